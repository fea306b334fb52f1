"""The networks of the paper (section 4.3, Table 4) as rows of one table, their decoders (3.1, Table 2).

Shapes are (B, C, D, H, W); comments give channels at full width f and the side as a fraction of the patch.
Parameter names are the official ones, so that published checkpoints load without a map.
"""

import difflib
import functools
import itertools
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import forms
import swin
from config import UserError


class Row(NamedTuple):
    family: str  # unet, mednext or swin
    features: int  # f, channels of the first level
    blocks: tuple = ()  # MedNeXt: blocks of each of the five levels
    expansion: tuple = ()  # MedNeXt: channel expansion inside them
    decoder: str = "unet"  # of segmentation: unet or mednext; SwinUNETR has its own


M = ((3, 4, 4, 4, 4), (2, 3, 4, 4, 4))

L = ((3, 4, 8, 8, 8), (3, 4, 8, 8, 8))

ROWS = {
    "unet_demo": Row("unet", 8),  # not in the paper: for demonstrations and tests
    "unet_b": Row("unet", 32),
    "unet_xl": Row("unet", 64),
    "mednext_m": Row("mednext", 32, *M),
    "mednext_l": Row("mednext", 32, *L),
    "mednext_l_mednextdec": Row("mednext", 32, *L, decoder="mednext"),
    "swinunetr": Row("swin", 48),
}

# A guess, until bench/gpu.py has measured it on a GPU.
SHIFTS_ON_CUDA = False  # MedNeXt's depthwise convolutions as 27 shifted products; False: cuDNN's


# ------------------------------------------------------------------------------------------ U-Net, B and XL
class ConvNormAct(nn.Module):
    """Convolution 3^3, instance norm, leaky ReLU."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.InstanceNorm3d(channels_out, affine=True)

    def forward(self, x):
        y = self.conv(forms.quick_format(x))
        return forms.instance_norm(y, self.norm.weight, self.norm.bias, slope=0.01)


def upsample(x, up):
    """A transposed convolution whose stride is its kernel's size. Channels-last, it is one matrix product,
    whose columns are then put in their places."""
    if x.is_contiguous():
        return up(x)
    (b, _, *size), k, c = x.shape, up.stride[0], up.out_channels
    y = nn.functional.linear(x.movedim(1, -1), up.weight.permute(2, 3, 4, 1, 0).flatten(0, 3),
                             up.bias.repeat(k ** 3))
    y = y.view(b, *size, k, k, k, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return y.reshape(b, *(k * side for side in size), c).movedim(-1, 1)


class Block(nn.Module):
    """Two ConvNormAct; one in the light decoder (Table 2)."""

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
            # max_pool3d itself would run in float32 under autocast.
            pooled, _ = nn.functional.max_pool3d_with_indices(levels[-1], 2)
            levels.append(block(pooled))
        return levels


class UNetDecoder(nn.Module):
    """Five levels -> (B, channels, s^3). Light: one convolution a level (Table 2). Skips: concatenated [up,
    skip]. stem: stride of the encoder's first convolution, undone at the end; 1 but for Swin."""

    def __init__(self, channels, f, light, skips, stem=1):
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
        self.out_conv = nn.ConvTranspose3d(f, channels, stem, stem) if stem > 1 else nn.Conv3d(f, channels, 1)

    def forward(self, levels):
        *skips, x = levels
        for up, block in ((self.upsample1, self.decoder_conv1), (self.upsample2, self.decoder_conv2),
                          (self.upsample3, self.decoder_conv3), (self.upsample4, self.decoder_conv4)):
            x, skip = upsample(x, up), skips.pop()
            x = block(torch.cat([x, skip], 1) if self.skips else x)
        return self.out_conv(x)


# --------------------------------------------------------------------- MedNeXt, M and L, kernel 3 (no UpKern)
def channels_first(x):
    """x.contiguous(), slow for channels-last volumes on a CPU: there a transposed matrix for each sample."""
    if x.is_contiguous() or x.device.type != "cpu":
        return x.contiguous()
    return torch.stack([sample.t().contiguous() for sample in x.movedim(1, -1).flatten(1, 3)]).view(x.shape)


class DepthwiseConv(torch.autograd.Function):
    """3^3 depthwise convolution of a channels-last tensor on a CPU, with quicker gradients than oneDNN's: the
    input's is the convolution with the mirrored kernel, the kernel's comes from matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return nn.functional.conv3d(x, weight, bias, padding=1, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        kernel = weight.to(grad.dtype).flip(2, 3, 4)
        grad_x = nn.functional.conv3d(grad, kernel, padding=1, groups=len(weight))
        grad_weight = kernel_gradient(channels_first(x.to(grad.dtype)), channels_first(grad))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad.sum((0, 2, 3, 4)).to(weight.dtype)


def kernel_gradient(x, grad, b=8):
    """Gradient (C, 1, 3, 3, 3) of a depthwise kernel: for each of 27 offsets, the sum over voxels v of
    grad[v] * x[v + offset]. x, grad: (B, C, D, H, W).

    The planes are cut into blocks of b^2 voxels. The products of all voxels of a block with all of the block
    and its rim are one matrix product for all blocks; the sums wanted lie on its diagonals."""
    channels, depth, tail = x.shape[1], x.shape[2], [-x.shape[4] % b, -x.shape[3] % b]
    x = nn.functional.pad(x, (1, 1 + tail[0], 1, 1 + tail[1], 1, 1))
    grad = nn.functional.pad(grad, (0, tail[0], 0, tail[1])) if any(tail) else grad
    rims = x.unfold(3, b + 2, b).unfold(4, b + 2, b).permute(1, 2, 0, 3, 4, 5, 6)
    rims = rims.reshape(channels, depth + 2, -1, (b + 2) ** 2)
    blocks = grad.unfold(3, b, b).unfold(4, b, b).permute(1, 2, 0, 3, 4, 5, 6).reshape(channels, -1, b * b)
    sums = []
    for i in range(3):
        products = rims[:, i:i + depth].flatten(1, 2).transpose(1, 2) @ blocks
        products = products.view(channels, b + 2, b + 2, b, b)
        sums += [products[:, j:j + b, k:k + b].diagonal(0, 1, 3).diagonal(0, 1, 2).sum((1, 2))
                 for j in range(3) for k in range(3)]
    return torch.stack(sums, 1).view(channels, 1, 3, 3, 3)


def depthwise_shifts(x, weight, bias):
    """3^3 depthwise convolution as a sum of 27 shifted products, which a compiler makes one kernel of."""
    depth, height, width = x.shape[2:]
    padded = nn.functional.pad(x, (1,) * 6)
    y = bias.view(-1, 1, 1, 1)
    for i, j, k in itertools.product(range(3), repeat=3):
        part = padded[:, :, i:i + depth, j:j + height, k:k + width]
        y = y + part * weight[:, :, i, j, k, None, None]
    return y.to(x.dtype)


class MedNeXtBlock(nn.Module):
    """Depthwise 3^3, group norm with a group a channel, 1^3 expansion, GELU, 1^3 compression; residual.

    stride 2 halves the grid and up doubles it; the residual then is a convolution too. A transposed
    convolution gives 2n - 1 voxels: a plane of zeros is put before them on each axis, as in the official
    code."""

    def __init__(self, channels_in, channels_out, expansion, stride=1, up=False):
        super().__init__()
        self.stride, self.up = stride, up
        convolution = nn.ConvTranspose3d if up else nn.Conv3d
        self.conv1 = convolution(channels_in, channels_in, 3, stride, padding=1, groups=channels_in)
        self.norm = nn.GroupNorm(channels_in, channels_in)
        self.conv2 = nn.Conv3d(channels_in, channels_in * expansion, 1)
        self.conv3 = nn.Conv3d(channels_in * expansion, channels_out, 1)
        if stride == 2:
            self.res_conv = convolution(channels_in, channels_out, 1, stride)

    def forward(self, x):
        y = self.branch_cpu(x) if forms.on_cpu(x) else self.branch(x)
        y = y + (x if self.stride == 1 else self.res_conv(x))
        return nn.functional.pad(y, (1, 0, 1, 0, 1, 0)) if self.up else y

    def branch(self, x):
        shifts = SHIFTS_ON_CUDA and self.stride == 1
        y = depthwise_shifts(x, self.conv1.weight, self.conv1.bias) if shifts else self.conv1(x)
        y = forms.instance_norm(y, self.norm.weight, self.norm.bias)  # a group norm with one channel a group
        return self.conv3(nn.functional.gelu(self.conv2(y)))

    def branch_cpu(self, x):
        """The same in channels-last order, where a 1^3 convolution is a matrix product; the norm's scale goes
        into the matrix of the expansion. bench/models.py says what it gains."""
        if self.stride == 1:
            y = DepthwiseConv.apply(x, self.conv1.weight, self.conv1.bias)
        else:
            y = self.conv1(x)
        v = y.movedim(1, -1).flatten(1, 3)  # (B, voxels, C)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        v = v - v.mean(1, keepdim=True)
        scale = self.norm.weight * (v.square().mean(1) + self.norm.eps).rsqrt()
        expand = self.conv2.weight.flatten(1)
        bias = (expand * self.norm.bias).sum(1) + self.conv2.bias
        h = torch.baddbmm(bias, v, (expand * scale.unsqueeze(1)).transpose(1, 2))
        h = nn.functional.linear(nn.functional.gelu(h), self.conv3.weight.flatten(1), self.conv3.bias)
        return h.unflatten(1, y.shape[2:]).movedim(-1, 1)


def mednext_level(channels, blocks, expansion):
    return nn.Sequential(*(MedNeXtBlock(channels, channels, expansion) for _ in range(blocks)))


class MedNeXtEncoder(nn.Module):
    """(B, C, s^3) -> five levels, as the U-Net's: f at s, ..., 16f at s/16."""

    def __init__(self, channels, f, blocks, expansion):
        super().__init__()
        self.stem = nn.Conv3d(channels, f, 1)
        self.enc_block_0 = mednext_level(f, blocks[0], expansion[0])
        self.down_0 = MedNeXtBlock(f, 2 * f, expansion[1], stride=2)
        self.enc_block_1 = mednext_level(2 * f, blocks[1], expansion[1])
        self.down_1 = MedNeXtBlock(2 * f, 4 * f, expansion[2], stride=2)
        self.enc_block_2 = mednext_level(4 * f, blocks[2], expansion[2])
        self.down_2 = MedNeXtBlock(4 * f, 8 * f, expansion[3], stride=2)
        self.enc_block_3 = mednext_level(8 * f, blocks[3], expansion[3])
        self.down_3 = MedNeXtBlock(8 * f, 16 * f, expansion[4], stride=2)
        self.bottleneck = mednext_level(16 * f, blocks[4], expansion[4])

    def forward(self, x):
        levels = [self.enc_block_0(self.stem(forms.quick_format(x)))]
        for down, level in ((self.down_0, self.enc_block_1), (self.down_1, self.enc_block_2),
                            (self.down_2, self.enc_block_3), (self.down_3, self.bottleneck)):
            levels.append(level(down(levels[-1])))
        return levels


class MedNeXtDecoder(nn.Module):
    """MedNeXt's own decoder (Table 4, "MedNeXt dec"): five levels -> (B, channels, s^3). Skips are added."""

    def __init__(self, channels, f, blocks, expansion):
        super().__init__()
        self.up_3 = MedNeXtBlock(16 * f, 8 * f, expansion[3], stride=2, up=True)
        self.dec_block_3 = mednext_level(8 * f, blocks[3], expansion[3])
        self.up_2 = MedNeXtBlock(8 * f, 4 * f, expansion[2], stride=2, up=True)
        self.dec_block_2 = mednext_level(4 * f, blocks[2], expansion[2])
        self.up_1 = MedNeXtBlock(4 * f, 2 * f, expansion[1], stride=2, up=True)
        self.dec_block_1 = mednext_level(2 * f, blocks[1], expansion[1])
        self.up_0 = MedNeXtBlock(2 * f, f, expansion[0], stride=2, up=True)
        self.dec_block_0 = mednext_level(f, blocks[0], expansion[0])
        self.out_0 = nn.Sequential(OrderedDict(conv_out=nn.ConvTranspose3d(f, channels, 1)))

    def forward(self, levels):
        *skips, x = levels
        for up, level in ((self.up_3, self.dec_block_3), (self.up_2, self.dec_block_2),
                          (self.up_1, self.dec_block_1), (self.up_0, self.dec_block_0)):
            x = level(up(x) + skips.pop())
        return self.out_0(x)


# --------------------------------------------------------------------------------------------------- networks
class Network(nn.Module):
    """Encoder and a decoder: `rec_head` in pretraining, `pred_head` in segmentation. (B, C, D, H, W) -> the
    same grid."""

    size_multiple, encoder_prefix = 16, "encoder."  # every side is four times halved

    def __init__(self, encoder, rec_head=None, pred_head=None):
        super().__init__()
        self.encoder, self.rec_head, self.pred_head = encoder, rec_head, pred_head

    def forward(self, x):
        swin.check_multiple(x, self.size_multiple)
        return (self.pred_head if self.rec_head is None else self.rec_head)(self.encoder(x))


def build_model(name, task, in_channels=1, out_channels=1, decoder="light", skips=False, merge="legacy",
                features=None):
    """A row of ROWS for a task, on (B, in_channels, D, H, W) -> (B, out_channels, D, H, W).

    task: "pretrain", with the `decoder` light or standard (Table 2) and `skips` or none (section 3.1);
    "segment", with the row's own decoder and skips (section 3.2); or "swin", SwinUNETR's encoder under the
    three heads of [23]. merge: SwinUNETR's patch merging, legacy as the paper's MONAI 1.3.2 had it or fixed
    as MONAI >= 1.5 has it. features: another width f. UserError for an unknown name."""
    for value, known, what in ((name, ROWS, "model"), (task, ("pretrain", "segment", "swin"), "task"),
                               (decoder, ("light", "standard"), "decoder"), (merge, swin.MERGE, "merge")):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            raise UserError(f"unknown {what} {value!r}: " + (f"did you mean {near[0]}? " if near else "")
                            + f"known are {', '.join(known)}")
    row = ROWS[name]
    f = features or row.features
    if row.family == "swin" and f % 16:
        raise UserError(f"features {f}: SwinUNETR needs a multiple of 16, the channels of a head")
    if task == "swin":
        if row.family != "swin":
            raise UserError(f"objective swin pretrains swinunetr, not {name}")
        return swin.SwinHeads(in_channels, f, merge)
    if row.family == "swin":
        if task == "segment":
            return swin.SwinUNETR(in_channels, out_channels, f, merge)
        return swin.SwinReconstruction(swin.SwinEncoder(in_channels, f, merge),
                                  UNetDecoder(out_channels, f, decoder == "light", skips, stem=2))
    encoder = (UNetEncoder(in_channels, f) if row.family == "unet"
               else MedNeXtEncoder(in_channels, f, row.blocks, row.expansion))
    if task == "pretrain":
        return Network(encoder, rec_head=UNetDecoder(out_channels, f, decoder == "light", skips))
    if row.decoder == "mednext":
        return Network(encoder, pred_head=MedNeXtDecoder(out_channels, f, row.blocks, row.expansion))
    return Network(encoder, pred_head=UNetDecoder(out_channels, f, light=False, skips=True))


def recompute(model):
    """Activation checkpointing: every block makes its activations again in the backward pass instead of
    keeping them. The same results; bench/models.py has what it saves and what it costs."""
    for module in model.modules():
        if isinstance(module, (Block, MedNeXtBlock, swin.SwinBlock, swin.ResidualBlock)):
            module.forward = functools.partial(torch.utils.checkpoint.checkpoint, module.forward,
                                               use_reentrant=False, preserve_rng_state=False)


def contiguous_on_cuda(name):
    """Does a row convolve contiguous volumes on CUDA?"""
    return ROWS[name].family == "swin" or not forms.CHANNELS_LAST_ON_CUDA


class LargestTensor(TorchDispatchMode):
    """While it is on, `elements` is the size of the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@torch.no_grad()
def largest_tensor(model, x):
    """Elements of the largest tensor in a forward pass; on the device meta nothing is computed for it."""
    with LargestTensor() as largest:
        model(x)
    return largest.elements


def check_patch(model, size, device, precision):
    """UserError unless the model takes patches of this side: a multiple of size_multiple, and at least two of
    them, since instance norm needs more than one voxel at the coarsest level.

    Three on a CPU in bf16: oneDNN's weight gradient of a 3^3 convolution over 2^3 voxels is not finite there
    (torch 2.13)."""
    coarsest = 3 if device.type == "cpu" and precision == "bf16" else 2  # voxels a side
    if size % model.size_multiple or size < coarsest * model.size_multiple:
        raise UserError(f"patch_size {size}: choose a multiple of {model.size_multiple}, at least {coarsest} "
                        "times that" + " in bf16 on a CPU" * (coarsest == 3))
