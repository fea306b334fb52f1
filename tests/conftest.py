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
from unittest import mock

import pytest
import torch
from folders import TASK
from runs import ROOT, words_of

import config

torch.set_num_threads(1)

# Settings of a finetuning that takes seconds.
FINETUNE = {"steps": 6, "patch_size": 32, "batch_size": 2, "save_every": 4, "log_every": 1,
            "compile": "false", "precision": "fp32", "workers": 1, "lr": 1e-3, "overlap": 0}


def script(*words, processes=None, check=0, **settings):
    """Run a script as a user does, in a process of its own. check: the exit code it must have."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, *map(str, words), *words_of(settings)]
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


@contextlib.contextmanager
def handlers_put_back():
    """Whatever happens within, the next script finds the handlers of signals as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(name, *words, **settings):
    """A script in this process, which is quicker -> what it printed."""
    module = importlib.import_module(name)
    words = [*map(str, words), *words_of(settings)]
    output = io.StringIO()
    with handlers_put_back():
        try:
            with contextlib.redirect_stdout(output):
                module.main(config.parse_config(module.Config, words))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return output.getvalue()


def mistake(name, *words, **settings):
    """The one line with which a script refuses, exit code 2; in this process, which is quicker."""
    module = importlib.import_module(name)
    errors = io.StringIO()
    command = [name, *map(str, words), *words_of(settings)]
    with handlers_put_back(), mock.patch.object(sys, "argv", command):
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
            config.run(module.main, module.Config)
    line = errors.getvalue()
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


class Bomb:
    """Whoever unpickles it without care makes the file at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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
    path = tmp_path_factory.mktemp("task") / "lesions.yaml"
    path.write_text(json.dumps(TASK))
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
