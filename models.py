"""The paper's networks (section 4.3, Table 4) as rows of one table, with the decoders of Table 2.

A network takes a patch (B, C, s, s, s). f is its width, the number of channels of its first level.
Parameter names are the official ones, so that published checkpoints load without a map. fast_cpu.py
and fast_cuda.py hold quicker forms of these modules."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn

import resenc
import swin
from config import UserError, check_choice


class Row(NamedTuple):
    family: str  # unet, mednext, swin or resenc
    features: int  # f, the channels of the first level
    blocks: tuple = ()  # MedNeXt and resenc: the number of blocks in each level
    expansion: tuple = ()  # MedNeXt: how many times wider the channels get inside these blocks
    segments_with: str = "unet"  # the decoder of segmentation: unet or mednext; others have one


MEDNEXT_L = Row("mednext", 32, blocks=(3, 4, 8, 8, 8), expansion=(3, 4, 8, 8, 8))

ROWS = {
    "unet_demo": Row("unet", 8),  # not in the paper: for demonstrations and tests
    "unet_b": Row("unet", 32),
    "unet_xl": Row("unet", 64),
    "mednext_m": Row("mednext", 32, blocks=(3, 4, 4, 4, 4), expansion=(2, 3, 4, 4, 4)),
    "mednext_l": MEDNEXT_L,
    "mednext_l_mednextdec": MEDNEXT_L._replace(segments_with="mednext"),
    "swinunetr": Row("swin", 48),
    "resenc_b": Row("resenc", 32, blocks=(1, 3, 4, 6, 6, 6)),  # not in the paper: resenc.py
}


# ---------------------------------------------------------------------------------- U-Net, B and XL
class ConvNormAct(nn.Module):
    """Convolution 3^3, instance norm, leaky ReLU."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.InstanceNorm3d(channels_out, affine=True)
        self.act = nn.LeakyReLU(0.01)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Block(nn.Module):
    """Two ConvNormAct, or a single one in the light decoder (Table 2)."""

    def __init__(self, channels_in, channels_out, convolutions=2):
        super().__init__()
        self.conv1 = ConvNormAct(channels_in, channels_out)
        self.conv2 = nn.Identity()
        if convolutions == 2:
            self.conv2 = ConvNormAct(channels_out, channels_out)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class UNetEncoder(nn.Module):
    """(B, channels, s, s, s) -> five levels, the first with f channels at the side s. From each
    level to the next the channels double and the side halves."""

    def __init__(self, channels, f):
        super().__init__()
        self.in_conv = Block(channels, f)  # at the side s
        self.encoder_conv1 = Block(f, 2 * f)  # s/2
        self.encoder_conv2 = Block(2 * f, 4 * f)  # s/4
        self.encoder_conv3 = Block(4 * f, 8 * f)  # s/8
        self.encoder_conv4 = Block(8 * f, 16 * f)  # s/16
        self.pool = nn.MaxPool3d(2)

    def forward(self, x):
        levels = [self.in_conv(x)]

        # Each level is made of the one above it, at half its side.
        for block in (self.encoder_conv1, self.encoder_conv2, self.encoder_conv3,
                      self.encoder_conv4):
            levels.append(block(self.pool(levels[-1])))

        return levels


class UNetDecoder(nn.Module):
    """Five levels of an encoder -> (B, channels, s, s, s).

    light: one convolution per level instead of two (Table 2). skips: the encoder's level is
    concatenated to the upsampled one. stem: the stride of the encoder's first convolution, which
    the last one here undoes. It is 1 for all encoders except Swin's."""

    def __init__(self, channels, f, light, skips, stem=1):
        super().__init__()
        self.skips = skips
        wide = 2 if skips else 1
        convolutions = 1 if light else 2

        # From s/16 to s: each level doubles the side and halves the channels.
        self.upsample1 = nn.ConvTranspose3d(16 * f, 8 * f, 2, 2)
        self.decoder_conv1 = Block(8 * f * wide, 8 * f, convolutions)
        self.upsample2 = nn.ConvTranspose3d(8 * f, 4 * f, 2, 2)
        self.decoder_conv2 = Block(4 * f * wide, 4 * f, convolutions)
        self.upsample3 = nn.ConvTranspose3d(4 * f, 2 * f, 2, 2)
        self.decoder_conv3 = Block(2 * f * wide, 2 * f, convolutions)
        self.upsample4 = nn.ConvTranspose3d(2 * f, f, 2, 2)
        self.decoder_conv4 = Block(f * wide, f, convolutions)

        if stem > 1:
            self.out_conv = nn.ConvTranspose3d(f, channels, stem, stem)
        else:
            self.out_conv = nn.Conv3d(f, channels, 1)

    def forward(self, levels):
        *skips, x = levels
        for upsample, block in ((self.upsample1, self.decoder_conv1),
                                (self.upsample2, self.decoder_conv2),
                                (self.upsample3, self.decoder_conv3),
                                (self.upsample4, self.decoder_conv4)):
            x = upsample(x)
            skip = skips.pop()
            if self.skips:
                x = torch.cat([x, skip], 1)
            x = block(x)

        return self.out_conv(x)


# ----------------------------------------------------------- MedNeXt, M and L (kernel 3, no UpKern)
class MedNeXtBlock(nn.Module):
    """Depthwise convolution, group norm, expansion, GELU, compression, and a shortcut around them.

    With stride 2 the block halves the side, or doubles it with `up`. The shortcut is then a
    convolution, too."""

    def __init__(self, channels_in, channels_out, expansion, stride=1, up=False):
        super().__init__()
        self.stride = stride
        self.up = up

        convolution = nn.ConvTranspose3d if up else nn.Conv3d
        self.conv1 = convolution(channels_in, channels_in, 3, stride, 1, groups=channels_in)
        self.norm = nn.GroupNorm(channels_in, channels_in)  # one group per channel
        self.conv2 = nn.Conv3d(channels_in, channels_in * expansion, 1)
        self.act = nn.GELU()
        self.conv3 = nn.Conv3d(channels_in * expansion, channels_out, 1)

        # The shortcut must change the side and the channels as the block does.
        self.res_conv = nn.Identity()
        if stride == 2:
            self.res_conv = convolution(channels_in, channels_out, 1, stride)

    def branch(self, x):
        y = self.norm(self.conv1(x))
        return self.conv3(self.act(self.conv2(y)))

    def forward(self, x):
        y = self.branch(x) + self.res_conv(x)

        # The transposed convolution makes 2n - 1 voxels of n. As in the official code, a plane of
        # zeros before them on each axis completes 2n.
        if self.up:
            y = nn.functional.pad(y, (1, 0, 1, 0, 1, 0))
        return y


def mednext_level(channels, blocks, expansion):
    return nn.Sequential(*(MedNeXtBlock(channels, channels, expansion) for _ in range(blocks)))


class MedNeXtEncoder(nn.Module):
    """(B, channels, s, s, s) -> five levels, shaped like the U-Net's."""

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
        levels = [self.enc_block_0(self.stem(x))]

        for down, level in ((self.down_0, self.enc_block_1), (self.down_1, self.enc_block_2),
                            (self.down_2, self.enc_block_3), (self.down_3, self.bottleneck)):
            levels.append(level(down(levels[-1])))
        return levels


class MedNeXtDecoder(nn.Module):
    """MedNeXt's own decoder (Table 4, "MedNeXt dec"): five levels -> (B, channels, s, s, s).

    It adds the skips instead of concatenating them."""

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


# ----------------------------------------------------------------------------------- whole networks
class Network(nn.Module):
    """An encoder and one decoder, `rec_head` in pretraining and `pred_head` in segmentation:
    (B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""

    size_multiple = 16  # the encoder halves every side four times
    encoder_prefix = "encoder."

    def __init__(self, encoder, rec_head=None, pred_head=None):
        super().__init__()
        self.encoder = encoder
        self.rec_head = rec_head
        self.pred_head = pred_head

    def forward(self, x):
        swin.check_multiple(x, self.size_multiple)
        decoder = self.pred_head if self.rec_head is None else self.rec_head
        return decoder(self.encoder(x))


def build_model(name, purpose, in_channels=1, out_channels=1, decoder="light", skips=False,
                merge="legacy", features=None):
    """A row of ROWS for a purpose: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W).

    purpose: "pretrain" has the `decoder` "light" or "standard" (Table 2), with `skips` or without
    (section 3.1). "segment" has the row's own decoder, with skips (section 3.2). "swin" is the
    encoder of SwinUNETR under the three heads of [23].
    merge: SwinUNETR's patch merging, "legacy" as in the paper's MONAI 1.3.2 or "fixed" as in 1.5.
    features: another width f than the row's. Raises UserError for an unknown name."""
    check_choice("model", name, ROWS)
    check_choice("purpose", purpose, ("pretrain", "segment", "swin"))
    check_choice("decoder", decoder, ("light", "standard"))
    check_choice("merge", merge, swin.MERGE)

    row = ROWS[name]
    f = features or row.features
    light = decoder == "light"

    # SwinUNETR has networks of its own. The paper leaves open how AMAES would pretrain its encoder:
    # here the decoder is the one of section 3.1.
    if row.family == "swin":
        if purpose == "swin":
            return swin.SwinHeads(in_channels, f, merge)
        if purpose == "segment":
            return swin.SwinUNETR(in_channels, out_channels, f, merge)
        encoder = swin.SwinEncoder(in_channels, f, merge)
        return swin.SwinReconstruction(encoder, UNetDecoder(out_channels, f, light, skips, stem=2))
    if purpose == "swin":
        raise UserError(f"objective swin pretrains swinunetr, not {name}")

    # The network of later weights has one decoder for both purposes.
    if row.family == "resenc":
        segments = purpose == "segment"
        return resenc.ResEncUNet(in_channels, out_channels, f, row.blocks,
                                 light=light or segments, skips=skips or segments)

    # All others are an encoder and a decoder.
    if row.family == "unet":
        encoder = UNetEncoder(in_channels, f)
    else:
        encoder = MedNeXtEncoder(in_channels, f, row.blocks, row.expansion)

    # Pretraining has the decoder of section 3.1, segmentation the row's own.
    if purpose == "pretrain":
        return Network(encoder, rec_head=UNetDecoder(out_channels, f, light, skips))
    if row.segments_with == "unet":
        return Network(encoder, pred_head=UNetDecoder(out_channels, f, light=False, skips=True))
    return Network(encoder, pred_head=MedNeXtDecoder(out_channels, f, row.blocks, row.expansion))
