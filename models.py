"""The networks of the paper (section 4.3, Table 4) as rows of one table, their decoders (section 3.1, Table
2), and strict loading of weights.

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

from common import UserError, load_checkpoint


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


# ------------------------------------------------------------------------- the forms of CPU and CUDA
# Only a measurement on a GPU decides these three (bench/gpu.py). None was made yet: they are guesses.
CHANNELS_LAST_ON_CUDA = True  # memory format of U-Nets and MedNeXt; False: contiguous
SHIFTS_ON_CUDA = False  # MedNeXt's depthwise convolutions as 27 shifted products; False: cuDNN's
SDPA = True  # SwinUNETR's attention as one kernel, on a CPU twice as quick; False: as matrix products


def on_cpu(x):
    """Is x computed in the CPU's form? Tests say False here, to run on a CPU what CUDA runs."""
    return x.device.type == "cpu"


def quick_format(x):
    """x in the memory format in which its device convolves it fastest.

    A CPU: channels-last, but for the coarse levels, where the layout of the weights' gradient costs more than
    that gains. CUDA: as CHANNELS_LAST_ON_CUDA says."""
    channels_last = x[0, 0].numel() > 8 ** 3 if on_cpu(x) else CHANNELS_LAST_ON_CUDA
    if not channels_last:
        return x.contiguous()
    if x.shape[1] == 1:  # contiguous in both formats; what counts are the strides, which a copy sets
        return x.clone(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last_3d)


def instance_norm(x, weight=None, bias=None, slope=None, eps=1e-5):
    """Instance norm that keeps the memory format of x, (B, C, D, H, W), and a leaky ReLU of `slope` after it.

    torch's own does not know channels-last. It also returns a view, and the gradient of an operation in place
    on a view copies it three times: so the leaky ReLU is applied here, before there is a view."""
    if x.is_contiguous():
        # A channel of a sample is a channel of one long sample, on which batch norm is instance norm.
        batch = len(x)
        weights = (None, None) if weight is None else (weight.repeat(batch), bias.repeat(batch))
        y = nn.functional.batch_norm(x.flatten(0, 1)[None], None, None, *weights, True, eps=eps)
    elif on_cpu(x):
        samples = x.split(1) if len(x) > 1 else [x]
        parts = [nn.functional.batch_norm(one, None, None, weight, bias, True, eps=eps) for one in samples]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
    else:
        # Written out: compiled, it is one reduction and one pass that takes the leaky ReLU along.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (2, 3, 4), correction=0, keepdim=True)
        y = (wide - mean) * (variance + eps).rsqrt()
        if weight is not None:
            y = y * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
        y = y.to(x.dtype)
    if slope is not None:
        y = nn.functional.leaky_relu(y, slope, inplace=True)
    return y.view_as(x)


# ------------------------------------------------------------------------------------------ U-Net, B and XL
class ConvNormAct(nn.Module):
    """Convolution 3^3, instance norm, leaky ReLU."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.InstanceNorm3d(channels_out, affine=True)

    def forward(self, x):
        return instance_norm(self.conv(quick_format(x)), self.norm.weight, self.norm.bias, slope=0.01)


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
        y = self.branch_cpu(x) if on_cpu(x) else self.branch(x)
        y = y + (x if self.stride == 1 else self.res_conv(x))
        return nn.functional.pad(y, (1, 0, 1, 0, 1, 0)) if self.up else y

    def branch(self, x):
        shifts = SHIFTS_ON_CUDA and self.stride == 1
        y = depthwise_shifts(x, self.conv1.weight, self.conv1.bias) if shifts else self.conv1(x)
        y = instance_norm(y, self.norm.weight, self.norm.bias)  # which a group norm of one channel a group is
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
        levels = [self.enc_block_0(self.stem(quick_format(x)))]
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


# --------------------------------------------------------------------------- SwinUNETR [23], names as MONAI's
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
        if SDPA and not on_cpu(x):
            y = self.mix(q, k, v, mask)  # the kernel of CUDA never has the n x n matrices in memory
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
        y = instance_norm(self.conv1(x), slope=0.01)
        y = instance_norm(self.conv2(y))
        x = x if self.conv3 is None else instance_norm(self.conv3(x))
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


# --------------------------------------------------------------------------------------------------- networks
class Network(nn.Module):
    """Encoder and a decoder: `rec_head` in pretraining, `pred_head` in segmentation. (B, C, D, H, W) -> the
    same grid."""

    size_multiple, encoder_prefix = 16, "encoder."  # every side is four times halved

    def __init__(self, encoder, rec_head=None, pred_head=None):
        super().__init__()
        self.encoder, self.rec_head, self.pred_head = encoder, rec_head, pred_head

    def forward(self, x):
        check_multiple(x, self.size_multiple)
        return (self.pred_head if self.rec_head is None else self.rec_head)(self.encoder(x))


def check_multiple(x, multiple):
    if any(side % multiple for side in x.shape[2:]):
        raise UserError(f"input {tuple(x.shape[2:])}: choose multiples of {multiple}")


def build_model(name, task, in_channels=1, out_channels=1, decoder="light", skips=False, merge="legacy",
                features=None):
    """A row of ROWS for a task, on (B, in_channels, D, H, W) -> (B, out_channels, D, H, W).

    task: "pretrain", with the `decoder` light or standard (Table 2) and `skips` or none (section 3.1);
    "segment", with the row's own decoder and skips (section 3.2); or "swin", SwinUNETR's encoder under the
    three heads of [23]. merge: SwinUNETR's patch merging, legacy as the paper's MONAI 1.3.2 had it or fixed
    as MONAI >= 1.5 has it. features: another width f. UserError for an unknown name."""
    for value, known, what in ((name, ROWS, "model"), (task, ("pretrain", "segment", "swin"), "task"),
                               (decoder, ("light", "standard"), "decoder"), (merge, MERGE, "merge")):
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
        return SwinHeads(in_channels, f, merge)
    if row.family == "swin":
        if task == "segment":
            return SwinUNETR(in_channels, out_channels, f, merge)
        return SwinReconstruction(SwinEncoder(in_channels, f, merge),
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
        if isinstance(module, (Block, MedNeXtBlock, SwinBlock, ResidualBlock)):
            module.forward = functools.partial(torch.utils.checkpoint.checkpoint, module.forward,
                                               use_reentrant=False, preserve_rng_state=False)


def contiguous_on_cuda(name):
    """Does a row convolve contiguous volumes on CUDA?"""
    return ROWS[name].family == "swin" or not CHANNELS_LAST_ON_CUDA


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


# Weights whose shape depends on the number of input channels.
STEMS = ("encoder.in_conv.conv1.conv.weight", "encoder.stem.weight", "swinViT.patch_embed.proj.weight",
         "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")


def bare_names(checkpoint):
    """The tensors of a checkpoint by the names used here.

    Ours ({"model": ...}), Lightning's and MONAI's ({"state_dict": ...}), or a flat dict; the prefixes
    module., model. and _orig_mod. are stripped in any order. The SSL weights of [23] name swinViT swin_vit or
    nothing, and the layers of its MLP fc1 and fc2."""
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    bare = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        while name.startswith(("module.", "model.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if name.startswith("swin_vit."):
            name = name.replace("swin_vit.", "swinViT.", 1)
        elif name.startswith(("patch_embed.", "layers1.", "layers2.", "layers3.", "layers4.")):
            name = f"swinViT.{name}"
        name = name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
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
    wanted = [name for name in own if part == "all" or name.startswith(model.encoder_prefix)]
    taken, reshaped, wrong = [], [], []
    for name in wanted:
        tensor, target = found.get(name), own[name]
        if tensor is not None and tensor.shape == target.shape:
            own[name] = tensor
            taken.append(name)
        elif tensor is not None and name in STEMS and tensor.shape[:1] + tensor.shape[2:] == \
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
