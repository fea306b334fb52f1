"""Scores beside the network, and kept case by case: the same ones however an evaluation ends."""

import json
import os
import random
import shutil
import signal
import time

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from folders import TASK
from runs import FINETUNE, Run

import checkpoint
import data
import evaluate
import predict
import scoring
from config import UserError


# --------------------------------------------------------------------------- logits become classes
@pytest.mark.parametrize("size", [(9, 20, 13), (16, 17, 18), (40, 11, 30)])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_class_at_a_time_gives_what_argmax_gives(classes, size):
    """Bitwise, of logits with ties, in and out of contiguous memory."""
    logits = torch.randn(classes, 18, 19, 20)[:, 1:17, 1:18, 2:20]
    logits[:, :8] = 1
    resized = F.interpolate(logits[None], size, mode="trilinear", align_corners=False)[0]
    found = predict.largest_class(logits, size)
    assert found.dtype == torch.uint8 and np.array_equal(found, resized.numpy().argmax(0))
    if classes > 1:
        top = resized.topk(2, 0).values
        assert (top[0] == top[1]).any(), "a tie was tried"


# --------------------------------------------------------------------------- beside the network
def square(number):
    time.sleep(random.Random(number).random() / 50)
    return number ** 2


@pytest.mark.parametrize("most", [0, 1, 3])
def test_every_case_gets_its_own_result(most):
    results = {}
    scorers = scoring.Scorers(most, results.__setitem__)
    for number in range(12):
        scorers.begin(f"case {number}", square, number)
        assert len(scorers.running) <= most
    scorers.wait()
    assert results == {f"case {number}": number ** 2 for number in range(12)}
    assert not scorers.running


def fail(number):
    raise UserError("the label map is torn") if number else OSError(5, "Input/output error")


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("number", [0, 1])
def test_a_case_that_cannot_be_scored_is_named(most, number):
    scorers = scoring.Scorers(most, lambda *_: None)
    with pytest.raises(UserError, match="cannot evaluate sub-1: .*(torn|Input/output)"):
        scorers.begin("sub-1", fail, number)
        scorers.wait()


def test_a_scorer_that_dies_is_told_by_its_case():
    results = {}
    scorers = scoring.Scorers(3, results.__setitem__)
    with pytest.raises(UserError, match="cannot evaluate sub-2: .* died with exit code -9"):
        scorers.begin("sub-1", square, 1)
        scorers.begin("sub-2", die, 2)
        scorers.begin("sub-3", square, 3)
        scorers.wait()
        scorers.wait()


# ------------------------------------------------------------------------------- kept on the disk
def test_a_record_is_good_for_what_it_was_made_of(tmp_path):
    kept = scoring.Kept(str(tmp_path), ["network", {"overlap": 0.5}])
    record = {"case": "a/b", "dice": {"lesion": None, "core": 0.123457}}
    assert kept.read("a/b", ["label"]) is None
    kept.write("a/b", ["label"], record)
    kept.write("a:b", ["label"], record | {"case": "a:b"})
    assert kept.read("a/b", ["label"]) == record, "names that differ in signs alone"
    assert kept.read("a/b", ["another label"]) is None
    for other in (["another network", {"overlap": 0.5}], ["network", {"overlap": 0}]):
        assert scoring.Kept(str(tmp_path), other).read("a/b", ["label"]) is None

    with open(kept.path("a/b"), "w") as file:
        file.write('{"made_of"')
    assert kept.read("a/b", ["label"]) is None, "damaged"
    kept.remove()
    kept.remove()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- a whole fold
@pytest.fixture(scope="module")
def fold(prepared, tmp_path_factory):
    """A finished run of one fold with four cases to evaluate: its folder, its settings."""
    folder = tmp_path_factory.mktemp("fold")
    (folder / "four.yaml").write_text(json.dumps(TASK | {"n_train": 1, "folds": 1}))
    settings = {key: value for key, value in FINETUNE.items() if key != "folds"}
    settings |= {"task": folder / "four.yaml", "data": prepared, "steps": 1, "overlap": 0}
    run("finetune", out=folder / "run", scorers=0, **settings)
    assert len(json.loads((folder / "run" / "fold_0" / "dice.json").read_text())) == 4
    return folder / "run", settings


def without_scores(fold, tmp_path):
    """A copy of the run folder of which the network is left, and its fold."""
    shutil.copytree(fold, tmp_path / "run")
    (tmp_path / "run" / "fold_0" / "dice.json").unlink()
    return tmp_path / "run", tmp_path / "run" / "fold_0"


@pytest.mark.parametrize(("scorers", "processes"), [(1, 1), (3, 1), (2, 2)])
def test_scores_beside_the_network_are_those_of_the_serial_form(fold, tmp_path, scorers, processes):
    finished, settings = fold
    out, folder = without_scores(finished, tmp_path)
    Run("finetune", tmp_path / "output", processes, out=out, scorers=scorers, **settings).finish(
        *[0] * processes)
    for name in ("dice.json", "fold_0/dice.json"):
        ours, theirs = ((each / name).read_text() for each in (out, finished))
        for before, after in ((str(out), ""), (str(finished), "")):
            ours, theirs = ours.replace(before, after), theirs.replace(before, after)
        assert ours.replace(f'"scorers": {scorers}', '"scorers": 0') == theirs
    assert not (folder / "scores").exists()


def slow():
    """Patch: reading takes as long as a small network, and scoring longer."""
    read_scan, read_truth = data.read_scan, data.read_truth
    data.read_scan = lambda case: time.sleep(0.05) or read_scan(case)
    data.read_truth = lambda *arguments: time.sleep(0.1) or read_truth(*arguments)


def kill_and_go_on(fold, tmp_path, kills, seed):
    """An evaluation that is killed several times ends with the scores of one that is not."""
    finished, settings = fold
    out, folder = without_scores(finished, tmp_path)
    rng = random.Random(seed)
    for _ in range(kills):
        attempt = Run("finetune", tmp_path / "output", patch=slow, out=out, **settings)
        begun = time.time()
        wait = rng.uniform(0, 0.9)
        while attempt.parts[0].exitcode is None and not attempt.text():
            time.sleep(0.002)
            assert time.time() < begun + 60
        time.sleep(wait)
        attempt.kill()
        if (folder / "dice.json").exists():
            (folder / "dice.json").unlink()
    Run("finetune", tmp_path / "output", patch=slow, out=out, **settings).finish()
    assert (folder / "dice.json").read_bytes() == (finished / "fold_0" / "dice.json").read_bytes()
    assert not (folder / "scores").exists()


def test_a_killed_evaluation_ends_with_the_same_scores(fold, tmp_path):
    kill_and_go_on(fold, tmp_path, kills=3, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_thirty_kills(fold, tmp_path, seed):
    kill_and_go_on(fold, tmp_path, kills=3, seed=1 + seed)


def test_an_estimate_neither_takes_nor_leaves_scores(fold, tmp_path):
    """It scores a network that was hardly trained, beside one that is finished."""
    finished, settings = fold
    out, folder = without_scores(finished, tmp_path)
    before = sorted(out.rglob("*"))
    Run("finetune", tmp_path / "output", out=out, estimate="true", **settings).finish()
    assert sorted(out.rglob("*")) == before


def counting():
    """Patch: say which cases are segmented and which are scored."""
    segment, score = predict.segment, evaluate.score

    def counted(case, *arguments):
        print(f"scored {case.name}", flush=True)
        return score(case, *arguments)
    predict.segment = lambda *args, **options: print("segmented") or segment(*args, **options)
    evaluate.score = counted


def test_an_evaluation_goes_on_at_its_case(fold, tmp_path):
    """After a signal what was begun is finished. What is known is not segmented again, but for a
    case whose label map was replaced behind the index."""
    finished, settings = fold
    out, folder = without_scores(finished, tmp_path)
    shutil.copytree(settings["data"], tmp_path / "data")
    settings = settings | {"data": tmp_path / "data"}
    attempt = Run("finetune", tmp_path / "cut", patch=slow, out=out, **settings)
    attempt.wait_for(lambda: list(folder.glob("scores/sub*")))
    os.kill(attempt.parts[0].pid, signal.SIGTERM)
    attempt.finish()
    known = [json.loads(path.read_text())["record"]["case"] for path in folder.glob("scores/*")]
    assert 0 < len(known) < 4 and not (folder / "dice.json").exists()

    # The label map of one of them is stored anew, with other bytes.
    label = next((tmp_path / "data").rglob(f"*{known[0].split('_')[0]}*_native.nii.gz"))
    image = nib.load(label)
    nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine).to_filename(label)
    printed = Run("finetune", tmp_path / "rest", patch=counting, out=out, **settings).finish()
    assert printed.count("segmented") == 4 - len(known) + 1
    assert f"scored {known[0]}" in printed
    assert all(f"scored {name}" not in printed for name in known[1:])

    records = json.loads((folder / "dice.json").read_text())
    assert len(records) == 4 and checkpoint.load_checkpoint(folder / "last.pt")["step"] == 1
    changed = next(record for record in records if record["case"] == known[0])
    assert changed["dice"]["lesion"] in (0, None)


def dying():
    """Patch: the process that scores a case is killed, as by a machine without memory."""
    evaluate.score = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_a_scorer_that_dies_ends_the_run_in_one_line(fold, tmp_path):
    finished, settings = fold
    out, folder = without_scores(finished, tmp_path)
    printed = Run("finetune", tmp_path / "output", patch=dying, out=out, **settings).finish(2)
    assert printed.count("error: cannot evaluate sub-") == 1 and "Traceback" not in printed
    assert "exit code -9" in printed and not (folder / "dice.json").exists()
