"""Where a run stands (compare.py RUN), and the pictures at its end."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import log_of, mistake, run

import pictures
import state
import validation

PRETRAIN = {"model": "unet_demo", "features": 4, "patch_size": 32, "batch_size": 2, "workers": 0,
            "steps": 4, "val_every": 2, "log_every": 1, "compile": "false", "precision": "fp32",
            "val_fraction": 0.4}


@pytest.fixture(scope="module")
def out(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("state") / "run"
    run("pretrain", **PRETRAIN, data=prepared, out=out)
    return out


def test_a_finished_pretraining_says_its_last_error_beside_the_fill(out):
    lines = run("compare", out).splitlines()
    last = log_of(out)[-1]
    assert lines[0] == f"{out}: pretraining, step 4 of 4, finished"
    assert lines[1] == f"validation at step 4: loss {last['val_loss']:.4g}"
    assert lines[2] == validation.verdict(last) and "of the best Gaussian fill" in lines[2]


def test_a_running_one_says_what_is_left(out, tmp_path):
    """A log that was cut after two steps of four, and whose last line is being written."""
    log = (out / "log.jsonl").read_text().splitlines()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "log.jsonl").write_text("\n".join(log[:2]) + "\n" + log[2][:20])
    line = run("compare", tmp_path).splitlines()[0]
    seconds = json.loads(log[1])["seconds"]
    assert f"step 2 of 4, {seconds:.3g} s a step: {2 * seconds / 60:.1f} minutes left" in line
    assert line.endswith("nobody is at work")


def test_a_locked_folder_is_at_work(out, tmp_path):
    """The lock of another process is seen, and seeing it takes no lock away."""
    (tmp_path / "config.yaml").touch()
    code = ("import sys, checkpoint; checkpoint.lock(sys.argv[1]); print('locked', flush=True); "
            "sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "locked\n"
    for _ in range(2):
        assert run("compare", tmp_path).endswith("no step is logged yet, at work\n")
    holder.communicate("")
    assert run("compare", tmp_path).endswith("nobody is at work\n")


def test_folds_are_listed_with_their_dice(finetuned):
    out, _ = finetuned
    lines = run("compare", out).splitlines()
    assert lines[0] == f"{out}: finetuning"
    assert lines[-1] == "2 of 2 folds done"
    for fold in (0, 1):
        records = json.loads((out / f"fold_{fold}" / "dice.json").read_text())
        scores = [v for record in records for v in record["dice"].values() if v is not None]
        assert lines[1 + fold] == f"fold_{fold}: done, Dice {100 * sum(scores) / len(scores):.2f} %"


def test_regions_do_not_count_twice(finetuned, tmp_path):
    """A region is a union of classes: the mean is over the classes alone, as in summary.md."""
    shutil.copytree(finetuned[0], tmp_path / "run")
    path = tmp_path / "run" / "fold_0" / "dice.json"
    records = json.loads(path.read_text())
    before = run("compare", tmp_path / "run").splitlines()[1]
    for record in records:
        record["dice"]["whole"] = 1.0
    path.write_text(json.dumps(records))
    assert run("compare", tmp_path / "run").splitlines()[1] == before


def test_what_is_no_run_is_said(tmp_path):
    assert f"{tmp_path} holds no run" in mistake("compare", tmp_path)
    assert "name run folders" in mistake("compare")


# --------------------------------------------------------------------------------------- pictures
def test_pictures_are_there_at_the_end(out, finetuned):
    pytest.importorskip("matplotlib")
    for path in (out / "losses.png", finetuned[0] / "losses.png", finetuned[0] / "dice.png"):
        assert path.read_bytes()[1:4] == b"PNG"
    assert not (out / "dice.png").exists()


def test_a_loss_below_zero_is_drawn(finetuned):
    """Cross-entropy minus Dice ends at -1, which a logarithmic axis would not show."""
    plt = pytest.importorskip("matplotlib").pyplot
    axis, = pictures.losses(pictures.pyplot(), finetuned[0] / "fold_0").axes
    assert axis.get_yscale() == "linear"
    assert {line.get_label() for line in axis.lines} >= {"loss"}
    plt.close("all")


def test_each_case_is_a_dot(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"dice": {"lesion": value, "whole": 0.5}} for value in (0.1, None, 0.3)]
    dice = {"classes": ["lesion"], "regions": ["whole"], "folds": {"0": records, "1": records}}
    (tmp_path / "dice.json").write_text(json.dumps(dice))
    first, second = pictures.cases(pictures.pyplot(), tmp_path).axes
    assert [sorted(line.get_ydata()) for line in first.lines] == [[10, 30], [10, 30]]
    assert [len(line.get_ydata()) for line in second.lines] == [3, 3]


def test_processes_that_draw_one_picture_do_not_share_a_file(tmp_path):
    """Folds of one run may end side by side in several processes."""
    written = []

    class Figure:
        def tight_layout(self):
            pass

        def savefig(self, path, **_):
            written.append(os.path.basename(path))
            open(path, "w").close()

    pictures.save(Figure(), tmp_path / "dice.png")
    assert str(os.getpid()) in written[0] and os.listdir(tmp_path) == ["dice.png"]


def test_without_matplotlib_a_run_ends_as_well(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pictures.at_end(tmp_path, [tmp_path], scored=True)
    assert not list(tmp_path.iterdir())


def test_runs_with_different_folds_are_said_to_be(tmp_path):
    runs = [{"path": "a", "folds": {"0": [], "1": []}}, {"path": "b", "folds": {"1": [], "0": []}}]
    assert state.unequal(runs) == ""
    del runs[1]["folds"]["0"]
    assert "different folds (a 0, 1; b 1)" in state.unequal(runs)
