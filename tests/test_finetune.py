"""Finetuning, evaluation, prediction and comparison: the loss, the folds, the window, the scan's own grid."""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import importlib
import io
import json
import math
import os
import shutil
import signal
import threading

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import log_of, mistake, script
from runs import Run

import checkpoint
import config
import data
import evaluate
import finetune
import metrics
import models
import predict
import preprocess
import pretrain
import tasks
import training

TASK = {"data": "set by --data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
        "labels": {0: 0, 1: 1}, "n_train": 3, "folds": 2}
TINY = {"steps": 6, "patch_size": 32, "batch_size": 2, "save_every": 4, "log_every": 1, "compile": "false",
        "precision": "fp32", "workers": 1, "lr": 1e-3, "overlap": 0}


def run(name, *words, **settings):
    """A script in this process, which is quicker -> what it printed."""
    module, output = importlib.import_module(name), io.StringIO()
    words = [str(word) for word in words]
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.redirect_stdout(output):
            module.main(config.parse_config(module.Config, words))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return output.getvalue()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "lesions.yaml"
    path.write_text(json.dumps(TASK))
    return path


@pytest.fixture(scope="module")
def pretrained(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    script("pretrain.py", data=prepared, out=out, model="unet_demo", patch_size=32, batch_size=2, steps=2,
           val_fraction=0.2, compile="false", precision="fp32", workers=0)
    return out / "last.pt"


@pytest.fixture(scope="module")
def finetuned(prepared, pretrained, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned")
    result = script("finetune.py", ckpt=pretrained, task=task, data=prepared, out=out, **TINY)
    return out, result.stdout


# ------------------------------------------------------------------------------------------------------- loss
def test_dice_ce_is_cross_entropy_minus_soft_dice():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 5, 6), generator=generator)
    p, y = logits.softmax(1).numpy(), label.numpy()
    scores = []
    for b in range(2):
        for k in range(3):
            tp, fp, fn = ((p[b, k] * (y[b] == k)).sum(), (p[b, k] * (y[b] != k)).sum(),
                          ((1 - p[b, k]) * (y[b] == k)).sum())
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
    assert logits.grad[:, :, 2:].abs().max() == 0 and logits.grad[:, :, :2].abs().max() > 0
    assert math.isfinite(finetune.dice_ce(logits, torch.full_like(label, data.IGNORE)).item())


def test_shares_of_a_batch_average_to_its_loss():
    """As DDP averages them, also where the label of one sample is ignored in part."""
    logits = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 4, 4))
    label[0, :3] = data.IGNORE
    shares = [finetune.dice_ce(logits[i:i + 1], label[i:i + 1]).item() for i in range(2)]
    assert finetune.dice_ce(logits, label).item() == pytest.approx(np.mean(shares), abs=1e-12)


# ------------------------------------------------------------------------------------------------------ folds
def cases_of(n, test=0):
    row = data.Volume("p", "s", "x", "", "FLAIR", "train", "l", "", "", "")
    return [data.Case(f"c{i:04}", f"s/{i:04}", ("p",), "l",
                      (row._replace(split="test" if i < test else "train"),)) for i in range(n)]


@pytest.mark.parametrize(("n", "quarter", "evaluate", "counts"), [
    (1251, "test", "test", (938, 313, 313)),  # BraTS21, Table 4
    (1251, "test", "rest", (938, 313, 918)),  # BraTS21, Tables 2 and 3
    (250, "pretrain", "rest", (187, 63, 167)),  # ISLES22: 63 are set aside, but for pretraining
    (60, None, "rest", (60, 0, 40)),  # WMH
])
def test_split_arithmetic_of_the_paper(n, quarter, evaluate, counts):
    cases = cases_of(n)
    kept, held = data.split_subjects([c.subject for c in cases], 0.25, 0) if quarter else (cases, [])
    assert (len(kept), len(held)) == counts[:2]
    cases = [c._replace(volumes=(c.volumes[0]._replace(split=quarter if c.subject in held else "train"),))
             for c in cases]
    usable = [c for c in cases if c.volumes[0].split != "pretrain"]  # as data.labelled_cases
    task = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",), evaluate=evaluate)
    folds = tasks.make_folds("task", task, usable)
    subjects = {c.name: c.subject for c in cases}
    assert len(folds) == 6 and len({tuple(f["train"]) for f in folds}) == 6
    for fold in folds:
        train, rest = ({subjects[name] for name in fold[part]} for part in ("train", "evaluate"))
        assert (len(train), len(rest)) == (20, counts[2]) and not train & rest
        assert not train & set(held) and (rest == set(held)) == (evaluate == "test")
    assert folds[0]["train"] != tasks.make_folds("other", task, usable)[0]["train"]


def test_sessions_of_a_subject_stay_together():
    cases = [c._replace(name=f"{c.name}_{session}") for c in cases_of(30) for session in "ab"]
    task = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",))
    for fold in tasks.make_folds("task", task, cases):
        assert (len(fold["train"]), len(fold["evaluate"])) == (40, 20)
        assert not {name[:-2] for name in fold["train"]} & {name[:-2] for name in fold["evaluate"]}


def test_folds_are_the_same_on_every_machine():
    task = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",))
    folds = tasks.make_folds("wmh", task, cases_of(60))
    assert folds[0]["train"][:4] == ["c0002", "c0003", "c0007", "c0008"]
    assert hashlib.sha256(json.dumps(folds).encode()).hexdigest()[:16] == "f71f6d6c34dfb579"


def test_more_training_subjects_are_the_same_ones_and_more():
    task = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",))
    trained = [set(tasks.make_folds("wmh", dataclasses.replace(task, n_train=n), cases_of(60))[0]["train"])
               for n in (5, 10, 20, 40)]
    assert [len(names) for names in trained] == [5, 10, 20, 40]
    assert all(few < many for few, many in zip(trained, trained[1:], strict=False))


def test_leave_one_out():
    task = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",), folds=0)
    folds = tasks.make_folds("task", task, cases_of(4, test=1))  # the hold-out does not matter here
    assert [fold["evaluate"] for fold in folds] == [["c0000"], ["c0001"], ["c0002"], ["c0003"]]
    assert all(len(fold["train"]) == 3 for fold in folds)


def test_a_task_that_needs_more_subjects_is_refused():
    task = tasks.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",))
    with pytest.raises(config.UserError, match="trains on 20 subjects"):
        tasks.make_folds("task", task, cases_of(20))
    with pytest.raises(config.UserError, match="split test, of which d has no"):
        tasks.make_folds("task", dataclasses.replace(task, evaluate="test"), cases_of(30))


# ------------------------------------------------------------------------------------------- foreground crops
def test_oversampling_finds_the_foreground_and_survives_an_empty_label(tmp_path):
    image, label = np.zeros((40, 40, 40), np.float16), np.zeros((40, 40, 40), np.uint8)
    label[33, 5, 20] = 1
    label[2, 2, 2] = 2  # ignored: never looked for
    for name, array in (("image", image), ("label", label), ("empty", np.zeros_like(label))):
        np.save(tmp_path / f"{name}.npy", array)
    classes = data.class_table({0: 0, 1: 1}, (2,))

    def share(name, oversample):
        case = data.Case("c", "s", (str(tmp_path / "image.npy"),), str(tmp_path / f"{name}.npy"), ())
        dataset = data.Crops([case], 16, 0, "none", classes, oversample)
        return np.mean([(dataset[epoch, 0].label == 1).any().item() for epoch in range(200)])

    assert share("label", 1.0) == 1.0, "the reference's bound could just miss the voxel"
    assert 0.25 < share("label", 0.33) < 0.5
    assert share("empty", 1.0) == 0.0


def test_a_label_value_the_task_does_not_name_is_an_error(tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((16, 16, 16), np.float16))
    np.save(tmp_path / "label.npy", np.full((16, 16, 16), 3, np.uint8))
    case = data.Case("c", "s", (str(tmp_path / "image.npy"),), str(tmp_path / "label.npy"), ())
    sample = data.Crops([case], 16, 0, "none", data.class_table({0: 0, 1: 1}))[0, 0]
    assert "do not name" in sample.fault


# ----------------------------------------------------------------------------------------------------- window
class Shift(torch.nn.Module):
    """Two logits whose values tell which voxel was read: x and -x."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.cat([x, -x], 1) * self.one


@pytest.mark.parametrize("shape", [(16, 16, 16), (20, 33, 17), (9, 40, 16)])
@pytest.mark.parametrize("gaussian", [False, True])
def test_window_puts_every_voxel_back(shape, gaussian):
    volume = torch.rand(1, *shape)
    logits = predict.sliding_window(Shift(), volume, 16, 0.5, gaussian)
    assert logits.shape == (2, *shape)
    assert torch.allclose(logits[:1], volume, atol=1e-6) and torch.allclose(logits[1:], -volume, atol=1e-6)


def test_window_starts_as_the_official_code():
    assert predict.window_starts(300, 128, 0.5) == [0, 64, 128, 172]
    assert predict.window_starts(256, 128, 0.5) == [0, 64, 128]
    assert predict.window_starts(128, 128, 0.5) == [0]


def test_dice_rules():
    truth = np.array([1, 1, 0, 2, 0, 0])
    found = np.array([1, 0, 0, 1, 0, 0])
    scores = metrics.dice(found, truth, [1, 2, 3, (1, 2)])
    assert scores[1] == 0.5 and scores[2] == 0 and math.isnan(scores[3]) and scores[1, 2] == 0.8
    assert metrics.dice(found, truth, [1], ignore=2)[1] == pytest.approx(2 / 3)
    assert metrics.dice(np.array([3]), np.array([0]), [3])[3] == 0
    with pytest.raises(ValueError, match="shape"):
        metrics.dice(found, truth[:3], [1])


# ------------------------------------------------------------------------------------------------------- runs
def test_finetuning_takes_the_whole_encoder_and_scores_every_case(finetuned, prepared):
    out, output = finetuned
    assert "100 %" in output
    folds = json.loads((out / "folds.json").read_text())["folds"]
    results = json.loads((out / "dice.json").read_text())["folds"]
    for f, fold in enumerate(folds):
        assert [r["case"] for r in results[str(f)]] == sorted(fold["evaluate"])
        assert len(fold["train"]) == 3 and not set(fold["train"]) & set(fold["evaluate"])
        assert log_of(out / f"fold_{f}")[-1]["step"] == 6
    assert "mean ± SD" in (out / "summary.md").read_text()


def test_encoder_weights_arrive(prepared, pretrained, task):
    saved, (_, read) = checkpoint.load_checkpoint(pretrained), tasks.read_task(str(task))
    cfg = finetune.Config(task=str(task), ckpt=str(pretrained)).fill_defaults("few", read, saved)
    assert cfg.out == "runs/few-unet_demo-amaes"

    def build():
        return models.build_model(cfg.model, "segment", len(read.sequences), len(read.classes),
                                  features=cfg.features)

    model, report = finetune.new_network(build, saved, seed=0)
    weights = saved["model"]
    assert sorted(report.taken) == sorted(n for n in weights if n.startswith("encoder."))
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    assert len(encoder) == 40
    assert all(torch.equal(v, weights[k]) for k, v in encoder.items())


def test_finished_folds_are_kept_and_a_cut_fold_goes_on(finetuned, prepared, pretrained, task):
    out, _ = finetuned
    before = (out / "dice.json").read_text()
    stamp = os.stat(out / "fold_0" / "last.pt").st_mtime_ns
    os.remove(out / "fold_1" / "dice.json")
    script("finetune.py", ckpt=pretrained, task=task, data=prepared, out=out, **TINY)
    assert (out / "dice.json").read_text() == before
    assert os.stat(out / "fold_0" / "last.pt").st_mtime_ns == stamp


def test_two_processes_evaluate_the_same_cases(prepared, task, tmp_path):
    for processes in (None, 2):
        script("finetune.py", processes=processes, model="unet_demo", task=task, data=prepared, folds=1,
               out=tmp_path / f"{processes}", **TINY | {"precision": "fp64"})
    one, two = (json.loads((tmp_path / f"{p}" / "dice.json").read_text())["folds"]["1"] for p in (None, 2))
    assert [r["case"] for r in one] == [r["case"] for r in two]
    for a, b in zip(log_of(tmp_path / "None" / "fold_1"), log_of(tmp_path / "2" / "fold_1"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)


def test_prediction_lies_on_the_scans_own_grid(finetuned, raw, tmp_path):
    out, _ = finetuned
    for i, scan in enumerate(sorted(glob.glob(f"{raw}/**/*FLAIR.nii.gz", recursive=True))[:4]):
        run("predict", scan, ckpt=out / "fold_0" / "last.pt", overlap=0, out=tmp_path / f"{i}.nii.gz")
        source, result = nib.load(scan), nib.load(tmp_path / f"{i}.nii.gz")
        assert result.shape == source.shape and np.allclose(result.affine, source.affine, atol=1e-6)
        assert result.get_data_dtype() == np.uint8 and set(np.unique(result.dataobj)) <= {0, 1}


def test_prediction_scores_as_the_evaluation_does(finetuned, prepared, raw, tmp_path):
    out, _ = finetuned
    record = json.loads((out / "fold_0" / "dice.json").read_text())[0]
    case = next(c for c in data.labelled_cases(str(prepared), None, ("FLAIR",)) if c.name == record["case"])
    subject = case.volumes[0].subject
    scan = glob.glob(f"{raw}/**/*{subject}*FLAIR.nii.gz", recursive=True)[0]
    truth = scan.replace("FLAIR", "lesion")
    result = script("predict.py", scan, truth=truth, ckpt=out / "fold_0" / "last.pt", overlap=0,
                    out=tmp_path / "s.nii.gz")
    score = result.stdout.split("lesion: Dice ")[1].split(",")[0]
    assert score == "nan" if record["dice"]["lesion"] is None else (
        float(score) == pytest.approx(record["dice"]["lesion"], rel=1e-3)), "the same float16 voxels"


def test_compare_pairs_runs_and_refuses_other_folds(finetuned, prepared, task, tmp_path):
    out, _ = finetuned
    settings = TINY | {"task": task, "data": prepared, "out": tmp_path / "scratch", "workers": 0}
    run("finetune", model="unet_demo", **settings)
    result = script("compare.py", tmp_path / "scratch", out, out=tmp_path / "table.md")
    assert "| lesion |" in result.stdout and (tmp_path / "table.md").exists()
    folds = json.loads((tmp_path / "scratch" / "folds.json").read_text())
    folds["folds"][0]["train"] = folds["folds"][0]["evaluate"]
    (tmp_path / "scratch" / "folds.json").write_text(json.dumps(folds))
    assert "different tasks or folds" in mistake("compare", tmp_path / "scratch", out)


# -------------------------------------------------------------------------------------------------- bad input
def test_a_checkpoint_of_another_model_is_refused(prepared, pretrained, task, tmp_path):
    settings = TINY | {"task": task, "data": prepared, "out": tmp_path, "model": "unet_b"}
    assert "holds a unet_demo, not a unet_b" in mistake("finetune", ckpt=pretrained, **settings)
    saved = checkpoint.load_checkpoint(pretrained)
    del saved["row"], saved["format"]  # as if another program had written it
    torch.save(saved, tmp_path / "anonymous.pt")
    line = mistake("finetune", ckpt=tmp_path / "anonymous.pt", **settings)
    assert "of 40 encoder tensors 40 are missing or of another shape" in line


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_with_code_is_refused_and_nothing_runs(prepared, task, tmp_path):
    torch.save({"model": {}, "row": Bomb(tmp_path / "ran")}, tmp_path / "bad.pt")
    assert "refused" in mistake("finetune", ckpt=tmp_path / "bad.pt", task=task, data=prepared, **TINY)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
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
def test_a_mistake_ends_in_one_line(prepared, task, tmp_path, settings, message):
    merged = TINY | {"model": "unet_demo", "task": task, "data": prepared, "out": tmp_path} | settings
    assert message in mistake("finetune", **{k: v for k, v in merged.items() if v is not None})


def test_prediction_refuses_what_it_cannot_use(finetuned, pretrained, raw, tmp_path):
    out, _ = finetuned
    scan = glob.glob(f"{raw}/**/*FLAIR.nii.gz", recursive=True)[0]
    (tmp_path / "broken.nii.gz").write_bytes(open(scan, "rb").read()[:2000])
    ckpt = out / "fold_0" / "last.pt"
    for words, settings, message in (((scan,), {"ckpt": pretrained}, "finetune.py makes one"),
                                     ((scan, scan), {"ckpt": ckpt}, "reads 1 channels"),
                                     ((), {"ckpt": ckpt}, "name the scan"),
                                     ((tmp_path / "none.nii.gz",), {"ckpt": ckpt}, "none.nii.gz"),
                                     ((tmp_path / "broken.nii.gz",), {"ckpt": ckpt}, "broken.nii.gz")):
        assert message in mistake("predict", *words, out=tmp_path / "x.nii.gz", **settings)
    assert not (tmp_path / "x.nii.gz").exists()
    line = mistake("predict", scan, ckpt=ckpt, out=tmp_path / "seg.mgz")
    assert "ends in .nii or .nii.gz" in line
    before = open(scan, "rb").read()
    assert "one of the files to read" in mistake("predict", scan, ckpt=ckpt, out=scan)
    assert open(scan, "rb").read() == before


def test_prediction_takes_what_preparation_takes(finetuned, raw, tmp_path):
    """FreeSurfer's format, a fourth axis of one; and a folder for the result that is not there yet."""
    ckpt = finetuned[0] / "fold_0" / "last.pt"
    source = nib.load(glob.glob(f"{raw}/**/*FLAIR.nii.gz", recursive=True)[0])
    voxels = source.get_fdata(dtype=np.float32)
    nib.MGHImage(voxels, source.affine).to_filename(tmp_path / "scan.mgz")
    nib.Nifti1Image(voxels[..., None], source.affine).to_filename(tmp_path / "scan.nii.gz")
    results = []
    for name in ("scan.mgz", "scan.nii.gz"):
        out = tmp_path / "new" / f"{name}.nii.gz"
        run("predict", tmp_path / name, ckpt=ckpt, overlap=0, out=out)
        results.append(nib.load(out))
        assert results[-1].shape == source.shape and results[-1].get_data_dtype() == np.uint8
        assert np.allclose(results[-1].affine, source.affine, atol=1e-4)
    assert np.array_equal(*(np.asarray(result.dataobj) for result in results))
    images = [tmp_path / "scan.nii.gz", tmp_path / "plain.nii.gz"]
    nib.Nifti1Image(voxels, source.affine).to_filename(images[1])
    assert preprocess.prepare_scan(images)[0].shape[0] == 2


# ----------------------------------------------------------------------------------------------- the protocol
def test_augmentations_by_default_and_crossed():
    def preset(ckpt, *words):
        cfg = config.parse_config(finetune.Config, ["--task", "wmh", "--model", "unet_b", *words])
        cfg, saved = dataclasses.replace(cfg, ckpt=ckpt), {"row": "unet_b"} if ckpt else {}
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


def test_finished_folds_of_other_settings_are_not_taken_for_these(finetuned, prepared, pretrained, task):
    out, _ = finetuned
    before = (out / "dice.json").read_text(), (out / "config.yaml").read_text()
    settings = TINY | {"task": task, "data": prepared, "out": out, "augment": "none"}
    line = mistake("finetune", ckpt=pretrained, **settings)
    assert "folds of another run (augment spatial -> none)" in line
    assert before == ((out / "dice.json").read_text(), (out / "config.yaml").read_text())


def test_folds_of_an_edited_task_are_not_taken_for_these(finetuned, prepared, pretrained, task, tmp_path):
    out, _ = finetuned
    settings = TINY | {"data": prepared, "out": out, "ckpt": pretrained}
    before = task.read_text()
    try:
        task.write_text(json.dumps(json.loads(before) | {"regions": {"any": [1]}}))
        assert "folds of another task, or of other cases" in mistake("finetune", task=task, **settings)
    finally:
        task.write_text(before)


def test_subjects_of_one_name_in_two_sources_are_refused(prepared, task, tmp_path):
    folder = twice(prepared, tmp_path / "data")
    line = mistake("finetune", task=task, data=folder, model="unet_demo", out=tmp_path / "run")
    assert "in several sources: name one in the task" in line


def twice(prepared, folder):
    """A prepared folder that holds its volumes as two sources."""
    shutil.copytree(prepared, folder)
    index = (folder / "index" / "bids-0of1.csv").read_text()
    shutil.copytree(folder / "volumes" / "bids", folder / "volumes" / "more")
    shutil.copytree(folder / "labels" / "bids", folder / "labels" / "more")
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
def test_a_mistake_in_a_task_file_ends_in_one_line(change, message, prepared, task, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(json.loads(task.read_text()) | change))
    assert message in mistake("finetune", task=path, data=prepared, model="unet_demo")


def test_a_damaged_truth_stops_the_evaluation_in_one_line(finetuned, prepared, tmp_path):
    out, _ = finetuned
    shutil.copytree(prepared, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*_native.nii.gz"):
        path.write_bytes(path.read_bytes()[:60])
    shutil.copytree(out, tmp_path / "run")
    for path in (tmp_path / "run").glob("fold_*/dice.json"):
        path.unlink()
    words = {key: value for key, value in config.read_yaml(finetune.Config, out / "config.yaml").items()
             if value is not None} | {"data": tmp_path / "data", "out": tmp_path / "run"}
    output = Run("finetune", tmp_path / "output", **words).finish(2)
    assert "error: cannot evaluate sub-" in output and "Traceback" not in output


def test_leakage_is_visible(finetuned, pretrained, prepared):
    out, _ = finetuned
    saw = checkpoint.load_checkpoint(pretrained)
    result, summary = json.loads((out / "dice.json").read_text()), (out / "summary.md").read_text()
    records = [record for fold in result["folds"].values() for record in fold]
    for record in records:
        assert record["seen"] is record["same_scan"] is (record["subject"] in saw["subjects"])
    seen = {r["case"] for r in records if r["seen"]}
    clean = {r["case"] for r in records} - seen
    assert f"Of {len(seen | clean)} evaluated scans {len(seen)} were seen, unlabelled" in summary
    assert ("| not seen |" in summary) == bool(seen and clean)
    tuned = checkpoint.load_checkpoint(out / "fold_0" / "last.pt")
    for key in ("subjects", "sha256"):
        assert set(saw[key]) <= set(tuned[key])
    assert tuned["pretraining"]["mask_ratio"] == result["pretraining"]["mask_ratio"] == 0.6
    assert result["params"] == sum(tensor.numel() for tensor in tuned["model"].values())


def test_history():
    row = data.Volume("p", "s", "x", "", "FLAIR", "train", "l", "", "", "f00")
    case = data.Case("c", "s/x", ("p",), "l", (row,))
    scratch = {"subjects": ["s/x"], "sha256": ["f00"], "pretraining": None}
    assert finetune.data_seen({}, [case]) == scratch
    first = {"kind": "pretrain", "subjects": ["s/a"], "sha256": ["a00"], "config": {"lr": 1}, "hours": 2.5}
    expected = {"subjects": ["s/a", "s/x"], "sha256": ["a00", "f00"], "pretraining": {"lr": 1, "hours": 2.5}}
    assert finetune.data_seen(first, [case]) == expected
    again = expected | {"kind": "finetune", "config": {"lr": 2}}
    assert finetune.data_seen(again) == expected, "finetuned again"
    foreign = finetune.data_seen({"state_dict": {}}, [case])
    assert foreign == {"subjects": None, "sha256": None, "pretraining": {"hours": None}}


def test_summary_of_groups_and_dropped_cases():
    def record(case, dice, seen, site, hd95):
        scores = {kind: {"a": 0.5, "b": None} for kind in metrics.SCORES}
        return {"case": case, "subject": case, "seen": seen, "same_scan": seen, "site": site} | scores | {
            "dice": {"a": dice, "b": None}, "hd95": {"a": hd95, "b": None}}
    done = {f: [record("x", 0.5 + f / 10, True, "Utrecht", 3.0), record("y", 0.1, False, "GE1T5", None),
                record("z", None, False, "GE1T5", None)] for f in range(2)}
    result = {"task": "t", "model": "unet_b", "ckpt": "c.pt", "augment": "all", "classes": ["a"],
              "regions": ["b"], "sites": ["Utrecht"], "folds": done,
              "config": dataclasses.asdict(finetune.Config("t", lr=1e-4))}
    lines = metrics.summarise(result, [{"train": ["u"] * 20}] * 2).splitlines()
    for line in ("| 0 | 20 | 3 | 30.00 | nan | 3 |", "| mean ± SD |  |  | 32.50 ± 3.54 | - |  |",
                 "| seen in pretraining | 1 | 55.00 ± 7.07 | - |", "| not seen | 2 | 10.00 ± 0.00 | - |",
                 "| sites of the training set | 1 | 55.00 ± 7.07 | - |",
                 "| other sites | 2 | 10.00 ± 0.00 | - |",
                 "| HD95 mm | 3.00 ± 0.00 | 4 | - | 6 |", "| lesion F1 | 0.50 ± 0.00 | 0 | - | 6 |",
                 "Of 3 evaluated scans 1 were seen, unlabelled, in pretraining: 1 the same file, 0 another "
                 "of the subject."):
        assert line in lines, "\n".join(lines)
    for records in done.values():
        records[0]["seen"] = None
    assert "does not say which scans" in metrics.summarise(result, [{"train": []}] * 2)


@pytest.fixture(scope="module")
def sites(raw, tmp_path_factory):
    """Five subjects named as those of WMH, two of them test cases, one of those from another scanner; and a
    finished run."""
    folder = tmp_path_factory.mktemp("sites")
    scans = sorted(glob.glob(f"{raw}/sub-L*/**/*FLAIR.nii.gz", recursive=True))
    names = ["Utrecht_0", "Singapore_50", "Amsterdam-GE3T_100", "Utrecht_3",
             "Amsterdam-Philips_VU.PETMR_01_168"]
    with open(raw / "sites.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "subject", "session", "sequence", "label", "split"])
        for i, (scan, name) in enumerate(zip(scans, names, strict=True)):
            scan, split = os.path.relpath(scan, raw), "test" if i > 2 else "train"
            writer.writerow([scan, name, "", "FLAIR", scan.replace("FLAIR", "lesion"), split])
    run("prepare_data", source="manifest", input=raw / "sites.csv", out=folder / "prepared", workers=1)
    (folder / "few.yaml").write_text(json.dumps(TASK | {"n_train": 2}))
    ood = TASK | {"n_train": 2, "networks": "few", "evaluate": "test", "sites": True}
    (folder / "few_ood.yaml").write_text(json.dumps(ood))
    settings = TINY | {"data": folder / "prepared", "model": "unet_demo", "steps": 2, "workers": 0}
    run("finetune", task=folder / "few.yaml", out=folder / "few", **settings)
    return folder


def test_a_task_evaluates_the_networks_of_another(sites):
    printed = run("finetune", task=sites / "few_ood.yaml", data=sites / "prepared", model="unet_demo",
                  networks=sites / "few", out=sites / "ood", overlap=0)
    first, second = (json.loads((sites / name / "dice.json").read_text()) for name in ("few", "ood"))
    trained, tested = (json.loads((sites / name / "folds.json").read_text())["folds"]
                       for name in ("few", "ood"))
    assert [f["train"] for f in trained] == [f["train"] for f in tested]
    for records in second["folds"].values():
        assert [r["case"] for r in records] == ["Amsterdam-Philips_VU.PETMR_01_168", "Utrecht_3"]
        assert [r["site"] for r in records] == ["Amsterdam-Philips_VU.PETMR_01", "Utrecht"]
        assert [r["seen"] for r in records] == [False, False]
    assert second["sites"] == ["Amsterdam-GE3T", "Singapore", "Utrecht"]
    assert second["task"] == "few_ood" and second["config"]["steps"] == 2
    assert second["params"] == first["params"] > 0
    assert "| other sites | 1 |" in printed and "| sites of the training set | 1 |" in printed
    assert not list(sites.glob("ood/**/*.pt")), "nothing was trained"
    network, saved = predict.load_network(sites / "few" / "fold_1" / "last.pt", "cpu")
    cases = data.labelled_cases(str(sites / "prepared"), None, ("FLAIR",))
    case = next(case for case in cases if case.name == "Utrecht_3")
    volume, geometry, truth = data.read_case(case)
    found = predict.segment(network, volume, geometry, 32, overlap=0)
    scores = tasks.score_case(found, truth, saved["task"], geometry["affine"])
    expected = {kind: scores[kind]["lesion"] for kind in scores}
    record = {kind: second["folds"]["1"][1][kind]["lesion"] for kind in scores}
    assert record == {k: None if math.isnan(v) else pytest.approx(v, abs=1e-6) for k, v in expected.items()}


@pytest.mark.parametrize("axes", ["PSR", "RPI"])
def test_a_label_stored_on_other_axes_is_scored_on_the_scans(raw, tmp_path, axes):
    scan = sorted(glob.glob(f"{raw}/sub-L*/**/*FLAIR.nii.gz", recursive=True))[0]
    image, label = nib.load(scan), nib.load(scan.replace("FLAIR", "lesion"))
    wanted = nib.orientations.axcodes2ornt(axes)
    turned = label.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(label.affine), wanted))
    image.to_filename(tmp_path / "scan.nii.gz")
    turned.to_filename(tmp_path / "label.nii.gz")
    (tmp_path / "all.csv").write_text("path,subject,session,sequence,label\n"
                                      "scan.nii.gz,a,,FLAIR,label.nii.gz\n")
    run("prepare_data", source="manifest", input=tmp_path / "all.csv", out=tmp_path / "prepared", workers=1)
    _, _, truth = data.read_case(data.labelled_cases(str(tmp_path / "prepared"), None, ("FLAIR",))[0])
    assert np.array_equal(truth, np.asarray(label.dataobj))


def test_networks_that_are_not_there_or_do_not_fit_are_refused(sites, tmp_path):
    settings = {"data": sites / "prepared", "model": "unet_demo", "task": sites / "few_ood.yaml",
                "networks": sites / "few", "out": tmp_path}
    (tmp_path / "other.yaml").write_text((sites / "few_ood.yaml").read_text().replace('"lesion"', '"stroke"'))
    for changed, message in (({"networks": "/nowhere"}, "no run in /nowhere: first finetune.py --task few"),
                             ({"model": "unet_b"}, "is of --ckpt None --model unet_demo"),
                             ({"task": tmp_path / "other.yaml"}, "has other classes"),
                             ({"estimate": "true"}, "nothing is left to train")):
        assert message in mistake("finetune", **settings | changed)


def test_an_estimate_takes_real_steps_and_touches_nothing(sites, tmp_path):
    settings = {"data": sites / "prepared", "task": sites / "few.yaml", "model": "unet_demo", "workers": 0,
                "steps": 50, "save_every": 1, "estimate": "true"}
    printed = run("finetune", out=tmp_path / "run", **TINY | settings)
    assert "100 steps: 0.0" in printed and "; 2 cases: 0.00 hours more" in printed, "of both folds"
    assert not (tmp_path / "run").exists()


def test_a_signal_in_evaluation_leaves_no_scores(sites):
    cfg = finetune.Config(task="few", patch_size=32, precision="fp32")
    model, _ = predict.load_network(sites / "few" / "fold_0" / "last.pt", "cpu")
    cases = data.labelled_cases(str(sites / "prepared"), None, ("FLAIR",))[:1]
    stop, processes = threading.Event(), training.init_processes("cpu")
    stop.set()
    try:
        task, seen = tasks.read_task(str(sites / "few.yaml"))[1], finetune.data_seen({})
        assert evaluate.evaluate_fold(model, task, seen, cases, "", processes, stop, cfg.patch_size,
                                      cfg.precision, cfg.overlap, cfg.batch_size) is None
    finally:
        dist.destroy_process_group()


def test_every_ablation_is_a_config_of_its_script():
    folder = os.path.join(os.path.dirname(finetune.__file__), "configs")
    files, runs = sorted(glob.glob(f"{folder}/ablations/*.yaml")), {}
    for path in files:
        script = finetune if os.path.basename(path).startswith("finetune_") else pretrain
        words = ["--task", "brats21"] if script is finetune else [f"{folder}/unet_xl.yaml"]
        plain = config.parse_config(script.Config, words)
        cfg = config.parse_config(script.Config, [*words, path])
        listed = config.read_yaml(script.Config, path)
        assert all(getattr(plain, key) != value for key, value in listed.items()), "only what differs"
        assert f"{script.__name__}.py" in open(path).read()
        runs[os.path.basename(path)] = cfg
    outs = [cfg.out for cfg in runs.values() if isinstance(cfg, pretrain.Config)]
    assert len(set(outs)) == len(outs) and "runs/unet_xl" not in outs
    assert {cfg.n_train for cfg in runs.values() if isinstance(cfg, finetune.Config)} == {5, 10, 40}
    assert runs["skips.yaml"].skips and runs["skips.yaml"].decoder == "standard"
    assert runs["no_augment.yaml"].decoder == "light" and runs["no_augment.yaml"].augment == "none"


def test_tasks_shipped_are_valid():
    folder = os.path.join(os.path.dirname(finetune.__file__), "configs", "tasks")
    for file in sorted(os.listdir(folder)):
        name, task = tasks.read_task(os.path.join(folder, file))
        assert task.classes[0] == "background" and dataclasses.asdict(task)["sequences"]
