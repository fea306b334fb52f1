"""Validation in pretraining: the error of hidden voxels, beside that of interpolation."""

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import log_of
from runs import PRETRAIN, Run
from scipy import ndimage

import amaes
import augment
import models
import pretrain
import training
import validation


def views_of(samples=3, side=24, seed=0):
    """Smooth positive volumes on air, and random masks."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(samples, 1, side, side, side))
    noise = ndimage.gaussian_filter(noise, (0, 0, 3, 3, 3))
    target = torch.from_numpy((4 * noise).clip(0, 1)).float()
    mask = amaes.random_mask(range(samples), target.shape[2:])
    return amaes.Views(target.masked_fill(mask, 0), target, mask)


# ------------------------------------------------------------------------------------ the yardstick
@pytest.mark.parametrize("sigma", validation.SIGMAS)
def test_the_fill_is_scipys_normalised_convolution(sigma):
    views = views_of()
    found = validation.gaussian_fill(views.image, views.mask, sigma).numpy()
    for image, mask, filled in zip(views.image.numpy(), views.mask.numpy(), found, strict=True):
        blur = {"sigma": (0, sigma, sigma, sigma), "mode": "constant"}
        values = ndimage.gaussian_filter(image.astype(np.float64), **blur)
        weight = ndimage.gaussian_filter((~mask).astype(np.float64), **blur)
        expected = np.where(mask, values / np.maximum(weight, 1e-9), image)
        near = weight > 1e-3  # deep in a hole the weights are rounding
        assert near.mean() > 0.9
        assert np.abs(filled - expected)[near].max() < 1e-5
        assert np.array_equal(filled[~mask], image[~mask])


def test_a_constant_is_filled_exactly_even_deep_in_a_hole():
    image = torch.full((1, 2, 40, 40, 40), 0.7)
    mask = torch.ones(1, 1, 40, 40, 40, dtype=torch.bool)
    mask[..., :2] = False
    filled = validation.gaussian_fill(image.masked_fill(mask, 0), mask, 1.5)
    assert torch.allclose(filled, image, atol=1e-5)


def test_the_sums_are_those_of_numpy():
    views = views_of()
    output = (views.target * 0.8 + 0.1 * torch.rand_like(views.target)).to(torch.bfloat16)
    parts = [amaes.Views(*(each[part] for each in views)) for part in (slice(0, 1), slice(1, 3))]
    sums = sum(validation.look(output[part], each)
               for part, each in zip((slice(0, 1), slice(1, 3)), parts, strict=True))
    found = validation.seen(sums, amaes.losses_from_sums)

    target, mask = views.target.numpy(), views.mask.numpy()
    error = (output.float().numpy() - target) ** 2
    head = target > validation.HEAD
    expected = {"loss": error.mean(), "masked": error[mask].mean(), "visible": error[~mask].mean(),
                "masked_head": error[mask & head].mean(), "masked_air": error[mask & ~head].mean()}
    means = [[volume[inside].mean() for volume, inside in zip(volumes, head, strict=True)]
             for volumes in (target, output.float().numpy())]
    expected["mean_r"] = np.corrcoef(*means)[0, 1]

    # The scale is that of least squares over the visible voxels of each patch.
    scaled = []
    for volume, truth, hidden in zip(output.float().numpy(), target, mask, strict=True):
        scale = np.linalg.lstsq(volume[~hidden][:, None], truth[~hidden], rcond=None)[0][0]
        scaled.append((scale * volume - truth)[hidden] ** 2)
    expected["masked_scaled"] = np.concatenate(scaled).mean()
    assert found == pytest.approx(expected, rel=1e-4)

    # The best fill is that of one sigma, in head and air, too.
    best = validation.best_fill(sum(validation.fill_sums(each) for each in parts))
    errors = []
    for sigma in validation.SIGMAS:
        filled = validation.gaussian_fill(views.image, views.mask, sigma).numpy()
        error = (filled - target) ** 2
        errors.append((error[mask].mean(), error[mask & head].mean(), error[mask & ~head].mean()))
    assert [best[key] for key in ("fill", "fill_head", "fill_air")] == pytest.approx(
        min(errors), rel=1e-4)


# --------------------------------------------------------------------------------------- in a run
@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    settings = PRETRAIN | {"data": prepared, "steps": 6, "val_every": 2, "preview": 6}
    printed = Run("pretrain", folder / "output", out=folder / "run", **settings).finish()
    return folder / "run", settings, printed


def test_every_validation_says_what_interpolation_scores(whole):
    folder, _, printed = whole
    records = [record for record in log_of(folder) if "val_loss" in record]
    assert [record["step"] for record in records] == [2, 4, 6]
    keys = {"loss", "masked", "visible", "masked_head", "masked_air", "masked_scaled", "mean_r",
            "fill", "fill_head", "fill_air"}
    for record in records:
        assert {key for key in record if key.startswith("val_")} == {f"val_{key}" for key in keys}
        assert record["val_fill"] == records[0]["val_fill"] > 0
        assert record["weights"] == pytest.approx(1, abs=0.2), "of a U-Net that has moved a little"
    assert len({record["val_masked"] for record in records}) == 3

    # It is said in plain words, once, and it is true.
    last = records[-1]
    winner = "the network" if last["val_masked"] < last["val_fill"] else "interpolation"
    assert printed.count("does better") == 1
    assert (f"error {last['val_masked']:.4g}, of the best Gaussian fill {last['val_fill']:.4g}: "
            f"{winner} does better") in printed


def test_what_is_logged_is_the_fill_of_the_held_out_patches(whole, prepared):
    folder, settings, _ = whole
    _, cases, _ = pretrain.open_data(str(prepared), settings["val_fraction"], 0)
    objective = pretrain.choose_objective("amaes", torch.device("cpu"), "fp32", 4, 0.6, False,
                                          "all")
    alone = training.Processes(0, 1, torch.device("cpu"))
    held = validation.HeldOut(cases, objective, 32, 0, "all", 1, alone)
    views = [objective.reconstruct(None, validation.read(held.crops, [number]))[1]
             for number in range(len(cases))]
    target, mask = (torch.cat([getattr(each, name) for each in views])
                    for name in ("target", "mask"))
    image = torch.cat([each.image for each in views])
    errors = [((validation.gaussian_fill(image, mask, sigma) - target)[mask] ** 2).mean().item()
              for sigma in validation.SIGMAS]
    assert log_of(folder)[-1]["val_fill"] == pytest.approx(min(errors), rel=1e-5)


def test_two_processes_and_a_continuation_say_the_same(whole, tmp_path):
    folder, settings, _ = whole
    settings = settings | {"out": tmp_path / "run"}
    Run("pretrain", tmp_path / "output", 2, **settings | {"steps": 6}).finish(0, 0)
    for one, two in zip(log_of(folder), log_of(tmp_path / "run"), strict=True):
        for key in ("val_fill", "val_fill_head", "val_fill_air"):
            assert (key in one) == (key in two)
            if key in one:
                assert one[key] == pytest.approx(two[key], rel=1e-6)

    # A run that is finished has nothing to say of it.
    printed = Run("pretrain", tmp_path / "again", 2, **settings).finish(0, 0)
    assert "holds step 6 of 6" in printed and "does better" not in printed


def test_the_preview_has_the_fill(whole):
    folder, _, _ = whole
    image, fill, target = (nib.load(folder / "preview" / f"step0000006_0_{name}.nii.gz").get_fdata()
                           for name in ("input", "fill", "target"))
    hidden = (image == 0) & (fill != image)
    assert 0.2 < hidden.mean() < 0.65, "the head's part of the hidden voxels"
    assert np.array_equal(fill[~hidden], image[~hidden]) and fill.shape == target.shape


def test_the_objective_of_swin_has_no_yardstick(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "objective": "swin", "model": "swinunetr",
                           "features": 16, "mask_ratio": 0.3, "augment": "none", "steps": 1,
                           "out": tmp_path / "run", "patch_size": 64}
    printed = Run("pretrain", tmp_path / "output", **settings).finish(seconds=120)
    record = log_of(tmp_path / "run")[-1]
    assert {key for key in record if key.startswith("val_")} == {
        "val_loss", "val_rotation", "val_contrast", "val_l1"}
    assert "does better" not in printed


def test_the_verdict_tells_brightness_from_the_rest():
    look = {"val_masked": 0.04, "val_masked_scaled": 0.02, "val_fill": 0.03}
    assert validation.verdict(look).endswith(
        "0.03: interpolation does better, but not if the brightness of each output is that of the "
        "visible voxels: 0.02")
    for change in ({"val_masked_scaled": 0.035}, {"val_masked": 0.025}):
        assert validation.verdict(look | change).endswith("does better")
    del look["val_masked_scaled"]
    assert validation.verdict(look).endswith("interpolation does better")
    assert validation.verdict({"val_loss": 1.0}) == ""


def test_weights_that_have_grown_are_spoken_of():
    """Behind a convolution stands an instance norm: large weights leave the output as it is, and
    are turned less by each step of finetuning (docs/experiments.md)."""
    torch.manual_seed(0)
    model = models.build_model("unet_demo", "pretrain", features=8).eval()
    assert validation.weights_grown(model)["weights"] == pytest.approx(1, abs=0.05)
    patch = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        before = model(patch)
        deepest = model.encoder.encoder_conv4.conv2.conv
        deepest.weight *= 3
        deepest.bias *= 3
        assert torch.allclose(model(patch), before, atol=1e-3), "the same function"
    grown = validation.weights_grown(model)
    assert grown["weights"] == pytest.approx(3, abs=0.1)

    look = {"val_masked": 0.02, "val_fill": 0.03}
    assert "weights have grown up to 3.0 times" in validation.verdict(look | grown)
    assert "grown" not in validation.verdict(look | {"weights": 1.6})

    # MedNeXt has no such norm behind each convolution.
    assert validation.weights_grown(models.build_model("mednext_m", "pretrain", features=4)) == {}


# -------------------------------------------------------------- without augmentation reversal
def test_the_ablation_keeps_the_intensity_augmentations_in_the_target():
    crops = [torch.rand(1, 16, 16, 16)]
    draws = [augment.Draw((16,) * 3, (16,) * 3, intensity=(("gamma", (2.0, False)),))]
    clean = amaes.make_views(crops, draws, [0])
    kept = amaes.make_views(crops, draws, [0], augmented_target=True)
    assert torch.equal(clean.image, kept.image) and torch.equal(clean.mask, kept.mask)
    assert torch.equal(clean.target[0], crops[0])
    assert torch.equal(kept.target.masked_fill(kept.mask, 0), kept.image)
    assert not torch.allclose(kept.target, clean.target)


@pytest.mark.parametrize("row, features, sees", [("unet_demo", 8, False), ("mednext_m", 8, True),
                                                 ("swinunetr", 16, True)])
def test_which_networks_see_how_bright_a_patch_is(row, features, sees):
    """Instance norm after every convolution takes it away: half as bright, and a U-Net returns the
    same. So its output cannot follow the brightness of a patch (docs/status.md, r of means). In
    MedNeXt and SwinUNETR it passes beside the norms."""
    torch.manual_seed(0)
    model = models.build_model(row, "pretrain", features=features).eval().double()
    x = torch.rand(1, 1, 64, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        bright = model(x)
        dark = model(x / 2)
    change = ((bright - dark).norm() / (bright - bright.mean()).norm()).item()
    if sees:
        assert change > 0.1
    else:
        assert change < 0.005
