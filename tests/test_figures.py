"""Pictures of a run, features of a scan, and the measure of invariance, from one short pretraining."""

import importlib.util
import json
import runpy
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, mistake, script

import checkpoint
import predict
import preprocess


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """Two steps of pretraining with a preview at each."""
    out = tmp_path_factory.mktemp("run")
    script("pretrain.py", model="unet_demo", data=prepared, steps=2, preview=1, batch_size=2, patch_size=32,
           features=4, workers=0, compile="false", precision="fp32", log_every=1, out=out)
    return out


def draw(monkeypatch, *words):
    """docs/figures.py in this process."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
    runpy.run_path(str(ROOT / "docs" / "figures.py"), run_name="__main__")


def test_previews_are_nifti_of_the_clean_target_and_the_masked_input(run):
    assert len(list((run / "preview").glob("*.nii.gz"))) % 6 == 0
    image, output, target = (nib.load(run / "preview" / f"step0000002_0_{kind}.nii.gz").get_fdata()
                             for kind in ("input", "reconstruction", "target"))
    tokens = [x.reshape(8, 4, 8, 4, 8, 4).swapaxes(1, 2).swapaxes(3, 4).swapaxes(2, 3).reshape(512, 64)
              for x in (image, target)]
    hidden = (tokens[0] == 0).all(1)
    assert hidden.sum() >= 308 and (tokens[1][hidden] > 0).any(), "308 of 512 tokens, not of the target"
    assert output.shape == (32, 32, 32) and np.isfinite(output).all()


def test_every_picture_is_drawn(run, monkeypatch, tmp_path):
    for kind in ("preview", "losses"):
        draw(monkeypatch, kind, run, "--out", tmp_path / f"{kind}.png")
    for name, gain in (("first", 0.0), ("second", 0.1)):
        (tmp_path / name).mkdir()
        records = [{"case": f"c{i}", "subject": f"c{i}", "dice": {"lesion": i / 10 + gain if i else None}}
                   for i in range(5)]
        scores = {"classes": ["lesion"], "folds": {"0": records}}
        (tmp_path / name / "dice.json").write_text(json.dumps(scores))
    draw(monkeypatch, "dice", tmp_path / "first", tmp_path / "second", "--out", tmp_path / "dice.png")
    volume = np.random.default_rng(0).random((20, 24, 16), np.float32)
    for name, array in (("scan", volume), ("seg", (volume > 0.9).astype(np.uint8))):
        nib.Nifti1Image(array, np.diag([1, 1, 2, 1])).to_filename(tmp_path / f"{name}.nii.gz")
    files = tmp_path / "scan.nii.gz", tmp_path / "seg.nii.gz"
    draw(monkeypatch, "scan", *files, "--out", tmp_path / "scan.png")
    for kind in ("preview", "losses", "dice", "scan"):
        assert (tmp_path / f"{kind}.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(SystemExit, match="--preview N writes it"):
        draw(monkeypatch, "preview", tmp_path)


def test_features_of_a_scan(run, raw, tmp_path, capsys):
    scan = sorted(raw.rglob("*T1w.nii.gz"))[0]
    predict.main(predict.Config(str(run / "last.pt"), (str(scan),), features=str(tmp_path / "x.npy")))
    pooled, voxels = np.load(tmp_path / "x.npy"), np.load(tmp_path / "x_voxels.npy")
    volume, _, _ = preprocess.prepare_scan([str(scan)])
    assert pooled.shape == (31 * 4,) and voxels.shape == (4, *volume.shape[1:]) and voxels.dtype == np.float16
    model, _ = predict.load_encoder(checkpoint.load_checkpoint(str(run / "last.pt")))
    with torch.no_grad():
        corner = model.encoder(volume[None, :, :32, :32, :32].float())[0][0]
    alone = predict.window_starts(volume.shape[1], 32, 0.5)[1]  # the first window alone covers these voxels
    assert np.abs(voxels[:, :alone, :alone, :alone] - corner[:, :alone, :alone, :alone].numpy()).max() < 5e-3
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "this is none" in mistake("predict", scan, ckpt=tmp_path / "other.pt", features="y")


def test_invariance_of_random_and_of_pretrained_weights(run, prepared, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("invariance", ROOT / "bench" / "invariance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["invariance.py", str(run / "last.pt"), "--patches", "3"])
    module.main()
    header, _, trained, untrained = [[cell.strip() for cell in line.strip("|").split("|")]
                                     for line in capsys.readouterr().out.splitlines()]
    assert untrained[0] == "random weights" and trained[1:] != untrained[1:]
    values = np.array([trained[1:], untrained[1:]], float)
    assert (np.abs(values) <= 1).all() and (values[:, header[1:].index("noise")] > values[:, 0]).all()
