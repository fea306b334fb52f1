"""The folds of a task are the paper's, and the same on every machine."""

import dataclasses
import hashlib
import json
import os

import pytest

import config
import data
import tasks

TASK = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",))


def cases_of(n, test=0):
    """n cases, one a subject, the first of them test cases."""
    row = data.Volume("p", "s", "x", "", "FLAIR", "train", "l", "", "", "")
    cases = []
    for i in range(n):
        volume = row._replace(split="test" if i < test else "train")
        cases.append(data.Case(f"c{i:04}", f"s/{i:04}", ("p",), "l", (volume,)))
    return cases


@pytest.mark.parametrize(("n", "quarter", "evaluate", "counts"), [
    (1251, "test", "test", (938, 313, 313)),  # BraTS21, Table 4
    (1251, "test", "rest", (938, 313, 918)),  # BraTS21, Tables 2 and 3
    (250, "pretrain", "rest", (187, 63, 167)),  # ISLES22: 63 are set aside, but for pretraining
    (60, None, "rest", (60, 0, 40)),  # WMH
])
def test_split_arithmetic_of_the_paper(n, quarter, evaluate, counts):
    # A quarter of the subjects is held out.
    cases = cases_of(n)
    kept = cases
    held = []
    if quarter:
        kept, held = data.split_subjects([case.subject for case in cases], 0.25, 0)
    assert (len(kept), len(held)) == counts[:2]

    # Those of the split pretrain are no cases, as in tasks.labelled_cases.
    usable = []
    for case in cases:
        split = quarter if case.subject in held else "train"
        if split != "pretrain":
            usable.append(case._replace(volumes=(case.volumes[0]._replace(split=split),)))
    task = dataclasses.replace(TASK, evaluate=evaluate)
    folds = tasks.make_folds("task", task, usable)
    assert len(folds) == 6 and len({tuple(fold["train"]) for fold in folds}) == 6

    subjects = {case.name: case.subject for case in cases}
    for fold in folds:
        train = {subjects[name] for name in fold["train"]}
        rest = {subjects[name] for name in fold["evaluate"]}
        assert (len(train), len(rest)) == (20, counts[2]) and not train & rest
        assert not train & set(held) and (rest == set(held)) == (evaluate == "test")
    assert folds[0]["train"] != tasks.make_folds("other", task, usable)[0]["train"]


def test_sessions_of_a_subject_stay_together():
    cases = [case._replace(name=f"{case.name}_{session}")
             for case in cases_of(30) for session in "ab"]
    for fold in tasks.make_folds("task", TASK, cases):
        assert (len(fold["train"]), len(fold["evaluate"])) == (40, 20)
        train = {name[:-2] for name in fold["train"]}
        assert not train & {name[:-2] for name in fold["evaluate"]}


def test_folds_are_the_same_on_every_machine():
    folds = tasks.make_folds("wmh", TASK, cases_of(60))
    assert folds[0]["train"][:4] == ["c0002", "c0003", "c0007", "c0008"]
    digest = hashlib.sha256(json.dumps(folds).encode()).hexdigest()
    assert digest[:16] == "f71f6d6c34dfb579"


def test_more_training_subjects_are_the_same_ones_and_more():
    trained = []
    for n in (5, 10, 20, 40):
        folds = tasks.make_folds("wmh", dataclasses.replace(TASK, n_train=n), cases_of(60))
        trained.append(set(folds[0]["train"]))
    assert [len(names) for names in trained] == [5, 10, 20, 40]
    assert all(few < many for few, many in zip(trained, trained[1:], strict=False))


def test_leave_one_out():
    task = dataclasses.replace(TASK, folds=0)
    folds = tasks.make_folds("task", task, cases_of(4, test=1))  # the test split does not matter
    assert [fold["evaluate"] for fold in folds] == [["c0000"], ["c0001"], ["c0002"], ["c0003"]]
    assert all(len(fold["train"]) == 3 for fold in folds)


def test_a_task_that_needs_more_subjects_is_refused():
    with pytest.raises(config.UserError, match="trains on 20 subjects"):
        tasks.make_folds("task", TASK, cases_of(20))
    with pytest.raises(config.UserError, match="split test, of which d has no"):
        tasks.make_folds("task", dataclasses.replace(TASK, evaluate="test"), cases_of(30))


def test_tasks_shipped_are_valid():
    folder = os.path.join(os.path.dirname(tasks.__file__), "configs", "tasks")
    for file in sorted(os.listdir(folder)):
        _, task = tasks.read_task(os.path.join(folder, file))
        assert task.classes[0] == "background" and task.sequences
