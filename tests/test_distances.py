"""Surface distances and lesions are those of scipy, by all three ways, in the memory promised."""

import itertools
import os
import sys
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

import distances

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "bench"))
import evaluation_cases  # noqa: E402

SPACINGS = (0.45, 0.958, 1.0, 2.0, 3.0, 5.0)
WAYS = (distances.by_rings, distances.by_pairs, distances.by_lines)


def random_mask(rng, shape):
    """One voxel, all voxels, scattered voxels, or blobs that may touch the border."""
    kind = rng.integers(8)
    mask = np.zeros(shape, bool)
    mask[tuple(rng.integers(0, shape))] = True
    if kind == 0:
        return mask
    if kind == 1:
        return np.ones(shape, bool)
    noise = rng.normal(size=shape)
    if kind > 4:
        noise = ndimage.gaussian_filter(noise, rng.uniform(0.5, 2.5))
    return mask | (noise > np.quantile(noise, rng.uniform(0.5, 0.99)))


def expected(queries, targets, spacing):
    """The distances from scipy."""
    return ndimage.distance_transform_edt(~targets, spacing)[queries]


def by(way, queries, targets, spacing):
    """The distances by one way alone."""
    found = np.full(np.count_nonzero(queries), np.inf, np.float32)
    way(queries, targets, spacing, found)
    return found


def check_ways(queries, targets, spacing):
    """All ways give scipy's distances; rings those within reach, and they leave the others inf."""
    true = expected(queries, targets, spacing)
    found = distances.to_surface(queries, targets, spacing)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, true, rtol=0, atol=1e-4)
    ways = [distances.by_lines]
    if len(true) * np.count_nonzero(targets) < 2e6:
        ways.append(distances.by_pairs)
    for way in ways:
        np.testing.assert_allclose(by(way, queries, targets, spacing), true, rtol=0, atol=1e-4)

    reach = distances.REACH * np.prod(spacing) ** (1 / 3)
    found = by(distances.by_rings, queries, targets, spacing)
    near = np.isfinite(found)
    np.testing.assert_allclose(found[near], true[near], rtol=0, atol=1e-4)
    assert (true[near] < reach + 1e-4).all() and (true[~near] > reach - 1e-4).all()


def test_distances_equal_scipy_on_200_random_pairs():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = rng.integers(1, 26, 3)
        spacing = rng.choice(SPACINGS, 3)
        check_ways(random_mask(rng, shape), random_mask(rng, shape), spacing)


def test_distances_equal_scipy_from_surface_to_surface():
    rng = np.random.default_rng(1)
    for _ in range(60):
        shape = rng.integers(8, 40, 3)
        mask = random_mask(rng, shape)
        one = distances.surface(mask)
        other = distances.surface(np.roll(mask, rng.integers(-3, 4, 3), axis=(0, 1, 2)))
        check_ways(one, other, rng.choice(SPACINGS, 3))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (5, 0.45, 0.958), (0.1, 3, 0.1)])
def test_corners_and_borders(spacing):
    shape = (20, 31, 17)
    for one, other in itertools.product(itertools.product((0, -1), repeat=3), repeat=2):
        queries, targets = np.zeros((2, *shape), bool)
        queries[one] = targets[other] = True
        check_ways(queries, targets, spacing)


@pytest.mark.parametrize("name", evaluation_cases.hard_names())
def test_hard_cases_on_a_small_grid(name):
    queries, targets = evaluation_cases.hard(name, (36, 40, 25))
    if queries.any() and targets.any():
        check_ways(distances.surface(queries), distances.surface(targets), (1, 0.9, 2.5))
        check_ways(distances.surface(targets), distances.surface(queries), (1, 0.9, 2.5))
    for mask, other in ((queries, targets), (targets, queries)):
        check_lesions(mask, other)


def test_each_way_is_taken(monkeypatch):
    taken = []
    for way in WAYS:
        def noted(*words, way=way):
            taken.append(way.__name__)
            way(*words)
        monkeypatch.setattr(distances, way.__name__, noted)
    near, far, half = np.zeros((3, 40, 40, 40), bool)
    near[:, 0], far[:, 2], half[:, 20:] = True, True, True
    distances.to_surface(near, far, (1, 1, 1))
    assert taken == ["by_rings"], "nothing is left for another way"
    near[0, 39, 0] = True
    distances.to_surface(near, far, (1, 1, 1))
    assert taken[1:] == ["by_rings", "by_pairs"]
    distances.to_surface(far, half, (1, 1, 1))
    assert taken[3:] == ["by_rings", "by_lines"]


def test_batches_do_not_show(monkeypatch):
    rng = np.random.default_rng(2)
    one, other = rng.random((2, 12, 13, 14)) < 0.4
    other[:, :, 3:] = False
    whole = distances.to_surface(one, other, (1, 2, 3)), distances.components(one)
    for name in ("BATCH", "PRODUCTS", "CELLS"):
        monkeypatch.setattr(distances, name, 7)
    check_ways(one, other, (1, 2, 3))
    for queries in (one, np.asfortranarray(one)):
        for targets in (other, np.asfortranarray(other)):
            found = distances.to_surface(queries, targets, (1, 2, 3))
            np.testing.assert_allclose(found, whole[0], rtol=0, atol=1e-5)
    assert same_partition(distances.components(one), whole[1])


def test_empty_masks():
    empty, full = np.zeros((5, 6, 7), bool), np.ones((5, 6, 7), bool)
    assert len(distances.to_surface(empty, full, (1, 1, 1))) == 0
    assert not distances.surface(empty).any() and len(distances.components(empty)) == 0
    assert distances.lesions_found(empty, full) == (0, 0)
    assert distances.lesions_found(full, empty) == (0, 1)
    assert empty[distances.box_of(empty)].size == 0
    with pytest.raises(ValueError, match="differ in shape"):
        distances.to_surface(full, full[1:], (1, 1, 1))


def test_surface_and_box_equal_scipy():
    rng = np.random.default_rng(3)
    for _ in range(100):
        mask = random_mask(rng, rng.integers(1, 20, 3))
        expected_surface = mask & ~ndimage.binary_erosion(mask)
        assert np.array_equal(distances.surface(mask), expected_surface)
        assert np.array_equal(distances.surface(np.asfortranarray(mask)), expected_surface)
        assert distances.box_of(mask) == ndimage.find_objects(mask.astype(np.int8))[0]


def same_partition(one, other):
    """Whether two numberings put the same voxels together."""
    pairs = len(np.unique(np.stack([one, other]), axis=1).T)
    return pairs == len(np.unique(one)) == len(np.unique(other))


def check_lesions(mask, other):
    """Components and lesions found are scipy's."""
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    found = distances.components(mask)
    if count:
        assert same_partition(found, labels[mask])
    overlaps = len(np.unique(labels[mask & other]))
    assert distances.lesions_found(mask, other) == (overlaps, count)


def test_lesions_equal_scipy():
    rng = np.random.default_rng(4)
    for _ in range(200):
        shape = rng.integers(1, 24, 3)
        mask, other = random_mask(rng, shape), random_mask(rng, shape)
        sparse = mask & (rng.random(shape) < rng.uniform(0.02, 0.3))
        for one in (mask, sparse, np.asfortranarray(sparse)):
            check_lesions(one, other)


def test_two_voxels_are_connected_if_they_are_neighbours():
    for first in itertools.product((2, 3), repeat=3):
        for step in itertools.product((-2, -1, 0, 1, 2), repeat=3):
            mask = np.zeros((6, 6, 6), bool)
            mask[first] = mask[tuple(np.add(first, step))] = True
            expected_count = 1 if max(map(abs, step)) <= 1 else 2
            assert distances.lesions_found(mask, mask)[1] == expected_count, (first, step)


def test_a_long_way_is_one_lesion():
    snake = np.zeros((1, 81, 81), bool)
    snake[0, ::2] = snake[0, 1::4, -1] = snake[0, 3::4, 0] = True
    for axes in itertools.permutations(range(3)):
        assert distances.lesions_found(snake.transpose(axes), snake.transpose(axes)) == (1, 1)


def peak_per_voxel(prediction, truth):
    """Bytes a voxel that distances and lesions take beyond the two masks."""
    tracemalloc.start()
    evaluation_cases.ours(prediction, truth, (1, 1, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / prediction.size


def test_memory_of_a_glioma():
    truth = evaluation_cases.glioma(0)
    prediction = evaluation_cases.predicted_glioma(0, truth)
    assert peak_per_voxel(prediction > 0, truth > 0) < 8


@pytest.mark.soak
@pytest.mark.parametrize("name", evaluation_cases.hard_names())
def test_hard_cases_at_full_size(name):
    prediction, truth = evaluation_cases.hard(name)
    assert peak_per_voxel(prediction, truth) < 8
    found = evaluation_cases.ours(prediction, truth, (0.9, 1, 1.1))
    true = evaluation_cases.by_scipy(prediction, truth, (0.9, 1, 1.1))
    if true is None:
        assert found is None
        return
    for one, other in zip(found[:2], true[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    assert found[2:] == true[2:]
