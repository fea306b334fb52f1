"""Every source's own tree: what its paths say, what is prepared of it, and Table 1."""

import contextlib
import csv
import io
import json
import os
from collections import Counter

import folders
import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, mistake, script
from inputs import head, prepare, tables

import data
import phantom
import preprocess
import records
import sources
import tasks

# -------------------------------------------------------------------------------- what a name says
CASES = json.loads((ROOT / "tests" / "golden" / "discovery_cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["path"][-40:])
def test_what_a_path_says(case):
    who = sources.identify(case["source"], case["path"])
    named = {"subject": who.subject, "session": who.session, "sequence": "".join(who.sequences)}
    assert (None if who.skip else named) == case["expect"]


@pytest.mark.parametrize(
    ("sequence", "names"),
    {
        "T1": "SAG FSPGR BRAVO, MPR____N3__Scaled, MT1__GradWarp__N3m, sT1W_3D_TFE, "
        "MPRAGE_GRAPPA2, SAG T1 SE, Spatially_Normalized__Masked_and_N3_corrected_T1",
        "FLAIR": "3D T2 FLAIR_MPR_Tra_1.5mm, COR/FLAIR/r, t2_tirm_tra_dark-fluid_, 3DT2FLAIR",
        "T2": "AX PD + T2, SG T2WI DS, sT2W/PD_TSE, *AX FSE T2",
        "T2star": "AXIAL_T2_STAR, Ax T2* GRE",
        "DWI": "2D DTI EPI FAT SHIFT LEFT, DTI_LR_TRACEW, ep2d_diff_LR, IsoDWI",
        "SWI": "minIP, Ax 3D SWAN GRE",
        "other": "T!, MR, PPMI 2.0, MRI BRAIN WO IVCON, 3D SAG",
        "-fMRI": "AX rsfMRI_LR, rsmriRL, ep2d_RESTING_STATE, BOLD_RS ACPC_LINE",
        "-localizer": "3-pl T2* FGRE, 3_Plane_Localizer",
        "-magnetisation transfer": "2D GRE-NM, NM-MT",
        "-perfusion": "Axial_3D_PASL__Eyes_Open_, Perfusion_Weighted, relCBF",
        "-calibration": "Field_Mapping, B1-calibration_Body",
        "-derived map": "DTI_LR_ColFA",
    }.items(),
)
def test_free_text_series(sequence, names):
    # In the table above: taken as a sequence, or skipped with a reason.
    skip = sequence.startswith("-")
    expected = sources.Series(skip=sequence[1:]) if skip else sources.Series(sequence)
    series = sources.read_layout("adni").series
    assert {name: sources.classify(name, series) for name in names.split(", ")} == dict.fromkeys(
        names.split(", "), expected)


# --------------------------------------------------------------------------- every source, Table 1
PEOPLE = {
    "isles22": (1, 4),
    "isles22_rawdata": (1, 3),
    "brats21": (1, 4),
    "wmh": (5, 3),
    "msseg1": (2, 2),
    "msd": (2, 1),
    "nnunet": (1, 3),
    "fomo60k": (1, 0),
    "oasis4": (1, 0),
}  # else: 2 without labels


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every source's tree, prepared into one folder: {layout: (truth, exit code, output)}."""
    folder, reports = tmp_path_factory.mktemp("sources"), {}
    for layout in phantom.LAYOUTS:
        truth = phantom.write(layout, folder / layout, *PEOPLE.get(layout, (2, 0)), size=32)
        source = layout.removesuffix("_rawdata")
        root = folder / layout / ("Dataset501_Lesions" if source == "nnunet" else "")
        out = folder / ("rawdata" if source != layout else "out")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = prepare(source, root, out)
        reports[layout] = truth, code, printed.getvalue()
    return folder, reports


@pytest.mark.parametrize("layout", phantom.LAYOUTS)
def test_counts_of_every_source(everything, layout):
    folder, reports = everything
    truth, code, printed = reports[layout]
    source = {"nnunet": "Dataset501_Lesions"}.get(layout, layout.removesuffix("_rawdata"))
    if layout == "nnunet":  # the input is the dataset's folder, not the one above it
        truth = {
            path.removeprefix(source + "/"): kind
            for path, kind in truth.items()
            if path.startswith(source)
        }
    kinds = Counter()
    for kind in truth.values():
        kinds[kind.split()[0]] += 4 if kind.endswith("x4") else 1
    taken, skipped = kinds["volume"] + kinds["test"], kinds["junk"] + kinds["label"]
    assert (
        f"{source}: {kinds.total()} found = {taken} prepared + {skipped} skipped by rule" in printed
    )
    assert f" + {kinds['reject']} rejected" in printed and code == 0
    rows = [
        v
        for v in data.read_index(str(folder / ("rawdata" if "raw" in layout else "out")))
        if v.source == source
    ]
    assert len(rows) == taken
    held_out = {"brats21": 2 * 4}.get(layout, 0)  # a quarter of 4, and 1 without label
    assert sum(v.split == "test" for v in rows) == kinds["test"] + held_out
    assert sum(bool(v.label) for v in rows) == {
        "isles22": 8,
        "isles22_rawdata": 6,
        "brats21": 16,
        "wmh": 16,
        "msseg1": 20,
        "msd": 4,
        "nnunet": 6,
    }.get(layout, 0)


def test_table_1(everything):
    folder, _ = everything
    table = records.table_1(str(folder / "out"))
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert rows["wmh"].startswith("| wmh | 3 (60) | 3 (60) | 6 (120) | FLAIR 3, T1 3 |"), (
        "no test case"
    )
    assert rows["msd"].startswith("| msd | 2 (266) | 2 (266) | 8 (1,064) |"), "imagesTs only"
    assert rows["brats21"].startswith("| brats21 | 3 (938) | 3 (938) | 12 (3,752) |")
    assert rows["isles22"].startswith("| isles22 | 5 (250) | 5 (250) | 15 (750) |"), (
        "all, held out or not"
    )
    assert rows["adni"].startswith("| adni | 2 (1,563) | 4 (8,019) | 12 (9,548) |")
    taken = [v for v in data.read_index(str(folder / "out")) if v.split != "test"]
    assert f"| {len(taken):,} (44,756) |" in rows["total"] and "(7,140) |" in rows["total"]
    assert "(16,040) |" in rows["total"] and len(
        data.pretraining_cases(str(folder / "out"))
    ) == len(taken)


def test_tasks_find_their_cases(everything):
    """25 % held out for BraTS21, set aside for ISLES22; WMH's scanner in the subject's name."""
    folder = str(everything[0] / "out")
    wmh = tasks.labelled_cases(folder, "wmh", ("FLAIR",))
    assert sorted({c.volumes[0].split for c in wmh}) == ["test", "train"] and len(wmh) == 8
    assert "wmh/Amsterdam-Philips_VU.PETMR_01_1" in {c.subject for c in wmh}
    assert [len(tasks.labelled_cases(folder, "isles22", (s,))) for s in ("DWI", "FLAIR")] == [3, 0]
    splits = Counter(
        c.volumes[0].split for c in tasks.labelled_cases(folder, "brats21", ("FLAIR", "T1ce"))
    )
    assert splits == {"train": 3, "test": 1}
    _, geometry, truth = folders.read_case(wmh[0])
    assert set(np.unique(truth)) == {0, 1, 2} and list(truth.shape) == geometry["shape"]


def test_nnunet_becomes_a_task(everything):
    name, task = tasks.read_task(str(everything[0] / "out" / "Dataset501_Lesions.yaml"))
    assert name == "Dataset501_Lesions" and task.sequences == ("FLAIR", "T1")
    assert task.classes == ("background", "lesion") and task.labels == {0: 0, 1: 1}
    cases = tasks.labelled_cases(task.data, task.source, task.sequences)
    assert [c.subject.split("/")[1] for c in cases] == ["sub02", "sub_01", "sub_03"]


@pytest.mark.parametrize(
    ("labels", "classes", "regions", "ignore"),
    [
        ({"0": "background", "1": "edema", "2": "core"}, ["background", "edema", "core"], {}, []),
        (
            {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
            ["background", "label 1", "core"],
            {"whole": [1, 2]},
            [3],
        ),
    ],
)
def test_labels_of_nnunet(labels, classes, regions, ignore, tmp_path):
    known = {"modality": {"0": "MRI", "1": "MRI"}, "labels": labels}
    (tmp_path / "dataset.json").write_text(json.dumps(known))
    channels, task = sources.read_dataset(str(tmp_path))
    assert (task["classes"], task["regions"], task["ignore"]) == (classes, regions, ignore)
    assert channels == {"0000": "0-MRI", "0001": "1-MRI"}


def test_dry_run_lists_and_writes_nothing(everything, tmp_path, capsys):
    folder, reports = everything
    truth = reports["oasis3"][0]
    prepare("oasis3", folder / "oasis3", tmp_path / "o", dry_run=True)
    printed = capsys.readouterr().out
    for path, kind in truth.items():
        assert f"{'skip' if kind == 'junk' else 'take'} {path}: " in printed
    assert "estimate from" in printed and not (tmp_path / "o").exists()


def test_dry_run_of_nnunet_writes_no_task(everything, tmp_path, capsys):
    prepare("nnunet", everything[0] / "nnunet" / "Dataset501_Lesions", tmp_path / "o", dry_run=True)
    assert "FLAIR, train, label" in capsys.readouterr().out and not (tmp_path / "o").exists()


def test_brats21_layout_holds_out_a_quarter(tmp_path):
    script(
        "tests/phantom.py", out=tmp_path / "raw", subjects=1, labelled=4, layout="brats21", size=32
    )
    result = script(
        "prepare_data.py", source="brats21", input=tmp_path / "raw", out=tmp_path / "out"
    )
    assert "24 found = 20 prepared + 4 skipped by rule (label 4) + 0 rejected" in result.stdout
    rows = tables(tmp_path / "out", "index")
    held = {r["subject"] for r in rows if r["split"] == "test"}
    assert len(held) == 1 + 1, "a quarter of the labelled, and those that the challenge holds back"
    assert not held & {r["subject"] for r in rows if r["split"] != "test"}
    cases = tasks.labelled_cases(str(tmp_path / "out"), "brats21", ("FLAIR", "T1ce"))
    assert len(cases) == 4 and all(len({v.shape for v in case.volumes}) == 1 for case in cases)
    assert len(data.pretraining_cases(str(tmp_path / "out"))) == 12


# ------------------------------------------------------------------------------------ other inputs
def test_a_second_label_map_is_named_and_a_brain_mask_is_none(tmp_path, capsys):
    image, label = head(size=24)
    for name, file in (
        ("sub-1/anat/sub-1_FLAIR", image),
        ("sub-1/anat/sub-1_lesion", label),
        ("sub-1/anat/sub-1_space-x_dseg", label),
        ("derivatives/prep/sub-1/anat/sub-1_desc-brain_mask", label),
    ):
        path = tmp_path / "raw" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        file.to_filename(path)
    prepare("bids", tmp_path / "raw", tmp_path / "out", dry_run=True)
    printed = capsys.readouterr().out
    assert (
        "sub-1_space-x_dseg.nii.gz is not used: sub-1/anat/sub-1_lesion.nii.gz is the label"
        in printed
    )
    assert "label sub-1/anat/sub-1_lesion.nii.gz" in printed and "1 prepared" not in printed


def test_dicom_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "IM_0001.dcm").write_text("DICM")
    assert "1 of DICOM: run dcm2niix first" in mistake(
        "prepare_data", source="ppmi", input=tmp_path
    )


def test_manifest(raw, tmp_path):
    labelled = sorted(raw.rglob("*lesion.nii.gz"))[0]
    with open(tmp_path / "scans.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("path", "subject", "session", "sequence", "label"),
                (str(labelled).replace("lesion", "FLAIR"), "anna", "1", "FLAIR", str(labelled)),
                (os.path.relpath(next(raw.rglob("*T1w.nii.gz")), tmp_path), "bert", "", "T1", ""),
            ]
        )
    result = script(
        "prepare_data.py", source="manifest", input=tmp_path / "scans.csv", out=tmp_path / "out"
    )
    assert "2 found = 2 prepared" in result.stdout
    assert [(r["subject"], r["split"]) for r in tables(tmp_path / "out", "index")] == [
        ("anna", "train"),
        ("bert", "pretrain"),
    ]


def test_manifest_of_a_spreadsheet_with_packed_pairs(tmp_path):
    image, _ = head(size=40)
    nib.Nifti1Pair(np.asarray(image.dataobj), image.affine).to_filename(tmp_path / "scan.img.gz")
    (tmp_path / "scans.csv").write_text(
        "path,subject,session,sequence\nscan.img.gz,a,1,FLAIR\n", encoding="utf-8-sig"
    )
    assert prepare("manifest", tmp_path / "scans.csv", tmp_path / "out") == 0
    (row,) = data.read_index(str(tmp_path / "out"))
    volume, _ = preprocess.preprocess(image)
    assert np.abs(np.load(tmp_path / "out" / row.path) - volume).max() < 1e-3


def test_linked_folders_are_walked(raw, tmp_path):
    (tmp_path / "links").mkdir()
    for folder in raw.glob("sub-*"):
        (tmp_path / "links" / folder.name).symlink_to(folder)
    linked, plain = (
        list(sources.find_nifti_files(str(folder))) for folder in (tmp_path / "links", raw)
    )
    assert linked == plain != []
