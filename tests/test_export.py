"""The networks in other people's code: torch.hub, and files of plain weights."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, mistake, run

import checkpoint
import config
import hubconf
import models

WIDTH = {"unet": 4, "mednext": 4, "swin": 16, "resenc": 4}


def hub(row, **settings):
    return torch.hub.load(str(ROOT), row, source="local", **settings)


def written(folder, row):
    """A checkpoint of a pretraining of this row that was just begun: its file, and its network."""
    features = WIDTH[models.ROWS[row].family]
    model = models.build_model(row, "pretrain", features=features)
    path = folder / f"{row}.pt"
    checkpoint.save_checkpoint(path, {"kind": "pretrain", "row": row, "step": 0,
                                      "config": {"features": features, "model": row},
                                      "model": model.state_dict()})
    return path, model


# -------------------------------------------------------------------------------------------- hub
FOREIGN = """
import sys, torch
repo, folder, *rows = sys.argv[1:]
for row in rows:
    model = torch.hub.load(repo, row, source="local", ckpt=f"{folder}/{row}.pt", in_channels=2,
                           out_channels=3, verbose=False)
    assert repo not in sys.path
    with torch.no_grad():
        output = model(torch.rand(1, 2, 64, 64, 64))
    assert output.shape == (1, 3, 64, 64, 64) and output.isfinite().all()
    torch.save(model.state_dict(), f"{folder}/{row}.state")
"""


def test_every_row_from_another_folder(tmp_path):
    """Weights of a run, in a process that knows nothing of this folder; strictly, with a report."""
    files = {row: written(tmp_path, row) for row in models.ROWS}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(ROOT), str(tmp_path), *models.ROWS], cwd=elsewhere,
        capture_output=True, text=True, timeout=300, env=environment | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tensors taken (100 %)") == len(models.ROWS)

    # All of the encoder is the file's. The first convolution's two channels share its one.
    for row, (_, source) in files.items():
        state = torch.load(tmp_path / f"{row}.state", weights_only=True)
        encoder = {name: tensor for name, tensor in source.state_dict().items()
                   if name.startswith(source.encoder_prefix)}
        assert len(encoder) > 30
        for name, tensor in encoder.items():
            if name in checkpoint.STEMS:
                assert torch.equal(state[name], tensor.repeat(1, 2, 1, 1, 1) / 2)
            else:
                assert torch.equal(state[name], tensor), name


def test_published_names_and_new_weights(tmp_path, capsys):
    """Names as in the authors' files; and without a file, the weights are those of the seed."""
    _, source = written(tmp_path, "unet_b")
    published = {f"model._orig_mod.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save(published, tmp_path / "unet_b_lw_dec_fullaug.pth")
    model = hub("unet_b", ckpt=str(tmp_path / "unet_b_lw_dec_fullaug.pth"), features=4)
    assert "encoder: all 40 tensors taken (100 %)" in capsys.readouterr().out
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, source.encoder.state_dict()[name])

    torch.manual_seed(3)
    new = hub("unet_demo", in_channels=2, out_channels=3)
    torch.manual_seed(3)
    expected = models.build_model("unet_demo", "segment", 2, 3)
    assert all(map(torch.equal, new.state_dict().values(), expected.state_dict().values()))


def test_a_finetuned_network_whole(finetuned):
    path = str(finetuned[0] / "fold_0" / "last.pt")
    saved = checkpoint.load_checkpoint(path)
    channels, classes = len(saved["task"]["sequences"]), len(saved["task"]["classes"])
    assert classes > 1
    model = hub("unet_demo", ckpt=path, part="all")  # it knows its channels
    assert all(torch.equal(tensor, saved["model"][name])
               for name, tensor in model.state_dict().items())
    with pytest.raises(Exception, match="does not fit: .* all tensors .* are missing or of"):
        hub("unet_demo", ckpt=path, in_channels=channels, out_channels=classes + 1, part="all")


@pytest.mark.parametrize(("settings", "message"), [
    ({"ckpt": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
    ({"part": "decoder"}, "part 'decoder': choose encoder, all"),
    ({"in_channels": 0}, "in_channels 0: give a whole number"),
    ({"out_channels": "3"}, "out_channels '3': give a whole number"),
    ({"features": 0}, "features 0: give a whole number")])
def test_what_hub_refuses(settings, message):
    with pytest.raises(config.UserError, match=message):
        hub("unet_demo", **settings)


def test_hub_refuses_another_row_and_width(tmp_path):
    path, _ = written(tmp_path, "unet_b")
    with pytest.raises(config.UserError, match="holds a unet_b, not a mednext_m"):
        hub("mednext_m", ckpt=str(path))
    with pytest.raises(config.UserError, match="of 40 encoder tensors 40 are missing"):
        hub("unet_b", ckpt=str(path), features=8)


def test_modules_of_another_project_are_not_taken_for_ours(tmp_path):
    (tmp_path / "config.py").write_text("value = 1\n")
    code = (f"import config, torch; torch.hub.load({str(ROOT)!r}, 'unet_b', source='local', "
            "verbose=False)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, timeout=100)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and "a module config is already imported, from" in last


def test_hub_has_a_function_for_every_row():
    entries = {name for name, value in vars(hubconf).items()
               if callable(value) and not name.startswith("_")}
    assert entries == set(models.ROWS)


# ------------------------------------------------------------------------------------------ export
@pytest.fixture(scope="module")
def last(finetuned):
    return finetuned[0] / "fold_0" / "last.pt"


def execute(printed):
    """Run the lines that export.py printed -> their variables."""
    space = {}
    exec(printed.split("\n\n", 1)[1], space)
    return space


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_a_plain_file_loads_with_the_lines_that_are_printed(pretrained, last, tmp_path, kind,
                                                            decoder):
    source = pretrained if kind == "pretrained" else last
    saved = checkpoint.load_checkpoint(source)
    printed = run("export", source, tmp_path / "out.pt", decoder=decoder)

    # It holds tensors by name and nothing else, all of them or those of the encoder.
    weights = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = [name for name in saved["model"] if decoder or name.startswith("encoder.")]
    assert list(weights) == wanted and (len(wanted) > 40) == decoder
    assert all(torch.equal(weights[name], saved["model"][name]) for name in wanted)

    network = execute(printed)["network"]
    state = network.state_dict()
    assert all(torch.equal(state[name], saved["model"][name]) for name in wanted)
    assert printed.split("\n\n", 1)[1].count("\n") == (4 if decoder else 5)


@pytest.mark.parametrize("row", models.ROWS)
def test_every_row_is_exported(tmp_path, row):
    path, model = written(tmp_path, row)
    printed = run("export", path, tmp_path / "encoder.pt", decoder=False)
    network = execute(printed)["network"]
    prefix = model.encoder_prefix
    state = network.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) == name.startswith(prefix) or tensor.ndim == 1

    # --ckpt takes the file, too.
    other = models.build_model(row, "segment", features=WIDTH[models.ROWS[row].family])
    report = checkpoint.load_weights(other, tmp_path / "encoder.pt")
    assert not report.unused and not report.reshaped


def test_the_objective_of_23_is_exported(tmp_path):
    model = models.build_model("swinunetr", "swin", features=16, merge="fixed")
    settings = {"features": 16, "merge": "fixed", "objective": "swin"}
    checkpoint.save_checkpoint(tmp_path / "last.pt", {
        "kind": "pretrain", "row": "swinunetr", "config": settings, "model": model.state_dict()})
    network = execute(run("export", tmp_path / "last.pt", tmp_path / "out.pt"))["network"]
    assert all(map(torch.equal, network.state_dict().values(), model.state_dict().values()))


def test_what_export_refuses(tmp_path, last):
    assert "give a checkpoint and the file to write" in mistake("export", last)
    assert "would be overwritten" in mistake("export", last, last)
    torch.save({"encoder.weight": torch.rand(2)}, tmp_path / "other.pt")
    line = mistake("export", tmp_path / "other.pt", tmp_path / "out.pt")
    assert "is no checkpoint of pretrain.py or finetune.py" in line
    assert "cannot write" in mistake("export", last, tmp_path / "other.pt" / "out.pt")
    assert not (tmp_path / "out.pt").exists()


# -------------------------------------------------------------------------------------- the page
def test_the_lines_of_the_page_run(tmp_path, monkeypatch, pretrained):
    """The five lines of docs/weights.md, as they stand there but for names and sizes."""
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    [block] = [part for part in re.findall(r"```\n(.*?)```", text, re.DOTALL)
               if part.startswith("import torch")]
    assert block.count("\n") == 5
    monkeypatch.chdir(tmp_path)
    printed = run("export", pretrained, "encoder.pt", decoder=False)
    block = block.replace("unet_xl", "unet_demo")
    assert printed.split("\n\n", 1)[1] == block
    space = {}
    exec(block, space)
    saved = checkpoint.load_checkpoint(pretrained)["model"]
    state = space["network"].state_dict()
    encoder = [name for name in saved if name.startswith("encoder.")]
    assert len(encoder) == 40
    assert all(torch.equal(state[name], saved[name]) for name in encoder)
