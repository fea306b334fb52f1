"""The objective of section 3.1; that a run is the same with any number of processes."""

import math
import os
import re
import threading

import pytest
import torch
from conftest import log_of, mistake
from runs import Run
from torch._dynamo.testing import CompileCounter

import amaes
import checkpoint
import data
import devices
import models
import pretrain
import training

TINY = {"model": "unet_demo", "patch_size": 32, "batch_size": 4, "steps": 20, "log_every": 1,
        "save_every": 5, "val_fraction": 0.2, "compile": "false", "precision": "fp32",
        "workers": 1, "lr": 1e-3, "warmup_epochs": 0.5}


# ---------------------------------------------------------------------------------------- objective
@pytest.mark.parametrize(("side", "hidden"), [
    (128, 19661), (96, 13824 - 5529), (64, 2458), (32, 308)])
def test_mask_hides_an_exact_count_of_whole_tokens(side, hidden):
    mask = amaes.random_mask([3, 4], (side,) * 3, 4, 0.6, "cpu")
    assert mask.shape == (2, 1, side, side, side) and mask.dtype == torch.bool
    tokens = mask.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(-3)
    assert (tokens.all(-1) | ~tokens.any(-1)).all(), "a token is hidden whole or not at all"
    assert tokens[..., 0].sum((1, 2, 3, 4)).tolist() == [hidden, hidden]
    assert (mask[0] != mask[1]).any()


def test_mask_depends_on_its_seed_alone():
    both = amaes.random_mask([3, 4], (16, 32, 48), 4, 0.6, "cpu")
    assert torch.equal(both[1:], amaes.random_mask([4], (16, 32, 48), 4, 0.6, "cpu"))
    with pytest.raises(ValueError, match="multiple of the token size"):
        amaes.random_mask([0], (18, 16, 16), 4, 0.6, "cpu")


def test_loss_regions():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.rand(2, 2, 1, 16, 16, 16, generator=generator)
    mask = amaes.random_mask([1, 2], (16,) * 3, 4, 0.6, "cpu")
    error = ((output - target) ** 2).numpy()

    # The loss of all voxels, and of the masked ones.
    everywhere = amaes.reconstruction_loss(output, target, mask, "all").item()
    assert everywhere == pytest.approx(error.mean(), rel=1e-6)
    masked = amaes.reconstruction_loss(output, target, mask, "masked").item()
    assert masked == pytest.approx(error[mask.numpy()].mean(), rel=1e-6)

    # The sums for the log say the same.
    sums = amaes.error_sums(output, target, mask)
    assert sums[0].item() / sums[1].item() == pytest.approx(masked, rel=1e-6)
    visible = error[~mask.numpy()].mean()
    assert sums[2].item() / sums[3].item() == pytest.approx(visible, rel=1e-6)


def test_learning_rate_warms_up_and_reaches_zero_at_the_last_step():
    rates = [training.learning_rate(step, 100, 10, 1e-4) for step in range(100)]
    assert rates[0] == pytest.approx(1e-7) and max(rates) == rates[10] == 1e-4 and rates[-1] == 0
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[10 + 40] == pytest.approx(0.5e-4 * (1 + math.cos(math.pi * 40 / 89)))


# --------------------------------------------------------------------------------------------- runs
def test_two_processes_equal_one(prepared, tmp_path):
    """The losses to 1e-9 in fp64; in fp32 only the first, then rounding alone drives them apart."""
    for processes in (1, 2):
        for precision, steps in (("fp64", 20), ("fp32", 1)):
            settings = TINY | {"features": 4, "precision": precision, "steps": steps}
            run = Run("pretrain", tmp_path / "output", processes, data=prepared,
                      out=tmp_path / f"{precision}-{processes}", **settings)
            run.finish(seconds=120)

    one, two = (log_of(tmp_path / f"fp64-{processes}") for processes in (1, 2))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9), f"step {a['step']}"
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], abs=1e-9)

    one, two = (log_of(tmp_path / f"fp32-{processes}") for processes in (1, 2))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-6)


def test_validation_loss_falls(prepared, tmp_path):
    settings = TINY | {"steps": 60, "val_every": 5, "lr": 3e-3, "save_every": 1000}
    run = Run("pretrain", tmp_path / "output", data=prepared, out=tmp_path, **settings)
    run.finish(seconds=120)
    values = [record["val_masked"] for record in log_of(tmp_path) if "val_masked" in record]
    assert values[-1] < 0.7 * values[0], values


def test_checkpoint_knows_what_it_saw(prepared, tmp_path):
    settings = TINY | {"steps": 1}
    Run("pretrain", tmp_path / "output", data=prepared, out=tmp_path, **settings).finish()
    saved = checkpoint.load_checkpoint(tmp_path / "last.pt")
    volumes = data.read_index(str(prepared))
    seen = {v.sha256 for v in volumes if f"{v.source}/{v.subject}" in saved["subjects"]}
    assert set(saved["sha256"]) == seen and 0 < len(seen) < len(volumes)


def test_estimate_measures_and_writes_nothing(prepared, tmp_path):
    settings = TINY | {"data": prepared, "out": tmp_path / "run", "steps": 1000,
                       "estimate": "true"}
    output = Run("pretrain", tmp_path / "output", 2, **settings).finish()
    found = re.search(r"step ([\d.e-]+) s, (\d+)% of it waiting for data; 1000 steps: ([\d.]+) "
                      r"hours; peak memory of a process ([\d.]+) of ([\d.]+) GiB: fits", output)
    step, waiting, hours, peak, memory = map(float, found.groups())
    assert hours == pytest.approx(1000 * step / 3600, abs=0.006) and waiting <= 100
    assert 0.1 < peak < memory and not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------- compilation
@pytest.mark.soak
@pytest.mark.parametrize("row", ["unet_b", "mednext_m", "swinunetr"])
@pytest.mark.parametrize("task", ["pretrain", "segment", "swin"])
def test_every_network_is_one_graph(row, task):
    if task == "swin" and row != "swinunetr":
        pytest.skip("the objective of [23] is SwinUNETR's")
    counter = CompileCounter()
    model = devices.quicken(models.build_model(row, task, features=16), "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            output = compiled(torch.rand(1, 1, 64, 64, 64))
            parts = output if task == "swin" else [output]
            sum(part.sum() for part in parts).backward()
    assert counter.frame_count == 1


def test_one_graph_and_no_recompiles_over_a_run(prepared, tmp_path, monkeypatch):
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda model, options=None: compile_(model, backend=counter))
    monkeypatch.setattr(training, "catch_signals", threading.Event)
    settings = TINY | {"data": str(prepared), "out": str(tmp_path), "steps": 5, "val_every": 2,
                       "workers": 0, "micro_batch": 2, "compile": True}
    torch._dynamo.reset()

    # DistributedDataParallel would cut the graph where its gradients start to travel.
    with torch._dynamo.config.patch(error_on_recompile=True, optimize_ddp=False):
        pretrain.main(pretrain.Config(**settings))
    torch.distributed.destroy_process_group()
    assert counter.frame_count == 2, "the probe and the model"


def no_compiler():
    torch._inductor.config.cpp.cxx = (None, "/nowhere/g++")


def test_without_a_compiler_a_run_goes_on_with_one_warning(prepared, tmp_path):
    settings = TINY | {"steps": 2, "compile": "true", "workers": 0}
    output = Run("pretrain", tmp_path / "output", 2, no_compiler, data=prepared,
                 environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
                 out=tmp_path / "run", **settings).finish()
    assert output.count("warning: torch.compile fails here, going on without it: ") == 1, output
    assert len(log_of(tmp_path / "run")) == 2


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("settings", "message"), [
    ({"data": "/nowhere"}, "not a prepared folder"),
    ({"patch_sze": 16}, "did you mean 'patch_size'"),
    ({"lr": "fast"}, "expected float, got 'fast'"),
    ({"steps": 1.5}, "expected int"),
    ({"model": "unet_xxl"}, "unet_xl"),
    ({"batch_size": 3, "micro_batch": 2}, "micro_batch 2 does not divide"),
    ({"micro_batch": -1}, "micro_batch in the command line: -1 is out of range"),
    ({"log_every": 0}, "log_every in the command line: 0 is out of range"),
    ({"mask_ratio": 1.5}, "mask_ratio 1.5"),
    ({"patch_size": 20}, "multiple of 16"),
    ({"patch_size": 16}, "multiple of 16, at least 2 times that"),
    ({"patch_size": 32, "precision": "bf16"}, "at least 3 times that in bf16 on a CPU"),
    ({"augment": "some"}, "choose none, spatial, all"),
    ({"objective": "swin"}, "objective swin pretrains swinunetr, not unet_demo"),
    ({"objective": "swin", "model": "swinunetr", "batch_size": 1, "patch_size": 64},
     "give --batch_size 2 or more"),
    ({"objective": "mae"}, "choose amaes, swin"),
    ({"model": "swinunetr", "merge": "new"}, "merge 'new': choose fixed, legacy"),
    ({"model": "swinunetr", "features": 20}, "SwinUNETR needs a multiple of 16"),
])
def test_a_mistake_ends_in_one_line(prepared, tmp_path, settings, message):
    assert message in mistake("pretrain", **TINY | {"data": prepared, "out": tmp_path} | settings)


@pytest.mark.parametrize(("row", "precision"), [
    ("unet_demo", "fp32"), ("unet_demo", "bf16"), ("mednext_m", "bf16"), ("swinunetr", "fp32")])
def test_a_run_warns_of_nothing(prepared, tmp_path, row, precision):
    """Of gradients laid out otherwise than their weights, for one."""
    settings = TINY | {"model": row, "features": 16, "steps": 2, "patch_size": 64, "batch_size": 1,
                       "precision": precision, "workers": 0}
    output = Run("pretrain", tmp_path / "output", data=prepared, out=tmp_path / "run",
                 **settings).finish()
    assert "arning" not in output, output


def test_a_stray_word_ends_in_one_line():
    assert "'unet_b' is neither a --key nor a .yaml file" in mistake("pretrain", "unet_b")


def test_a_run_with_other_settings_is_not_continued(prepared, tmp_path):
    settings = TINY | {"steps": 1}
    Run("pretrain", tmp_path / "output", data=prepared, out=tmp_path, **settings).finish()
    changed = settings | {"mask_ratio": 0.5}
    assert "mask_ratio 0.6 -> 0.5" in mistake("pretrain", data=prepared, out=tmp_path, **changed)


def test_a_run_on_other_data_is_not_continued(prepared, tmp_path):
    """Own scans given to the command of an earlier run would be trained on from its last step, or
    not at all."""
    settings = TINY | {"steps": 1, "out": tmp_path / "run"}
    Run("pretrain", tmp_path / "output", data=prepared, **settings).finish()
    os.makedirs(tmp_path / "other/index")
    os.symlink(prepared / "volumes", tmp_path / "other/volumes")
    parts = sorted(prepared.glob("index/*.csv"))
    lines = "".join(part.read_text() for part in parts).splitlines()
    (tmp_path / "other/index/all.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert "other data: new --out" in mistake("pretrain", data=tmp_path / "other", **settings)
