"""predict.py --input: a cohort in, a cohort out, however often it was cut off; ensembles."""

import contextlib
import csv
import io
import itertools
import json
import os
import runpy
import shutil
import signal
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import handlers_put_back, mistake
from runs import ROOT, Run, alive, words_of
from scipy import ndimage
from test_predict_inputs import AFFINE, head, network

import checkpoint
import config
import label_maps
import networks
import phantom
import predict
import preprocess
import scoring
import segment_cohort
import tasks


def segment(*words, code=0, **settings):
    """predict.py in this process, which must end with the code -> what it printed, errors after."""
    settings = {"overlap": 0, "workers": 0} | settings
    cfg = config.parse_config(predict.Config, [*map(str, words), *words_of(settings)])
    output, errors = io.StringIO(), io.StringIO()
    with handlers_put_back(), contextlib.redirect_stdout(output):
        with contextlib.redirect_stderr(errors):
            assert predict.main(cfg) == code, errors.getvalue()
    return output.getvalue() + errors.getvalue()


def rows(out):
    with open(out / "volumes.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(out):
    """{path below a folder: bytes} of all files that are not hidden."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def drawn(path, seed):
    """A finetuned checkpoint with other weights for every seed."""
    network(path)
    saved = checkpoint.load_checkpoint(path)
    generator = torch.Generator().manual_seed(seed)
    for weight in saved["model"].values():
        weight += 0.1 * torch.randn(weight.shape, generator=generator) * weight.std(correction=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save_checkpoint(path, saved)
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """20 phantoms in BIDS, two folds of a run, and what an undisturbed call makes of them."""
    folder = tmp_path_factory.mktemp("cohort")
    phantom.write_bids(folder / "raw", subjects=0, labelled=20, size=28, seed=3)
    for fold in range(2):
        (folder / f"run/fold_{fold}").mkdir(parents=True)
        drawn(folder / f"run/fold_{fold}/last.pt", fold)
    said = segment(ckpt=folder / "run", input=folder / "raw", truth=folder / "raw",
                   out=folder / "whole")
    return folder, said


# ------------------------------------------------------------------------------ cut off and resumed
def test_a_cohort_that_was_killed_twice_is_the_same_to_the_byte(cohort, tmp_path):
    folder, said = cohort
    assert "the mean of 2 networks" in said and "scans: 20, of which finished before: 0" in said
    settings = {"ckpt": folder / "run", "input": folder / "raw", "truth": folder / "raw",
                "out": tmp_path / "out", "overlap": 0, "workers": 2}
    finished = 0

    def records():
        return len(list((tmp_path / "out").rglob("*dseg.json")))

    for number in range(2):
        call = Run("predict", tmp_path / f"log{number}", **settings)
        enough = finished + 3
        call.wait_for(lambda enough=enough: records() >= enough)
        session = call.parts[0].pid
        call.kill()

        # Whoever reads or writes beside it ends by himself, and what has a final name is whole.
        deadline = time.time() + 20
        while alive(session):
            assert time.time() < deadline
            time.sleep(0.05)
        finished = records()
        assert finished < 20
        for path in (tmp_path / "out").rglob("sub-*.nii.gz"):
            assert nib.load(path).get_fdata().max() <= 1

    # A last file that was not finished, and a table that was cut within a row.
    (tmp_path / "out" / ".part1-dseg.tsv").write_text("half")
    os.truncate(tmp_path / "out" / "volumes.csv", 60)
    printed = Run("predict", tmp_path / "log", **settings).finish()
    assert f"scans: 20, of which finished before: {finished}" in printed
    assert contents(tmp_path / "out") == contents(folder / "whole")
    assert not list((tmp_path / "out").rglob(".part*"))


def test_one_by_one_gives_the_same_rows_and_maps(cohort, tmp_path):
    folder, _ = cohort
    for scan in sorted((folder / "raw").rglob("*FLAIR.nii.gz"))[:6]:
        truth = str(scan).replace("FLAIR", "lesion")
        segment(ckpt=folder / "run", input=scan, truth=truth, out=tmp_path / "out")
    expected = rows(folder / "whole")[:6]
    found = rows(tmp_path / "out")
    assert found == expected and len({row["dice"] for row in found}) > 3
    maps = {name: content for name, content in contents(tmp_path / "out").items()
            if name.endswith(".nii.gz")}
    assert len(maps) == 6 and maps.items() <= contents(folder / "whole").items()


def test_a_signal_ends_a_call_after_a_scan(cohort, tmp_path):
    folder, _ = cohort
    settings = {"ckpt": folder / "run", "input": folder / "raw", "out": tmp_path / "out",
                "overlap": 0}
    call = Run("predict", tmp_path / "log", **settings)
    call.wait_for(lambda: list((tmp_path / "out").rglob("*dseg.json")))
    os.kill(call.parts[0].pid, signal.SIGTERM)
    assert "stopped by a signal; the same command goes on" in call.finish()
    done = len(rows(tmp_path / "out"))
    assert 0 < done < 20 and done == len(list((tmp_path / "out").rglob("*.nii.gz")))


def test_what_exists_is_skipped_unless_it_is_of_something_else(cohort, tmp_path):
    folder, _ = cohort
    raw, out = tmp_path / "raw", tmp_path / "out"
    for subject in ("sub-L000", "sub-L001", "sub-L002"):
        shutil.copytree(folder / "raw" / subject, raw / subject)
    one = {"ckpt": folder / "run/fold_0", "input": raw, "out": out}
    assert "segmented 3 of 3 scans" in segment(**one)
    before = contents(out)
    assert "scans: 3, of which finished before: 3" in segment(**one)

    # A scan that has changed; a label map that is gone; other networks, which are refused.
    scan = next(raw.rglob("sub-L000*FLAIR.nii.gz"))
    os.utime(scan, (1, 1))
    assert "scans: 3, of which finished before: 2" in segment(**one)
    next(out.rglob("sub-L001*.nii.gz")).unlink()
    assert "scans: 3, of which finished before: 2" in segment(**one)
    maps = {name: content for name, content in contents(out).items() if "L000" not in name}
    assert maps.items() <= before.items()
    for other in ({"ckpt": folder / "run"}, {"mirror": "true"}):
        line = mistake("predict", **(one | other | {"overlap": 0}))
        assert "holds segmentations of other" in line and "--overwrite" in line
    assert contents(out).keys() == before.keys()

    # Overwritten by others, as far as this call goes: the rest is in the table no more.
    segment("--overwrite", **(one | {"ckpt": folder / "run", "input": scan}))
    assert [row["scan"] for row in rows(out)] == ["sub-L000_ses-01"]


# -------------------------------------------------------------------------------------- the network
def test_one_network_gives_what_one_scan_gives(cohort, tmp_path):
    """And the probabilities, which are written, are those that volumes.csv has the mean of."""
    folder, _ = cohort
    scan = sorted((folder / "raw").rglob("*FLAIR.nii.gz"))[2]
    ckpt = folder / "run" / "fold_1" / "last.pt"
    segment(scan, ckpt=ckpt, out=tmp_path / "one.nii.gz")
    segment("--probabilities", ckpt=ckpt, input=scan, out=tmp_path / "out")
    found = next((tmp_path / "out").rglob("*dseg.nii.gz"))
    assert found.name == "sub-L002_ses-01_space-orig_label-lesion_dseg.nii.gz"
    assert found.read_bytes() == (tmp_path / "one.nii.gz").read_bytes()

    # Two bytes a voxel, on the scan's own grid.
    probability = nib.load(next((tmp_path / "out").rglob("*lesion_probseg.nii.gz")))
    source, marked = nib.load(scan), nib.load(found).get_fdata() > 0
    assert probability.get_data_dtype() == np.uint16 and probability.shape == source.shape
    assert np.allclose(probability.affine, source.affine, atol=1e-5)
    values = probability.get_fdata()
    assert 0 <= values.min() and values.max() <= 1
    row, = rows(tmp_path / "out")
    assert marked.any() and values[marked].mean() == pytest.approx(float(row["mean_probability"]),
                                                                  abs=1e-5)


@pytest.mark.parametrize("mirror", [False, True])
def test_an_ensemble_is_the_mean_of_softmax(cohort, mirror):
    folder, _ = cohort
    paths = networks.find(str(folder / "run"))
    device = torch.device("cpu")
    members, _ = predict.load_members(paths, device)
    volume = torch.rand(1, 30, 31, 33 if not mirror else 32)
    classes, probabilities = predict.segment_together(members, volume, (31, 37, 60), device, mirror,
                                                      overlap=0)
    expected = []
    for path in paths:
        model, _ = predict.load_network(path, device)
        flips = itertools.product((False, True), repeat=3 if mirror else 0)
        for flip in flips:
            axes = [axis + 1 for axis, flipped in enumerate(flip) if flipped]
            logits = predict.sliding_window(model, volume.flip(axes), 32, 0).flip(axes)
            expected.append(logits.softmax(0))
    mean = torch.stack(expected).mean(0)
    assert len(expected) == (16 if mirror else 2)
    assert torch.allclose(probabilities, mean, atol=1e-6)
    assert torch.equal(classes, predict.largest_class(probabilities, (31, 37, 60)))
    assert len(classes.unique()) == 2


def test_a_run_folder_is_its_folds(tmp_path):
    names = ("fold_10", "fold_2", "fold_all", "fold_0", "other")
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
    run = str(tmp_path / "run")
    (tmp_path / "run/fold_all/last.pt").touch()
    assert networks.find(run) == [f"{run}/fold_all/last.pt"]
    for name in ("fold_10", "fold_2", "other"):
        (tmp_path / "run" / name / "last.pt").touch()
    assert networks.find(run) == [f"{run}/fold_2/last.pt", f"{run}/fold_10/last.pt"]
    assert networks.find(f"{run}/fold_all") == [f"{run}/fold_all/last.pt"]
    assert networks.find(f"{run},a.pt") == [f"{run}/fold_2/last.pt", f"{run}/fold_10/last.pt",
                                            "a.pt"]
    (tmp_path / "a,b.pt").touch()
    assert networks.find(f"{tmp_path}/a,b.pt") == [f"{tmp_path}/a,b.pt"]


def test_networks_that_are_no_ensemble_are_refused(tmp_path):
    scan = tmp_path / "scan.nii"
    nib.Nifti1Image(head(), AFFINE).to_filename(scan)
    changes = {"half": {"step": 4}, "sided": {}, "whole": {}}
    for name, change in changes.items():
        saved = checkpoint.load_checkpoint(network(tmp_path / f"{name}.pt"))
        saved["config"]["steps"] = 8
        if name == "sided":
            saved["task"]["classes"] = ("background", "left stroke")
        checkpoint.save_checkpoint(tmp_path / f"{name}.pt", saved | change)

    def line(names, *words):
        ckpt = ",".join(f"{tmp_path}/{name}.pt" for name in names)
        return mistake("predict", scan, *words, ckpt=ckpt, out=tmp_path / "x.nii")

    assert "sided.pt has other classes" in line(["whole", "sided"])
    assert "half.pt is at step 4 of 8" in line(["whole", "half"])
    assert "left stroke is another class in the mirror" in line(["sided"], "--mirror")
    assert "scans that --input names" in line(["whole"], "--probabilities")
    assert "choose bf16, fp32" in line(["whole"], "--precision", "fp64")
    assert not (tmp_path / "x.nii").exists()


# ------------------------------------------------------------------------------------------ volumes
def test_volumes_are_those_of_scipy(cohort):
    folder, _ = cohort
    found = rows(folder / "whole")
    assert [row["scan"] for row in found] == [f"sub-L{n:03}_ses-01" for n in range(20)]
    for row in found[:4]:
        label_map = nib.load(next((folder / "whole").rglob(f"{row['scan']}*dseg.nii.gz")))
        scan = nib.load(next((folder / "raw").rglob(row["file"])))
        voxel = np.prod(nib.affines.voxel_sizes(scan.affine)) / 1000
        mask = label_map.get_fdata() > 0
        lesions, count = ndimage.label(mask, np.ones((3, 3, 3)))
        sizes = np.bincount(lesions.ravel())[1:]
        expected = {"ml": mask.sum() * voxel, "components": count, "largest_ml": max(sizes) * voxel,
                    "share": mask.sum() / (scan.get_fdata() > 0).sum()}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, abs=1e-6)
        truth = next((folder / "raw").rglob(row["file"].replace("FLAIR", "lesion")))
        scores = tasks.score_case(mask.astype(np.uint8), nib.load(truth).get_fdata(), {
            "labels": {0: 0, 1: 1}, "ignore": (), "regions": {}, "classes": ("air", "lesion")},
            scan.affine)
        assert float(row["dice"]) == pytest.approx(scores["dice"]["lesion"], abs=1e-6)
    tsv = (folder / "whole/dseg.tsv").read_text()
    assert tsv == "index\tname\n0\tbackground\n1\tlesion\n"
    described = json.loads((folder / "whole/dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"


def test_the_volume_of_nothing():
    nothing = label_maps.measure(np.zeros((4, 4, 4), bool), (1, 1, 1))
    assert nothing == {"ml": 0, "components": 0, "largest_ml": 0}


def test_the_picture_of_a_cohort(cohort, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, _ = cohort
    script = str(ROOT / "docs" / "figures.py")

    def draw(*words):
        monkeypatch.setattr(sys, "argv", ["figures.py", "cohort", *map(str, words)])
        return runpy.run_path(script, run_name="__main__")

    names = draw(folder / "whole", "--out", tmp_path / "cohort.png")
    picture = (tmp_path / "cohort.png").read_bytes()
    width = int.from_bytes(picture[16:20], "big")
    assert picture[1:4] == b"PNG" and width == 1100, "a page wide"
    volumes = names["read_volumes"](str(folder / "whole"))
    assert [found["lesion"] for found in volumes.values()] == sorted(
        float(row["ml"]) for row in rows(folder / "whole"))
    with pytest.raises(SystemExit, match="predict.py --input writes it"):
        draw(tmp_path)


# ------------------------------------------------------------------------------------- what fails
def test_a_bad_scan_is_one_line_at_the_end(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "c"):
        nib.Nifti1Image(head(), AFFINE).to_filename(tmp_path / "in" / f"{name}.nii")
    (tmp_path / "in" / "b.nii").write_text("no scan")
    settings = {"ckpt": network(tmp_path / "net.pt"), "input": tmp_path / "in",
                "out": tmp_path / "out"}
    for workers in (0, 2):
        said = segment(code=1, workers=workers, **settings)
        assert said.count("not segmented: sub-b_ses-1: ") == said.count("b.nii: unreadable") == 1
        assert [row["file"] for row in rows(tmp_path / "out")] == ["a.nii", "c.nii"]
    nib.Nifti1Image(head(), AFFINE).to_filename(tmp_path / "in" / "b.nii")
    assert "segmented 1 of 1 scans; " in segment(**settings)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_readers_that_die_and_readers_that_nobody_asks(tmp_path, monkeypatch):
    """A scan whose reader is killed is a bad scan. Results that are not taken keep nobody alive."""
    scans = [segment_cohort.new_scans.NewScan(f"s{n}", (f"{n}",), (None,)) for n in range(4)]
    big = np.zeros(10 ** 7, np.uint8)
    failed = {}
    monkeypatch.setattr(segment_cohort, "read", lambda scan, _: die() if scan.name == "s1" else big)
    readings = segment_cohort.read_ahead(scans, {}, 2, failed.__setitem__)
    names = [scan.name for scan, _ in itertools.islice(readings, 2)]
    assert names == ["s0", "s2"] and "died with exit code -9" in failed["s1"]
    readings.close()
    deadline = time.time() + 20
    while scoring.multiprocessing.active_children():
        assert time.time() < deadline
        time.sleep(0.01)


def test_a_scan_that_is_too_large_does_not_stop_the_others(tmp_path, monkeypatch):
    for name, n in (("a", 24), ("b", 32)):
        nib.Nifti1Image(head(n=n), AFFINE).to_filename(tmp_path / f"{name}.nii")
    known = predict.segment_together

    def fail(members, volume, size, *rest, **window):
        if max(size) < 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return known(members, volume, size, *rest, **window)

    monkeypatch.setattr(predict, "segment_together", fail)
    said = segment(tmp_path / "b.nii", code=1, ckpt=network(tmp_path / "net.pt"),
                   input=tmp_path / "a.nii", out=tmp_path / "out")
    assert "not segmented: sub-a_ses-1" in said and "out of memory" in said
    assert [row["file"] for row in rows(tmp_path / "out")] == ["b.nii"]


def test_a_truth_on_another_grid_or_with_unknown_values(tmp_path):
    for name in ("in", "truth"):
        (tmp_path / name).mkdir()
    moved = AFFINE.copy()
    moved[0, 3] += 3
    for name, value, affine in (("a", 1, AFFINE), ("b", 7, AFFINE), ("c", 1, moved)):
        nib.Nifti1Image(head(), AFFINE).to_filename(tmp_path / "in" / f"{name}.nii")
        label = (head() > 350).astype(np.uint8) * value
        nib.Nifti1Image(label, affine).to_filename(tmp_path / "truth" / f"{name}_seg.nii")
    said = segment(code=1, ckpt=network(tmp_path / "net.pt"), input=tmp_path / "in",
                   truth=tmp_path / "truth", out=tmp_path / "out")
    assert "holds 7, which the task's labels do not name" in said
    assert "c_seg.nii: label grid differs from image grid" in said
    assert [row["scan"] for row in rows(tmp_path / "out")] == ["sub-a_ses-1"]
    line = mistake("predict", ckpt=tmp_path / "net.pt", input=tmp_path / "in",
                   truth=tmp_path / "truth", out=tmp_path / "truth" / "out")
    assert "choose a folder beside it" in line


def test_share_counts_what_preprocessing_calls_the_head(tmp_path):
    scan = tmp_path / "scan.nii"
    nib.Nifti1Image(head(), AFFINE).to_filename(scan)
    reading = segment_cohort.read(segment_cohort.new_scans.NewScan("s", (str(scan),), (None,)), {})
    assert reading.brain_ml == pytest.approx((head() > 0).sum() / 1000)
    volume, _, _ = preprocess.prepare_scan([str(scan)])
    assert np.array_equal(reading.volume, volume.numpy())
