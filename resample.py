"""Splines and filters as one matrix an axis, nearest voxels, and copies to the device."""

import functools
import math

import numpy as np
import torch


def apply_matrix(x, matrix, axis):
    """Multiply one spatial axis of (C, D, H, W), float32, by a numpy matrix (n_out, n_in).
    The matrices here are banded: on a CPU, 16 rows at a time are multiplied by the columns that they use."""
    n_out, n_in = matrix.shape
    inner, block = math.prod(x.shape[axis + 2:]), 16 if x.device.type == "cpu" else n_out
    flat, on_device = x.reshape(-1, n_in, inner), upload_array(matrix, x)
    result = x.new_empty(len(flat), n_out, inner)
    for start in range(0, n_out, block):
        used = np.flatnonzero(np.abs(matrix[start:start + block]).max(0) > 1e-6)
        columns = slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)
        rows, target = on_device[start:start + block, columns], result[:, start:start + block]
        if inner == 1:
            torch.mm(flat[:, columns, 0], rows.T, out=target[..., 0])
        else:
            torch.bmm(rows.expand(len(flat), -1, -1), flat[:, columns], out=target)
    return result.view(*x.shape[:axis + 1], n_out, *x.shape[axis + 2:])


def upload(tensor, device):
    """A CPU tensor to the device, which is not waited for: out of memory that is not pinned, the copy would
    begin only when all that is queued there is done."""
    if torch.device(device).type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_array(array, x):
    """A small numpy array as float32 on x's device."""
    return upload(torch.from_numpy(array).float(), x.device)


@functools.lru_cache(maxsize=256)
def spline_up(n_in, n_out, pad=12):
    """Cubic spline from n_in to n_out voxels as a matrix. Beyond the border the outermost voxel is repeated:
    12 of them, as in scipy, are added before the spline is fitted."""
    m = n_in + 2 * pad
    spline = (4 * np.eye(m) + np.eye(m, k=1) + np.eye(m, k=-1)) / 6
    coefficients = np.linalg.solve(spline, np.pad(np.eye(n_in), ((pad, pad), (0, 0)), "edge"))
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5 + pad
    first = np.floor(centres).astype(int)
    t = (centres - first)[:, None]
    weights = (1 - t) ** 3, 4 - 6 * t ** 2 + 3 * t ** 3, 1 + 3 * (t + t ** 2 - t ** 3), t ** 3
    return sum(weight / 6 * coefficients[first + i] for i, weight in enumerate(weights, start=-1))


@functools.lru_cache(maxsize=64)
def resampling_matrix(n_in, n_out):
    """Cubic spline resampling of one axis as a matrix (n_out, n_in), float64: scikit-image's
    resize(order=3).

    Gaussian antialias filter, spline prefilter (the inverse of the B-spline's values at the
    voxels), cubic weights at the new pixel centres; every boundary is mirrored about the outermost
    voxel."""
    def mirrored(index):  # ... 2 1 | 0 1 2 ... n-1 | n-2 ...
        period = max(1, 2 * (n_in - 1))
        index = index % period
        return np.minimum(index, period - index) if n_in > 1 else index * 0

    def matrix(index, weights):
        rows = np.zeros((len(index), n_in))
        np.add.at(rows, (np.arange(len(index))[:, None], mirrored(index)), weights)
        return rows

    at = np.arange(n_in)[:, None]
    sigma = max(0.0, (n_in / n_out - 1) / 2)
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / max(sigma, 1e-12)) ** 2)
    smooth = matrix(at + offsets, kernel / kernel.sum())
    spline = matrix(at + np.arange(-1, 2), np.array([1, 4, 1]) / 6)
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    first = np.floor(centres).astype(int)
    t = (centres - first)[:, None]
    cubic = np.concatenate([(1 - t) ** 3, 4 - 6 * t ** 2 + 3 * t ** 3,
                            1 + 3 * t + 3 * t ** 2 - 3 * t ** 3, t ** 3], 1) / 6
    return matrix(first[:, None] + np.arange(-1, 3), cubic) @ np.linalg.solve(spline, smooth)


def resample(volume, shape):
    """(D, H, W) -> shape, as scikit-image's resize(order=3): one matrix product an axis, clipped to
    the input's range. Like there, every axis is smoothed that shrinks."""
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None]
    for axis in sorted(range(3), key=lambda a: shape[a] / volume.shape[a]):  # those that shrink most first
        if shape[axis] != volume.shape[axis]:
            x = apply_matrix(x, resampling_matrix(volume.shape[axis], shape[axis]), axis)
    return x[0].clamp(float(volume.min()), float(volume.max())).numpy()


def nearest(array, shape):
    """Nearest voxel, pixel centres aligned: index floor((i + 0.5) * n_in / n_out) on each axis."""
    for axis, n in enumerate(shape):
        index = ((np.arange(n) + 0.5) * array.shape[axis] / n).astype(int)
        array = array.take(index, axis)
    return array
