"""Finetuning, evaluation, prediction and comparison: the loss, the folds, the window, the scan's own grid."""

import dataclasses
import glob
import json
import math
import os

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log_of, mistake, script

import common
import data
import finetune
import predict

TASK = {"data": "set by --data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
        "labels": {0: 0, 1: 1}, "n_train": 3, "folds": 2}
TINY = {"steps": 6, "patch_size": 32, "batch_size": 2, "save_every": 4, "log_every": 1, "compile": "false",
        "precision": "fp32", "workers": 1, "lr": 1e-3}


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


# ------------------------------------------------------------------------------------------------------ folds
def cases_of(n, test=0):
    row = data.Volume("p", "s", "x", "", "FLAIR", "train", "l", "", "", "")
    return [data.Case(f"c{i:04}", f"s/{i:04}", ("p",), "l",
                      (row._replace(split="test" if i < test else "train"),)) for i in range(n)]


@pytest.mark.parametrize(("n", "test", "evaluate", "evaluated"),
                         [(1251, 313, "test", 313), (250, 63, "rest", 167), (60, 0, "rest", 40)])
def test_split_arithmetic_of_the_paper(n, test, evaluate, evaluated):
    task = finetune.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",), evaluate=evaluate)
    folds = finetune.make_folds("task", task, cases_of(n, test))
    assert len(folds) == 6 and len({tuple(f["train"]) for f in folds}) == 6
    for fold in folds:
        assert len(fold["train"]) == 20 and len(fold["evaluate"]) == evaluated
        assert not set(fold["train"]) & set(fold["evaluate"])
    assert folds[0]["train"] != finetune.make_folds("other", task, cases_of(n, test))[0]["train"]


def test_leave_one_out():
    task = finetune.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",), folds=0)
    folds = finetune.make_folds("task", task, cases_of(4, test=1))  # the hold-out does not matter here
    assert [fold["evaluate"] for fold in folds] == [["c0000"], ["c0001"], ["c0002"], ["c0003"]]
    assert all(len(fold["train"]) == 3 for fold in folds)


def test_a_task_that_needs_more_subjects_is_refused():
    task = finetune.Task("d", ("b", "l"), {0: 0, 1: 1}, ("FLAIR",))
    with pytest.raises(common.UserError, match="trains on 20 subjects"):
        finetune.make_folds("task", task, cases_of(20))


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
    scores = predict.dice(found, truth, [1, 2, 3, (1, 2)])
    assert scores[1] == 0.5 and scores[2] == 0 and math.isnan(scores[3]) and scores[1, 2] == 0.8
    assert predict.dice(found, truth, [1], ignore=2)[1] == pytest.approx(2 / 3)
    assert predict.dice(np.array([3]), np.array([0]), [3])[3] == 0
    with pytest.raises(ValueError, match="shape"):
        predict.dice(found, truth[:3], [1])


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
    cfg = finetune.resolve(finetune.Config(task=str(task), ckpt=str(pretrained)))
    _, read = finetune.read_task(str(task))
    model = finetune.build(cfg, read, torch.device("cpu"), torch.float32, quiet=True)
    saved = common.load_checkpoint(pretrained)["model"]
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    assert len(encoder) == 40
    assert all(torch.equal(v, saved[k]) for k, v in encoder.items())


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
        script("predict.py", scan, ckpt=out / "fold_0" / "last.pt", out=tmp_path / f"{i}.nii.gz")
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
    result = script("predict.py", scan, truth=truth, ckpt=out / "fold_0" / "last.pt",
                    out=tmp_path / "s.nii.gz")
    score = result.stdout.split("Dice lesion: ")[1].split()[0]
    assert score == "nan" if record["dice"]["lesion"] is None else (
        float(score) == pytest.approx(record["dice"]["lesion"], abs=2e-3)), "float16 storage may move a voxel"


def test_compare_pairs_runs_and_refuses_other_folds(finetuned, prepared, task, tmp_path):
    out, _ = finetuned
    script("finetune.py", model="unet_demo", task=task, data=prepared, out=tmp_path / "scratch", **TINY)
    result = script("compare.py", tmp_path / "scratch", out, out=tmp_path / "table.md")
    assert "| lesion |" in result.stdout and (tmp_path / "table.md").exists()
    folds = json.loads((tmp_path / "scratch" / "folds.json").read_text())
    folds["folds"][0]["train"] = folds["folds"][0]["evaluate"]
    (tmp_path / "scratch" / "folds.json").write_text(json.dumps(folds))
    assert "different tasks or folds" in mistake("compare", tmp_path / "scratch", out)


def test_paired_differences():
    def record(case, value):
        return {"case": case, "dice": {"a": value}}
    first = {"0": [record("x", 0.5), record("y", None)], "1": [record("x", 0.2)]}
    second = {"0": [record("y", 0.3), record("x", 0.7)], "1": [record("x", 0.1)]}
    import compare
    means, differences = compare.paired(first, second, ["a"])
    assert np.allclose(means, [[50, 50], [20, 10]])
    assert np.allclose(differences, [20, -10]), "a case without a score in one run is in no pair"


# -------------------------------------------------------------------------------------------------- bad input
def test_a_checkpoint_of_another_model_is_refused(prepared, pretrained, task, tmp_path):
    settings = TINY | {"task": task, "data": prepared, "out": tmp_path, "model": "unet_b"}
    assert "holds a unet_demo, not a unet_b" in mistake("finetune", ckpt=pretrained, **settings)
    checkpoint = common.load_checkpoint(pretrained)
    checkpoint.pop("row")
    torch.save(checkpoint, tmp_path / "anonymous.pt")
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


def test_tasks_shipped_are_valid():
    folder = os.path.join(os.path.dirname(finetune.__file__), "configs", "tasks")
    for file in sorted(os.listdir(folder)):
        name, task = finetune.read_task(os.path.join(folder, file))
        assert task.classes[0] == "background" and dataclasses.asdict(task)["sequences"]
