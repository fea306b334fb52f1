"""Optional: the same networks, quicker on a CPU. Delete this file and all works, more slowly.

`install` makes a quick network of a plain one (models.py, swin.py, resenc.py). Outputs and
gradients stay the same but for rounding. bench/models.py measures what it gains."""

import ctypes

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import augment
import fast
import models
import resample
import resenc
import swin


def install(model):
    """Turn the modules of a plain network into the quick ones below, in place -> the model."""
    return fast.install(model, QUICK)


def keep_freed_memory():
    """Make the allocator of this process keep what is freed. Elsewhere than in glibc, do nothing.

    glibc gives every large tensor back to the kernel when it is freed, and each new one then costs
    a page fault for every 4 KB: much of a training step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing through mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays


# ------------------------------------------------------------------------- memory formats and norms
def quick_format(x):
    """x, (B, C, D, H, W), in the memory format in which a CPU convolves it fastest: channels-last,
    except at coarse levels, where converting the weight gradient costs more than it saves."""
    if x[0, 0].numel() <= 8 ** 3:
        return x.contiguous()
    return fast.channels_last(x)


def convolve(conv, x):
    """conv(x), by oneDNN also if x is one small volume in float32. With one thread, torch itself
    takes a slow path there (ConvParams::use_mkldnn), up to 19 times as long.

    torch.compile cannot trace oneDNN's function, so compiled networks convolve as torch chooses."""
    if torch.compiler.is_compiling():
        return conv(x)
    one = len(x) == 1 and x.dtype == conv.weight.dtype == torch.float32
    if not one or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return conv(x)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride,
                                    conv.dilation, conv.groups)


def channels_first(x):
    """x.contiguous(). For channels-last volumes, transposing one matrix per sample is faster."""
    if x.is_contiguous():
        return x
    matrices = [sample.t().contiguous() for sample in x.movedim(1, -1).flatten(1, 3)]
    return torch.stack(matrices).view(x.shape)


def instance_norm(x, weight=None, bias=None, slope=None, eps=1e-5):
    """fast.instance_norm, on channels-last volumes as batch norms of one sample each."""
    return fast.instance_norm(x, weight, bias, slope, eps, norm_of_samples)


def norm_of_samples(x, weight, bias, eps):
    if len(x) == 1:
        return fast.batch_norm(x, weight, bias, eps)
    return torch.cat([fast.batch_norm(sample, weight, bias, eps) for sample in x.split(1)])


# -------------------------------------------------------------------------------------------- U-Net
class ConvNormAct(models.ConvNormAct):
    """In channels-last order, with the leaky ReLU in place."""

    def forward(self, x):
        y = convolve(self.conv, quick_format(x))
        return instance_norm(y, self.norm.weight, self.norm.bias, slope=self.act.negative_slope)


class MaxPool(nn.MaxPool3d):
    """Under autocast, max_pool3d itself runs in float32, for nothing."""

    def forward(self, x):
        pooled, _ = nn.functional.max_pool3d_with_indices(x, self.kernel_size)
        return pooled


# ------------------------------------------------------------------------------------------ MedNeXt
class MedNeXtEncoder(models.MedNeXtEncoder):
    """In channels-last order from the stem on."""

    def forward(self, x):
        return super().forward(quick_format(x))


class MedNeXtBlock(models.MedNeXtBlock):
    """In channels-last order, where a 1^3 convolution is a matrix product. The scale of the norm
    goes into the matrix of the expansion, and its shift into the bias."""

    def branch(self, x):
        if self.stride == 1:
            y = DepthwiseConv.apply(x, self.conv1.weight, self.conv1.bias)
        else:
            y = self.conv1(x)

        # (B, voxels, C), at least in float32, less the mean of each channel; then the norm's scale.
        v = y.movedim(1, -1).flatten(1, 3)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        v = v - v.mean(1, keepdim=True)
        variance = v.square().mean(1)
        scale = self.norm.weight * (variance + self.norm.eps).rsqrt()

        # Expand v * scale + norm.bias, with one matrix per sample.
        expand = self.conv2.weight.flatten(1)
        bias = (expand * self.norm.bias).sum(1) + self.conv2.bias
        matrices = expand * scale.unsqueeze(1)
        h = torch.baddbmm(bias, v, matrices.transpose(1, 2))

        compress = self.conv3.weight.flatten(1)
        h = nn.functional.linear(self.act(h), compress, self.conv3.bias)
        return h.unflatten(1, y.shape[2:]).movedim(-1, 1)


class DepthwiseConv(torch.autograd.Function):
    """Depthwise 3^3 convolution of a channels-last volume, with quicker gradients than oneDNN's.
    The input's is the convolution with the mirrored kernel, and the kernel's is
    kernel_gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return nn.functional.conv3d(x, weight, bias, padding=1, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        mirrored = weight.to(grad.dtype).flip(2, 3, 4)
        grad_x = nn.functional.conv3d(grad, mirrored, padding=1, groups=len(weight))
        grad_weight = kernel_gradient(channels_first(x.to(grad.dtype)), channels_first(grad))
        grad_bias = grad.sum((0, 2, 3, 4))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def kernel_gradient(x, grad, side=8):
    """Gradient of a depthwise kernel, (C, 1, 3, 3, 3), from the input x and the output's gradient,
    both (B, C, D, H, W). For each of the 27 offsets it is the sum of grad[v] * x[v + offset] over
    all voxels v.

    The planes (H, W) are cut into blocks of side^2 voxels. A matrix product multiplies every voxel
    of x in a block and its rim by every voxel of grad in the block, and sums over all blocks. The
    sums that are wanted, of voxels an offset apart, lie on diagonals of the result."""
    channels, depth, height, width = x.shape[1:]
    rim = side + 2

    # A rim of zeros around x, and as many zeros behind both as fill whole blocks.
    fill_h = -height % side
    fill_w = -width % side
    x = nn.functional.pad(x, (1, 1 + fill_w, 1, 1 + fill_h, 1, 1))
    if fill_h or fill_w:
        grad = nn.functional.pad(grad, (0, fill_w, 0, fill_h))

    # x as (C, depth, blocks of all samples, voxels of a block and its rim); grad as (C, blocks of
    # all planes and samples, voxels of a block).
    rims = x.unfold(3, rim, side).unfold(4, rim, side)
    rims = rims.permute(1, 2, 0, 3, 4, 5, 6)
    rims = rims.reshape(channels, depth + 2, -1, rim ** 2)
    blocks = grad.unfold(3, side, side).unfold(4, side, side)
    blocks = blocks.permute(1, 2, 0, 3, 4, 5, 6)
    blocks = blocks.reshape(channels, -1, side ** 2)

    # An offset between planes is a matrix product, and an offset in the plane a diagonal of it.
    sums = []
    for i in range(3):
        planes = rims[:, i:i + depth].flatten(1, 2)
        products = planes.transpose(1, 2) @ blocks
        products = products.view(channels, rim, rim, side, side)
        for j in range(3):
            for k in range(3):
                pairs = products[:, j:j + side, k:k + side]
                same_voxel = pairs.diagonal(0, 1, 3).diagonal(0, 1, 2)
                sums.append(same_voxel.sum((1, 2)))
    return torch.stack(sums, 1).view(channels, 1, 3, 3, 3)


# ---------------------------------------------------------------------------------------- SwinUNETR
class WindowAttention(swin.WindowAttention):
    """Computes its n x n matrices again in the backward pass, since they would be most of the
    memory. CUDA's kernel does so by itself."""

    def mix(self, q, k, v, mask):
        return torch.utils.checkpoint.checkpoint(super().mix, q, k, v, mask, use_reentrant=False,
                                                 preserve_rng_state=False)


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
        y = convolve(self.conv, quick_format(x))
        slope = fast.slope_of(self.act)
        return instance_norm(y, self.norm_op.weight, self.norm_op.bias, slope=slope)


QUICK = {  # a plain class -> the quick one that takes its place
    models.ConvNormAct: ConvNormAct,
    nn.MaxPool3d: MaxPool,
    models.MedNeXtEncoder: MedNeXtEncoder,
    models.MedNeXtBlock: MedNeXtBlock,
    swin.WindowAttention: WindowAttention,
    swin.ResidualBlock: ResidualBlock,
    resenc.ConvNorm: ConvNorm,
    resenc.ResidualBlock: fast.ResidualBlock,
}


# ----------------------------------------------------------------------------- augmentation lookups
def install_lookup():
    """Let augment.lookup read a tensor on a CPU by gathers; on other devices it stays as it was.

    The results agree with augment.lookup_by_grid_sample to rounding."""
    augment.lookup = lookup


def lookup(x, matrix, displacement, size, mode):
    """augment.lookup_by_grid_sample in the form that is quickest for x."""
    if x.device.type != "cpu":
        return augment.lookup_by_grid_sample(x, matrix, displacement, size, mode)
    turns = np.any(matrix[~np.eye(3, dtype=bool)])
    if mode == "bilinear" and displacement is None and not turns:
        return zoom(x, matrix[0, 0], size)
    return gather(x, matrix, displacement, size, mode)


def zoom(x, scale, size):
    """Trilinear lookup at scale * c: the first axis by a matrix, then plane by plane."""
    depth, *sides = x.shape[1:]
    first, *others = (resample.from_middle(n) * scale for n in size)

    # Each plane of the result is a mean of two planes of x, weighted by their distances.
    position = first[:, None] + (depth - 1) / 2
    distance = abs(position - np.arange(depth))
    weights = np.maximum(1 - distance, 0)
    planes = resample.apply_matrix(x, weights, 0)
    planes = planes.view(-1, 1, *sides)

    # Within a plane, -1 and 1 are the centres of the outermost pixels, and the last axis is first.
    lines = []
    for line, n in zip(others, sides, strict=True):
        line = line * 2 / max(n - 1, 1)
        lines.append(resample.upload_array(line, x))
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    grid = torch.stack([columns, rows], -1)
    grid = grid.expand(len(planes), -1, -1, -1)
    moved = F.grid_sample(planes, grid, "bilinear", "zeros", align_corners=True)
    return moved.view(-1, *size)


def gather(x, matrix, displacement, size, mode):
    """Lookup at matrix (c + displacement) by indices into the flattened volume.

    Some planes at a time, so that the positions stay in the cache."""
    # One voxel of 0 below and two above: every position is clamped between them.
    volumes = F.pad(x, (1, 2) * 3)
    sides = volumes.shape[1:]
    strides = (sides[1] * sides[2], sides[2], 1)
    volumes = volumes.flatten(1)

    result = x.new_empty(len(x), *size)
    lines = [torch.arange(n) - (n - 1) / 2 for n in size]
    planes = max(1, 2 ** 17 // (size[1] * size[2]))
    for start in range(0, size[0], planes):
        part = slice(start, start + planes)

        # An axis at a time: which voxel lies below the position, and by how much.
        index = 0
        fractions = []
        for row, side, stride in zip(matrix.tolist(), sides, strides, strict=True):
            d, h, w = (line * weight for line, weight in zip(lines, row, strict=True))
            position = (d[part, None, None] + (side / 2 - 1) + h[:, None]) + w
            if displacement is not None:
                for along, weight in zip(displacement[:, part], row, strict=True):
                    if weight:  # without a rotation, one of the three
                        position.add_(along, alpha=weight)
            position.clamp_(0, side - 2)

            if mode == "nearest":
                voxel = (position + 0.5).int()
            else:
                voxel = position.int()
                fractions.append((position - voxel).view(-1))
            index = voxel * stride + index

        # All channels are read at the same positions.
        for volume, target in zip(volumes, result, strict=True):
            values = blend(volume, index.view(-1), fractions, strides)
            target[part] = values.view_as(index)
    return result


def blend(volume, index, fractions, strides):
    """Linear interpolation along the first axis of what the others give. No fractions: nearest."""
    if not fractions:
        return volume.index_select(0, index)
    near = blend(volume, index, fractions[1:], strides[1:])
    far = blend(volume, index + strides[0], fractions[1:], strides[1:])
    return near.lerp_(far, fractions[0])
