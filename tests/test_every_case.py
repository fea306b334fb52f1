"""finetune.py --folds all: one network on every labelled case; and Dice of the training crops."""

import json
import math

import pytest
import torch
from conftest import FINETUNE, log_of, mistake, run

import checkpoint
import data
import finetune
import tasks


# -------------------------------------------------------------------------- Dice in the log
def test_overlaps_give_the_dice_of_the_largest_class():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    label = torch.randint(0, 3, (2, 4, 5, 6), generator=generator, dtype=torch.uint8)
    label[0, 0] = data.IGNORE
    predicted = logits.argmax(1)[label != data.IGNORE]
    truth = label[label != data.IGNORE]
    expected = []
    for k in (1, 2):
        common = ((predicted == k) & (truth == k)).sum().item()
        expected.append(2 * common / ((predicted == k).sum() + (truth == k).sum()).item())
    sums = finetune.class_overlaps(logits, label)
    assert sums.shape == (2, 2)
    found = finetune.dice_of_overlaps(sums)
    assert found["dice"] == pytest.approx(sum(expected) / 2, abs=1e-12)

    # A class that is neither there nor found does not count; without any there is no Dice.
    label = torch.where(label == 2, 1, label)
    logits[:, 2] = -9
    alone = finetune.class_overlaps(logits, label)
    assert finetune.dice_of_overlaps(alone)["dice"] == (2 * alone[0, 0] / alone[1, 0]).item()
    assert finetune.dice_of_overlaps(torch.zeros(2, 2)) == {}


# -------------------------------------------------------------------------- all cases
@pytest.fixture(scope="module")
def everyone(prepared, lesions, tmp_path_factory):
    out = tmp_path_factory.mktemp("every")
    settings = FINETUNE | {"task": lesions, "data": prepared, "folds": "all",
                           "model": "unet_demo", "features": 4}
    return out, settings, run("finetune", **settings, out=out)


def test_all_labelled_cases_are_trained_on_and_none_is_scored(everyone, prepared):
    out, settings, printed = everyone
    saved = checkpoint.load_checkpoint(out / "fold_all" / "last.pt")
    _, task = tasks.read_task(str(settings["task"]))
    cases = tasks.labelled_cases(str(prepared), task.source, tuple(task.sequences))
    assert saved["cases"] == [case.name for case in cases if case.volumes[0].split != "test"]
    assert saved["step"] == settings["steps"]
    assert f"one network trains on {len(saved['cases'])}" in printed
    assert "none is left to score it" in printed
    assert not (out / "dice.json").exists() and not (out / "summary.md").exists()
    for record in log_of(out / "fold_all"):
        assert math.isfinite(record["loss"]) and 0 <= record.get("dice", 0) <= 1


def test_an_estimate_does_not_claim_a_network(everyone, tmp_path):
    out, settings, _ = everyone
    printed = run("finetune", **settings | {"estimate": "true"}, out=tmp_path / "run")
    assert "steps: " in printed and "was trained on all cases" not in printed
    assert not (tmp_path / "run").exists()


def test_its_losses_are_drawn(everyone):
    pytest.importorskip("matplotlib")
    assert (everyone[0] / "fold_all" / "losses.png").read_bytes()[1:4] == b"PNG"


def test_it_goes_on_and_folds_go_beside_it(everyone):
    """The same command finds it finished; numbered folds may stand in the same folder."""
    out, settings, _ = everyone
    before = (out / "fold_all" / "last.pt").read_bytes()
    run("finetune", **settings, out=out)
    assert (out / "fold_all" / "last.pt").read_bytes() == before

    run("finetune", **settings | {"folds": 0}, out=out)
    assert list(json.loads((out / "dice.json").read_text())["folds"]) == ["0"]


@pytest.mark.parametrize("folds", ["all,0", "every", "0,all"])
def test_all_stands_alone(everyone, folds, tmp_path):
    _, settings, _ = everyone
    line = mistake("finetune", **settings | {"folds": folds}, out=tmp_path)
    assert f"folds {folds}: the task has the folds 0 to" in line and "or all, alone" in line
