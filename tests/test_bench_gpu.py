"""bench/gpu.py, which nobody can run to the end without a GPU, runs so with --tiny on a CPU."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script

import fast_cuda
import models

POSITIVE = ("ms", "forward_ms", "both_ms", "ms_a_sample", "tflops", "dense_tflops", "copy_tb_s",
            "first_s", "forward_s", "host_s", "whole_s", "seconds")


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def numbers(value):
    """All numbers in nested containers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a tiny run of every section prints."""
    out = tmp_path_factory.mktemp("gpu") / "GPU.jsonl"
    printed = script("bench/gpu.py", "--tiny", out=out).stdout
    assert out.read_text() == printed
    return [json.loads(line) for line in printed.splitlines()]


def test_every_section_finds_something(gpu, found):
    assert list(dict.fromkeys(line["section"] for line in found)) == list(gpu.SECTIONS)
    assert not [line for line in found if "error" in line or "left out" in line["finding"]]


def test_values_are_finite_and_times_positive(found):
    for line in found:
        assert all(math.isfinite(number) and number >= 0 for number in numbers(line)), line
        assert all(number > 0 for key in POSITIVE for number in numbers(line.get(key, []))), line


def test_the_forms_agree(found):
    """Output and gradients of each network, under each switch, in float32."""
    lines = [line for line in found if line["section"] == "networks"]
    keys = {key for line in lines for key in line}
    assert keys >= {"channels_last", "shifts", "sdpa", "benchmark"}
    assert all(line["output"] < 1e-5 and line["gradient"] < 1e-3 for line in lines)


def test_the_scripts_save_and_go_on(found):
    lines = [line for line in found if line["section"] == "scripts"]
    said = {line["finding"]: " ".join(line["said"]) for line in lines}
    assert "276925 steps" in said["estimate"] and "holds step" in said["signalled"]
    assert "continues at step" in said["continued, signalled"] and "Dice" in said["predict"]


def test_a_failure_costs_its_section(gpu, monkeypatch, tmp_path, capsys):
    def broken(options):
        yield "before", {"value": 1}
        raise RuntimeError("no kernel image")

    rows, seen = dict(models.ROWS), torch.backends.cudnn.benchmark
    monkeypatch.setitem(gpu.SECTIONS, "augmentations", broken)
    words = ["--tiny", "--only", "machine,augmentations,layers", "--out", str(tmp_path / "lines")]
    assert gpu.main(words) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sections = [line["section"] for line in lines]
    assert sections[:4] == ["machine", "augmentations", "augmentations", "layers"]
    assert [line["error"] for line in lines if "error" in line] == ["RuntimeError: no kernel image"]
    assert models.ROWS == rows
    torch.backends.cudnn.benchmark = seen


def test_what_there_is_no_time_for_is_left_out(gpu, tmp_path, capsys):
    words = ["--tiny", "--only", "machine,layers", "--minutes", "0"]
    words += ["--out", str(tmp_path / "lines")]
    assert gpu.main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["finding"] for line in lines] == ["left out: no time"] * 2


def test_switches_are_those_of_the_scripts(gpu):
    before = torch.backends.cudnn.benchmark
    turned = gpu.switch(shifts=True, sdpa=False, benchmark=False)
    assert turned["shifts"] and fast_cuda.SHIFTS and not fast_cuda.SDPA
    fast_cuda.install(torch.nn.Identity())
    assert not torch.backends.cudnn.benchmark, "a network that is made later does not turn it back"
    gpu.switch()
    assert (fast_cuda.CHANNELS_LAST, fast_cuda.SHIFTS, fast_cuda.SDPA,
            torch.backends.cudnn.benchmark) == tuple(gpu.DEFAULTS.values())
    torch.backends.cudnn.benchmark = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, ROOT / "bench" / "gpu.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "bench/gpu.py needs a GPU; --tiny runs it small, on a CPU\n"
