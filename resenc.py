"""The residual-encoder U-Net that the authors of the paper pretrained later. Not in the paper.

Its weights are published as AMAES_resenc_b. The encoder has the shapes of nnU-Net's "ResEnc L".
Parameter names are the published ones."""

from collections import OrderedDict

import torch
from torch import nn

import swin

WIDTHS = (1, 2, 4, 8, 10, 10)  # channels of the six levels, in units of f


class ConvNorm(nn.Module):
    """Convolution and instance norm, then a leaky ReLU if it is to be `active`."""

    def __init__(self, channels_in, channels_out, kernel=3, stride=1, active=True):
        super().__init__()

        # Only shortcuts have a kernel of 1, and no bias.
        bias = kernel > 1
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride, kernel // 2, bias=bias)
        self.norm_op = nn.InstanceNorm3d(channels_out, affine=True)
        self.act = nn.LeakyReLU(0.01) if active else nn.Identity()

    def forward(self, x):
        return self.act(self.norm_op(self.conv(x)))


class ConvBlock(nn.Sequential):
    """One or two ConvNorm."""

    def __init__(self, channels_in, channels_out, convolutions=1):
        super().__init__(OrderedDict(conv1=ConvNorm(channels_in, channels_out)))
        if convolutions == 2:
            self.conv2 = ConvNorm(channels_out, channels_out)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut around them. With stride 2 the block halves the side."""

    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels_out, stride=stride)
        self.conv2 = ConvNorm(channels_out, channels_out, active=False)

        # The shortcut changes the side and the channels where the block does.
        shortcut = []
        if stride > 1:
            shortcut.append(nn.AvgPool3d(stride))
        if channels_in != channels_out:
            shortcut.append(ConvNorm(channels_in, channels_out, kernel=1, active=False))
        self.skip = nn.Sequential(*shortcut)
        self.act = nn.LeakyReLU(0.01)

    def forward(self, x):
        return self.act(self.conv2(self.conv1(x)) + self.skip(x))


def level_of(channels_in, channels_out, blocks, stride):
    """A level of the encoder, made of the one above it. Its inner name is one of the published."""
    first = ResidualBlock(channels_in, channels_out, stride)
    others = (ResidualBlock(channels_out, channels_out, 1) for _ in range(blocks - 1))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(first, *others)))


class Encoder(nn.Module):
    """(B, channels, s, s, s) -> six levels, the first with f channels at the side s. From each
    level to the next the side halves; the channels are WIDTHS times f."""

    def __init__(self, channels, f, blocks):
        super().__init__()
        self.stem = ConvBlock(channels, f)

        # The first level keeps the side of the stem.
        self.stages = nn.Sequential(level_of(f, f, blocks[0], stride=1))
        for i in range(1, len(WIDTHS)):
            self.stages.append(level_of(f * WIDTHS[i - 1], f * WIDTHS[i], blocks[i], stride=2))

    def forward(self, x):
        levels = [self.stem(x)]
        for stage in self.stages:
            levels.append(stage(levels[-1]))

        # The stem's own output is no level.
        return levels[1:]


class Decoder(nn.Module):
    """Six levels of the encoder -> (B, channels, s, s, s).

    light, skips: as in models.UNetDecoder. The published networks are light in all tasks."""

    def __init__(self, channels, f, light, skips):
        super().__init__()
        self.skips = skips
        wide = 2 if skips else 1
        convolutions = 1 if light else 2

        # From s/32 to s: each level doubles the side.
        for i in range(1, len(WIDTHS)):
            below = f * WIDTHS[-i]
            width = f * WIDTHS[-i - 1]
            self.add_module(f"upsample{i}", nn.ConvTranspose3d(below, width, 2, 2))
            self.add_module(f"decoder_conv{i}", ConvBlock(width * wide, width, convolutions))
        self.out_conv = nn.Conv3d(f, channels, 1)

    def forward(self, levels):
        *skips, x = levels

        # The parts come in the order in which they were made.
        *parts, out_conv = self.children()
        for upsample, block in zip(parts[::2], parts[1::2], strict=True):
            x = upsample(x)
            if self.skips:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x)

        return out_conv(x)


class ResEncUNet(nn.Module):
    """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""

    size_multiple = 32  # the encoder halves every side five times
    encoder_prefix = "encoder."

    def __init__(self, in_channels, out_channels, f, blocks, light, skips):
        super().__init__()
        self.encoder = Encoder(in_channels, f, blocks)
        self.decoder = Decoder(out_channels, f, light, skips)

    def forward(self, x):
        swin.check_multiple(x, self.size_multiple)
        return self.decoder(self.encoder(x))
