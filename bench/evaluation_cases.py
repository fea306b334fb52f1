"""Masks that are hard for surface distances and lesions: seeded synthetic cases.

Each case is a prediction and a truth on the grid of BraTS: 240 x 240 x 155 voxels of 1 mm. A glioma
is scored in four regions: the whole tumour, the core, the enhancing tumour and the oedema. Its
prediction is the truth moved by two voxels, with specks in 2e-5 of the voxels. The hard cases have
one region.
"""

import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import distances  # noqa: E402

GRID = (240, 240, 155)
REGIONS = {"whole tumour": (1, 2, 3), "core": (1, 3), "enhancing": (3,), "oedema": (2,)}
SPECKS = 2e-5


def radius(shape, centre, half_axes):
    """Distance (D, H, W) from a centre, in half axes; both are given as shares of the shape."""
    square = np.zeros(shape, np.float32)
    for axis, side in enumerate(shape):
        line = (np.arange(side) - centre[axis] * side) / (half_axes[axis] * side)
        square += np.expand_dims(line.astype(np.float32) ** 2, tuple({0, 1, 2} - {axis}))
    return np.sqrt(square)


def head(shape):
    """An ellipsoid (D, H, W) of the size of a brain."""
    return radius(shape, (0.5, 0.5, 0.5), (0.3, 0.37, 0.43)) < 1


def smooth_noise(rng, shape):
    """Noise (D, H, W), smooth over few voxels and over many, of standard deviation 1."""
    total = np.zeros(shape, np.float32)
    for width, weight in ((1, 0.15), (3, 0.3), (7, 0.5)):
        noise = rng.normal(size=shape).astype(np.float32)

        # Running means, three times, are nearly a Gaussian filter.
        for axis in (0, 1, 2) * 3:
            window = min(2 * width + 1, shape[axis])
            sums = np.cumsum(np.concatenate([noise, noise.take(range(window), axis)], axis), axis)
            lines = np.moveaxis(sums, axis, 0)
            noise = np.moveaxis((lines[window:] - lines[:-window]) / window, 0, axis)
        total += weight * noise / noise.std()
    return total / total.std()


def specks(rng, shape, share=SPECKS):
    """Single True voxels, in this share of the grid."""
    return rng.random(shape, dtype=np.float32) < share


def glioma(seed, shape=GRID):
    """The true classes, uint8 (D, H, W): 1 necrosis, 2 oedema, 3 enhancing tumour."""
    rng = np.random.default_rng(seed)
    voxels = np.prod(shape) / np.prod(GRID) * rng.uniform(60e3, 120e3)
    brain = head(shape)
    box = distances.box_of(brain)
    inside = brain[box]

    # Low near a centre, and rough. The lowest voxels of the head are the tumour: nested regions.
    centre = 0.5 + rng.uniform(-0.12, 0.12, 3)
    level = radius(shape, centre, (0.12, 0.12, 0.18))[box]
    level += 0.35 * smooth_noise(rng, inside.shape)
    ordered = np.sort(level[inside])
    whole, core, necrosis = (ordered[int(voxels * share)] for share in (1, 0.4, 0.15))

    classes = np.zeros(shape, np.uint8)
    part = classes[box]
    part[inside & (level < whole)] = 2
    part[inside & (level < core)] = 3
    part[inside & (level < necrosis)] = 1
    return classes


def predicted_glioma(seed, truth):
    """The truth moved by two voxels along the first axis, with specks of all classes."""
    rng = np.random.default_rng([seed, 1])
    prediction = np.roll(truth, 2, axis=0)
    where = specks(rng, truth.shape)
    prediction[where] = rng.integers(1, 4, np.count_nonzero(where))
    return prediction


def hard_names():
    """The names of the 50 hard cases."""
    kinds = ("specks", "empty truth", "whole brain", "far blobs", "checkerboard",
             "half checkerboards", "shells", "moved far", "noise", "plates")
    return [f"{kind} {number}" for kind in kinds for number in range(5)]


def hard(name, shape=GRID):
    """Prediction and truth, bool (D, H, W), of a hard case. Five numbers of a kind, 0 to 4."""
    kind, number = name.rsplit(" ", 1)
    number = int(number)
    rng = np.random.default_rng([number, *kind.encode()])
    tumour = glioma(number, shape) > 0
    i, j, k = np.ogrid[:shape[0], :shape[1], :shape[2]]
    checkerboard = (i + j + k) % 2 == 0

    if kind == "specks":
        share = 10.0 ** -(number + 1)
        return specks(rng, shape, share), specks(rng, shape, share)
    if kind == "empty truth":
        return tumour | specks(rng, shape), np.zeros(shape, bool)
    if kind == "whole brain":
        return head(shape), tumour
    if kind == "far blobs":
        size = (0.01 + 0.02 * number,) * 3
        return radius(shape, (0.1, 0.1, 0.1), size) < 1, radius(shape, (0.9, 0.9, 0.9), size) < 1
    if kind == "checkerboard":
        others = (~checkerboard, tumour, head(shape), specks(rng, shape), specks(rng, shape, 1e-7))
        return checkerboard, others[number] | (i + j + k == 0)
    if kind == "half checkerboards":
        # The gap between them grows, along one axis after the other.
        axis, place = number % 3, (i, j, k)[number % 3]
        gap = (0.02 + 0.1 * number) * shape[axis]
        middle = shape[axis] / 2
        return checkerboard & (place < middle - gap), checkerboard & (place > middle + gap)
    if kind == "shells":
        # From everywhere on a small shell, the large one is about equally far.
        from_centre = radius(shape, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return from_centre < 0.1 + 0.15 * number, (from_centre > 0.9) & (from_centre < 0.97)
    if kind == "moved far":
        return np.roll(tumour, 10 * (number + 1), axis=number % 3) | specks(rng, shape), tumour
    if kind == "noise":
        noise = rng.random(shape, dtype=np.float32)
        return noise < 0.1 + 0.2 * number, noise[::-1] < 0.5
    if kind == "plates":
        # Two thirds of the voxels are surface on one side of the head, and one plate on the other.
        plates = (i % 3 > 0) & (j + 0 * k > shape[1] * (0.2 + 0.15 * number))
        return plates, (j == 0) & (i + k >= 0)
    raise ValueError(f"{name!r} is not a hard case")


def ours(prediction, truth, spacing):
    """Distances to the truth and to the prediction, lesions of both; None if one is empty."""
    if not (prediction.any() and truth.any()):
        return None
    box = distances.box_of(prediction | truth)
    prediction, truth = prediction[box], truth[box]
    lesions = (distances.lesions_found(truth, prediction),
               distances.lesions_found(prediction, truth))
    predicted, true = distances.surface(prediction), distances.surface(truth)
    return (distances.to_surface(predicted, true, spacing),
            distances.to_surface(true, predicted, spacing), *lesions)


def by_scipy(prediction, truth, spacing, whole_grid=False):
    """The same from scipy.ndimage, in the same box or in the whole grid."""
    from scipy import ndimage
    if not (prediction.any() and truth.any()):
        return None
    if not whole_grid:
        box = ndimage.find_objects((prediction | truth).view(np.int8))[0]
        prediction, truth = prediction[box], truth[box]
    results = []
    predicted = prediction & ~ndimage.binary_erosion(prediction)
    true = truth & ~ndimage.binary_erosion(truth)
    for one, other in ((predicted, true), (true, predicted)):
        results.append(ndimage.distance_transform_edt(~other, spacing)[one])
    for one, other in ((truth, prediction), (prediction, truth)):
        labels, count = ndimage.label(one, np.ones((3, 3, 3)))
        results.append((len(np.unique(labels[one & other])), count))
    return tuple(results)


def seconds(function, pairs):
    """CPU seconds of one call for each pair of masks."""
    start = time.process_time()
    for prediction, truth in pairs:
        function(prediction, truth, (1, 1, 1))
    return time.process_time() - start


def glioma_pairs(seed):
    """A mask of the prediction and of the truth for each of the four regions."""
    truth = glioma(seed)
    prediction = predicted_glioma(seed, truth)
    return [(np.isin(prediction, c), np.isin(truth, c)) for c in REGIONS.values()]
