"""Augmentations (paper, Appendix B, Table 5) as pure functions of tensors and drawn parameters.

`draw` is the policy: what is applied to one sample, how often and how strongly. `spatial` moves
image and label together. `intensity` changes the input only; undoing it is the "augmentation
reversal" of section 3.1. One sample is (C, D, H, W); axes 0, 1, 2 are D, H, W.

Parameters, and the random numbers of the elastic field, are drawn on the CPU: bitwise the same on
every device. Noise is drawn on the device: bitwise the same on one kind of device, the same in
distribution across kinds. Nothing waits for the device.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import resample


class Draw(NamedTuple):
    """The parameters of one sample; None where a transform was not drawn."""
    size: tuple  # patch (D, H, W)
    context: tuple  # box to read around the patch, so that the transforms find data, not padding
    angles: tuple | None = None  # degrees about axes 0, 1, 2; 0 where the axis was not drawn
    scale: float | None = None  # above 1 reads a larger region: the head appears smaller
    elastic: tuple | None = None  # alpha, sigma, seed
    intensity: tuple = ()  # (function name, parameters) in the order of application


# ------------------------------------------------------------------------------ the policy, Table 5
def draw(seed, preset, patch_size):
    """Draw the augmentations of one sample -> Draw. Table 5, in the order of application.

    preset: "none"; "spatial", the rotation and scale of finetuning (section 3.2); "all", Table 5.
    The official preset named spatial holds the elastic deformation too; the paper never uses it
    alone. In the comments, p is the probability that a sample gets the transform, and [a, b] the
    range that a parameter is drawn from, uniformly."""
    rng = np.random.default_rng(seed)
    size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
    if preset == "none":
        return Draw(size, size)

    # Rotation: p 0.2, each axis 0.66; [-30, 30] degrees.
    angles = None
    if rng.random() < 0.2:
        angles = tuple(rng.uniform(-30, 30) if rng.random() < 0.66 else 0.0 for _ in range(3))

    # Scale: p 0.2; [0.9, 1.1].
    scale = rng.uniform(0.9, 1.1) if rng.random() < 0.2 else None

    # What follows is drawn by the preset "all" only.
    if preset == "spatial":
        return Draw(size, context_of(size, angles, scale, None), angles, scale)

    # Elastic deformation: p 0.33; alpha [200, 600], sigma [20, 30] voxels. Table 5 lists it under
    # Intensity; in the official code, and here, it moves the target too.
    elastic = None
    if rng.random() < 0.33:
        alpha = rng.uniform(200, 600)
        sigma = rng.uniform(20, 30)
        noise_seed = int(rng.integers(2 ** 62))
        elastic = (alpha, sigma, noise_seed)

    context = context_of(size, angles, scale, elastic)
    return Draw(size, context, angles, scale, elastic, draw_intensity(rng, size))


def draw_intensity(rng, size):
    """The other rows of Table 5, in the order of application: ((function name, parameters), ...).

    All channels of a sample share them; the official code draws them once per channel."""
    drawn = []

    # Additive noise: p 0.2; sigma [1e-4, 1e-3] as in the code. Table 5 prints "[1^-3, 1^-4]".
    if rng.random() < 0.2:
        sigma = rng.uniform(1e-4, 1e-3)
        noise_seed = int(rng.integers(2 ** 62))
        drawn.append(("gaussian_noise", (sigma, noise_seed)))

    # Blur: p 0.1; sigma [0, 1] voxels.
    if rng.random() < 0.1:
        drawn.append(("gaussian_blur", (rng.uniform(0, 1),)))

    # Multiplicative noise: p 0.2; sigma as above.
    if rng.random() < 0.2:
        sigma = rng.uniform(1e-4, 1e-3)
        noise_seed = int(rng.integers(2 ** 62))
        drawn.append(("multiplicative_noise", (sigma, noise_seed)))

    # Motion ghosting: p 0.2; alpha [0.85, 0.95], every plane of "[2, 11]", 11 excluded.
    if rng.random() < 0.2:
        axis = int(rng.integers(3))
        alpha = rng.uniform(0.85, 0.95)
        every = int(rng.integers(2, 11))
        drawn.append(("motion_ghosting", (alpha, every, axis)))

    # Gibbs ringing: p 0.2. The official code keeps 96 to 128 planes, here [0.75, 1] of the side.
    if rng.random() < 0.2:
        axis = int(rng.integers(3))
        keep = round(rng.uniform(0.75, 1) * size[axis])
        drawn.append(("gibbs_ringing", (keep, axis)))

    # Low resolution: p 0.1, each axis 0.33; one zoom [0.5, 1] for all of them.
    if rng.random() < 0.1:
        zoom = rng.uniform(0.5, 1)
        low = tuple(round(n * zoom) if rng.random() < 0.33 else n for n in size)
        drawn.append(("low_resolution", (low,)))

    # Bias field: p 0.33; its centre is any voxel.
    if rng.random() < 0.33:
        center = tuple(int(rng.integers(n)) for n in size)
        drawn.append(("bias_field", (center,)))

    # Gamma: p 0.2; [0.5, 1] or [1, 2] as in the code. "Inverted" with 0.05 of 0.2: Table 5's 0.01.
    if rng.random() < 0.2:
        value = rng.uniform(0.5, 1) if rng.random() < 0.5 else rng.uniform(1, 2)
        invert = rng.random() < 0.05
        drawn.append(("gamma", (value, invert)))
    return tuple(drawn)


@torch.no_grad()
def intensity(batch, draws):
    """Apply each sample's intensity transforms, in order, to a batch (B, C, D, H, W); B draws.

    Computed in float32; the dtype is kept. With nothing drawn, the result is the batch itself."""
    if not any(drawn.intensity for drawn in draws):
        return batch

    result = torch.empty_like(batch)
    for number, drawn in enumerate(draws):
        x = batch[number]
        for name, parameters in drawn.intensity:
            # Clip each channel to the range it had before the transform. The official code does
            # so in pretraining but not in finetuning.
            x = x.float()
            low, high = channel_range(x)
            x = clip(TRANSFORMS[name](x, *parameters), low, high)
        result[number] = x
    return result


def channel_range(x):
    """Smallest and largest value of each channel of x (C, D, H, W): (C, 1, 1, 1) each."""
    return x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)


def clip(x, low, high):
    """As x.clamp_(low, high), but on a CPU in a quarter of its time."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


# ------------------------------------------------------------------------------- spatial transforms
@torch.no_grad()
def spatial(crops, labels, draws):
    """Apply each sample's spatial transforms -> batch (B, C, *size) float32 and labels (B, *size).

    Crops are (C, *context), of unequal contexts; labels are (*context) each, or None. A sample
    without a spatial transform passes bitwise; the official code interpolates every sample."""
    images = torch.empty(len(crops), len(crops[0]), *draws[0].size, device=crops[0].device)
    moved_labels = []
    for number, drawn in enumerate(draws):
        image = crops[number]
        label = labels[number] if labels else None
        angles = drawn.angles or (0, 0, 0)
        scale = drawn.scale or 1.0
        field = None
        if drawn.elastic:
            field = elastic_displacement(*drawn.elastic, drawn.size, image.device)

        if any(angles) or scale != 1 or drawn.elastic:
            image, label = spatial_transform(image.float(), label, angles, scale, field, drawn.size)
        images[number] = image
        moved_labels.append(label)
    return images, torch.stack(moved_labels) if labels else None


def rotation_matrix(angles):
    """R = R0 R1 R2, right-handed rotations in degrees about axes 0, 1, 2: (3, 3) float64."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(angles)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j] = -math.sin(angle)
        turn[j, i] = math.sin(angle)
        matrix = matrix @ turn
    return matrix


def context_of(size, angles, scale, elastic):
    """Box (D, H, W) that a transformed patch reads, centred on the patch. None: not drawn."""
    # Nearly half of the samples end here, which spares the loader a tenth of its work.
    if not (angles or scale or elastic):
        return size

    half = (np.array(size) - 1) / 2
    reach = half

    # Displacements have a standard deviation of up to 0.6 voxels: allow for five of them.
    if elastic:
        alpha, sigma, _ = elastic
        # Of white noise U(-1, 1), a third; a Gaussian filter leaves this share of it on each axis.
        variance = (1 / (2 * math.sqrt(math.pi) * sigma)) ** 3 / 3
        reach = half + 5 * alpha * math.sqrt(variance)

    # Along each axis it is a corner that reads furthest, hence the absolute values.
    matrix = (scale or 1.0) * rotation_matrix(angles or (0, 0, 0)).T
    reach = np.abs(matrix) @ reach

    # Add the same number of voxels on both sides, so that the centres align.
    beyond = np.ceil(reach - half - 1e-6).astype(int).clip(min=0)
    return tuple((size + 2 * beyond).tolist())


@torch.no_grad()
def spatial_transform(x, label, angles, scale, displacement, size):
    """Move x (C, D, H, W) and a label (..., D, H, W) or None -> (C, *size) and (..., *size).

    A voxel at c from the centre of the result reads the source at scale * R^T (c + displacement)
    from its centre, in voxels: trilinear for x, nearest for the label, 0 outside. Angles are in
    degrees, displacement is (3, *size) or None."""
    matrix = scale * rotation_matrix(angles).T
    moved = lookup(x.float(), matrix, displacement, size, "bilinear")

    # The weights of a voxel sum to 1 but for rounding: stay in the range of x and of the 0 outside.
    low, high = channel_range(x)
    low.clamp_(max=0)
    high.clamp_(min=0)
    moved = clip(moved, low.float(), high.float()).to(x.dtype)
    if label is None:
        return moved, None

    # Any leading dimensions of the label travel as channels.
    volumes = label.reshape(-1, *label.shape[-3:]).float()
    found = lookup(volumes, matrix, displacement, size, "nearest")
    return moved, found.view(*label.shape[:-3], *size).to(label.dtype)


def lookup_by_grid_sample(x, matrix, displacement, size, mode):
    """Read x (C, D, H, W) float32 at matrix (c + displacement), for each voxel c of the result.

    mode: "bilinear", which is trilinear in a volume, or "nearest"."""
    # Where each voxel of the result lies, from the centre: (3, *size).
    lines = [torch.arange(n, device=x.device) - (n - 1) / 2 for n in size]
    position = torch.stack(torch.meshgrid(*lines, indexing="ij"))
    if displacement is not None:
        position += displacement

    # Where it reads x. grid_sample counts from -1 to 1 between the outer faces of x, and wants the
    # last axis first.
    sides = np.array(x.shape[1:])
    to_grid = matrix[::-1] * 2 / sides[::-1, None]
    to_grid = resample.upload_array(to_grid, x)
    grid = torch.tensordot(to_grid, position, 1).movedim(0, -1)
    return F.grid_sample(x[None], grid[None], mode, "zeros", align_corners=False)[0]


# fast_cpu.install_lookup puts a quicker one here for tensors on a CPU.
lookup = lookup_by_grid_sample


def elastic_displacement(alpha, sigma, seed, size, device):
    """Displacement (3, *size) in voxels: alpha times white noise U(-1, 1) under a Gaussian filter.

    The official code filters noise of full size. A field this smooth needs noise on nodes sigma / 2
    apart only, filtered and interpolated by one matrix per axis; its deviation is the same."""
    step = sigma / 2
    nodes = [math.ceil(n / step) + 1 for n in size]
    generator = torch.Generator().manual_seed(seed)
    noise = 2 * torch.rand(3, *nodes, generator=generator) - 1
    field = resample.upload(noise * alpha, device)
    for axis in (2, 1, 0):
        matrix = resample.smooth_noise_matrix(nodes[axis], size[axis], step, sigma)
        field = resample.apply_matrix(field, matrix, axis)
    return field


# ----------------------------------------------------------------------------- intensity transforms
def normal_noise(x, sigma, seed):
    """Normal noise of standard deviation sigma, of the shape and on the device of x."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty(x.shape, device=x.device).normal_(0, sigma, generator=generator)


@torch.no_grad()
def gaussian_noise(x, sigma, seed):
    """x + n, n normal of standard deviation sigma. Table 5's sigmas are tiny beside [0, 1]."""
    return normal_noise(x, sigma, seed).add_(x).to(x.dtype)


@torch.no_grad()
def multiplicative_noise(x, sigma, seed):
    """x + x n, n normal of standard deviation sigma."""
    return normal_noise(x, sigma, seed).add_(1).mul_(x).to(x.dtype)


@torch.no_grad()
def gaussian_blur(x, sigma):
    """Gaussian filter of sigma voxels, cut at 4 sigma; mirrored border, outer voxel included."""
    kernel = resample.gaussian_kernel(sigma)
    blurred = x.float()
    for axis, n in enumerate(x.shape[1:]):
        matrix = resample.filter_matrix(kernel, n, "symmetric")
        blurred = resample.apply_matrix(blurred, matrix, axis)
    return blurred.to(x.dtype)


@torch.no_grad()
def motion_ghosting(x, alpha, every, axis):
    """Ghosts along an axis: planes 0, every, 2 every ... of k-space times alpha, never the last."""
    gain = np.ones(x.shape[axis + 1])
    gain[0:-1:every] = alpha
    return resample.filter_frequencies(x, gain, axis)


@torch.no_grad()
def gibbs_ringing(x, keep, axis):
    """Ringing along an axis: only the central frequencies stay, `keep` or one more, to be even."""
    n = x.shape[axis + 1]
    middle = math.ceil(n / 2)
    half = math.ceil(keep / 2)
    gain = np.zeros(n)
    gain[middle - half:middle + half] = 1
    return resample.filter_frequencies(x, np.fft.ifftshift(gain), axis)


@torch.no_grad()
def low_resolution(x, shape):
    """Down to `shape` by nearest voxel, back up by cubic spline, clipped to the range between."""
    small = x.float()
    for axis, n in enumerate(shape):
        index = resample.nearest_index(x.shape[axis + 1], n)
        index = resample.upload(torch.from_numpy(index), x.device)
        small = small.index_select(axis + 1, index)

    low, high = channel_range(small)
    for axis in (2, 1, 0):
        side = x.shape[axis + 1]
        if shape[axis] != side:
            matrix = resample.spline_up(shape[axis], side)
            small = resample.apply_matrix(small, matrix, axis)
    return clip(small, low, high).to(x.dtype)


@torch.no_grad()
def bias_field(x, center):
    """x * max(0, 1 - r), where r is the sum over axes of ((i - center) / side)^2."""
    field = 1
    for axis, n in enumerate(x.shape[1:]):
        distance = (torch.arange(n, device=x.device) - center[axis]) / n
        field = field - resample.along_axis(distance ** 2, axis)
    return (field.clamp_(min=0) * x).to(x.dtype)  # the official field goes on below 0


@torch.no_grad()
def gamma(x, gamma, invert):
    """Gamma curve on each channel's own range.

    `invert` applies it to the negative and negates back, so the colours are not inverted."""
    curve = x.float().neg() if invert else x.float()
    low, high = channel_range(curve)
    span = high - low + 1e-7
    curve = (curve - low).pow_(gamma).mul_(span ** (1 - gamma)).add_(low)
    return (curve.neg_() if invert else curve).to(x.dtype)


TRANSFORMS = {function.__name__: function for function in (
    gaussian_noise, gaussian_blur, multiplicative_noise, motion_ghosting, gibbs_ringing,
    low_resolution, bias_field, gamma)}
