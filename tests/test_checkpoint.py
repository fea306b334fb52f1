"""checkpoint.py: what is damaged, hostile or of another network is refused in one line."""

import dataclasses
import hashlib
import json
import os
import random
import zipfile

import pytest
import torch
from conftest import Bomb

import checkpoint
import config
import models
import pretrain


def test_a_half_written_line_is_cut_from_the_log(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + lines[0][:5])
    checkpoint.cut_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])


def network():
    """A checkpoint of a few kB, as pretraining makes it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {"kind": "pretrain", "row": "unet_demo", "step": 3, "config": {"lr": 1e-3},
            "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def refusal(path):
    with pytest.raises(config.UserError) as error:
        checkpoint.load_checkpoint(path)
    return str(error.value)


def test_every_truncation_and_bit_flip_is_refused(tmp_path):
    path, bad, rng = tmp_path / "last.pt", tmp_path / "bad.pt", random.Random(0)
    checkpoint.save_checkpoint(path, network())
    whole = path.read_bytes()
    assert checkpoint.load_checkpoint(path)["step"] == 3
    assert torch.load(path, weights_only=True)["step"] == 3, "others read it with torch alone"
    for _ in range(100):
        bad.write_bytes(whole[:rng.randrange(len(whole))])
        assert str(bad) in refusal(bad)
    everywhere = [rng.randrange(len(whole)) for _ in range(100)]
    the_checksum_itself = list(range(len(whole) - 80, len(whole)))
    for place in everywhere + the_checksum_itself:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        bad.write_bytes(flipped)
        assert str(bad) in refusal(bad), place


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_of_others_never_crash(tmp_path):
    """They have no checksum: what is no checkpoint any more is refused, however torch fails."""
    path, rng, refused = tmp_path / "bad.pt", random.Random(0), 0
    for legacy in (False, True):
        torch.save(network(), tmp_path / "other.pt", _use_new_zipfile_serialization=not legacy)
        assert checkpoint.load_checkpoint(tmp_path / "other.pt")["step"] == 3
        whole = (tmp_path / "other.pt").read_bytes()
        for _ in range(150):
            flipped = bytearray(whole)
            flipped[rng.randrange(2000)] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            try:
                checkpoint.load_checkpoint(path)
            except config.UserError:
                refused += 1
    assert refused > 100


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """A checkpoint whose members went through change(name, content)."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(f"{path}.new", "w", method) as target:
        for member in source.infolist():
            target.writestr(member.filename, change(member.filename, source.read(member)))
    os.replace(f"{path}.new", path)


def test_hostile_checkpoints_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    path = tmp_path / "bad.pt"
    torch.save(network() | {"row": Bomb(tmp_path / "ran")}, path)
    assert "nothing in it was run" in refusal(path)
    assert not (tmp_path / "ran").exists()

    billion, more = b"J\x00\xca\x9a\x3b", b"\x8a\x06\x00\x00\x00\x00\x00\x10"  # 1e9, 2^44 values
    for length in (billion, more):
        torch.save({"model": {"w": torch.ones(100)}}, path)
        rewritten(path, lambda name, content, length=length: content.replace(b"Kd", length))
        assert "does not match expected size" in refusal(path)
    torch.save({"model": {"w": torch.ones(1).expand(10 ** 12)}}, path)
    assert "a tensor in it is larger than the file" in refusal(path)
    torch.save({"model": {"w": torch.ones(100)}}, path)
    zeros = bytes(10 ** 8)
    rewritten(path, lambda name, content: zeros if "data/0" in name else content,
              zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10 ** 6
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # it does not come to that
        assert "it is compressed, as no checkpoint is" in refusal(path)

    torch.save(network(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped", b"x")
        archive.writestr(str(tmp_path / "escaped"), b"x")
    assert "not in a subdirectory" in refusal(path)
    assert not list(tmp_path.rglob("**/escaped")) and not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"format": checkpoint.FORMAT + 1}, "newer than"), ({"format": "1"}, "its format is a str"),
    ({"row": ["unet_demo"]}, "its row is a list"), ({"config": 3}, "its config is a int")])
def test_checkpoints_of_later_formats_and_odd_contents_are_refused(tmp_path, change, message):
    torch.save(network() | {"format": 1} | change, tmp_path / "odd.pt")
    assert message in refusal(tmp_path / "odd.pt")


def test_a_checkpoint_of_another_network_is_not_continued(tmp_path):
    contents = {"config": dataclasses.asdict(pretrain.Config()), "sha256": None, "inputs": {}}
    saved = network() | contents
    checkpoint.save_checkpoint(tmp_path / "last.pt", saved)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(config.UserError, match="does not fit this network"):
        checkpoint.resume(tmp_path / "last.pt", contents, (), model, optimizer)


# ------------------------------------------------------------------------------------------ weights
STEM = "encoder.in_conv.conv1.conv.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: {0: torch.ones(2)}, f"{STEM} is missing"),
    (lambda state: [1, 2], f"{STEM} is missing"),
    (lambda state: state | {STEM: torch.ones(4, 0, 3, 3, 3)}, f"{STEM} is (4, 0, 3, 3, 3), not"),
    (lambda state: state | {STEM: torch.ones(4)}, f"{STEM} is (4,), not")],
    ids=["a number for a name", "a list", "no values", "too few axes"])
def test_odd_weights_are_refused_in_one_line(change, message):
    model = models.build_model("unet_demo", "pretrain", features=4)
    with pytest.raises(config.UserError) as error:
        checkpoint.load_weights(model, {"model": change(model.state_dict())})
    assert message in str(error.value)


def test_the_checksum_is_the_one_of_the_file_before_its_comment(tmp_path):
    """A zip file whose comment holds the digest: the form of all checkpoints so far."""
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, network())
    whole = path.read_bytes()
    digest = hashlib.sha256(whole[:-73]).hexdigest()
    assert zipfile.ZipFile(path).comment == b"sha256:" + digest.encode()
    assert checkpoint.checksum(path) == digest
    path.write_bytes(whole[:-1])
    assert checkpoint.checksum(path) == hashlib.sha256(whole[:-1]).hexdigest(), "as of any file"
