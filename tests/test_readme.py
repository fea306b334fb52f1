"""The pages cannot rot: every file, function, link and picture that they name exists, and every
command that they show is one that runs. They are README.md, CONTRIBUTING.md and docs/*.md."""

import argparse
import importlib
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT

import config
import sources

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
ALL_TEXT = "\n".join(PAGES.values())
README = PAGES["README.md"]
SCRIPTS = ("prepare_data", "pretrain", "finetune", "predict", "compare")
OTHERS = ("export",)  # shown on other pages


def without_code(text):
    """A page without its fenced blocks."""
    return re.sub(r"^ *```\n.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


# ----------------------------------------------------------------------------------------- commands
def commands():
    """(page, words of a command from its script on), from fenced blocks and running text."""
    for page, text in PAGES.items():
        blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for line in lines + re.findall(r"`((?:python|torchrun) [^`]+)`", text):
            if ".py" not in line or "pytest" in line:
                continue
            words = [word for word in shlex.split(line, comments=True) if word != "&"]
            at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if at is not None:
                yield page, words[at:]


def readable(value):
    return " ".join(value) if isinstance(value, list) else value


def stop_after_parsing(script, options, monkeypatch):
    """Run another script than ours until its own parser has read the options -> its exit code."""
    known = argparse.ArgumentParser.parse_args

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
    return end.value.code


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=readable)
def test_commands_are_understood(page, words, monkeypatch, capsys):
    """Options and config files are known; data and runs need not be there."""
    script, *options = words
    name = script.removesuffix(".py")
    if name in SCRIPTS + OTHERS:
        monkeypatch.chdir(ROOT)
        config.parse_config(importlib.import_module(name).Config, options)
    else:
        assert not stop_after_parsing(script, options, monkeypatch), capsys.readouterr().err


def test_every_script_is_shown():
    on_front = {words[0] for page, words in commands() if page == "README.md"}
    assert {f"{name}.py" for name in SCRIPTS} <= on_front


def test_every_make_target_that_is_shown_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = re.findall(r"(?:^|`)make ([a-z]+)", ALL_TEXT, re.MULTILINE)
    assert len(shown) > 5 and set(shown) <= set(targets)


def known_sources():
    """The layouts that `--source` takes by name."""
    files = {path.stem for path in (ROOT / "configs" / "sources").glob("*.yaml")}
    return files | set(getattr(sources, "SOURCES", ())) | {"manifest"}


def test_every_source_is_shown():
    assert len(known_sources()) > 10
    assert [name for name in known_sources() if f"`{name}`" not in PAGES["docs/data.md"]] == []


# ------------------------------------------------------------------------------ files and functions
@pytest.mark.parametrize(
    ("file", "names"), sorted(set(re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", ALL_TEXT)))
)
def test_functions_exist(file, names):
    source = (ROOT / file).read_text()
    for name in re.findall(r"\w+", names):
        pattern = rf"^\s*(def|class) {name}\b|^{name}\b.*="
        assert re.search(pattern, source, re.MULTILINE), f"{file}: {name}"


def test_paths_exist():
    paths = set(re.findall(r"[`(]((?:configs|docs|bench|tests|\.github)/[\w./]*)[`)]", ALL_TEXT))
    paths |= set(re.findall(r"`(\w+\.(?:py|sh|md|cff))`", README + PAGES["CONTRIBUTING.md"]))
    assert len(paths) > 30

    # What a run writes is no file of the project.
    written = {"summary.md"}
    assert sorted(path for path in paths - written if not (ROOT / path).exists()) == []


def test_the_map_has_every_file_once():
    """README and docs/code.md list all modules of the top level, and no other."""
    maps = README + PAGES["docs/code.md"]
    listed = re.findall(r"^\| `(\w+\.py)` \|", maps, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))


# ------------------------------------------------------------------------------- links and pictures
def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    """(page, target) of all links and pictures within the project."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", without_code(text)):
            if not target.startswith("https://"):
                yield page, target


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists()
    if anchor:
        assert anchor in anchors(file.read_text(encoding="utf-8"))


def test_every_page_and_picture_is_linked():
    """A page or picture that no other page leads to would not be found."""
    named = set()
    for page, target in links():
        named.add((ROOT / page).parent.joinpath(target.split("#")[0]).resolve())
    for pattern in ("docs/*.md", "docs/*.png", "bench/*.md"):
        assert set(ROOT.glob(pattern)) <= named


def test_links_out_of_the_project_are_https():
    assert re.findall(r"\]\(http:", ALL_TEXT) == []


def test_the_picture_of_figure_2_shows_what_pretraining_does(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "method.png"
    monkeypatch.setattr(sys, "argv", ["method_figure.py", str(path)])
    names = runpy.run_path(str(ROOT / "docs" / "method_figure.py"), run_name="__main__")
    assert path.read_bytes()[1:4] == b"PNG"

    views = names["pretraining_views"]()
    hidden = views["input"] == 0
    assert 0.5 < hidden.mean() < 0.75, "60 % of the tokens, and the air"
    assert np.array_equal(views["input"][~hidden], views["augmented"][~hidden])
    for first, second in (("patch", "target"), ("target", "augmented")):
        assert np.abs(views[first] - views[second]).max() > 0.1, "a stranger sees the step"


# ---------------------------------------------------------------------------------------- the prose
def paragraphs(text):
    """The paragraphs and list items of a page, as one line each; no tables, no headings."""
    lines = re.sub(r"^( *([*]|\d+[.]) )", r"\n\1", without_code(text), flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", lines):
        if not block.lstrip().startswith(("|", "#")):
            yield " ".join(block.split())


@pytest.mark.parametrize("page", PAGES)
def test_sentences_and_paragraphs_are_short(page):
    for paragraph in paragraphs(PAGES[page]):
        assert len(paragraph.split()) <= 100, paragraph
        for sentence in re.split(r"(?<=[.?!:])\s", paragraph):
            assert len(sentence.split()) <= 40, sentence


def test_readme_is_a_front_page():
    assert len(README.splitlines()) <= 160
    first_screen = "\n".join(README.splitlines()[:25])
    expected = (
        "arxiv.org/abs/2408.00640",
        "github.com/asbjrnmunk/amaes",
        "zenodo.org/records/13604788",
        "## Status",
        "never on a GPU",
        "That pretraining helps on real scans has not been",
    )
    assert [words for words in expected if words not in first_screen] == []


# ---------------------------------------------------------------------------- citation and workflow
def test_the_citation_is_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("AMAES: Augmented Masked Autoencoder Pretraining")
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Munk", "Ambsdorf", "Llambias", "Nielsen"]
    assert "2408.00640" in paper["url"]


def test_the_workflow_runs_the_same_tests():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make test"]
    assert {"python-version": "3.11"} in [step.get("with") for step in steps]
