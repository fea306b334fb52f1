"""Files of scans: every form of NIfTI is read, and what cannot be read is rejected by name."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from inputs import bad_scan, head, prepare, tables

import preprocess

FORMS = {
    "plain .nii": lambda image: image,
    "big-endian": lambda image: nib.Nifti1Image(
        np.asarray(image.dataobj), image.affine, nib.Nifti1Header(endianness=">")
    ),
    "NIfTI-2": lambda image: nib.Nifti2Image(np.asarray(image.dataobj), image.affine),
    "scaled": lambda image: scaled(image),
    "fourth axis of one": lambda image: nib.Nifti1Image(
        np.asarray(image.dataobj)[..., None], image.affine
    ),
    "qform only": lambda image: qform_only(image),
}


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
        assert (
            np.allclose(found["affine"], geometry["affine"], atol=1e-4)
            and found["box"] == geometry["box"]
        )


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("kind", "reason", "code"),
    [
        ("truncated", "unreadable", 1),
        ("text", "unreadable", 1),
        ("4-D", "not 3-D but", 0),
        ("infinite", "1 voxels are infinite", 1),
        ("constant", "constant", 1),
        ("empty", "constant or empty", 1),
        ("thin", "a side of 14 voxels", 0),
        ("no scale", "no affine scale", 1),
        ("huge", "no head scan", 1),
        ("bomb", "more data than the header says", 1),
        ("complex", "not numbers", 1),
    ],
)
def test_a_bad_scan_is_rejected_by_name_and_the_good_one_prepared(
    kind, reason, code, tmp_path, capsys
):
    for subject in ("sub-1", "sub-2"):
        (tmp_path / "raw" / subject / "anat").mkdir(parents=True)
    bad_scan(kind, tmp_path / "raw" / "sub-1" / "anat")
    head(size=40)[0].to_filename(tmp_path / "raw" / "sub-2" / "anat" / "sub-2_T1w.nii.gz")
    assert prepare("bids", tmp_path / "raw", tmp_path / "out") == code
    assert "2 found = 1 prepared + 0 skipped by rule + 1 rejected" in capsys.readouterr().out
    [row] = tables(tmp_path / "out", "rejected")
    assert reason in row["reason"] and row["path"] == "sub-1/anat/sub-1_T1w.nii.gz"


def damaged(rng, raw):
    """One of five kinds of damage to the bytes of a file."""
    raw, kind = bytearray(raw), rng.integers(5)
    if kind == 0:
        return bytes(raw[: rng.integers(0, len(raw))])
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
    assert (
        f"300 found = {len(rows)} prepared" in capsys.readouterr().out
        and len(rows) + len(refused) == 300
    )
    assert len(refused) > 100 and len(rows) > 50 and all(row["reason"] for row in refused)
    expected, _ = preprocess.preprocess(image)
    for row in rows:
        volume, number = np.load(tmp_path / "out" / row["path"]), int(row["subject"][4:])
        assert (
            0 <= volume.min()
            and volume.max() <= 1
            and "x".join(map(str, volume.shape)) == row["shape"]
        )
        if (
            number % 4 == 1
        ):  # packed before it was damaged: what the checksum lets through is the scan itself
            assert np.abs(volume - expected).max() < 1e-3
