"""Pictures of a run, features of a scan, the measure of invariance, of one short pretraining."""

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
    script("pretrain.py", model="unet_demo", data=prepared, steps=2, preview=1, batch_size=2,
           patch_size=32, features=4, workers=0, compile="false", precision="fp32", log_every=1,
           out=out)
    return out


def draw(monkeypatch, *words):
    """docs/figures.py in this process."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
    runpy.run_path(str(ROOT / "docs" / "figures.py"), run_name="__main__")


def test_previews_are_nifti_of_the_clean_target_and_the_masked_input(run):
    assert len(list((run / "preview").glob("*.nii.gz"))) % 8 == 0
    image, output, target = (
        nib.load(run / "preview" / f"step0000002_0_{kind}.nii.gz").get_fdata()
        for kind in ("input", "reconstruction", "target"))

    def tokens(volume):
        split = volume.reshape(8, 4, 8, 4, 8, 4)
        return split.transpose(0, 2, 4, 1, 3, 5).reshape(512, 64)

    hidden = (tokens(image) == 0).all(1)
    assert hidden.sum() >= 308, "of 512 tokens"
    assert (tokens(target)[hidden] > 0).any(), "the target is not masked"
    assert output.shape == (32, 32, 32) and np.isfinite(output).all()


def test_every_picture_is_drawn(run, monkeypatch, tmp_path):
    for kind in ("preview", "losses"):
        draw(monkeypatch, kind, run, "--out", tmp_path / f"{kind}.png")

    # Two runs of five cases, one without a Dice.
    for name, gain in (("first", 0.0), ("second", 0.1)):
        (tmp_path / name).mkdir()
        records = [{"case": f"c{i}", "subject": f"c{i}", "dice": {"lesion": i / 10 + gain}}
                   for i in range(5)]
        records[0]["dice"]["lesion"] = None
        scores = {"classes": ["lesion"], "folds": {"0": records}}
        (tmp_path / name / "dice.json").write_text(json.dumps(scores))
    both = tmp_path / "first", tmp_path / "second"
    draw(monkeypatch, "dice", *both, "--out", tmp_path / "dice.png")

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
    scan = str(sorted(raw.rglob("*T1w.nii.gz"))[0])
    predict.main(predict.Config(str(run / "last.pt"), (scan,), features=str(tmp_path / "x.npy")))
    pooled = np.load(tmp_path / "x.npy")
    voxels = np.load(tmp_path / "x_voxels.npy")
    volume, _, _ = preprocess.prepare_scan([scan])
    assert pooled.shape == (31 * 4,)
    assert voxels.shape == (4, *volume.shape[1:]) and voxels.dtype == np.float16

    # Before the second window begins, the first one alone makes a voxel.
    model = predict.rebuild(checkpoint.load_checkpoint(str(run / "last.pt")), part="encoder")
    with torch.no_grad():
        corner = model.encoder(volume[None, :, :32, :32, :32].float())[0][0].numpy()
    alone = (slice(None), *[slice(predict.window_starts(volume.shape[1], 32, 0.5)[1])] * 3)
    assert np.abs(voxels[alone] - corner[alone]).max() < 5e-3

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
    assert (np.abs(values) <= 1).all()
    assert (values[:, header[1:].index("noise")] > values[:, 0]).all()


def test_the_curve_over_labels_has_a_part_for_each_augmentation_that_was_run(tmp_path, monkeypatch):
    """A study that is not complete has no empty picture."""
    image = pytest.importorskip("matplotlib.image")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "pretrain-base.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds no result of claim b"):
        draw(monkeypatch, "study_labels", folder)

    widths = []
    for preset in ("spatial", "all"):
        for n in (3, 5):
            dice = {str(fold): {"case": {"lesion": 0.5 + fold / 10}} for fold in range(3)}
            result = {"dice": dice}
            (folder / f"lesion-{n}-{preset}-scratch.json").write_text(json.dumps(result))
        draw(monkeypatch, "study_labels", folder)
        widths.append(image.imread(folder / "study_labels.png").shape[1])
    assert widths[1] > 1.5 * widths[0]
