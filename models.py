"""The networks of the paper (section 4.3, Table 4) as rows of one table, their decoders (section 3.1, Table
2), and strict loading of weights.

Shapes are (B, C, D, H, W); comments give channels at full width f and the side as a fraction of the patch.
Parameter names are the official ones, so that published checkpoints load without a map.
"""

import difflib
from typing import NamedTuple

import torch
from torch import nn

from common import UserError, load_checkpoint


class Row(NamedTuple):
    family: str
    features: int  # f, channels at full resolution


ROWS = {
    "unet_demo": Row("unet", 8),  # not in the paper: for demonstrations and tests
    "unet_b": Row("unet", 32),
    "unet_xl": Row("unet", 64),
}


STEM = "encoder.in_conv.conv1.conv.weight"  # its shape alone depends on the input channels


class ConvNormAct(nn.Module):
    """Convolution 3^3, instance norm, leaky ReLU."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.InstanceNorm3d(channels_out, affine=True)

    def forward(self, x):
        return nn.functional.leaky_relu(self.norm(self.conv(x)), 0.01)


class Block(nn.Module):
    """Two of them; one in the light decoder."""

    def __init__(self, channels_in, channels_out, convolutions=2):
        super().__init__()
        self.conv1 = ConvNormAct(channels_in, channels_out)
        self.conv2 = ConvNormAct(channels_out, channels_out) if convolutions == 2 else nn.Identity()

    def forward(self, x):
        return self.conv2(self.conv1(x))


class UNetEncoder(nn.Module):
    """(B, C, s^3) -> five levels: f at s, 2f at s/2, 4f at s/4, 8f at s/8, 16f at s/16."""

    def __init__(self, channels, f):
        super().__init__()
        self.in_conv = Block(channels, f)
        self.encoder_conv1 = Block(f, 2 * f)
        self.encoder_conv2 = Block(2 * f, 4 * f)
        self.encoder_conv3 = Block(4 * f, 8 * f)
        self.encoder_conv4 = Block(8 * f, 16 * f)

    def forward(self, x):
        levels = [self.in_conv(x)]
        for block in (self.encoder_conv1, self.encoder_conv2, self.encoder_conv3, self.encoder_conv4):
            levels.append(block(nn.functional.max_pool3d(levels[-1], 2)))
        return levels


class UNetDecoder(nn.Module):
    """Five levels -> (B, channels, s^3). Light: one convolution a level (Table 2). Skips: concatenated [up,
    skip]."""

    def __init__(self, channels, f, light, skips):
        super().__init__()
        self.skips = skips
        wide, convolutions = 2 if skips else 1, 1 if light else 2
        self.upsample1 = nn.ConvTranspose3d(16 * f, 8 * f, 2, 2)
        self.decoder_conv1 = Block(8 * f * wide, 8 * f, convolutions)
        self.upsample2 = nn.ConvTranspose3d(8 * f, 4 * f, 2, 2)
        self.decoder_conv2 = Block(4 * f * wide, 4 * f, convolutions)
        self.upsample3 = nn.ConvTranspose3d(4 * f, 2 * f, 2, 2)
        self.decoder_conv3 = Block(2 * f * wide, 2 * f, convolutions)
        self.upsample4 = nn.ConvTranspose3d(2 * f, f, 2, 2)
        self.decoder_conv4 = Block(f * wide, f, convolutions)
        self.out_conv = nn.Conv3d(f, channels, 1)

    def forward(self, levels):
        *skips, x = levels
        for up, block in ((self.upsample1, self.decoder_conv1), (self.upsample2, self.decoder_conv2),
                          (self.upsample3, self.decoder_conv3), (self.upsample4, self.decoder_conv4)):
            x, skip = up(x), skips.pop()
            x = block(torch.cat([x, skip], 1) if self.skips else x)
        return self.out_conv(x)


class Network(nn.Module):
    """Encoder and a decoder: `rec_head` in pretraining, `pred_head` in segmentation. (B, C, D, H, W) -> the
    same grid."""

    size_multiple = 16  # of every side of the input: four times halved

    def __init__(self, encoder, rec_head=None, pred_head=None):
        super().__init__()
        self.encoder = encoder
        if rec_head is not None:
            self.rec_head = rec_head
        if pred_head is not None:
            self.pred_head = pred_head

    def forward(self, x):
        if any(side % self.size_multiple for side in x.shape[2:]):
            raise UserError(f"input {tuple(x.shape[2:])}: choose multiples of {self.size_multiple}")
        return (self.rec_head if hasattr(self, "rec_head") else self.pred_head)(self.encoder(x))


def build_model(name, task, in_channels=1, out_channels=1, decoder="light", skips=False, merge="legacy",
                features=None):
    """A row of ROWS for a task, on (B, in_channels, D, H, W) -> (B, out_channels, D, H, W).

    task: "pretrain", with the `decoder` light or standard (Table 2) and `skips` or none (section 3.1); or
    "segment", with the row's own decoder and skips (section 3.2). features: another width. UserError for an
    unknown name."""
    for value, known, what in ((name, ROWS, "model"), (task, ("pretrain", "segment"), "task"),
                               (decoder, ("light", "standard"), "decoder"),
                               (merge, ("legacy", "fixed"), "merge")):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            raise UserError(f"unknown {what} {value!r}: " + (f"did you mean {near[0]}? " if near else "")
                            + f"known are {', '.join(known)}")
    f = features or ROWS[name].features
    encoder = UNetEncoder(in_channels, f)
    if task == "pretrain":
        return Network(encoder, rec_head=UNetDecoder(out_channels, f, decoder == "light", skips))
    return Network(encoder, pred_head=UNetDecoder(out_channels, f, light=False, skips=True))


def check_patch(model, size, device, precision):
    """UserError unless the model takes patches of this side: a multiple of size_multiple, and at least two of
    them, since instance norm needs more than one voxel at the coarsest level.

    Three on a CPU in bf16: oneDNN's weight gradient of a 3^3 convolution over 2^3 voxels is not finite there
    (torch 2.13)."""
    levels = 3 if device.type == "cpu" and precision == "bf16" else 2
    if size % model.size_multiple or size < levels * model.size_multiple:
        raise UserError(f"patch_size {size}: choose a multiple of {model.size_multiple}, at least {levels} "
                        "times that" + " in bf16 on a CPU" * (levels == 3))


# -------------------------------------------------------------------------------------------- loading weights
class Report(NamedTuple):
    """What load_weights did with each tensor of the model, and what it left unread in the file."""
    part: str
    taken: list
    reshaped: list
    new: list
    unused: list

    def __str__(self):
        arrived = len(self.taken) + len(self.reshaped)  # load_weights raises unless that is all of them
        lines = [f"  {what:<9} {len(names):>4}  {names[0] + ' ...' if names else ''}"
                 for what, names in (("taken", self.taken), ("reshaped", self.reshaped), ("new", self.new),
                                     ("unused", self.unused))]
        return "\n".join(lines + [f"{self.part}: all {arrived} tensors taken (100 %)"])


def bare_names(checkpoint):
    """The tensors of a checkpoint by their bare names: ours ({"model": ...}), Lightning's ({"state_dict":
    ...}), or a flat dict; the prefixes module., model. and _orig_mod. stripped in any order."""
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    bare = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        while name.startswith(("module.", "model.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if isinstance(tensor, torch.Tensor):
            bare[name] = tensor
    return bare


def load_weights(model, path, part="encoder"):
    """Copy weights into the model and report on every tensor; nothing is ever left out silently.

    path: a file, or a checkpoint already read. part: "encoder", each of whose tensors must be there (the rest
    of the model stays new), or "all". The first convolution may have had fewer input channels: its weights
    are then repeated and divided by their number, so that repeated input gives the same output. UserError
    names what does not fit."""
    checkpoint = path if isinstance(path, dict) else load_checkpoint(path)
    found, own = bare_names(checkpoint), model.state_dict()
    wanted = [name for name in own if part == "all" or name.startswith("encoder.")]
    taken, reshaped, wrong = [], [], []
    for name in wanted:
        tensor, target = found.get(name), own[name]
        if tensor is not None and tensor.shape == target.shape:
            own[name] = tensor
            taken.append(name)
        elif tensor is not None and name == STEM and tensor.shape[:1] + tensor.shape[2:] == \
                target.shape[:1] + target.shape[2:] and target.shape[1] % tensor.shape[1] == 0:
            repeats = target.shape[1] // tensor.shape[1]
            own[name] = tensor.repeat(1, repeats, 1, 1, 1) / repeats
            reshaped.append(name)
        else:
            shape = "missing" if tensor is None else tuple(tensor.shape)
            wrong.append(f"{name} is {shape}, not {tuple(target.shape)}")
    if wrong:
        whose = f" of a {checkpoint['row']}" if "row" in checkpoint else ""
        raise UserError(f"the checkpoint{whose} does not fit: of {len(wanted)} {part} tensors {len(wrong)} "
                        f"are missing or of another shape; {'; '.join(wrong[:2])}")
    model.load_state_dict(own)
    new, unused = [n for n in own if n not in wanted], [n for n in found if n not in wanted]
    return Report(part, taken, reshaped, new, unused)
