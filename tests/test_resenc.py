"""The network of the authors' later weights, against their own code; and files of its names."""

import json

import numpy as np
import pytest
import torch
from test_models import GOLDEN, convolutional, fill

import checkpoint
import config
import fast_cpu
import models
import strangers

STEM = "encoder.stem.conv1.conv.weight"


@pytest.mark.parametrize("official", ["resenc_b", "resenc_b_pretrain"])
@pytest.mark.parametrize("quick", [False, True])
def test_outputs_and_a_gradient_of_the_official_network(official, quick):
    """At an eighth of the width, in float64. The loss is the mean of the squared output."""
    golden = np.load(GOLDEN / f"{official}.npz")
    purpose = "segment" if official == "resenc_b" else "pretrain"
    classes = golden["shape"][1]
    model = models.build_model("resenc_b", purpose, out_channels=int(classes), features=4)
    fill(model, convolutional).double().eval()
    if quick:
        fast_cpu.install(model)

    x = torch.from_numpy(np.random.RandomState(0).standard_normal(64 * 64 * 32).astype(np.float32))
    x = x.view(1, 1, 64, 64, 32).double()
    levels = model.encoder(x)
    output = model.decoder(levels)
    output.square().mean().backward()

    assert list(output.shape) == golden["shape"].tolist()
    corners = output[0, :, ::4, ::4, ::4].detach().numpy()
    assert np.abs(corners - golden["sub"]).max() < 1e-5 * golden["std"]
    gradient = model.get_parameter(STEM).grad.numpy()
    expected = golden["stem_gradient"]
    assert np.abs(gradient - expected).max() < 1e-5 * expected.std()

    assert [list(level.shape) for level in levels] == golden["enc_shapes"].tolist()
    deepest = levels[-1][0].detach().numpy()
    assert np.abs(deepest - golden["bottleneck"]).max() < 1e-5 * golden["enc_std"][-1]


def small_file(prefix=""):
    """A published file at a quarter of the width: its own names, and any numbers."""
    shapes = json.loads((GOLDEN / "states.json").read_text())["resenc_b_pretrain"]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        # A layer has two names there, and one tensor.
        twin = strangers.our_name(name)
        narrow = [n // 4 if n >= 32 else n for n in shape]
        if twin not in state:
            state[twin] = torch.rand(narrow, generator=generator)
        state[name] = state[twin]
    return {prefix + name: tensor for name, tensor in state.items()}


def test_the_published_file_arrives_whole():
    """Lightning's prefix, and every layer under two names."""
    saved = {"state_dict": small_file("model."), "epoch": 1}
    for purpose, part, tensors in (("pretrain", "all", 256), ("segment", "encoder", 224)):
        model = models.build_model("resenc_b", purpose, features=8)
        report = checkpoint.load_weights(model, saved, part)
        assert len(report.taken) == tensors and not report.reshaped
        state = model.state_dict()
        for name in report.taken:
            assert torch.equal(state[name], saved["state_dict"][f"model.{name}"])
    assert {name.split(".")[0] for name in report.unused} == {"decoder"}


def test_nnunets_names_arrive_whole():
    """The same encoder as nnU-Net and OpenMind name it; their decoder holds it a second time."""
    saved = {}
    for name, tensor in small_file().items():
        name = name.replace("stem.conv1.", "stem.convs.0.").replace(".norm_op.", ".norm.")
        if name.startswith("encoder."):
            saved[name] = saved[f"decoder.{name}"] = tensor
    model = models.build_model("resenc_b", "segment", features=8)
    report = checkpoint.load_weights(model, {"network_weights": saved})
    assert len(report.taken) == 224
    state = model.state_dict()
    assert torch.equal(state[STEM], saved["encoder.stem.convs.0.conv.weight"])
    norm = "encoder.stages.1.blocks.0.skip.1.norm"
    assert torch.equal(state[f"{norm}_op.weight"], saved[f"{norm}.weight"])


def test_an_encoder_with_more_layers_is_another_one():
    """Else its features would lack those layers, silently: SwinUNETR v2, a deeper ResEnc."""
    saved = small_file()
    saved["encoder.stages.5.blocks.6.conv1.conv.weight"] = torch.rand(80, 80, 3, 3, 3)
    model = models.build_model("resenc_b", "segment", features=8)
    with pytest.raises(config.UserError, match="1 tensors more .* encoder.stages.5.blocks.6.conv1"):
        checkpoint.load_weights(model, saved)

    source = models.build_model("swinunetr", "segment", features=16)
    second = source.state_dict() | {"swinViT.layers1c.0.conv1.conv.weight": torch.rand(2)}
    with pytest.raises(config.UserError, match="holds another encoder.*layers1c"):
        checkpoint.load_weights(source, second)


def test_suprems_names_arrive_whole():
    source = models.build_model("swinunetr", "segment", features=16)
    state = {f"module.backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    model = models.build_model("swinunetr", "segment", out_channels=3, features=16)
    assert len(checkpoint.load_weights(model, {"net": state, "epoch": 1}).taken) == 126
