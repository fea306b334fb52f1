"""The baseline: SwinUNETR, in MONAI's names, and its pretraining [23] (section 4.3, Appendix D)."""

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import resample
from config import UserError

WINDOW = 7  # tokens a side

# Order of the eight sub-lattices in patch merging. The state dicts do not tell the two apart.
MERGE = {
    "fixed": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1),
              (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    # MONAI up to 1.4, so the weights of [23] and the paper's run: two twice, two not at all.
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1),
               (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}


def under(name, module):
    """The module under one more name, as MONAI has it: `conv1.conv.weight`."""
    return nn.Sequential(OrderedDict([(name, module)]))


# ---------------------------------------------------------------------------------- the transformer
class WindowAttention(nn.Module):
    """Self-attention inside windows of up to 7^3 tokens, with a learned bias for each offset
    between two tokens: (windows, n, d) -> (windows, n, d)."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

        # The row of the table for each pair of tokens: their offset on three axes as one number.
        position = torch.cartesian_prod(*[torch.arange(WINDOW)] * 3)
        offset = position[:, None] - position + WINDOW - 1
        strides = torch.tensor([(2 * WINDOW - 1) ** 2, 2 * WINDOW - 1, 1])
        self.register_buffer("relative_position_index", (offset * strides).sum(-1))

        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x, mask):
        # Queries, keys and values of each head: (windows, heads, n, channels of a head).
        windows, n, d = x.shape
        qkv = self.qkv(x).view(windows, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)

        y = self.mix(q, k, v, mask)
        return self.proj(y.transpose(1, 2).reshape(windows, n, d))

    def mix(self, q, k, v, mask):
        """The mean of v, weighted by the softmax of the scores: (windows, heads, n, channels)."""
        bias = self.pair_bias(q.shape[2], mask).to(q.dtype)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        # The bias differs between the windows of a sample. Sample by sample, it is not repeated.
        windows = len(mask)
        samples = zip(q.split(windows), k.split(windows), v.split(windows), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*sample, attn_mask=bias)
                          for sample in samples])

    def pair_bias(self, n, mask):
        """What is added to the scores: (1, heads, n, n), with a mask (its windows, heads, n, n)."""
        # As in MONAI, smaller windows take a corner of the index, though they lie otherwise.
        index = self.relative_position_index[:n, :n]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)[None]
        return bias if mask is None else bias + mask[:, None]


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on (B, D, H, W, d).

    Every second block shifts its windows by 3 tokens on the axes that are longer than a window."""

    def __init__(self, d, heads, shifted):
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(d)
        self.attn = WindowAttention(d, heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(OrderedDict(linear1=nn.Linear(d, 4 * d), act=nn.GELU(),
                                             linear2=nn.Linear(4 * d, d)))

    def forward(self, x):
        x = x + self.attend_in_windows(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend_in_windows(self, x):
        """Attention in the windows of a grid (B, D, H, W, d) -> the same shape."""
        size = x.shape[1:4]
        window = [min(side, WINDOW) for side in size]
        shift = [WINDOW // 2 if self.shifted and side > WINDOW else 0 for side in size]

        # Fill up to whole windows. The padding tokens take part, as in MONAI.
        pad = [-s % w for s, w in zip(size, window, strict=True)]
        x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))

        # Shift cyclically, and hide from each other what this brings together.
        mask = None
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
            mask = shift_mask(x.shape[1:4], window, shift, x.device)

        y = self.attn(windows_of(x, window), mask)

        # Undo the three steps.
        y = grid_of(y, x.shape, window)
        if any(shift):
            y = y.roll(shift, (1, 2, 3))
        return y[:, :size[0], :size[1], :size[2]]


def windows_of(x, window):
    """(B, D, H, W, d) -> (B * windows, tokens, d), both in raster order."""
    # Each axis is cut into windows. The last one comes first: it does not move the others.
    for axis in (3, 2, 1):
        x = x.unflatten(axis, (-1, window[axis - 1]))
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.flatten(0, 3).flatten(1, 3)


def grid_of(x, shape, window):
    """The inverse of windows_of: (B * windows, tokens, d) -> shape, which is (B, D, H, W, d)."""
    b, *size, d = shape
    windows = [side // w for side, w in zip(size, window, strict=True)]
    x = x.view(b, *windows, *window, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def shift_mask(size, window, shift, device):
    """(windows, n, n): -100 between tokens that the shift has joined across a border, else 0."""
    # Number the regions whose tokens belong together. There are three on each axis: what lies
    # before the last window, the last window's own tokens, and those from the opposite border.
    region = torch.zeros(size, device=device)
    for axis, side in enumerate(size):
        i = torch.arange(side, device=device)
        label = (i >= side - window[axis]).float() + (i >= side - shift[axis]).float()
        region = 3 * region + resample.along_axis(label, axis)

    region = windows_of(region[None, ..., None], window)
    return -100.0 * (region != region.transpose(1, 2)).float()


class PatchMerging(nn.Module):
    """Halves the grid: eight neighbours side by side, normalised, reduced to twice the channels."""

    def __init__(self, d, merge):
        super().__init__()
        self.order = MERGE[merge]
        self.reduction = nn.Linear(8 * d, 2 * d, bias=False)
        self.norm = nn.LayerNorm(8 * d)

    def forward(self, x):
        # Each sub-lattice holds one of the eight neighbours.
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.order], -1)
        return self.reduction(self.norm(x))


def swin_stage(d, heads, merge):
    """Two blocks and a merging: (B, D, H, W, d) -> (B, D/2, H/2, W/2, 2d)."""
    blocks = nn.Sequential(SwinBlock(d, heads, False), SwinBlock(d, heads, True))
    return nn.Sequential(OrderedDict(blocks=blocks, downsample=PatchMerging(d, merge)))


class SwinEncoder(nn.Module):
    """(B, C, s, s, s) -> five hidden states, normalised over channels: f at the side s/2, 2f at
    s/4, ..., 16f at s/32."""

    def __init__(self, channels, f, merge):
        super().__init__()
        if f % 16:
            raise UserError(f"features {f}: SwinUNETR needs a multiple of 16, the channels of a "
                            "head")
        heads = f // 16  # of the first stage; 16 channels a head at every stage
        self.patch_embed = under("proj", nn.Conv3d(channels, f, 2, 2))
        self.layers1 = nn.Sequential(swin_stage(f, heads, merge))
        self.layers2 = nn.Sequential(swin_stage(2 * f, 2 * heads, merge))
        self.layers3 = nn.Sequential(swin_stage(4 * f, 4 * heads, merge))
        self.layers4 = nn.Sequential(swin_stage(8 * f, 8 * heads, merge))

    def forward(self, x):
        # The transformer has the channels last.
        states = [self.patch_embed(x).movedim(1, -1)]
        for stage in (self.layers1, self.layers2, self.layers3, self.layers4):
            states.append(stage(states[-1]))
        return [F.layer_norm(state, state.shape[-1:]).movedim(-1, 1) for state in states]


# ------------------------------------------------------------------------------------- the networks
class ResidualBlock(nn.Module):
    """Two 3^3 convolutions with instance norm and leaky ReLU, and a shortcut around them."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv1 = under("conv", nn.Conv3d(channels_in, channels_out, 3, padding=1, bias=False))
        self.conv2 = under("conv", nn.Conv3d(channels_out, channels_out, 3, padding=1, bias=False))
        self.norm = nn.InstanceNorm3d(channels_out)  # without parameters, so one serves all
        self.act = nn.LeakyReLU(0.01)
        self.conv3 = None
        if channels_in != channels_out:
            self.conv3 = under("conv", nn.Conv3d(channels_in, channels_out, 1, bias=False))

    def forward(self, x):
        y = self.act(self.norm(self.conv1(x)))
        y = self.norm(self.conv2(y))

        # The shortcut is a convolution where the number of channels changes.
        if self.conv3 is not None:
            x = self.norm(self.conv3(x))
        return self.act(y + x)


class SwinUpBlock(nn.Module):
    """Transposed convolution, concatenation with the skip, residual block."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        up = nn.ConvTranspose3d(channels_in, channels_out, 2, 2, bias=False)
        self.transp_conv = under("conv", up)
        self.conv_block = ResidualBlock(2 * channels_out, channels_out)

    def forward(self, x, skip):
        return self.conv_block(torch.cat([self.transp_conv(x), skip], 1))


class SwinNetwork(nn.Module):
    """A network on the encoder swinViT, which halves the side of its input five times."""
    size_multiple = 32
    encoder_prefix = "swinViT."


class SwinUNETR(SwinNetwork):
    """Segmentation network of [23]: (B, C, s, s, s) -> (B, channels_out, s, s, s).

    Only swinViT, 8 of its 62 million parameters, is ever pretrained."""

    def __init__(self, channels_in, channels_out, f, merge):
        super().__init__()
        self.swinViT = SwinEncoder(channels_in, f, merge)
        self.encoder1 = under("layer", ResidualBlock(channels_in, f))
        self.encoder2 = under("layer", ResidualBlock(f, f))
        self.encoder3 = under("layer", ResidualBlock(2 * f, 2 * f))
        self.encoder4 = under("layer", ResidualBlock(4 * f, 4 * f))
        self.encoder10 = under("layer", ResidualBlock(16 * f, 16 * f))
        self.decoder5 = SwinUpBlock(16 * f, 8 * f)
        self.decoder4 = SwinUpBlock(8 * f, 4 * f)
        self.decoder3 = SwinUpBlock(4 * f, 2 * f)
        self.decoder2 = SwinUpBlock(2 * f, f)
        self.decoder1 = SwinUpBlock(f, f)
        self.out = under("conv", under("conv", nn.Conv3d(f, channels_out, 1)))

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        h0, h1, h2, h3, h4 = self.swinViT(x)

        # From the coarsest state up; all skips but h3 pass a block of their own.
        y = self.decoder5(self.encoder10(h4), h3)
        y = self.decoder4(y, self.encoder4(h2))
        y = self.decoder3(y, self.encoder3(h1))
        y = self.decoder2(y, self.encoder2(h0))
        return self.out(self.decoder1(y, self.encoder1(x)))


class SwinHeads(SwinNetwork):
    """Pretraining network of [23]: (B, C, s, s, s) -> rotation logits (B, 4), contrastive vectors
    (B, 512), reconstruction (B, C, s, s, s)."""

    def __init__(self, channels, f, merge):
        super().__init__()
        self.swinViT = SwinEncoder(channels, f, merge)
        self.rotation_head = nn.Linear(16 * f, 4)
        self.contrastive_head = nn.Linear(16 * f, 512)

        # Doubles the side five times, from s/32 to s.
        layers = []
        for wide, narrow in ((16 * f, 8 * f), (8 * f, 4 * f), (4 * f, 2 * f), (2 * f, f), (f, f)):
            layers += [nn.Conv3d(wide, narrow, 3, padding=1), nn.InstanceNorm3d(narrow),
                       nn.LeakyReLU(0.01), nn.Upsample(scale_factor=2, mode="trilinear")]
        self.conv = nn.Sequential(*layers, nn.Conv3d(f, channels, 1))

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        h4 = self.swinViT(x)[-1]

        # Rotation and contrast read one corner token each: [23] pools nothing.
        tokens = h4.flatten(2)
        rotation = self.rotation_head(tokens[..., 0])
        contrast = self.contrastive_head(tokens[..., 1])
        return rotation, contrast, self.conv(h4)


class SwinReconstruction(SwinNetwork):
    """AMAES on the SwinUNETR encoder, which the paper leaves open: the decoder of section 3.1 takes
    the hidden states, and its last convolution undoes the patch embedding."""

    def __init__(self, encoder, rec_head):
        super().__init__()
        self.swinViT = encoder
        self.rec_head = rec_head

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        return self.rec_head(self.swinViT(x))


def check_multiple(x, multiple):
    """UserError unless every side of (B, C, D, H, W) is a multiple."""
    if any(side % multiple for side in x.shape[2:]):
        raise UserError(f"input {tuple(x.shape[2:])}: choose multiples of {multiple}")


# -------------------------------------------------------------------------- the pretraining of [23]
class Views(NamedTuple):
    image: torch.Tensor  # (2B, C, D, H, W): what the network sees, all first views, then all second
    target: torch.Tensor  # (2B, C, D, H, W): the same, not cut
    turns: torch.Tensor  # (2B,): by how many quarter turns each is rotated, 0 to 3


def make_views(patches, seeds, share):
    """Two views of each patch (B, C, D, H, W), by swin_view. seeds: for each view, one a sample."""
    first, second = (swin_view(patches, view_seeds, share) for view_seeds in seeds)
    rotated, cut, turns = (torch.cat(pair) for pair in zip(first, second, strict=True))
    return Views(cut, rotated, turns)


def swin_view(target, seeds, share):
    """One view of each sample (B, C, D, H, W): rotated and cut, with one seed a sample.

    Each is rotated by k * 90 degrees about the first axis. Then boxes of it are filled with noise
    in [0, 1], and others with what lies there in another sample of the batch, which is drawn. One
    that comes earlier in the batch is cut already, as in [23], whose loop works in place.
    -> rotated and cut, both (B, C, D, H, W), and k, (B,)"""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    turns = [int(rng.integers(4)) for rng in rngs]
    rotated = torch.stack([torch.rot90(x, k, (2, 3)) for x, k in zip(target, turns, strict=True)])

    cut = rotated.clone()
    for image, rng in zip(cut, rngs, strict=True):
        # Noise, stretched to [0, 1] within each box.
        noise_seed = int(rng.integers(2 ** 62))
        generator = torch.Generator(image.device).manual_seed(noise_seed)
        for box in cut_boxes(rng, image.shape[1:], share):
            part = image[(slice(None), *box)]
            noise = torch.empty_like(part).normal_(generator=generator)
            spread = (noise.max() - noise.min()).clamp(min=1e-12)
            part.copy_((noise - noise.min()) / spread)

        # Boxes of another sample. If the sample itself is drawn, this changes nothing.
        other = int(rng.integers(len(cut)))
        for box in cut_boxes(rng, image.shape[1:], share):
            image[(slice(None), *box)] = cut[(other, slice(None), *box)]
    return rotated, cut, resample.upload(torch.tensor(turns), target.device)


def cut_boxes(rng, shape, share):
    """Random boxes of a patch of this shape, (D, H, W), as tuples of slices.

    They are drawn until their volumes sum to U(0, share) of the patch. A side is 5 to 25 % of the
    patch's, and ends at its border: the paper's "mask ratio 0.3" hides 14 % on average."""
    target = rng.uniform(0, share) * math.prod(shape)
    volume = 0
    boxes = []
    while volume < target:
        box = []
        for side in shape:
            # It may begin anywhere but in the last 5 %.
            start = int(rng.integers(0, side - int(0.05 * side)))
            extent = int(rng.integers(int(0.05 * side), int(0.25 * side)))
            box.append(slice(start, min(side, start + extent)))
        boxes.append(tuple(box))
        volume += math.prod(part.stop - part.start for part in box)
    return boxes


def losses(outputs, views):
    """The three losses of [23], which are summed without weights: (3,).

    Rotation: which of the four quarter turns. Contrast: the two views of a sample belong together.
    L1: the views as they were before they were cut. Pasting and contrast are among the samples that
    a process holds at once, as in [23]."""
    rotation, vectors, reconstruction = outputs
    dtype = views.target.dtype
    return torch.stack([
        F.cross_entropy(rotation.to(dtype), views.turns),
        contrastive_loss(vectors),
        (reconstruction.to(dtype) - views.target).abs().mean()])


def contrastive_loss(vectors, temperature=0.5):
    """NT-Xent of vectors (2B, d), the first views of B samples and their second: 0 if B is 1."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    vectors = F.normalize(vectors.to(dtype), dim=1)

    # Each vector must find its partner, B places away, among all vectors but itself.
    similarity = (vectors @ vectors.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(vectors), device=vectors.device).roll(len(vectors) // 2)
    return F.cross_entropy(similarity, partner)


@torch.no_grad()
def loss_sums(three, samples):
    """Sums for the log, (4,): each of the three losses times the number of samples; that number."""
    return torch.cat([three, three.new_ones(1)]) * samples


def losses_from_sums(sums):
    """loss_sums, added up -> the numbers of a log line: means over samples."""
    rotation, contrast, l1 = (sums[:3] / sums[3]).tolist()
    return {"loss": rotation + contrast + l1, "rotation": rotation, "contrast": contrast, "l1": l1}
