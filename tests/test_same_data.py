"""A run goes on with the data that it began with, and what its data lack is said before the first step."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import mistake
from folders import TASK, TINY, lesion, prepare, write_index
from test_finetune import run

import checkpoint
import config
import data
import finetune
import pretrain


@pytest.fixture(scope="module")
def labels():
    return {name: lesion(at=at) for name, at in zip("abcde", (6, 8, 10, 12, 14), strict=True)}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "mine.yaml"
    path.write_text(json.dumps(TASK))
    return path


@pytest.fixture(scope="module")
def first(labels, mine, tmp_path_factory):
    """A prepared folder, and a finished run on it."""
    folder = tmp_path_factory.mktemp("first")
    prepare(folder / "data", labels)
    run("finetune", task=mine, data=folder / "data", out=folder / "run", **TINY)
    return folder


@pytest.fixture
def again(first, mine, tmp_path):
    """A copy of that run, and the command that made it."""
    shutil.copytree(first / "run", tmp_path / "run")
    return TINY | {"task": mine, "data": first / "data", "out": tmp_path / "run"}


def cut(folder, fold=0, step=2):
    """As if the run had been killed at a step of a fold."""
    (folder / f"fold_{fold}" / "dice.json").unlink()
    path = folder / f"fold_{fold}" / "last.pt"
    saved = checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(path, saved | {"step": step})


def test_a_run_says_what_it_was_made_of(first):
    inputs = json.loads((first / "run" / "inputs.json").read_text())
    by_subject = {volume.subject: volume for volume in data.read_index(str(first / "data"))}
    assert inputs["ckpt"] is None and sorted(inputs["cases"]) == ["a_1", "b_1", "c_1", "d_1", "e_1"]
    for records in json.loads((first / "run" / "dice.json").read_text())["folds"].values():
        for record in records:
            volume = by_subject[record["case"][0]]
            assert record["sha256"] == inputs["cases"][record["case"]]["sha256"] == [volume.sha256]
            assert record["label_sha256"] == inputs["cases"][record["case"]]["label_sha256"]
            assert record["label_sha256"] == volume.label_sha256
    folds = json.loads((first / "run" / "folds.json").read_text())["folds"]
    saved = checkpoint.load_checkpoint(first / "run" / "fold_1" / "last.pt")
    assert saved["inputs"] == {name: inputs["cases"][name] for name in folds[1]["train"]}


@pytest.mark.parametrize("state", ["finished", "cut"])
@pytest.mark.parametrize("change", ["label", "scan", "shape"])
def test_a_run_is_not_continued_on_other_data(again, labels, tmp_path, state, change):
    """Corrected labels, or another --data: finished folds would print the scores of the old data, and a cut
    fold would go on with the new."""
    other = prepare(tmp_path / "other", labels | ({"b": lesion(at=9)} if change == "label" else {}))
    volumes = data.read_index(str(other))
    changed = {"label": {}, "scan": {"sha256": "another"}, "shape": {"shape": "9x9x9"}}[change]
    write_index(other, [v._replace(**changed) if v.subject == "b" else v for v in volumes])
    if state == "cut":
        cut(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    line = mistake("finetune", **again | {"data": other})
    word = {"label": "label", "scan": "scan", "shape": "prepared volume"}[change]
    assert f"has folds of other data (another {word} of b_1): new --out, or the old data" in line
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_cut_fold_knows_its_data_by_itself(again, labels, tmp_path):
    trained = json.loads((tmp_path / "run" / "folds.json").read_text())["folds"][0]["train"]
    other = prepare(tmp_path / "other", labels | {trained[0][0]: lesion(at=9)})
    cut(tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()
    line = mistake("finetune", **again | {"data": other})
    assert f"fold_0/last.pt is of a run on other data (another label of {trained[0]}" in line

    # Of an earlier version: it knows the scans alone.
    path = tmp_path / "run" / "fold_0" / "last.pt"
    saved = checkpoint.load_checkpoint(path)
    del saved["inputs"]
    checkpoint.save_checkpoint(path, saved)
    rows = [volume._replace(sha256=f"another {volume.sha256}") for volume in data.read_index(str(other))]
    write_index(other, rows)
    (tmp_path / "run" / "inputs.json").unlink(missing_ok=True)
    line = mistake("finetune", **again | {"data": other})
    assert "fold_0/last.pt is of a run on other data: new --out, or the old data" in line


def test_the_same_data_elsewhere_is_the_same(again, first, tmp_path):
    shutil.copytree(first / "data", tmp_path / "moved")
    cut(tmp_path / "run")
    run("finetune", **again | {"data": tmp_path / "moved"})
    assert ((tmp_path / "run" / "inputs.json").read_text() == (first / "run" / "inputs.json").read_text())
    assert (tmp_path / "run" / "fold_0" / "dice.json").exists()
    shutil.rmtree(tmp_path / "moved" / "volumes")
    printed = run("finetune", **again | {"data": tmp_path / "moved"})
    assert "mean ± SD" in printed, "what is finished needs no volumes any more"


def test_runs_and_folders_of_earlier_versions_go_on(again, first, labels, tmp_path):
    """Neither the run folder nor the prepared folder says what labels there were. A folder that is prepared
    again meanwhile does, but whether they are those of then, nobody knows: this is said each time."""
    old = prepare(tmp_path / "old", labels, data.Volume._fields[:-2])
    (tmp_path / "run" / "inputs.json").unlink()
    for fold in range(2):
        path = tmp_path / "run" / f"fold_{fold}" / "last.pt"
        saved = checkpoint.load_checkpoint(path)
        del saved["inputs"]
        checkpoint.save_checkpoint(path, saved)
        path = path.with_name("dice.json")
        records = json.loads(path.read_text())
        for record in records:
            del record["sha256"], record["label_sha256"]
        path.write_text(json.dumps(records))
    cut(tmp_path / "run")
    printed = run("finetune", **again | {"data": old})
    assert "mean ± SD" in printed and "has folds of an earlier version" in printed
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())["cases"]
    assert {case["label_sha256"] for case in inputs.values()} == {""}

    for data_of in (again, again | {"data": old}, again):
        printed = run("finetune", **data_of)
        known = json.loads((tmp_path / "run" / "inputs.json").read_text())["cases"]
        assert {case["label_sha256"] for case in known.values()} == {""}, "never taken for verified"
    assert f"the labels of {len(known)} cases were not recorded when the folds in" in printed


def test_networks_are_evaluated_on_the_data_they_were_trained_on(first, labels, tmp_path):
    """Of another run's networks the trained cases must be the same; those evaluated are this run's own."""
    task = tmp_path / "mine_ood.yaml"
    task.write_text(json.dumps(TASK | {"networks": "mine"}))
    settings = {"task": task, "model": "unet_demo", "features": 4, "networks": first / "run", "overlap": 0}
    folds = json.loads((first / "run" / "folds.json").read_text())["folds"]
    trained = {name for fold in folds for name in fold["train"]}
    fresh = min(set(labels) - {name[0] for name in trained})
    other = prepare(tmp_path / "evaluated", labels | {fresh: lesion(at=9)})
    run("finetune", data=other, out=tmp_path / "fresh", **settings)
    line = mistake("finetune", data=first / "data", out=tmp_path / "fresh", **settings)
    assert f"has folds of other data (another label of {fresh}_1)" in line
    trained = min(folds[0]["train"])
    other = prepare(tmp_path / "trained", labels | {trained[0]: lesion(at=9)})
    line = mistake("finetune", data=other, out=tmp_path / "refused", **settings)
    assert f"was trained on other data (another label of {trained}" in line
    assert "finetune mine again, or the old data" in line


def test_scores_of_networks_that_were_trained_again_are_not_printed(first, tmp_path):
    networks, task = tmp_path / "networks", tmp_path / "mine_ood.yaml"
    shutil.copytree(first / "run", networks)
    task.write_text(json.dumps(TASK | {"networks": "mine"}))
    settings = {"task": task, "model": "unet_demo", "features": 4, "networks": networks, "overlap": 0,
                "data": first / "data", "out": tmp_path / "scores"}
    run("finetune", folds=0, **settings)
    for fold, refused in ((1, False), (0, True)):  # fold 1 has no score yet
        path = networks / f"fold_{fold}" / "last.pt"
        saved = checkpoint.load_checkpoint(path)
        saved["model"] = {name: tensor + 1 for name, tensor in saved["model"].items()}
        checkpoint.save_checkpoint(path, saved)
        if refused:
            assert "has scores of another network of fold 0" in mistake("finetune", **settings)
        else:
            run("finetune", folds=0, **settings)


def test_folds_of_one_run_start_from_one_checkpoint(first, mine, tmp_path):
    """Pretraining that went on between two folds would give them different starts."""
    settings = TINY | {"task": mine, "data": first / "data", "out": tmp_path / "run", "steps": 1,
                       "ckpt": tmp_path / "last.pt"}
    saved = checkpoint.load_checkpoint(first / "run" / "fold_0" / "last.pt")
    checkpoint.save_checkpoint(tmp_path / "last.pt", saved)
    run("finetune", folds=0, **settings)
    run("finetune", folds=1, **settings)
    saved["model"] = {name: tensor + 1 for name, tensor in saved["model"].items()}
    checkpoint.save_checkpoint(tmp_path / "last.pt", saved)
    line = mistake("finetune", folds=1, **settings)
    assert "has folds that started from another --ckpt: the file has changed since" in line
    torch.save({"state_dict": saved["model"]}, tmp_path / "foreign.pth")
    assert checkpoint.checksum(tmp_path / "foreign.pth") == checkpoint.checksum(tmp_path / "foreign.pth")
    for name in ("foreign.pth", "last.pt"):
        assert len(checkpoint.checksum(tmp_path / name)) == 64


def test_an_unknown_value_stops_before_the_first_step(labels, mine, tmp_path):
    label = lesion()
    label[20:22, 20:22, 20:22] = 3
    folder = prepare(tmp_path / "data", labels | {"c": label})
    line = mistake("finetune", task=mine, data=folder, out=tmp_path / "run", **TINY)
    assert "c_1 has 8 voxels of label value 3" in line and "`ignore: [3]`" in line
    assert not (tmp_path / "run").exists()
    old = prepare(tmp_path / "old", labels | {"c": label}, data.Volume._fields[:-2])
    with pytest.raises(config.UserError, match="do not name"):  # later, since the index does not say
        run("finetune", task=mine, data=old, out=tmp_path / "run", **TINY)


def test_empty_labels_are_said_or_refused(labels, mine, tmp_path):
    empty = np.zeros((30, 30, 30), np.uint8)
    some = prepare(tmp_path / "some", labels | {"c": empty})
    printed = run("finetune", task=mine, data=some, out=tmp_path / "run", **TINY | {"estimate": "true"})
    assert "1 of 5 cases have no foreground voxel, c_1 the first\n" in printed
    none = prepare(tmp_path / "none", dict.fromkeys(labels, empty))
    line = mistake("finetune", task=mine, data=none, out=tmp_path / "run", **TINY)
    assert "fold 0 would be trained on no foreground at all" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("lost", ["volumes/mine/b_1_FLAIR.npy", "labels/mine/b_1_FLAIR.npy",
                                  "labels/mine/b_1_FLAIR_native.nii.gz", "geometry/mine/b_1_FLAIR.json"])
def test_lost_files_are_named_before_the_first_step(labels, mine, tmp_path, lost):
    folder = prepare(tmp_path / "data", labels)
    (folder / lost).unlink()
    line = mistake("finetune", task=mine, data=folder, out=tmp_path / "run", **TINY)
    assert f"lacks 1 files that its index names, the first {folder / lost}" in line
    shutil.rmtree((folder / lost).parent)
    line = mistake("finetune", task=mine, data=folder, out=tmp_path / "run", **TINY)
    assert "files that its index names" in line
    assert not (tmp_path / "run").exists()


def test_too_few_subjects_says_how_many_there_are(first, mine, tmp_path):
    line = mistake("finetune", task=mine, data=first / "data", out=tmp_path, **TINY | {"n_train": 5})
    assert "trains on 5 subjects and needs more" in line and "has 5 with labels: --n_train 4 or less" in line


def test_runs_scored_on_other_labels_are_not_compared(first, labels, mine, tmp_path):
    other = prepare(tmp_path / "other", labels | {"b": lesion(at=9), "c": lesion(at=9)})
    run("finetune", task=mine, data=other, out=tmp_path / "run", **TINY | {"steps": 1})
    line = mistake("compare", first / "run", tmp_path / "run")
    assert "were scored on different data (another label of" in line


# -------------------------------------------------------------------------------------- pretraining
def pretraining(folder, **changes):
    return pretrain.Config(**{"data": str(folder), "val_fraction": 0.2} | changes)


def test_pretraining_checks_its_data_before_the_first_step(labels, tmp_path):
    folder = prepare(tmp_path / "data", labels)

    def open_data(val_fraction=0.2):
        return pretrain.open_data(str(folder), val_fraction, seed=0)

    train, validation, held = open_data()
    assert (len(train), len(validation), len(held)) == (4, 1, 1)
    assert pretrain.shared_files(train, validation) == []
    with pytest.raises(config.UserError, match="5 volumes of 5 subjects, and val_fraction 1.0 holds out all"):
        open_data(val_fraction=1.0)

    volumes = data.read_index(str(folder))
    write_index(folder, [volume._replace(sha256="one") for volume in volumes])
    line, = pretrain.shared_files(*open_data()[:2])
    assert line.startswith("1 of 1 held-out volumes are trained on, too: the first is vol")
    write_index(folder, [volume._replace(split="test") for volume in volumes])
    with pytest.raises(config.UserError, match="no volume to pretrain on: all are of the split test"):
        open_data()
    write_index(folder, volumes)
    (folder / volumes[1].path).unlink()
    with pytest.raises(config.UserError, match="lacks 1 files that its index names"):
        open_data()


def test_a_pretraining_on_other_data_is_not_continued(labels, tmp_path):
    """Beside the scans that are trained on, which checkpoints always knew: those held out, and the boxes."""
    folder = prepare(tmp_path / "data", labels)
    small = {"model": "unet_demo", "features": 4, "patch_size": 32, "batch_size": 2, "steps": 1, "workers": 0,
             "compile": "false", "precision": "fp32", "val_fraction": 0.2, "data": folder, "out": tmp_path}
    run("pretrain", **small)
    volumes = data.read_index(str(folder))
    held = json.loads((tmp_path / "held_out.json").read_text())
    for field, on_held, message in (("sha256", True, "(another scan of the held-out set)"),
                                    ("shape", True, "(another prepared volume of the held-out set)"),
                                    ("shape", False, "(another prepared volume of the training set)"),
                                    ("sha256", False, "other data: new --out")):
        rows = []
        for volume in volumes:
            odd = (f"mine/{volume.subject}" in held) == on_held
            rows.append(volume._replace(**{field: "9x9x9"}) if odd else volume)
        write_index(folder, rows)
        line = mistake("pretrain", **small)
        assert "last.pt is of a run on other data" in line and message in line
    write_index(folder, volumes)
    saved = checkpoint.load_checkpoint(tmp_path / "last.pt")
    del saved["inputs"]  # of an earlier version
    checkpoint.save_checkpoint(tmp_path / "last.pt", saved)
    assert "holds step 1 of 1" in run("pretrain", **small)


def test_names_that_are_not_utf_8(labels, mine, tmp_path):
    """A run in a folder of a Latin-1 disk: settings, summary and checkpoint are written and read again."""
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    prepare(folder / "data", labels)
    shutil.copy(mine, folder / "mine.yaml")
    settings = TINY | {"task": folder / "mine.yaml", "data": folder / "data", "out": folder / "run"}
    run("finetune", **settings)
    ckpt = folder / "run" / "fold_0" / "last.pt"
    tuned = settings | {"ckpt": ckpt, "out": folder / "tuned"}
    for _ in range(2):
        assert "mean ± SD" in run("finetune", **tuned)
    assert config.read_yaml(finetune.Config, folder / "tuned" / "config.yaml")["ckpt"] == str(ckpt)
    assert str(ckpt) in checkpoint.read_text(folder / "tuned" / "summary.md")
    assert checkpoint.load_checkpoint(folder / "tuned" / "fold_0" / "last.pt")["config"]["ckpt"] == str(ckpt)
    small = {"model": "unet_demo", "features": 4, "patch_size": 32, "batch_size": 2, "steps": 2, "workers": 0,
             "compile": "false", "precision": "fp32", "val_fraction": 0.2, "log_every": 1}
    for _ in range(2):
        run("pretrain", data=folder / "data", out=folder / "pretrained", **small)
    assert dataclasses.replace(pretrain.Config(), **config.read_yaml(
        pretrain.Config, folder / "pretrained" / "config.yaml")).data == str(folder / "data")
    assert "different tasks or folds" not in run("compare", folder / "run", folder / "tuned",
                                                 out=folder / "table.md")
