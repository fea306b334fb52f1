"""Preparation: the official preprocessing exactly, its inverse, the folder it writes, and what it refuses."""

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT, mistake, script
from skimage.transform import resize

import data
import phantom
import prepare_data
from prepare_data import Rejected

GOLDEN = np.load(ROOT / "tests" / "golden" / "preprocess.npz")
BOX = GOLDEN["crop_box"].reshape(3, 2) + [0, 1]  # half-open, as the official code slices it


def image_of(array, affine=None):
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine)


def head(spacing=(1, 1, 1), axes="RAS", degrees=0.0, size=80, contrast="FLAIR", seed=0):
    """A phantom scan with its lesion map: two nibabel images."""
    rng = np.random.default_rng(seed)
    return phantom.scan(phantom.anatomy(rng, size), rng, contrast, size, spacing, axes, degrees, lesions=True)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# --------------------------------------------------------------------------------- the official result
def test_equals_the_official_preprocessing():
    volume, geometry = prepare_data.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]), BOX)
    label = prepare_data.preprocess_label(image_of(GOLDEN["lab"], GOLDEN["affine"]), geometry)
    assert np.abs(volume - GOLDEN["out_img"]).max() < 1e-5
    assert np.array_equal(label, GOLDEN["out_lab"])
    tight = np.array(prepare_data.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]))[1]["box"])
    assert np.array_equal(tight, BOX - [0, 1]), "the official box is one voxel larger at the high side"


def test_equals_the_official_way_back():
    _, geometry = prepare_data.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]), BOX)
    pad = GOLDEN["padding"].reshape(3, 2)
    unpadded = tuple(slice(before, 64 - after) for before, after in pad)
    logits = prepare_data.restore(GOLDEN["rev_logits_in"][0][(slice(None), *unpadded)], geometry)
    official = np.flip(GOLDEN["rev_logits_out"][0], 1)  # it was stored in RAS order, before the last flip
    assert np.allclose(logits, official, atol=1e-5)


@pytest.mark.parametrize(("shape", "target"), [
    ((30, 41, 12), (30, 41, 60)), ((50, 31, 29), (22, 14, 13)), ((33, 20, 27), (15, 47, 27)),
    ((16, 17, 18), (16, 17, 18)), ((40, 8, 9), (3, 30, 31))])
def test_resampling_equals_scikit_image(shape, target):
    volume = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = resize(volume.astype(np.float64), target, order=3, anti_aliasing=None, clip=True)
    assert np.abs(prepare_data.resample(volume, target) - expected).max() < 1e-5


def test_values_negative_voxels_and_the_tight_box():
    array = np.zeros((20, 20, 20), np.float32)
    array[3:17, 4:15, 5:18] = np.random.default_rng(0).uniform(10, 100, (14, 11, 13))
    array[0, 0, :7] = -5
    volume, geometry = prepare_data.preprocess(image_of(array))
    assert geometry["box"] == [[3, 17], [4, 15], [5, 18]] and geometry["clamped"] == 7
    crop = array[3:17, 4:15, 5:18]
    high = np.quantile(crop[crop > crop.min()], 0.99)
    assert np.allclose(volume, (np.minimum(crop, high) - crop.min()) / (high - crop.min()), atol=1e-6)
    assert volume.dtype == np.float32 and volume.min() == 0 and volume.max() == 1


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA", "AIL"])
@pytest.mark.parametrize("coded", [True, False])
def test_axis_order_does_not_change_the_volume(axes, coded):
    reference, _ = prepare_data.preprocess(head((1, 1.5, 2))[0])
    image, label = head((1, 1.5, 2), axes)
    if not coded:  # both form codes 0: nibabel's own affine is the truth then, and must give a usable volume
        image.header.set_sform(None, 0)
        image.header.set_qform(None, 0)
        assert image.header["sform_code"] == image.header["qform_code"] == 0
    volume, geometry = prepare_data.preprocess(image)
    assert volume.shape == reference.shape and np.abs(volume - reference).max() < 1e-5
    native = prepare_data.restore(prepare_data.preprocess_label(label, geometry), geometry)
    assert native.shape == image.shape


# ---------------------------------------------------------------------------------------- round trips
GRIDS = {"1 mm": ((1, 1, 1), "RAS", 0), "1 mm LPS": ((1, 1, 1), "LPS", 0),
         "1 mm oblique": ((1, 1, 1), "PSR", 17),
         "0.45 x 0.45 x 5 mm": ((0.45, 0.45, 5), "LAS", 0), "3 mm": ((3, 3, 3), "RAS", 0),
         "thick oblique": ((0.9, 0.9, 4), "AIL", 12)}


@pytest.mark.parametrize("grid", GRIDS)
def test_label_round_trip(grid):
    """No worse than nearest-neighbour round trips by scipy; a probability map, back trilinearly, better."""
    image, label = head(*GRIDS[grid], size=96)
    truth = np.asarray(label.dataobj) > 0
    _, geometry = prepare_data.preprocess(image)
    there = prepare_data.preprocess_label(image_of(truth.astype(np.uint8), label.affine), geometry)
    back = prepare_data.restore(there, geometry)
    assert back.shape == truth.shape and back.dtype == np.uint8
    box = tuple(slice(*pair) for pair in geometry["box"])
    ras = nib.apply_orientation(truth, np.array(geometry["orientation"]))
    crop = ras[box].astype(np.uint8)
    zoom = {"order": 0, "mode": "nearest", "grid_mode": True}
    once = scipy.ndimage.zoom(crop, np.array(geometry["resampled"]) / crop.shape, **zoom)
    again = scipy.ndimage.zoom(once, np.array(crop.shape) / once.shape, **zoom)
    ours = dice(back > 0, truth)
    assert ours >= dice(again > 0, crop > 0) - 0.005
    if "1 mm" in grid:
        assert ours >= 0.99
    soft = torch.from_numpy(prepare_data.resample(crop.astype(np.float32), geometry["resampled"]))
    logits = prepare_data.restore(torch.stack([1 - soft, soft]), geometry)
    assert dice(logits.argmax(0) > 0, truth) >= ours - 1e-9


# ------------------------------------------------------------------------------ the folder it writes
def tables(out, kind):
    return [row for path in sorted((Path(out) / kind).glob("*.csv")) for row in csv.DictReader(path.open())]


def test_counts_index_and_files(prepared, raw):
    rows = tables(prepared, "index")
    files = list(raw.rglob("*.nii.gz"))
    labels = [f for f in files if "lesion" in f.name]
    assert len(rows) == len(files) - len(labels) == 6 * 2 + 5 and len(labels) == 5
    for row in rows:
        volume = np.load(prepared / row["path"])
        assert volume.dtype == np.float16 and "x".join(map(str, volume.shape)) == row["shape"]
        assert 0 <= volume.min() and volume.max() <= 1 and len(row["sha256"]) == 64
        assert bool(row["label"]) == row["subject"].startswith("sub-L")
        if row["label"]:
            label = np.load(prepared / row["label"])
            assert label.dtype == np.uint8 and label.shape == volume.shape and label.max() == 1
    assert not list(prepared.rglob(".*")), "no temporary file is left"


def test_float16_is_near(raw):
    scan = next(raw.rglob("*T1w.nii.gz"))
    volume, _ = prepare_data.preprocess(scan)
    assert np.abs(volume - volume.astype(np.float16).astype(np.float32)).max() < 5e-4


def test_a_second_run_does_only_what_is_missing(prepared, raw, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(prepared, out)
    victim = next((out / "geometry").rglob("*.json"))
    victim.unlink()
    before = {path: path.stat().st_mtime_ns for path in (out / "volumes").rglob("*.npy")}
    script("prepare_data.py", source="bids", input=raw, out=out, workers=1)
    changed = [path.stem for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert changed == [victim.stem]
    assert tables(out, "index") == tables(prepared, "index")


def test_shards_and_workers_make_the_same_folder(prepared, raw, tmp_path):
    for shard in ("0/2", "1/2"):
        script("prepare_data.py", source="bids", input=raw, out=tmp_path, workers=1, shard=shard)
    assert data.read_index(str(tmp_path)) == data.read_index(str(prepared))
    for volume in data.read_index(str(prepared)):
        assert (tmp_path / volume.path).read_bytes() == (prepared / volume.path).read_bytes()


def test_brats21_layout_holds_out_a_quarter(tmp_path):
    script("tests/phantom.py", out=tmp_path / "raw", subjects=1, labelled=4, layout="brats21", size=32)
    result = script("prepare_data.py", source="brats21", input=tmp_path / "raw", out=tmp_path / "out")
    assert "24 files found = 20 prepared + 4 skipped by rule (label 4) + 0 rejected" in result.stdout
    rows = tables(tmp_path / "out", "index")
    held = {r["subject"] for r in rows if r["split"] == "test"}
    assert len(held) == 1 and not held & {r["subject"] for r in rows if r["split"] != "test"}
    cases = data.labelled_cases(str(tmp_path / "out"), "brats21", ("FLAIR", "T1ce"))
    assert len(cases) == 4 and all(len({v.shape for v in case.volumes}) == 1 for case in cases)
    assert len(data.pretraining_cases(str(tmp_path / "out"))) == 16


def test_manifest(raw, tmp_path):
    labelled = sorted(raw.rglob("*lesion.nii.gz"))[0]
    with open(tmp_path / "scans.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("path", "subject", "session", "sequence", "label"),
            (str(labelled).replace("lesion", "FLAIR"), "anna", "1", "FLAIR", str(labelled)),
            (os.path.relpath(next(raw.rglob("*T1w.nii.gz")), tmp_path), "bert", "", "T1", "")])
    result = script("prepare_data.py", source="manifest", input=tmp_path / "scans.csv", out=tmp_path / "out")
    assert "2 files found = 2 prepared" in result.stdout
    assert [(r["subject"], r["split"]) for r in tables(tmp_path / "out", "index")] == [
        ("anna", "train"), ("bert", "pretrain")]


# ------------------------------------------------------------------------------------------ bad input
def bad_scan(kind, folder):
    """Write one bad scan of a kind, return its path."""
    image, _ = head(size=40)
    array, path = np.asarray(image.dataobj).astype(np.float32), folder / "sub-1_T1w.nii.gz"
    if kind == "4-D":
        array = np.stack([array, array], -1)
    elif kind == "NaN":
        array[3, 4, 5] = np.nan
    elif kind == "constant":
        array[:] = 7
    elif kind == "empty":
        array[:] = 0
    elif kind == "thin":
        array = array[:, :, :14]
    image_of(array, image.affine).to_filename(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "no scale":
        image = nib.load(path)
        header = image.header.copy()
        header.set_sform(np.zeros((4, 4)), 1)
        nib.Nifti1Image(array, None, header).to_filename(path)
    return path


@pytest.mark.parametrize(("kind", "reason", "code"), [
    ("truncated", "unreadable", 1), ("text", "unreadable", 1), ("4-D", "not 3-D but", 0),
    ("NaN", "1 voxels are not finite", 1), ("constant", "constant", 1), ("empty", "constant or empty", 1),
    ("thin", "a side of 14 voxels", 0), ("no scale", "no affine scale", 1)])
def test_a_bad_scan_is_rejected_by_name_and_the_good_one_prepared(kind, reason, code, tmp_path):
    for subject in ("sub-1", "sub-2"):
        (tmp_path / "raw" / subject / "anat").mkdir(parents=True)
    bad_scan(kind, tmp_path / "raw" / "sub-1" / "anat")
    head(size=40)[0].to_filename(tmp_path / "raw" / "sub-2" / "anat" / "sub-2_T1w.nii.gz")
    result = script("prepare_data.py", source="bids", input=tmp_path / "raw", out=tmp_path / "out",
                    check=code)
    assert "2 files found = 1 prepared + 0 skipped by rule + 1 rejected" in result.stdout
    [row] = tables(tmp_path / "out", "rejected")
    assert reason in row["reason"] and row["path"] == "sub-1/anat/sub-1_T1w.nii.gz"
    assert "Traceback" not in result.stderr


def test_a_label_on_another_grid_is_rejected(tmp_path):
    image, label = head(size=40)
    _, geometry = prepare_data.preprocess(image)
    moved = label.affine.copy()
    moved[0, 3] += 0.005
    assert prepare_data.preprocess_label(image_of(np.asarray(label.dataobj), moved), geometry).any()
    moved[0, 3] += 0.01
    with pytest.raises(Rejected, match="label grid differs"):
        prepare_data.preprocess_label(image_of(np.asarray(label.dataobj), moved), geometry)
    with pytest.raises(Rejected, match="label grid differs"):
        prepare_data.preprocess_label(image_of(np.asarray(label.dataobj)[:-1], label.affine), geometry)
    with pytest.raises(Rejected, match="label values unknown"):
        prepare_data.preprocess_label(image_of(np.full(image.shape, 0.5, np.float32), image.affine), geometry)


@pytest.mark.parametrize(("settings", "message"), [
    ({"input": "/nowhere"}, "/nowhere is not a folder"),
    ({"input": "."}, "no .nii or .nii.gz file"),
    ({"source": "brats"}, "choose"),
    ({"shard": "3/3"}, "expected i/n"),
    ({"workerz": 3}, "did you mean 'workers'"),
    ({"workers": "many"}, "expected int, got 'many'"),
    ({"source": "manifest", "input": "/nowhere.csv"}, "cannot read the manifest"),
])
def test_a_mistake_ends_in_one_line(tmp_path, settings, message):
    merged = {"source": "bids", "input": tmp_path, "out": tmp_path / "out"} | settings
    if merged["input"] == ".":
        merged["input"] = tmp_path
    assert message in mistake("prepare_data", **merged)


# ----------------------------------------------------------------------------------------- real scans
SCANS = ROOT.parent / "shared" / "scans"


@pytest.mark.skipif(not SCANS.exists(), reason="../shared/scans is absent")
@pytest.mark.parametrize(("source", "folder", "line"), [
    ("brats21", "brats21", "12 files found = 8 prepared + 4 skipped by rule (label 4) + 0 rejected"),
    ("bids", "stroke_t2", "4 files found = 2 prepared + 2 skipped by rule (label 2) + 0 rejected")])
def test_real_scans(source, folder, line, tmp_path):
    result = script("prepare_data.py", source=source, input=SCANS / folder, out=tmp_path)
    assert line in result.stdout
    for volume in data.read_index(str(tmp_path)):
        record = tmp_path / volume.path.replace("volumes/", "geometry/").replace(".npy", ".json")
        geometry = json.loads(record.read_text())
        native = np.asarray(nib.load(tmp_path / volume.label.replace(".npy", "_native.nii.gz")).dataobj)
        back = prepare_data.restore(np.load(tmp_path / volume.label), geometry)
        assert dice(back > 0, native > 0) >= 0.99
