"""Optional: the same networks, quicker on CUDA. Delete this file and all works, more slowly.

`install` makes a quick network of a plain one (models.py, swin.py, resenc.py). Outputs and
gradients stay the same but for rounding. Nothing here needs a GPU: the tests run it on a CPU.
"""

import itertools

import torch
import torch.utils.checkpoint
from torch import nn

import fast
import models
import resenc
import swin

# Guesses, until bench/gpu.py has measured them on a GPU.
CHANNELS_LAST = True  # memory format of U-Nets and MedNeXt; False: contiguous
SHIFTS = False  # MedNeXt's depthwise convolutions as 27 shifted products; False: cuDNN's
SDPA = True  # SwinUNETR's attention as one kernel; False: as matrix products
CUDNN_BENCHMARK = True  # cuDNN tries its kernels on the first batch of each shape


def install(model):
    """Turn the modules of a plain network into the quick ones below, in place -> the model."""
    torch.backends.cudnn.benchmark = CUDNN_BENCHMARK
    return fast.install(model, QUICK)


def convolves_contiguous(row):
    """Does this row of models.py convolve contiguous volumes on CUDA?"""
    return models.ROWS[row].family == "swin" or not CHANNELS_LAST


# ------------------------------------------------------------------------- memory formats and norms
def quick_format(x):
    """x, (B, C, D, H, W), in the memory format that CHANNELS_LAST asks for."""
    if not CHANNELS_LAST:
        return x.contiguous()
    return fast.channels_last(x)


def instance_norm(x, weight=None, bias=None, slope=None, eps=1e-5):
    """fast.instance_norm, on channels-last volumes written out."""
    return fast.instance_norm(x, weight, bias, slope, eps, norm_written_out)


def norm_written_out(x, weight, bias, eps):
    """Compiled, it is one reduction and one pass, which takes the leaky ReLU along."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (2, 3, 4), correction=0, keepdim=True)
    y = (wide - mean) * (variance + eps).rsqrt()
    if weight is not None:
        y = y * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
    return y.to(x.dtype)


# -------------------------------------------------------------------------------------------- U-Net
class ConvNormAct(models.ConvNormAct):
    """In the format of CHANNELS_LAST, with the leaky ReLU in place."""

    def forward(self, x):
        y = self.conv(quick_format(x))
        return instance_norm(y, self.norm.weight, self.norm.bias, slope=self.act.negative_slope)


# ------------------------------------------------------------------------------------------ MedNeXt
class MedNeXtEncoder(models.MedNeXtEncoder):
    """In the format of CHANNELS_LAST from the stem on."""

    def forward(self, x):
        return super().forward(quick_format(x))


class MedNeXtBlock(models.MedNeXtBlock):
    """With the norm of the U-Nets: torch's group norm would run in float32 under autocast."""

    def branch(self, x):
        if SHIFTS and self.stride == 1:
            y = depthwise_shifts(x, self.conv1.weight, self.conv1.bias)
        else:
            y = self.conv1(x)

        # A group norm with one channel a group is an instance norm.
        y = instance_norm(y, self.norm.weight, self.norm.bias)
        return self.conv3(self.act(self.conv2(y)))


def depthwise_shifts(x, weight, bias):
    """Depthwise 3^3 convolution as a sum of 27 shifted products, which a compiler makes one
    kernel."""
    depth, height, width = x.shape[2:]
    padded = nn.functional.pad(x, (1,) * 6)
    y = bias.view(-1, 1, 1, 1)
    for i, j, k in itertools.product(range(3), repeat=3):
        shifted = padded[:, :, i:i + depth, j:j + height, k:k + width]
        y = y + shifted * weight[:, :, i, j, k, None, None]
    return y.to(x.dtype)


# ---------------------------------------------------------------------------------------- SwinUNETR
class WindowAttention(swin.WindowAttention):
    """With SDPA the plain one, else matrix products."""

    def mix(self, q, k, v, mask):
        if SDPA:
            return super().mix(q, k, v, mask)

        # Unlike the kernel, products keep their n x n results for the backward pass. These would be
        # most of the memory, so they are computed again.
        return torch.utils.checkpoint.checkpoint(self.mix_by_products, q, k, v, mask,
                                                 use_reentrant=False, preserve_rng_state=False)

    def mix_by_products(self, q, k, v, mask):
        bias = self.pair_bias(q.shape[2], mask)
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        scores = scores.unflatten(0, (-1, len(bias))) + bias
        return scores.softmax(-1).to(v.dtype).flatten(0, 1) @ v


class ResidualBlock(swin.ResidualBlock):
    """With norms that keep the memory format, and the leaky ReLU in place."""

    def forward(self, x):
        slope = self.act.negative_slope
        y = instance_norm(self.conv1(x), slope=slope)
        y = instance_norm(self.conv2(y))
        if self.conv3 is not None:
            x = instance_norm(self.conv3(x))
        return nn.functional.leaky_relu(y + x, slope, inplace=True)


# --------------------------------------------------------------------------- residual-encoder U-Net
class ConvNorm(resenc.ConvNorm):
    """As ConvNormAct, but some have no activation."""

    def forward(self, x):
        y = self.conv(quick_format(x))
        slope = fast.slope_of(self.act)
        return instance_norm(y, self.norm_op.weight, self.norm_op.bias, slope=slope)


QUICK = {  # a plain class -> the quick one that takes its place
    models.ConvNormAct: ConvNormAct,
    models.MedNeXtEncoder: MedNeXtEncoder,
    models.MedNeXtBlock: MedNeXtBlock,
    swin.WindowAttention: WindowAttention,
    swin.ResidualBlock: ResidualBlock,
    resenc.ConvNorm: ConvNorm,
    resenc.ResidualBlock: fast.ResidualBlock,
}
