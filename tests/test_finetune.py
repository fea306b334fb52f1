"""Finetuning: its loss, its runs, where its settings come from, and what it refuses."""

import dataclasses
import glob
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FINETUNE, Bomb, log_of, mistake, run, script

import checkpoint
import config
import data
import finetune
import models
import pretrain
import tasks


def results_of(folder):
    """dice.json of a run folder."""
    return json.loads((folder / "dice.json").read_text())


# ------------------------------------------------------------------------------------------- loss
def test_dice_ce_is_cross_entropy_minus_soft_dice():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 5, 6), generator=generator)
    p = logits.softmax(1).numpy()
    y = label.numpy()

    # Soft Dice of each sample and class, by its definition.
    scores = []
    for b in range(2):
        for k in range(3):
            tp = (p[b, k] * (y[b] == k)).sum()
            fp = (p[b, k] * (y[b] != k)).sum()
            fn = ((1 - p[b, k]) * (y[b] == k)).sum()
            scores.append((2 * tp + 1) / (2 * tp + fp + fn + 1 + 1e-8))
    expected = F.cross_entropy(logits, label).item() - np.mean(scores)
    assert finetune.dice_ce(logits, label).item() == pytest.approx(expected, abs=1e-12)

    perfect = F.one_hot(label, 3).movedim(-1, 1).double() * 100
    assert finetune.dice_ce(perfect, label).item() == pytest.approx(-1, abs=1e-6)


def test_ignored_voxels_do_not_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 4, 4, 4, generator=generator)
    label = torch.randint(0, 2, (1, 4, 4, 4), generator=generator, dtype=torch.uint8)
    label[:, 2:] = data.IGNORE
    expected = finetune.dice_ce(logits[:, :, :2], label[:, :2]).item()
    assert finetune.dice_ce(logits, label).item() == pytest.approx(expected, abs=1e-6)

    logits.requires_grad_()
    finetune.dice_ce(logits, label).backward()
    assert logits.grad[:, :, 2:].abs().max() == 0
    assert logits.grad[:, :, :2].abs().max() > 0

    nothing = torch.full_like(label, data.IGNORE)
    assert math.isfinite(finetune.dice_ce(logits, nothing).item())


def test_shares_of_a_batch_average_to_its_loss():
    """As DDP averages them, also where the label of one sample is ignored in part."""
    logits = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 4, 4))
    label[0, :3] = data.IGNORE
    shares = [finetune.dice_ce(logits[i:i + 1], label[i:i + 1]).item() for i in range(2)]
    assert finetune.dice_ce(logits, label).item() == pytest.approx(np.mean(shares), abs=1e-12)


# ------------------------------------------------------------------------------------------- runs
def test_finetuning_takes_the_whole_encoder_and_scores_every_case(finetuned, prepared):
    out, output = finetuned
    assert "100 %" in output
    folds = json.loads((out / "folds.json").read_text())["folds"]
    results = results_of(out)["folds"]
    for number, fold in enumerate(folds):
        assert [r["case"] for r in results[str(number)]] == sorted(fold["evaluate"])
        assert len(fold["train"]) == 2 and not set(fold["train"]) & set(fold["evaluate"])
        assert log_of(out / f"fold_{number}")[-1]["step"] == 6
    assert "mean ± SD" in (out / "summary.md").read_text()


def test_encoder_weights_arrive(prepared, pretrained, lesions):
    saved = checkpoint.load_checkpoint(pretrained)
    _, task = tasks.read_task(str(lesions))
    cfg = finetune.Config(task=str(lesions), ckpt=str(pretrained))
    cfg = cfg.fill_defaults("few", task, saved)
    assert cfg.out == "runs/few-unet_demo-amaes"

    def build():
        return models.build_model(cfg.model, "segment", len(task.sequences), len(task.classes),
                                  features=cfg.features)

    model, report = finetune.new_network(build, saved, seed=0)
    weights = saved["model"]
    assert sorted(report.taken) == sorted(n for n in weights if n.startswith("encoder."))
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    assert len(encoder) == 40
    assert all(torch.equal(v, weights[k]) for k, v in encoder.items())


def test_finished_folds_are_kept_and_a_cut_fold_goes_on(finetuned, prepared, pretrained, lesions):
    out, _ = finetuned
    before = (out / "dice.json").read_text()
    stamp = os.stat(out / "fold_0" / "last.pt").st_mtime_ns
    os.remove(out / "fold_1" / "dice.json")
    script("finetune.py", ckpt=pretrained, task=lesions, data=prepared, out=out, **FINETUNE)
    assert (out / "dice.json").read_text() == before
    assert os.stat(out / "fold_0" / "last.pt").st_mtime_ns == stamp


def test_two_processes_evaluate_the_same_cases(prepared, lesions, tmp_path):
    settings = FINETUNE | {"precision": "fp64", "model": "unet_demo", "task": lesions,
                           "data": prepared, "folds": 1}
    for processes in (None, 2):
        script("finetune.py", processes=processes, out=tmp_path / f"{processes}", **settings)
    one, two = (results_of(tmp_path / f"{p}")["folds"]["1"] for p in (None, 2))
    assert [r["case"] for r in one] == [r["case"] for r in two]

    logs = [log_of(tmp_path / f"{p}" / "fold_1") for p in (None, 2)]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)


def test_compare_pairs_runs_and_refuses_other_folds(finetuned, prepared, lesions, tmp_path):
    out, _ = finetuned
    scratch = tmp_path / "scratch"
    settings = FINETUNE | {"task": lesions, "data": prepared, "out": scratch, "workers": 0}
    run("finetune", model="unet_demo", **settings)
    result = script("compare.py", scratch, out, out=tmp_path / "table.md")
    assert "| lesion |" in result.stdout and (tmp_path / "table.md").exists()

    folds = json.loads((scratch / "folds.json").read_text())
    folds["folds"][0]["train"] = folds["folds"][0]["evaluate"]
    (scratch / "folds.json").write_text(json.dumps(folds))
    assert "different tasks or folds" in mistake("compare", scratch, out)


# ------------------------------------------------------------------------------------ the settings
def test_augmentations_by_default_and_crossed():
    def preset(ckpt, *words):
        words = ["--task", "wmh", "--model", "unet_b", *words]
        cfg = config.parse_config(finetune.Config, words)
        cfg = dataclasses.replace(cfg, ckpt=ckpt)
        saved = {"row": "unet_b"} if ckpt else {}
        return cfg.fill_defaults("wmh", tasks.read_task("wmh")[1], saved).augment

    assert (preset(None), preset("x.pt")) == ("all", "spatial"), "section 4.3, section 3.2"
    for word in ("none", "spatial", "all"):
        assert preset(None, "--augment", word) == preset("x.pt", "--augment", word) == word


@pytest.mark.parametrize(("saved", "model", "origin"), [
    ({}, "unet_b", "scratch"),
    ({"row": "unet_b", "kind": "pretrain", "config": {"objective": "amaes"}}, None, "amaes"),
    ({"row": "swinunetr", "config": {"objective": "swin"}}, None, "swin"),
    ({"row": "swinunetr", "config": {"objective": "amaes"}}, None, "amaes"),
    ({"state_dict": {}}, "unet_xl", "amaes"), ({"state_dict": {}}, "swinunetr", "swin"),
    ({"row": "unet_b", "kind": "finetune"}, None, "finetune")])
def test_origin_names_the_run(saved, model, origin):
    cfg = finetune.Config(task="wmh", ckpt="x.pt" if saved else None, model=model)
    cfg = cfg.fill_defaults("wmh", tasks.read_task("wmh")[1], saved)
    assert cfg.out == f"runs/wmh-{cfg.model}-{origin}"
    assert cfg.lr == 1e-4 and cfg.steps == 2500 and cfg.batch_size == 4 and cfg.patch_size == 128


def test_history():
    row = data.Volume("p", "s", "x", "", "FLAIR", "train", "l", "", "", "f00")
    case = data.Case("c", "s/x", ("p",), "l", (row,))
    scratch = {"subjects": ["s/x"], "sha256": ["f00"], "pretraining": None}
    assert finetune.data_seen({}, [case]) == scratch

    first = {"kind": "pretrain", "subjects": ["s/a"], "sha256": ["a00"], "config": {"lr": 1},
             "hours": 2.5}
    expected = {"subjects": ["s/a", "s/x"], "sha256": ["a00", "f00"],
                "pretraining": {"lr": 1, "hours": 2.5}}
    assert finetune.data_seen(first, [case]) == expected
    again = expected | {"kind": "finetune", "config": {"lr": 2}}
    assert finetune.data_seen(again) == expected, "finetuned again"

    foreign = finetune.data_seen({"state_dict": {}}, [case])
    assert foreign == {"subjects": None, "sha256": None, "pretraining": {"hours": None}}


def test_every_ablation_is_a_config_of_its_script():
    folder = os.path.join(os.path.dirname(finetune.__file__), "configs")
    files = sorted(glob.glob(f"{folder}/ablations/*.yaml"))
    runs = {}
    for path in files:
        script = finetune if os.path.basename(path).startswith("finetune_") else pretrain
        words = ["--task", "brats21"] if script is finetune else [f"{folder}/unet_xl.yaml"]
        plain = config.parse_config(script.Config, words)
        cfg = config.parse_config(script.Config, [*words, path])
        listed = config.read_yaml(script.Config, path)
        for key, value in listed.items():
            assert getattr(plain, key) != value, "only what differs"
        assert f"{script.__name__}.py" in open(path).read()
        runs[os.path.basename(path)] = cfg

    outs = [cfg.out for cfg in runs.values() if isinstance(cfg, pretrain.Config)]
    assert len(set(outs)) == len(outs) and "runs/unet_xl" not in outs
    trained = {cfg.n_train for cfg in runs.values() if isinstance(cfg, finetune.Config)}
    assert trained == {5, 10, 40}
    assert runs["skips.yaml"].skips and runs["skips.yaml"].decoder == "standard"
    assert runs["no_augment.yaml"].decoder == "light" and runs["no_augment.yaml"].augment == "none"


# --------------------------------------------------------------------------------------- bad input
def test_a_checkpoint_of_another_model_is_refused(prepared, pretrained, lesions, tmp_path):
    settings = FINETUNE | {"task": lesions, "data": prepared, "out": tmp_path, "model": "unet_b"}
    assert "holds a unet_demo, not a unet_b" in mistake("finetune", ckpt=pretrained, **settings)

    # As if another program had written it.
    saved = checkpoint.load_checkpoint(pretrained)
    del saved["row"], saved["format"]
    torch.save(saved, tmp_path / "anonymous.pt")
    line = mistake("finetune", ckpt=tmp_path / "anonymous.pt", **settings)
    assert "of 40 encoder tensors 40 are missing or of another shape" in line


def test_a_checkpoint_with_code_is_refused_and_nothing_runs(prepared, lesions, tmp_path):
    path = tmp_path / "bad.pt"
    torch.save({"model": {}, "row": Bomb(tmp_path / "ran")}, path)
    assert "refused" in mistake("finetune", ckpt=path, task=lesions, data=prepared, **FINETUNE)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run code"


@pytest.mark.parametrize(("settings", "message"), [
    ({"task": "whm"}, "no task 'whm'"),
    ({"ckpt": "/nowhere.pt", "model": None}, "no checkpoint at /nowhere.pt"),
    ({"data": "/nowhere"}, "not a prepared folder"),
    ({"folds": 7}, "folds 0 to 1"),
    ({"stepz": 3}, "did you mean 'steps'"),
    ({"precision": "fp16"}, "choose bf16, fp32, fp64"),
    ({"augment": "basic"}, "choose auto, none, spatial, all"),
    ({"batch_size": 0}, "batch_size in the command line: 0 is out of range"),
    ({"overlap": 1}, "overlap in the command line: 1.0 is out of range, 0 to 0.95"),
    ({"lr": -1}, "lr in the command line: -1.0 is out of range"),
    ({"n_train": 5}, "trains on 5 subjects and needs more"),
])
def test_a_mistake_ends_in_one_line(prepared, lesions, tmp_path, settings, message):
    common = {"model": "unet_demo", "task": lesions, "data": prepared, "out": tmp_path}
    merged = FINETUNE | common | settings
    given = {key: value for key, value in merged.items() if value is not None}
    assert message in mistake("finetune", **given)


def test_finished_folds_of_other_settings_are_not_taken_for_these(
        finetuned, prepared, pretrained, lesions):
    out, _ = finetuned
    before = (out / "dice.json").read_text(), (out / "config.yaml").read_text()
    settings = FINETUNE | {"task": lesions, "data": prepared, "out": out, "augment": "none"}
    line = mistake("finetune", ckpt=pretrained, **settings)
    assert "folds of another run (augment spatial -> none)" in line
    assert before == ((out / "dice.json").read_text(), (out / "config.yaml").read_text())


def test_folds_of_an_edited_task_are_not_taken_for_these(
        finetuned, prepared, pretrained, lesions):
    out, _ = finetuned
    settings = FINETUNE | {"data": prepared, "out": out, "ckpt": pretrained}
    before = lesions.read_text()
    try:
        lesions.write_text(json.dumps(json.loads(before) | {"regions": {"any": [1]}}))
        line = mistake("finetune", task=lesions, **settings)
    finally:
        lesions.write_text(before)
    assert "folds of another task, or of other cases" in line


def test_subjects_of_one_name_in_two_sources_are_refused(prepared, lesions, tmp_path):
    folder = twice(prepared, tmp_path / "data")
    line = mistake("finetune", task=lesions, data=folder, model="unet_demo", out=tmp_path / "run")
    assert "in several sources: name one in the task" in line


def twice(prepared, folder):
    """A prepared folder that holds its volumes as two sources."""
    shutil.copytree(prepared, folder)
    shutil.copytree(folder / "volumes" / "bids", folder / "volumes" / "more")
    shutil.copytree(folder / "labels" / "bids", folder / "labels" / "more")
    index = (folder / "index" / "bids-0of1.csv").read_text()
    index = index.replace("/bids/", "/more/").replace(",bids,", ",more,")
    (folder / "index" / "more-0of1.csv").write_text(index)
    return folder


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": {"background": 0, "lesion": 1}}, "labels maps label values, 0 to 255"),
    ({"labels": {"0": 0, "300": 1}}, "labels maps label values, 0 to 255"),
    ({"labels": {"0": 0, "1": [1]}}, "labels must map onto the class numbers 0 to 1"),
    ({"ignore": [300]}, "ignore lists values"),
    ({"regions": {"any": 1}}, "a region is a list of class numbers"),
    ({"regions": {"any": ["lesion"]}}, "a region is a list of class numbers"),
    ({"folds": -1}, "folds in "), ({"n_train": -3}, "n_train in ")])
def test_a_mistake_in_a_task_file_ends_in_one_line(change, message, prepared, lesions, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(json.loads(lesions.read_text()) | change))
    assert message in mistake("finetune", task=path, data=prepared, model="unet_demo")
