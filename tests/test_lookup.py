"""The lookups of fast_cpu.py, which read by gathers, against those of grid_sample."""

import math

import numpy as np
import pytest
import torch
from test_augment import difference, volume
from test_augment_spatial import NONE, positions

import augment

fast_cpu = pytest.importorskip("fast_cpu")


@pytest.mark.parametrize("size", [(32, 32, 32), (15, 24, 33), (48, 40, 36)])
def test_both_lookups_agree_to_rounding(size, monkeypatch):
    """Each position is float32 in both: images of noise differ by a few roundings of the largest
    side, labels only within 2e-5 voxels of a tie between two voxels."""
    differ = undecided = total = 0
    for seed in range(80):
        draw = augment.draw(seed, "all", size)
        if not (draw.elastic or draw.scale or any(draw.angles or ())):
            continue
        x = volume(2, *draw.context, seed=seed)
        label = (x[0] * 250).byte()
        monkeypatch.setattr(augment, "lookup", augment.lookup_by_grid_sample)
        image, found = augment.spatial([x], [label], [draw])
        monkeypatch.setattr(augment, "lookup", fast_cpu.lookup)
        quick_image, quick_found = augment.spatial([x], [label], [draw])
        assert difference(image, quick_image) <= 6 * max(draw.context) * 2 ** -24, draw

        field = draw.elastic and augment.elastic_displacement(*draw.elastic, size, "cpu")
        read = positions(draw.context, draw.angles or NONE, draw.scale or 1.0, field, size)
        tie = (np.abs(read - np.floor(read) - 0.5) < 2e-5).any(0)
        wrong = (found != quick_found)[0].numpy()
        assert not (wrong & ~tie).any(), draw
        differ += wrong.sum()
        undecided += tie.sum()
        total += tie.size
    assert undecided < 3e-4 * total and differ < 1e-5 * total and total > 20 * math.prod(size)


def test_only_a_tensor_on_a_cpu_is_looked_up_by_gathers(monkeypatch):
    monkeypatch.setattr(augment, "lookup", augment.lookup)  # put back at the end
    monkeypatch.setattr(augment, "lookup_by_grid_sample", lambda x, *_: x)
    fast_cpu.install_lookup()
    elsewhere, here = torch.empty(1, 5, 6, 7, device="meta"), torch.ones(1, 5, 6, 7)
    assert augment.lookup(elsewhere, np.eye(3), None, (5, 6, 7), "nearest") is elsewhere
    assert augment.lookup(here, np.eye(3), None, (5, 6, 7), "nearest") is not here
