"""Starts the scripts as a user does, one process or several, but at once: a server that has imported torch
forks them."""

import importlib
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import torch

import config

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "nibabel", "yaml", "tqdm"])


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
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
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
