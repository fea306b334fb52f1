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
