"""reproduce.sh: every command is one that the scripts take, each step uses what earlier ones made,
and the tables are whole. In the soak it runs, at SCALE=tiny."""

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from test_compare import cells

import compare
import config
import sources
import tasks


def reproduce(timeout=60, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(["bash", str(ROOT / "reproduce.sh")], capture_output=True, text=True,
                          timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def commands():
    """What DRY=1 prints, for the paper and for SCALE=tiny: {scale: [(script, its Config)]}."""
    found = {}
    for scale in ("paper", "tiny"):
        result = reproduce(DRY="1", SCALE=scale)
        assert result.returncode == 0 and not result.stderr
        found[scale] = []
        for line in result.stdout.splitlines():
            words = shlex.split(line)
            at = next(i for i, word in enumerate(words) if word.endswith(".py"))
            name = os.path.basename(words[at]).removesuffix(".py")
            if name != "phantom":
                config_class = importlib.import_module(name).Config
                found[scale].append((name, config.parse_config(config_class, words[at + 1:])))
    return found


def test_every_option_is_known_and_every_config_is_there(commands):
    shown = {name for name, _ in commands["paper"]}
    assert shown == {"prepare_data", "pretrain", "finetune", "compare"}
    for name, cfg in commands["paper"]:
        if name == "prepare_data":
            assert cfg.table or cfg.source in sources.SOURCES
        if name == "finetune":
            tasks.read_task(cfg.task)


def task_of(cfg):
    return os.path.basename(cfg.task).removesuffix(".yaml")


def test_tiny_runs_the_same_commands(commands):
    keys = {"prepare_data": ["source", "table"], "compare": ["table", "inputs", "out"],
            "pretrain": ["model", "objective", "decoder", "skips", "augment", "out"],
            "finetune": ["model", "ckpt", "augment", "n_train", "out"]}

    def what_counts(scale):
        """Of each command what both scales must share."""
        for name, cfg in commands[scale]:
            task = task_of(cfg) if name == "finetune" else None
            yield name, [getattr(cfg, key) for key in keys[name]], task

    assert list(what_counts("paper")) == list(what_counts("tiny"))
    for _, cfg in commands["tiny"]:
        if hasattr(cfg, "steps"):
            assert cfg.device == "cpu" and cfg.steps < 5


def trained(commands):
    """Each finetuning, in order: (run folder, model, origin, Config of its pretraining or None, its
    own Config)."""
    pretrained = {}
    for name, cfg in commands:
        if name == "pretrain":
            folder = cfg.out or f"runs/{cfg.model}"
            assert folder not in pretrained, "two runs in one folder"
            pretrained[folder] = cfg
        if name == "finetune":
            before = pretrained[os.path.dirname(cfg.ckpt)] if cfg.ckpt else None
            model = before.model if before else cfg.model
            origin = before.objective if before else "scratch"
            yield cfg.out or f"runs/{task_of(cfg)}-{model}-{origin}", model, origin, before, cfg


def test_each_step_uses_what_an_earlier_one_made(commands):
    folders = [folder for folder, *_ in trained(commands["paper"])]
    compared = [run for name, cfg in commands["paper"] if name == "compare" for run in cfg.inputs]
    assert len(folders) == len(set(folders)) and set(folders) == set(compared)
    at = [folders.index(f"runs/{task}-unet_b-amaes") for task in ("wmh", "wmh_ood")]
    assert at == sorted(at), "wmh_ood evaluates the networks of wmh"


def test_the_runs_fill_the_tables(commands):
    """Each row of compare.py's tables, told from the settings, and each source of Table 1."""
    prepared = [cfg.source for name, cfg in commands["paper"] if getattr(cfg, "source", None)]
    assert prepared == "adni oasis3 oasis4 ppmi brats21 isles22 wmh msseg1 msd".split()

    filled = set()
    for _, model, origin, before, cfg in trained(commands["paper"]):
        if cfg.augment == "auto":
            pretraining = dataclasses.asdict(before) if before else None
            run = {"model": model, "origin": origin, "pretraining": pretraining}
            filled.add((compare.row_of(run), task_of(cfg)))
    assert filled == {(row, task) for rows, tasks, _ in compare.TABLES.values()
                      for row in rows for task in tasks}


@pytest.mark.soak
def test_tiny_reproduces_every_table(tmp_path):
    result = reproduce(timeout=3600, SCALE="tiny", WORK=str(tmp_path))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    for table, (printed, columns, _) in compare.TABLES.items():
        laid_out = cells((tmp_path / "runs" / f"table{table}.md").read_text())[f"Table {table}"]
        assert len(laid_out) == len(printed)
        for line in laid_out.values():
            for title in columns.values():
                assert line[title] != "-" and line[f"{title}, paper"] != "-"
        if table == 2:
            assert all(line["hours"] != "-" for line in laid_out.values())
