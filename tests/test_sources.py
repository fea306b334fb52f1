"""Folders as users have them: whose label is whose, what is said, names of all kinds.

Each test is a kind of fault that was reported of some tool in public, as a few small voxels."""

import os
import subprocess
import sys

import folders
import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from inputs import (
    COLUMNS,
    array_of,
    head,
    image_of,
    prepare,
    prepare_tree,
    record_of,
    rows_of,
    save,
    table_text,
    tables,
    write_manifest,
)

import data
import scans
import sources
import tasks


# ----------------------------------------------------------------------------- which label is whose
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
    "runs": (
        ("run-1_FLAIR", "run-2_FLAIR"),
        ("run-1_label-lesion_mask", "run-2_label-lesion_mask"),
        {"run-1_FLAIR": "run-1_label-lesion_mask", "run-2_FLAIR": "run-2_label-lesion_mask"},
    ),
    "run 01 is run 1": (
        ("run-01_FLAIR", "run-02_FLAIR"),
        ("run-1_lesion",),
        {"run-01_FLAIR": "run-1_lesion", "run-02_FLAIR": ""},
    ),
    "acquisitions": (
        ("acq-a_FLAIR", "acq-b_FLAIR", "T1w"),
        ("acq-b_lesion",),
        {"acq-a_FLAIR": "", "acq-b_FLAIR": "acq-b_lesion", "T1w": "acq-b_lesion"},
    ),
    "echoes": (
        ("echo-1_T2w", "echo-2_T2w"),
        ("echo-2_roi", "echo-1_roi"),
        {"echo-1_T2w": "echo-1_roi", "echo-2_T2w": "echo-2_roi"},
    ),
    "sequences": (
        ("FLAIR", "T1w"),
        ("FLAIR_lesion", "T1w_lesion"),
        {"FLAIR": "FLAIR_lesion", "T1w": "T1w_lesion"},
    ),
    "brain mask": (
        ("FLAIR",),
        ("FLAIR_bet_mask", "lesion", "desc-brain_mask", "head_mask", "label-brain_mask"),
        {"FLAIR": "lesion"},
    ),
    "brain mask alone": (
        ("FLAIR",),
        ("FLAIR_bet_mask", "space-orig_desc-brain_mask"),
        {"FLAIR": ""},
    ),
    "lesion of a brain": (
        ("FLAIR",),
        ("desc-brain_label-lesion_mask",),
        {"FLAIR": "desc-brain_label-lesion_mask"},
    ),
    "plus": (
        ("acq-sag+fs_FLAIR",),
        ("acq-sag+fs_label-lesion_seg",),
        {"acq-sag+fs_FLAIR": "acq-sag+fs_label-lesion_seg"},
    ),
    "lesion-manual": (("FLAIR",), ("FLAIR_lesion-manual",), {"FLAIR": "FLAIR_lesion-manual"}),
    "lesion names win": (
        ("FLAIR",),
        ("dseg", "mask", "desc-T1lesion_mask"),
        {"FLAIR": "desc-T1lesion_mask"},
    ),
    "description of the scan": (
        ("desc-preproc_FLAIR",),
        ("desc-manual_lesion",),
        {"desc-preproc_FLAIR": "desc-manual_lesion"},
    ),
    "capitals": (("FLAIR",), ("FLAIR_Lesion",), {"FLAIR": "FLAIR_Lesion"}),
}


@pytest.mark.parametrize("tree", ["beside", "derivatives"])
@pytest.mark.parametrize("kind", PAIRS)
def test_each_scan_has_its_own_label(kind, tree, tmp_path):
    scans, labels, expected = PAIRS[kind]
    image, label = head(size=24)
    folder = "sub-1/anat" if tree == "beside" else "derivatives/labels/sub-1/anat"
    files = {
        f"sub-1/anat/sub-1_{name}": image_of(array_of(image) + np.int16(i), image.affine)
        for i, name in enumerate(scans)
    }
    files |= {f"{folder}/sub-1_{name}": label for name in labels}
    assert prepare_tree(tmp_path, files) == 0
    assert labels_of(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("scans", "labels", "said"),
    [
        (
            ("FLAIR",),
            ("desc-a_lesion", "desc-b_lesion"),
            "desc-a_lesion.nii.gz, sub-1/anat/sub-1_desc-b_lesion.nii.gz",
        ),
        (("FLAIR",), ("mask", "seg"), "several label maps could be its own"),
        (
            ("run-1_FLAIR", "run-2_FLAIR"),
            ("lesion",),
            "is the label map of several FLAIR: sub-1/anat/sub-1_run-1_FLAIR",
        ),
    ],
)
def test_labels_that_nothing_tells_apart_are_an_error_that_names_them(
    scans, labels, said, tmp_path, capsys
):
    image, label = head(size=24)
    files = {f"sub-1/anat/sub-1_{name}": image for name in scans}
    files |= {f"sub-1/anat/sub-1_{name}": label for name in labels}
    files |= {"sub-2/anat/sub-2_FLAIR": head(size=24, seed=2)[0]}
    assert prepare_tree(tmp_path, files) == 1
    printed = capsys.readouterr().out
    assert (
        said in printed
        and f"= 1 prepared + {len(labels)} skipped by rule (label {len(labels)}) + " in printed
    )


@pytest.mark.parametrize("missing", [None, "run-1_T1w"])
def test_the_channels_of_a_case_are_of_one_run(missing, tmp_path):
    """Their volumes lie in the order of a hash; each run has its own label map."""
    for subject in range(4):
        files = {}
        for run in (1, 2):
            name = f"sub-{subject}/anat/sub-{subject}_run-{run}"
            image, label = head(size=24, seed=10 * subject + run)
            files |= {f"{name}_FLAIR": image, f"{name}_lesion": label}
            files[f"{name}_T1w"] = image_of(array_of(image) + np.int16(1), image.affine)
        files.pop(f"sub-{subject}/anat/sub-{subject}_{missing}", None)
        save(tmp_path / "raw", {f"{path}.nii.gz": image for path, image in files.items()})
    assert prepare("bids", tmp_path / "raw", tmp_path / "out") == 0
    cases = tasks.labelled_cases(str(tmp_path / "out"), None, ["FLAIR", "T1"])
    assert len(cases) == 4
    for case in cases:
        flair, t1 = case.volumes
        assert flair.label_sha256 == t1.label_sha256 and flair.shape == t1.shape
        if missing:
            assert "run-2" in record_of(tmp_path / "out", flair)["scan"]["path"]


def test_the_name_of_a_subject_says_nothing_of_a_label(tmp_path):
    image, label = head(size=24)
    files = {
        "sub-stroke1/anat/sub-stroke1_FLAIR": image,
        "sub-stroke1/anat/sub-stroke1_lesion": label,
    }
    files |= {f"sub-stroke1/anat/sub-stroke1_{name}": label for name in ("mask", "brain_mask")}
    files |= {"sub-head1/anat/sub-head1_FLAIR": image, "sub-head1/anat/sub-head1_seg": label}
    assert prepare_tree(tmp_path, files) == 0
    found = [
        record_of(tmp_path / "out", row)["label"]["path"]
        for row in data.read_index(str(tmp_path / "out"))
    ]
    assert [os.path.basename(path) for path in found] == [
        "sub-head1_seg.nii.gz",
        "sub-stroke1_lesion.nii.gz",
    ]


def test_a_manifest_cannot_give_one_label_to_two_scans_of_a_sequence(tmp_path, capsys):
    image, label = head(size=24)
    save(tmp_path, {"a.nii.gz": image, "b.nii.gz": image, "c.nii.gz": image, "l.nii.gz": label})
    rows = [
        (f"{name}.nii.gz", "s", sequence, "l.nii.gz")
        for name, sequence in zip("abc", ("FLAIR", "FLAIR", "T1"), strict=True)
    ]
    assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 1
    assert (
        "l.nii.gz is the label map of several FLAIR: a.nii.gz, b.nii.gz" in capsys.readouterr().out
    )
    assert list(rows_of(tmp_path / "out")) == [("s", "T1")]


def test_label_maps_without_session_belong_to_the_only_session(tmp_path, capsys):
    image, label = head(size=24)
    files = {
        "sub-1/ses-a/anat/sub-1_ses-a_FLAIR": image,
        "derivatives/sub-1/sub-1_lesion": label,
        "sub-2/ses-a/anat/sub-2_ses-a_FLAIR": image,
        "sub-2/ses-b/anat/sub-2_ses-b_FLAIR": image,
        "derivatives/sub-2/sub-2_lesion": label,
    }
    assert prepare_tree(tmp_path, files) == 0
    assert [bool(row.label) for row in data.read_index(str(tmp_path / "out"))] == [
        True,
        False,
        False,
    ]
    assert (
        "label maps that fit no scan: 1, first derivatives/sub-2/sub-2_lesion.nii.gz"
        in capsys.readouterr().out
    )


def test_skipped_names_that_speak_of_lesions_are_said_once_with_the_known_endings(tmp_path, capsys):
    image, label = head(size=24)
    files = {f"sub-{i}/anat/sub-{i}_FLAIR": image for i in range(3)}
    files |= {f"sub-{i}/anat/sub-{i}_FLAIR_segmentation2": label for i in range(3)}
    assert prepare_tree(tmp_path, files) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "hold lesion, seg or mask" in line
    ]
    assert ": 3, first sub-0/anat/sub-0_FLAIR_segmentation2.nii.gz" in line and "_dseg" in line


def test_nothing_prepared_is_an_error(tmp_path, capsys):
    image, _ = head(size=24)
    files = {f"sub-{i}/anat/patient{i}": image for i in range(3)}
    assert prepare_tree(tmp_path, files) == 1
    captured = capsys.readouterr()
    assert "3 found = 0 prepared + 3 skipped" in captured.out
    assert captured.err.splitlines()[-1].startswith(
        "error: nothing prepared of 3 found: no name is as"
    )
    assert prepare("bids", tmp_path / "raw", tmp_path / "out", dry_run=True) == 1

    files = {"a.nii.gz": image_of(array_of(image)[:, :, :10], image.affine)}
    save(tmp_path, files)
    table = write_manifest(tmp_path, [("a.nii.gz", "a", "FLAIR", "")])
    assert prepare("manifest", table, tmp_path / "out2") == 1, "all turned away by a rule"


def test_a_shard_may_have_nothing_to_do(tmp_path):
    image, _ = head(size=24)
    save(tmp_path / "raw", {"sub-1/anat/sub-1_FLAIR.nii.gz": image})
    assert [
        prepare("bids", tmp_path / "raw", tmp_path / "out", shard=f"{i}/3") for i in range(3)
    ] == [0, 0, 0]


# -------------------------------------------------------------------------------------------- grids
def reoriented(image, axes):
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    return image.as_reoriented(turn)


@pytest.mark.parametrize("axes", ["LPS", "PSR", "AIL"])
def test_the_same_corners_in_ras_are_the_same_grid(axes, tmp_path):
    """Channels that are stored on other axes, with one label.

    Training, the way back and the scores agree."""
    image, label = head((1, 1.3, 2), size=40)
    other, _ = head((1, 1.3, 2), contrast="T1", size=40)
    other = reoriented(image_of(array_of(other), image.affine), axes)
    assert scans.same_grid(image.shape, image.affine, other.shape, other.affine)
    assert not scans.same_grid(
        image.shape, image.affine, other.shape, other.affine + 0.02 * np.eye(4, k=3)
    )
    save(tmp_path, {"f.nii.gz": image, "t.nii.gz": other, "l.nii.gz": label})
    table = write_manifest(
        tmp_path, [("f.nii.gz", "a", "FLAIR", "l.nii.gz"), ("t.nii.gz", "a", "T1", "l.nii.gz")]
    )
    assert prepare("manifest", table, tmp_path / "out") == 0
    for channels in (["FLAIR", "T1"], ["T1", "FLAIR"]):
        (case,) = tasks.labelled_cases(str(tmp_path / "out"), None, channels)
        volume, geometry, truth = folders.read_case(case)
        prepared = np.load(case.label)
        assert volume.shape[1:] == prepared.shape
        back = folders.restore(prepared, geometry)
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
        files = {
            "sub-1/anat/sub-1_FLAIR": image,
            "sub-1/anat/sub-1_T1w": other,
            "sub-1/anat/sub-1_lesion": label,
        }
        assert prepare_tree(tmp_path, files) == 0
    else:
        save(tmp_path, {"f.nii.gz": image, "t.nii.gz": other, "l.nii.gz": label})
        rows = [("t.nii.gz", "a", "T1", "l.nii.gz"), ("f.nii.gz", "a", "FLAIR", "l.nii.gz")]
        assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 0
    printed = capsys.readouterr().out
    name = "sub-1/anat/sub-1_T1w.nii.gz" if layout == "bids" else "t.nii.gz"
    assert (
        f"scans without a label, since their session's is on another grid: 1, first {name}"
        in printed
    )


# ----------------------------------------------------------------------------------- names of bytes
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
        result = subprocess.run(
            [
                sys.executable,
                "prepare_data.py",
                "--source",
                "bids",
                "--input",
                root,
                "--out",
                tmp_path / "out",
                *settings,
            ],
            cwd=ROOT,
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert b"Traceback" not in result.stderr and result.returncode == (
            0 if settings[:1] == ["--dry-run"] else 1
        )
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
    assert {row.subject for row in data.read_index(str(tmp_path / "out"))} == {"Müller", "Zoë"}


def test_a_tissue_map_is_no_label_where_a_lesion_is_marked(tmp_path, capsys):
    """A run without a lesion map has no label, though a map of tissues would fit it."""
    image, label = head(size=24)
    tissues = image_of((array_of(image) > 0).astype(np.uint8), image.affine)
    names = {f"sub-a_run-{run}_FLAIR": image for run in (1, 2)}
    names |= {"sub-a_run-1_lesion": label, "sub-a_dseg": tissues}
    save(tmp_path / "raw", {f"sub-a/anat/{name}.nii.gz": what for name, what in names.items()})
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    labelled = [volume for volume in data.read_index(str(tmp_path / "out")) if volume.label]
    assert len(labelled) == 1 and " 1:" in labelled[0].label_values
    assert "label maps left aside, since another one fits better: 1" in capsys.readouterr().out


def test_a_session_called_head_says_nothing_of_a_label():
    path = "sub-a/ses-head/anat/sub-a_ses-head_seg.nii.gz"
    assert sources.identify("bids", path).skip == "label"
    path = "sub-a/anat/sub-a_desc-brain_mask.nii.gz"
    assert sources.identify("bids", path).skip == "mask of the head"


def test_a_segmentation_that_is_called_the_heads_is_said(tmp_path, capsys):
    image, label = head(size=24)
    save(tmp_path / "raw", {"sub-a/anat/sub-a_FLAIR.nii.gz": image,
                            "sub-a/anat/sub-a_FLAIR_brain_seg.nii.gz": label})
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "files skipped though they hold lesion, seg or mask" in printed
    assert "sub-a_FLAIR_brain_seg.nii.gz" in printed
