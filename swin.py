"""The baseline: SwinUNETR, with the names of MONAI, and its pretraining [23] (section 4.3, Appendix D)."""

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import forms
import resample
from config import UserError

# Measured on a CPU, a guess on CUDA until bench/gpu.py has measured it.
SDPA = True  # attention as one kernel, on a CPU twice as quick; False: as matrix products

WINDOW = 7  # tokens a side

MERGE = {  # order of the eight sub-lattices in patch merging; the state dicts do not tell the two apart
    "fixed": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    # MONAI up to 1.4, so the weights of [23] and the paper's run: two of them twice, two not at all.
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}


class WindowAttention(nn.Module):
    """Self-attention inside windows of up to 7^3 tokens, (windows, n, d), with a learned bias for each offset
    between two tokens of a window."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        position = torch.cartesian_prod(*[torch.arange(WINDOW)] * 3)
        offset = position[:, None] - position + WINDOW - 1
        weights = torch.tensor([(2 * WINDOW - 1) ** 2, 2 * WINDOW - 1, 1])
        self.register_buffer("relative_position_index", (offset * weights).sum(-1))
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x, mask):
        windows, n, d = x.shape
        q, k, v = self.qkv(x).view(windows, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if SDPA and not forms.on_cpu(x):
            y = self.mix(q, k, v, mask)  # the kernel of CUDA keeps no n x n matrices for the backward pass
        else:
            # They are most of the memory: made again in the backward pass, not kept for it.
            y = torch.utils.checkpoint.checkpoint(self.mix, q, k, v, mask, use_reentrant=False,
                                                  preserve_rng_state=False)
        return self.proj(y.transpose(1, 2).reshape(windows, n, d))

    def mix(self, q, k, v, mask):
        """Softmax of scores, bias and mask, times v: (windows, heads, n, channels) -> the same."""
        n = q.shape[2]
        # A window under 7^3 takes the corner of the 7^3 index, though its tokens lie otherwise: MONAI's way.
        bias = self.relative_position_bias_table[self.relative_position_index[:n, :n]].permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None]
        if SDPA:
            return attend(q, k, v, bias.to(q.dtype))
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        scores = scores.unflatten(0, (-1, len(bias))) + bias
        return scores.softmax(-1).to(v.dtype).flatten(0, 1) @ v


def attend(q, k, v, bias):
    """torch's attention on (windows, heads, n, channels). bias, added to the scores: (1, heads, n, n), or one
    for each window of a sample; then sample by sample, so that it is not repeated in memory."""
    if len(bias) == 1:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    samples = zip(*(part.split(len(bias)) for part in (q, k, v)), strict=True)
    return torch.cat([nn.functional.scaled_dot_product_attention(*sample, attn_mask=bias)
                      for sample in samples])


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on (B, D, H, W, d). Every second block shifts its
    windows by 3 tokens on the axes that are longer than a window."""

    def __init__(self, d, heads, shifted):
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(d)
        self.attn = WindowAttention(d, heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(OrderedDict(linear1=nn.Linear(d, 4 * d), act=nn.GELU(),
                                             linear2=nn.Linear(4 * d, d)))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x):
        size = x.shape[1:4]
        window = [min(s, WINDOW) for s in size]
        shift = [WINDOW // 2 if self.shifted and s > WINDOW else 0 for s in size]
        pad = [-s % w for s, w in zip(size, window, strict=True)]  # padding tokens take part, as in MONAI
        x = nn.functional.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
        padded, mask = x.shape[1:4], None
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
            mask = shift_mask(padded, window, shift, x.device)
        y = self.attn(windows_of(x, window), mask)
        y = grid_of(y, x.shape, window)
        if any(shift):
            y = y.roll(shift, (1, 2, 3))
        return y[:, :size[0], :size[1], :size[2]]


def windows_of(x, window):
    """(B, D, H, W, d) -> (B * windows, tokens, d), both in raster order."""
    (b, *size, d), (i, j, k) = x.shape, window
    x = x.view(b, size[0] // i, i, size[1] // j, j, size[2] // k, k, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, i * j * k, d)


def grid_of(x, shape, window):
    """The inverse of windows_of."""
    (b, *size, d), (i, j, k) = shape, window
    x = x.view(b, size[0] // i, size[1] // j, size[2] // k, i, j, k, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def shift_mask(size, window, shift, device):
    """(windows, n, n): -100 between tokens that the cyclic shift brought together from opposite borders."""
    region = torch.zeros(1, *size, 1, device=device)
    for axis, (p, w, s) in enumerate(zip(size, window, shift, strict=True)):
        if s:
            i = torch.arange(p, device=device)
            label = (i >= p - w).float() + (i >= p - s).float()
            region = 3 * region + label.view([-1 if a == axis + 1 else 1 for a in range(5)])
    region = windows_of(region, window)
    return -100.0 * (region != region.transpose(1, 2)).float()


class PatchMerging(nn.Module):
    """Halves the grid: eight neighbours side by side, normalised, reduced to twice the channels."""

    def __init__(self, d, merge):
        super().__init__()
        self.order = MERGE[merge]
        self.reduction = nn.Linear(8 * d, 2 * d, bias=False)
        self.norm = nn.LayerNorm(8 * d)

    def forward(self, x):
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.order], -1)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Two blocks and a merging: (B, D, H, W, d) -> (B, D/2, H/2, W/2, 2d)."""

    def __init__(self, d, heads, merge):
        super().__init__()
        self.blocks = nn.Sequential(SwinBlock(d, heads, False), SwinBlock(d, heads, True))
        self.downsample = PatchMerging(d, merge)

    def forward(self, x):
        return self.downsample(self.blocks(x))


class SwinEncoder(nn.Module):
    """(B, C, s^3) -> five hidden states: f at s/2, 2f at s/4, ..., 16f at s/32; normalised over channels."""

    def __init__(self, channels, f, merge):
        super().__init__()
        heads = f // 16  # 16 channels a head at every stage
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv3d(channels, f, 2, 2)))
        self.layers1 = nn.Sequential(SwinStage(f, heads, merge))
        self.layers2 = nn.Sequential(SwinStage(2 * f, 2 * heads, merge))
        self.layers3 = nn.Sequential(SwinStage(4 * f, 4 * heads, merge))
        self.layers4 = nn.Sequential(SwinStage(8 * f, 8 * heads, merge))

    def forward(self, x):
        states = [self.patch_embed(x).movedim(1, -1)]
        for stage in (self.layers1, self.layers2, self.layers3, self.layers4):
            states.append(stage(states[-1]))
        return [nn.functional.layer_norm(x, x.shape[-1:]).movedim(-1, 1) for x in states]


def plain_conv(channels_in, channels_out, kernel):
    """MONAI's extra level in the names: conv1.conv.weight."""
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(channels_in, channels_out, kernel, padding=kernel // 2,
                                                    bias=False)))


class ResidualBlock(nn.Module):
    """Two convolutions 3^3 with instance norm and leaky ReLU around a shortcut; norms without parameters."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv1 = plain_conv(channels_in, channels_out, 3)
        self.conv2 = plain_conv(channels_out, channels_out, 3)
        self.conv3 = plain_conv(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x):
        y = forms.instance_norm(self.conv1(x), slope=0.01)
        y = forms.instance_norm(self.conv2(y))
        x = x if self.conv3 is None else forms.instance_norm(self.conv3(x))
        return nn.functional.leaky_relu(y + x, 0.01, inplace=True)


class SwinUpBlock(nn.Module):
    """Transposed convolution, concatenation with the skip, residual block."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.transp_conv = nn.Sequential(OrderedDict(
            conv=nn.ConvTranspose3d(channels_in, channels_out, 2, 2, bias=False)))
        self.conv_block = ResidualBlock(2 * channels_out, channels_out)

    def forward(self, x, skip):
        return self.conv_block(torch.cat([self.transp_conv(x), skip], 1))


def skip_block(channels_in, channels_out):
    return nn.Sequential(OrderedDict(layer=ResidualBlock(channels_in, channels_out)))


class SwinUNETR(nn.Module):
    """Segmentation network of [23]: (B, C, s^3) -> (B, channels_out, s^3). Only swinViT, 8 of its 62 million
    parameters, is ever pretrained."""

    size_multiple, encoder_prefix = 32, "swinViT."

    def __init__(self, channels_in, channels_out, f, merge):
        super().__init__()
        self.swinViT = SwinEncoder(channels_in, f, merge)
        self.encoder1 = skip_block(channels_in, f)
        self.encoder2 = skip_block(f, f)
        self.encoder3 = skip_block(2 * f, 2 * f)
        self.encoder4 = skip_block(4 * f, 4 * f)
        self.encoder10 = skip_block(16 * f, 16 * f)
        self.decoder5 = SwinUpBlock(16 * f, 8 * f)
        self.decoder4 = SwinUpBlock(8 * f, 4 * f)
        self.decoder3 = SwinUpBlock(4 * f, 2 * f)
        self.decoder2 = SwinUpBlock(2 * f, f)
        self.decoder1 = SwinUpBlock(f, f)
        self.out = nn.Sequential(OrderedDict(conv=nn.Sequential(OrderedDict(
            conv=nn.Conv3d(f, channels_out, 1)))))

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        h0, h1, h2, h3, h4 = self.swinViT(x)
        y = self.decoder5(self.encoder10(h4), h3)
        y = self.decoder4(y, self.encoder4(h2))
        y = self.decoder3(y, self.encoder3(h1))
        y = self.decoder2(y, self.encoder2(h0))
        return self.out(self.decoder1(y, self.encoder1(x)))


class SwinHeads(nn.Module):
    """Pretraining network of [23]: (B, C, s^3) -> rotation logits (B, 4), contrastive vectors (B, 512),
    reconstruction (B, C, s^3). The first two read one corner token each; [23] pools nothing."""

    size_multiple, encoder_prefix = 32, "swinViT."

    def __init__(self, channels, f, merge):
        super().__init__()
        self.swinViT = SwinEncoder(channels, f, merge)
        self.rotation_head = nn.Linear(16 * f, 4)
        self.contrastive_head = nn.Linear(16 * f, 512)
        layers = []
        for a, b in ((16 * f, 8 * f), (8 * f, 4 * f), (4 * f, 2 * f), (2 * f, f), (f, f)):
            layers += [nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b), nn.LeakyReLU(0.01),
                       nn.Upsample(scale_factor=2, mode="trilinear")]
        self.conv = nn.Sequential(*layers, nn.Conv3d(f, channels, 1))

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        h4 = self.swinViT(x)[-1]
        tokens = h4.flatten(2)
        return self.rotation_head(tokens[..., 0]), self.contrastive_head(tokens[..., 1]), self.conv(h4)


class SwinReconstruction(nn.Module):
    """AMAES on the SwinUNETR encoder, which the paper leaves open: the decoder of section 3.1 on the hidden
    states; its last convolution undoes the patch embedding."""

    size_multiple, encoder_prefix = 32, "swinViT."

    def __init__(self, encoder, rec_head):
        super().__init__()
        self.swinViT = encoder
        self.rec_head = rec_head

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        return self.rec_head(self.swinViT(x))


def check_multiple(x, multiple):
    if any(side % multiple for side in x.shape[2:]):
        raise UserError(f"input {tuple(x.shape[2:])}: choose multiples of {multiple}")


# ----------------------------------------------------------------------- the pretraining of [23]
class Views(NamedTuple):
    image: torch.Tensor  # (2B, C, D, H, W): what the network sees, all first views, then all second
    target: torch.Tensor  # (2B, C, D, H, W): the same, not cut
    turns: torch.Tensor  # (2B,): by how many quarter turns each is rotated, 0 to 3


def make_views(patches, seeds, share):
    """Two views of each patch of a batch (B, C, D, H, W); see swin_view.

    seeds: for each of the two views, one seed a sample.
    """
    first, second = (swin_view(patches, view_seeds, share) for view_seeds in seeds)
    rotated, cut, turns = (torch.cat(pair) for pair in zip(first, second, strict=True))
    return Views(cut, rotated, turns)


def swin_view(target, seeds, share):
    """One view of each sample (B, C, D, H, W): rotated and cut, with one seed a sample.

    Each is rotated by k * 90 degrees about the first axis. Then boxes of it are filled with noise
    in [0, 1], and others with what lies there in another sample of the batch, which is drawn. One
    that comes earlier in the batch is cut already, as in [23], whose loop works in place.
    -> rotated and cut, both (B, C, D, H, W), and k, (B,)
    """
    rngs = [np.random.default_rng(seed) for seed in seeds]
    turns = [int(rng.integers(4)) for rng in rngs]
    rotated = torch.stack([torch.rot90(x, k, (2, 3)) for x, k in zip(target, turns, strict=True)])

    cut = rotated.clone()
    for sample, rng in enumerate(rngs):
        image = cut[sample]

        # Noise, stretched to [0, 1] within each box.
        noise_seed = int(rng.integers(2 ** 62))
        generator = torch.Generator(image.device).manual_seed(noise_seed)
        for box in cut_boxes(rng, image.shape[1:], share):
            part = image[(slice(None), *box)]
            noise = torch.randn(part.shape, generator=generator, device=part.device,
                                dtype=part.dtype)
            spread = (noise.max() - noise.min()).clamp(min=1e-12)
            part.copy_((noise - noise.min()) / spread)

        # Boxes of another sample. If the sample itself is drawn, nothing is pasted.
        other = int(rng.integers(len(cut)))
        if other == sample:
            continue
        for box in cut_boxes(rng, image.shape[1:], share):
            image[(slice(None), *box)] = cut[(other, slice(None), *box)]
    return rotated, cut, resample.upload(torch.tensor(turns), target.device)


def cut_boxes(rng, shape, share):
    """Random boxes of a patch of this shape, (D, H, W), as tuples of slices.

    They are drawn until their volumes sum to U(0, share) of the patch. A side is 5 to 25 % of the
    patch's, and ends at its border: the paper's "mask ratio 0.3" hides 14 % on average.
    """
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
    a process holds at once, as in [23].
    """
    rotation, vectors, reconstruction = outputs
    dtype = views.target.dtype
    return torch.stack([
        F.cross_entropy(rotation.to(dtype), views.turns),
        contrastive_loss(vectors),
        (reconstruction.to(dtype) - views.target).abs().mean()])


def contrastive_loss(vectors, temperature=0.5):
    """NT-Xent: a scalar, 0 if B is 1.

    vectors: (2B, d), the first views of B samples, then their second views.
    """
    vectors = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)

    # Each vector must find its partner, B places away, among all vectors but itself.
    similarity = (vectors @ vectors.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(vectors), device=vectors.device).roll(len(vectors) // 2)
    return F.cross_entropy(similarity, partner)


@torch.no_grad()
def loss_sums(three, samples):
    """Sums for the log, to be added over micro-batches and processes: (4,).

    They are each of the three losses times the number of samples, and that number.
    """
    return torch.cat([three, three.new_ones(1)]) * samples


def losses_from_sums(sums):
    """loss_sums, added up -> the numbers of a log line: means over samples."""
    rotation, contrast, l1 = (sums[:3] / sums[3]).tolist()
    return {"loss": rotation + contrast + l1, "rotation": rotation, "contrast": contrast, "l1": l1}
