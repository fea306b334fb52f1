"""The study: its runs are commands that the scripts take, and its tables say what was found."""

import importlib
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import words_of

import compare
import config
import models
import training
import validation

sys.path.insert(0, str(ROOT / "study"))
import cohort  # noqa: E402
import detail  # noqa: E402
import frozen  # noqa: E402
import real  # noqa: E402
import renewed  # noqa: E402
import report  # noqa: E402
import scaled  # noqa: E402

import phantom  # noqa: E402
import study  # noqa: E402


@pytest.mark.parametrize("size", study.SIZES)
def test_every_run_is_a_command_that_is_understood(size):
    planned = study.all_runs(study.SIZES[size])
    names = [run.name for run in planned]
    assert len(names) == len(set(names)) > 40
    for run in planned:
        assert not run.needs or run.needs.name in names[:names.index(run.name)], "in order"
        assert set(run.claims) <= set("abcdefghijkl")
        assert run.claims or run.script == "finetune.py"
        script = run.script
        if script in ("study/frozen.py", "study/scaled.py", "study/renewed.py"):
            script = "finetune.py"  # they take the same options
        module = importlib.import_module(script.removesuffix(".py").replace("study/", ""))
        if hasattr(module, "Config"):
            config.parse_config(module.Config, words_of(run.settings))
    assert set("".join(run.claims for run in planned)) == set("abcdefghijkl")


def test_a_frozen_encoder_is_not_in_the_optimizer():
    model = models.build_model("unet_demo", "segment", features=2)
    optimizer = frozen.of_the_decoder(training.adamw)(model, 1e-3, 0.1, 1e-8, False)
    learns = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert learns == {id(weight) for weight in model.pred_head.parameters()}
    assert not learns & {id(weight) for weight in model.encoder.parameters()}


def test_a_scaled_encoder_is_the_same_function():
    """Its weights have the size of new ones, and its output stays."""
    torch.manual_seed(0)
    model = models.build_model("unet_demo", "segment", features=4).eval()
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        for number, block in enumerate(model.encoder.modules()):
            if isinstance(block, models.ConvNormAct):
                block.conv.weight *= 1 + number
                block.conv.bias *= 1 + number
        before = model(image)
        scaled.scale(model.encoder)
        assert validation.weights_grown(model)["weights"] == pytest.approx(1)
        assert model(image) == pytest.approx(before, abs=2e-3)


def test_a_renewed_encoder_has_the_first_level_of_scratch():
    """And all other levels of the checkpoint."""
    def build():
        return models.build_model("unet_demo", "segment", features=2)

    def new_network(make, pretrained, seed):
        model = make()
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(7)
        return model, "taken"

    model, words = renewed.then_renewed(new_network)(build, {}, 3)
    torch.manual_seed(3)
    scratch = build().encoder.state_dict()
    for name, weight in model.encoder.state_dict().items():
        expected = scratch[name] if name.startswith("in_conv") else torch.full_like(weight, 7)
        assert torch.equal(weight, expected), name
    assert words.startswith("taken") and "in_conv" in words


def test_fine_detail_is_found_where_it_is():
    """A level that passes its input on carries all of it if it passes the neighbours, too."""
    heads = list(torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1)

    def blurred(scan):
        return torch.nn.functional.avg_pool3d(scan, 3, 1, 1)

    carried, channels = detail.measure(lambda scan: torch.cat([scan, blurred(scan)], 1), heads)
    assert carried > 0.99 and 1.5 < channels <= 2
    carried, _ = detail.measure(blurred, heads)
    assert carried < 0.3, "a mean of 27 voxels says little of one"


def test_dry_lists_what_is_left():
    """And what that needs: g tests the networks of b."""
    command = [sys.executable, "study/study.py", "--dry", "--only", "g"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *listed, summary = printed.splitlines()
    assert all("hours of a core" in line for line in listed)
    assert summary.startswith(f"{len(listed)} of ")
    if listed:  # the results of the study may be complete
        assert "moved-" in printed or "base" in printed


def test_a_signal_to_the_study_ends_its_runs(tmp_path):
    """They get a signal themselves, which lets them save; the next start would meet their locks."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT / "study")!r})
import study
sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
def start(run, threads, device):
    child = subprocess.Popen(sleep)
    print(child.pid, flush=True)
    return child
study.start = start
study.work_off([study.Run("none", "a", "pretrain.py", {{}}, 1)], 1, "cpu")
""")
    process = subprocess.Popen([sys.executable, driver], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline().strip() for _ in range(3)]
    child = next(int(line) for line in lines if line.isdigit())
    process.terminate()
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_no_threshold_solves_the_lesions():
    """Lesions are between cortex and white matter, and contrasts turn around from scan to scan."""
    rng = np.random.default_rng(0)
    drawn = np.array([cohort.draw_intensities(rng) for _ in range(200)])
    cortex, white, lesion = drawn[:, 4], drawn[:, 5], drawn[:, 6]
    share = (lesion - cortex) / (white - cortex)
    assert (share > 0.29).all() and (share < 0.71).all()
    assert 0.3 < (cortex < white).mean() < 0.7, "white matter is the brighter one in half of them"


@pytest.mark.parametrize("stream, intensities_of, mean", [
    (2, cohort.draw_intensities, 80.397), (4, cohort.draw_alike, 126.090)])
def test_the_scans_of_a_cohort_stay_what_the_results_are_of(stream, intensities_of, mean):
    """Results know a cohort by its name. If its scans change, give it another name, and this test
    its new numbers."""
    head = phantom.anatomy(np.random.default_rng([1, 300]), cohort.SIDE)
    rng = np.random.default_rng([stream, 300])
    image, label = cohort.scan(head, rng, (1, 1, 1), 12, intensities_of)
    assert np.asarray(image.dataobj).mean() == pytest.approx(mean, rel=1e-3)
    assert image.shape == (study.PATCH,) * 3, "a head is one patch"
    counts = np.bincount(np.asarray(label.dataobj).ravel())
    assert counts == pytest.approx([28584, 1746, 1823, 615], rel=0.01)


def test_scans_of_one_sequence_have_nearly_one_contrast():
    rng = np.random.default_rng(0)
    drawn = np.array([cohort.draw_alike(rng) for _ in range(200)])
    fluid, cortex, white = drawn[:, 3], drawn[:, 4], drawn[:, 5]
    assert (fluid < cortex).all() and (cortex < white).all()
    assert (drawn.std(0)[1:6] < 0.08 * drawn.mean(0)[1:6]).all()


def made_up(level, rng, folds=6):
    """A result of a finetuning: Dice of twenty cases around a level, in each fold."""
    return {"dice": {str(fold): {f"case{i}": {"lesion": level + rng.normal(0, 0.01)}
                                 for i in range(20)} for fold in range(folds)}}


def test_the_table_of_claims_says_what_the_results_say():
    rng = np.random.default_rng(1)
    results = {f"lesion-5-spatial-{start}": made_up(level, rng)
               for start, level in (("scratch", 0.5), ("base", 0.6))}
    results["lesion-5-spatial-base"]["dice"]["0"]["case3"]["lesion"] = None

    def rows():
        cells = [line.strip("| ").split(" | ") for line in report.claims(results).splitlines()]
        return [row for row in cells if row[1].startswith("pretraining helps with 5 labelled "
                                                          "scans, spatial")]

    row, = rows()
    assert float(row[2]) == pytest.approx(50, abs=0.5) and float(row[4]) == pytest.approx(10, abs=1)
    assert row[7] == "seen" and row[8] == "`python study/study.py --only b`"
    assert report.claims(results).count("not run yet") == len(report.COMPARISONS) - 1

    # Turned around, it is not seen.
    scratch, base = results.values()
    results = {"lesion-5-spatial-scratch": base, "lesion-5-spatial-base": scratch}
    assert rows()[0][7] == "not seen: the opposite is"


def test_a_case_without_a_dice_in_one_run_is_left_out_of_both():
    """As compare.py does: 0 before and nothing after is no gain."""
    before = {"dice": {"0": {"a": {"lesion": 0.0}, "b": {"lesion": 0.5}}}}
    after = {"dice": {"0": {"a": {"lesion": None}, "b": {"lesion": 0.6}}}}
    results = {"before": before, "after": after}
    assert report.differences_of(results, "after", "before") == pytest.approx([10])


def test_real_heads_have_a_table_of_their_own():
    rng = np.random.default_rng(2)
    results = {"deep-5-all-scratch": made_up(0.3, rng), "deep-5-all-real": made_up(0.4, rng)}
    row = report.real_heads(results).splitlines()[-1]
    assert row.startswith("| deep | 5 | all | yes | scratch | ") and row.endswith(" | seen |")

    # Beside first weights that were not trained, too.
    results["deep-5-all-real-untrained"] = made_up(0.5, rng)
    row = report.real_heads(results).splitlines()[-1]
    assert row.startswith("| deep | 5 | all | yes | the same first weights | ")
    assert row.endswith(" | not seen: the opposite is |")
    assert report.real_heads({}) == "Not run yet."


def test_a_coarse_scan_has_the_means_of_blocks(tmp_path, monkeypatch):
    """A label map has the task's values where they fill half of a block."""
    monkeypatch.setattr(real, "RAW", str(tmp_path / "coarse"))
    (tmp_path / "coarse").mkdir()
    values = np.zeros((9, 4, 4), np.int16)
    values[:4] = 100
    values[4:6], values[6:] = 2, 7
    affine = np.diag([-1, 1, 1, 1])
    for name in ("scan", "label"):
        nib.Nifti1Image(values, affine).to_filename(tmp_path / f"{name}.nii.gz")
    scan = nib.load(real.coarse(str(tmp_path / "scan.nii.gz")))
    assert np.asarray(scan.dataobj).ravel().tolist() == [100, 4.5], "the ninth voxel is left out"
    assert (scan.affine == affine).all()
    label = nib.load(real.coarse(str(tmp_path / "label.nii.gz"), (2, 3)))
    assert np.asarray(label.dataobj).ravel().tolist() == [0, 1]


def test_every_comparison_is_of_planned_runs():
    names = {run.name: run for run in study.all_runs(study.SIZES["cpu"])}
    for claim, text, after, before in report.COMPARISONS:
        assert {claim} <= set(names[after].claims) & set(names[before].claims), text


def test_what_a_start_is_worth_is_read_off_the_curve_of_scratch():
    scratch = [20, 30, 40, 50]
    assert report.labels_for(30, scratch) == "5.0"
    assert report.labels_for(35, scratch) == f"{50 ** 0.5:.1f}", "half way on a logarithmic axis"
    assert report.labels_for(10, scratch) == "3 or fewer"
    assert report.labels_for(51, scratch) == "more than 20"
    assert report.labels_for(30, [20, 30, 30, 30]) == "5.0", "the first that reaches it"
    rng = np.random.default_rng(0)
    results = {}
    for n, level in zip(report.LABELS, scratch, strict=True):
        for start, more in (("scratch", 0), ("base", 10)):
            results[f"lesion-{n}-spatial-{start}"] = made_up((level + more) / 100, rng)
    assert "spatial augmentation: 20 labelled scans, as from scratch with more than 20" in (
        report.worth(results))
    assert "all augmentation" not in report.worth(results)

    # Of all four numbers together.
    line, = report.pooled(results).splitlines()
    assert report.pooled({}) == "Too few runs are done yet."
    found = float(line.split("labelled scans: ")[1].split(" ")[0])
    assert found == pytest.approx(10, abs=0.5) and line.endswith(": seen.")
    assert "mean over 4 numbers" in line


def test_no_single_pretraining_is_picked():
    """The gain over all of them, in a line that says how many point up."""
    rng = np.random.default_rng(3)
    levels = {"scratch": 0.5, "base": 0.6, "noskips": 0.62, "mask30": 0.46}
    results = {f"lesion-5-spatial-{start}": made_up(level, rng) for start, level in levels.items()}
    results |= {f"pretrain-{start}": {} for start in (*levels, "width8") if start != "scratch"}

    # First weights are none.
    results["pretrain-untrained"] = {}
    results["lesion-5-spatial-untrained"] = made_up(0.9, rng)
    line, same_weights = report.over_pretrainings(results).splitlines()
    assert "mean over 3 pretrainings, of which 2 point up" in line, "width8 was not finetuned"
    found = float(line.split("point up: ")[1].split(" ")[0])
    assert found == pytest.approx(6, abs=0.5) and line.endswith(": seen.")

    # Those that begin with other weights are compared with these.
    assert "mean over 3 pretrainings, of which 0 point up" in same_weights
    assert report.first_weights("base-seed2") == "untrained-seed2"
    assert report.first_weights("half") == "untrained"
    assert report.over_pretrainings({}) == "Not all pretrainings are done yet."


def test_first_weights_are_what_is_drawn():
    """All folds of a start share them: three starts that differ make a wide interval."""
    rng = np.random.default_rng(4)
    results = {}
    for seed, level in zip(report.SEEDS, (0.4, 0.5, 0.6), strict=True):
        results[f"lesion-5-spatial-untrained{seed}"] = made_up(0.5, rng)
        results[f"lesion-5-spatial-base{seed}"] = made_up(level, rng)
    line, = report.pooled(results).splitlines()
    low, high = (float(word) for word in line.split("(")[1].split(";")[0].split(" to "))
    assert low < -20 and high > 20 and line.endswith(report.CANNOT + ".")


def test_a_start_whose_networks_are_gone_is_made_again(tmp_path, monkeypatch):
    """Results are kept with the code, networks are not. A chain of three is followed back."""
    monkeypatch.setattr(study, "WORK", str(tmp_path / "work"))
    monkeypatch.setattr(study, "RESULTS", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    start = study.Run("start", "a", "pretrain.py", {"steps": 1}, 1)
    tuned = study.Run("tuned", "a", "finetune.py", {"steps": 2}, 1, needs=start)
    moved = study.Run("moved", "a", "study/moved.py", {"run": "x"}, 1, needs=tuned)
    for run in (start, tuned):
        kept = json.dumps({"settings": study.identity(run)})
        (tmp_path / "results" / f"{run.name}.json").write_text(kept)
    assert study.runs_left([start, tuned]) == []
    assert study.runs_left([start, tuned, moved]) == [start, tuned, moved]

    # What starts from a run with other settings is another run, although its own stayed.
    other = start._replace(settings={"steps": 9})
    changed = tuned._replace(needs=other)
    assert study.runs_left([other, changed]) == [other, changed]

    # It stays another one when the start is done.
    kept = json.dumps({"settings": study.identity(other)})
    (tmp_path / "results" / "start.json").write_text(kept)
    assert study.runs_left([other, changed]) == [other, changed], "the networks of start are gone"
    assert not study.is_done(changed)
    (tmp_path / "results" / "start.json").write_text(
        json.dumps({"settings": study.identity(start)}))

    # Networks that are there are not made again, if they are of this run and of its end.
    for run in (start, tuned):
        (tmp_path / "work" / run.name).mkdir(parents=True)
    study.write_note(start, finished=True)
    study.write_note(tuned, finished=False)
    assert study.runs_left([start, tuned, moved]) == [tuned, moved]
    study.write_note(tuned, finished=True)
    assert study.runs_left([start, tuned, moved]) == [moved]
    study.write_note(changed, finished=True)  # in the same folder
    assert study.runs_left([start, tuned, moved]) == [tuned, moved]


def test_a_choice_of_runs_has_what_these_need():
    """`--only tumour` begins with the pretraining."""
    for size in study.SIZES.values():
        runs = study.all_runs(size)
        moved = runs[[run.script for run in runs].index("study/moved.py") + 1]
        assert [run.script for run in study.with_needs([moved])] == [
            "pretrain.py", "finetune.py", "study/moved.py"]
        assert study.with_needs(runs) == runs, "each once, and in their order"


def test_a_run_that_was_stopped_is_not_done(tmp_path, monkeypatch):
    """A signal to a run alone: pretrain.py and finetune.py end well, but early."""
    monkeypatch.setattr(study, "WORK", str(tmp_path))
    folder = tmp_path / "run"
    folder.mkdir()
    pretraining = study.Run("run", "a", "pretrain.py", {"steps": 20}, 1)
    (folder / "log.jsonl").write_text(json.dumps({"step": 10, "val_masked": 0.1}) + "\n")
    assert study.result_of(pretraining, 1) is None
    (folder / "log.jsonl").write_text(json.dumps({"step": 20, "val_masked": 0.1}) + "\n")
    assert study.result_of(pretraining, 1)["log"] == [{"step": 20, "val_masked": 0.1}]

    finetuning = study.Run("run", "a", "finetune.py", {"steps": 20}, 1)
    record = {"case": "a", "dice": {"lesion": 0.5}}
    for folds, is_whole in ((5, False), (6, True)):
        scores = {"folds": {number: [record] for number in range(folds)}}
        (folder / "dice.json").write_text(json.dumps(scores))
        assert (study.result_of(finetuning, 1) is not None) == is_whole


def test_a_stopped_run_stops_the_study_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORK", str(tmp_path / "work"))
    monkeypatch.setattr(study, "RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(study, "start",
                        lambda *_: subprocess.Popen([sys.executable, "-c", ""]))
    folder = tmp_path / "work" / "run"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("")
    run = study.Run("run", "a", "pretrain.py", {"steps": 20}, 1)
    with pytest.raises(SystemExit, match="run was stopped before its end"):
        study.work_off([run], 1, "cpu")

    # At its end it is done, and so are its networks.
    (folder / "log.jsonl").write_text(json.dumps({"step": 20, "val_masked": 0.1}) + "\n")
    (tmp_path / "results").mkdir()
    study.work_off([run], 1, "cpu")
    assert study.is_done(run) and study.has_networks(run)
    assert study.runs_left([run]) == []


def test_results_of_other_settings_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", str(tmp_path))
    run = study.Run("run", "a", "pretrain.py", {"steps": 20, "data": "/here/unlike"}, 1)
    (tmp_path / "run.json").write_text(json.dumps({"settings": study.identity(run)}))
    assert list(report.read_results([run])) == ["run"]
    elsewhere = run._replace(settings=run.settings | {"data": "/there/unlike"})
    assert list(report.read_results([elsewhere])) == ["run"]
    for change in ({"steps": 21}, {"data": "/here/alike"}):
        assert report.read_results([run._replace(settings=run.settings | change)]) == {}


@pytest.mark.parametrize("gain, low, high, word", [
    (6, 1, 11, report.SEEN), (0, -4, 4, report.NOT_SEEN), (-9, -12, -6, report.OPPOSITE),
    (3, -0.1, 6.1, report.CANNOT), (-3, -20, 14, report.CANNOT)])
def test_the_verdict_is_read_off_the_interval(gain, low, high, word):
    assert report.verdict(compare.Estimate(gain, low, high, 0.5)) == word


def test_a_folder_of_another_run_is_deleted(tmp_path, monkeypatch):
    """Settings of the study change, and a run of the same name cannot go on in the old folder."""
    monkeypatch.setattr(study, "WORK", str(tmp_path))
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "last.pt").touch()  # of a study that left no note
    run = study.Run("start", "a", "pretrain.py", {"help": "true"}, 1)
    study.start(run, 1, "cpu").wait()
    assert not (folder / "last.pt").exists()

    # The same run goes on in its folder, another one does not.
    (folder / "last.pt").touch()
    study.start(run, 1, "cpu").wait()
    assert (folder / "last.pt").exists()
    study.start(run._replace(settings={"help": "false"}), 1, "cpu").wait()
    assert not (folder / "last.pt").exists()
