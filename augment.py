"""Augmentations (paper, Appendix B, Table 5) as pure functions of tensors and drawn parameters.

`draw` is the policy: what is applied to one sample, how often, how strongly, drawn on the CPU from the
sample's seed. `spatial` moves image, target and label together, in one lookup; `intensity` changes the input
only. Undoing it is the "augmentation reversal" of section 3.1. One sample is (C, D, H, W); axes 0, 1, 2 are
D, H, W.

The parameters and the elastic field are bitwise the same on every device. Noise fields are drawn on the
device from a seeded generator: bitwise the same on one kind of device, the same in distribution across kinds.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Draw(NamedTuple):
    """The parameters of one sample; None where a transform was not drawn."""
    size: tuple  # patch (D, H, W)
    context: tuple  # box to read around the patch, so that rotation and zoom find data, not padding
    angles: tuple | None = None  # degrees about axes 0, 1, 2
    scale: float | None = None  # above 1 reads a larger region: the head appears smaller
    elastic: tuple | None = None  # alpha, sigma, seed
    intensity: tuple = ()  # (function name, parameters) in the order of application


PRESETS = ("none", "spatial", "all")


# ---------------------------------------------------------------------------------------- the policy, Table 5
def draw(seed, preset, patch_size):
    """Table 5 on one screen: the augmentations of one sample with their probabilities and ranges -> Draw.

    preset: none; spatial, the rotation and scale of finetuning (section 3.2); all, Table 5. (The official
    pretraining preset named spatial holds the elastic deformation too; the paper never uses it alone.)"""
    rng = np.random.default_rng(seed)
    size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)

    def chance(p):
        return rng.random() < p

    def new_seed():
        return int(rng.integers(2 ** 62))

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
        elastic = (rng.uniform(200, 600), rng.uniform(20, 30), new_seed())

    steps = []
    if chance(0.2):  # "[1^-3, 1^-4]" in Table 5; the code: U(1e-4, 1e-3)
        steps.append(("gaussian_noise", (rng.uniform(1e-4, 1e-3), new_seed())))
    if chance(0.1):
        steps.append(("gaussian_blur", (rng.uniform(0, 1),)))
    if chance(0.2):
        steps.append(("multiplicative_noise", (rng.uniform(1e-4, 1e-3), new_seed())))
    if chance(0.2):  # repetitions "[2, 11]", the upper end exclusive
        axis = int(rng.integers(3))
        steps.append(("motion_ghosting", (rng.uniform(0.85, 0.95), int(rng.integers(2, 11)), axis)))
    if chance(0.2):  # the code keeps 96 to 128 planes of any patch; here 0.75 to 1.0 of the side
        axis = int(rng.integers(3))
        steps.append(("gibbs_ringing", (round(rng.uniform(0.75, 1) * size[axis]), axis)))
    if chance(0.1):  # each axis 0.33, one zoom for all; without an axis nothing happens, and nothing is paid
        zoom, axes = rng.uniform(0.5, 1), [chance(0.33) for _ in range(3)]
        if any(axes):
            low = tuple(round(n * zoom) if hit else n for n, hit in zip(size, axes, strict=True))
            steps.append(("low_resolution", (low,)))
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
    (which switches that off in finetuning). Samples without a transform are not touched; without any, neither
    is the batch."""
    if not any(d.intensity for d in draws):
        return batch
    samples = []
    for x, d in zip(batch, draws, strict=True):
        for name, parameters in d.intensity:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = TRANSFORMS[name](x, *parameters).clamp(low, high)
        samples.append(x)
    return torch.stack(samples)


# ----------------------------------------------------------------------------------------- spatial transforms
@torch.no_grad()
def spatial(crops, labels, draws):
    """Crops (C, *context), of unequal sizes, -> batch (B, C, *size) float32; labels (*context) uint8, or
    None, alike.

    A sample without a spatial transform passes bitwise, without interpolation (the official code interpolates
    every sample, half a voxel off at 128)."""
    images, moved = [], []
    for crop, label, d in zip(crops, labels or [None] * len(crops), draws, strict=True):
        x = crop.float()
        if d.angles or d.scale or d.elastic:
            field = elastic_displacement(*d.elastic, d.size, x.device) if d.elastic else None
            x, label = spatial_transform(x, label, d.angles or (0, 0, 0), d.scale or 1.0, field, d.size)
        images.append(x)
        moved.append(label)
    return torch.stack(images), None if labels is None else torch.stack(moved)


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
    """x (C, D, H, W) and label (..., D, H, W) or None, looked up once at rotated, scaled, displaced
    positions.

    The position c of a voxel of the result, from its centre, plus the displacement (3, *size) in voxels,
    reads the source at scale * R^T c from the source's centre: trilinear for x, nearest for the label, 0
    outside."""
    matrix = torch.tensor(scale * rotation_matrix(angles).T, dtype=torch.float32, device=x.device)
    lines = [torch.arange(n, device=x.device) - (n - 1) / 2 for n in size]
    position = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    if displacement is not None:
        position = position + displacement.movedim(0, -1)
    half = torch.tensor([max(n - 1, 1) / 2 for n in x.shape[1:]], device=x.device)
    grid = ((position @ matrix.T) / half).flip(-1)[None]  # grid_sample wants (W, H, D) in [-1, 1]
    moved = F.grid_sample(x[None].float(), grid, "bilinear", "zeros", align_corners=True)[0].to(x.dtype)
    if label is None:
        return moved, None
    flat = label.reshape(1, -1, *label.shape[-3:]).float()
    found = F.grid_sample(flat, grid, "nearest", "zeros", align_corners=True)
    return moved, found.reshape(*label.shape[:-3], *size).to(label.dtype)


@torch.no_grad()
def elastic_displacement(alpha, sigma, seed, size, device):
    """Smooth random displacement (3, *size) in voxels: alpha times white noise U(-1, 1) filtered with a
    Gaussian.

    The reference filters full-size noise, the most expensive step of all. A field that smooth is given by
    noise on nodes sigma / 2 apart: filter and interpolation together are one matrix an axis, with the same
    standard deviation."""
    step = sigma / 2
    generator = torch.Generator().manual_seed(seed)
    nodes = [math.ceil(n / step) + 1 for n in size]
    field = (torch.rand(3, *nodes, generator=generator) * 2 - 1).to(device)
    for axis, (n, m) in enumerate(zip(size, nodes, strict=True)):
        centre = torch.arange(m, device=device) * step + (n - 1 - (m - 1) * step) / 2
        distance = torch.arange(n, device=device)[:, None] - centre
        kernel = torch.exp(-0.5 * (distance / sigma) ** 2) * (math.sqrt(step / (2 * math.pi)) / sigma)
        field = apply_matrix(field, kernel, axis)
    return alpha * field


# --------------------------------------------------------------------------------------- intensity transforms
def apply_matrix(x, matrix, axis):
    """Multiply one spatial axis of (C, D, H, W) by a matrix (n_out, n_in); in float32, the dtype is kept."""
    moved = x.movedim(axis + 1, -1).float() @ matrix.T.to(x.device, torch.float32)
    return moved.movedim(-1, axis + 1).to(x.dtype)


def _normal(x, seed):
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, device=x.device)


@torch.no_grad()
def gaussian_noise(x, sigma, seed):
    """x + n, n normal with standard deviation sigma. At most 0.001 of [0, 1]: practically nothing, as
    published."""
    return (x + sigma * _normal(x, seed)).to(x.dtype)


@torch.no_grad()
def multiplicative_noise(x, sigma, seed):
    """x + x n, n normal with standard deviation sigma."""
    return (x + x * (sigma * _normal(x, seed))).to(x.dtype)


@torch.no_grad()
def gaussian_blur(x, sigma):
    """Gaussian filter of sigma voxels, cut at 4 sigma; the border is mirrored with the outermost voxel
    repeated."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return x
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    for axis, n in enumerate(x.shape[1:]):
        index = (np.arange(n)[:, None] + offsets) % (2 * n)
        index, matrix = np.minimum(index, 2 * n - 1 - index), np.zeros((n, n))
        np.add.at(matrix, (np.arange(n)[:, None], index), kernel / kernel.sum())
        x = apply_matrix(x, torch.from_numpy(matrix), axis)
    return x


def _filter_frequencies(x, gain, axis):
    """Magnitude of x after its frequencies along one axis are multiplied by gain (n,), unshifted order."""
    shape = [1] * x.ndim
    shape[axis + 1] = -1
    spectrum = torch.fft.fft(x.float(), dim=axis + 1) * gain.to(x.device).view(shape)
    return torch.fft.ifft(spectrum, dim=axis + 1).abs().to(x.dtype)


@torch.no_grad()
def motion_ghosting(x, alpha, every, axis):
    """Ghosts along an axis: planes 0, every, 2 every, ... of k-space, the last plane excepted, times
    alpha."""
    gain = torch.ones(x.shape[axis + 1])
    gain[0:-1:every] = alpha
    low = x.amin((1, 2, 3), keepdim=True).clamp(max=0)  # the magnitude would fold negative values
    return _filter_frequencies(x - low, gain, axis) + low


@torch.no_grad()
def gibbs_ringing(x, keep, axis):
    """Ringing along an axis: all but the `keep` central frequencies are 0. keep = side is the identity."""
    n = x.shape[axis + 1]
    gain = torch.zeros(n)
    gain[math.ceil(n / 2) - math.ceil(keep / 2):math.ceil(n / 2) + math.ceil(keep / 2)] = 1
    low = x.amin((1, 2, 3), keepdim=True).clamp(max=0)
    return _filter_frequencies(x - low, torch.fft.ifftshift(gain), axis) + low


@torch.no_grad()
def low_resolution(x, shape):
    """Down to `shape` by nearest voxel, back up by cubic spline, clipped to the down-sampled range."""
    small = x
    for axis, (n, m) in enumerate(zip(x.shape[1:], shape, strict=True)):
        index = torch.from_numpy(((np.arange(m) + 0.5) * n / m).astype(np.int64)).to(x.device)
        small = small.index_select(axis + 1, index)
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    for axis, (n, m) in enumerate(zip(x.shape[1:], shape, strict=True)):
        if n != m:
            small = apply_matrix(small, torch.from_numpy(_spline_up(m, n)), axis)
    return small.clamp(low, high)


def _spline_up(n_in, n_out, pad=12):
    """Cubic spline from n_in to n_out voxels as a matrix; the outermost voxel is repeated beyond the border,
    which scipy realises by padding 12 of them before the spline is fitted."""
    m = n_in + 2 * pad
    spline = np.zeros((m, m))
    for offset, weight in ((-1, 1 / 6), (0, 4 / 6), (1, 1 / 6)):
        index = np.abs(np.arange(m) + offset)  # fitted with mirrored ends
        np.add.at(spline, (np.arange(m), np.where(index >= m, 2 * m - 2 - index, index)), weight)
    repeat = np.zeros((m, n_in))
    repeat[np.arange(m), np.clip(np.arange(m) - pad, 0, n_in - 1)] = 1
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5 + pad
    first = np.floor(centres).astype(int)
    t = (centres - first)[:, None]
    weights = np.concatenate([(1 - t) ** 3, 4 - 6 * t ** 2 + 3 * t ** 3, 1 + 3 * t + 3 * t ** 2 - 3 * t ** 3,
                              t ** 3], 1) / 6
    sample = np.zeros((n_out, m))
    np.add.at(sample, (np.arange(n_out)[:, None], first[:, None] + np.arange(-1, 3)), weights)
    return sample @ np.linalg.solve(spline, repeat)


@torch.no_grad()
def bias_field(x, center):
    """x times 1 - sum over axes of ((i - center) / side)^2, at least 0 (the official field goes negative)."""
    field = torch.ones((), device=x.device)
    for axis, (n, c) in enumerate(zip(x.shape[1:], center, strict=True)):
        line = ((torch.arange(n, device=x.device) - c) / n) ** 2
        field = field - line.view([-1 if a == axis else 1 for a in range(3)])
    return (x * field.clamp(min=0)).to(x.dtype)


@torch.no_grad()
def gamma(x, gamma, invert):
    """Gamma curve on each channel's own range; `invert` applies it to the negative, and negates back."""
    x = -x if invert else x
    low = x.amin((1, 2, 3), keepdim=True)
    span = x.amax((1, 2, 3), keepdim=True) - low + 1e-7
    x = low + span * ((x - low) / span).clamp(min=0) ** gamma
    return -x if invert else x


TRANSFORMS = {function.__name__: function for function in (
    gaussian_noise, gaussian_blur, multiplicative_noise, motion_ghosting, gibbs_ringing, low_resolution,
    bias_field, gamma)}
