"""Prediction: windows, and scores equal to scipy's brute force."""

import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import config
import distances
import metrics
import predict
import preprocess
import tasks

NAN = float("nan")


# ------------------------------------------------------------------------------------------- scores
def brute_force(p, t, spacing):
    """metrics.score of two masks from scipy's distance transform, erosion and labelling."""
    voxel = np.prod(spacing) / 1000
    found = {"dice": NAN, "hd95": NAN, "asd": NAN, "nsd": NAN, "f1": NAN, "ml": p.sum() * voxel,
             "ml_error": (p.sum() - t.sum()) * voxel}
    if not p.any() and not t.any():
        return found

    found |= {"dice": 2 * (p & t).sum() / (p.sum() + t.sum()), "nsd": 0, "f1": 0}
    if not p.any() or not t.any():
        return found

    # Distances from one surface to the other, in both directions.
    p_surface = p & ~ndimage.binary_erosion(p)
    t_surface = t & ~ndimage.binary_erosion(t)
    there = ndimage.distance_transform_edt(~t_surface, spacing)[p_surface]
    back = ndimage.distance_transform_edt(~p_surface, spacing)[t_surface]
    both = np.concatenate([there, back])

    # Lesions found, of the true and of the predicted ones.
    p_lesions, p_count = ndimage.label(p, np.ones((3, 3, 3)))
    t_lesions, t_count = ndimage.label(t, np.ones((3, 3, 3)))
    recall = sum((p & (t_lesions == n)).any() for n in range(1, t_count + 1)) / t_count
    precision = sum((t & (p_lesions == n)).any() for n in range(1, p_count + 1)) / p_count
    if recall + precision:
        found["f1"] = 2 * recall * precision / (recall + precision)
    return found | {"hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
                    "asd": both.mean(), "nsd": (both <= 2 + 1e-6).mean()}


def random_mask(rng, shape):
    """Empty, full, scattered voxels or blobs of some size."""
    kind = rng.integers(8)
    if kind < 2:
        return np.full(shape, kind == 1 and rng.random() < 0.3)
    noise = rng.normal(size=shape)
    if kind > 4:
        noise = ndimage.gaussian_filter(noise, rng.uniform(0.5, 2.5))
    return noise > np.quantile(noise, rng.uniform(0.5, 0.99))


def test_scores_equal_brute_force_on_200_pairs():
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(200):
        shape, spacing = rng.integers(1, 24, 3), rng.choice([0.45, 0.958, 1.0, 2.0, 3.0, 5.0], 3)
        p, t = random_mask(rng, shape), random_mask(rng, shape)
        if rng.random() < 0.3:
            p = ndimage.binary_dilation(t)
        found, expected = metrics.score(p, t, spacing), brute_force(p, t, spacing)
        assert list(found) == list(metrics.SCORES)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), (shape, spacing)
        kinds.add((bool(p.any()), bool(t.any())))
    assert len(kinds) == 4, "both, one and no mask empty"


def test_scores_of_a_shifted_cube():
    truth, found = np.zeros((2, 30, 30, 30), bool)
    truth[10:20, 10:20, 10:20] = found[12:22, 10:20, 10:20] = True
    scores = metrics.score(found, truth, (3, 1, 1))
    assert scores["dice"] == 0.8 and scores["f1"] == 1 and scores["hd95"] == 6
    assert scores["ml"] == pytest.approx(3) and scores["ml_error"] == 0

    # Of the 488 surface voxels of each, the end face lies 6 mm outside the other, the rim before it
    # 3 mm, and the middle of the far face over 2 mm inside.
    assert scores["nsd"] == pytest.approx(1 - (100 + 36 + 16) / 488)
    assert metrics.score(found, truth, (1, 1, 1))["nsd"] == 1, "2 mm are within the tolerance"
    scores = metrics.score(truth, truth, (3, 1, 1))
    kinds = ("dice", "hd95", "asd", "nsd", "f1", "ml_error")
    assert [scores[kind] for kind in kinds] == [1, 0, 0, 1, 1, 0]


def test_distance_respects_the_spacing():
    one, other = np.zeros((2, 9, 9, 9), bool)
    one[1, 1, 1] = other[4, 5, 1] = True
    assert metrics.score(one, other, (1, 1, 1))["asd"] == 5
    assert metrics.score(one, other, (2, 0.5, 1))["hd95"] == pytest.approx(math.hypot(6, 2))


def test_lesions_are_connected_over_corners_and_found_by_one_voxel():
    truth, found = np.zeros((2, 12, 12, 12), bool)
    truth[1, 1, 1] = truth[2, 2, 2] = True  # one lesion
    truth[6:9, 6:9, 6:9] = truth[11, 11, 11] = True  # two more
    found[2, 2, 2] = found[8, 8, 8] = found[0, 11, 0] = found[11, 0, 0] = True
    assert len(np.unique(distances.components(truth))) == 3
    mask = np.random.default_rng(0).random((9, 10, 11)) < 0.05
    fortran = distances.components(np.asfortranarray(mask))  # as nibabel returns it
    assert np.array_equal(fortran, distances.components(mask))
    assert metrics.lesion_f1(found, truth) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    snake = np.zeros((1, 41, 41), bool)
    snake[0, ::2] = snake[0, 1::4, -1] = snake[0, 3::4, 0] = True
    assert len(np.unique(distances.components(snake))) == 1, "however long the way"


def test_empty_masks():
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    nothing = metrics.score(empty, empty, (1, 1, 1))
    assert all(math.isnan(nothing[k]) for k in ("dice", "hd95", "asd", "nsd", "f1"))
    assert nothing["ml"] == nothing["ml_error"] == 0
    for p, t in ((empty, full), (full, empty)):
        scores = metrics.score(p, t, (1, 1, 1))
        assert scores["dice"] == scores["nsd"] == scores["f1"] == 0
        assert math.isnan(scores["hd95"]) and math.isnan(scores["asd"])
        assert scores["ml_error"] == pytest.approx(0.064 if p.any() else -0.064)


def test_ignored_voxels_are_in_no_score():
    task = {"labels": {0: 0, 1: 1, 4: 2}, "ignore": (2,), "classes": ("background", "core", "rim"),
            "regions": {"all": [1, 2]}}
    truth, found = np.zeros((2, 12, 12, 12), np.uint8)
    truth[:, :, 6:] = 2
    truth[2:5, 2:5, 2:5] = 1
    truth[2, 2, 2] = found[2, 2, 2] = 4
    found[2, 2, 2] = 2
    found[2:5, 2:5, 3:5] = 1
    scores = tasks.score_case(found, truth, task, np.eye(4))
    assert list(scores) == list(metrics.SCORES) and list(scores["dice"]) == ["core", "rim", "all"]
    found[8:, :, 7:] = 1  # in the ignored half
    assert tasks.score_case(found, truth, task, np.eye(4)) == scores
    assert scores["dice"]["rim"] == scores["f1"]["all"] == 1
    assert scores["ml"]["all"] == pytest.approx(0.019)
    assert scores["dice"]["core"] == pytest.approx(metrics.dice(found, truth, [1], ignore=2)[1])
    for value in (3, 0.5, 260):
        with pytest.raises(config.UserError, match=f"holds {value}, which"):
            tasks.score_case(found, np.where(truth == 1, float(value), truth), task, np.eye(4))


def test_a_label_map_is_read_on_the_axes_of_the_scan(tmp_path):
    rng = np.random.default_rng(0)
    values, affine = rng.integers(0, 3, (16, 17, 18)).astype(np.uint8), np.diag([1.0, 2, 3, 1])
    scan = nib.Nifti1Image(values, affine)
    turn = nib.orientations.axcodes2ornt("PSL")
    scan.as_reoriented(turn).to_filename(tmp_path / "label.nii.gz")
    assert np.array_equal(preprocess.read_label(tmp_path / "label.nii.gz", scan), values)
    affine[0, 3] = 1
    nib.Nifti1Image(values, affine).to_filename(tmp_path / "moved.nii.gz")
    with pytest.raises(config.UserError, match="grid"):
        preprocess.read_label(tmp_path / "moved.nii.gz", scan)


# ------------------------------------------------------------------------------------------- window
class Averages(torch.nn.Module):
    """Three logits that depend on all of the window and on the place in it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 1, 1, 1, generator=generator))
        self.windows = 0

    def forward(self, x):
        self.windows += len(x)
        place = torch.linspace(-1, 1, x.shape[-1])
        return (x + x.mean((2, 3, 4), keepdim=True) + place) * self.weight


def plain_window(model, volume, patch, starts, gaussian):
    """Sum of weights times logits over sum of weights, both voxel by voxel in float64."""
    weights = torch.ones(patch).double()
    if gaussian:
        line = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in patch]
        weights = torch.from_numpy(np.einsum("i,j,k", *line))

    logits = torch.zeros(3, *volume.shape[1:]).double()
    total = torch.zeros(volume.shape[1:]).double()
    for corner in itertools.product(*starts):
        a, b, c = (slice(start, start + n) for start, n in zip(corner, patch, strict=True))
        logits[:, a, b, c] += model(volume[None, :, a, b, c])[0] * weights
        total[a, b, c] += weights
    return logits / total


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_window_is_the_weighted_mean(gaussian, batch):
    model, volume = Averages(), torch.rand(1, 40, 17, 20)
    starts = [0, 8, 16, 24], [0, 1], [0, 4]
    with torch.no_grad():
        expected = plain_window(model, volume, (16, 16, 16), starts, gaussian)
    found = predict.sliding_window(model, volume, 16, 0.5, gaussian, batch)
    assert found.dtype == torch.float32 and model.windows == 2 * 16
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_window_equals_monais():
    inferers = pytest.importorskip("monai.inferers", reason="MONAI comes with `make bench`")
    model, volume = Averages(), torch.rand(1, 40, 17, 20)
    ours = predict.sliding_window(model, volume, 16)
    theirs = inferers.sliding_window_inference(volume[None], (16, 16, 16), 1, model, overlap=0.5)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
