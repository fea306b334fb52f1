"""--source any: a folder that nobody arranged for this, of scans without labels."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from conftest import mistake, run
from inputs import array_of, head, image_of, prepare, save, tables

import data
import scans
import sources

# ------------------------------------------------------------------------------ what a path says
PATHS = {
    "P001/2020-01-31/T1.nii.gz": ("P001", "T1"),
    "P001/T2 study/3D_FLAIR sag.nii": ("P001", "FLAIR"),
    "P001/T2_study/scan 3.mgz": ("P001", "T2"),
    "P001/scan.nii.gz": ("P001", "other"),
    "T1/scan.nii.gz": ("T1", "other"),  # the subject's name says no sequence
    "IXI002-Guys-0828-T1.nii.gz": ("IXI002-Guys-0828-T1", "T1"),
    "x.hdr": ("x", "other"),
    "Müller, Zoë/Kopf/t2_tse.nii.gz": ("Müller, Zoë", "T2"),
    "a/b/c/d/e/MPRAGE.MGH": ("a", "T1"),
    "a/lesion_visit/T1.nii": ("a", "T1"),
    "a/MT1__GradWarp__N3m/x.nii": ("a", "T1"),
    "a/Spatially_Normalized__Masked_and_N3_corrected_T1/x.nii": ("a", "T1"),
    "a/mri/orig.mgz": ("a", "other"),
    "a/mri/T1.mgz": ("a", "T1"),
}
SKIPPED = {
    "._T1.nii.gz": "hidden",
    "__MACOSX/P001/T1.nii.gz": "hidden",
    "P001/.cache/T1.nii.gz": "hidden",
    "P001/T1_lesion.nii.gz": "label map",
    "P001/consensus.nii.gz": "label map",
    "P001/mri/aparc+aseg.mgz": "label map",
    "P001/T1_brainmask.nii": "mask",
    "P001/labels/T1.nii.gz": "mask",
    "derivatives/P001/T1.nii.gz": "derivative",
    "P001/derivatives/T1.nii.gz": "derivative",
    "P001/T1_pve_0.nii.gz": "derivative",
    "P001/mri/norm.mgz": "derivative",
    "P001/rest_bold/x.nii": "fMRI",
    "P001/localizer.nii": "localizer",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_scan_is_understood(path):
    who = sources.identify("any", path)
    assert (who.subject, *who.sequences, who.skip) == (*PATHS[path], "")
    assert who.session == "1" and not who.test


@pytest.mark.parametrize("path", SKIPPED)
def test_what_is_no_scan_is_skipped_by_its_name(path):
    assert sources.identify("any", path).skip == SKIPPED[path]


# ---------------------------------------------------------------------------- what the values say
def classes(dtype=np.uint8, number=5, shape=(24, 24, 24)):
    """A label map with values from 0 to number - 1, each of them somewhere."""
    values = np.zeros(shape, dtype)
    values.reshape(-1)[-number:] = np.arange(number)
    return image_of(values, np.eye(4))


@pytest.mark.parametrize(
    ("image", "is_named", "expected"),
    [
        (classes(), False, True),
        (classes(), True, True),
        (classes(np.float32), False, True),
        (classes(number=63), False, True),
        (classes(number=64), False, False),
        (head(size=24)[0], False, False),
        (head(size=24)[0], True, False),
        (image_of((array_of(head(size=24)[0]) // 8).astype(np.uint8), np.eye(4)), True, False),
        (image_of(np.stack([array_of(classes())] * 2, -1), np.eye(4)), False, False),
    ],
    ids="uint8, T1 of uint8, float, 63 values, 64 values, scan, T1, T1 of 8 bits, 4-D".split(", "),
)
@pytest.mark.parametrize("ending", ["nii", "nii.gz", "hdr"])
def test_a_label_map_is_told_by_its_values(ending, image, is_named, expected, tmp_path):
    if ending == "hdr":
        image = nib.Nifti1Pair(array_of(image), image.affine)
    image.to_filename(tmp_path / f"x.{ending}")
    assert scans.is_label_map(str(tmp_path / f"x.{ending}"), is_named) == expected


def test_a_small_packed_file_is_looked_at_whatever_its_name(tmp_path):
    classes(np.int16).to_filename(tmp_path / "x.nii.gz")
    assert scans.is_label_map(str(tmp_path / "x.nii.gz"), True)


@pytest.mark.parametrize("content", [b"", b"no scan", gzip.compress(b"no scan", mtime=0)])
def test_what_cannot_be_read_is_no_label_map(content, tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(content)
    assert not scans.is_label_map(str(tmp_path / "x.nii.gz"), False)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_label_map_that_is_cut_short_is_left_to_the_preparation(ending, tmp_path):
    classes(shape=(64, 64, 64)).to_filename(tmp_path / f"x.{ending}")
    whole = (tmp_path / f"x.{ending}").read_bytes()
    (tmp_path / f"x.{ending}").write_bytes(whole[:-100])
    assert not scans.is_label_map(str(tmp_path / f"x.{ending}"), False)


def test_a_scan_is_read_no_further_than_it_has_to_be(tmp_path, monkeypatch):
    """One block is enough where it has 64 values, and none where the name leaves no doubt."""
    noise = np.random.default_rng(0).integers(0, 500, (120, 120, 120), np.int16)
    image = image_of(noise)
    image.to_filename(tmp_path / "x.nii")
    blocks = []
    frombuffer = np.frombuffer

    def count(block, *arguments):
        blocks.append(len(block))
        return frombuffer(block, *arguments)

    monkeypatch.setattr(np, "frombuffer", count)
    assert not scans.is_label_map(str(tmp_path / "x.nii"), True) and blocks == []
    assert not scans.is_label_map(str(tmp_path / "x.nii"), False)
    assert blocks == [2**18] and scans.size_of_voxels(image) > 10 * 2**18


# ------------------------------------------------------------------------------------ a whole tree
@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """What somebody's folder may hold: the folder, and what is to be prepared of it."""
    folder = tmp_path_factory.mktemp("mess")
    scan = [head(size=24, seed=seed)[0] for seed in range(9)]
    pair = nib.Nifti1Pair(array_of(scan[0]), scan[0].affine)
    mgz = nib.MGHImage(array_of(scan[1]).astype(np.float32), scan[1].affine.astype(np.float32))
    wanted = {
        "one/T1.nii.gz": scan[2],
        "two/T1.nii.gz": scan[3],
        "Zoë Müller/the best one (final).nii.gz": scan[4],
        "one/old/T1.nii.gz": scan[5],
        "one/mri/orig.mgz": mgz,
        "flat flair.nii": scan[6],
        "pair.img": pair,
    }
    others = {
        "one/T1_lesion.nii.gz": classes(),
        "one/by hand.nii.gz": classes(np.int16),
        "two/func/rest_bold.nii.gz": scan[7],
        "two/series.nii.gz": image_of(np.stack([array_of(scan[8])] * 3, -1), scan[8].affine),
        "two/cut.nii.gz": b"\x1f\x8b",
        "two/._T1.nii.gz": b"\x00\x05\x16\x07",
        "__MACOSX/two/._T1.nii.gz": b"\x00\x05\x16\x07",
        "two/IM_0001.dcm": b"DICM",
        "two/IM_0002": b"DICM",
        "notes.txt": b"mine",
    }
    save(folder, wanted | others)
    return folder, {path.replace(".img", ".hdr") for path in wanted}


def test_a_mess_is_sorted_and_prepared(mess, tmp_path, capsys):
    folder, wanted = mess
    assert prepare("any", folder, tmp_path / "out") == 1, "one file is damaged"
    printed = capsys.readouterr().out
    assert ("any: 14 found = 7 prepared + 5 skipped by rule (fMRI 1, fewer than 64 values 1, "
            "hidden 2, label map 1) + 2 rejected") in printed
    assert "1 DICOM files are not read: run dcm2niix" in printed
    reasons = {row["path"]: row["reason"] for row in tables(tmp_path / "out", "rejected")}
    assert set(reasons) == {"two/series.nii.gz", "two/cut.nii.gz"}

    rows = data.read_index(str(tmp_path / "out"))
    assert len({row.path for row in rows}) == len(wanted) == len(rows)
    subjects = {row.subject for row in rows}
    assert subjects == {"one", "two", "Zoë Müller", "flat flair", "pair"}
    assert {row.split for row in rows} == {"pretrain"}
    assert len(data.pretraining_cases(str(tmp_path / "out"))) == len(rows)


def test_the_check_shows_what_it_understood(mess):
    folder, wanted = mess
    printed = run("prepare_data", "--check", "--dry-run", source="any", input=folder)
    assert "any: 14 found = 7 to prepare + 5 skipped by rule" in printed
    assert "+ 2 rejected" in printed
    assert "7 scans of 5 subjects in 5 sessions: T1 3, other 3, FLAIR 1" in printed
    assert "skip one/by hand.nii.gz: fewer than 64 values\n" in printed
    assert "rejected two/series.nii.gz: not 3-D but" in printed


def test_folders_that_are_no_subjects_are_said(tmp_path):
    image, _ = head(size=24)
    save(tmp_path / "a", {f"scans/{i}.nii.gz": image for i in range(11)})
    printed = run("prepare_data", "--check", source="any", input=tmp_path / "a")
    assert "is scans the subject of all 11? If not, --input may be the folder above" in printed
    printed = run("prepare_data", "--check", source="any", input=tmp_path / "a" / "scans")
    assert "11 scans of 11 subjects" in printed and "the subject of all" not in printed

    save(tmp_path / "b", {f"{name}/1.nii.gz": image for name in ("T1", "flair", "x")})
    printed = run("prepare_data", "--check", source="any", input=tmp_path / "b")
    assert "is T1 a subject? That is how a sequence is called" in printed


def test_a_folder_without_scans_is_one_line(tmp_path):
    save(tmp_path, {"a/IM_0001.dcm": b"DICM"})
    assert "1 of DICOM: run dcm2niix first" in mistake("prepare_data", source="any", input=tmp_path)
