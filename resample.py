"""Resampling and filters along an axis, mostly as a matrix; nearest voxels; copies to a device."""

import functools
import math

import numpy as np
import torch


def apply_matrix(x, matrix, axis):
    """Multiply one spatial axis of x (C, D, H, W) float32 by a numpy matrix (n_out, n_in)."""
    n_out, n_in = matrix.shape
    before = x.shape[:axis + 1]
    after = x.shape[axis + 2:]
    inner = math.prod(after)
    flat = x.reshape(-1, n_in, inner)
    on_device = upload_array(matrix, x)
    result = x.new_empty(len(flat), n_out, inner)

    # The matrices here are banded. On a CPU, blocks of 16 rows skip most of the zeros.
    block = 16 if x.device.type == "cpu" else n_out
    for start in range(0, n_out, block):
        part = slice(start, start + block)
        columns = used_columns(matrix[part])
        rows = on_device[part, columns]
        source = flat[:, columns]
        target = result[:, part]

        # For the last axis, inner is 1: one product serves all lines along it.
        if inner == 1:
            torch.mm(source[..., 0], rows.T, out=target[..., 0])
        else:
            torch.bmm(rows.expand(len(flat), -1, -1), source, out=target)
    return result.view(*before, n_out, *after)


def used_columns(rows):
    """The columns of a banded matrix outside of which these rows are 0, as a slice."""
    largest = np.abs(rows).max(0)
    used = np.flatnonzero(largest > 1e-6)
    if len(used) == 0:
        return slice(0, 1)  # a product needs one column at least
    return slice(used[0], used[-1] + 1)


def upload(tensor, device):
    """Copy a CPU tensor to the device without waiting for the device.

    Out of memory that is not pinned, a copy begins only when all that is queued there is done."""
    if torch.device(device).type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_array(array, x):
    """A small numpy array as float32 on the device of x."""
    return upload(torch.from_numpy(array).float(), x.device)


# ------------------------------------------------------------------------------------------ filters
def gaussian(distance, sigma):
    """A Gaussian of height 1."""
    return np.exp(-0.5 * (distance / sigma) ** 2)


def gaussian_kernel(sigma):
    """Weights of a Gaussian of sigma voxels, cut at 4 sigma. Their sum is 1; sigma may be 0."""
    radius = int(4 * sigma + 0.5)
    distance = np.arange(-radius, radius + 1)
    kernel = gaussian(distance, max(sigma, 1e-12))
    return kernel / kernel.sum()


def smooth_noise_matrix(nodes, n, step, sigma):
    """Matrix (n, nodes) that makes a smooth field on n voxels out of white noise.

    The noise is on nodes `step` voxels apart, and both are centred. In each axis, the field has the
    standard deviation and the smoothness of white noise on voxels under a Gaussian of sigma."""
    voxels = from_middle(n)
    nodes = from_middle(nodes) * step
    distance = voxels[:, None] - nodes

    # The fewer the nodes, the more each must weigh for the same standard deviation.
    weight = math.sqrt(step / (2 * math.pi))
    return gaussian(distance, sigma) * weight / sigma


def from_middle(n):
    """Positions of n voxels along an axis, (n,), counted from the middle of the axis."""
    return np.arange(n) - (n - 1) / 2


def filter_matrix(kernel, n, boundary):
    """Matrix (n, n) that filters n voxels with a kernel of odd length.

    boundary: what lies beyond the outermost voxels, as a mode of numpy.pad."""
    # A filter is a weighted sum of shifted copies; row i of `padded` says which voxel lies there.
    reach = len(kernel) // 2
    padded = padded_identity(n, reach, boundary)
    return sum(weight * padded[i:i + n] for i, weight in enumerate(kernel))


def padded_identity(n, pad, boundary):
    """Matrix (n + 2 pad, n) that pads n voxels on both sides, by a mode of numpy.pad."""
    return np.pad(np.eye(n), ((pad, pad), (0, 0)), boundary)


def along_axis(values, axis):
    """A tensor (n,) in the shape in which it lies along one spatial axis of (C, D, H, W)."""
    axes_behind = 2 - axis
    return values.view(-1, *[1] * axes_behind)


def filter_frequencies(x, gain, axis):
    """Multiply the frequencies of x (C, D, H, W) along one spatial axis by gain (n,), 0 first.

    Returns the magnitude, in the dtype of x."""
    # The magnitude would fold negative values over: lift them to 0 meanwhile.
    low = x.amin((1, 2, 3), keepdim=True)
    low = low.float().clamp_(max=0)
    spectrum = torch.fft.fft(x - low, dim=axis + 1)

    spectrum *= along_axis(upload_array(gain, x), axis)
    filtered = torch.fft.ifft(spectrum, dim=axis + 1)
    return filtered.abs().add_(low).to(x.dtype)


# ------------------------------------------------------------------------------------------ splines
# A cubic B-spline at its own voxel and at the two beside it.
B_SPLINE = np.array([1, 4, 1]) / 6


def cubic_weights(n_in, n_out):
    """How a cubic spline over n_in voxels is read at n_out voxels; pixel centres are aligned.

    Returns the index of the first of the four coefficients that a voxel reads, (n_out,), which may
    lie 2 beyond the border, and the weights of the four, (4, n_out, 1)."""
    pixels = np.arange(n_out)
    centres = (pixels + 0.5) * n_in / n_out - 0.5
    below = np.floor(centres).astype(int)

    # The B-spline's four pieces, t beyond the voxel below.
    t = (centres - below)[:, None]
    pieces = [
        (1 - t) ** 3,
        4 - 6 * t ** 2 + 3 * t ** 3,
        1 + 3 * t + 3 * t ** 2 - 3 * t ** 3,
        t ** 3,
    ]
    return below - 1, np.stack(pieces) / 6


def read_spline(coefficients, pad, n_in, n_out):
    """Values at n_out voxels of a spline over n_in, by its coefficients (n_in + 2 pad, ...)."""
    first, weights = cubic_weights(n_in, n_out)
    first += pad
    return sum(weight * coefficients[first + i] for i, weight in enumerate(weights))


@functools.lru_cache(maxsize=256)
def spline_up(n_in, n_out, pad=12):
    """Cubic spline from n_in to n_out voxels as a matrix (n_out, n_in) float64.

    Beyond the border the outermost voxel is repeated: before the spline is fitted, `pad` copies of
    it are added, as in scipy."""
    repeated = padded_identity(n_in, pad, "edge")
    spline = filter_matrix(B_SPLINE, len(repeated), "constant")
    coefficients = np.linalg.solve(spline, repeated)
    return read_spline(coefficients, pad, n_in, n_out)


@functools.lru_cache(maxsize=64)
def resampling_matrix(n_in, n_out):
    """Cubic resampling as a matrix (n_out, n_in) float64, as scikit-image's resize(order=3).

    A Gaussian filter if the axis shrinks, the spline's coefficients, the cubic weights at the new
    pixel centres. Every boundary is mirrored about the outermost voxel."""
    # Filter against aliasing, and find the coefficients of the spline through the result.
    sigma = max(0.0, (n_in / n_out - 1) / 2)
    smooth = filter_matrix(gaussian_kernel(sigma), n_in, "reflect")
    spline = filter_matrix(B_SPLINE, n_in, "reflect")
    coefficients = np.linalg.solve(spline, smooth)

    # Read the spline at the new centres. The four coefficients reach 2 beyond the border.
    mirrored = padded_identity(n_in, 2, "reflect")
    return read_spline(mirrored, 2, n_in, n_out) @ coefficients


def resample(volume, shape):
    """Volume (D, H, W) -> float32 of the given shape, as scikit-image's resize(order=3).

    One matrix product per axis, clipped to the input's range. Any axis that shrinks is smoothed."""
    array = np.ascontiguousarray(volume, dtype=np.float32)
    x = torch.from_numpy(array)[None]

    # The axis that shrinks most comes first, which leaves the least work for the others.
    growth = np.divide(shape, volume.shape)
    for axis in np.argsort(growth, kind="stable").tolist():
        n_in = volume.shape[axis]
        n_out = shape[axis]
        if n_in != n_out:
            x = apply_matrix(x, resampling_matrix(n_in, n_out), axis)

    # A cubic spline overshoots: keep to the range of the volume.
    low = float(volume.min())
    high = float(volume.max())
    return x[0].clamp(low, high).numpy()


def nearest_index(n_in, n_out):
    """For each of n_out voxels the nearest of n_in, (n_out,): floor((i + 1/2) n_in / n_out)."""
    return (2 * np.arange(n_out) + 1) * n_in // (2 * n_out)


def nearest(array, shape):
    """A numpy array (D, H, W) -> the given shape by nearest voxel; pixel centres are aligned."""
    for axis, n in enumerate(shape):
        array = array.take(nearest_index(array.shape[axis], n), axis)
    return array
