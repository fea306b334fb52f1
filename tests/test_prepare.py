"""Preparation: the official preprocessing exactly, its inverse, the folder it writes, and what it refuses."""

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT, mistake, script
from skimage.transform import resize
from tqdm import tqdm

import data
import phantom
import prepare_data
import preprocess
import resample
import sources
import tasks

GOLDEN = np.load(ROOT / "tests" / "golden" / "preprocess.npz")
BOX = GOLDEN["crop_box"].reshape(3, 2) + [0, 1]  # half-open, as the official code slices it


def image_of(array, affine=None):
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine)


def head(spacing=(1, 1, 1), axes="RAS", degrees=0.0, size=80, contrast="FLAIR", seed=0):
    """A phantom scan with its lesion map: two nibabel images."""
    rng = np.random.default_rng(seed)
    return phantom.scan(phantom.anatomy(rng, size), rng, contrast, size, spacing, axes, degrees, lesions=True)


def prepare(source, folder, out, **settings):
    """prepare_data.py in this process, which is quicker; -> its exit code."""
    settings = {"workers": 1} | settings
    return prepare_data.main(prepare_data.Config(source, str(folder), str(out), **settings))


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# --------------------------------------------------------------------------------- the official result
def test_equals_the_official_preprocessing():
    volume, geometry = preprocess.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]), BOX)
    label = preprocess.preprocess_label(image_of(GOLDEN["lab"], GOLDEN["affine"]), geometry)
    assert np.abs(volume - GOLDEN["out_img"]).max() < 1e-5
    assert np.array_equal(label, GOLDEN["out_lab"])
    tight = np.array(preprocess.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]))[1]["box"])
    assert np.array_equal(tight, BOX - [0, 1]), "the official box is one voxel larger at the high side"


def test_equals_the_official_way_back():
    _, geometry = preprocess.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]), BOX)
    pad = GOLDEN["padding"].reshape(3, 2)
    unpadded = tuple(slice(before, 64 - after) for before, after in pad)
    logits = preprocess.restore(GOLDEN["rev_logits_in"][0][(slice(None), *unpadded)], geometry)
    official = np.flip(GOLDEN["rev_logits_out"][0], 1)  # it was stored in RAS order, before the last flip
    assert np.allclose(logits, official, atol=1e-5)


@pytest.mark.parametrize(("shape", "target"), [
    ((30, 41, 12), (30, 41, 60)), ((50, 31, 29), (22, 14, 13)), ((33, 20, 27), (15, 47, 27)),
    ((16, 17, 18), (16, 17, 18)), ((40, 8, 9), (3, 30, 31))])
def test_resampling_equals_scikit_image(shape, target):
    volume = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = resize(volume.astype(np.float64), target, order=3, anti_aliasing=None, clip=True)
    assert np.abs(resample.resample(volume, target) - expected).max() < 1e-5


def test_values_negative_voxels_and_the_tight_box():
    array = np.zeros((20, 20, 20), np.float32)
    array[3:17, 4:15, 5:18] = np.random.default_rng(0).uniform(10, 100, (14, 11, 13))
    array[0, 0, :7] = -5
    volume, geometry = preprocess.preprocess(image_of(array))
    assert geometry["box"] == [[3, 17], [4, 15], [5, 18]] and geometry["clamped"] == 7
    crop = array[3:17, 4:15, 5:18]
    high = np.quantile(crop[crop > crop.min()], 0.99)
    assert np.allclose(volume, (np.minimum(crop, high) - crop.min()) / (high - crop.min()), atol=1e-6)
    assert volume.dtype == np.float32 and volume.min() == 0 and volume.max() == 1


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA", "AIL"])
@pytest.mark.parametrize("coded", [True, False])
def test_axis_order_does_not_change_the_volume(axes, coded):
    reference, _ = preprocess.preprocess(head((1, 1.5, 2))[0])
    image, label = head((1, 1.5, 2), axes)
    if not coded:  # both form codes 0: nibabel's own affine is the truth then, and must give a usable volume
        image.header.set_sform(None, 0)
        image.header.set_qform(None, 0)
        assert image.header["sform_code"] == image.header["qform_code"] == 0
    volume, geometry = preprocess.preprocess(image)
    assert volume.shape == reference.shape and np.abs(volume - reference).max() < 1e-5
    native = preprocess.restore(preprocess.preprocess_label(label, geometry), geometry)
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
    _, geometry = preprocess.preprocess(image)
    there = preprocess.preprocess_label(image_of(truth.astype(np.uint8), label.affine), geometry)
    back = preprocess.restore(there, geometry)
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
    soft = torch.from_numpy(resample.resample(crop.astype(np.float32), geometry["resampled"]))
    logits = preprocess.restore(torch.stack([1 - soft, soft]), geometry)
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
    volume, _ = preprocess.preprocess(scan)
    assert np.abs(volume - volume.astype(np.float16).astype(np.float32)).max() < 5e-4


def test_two_inputs_of_one_source_need_two_names(prepared, raw, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("bids", raw, out)
    shutil.copytree(raw, tmp_path / "other")
    again = mistake("prepare_data", source="bids", input=tmp_path / "other", out=out)
    assert "give this one another --name" in again
    prepare("bids", tmp_path / "other", out, name="other")
    sources = [row.source for row in data.read_index(str(out))]
    assert sources.count("other") == sources.count("bids") == len(sources) / 2


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


def session_of_two(folder):
    """A FLAIR and a T2 on one grid with a label; the T2 reaches 3 mm further to one side."""
    image, label = head(size=48)
    narrow = np.asarray(image.dataobj).copy()
    narrow[:3] = 0
    os.makedirs(folder / "sub-1" / "anat", exist_ok=True)
    for name, file in (("FLAIR", image_of(narrow, image.affine)), ("T2w", image), ("lesion", label)):
        file.to_filename(folder / "sub-1" / "anat" / f"sub-1_{name}.nii.gz")
    return folder / "sub-1" / "anat" / "sub-1_T2w.nii.gz"


def test_channels_of_a_session_share_a_box_when_one_is_mended_later(tmp_path):
    second, out = session_of_two(tmp_path / "raw"), tmp_path / "out"
    whole = second.read_bytes()
    second.write_bytes(whole[:2000])
    assert prepare("bids", tmp_path / "raw", out) == 1
    second.write_bytes(whole)
    assert prepare("bids", tmp_path / "raw", out) == 0
    boxes = [json.loads(path.read_text())["box"] for path in out.rglob("geometry/*/*.json")]
    assert len(boxes) == 2 and boxes[0] == boxes[1]
    assert len({volume.shape for volume in data.read_index(str(out))}) == 1


def test_a_corrected_label_is_taken_by_the_next_run(tmp_path):
    session_of_two(tmp_path / "raw")
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    path = tmp_path / "raw" / "sub-1" / "anat" / "sub-1_lesion.nii.gz"
    label = nib.load(path)
    image_of(np.ones(label.shape, np.uint8), label.affine).to_filename(path)
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    case, = data.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert np.load(case.label).all() and data.read_case(case)[2].all()


def test_a_record_that_a_crash_left_empty_is_made_again(prepared, raw, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    victim = next((tmp_path / "out" / "geometry").rglob("*.json"))
    victim.write_text("")
    assert prepare("bids", raw, tmp_path / "out") == 0
    assert json.loads(victim.read_text())["row"]


def test_of_two_volumes_of_a_sequence_the_task_takes_the_labelled_one(prepared, tmp_path):
    rows = [volume for volume in data.read_index(str(prepared)) if volume.label]
    for other in ("volumes/bids/0.npy", "volumes/bids/z.npy"):
        out = tmp_path / os.path.basename(other)
        prepare_data.write_table(f"{out}/index/all.csv", data.Volume._fields,
                                 [*rows, rows[0]._replace(path=other, label="")])
        assert len(data.labelled_cases(str(out), None, ["FLAIR"])) == len(rows)


def test_brats21_layout_holds_out_a_quarter(tmp_path):
    script("tests/phantom.py", out=tmp_path / "raw", subjects=1, labelled=4, layout="brats21", size=32)
    result = script("prepare_data.py", source="brats21", input=tmp_path / "raw", out=tmp_path / "out")
    assert "24 found = 20 prepared + 4 skipped by rule (label 4) + 0 rejected" in result.stdout
    rows = tables(tmp_path / "out", "index")
    held = {r["subject"] for r in rows if r["split"] == "test"}
    assert len(held) == 1 + 1, "a quarter of the labelled, and those that the challenge holds back"
    assert not held & {r["subject"] for r in rows if r["split"] != "test"}
    cases = data.labelled_cases(str(tmp_path / "out"), "brats21", ("FLAIR", "T1ce"))
    assert len(cases) == 4 and all(len({v.shape for v in case.volumes}) == 1 for case in cases)
    assert len(data.pretraining_cases(str(tmp_path / "out"))) == 12


# -------------------------------------------------------------------------------- every source, Table 1
CASES = json.loads((ROOT / "tests" / "golden" / "discovery_cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["path"][-40:])
def test_what_a_path_says(case):
    who = sources.identify(case["source"], case["path"])
    named = {"subject": who.subject, "session": who.session, "sequence": "".join(who.sequences)}
    assert (None if who.skip else named) == case["expect"]


@pytest.mark.parametrize(("sequence", "names"), {
    "T1": "SAG FSPGR BRAVO, MPR____N3__Scaled, MT1__GradWarp__N3m, sT1W_3D_TFE, MPRAGE_GRAPPA2, SAG T1 SE, "
          "Spatially_Normalized__Masked_and_N3_corrected_T1",
    "FLAIR": "3D T2 FLAIR_MPR_Tra_1.5mm, COR/FLAIR/r, t2_tirm_tra_dark-fluid_, 3DT2FLAIR",
    "T2": "AX PD + T2, SG T2WI DS, sT2W/PD_TSE, *AX FSE T2", "T2star": "AXIAL_T2_STAR, Ax T2* GRE",
    "DWI": "2D DTI EPI FAT SHIFT LEFT, DTI_LR_TRACEW, ep2d_diff_LR, IsoDWI", "SWI": "minIP, Ax 3D SWAN GRE",
    "other": "T!, MR, PPMI 2.0, MRI BRAIN WO IVCON, 3D SAG",
    "-fMRI": "AX rsfMRI_LR, rsmriRL, ep2d_RESTING_STATE, BOLD_RS ACPC_LINE",
    "-localizer": "3-pl T2* FGRE, 3_Plane_Localizer", "-magnetisation transfer": "2D GRE-NM, NM-MT",
    "-perfusion": "Axial_3D_PASL__Eyes_Open_, Perfusion_Weighted, relCBF",
    "-calibration": "Field_Mapping, B1-calibration_Body", "-derived map": "DTI_LR_ColFA"}.items())
def test_free_text_series(sequence, names):
    skip = sequence.startswith("-")  # in the table above: taken as a sequence, or skipped with a reason
    expected = sources.Series(skip=sequence[1:]) if skip else sources.Series(sequence)
    series = sources.read_layout("adni").series
    assert {name: sources.classify(name, series) for name in names.split(", ")} == dict.fromkeys(
        names.split(", "), expected)


PEOPLE = {"isles22": (1, 4), "isles22_rawdata": (1, 3), "brats21": (1, 4), "wmh": (5, 3), "msseg1": (2, 2),
          "msd": (2, 1), "nnunet": (1, 3), "fomo60k": (1, 0), "oasis4": (1, 0)}  # else: 2 without labels


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every source's native tree, prepared into one folder: {layout: (truth, exit code, output)}."""
    folder, reports = tmp_path_factory.mktemp("sources"), {}
    for layout in phantom.LAYOUTS:
        truth = phantom.write(layout, folder / layout, *PEOPLE.get(layout, (2, 0)), size=32)
        source = layout.removesuffix("_rawdata")
        root = folder / layout / ("Dataset501_Lesions" if source == "nnunet" else "")
        out = folder / ("rawdata" if source != layout else "out")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = prepare(source, root, out)
        reports[layout] = truth, code, printed.getvalue()
    return folder, reports


@pytest.mark.parametrize("layout", phantom.LAYOUTS)
def test_counts_of_every_source(everything, layout):
    folder, reports = everything
    truth, code, printed = reports[layout]
    source = {"nnunet": "Dataset501_Lesions"}.get(layout, layout.removesuffix("_rawdata"))
    if layout == "nnunet":  # the input is the dataset's folder, not the one above it
        truth = {path.removeprefix(source + "/"): kind for path, kind in truth.items()
                 if path.startswith(source)}
    kinds = Counter()
    for kind in truth.values():
        kinds[kind.split()[0]] += 4 if kind.endswith("x4") else 1
    taken, skipped = kinds["volume"] + kinds["test"], kinds["junk"] + kinds["label"]
    assert f"{source}: {kinds.total()} found = {taken} prepared + {skipped} skipped by rule" in printed
    assert f" + {kinds['reject']} rejected" in printed and code == 0
    rows = [v for v in data.read_index(str(folder / ("rawdata" if "raw" in layout else "out")))
            if v.source == source]
    assert len(rows) == taken
    held_out = {"brats21": 2 * 4}.get(layout, 0)  # a quarter of 4, and 1 without label
    assert sum(v.split == "test" for v in rows) == kinds["test"] + held_out
    assert sum(bool(v.label) for v in rows) == {"isles22": 8, "isles22_rawdata": 6, "brats21": 16, "wmh": 16,
                                                "msseg1": 20, "msd": 4, "nnunet": 6}.get(layout, 0)


def test_table_1(everything):
    folder, _ = everything
    table = prepare_data.table_1(str(folder / "out"))
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert rows["wmh"].startswith("| wmh | 3 (60) | 3 (60) | 6 (120) | FLAIR 3, T1 3 |"), "no test case"
    assert rows["msd"].startswith("| msd | 2 (266) | 2 (266) | 8 (1,064) |"), "imagesTs only"
    assert rows["brats21"].startswith("| brats21 | 3 (938) | 3 (938) | 12 (3,752) |")
    assert rows["isles22"].startswith("| isles22 | 5 (250) | 5 (250) | 15 (750) |"), "all, held out or not"
    assert rows["adni"].startswith("| adni | 2 (1,563) | 4 (8,019) | 12 (9,548) |")
    taken = [v for v in data.read_index(str(folder / "out")) if v.split != "test"]
    assert f"| {len(taken):,} (44,756) |" in rows["total"] and "(7,140) |" in rows["total"]
    assert "(16,040) |" in rows["total"] and len(data.pretraining_cases(str(folder / "out"))) == len(taken)


def test_tasks_find_their_cases(everything):
    """25 % held out for BraTS21, set aside for ISLES22; the scanner of WMH in the subject's name."""
    folder = str(everything[0] / "out")
    wmh = data.labelled_cases(folder, "wmh", ("FLAIR",))
    assert sorted({c.volumes[0].split for c in wmh}) == ["test", "train"] and len(wmh) == 8
    assert "wmh/Amsterdam-Philips_VU.PETMR_01_1" in {c.subject for c in wmh}
    assert [len(data.labelled_cases(folder, "isles22", (s,))) for s in ("DWI", "FLAIR")] == [3, 0]
    splits = Counter(c.volumes[0].split for c in data.labelled_cases(folder, "brats21", ("FLAIR", "T1ce")))
    assert splits == {"train": 3, "test": 1}
    _, geometry, truth = data.read_case(wmh[0])
    assert set(np.unique(truth)) == {0, 1, 2} and list(truth.shape) == geometry["shape"]


def test_nnunet_becomes_a_task(everything):
    name, task = tasks.read_task(str(everything[0] / "out" / "Dataset501_Lesions.yaml"))
    assert name == "Dataset501_Lesions" and task.sequences == ("FLAIR", "T1")
    assert task.classes == ("background", "lesion") and task.labels == {0: 0, 1: 1}
    cases = data.labelled_cases(task.data, task.source, task.sequences)
    assert [c.subject.split("/")[1] for c in cases] == ["sub02", "sub_01", "sub_03"]


@pytest.mark.parametrize(("labels", "classes", "regions", "ignore"), [
    ({"0": "background", "1": "edema", "2": "core"}, ["background", "edema", "core"], {}, []),
    ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, ["background", "label 1", "core"],
     {"whole": [1, 2]}, [3])])
def test_labels_of_nnunet(labels, classes, regions, ignore, tmp_path):
    known = {"modality": {"0": "MRI", "1": "MRI"}, "labels": labels}
    (tmp_path / "dataset.json").write_text(json.dumps(known))
    channels, task = sources.read_dataset(str(tmp_path))
    assert (task["classes"], task["regions"], task["ignore"]) == (classes, regions, ignore)
    assert channels == {"0000": "0-MRI", "0001": "1-MRI"}


def test_dry_run_lists_and_writes_nothing(everything, tmp_path, capsys):
    folder, reports = everything
    truth = reports["oasis3"][0]
    prepare("oasis3", folder / "oasis3", tmp_path / "o", dry_run=True)
    printed = capsys.readouterr().out
    for path, kind in truth.items():
        assert f"{'skip' if kind == 'junk' else 'take'} {path}: " in printed
    assert "estimate from" in printed and not (tmp_path / "o").exists()


def test_other_shards_of_before_are_forgotten(tmp_path):
    """They hold the splits of fewer subjects."""
    def add(numbers):
        for i in numbers:
            image, label = head(size=24, seed=i)
            folder = tmp_path / "raw" / f"BraTS2021_{i:05}"
            folder.mkdir(parents=True)
            image.to_filename(folder / f"{folder.name}_flair.nii.gz")
            label.to_filename(folder / f"{folder.name}_seg.nii.gz")

    add(range(4))
    for shard in ("0/2", "1/2"):
        prepare("brats21", tmp_path / "raw", tmp_path / "out", shard=shard)
    add(range(4, 8))
    prepare("brats21", tmp_path / "raw", tmp_path / "out")
    prepare("brats21", tmp_path / "raw", tmp_path / "new")
    splits = [{v.path: v.split for v in data.read_index(str(tmp_path / name))} for name in ("out", "new")]
    assert splits[0] == splits[1] and sorted(splits[0].values()).count("test") == 2


def test_labels_on_two_grids_of_one_session(tmp_path):
    """Each volume is cropped with those that share its label."""
    lines = ["path,subject,session,sequence,label"]
    for name, spacing in (("FLAIR", (1, 1, 1)), ("DWI", (2, 2, 2))):
        image, label = head(spacing, size=48)
        image.to_filename(tmp_path / f"{name}.nii.gz")
        label.to_filename(tmp_path / f"{name}_label.nii.gz")
        lines.append(f"{name}.nii.gz,a,1,{name},{name}_label.nii.gz")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    assert prepare("manifest", tmp_path / "scans.csv", tmp_path / "out") == 0
    for name in ("FLAIR", "DWI"):
        case, = data.labelled_cases(str(tmp_path / "out"), None, [name])
        volume, geometry, truth = data.read_case(case)
        back = preprocess.restore(volume, geometry)
        assert back.shape[1:] == truth.shape and truth.any()


def test_a_scaled_label_is_the_same_for_training_and_for_scores(tmp_path):
    """Stored as 65535 with the slope 1/65535: 1 - 2^-32 in float64, 1 in float32."""
    image, label = head(size=48)
    mask = nib.Nifti1Image((np.asarray(label.dataobj) > 0).astype(np.uint16) * 65535, label.affine)
    mask.header.set_slope_inter(np.float32(1 / 65535), 0)
    folder = tmp_path / "raw" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    image.to_filename(folder / "sub-1_FLAIR.nii.gz")
    mask.to_filename(folder / "sub-1_lesion.nii.gz")
    assert nib.load(folder / "sub-1_lesion.nii.gz").dataobj.slope != 1
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    case, = data.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert data.read_case(case)[2].max() == 1
    assert preprocess.read_label(folder / "sub-1_lesion.nii.gz", image).max() == 1


def test_a_second_label_map_is_named_and_a_brain_mask_is_none(tmp_path, capsys):
    image, label = head(size=24)
    for name, file in (("sub-1/anat/sub-1_FLAIR", image), ("sub-1/anat/sub-1_lesion", label),
                       ("sub-1/anat/sub-1_space-x_dseg", label),
                       ("derivatives/prep/sub-1/anat/sub-1_desc-brain_mask", label)):
        path = tmp_path / "raw" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        file.to_filename(path)
    prepare("bids", tmp_path / "raw", tmp_path / "out", dry_run=True)
    printed = capsys.readouterr().out
    assert "sub-1_space-x_dseg.nii.gz is not used: sub-1/anat/sub-1_lesion.nii.gz is the label" in printed
    assert "label sub-1/anat/sub-1_lesion.nii.gz" in printed and "1 prepared" not in printed


def test_dry_run_of_nnunet_writes_no_task(everything, tmp_path, capsys):
    prepare("nnunet", everything[0] / "nnunet" / "Dataset501_Lesions", tmp_path / "o", dry_run=True)
    assert "FLAIR, train, label" in capsys.readouterr().out and not (tmp_path / "o").exists()


def test_dicom_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "IM_0001.dcm").write_text("DICM")
    assert "1 of DICOM: run dcm2niix first" in mistake("prepare_data", source="ppmi", input=tmp_path)


def test_manifest(raw, tmp_path):
    labelled = sorted(raw.rglob("*lesion.nii.gz"))[0]
    with open(tmp_path / "scans.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("path", "subject", "session", "sequence", "label"),
            (str(labelled).replace("lesion", "FLAIR"), "anna", "1", "FLAIR", str(labelled)),
            (os.path.relpath(next(raw.rglob("*T1w.nii.gz")), tmp_path), "bert", "", "T1", "")])
    result = script("prepare_data.py", source="manifest", input=tmp_path / "scans.csv", out=tmp_path / "out")
    assert "2 found = 2 prepared" in result.stdout
    assert [(r["subject"], r["split"]) for r in tables(tmp_path / "out", "index")] == [
        ("anna", "train"), ("bert", "pretrain")]


def test_manifest_of_a_spreadsheet_with_packed_pairs(tmp_path):
    image, _ = head(size=40)
    nib.Nifti1Pair(np.asarray(image.dataobj), image.affine).to_filename(tmp_path / "scan.img.gz")
    (tmp_path / "scans.csv").write_text("path,subject,session,sequence\nscan.img.gz,a,1,FLAIR\n",
                                        encoding="utf-8-sig")
    assert prepare("manifest", tmp_path / "scans.csv", tmp_path / "out") == 0
    row, = data.read_index(str(tmp_path / "out"))
    volume, _ = preprocess.preprocess(image)
    assert np.abs(np.load(tmp_path / "out" / row.path) - volume).max() < 1e-3


def test_linked_folders_are_walked(raw, tmp_path):
    (tmp_path / "links").mkdir()
    for folder in raw.glob("sub-*"):
        (tmp_path / "links" / folder.name).symlink_to(folder)
    linked, plain = (list(sources.find_nifti_files(str(folder))) for folder in (tmp_path / "links", raw))
    assert linked == plain != []


# ------------------------------------------------------------------------------------------ bad input
def bad_scan(kind, folder):
    """Write one bad scan of a kind, return its path."""
    image, _ = head(size=40)
    array, path = np.asarray(image.dataobj).astype(np.float32), folder / "sub-1_T1w.nii.gz"
    if kind == "4-D":
        array = np.stack([array, array], -1)
    elif kind == "infinite":
        array[3, 4, 5] = np.inf
    elif kind == "constant":
        array[:] = 7
    elif kind == "empty":
        array[:] = 0
    elif kind == "thin":
        array = array[:, :, :14]
    elif kind == "complex":
        array = array.astype(np.complex64)
    image_of(array, image.affine).to_filename(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "huge":  # a header that asks for 30,000^3 voxels
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[42:48] = np.array([30000] * 3, "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "bomb":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2 ** 26)))
    elif kind == "no scale":
        image = nib.load(path)
        header = image.header.copy()
        header.set_sform(np.zeros((4, 4)), 1)
        nib.Nifti1Image(array, None, header).to_filename(path)
    return path


@pytest.mark.parametrize(("kind", "reason", "code"), [
    ("truncated", "unreadable", 1), ("text", "unreadable", 1), ("4-D", "not 3-D but", 0),
    ("infinite", "1 voxels are infinite", 1), ("constant", "constant", 1), ("empty", "constant or empty", 1),
    ("thin", "a side of 14 voxels", 0), ("no scale", "no affine scale", 1), ("huge", "no head scan", 1),
    ("bomb", "more data than the header says", 1), ("complex", "not numbers", 1)])
def test_a_bad_scan_is_rejected_by_name_and_the_good_one_prepared(kind, reason, code, tmp_path, capsys):
    for subject in ("sub-1", "sub-2"):
        (tmp_path / "raw" / subject / "anat").mkdir(parents=True)
    bad_scan(kind, tmp_path / "raw" / "sub-1" / "anat")
    head(size=40)[0].to_filename(tmp_path / "raw" / "sub-2" / "anat" / "sub-2_T1w.nii.gz")
    assert prepare("bids", tmp_path / "raw", tmp_path / "out") == code
    assert "2 found = 1 prepared + 0 skipped by rule + 1 rejected" in capsys.readouterr().out
    [row] = tables(tmp_path / "out", "rejected")
    assert reason in row["reason"] and row["path"] == "sub-1/anat/sub-1_T1w.nii.gz"


FORMS = {
    "plain .nii": lambda image: image, "big-endian": lambda image: nib.Nifti1Image(
        np.asarray(image.dataobj), image.affine, nib.Nifti1Header(endianness=">")),
    "NIfTI-2": lambda image: nib.Nifti2Image(np.asarray(image.dataobj), image.affine),
    "scaled": lambda image: scaled(image), "fourth axis of one": lambda image: nib.Nifti1Image(
        np.asarray(image.dataobj)[..., None], image.affine), "qform only": lambda image: qform_only(image)}


def scaled(image):
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    image.header.set_slope_inter(0.5, 0)
    return image


def qform_only(image):
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    affine = image.affine.copy()
    image.set_sform(None, 0)
    image.set_qform(affine, 1)
    assert image.header["sform_code"] == 0 and image.header["qform_code"] == 1
    return image


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_nifti(form, tmp_path):
    image, _ = head((1, 1.5, 2), "PSR", degrees=9, size=40)
    expected, geometry = preprocess.preprocess(image)
    for name in ("scan.nii", "scan.nii.gz"):
        FORMS[form](image).to_filename(tmp_path / name)
        volume, found = preprocess.preprocess(tmp_path / name)
        assert volume.shape == expected.shape and np.abs(volume - expected).max() < 1e-5
        assert np.allclose(found["affine"], geometry["affine"], atol=1e-4) and found["box"] == geometry["box"]


def test_a_sheared_grid_goes_there_and_back():
    image, label = head((1, 1, 2), degrees=20, size=60)
    shear = np.eye(4)
    shear[0, 2], shear[1, 0] = 0.3, 0.1
    affine = shear @ image.affine
    volume, geometry = preprocess.preprocess(image_of(np.asarray(image.dataobj), affine))
    truth = (np.asarray(label.dataobj) > 0).astype(np.uint8)
    there = preprocess.preprocess_label(image_of(truth, affine), geometry)
    back = preprocess.restore(there, geometry)
    assert there.shape == volume.shape and back.shape == truth.shape and dice(back > 0, truth > 0) > 0.97


def damaged(rng, raw):
    """One of five kinds of damage to the bytes of a file."""
    raw, kind = bytearray(raw), rng.integers(5)
    if kind == 0:
        return bytes(raw[:rng.integers(0, len(raw))])
    spread = 352 if kind in (1, 2) else len(raw)
    for _ in range(rng.integers(1, 9)):
        place = rng.integers(0, min(spread, len(raw)))
        raw[place] = rng.integers(256) if kind in (1, 3) else raw[place] ^ (1 << rng.integers(8))
    return bytes(raw)


def test_300_damaged_files_are_prepared_right_or_rejected(tmp_path, capsys):
    rng = np.random.default_rng(0)
    image, _ = head(size=24)
    whole = {}
    for name in ("scan.nii", "scan.nii.gz"):
        image.to_filename(tmp_path / name)
        whole[name] = (tmp_path / name).read_bytes()
    for number in range(300):
        name = ("scan.nii", "scan.nii.gz")[number % 2]
        raw = damaged(rng, whole[name])
        if number % 4 == 3:  # the damage is inside, the file is packed well
            raw = gzip.compress(damaged(rng, whole["scan.nii"]))
        folder = tmp_path / "raw" / f"sub-{number:03}" / "anat"
        folder.mkdir(parents=True)
        (folder / f"sub-{number:03}_T1w{name[4:]}").write_bytes(raw)
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    rows, refused = tables(tmp_path / "out", "index"), tables(tmp_path / "out", "rejected")
    assert f"300 found = {len(rows)} prepared" in capsys.readouterr().out and len(rows) + len(refused) == 300
    assert len(refused) > 100 and len(rows) > 50 and all(row["reason"] for row in refused)
    expected, _ = preprocess.preprocess(image)
    for row in rows:
        volume, number = np.load(tmp_path / "out" / row["path"]), int(row["subject"][4:])
        assert 0 <= volume.min() and volume.max() <= 1 and "x".join(map(str, volume.shape)) == row["shape"]
        if number % 4 == 1:  # packed before it was damaged: what the checksum lets through is the scan itself
            assert np.abs(volume - expected).max() < 1e-3


# --------------------------------------------------------------------- kills, shards at once, a full disk
def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def fork(work):
    """Run work() in a forked child, in a session of its own; -> its process id."""
    if child := os.fork():
        return child
    os.setsid()
    tqdm.set_lock(threading.RLock())  # else a killed child may keep the lock that this process shares
    status = 1
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            status = work()
    finally:
        os._exit(status or 0)


def test_killed_at_20_random_moments_and_run_again(prepared, raw, tmp_path):
    rng = np.random.default_rng(0)
    for attempt in range(20):
        child = fork(lambda workers=1 + attempt % 2: prepare("bids", raw, tmp_path / "out", workers=workers))
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in tmp_path.rglob("*.npy"):
            assert path.name.startswith(".part-") or np.load(path).size, "what has its name is whole"
    prepare("bids", raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(prepared)


def test_two_shards_at_once_are_one_run(prepared, raw, tmp_path):
    children = [fork(lambda shard=shard: prepare("bids", raw, tmp_path / "out", shard=f"{shard}/2"))
                for shard in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert data.read_index(str(tmp_path / "out")) == data.read_index(str(prepared))
    ours, theirs = ({path: content for path, content in files_of(folder).items() if ".csv" not in path}
                    for folder in (tmp_path / "out", prepared))
    assert ours == theirs


def test_what_a_killed_run_left_is_overwritten(prepared, raw, tmp_path):
    for path in prepared.rglob("geometry/*/*.json"):
        left = tmp_path / "out" / path.relative_to(prepared)
        left.parent.mkdir(parents=True, exist_ok=True)
        left.with_name(f".part-{path.name}").write_text("half")
    prepare("bids", raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(prepared)


def test_a_full_disk_ends_in_one_line(prepared, raw, tmp_path):
    """A limit on the size of files, 100 KB, stands for the full disk: some volumes still fit."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
            "import config, prepare_data; config.run(prepare_data.main, prepare_data.Config)")
    result = subprocess.run([sys.executable, "-c", code, "--source", "bids", "--input", raw, "--out",
                             tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot write" in line
    assert not list((tmp_path / "out").rglob("*.csv")), "no index of a part"
    for path in (tmp_path / "out").rglob("[!.]*.npy"):
        assert np.load(path).size and path.stat().st_size <= 100000
    prepare("bids", raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(prepared)


def test_a_label_on_another_grid_is_rejected(tmp_path):
    image, label = head(size=40)
    _, geometry = preprocess.preprocess(image)
    moved = label.affine.copy()
    moved[0, 3] += 0.005
    assert preprocess.preprocess_label(image_of(np.asarray(label.dataobj), moved), geometry).any()
    moved[0, 3] += 0.01
    with pytest.raises(preprocess.Rejected, match="label grid differs"):
        preprocess.preprocess_label(image_of(np.asarray(label.dataobj), moved), geometry)
    with pytest.raises(preprocess.Rejected, match="label grid differs"):
        preprocess.preprocess_label(image_of(np.asarray(label.dataobj)[:-1], label.affine), geometry)
    with pytest.raises(preprocess.Rejected, match="label values unknown"):
        preprocess.preprocess_label(image_of(np.full(image.shape, 0.5, np.float32), image.affine), geometry)


def test_a_label_on_other_axes_belongs_to_the_scan_on_its_grid(tmp_path):
    """A session whose volumes lie on two grids; the label is stored as neither, but lies on the first."""
    folder = tmp_path / "raw" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    image, label = head(size=40)
    wanted = nib.orientations.axcodes2ornt("PSR")
    turn = nib.orientations.ornt_transform(nib.io_orientation(label.affine), wanted)
    label.as_reoriented(turn).to_filename(folder / "sub-1_lesion.nii.gz")
    image.to_filename(folder / "sub-1_FLAIR.nii.gz")
    head((1, 1, 2), "LAS", 10, size=40)[0].to_filename(folder / "sub-1_T1w.nii.gz")
    assert prepare("bids", tmp_path / "raw", tmp_path / "out") == 0
    labels = {row["sequence"]: row["label"] for row in tables(tmp_path / "out", "index")}
    assert labels["FLAIR"] and labels["T1"] == ""


@pytest.mark.parametrize(("settings", "message"), [
    ({"input": "/nowhere"}, "/nowhere is not a folder"),
    ({"input": ".", "workers": 0}, "workers 0: give 1 or more"),
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
    ("brats21", "brats21", "12 found = 8 prepared + 4 skipped by rule (label 4) + 0 rejected"),
    ("isles22", "isles22", "4 found = 3 prepared + 1 skipped by rule (label 1) + 0 rejected"),
    ("bids", "stroke_t2", "4 found = 2 prepared + 2 skipped by rule (label 2) + 0 rejected"),
    ("manifest", "open_ms_*", "22 found = 22 prepared + 0 skipped by rule + 0 rejected")])
def test_real_scans(source, folder, line, tmp_path, capsys):
    if source == "manifest":
        rows = [(str(path), path.parent.name, path.stem.split("_")[0], path.name.split("_")[-1].split(".")[0],
                 str(path.parent / "lesion.nii.gz") if "mni" in str(path) else "")
                for path in sorted(SCANS.glob(f"{folder}/*/*.nii.gz")) if "lesion" not in path.name]
        with open(tmp_path / "scans.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "subject", "session", "sequence", "label"), *rows])
    place = tmp_path / "scans.csv" if source == "manifest" else SCANS / folder
    assert prepare(source, place, tmp_path / "out", workers=2) == 0
    assert line in capsys.readouterr().out
    labelled = [v for v in data.read_index(str(tmp_path / "out")) if v.label]
    assert len(labelled) == {"brats21": 8, "isles22": 2, "bids": 2, "manifest": 8}[source]
    for volume in labelled:
        record = tmp_path / "out" / volume.path.replace("volumes/", "geometry/").replace(".npy", ".json")
        geometry = json.loads(record.read_text())
        native = nib.load(tmp_path / "out" / volume.label.replace(".npy", "_native.nii.gz"))
        back = preprocess.restore(np.load(tmp_path / "out" / volume.label), geometry)
        assert dice(back > 0, np.asarray(native.dataobj) > 0) >= 0.99
