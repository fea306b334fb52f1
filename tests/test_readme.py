"""README.md cannot rot: every file and function it names exists, every command it shows is one that runs."""

import argparse
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

import config

README = (ROOT / "README.md").read_text()
SCRIPTS = ("prepare_data", "pretrain", "finetune", "predict", "compare")


def commands():
    """Words of each command in the fenced blocks and in the running text, from its script on."""
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines + re.findall(r"`((?:python|torchrun) [^`]+)`", README):
        words = [word for word in shlex.split(line, comments=True) if word != "&"]
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if at is not None:
            yield words[at:]


@pytest.mark.parametrize(("file", "names"), re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", README))
def test_functions_exist(file, names):
    source = (ROOT / file).read_text()
    for name in re.findall(r"\w+", names):
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", source, re.MULTILINE), f"{file}: {name}"


def test_paths_exist():
    paths = re.findall(r"[`(]((?:configs|docs|bench|tests)/[\w./]*)[`)]", README)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_are_understood(words, monkeypatch, capsys):
    script, *options = words
    name = script.removesuffix(".py")
    if name in SCRIPTS:  # options and config files are known; data and runs need not be there
        monkeypatch.chdir(ROOT)
        config.parse_config(importlib.import_module(name).Config, options)
        return
    known = argparse.ArgumentParser.parse_args  # others: their own parser, then no further

    def parse_and_stop(parser, *_):
        known(parser, options)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend((ROOT / script).parent)  # as python itself does
    spec = importlib.util.spec_from_file_location("shown", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert not end.value.code, capsys.readouterr().err


def test_every_script_and_source_is_shown():
    shown = {words[0] for words in commands()}
    assert {f"{name}.py" for name in SCRIPTS} <= shown
    sources = importlib.import_module("sources")
    assert [s for s in [*sources.SOURCES, "manifest"] if f"`{s}`" not in README] == []
