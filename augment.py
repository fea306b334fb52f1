"""Augmentations (paper, Appendix B, Table 5) as pure functions of tensors and drawn parameters.

`draw` is the policy: what is applied to one sample, how often, how strongly. `spatial` moves image, target
and label together, in one lookup; `intensity` changes the input only. Undoing it is the "augmentation
reversal" of section 3.1. One sample is (C, D, H, W); axes 0, 1, 2 are D, H, W.

Parameters, and the random numbers of the elastic field, are drawn on the CPU: bitwise the same on every
device, and what is computed from them agrees to rounding. Noise comes from a seeded generator on the device:
bitwise the same on one kind of device, the same in distribution across kinds. Nothing waits for the device.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import resample


class Draw(NamedTuple):
    """The parameters of one sample; None where a transform was not drawn."""
    size: tuple  # patch (D, H, W)
    context: tuple  # box to read around the patch, so that rotation and zoom find data, not padding
    angles: tuple | None = None  # degrees about axes 0, 1, 2; 0 where the axis was not drawn
    scale: float | None = None  # above 1 reads a larger region: the head appears smaller
    elastic: tuple | None = None  # alpha, sigma, seed
    intensity: tuple = ()  # (function name, parameters) in the order of application


# ---------------------------------------------------------------------------------------- the policy, Table 5
def draw(seed, preset, patch_size):
    """Table 5 on one screen: the augmentations of one sample with their probabilities and ranges -> Draw.

    preset: none; spatial, the rotation and scale of finetuning (section 3.2); all, Table 5. (The official
    pretraining preset named spatial holds the elastic deformation too; the paper never uses it alone.) The
    channels of a sample share one draw; the official code draws each intensity transform once a channel."""
    rng = np.random.default_rng(seed)
    size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)

    def chance(p):
        return rng.random() < p

    if preset == "none":
        return Draw(size, size)
    angles = scale = elastic = None
    if chance(0.2):  # rotation, each axis 0.66
        angles = tuple(rng.uniform(-30, 30) if chance(0.66) else 0.0 for _ in range(3))
    if chance(0.2):
        scale = rng.uniform(0.9, 1.1)
    if preset == "spatial":
        return Draw(size, context_of(size, angles, scale, None), angles, scale)
    if chance(0.33):  # listed under Intensity in Table 5; in the code, and here, it moves the target too
        elastic = (rng.uniform(200, 600), rng.uniform(20, 30), int(rng.integers(2 ** 62)))

    steps = []
    if chance(0.2):  # "[1^-3, 1^-4]" in Table 5; the code: U(1e-4, 1e-3)
        steps.append(("gaussian_noise", (rng.uniform(1e-4, 1e-3), int(rng.integers(2 ** 62)))))
    if chance(0.1):
        steps.append(("gaussian_blur", (rng.uniform(0, 1),)))
    if chance(0.2):
        steps.append(("multiplicative_noise", (rng.uniform(1e-4, 1e-3), int(rng.integers(2 ** 62)))))
    if chance(0.2):  # repetitions "[2, 11]", the upper end exclusive
        axis = int(rng.integers(3))
        steps.append(("motion_ghosting", (rng.uniform(0.85, 0.95), int(rng.integers(2, 11)), axis)))
    if chance(0.2):  # the code keeps 96 to 128 planes of any patch; here 0.75 to 1.0 of the side
        axis = int(rng.integers(3))
        steps.append(("gibbs_ringing", (round(rng.uniform(0.75, 1) * size[axis]), axis)))
    if chance(0.1):  # each axis 0.33, one zoom for all; where no axis is drawn, nothing happens
        zoom = rng.uniform(0.5, 1)
        steps.append(("low_resolution", (tuple(round(n * zoom) if chance(0.33) else n for n in size),)))
    if chance(0.33):
        steps.append(("bias_field", (tuple(int(rng.integers(n)) for n in size),)))
    if chance(0.2):  # invert: 0.05 of 0.2 is Table 5's 0.01; the output's colours are not inverted
        gamma_value = rng.uniform(0.5, 1) if chance(0.5) else rng.uniform(1, 2)
        steps.append(("gamma", (gamma_value, chance(0.05))))
    return Draw(size, context_of(size, angles, scale, elastic), angles, scale, elastic, tuple(steps))


@torch.no_grad()
def intensity(batch, draws):
    """(B, C, D, H, W) and B draws -> the batch with each sample's intensity transforms applied, in order.

    After each one, a channel is clipped to the range it had just before it, as in the official pretraining
    (not in its finetuning). Computed in float32, the dtype is kept; with nothing drawn, the batch itself."""
    if not any(d.intensity for d in draws):
        return batch
    result = torch.empty_like(batch)
    for i, d in enumerate(draws):
        x = batch[i]
        for name, parameters in d.intensity:
            x = x.float()
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = _clip(TRANSFORMS[name](x, *parameters), low, high)
        result[i] = x
    return result


# ----------------------------------------------------------------------------------------- spatial transforms
@torch.no_grad()
def spatial(crops, labels, draws):
    """Crops (C, *context), of unequal sizes, -> batch (B, C, *size) float32; labels (*context) or None alike.
    A sample without a spatial transform passes bitwise; the official code interpolates every sample."""
    size, device = draws[0].size, crops[0].device
    images, moved = torch.empty(len(crops), len(crops[0]), *size, device=device), []
    for i, (crop, label, d) in enumerate(zip(crops, labels or [None] * len(crops), draws, strict=True)):
        angles, scale = d.angles or (0, 0, 0), d.scale or 1.0
        if d.elastic or scale != 1 or any(angles):
            field = elastic_displacement(*d.elastic, size, device) if d.elastic else None
            crop, label = spatial_transform(crop.float(), label, angles, scale, field, size)
        images[i] = crop
        moved.append(label)
    return images, None if labels is None else torch.stack(moved)


def rotation_matrix(angles):
    """R = R0 R1 R2, right-handed rotations in degrees about axes 0, 1, 2: (3, 3) float64."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(np.asarray(angles, dtype=np.float64))):
        turn, (i, j) = np.eye(3), ((axis + 1) % 3, (axis + 2) % 3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def context_of(size, angles, scale, elastic):
    """Box that the transformed patch reads, of the patch's parity on each axis so that the centres align."""
    if not (angles or scale or elastic):
        return size
    reach = np.array([(n - 1) / 2 for n in size])
    if elastic:  # displacements are sub-voxel to about 2 voxels: five standard deviations
        alpha, sigma, _ = elastic
        reach = reach + 5 * alpha * math.sqrt((1 / (2 * math.sqrt(math.pi) * sigma)) ** 3 / 3)
    reach = (scale or 1.0) * np.abs(rotation_matrix(angles or (0, 0, 0)).T) @ reach
    return tuple(n + 2 * max(0, math.ceil(r - (n - 1) / 2 - 1e-6)) for n, r in zip(size, reach, strict=True))


@torch.no_grad()
def spatial_transform(x, label, angles, scale, displacement, size):
    """x (C, D, H, W) and label (..., D, H, W) or None, looked up once at moved positions.

    The position c of a voxel of the result, from its centre, plus the displacement (3, *size) in voxels,
    reads the source at scale * R^T c from its centre: trilinear for x, nearest for the label, 0 outside."""
    matrix = (scale * rotation_matrix(angles).T).tolist()
    if displacement is None and not any(angles):
        moved = _zoom(x.float(), scale, size)
    else:
        moved = _lookup(x.float(), False, matrix, displacement, size)
    low, high = x.amin((1, 2, 3), keepdim=True).float(), x.amax((1, 2, 3), keepdim=True).float()
    moved = _clip(moved, low.clamp_(max=0), high.clamp_(min=0)).to(x.dtype)  # weights sum to 1 up to rounding
    if label is None:
        return moved, None
    found = _lookup(label.reshape(-1, *label.shape[-3:]).float(), True, matrix, displacement, size)
    return moved, found.view(*label.shape[:-3], *size).to(label.dtype)


def _zoom(x, scale, size):
    """Trilinear, without rotation and displacement: the first axis by a matrix, then plane by plane."""
    depth, *sides = x.shape[1:]
    z, *lines = ((np.arange(n) - (n - 1) / 2) * scale for n in size)
    weights = np.maximum(1 - abs(z[:, None] + (depth - 1) / 2 - np.arange(depth)), 0)
    planes = resample.apply_matrix(x, weights, 0).view(-1, 1, *sides)
    lines = [resample.upload_array(line * 2 / max(n - 1, 1), x) for line, n in zip(lines, sides, strict=True)]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1).expand(len(planes), -1, -1, -1)
    return F.grid_sample(planes, grid, "bilinear", "zeros", align_corners=True).view(-1, *size)


def _lookup(x, nearest, matrix, displacement, size):
    """Trilinear or nearest, by gathers and linear blends: on a CPU twice as fast as grid_sample."""
    sides = [n + 3 for n in x.shape[1:]]  # with one voxel of 0 below, two above
    strides = (sides[1] * sides[2], sides[2], 1)
    volumes, moved = F.pad(x, (1, 2) * 3).flatten(1), x.new_empty(len(x), *size)
    lines = [torch.arange(n, device=x.device) - (n - 1) / 2 for n in size]
    planes = max(1, 2 ** 17 // (size[1] * size[2])) if x.device.type == "cpu" else size[0]  # fit the cache
    for start in range(0, size[0], planes):
        part, index, fractions = slice(start, start + planes), 0, []
        for row, side, stride in zip(matrix, sides, strides, strict=True):
            a, b, c = (line * weight for line, weight in zip(lines, row, strict=True))
            position = (a[part, None, None] + (side / 2 - 1) + b[:, None]) + c
            for i, weight in enumerate(row if displacement is not None else ()):
                if weight:
                    position.add_(displacement[i, part], alpha=weight)
            position.clamp_(0, side - 2)
            corner = (position + 0.5 if nearest else position).int()
            index = corner * stride + index
            fractions += [] if nearest else [(position - corner).view(-1)]
        for source, target in zip(volumes, moved, strict=True):
            target[part] = _blend(source, index.view(-1), fractions, strides).view_as(index)
    return moved


def _blend(source, index, fractions, strides):
    """Linear interpolation along one axis of linear interpolations along the others."""
    if not fractions:
        return source.index_select(0, index)
    far = _blend(source, index + strides[0], fractions[1:], strides[1:])
    return _blend(source, index, fractions[1:], strides[1:]).lerp_(far, fractions[0])


@torch.no_grad()
def elastic_displacement(alpha, sigma, seed, size, device):
    """Smooth displacement (3, *size) in voxels: alpha times white noise U(-1, 1) filtered with a Gaussian.

    The reference filters full-size noise, its most expensive step. A field that smooth is given by noise on
    nodes sigma / 2 apart, filtered and interpolated by one matrix an axis, with its standard deviation."""
    step = sigma / 2
    generator = torch.Generator().manual_seed(seed)
    nodes = [math.ceil(n / step) + 1 for n in size]
    field = resample.upload((2 * torch.rand(3, *nodes, generator=generator) - 1) * alpha, device)
    for axis in (2, 1, 0):
        n, m = size[axis], nodes[axis]
        distance = np.arange(n)[:, None] - (n - 1) / 2 - (np.arange(m) - (m - 1) / 2) * step
        kernel = np.exp(-0.5 * (distance / sigma) ** 2) * math.sqrt(step / (2 * math.pi)) / sigma
        field = resample.apply_matrix(field, kernel, axis)
    return field


def _clip(x, low, high):
    """x.clamp_(low, high), many times quicker on a CPU."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def _noise(x, sigma, seed):
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty(x.shape, device=x.device).normal_(0, sigma, generator=generator)


@torch.no_grad()
def gaussian_noise(x, sigma, seed):
    """x + n, n normal of standard deviation sigma. At most 0.001 of [0, 1]: next to nothing, as published."""
    return _noise(x, sigma, seed).add_(x).to(x.dtype)


@torch.no_grad()
def multiplicative_noise(x, sigma, seed):
    """x + x n, n normal of standard deviation sigma."""
    return _noise(x, sigma, seed).add_(1).mul_(x).to(x.dtype)


@torch.no_grad()
def gaussian_blur(x, sigma):
    """Gaussian filter of sigma voxels, cut at 4 sigma; mirrored border, its outermost voxel repeated."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return x.clone()
    kernel, blurred = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2), x.float()
    for axis, n in enumerate(x.shape[1:]):
        mirrored = np.pad(np.eye(n), ((radius, radius), (0, 0)), "symmetric")
        matrix = sum(weight * mirrored[i:i + n] for i, weight in enumerate(kernel / kernel.sum()))
        blurred = resample.apply_matrix(blurred, matrix, axis)
    return blurred.to(x.dtype)


def _filter_frequencies(x, gain, axis):
    """Magnitude of x after its frequencies along one axis are multiplied by gain (n,), unshifted order.
    Its even part makes the real half of the result, its odd part the imaginary one, by quicker transforms."""
    n, mirrored, shape = len(gain), np.roll(gain[::-1], 1), [-1 if a == axis else 1 for a in range(3)]
    low = x.amin((1, 2, 3), keepdim=True).float().clamp_(max=0)  # the magnitude would fold negative values
    spectrum = torch.fft.rfft(x - low, dim=axis + 1)
    halves = [torch.fft.irfft(spectrum * (resample.upload_array(part[:n // 2 + 1], x).view(shape) * unit), n,
                              axis + 1)
              for part, unit in ((gain + mirrored, 0.5), (gain - mirrored, 0.5j)) if part.any()]
    return functools.reduce(torch.hypot, halves).abs().add_(low).to(x.dtype)


@torch.no_grad()
def motion_ghosting(x, alpha, every, axis):
    """Ghosts along an axis: planes 0, every, 2 every, ... of k-space, except the last plane, times alpha."""
    gain = np.ones(x.shape[axis + 1])
    gain[0:-1:every] = alpha
    return _filter_frequencies(x, gain, axis)


@torch.no_grad()
def gibbs_ringing(x, keep, axis):
    """Ringing along an axis: all but the `keep` central frequencies are 0. keep = side is the identity."""
    n = x.shape[axis + 1]
    gain = np.zeros(n)
    gain[math.ceil(n / 2) - math.ceil(keep / 2):math.ceil(n / 2) + math.ceil(keep / 2)] = 1
    return _filter_frequencies(x, np.fft.ifftshift(gain), axis)


@torch.no_grad()
def low_resolution(x, shape):
    """Down to `shape` by nearest voxel, back up by cubic spline, clipped to the down-sampled range."""
    index = torch.arange(len(x), device=x.device, dtype=torch.int32)  # into the flattened volume
    for n, m in zip(x.shape[1:], shape, strict=True):
        nearest = (2 * torch.arange(m, device=x.device) + 1) * n // (2 * m)  # floor((i + 1/2) n / m), exactly
        index = index[..., None] * n + nearest.int()
    small = x.float().reshape(-1).index_select(0, index.view(-1)).view(-1, *shape)
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    for axis in (2, 1, 0):
        if shape[axis] != x.shape[axis + 1]:
            small = resample.apply_matrix(small, resample.spline_up(shape[axis], x.shape[axis + 1]), axis)
    return _clip(small, low, high).to(x.dtype)


@torch.no_grad()
def bias_field(x, center):
    """x times 1 - sum over axes of ((i - center) / side)^2, at least 0 (the official field goes negative)."""
    a, b, c = (((torch.arange(n, device=x.device) - at) / n) ** 2
               for n, at in zip(x.shape[1:], center, strict=True))
    return ((1 - a[:, None, None] - b[:, None] - c).clamp_(min=0) * x).to(x.dtype)


@torch.no_grad()
def gamma(x, gamma, invert):
    """Gamma curve on each channel's own range; `invert` applies it to the negative, and negates back."""
    curve = x.float().neg() if invert else x.float()
    low = curve.amin((1, 2, 3), keepdim=True)
    span = curve.amax((1, 2, 3), keepdim=True) - low + 1e-7
    curve = (curve - low).pow_(gamma).mul_(span ** (1 - gamma)).add_(low)
    return (curve.neg_() if invert else curve).to(x.dtype)


TRANSFORMS = {function.__name__: function for function in (
    gaussian_noise, gaussian_blur, multiplicative_noise, motion_ghosting, gibbs_ringing, low_resolution,
    bias_field, gamma)}
