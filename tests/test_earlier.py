"""What commit 43f57bb left behind still serves: its prepared folder, its checkpoints, its runs."""

import json
import shutil
import tarfile

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, call, log_of

import checkpoint
import compare
import config
import finetune
import predict
import pretrain

# How a run was started then; make.py says what is in the archive.
SETTINGS = ("--patch_size 32 --batch_size 1 --precision fp32 --compile false --workers 0 "
            "--log_every 1 --steps 4").split()
PRETRAIN = ("--data data --model unet_demo --features 1 --warmup_epochs 0 --out pretrain".split()
            + SETTINGS)
FINETUNE = "--task task.yaml --ckpt pretrain/last.pt --out finetune".split() + SETTINGS


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "43f57bb"
    with tarfile.open(ROOT / "tests/old/43f57bb.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(archive, tmp_path, monkeypatch):
    """A copy for each test. It is the working directory, because the old paths are relative."""
    folder = tmp_path / "old"
    shutil.copytree(archive, folder)
    monkeypatch.chdir(folder)
    return folder


def ends_as_then(old, folder, name):
    """All four steps are there, with the losses that the code of then had in this run."""
    assert checkpoint.load_checkpoint(old / folder / "last.pt")["step"] == 4
    records = log_of(old / folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    expected = json.loads((old / "expected.json").read_text())[name]
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-4)


def test_a_pretraining_run_goes_on(old):
    assert checkpoint.load_checkpoint("pretrain/last.pt")["step"] == 2
    call(pretrain, *PRETRAIN)
    ends_as_then(old, "pretrain", "pretrain")


def test_a_finetuning_run_goes_on(old, capsys):
    finished = (old / "finetune/fold_0/dice.json").read_text()
    assert checkpoint.load_checkpoint("finetune/fold_1/last.pt")["step"] == 2
    call(finetune, *FINETUNE)
    assert "has folds of an earlier version" in capsys.readouterr().out
    assert (old / "finetune/fold_0/dice.json").read_text() == finished, "not done again"
    ends_as_then(old, "finetune/fold_1", "fold_1")
    assert list(json.loads((old / "finetune/dice.json").read_text())["folds"]) == ["0", "1"]


def test_a_pretrained_checkpoint_is_finetuned(old):
    call(finetune, *FINETUNE, "--out", "new", "--steps", "1", "--folds", "1")
    [case] = json.loads((old / "new/dice.json").read_text())["folds"]["1"]
    assert np.isfinite(case["dice"]["lesion"])


def test_a_finetuned_checkpoint_predicts(old):
    call(predict, "--ckpt", "finetune/fold_0/last.pt", "scan.nii.gz",
         "--out", "segmentation.nii.gz")
    segmentation, scan = nib.load("segmentation.nii.gz"), nib.load("scan.nii.gz")
    assert segmentation.shape == scan.shape and set(np.unique(segmentation.dataobj)) <= {0, 1}


def test_a_finished_run_is_compared(old, capsys):
    shutil.copytree("finetune", "other")
    call(compare, "finetune", "other")
    assert "task, Dice %" in capsys.readouterr().out


def test_its_checkpoints_carry_a_checksum_that_is_verified(old):
    path = old / "pretrain/last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(config.UserError, match="its checksum does not fit"):
        checkpoint.load_checkpoint(path)
