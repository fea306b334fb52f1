"""The quick forms of a device against the plain networks: the same outputs and gradients.

And without them all works. CUDA's run on a CPU, too: what they compute does not depend on the
device."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import devices
import fast_cpu
import fast_cuda
import models
import resenc
import swin

# A file, and switches of it that are not as they are by default.
CPU = (fast_cpu, {})
CUDA = (fast_cuda, {})
CONTIGUOUS = (fast_cuda, {"CHANNELS_LAST": False})
SHIFTS = (fast_cuda, {"SHIFTS": True})
PRODUCTS = (fast_cuda, {"SDPA": False})
FORMS = {"cpu": CPU, "cuda": CUDA, "cuda contiguous": CONTIGUOUS, "cuda shifts": SHIFTS,
         "cuda products": PRODUCTS}

BLOCKS = {  # one of each kind that has quick forms, and its input
    "unet": (lambda: models.Block(8, 12), (2, 8, 12, 13, 10)),
    "unet, one channel": (lambda: models.Block(1, 12), (1, 1, 12, 13, 10)),
    "unet, coarse": (lambda: models.Block(8, 12), (2, 8, 6, 6, 6)),
    "mednext": (lambda: models.MedNeXtBlock(8, 8, 3), (2, 8, 12, 13, 10)),
    "mednext down": (lambda: models.MedNeXtBlock(8, 16, 3, stride=2), (2, 8, 12, 13, 10)),
    "mednext up": (lambda: models.MedNeXtBlock(8, 4, 3, stride=2, up=True), (2, 8, 12, 13, 10)),
    "residual": (lambda: swin.ResidualBlock(8, 12), (2, 8, 12, 13, 10)),
    "resenc": (lambda: resenc.ResidualBlock(8, 12, 1), (2, 8, 12, 13, 10)),
    "resenc down": (lambda: resenc.ResidualBlock(8, 12, 2), (2, 8, 12, 14, 10)),
    "attention": (lambda: swin.SwinBlock(32, 2, shifted=True), (2, 8, 9, 14, 32)),
}


def passes(model, x):
    """{name: tensor}, the output and the gradients of a loss that is no mean; the graph's names."""
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weights).sum().backward()

    # A bias before an instance norm has no effect: its gradient is 0 but for rounding errors.
    tensors = {"output": y.detach(), "input": x.grad}
    for name, weight in model.named_parameters():
        if not name.endswith(("conv.bias", "conv1.bias")) or "out" in name:
            tensors[name] = weight.grad.clone()
    return tensors, {node.name() for node in found}


def install(monkeypatch, form, model):
    """A copy of the model with a form of FORMS."""
    fast, switches = FORMS[form]
    for name, value in switches.items():
        monkeypatch.setattr(fast, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    return fast.install(copy.deepcopy(model))


def apart(a, b, floor=1e-30):
    """Norm of the difference over that of b."""
    return float((a.double() - b).norm() / b.double().norm().clamp(min=floor))


def narrow(row, task="segment"):
    """A row of the table in few channels, and an input: two samples, for oneDNN's kernels.

    Those of SwinUNETR and ResEnc are three voxels deep at the coarsest level, as bf16 on a CPU
    needs."""
    torch.manual_seed(0)
    if models.ROWS[row].family == "swin":
        return models.build_model(row, task, features=16), torch.rand(2, 1, 96, 32, 32)
    if row == "resenc_b":
        return models.build_model(row, task, features=4), torch.rand(2, 1, 96, 32, 32)
    return models.build_model(row, task, features=4), torch.rand(2, 1, 32, 32, 48)


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    for name, row in models.ROWS.items():
        if row.family == "mednext":
            few = row._replace(blocks=(1, 2, 1, 1, 1), expansion=(2, 3, 2, 2, 2))
            monkeypatch.setitem(models.ROWS, name, few)
        if row.family == "resenc":
            monkeypatch.setitem(models.ROWS, name, row._replace(blocks=(1, 2, 1, 1, 1, 1)))


# --------------------------------------------------------------------------- installed equals plain
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_an_installed_block_is_the_plain_one(monkeypatch, kind, form):
    """In float32 against float64; and in float64 to the last bits.

    The norms scale and shift."""
    make, shape = BLOCKS[kind]
    torch.manual_seed(0)
    block, x = make(), torch.rand(shape)
    if kind != "attention":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    installed = install(monkeypatch, form, block)
    assert any(type(module).__module__ == FORMS[form][0].__name__ for module in installed.modules())

    # torch's channels-last batch norm on a CPU rounds more than the others.
    rounding = 1e-4 if form == "cpu" else 1e-5
    for dtype, limit in ((torch.float32, rounding), (torch.float64, 1e-10)):
        plain, _ = passes(copy.deepcopy(block).double(), x.double())
        found, nodes = passes(installed.to(dtype), x.to(dtype))
        assert not [node for node in nodes if "CopySlices" in node]
        worst = max(found, key=lambda name: apart(found[name], plain[name]))
        assert apart(found[worst], plain[worst]) < limit, worst

        for name, weight in block.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(weight)
        installed.load_state_dict(block.state_dict())


def mean_distance(found, expected):
    """Of all gradients together."""
    names = [name for name in expected if name != "output"]
    return apart(*(torch.cat([tensors[name].double().flatten() for name in names])
                   for tensors in (found, expected)))


@pytest.mark.parametrize("form", ["cpu", "cuda"])
@pytest.mark.parametrize("row", [row for row in models.ROWS if row != "unet_xl"])
def test_an_installed_network_is_the_plain_one(monkeypatch, row, form):
    """Outputs and gradients, float32 against float64.

    Rounding grows in gradients through norms over few voxels, to 1e-2 in either form. In bf16,
    neither is further from float64 than the plain one."""
    model, x = narrow(row)
    plain, _ = passes(copy.deepcopy(model).double(), x.double())
    installed = install(monkeypatch, form, model)

    found, nodes = passes(installed, x)
    assert not [node for node in nodes if "CopySlices" in node]
    assert apart(found["output"], plain["output"]) < 2e-5
    scale = max(tensor.norm() for name, tensor in plain.items() if name != "output")
    far = {name: apart(found[name], plain[name], floor=1e-6 * scale) for name in found}
    assert max(far.values()) < 3e-2, max(far, key=far.get)

    # bf16 on a CPU needs three voxels at the coarsest level: see devices.check_patch.
    if model.size_multiple == 16:
        x = torch.rand(2, 1, 48, 48, 48)
        plain, _ = passes(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = passes(model, x)
        found, _ = passes(installed, x)
    assert found["output"].dtype == half["output"].dtype
    assert apart(found["output"], plain["output"]) < 1.2 * apart(half["output"], plain["output"])
    assert mean_distance(found, plain) < 1.2 * mean_distance(half, plain)


@pytest.mark.parametrize(("row", "task", "form"), [
    ("unet_demo", "pretrain", "cuda contiguous"), ("mednext_m", "pretrain", "cuda shifts"),
    ("mednext_m", "pretrain", "cuda contiguous"), ("swinunetr", "pretrain", "cpu"),
    ("swinunetr", "pretrain", "cuda products"), ("resenc_b", "pretrain", "cuda contiguous")])
def test_the_other_switches_and_tasks(monkeypatch, row, task, form):
    model, x = narrow(row, task)
    plain, _ = passes(copy.deepcopy(model).double(), x.double())
    found, _ = passes(install(monkeypatch, form, model).double(), x.double())
    worst = max(found, key=lambda name: apart(found[name], plain[name]))
    assert apart(found[worst], plain[worst]) < 1e-9, worst


@pytest.mark.parametrize("form", ["cpu", "cuda"])
@pytest.mark.parametrize(("row", "precision"), [
    ("unet_demo", "fp32"), ("unet_demo", "bf16"), ("mednext_m", "bf16"), ("resenc_b", "fp32")])
def test_compiled_is_eager(monkeypatch, row, form, precision):
    """One graph, and what it computes."""
    model, x = narrow(row)
    installed = install(monkeypatch, form, model)
    if model.size_multiple == 16:
        x = torch.rand(2, 1, 48, 48, 48)
    torch._dynamo.reset()
    compiled = torch.compile(installed, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected, _ = passes(installed, x)
        found, _ = passes(compiled, x)
    limit = 1e-4 if precision == "fp32" else 2e-2
    assert apart(found["output"], expected["output"]) < limit
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    assert mean_distance(found, expected) < limit
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ install
@pytest.mark.parametrize("form", ["cpu", "cuda"])
@pytest.mark.parametrize("slope", [None, 0.01])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_quick_norm_keeps_the_memory_format(form, slope, samples):
    """With other strides the next convolution would convert the volume, and so would its gradient.

    The stride of a batch of one counts as well."""
    quick = {"cpu": fast_cpu, "cuda": fast_cuda}[form]
    plain = torch.rand(samples, 4, 9, 9, 9)
    for x in (plain, plain.contiguous(memory_format=torch.channels_last_3d)):
        y = quick.instance_norm(x, slope=slope)
        assert y.stride() == x.stride()


@pytest.mark.parametrize("form", ["cpu", "cuda"])
@pytest.mark.parametrize("row", ["unet_demo", "mednext_m", "swinunetr", "resenc_b"])
def test_what_install_leaves(monkeypatch, row, form):
    """Parameters and their names; and a second time it changes nothing."""
    model, _ = narrow(row)
    installed = install(monkeypatch, form, model)
    kinds = [type(module) for module in installed.modules()]
    assert kinds != [type(module) for module in model.modules()]
    assert list(installed.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, installed.state_dict().values(), model.state_dict().values()))
    again = FORMS[form][0].install(installed)
    assert again is installed and kinds == [type(module) for module in installed.modules()]


def test_quicken_takes_the_file_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for device, expected in (("cpu", fast_cpu.ConvNormAct), ("cuda:1", fast_cuda.ConvNormAct),
                             (torch.device("cpu"), fast_cpu.ConvNormAct),
                             ("meta", models.ConvNormAct)):
        block = models.ConvNormAct(1, 2)
        assert devices.quicken(block, device) is block and type(block) is expected
    assert torch.backends.cudnn.benchmark == fast_cuda.CUDNN_BENCHMARK


def test_one_small_volume_takes_no_slow_path():
    """One thread of torch convolves one volume of few voxels by slow_conv3d, which takes 19 times
    as long as oneDNN. All tests have one thread, as torchrun sets it."""
    model = models.build_model("unet_demo", "segment", features=4)
    x = torch.rand(1, 1, 32, 32, 32)

    def slow_kernels(network):
        with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
            network(x)
        return [event.input_shapes[1][2:] for event in profile.events()
                if event.name == "aten::slow_conv3d_forward"]

    assert [3, 3, 3] in slow_kernels(model), "torch has mended it: fast_cpu.convolve can go"
    assert [3, 3, 3] not in slow_kernels(devices.quicken(model, "cpu"))


def test_who_convolves_contiguous_volumes_on_cuda(monkeypatch):
    assert [devices.convolves_contiguous(row) for row in ("unet_b", "mednext_l", "swinunetr")] == [
        False, False, True]
    monkeypatch.setattr(fast_cuda, "CHANNELS_LAST", False)
    assert devices.convolves_contiguous("unet_b")


WITHOUT = """
import importlib.util, torch, devices, models
assert not importlib.util.find_spec("fast_cpu") and not importlib.util.find_spec("fast_cuda")
assert devices.convolves_contiguous("unet_b")
for row in ("unet_demo", "mednext_m", "swinunetr", "resenc_b"):
    side, features = (64, 16) if row in ("swinunetr", "resenc_b") else (32, 4)
    for device in ("cpu", "cuda"):
        model = devices.quicken(models.build_model(row, "pretrain", features=features), device)
    model(torch.rand(1, 1, side, side, side)).mean().backward()
"""


def test_without_the_quick_forms_all_works(prepared, tmp_path):
    """A copy of the scripts without both files: forward, backward, and a step of pretraining."""
    for path in ROOT.glob("*.py"):
        if path.name not in ("fast_cpu.py", "fast_cuda.py"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    words = ["pretrain.py", "--data", prepared, "--out", tmp_path / "run", "--model", "unet_demo",
             "--features", 4, "--patch_size", 32, "--batch_size", 2, "--steps", 1, "--workers", 0,
             "--precision", "fp32", "--compile", "false", "--val_fraction", 0.2]
    for command in (["-c", WITHOUT], [*map(str, words)]):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, timeout=300,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "run" / "last.pt").exists()
