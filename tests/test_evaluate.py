"""Evaluation: what the networks have seen, those of another task, the scan's own grid."""

import csv
import glob
import json
import math
import os
import shutil
import threading

import nibabel as nib
import numpy as np
import pytest
import torch.distributed as dist
from conftest import FINETUNE, mistake, run
from folders import TASK, read_case
from runs import Run

import checkpoint
import config
import evaluate
import finetune
import predict
import tasks
import training


@pytest.fixture(scope="module")
def sites(raw, tmp_path_factory):
    """Five subjects named as those of WMH, two of them test cases, one of those from another
    scanner; and a finished run."""
    folder = tmp_path_factory.mktemp("sites")
    scans = sorted(glob.glob(f"{raw}/sub-L*/**/*FLAIR.nii.gz", recursive=True))
    names = ["Utrecht_0", "Singapore_50", "Amsterdam-GE3T_100", "Utrecht_3",
             "Amsterdam-Philips_VU.PETMR_01_168"]
    with open(raw / "sites.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "subject", "session", "sequence", "label", "split"])
        for number, (scan, name) in enumerate(zip(scans, names, strict=True)):
            path = os.path.relpath(scan, raw)
            split = "test" if number > 2 else "train"
            writer.writerow([path, name, "", "FLAIR", path.replace("FLAIR", "lesion"), split])
    run("prepare_data", source="manifest", input=raw / "sites.csv", out=folder / "prepared",
        workers=1)

    # One task is trained; the other evaluates its networks.
    ood = TASK | {"networks": "few", "evaluate": "test", "sites": True}
    (folder / "few.yaml").write_text(json.dumps(TASK))
    (folder / "few_ood.yaml").write_text(json.dumps(ood))
    settings = FINETUNE | {"data": folder / "prepared", "model": "unet_demo", "steps": 2,
                           "workers": 0}
    run("finetune", task=folder / "few.yaml", out=folder / "few", **settings)
    return folder


# ------------------------------------------------------------------------------ what they have seen
def test_leakage_is_visible(finetuned, pretrained, prepared):
    out, _ = finetuned
    saw = checkpoint.load_checkpoint(pretrained)
    result = json.loads((out / "dice.json").read_text())
    records = [record for fold in result["folds"].values() for record in fold]
    for record in records:
        assert record["seen"] is record["same_scan"] is (record["subject"] in saw["subjects"])

    # The summary counts each case once, in however many folds it is.
    seen = {record["case"] for record in records if record["seen"]}
    clean = {record["case"] for record in records} - seen
    summary = (out / "summary.md").read_text()
    assert f"Of {len(seen | clean)} evaluated scans {len(seen)} were seen, unlabelled" in summary
    assert ("| not seen |" in summary) == bool(seen and clean)

    tuned = checkpoint.load_checkpoint(out / "fold_0" / "last.pt")
    for key in ("subjects", "sha256"):
        assert set(saw[key]) <= set(tuned[key])
    assert tuned["pretraining"]["mask_ratio"] == result["pretraining"]["mask_ratio"] == 0.6
    assert result["params"] == sum(tensor.numel() for tensor in tuned["model"].values())


# ------------------------------------------------------------------------ networks of another task
def test_a_task_evaluates_the_networks_of_another(sites):
    printed = run("finetune", task=sites / "few_ood.yaml", data=sites / "prepared",
                  model="unet_demo", networks=sites / "few", out=sites / "ood", overlap=0)
    assert "| other sites | 1 |" in printed and "| sites of the training set | 1 |" in printed
    assert not list(sites.glob("ood/**/*.pt")), "nothing was trained"

    trained, tested = (json.loads((sites / name / "folds.json").read_text())["folds"]
                       for name in ("few", "ood"))
    assert [fold["train"] for fold in trained] == [fold["train"] for fold in tested]

    first, second = (json.loads((sites / name / "dice.json").read_text())
                     for name in ("few", "ood"))
    for records in second["folds"].values():
        cases = [record["case"] for record in records]
        assert cases == ["Amsterdam-Philips_VU.PETMR_01_168", "Utrecht_3"]
        assert [r["site"] for r in records] == ["Amsterdam-Philips_VU.PETMR_01", "Utrecht"]
        assert [r["seen"] for r in records] == [False, False]
    assert second["sites"] == ["Amsterdam-GE3T", "Singapore", "Utrecht"]
    assert second["task"] == "few_ood" and second["config"]["steps"] == 2
    assert second["params"] == first["params"] > 0

    # The scores are those of the network of the fold.
    network, saved = predict.load_network(sites / "few" / "fold_1" / "last.pt", "cpu")
    cases = tasks.labelled_cases(str(sites / "prepared"), None, ("FLAIR",))
    case = next(case for case in cases if case.name == "Utrecht_3")
    volume, geometry, truth = read_case(case)
    found = predict.segment(network, volume, geometry, 32, overlap=0)
    scores = tasks.score_case(found, truth, saved["task"], geometry["affine"])
    for kind in scores:
        value = second["folds"]["1"][1][kind]["lesion"]
        expected = scores[kind]["lesion"]
        if math.isnan(expected):
            assert value is None
        else:
            assert value == pytest.approx(expected, abs=1e-6)


def test_networks_that_are_not_there_or_do_not_fit_are_refused(sites, tmp_path):
    settings = {"data": sites / "prepared", "model": "unet_demo", "task": sites / "few_ood.yaml",
                "networks": sites / "few", "out": tmp_path}
    other = (sites / "few_ood.yaml").read_text().replace('"lesion"', '"stroke"')
    (tmp_path / "other.yaml").write_text(other)
    for changed, message in (
            ({"networks": "/nowhere"}, "no run in /nowhere: first finetune.py --task few"),
            ({"model": "unet_b"}, "is of --ckpt None --model unet_demo"),
            ({"task": tmp_path / "other.yaml"}, "has other classes"),
            ({"estimate": "true"}, "nothing is left to train")):
        assert message in mistake("finetune", **settings | changed)


# --------------------------------------------------------------------------------- cost and signals
def test_an_estimate_takes_real_steps_and_touches_nothing(sites, tmp_path):
    settings = {"data": sites / "prepared", "task": sites / "few.yaml", "model": "unet_demo",
                "workers": 0, "steps": 50, "save_every": 1, "estimate": "true"}
    printed = run("finetune", out=tmp_path / "run", **FINETUNE | settings)
    assert "100 steps: 0.0" in printed and "; 2 cases: 0.00 hours more" in printed, "of both folds"
    assert not (tmp_path / "run").exists()


def test_a_signal_in_evaluation_leaves_no_scores(sites):
    cases = tasks.labelled_cases(str(sites / "prepared"), None, ("FLAIR",))[:1]
    stop = threading.Event()
    stop.set()
    processes = training.init_processes("cpu")
    try:
        _, task = tasks.read_task(str(sites / "few.yaml"))
        seen = finetune.data_seen({})
        records = evaluate.evaluate_fold(None, task, seen, cases, "", None, processes, stop, 2)
    finally:
        dist.destroy_process_group()
    assert records is None


# ------------------------------------------------------------------------------------- true labels
@pytest.mark.parametrize("axes", ["PSR", "RPI"])
def test_a_label_stored_on_other_axes_is_scored_on_the_scans(raw, tmp_path, axes):
    scan = sorted(glob.glob(f"{raw}/sub-L*/**/*FLAIR.nii.gz", recursive=True))[0]
    label = nib.load(scan.replace("FLAIR", "lesion"))
    wanted = nib.orientations.axcodes2ornt(axes)
    stored = nib.io_orientation(label.affine)
    turned = label.as_reoriented(nib.orientations.ornt_transform(stored, wanted))
    nib.load(scan).to_filename(tmp_path / "scan.nii.gz")
    turned.to_filename(tmp_path / "label.nii.gz")
    (tmp_path / "all.csv").write_text("path,subject,session,sequence,label\n"
                                      "scan.nii.gz,a,,FLAIR,label.nii.gz\n")
    run("prepare_data", source="manifest", input=tmp_path / "all.csv", out=tmp_path / "prepared",
        workers=1)
    case = tasks.labelled_cases(str(tmp_path / "prepared"), None, ("FLAIR",))[0]
    _, _, truth = read_case(case)
    assert np.array_equal(truth, np.asarray(label.dataobj))


def test_a_damaged_truth_stops_the_evaluation_in_one_line(finetuned, prepared, tmp_path):
    out, _ = finetuned
    shutil.copytree(prepared, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*_native.nii.gz"):
        path.write_bytes(path.read_bytes()[:60])
    shutil.copytree(out, tmp_path / "run")
    for path in (tmp_path / "run").glob("fold_*/dice.json"):
        path.unlink()

    settings = config.read_yaml(finetune.Config, out / "config.yaml")
    settings = {key: value for key, value in settings.items() if value is not None}
    settings |= {"data": tmp_path / "data", "out": tmp_path / "run"}
    output = Run("finetune", tmp_path / "output", **settings).finish(2)
    assert "error: cannot evaluate sub-" in output and "Traceback" not in output
