"""What only a GPU runs, as far as a CPU can tell: waits, pinned batches, graphs.

Its quick forms of the networks are in test_fast.py."""

import collections
import contextlib
import json
import os
import sys
import threading
import traceback
import types
from unittest import mock

import pytest
import torch
from conftest import log_of
from folders import TASK
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import pin_memory

import augment
import config
import data
import devices
import fast_cuda
import finetune
import models
import pretrain
import resample
import training

META = torch.device("meta")
HERE = os.path.dirname(os.path.abspath(augment.__file__))
TESTS = os.path.dirname(os.path.abspath(__file__))


# ------------------------------------------------------------------ a step that waits for nothing
class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU, with the device meta in its place."""

    READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
             "aten::unique_dim", "aten::equal", "aten::is_nonzero"}

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __enter__(self):
        tensor = torch.tensor

        def from_list(values, device=None, **settings):  # torch's own hides its copy from the mode
            made = tensor(values, **settings)
            return made if device is None else made.to(device)

        self.patch = mock.patch.object(torch, "tensor", from_list)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def note(self, what):
        own = ("note", "__torch_dispatch__", "from_list")
        place = [frame for frame in traceback.extract_stack()
                 if os.path.dirname(frame.filename) in (HERE, TESTS) and frame.name not in own][-1]
        self.found[f"{os.path.basename(place.filename)}:{place.lineno}: {what}"] += 1

    def __torch_dispatch__(self, function, kinds, arguments=(), settings=None):
        settings = settings or {}
        name, source = function._schema.name, arguments[0] if arguments else None
        if name in self.READS and any(isinstance(a, torch.Tensor) and a.is_meta for a in arguments):
            self.note(name)
            if name == "aten::_local_scalar_dense":
                return 0.0
        if name != "aten::_to_copy":
            return function(*arguments, **settings)

        target = torch.device(settings.get("device") or source.device)
        if source.device.type == target.type:
            return function(*arguments, **settings)
        if not settings.get("non_blocking"):
            self.note(f"blocking copy {source.device.type}->{target.type}, {source.nbytes} bytes")
        elif not source.is_meta and source.nbytes > 2 ** 16:
            if not getattr(source, "pinned", False):
                self.note("upload above 64 KiB out of memory that is not pinned")
        if source.is_meta:
            return torch.zeros(source.shape, dtype=settings.get("dtype") or source.dtype)
        return function(*arguments, **settings)


def pinned(tensor):
    tensor.pinned = True
    return tensor


@pytest.fixture
def on_meta(monkeypatch):
    """Stands in for what a GPU has and meta has not: pinned memory, generators, autocast.

    And keeps the setting of cuDNN that fast_cuda makes."""
    generator = types.SimpleNamespace(manual_seed=lambda seed: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch, "Generator", lambda *_: generator)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def batches(side, classes, seeds=60, size=2):
    """Batches as the loader hands them over: pinned. 60 draws apply every transform of Table 5."""
    for seed in range(0, seeds, size):
        draws = [augment.draw(seed + i, "all", side) for i in range(size)]
        crops = [pinned(torch.zeros(1, *d.context, dtype=torch.float16)) for d in draws]
        labels = None
        if classes:
            labels = [pinned(torch.zeros(*d.context, dtype=torch.uint8)) for d in draws]
        yield data.Batch(crops, labels, draws, [seed, seed + 1], ["x"] * size, "")


@pytest.mark.parametrize(("objective", "row"), [("amaes", "unet_demo"), ("amaes", "mednext_m"),
                                                ("swin", "swinunetr")])
def test_a_step_of_pretraining_waits_for_nothing(on_meta, objective, row):
    cfg = pretrain.Config(objective=objective, model=row)
    chosen = pretrain.choose_objective(objective, META, cfg.precision, cfg.token_size,
                                       cfg.mask_ratio, cfg.augmented_target, cfg.loss_region)
    with META:
        model = fast_cuda.install(models.build_model(row, chosen.purpose, features=16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seeds = 60 if row == "unet_demo" else 4
    with Waits() as waits:
        for batch in batches(cfg.patch_size, 0, seeds):
            loss, _ = chosen.loss(model, batch, logging=False)
            loss.backward()
            training.to_host(0, batch.names, loss)
            optimizer.step()
            optimizer.zero_grad()
    assert not waits.found


def test_a_step_of_finetuning_waits_for_nothing(on_meta):
    cfg = finetune.Config(task="wmh", lr=1e-4)
    with META:
        model = fast_cuda.install(models.build_model("unet_demo", "segment", out_channels=4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Waits() as waits:
        for step, batch in enumerate(batches(cfg.patch_size, 4)):
            loss, _ = finetune.segmentation_loss(model, batch, META, cfg.precision)
            training.to_host(step, batch.names, loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not waits.found


def test_what_would_wait_is_seen(on_meta):
    """The check itself: each of the things that it looks for."""
    x, large = torch.zeros(4, device=META), torch.zeros(2 ** 15)
    with Waits() as waits:
        float(x.sum())
        torch.zeros(4).to(META)
        torch.tensor([1, 2], device=META)
        large.to(META, non_blocking=True)
        x.cpu()
        resample.upload(large.clone(), META)  # pinned: not noted
    assert sorted(waits.found.values()) == [1, 1, 1, 1, 1]


def test_upload_is_the_tensor():
    x = torch.rand(3)
    assert resample.upload(x, "cpu") is x and resample.upload(x, torch.device("cpu")) is x


# --------------------------------------------------------------------------------- pinned batches
def test_a_pinned_batch_is_the_batch(monkeypatch):
    """torch's own code, which only a GPU enters, takes our tuples apart and makes them again."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    for batch in batches(16, 2, seeds=20):
        found = pin_memory.pin_memory(batch, "cpu")
        assert type(found) is data.Batch and found.draws == batch.draws
        assert all(type(draw) is augment.Draw for draw in found.draws)
        assert found[3:] == batch[3:], "seeds, names, fault"
        for name in ("crops", "labels"):
            pairs = zip(getattr(found, name), getattr(batch, name), strict=True)
            assert all(a is not b and torch.equal(a, b) for a, b in pairs)
        images = [augment.spatial(b.crops, b.labels, b.draws) for b in (found, batch)]
        assert torch.equal(images[0][0], images[1][0]) and torch.equal(images[0][1], images[1][1])


def test_a_pinned_batch_of_an_older_torch(monkeypatch):
    """Older ones make lists of the tuples inside a Draw."""
    for batch in batches(16, 0, seeds=40):
        lists = [d._replace(**{key: list(value) for key, value in d._asdict().items()
                               if type(value) is tuple}) for d in batch.draws]
        crops = [torch.rand(crop.shape) for crop in batch.crops]
        images = [augment.intensity(augment.spatial(crops, None, draws)[0], draws)
                  for draws in (lists, batch.draws)]
        assert torch.equal(*images)


# ------------------------------------------------------------------------------------------ graphs
@pytest.fixture
def aot(monkeypatch):
    """torch.compile by aot_eager, counted, as on CUDA: with its options, and DDPOptimizer on."""
    compiled = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend=compiled))
    monkeypatch.setattr(training, "catch_signals", threading.Event)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch._dynamo.config.optimize_ddp, "the default, that users have"
        yield compiled
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.parametrize(("row", "more"), [
    ("unet_demo", {}), ("unet_demo", {"recompute": True}), ("swinunetr", {}),
    pytest.param("mednext_m", {"recompute": True}, marks=pytest.mark.soak)])
def test_no_recompiles_over_a_run(prepared, tmp_path, aot, row, more):
    """Over steps, gradient accumulation and validation."""
    swin = row == "swinunetr"
    pretrain.main(pretrain.Config(
        data=str(prepared), out=str(tmp_path), model=row, features=16 if swin else 4, compile=True,
        patch_size=64 if swin else 48, precision="fp32" if swin else "bf16", steps=3, batch_size=2,
        micro_batch=1, val_every=2, val_fraction=0.2, log_every=1, workers=0, **more))
    assert len(log_of(tmp_path)) == 3 and aot.frame_count >= 2, "the probe, and the model"


def test_no_recompiles_over_six_folds(prepared, tmp_path, aot):
    task = TASK | {"data": str(prepared), "folds": 6}
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    finetune.main(finetune.Config(
        task=str(tmp_path / "task.yaml"), model="unet_demo", features=4, compile=True, steps=2,
        patch_size=48, batch_size=2, workers=0, out=str(tmp_path / "run")))
    assert len(json.loads((tmp_path / "run" / "dice.json").read_text())["folds"]) == 6


# ------------------------------------------------------------------------------------ small things
def test_compile_is_for_cuda():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [devices.choose_compile(None, "unet_xl", d) for d in (cpu, cuda)] == [False, True]
    assert not devices.choose_compile(None, "swinunetr", cuda)
    for wanted in (True, False):  # an explicit value wins
        assert [devices.choose_compile(wanted, row, d) for row in ("unet_b", "swinunetr")
                for d in (cpu, cuda)] == [wanted] * 4
    for words in ([], ["--compile", "auto"], ["--compile", "none"]):
        assert config.parse_config(pretrain.Config, words).compile is None
    assert "off (auto: no quicker on a CPU" in devices.say_compile(None, "unet_b", cpu)


def test_the_compiler_leaves_the_layout_on_cuda(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: seen.append(settings) or model)
    monkeypatch.setattr(training, "any_process", lambda *flags: [bool(flag) for flag in flags])
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(n))
    for kind in ("cpu", "cuda"):
        training.compile_or_warn(torch.nn.Identity(), True, torch.device(kind))
    assert seen[1] == {}, "as torch has it"
    assert seen[3] == {"options": {"layout_optimization": False}}


@pytest.mark.parametrize(("version", "precision", "contiguous", "warned"), [
    (90800, "bf16", True, True), (91400, "bf16", True, True), (91500, "bf16", True, False),
    (90701, "bf16", True, False), (91002, "fp32", True, False), (91002, "bf16", False, False)])
def test_a_slow_cudnn_is_named(monkeypatch, capsys, version, precision, contiguous, warned):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    devices.warn_of_cudnn(torch.device("cuda"), precision, contiguous)
    devices.warn_of_cudnn(torch.device("cpu"), precision, contiguous)
    assert capsys.readouterr().err.count("Install cuDNN 9.15 or later") == warned


def said_of(error, monkeypatch, capsys):
    """What a script says, on stderr, that ends in this error, exit code 1."""
    def fail(cfg):
        raise error

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as end:
        config.run(fail, pretrain.Config)
    assert end.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error: Cuda failure 2 'out of "
                                       "memory'")])
def test_memory_that_runs_out_ends_in_one_line(monkeypatch, capsys, error):
    said = said_of(error, monkeypatch, capsys)
    assert said.startswith("error: out of memory; what helps") and said.count("\n") == 1


def test_a_lost_peer_is_no_traceback(monkeypatch, capsys):
    error = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0")
    said = said_of(error, monkeypatch, capsys)
    assert said.startswith("error: stopped: another process ended")


@pytest.mark.parametrize(("settings", "micro"), [
    ({"model": "unet_xl"}, 8), ({"model": "unet_xl", "skips": True}, 4), ({"model": "unet_b"}, 16),
    ({"model": "unet_xl", "micro_batch": 16}, 16), ({"model": "unet_xl", "patch_size": 96}, 16),
    ({"model": "mednext_l"}, 8), ({"model": "swinunetr", "batch_size": 8}, 4)])
def test_no_tensor_has_2_to_the_31_elements(settings, micro):
    """16 samples of U-Net XL at 128^3 are 2^31 elements exactly."""
    cfg = pretrain.Config(**settings)
    with META:
        model = models.build_model(cfg.model, "pretrain", skips=cfg.skips)
    chosen, line = devices.plan_batch(cfg.batch_size, cfg.micro_batch, 1, "amaes", model,
                                      cfg.patch_size)
    assert chosen == micro
    capped = micro < cfg.batch_size and not cfg.micro_batch
    reason = f"x {micro} (micro_batch {micro}, so that no tensor has 2^31 elements)"
    assert (reason in line) == capped
