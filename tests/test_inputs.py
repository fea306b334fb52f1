"""Files as users have them: other readers, headers that contradict themselves, odd values.

Each test is a kind of fault that was reported of some tool in public, as a few small voxels."""

import gzip
import os
import shutil

import folders
import nibabel as nib
import numpy as np
import pytest
from inputs import (
    array_of,
    head,
    image_of,
    one_scan,
    prepare,
    record_of,
    rows_of,
    save,
    session_of_two,
    tables,
    write_manifest,
)

import data
import preprocess
import records
import resample
import scans
import tasks


# ------------------------------------------------------------------------------ readers and headers
def mgh(image):
    return nib.MGHImage(array_of(image).astype(np.float32), image.affine.astype(np.float32))


FORMS = {
    "mgz": (".mgz", mgh),
    "mgh": (".mgh", mgh),
    "NIfTI-2": (".nii.gz", nib.Nifti2Image.from_image),
    "gzip named .nii": (".nii", lambda image: gzip.compress(image.to_bytes())),
    "plain named .nii.gz": (".nii.gz", lambda image: image.to_bytes()),
    "plain named .mgz": (".mgz", lambda image: mgh(image).to_bytes()),
    "NIfTI named .mgz": (".mgz", lambda image: gzip.compress(image.to_bytes())),
    "NIfTI named .mgh": (".mgh", lambda image: image.to_bytes()),
    "MGH named .nii": (".nii", lambda image: mgh(image).to_bytes()),
    "capitals": (".NII.GZ", lambda image: gzip.compress(image.to_bytes())),
}


@pytest.mark.parametrize("layout", ["manifest", "bids"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_told_by_its_first_bytes(form, layout, tmp_path, capsys):
    image, label = head((1, 1.5, 2), "PSR", degrees=9, size=40)
    ending, other = FORMS[form]
    expected, geometry = preprocess.preprocess(image)
    if layout == "manifest":
        code, row = one_scan(tmp_path, other(image), other(label), ending)
    else:
        save(
            tmp_path / "raw",
            {
                f"sub-a/anat/sub-a_FLAIR{ending}": other(image),
                f"sub-a/anat/sub-a_lesion{ending}": other(label),
            },
        )
        code = prepare("bids", tmp_path / "raw", tmp_path / "out")
        (row,) = data.read_index(str(tmp_path / "out"))
    assert code == 0, capsys.readouterr().out
    assert np.abs(np.load(tmp_path / "out" / row.path) - expected).max() < 1e-3
    truth = preprocess.preprocess_label(label, geometry)
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
    assert not np.array_equal(
        np.load(tmp_path / "out" / rows_of(tmp_path / "out")["a", "FLAIR"].path), before
    )


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
    expected, geometry = preprocess.preprocess(image)
    code, row = one_scan(tmp_path, without_scale(image), without_scale(label))
    assert code == 0 and "qform used" in capsys.readouterr().out
    assert row.spacing == "2x2x2" and row.shape == "x".join(map(str, expected.shape))
    assert (
        np.load(tmp_path / "out" / row.label).sum()
        == preprocess.preprocess_label(label, geometry).sum()
    )

    volume, geometry, _ = preprocess.prepare_scan([str(tmp_path / "scan.nii.gz")])
    assert volume.shape[1:] == expected.shape and np.allclose(geometry["affine"], image.affine)


def test_an_sform_without_voxel_size_nor_qform_is_rejected_with_both_numbers(tmp_path, capsys):
    image, _ = head((2, 2, 2), size=60)
    code, row = one_scan(tmp_path, without_scale(image, code=0))
    printed = capsys.readouterr().out
    assert code == 1 and row is None
    assert "1 x 1 x 1 mm by the sform, 2 x 2 x 2 mm by pixdim" in printed


def test_an_orientation_that_nobody_wrote_is_said(tmp_path, capsys):
    image, _ = head(size=40)
    bare = nib.Nifti1Image(array_of(image), image.affine)
    bare.header.set_sform(None, 0)
    bare.header.set_qform(None, 0)
    analyze = nib.AnalyzeImage(array_of(image), None)
    for name, scan, ending in (
        ("bare", nib.Nifti1Image(array_of(image), None, bare.header), ".nii.gz"),
        ("analyze", analyze, ".hdr"),
    ):
        (tmp_path / name).mkdir()
        assert one_scan(tmp_path / name, scan, None, ending)[0] == 0
        said = f"nibabel's guess of left and right is taken: 1, first scan{ending}"
        assert said in capsys.readouterr().out


def test_an_empty_sform_gives_way_and_a_mirrored_qform_is_said(tmp_path, capsys):
    image, _ = head((2, 2, 2), size=60)
    for name, sform in (
        ("empty", np.zeros((4, 4))),
        ("mirrored", image.affine @ np.diag([-1, 1, 1, 1])),
    ):
        (tmp_path / name).mkdir()
        code, row = one_scan(tmp_path / name, with_sform(image, sform))
        assert code == 0 and row.spacing == "2x2x2"
    assert "left and right the other way: 1, first scan.nii.gz" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- values
NOISE = {
    "float": (np.float32(0.99999994), np.float32),
    "below": (0.9991, np.float64),
    "above": (1.0009, np.float64),
}


@pytest.mark.parametrize("noise", NOISE)
def test_a_label_value_near_an_integer_is_that_integer(noise, tmp_path):
    image, label = head(size=40)
    factor, kind = NOISE[noise]
    mask = array_of(label) > 0
    values = np.where(mask, factor, -0.0004).astype(kind)
    _, row = one_scan(tmp_path, image, image_of(values, label.affine))
    assert set(np.unique(np.load(tmp_path / "out" / row.label))) == {0, 1}
    (case,) = tasks.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert np.array_equal(folders.read_case(case)[2], mask)
    assert np.array_equal(preprocess.read_label(tmp_path / "label.nii.gz", image), mask)


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


@pytest.mark.parametrize(
    ("value", "said"), [(0.998, "0.998"), (-1, "-1"), (256, "256"), (2.5, "2.5")]
)
def test_another_label_value_is_rejected_with_the_first(value, said, tmp_path, capsys):
    image, label = head(size=40)
    code, row = one_scan(
        tmp_path, image, image_of(np.where(array_of(label) > 0, value, 0.0), label.affine)
    )
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
    assert (
        code == 0
        and f"scans with NaN, set to 0: 1, first scan.nii.gz; {zeros[:9].size:,} voxels" in printed
    )
    assert "label maps with NaN, set to 0: 1, first label.nii.gz" in printed
    expected, _ = preprocess.preprocess(image_of(zeros, image.affine))
    assert np.array_equal(np.load(tmp_path / "out" / row.path), expected.astype(np.float16))
    assert np.load(tmp_path / "out" / row.label).sum() == np.nansum(mask)
    assert record_of(tmp_path / "out", row)["nan"] == zeros[:9].size
    (case,) = tasks.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    read = preprocess.read_label(tmp_path / "label.nii.gz", image)
    assert folders.read_case(case)[2].sum() == read.sum()


@pytest.mark.parametrize(
    ("fill", "part", "reason"),
    [
        (np.inf, 1, "voxels are infinite"),
        (-np.inf, 1, "voxels are infinite"),
        (np.nan, 42, "voxels are numbers"),
    ],
)
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
    printed = capsys.readouterr().out
    assert "% of the voxels that are not 0 are negative: is it normalised already?" in printed
    assert "Give the scan as the scanner wrote it" in printed
    with pytest.raises(scans.Rejected, match="scan.nii.gz: .* is it normalised already"):
        preprocess.prepare_scan([str(tmp_path / "scan.nii.gz")])


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
    assert (
        f"negative values, set to 0: 1, first scan.nii.gz; {count:,} voxels"
        in capsys.readouterr().out
    )


def test_a_lesion_that_vanishes_and_one_outside_the_box_are_said(tmp_path, capsys):
    image, _ = head((0.5, 0.5, 0.5), size=20)
    scan = array_of(image).copy()
    scan[:4] = 0
    label = np.zeros(scan.shape, np.uint8)
    label[20, 20, 20] = 2  # one voxel, between the centres of the prepared ones
    label[10:14, 10:14, 10:14] = 1
    label[:2, :3, :4] = 1
    geometry = preprocess.preprocess(image_of(scan, image.affine))[1]
    if preprocess.preprocess_label(image_of(label, image.affine), geometry).max() == 2:
        label[20, 20, 20], label[21, 21, 21] = 0, 2
    _, row = one_scan(tmp_path, image_of(scan, image.affine), image_of(label, image.affine))
    printed = capsys.readouterr().out
    prepared = np.load(tmp_path / "out" / row.label)
    assert "lost a class at 1 mm: 1, first label.nii.gz" in printed
    assert (
        "voxels outside the box of the head, which are cut off: 1, first label.nii.gz; 24 voxels"
        in printed
    )
    background = label.size - 24 - 64 - 1
    assert row.label_values == (
        f"0:{background}/{(prepared == 0).sum()} 1:88/{(prepared == 1).sum()} 2:1/0"
    )
    assert record_of(tmp_path / "out", row)["label"]["values"]["2"] == [1, 0]

    assert prepare("manifest", tmp_path / "scans.csv", tmp_path / "out") == 0
    again = capsys.readouterr().out
    assert again == printed, "a second run prepares nothing, and says the same"


# ------------------------------------------------------------------------- whatever one scan raises
ERRORS = [
    KeyError("x"),
    RuntimeError("two\nlines"),
    RecursionError("deep"),
    AssertionError(),
    ValueError("v"),
    MemoryError(),
    OSError(5, "Input/output error"),
    UnicodeDecodeError("utf-8", b"a", 0, 1, "bad"),
    StopIteration(),
    ZeroDivisionError("0"),
]
PLACES = {
    "resample": resample,
    "findings_of": records,
    "load_scan": scans,
    "read_header": scans,
    "stored_voxels": scans,
    "settle_affine": scans,
    "preprocess": preprocess,
    "label_map": scans,
    "tight_box": preprocess,
    "same_grid": scans,
}


@pytest.mark.parametrize("place", PLACES)
def test_whatever_one_scan_raises_the_others_go_on(place, tmp_path, monkeypatch, capsys):
    session_of_two(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw" / "sub-1", tmp_path / "raw" / "sub-2")
    for path in sorted((tmp_path / "raw" / "sub-2" / "anat").iterdir()):
        path.rename(path.with_name(path.name.replace("sub-1", "sub-2")))
    good = getattr(PLACES[place], place)

    for number, error in enumerate(ERRORS):
        count = iter(range(10**6))

        def sometimes(*args, count=count, error=error, **more):
            if next(count) == 0:
                raise error
            return good(*args, **more)

        monkeypatch.setattr(PLACES[place], place, sometimes)
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

    monkeypatch.setattr(scans, "stored_voxels", broken)
    assert one_scan(tmp_path, head(size=24)[0]) == (1, None)
    assert "rejected scan.nii.gz: KeyError: 'dim'\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_fault_of_a_scan(error, tmp_path, monkeypatch):
    def stopped(*_):
        raise error

    monkeypatch.setattr(scans, "stored_voxels", stopped)
    with pytest.raises(error):
        one_scan(tmp_path, head(size=24)[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bytes(128) + b"DICM" + bytes(500), "DICOM: run dcm2niix first"),
        (b"<!DOCTYPE html><html>", "a web page: the download needs a login"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a git-lfs pointer: fetch the file itself with git lfs pull",
        ),
        (b"", "an empty file"),
        (b"no image", "no scan by its first bytes"),
        (gzip.compress(b"no image", mtime=0), "no scan by its first bytes"),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz"])
def test_what_is_no_scan_is_called_by_its_name(content, said, ending, tmp_path, capsys):
    (tmp_path / f"scan{ending}").write_bytes(content)
    table = write_manifest(tmp_path, [(f"scan{ending}", "a", "FLAIR", "")])
    assert prepare("manifest", table, tmp_path / "out") == 1
    assert f"rejected scan{ending}: unreadable ({said})" in capsys.readouterr().out


def test_messages_name_a_file_once(tmp_path, capsys):
    image, label = head(size=24)
    names = {
        "text": b"no image",
        "cut": gzip.compress(image.to_bytes())[:-500],
        "empty": b"",
        "constant": image_of(0 * array_of(image) + 7, image.affine),
        "folder/x": b"",
        "moved": image,
        "odd": image,
    }
    save(tmp_path, {f"{name}.nii.gz": content for name, content in names.items()})
    image_of(array_of(label)[1:], label.affine).to_filename(tmp_path / "l.nii.gz")
    rows = [
        (
            f"{name}.nii.gz",
            name,
            "FLAIR",
            "l.nii.gz" if name == "moved" else "no.nii.gz" if name == "odd" else "",
        )
        for name in names
    ] + [("missing.nii.gz", "m", "FLAIR", ""), ("folder", "f", "FLAIR", "")]
    assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rejected ")]
    assert len(lines) == len(rows)
    for line in lines:
        name = line.split()[1].rstrip(":")
        assert line.count(name) == 1 and str(tmp_path) not in line, line
    assert "rejected moved.nii.gz: l.nii.gz: label grid differs from image grid" in lines
    assert "rejected odd.nii.gz: no.nii.gz: no such file" in lines
