"""The same lookups, quicker on a CPU. Optional: delete this file and all works."""

import numpy as np
import torch
import torch.nn.functional as F

import augment
import resample


# -------------------------------------------------------------------------- augmentation lookups
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
    first, *others = ((np.arange(n) - (n - 1) / 2) * scale for n in size)

    # Each plane of the result is a mean of two planes of x, weighted by their distances.
    position = first[:, None] + (depth - 1) / 2
    distance = abs(position - np.arange(depth))
    planes = resample.apply_matrix(x, np.maximum(1 - distance, 0), 0)
    planes = planes.view(-1, 1, *sides)

    # Within a plane, -1 and 1 are the centres of the outermost pixels, and the last axis is first.
    lines = []
    for line, n in zip(others, sides, strict=True):
        line = line * 2 / max(n - 1, 1)
        lines.append(resample.upload_array(line, x))
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)
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
