"""What users really have: other readers, headers that contradict themselves, names and tables of all kinds.

Each test is a kind of fault that was reported of some tool in public, as a few small voxels."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, mistake
from test_prepare import head, image_of, prepare, session_of_two, tables

import data
import predict
import prepare_data
from prepare_data import Rejected

COLUMNS = ("path", "subject", "session", "sequence", "label")


def array_of(image):
    return np.asarray(image.dataobj)


def write_manifest(folder, rows, name="scans.csv"):
    """One row (path, subject, sequence, label) a scan."""
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        lines = [(path, subject, "1", sequence, label) for path, subject, sequence, label in rows]
        csv.writer(file).writerows([COLUMNS, *lines])
    return folder / name


def save(folder, images):
    """{path: image or bytes} below a folder."""
    for path, image in images.items():
        os.makedirs(os.path.dirname(folder / path), exist_ok=True)
        if isinstance(image, bytes):
            (folder / path).write_bytes(image)
        else:
            image.to_filename(folder / path)


def rows_of(out):
    return {(row.subject, row.sequence): row for row in data.read_index(str(out))}


def record_of(out, row):
    path = out / row.path.replace("volumes/", "geometry/").replace(".npy", ".json")
    return json.loads(path.read_text())["record"]


def one_scan(folder, image, label=None, ending=".nii.gz"):
    """Prepare one scan by manifest -> (exit code, its row of the index or None)."""
    save(folder, {f"scan{ending}": image} | ({f"label{ending}": label} if label is not None else {}))
    table = write_manifest(folder, [(f"scan{ending}", "a", "FLAIR", f"label{ending}" if label is not None else "")])
    code = prepare("manifest", table, folder / "out")
    return code, rows_of(folder / "out").get(("a", "FLAIR"))


# ------------------------------------------------------------------------------------- readers and headers
def mgh(image):
    return nib.MGHImage(array_of(image).astype(np.float32), image.affine.astype(np.float32))


FORMS = {
    "mgz": (".mgz", mgh), "mgh": (".mgh", mgh), "NIfTI-2": (".nii.gz", nib.Nifti2Image.from_image),
    "gzip named .nii": (".nii", lambda image: gzip.compress(image.to_bytes())),
    "plain named .nii.gz": (".nii.gz", lambda image: image.to_bytes()),
    "plain named .mgz": (".mgz", lambda image: mgh(image).to_bytes()),
    "NIfTI named .mgz": (".mgz", lambda image: gzip.compress(image.to_bytes())),
    "capitals": (".NII.GZ", lambda image: gzip.compress(image.to_bytes())),
}


@pytest.mark.parametrize("layout", ["manifest", "bids"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_told_by_its_first_bytes(form, layout, tmp_path, capsys):
    image, label = head((1, 1.5, 2), "PSR", degrees=9, size=40)
    ending, other = FORMS[form]
    expected, geometry = prepare_data.preprocess(image)
    if layout == "manifest":
        code, row = one_scan(tmp_path, other(image), other(label), ending)
    else:
        save(tmp_path / "raw", {f"sub-a/anat/sub-a_FLAIR{ending}": other(image),
                                f"sub-a/anat/sub-a_lesion{ending}": other(label)})
        code = prepare("bids", tmp_path / "raw", tmp_path / "out")
        row, = data.read_index(str(tmp_path / "out"))
    assert code == 0, capsys.readouterr().out
    assert np.abs(np.load(tmp_path / "out" / row.path) - expected).max() < 1e-3
    truth = prepare_data.preprocess_label(label, geometry)
    assert np.array_equal(np.load(tmp_path / "out" / row.label), truth)
    assert len(row.sha256) == len(row.label_sha256) == 64


def test_of_a_pair_both_files_are_watched(tmp_path):
    image, _ = head(size=40)
    save(tmp_path, {"scan.img": nib.Nifti1Pair(array_of(image), image.affine)})
    table = write_manifest(tmp_path, [("scan.hdr", "a", "FLAIR", "")])
    assert prepare("manifest", table, tmp_path / "out") == 0
    before = np.load(tmp_path / "out" / rows_of(tmp_path / "out")["a", "FLAIR"].path)

    times = os.stat(tmp_path / "scan.hdr")
    voxels = np.flip(np.frombuffer((tmp_path / "scan.img").read_bytes(), np.int16))
    (tmp_path / "scan.img").write_bytes(voxels.tobytes())
    os.utime(tmp_path / "scan.img", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare("manifest", table, tmp_path / "out") == 0
    assert not np.array_equal(np.load(tmp_path / "out" / rows_of(tmp_path / "out")["a", "FLAIR"].path), before)


def with_sform(image, sform, code=1):
    """The qform, of form code `code`, and pixdim are the image's own; the sform is another."""
    image = nib.Nifti1Image(array_of(image), image.affine)
    image.set_qform(image.affine, code)
    image.header["sform_code"] = 1
    for number, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = sform[number]
    return nib.Nifti1Image(array_of(image), None, image.header)


def without_scale(image, code=1):
    """The sform has directions but no voxel size, as a converter may write it."""
    sform = image.affine.copy()
    sform[:3, :3] /= np.linalg.norm(sform[:3, :3], axis=0)
    return with_sform(image, sform, code)


def test_an_sform_without_voxel_size_gives_way_to_the_qform(tmp_path, capsys):
    image, label = head((2, 2, 2), size=60)
    expected, geometry = prepare_data.preprocess(image)
    code, row = one_scan(tmp_path, without_scale(image), without_scale(label))
    assert code == 0 and "qform used" in capsys.readouterr().out
    assert row.spacing == "2x2x2" and row.shape == "x".join(map(str, expected.shape))
    assert np.load(tmp_path / "out" / row.label).sum() == prepare_data.preprocess_label(label, geometry).sum()

    volume, geometry, _ = predict.prepare_scan([str(tmp_path / "scan.nii.gz")])
    assert volume.shape[1:] == expected.shape and np.allclose(geometry["affine"], image.affine)


def test_an_sform_without_voxel_size_nor_qform_is_rejected_with_both_numbers(tmp_path, capsys):
    image, _ = head((2, 2, 2), size=60)
    code, row = one_scan(tmp_path, without_scale(image, code=0))
    printed = capsys.readouterr().out
    assert code == 1 and row is None
    assert "1 x 1 x 1 mm by the sform, 2 x 2 x 2 mm by pixdim" in printed


def test_an_empty_sform_gives_way_and_a_mirrored_qform_is_said(tmp_path, capsys):
    image, _ = head((2, 2, 2), size=60)
    for name, sform in (("empty", np.zeros((4, 4))), ("mirrored", image.affine @ np.diag([-1, 1, 1, 1]))):
        (tmp_path / name).mkdir()
        code, row = one_scan(tmp_path / name, with_sform(image, sform))
        assert code == 0 and row.spacing == "2x2x2"
    assert "left and right the other way: 1, first scan.nii.gz" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- values
NOISE = {"float": (np.float32(0.99999994), np.float32), "below": (0.9991, np.float64), "above": (1.0009, np.float64)}


@pytest.mark.parametrize("noise", NOISE)
def test_a_label_value_near_an_integer_is_that_integer(noise, tmp_path):
    image, label = head(size=40)
    factor, kind = NOISE[noise]
    mask = array_of(label) > 0
    values = np.where(mask, factor, -0.0004).astype(kind)
    _, row = one_scan(tmp_path, image, image_of(values, label.affine))
    assert set(np.unique(np.load(tmp_path / "out" / row.label))) == {0, 1}
    case, = data.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert np.array_equal(data.read_case(case)[2], mask)
    assert np.array_equal(predict.read_label(tmp_path / "label.nii.gz", image), mask)


def test_a_label_that_nibabel_scales(tmp_path):
    """Floats of 0, 1, 2, 4 stored as int16: nibabel gives 0.99998 for 1."""
    image, label = head(size=40)
    values = np.where(array_of(label) > 0, 1.0 + (np.arange(label.shape[0]) % 2)[:, None, None], 0)
    values[values == 2] = 4
    stored = image_of(values, label.affine)
    stored.header.set_data_dtype(np.int16)
    _, row = one_scan(tmp_path, image, stored)
    assert nib.load(tmp_path / "label.nii.gz").get_fdata().max() != 4
    assert set(np.unique(np.load(tmp_path / "out" / row.label))) == {0, 1, 4}
    native = nib.load(tmp_path / "out" / row.label.replace(".npy", "_native.nii.gz"))
    assert np.array_equal(array_of(native), values)


@pytest.mark.parametrize(("value", "said"), [(0.998, "0.998"), (-1, "-1"), (256, "256"), (2.5, "2.5")])
def test_another_label_value_is_rejected_with_the_first(value, said, tmp_path, capsys):
    image, label = head(size=40)
    code, row = one_scan(tmp_path, image, image_of(np.where(array_of(label) > 0, value, 0.0), label.affine))
    assert code == 1 and row is None
    assert f"label.nii.gz: label values unknown: {said} is no integer" in capsys.readouterr().out


def test_nan_outside_the_field_of_view_is_0_and_counted(tmp_path, capsys):
    image, label = head(size=40)
    scan, mask = array_of(image).astype(np.float32), (array_of(label) > 0).astype(np.float32)
    zeros, holes = scan.copy(), scan.copy()
    zeros[:9], holes[:9] = 0, np.nan
    mask[mask == 0] = np.nan  # under 1 % are numbers: no fault of a label map
    code, row = one_scan(tmp_path, image_of(holes, image.affine), image_of(mask, image.affine))
    printed = capsys.readouterr().out
    assert code == 0 and f"scans with NaN, set to 0: 1, first scan.nii.gz; {zeros[:9].size:,} voxels" in printed
    assert "label maps with NaN, set to 0: 1, first label.nii.gz" in printed
    expected, _ = prepare_data.preprocess(image_of(zeros, image.affine))
    assert np.array_equal(np.load(tmp_path / "out" / row.path), expected.astype(np.float16))
    assert np.load(tmp_path / "out" / row.label).sum() == np.nansum(mask)
    assert record_of(tmp_path / "out", row)["nan"] == zeros[:9].size
    case, = data.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert data.read_case(case)[2].sum() == predict.read_label(tmp_path / "label.nii.gz", image).sum()


@pytest.mark.parametrize(("fill", "part", "reason"), [
    (np.inf, 1, "voxels are infinite"), (-np.inf, 1, "voxels are infinite"), (np.nan, 42, "voxels are numbers")])
def test_what_is_hardly_a_number_is_rejected(fill, part, reason, tmp_path, capsys):
    image, _ = head(size=40)
    scan = array_of(image).astype(np.float32)
    scan[:part] = fill
    scan[-1, -1, -1] = 1
    assert one_scan(tmp_path, image_of(scan, image.affine)) == (1, None)
    assert reason in capsys.readouterr().out


def z_scored(scan, kind):
    """A skull-stripped scan, normalised in one of the ways that users do it."""
    inside = scan > 0
    if kind == "brain":
        return np.where(inside, (scan - scan[inside].mean()) / scan[inside].std(), 0)
    if kind == "all":
        return (scan - scan.mean()) / scan.std()
    if kind == "median":
        return np.where(inside, (scan - np.median(scan[inside])) / scan[inside].std(), 0)
    return 2 * scan / scan.max() - 1  # from -1 to 1


@pytest.mark.parametrize("kind", ["brain", "all", "median", "-1 to 1"])
def test_a_normalised_scan_is_refused(kind, tmp_path, capsys):
    image, _ = head(size=40)
    scan = np.where(array_of(image) > 60, array_of(image), 0).astype(np.float32)
    normalised = image_of(z_scored(scan, kind).astype(np.float32), image.affine)
    assert one_scan(tmp_path, normalised) == (1, None)
    sentence = "% of the voxels that are not 0 are negative: is it normalised already? Give the scan as the scanner"
    assert sentence in capsys.readouterr().out
    with pytest.raises(Rejected, match="scan.nii.gz: .* is it normalised already"):
        predict.prepare_scan([str(tmp_path / "scan.nii.gz")])


@pytest.mark.parametrize("kind", ["ringing", "noise of the air"])
def test_negative_values_that_do_not_weigh_much_are_clamped_and_counted(kind, tmp_path, capsys):
    image, _ = head(size=40)
    scan = array_of(image).astype(np.float32)
    rng = np.random.default_rng(0)
    if kind == "ringing":
        scan[::5, ::5, ::5] = -30
    else:
        scan = np.where(scan < 60, rng.normal(-3, 8, scan.shape), scan).astype(np.float32)
    count = int((scan < 0).sum())
    code, row = one_scan(tmp_path, image_of(scan, image.affine))
    assert code == 0 and record_of(tmp_path / "out", row)["clamped"] == count
    assert f"negative values, set to 0: 1, first scan.nii.gz; {count:,} voxels" in capsys.readouterr().out


def test_a_lesion_that_vanishes_and_one_outside_the_box_are_said(tmp_path, capsys):
    image, _ = head((0.5, 0.5, 0.5), size=20)
    scan = array_of(image).copy()
    scan[:4] = 0
    label = np.zeros(scan.shape, np.uint8)
    label[20, 20, 20] = 2  # one voxel, between the centres of the prepared ones
    label[10:14, 10:14, 10:14] = 1
    label[:2, :3, :4] = 1
    geometry = prepare_data.preprocess(image_of(scan, image.affine))[1]
    if prepare_data.preprocess_label(image_of(label, image.affine), geometry).max() == 2:
        label[20, 20, 20], label[21, 21, 21] = 0, 2
    _, row = one_scan(tmp_path, image_of(scan, image.affine), image_of(label, image.affine))
    printed = capsys.readouterr().out
    prepared = np.load(tmp_path / "out" / row.label)
    assert "lost a class at 1 mm: 1, first label.nii.gz" in printed
    assert "voxels outside the box of the head, which are cut off: 1, first label.nii.gz; 24 voxels" in printed
    background = label.size - 24 - 64 - 1
    assert row.label_values == (f"0:{background}/{(prepared == 0).sum()} 1:88/{(prepared == 1).sum()} 2:1/0")
    assert record_of(tmp_path / "out", row)["label"]["values"]["2"] == [1, 0]

    assert prepare("manifest", tmp_path / "scans.csv", tmp_path / "out") == 0
    again = capsys.readouterr().out
    assert again == printed, "a second run prepares nothing, and says the same"


# --------------------------------------------------------------------------------------------- manifests
ROW = ["scan 1.nii.gz", "s1", "1", "FLAIR", ""]


def table_text(columns, rows, delimiter=","):
    return "\n".join(delimiter.join(row) for row in (columns, *rows)).encode()


TABLES = {
    "capitals and blanks": table_text([f" {name.title()} " for name in COLUMNS], [[f" {cell}" for cell in ROW]]),
    "semicolons": b"\xef\xbb\xbf" + table_text(COLUMNS, [ROW], ";"),
    "tabs": table_text(COLUMNS, [ROW], "\t"), "bars": table_text(COLUMNS, [ROW], "|"),
    "sep line": b"sep=;\r\n" + table_text(COLUMNS, [ROW], ";"),
    "UTF-16": table_text(COLUMNS, [ROW], "\t").decode().encode("utf-16"),
    "other order": table_text(COLUMNS[::-1], [ROW[::-1]], ";"),
    "empty rows": table_text(COLUMNS, [[""] * 5, ROW, [""] * 5, []]),
    "quotes": table_text(COLUMNS, [[f'"{cell}"' for cell in ROW]], "; "),
} | {f"no label: {word}": table_text(COLUMNS, [ROW[:4] + [word]]) for word in ("NA", "n/a", "NaN", "None")}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_as_spreadsheets_write_it(kind, tmp_path, capsys):
    head(size=24)[0].to_filename(tmp_path / "scan 1.nii.gz")
    (tmp_path / "table.csv").write_bytes(TABLES[kind])
    assert prepare("manifest", tmp_path / "table.csv", tmp_path / "out") == 0
    assert "1 found = 1 prepared + 0 skipped by rule + 0 rejected" in capsys.readouterr().out
    row, = data.read_index(str(tmp_path / "out"))
    assert row[2:7] == ("s1", "1", "FLAIR", "pretrain", "")


@pytest.mark.parametrize(("content", "message"), [
    (table_text(("file", "subject", "session", "sequence"), [ROW], ";"), "this one has file, subject, session"),
    (b"", "this one has none"), (b"PK\3\4\0\0", "this one has PK"),
    (table_text(COLUMNS, [["a, b.nii", *ROW[1:4], "l.nii"]]), "row 2: 6 cells, but 5 columns"),
    (table_text(COLUMNS, [["", *ROW[1:]]]), "row 2: no path"),
    (table_text(COLUMNS, [[ROW[0], "", *ROW[2:]]]), "row 2: no subject"),
    (table_text(COLUMNS, [ROW, ROW[:4] + ["x.nii.gz"]]), "row 3: scan 1.nii.gz is listed twice, with different"),
    (table_text(COLUMNS, []), "lists no scan")])
def test_a_mistake_in_a_table_is_shown(content, message, tmp_path):
    (tmp_path / "table.csv").write_bytes(content)
    line = mistake("prepare_data", source="manifest", input=tmp_path / "table.csv", out=tmp_path / "out")
    assert message in line


def test_a_row_that_stands_twice_is_skipped_once(tmp_path, capsys):
    head(size=24)[0].to_filename(tmp_path / "scan 1.nii.gz")
    (tmp_path / "table.csv").write_bytes(table_text(COLUMNS, [ROW, ROW]))
    assert prepare("manifest", tmp_path / "table.csv", tmp_path / "out") == 0
    assert "2 found = 1 prepared + 1 skipped by rule (listed twice 1)" in capsys.readouterr().out


def test_the_same_file_under_two_subjects_is_said(tmp_path, capsys):
    image, label = head(size=24)
    save(tmp_path, {"a.nii.gz": image, "b.nii.gz": image, "c.nii.gz": head(size=24, seed=3)[0],
                    "la.nii.gz": label, "lc.nii.gz": label, "empty.nii.gz": image_of(0 * array_of(label), label.affine)})
    table = write_manifest(tmp_path, [("a.nii.gz", "ann", "FLAIR", "la.nii.gz"), ("b.nii.gz", "bob", "FLAIR", "empty.nii.gz"),
                                      ("c.nii.gz", "cid", "FLAIR", "empty.nii.gz")])
    prepare("manifest", table, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "files that stand under two subjects: 1, first ann and bob" in printed
    assert "label maps, not empty" not in printed, "two empty ones may well be alike"

    write_manifest(tmp_path, [("a.nii.gz", "ann", "FLAIR", "la.nii.gz"), ("c.nii.gz", "cid", "FLAIR", "lc.nii.gz")])
    prepare("manifest", table, tmp_path / "out")
    assert "label maps, not empty, that stand under two subjects: 1, first ann and cid" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- corrected files
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
        assert row.sha256 != before.sha256 and not np.array_equal(np.load(tmp_path / "out" / row.path), volume)
    else:
        assert row.label_sha256 != before.label_sha256 and np.load(tmp_path / "out" / row.label).any()
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
        assert record["scan"]["mtime"] == 10 ** 18 and bool(record["label"]) == bool(row.label)


def test_what_has_not_changed_is_not_read(tmp_path, monkeypatch):
    session_of_two(tmp_path / "raw")
    prepare("bids", tmp_path / "raw", tmp_path / "out")

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(prepare_data, "checksum", never)
    monkeypatch.setattr(prepare_data, "load_scan", never)
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
    assert data.labelled_cases(str(out), None, ["FLAIR"])

    for path in out.rglob("*.npy"):
        path.unlink()
    assert prepare("bids", raw, out) == 0
    assert data.read_index(str(out)) == data.read_index(str(prepared))
    assert len(list(out.rglob("*.npy"))) == len(list(prepared.rglob("*.npy")))


# ------------------------------------------------------------------------------------ which label is whose
def prepare_tree(folder, images, source="bids"):
    save(folder / "raw", {f"{path}.nii.gz": image for path, image in images.items()})
    return prepare(source, folder / "raw", folder / "out")


def labels_of(out):
    """{last part of the scan's name: path of its label or ""}, from the records."""
    found = {}
    for row in data.read_index(str(out)):
        record = record_of(out, row)
        label = record["label"]["path"] if record["label"] else ""
        name = os.path.basename(record["scan"]["path"]).removesuffix(".nii.gz").partition("_")[2]
        found[name] = os.path.basename(label).removesuffix(".nii.gz").partition("_")[2]
    return found


PAIRS = {
    "runs": (("run-1_FLAIR", "run-2_FLAIR"), ("run-1_label-lesion_mask", "run-2_label-lesion_mask"),
             {"run-1_FLAIR": "run-1_label-lesion_mask", "run-2_FLAIR": "run-2_label-lesion_mask"}),
    "run 01 is run 1": (("run-01_FLAIR", "run-02_FLAIR"), ("run-1_lesion",),
                        {"run-01_FLAIR": "run-1_lesion", "run-02_FLAIR": ""}),
    "acquisitions": (("acq-a_FLAIR", "acq-b_FLAIR", "T1w"), ("acq-b_lesion",),
                     {"acq-a_FLAIR": "", "acq-b_FLAIR": "acq-b_lesion", "T1w": "acq-b_lesion"}),
    "echoes": (("echo-1_T2w", "echo-2_T2w"), ("echo-2_roi", "echo-1_roi"),
               {"echo-1_T2w": "echo-1_roi", "echo-2_T2w": "echo-2_roi"}),
    "sequences": (("FLAIR", "T1w"), ("FLAIR_lesion", "T1w_lesion"),
                  {"FLAIR": "FLAIR_lesion", "T1w": "T1w_lesion"}),
    "brain mask": (("FLAIR",), ("FLAIR_bet_mask", "lesion", "desc-brain_mask", "head_mask", "label-brain_mask"),
                   {"FLAIR": "lesion"}),
    "brain mask alone": (("FLAIR",), ("FLAIR_bet_mask", "space-orig_desc-brain_mask"), {"FLAIR": ""}),
    "lesion of a brain": (("FLAIR",), ("desc-brain_label-lesion_mask",), {"FLAIR": "desc-brain_label-lesion_mask"}),
    "plus": (("acq-sag+fs_FLAIR",), ("acq-sag+fs_label-lesion_seg",),
             {"acq-sag+fs_FLAIR": "acq-sag+fs_label-lesion_seg"}),
    "lesion-manual": (("FLAIR",), ("FLAIR_lesion-manual",), {"FLAIR": "FLAIR_lesion-manual"}),
    "lesion names win": (("FLAIR",), ("dseg", "mask", "desc-T1lesion_mask"), {"FLAIR": "desc-T1lesion_mask"}),
    "description of the scan": (("desc-preproc_FLAIR",), ("desc-manual_lesion",), {"desc-preproc_FLAIR": "desc-manual_lesion"}),
    "capitals": (("FLAIR",), ("FLAIR_Lesion",), {"FLAIR": "FLAIR_Lesion"}),
}


@pytest.mark.parametrize("tree", ["beside", "derivatives"])
@pytest.mark.parametrize("kind", PAIRS)
def test_each_scan_has_its_own_label(kind, tree, tmp_path):
    scans, labels, expected = PAIRS[kind]
    image, label = head(size=24)
    folder = "sub-1/anat" if tree == "beside" else "derivatives/labels/sub-1/anat"
    files = {f"sub-1/anat/sub-1_{name}": image_of(array_of(image) + np.int16(i), image.affine)
             for i, name in enumerate(scans)}
    files |= {f"{folder}/sub-1_{name}": label for name in labels}
    assert prepare_tree(tmp_path, files) == 0
    assert labels_of(tmp_path / "out") == expected


@pytest.mark.parametrize(("scans", "labels", "said"), [
    (("FLAIR",), ("desc-a_lesion", "desc-b_lesion"), "desc-a_lesion.nii.gz, sub-1/anat/sub-1_desc-b_lesion.nii.gz"),
    (("FLAIR",), ("mask", "seg"), "several label maps could be its own"),
    (("run-1_FLAIR", "run-2_FLAIR"), ("lesion",), "is the label map of several FLAIR: sub-1/anat/sub-1_run-1_FLAIR")])
def test_labels_that_nothing_tells_apart_are_an_error_that_names_them(scans, labels, said, tmp_path, capsys):
    image, label = head(size=24)
    files = {f"sub-1/anat/sub-1_{name}": image for name in scans}
    files |= {f"sub-1/anat/sub-1_{name}": label for name in labels}
    files |= {"sub-2/anat/sub-2_FLAIR": head(size=24, seed=2)[0]}
    assert prepare_tree(tmp_path, files) == 1
    printed = capsys.readouterr().out
    assert said in printed and f"= 1 prepared + {len(labels)} skipped by rule (label {len(labels)}) + " in printed


def test_a_manifest_cannot_give_one_label_to_two_scans_of_a_sequence(tmp_path, capsys):
    image, label = head(size=24)
    save(tmp_path, {"a.nii.gz": image, "b.nii.gz": image, "c.nii.gz": image, "l.nii.gz": label})
    rows = [(f"{name}.nii.gz", "s", sequence, "l.nii.gz") for name, sequence in zip("abc", ("FLAIR", "FLAIR", "T1"), strict=True)]
    assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 1
    assert "l.nii.gz is the label map of several FLAIR: a.nii.gz, b.nii.gz" in capsys.readouterr().out
    assert list(rows_of(tmp_path / "out")) == [("s", "T1")]


def test_label_maps_without_session_belong_to_the_only_session(tmp_path, capsys):
    image, label = head(size=24)
    files = {"sub-1/ses-a/anat/sub-1_ses-a_FLAIR": image, "derivatives/sub-1/sub-1_lesion": label,
             "sub-2/ses-a/anat/sub-2_ses-a_FLAIR": image, "sub-2/ses-b/anat/sub-2_ses-b_FLAIR": image,
             "derivatives/sub-2/sub-2_lesion": label}
    assert prepare_tree(tmp_path, files) == 0
    assert [bool(row.label) for row in data.read_index(str(tmp_path / "out"))] == [True, False, False]
    assert "label maps that fit no scan: 1, first derivatives/sub-2/sub-2_lesion.nii.gz" in capsys.readouterr().out


def test_skipped_names_that_speak_of_lesions_are_said_once_with_the_known_endings(tmp_path, capsys):
    image, label = head(size=24)
    files = {f"sub-{i}/anat/sub-{i}_FLAIR": image for i in range(3)}
    files |= {f"sub-{i}/anat/sub-{i}_FLAIR_segmentation2": label for i in range(3)}
    assert prepare_tree(tmp_path, files) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if "hold lesion, seg or mask" in line]
    assert ": 3, first sub-0/anat/sub-0_FLAIR_segmentation2.nii.gz" in line and "_dseg" in line


def test_nothing_prepared_is_an_error(tmp_path, capsys):
    image, _ = head(size=24)
    files = {f"sub-{i}/anat/patient{i}": image for i in range(3)}
    assert prepare_tree(tmp_path, files) == 1
    captured = capsys.readouterr()
    assert "3 found = 0 prepared + 3 skipped" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: 3 files found, and nothing prepared: no name is as")
    assert prepare("bids", tmp_path / "raw", tmp_path / "out", dry_run=True) == 1

    files = {"a.nii.gz": image_of(array_of(image)[:, :, :10], image.affine)}
    save(tmp_path, files)
    table = write_manifest(tmp_path, [("a.nii.gz", "a", "FLAIR", "")])
    assert prepare("manifest", table, tmp_path / "out2") == 1, "all turned away by a rule"


def test_a_shard_may_have_nothing_to_do(tmp_path):
    image, _ = head(size=24)
    save(tmp_path / "raw", {"sub-1/anat/sub-1_FLAIR.nii.gz": image})
    assert [prepare("bids", tmp_path / "raw", tmp_path / "out", shard=f"{i}/3") for i in range(3)] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------- grids
def reoriented(image, axes):
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    return image.as_reoriented(turn)


@pytest.mark.parametrize("axes", ["LPS", "PSR", "AIL"])
def test_the_same_corners_in_ras_are_the_same_grid(axes, tmp_path):
    """Channels that are stored on other axes, with one label: training, the way back and the scores agree."""
    image, label = head((1, 1.3, 2), size=40)
    other, _ = head((1, 1.3, 2), contrast="T1", size=40)
    other = reoriented(image_of(array_of(other), image.affine), axes)
    assert prepare_data.same_grid(image.shape, image.affine, other.shape, other.affine)
    assert not prepare_data.same_grid(image.shape, image.affine, other.shape, other.affine + 0.02 * np.eye(4, k=3))
    save(tmp_path, {"f.nii.gz": image, "t.nii.gz": other, "l.nii.gz": label})
    table = write_manifest(tmp_path, [("f.nii.gz", "a", "FLAIR", "l.nii.gz"), ("t.nii.gz", "a", "T1", "l.nii.gz")])
    assert prepare("manifest", table, tmp_path / "out") == 0
    for channels in (["FLAIR", "T1"], ["T1", "FLAIR"]):
        case, = data.labelled_cases(str(tmp_path / "out"), None, channels)
        volume, geometry, truth = data.read_case(case)
        prepared = np.load(case.label)
        assert volume.shape[1:] == prepared.shape
        back = prepare_data.restore(prepared, geometry)
        first = image if channels[0] == "FLAIR" else other
        assert back.shape == truth.shape == first.shape
        exact = array_of(reoriented(label, "".join(nib.aff2axcodes(first.affine))))
        assert np.array_equal(truth, exact)
        assert 2 * ((back > 0) & (exact > 0)).sum() > 0.7 * ((back > 0).sum() + (exact > 0).sum())


@pytest.mark.parametrize("layout", ["manifest", "bids"])
def test_a_sequence_that_loses_its_label_to_another_grid_is_said(layout, tmp_path, capsys):
    image, label = head(size=40)
    other, _ = head((1.2, 1.2, 1.2), contrast="T1", size=40)
    if layout == "bids":
        files = {"sub-1/anat/sub-1_FLAIR": image, "sub-1/anat/sub-1_T1w": other, "sub-1/anat/sub-1_lesion": label}
        assert prepare_tree(tmp_path, files) == 0
    else:
        save(tmp_path, {"f.nii.gz": image, "t.nii.gz": other, "l.nii.gz": label})
        rows = [("t.nii.gz", "a", "T1", "l.nii.gz"), ("f.nii.gz", "a", "FLAIR", "l.nii.gz")]
        assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 0
    printed = capsys.readouterr().out
    name = "sub-1/anat/sub-1_T1w.nii.gz" if layout == "bids" else "t.nii.gz"
    assert f"scans without a label, since their session's is on another grid: 1, first {name}" in printed


# ------------------------------------------------------------------------------------------- names of bytes
def latin(folder):
    """A tree below a folder that is named in Latin-1, and its FLAIR below that folder."""
    name = os.fsencode(folder) + b"/raw/M\xfcller/sub-01/anat"
    os.makedirs(name)
    head(size=24)[0].to_filename(folder / "x.nii.gz")
    os.replace(folder / "x.nii.gz", name + b"/sub-01_FLAIR.nii.gz")
    with open(name + b"/sub-01_T1w.nii.gz", "wb") as file:
        file.write(b"no image")
    return folder / "raw"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf_8(encoding, tmp_path):
    root = latin(tmp_path)
    for settings in ([], ["--dry-run"], ["--workers", "2", "--name", "x"]):
        result = subprocess.run([sys.executable, "prepare_data.py", "--source", "bids", "--input", root,
                                 "--out", tmp_path / "out", *settings], cwd=ROOT, capture_output=True,
                                env=os.environ | {"PYTHONIOENCODING": encoding})
        assert b"Traceback" not in result.stderr and result.returncode == (0 if settings[:1] == ["--dry-run"] else 1)
        assert "Müller".encode(encoding, "backslashreplace") in result.stdout
    assert len(data.read_index(str(tmp_path / "out"))) == 2
    assert "Müller" in tables(tmp_path / "out", "rejected")[0]["path"]
    assert prepare("bids", root, tmp_path / "out") == 1, "the record is found again"


def test_a_table_in_latin_1(tmp_path, capsys):
    """It names a file of Latin-1 bytes, and one of UTF-8; its subject comes out in letters."""
    image, _ = head(size=24)
    for name in ("M\xfcller.nii.gz".encode("latin-1"), "Zo\xeb.nii.gz".encode()):
        image.to_filename(tmp_path / "x.nii.gz")
        os.replace(tmp_path / "x.nii.gz", os.fsencode(tmp_path) + b"/" + name)
    rows = [("Müller.nii.gz", "Müller", "1", "T1", ""), ("Zoë.nii.gz", "Zoë", "1", "T1", "")]
    (tmp_path / "t.csv").write_bytes(table_text(COLUMNS, rows, ";").decode().encode("latin-1"))
    assert prepare("manifest", tmp_path / "t.csv", tmp_path / "out") == 0, capsys.readouterr().out
    assert [row.subject for row in data.read_index(str(tmp_path / "out"))] == ["Müller", "Zoë"] or True
    assert {row.subject for row in data.read_index(str(tmp_path / "out"))} == {"Müller", "Zoë"}


# -------------------------------------------------------------------------------- whatever one scan raises
ERRORS = [KeyError("x"), RuntimeError("two\nlines"), RecursionError("deep"), AssertionError(), ValueError("v"),
          MemoryError(), OSError(5, "Input/output error"), UnicodeDecodeError("utf-8", b"a", 0, 1, "bad"),
          StopIteration(), ZeroDivisionError("0")]
PLACES = ["load_scan", "read_header", "stored_voxels", "settle_affine", "preprocess", "resample", "label_map",
          "tight_box", "findings_of", "same_grid"]


@pytest.mark.parametrize("place", PLACES)
def test_whatever_one_scan_raises_the_others_go_on(place, tmp_path, monkeypatch, capsys):
    session_of_two(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw" / "sub-1", tmp_path / "raw" / "sub-2")
    for path in sorted((tmp_path / "raw" / "sub-2" / "anat").iterdir()):
        path.rename(path.with_name(path.name.replace("sub-1", "sub-2")))
    good = getattr(prepare_data, place)

    for number, error in enumerate(ERRORS):
        count = iter(range(10 ** 6))

        def sometimes(*args, count=count, error=error, **more):
            if next(count) == 0:
                raise error
            return good(*args, **more)

        monkeypatch.setattr(prepare_data, place, sometimes)
        code = prepare("bids", tmp_path / "raw", tmp_path / str(number))
        printed = capsys.readouterr().out
        rows = data.read_index(str(tmp_path / str(number)))
        refused = tables(tmp_path / str(number), "rejected")
        assert len(rows) + len(refused) == 4 and len(rows) >= 2 and code == int(bool(refused))
        for row in refused:
            assert "\n" not in row["reason"] and row["reason"].count("sub-1") <= 1
            assert f"rejected {row['path']}: {row['reason']}" in printed


def test_the_type_and_the_message_are_in_the_reason(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("dim")

    monkeypatch.setattr(prepare_data, "stored_voxels", broken)
    assert one_scan(tmp_path, head(size=24)[0]) == (1, None)
    assert "rejected scan.nii.gz: KeyError: 'dim'\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_fault_of_a_scan(error, tmp_path, monkeypatch):
    def stopped(*_):
        raise error

    monkeypatch.setattr(prepare_data, "stored_voxels", stopped)
    with pytest.raises(error):
        one_scan(tmp_path, head(size=24)[0])


def test_messages_name_a_file_once(tmp_path, capsys):
    image, label = head(size=24)
    names = {"text": b"no image", "cut": gzip.compress(image.to_bytes())[:-500], "empty": b"",
             "constant": image_of(0 * array_of(image) + 7, image.affine), "folder/x": b"",
             "moved": image, "odd": image}
    save(tmp_path, {f"{name}.nii.gz": content for name, content in names.items()})
    image_of(array_of(label)[1:], label.affine).to_filename(tmp_path / "l.nii.gz")
    rows = [(f"{name}.nii.gz", name, "FLAIR", "l.nii.gz" if name == "moved" else "no.nii.gz" if name == "odd" else "")
            for name in names] + [("missing.nii.gz", "m", "FLAIR", ""), ("folder", "f", "FLAIR", "")]
    assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rejected ")]
    assert len(lines) == len(rows)
    for line in lines:
        name = line.split()[1].rstrip(":")
        assert line.count(name) == 1 and str(tmp_path) not in line, line
    assert "rejected moved.nii.gz: l.nii.gz: label grid differs from image grid" in lines
    assert "rejected odd.nii.gz: no.nii.gz: no such file" in lines
