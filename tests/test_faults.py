"""What breaks in the middle of a run: one process, a file, the disk.

Most of these replace functions of the scripts by name (PHASES, another_folder, limiting ...)."""

import csv
import functools
import importlib
import itertools
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import log_of
from runs import FINETUNE, PRETRAIN, Run, steps_logged, torchrun, wait_until

import checkpoint
import config
import data
import pretrain


def test_preempted_evaluation_exits_0_without_a_score(prepared, lesions, tmp_path):
    run = Run("finetune", tmp_path / "output", patch=slow_evaluation, data=prepared, task=lesions,
              out=tmp_path / "run", **FINETUNE | {"steps": 1})
    run.wait_for(lambda: "evaluate: " in run.text())
    os.kill(run.parts[0].pid, signal.SIGTERM)
    run.finish(seconds=10)
    assert (tmp_path / "run" / "fold_1" / "last.pt").exists()
    scores = list((tmp_path / "run").rglob("dice.json"))
    assert not scores, "compare.py would stop at a run without folds"
    assert not (tmp_path / "run" / "fold_1" / "dice.json").exists()


def slow_evaluation():
    read = data.read_scan
    data.read_scan = lambda case: time.sleep(1) or read(case)


# -------------------------------------------------------------------------------------- no deadlock
MESSAGE = "the first error"


def raising(target, rank, number, kind):
    """Patch of one process: the nth call of a function raises."""
    module = importlib.import_module(target.split(".")[0])
    name, calls = target.split(".")[1], itertools.count(1)
    function = getattr(module, name)

    def patched(*arguments, **options):
        if int(os.environ["RANK"]) == rank and next(calls) == number:
            raise kind(MESSAGE)
        return function(*arguments, **options)
    setattr(module, name, patched)


PHASES = {  # the function that raises, in which process, in which of its calls
    "before the loop": ("data.make_loader", 1, 1),
    "set-up": ("pretrain.open_data", 1, 1),
    "step": ("amaes.make_views", 1, 2),
    "validation": ("amaes.make_views", 1, 4),
    "saving": ("checkpoint.save_checkpoint", 0, 2),
    "log": ("checkpoint.append_log", 0, 3),
    "last step": ("training.learning_rate", 1, 6),
    "evaluation": ("predict.segment", 1, 1),
}


@pytest.mark.parametrize("kind", [RuntimeError, config.UserError])
@pytest.mark.parametrize("phase", PHASES)
def test_an_exception_on_one_process_ends_all(prepared, lesions, tmp_path, phase, kind):
    name, settings = "pretrain", PRETRAIN | {"steps": 6}
    if phase == "evaluation":
        name, settings = "finetune", FINETUNE | {"steps": 1, "task": lesions}
    run = Run(name, tmp_path / "output", 2, functools.partial(raising, *PHASES[phase], kind),
              **settings | {"data": prepared, "out": tmp_path / "run", "workers": 0})
    assert all(run.wait(60)), run.text()
    assert run.text().count(MESSAGE) == 1, run.text()
    assert run.text().count("Traceback") == (kind is RuntimeError), run.text()


@pytest.mark.soak
@pytest.mark.parametrize("phase", list(PHASES)[:-1])
def test_an_exception_under_torchrun_ends_all(prepared, tmp_path, phase):
    patch = f"import test_faults; test_faults.raising(*{PHASES[phase]}, RuntimeError)"
    settings = PRETRAIN | {"steps": 6, "data": prepared, "out": tmp_path / "run", "workers": 1}
    with torchrun(tmp_path, 1, 2, restarts=0, patch=patch, **settings) as (node,):
        wait_until(lambda: len(list(tmp_path.glob("pid.*"))) == 2)
        assert node.wait(60) == 1
        pids = [path.read_text() for path in tmp_path.glob("pid.*")]
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert (tmp_path / "errors.0").read_text().count(f"RuntimeError: {MESSAGE}") == 1


def another_folder():
    """Patch: process 1 is on a node whose run folder is another."""
    resume = checkpoint.resume
    if os.environ["RANK"] == "1":
        checkpoint.resume = lambda *arguments: (resume(*arguments)[0] + 1, 0.0)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_nodes_that_see_different_folders_stop(prepared, lesions, tmp_path, name):
    settings = PRETRAIN if name == "pretrain" else FINETUNE | {"task": lesions}
    settings = settings | {"data": prepared, "out": tmp_path / "run"}
    output = Run(name, tmp_path / "output", 2, another_folder, **settings).finish(2, 2)
    assert output.count("error: ") == 1 and "differs between the nodes" in output


def killed_loader():
    def read(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    data.Crops.read = read


def test_a_lost_loader_process_ends_in_one_line(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path / "run", "workers": 1}
    output = Run("pretrain", tmp_path / "output", patch=killed_loader, **settings).finish(1)
    assert output.count("error: a loader process was lost") == output.count("rror") == 1, output


# -------------------------------------------------------------------------------------- broken data
def truncated(path):
    os.truncate(path, os.path.getsize(path) // 2)


def emptied(path):
    os.truncate(path, 0)


def overwritten(path):
    size = os.path.getsize(path)
    path.write_bytes(random.Random(0).randbytes(size))


def unreadable(path):  # a folder: permissions do not stop root
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("part", "damage"), [
    ("training", Path.unlink), ("training", emptied), ("training", unreadable),
    ("validation", truncated), ("validation", overwritten)])
def test_a_volume_lost_in_mid_run_stops_all_and_is_named(prepared, tmp_path, part, damage):
    shutil.copytree(prepared, tmp_path / "data")
    settings = PRETRAIN | {"data": tmp_path / "data", "workers": 0}
    train, validation, _ = pretrain.open_data(str(tmp_path / "data"), 0.4, 0)
    victim = {"training": train, "validation": validation}[part][0]
    settings["out"] = tmp_path / "cut"
    run = Run("pretrain", tmp_path / "output", 2, **settings)
    run.wait_for(lambda: steps_logged(tmp_path / "cut") >= 3)
    shutil.move(victim.images[0], tmp_path / "kept.npy")
    shutil.copy(tmp_path / "kept.npy", victim.images[0])
    damage(Path(victim.images[0]))
    output = run.finish(2, 2)
    named = output.count(f"error: cannot read {victim.name}: ")
    assert named == output.count("error: ") == 1, output
    assert "Traceback" not in output
    if damage is unreadable:
        os.rmdir(victim.images[0])
    shutil.move(tmp_path / "kept.npy", victim.images[0])
    if damage is Path.unlink:  # what follows is the same for all
        Run("pretrain", tmp_path / "output", 2, **settings).finish()
        assert [record["step"] for record in log_of(tmp_path / "cut")] == list(range(1, 13))


def test_a_loss_that_is_not_finite_stops_all_and_keeps_the_checkpoint(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    settings = PRETRAIN | {"data": tmp_path / "data", "out": tmp_path / "run", "save_every": 1,
                            "workers": 0, "steps": 20}
    victim = pretrain.open_data(str(tmp_path / "data"), 0.4, 0)[0][0]
    run = Run("pretrain", tmp_path / "output", 2, **settings)
    run.wait_for(lambda: steps_logged(tmp_path / "run") >= 4)
    volume = np.load(victim.images[0])
    np.save(victim.images[0], np.full_like(volume, np.nan))
    output = run.finish(2, 2)
    assert output.count("error: ") == 1 and "loss nan at step" in output and victim.name in output
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


# ---------------------------------------------------------------------------------------- full disk
def limiting(target, number, size):
    """Patch: in the nth call of a function no file may grow beyond `size` bytes: a full disk."""
    module, name = importlib.import_module(target.split(".")[0]), target.split(".")[1]
    function, calls = getattr(module, name), itertools.count(1)
    no_limit = resource.RLIM_INFINITY

    def patched(*arguments):
        limit = size if next(calls) == number else no_limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, no_limit))
        try:
            return function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (no_limit, no_limit))
    setattr(module, name, patched)


@pytest.mark.parametrize(("target", "size", "file"), [
    ("checkpoint.save_checkpoint", 100, "last.pt"),
    ("checkpoint.save_checkpoint", 1000000, "last.pt"),
    ("checkpoint.append_log", 500, "log.jsonl")])
def test_a_full_disk_leaves_the_checkpoint_whole(prepared, tmp_path, target, size, file):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path / "cut", "steps": 7, "workers": 0}
    patch = functools.partial(limiting, target, 3, size)
    output = Run("pretrain", tmp_path / "output", 2, patch, **settings).finish(2, 2)
    assert output.count(f"error: cannot write {tmp_path}/cut/{file}: File too large") == 1, output
    assert "Traceback" not in output
    step = checkpoint.load_checkpoint(tmp_path / "cut" / "last.pt")["step"]
    assert step == (2 if file == "log.jsonl" else 4)
    assert not list((tmp_path / "cut").glob(".part*"))


# ---------------------------------------------------------------------------------- hostile folders
NAMES = ["two words", "Zoë 脳", "two\nlines", "../../up", "/root", ".", "a,b\"c"]


def test_odd_names_stay_inside_the_prepared_folder_and_train(raw, tmp_path):
    scans = sorted(raw.glob("sub-*/**/anat/*.nii.gz"))
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "subject", "session", "sequence"])
        writer.writerows([scan, name, name, name] for scan, name in zip(scans, NAMES, strict=False))
    out = tmp_path / "deep" / "deep" / "out"
    Run("prepare_data", tmp_path / "output", source="manifest", input=tmp_path / "table.csv",
        out=out).finish()
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "output", "deep"}
    assert sorted(v.subject for v in data.read_index(str(out))) == sorted(NAMES)
    settings = PRETRAIN | {"data": out, "out": tmp_path / "run", "steps": 4}
    Run("pretrain", tmp_path / "output", **settings).finish()
    subjects = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["subjects"]
    assert set(subjects) < {f"manifest/{name}" for name in NAMES}


@pytest.mark.parametrize(("path", "label"), [
    ("../secret.npy", ""), ("/etc/passwd", ""), ("volumes/../../secret.npy", ""),
    ("v.npy", "../secret.npy")])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, path, label):
    (tmp_path / "index").mkdir()
    row = data.Volume(path, "s", "1", "", "T1", "pretrain", label, "1x1x1", "1x1x1", "")
    lines = [",".join(data.Volume._fields), ",".join(row)]
    (tmp_path / "index" / "part.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(config.UserError, match="outside"):
        data.read_index(str(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"path\0", b"path,source\nx,y\n", b""])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "part.csv").write_bytes(content)
    with pytest.raises(config.UserError, match="part.csv"):
        data.read_index(str(tmp_path))
