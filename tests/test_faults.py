"""That a run survives: kills, preemption, lost workers, broken data, full disks, hostile files."""

import contextlib
import csv
import dataclasses
import functools
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, mistake
from runs import Run

import checkpoint
import config
import data
import pretrain

TINY = {"model": "unet_demo", "patch_size": 32, "batch_size": 2, "log_every": 1, "compile": "false",
        "precision": "fp32", "workers": 1, "lr": 1e-3}
PRETRAIN = TINY | {"features": 4, "steps": 12, "save_every": 2, "val_every": 3, "val_fraction": 0.4,
                   "warmup_epochs": 0.5}
FINETUNE = TINY | {"features": 4, "steps": 6, "save_every": 2, "folds": 1}
TASK = {"data": "set by --data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
        "labels": {0: 0, 1: 1}, "n_train": 2, "folds": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "lesions.yaml"
    path.write_text(json.dumps(TASK))
    return path


def steps_logged(folder):
    path = Path(folder) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_run(one, two):
    """Weights and optimizer bitwise, the log but for its times."""
    first, second = (checkpoint.load_checkpoint(folder / "last.pt") for folder in (one, two))
    assert first["step"] == second["step"]
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    for index, state in first["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second["optimizer"]["state"][index][name]), (index, name)
    logs = [log_of(folder) for folder in (one, two)]
    for record in sum(logs, []):
        record.pop("seconds", None)
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0]] == list(range(1, first["step"] + 1)), "no gap, none twice"


# ---------------------------------------------------------------------------------------------------- SIGKILL
def kill_again_and_again(name, folder, output, kills, settings):
    """Start, SIGKILL at a random moment or while it writes a checkpoint, start again."""
    rng = random.Random(kills)
    for number in range(kills):
        run, logged = Run(name, output, **settings), steps_logged(folder)
        if number % 3 == 2:
            run.wait_for((folder / ".part-last.pt").exists)
        else:
            wanted = logged + rng.randrange(4)
            run.wait_for(lambda: steps_logged(folder) >= wanted)  # noqa: B023
            time.sleep(rng.random() * 0.1)
        run.kill()
        if (folder / "last.pt").exists():
            kept = checkpoint.load_checkpoint(folder / "last.pt")["step"]
            assert steps_logged(folder) <= kept + settings["save_every"], "what came before a save is kept"


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_pretraining_killed_at_random_moments_ends_bitwise_equal(prepared, tmp_path, kills):
    settings = PRETRAIN | {"data": prepared, "steps": 3 + 3 * kills}
    Run("pretrain", tmp_path / "output", out=tmp_path / "whole", **settings).finish(seconds=300)
    settings["out"] = tmp_path / "cut"
    kill_again_and_again("pretrain", tmp_path / "cut", tmp_path / "output", kills, settings)
    Run("pretrain", tmp_path / "output", **settings).finish(seconds=300)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    hours = [checkpoint.load_checkpoint(tmp_path / name / "last.pt")["hours"] for name in ("whole", "cut")]
    assert all(0 < h < 0.1 for h in hours)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_finetuning_killed_at_random_moments_ends_bitwise_equal(prepared, task, tmp_path, kills):
    settings = FINETUNE | {"data": prepared, "task": task, "steps": 3 + 3 * kills}
    Run("finetune", tmp_path / "output", out=tmp_path / "whole", **settings).finish(seconds=300)
    cut, rng = tmp_path / "cut", random.Random(0)
    settings["out"] = cut
    kill_again_and_again("finetune", cut / "fold_1", tmp_path / "output", kills, settings)
    for number in range(kills // 3):
        run = Run("finetune", tmp_path / f"evaluation {number}", **settings)
        run.wait_for(lambda: "evaluate: " in run.text())  # noqa: B023
        time.sleep(rng.random() * 0.2)
        run.kill()
    Run("finetune", tmp_path / "output", **settings).finish(seconds=300)
    assert_same_run(tmp_path / "whole" / "fold_1", cut / "fold_1")
    for name in ("fold_1/dice.json", "summary.md", "folds.json"):
        assert (cut / name).read_text() == (tmp_path / "whole" / name).read_text()


# ------------------------------------------------------------------------------------------------- preemption
def alive(session):
    """Processes of a session that still run, zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("to_all", [False, True], ids=["script", "loader too"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_preempted_run_saves_and_exits_0(prepared, tmp_path, number, to_all):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path, "steps": 100000, "save_every": 100000,
                           "workers": 2}
    run = Run("pretrain", tmp_path / "output", **settings)
    run.wait_for((tmp_path / "log.jsonl").exists)
    session = run.parts[0].pid
    (os.killpg if to_all else os.kill)(session, number)
    output = run.finish(seconds=10)
    step = checkpoint.load_checkpoint(tmp_path / "last.pt")["step"]
    assert step >= 1 and f"holds step {step}" in output
    assert log_of(tmp_path)[-1]["step"] <= step
    deadline = time.time() + 10
    while alive(session):
        assert time.time() < deadline, "the loader's processes are still there"
        time.sleep(0.05)


def test_preempted_evaluation_exits_0_without_a_score(prepared, task, tmp_path):
    run = Run("finetune", tmp_path / "output", patch=slow_evaluation, data=prepared, task=task,
              out=tmp_path / "run", **FINETUNE | {"steps": 1})
    run.wait_for(lambda: "evaluate: " in run.text())
    os.kill(run.parts[0].pid, signal.SIGTERM)
    run.finish(seconds=10)
    assert (tmp_path / "run" / "fold_1" / "last.pt").exists()
    assert not list((tmp_path / "run").rglob("dice.json")), "compare.py would stop at a run without folds"
    assert not (tmp_path / "run" / "fold_1" / "dice.json").exists()


def slow_evaluation():
    read = data.read_case
    data.read_case = lambda case: time.sleep(1) or read(case)


# ------------------------------------------------------------------------------------------------ no deadlock
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
def test_an_exception_on_one_process_ends_all(prepared, task, tmp_path, phase, kind):
    name, settings = "pretrain", PRETRAIN | {"steps": 6}
    if phase == "evaluation":
        name, settings = "finetune", FINETUNE | {"steps": 1, "task": task}
    run = Run(name, tmp_path / "output", 2, functools.partial(raising, *PHASES[phase], kind),
              **settings | {"data": prepared, "out": tmp_path / "run", "workers": 0})
    assert all(run.wait(60)), run.text()
    assert run.text().count(MESSAGE) == 1, run.text()
    assert run.text().count("Traceback") == (kind is RuntimeError), run.text()


# --------------------------------------------------------------------------------------------- many processes
def test_four_processes_and_one_validation_case_equal_one_process(prepared, tmp_path):
    """Three of the four have nothing to validate."""
    settings = PRETRAIN | {"data": prepared, "precision": "fp64", "batch_size": 4, "steps": 3, "workers": 0,
                           "val_fraction": 0.01}
    for processes in (1, 4):
        Run("pretrain", tmp_path / "output", processes, out=tmp_path / str(processes), **settings).finish()
    one, four = (log_of(tmp_path / name) for name in ("1", "4"))
    assert [r["step"] for r in one] == [r["step"] for r in four] == [1, 2, 3]
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
    assert one[-1]["val_loss"] == pytest.approx(four[-1]["val_loss"], abs=1e-9)


def test_processes_without_a_case_to_evaluate(prepared, task, tmp_path):
    Run("finetune", tmp_path / "output", 4, data=prepared, task=task, out=tmp_path / "run",
        **FINETUNE | {"steps": 1, "batch_size": 4, "workers": 0}).finish()
    scored = json.loads((tmp_path / "run" / "fold_1" / "dice.json").read_text())
    fold = json.loads((tmp_path / "run" / "folds.json").read_text())["folds"][1]
    assert [record["case"] for record in scored] == sorted(fold["evaluate"]) and len(scored) == 3


DRIVER = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import config, pretrain

def note(kind, text):
    name = kind + ".{{RANK}}.{{TORCHELASTIC_RESTART_COUNT}}".format(**os.environ)
    open({folder!r} + "/" + name, "w").write(str(text))

leave = os._exit
os._exit = lambda code: (note("exit", code), leave(code))
note("pid", os.getpid())
{patch}
config.run(pretrain.main, pretrain.Config)
"""


@contextlib.contextmanager
def torchrun(folder, nodes, processes, restarts=2, patch="", **settings):
    """One torchrun a node, all on this machine. Processes write files pid.<rank>.<attempt>, exit.<...>."""
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), folder=str(folder), patch=patch))
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
               f"--nproc_per_node={processes}", "--rdzv_backend=c10d", f"--max-restarts={restarts}",
               f"--rdzv_endpoint=localhost:{random.randrange(20000, 30000)}", f"{folder}/driver.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment,
                                stderr=open(folder / f"errors.{node}", "w")) for node in range(nodes)]
    try:
        yield started
    finally:
        for node in started:
            node.kill()
            node.wait()
        for path in folder.glob("pid.*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def wait_until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def test_two_nodes_lose_a_process_restart_and_end_with_the_same_weights(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "workers": 0}
    Run("pretrain", tmp_path / "output", 2, out=tmp_path / "whole", **settings).finish()
    with torchrun(tmp_path, 2, 1, out=tmp_path / "cut", **settings) as nodes:
        wait_until(lambda: steps_logged(tmp_path / "cut") >= 3)
        os.kill(int((tmp_path / "pid.1.0").read_text()), signal.SIGKILL)
        assert [node.wait(90) for node in nodes] == [0, 0], (tmp_path / "errors.0").read_text()[-2000:]
    assert len(list(tmp_path.glob("pid.*"))) == 4, "one restart"
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_signal_to_torchrun_stops_its_processes_with_0(prepared, tmp_path, number):
    settings = PRETRAIN | {"data": prepared, "steps": 100000, "save_every": 100000, "workers": 1}
    with torchrun(tmp_path, 1, 2, out=tmp_path / "run", **settings) as (node,):
        wait_until((tmp_path / "run" / "log.jsonl").exists)
        node.send_signal(number)
        wait_until(lambda: len(list(tmp_path.glob("exit.*"))) == 2, 15)
        node.wait(60)
    assert [(tmp_path / f"exit.{rank}.0").read_text() for rank in (0, 1)] == ["0", "0"]
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"] >= 1


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


@pytest.mark.soak
@pytest.mark.parametrize(("nodes", "processes"), [(1, 4), (2, 2), (4, 1)])
def test_four_processes_on_one_two_or_four_nodes(prepared, tmp_path, nodes, processes):
    settings = PRETRAIN | {"data": prepared, "precision": "fp64", "batch_size": 4, "steps": 50, "workers": 1}
    Run("pretrain", tmp_path / "output", out=tmp_path / "one", **settings).finish(seconds=300)
    with torchrun(tmp_path, nodes, processes, out=tmp_path / "four", **settings) as started:
        assert [node.wait(600) for node in started] == [0] * nodes
    one, four = (log_of(tmp_path / name) for name in ("one", "four"))
    assert len(one) == len(four) == 50
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9), a["step"]


# ------------------------------------------------------------------------------------------------ broken data
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
    assert output.count(f"error: cannot read {victim.name}: ") == output.count("error: ") == 1, output
    assert "Traceback" not in output
    if damage is unreadable:
        os.rmdir(victim.images[0])
    shutil.move(tmp_path / "kept.npy", victim.images[0])
    if damage is Path.unlink:  # what follows is the same for all
        Run("pretrain", tmp_path / "output", 2, **settings).finish()
        assert [record["step"] for record in log_of(tmp_path / "cut")] == list(range(1, 13))


def test_a_loss_that_is_not_finite_stops_all_and_keeps_the_checkpoint(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    settings = PRETRAIN | {"data": tmp_path / "data", "out": tmp_path / "run", "save_every": 1, "workers": 0,
                           "steps": 20}
    victim = pretrain.open_data(str(tmp_path / "data"), 0.4, 0)[0][0]
    run = Run("pretrain", tmp_path / "output", 2, **settings)
    run.wait_for(lambda: steps_logged(tmp_path / "run") >= 4)
    volume = np.load(victim.images[0])
    np.save(victim.images[0], np.full_like(volume, np.nan))
    output = run.finish(2, 2)
    assert output.count("error: ") == 1 and "loss nan at step" in output and victim.name in output
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


# ---------------------------------------------------------------------------------------- several processes
def another_folder():
    """Patch: process 1 is on a node whose run folder is another."""
    resume = checkpoint.resume
    if os.environ["RANK"] == "1":
        checkpoint.resume = lambda *arguments: (resume(*arguments)[0] + 1, 0.0)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_nodes_that_see_different_folders_stop(prepared, task, tmp_path, name):
    settings = PRETRAIN if name == "pretrain" else FINETUNE | {"task": task}
    run = Run(name, tmp_path / "output", 2, another_folder, data=prepared, out=tmp_path / "run", **settings)
    output = run.finish(2, 2)
    assert output.count("error: ") == 1 and "differs between the nodes" in output


def test_a_mistake_on_the_command_line_is_printed_once(tmp_path):
    output = Run("pretrain", tmp_path / "output", 2, stepss=3).finish(2, 2)
    assert output.count("error: unknown key 'stepss'") == 1, output


def killed_loader():
    def read(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    data.Crops.read = read


def test_a_lost_loader_process_ends_in_one_line(prepared, tmp_path):
    output = Run("pretrain", tmp_path / "output", patch=killed_loader, data=prepared, out=tmp_path / "run",
                 **PRETRAIN | {"workers": 1}).finish(1)
    assert output.count("error: a loader process was lost") == output.count("rror") == 1, output


def test_a_second_process_in_a_run_folder_is_refused(prepared, task, tmp_path):
    """A job submitted again while the first still runs: both would write one checkpoint."""
    for name, settings in (("pretrain", PRETRAIN), ("finetune", FINETUNE | {"task": task})):
        settings = settings | {"data": prepared, "out": tmp_path / name, "steps": 10 ** 4, "workers": 0}
        run = Run(name, tmp_path / "output", **settings)
        run.wait_for(lambda name=name: list((tmp_path / name).rglob("log.jsonl")))
        assert "another process is at work" in mistake(name, **settings)
        run.kill()
        Run(name, tmp_path / "again", **settings | {"estimate": "true"}).finish()


def test_a_machine_without_git(prepared, tmp_path):
    output = Run("pretrain", tmp_path / "output", environment={"PATH": str(tmp_path)}, data=prepared,
                 out=tmp_path / "run", **PRETRAIN | {"steps": 1}).finish()
    assert "'commit': 'unknown'" in output


# -------------------------------------------------------------------------------------------------- full disk
def limiting(target, number, size):
    """Patch: during the nth call of a function no file may grow beyond `size` bytes, as on a full disk."""
    module, name = importlib.import_module(target.split(".")[0]), target.split(".")[1]
    function, calls = getattr(module, name), itertools.count(1)

    def patched(*arguments):
        limit = size if next(calls) == number else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    setattr(module, name, patched)


@pytest.mark.parametrize(("target", "size", "file"), [
    ("checkpoint.save_checkpoint", 100, "last.pt"), ("checkpoint.save_checkpoint", 1000000, "last.pt"),
    ("checkpoint.append_log", 500, "log.jsonl")])
def test_a_full_disk_leaves_the_checkpoint_whole(prepared, tmp_path, target, size, file):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path / "cut", "steps": 7, "workers": 0}
    run = Run("pretrain", tmp_path / "output", 2, functools.partial(limiting, target, 3, size), **settings)
    output = run.finish(2, 2)
    assert output.count(f"error: cannot write {tmp_path}/cut/{file}: File too large") == 1, output
    assert "Traceback" not in output
    step = checkpoint.load_checkpoint(tmp_path / "cut" / "last.pt")["step"]
    assert step == (2 if file == "log.jsonl" else 4)
    assert not list((tmp_path / "cut").glob(".part*"))


def test_a_half_written_line_is_cut_from_the_log(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + lines[0][:5])
    checkpoint.cut_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])


# ---------------------------------------------------------------------------------------------- hostile files
class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def network():
    """A checkpoint of a few kB, as pretraining makes it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {"kind": "pretrain", "row": "unet_demo", "step": 3, "config": {"lr": 1e-3},
            "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def refusal(path):
    with pytest.raises(config.UserError) as error:
        checkpoint.load_checkpoint(path)
    return str(error.value)


def test_every_truncation_and_bit_flip_is_refused(tmp_path):
    path, bad, rng = tmp_path / "last.pt", tmp_path / "bad.pt", random.Random(0)
    checkpoint.save_checkpoint(path, network())
    whole = path.read_bytes()
    assert checkpoint.load_checkpoint(path)["step"] == 3
    assert torch.load(path, weights_only=True)["step"] == 3, "others read it with torch alone"
    for _ in range(100):
        bad.write_bytes(whole[:rng.randrange(len(whole))])
        assert str(bad) in refusal(bad)
    everywhere = [rng.randrange(len(whole)) for _ in range(100)]
    for place in everywhere + list(range(len(whole) - 80, len(whole))):  # and in the checksum itself
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        bad.write_bytes(flipped)
        assert str(bad) in refusal(bad), place


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_of_others_never_crash(tmp_path):
    """They have no checksum: what is no longer a checkpoint is refused, in whatever way torch fails."""
    path, rng, refused = tmp_path / "bad.pt", random.Random(0), 0
    for legacy in (False, True):
        torch.save(network(), tmp_path / "other.pt", _use_new_zipfile_serialization=not legacy)
        assert checkpoint.load_checkpoint(tmp_path / "other.pt")["step"] == 3
        whole = (tmp_path / "other.pt").read_bytes()
        for _ in range(150):
            flipped = bytearray(whole)
            flipped[rng.randrange(2000)] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            try:
                checkpoint.load_checkpoint(path)
            except config.UserError:
                refused += 1
    assert refused > 100


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """A checkpoint whose members went through change(name, content)."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(f"{path}.new", "w", method) as target:
        for member in source.infolist():
            target.writestr(member.filename, change(member.filename, source.read(member)))
    os.replace(f"{path}.new", path)


def test_hostile_checkpoints_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    path = tmp_path / "bad.pt"
    torch.save(network() | {"row": Bomb(tmp_path / "ran")}, path)
    assert "nothing in it was run" in refusal(path)
    assert not (tmp_path / "ran").exists()

    for length in (b"J\x00\xca\x9a\x3b", b"\x8a\x06\x00\x00\x00\x00\x00\x10"):  # 1e9 and 2^44 values
        torch.save({"model": {"w": torch.ones(100)}}, path)
        rewritten(path, lambda name, content, length=length: content.replace(b"Kd", length))
        assert "does not match expected size" in refusal(path)
    torch.save({"model": {"w": torch.ones(1).expand(10 ** 12)}}, path)
    assert "a tensor in it is larger than the file" in refusal(path)
    torch.save({"model": {"w": torch.ones(100)}}, path)
    zeros = bytes(10 ** 8)
    rewritten(path, lambda name, content: zeros if "data/0" in name else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10 ** 6
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # it does not come to that
        assert "it is compressed, as no checkpoint is" in refusal(path)

    torch.save(network(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped", b"x")
        archive.writestr(str(tmp_path / "escaped"), b"x")
    assert "not in a subdirectory" in refusal(path)
    assert not list(tmp_path.rglob("**/escaped")) and not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"format": checkpoint.FORMAT + 1}, "newer than"), ({"format": "1"}, "its format is a str"),
    ({"row": ["unet_demo"]}, "its row is a list"), ({"config": 3}, "its config is a int")])
def test_checkpoints_of_later_formats_and_odd_contents_are_refused(tmp_path, change, message):
    torch.save(network() | {"format": 1} | change, tmp_path / "odd.pt")
    assert message in refusal(tmp_path / "odd.pt")


def test_a_checkpoint_of_another_network_is_not_continued(tmp_path):
    cfg = pretrain.Config()
    checkpoint.save_checkpoint(tmp_path / "last.pt", network() | {"config": dataclasses.asdict(cfg)})
    model = torch.nn.Linear(3, 3)
    with pytest.raises(config.UserError, match="does not fit this network"):
        checkpoint.resume(tmp_path / "last.pt", cfg, (), model, torch.optim.AdamW(model.parameters()))


NINE = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)])
MERGES = "\n".join(["a0: &a0 {x: y}"] + [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}"
                                         for i in range(1, 20)])


@pytest.mark.parametrize(("text", "message"), [
    (NINE, "aliases"), (MERGES, "aliases"), ("data: &a [*a]", "aliases"),
    ("data: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
    ("data: " + "[" * 1200, "not valid YAML"), ("data: 2001-99-99", "not valid YAML"),
    ("- 1", "expected lines"), ("? [a, b]\n: 1", "not valid YAML"), ("data: \x00", "not valid YAML"),
    ("seed: " + "9" * 5000, "not valid YAML"), ("seed: [" + "1," * 10000 + "]", "expected int")])
def test_hostile_yaml_ends_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    line = mistake("pretrain", tmp_path / "bad.yaml")
    assert message in line and len(line) < 2000
    assert not (tmp_path / "ran").exists()


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
    Run("pretrain", tmp_path / "output", data=out, out=tmp_path / "run", **PRETRAIN | {"steps": 4}).finish()
    subjects = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["subjects"]
    assert set(subjects) < {f"manifest/{name}" for name in NAMES}


@pytest.mark.parametrize(("path", "label"), [
    ("../secret.npy", ""), ("/etc/passwd", ""), ("volumes/../../secret.npy", ""), ("v.npy", "../secret.npy")])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, path, label):
    (tmp_path / "index").mkdir()
    row = data.Volume(path, "s", "1", "", "T1", "pretrain", label, "1x1x1", "1x1x1", "")
    (tmp_path / "index" / "part.csv").write_text(f"{','.join(data.Volume._fields)}\n{','.join(row)}\n")
    with pytest.raises(config.UserError, match="outside"):
        data.read_index(str(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"path\0", b"path,source\nx,y\n", b""])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "part.csv").write_bytes(content)
    with pytest.raises(config.UserError, match="part.csv"):
        data.read_index(str(tmp_path))


# ------------------------------------------------------------------------------------------------------- soak
def memory_and_files(pid):
    """Resident bytes and number of open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.soak
def test_memory_and_open_files_stay_flat_over_2000_steps(prepared, tmp_path):
    settings = {"model": "unet_demo", "patch_size": 32, "batch_size": 8, "steps": 2000, "compile": "false",
                "precision": "fp32", "workers": 4, "log_every": 30, "val_every": 60, "val_fraction": 0.1}
    run = Run("pretrain", tmp_path / "output", data=prepared, out=tmp_path / "run", **settings)
    samples = []
    while run.parts[0].exitcode is None:
        processes = alive(run.parts[0].pid)
        if len(processes) == 5:
            try:
                samples.append([memory_and_files(pid) for pid in sorted(processes)])
            except (FileNotFoundError, ProcessLookupError):
                pass  # the end
        time.sleep(1)
    run.finish()
    memory, files = np.array(samples).transpose(2, 1, 0)  # (processes, seconds)
    thirds = len(samples) // 3
    before, after = (memory[:, part].max(1) for part in (slice(thirds, 2 * thirds), slice(2 * thirds, None)))
    print("MiB", (before / 2 ** 20).round(1), (after / 2 ** 20).round(1), "files", files[:, thirds:].max(1))
    assert (after < 1.05 * before).all(), (before, after)
    assert (files[:, 2 * thirds:].max(1) <= files[:, thirds:2 * thirds].max(1)).all()
