"""What a preparation records of its files decides what the next one does again."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import calls_of
from inputs import (
    array_of,
    head,
    image_of,
    prepare,
    record_of,
    rows_of,
    save,
    session_of_two,
    tables,
    write_manifest,
)

import data
import records
import scans
import sources
import tasks


def replace(path, image, when):
    """As `cp -p` puts another file in the place of one: with the time of its own."""
    image.to_filename(path)
    os.utime(path, (when, when))


@pytest.mark.parametrize("way", ["a new path, older", "in place, older", "the scan, older"])
def test_corrected_files_are_prepared_again(way, tmp_path):
    image, label = head(size=24)
    empty = image_of(0 * array_of(label), label.affine)
    save(tmp_path, {"scan.nii.gz": image, "first.nii.gz": empty, "second.nii.gz": label})
    os.utime(tmp_path / "second.nii.gz", (1e9, 1e9))
    table = write_manifest(tmp_path, [("scan.nii.gz", "a", "FLAIR", "first.nii.gz")])
    prepare("manifest", table, tmp_path / "out")
    before = rows_of(tmp_path / "out")["a", "FLAIR"]
    assert not np.load(tmp_path / "out" / before.label).any()

    if way == "a new path, older":
        write_manifest(tmp_path, [("scan.nii.gz", "a", "FLAIR", "second.nii.gz")])
    elif way == "in place, older":
        replace(tmp_path / "first.nii.gz", label, 1e9)
    else:
        replace(tmp_path / "scan.nii.gz", image_of(array_of(image)[::-1], image.affine), 1e9)
    volume = np.load(tmp_path / "out" / before.path)
    assert prepare("manifest", table, tmp_path / "out") == 0
    row = rows_of(tmp_path / "out")["a", "FLAIR"]
    if way == "the scan, older":
        assert row.sha256 != before.sha256 and not np.array_equal(
            np.load(tmp_path / "out" / row.path), volume
        )
    else:
        assert (
            row.label_sha256 != before.label_sha256 and np.load(tmp_path / "out" / row.label).any()
        )
        assert " 1:" in row.label_values


def test_touched_files_are_not_prepared_again_but_recorded(prepared, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    for path in (tmp_path / "raw").rglob("*.nii.gz"):
        os.utime(path, (1e9, 1e9))
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    assert tables(tmp_path / "out", "index") == tables(prepared, "index")
    for row in data.read_index(str(tmp_path / "out")):
        record = record_of(tmp_path / "out", row)
        assert record["scan"]["mtime"] == 10**18 and bool(record["label"]) == bool(row.label)


def test_what_has_not_changed_is_not_read(tmp_path, monkeypatch):
    session_of_two(tmp_path / "raw")
    prepare("bids", tmp_path / "raw", tmp_path / "out")

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(records, "checksum", never)
    monkeypatch.setattr(scans, "load_scan", never)
    assert prepare("bids", tmp_path / "raw", tmp_path / "out") == 0


def test_an_old_folder_opens_and_is_prepared_again(prepared, raw, tmp_path):
    """Without records, and without the last two columns of the index."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    for path in out.rglob("geometry/*/*.json"):
        geometry = json.loads(path.read_text())
        del geometry["record"], geometry["nan"]
        path.write_text(json.dumps(geometry))
    for path in (out / "index").glob("*.csv"):
        lines = [line.split(",")[:10] for line in path.read_text().splitlines()]
        path.write_text("".join(",".join(line) + "\n" for line in lines))
    rows = data.read_index(str(out))
    assert [row[:10] for row in rows] == [row[:10] for row in data.read_index(str(prepared))]
    assert {row.label_sha256 + row.label_values for row in rows} == {""}
    assert tasks.labelled_cases(str(out), None, ["FLAIR"])

    for path in out.rglob("*.npy"):
        path.unlink()
    assert prepare("bids", raw, out) == 0
    assert data.read_index(str(out)) == data.read_index(str(prepared))
    assert len(list(out.rglob("*.npy"))) == len(list(prepared.rglob("*.npy")))


def test_a_label_that_is_taken_away_is_gone(tmp_path):
    image, label = head(size=24)
    save(tmp_path, {"scan.nii.gz": image, "first.nii.gz": label})
    table = write_manifest(tmp_path, [("scan.nii.gz", "a", "FLAIR", "first.nii.gz")])
    prepare("manifest", table, tmp_path / "out")
    write_manifest(tmp_path, [("scan.nii.gz", "a", "FLAIR", "")])
    prepare("manifest", table, tmp_path / "out")
    row = rows_of(tmp_path / "out")["a", "FLAIR"]
    assert (row.label, row.label_sha256, row.label_values) == ("", "", "")
    assert record_of(tmp_path / "out", row)["label"] is None


def test_raw_files_that_were_moved_away_are_no_reason_to_prepare_again(tmp_path):
    image, label = head(size=24)
    save(tmp_path, {"scan.nii.gz": image, "first.nii.gz": label})
    table = write_manifest(tmp_path, [("scan.nii.gz", "a", "FLAIR", "first.nii.gz")])
    prepare("manifest", table, tmp_path / "out")
    before = data.read_index(str(tmp_path / "out"))
    for name in ("scan.nii.gz", "first.nii.gz"):
        (tmp_path / name).unlink()
    assert prepare("manifest", table, tmp_path / "out") == 0
    assert data.read_index(str(tmp_path / "out")) == before


def test_little_is_done_for_each_volume_of_the_index(tmp_path):
    """A cohort has 45,000 of them, and each start of a run reads them."""
    row = data.Volume(
        "",
        "oasis3",
        "OAS30001",
        "d0129",
        "T1",
        "train",
        "labels/x.npy",
        "160x200x180",
        "1x1x1.2",
        "a" * 64,
        "b" * 64,
        "0:87120/87040 1:257/254",
    )
    calls = []
    for count in (1000, 2000):
        rows = [row._replace(path=f"volumes/oasis3/{i:08}.npy") for i in range(count)]
        (tmp_path / "index").mkdir(exist_ok=True)
        records.write_table(f"{tmp_path}/index/all.csv", data.Volume._fields, rows)
        assert data.read_index(str(tmp_path)) == rows
        calls.append(calls_of(data.read_index, str(tmp_path)))
    assert (calls[1] - calls[0]) / 1000 < 25, "calls for one volume more: 19 when this was written"


def test_channels_that_a_kill_left_with_two_boxes_are_made_alike(tmp_path):
    session_of_two(tmp_path / "raw")
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    paths = sorted((tmp_path / "out").rglob("geometry/*/*.json"))
    whole = [path.read_text() for path in paths]
    for victim in (0, 1):
        geometry = json.loads(whole[victim])
        geometry["box"][0][1] -= 3
        paths[victim].write_text(json.dumps(geometry))
        prepare("bids", tmp_path / "raw", tmp_path / "out")
        assert [path.read_text() for path in paths] == whole


@pytest.mark.parametrize("lost", ["volumes/*/*.npy", "labels/*/*.npy", "labels/*/*_native.nii.gz"])
@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_what_is_missing_is_made_again(lost, how, tmp_path):
    image, label = head(size=24)
    save(tmp_path, {"scan.nii.gz": image, "label.nii.gz": label})
    table = write_manifest(tmp_path, [("scan.nii.gz", "a", "FLAIR", "label.nii.gz")])
    prepare("manifest", table, tmp_path / "out")
    (path,) = (tmp_path / "out").glob(lost)
    before = path.read_bytes()
    path.unlink()
    if how == "emptied":
        path.touch()
    assert prepare("manifest", table, tmp_path / "out") == 0 and path.read_bytes() == before


def test_voxels_of_all_channels_are_counted(tmp_path):
    scan = sources.Scan("x.nii.gz", "a", "1", "T1", "", "", 0)
    record = {"nan": 3, "clamped": 0, "elsewhere": False, "notes": [], "label": None}
    found = {}
    for channel in range(4):
        for kind, paths in records.findings_of(scan._replace(channel=channel), record).items():
            found.setdefault(kind, {}).update(paths)
    assert sum(found["nan"].values()) == 12


def test_tables_of_other_shards_may_vanish(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    for name in ("bids-0of1.csv", "bids-0of2.csv"):
        (tmp_path / "index" / name).write_text(",".join(data.Volume._fields) + "\n")
    unlink = os.unlink

    def twice(path):
        unlink(path)
        unlink(path)  # another shard was quicker

    monkeypatch.setattr(os, "unlink", twice)
    records.forget_other_shards(str(tmp_path), "bids", "2")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["bids-0of2.csv"]
    monkeypatch.setattr(
        data.glob,
        "glob",
        lambda pattern: [
            str(tmp_path / "index" / "bids-0of1.csv"),
            str(tmp_path / "index" / "bids-0of2.csv"),
        ],
    )
    assert data.read_index(str(tmp_path)) == []
