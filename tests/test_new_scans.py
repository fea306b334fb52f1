"""Which scans of a cohort are segmented: layouts, manifests, files as users call them."""

import json

import nibabel as nib
import numpy as np
import pytest

import new_scans
import phantom
from config import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def taken(found, folder):
    """{name: paths below the folder, joined}."""
    cut = len(str(folder)) + 1
    return {scan.name: " ".join(path[cut:] for path in scan.paths) for scan in found.scans}


# ----------------------------------------------------------------------------------------- layouts
def test_people_whose_names_differ_in_a_letter_stay_apart():
    assert new_scans.name_of("Müller, Hans", "") == "sub-Muller+Hans_ses-1"
    assert new_scans.name_of("Möller", "1") == "sub-Moller_ses-1"


def test_a_bids_folder_by_subject_and_session(tmp_path):
    for subject, session, suffixes in (("01", "ses-1/", "FLAIR T1w"), ("01", "ses-2/", "T1w"),
                                       ("02", "", "T1w FLAIR bold"), ("03", "", "FLAIR")):
        name = f"sub-{subject}_{session[:-1]}_" if session else f"sub-{subject}_"
        for suffix in suffixes.split():
            touch(tmp_path, f"sub-{subject}/{session}anat/{name}{suffix}.nii.gz")
    found = new_scans.find((str(tmp_path),), None, ("FLAIR", "T1"))
    assert taken(found, tmp_path) == {
        "sub-01_ses-1": "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz "
                        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-02_ses-1": "sub-02/anat/sub-02_FLAIR.nii.gz sub-02/anat/sub-02_T1w.nii.gz"}
    text = "\n".join(found.lines)
    assert "read as --source bids: 4 sessions; files left out: 1 fMRI" in text
    assert "no FLAIR, skipped: sub-01_ses-2" in text and "no T1, skipped: sub-03_ses-1" in text
    with pytest.raises(UserError, match="no session has T2, .* found: 3 FLAIR, 3 T1"):
        new_scans.find((str(tmp_path),), "bids", ("T2",))


def test_runs_and_true_label_maps_of_bids(tmp_path):
    """Of several runs the labelled one, as in preparation; labels may lie in another tree."""
    touch(tmp_path / "in", "sub-1/anat/sub-1_run-1_FLAIR.nii", "sub-1/anat/sub-1_run-2_FLAIR.nii",
          "sub-1/anat/sub-1_run-2_lesion.nii", "sub-2/anat/sub-2_FLAIR.nii",
          "sub-3/anat/sub-3_FLAIR.nii")
    touch(tmp_path / "true", "sub-1/anat/sub-1_run-2_lesion.nii", "sub-2/anat/sub-2_a_lesion.nii",
          "sub-2/anat/sub-2_b_lesion.nii")
    inputs = (str(tmp_path / "in"),)
    found = new_scans.find(inputs, None, ("FLAIR",))
    assert found.scans[0].paths[0].endswith("run-2_FLAIR.nii") and not found.faults
    assert any("several runs of a sequence" in line for line in found.lines)
    assert {scan.truth for scan in found.scans} == {""}

    found = new_scans.find(inputs, None, ("FLAIR",), truth=str(tmp_path / "true"))
    assert [scan.truth for scan in found.scans] == [
        f"{tmp_path}/true/sub-1/anat/sub-1_run-2_lesion.nii", ""]
    assert "several label maps could be its own" in found.faults["sub-2_ses-1"]


@pytest.mark.parametrize(("layout", "sequences", "parts"), [
    ("wmh", ("FLAIR", "T1"), (None, None)), ("msd", ("FLAIR", "T1ce"), None),
    ("nnunet", ("FLAIR", "T1"), (None, None)), ("brats21", ("T1ce",), (None,))])
def test_other_layouts_and_their_labels(tmp_path, layout, sequences, parts):
    phantom.write(layout, tmp_path, subjects=1, labelled=2, size=24)
    folder = str(next(tmp_path.iterdir())) if layout == "nnunet" else str(tmp_path)
    found = new_scans.find((folder,), layout, sequences, truth=folder)
    assert len(found.scans) == 3 and not found.faults
    assert sum(bool(scan.truth) for scan in found.scans) >= 2
    for scan in found.scans:
        assert len(scan.paths) == len(sequences)
        if parts:
            assert scan.parts == parts
        else:
            assert len(set(scan.paths)) == 1 and len(set(scan.parts)) == 2, "one 4-D file"


def test_a_manifest(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "c.nii", "a_true.nii")
    (tmp_path / "scans.csv").write_text(
        "path,subject,session,sequence,label\na.nii,P 1,,FLAIR,a_true.nii\nb.nii,P2,x,FLAIR,\n"
        "c.nii,P2,y,T1,\n")
    table = str(tmp_path / "scans.csv")
    found = new_scans.find((table,), None, ("FLAIR",), truth=table)
    assert taken(found, tmp_path) == {"sub-P+1_ses-1": "a.nii", "sub-P2_ses-x": "b.nii"}
    assert [scan.truth for scan in found.scans] == [f"{tmp_path}/a_true.nii", ""]
    with pytest.raises(UserError, match="give --truth .*scans.csv"):
        new_scans.find((table,), "manifest", ("FLAIR",), truth="elsewhere")


# ------------------------------------------------------------------------------------ plain files
def test_a_label_map_is_told_by_its_values_too(tmp_path):
    """A file whose name does not say what it is; a scan of the same type stays."""
    rng = np.random.default_rng(0)
    for name, most in (("scan5", 200), ("truth5", 3)):
        voxels = rng.integers(0, most, (16, 16, 16)).astype(np.uint8)
        nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / f"{name}.nii.gz")
    found = new_scans.find((str(tmp_path),), None, ("FLAIR",))
    assert taken(found, tmp_path) == {"sub-scan5_ses-1": "scan5.nii.gz"}
    assert "files left out: 1 with fewer than 64 values" in found.lines[0]


def test_a_folder_of_oddly_named_files(tmp_path):
    folder = touch(
        tmp_path, "patient1.nii.gz", "Müller (2).NII", "P7/flair.nii.gz", "P8/FLAIR.nii.gz",
        "T2_Flair.mgz", "x_0000.nii", "P7/t1.nii.gz", "P7/lesion.nii.gz", "P8/brain_mask.nii.gz",
        "derivatives/a.nii", "_old/b.nii", "notes.txt", "sub-4_ses-base_acq-3d_FLAIR.nii.gz")
    found = new_scans.find((folder,), None, ("FLAIR",))
    assert taken(found, tmp_path) == {
        "sub-Muller+2_ses-1": "Müller (2).NII", "sub-P7+flair_ses-1": "P7/flair.nii.gz",
        "sub-P8+FLAIR_ses-1": "P8/FLAIR.nii.gz", "sub-T2+Flair_ses-1": "T2_Flair.mgz",
        "sub-patient1_ses-1": "patient1.nii.gz", "sub-x_ses-1": "x_0000.nii",
        "sub-4_ses-base": "sub-4_ses-base_acq-3d_FLAIR.nii.gz"}
    line, = found.lines
    assert "read as plain files: each file is a scan of its own" in line
    for words in ("2 label map or mask", "1 named T1, not FLAIR", "1 in derivatives", "1 hidden"):
        assert words in line

    # What is named one by one is segmented, and said.
    mask = f"{folder}/P8/brain_mask.nii.gz"
    found = new_scans.find((f"{folder}/patient1.nii.gz", mask), None, ("FLAIR",))
    assert len(found.scans) == 2
    assert found.lines[1] == f"named as scans, though they sound like label maps: {mask}"


def test_files_of_several_channels(tmp_path):
    folder = touch(tmp_path, "a_0000.nii", "a_0001.nii", "b_0000.nii", "b_0002.nii", "c.nii")
    found = new_scans.find((folder,), None, ("FLAIR", "T1"))
    assert taken(found, tmp_path) == {"sub-a_ses-1": "a_0000.nii a_0001.nii"}
    text = "\n".join(found.lines)
    assert "end in _0000 FLAIR, _0001 T1" in text
    assert "skipped: b_0002.nii, c.nii" in text and "missing, skipped: b" in text
    with pytest.raises(UserError, match="CASE_0000.nii.gz and on"):
        new_scans.find((f"{folder}/c.nii",), None, ("FLAIR", "T1"))


@pytest.mark.parametrize("named", [False, True])
def test_numbers_of_one_channel_are_names(tmp_path, named):
    """nnU-Net's _0000 is none; scans that are counted by hand are scans of their own."""
    files = ("scan_0000.nii", "scan_0001.nii", "scan_0002.nii", "x_0003.nii.gz")
    folder = touch(tmp_path, *files)
    inputs = tuple(f"{folder}/{file}" for file in files) if named else (folder,)
    found = new_scans.find(inputs, None, ("FLAIR",))
    assert taken(found, tmp_path) == {
        "sub-scan_ses-1": "scan_0000.nii", "sub-scan+0001_ses-1": "scan_0001.nii",
        "sub-scan+0002_ses-1": "scan_0002.nii", "sub-x+0003_ses-1": "x_0003.nii.gz"}
    assert not found.faults and "skipped" not in "".join(found.lines)

    # Where a file has the name without it, _0000 stays.
    touch(tmp_path, "scan.nii")
    found = new_scans.find((*inputs, f"{folder}/scan.nii") if named else inputs, None, ("FLAIR",))
    assert len(found.scans) == 5 and not found.faults
    assert taken(found, tmp_path)["sub-scan+0000_ses-1"] == "scan_0000.nii"
    assert taken(found, tmp_path)["sub-scan_ses-1"] == "scan.nii"


def test_named_files_of_one_name_are_called_after_their_paths(tmp_path):
    folder = touch(tmp_path, "P1/flair.nii", "P2/flair.nii", "P3/other.nii",
                   "P4/sub-7_FLAIR.nii", "P5/sub-7_FLAIR.nii")
    files = tuple(f"{folder}/{path}" for path in (
        "P1/flair.nii", "P2/flair.nii", "P3/other.nii", "P4/sub-7_FLAIR.nii", "P5/sub-7_FLAIR.nii"))
    truth = touch(tmp_path / "true", "P2/flair_seg.nii", "other_seg.nii")
    found = new_scans.find(files, None, ("FLAIR",), truth)
    assert not found.faults
    assert [scan.name for scan in found.scans] == [
        "sub-P1+flair_ses-1", "sub-P2+flair_ses-1", "sub-other_ses-1",
        "sub-P4+sub+7+FLAIR_ses-1", "sub-P5+sub+7+FLAIR_ses-1"]
    assert tuple(scan.paths[0] for scan in found.scans) == files
    assert [scan.truth[len(truth) + 1:] for scan in found.scans] == [
        "", "P2/flair_seg.nii", "other_seg.nii", "", ""]

    # Of several channels, all files of a case go by their paths.
    touch(tmp_path, "P1/x_0000.nii", "P1/x_0001.nii", "P2/x_0000.nii")
    files = [f"{folder}/{path}" for path in ("P1/x_0000.nii", "P1/x_0001.nii", "P2/x_0000.nii")]
    found = new_scans.find(tuple(files), None, ("FLAIR", "T1"))
    assert [(scan.name, scan.paths) for scan in found.scans] == [
        ("sub-P1+x_ses-1", tuple(files[:2]))]
    assert any("a channel is missing, skipped: P2/x" in line for line in found.lines)


def test_names_that_would_be_one(tmp_path):
    folder = touch(tmp_path, "a.nii", "a.nii.gz", "b_1.nii", "b-1.nii", "c.nii")
    found = new_scans.find((folder,), None, ("FLAIR",))
    assert [scan.name for scan in found.scans] == ["sub-b+1_ses-1", "sub-c_ses-1"]
    assert "a.nii, " in found.faults["sub-a_ses-1"]
    assert "would be called sub-b+1_ses-1" in found.faults[f"{folder}/b_1.nii"]


def test_true_label_maps_of_plain_files(tmp_path):
    scans = touch(tmp_path / "in", "a.nii", "a_b.nii", "c_0000.nii", "d.nii", "e.nii",
                  "sub-1_ses-2_FLAIR.nii")
    truth = touch(tmp_path / "true", "a_seg.nii", "a_b_seg.nii", "c.nii.gz", "d_1.nii", "d-2.nii",
                  "e2.nii", "sub-1_ses-2_lesion.nii")
    found = new_scans.find((scans,), None, ("FLAIR",), truth)
    assert {scan.name: scan.truth[len(truth) + 1:] for scan in found.scans} == {
        "sub-a_ses-1": "a_seg.nii", "sub-a+b_ses-1": "a_b_seg.nii", "sub-c_ses-1": "c.nii.gz",
        "sub-e_ses-1": "", "sub-1_ses-2": "sub-1_ses-2_lesion.nii"}
    assert "d_1.nii" in found.faults["sub-d_ses-1"]

    # Beside the scans.
    touch(tmp_path / "in", "e_mask.nii")
    found = new_scans.find((scans,), None, ("FLAIR",), scans)
    truths = {scan.name: scan.truth for scan in found.scans}
    assert truths["sub-e_ses-1"] == f"{scans}/e_mask.nii" and not truths["sub-a_ses-1"]


def test_label_maps_are_looked_up_and_not_compared_with_every_scan(tmp_path, monkeypatch):
    names = [f"{kind}{n}" for n in range(40) for kind in ("a", "P/a", "sub-")]
    scans = touch(tmp_path / "in", *(f"{name}_FLAIR.nii" for name in names))
    truth = touch(tmp_path / "true", *(f"{name}_FLAIR_seg.nii" for name in names))
    known, asked = new_scans.BIDS_NAME, []

    class Counting:
        def match(self, text):
            asked.append(text)
            return known.match(text)

    monkeypatch.setattr(new_scans, "BIDS_NAME", Counting())
    found = new_scans.from_folder(scans, ("FLAIR",), truth)
    assert len(found.scans) == len(names) and len(asked) <= 4 * len(names)
    for scan in found.scans:
        assert scan.truth[len(truth):] == scan.paths[0][len(scans):].replace(".nii", "_seg.nii")


def test_inputs_that_cannot_be_meant(tmp_path):
    folder = touch(tmp_path / "in", "wmh.nii", "T1.nii")
    (tmp_path / "none").mkdir()
    (tmp_path / "x.json").write_text(json.dumps({}))
    for inputs, source, message in (
            ((folder,), None, "holds no scan by the names of its files: 1 .* --input FILE FILE"),
            ((folder, folder), None, "name one folder"), ((f"{folder}/T1.nii", folder), "", "one"),
            ((f"{folder}/T1.nii",), "bids", "is the layout of a folder"),
            ((f"{folder}/none.nii",), None, "no such file"), ((folder,), "bidz", "did you mean"),
            ((str(tmp_path / "none"),), None, "no .nii or .nii.gz file under")):
        with pytest.raises(UserError, match=message):
            new_scans.find(inputs, source, ("FLAIR",))


def test_files_that_are_not_there_are_faults_of_their_scans(tmp_path):
    """In a manifest, and as links that lead nowhere."""
    touch(tmp_path, "a.nii", "a_t1.nii", "b.nii", "b_t1.nii", "c.nii", "c_true.nii")
    (tmp_path / "d.nii").symlink_to("nowhere.nii")
    (tmp_path / "scans.csv").write_text(
        "path,subject,session,sequence,label\na.nii,a,,FLAIR,a_true.nii\na_t1.nii,a,,T1,\n"
        "b.nii,b,,FLAIR,\nb_t1.nii,b,,T1,\nc.nii,c,,FLAIR,c_true.nii\nc_t1.nii,c,,T1,\n"
        "d.nii,d,,FLAIR,\nb_t1.nii,d,,T1,\n")
    table = str(tmp_path / "scans.csv")
    found = new_scans.find((table,), None, ("FLAIR", "T1"), truth=table)
    assert [scan.name for scan in found.scans] == ["sub-b_ses-1"]
    assert found.faults == {
        "sub-a_ses-1": f"{tmp_path}/a_true.nii: no such file, but it is named as a true label map",
        "sub-c_ses-1": f"{tmp_path}/c_t1.nii: no such file, but it is named as a scan",
        "sub-d_ses-1": f"{tmp_path}/d.nii: no such file, but it is named as a scan"}
    found = new_scans.find((table,), None, ("FLAIR",))
    assert [scan.name for scan in found.scans] == ["sub-a_ses-1", "sub-b_ses-1", "sub-c_ses-1"]


# ----------------------------------------------------------------------- the same as in training
def test_a_sequence_by_another_of_its_words(tmp_path):
    """As in training, a task that says flair finds FLAIR, in a layout and in plain files."""
    raw = touch(tmp_path / "raw", "sub-1/anat/sub-1_FLAIR.nii", "sub-1/anat/sub-1_T1w.nii")
    found = new_scans.find((raw,), None, ("flair", "t1w"))
    assert taken(found, raw) == {
        "sub-1_ses-1": "sub-1/anat/sub-1_FLAIR.nii sub-1/anat/sub-1_T1w.nii"}

    plain = touch(tmp_path / "plain", "a_FLAIR.nii", "b_flair.nii", "c_T1.nii", "d.nii")
    for word in ("flair", "Flair", "FLAIR"):
        found = new_scans.find((plain,), None, (word,))
        assert list(taken(found, plain).values()) == ["a_FLAIR.nii", "b_flair.nii", "d.nii"]
        assert f"1 named T1, not {word}" in found.lines[0]


def test_runs_that_share_a_label_map_go_together(tmp_path):
    """As tasks.choose_channels has it: not the first labelled run of each sequence by itself."""
    (tmp_path / "scans.csv").write_text(
        "path,subject,session,sequence,label\nf1.nii,a,,FLAIR,l1.nii\nf2.nii,a,,FLAIR,l2.nii\n"
        "t2.nii,a,,T1,l2.nii\nt0.nii,a,,T1,\nf3.nii,b,,FLAIR,\nf4.nii,b,,FLAIR,\nt3.nii,b,,T1,\n")
    touch(tmp_path, "f1.nii", "f2.nii", "t2.nii", "t0.nii", "f3.nii", "f4.nii", "t3.nii")
    found = new_scans.find((f"{tmp_path}/scans.csv",), None, ("FLAIR", "T1"))
    assert list(taken(found, tmp_path).values()) == ["f2.nii t2.nii", "f3.nii t3.nii"]
    assert "of which one is taken: sub-a_ses-1, sub-b_ses-1" in found.lines[-1]


def test_two_subjects_of_one_name_are_the_fault_of_one(tmp_path):
    (tmp_path / "scans.csv").write_text("path,subject,session,sequence\na.nii,a_b,,FLAIR\n"
                                        "b.nii,a-b,,FLAIR\nc.nii,c,,FLAIR\n")
    folder = touch(tmp_path, "a.nii", "b.nii", "c.nii")
    found = new_scans.find((f"{folder}/scans.csv",), None, ("FLAIR",))
    assert taken(found, tmp_path) == {"sub-a+b_ses-1": "b.nii", "sub-c_ses-1": "c.nii"}
    assert found.faults == {f"{folder}/a.nii": "its results would be called sub-a+b_ses-1, as "
                                               f"those of {folder}/b.nii: rename it"}
