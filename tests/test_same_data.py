"""A run goes on with the data it began with; what they lack is said before the first step."""

import itertools
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
import checks
import config
import data
import finetune
import pretrain

SMALL = {"model": "unet_demo", "features": 4, "patch_size": 32, "batch_size": 2, "workers": 0,
         "compile": "false", "precision": "fp32", "val_fraction": 0.2}  # a pretraining of seconds


def folds_of(run):
    """The folds of a run folder."""
    return json.loads((run / "folds.json").read_text())["folds"]


def inputs_of(run):
    """What a run folder says it was made of."""
    return json.loads((run / "inputs.json").read_text())


def files_in(folder):
    """{path: content} of everything in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path, change):
    """Loads a checkpoint, changes it in place, and saves it."""
    saved = checkpoint.load_checkpoint(path)
    change(saved)
    checkpoint.save_checkpoint(path, saved)


def forget_inputs(saved):
    """As an earlier version wrote a checkpoint: it knows the scans alone."""
    del saved["inputs"]


def add_one(saved):
    """As if the network had been trained on."""
    saved["model"] = {name: tensor + 1 for name, tensor in saved["model"].items()}


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
    edit(folder / f"fold_{fold}" / "last.pt", lambda saved: saved.update(step=step))


def test_a_run_says_what_it_was_made_of(first):
    inputs = inputs_of(first / "run")
    assert inputs["ckpt"] is None
    assert sorted(inputs["cases"]) == ["a_1", "b_1", "c_1", "d_1", "e_1"]

    # Every score names the files it was taken of.
    by_subject = {volume.subject: volume for volume in data.read_index(str(first / "data"))}
    scores = json.loads((first / "run" / "dice.json").read_text())
    for record in itertools.chain(*scores["folds"].values()):
        volume = by_subject[record["case"][0]]
        made_of = inputs["cases"][record["case"]]
        assert record["sha256"] == made_of["sha256"] == [volume.sha256]
        assert record["label_sha256"] == made_of["label_sha256"] == volume.label_sha256

    # And every network, the files it was trained on.
    trained = folds_of(first / "run")[1]["train"]
    saved = checkpoint.load_checkpoint(first / "run" / "fold_1" / "last.pt")
    assert saved["inputs"] == {name: inputs["cases"][name] for name in trained}


@pytest.mark.parametrize("state", ["finished", "cut"])
@pytest.mark.parametrize(("change", "fields", "word"), [
    ("label", {}, "label"),
    ("scan", {"sha256": "another"}, "scan"),
    ("shape", {"shape": "9x9x9"}, "prepared volume"),
])
def test_a_run_is_not_continued_on_other_data(again, labels, tmp_path, state, change, fields, word):
    """Corrected labels, or another --data.

    Finished folds would print the scores of the old data, and a cut fold would go on with the
    new."""
    if change == "label":
        labels = labels | {"b": lesion(at=9)}
    other = prepare(tmp_path / "other", labels)
    rows = data.read_index(str(other))
    write_index(other, [row._replace(**fields) if row.subject == "b" else row for row in rows])
    if state == "cut":
        cut(tmp_path / "run")

    before = files_in(tmp_path / "run")
    line = mistake("finetune", **again | {"data": other})
    assert f"has folds of other data (another {word} of b_1): new --out, or the old data" in line
    assert files_in(tmp_path / "run") == before


def test_a_cut_fold_knows_its_data_by_itself(again, labels, tmp_path):
    trained = folds_of(tmp_path / "run")[0]["train"]
    other = prepare(tmp_path / "other", labels | {trained[0][0]: lesion(at=9)})
    cut(tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()
    line = mistake("finetune", **again | {"data": other})
    message = f"fold_0/last.pt is of a run on other data (another label of {trained[0]}"
    assert message in line

    # A fold of an earlier version knows the scans alone.
    edit(tmp_path / "run" / "fold_0" / "last.pt", forget_inputs)
    rows = data.read_index(str(other))
    write_index(other, [row._replace(sha256=f"another {row.sha256}") for row in rows])
    (tmp_path / "run" / "inputs.json").unlink(missing_ok=True)
    line = mistake("finetune", **again | {"data": other})
    assert "fold_0/last.pt is of a run on other data: new --out, or the old data" in line


def test_the_same_data_elsewhere_is_the_same(again, first, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(first / "data", moved)
    cut(tmp_path / "run")
    run("finetune", **again | {"data": moved})
    written = [(folder / "run" / "inputs.json").read_text() for folder in (tmp_path, first)]
    assert written[0] == written[1]
    assert (tmp_path / "run" / "fold_0" / "dice.json").exists()

    shutil.rmtree(moved / "volumes")
    printed = run("finetune", **again | {"data": moved})
    assert "mean ± SD" in printed, "what is finished needs no volumes any more"


def test_runs_and_folders_of_earlier_versions_go_on(again, first, labels, tmp_path):
    """Neither the run folder nor the prepared folder says what labels there were.

    A folder that is prepared again meanwhile does, but whether they are those of then, nobody
    knows: this is said each time."""
    def labels_known():
        return {case["label_sha256"] for case in inputs_of(tmp_path / "run")["cases"].values()}

    old = prepare(tmp_path / "old", labels, data.Volume._fields[:-2])
    (tmp_path / "run" / "inputs.json").unlink()
    for fold in range(2):
        folder = tmp_path / "run" / f"fold_{fold}"
        edit(folder / "last.pt", forget_inputs)
        records = json.loads((folder / "dice.json").read_text())
        for record in records:
            del record["sha256"], record["label_sha256"]
        (folder / "dice.json").write_text(json.dumps(records))
    cut(tmp_path / "run")

    printed = run("finetune", **again | {"data": old})
    assert "mean ± SD" in printed
    assert "has folds of an earlier version" in printed
    assert labels_known() == {""}

    count = len(inputs_of(tmp_path / "run")["cases"])
    for settings in (again, again | {"data": old}, again):
        printed = run("finetune", **settings)
        assert labels_known() == {""}, "never taken for verified"
    assert f"the labels of {count} cases were not recorded when the folds in" in printed


def test_networks_are_evaluated_on_the_data_they_were_trained_on(first, labels, tmp_path):
    """Of another run's networks the trained cases must be the same.

    The cases that are evaluated are this run's own."""
    task = tmp_path / "mine_ood.yaml"
    task.write_text(json.dumps(TASK | {"networks": "mine"}))
    settings = {"task": task, "model": "unet_demo", "features": 4, "networks": first / "run",
                "overlap": 0}
    folds = folds_of(first / "run")
    trained = {name[0] for fold in folds for name in fold["train"]}
    fresh = min(set(labels) - trained)

    # Another label map of a case that no fold was trained on: these are new scores.
    other = prepare(tmp_path / "evaluated", labels | {fresh: lesion(at=9)})
    run("finetune", data=other, out=tmp_path / "fresh", **settings)
    line = mistake("finetune", data=first / "data", out=tmp_path / "fresh", **settings)
    assert f"has folds of other data (another label of {fresh}_1)" in line

    # Another label map of a case that was trained on.
    name = min(folds[0]["train"])
    other = prepare(tmp_path / "trained", labels | {name[0]: lesion(at=9)})
    line = mistake("finetune", data=other, out=tmp_path / "refused", **settings)
    assert f"was trained on other data (another label of {name}" in line
    assert "finetune mine again, or the old data" in line


def test_scores_of_networks_that_were_trained_again_are_not_printed(first, tmp_path):
    networks = tmp_path / "networks"
    shutil.copytree(first / "run", networks)
    task = tmp_path / "mine_ood.yaml"
    task.write_text(json.dumps(TASK | {"networks": "mine"}))
    settings = {"task": task, "model": "unet_demo", "features": 4, "networks": networks,
                "overlap": 0, "data": first / "data", "out": tmp_path / "scores"}
    run("finetune", folds=0, **settings)

    # Fold 1 has no score yet, so its network may change.
    edit(networks / "fold_1" / "last.pt", add_one)
    run("finetune", folds=0, **settings)
    edit(networks / "fold_0" / "last.pt", add_one)
    assert "has scores of another network of fold 0" in mistake("finetune", **settings)


def test_folds_of_one_run_start_from_one_checkpoint(first, mine, tmp_path):
    """Pretraining that went on between two folds would give them different starts."""
    ckpt = tmp_path / "last.pt"
    settings = TINY | {"task": mine, "data": first / "data", "out": tmp_path / "run", "steps": 1,
                       "ckpt": ckpt}
    shutil.copy(first / "run" / "fold_0" / "last.pt", ckpt)
    run("finetune", folds=0, **settings)
    run("finetune", folds=1, **settings)
    edit(ckpt, add_one)
    line = mistake("finetune", folds=1, **settings)
    assert "has folds that started from another --ckpt: the file has changed since" in line

    # Whoever wrote a checkpoint, its checksum is one of its content.
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": checkpoint.load_checkpoint(ckpt)["model"]}, foreign)
    assert checkpoint.checksum(foreign) == checkpoint.checksum(foreign)
    for path in (foreign, ckpt):
        assert len(checkpoint.checksum(path)) == 64


def test_an_unknown_value_stops_before_the_first_step(labels, mine, tmp_path):
    label = lesion()
    label[20:22, 20:22, 20:22] = 3
    folder = prepare(tmp_path / "data", labels | {"c": label})
    line = mistake("finetune", task=mine, data=folder, out=tmp_path / "run", **TINY)
    assert "c_1 has 8 voxels of label value 3" in line
    assert "`ignore: [3]`" in line
    assert not (tmp_path / "run").exists()

    # The index of an earlier version does not say, so that it stops later.
    old = prepare(tmp_path / "old", labels | {"c": label}, data.Volume._fields[:-2])
    with pytest.raises(config.UserError, match="do not name"):
        run("finetune", task=mine, data=old, out=tmp_path / "run", **TINY)


def test_empty_labels_are_said_or_refused(labels, mine, tmp_path):
    empty = np.zeros((30, 30, 30), np.uint8)
    settings = TINY | {"task": mine, "out": tmp_path / "run"}
    some = prepare(tmp_path / "some", labels | {"c": empty})
    printed = run("finetune", data=some, estimate="true", **settings)
    assert "1 of 5 cases have no foreground voxel, c_1 the first\n" in printed

    none = prepare(tmp_path / "none", dict.fromkeys(labels, empty))
    line = mistake("finetune", data=none, **settings)
    assert "fold 0 would be trained on no foreground at all" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lost", [
    "volumes/mine/b_1_FLAIR.npy", "labels/mine/b_1_FLAIR.npy",
    "labels/mine/b_1_FLAIR_native.nii.gz", "geometry/mine/b_1_FLAIR.json"])
def test_lost_files_are_named_before_the_first_step(labels, mine, tmp_path, lost):
    folder = prepare(tmp_path / "data", labels)
    settings = TINY | {"task": mine, "data": folder, "out": tmp_path / "run"}
    (folder / lost).unlink()
    line = mistake("finetune", **settings)
    assert f"lacks 1 files that its index names, the first {folder / lost}" in line

    shutil.rmtree((folder / lost).parent)
    assert "files that its index names" in mistake("finetune", **settings)
    assert not (tmp_path / "run").exists()


def test_too_few_subjects_says_how_many_there_are(first, mine, tmp_path):
    settings = TINY | {"task": mine, "data": first / "data", "out": tmp_path, "n_train": 5}
    line = mistake("finetune", **settings)
    assert "trains on 5 subjects and needs more" in line
    assert "has 5 with labels: --n_train 4 or less" in line


def test_runs_scored_on_other_labels_are_not_compared(first, labels, mine, tmp_path):
    changed = {"b": lesion(at=9), "c": lesion(at=9)}
    other = prepare(tmp_path / "other", labels | changed)
    run("finetune", task=mine, data=other, out=tmp_path / "run", **TINY | {"steps": 1})
    line = mistake("compare", first / "run", tmp_path / "run")
    assert "were scored on different data (another label of" in line


# ----------------------------------------------------------------------------- pretraining
def pretraining(folder, **changes):
    return pretrain.Config(**{"data": str(folder), "val_fraction": 0.2} | changes)


def test_pretraining_checks_its_data_before_the_first_step(labels, tmp_path):
    folder = prepare(tmp_path / "data", labels)

    def open_data(val_fraction=0.2):
        return pretrain.open_data(str(folder), val_fraction, seed=0)

    train, validation, held_out = open_data()
    assert (len(train), len(validation), len(held_out)) == (4, 1, 1)
    assert checks.shared_files(train, validation) == []
    message = "5 volumes of 5 subjects, and val_fraction 1.0 holds out all"
    with pytest.raises(config.UserError, match=message):
        open_data(val_fraction=1.0)

    # The same scan under several names.
    volumes = data.read_index(str(folder))
    write_index(folder, [volume._replace(sha256="one") for volume in volumes])
    line, = checks.shared_files(*open_data()[:2])
    assert line.startswith("1 of 1 held-out volumes are trained on, too: the first is vol")

    # Test cases alone.
    write_index(folder, [volume._replace(split="test") for volume in volumes])
    message = "no volume to pretrain on: all are of the split test"
    with pytest.raises(config.UserError, match=message):
        open_data()

    # A lost file.
    write_index(folder, volumes)
    (folder / volumes[1].path).unlink()
    with pytest.raises(config.UserError, match="lacks 1 files that its index names"):
        open_data()


@pytest.fixture(scope="module")
def pretrained(labels, tmp_path_factory):
    """A prepared folder, and a finished pretraining on it."""
    folder = tmp_path_factory.mktemp("pretrained")
    prepare(folder / "data", labels)
    run("pretrain", data=folder / "data", out=folder / "run", steps=1, **SMALL)
    return folder


def copy_of(pretrained, folder):
    """A copy of both in `folder` -> the prepared folder, and the settings of the run."""
    shutil.copytree(pretrained, folder, dirs_exist_ok=True)
    return folder / "data", SMALL | {"steps": 1, "data": folder / "data", "out": folder / "run"}


@pytest.mark.parametrize(("field", "on_held_out", "message"), [
    ("sha256", True, "(another scan of the held-out set)"),
    ("shape", True, "(another prepared volume of the held-out set)"),
    ("shape", False, "(another prepared volume of the training set)"),
    ("sha256", False, "other data: new --out"),
])
def test_a_pretraining_on_other_data_is_not_continued(pretrained, tmp_path, field, on_held_out,
                                                      message):
    """What is compared, beside the scans trained on, which checkpoints always knew: those held
    out, and the prepared volumes."""
    folder, settings = copy_of(pretrained, tmp_path)
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    rows = []
    for volume in data.read_index(str(folder)):
        if (f"mine/{volume.subject}" in held_out) == on_held_out:
            volume = volume._replace(**{field: "9x9x9"})
        rows.append(volume)
    write_index(folder, rows)
    line = mistake("pretrain", **settings)
    assert "last.pt is of a run on other data" in line
    assert message in line


def test_a_pretraining_of_an_earlier_version_goes_on(pretrained, tmp_path):
    _, settings = copy_of(pretrained, tmp_path)
    edit(tmp_path / "run" / "last.pt", forget_inputs)
    assert "holds step 1 of 1" in run("pretrain", **settings)


def test_names_that_are_not_utf_8(labels, mine, tmp_path):
    """A run in a folder of a Latin-1 disk: what it writes can be read again."""
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    prepare(folder / "data", labels)
    shutil.copy(mine, folder / "mine.yaml")

    # Each run a second time as well, as one that goes on.
    settings = TINY | {"task": folder / "mine.yaml", "data": folder / "data"}
    ckpt = folder / "run" / "fold_0" / "last.pt"
    run("finetune", out=folder / "run", **settings)
    for _ in range(2):
        printed = run("finetune", out=folder / "tuned", ckpt=ckpt, **settings)
        assert "mean ± SD" in printed
    small = SMALL | {"steps": 2, "log_every": 1}
    for _ in range(2):
        run("pretrain", data=folder / "data", out=folder / "pretrained", **small)

    # The settings, the summary, the checkpoint.
    written = config.read_yaml(finetune.Config, folder / "tuned" / "config.yaml")
    assert written["ckpt"] == str(ckpt)
    assert str(ckpt) in checkpoint.read_text(folder / "tuned" / "summary.md")
    saved = checkpoint.load_checkpoint(folder / "tuned" / "fold_0" / "last.pt")
    assert saved["config"]["ckpt"] == str(ckpt)
    written = config.read_yaml(pretrain.Config, folder / "pretrained" / "config.yaml")
    assert written["data"] == str(folder / "data")

    printed = run("compare", folder / "run", folder / "tuned", out=folder / "table.md")
    assert "different tasks or folds" not in printed
