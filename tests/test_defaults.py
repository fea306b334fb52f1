"""What a user gets who overrides nothing: all networks, in all precisions, through all scripts."""

import json
import shlex

import nibabel as nib
import numpy as np
import pytest
from conftest import call, log_of, script

import finetune
import models
import phantom
import predict
import prepare_data
import pretrain

WIDTH = {"unet": 4, "mednext": 4, "swin": 16, "resenc": 4}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two unlabelled and two labelled heads, prepared, and the task of their lesions."""
    home = tmp_path_factory.mktemp("cohort")
    phantom.write(out=home / "raw", subjects=2, labelled=2, layout="bids", size=40, seed=3)
    call(prepare_data, "--source", "bids", "--input", home / "raw", "--out", home / "data",
         "--workers", 1)
    task = {"data": str(home / "data"), "sequences": ["FLAIR"], "classes": ["background", "lesion"],
            "labels": {0: 0, 1: 1}, "n_train": 1, "folds": 1}
    (home / "task.yaml").write_text(json.dumps(task))
    return home


def finite(path):
    array = np.load(path) if str(path).endswith(".npy") else nib.load(path).get_fdata()
    return array.size > 1 and np.isfinite(array).all()


# bf16 is the default and so is not typed; nor is compile.
@pytest.mark.parametrize("precision", [[], ["--precision", "fp32"], ["--precision", "fp64"]],
                         ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("row", models.ROWS)
def test_every_network_runs_through_every_script(cohort, tmp_path, row, precision):
    """A step of pretraining, its validation and its preview; a step of finetuning and its
    evaluation; the prediction of a scan; features."""
    family = models.ROWS[row].family

    # The smallest patches in which a CPU computes bf16 and float32.
    side = 48
    if family in ("swin", "resenc"):
        side = 64 if precision else 96
    small = ["--patch_size", side, "--features", WIDTH[family], "--workers", 0, *precision]
    data = ["--data", cohort / "data"]
    call(pretrain, *data, "--model", row, *small, "--steps", 1, "--batch_size", 1, "--preview", 1,
         "--out", tmp_path / "pre")
    [record] = log_of(tmp_path / "pre")
    assert all(np.isfinite(record[key]) for key in ("loss", "val_loss", "val_masked"))
    previews = sorted((tmp_path / "pre/preview").glob("*.nii.gz"))
    assert len(previews) >= 3 and all(map(finite, previews))

    call(finetune, "--task", cohort / "task.yaml", "--ckpt", tmp_path / "pre/last.pt", *small,
         "--steps", 1, "--batch_size", 1, "--out", tmp_path / "fine")
    [case] = json.loads((tmp_path / "fine/dice.json").read_text())["folds"]["0"]
    assert case["dice"]["lesion"] is not None and np.isfinite(case["dice"]["lesion"])

    scan = next((cohort / "raw").rglob("*FLAIR.nii.gz"))
    network = ["--ckpt", tmp_path / "fine/fold_0/last.pt", scan]
    call(predict, *network, "--out", tmp_path / "seg.nii.gz")
    segmentation, image = nib.load(tmp_path / "seg.nii.gz"), nib.load(scan)
    assert segmentation.shape == image.shape[:3] and set(np.unique(segmentation.dataobj)) <= {0, 1}
    call(predict, *network, "--features", tmp_path / "features.npy")
    assert finite(tmp_path / "features.npy") and finite(tmp_path / "features_voxels.npy")


def test_the_objective_of_23_at_its_defaults(cohort, tmp_path):
    call(pretrain, "configs/swinunetr.yaml", "--data", cohort / "data", "--patch_size", 96,
         "--features", 16, "--workers", 0, "--steps", 1, "--out", tmp_path)
    assert np.isfinite(log_of(tmp_path)[-1]["val_loss"])


def test_the_commands_of_the_readme(tmp_path):
    """Nothing is overridden but sizes, steps and paths; run as a user runs them."""
    phantom.write(out=tmp_path / "raw", subjects=0, labelled=5, layout="wmh", size=48, seed=4)
    small = "--patch_size 48 --steps 2 --batch_size 4"
    tuned = f"{small} --n_train 2 --folds 0 --data {tmp_path}/data"
    for command in (
            f"prepare_data.py --source wmh --input {tmp_path}/raw --out {tmp_path}/data",
            f"pretrain.py configs/unet_xl.yaml --features 4 {small} --data {tmp_path}/data "
            f"--out {tmp_path}/pre",
            f"finetune.py --ckpt {tmp_path}/pre/last.pt --task wmh {tuned} --out {tmp_path}/amaes",
            f"finetune.py --model unet_xl --features 4 --task wmh {tuned} "
            f"--out {tmp_path}/scratch"):
        script(*shlex.split(command), processes=2 if command.startswith("pretrain") else None)
    scan = next(path for path in (tmp_path / "raw").rglob("pre/FLAIR.nii.gz"))
    script("predict.py", scan, ckpt=tmp_path / "amaes/fold_0/last.pt", out=tmp_path / "seg.nii.gz")
    table = script("compare.py", tmp_path / "scratch", tmp_path / "amaes").stdout
    segmentation = nib.load(tmp_path / "seg.nii.gz")
    assert "wmh, Dice %" in table and set(np.unique(segmentation.dataobj)) <= {0, 1}
    assert not list(tmp_path.rglob(".part*")), "a file that was not finished"
