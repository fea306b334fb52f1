"""What fast_cpu.py and fast_cuda.py share: how a plain network becomes a quick one, and the forms
that are the same on both devices. It needs neither of them, and only they need it.
"""

import torch
from torch import nn

import models
import resenc


def install(model, quick):
    """Turn the modules of a plain network into quick ones, in place -> the model.

    quick: {a plain class: the quick one that takes its place}. A module keeps its parameters and
    becomes an instance of a subclass of its own class.
    """
    for module in model.modules():
        if type(module) in quick:
            module.__class__ = quick[type(module)]
        if isinstance(module, (models.UNetDecoder, resenc.Decoder)):
            for name, part in module.named_children():
                if name.startswith("upsample"):
                    part.__class__ = Upsample
    return model


def channels_last(x):
    """x, (B, C, D, H, W), in the memory format channels-last."""
    # A single channel is contiguous in both formats. Convolutions look at the strides, and a copy
    # sets them.
    if x.shape[1] == 1:
        return x.clone(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last_3d)


def instance_norm(x, weight, bias, slope, eps, norm_channels_last):
    """Instance norm, then a leaky ReLU if a slope is given, on (B, C, D, H, W). It keeps the memory
    format of x, which torch's own does not.

    norm_channels_last(x, weight, bias, eps): the norm of a volume that is not contiguous."""
    if x.is_contiguous():
        # Batch norm is instance norm if all channels of all samples are channels of one sample.
        if weight is not None:
            weight = weight.repeat(len(x))
            bias = bias.repeat(len(x))
        y = batch_norm(x.flatten(0, 1)[None], weight, bias, eps)
    else:
        y = norm_channels_last(x, weight, bias, eps)

    # In place, but before y becomes a view: through a view, the gradient would be copied three
    # times.
    if slope is not None:
        y = nn.functional.leaky_relu(y, slope, inplace=True)

    # Only where the shape changed: a view of a single sample has another stride of the batch, by
    # which the next convolution no longer knows it as channels-last.
    return y if y.shape == x.shape else y.view_as(x)


def slope_of(act):
    """The slope of an activation, a leaky ReLU; None if there is none."""
    if isinstance(act, nn.Identity):
        return None
    return act.negative_slope


def batch_norm(x, weight, bias, eps):
    return nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


class ResidualBlock(resenc.ResidualBlock):
    """With the leaky ReLU in place."""

    def forward(self, x):
        y = self.conv2(self.conv1(x)) + self.skip(x)
        return nn.functional.leaky_relu(y, self.act.negative_slope, inplace=True)


class Upsample(nn.ConvTranspose3d):
    """A transposed convolution whose stride is its kernel's size. In channels-last order it is one
    matrix product, whose columns are then put in their places."""

    def forward(self, x):
        if x.is_contiguous():
            return super().forward(x)
        batch, _, *size = x.shape
        k = self.stride[0]

        # (B, D, H, W, C) -> (B, D, H, W, k * k * k * channels_out): all that one voxel becomes.
        weight = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)
        y = nn.functional.linear(x.movedim(1, -1), weight, self.bias.repeat(k ** 3))

        # The offsets inside a voxel's block go beside its position on each axis.
        y = y.view(batch, *size, k, k, k, self.out_channels)
        y = y.permute(0, 1, 4, 2, 5, 3, 6, 7)
        sides = [k * side for side in size]
        return y.reshape(batch, *sides, self.out_channels).movedim(-1, 1)
