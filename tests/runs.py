"""Starts the scripts as a user does, in one process or several, and without the wait for imports: a
server that has imported torch forks them. And torchrun itself, on several nodes."""

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import config

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "nibabel", "yaml", "tqdm"])

# Settings of runs that take seconds.
TINY = {"model": "unet_demo", "patch_size": 32, "batch_size": 2, "log_every": 1, "compile": "false",
        "precision": "fp32", "workers": 1, "lr": 1e-3}
PRETRAIN = TINY | {"features": 4, "steps": 12, "save_every": 2, "val_every": 3, "val_fraction": 0.4,
                   "warmup_epochs": 0.5}
FINETUNE = TINY | {"features": 4, "steps": 6, "save_every": 2, "folds": 1}


def words_of(settings):
    """Settings as they are typed: --key value."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def child(name, words, environment, output, patch):
    """In a session of its own: one script, its command line, what it prints into a file."""
    os.setsid()
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # for the loader, as anywhere else
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    torch.set_num_threads(1)
    module = importlib.import_module(name)
    if patch:
        patch()
    sys.argv = [name, *words]
    config.run(module.main, module.Config)


class Run:
    """A script in the background. patch: called in each process before main, to break something."""

    def __init__(self, name, output, processes=1, patch=None, environment=None, **settings):
        self.output, self.parts = Path(output), []
        words = words_of(settings)
        port = str(random.randrange(20000, 30000))
        for rank in range(processes):
            place = {} if processes == 1 else {
                "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            arguments = name, words, (environment or {}) | place, output, patch
            self.parts.append(SERVER.Process(target=child, args=arguments))
            self.parts[-1].start()

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds=60):
        """Exit codes; whoever is still there after `seconds` fails the test."""
        deadline = time.time() + seconds
        for part in self.parts:
            part.join(max(0, deadline - time.time()))
        late = [part.pid for part in self.parts if part.exitcode is None]
        self.kill()
        assert not late, f"{late} still run\n{self.text()[-3000:]}"
        return [part.exitcode for part in self.parts]

    def finish(self, *codes, seconds=60):
        """Wait for these exit codes, by default 0 -> what was printed."""
        assert self.wait(seconds) == list(codes or (0,) * len(self.parts)), self.text()[-3000:]
        return self.text()

    def kill(self):
        for part in self.parts:
            part.kill()
            part.join()

    def wait_for(self, condition, seconds=60):
        """Poll until the condition holds; the run must not end before."""
        deadline = time.time() + seconds
        while not condition():
            assert self.parts[0].exitcode is None and time.time() < deadline, self.text()[-3000:]
            time.sleep(0.002)


def steps_logged(folder):
    path = Path(folder) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


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
    """One torchrun for each node, all on one machine, running pretrain.py.

    Each process leaves the files pid.<rank>.<attempt> and exit.<rank>.<attempt> in `folder`."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), folder=str(folder), patch=patch))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
               f"--nproc_per_node={processes}", "--rdzv_backend=c10d", f"--max-restarts={restarts}",
               f"--rdzv_endpoint=localhost:{random.randrange(20000, 30000)}", str(driver),
               *words_of(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []
    for node in range(nodes):
        errors = open(folder / f"errors.{node}", "w")
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                                        stderr=errors, env=environment))
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
