"""The sliding window, and the prediction of a scan on its own grid."""

import glob
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import mistake, run, script

import predict
import preprocess
import tasks


class Shift(torch.nn.Module):
    """Two logits whose values tell which voxel was read: x and -x."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.cat([x, -x], 1) * self.one


def scans_of(raw):
    """All FLAIR scans of a raw folder."""
    return sorted(glob.glob(f"{raw}/**/*FLAIR.nii.gz", recursive=True))


# ------------------------------------------------------------------------------------- the window
@pytest.mark.parametrize("shape", [(16, 16, 16), (20, 33, 17), (9, 40, 16)])
@pytest.mark.parametrize("gaussian", [False, True])
def test_window_puts_every_voxel_back(shape, gaussian):
    volume = torch.rand(1, *shape)
    logits = predict.sliding_window(Shift(), volume, 16, 0.5, gaussian)
    assert logits.shape == (2, *shape)
    assert torch.allclose(logits[:1], volume, atol=1e-6)
    assert torch.allclose(logits[1:], -volume, atol=1e-6)


def test_window_starts_as_the_official_code():
    assert predict.window_starts(300, 128, 0.5) == [0, 64, 128, 172]
    assert predict.window_starts(256, 128, 0.5) == [0, 64, 128]
    assert predict.window_starts(128, 128, 0.5) == [0]


# ---------------------------------------------------------------------------------- the prediction
def test_prediction_lies_on_the_scans_own_grid(finetuned, raw, tmp_path):
    ckpt = finetuned[0] / "fold_0" / "last.pt"
    for number, scan in enumerate(scans_of(raw)[:4]):
        out = tmp_path / f"{number}.nii.gz"
        run("predict", scan, ckpt=ckpt, overlap=0, out=out)
        source = nib.load(scan)
        result = nib.load(out)
        assert result.shape == source.shape
        assert np.allclose(result.affine, source.affine, atol=1e-6)
        assert result.get_data_dtype() == np.uint8 and set(np.unique(result.dataobj)) <= {0, 1}


def test_prediction_scores_as_the_evaluation_does(finetuned, prepared, raw, tmp_path):
    fold = finetuned[0] / "fold_0"
    record = json.loads((fold / "dice.json").read_text())[0]
    cases = tasks.labelled_cases(str(prepared), None, ("FLAIR",))
    case = next(case for case in cases if case.name == record["case"])
    subject = case.volumes[0].subject
    scan = next(scan for scan in scans_of(raw) if subject in scan)
    result = script("predict.py", scan, truth=scan.replace("FLAIR", "lesion"),
                    ckpt=fold / "last.pt", overlap=0, out=tmp_path / "s.nii.gz")

    score = result.stdout.split("lesion: Dice ")[1].split(",")[0]
    expected = record["dice"]["lesion"]
    if expected is None:
        assert score == "nan"
    else:
        assert float(score) == pytest.approx(expected, rel=1e-3), "the same float16 voxels"


def test_prediction_refuses_what_it_cannot_use(finetuned, pretrained, raw, tmp_path):
    ckpt = finetuned[0] / "fold_0" / "last.pt"
    scan = scans_of(raw)[0]
    before = open(scan, "rb").read()
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(before[:2000])
    for words, chosen, message in (((scan,), pretrained, "finetune.py makes one"),
                                   ((scan, scan), ckpt, "reads 1 channels"),
                                   ((), ckpt, "name the scan"),
                                   ((tmp_path / "none.nii.gz",), ckpt, "none.nii.gz"),
                                   ((broken,), ckpt, "broken.nii.gz")):
        assert message in mistake("predict", *words, out=tmp_path / "x.nii.gz", ckpt=chosen)
    assert not (tmp_path / "x.nii.gz").exists()

    line = mistake("predict", scan, ckpt=ckpt, out=tmp_path / "seg.mgz")
    assert "ends in .nii or .nii.gz" in line
    assert "one of the files to read" in mistake("predict", scan, ckpt=ckpt, out=scan)
    assert open(scan, "rb").read() == before


def test_prediction_takes_what_preparation_takes(finetuned, raw, tmp_path):
    """FreeSurfer's format, a fourth axis of one; a folder for the result that is not there yet."""
    ckpt = finetuned[0] / "fold_0" / "last.pt"
    source = nib.load(glob.glob(f"{raw}/**/*FLAIR.nii.gz", recursive=True)[0])
    voxels = source.get_fdata(dtype=np.float32)
    nib.MGHImage(voxels, source.affine).to_filename(tmp_path / "scan.mgz")
    nib.Nifti1Image(voxels[..., None], source.affine).to_filename(tmp_path / "scan.nii.gz")
    results = []
    for name in ("scan.mgz", "scan.nii.gz"):
        out = tmp_path / "new" / f"{name}.nii.gz"
        run("predict", tmp_path / name, ckpt=ckpt, overlap=0, out=out)
        result = nib.load(out)
        assert result.shape == source.shape and result.get_data_dtype() == np.uint8
        assert np.allclose(result.affine, source.affine, atol=1e-4)
        results.append(np.asarray(result.dataobj))
    assert np.array_equal(*results)

    # As a second channel, too.
    images = [tmp_path / "scan.nii.gz", tmp_path / "plain.nii.gz"]
    nib.Nifti1Image(voxels, source.affine).to_filename(images[1])
    assert preprocess.prepare_scan(images)[0].shape[0] == 2
