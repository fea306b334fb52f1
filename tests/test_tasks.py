"""What the index tells of a task before the first step: values, foreground, sequences, grids."""

import json
import os
import re

import pytest
from conftest import calls_of, mistake
from folders import TASK, volume_of, write_index

import checks
import config
import data
import tasks


def cases_of(*volumes):
    """A case of each of these rows of the index."""
    return [data.Case(v.subject, f"mine/{v.subject}", (v.path,), v.label, (v,)) for v in volumes]


def task_of(**changes):
    settings = TASK | {"classes": ("background", "lesion"), "sequences": ("FLAIR",)} | changes
    return tasks.Task(**settings)


# ------------------------------------------------------------------------- the task's file
@pytest.mark.parametrize(("changes", "message"), [
    ({"sequences": []}, "classes and sequences must not be empty"),
    ({"classes": [], "labels": {}}, "classes and sequences must not be empty"),
    ({"labels": {0: 0}}, "labels must map onto the class numbers 0 to 1"),
    ({"labels": {0: 0, 1: [1]}}, "labels must map onto the class numbers 0 to 1"),
    ({"labels": {0: 0, 256: 1}}, "labels maps label values, 0 to 255, to class numbers"),
    ({"regions": {"any": [[1]]}}, "a region is a list of class numbers"),
    ({"evaluate": "all"}, "evaluate 'all': choose rest or test"),
])
def test_a_task_that_contradicts_itself_is_refused(tmp_path, changes, message):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(TASK | changes))
    with pytest.raises(config.UserError, match=re.escape(f"{path}: {message}")):
        tasks.read_task(str(path))


# ---------------------------------------------------------------------------- label values
def test_label_values_of_the_index():
    volume = volume_of("a", label="0:87120/87040 1:257/254 4:3/0")
    assert checks.values_of(volume) == {0: (87120, 87040), 1: (257, 254), 4: (3, 0)}
    assert checks.values_of(volume_of("a", label="")) == {}, "prepared before values were counted"
    for damaged in ("0:1", "0:1/2/3", "a:1/2", "0:1/2,1:3/4", "x"):
        with pytest.raises(config.UserError, match=r"volumes/mine/a_1_FLAIR.npy: prepare it again"):
            checks.values_of(volume_of("a", label=damaged))


def test_a_value_that_the_task_does_not_name():
    """The case, the value, and the line to write.

    Also where the value is lost at 1 mm, since scores are on the scan's own grid."""
    good = volume_of("a", label="0:90/80 1:3/3")
    bad = volume_of("b", label="0:9/8 2:4/4 3:12/11")
    lost = volume_of("c", label="0:9/8 5:1/0")

    # Nothing to complain of.
    every_label = {"0": 0, "1": 1, "2": 1, "3": 1}
    checks.check_values("mine.yaml", task_of(), cases_of(good))
    checks.check_values("mine.yaml", task_of(), cases_of(volume_of("a", label="")))
    checks.check_values("mine.yaml", task_of(ignore=(2, 3, 5)), cases_of(good, bad, lost))
    checks.check_values("mine.yaml", task_of(labels=every_label), cases_of(good, bad))

    cases = cases_of(good, bad, bad._replace(subject="d"), lost)
    with pytest.raises(config.UserError) as error:
        checks.check_values("mine.yaml", task_of(), cases)
    message = str(error.value)
    assert message.startswith("b has 4 voxels of label value 2, which task mine.yaml does not name")
    assert "values without a name: 2, 3, 5; cases with 2: 2" in message
    assert "`labels: {0: 0, 1: 1, 2: 1, 3: 1, 5: 1}`" in message
    assert "`ignore: [2, 3, 5]`" in message

    with pytest.raises(config.UserError, match="c has 1 voxels of label value 5"):
        checks.check_values("mine.yaml", task_of(), cases_of(good, lost))


def test_cases_and_folds_without_foreground():
    rows = {"a": "0:90/80 1:3/3", "b": "0:90/80", "c": "0:90/80 1:2/0", "d": "0:90/80 2:7/7",
            "e": "0:90/80 1:3/3"}
    cases = {name: cases_of(volume_of(name, label=label))[0] for name, label in rows.items()}
    folds = [{"train": ["a", "b"], "evaluate": ["c", "d", "e"]},
             {"train": ["e", "c"], "evaluate": ["a"]}]
    one = task_of(ignore=(2,))
    said = ("3 of 5 cases have no foreground voxel, b the first; 1 of them had some on the scan's "
            "own grid")
    assert checks.check_foreground(one, cases, folds) == [said]

    # A class that one fold cannot learn.
    two = task_of(classes=("background", "core", "rim"), labels={0: 0, 1: 1, 2: 2})
    folds[1] = {"train": ["d", "e"], "evaluate": ["a"]}
    lines = checks.check_foreground(two, cases, folds)
    assert lines[1:] == ["rim: no voxel to train on in fold 0"]

    # A fold that cannot learn anything. Where nothing is trained, it is said and no error.
    folds[1] = {"train": ["b", "c"], "evaluate": ["a"]}
    message = "fold 1 would be trained on no foreground at all: none of "
    with pytest.raises(config.UserError, match=message):
        checks.check_foreground(one, cases, folds)
    assert checks.check_foreground(one, cases, ()) != []

    old = {name: cases_of(volume_of(name, label=""))[0] for name in rows}
    assert checks.check_foreground(task_of(), old, folds) == []


# ----------------------------------------------------------- sequences, sessions and grids
@pytest.mark.parametrize(("wanted", "source", "message"), [
    (["FLIAR"], None, "no labelled case with FLIAR; with a label it has FLAIR 3, T1 1. Is FLIAR "
                      "meant to be FLAIR?"),
    (["flaire"], None, "Is flaire meant to be FLAIR?"),
    (["T1x"], None, "Is T1x meant to be T1?"),
    (["FLAIR", "t1"], None, "Is t1 meant to be T1?"),
    (["DWI"], None, "with a label it has FLAIR 3, T1 1. A label counts for the scans on its own "
                    "grid"),
    (["FLAIR", "T1"], None, "a session 1: FLAIR 30x30x30 (voxels of 1x1x1 mm) with a label, T1 "
                            "25x25x25 (voxels of 0.8x1x1 mm) without"),
    (["FLAIR"], "other", "of source other: its sources, with their volumes, are mine 7"),
])
def test_why_a_folder_has_no_case(tmp_path, wanted, source, message):
    """A T1 on another grid loses its label, and it is said that it did."""
    volumes = [volume_of(name, label="") for name in "abc"]
    volumes += [volume_of(name, "T1", shape="25x25x25", spacing="0.8x1x1") for name in "abc"]
    write_index(tmp_path, [*volumes, volume_of("d", "T1", label="")])
    settings = TASK | {"sequences": wanted}
    if source:
        settings["source"] = source
    task = tmp_path / "mine.yaml"
    task.write_text(json.dumps(settings))

    line = mistake("finetune", task=task, data=tmp_path, model="unet_demo", out=tmp_path / "run")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_folder_without_labels_says_so(tmp_path):
    write_index(tmp_path, [volume_of(name) for name in "abc"])
    task = task_of(data=str(tmp_path))
    assert checks.why_none(task).endswith("none of its 3 volumes has a label")

    write_index(tmp_path, [volume_of("a"), volume_of("b", label="", split="pretrain")])
    line = checks.why_none(task)
    assert line.endswith("has a label but 1 of the split pretrain, which no task takes")


def test_sessions_left_out_and_odd_pairs_are_said(tmp_path):
    volumes = [volume_of(name, sequence, label="") for name in "ab" for sequence in ("FLAIR", "T1")]
    volumes += [volume_of("c", label=""), volume_of("c", "T1"), volume_of("d", label="")]
    write_index(tmp_path, [*volumes, volume_of("e")])
    task = task_of(data=str(tmp_path), sequences=("FLAIR", "T1"))
    cases = tasks.labelled_cases(task.data, None, task.sequences)
    line, = checks.left_out(task, cases)
    assert line.startswith("2 labelled sessions are left out: they lack one of FLAIR, T1")
    assert "c session 1" in line
    assert checks.left_out(task_of(data=str(tmp_path)), cases) == []

    # These two cases are as they should be.
    assert checks.other_labels(cases) == []
    assert checks.same_files(cases) == []
    checks.check_grids(cases)

    # And these are not.
    first, second = cases
    flair, t1 = first.volumes
    two_labels = first._replace(volumes=(flair, t1._replace(label_sha256="x")))
    line, = checks.other_labels([two_labels])
    assert "1 cases have another label map for each sequence, a_1 the first" in line

    twin = second._replace(volumes=(flair, second.volumes[1]))
    line, = checks.same_files([first, twin])
    assert "1 scans are the same file under several subjects, mine/a and mine/b the first" in line

    two_grids = first._replace(volumes=(flair, t1._replace(shape="30x30x31")))
    message = "a_1 differ in shape (FLAIR 30x30x30, T1 30x30x31)"
    with pytest.raises(config.UserError, match=re.escape(message)):
        checks.check_grids([second, two_grids])


def test_checks_do_little_for_each_volume(tmp_path, monkeypatch):
    """A cohort has 45,000: no check may ask the disk for each, or go through all for each."""
    volumes = []
    for number in range(2000):
        volumes.append(volume_of(f"s{number:05}", label="0:87120/87040 1:257/254"))
    (tmp_path / "volumes/mine").mkdir(parents=True)
    for volume in volumes[:100]:
        (tmp_path / volume.path).touch()

    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))

    def check_all(cases, paths):
        checks.check_values("mine.yaml", task_of(), cases.values())
        checks.check_foreground(task_of(), cases, [{"train": list(cases), "evaluate": []}])
        checks.check_grids(cases.values())
        checks.same_files(cases.values())
        with pytest.raises(config.UserError, match=f"lacks {len(cases) - 100} files"):
            checks.check_files(tmp_path, paths)

    calls = []
    for count in (1000, 2000):
        cases = {case.name: case for case in cases_of(*volumes[:count])}
        paths = [str(tmp_path / volume.path) for volume in volumes[:count]]
        calls.append(calls_of(check_all, cases, paths))
    assert (calls[1] - calls[0]) / 1000 < 70, "calls for one volume more: 50 when this was written"
    assert listed == [str(tmp_path / "volumes/mine")] * 2, "once a check"
