"""The networks against the official ones: counts, names, outputs.

Every row learns; everyone's checkpoints load whole or say why not."""

import functools
import json
import re
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, script
from folders import TASK
from torch import nn

import amaes
import checkpoint
import config
import devices
import fast_cpu
import finetune
import models
import swin

GOLDEN = ROOT / "tests" / "golden"
OFFICIAL = {  # official name -> our row, task
    "unet_b": ("unet_b", "segment"), "unet_b_lw_dec": ("unet_b", "pretrain"),
    "unet_xl": ("unet_xl", "segment"), "unet_xl_lw_dec": ("unet_xl", "pretrain"),
    "mednext_m3_std_dec": ("mednext_m", "segment"), "mednext_m3_lw_dec": ("mednext_m", "pretrain"),
    "mednext_l3_std_dec": ("mednext_l", "segment"), "mednext_l3_lw_dec": ("mednext_l", "pretrain"),
    "mednext_l3": ("mednext_l_mednextdec", "segment"),
    "resenc_b": ("resenc_b", "segment"), "resenc_b_pretrain": ("resenc_b", "pretrain"),
    "swinunetr": ("swinunetr", "segment"), "swin_ssl": ("swinunetr", "swin")}


def build(official, merge="fixed"):
    row, task = OFFICIAL[official]
    classes = 2 if task == "segment" else 1
    return models.build_model(row, task, out_channels=classes, merge=merge).eval()


@torch.no_grad()
def fill(model, rule):
    """Weights that anyone can make from the parameters' names.

    rule(name, normal draws, shape) -> values."""
    for name, parameter in model.named_parameters():
        draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.numel())
        values = rule(name, draws, tuple(parameter.shape)).astype(np.float32)
        parameter.copy_(torch.from_numpy(values).view(parameter.shape))
    return model


def convolutional(name, draws, shape):
    if name.endswith(("norm.weight", "norm_op.weight")):
        return 1 + 0.1 * draws
    return 0.1 * draws if name.endswith(".bias") else draws * np.sqrt(2 * shape[0] / len(draws))


def transformer(name, draws, shape):
    return 0.05 * draws + ("norm" in name and name.endswith("weight"))


def wave(side):
    """The input of the SwinUNETR goldens, at any size."""
    values = np.sin(0.01 * np.arange(side ** 3)).astype(np.float32)
    return torch.from_numpy(values).view(1, 1, side, side, side)


# ------------------------------------------------------------------------------- counts and names
@pytest.mark.parametrize(("row", "count"), [
    ("unet_xl", 90_304_514), ("unet_b", 22_581_250), ("mednext_m", 20_938_018),
    ("mednext_l", 55_198_626), ("mednext_l_mednextdec", 61_779_266), ("swinunetr", 62_186_708),
    ("resenc_b", 102_348_226)])
def test_parameter_counts_of_the_official_networks(row, count):
    with torch.device("meta"):
        model = models.build_model(row, "segment", out_channels=2)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("official", OFFICIAL)
def test_names_and_shapes_are_the_official_ones(official):
    expected = json.loads((GOLDEN / "states.json").read_text())[official]
    with torch.device("meta"):
        state = build(official).state_dict()

    # The files of resenc_b name every layer twice.
    expected = {name: shape for name, shape in expected.items() if "all_modules" not in name}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected


def keep(sizes, tensor):
    """Note the bytes of a tensor that autograd saves."""
    sizes.append(tensor.nbytes)
    return tensor


@pytest.mark.parametrize("row", ["unet_demo", "mednext_m", "swinunetr", "resenc_b"])
def test_recomputing_changes_nothing_but_the_memory(row):
    x, found = torch.rand(1, 1, 64, 64, 64), []
    narrow = 8 if row == "resenc_b" else None
    for recompute in (False, True):
        torch.manual_seed(0)
        model = devices.quicken(models.build_model(row, "segment", features=narrow), "cpu")
        if recompute:
            devices.recompute(model)
        kept = []
        note = functools.partial(keep, kept)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(x)
        output.square().mean().backward()
        found.append((output, [p.grad for p in model.parameters()], sum(kept)))
    (output, gradients, kept), (output2, gradients2, kept2) = found
    assert torch.equal(output, output2) and kept2 < kept / 2
    assert all(torch.equal(*pair) for pair in zip(gradients, gradients2, strict=True))


# --------------------------------------------------------------------------------- golden outputs
@pytest.mark.parametrize("official", ["unet_b", "unet_b_lw_dec", "mednext_m3_std_dec",
                                      "mednext_m3_lw_dec"])
@pytest.mark.parametrize("quick", [False, True])
def test_outputs_of_the_official_networks(official, quick):
    golden = np.load(GOLDEN / f"{official}.npz")
    model = fill(build(official), convolutional)
    if quick:
        fast_cpu.install(model)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal(32 ** 3).astype(np.float32))
    x = x.view(1, 1, 32, 32, 32)
    with torch.no_grad():
        levels, output = model.encoder(x), model(x)
    assert list(output.shape) == golden["shape"].tolist()
    assert np.abs(output[0, :, ::4, ::4, ::4].numpy() - golden["sub"]).max() < 1e-4 * golden["std"]
    assert [list(level.shape) for level in levels] == golden["enc_shapes"].tolist()
    for level, mean, std in zip(levels, golden["enc_mean"], golden["enc_std"], strict=True):
        assert level.double().mean().item() == pytest.approx(mean, abs=1e-4 * std)
    bottleneck = levels[-1][0, ::16].numpy()
    assert np.abs(bottleneck - golden["bottleneck_sub"]).max() < 1e-4 * golden["enc_std"][-1]


@pytest.mark.parametrize("merge", ["fixed", "legacy"])
@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), [(torch.float32, "", 2e-5),
                                                            (torch.float64, "_f64", 1e-10)])
def test_outputs_of_swinunetr_and_its_heads(merge, dtype, suffix, tolerance):
    prefix = "legacy_rng_" if merge == "legacy" else "rng_"
    golden, heads = np.load(GOLDEN / "swinunetr.npz"), np.load(GOLDEN / "swin_ssl.npz")
    x = wave(64).to(dtype)
    with torch.no_grad():
        output = fill(build("swinunetr", merge), transformer).to(dtype)(x)
        rotation, contrast, rec = fill(build("swin_ssl", merge), transformer).to(dtype)(x)
    for name, found, expected in (("out", output, golden), ("rot", rotation, heads),
                                  ("contrast", contrast, heads), ("rec", rec, heads)):
        found = found[0, :, ::8, ::8, ::8] if found.ndim == 5 else found[0]
        assert np.abs(found.numpy() - expected[prefix + name + suffix]).max() < tolerance, name


def test_swinunetr_is_monais():
    """State dicts exchanged both ways.

    The same outputs where windows are shifted, padded and clipped."""
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    theirs = nets.SwinUNETR(in_channels=2, out_channels=3, feature_size=48).eval()
    ours = models.build_model("swinunetr", "segment", 2, 3, merge="fixed").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 2, 96, 64, 32)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 2e-5
    fill(ours, transformer)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 2e-5


def test_mednext_decoder_is_monais():
    """No golden of the official code covers MedNeXt's own decoder.

    MONAI's is the same network where all levels expand alike (its blocks between two levels expand
    as the one, the official ones as the other)."""
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    blocks, expansion = (1, 2, 1, 2, 2), (2,) * 5
    theirs = nets.MedNeXt(
        spatial_dims=3, init_filters=8, in_channels=1, out_channels=2, kernel_size=3,
        encoder_expansion_ratio=2, decoder_expansion_ratio=2, bottleneck_expansion_ratio=2,
        use_residual_connection=True, blocks_down=blocks[:4], blocks_bottleneck=2,
        blocks_up=blocks[3::-1]).eval()
    encoder = models.MedNeXtEncoder(1, 8, blocks, expansion)
    decoder = models.MedNeXtDecoder(2, 8, blocks, expansion)
    ours = fill(models.Network(encoder, pred_head=decoder), convolutional)
    state = {}
    for name, tensor in ours.state_dict().items():
        name = name.removeprefix("encoder.").removeprefix("pred_head.")
        name = name.replace("enc_block_", "enc_stages.").replace("down_", "down_blocks.")
        name = re.sub(r"dec_block_(\d)", lambda m: f"dec_stages.{3 - int(m[1])}", name)
        state[re.sub(r"^up_(\d)", lambda m: f"up_blocks.{3 - int(m[1])}", name)] = tensor
    theirs.load_state_dict(state | {k: v for k, v in theirs.state_dict().items() if "dummy" in k})
    with torch.no_grad():
        x = torch.rand(1, 1, 32, 32, 32)
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() < 1e-4 * expected.std()


# ------------------------------------------------------------------------------- every row learns
def train(model, loss_of, lr=2e-3, steps=30):
    """Losses of a few steps, in the form in which the scripts train on a CPU."""
    devices.quicken(model, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Width and smallest legal patch of each row: two voxels at the coarsest level, for instance norm.
# Two samples of resenc_b, since oneDNN leaves a single one to slow kernels on one core.
SMALL = {"unet_b": (8, (32, 16, 16)), "unet_xl": (8, (32, 16, 16)), "mednext_m": (8, (32, 16, 16)),
         "mednext_l": (8, (32, 16, 16)), "mednext_l_mednextdec": (8, (32, 16, 16)),
         "swinunetr": (16, (64, 32, 32)), "resenc_b": (4, (64, 32, 32))}


def sample(shape, count=1):
    """Smooth blobs in [0, 1] and where they are bright."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 1, *(n // 8 for n in shape), generator=generator)
    x = nn.functional.interpolate(noise, size=shape, mode="trilinear")
    return x, (x[:, 0] > 0.5).long()


@pytest.mark.parametrize("row", SMALL)
def test_every_row_learns_to_segment(row):
    features, shape = SMALL[row]
    x, label = sample(shape, 2 if row == "resenc_b" else 1)
    torch.manual_seed(0)
    model = models.build_model(row, "segment", out_channels=2, features=features)
    losses = train(model, lambda m: finetune.dice_ce(m(x), label))
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.parametrize(("row", "decoder", "skips"), [
    ("unet_b", "light", False), ("unet_b", "standard", False), ("unet_b", "light", True),
    ("mednext_m", "light", False), ("mednext_l", "standard", True), ("swinunetr", "light", False),
    ("swinunetr", "standard", True), ("resenc_b", "light", False), ("resenc_b", "standard", True)])
def test_every_encoder_learns_to_reconstruct(row, decoder, skips):
    features, shape = SMALL[row]
    count = 2 if row == "resenc_b" else 1
    target, _ = sample(shape, count)
    mask = amaes.random_mask(range(count), target.shape[2:], 4, 0.6, "cpu")
    torch.manual_seed(0)
    model = models.build_model(row, "pretrain", decoder=decoder, skips=skips, features=features)

    def loss_of(model):
        return amaes.reconstruction_loss(model(target * ~mask), target, mask, "all")

    losses = train(model, loss_of)
    assert losses[-1] < 0.3 * losses[0], losses


@pytest.mark.parametrize(("row", "task"), [
    ("swinunetr", "segment"), ("swinunetr", "swin"), ("swinunetr", "pretrain"),
    ("resenc_b", "segment"), ("resenc_b", "pretrain")])
def test_some_need_their_own_sizes(row, task):
    model = models.build_model(row, task, features=16)
    with pytest.raises(config.UserError, match="multiples of 32"):
        model(torch.zeros(1, 1, 48, 32, 32))
    with pytest.raises(config.UserError, match="at least 2 times that"):
        devices.check_patch(model, 32, torch.device("cpu"), "fp32")


# ---------------------------------------------------------------------------- the objective of [23]
def test_cut_boxes_hide_what_the_original_hides():
    covered = []
    for seed in range(200):
        volume = np.zeros((128,) * 3, bool)
        for box in swin.cut_boxes(np.random.default_rng(seed), volume.shape, 0.3):
            volume[box] = True
            assert all(6 <= part.stop - part.start <= 31 or part.stop == 128 for part in box)
        covered.append(volume.mean())
    assert 0.125 < np.mean(covered) < 0.155, "14 % on average, as measured with the original"


def test_views_rotate_cut_and_paste():
    target = torch.stack([torch.full((1, 32, 32, 32), value) for value in (2.0, 3.0)])
    target[:, :, :, 0] += 2  # an edge that tells the turn
    rotated, cut, turns = swin.swin_view(target, [5, 6], 0.3)
    for x, y, k in zip(target, rotated, turns, strict=True):
        assert torch.equal(torch.rot90(x, int(k), (2, 3)), y)
    changed = cut != rotated
    assert changed.any((1, 2, 3, 4)).all()
    noise = changed & (cut <= 1)
    assert noise.any() and cut[noise].min() >= 0
    again = swin.swin_view(target, [5, 6], 0.3)
    assert torch.equal(again[1], cut), "a view is a function of its seeds"
    pasted = [swin.swin_view(target, [seed, seed + 1], 0.3) for seed in range(0, 40, 2)]
    share = np.mean([((c != r) & (c > 1)).any().item() for r, c, _ in pasted])
    assert share > 0.4, "half of the samples get a paste from the other"
    assert {int(k) for _, _, turns in pasted for k in turns} == {0, 1, 2, 3}


def test_contrastive_loss_is_nt_xent():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    similarity = np.exp(unit @ unit.T / 0.5)
    positive = similarity[np.arange(6), (np.arange(6) + 3) % 6]
    losses = -np.log(positive / (similarity.sum(1) - np.diag(similarity)))
    assert swin.contrastive_loss(vectors).item() == pytest.approx(np.mean(losses), abs=1e-12)
    assert swin.contrastive_loss(torch.ones(4, 8)).item() == pytest.approx(np.log(3), abs=1e-6)
    assert swin.contrastive_loss(torch.randn(2, 8)).item() == 0


def test_swin_objective_learns():
    x, _ = sample(SMALL["swinunetr"][1], count=2)
    views = [swin.swin_view(x, [seed, seed + 10], 0.3) for seed in (1, 2)]
    rotated, cut, turns = (torch.cat(part) for part in zip(*views, strict=True))
    torch.manual_seed(0)
    model = models.build_model("swinunetr", "swin", features=16)

    def loss_of(model):
        rotation, vectors, output = model(cut)
        return (nn.functional.cross_entropy(rotation, turns) + swin.contrastive_loss(vectors)
                + (output - rotated).abs().mean())

    losses = train(model, loss_of, lr=3e-4)
    assert losses[-1] < 0.7 * losses[0], losses


# --------------------------------------------------------------------------- everyone's checkpoints
def files(model):
    """The encoder's weights as they are found in the wild: {kind: checkpoint}."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = {"ours": {"kind": "pretrain", "model": state},
             "published": {f"model._orig_mod.{k}": v for k, v in state.items()},
             "other order": {f"_orig_mod.model.module.{k}": v for k, v in state.items()},
             "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}}
    if any(k.startswith("swinViT.") for k in state):
        swin = {k.removeprefix("swinViT."): v for k, v in state.items() if k.startswith("swinViT.")}
        old = {k.replace("linear1", "fc1").replace("linear2", "fc2"): v for k, v in swin.items()}
        found |= {"monai ssl": {"state_dict": {f"module.{k}": v for k, v in old.items()}},
                  "swin_vit": {"state_dict": {f"module.swin_vit.{k}": v for k, v in swin.items()}}}
    return found


@pytest.mark.parametrize(("row", "task", "tensors"), [
    ("unet_demo", "pretrain", 40), ("mednext_m", "pretrain", 194), ("mednext_l", "pretrain", 290),
    ("swinunetr", "pretrain", 126), ("swinunetr", "swin", 126), ("resenc_b", "pretrain", 224)])
def test_everyones_checkpoints_arrive_whole(row, task, tensors, tmp_path):
    source = models.build_model(row, task, features=16)
    model = models.build_model(row, "segment", out_channels=2, features=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for kind, saved in files(source).items():
        torch.save(saved, tmp_path / "file.pt")
        model.load_state_dict(before)
        report = checkpoint.load_weights(model, tmp_path / "file.pt")
        assert len(report.taken) == tensors and not report.reshaped, kind
        assert f"encoder: all {tensors} tensors taken (100 %)" in str(report)
        prefix = model.encoder_prefix
        for name, tensor in model.state_dict().items():
            wanted = source.state_dict()[name] if name.startswith(prefix) else before[name]
            assert torch.equal(tensor, wanted), (kind, name)


@pytest.mark.parametrize("row", ["unet_demo", "mednext_m", "swinunetr", "resenc_b"])
def test_a_gap_is_never_filled_silently(row):
    source = models.build_model(row, "pretrain", features=16)
    model = models.build_model(row, "segment", features=16)
    state = source.state_dict()
    name = [k for k in state if k.startswith(model.encoder_prefix)][5]
    removed = state.pop(name)
    message = f"1 are missing or of another shape; {name} is missing"
    with pytest.raises(config.UserError, match=message):
        checkpoint.load_weights(model, {"model": state})
    state[name] = removed[:1]
    with pytest.raises(config.UserError, match="of another shape"):
        checkpoint.load_weights(model, {"model": state})


@pytest.mark.parametrize("row", ["unet_demo", "mednext_m", "swinunetr", "resenc_b"])
def test_more_sequences_than_the_checkpoint_had(row):
    """The stem is repeated and divided by their number: repeated input gives the same features."""
    torch.manual_seed(0)
    source = models.build_model(row, "pretrain", features=16).double()
    model = models.build_model(row, "segment", in_channels=3, features=16).double()
    report = checkpoint.load_weights(model, source.state_dict())
    assert len(report.reshaped) == 1 and "reshaped" in str(report)
    x = torch.rand(1, 1, 64, 64, 32, dtype=torch.float64)
    encoders = [net.swinViT if row == "swinunetr" else net.encoder for net in (source, model)]
    with torch.no_grad():
        levels = encoders[0](x), encoders[1](x.expand(-1, 3, -1, -1, -1))
        for one, three in zip(*levels, strict=True):
            assert (one - three).abs().max() < 1e-6


def test_the_other_mednext_decoder_takes_the_same_encoder():
    source = models.build_model("mednext_l", "pretrain", features=8)
    model = models.build_model("mednext_l_mednextdec", "segment", features=8)
    assert len(checkpoint.load_weights(model, source.state_dict()).taken) == 290


# --------------------------------------------------------------------------------------------- runs
SHORT = {"steps": 2, "patch_size": 64, "batch_size": 2, "compile": "false", "precision": "fp32",
         "workers": 0, "features": 16}


def test_swin_pretraining_then_finetuning(prepared, tmp_path):
    script("pretrain.py", "configs/swinunetr.yaml", data=prepared, out=tmp_path / "pre",
           log_every=1, val_fraction=0.2, **SHORT)
    lines = log_of(tmp_path / "pre")
    for line in lines:
        assert line["loss"] == pytest.approx(line["rotation"] + line["contrast"] + line["l1"])
    assert "val_rotation" in lines[-1]
    (tmp_path / "task.yaml").write_text(json.dumps(TASK | {
        "data": str(prepared), "sequences": ["FLAIR", "FLAIR"], "n_train": 3, "folds": 1}))
    result = script("finetune.py", ckpt=tmp_path / "pre" / "last.pt", task=tmp_path / "task.yaml",
                    out=tmp_path / "run", **{k: v for k, v in SHORT.items() if k != "features"})
    assert "encoder: all 126 tensors taken" in result.stdout and "reshaped     1" in result.stdout
    assert "swinunetr" in (tmp_path / "run" / "summary.md").read_text()


@pytest.mark.soak
@pytest.mark.parametrize("row", [row for row in models.ROWS if row != "unet_demo"])
@pytest.mark.parametrize("task", ["segment", "pretrain", "swin"])
def test_one_step_at_full_size(row, task):
    if task == "swin" and row != "swinunetr":
        pytest.skip("the objective of [23] is SwinUNETR's")
    torch.set_num_threads(2)
    x, label = sample([96 if row in ("swinunetr", "resenc_b") else 64] * 3, 2)
    model = models.build_model(row, task, out_channels=2 if task == "segment" else 1)
    devices.quicken(model, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, amsgrad=True, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    if task == "segment":
        loss = finetune.dice_ce(output, label)
    else:
        parts = output if task == "swin" else [output]
        loss = sum(part.float().square().mean() for part in parts)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
