"""The prepared folder: what is in it, runs that go on, kills, shards at once, and a full disk."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import folders
import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, mistake, script
from inputs import dice, files_of, head, image_of, prepare, session_of_two, tables
from tqdm import tqdm

import data
import records
import tasks


# ---------------------------------------------------------------------------- the folder it writes
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


def test_two_inputs_of_one_source_need_two_names(prepared, raw, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("bids", raw, out)
    shutil.copytree(raw, tmp_path / "other")
    again = mistake("prepare_data", source="bids", input=tmp_path / "other", out=out)
    assert "give this one another --name" in again
    prepare("bids", tmp_path / "other", out, name="other")
    sources = [row.source for row in data.read_index(str(out))]
    assert sources.count("other") == sources.count("bids") == len(sources) / 2


def test_a_label_on_other_axes_belongs_to_the_scan_on_its_grid(tmp_path):
    """The volumes lie on two grids; the label is stored as neither, but lies on the first."""
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


def test_an_input_may_be_called_volumes(tmp_path):
    session_of_two(tmp_path / "raw")
    prepare("bids", tmp_path / "raw", tmp_path / "out", name="my_volumes")
    (case,) = tasks.labelled_cases(str(tmp_path / "out"), "my_volumes", ["FLAIR"])
    volume, geometry, truth = folders.read_case(case)
    assert list(volume.shape[1:]) == geometry["resampled"] and truth.any()


def test_of_two_volumes_of_a_sequence_the_task_takes_the_labelled_one(prepared, tmp_path):
    rows = [volume for volume in data.read_index(str(prepared)) if volume.label]
    for other in ("volumes/bids/0.npy", "volumes/bids/z.npy"):
        out = tmp_path / os.path.basename(other)
        records.write_table(
            f"{out}/index/all.csv",
            data.Volume._fields,
            [*rows, rows[0]._replace(path=other, label="")],
        )
        assert len(tasks.labelled_cases(str(out), None, ["FLAIR"])) == len(rows)


# --------------------------------------------------------------------------------- runs that go on
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
    (case,) = tasks.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert np.load(case.label).all() and folders.read_case(case)[2].all()


def test_a_record_that_a_crash_left_empty_is_made_again(prepared, raw, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    victim = next((tmp_path / "out" / "geometry").rglob("*.json"))
    victim.write_text("")
    assert prepare("bids", raw, tmp_path / "out") == 0
    assert json.loads(victim.read_text())["row"]


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
    splits = [
        {v.path: v.split for v in data.read_index(str(tmp_path / name))} for name in ("out", "new")
    ]
    assert splits[0] == splits[1] and sorted(splits[0].values()).count("test") == 2


# -------------------------------------------------------------- kills, shards at once, a full disk
def fork(work):
    """Run work() in a forked child, in a session of its own; -> its process id."""
    if child := os.fork():
        return child
    os.setsid()
    tqdm.set_lock(
        threading.RLock()
    )  # else a killed child may keep the lock that this process shares
    status = 1
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            status = work()
    finally:
        os._exit(status or 0)


def test_killed_at_20_random_moments_and_run_again(prepared, raw, tmp_path):
    rng = np.random.default_rng(0)
    for attempt in range(20):
        child = fork(
            lambda workers=1 + attempt % 2: prepare("bids", raw, tmp_path / "out", workers=workers)
        )
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in tmp_path.rglob("*.npy"):
            assert path.name.startswith(".part-") or np.load(path).size, (
                "what has its name is whole"
            )
    prepare("bids", raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(prepared)


def test_two_shards_at_once_are_one_run(prepared, raw, tmp_path):
    children = [
        fork(lambda shard=shard: prepare("bids", raw, tmp_path / "out", shard=f"{shard}/2"))
        for shard in range(2)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert data.read_index(str(tmp_path / "out")) == data.read_index(str(prepared))
    ours, theirs = (
        {path: content for path, content in files_of(folder).items() if ".csv" not in path}
        for folder in (tmp_path / "out", prepared)
    )
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
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
        "import config, prepare_data; config.run(prepare_data.main, prepare_data.Config)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--source", "bids", "--input", raw, "--out", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot write" in line
    assert not list((tmp_path / "out").rglob("*.csv")), "no index of a part"
    for path in (tmp_path / "out").rglob("[!.]*.npy"):
        assert np.load(path).size and path.stat().st_size <= 100000
    prepare("bids", raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(prepared)


# ---------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "/nowhere"}, "/nowhere is not a folder"),
        ({"input": ".", "workers": 0}, "workers 0: give 1 or more"),
        ({"input": "."}, "no .nii or .nii.gz file"),
        ({"source": "brats"}, "choose"),
        ({"shard": "3/3"}, "expected i/n"),
        ({"workerz": 3}, "did you mean 'workers'"),
        ({"workers": "many"}, "expected int, got 'many'"),
        ({"source": "manifest", "input": "/nowhere.csv"}, "cannot read the manifest"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, settings, message):
    merged = {"source": "bids", "input": tmp_path, "out": tmp_path / "out"} | settings
    if merged["input"] == ".":
        merged["input"] = tmp_path
    assert message in mistake("prepare_data", **merged)


# -------------------------------------------------------------------------------------- real scans
SCANS = ROOT.parent / "shared" / "scans"


@pytest.mark.skipif(not SCANS.exists(), reason="../shared/scans is absent")
@pytest.mark.parametrize(
    ("source", "folder", "line"),
    [
        ("brats21", "brats21", "12 found = 8 prepared + 4 skipped by rule (label 4) + 0 rejected"),
        ("isles22", "isles22", "4 found = 3 prepared + 1 skipped by rule (label 1) + 0 rejected"),
        ("bids", "stroke_t2", "4 found = 2 prepared + 2 skipped by rule (label 2) + 0 rejected"),
        ("manifest", "open_ms_*", "22 found = 22 prepared + 0 skipped by rule + 0 rejected"),
    ],
)
def test_real_scans(source, folder, line, tmp_path, capsys):
    if source == "manifest":
        rows = [
            (
                str(path),
                path.parent.name,
                path.stem.split("_")[0],
                path.name.split("_")[-1].split(".")[0],
                str(path.parent / "lesion.nii.gz") if "mni" in str(path) else "",
            )
            for path in sorted(SCANS.glob(f"{folder}/*/*.nii.gz"))
            if "lesion" not in path.name
        ]
        with open(tmp_path / "scans.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "subject", "session", "sequence", "label"), *rows])
    place = tmp_path / "scans.csv" if source == "manifest" else SCANS / folder
    assert prepare(source, place, tmp_path / "out", workers=2) == 0
    assert line in capsys.readouterr().out
    labelled = [v for v in data.read_index(str(tmp_path / "out")) if v.label]
    assert len(labelled) == {"brats21": 8, "isles22": 2, "bids": 2, "manifest": 8}[source]
    for volume in labelled:
        record = (
            tmp_path / "out" / volume.path.replace("volumes/", "geometry/").replace(".npy", ".json")
        )
        geometry = json.loads(record.read_text())
        native = nib.load(tmp_path / "out" / volume.label.replace(".npy", "_native.nii.gz"))
        back = folders.restore(np.load(tmp_path / "out" / volume.label), geometry)
        assert dice(back > 0, np.asarray(native.dataobj) > 0) >= 0.99
