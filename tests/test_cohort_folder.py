"""predict.py --input: the folder of the results; whose files they are, and what is overwritten."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, mistake
from test_predict_inputs import AFFINE, head, network
from test_segment_cohort import contents, drawn, rows, segment

import checkpoint
import derivatives
import networks
import phantom
import predict
import segment_cohort
from config import UserError
from new_scans import NewScan


def bids(folder, *subjects):
    """A scan of each subject in BIDS, with a description of the dataset."""
    for subject in subjects:
        path = folder / f"sub-{subject}" / "anat" / f"sub-{subject}_FLAIR.nii"
        path.parent.mkdir(parents=True)
        nib.Nifti1Image(head(), AFFINE).to_filename(path)
    described = {"Name": "Raw", "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    (folder / "dataset_description.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def one(tmp_path):
    """The settings of a call on two scans."""
    return {"ckpt": network(tmp_path / "net.pt"), "input": bids(tmp_path / "raw", "1", "2"),
            "out": tmp_path / "out", "overlap": 0, "workers": 0}


# ------------------------------------------------------------------------------- whose folder it is
def test_results_do_not_go_among_the_scans(one):
    raw = one["input"]
    (raw / ".part-of-notes").write_text("kept")
    (raw / "sub-1" / ".part7-sub-1_FLAIR.nii").write_text("kept")
    table = raw / "scans.csv"
    table.write_text("path,subject,session,sequence\nsub-1/anat/sub-1_FLAIR.nii,1,,FLAIR\n")
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}

    def refused(out, given=raw):
        return mistake("predict", **(one | {"input": given, "out": out}))

    for described in (True, False):
        if not described:
            (raw / "dataset_description.json").unlink()
            del before[raw / "dataset_description.json"]
        assert "out" in refused(raw) and "derivatives/segmented" in refused(raw)
        assert "is the folder of a subject to read" in refused(raw / "sub-1")
        for given in (table, raw / "sub-1", raw / "sub-2" / "anat" / "sub-2_FLAIR.nii"):
            assert "which is read: choose another folder" in refused(raw, given)
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before

    # Below the derivatives of the dataset is where BIDS wants them.
    inside = one | {"out": raw / "derivatives" / "segmented"}
    assert "segmented 2 of 2 scans" in segment(**inside)
    assert "scans: 2, of which finished before: 2" in segment(**inside)


def test_a_folder_of_somebody_else_is_left_alone(one):
    out = one["out"]
    for name, content in (("dataset_description.json", json.dumps({"Name": "fmriprep"})),
                          ("dataset_description.json", "[]"), ("volumes.csv", "mine"),
                          ("dseg.tsv", "mine")):
        out.mkdir()
        (out / name).write_text(content)
        assert f"has a {name} that predict.py has not written" in mistake("predict", **one)
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == content
        shutil.rmtree(out)

    # In a folder of ours, files that are called as if they were temporary may be others'.
    segment(**one)
    anat = out / "sub-1" / "ses-1" / "anat"
    kept = [out / ".part", out / ".partners.csv", anat / ".part12-notes.txt", out / ".part-x"]
    half = [out / ".part12-volumes.csv",
            anat / ".part9-sub-1_ses-1_space-orig_label-lesion_dseg.nii.gz"]
    for path in (*kept, *half):
        path.write_text("half")
    assert "finished before: 2" in segment(**one)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in half)


# ---------------------------------------------------------------------------- what is overwritten
def test_probabilities_of_another_network_do_not_stay(one, tmp_path):
    other = one | {"ckpt": drawn(tmp_path / "other.pt", 1)}
    segment("--probabilities", **one)
    first = {name: content for name, content in contents(one["out"]).items() if "probseg" in name}
    segment("--overwrite", **other)
    assert len(first) == 2 and not list(one["out"].rglob("*probseg*"))
    assert "finished before: 0" in segment("--probabilities", **other)
    second = contents(one["out"])
    assert all(second[name] != content for name, content in first.items())
    assert "finished before: 2" in segment("--probabilities", **other)


def test_what_others_made_is_removed_at_the_start(one, tmp_path):
    """Also of scans that this call does not name, and of networks with another name of the label:
    so the same call without --overwrite goes on."""
    saved = checkpoint.load_checkpoint(one["ckpt"])
    saved["task"]["classes"] = ("background", "wmh")
    checkpoint.save_checkpoint(tmp_path / "wmh.pt", saved)
    segment("--probabilities", **(one | {"ckpt": tmp_path / "wmh.pt"}))

    scan = one["input"] / "sub-1" / "anat" / "sub-1_FLAIR.nii"
    line = "all results of other networks are removed"
    said = segment("--overwrite", **(one | {"input": scan}))
    assert line in said and "those of 2 scans" in said
    assert not list(one["out"].rglob("*wmh*"))
    assert [row["scan"] for row in rows(one["out"])] == ["sub-1_ses-1"]
    said = segment(**one)
    assert "scans: 2, of which finished before: 1" in said and line not in said
    assert [row["class"] for row in rows(one["out"])] == ["lesion", "lesion"]
    assert line not in segment("--overwrite", **one)


def test_the_table_of_an_overwriting_call_that_is_killed(one, tmp_path, monkeypatch):
    """While it lasts, volumes.csv has the rows of what is finished, in columns that stay."""
    truth = tmp_path / "truth"
    for subject in ("1", "2"):
        path = truth / f"sub-{subject}" / "anat" / f"sub-{subject}_lesion.nii"
        path.parent.mkdir(parents=True)
        nib.Nifti1Image((head() > 350).astype("uint8"), AFFINE).to_filename(path)
    append = derivatives.append_rows
    tables = []

    def watch(out, record, columns):
        tables.append((out / "volumes.csv").read_text().splitlines())
        append(out, record, columns)
        tables.append((out / "volumes.csv").read_text().splitlines())

    monkeypatch.setattr(derivatives, "append_rows", lambda out, *rest: watch(Path(out), *rest))
    for given in (one | {"truth": truth}, one):
        tables.clear()
        segment("--overwrite", **given)
        assert [len(table) for table in tables] == [1, 2, 2, 3]
        final = (one["out"] / "volumes.csv").read_text().splitlines()
        assert tables[-1] == final and ("dice" in final[0]) == ("truth" in given)
        assert all(table == final[:len(table)] for table in tables)


def test_a_truth_that_has_gone_stops_no_other_scan(one, tmp_path):
    """And what was found in its scan before stays."""
    table = tmp_path / "raw" / "scans.csv"
    table.write_text("path,subject,session,sequence,label\n"
                     "sub-1/anat/sub-1_FLAIR.nii,1,,FLAIR,true.nii\n"
                     "sub-2/anat/sub-2_FLAIR.nii,2,,FLAIR,\n")
    truth = nib.Nifti1Image((head() > 350).astype("uint8"), AFFINE)
    truth.to_filename(tmp_path / "raw" / "true.nii")
    given = one | {"input": table, "truth": table}
    segment(**given)
    before = contents(one["out"])

    (tmp_path / "raw" / "true.nii").unlink()
    said = segment(code=1, **given)
    assert said.count("not segmented: ") == said.count("true.nii: no such file") == 1
    assert "scans: 1, of which finished before: 1" in said
    assert contents(one["out"]) == before


def test_the_file_that_goes_while_others_are_read_is_named(one, tmp_path):
    scan = NewScan("s", (str(one["input"] / "sub-1/anat/sub-1_FLAIR.nii"),), (None,),
                   str(tmp_path / "gone.nii"))
    with pytest.raises(UserError, match="gone.nii: No such file"):
        segment_cohort.read(scan, {})


# ------------------------------------------------------------------------------------- the networks
class Moving(torch.nn.Module):
    """A network that runs out of memory; it knows where it was moved."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.places = []

    def to(self, place):
        self.places.append(str(place))
        return self

    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_member_leaves_the_device_after_an_error():
    models = [Moving(), Moving()]
    members = [predict.Member(model, 32, "fp32") for model in models]
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            predict.segment_together(members, torch.rand(1, 32, 32, 32), (32, 32, 32),
                                     torch.device("cpu", 0))
    assert models[0].places == ["cpu:0", "cpu"] * 2 and models[1].places == []


def test_without_workers_the_network_keeps_its_threads(one):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        segment(**one)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_left_and_right_are_whole_words():
    def check(*classes):
        networks.check_mirror(True, {"classes": ("background", *classes), "regions": {}})

    check("bright lesion", "copyright", "cleft", "leftover", "Bright")
    for name in ("left stroke", "hippocampus_right", "left_hippocampus", "LEFT-1", "Right",
                 "LeftHippocampus", "hippocampusLeft", "left2"):
        with pytest.raises(UserError, match=f"{name} is another class in the mirror"):
            check(name)


# --------------------------------------------------------------------------------------- 4-D files
def test_the_picture_of_a_cohort_of_4d_files(tmp_path, monkeypatch):
    """As those of --source msd: the record says which volume of a file was read."""
    pytest.importorskip("matplotlib")
    phantom.write("msd", tmp_path / "raw", subjects=0, labelled=2, size=28)
    ckpt = network(tmp_path / "net.pt", ("T1ce",))
    out = tmp_path / "out"
    given = {"ckpt": ckpt, "input": tmp_path / "raw", "source": "msd", "out": out}
    segment(**given)
    assert "finished before: 2" in segment(**given)
    records = [json.loads(path.read_text()) for path in out.rglob("*dseg.json")]
    assert [record["parts"] for record in records] == [[2], [2]]

    drawn_slices = []
    monkeypatch.setattr(sys, "argv", ["figures.py", "cohort", str(out), "--out",
                                      str(tmp_path / "cohort.png")])
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"), run_name="figures")
    figures["main"]()
    assert (tmp_path / "cohort.png").read_bytes()[1:4] == b"PNG"
    figures["draw_case"].__globals__["draw_slice"] = lambda *given: drawn_slices.append(given[1])
    for record in records:
        figures["draw_case"](None, str(out), record["scan"])
        image = nib.as_closest_canonical(nib.load(record["files"][0][0])).get_fdata()
        assert np.array_equal(drawn_slices[-1], image[..., 2])
