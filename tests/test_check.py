"""prepare_data.py --check says beforehand what a preparation would do, and writes nothing."""

import contextlib
import io
import sys
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from conftest import mistake, run
from inputs import (
    array_of,
    bad_scan,
    files_of,
    head,
    image_of,
    prepare,
    record_of,
    save,
    tables,
    write_manifest,
)

import check_raw
import data
import phantom
import prepare_data
import scans
import sheet


# --------------------------------------------------------- what is said, and what is done after it
def looked_at(source, folder):
    """What the check finds -> (paths it takes, counted; {path: reason} it rejects; {reason: paths}
    it leaves aside)."""
    root, sessions, aside, _, _ = prepare_data.find_input(source, str(folder), False)
    taken, rejected = Counter(), {}
    for session in sessions:
        looks, refused = check_raw.check_session(root, session)
        taken.update(look.scan.path for look in looks)
        rejected |= {path: reason for path, reason, _ in refused}
    return taken, rejected, aside


def done_with(source, folder, out):
    """The same two of a preparation, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        prepare(source, folder, out)
    rows = data.read_index(str(out))
    taken = Counter(record_of(out, row)["scan"]["path"] for row in rows)
    rejected = {row["path"]: row["reason"] for row in tables(out, "rejected")}
    return taken, rejected, printed.getvalue()


def skipped_in(printed):
    """The part of a report's first line that says what was skipped."""
    return printed.split(" skipped by rule")[0].rpartition("+ ")[2]


@pytest.mark.parametrize("layout", phantom.LAYOUTS)
def test_the_check_agrees_with_a_preparation(layout, tmp_path):
    """But for what needs voxels, in these trees the negative ones of ADNI, OASIS and PPMI."""
    phantom.write(layout, tmp_path / "raw", 1, 1, size=32)
    source = layout.removesuffix("_rawdata")
    root = tmp_path / "raw" / ("Dataset501_Lesions" if source == "nnunet" else "")
    taken, rejected, aside = looked_at(source, root)
    assert sum(taken.values()) > 0

    truly_taken, truly_rejected, printed = done_with(source, root, tmp_path / "out")
    surprises = {path: reason for path, reason in truly_rejected.items() if path not in rejected}
    assert all("negative voxels" in reason for reason in surprises.values())
    assert bool(surprises) == (source in ("adni", "oasis3", "oasis4", "ppmi"))
    assert taken - truly_taken == Counter(list(surprises)) and truly_taken <= taken
    assert rejected == {path: truly_rejected[path] for path in rejected}
    assert int(skipped_in(printed)) == sum(map(len, aside.values()))


NEEDS_VOXELS = ("infinite", "constant", "empty")


@pytest.mark.parametrize(
    "kind", ["truncated", "text", "4-D", "thin", "no scale", "huge", "bomb", "complex",
             *NEEDS_VOXELS]
)
def test_a_bad_scan_is_seen_unless_its_voxels_must_be(kind, tmp_path):
    (tmp_path / "raw/sub-1/anat").mkdir(parents=True)
    bad_scan(kind, tmp_path / "raw/sub-1/anat")
    _, rejected, _ = looked_at("bids", tmp_path / "raw")
    _, truly_rejected, _ = done_with("bids", tmp_path / "raw", tmp_path / "out")
    assert len(truly_rejected) == 1
    assert rejected == ({} if kind in NEEDS_VOXELS else truly_rejected)


def cut_short(image, folder, ending):
    """The bytes of an image file without its last 3,000."""
    image.to_filename(folder / f"x{ending}")
    return (folder / f"x{ending}").read_bytes()[:-3000]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz", ".mgh"])
def test_a_file_that_is_cut_short_is_seen(ending, tmp_path):
    image, _ = head(size=40)
    kind = nib.MGHImage if "mg" in ending else nib.Nifti1Image
    image = kind(array_of(image).astype(np.float32), image.affine.astype(np.float32))
    files = {f"whole{ending}": image, f"cut{ending}": cut_short(image, tmp_path, ending)}
    save(tmp_path, files)
    table = write_manifest(tmp_path, [(name, name, "T1", "") for name in files])
    _, rejected, _ = looked_at("manifest", table)
    assert list(rejected) == [f"cut{ending}"]
    assert rejected == done_with("manifest", table, tmp_path / "out")[1]


def test_label_maps_are_read_and_their_grids_compared(tmp_path):
    image, label = head(size=32)
    values = array_of(label)
    shifted = image_of(values, nib.affines.from_matvec(np.eye(3), [5, 0, 0]) @ label.affine)
    labels = {
        "good": label,
        "shifted": shifted,
        "half": image_of(values * np.float32(0.5), label.affine),
        "nan": image_of(np.where(values, values, np.float32(np.nan)), label.affine),
        "text": b"no label map",
    }
    save(tmp_path, {"scan.nii.gz": image} | {f"{k}.nii.gz": v for k, v in labels.items()})
    names = [*labels, "missing"]
    rows = [("scan.nii.gz", name, "T1", f"{name}.nii.gz") for name in names]
    table = write_manifest(tmp_path, rows)

    root, sessions, _, _, _ = prepare_data.find_input("manifest", str(table), False)
    reasons = {}
    for session in sessions:
        for _, reason, _ in check_raw.check_session(root, session)[1]:
            reasons[session[0].subject] = reason
    assert set(reasons) == {"shifted", "half", "text", "missing"}
    prepare("manifest", table, tmp_path / "out")
    said = [row["reason"] for row in tables(tmp_path / "out", "rejected")]
    assert sorted(said) == sorted(reasons.values())


# ------------------------------------------------------------------------------- what it leaves be
def test_it_writes_nothing_and_reads_no_scan(raw, tmp_path, monkeypatch):
    before = files_of(raw)
    monkeypatch.chdir(tmp_path)

    opened = []
    load_scan = scans.load_scan

    def load(path, channel=None):
        opened.append(path)
        return load_scan(path, channel)

    monkeypatch.setattr(scans, "load_scan", load)
    printed = run("prepare_data", "--check", source="bids", input=raw, workers=1)
    assert "bids: 22 found = 17 to prepare + 5 skipped by rule (label 5) + 0 rejected" in printed
    assert len(opened) == 5 and all("lesion" in path for path in opened), "label maps alone"
    assert files_of(raw) == before and list(tmp_path.iterdir()) == []

    run("prepare_data", "--check", source="bids", input=raw, out=tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_folder_stays_as_it_is(prepared, raw):
    before = files_of(prepared)
    run("prepare_data", "--check", source="bids", input=raw, out=prepared)
    assert files_of(prepared) == before


# ---------------------------------------------------------------------------------------- its words
def odd_tree(folder):
    """A BIDS tree with something of each kind."""
    image, label = head(size=24)
    label = image_of((array_of(label) > 0).astype(np.uint8), label.affine)
    series = image_of(np.stack([array_of(image)] * 2, -1), image.affine)
    files = {f"sub-{i}/anat/sub-{i}_FLAIR": image for i in range(4)}
    files |= {f"sub-{i}/anat/sub-{i}_lesion": label for i in range(3)}
    files |= {"sub-2/anat/sub-2_lesion": image_of(0 * array_of(label), label.affine)}
    files |= {f"sub-{i}/dwi/sub-{i}_dwi": series for i in range(3)}
    files |= {"sub-3/anat/sub-3_T1w": series, "sub-3/anat/sub-3_T2w": b"<html>", "notes/x": image}
    save(folder, {f"{path}.nii.gz": content for path, content in files.items()})


def test_the_table_has_the_most_frequent_reasons_first_and_says_what_to_do(tmp_path, capsys):
    odd_tree(tmp_path)
    shape = head(size=24)[0].shape
    assert prepare("bids", tmp_path, tmp_path / "out", check=True) == 1, "one file is damaged"
    printed = capsys.readouterr().out
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if "| " in line]
    assert [row[:3] for row in cells[2:]] == [
        ["rejected", "4", f"not 3-D but {scans.times(shape)} x 2"],
        ["rejected", "1", "unreadable (a web page: the download needs a login)"],
        ["skipped", "3", "label"],
        ["skipped", "1", "name not of this source"],
    ]
    assert all(row[4] for row in cells[2:]) and cells[2][3] == "sub-0/dwi/sub-0_dwi.nii.gz"
    assert "4 scans of 4 subjects in 4 sessions: FLAIR 4; split: train 3, pretrain 1" in printed
    assert "3 label maps; values: 0 in 3, 1 in 2; 1 of them are empty" in printed
    assert "such as sub-0/anat/sub-0_FLAIR.nii.gz: sub-0, 1, FLAIR, train, label sub-0" in printed
    assert "The voxels of the scans were not looked at" in printed


def test_nothing_to_prepare_is_an_error(tmp_path, capsys):
    save(tmp_path, {"a/b.nii.gz": head(size=24)[0]})
    assert prepare("bids", tmp_path, tmp_path / "out", check=True) == 1
    assert "error: nothing prepared of 1 found: no name is as" in capsys.readouterr().err


def test_more_reasons_than_fit_are_summed_up():
    kinds = [(f"suffix {word}", [f"{word}{i}" for i in range(number)])
             for number, word in enumerate("abcdefghijklm", start=1)]
    rows = check_raw.rows_of("skipped", kinds)
    assert [row[1] for row in rows] == [13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3 + 2 + 1]
    assert rows[-1][2] == "3 other reasons"


def test_reasons_are_of_one_kind_whatever_their_numbers_and_label_maps():
    rejected = [("a", "a side of 3 voxels, under 15", False),
                ("b", "a side of 12 voxels, under 15", False),
                ("c", "l.nii: label grid differs from image grid", True),
                ("d", "m.nii: label grid differs from image grid", True),
                ("e", "l is the label map of several T1: x, y", True),
                ("f", "several label maps could be its own: x, y", True),
                ("g", "several label maps could be its own: z, y", True)]
    kinds = [paths for _, paths in check_raw.kinds_of(rejected)]
    assert kinds == [["a", "b"], ["c", "d"], ["e"], ["f", "g"]]


# ---------------------------------------------------------------------------------------- the sheet
def test_the_sheet_shows_each_scan_the_right_way_up(tmp_path):
    """A cube to the left, in front and on top, in a file that is stored on other axes."""
    voxels = np.full((40, 40, 40), 10, np.float32)
    voxels[4:8, 30:34, 34:38] = 100
    label = (voxels > 50).astype(np.uint8)
    affine = np.diag([2.0, 2, 2, 1])
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine),
                                           nib.orientations.axcodes2ornt("PSL"))
    files = {"s.nii": image_of(voxels, affine), "l.nii": image_of(label, affine)}
    save(tmp_path, {name: image.as_reoriented(turn) for name, image in files.items()})
    [[scan]] = prepare_data.find_input(
        "manifest", str(write_manifest(tmp_path, [("s.nii", "a", "T1", "l.nii")])), False)[1]
    picture, caption = sheet.draw_scan(str(tmp_path), scan)
    assert caption == "a  1  T1\ns.nii\nstored PSL, 2 x 2 x 2 mm"

    # The rows and columns of the cube in each plane: (0, 0) is the upper left corner.
    assert picture.shape == (sheet.TILE, sheet.WIDTH, 3)
    scale = sheet.TILE / 40
    places = {"axial": (40 - 34, 4), "coronal": (40 - 38, 4), "sagittal": (40 - 38, 30)}
    red = (picture == sheet.OUTLINE).all(-1)
    for number, (row, column) in enumerate(places.values()):
        start = number * (sheet.TILE + sheet.GAP)
        rows, columns = np.nonzero(red[:, start:start + sheet.TILE])
        assert abs(rows.min() - row * scale) <= 1 and abs(columns.min() - column * scale) <= 1
        assert abs(rows.max() + 1 - (row + 4) * scale) <= 1

        # The outline is closed, and what it holds stays as bright as it was.
        inside = picture[rows.min() + 2, start + columns.min() + 2]
        assert (inside == 255).all()


def test_a_sheet_is_a_picture_of_the_scans(raw, tmp_path):
    pytest.importorskip("matplotlib")
    printed = run("prepare_data", "--check", source="bids", input=raw, sheet=tmp_path / "s.png")
    assert f"{tmp_path}/s.png shows 17 of 17 scans" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    content = (tmp_path / "s.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = np.frombuffer(content[16:24], ">u4")
    assert width >= 4 * sheet.WIDTH and height >= 5 * sheet.TILE, "17 scans are 5 rows of 4"


def test_a_scan_that_cannot_be_drawn_says_why(tmp_path):
    save(tmp_path, {"s.nii.gz": b"no scan"})
    table = write_manifest(tmp_path, [("s.nii.gz", "a", "T1", "")])
    [[scan]] = prepare_data.find_input("manifest", str(table), False)[1]
    picture, caption = sheet.draw_scan(str(tmp_path), scan)
    assert not picture.any() and "unreadable (no scan by its first bytes)" in caption


def test_of_many_scans_a_sheet_shows_some_from_everywhere():
    volumes = [prepare_data.sources.Scan("", f"{i:03}", "1", "T1", "", "") for i in range(500)]
    chosen = [int(scan.subject) for scan in sheet.choose(volumes[::-1])]
    assert len(chosen) <= sheet.MOST and chosen[0] == 0 and chosen[-1] > 480
    assert sheet.choose(volumes[:3]) == volumes[:3]


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = mistake("prepare_data", "--check", source="bids", input=tmp_path, sheet="x.png")
    assert "--sheet needs matplotlib, which is not installed" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sheet": "x.png"}, "--sheet is drawn by --check: give both"),
        ({"sheet": "x.jpg", "check": "true"}, "sheet x.jpg: give a name that ends in .png"),
        ({"source": "any", "input": "/nowhere", "check": "true"}, "/nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line(settings, message, tmp_path):
    assert message in mistake("prepare_data", **{"source": "bids", "input": tmp_path} | settings)
