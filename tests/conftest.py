"""A small phantom cohort, raw and prepared, shared by the tests that run the scripts."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

# Settings of a finetuning that takes seconds.
FINETUNE = {"steps": 6, "patch_size": 32, "batch_size": 2, "save_every": 4, "log_every": 1,
            "compile": "false", "precision": "fp32", "workers": 1, "lr": 1e-3, "overlap": 0}


def script(*words, processes=None, check=0, **settings):
    """Run a script as a user does, in a process of its own. check: the exit code it must have."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [*launcher, *map(str, words), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    report = f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert result.returncode == check, report
    return result


def call(module, *words):
    """A script as it is typed, in this process, which is quicker."""
    module.main(config.parse_config(module.Config, list(map(str, words))))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(name, *words, **settings):
    """A script in this process, which is quicker -> what it printed."""
    module = importlib.import_module(name)
    words = [str(word) for word in words]
    for key, value in settings.items():
        words += [f"--{key}", str(value)]

    # Whatever happens, the next script finds no process group and no handlers of signals.
    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.redirect_stdout(output):
            module.main(config.parse_config(module.Config, words))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return output.getvalue()


def mistake(name, *words, **settings):
    """The one line with which a script refuses, exit code 2; in this process, which is quicker."""
    module, errors = importlib.import_module(name), io.StringIO()
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    argv, sys.argv = sys.argv, [name, *map(str, words), *options]
    try:
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
            config.run(module.main, module.Config)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    line = errors.getvalue()
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


def calls_of(function, *arguments):
    """How many functions, of Python and of C, are called in a call: its work, on any machine."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return count


def log_of(folder):
    with open(Path(folder) / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "bids"
    script("tests/phantom.py", out=folder, subjects=6, labelled=5, layout="bids", size=48, seed=0)
    return folder


@pytest.fixture(scope="session")
def prepared(raw):
    folder = raw.parent / "prepared"
    script("prepare_data.py", source="bids", input=raw, out=folder, workers=2)
    return folder


@pytest.fixture(scope="session")
def lesions(tmp_path_factory):
    """A task on the prepared phantoms: its file."""
    task = {"data": "set by --data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
            "labels": {0: 0, 1: 1}, "n_train": 2, "folds": 2}
    path = tmp_path_factory.mktemp("task") / "lesions.yaml"
    path.write_text(json.dumps(task))
    return path


@pytest.fixture(scope="session")
def pretrained(prepared, tmp_path_factory):
    """The checkpoint of a pretraining of two steps."""
    out = tmp_path_factory.mktemp("pretrained")
    script("pretrain.py", data=prepared, out=out, model="unet_demo", patch_size=32, batch_size=2,
           steps=2, val_fraction=0.2, compile="false", precision="fp32", workers=0)
    return out / "last.pt"


@pytest.fixture(scope="session")
def finetuned(prepared, pretrained, lesions, tmp_path_factory):
    """A finished finetuning of it: the run folder, and what was printed."""
    out = tmp_path_factory.mktemp("finetuned")
    result = script("finetune.py", ckpt=pretrained, task=lesions, data=prepared, out=out,
                    **FINETUNE)
    return out, result.stdout
