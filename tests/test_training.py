"""That a run survives: kills, preemption, lost nodes. All through the command line."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_of, mistake
from runs import FINETUNE, PRETRAIN, Run, alive, steps_logged, torchrun, wait_until

import checkpoint
import pretrain


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
    steps = [record["step"] for record in logs[0]]
    assert steps == list(range(1, first["step"] + 1)), "no gap, none twice"


# ------------------------------------------------------------------------------------------ SIGKILL
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
            most = kept + settings["save_every"]
            assert steps_logged(folder) <= most, "what came before a save is kept"


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_pretraining_killed_at_random_moments_ends_bitwise_equal(prepared, tmp_path, kills):
    settings = PRETRAIN | {"data": prepared, "steps": 3 + 3 * kills}
    Run("pretrain", tmp_path / "output", out=tmp_path / "whole", **settings).finish(seconds=300)
    settings["out"] = tmp_path / "cut"
    kill_again_and_again("pretrain", tmp_path / "cut", tmp_path / "output", kills, settings)
    Run("pretrain", tmp_path / "output", **settings).finish(seconds=300)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    hours = [checkpoint.load_checkpoint(tmp_path / name / "last.pt")["hours"]
             for name in ("whole", "cut")]
    assert all(0 < h < 0.1 for h in hours)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_finetuning_killed_at_random_moments_ends_bitwise_equal(prepared, lesions, tmp_path, kills):
    settings = FINETUNE | {"data": prepared, "task": lesions, "steps": 3 + 3 * kills}
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


# --------------------------------------------------------------------------------------- preemption
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


# ----------------------------------------------------------------------------------- many processes
def test_four_processes_and_one_validation_case_equal_one_process(prepared, tmp_path):
    """Three of the four have nothing to validate."""
    settings = PRETRAIN | {"data": prepared, "precision": "fp64", "batch_size": 4, "steps": 3,
                           "workers": 0, "val_fraction": 0.01}
    for processes in (1, 4):
        out = tmp_path / str(processes)
        Run("pretrain", tmp_path / "output", processes, out=out, **settings).finish()
    one, four = (log_of(tmp_path / name) for name in ("1", "4"))
    assert [r["step"] for r in one] == [r["step"] for r in four] == [1, 2, 3]
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
    assert one[-1]["val_loss"] == pytest.approx(four[-1]["val_loss"], abs=1e-9)


def test_processes_without_a_case_to_evaluate(prepared, lesions, tmp_path):
    Run("finetune", tmp_path / "output", 4, data=prepared, task=lesions, out=tmp_path / "run",
        **FINETUNE | {"steps": 1, "batch_size": 4, "workers": 0}).finish()
    scored = json.loads((tmp_path / "run" / "fold_1" / "dice.json").read_text())
    fold = json.loads((tmp_path / "run" / "folds.json").read_text())["folds"][1]
    assert [record["case"] for record in scored] == sorted(fold["evaluate"]) and len(scored) == 3


def test_two_nodes_lose_a_process_restart_and_end_with_the_same_weights(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "workers": 0}
    Run("pretrain", tmp_path / "output", 2, out=tmp_path / "whole", **settings).finish()
    with torchrun(tmp_path, 2, 1, out=tmp_path / "cut", **settings) as nodes:
        wait_until(lambda: steps_logged(tmp_path / "cut") >= 3)
        os.kill(int((tmp_path / "pid.1.0").read_text()), signal.SIGKILL)
        codes = [node.wait(90) for node in nodes]
        assert codes == [0, 0], (tmp_path / "errors.0").read_text()[-2000:]
    assert len(list(tmp_path.glob("pid.*"))) == 4, "one restart"
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
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
@pytest.mark.parametrize(("nodes", "processes"), [(1, 4), (2, 2), (4, 1)])
def test_four_processes_on_one_two_or_four_nodes(prepared, tmp_path, nodes, processes):
    settings = PRETRAIN | {"data": prepared, "precision": "fp64", "batch_size": 4, "steps": 50,
                           "workers": 1}
    Run("pretrain", tmp_path / "output", out=tmp_path / "one", **settings).finish(seconds=300)
    with torchrun(tmp_path, nodes, processes, out=tmp_path / "four", **settings) as started:
        assert [node.wait(600) for node in started] == [0] * nodes
    one, four = (log_of(tmp_path / name) for name in ("one", "four"))
    assert len(one) == len(four) == 50
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9), a["step"]


# -------------------------------------------------------------------- several processes, one folder
def test_a_mistake_on_the_command_line_is_printed_once(tmp_path):
    output = Run("pretrain", tmp_path / "output", 2, stepss=3).finish(2, 2)
    assert output.count("error: unknown key 'stepss'") == 1, output


def test_a_second_process_in_a_run_folder_is_refused(prepared, lesions, tmp_path):
    """A job submitted again while the first still runs: both would write one checkpoint."""
    for name, settings in (("pretrain", PRETRAIN), ("finetune", FINETUNE | {"task": lesions})):
        settings = settings | {"data": prepared, "out": tmp_path / name, "steps": 10 ** 4,
                               "workers": 0}
        run = Run(name, tmp_path / "output", **settings)
        run.wait_for(lambda name=name: list((tmp_path / name).rglob("log.jsonl")))
        assert "another process is at work" in mistake(name, **settings)
        run.kill()
        Run(name, tmp_path / "again", **settings | {"estimate": "true"}).finish()


def signalled_in_set_up():
    open_data = pretrain.open_data

    def open_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return open_data(*arguments)
    pretrain.open_data = open_and_signal


def test_a_signal_before_the_first_step_ends_in_one_line(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path / "run"}
    output = Run("pretrain", tmp_path / "output", patch=signalled_in_set_up, **settings).finish()
    assert output.splitlines()[-1] == "stopped before the first step"


def test_an_estimate_of_a_run_that_was_cut_is_of_what_is_left(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path / "run", "steps": 1000, "workers": 0}
    run = Run("pretrain", tmp_path / "output", **settings)
    run.wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists())
    os.kill(run.parts[0].pid, signal.SIGTERM)
    run.finish()
    left = 1000 - checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"]
    output = Run("pretrain", tmp_path / "again", **settings | {"estimate": "true"}).finish()
    assert 0 < left < 1000 and f"; {left} steps: " in output


def test_a_machine_without_git(prepared, tmp_path):
    settings = PRETRAIN | {"data": prepared, "out": tmp_path / "run", "steps": 1}
    environment = {"PATH": str(tmp_path)}
    output = Run("pretrain", tmp_path / "output", environment=environment, **settings).finish()
    assert "'commit': 'unknown'" in output


# --------------------------------------------------------------------------------------------- soak
def memory_and_files(pid):
    """Resident bytes and number of open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.soak
def test_memory_and_open_files_stay_flat_over_2000_steps(prepared, tmp_path):
    settings = {"model": "unet_demo", "patch_size": 32, "batch_size": 8, "steps": 2000,
                "compile": "false", "precision": "fp32", "workers": 4, "log_every": 30,
                "val_every": 60, "val_fraction": 0.1}
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
    before = memory[:, thirds:2 * thirds].max(1)
    after = memory[:, 2 * thirds:].max(1)
    print("MiB", (before / 2 ** 20).round(1), (after / 2 ** 20).round(1))
    print("files", files[:, thirds:].max(1))
    assert (after < 1.05 * before).all(), (before, after)
    assert (files[:, 2 * thirds:].max(1) <= files[:, thirds:2 * thirds].max(1)).all()
