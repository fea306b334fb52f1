"""compare.py: the statistics against scipy and by simulation, pairs, tables beside the paper's."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, mistake, script

import compare
import config
import metrics
import pretrain

spec = importlib.util.spec_from_file_location("bench_compare", ROOT / "bench" / "compare.py")
simulation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulation)


# --------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("df", [1, 2, 2.7, 5, 7.31, 19, 60.5, 312])
def test_student_against_scipy(df):
    for t in (0, 1e-4, 0.1, 1, -1, 2.5706, 5, 12.7, 100, 1e4):
        expected = 2 * scipy.stats.t.sf(abs(t), df)
        assert metrics.student_p(t, df) == pytest.approx(expected, abs=1e-9)
    for q in (0.5001, 0.6, 0.8, 0.95, 0.975, 0.9995):
        expected = scipy.stats.t.ppf(q, df)
        assert metrics.student_quantile(q, df) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_interval_over_folds_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    fold = rng.permutation(np.repeat(np.arange(6), [30, 40, 50, 40, 40, 40]))
    gain = rng.normal(2, 9, len(fold))
    means = [gain[fold == f].mean() for f in range(6)]
    expected = scipy.stats.ttest_1samp(means, 0)
    estimate = compare.over_folds(gain, fold)
    assert estimate.gain == pytest.approx(np.mean(means))
    assert estimate.p == pytest.approx(expected.pvalue)
    assert estimate[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)))


@pytest.mark.parametrize("folds", [5, 6, 10])
def test_the_smallest_effect_over_folds_is_found_in_four_of_five_experiments(folds):
    gain = np.arange(folds) - (folds - 1) / 2
    estimate = compare.over_folds(gain, np.arange(folds))
    effect = estimate.smallest / (gain.std(ddof=1) / math.sqrt(folds))

    # How often t passes its limit on either side, if the gain is the smallest.
    df = folds - 1
    limit = scipy.stats.t.ppf(0.975, df)
    power = scipy.stats.nct.sf(limit, df, effect) + scipy.stats.nct.cdf(-limit, df, effect)
    assert power == pytest.approx(0.8, abs=0.02)


def test_a_single_fold_or_patient_gives_a_gain_and_no_interval():
    for estimate in (compare.over_folds(np.array([1.0, 3.0]), np.zeros(2, int)),
                     compare.over_patients(np.array([1.0, 3.0]), np.zeros(2, int))):
        assert estimate.gain == 2 and all(math.isnan(value) for value in estimate[1:])


def test_folds_that_all_gain_the_same_leave_no_doubt():
    assert compare.over_folds(np.zeros(6), np.arange(6))[:4] == (0, 0, 0, 1)
    assert compare.over_folds(np.ones(6), np.arange(6)).p == 0


def test_bootstrap_takes_a_patients_cases_together():
    once = np.random.default_rng(0).normal(1, 10, 60)
    estimate = compare.over_patients(once, np.arange(60))
    repeated = compare.over_patients(np.tile(once, 6), np.tile(np.arange(60), 6))
    assert repeated == pytest.approx(estimate)

    # As cases of 360 patients they would count six times.
    apart = compare.over_patients(np.tile(once, 6), np.arange(360))
    narrower = (estimate.high - estimate.low) / (apart.high - apart.low)
    assert narrower == pytest.approx(math.sqrt(6), rel=0.05)

    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert estimate.smallest == pytest.approx(z * once.std() / math.sqrt(60), rel=0.03)


def test_permutation_p_is_that_of_all_sign_flips():
    gain = np.random.default_rng(1).normal(2, 6, 24)
    patient = np.arange(24) % 8
    sums = np.bincount(patient, gain)
    flips = np.array(list(itertools.product((-1, 1), repeat=8))) @ sums
    exact = np.mean(np.abs(flips) >= abs(sums.sum()) - 1e-9)
    assert 0.01 < exact < 0.5
    assert compare.over_patients(gain, patient).p == pytest.approx(exact, abs=0.012)


def test_bootstrap_is_the_same_every_time():
    rng = np.random.default_rng(0)
    gain = rng.normal(1, 10, 6 * 313)
    patient = np.tile(np.arange(313), 6)
    assert compare.over_patients(gain, patient) == compare.over_patients(gain, patient)


def test_holm():
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = metrics.holm([math.nan, 0.02, 0.9])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.04, 0.9])


# ---------------------------------------------------------------------------- what the paper proves
def paper_gains(models):
    """[(mean, SD, mean after pretraining, SD)], in the order of the paper's columns."""
    paper = compare.TABLES[6]
    found = []
    for model in models:
        before = paper.rows[model, "scratch"]
        after = paper.rows[model, "swin" if model == "swinunetr" else "amaes"]
        for task in paper.tasks:
            words = before[task].split(" ± ") + after[task].split(" ± ")
            found.append(tuple(map(float, words)))
    return found


def test_what_the_paper_printed_is_whole():
    """Each row has a cell for each task: mean and deviation, but for the skips of section 3.1."""
    assert [len(paper.rows) for paper in compare.TABLES.values()] == [3, 2, 11, 11]
    bare = []
    for paper in compare.TABLES.values():
        for (model, _), row in paper.rows.items():
            assert (model, paper.base) in paper.rows
            assert list(row)[1:] == list(paper.tasks)
            for task in paper.tasks:
                mean, *deviation = map(float, row[task].split(" ± "))
                assert 40 < mean < 75
                if not deviation:
                    bare.append(row[task])
    assert bare == ["56.22"]


def test_the_papers_pretraining_is_the_default():
    defaults = dataclasses.asdict(pretrain.Config())
    assert compare.PRETRAINING == {key: defaults[key] for key in compare.PRETRAINING}
    types = {key: type(defaults[key]) for key in compare.PRETRAINING}
    assert types == {key: type(value) for key, value in compare.PRETRAINING.items()}


@pytest.mark.parametrize(("equal", "pass_", "survive"), [(False, 3, 0), (True, 4, 1)])
def test_the_papers_own_gains(equal, pass_, survive):
    """Unpaired t tests on Table 6: Welch's, as compare.py says under its Table 6, and Student's."""
    ps = []
    for before, sd, after, sd_after in paper_gains(["unet_xl", "unet_b", "mednext_m", "mednext_l"]):
        a, b = sd ** 2 / 6, sd_after ** 2 / 6
        df = 10 if equal else (a + b) ** 2 / ((a ** 2 + b ** 2) / 5)
        ps.append(metrics.student_p((after - before) / math.sqrt(a + b), df))
        oracle = scipy.stats.ttest_ind_from_stats(before, sd, 6, after, sd_after, 6,
                                                  equal_var=equal)
        assert ps[-1] == pytest.approx(oracle.pvalue)
    assert len(ps) == 16 and sum(p < 0.05 for p in ps) == pass_
    assert sum(p < 0.05 for p in metrics.holm(ps)) == survive
    assert equal or f"{pass_} of the paper's 16 AMAES gains" in compare.WELCH


def test_the_papers_gains_come_from_its_cells():
    """It prints +5.27, +1.01, +1.75 and +1.59 for the second, fourth, sixth and last."""
    cells = paper_gains(["unet_xl", "swinunetr"])
    gains = [round(after - before, 2) for before, _, after, _ in cells]
    assert gains == [2.98, 5.28, 2.08, 1.00, -0.46, 5.87, 2.32, 3.12]


# --------------------------------------------------------------------------------------- simulation
def test_intervals_cover_what_they_say():
    found = simulation.rates(150, 0, 12, 0.25, resamples=1000)
    fold_all, fold_these, patient_all, _, errs, _ = found
    assert 0.91 <= patient_all <= 0.99 and 0.91 <= fold_these <= 0.99 and 0.01 <= errs <= 0.09
    assert fold_all < 0.92, "patients recur over the folds: the fold interval is for them alone"

    fold_all, _, patient_all, _, errs, _ = simulation.rates(150, 1.5, 12, 0, resamples=1000)
    assert 0.91 <= fold_all <= 0.99 and patient_all < 0.92 and errs > 0.08


@pytest.mark.soak
@pytest.mark.parametrize("share", [0, 0.25, 0.5])
def test_intervals_cover_what_they_say_in_500_experiments(share):
    _, these, patients, _, errs, _ = simulation.rates(500, 0, 12, share)
    assert 0.92 <= patients <= 0.98 and 0.03 <= errs <= 0.07 and 0.92 <= these <= 0.98
    _, these, patients, _, _, _ = simulation.rates(500, 1.5, 6, share)
    assert 0.92 <= these <= 0.98 and 0.68 <= patients <= 0.86


# -------------------------------------------------------------------------------------------- pairs
def make_run(folder, task="wmh", model="unet_xl", origin="scratch", folds=3, gain=0.0,
             classes=("wmh",), regions=(), **other):
    """A run folder as finetune.py writes it: 8 cases a fold out of 12 patients."""
    rng = np.random.default_rng(0)
    noise = np.random.default_rng(len(folder.name))
    evaluate = [[f"c{i}" for i in rng.permutation(12)[:8]] for _ in range(folds)]
    base = {f"c{i}": value for i, value in enumerate(rng.uniform(0.3, 0.7, 12))}

    def record(case):
        dice = {name: base[case] + gain + 0.05 * noise.uniform() for name in (*classes, *regions)}
        return {"case": case, "subject": case.replace("c", "s"), "seen": False, "site": None,
                "dice": dice}

    done = {str(fold): [record(case) for case in cases] for fold, cases in enumerate(evaluate)}
    scores = {"task": task, "model": model, "ckpt": None, "origin": origin, "params": 90_304_514,
              "augment": "all" if origin == "scratch" else "spatial", "classes": list(classes),
              "regions": list(regions), "pretraining": None, "config": {"n_train": None},
              "folds": done}
    folder.mkdir()
    (folder / "folds.json").write_text(json.dumps(
        {"task": task, "folds": [{"train": ["t"], "evaluate": names} for names in evaluate]}))
    (folder / "dice.json").write_text(json.dumps(scores | other))
    return folder


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_pairs():
    def run(folds):
        records = {fold: [{"case": case, "subject": case[0], "dice": {"a": a, "b": b}}
                          for case, a, b in cases] for fold, cases in folds.items()}
        return {"path": "r", "assignment": 0, "classes": ["a", "b"], "folds": records}

    first = run({"0": [("x1", 0.5, 0.1), ("y", None, None)], "1": [("x2", 0.2, 0.4)],
                 "2": [("x1", 0, 0)]})
    second = run({"0": [("y", 0.3, 0.3), ("x1", 0.7, None)], "1": [("x2", 0.1, 0.5)]})
    gain, fold, patient, left_out = compare.pair(first, second)
    assert np.allclose(gain, [40, 0]), "a case scores the mean of the classes that have a Dice"
    assert list(fold) == [0, 1], "fold 2 is finished in one run alone"
    assert list(patient) == [0, 0], "x is one patient"
    assert left_out == 1, "y has no Dice in the first run"


def test_unseen_scanners_are_compared_apart(tmp_path, capsys):
    runs = [make_run(tmp_path / name, task="wmh_ood", sites=["known"]) for name in ("a", "b")]
    for run, gain in zip(runs, (0, 0.25), strict=True):
        def change(scores, gain=gain):
            for records in scores["folds"].values():
                for i, record in enumerate(records):
                    record["site"] = "new" if i < 2 else "known"
                    record["dice"]["wmh"] = 0.5 + gain if i < 2 else 0.5
        edit(run, "dice.json", change)
    tables = cells(compared(capsys, *runs))
    assert [row["gain"] for row in tables[FOLDS].values()] == ["+6.25", "+25.00"]
    assert tables[FOLDS]["unseen scanners"]["cases better"] == "6 of 6"


def test_other_folds_or_cases_are_refused(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", origin="amaes")
    edit(second, "dice.json", lambda scores: scores["folds"]["1"].pop())
    assert "different tasks or folds" in mistake("compare", first, second)
    edit(first, "folds.json", lambda folds: folds["folds"][0]["train"].append("u"))
    assert "different tasks or folds" in mistake("compare", first, second)
    assert "different tasks or folds" in mistake("compare", first, second, table=4)


def test_a_mistake_ends_in_one_line(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (tmp_path / "pretrained").mkdir()
    assert "name run folders" in mistake("compare")
    assert "choose 2, 3, 4, 6" in mistake("compare", first, second, table=5)
    assert "no run for Table 4" in mistake("compare", tmp_path / "pretrained", table=4)
    assert "one cell of Table 4" in mistake("compare", first, second, table=4)
    assert "no folds.json" in mistake("compare", first, tmp_path / "pretrained")
    edit(second, "dice.json", lambda scores: scores["folds"].clear())
    assert "no finished fold" in mistake("compare", first, second)
    (second / "dice.json").write_text("{")
    assert "damaged" in mistake("compare", first, second)


# ------------------------------------------------------------------------------------------- tables
def compared(capsys, *words):
    """What compare.py prints, in this process."""
    compare.main(config.parse_config(compare.Config, [str(word) for word in words]))
    return capsys.readouterr().out


def cells(page):
    """{first word of a table's header: {label of a row: {column: cell}}} of a Markdown page."""
    tables = {}
    for block in page.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")]
                 for line in block.strip().splitlines() if line.startswith("|")]
        if not lines:
            continue

        # In the paper's tables two words tell the rows apart.
        header, _, *rows = lines
        width = 2 if header[1] == "pretraining" else 1
        tables[header[0]] = {", ".join(row[:width]): dict(zip(header, row, strict=True))
                             for row in rows}
    return tables


FOLDS, PATIENTS = "New training sets, the same patients", "These trained networks, new patients"


def test_runs_against_the_first(tmp_path, capsys):
    kinds = {"classes": ("core", "edema"), "regions": ("whole",)}
    runs = [make_run(tmp_path / name, gain=gain, **kinds)
            for name, gain in (("a", 0), ("bb", 0.1), ("ccc", 0.2))]
    page = script("compare.py", *runs[:2], out=tmp_path / "t.md", csv=tmp_path / "t.csv").stdout
    assert page.strip() == (tmp_path / "t.md").read_text().strip()
    tables = cells(page)
    assert list(tables[FOLDS]) == list(tables[PATIENTS]) == ["mean", "core", "edema", "whole"]
    for title, estimate in ((FOLDS, compare.over_folds), (PATIENTS, compare.over_patients)):
        gain, fold, patient, _ = compare.pair(*map(compare.read_run, map(str, runs[:2])))
        expected = estimate(gain, fold if title == FOLDS else patient)
        row = tables[title]["mean"]
        assert row["gain"] == f"{expected.gain:+.2f}"
        assert row["95 % interval"] == f"{expected.low:+.2f} to {expected.high:+.2f}"
        assert row["could find"] == f"{expected.smallest:.2f}" and row["folds"] == "3"
        assert row["patients"] == str(len(set(patient))) and row["cases better"] == "24 of 24"

    # The csv file has the same tables.
    with open(tmp_path / "t.csv", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    assert rows == [[cell.strip() for cell in line.strip("|").split("|")]
                    for line in page.splitlines() if line.startswith("|") and "---" not in line]
    assert len(cells(compared(capsys, *runs))[FOLDS]) == 8, "four measures of two runs"


AMAES = {"decoder": "light", "skips": False, "augment": "all", "mask_ratio": 0.6, "token_size": 4,
         "loss_region": "all", "lr": 1e-4, "hours": 31.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tuned = {"origin": "amaes", "gain": 0.1}
    make_run(folder / "wmh-unet_xl-scratch")
    make_run(folder / "wmh-unet_xl-amaes", pretraining=AMAES, **tuned)
    make_run(folder / "wmh-unet_xl-amaes-all", pretraining=AMAES, **tuned | {"augment": "all"})
    make_run(folder / "wmh-unet_xl-masked", pretraining=AMAES | {"mask_ratio": 0.3}, **tuned)
    make_run(folder / "wmh-unet_xl-amaes-n5", pretraining=AMAES, config={"n_train": 5}, **tuned)
    make_run(folder / "isles22-swinunetr-scratch", task="isles22", model="swinunetr")
    make_run(folder / "isles22-swinunetr-swin", task="isles22", model="swinunetr", origin="swin",
             gain=0.05, pretraining=AMAES | {"mask_ratio": 0.3, "augment": "none"})
    make_run(folder / "wmh-mine-amaes", model="mine", **tuned)

    # Tables 2 and 3.
    standard = {"augment": "none", "decoder": "standard", "hours": 40.0}
    for name, changes in (("light", {"augment": "none"}), ("all", {}), ("standard", standard),
                          ("skips", standard | {"skips": True, "hours": None})):
        make_run(folder / f"cv-{name}", task="brats21_cv", pretraining=AMAES | changes, **tuned)
    (folder / "unet_xl").mkdir()
    return folder


def lay_out(capsys, runs, table):
    page = compared(capsys, *sorted(runs.iterdir()), "--table", table)
    return cells(page), page.split("\n")[0]


def test_table_4(runs, capsys):
    tables, rest = lay_out(capsys, runs, 4)
    table = tables["Table 4"]
    assert len(table) == 12 and len(table["unet_xl, scratch"]) == 12
    row = table["unet_xl, amaes"]
    assert row["BraTS21"] == "-" and row["BraTS21, paper"] == "58.98"
    assert row["WMH, paper"] == "70.40"
    folds = compare.read_run(str(runs / "wmh-unet_xl-amaes"))["folds"]
    means = [100 * np.mean([record["dice"]["wmh"] for record in fold]) for fold in folds.values()]
    assert row["WMH"] == f"{np.mean(means):.2f}"
    assert (row["params, M"], row["params, M, paper"]) == ("90.3", "90")
    assert table["mine, amaes"]["WMH"] != "-" and table["mine, amaes"]["WMH, paper"] == "-"
    gains = tables[FOLDS]
    assert list(gains) == ["unet_xl amaes, WMH", "swinunetr swin, ISLES22"]
    assert gains["swinunetr swin, ISLES22"]["gain, paper"] == "+5.87"
    for name in ("amaes-all", "amaes-n5", "masked", "cv-light", "unet_xl (no dice.json)"):
        assert name in rest


def test_table_6_adds_the_deviations(runs, capsys):
    row = lay_out(capsys, runs, 6)[0]["Table 6"]["swinunetr, swin"]
    assert row["ISLES22, paper"] == "48.42 ± 3.14" and " ± " in row["ISLES22"] and row["WMH"] == "-"


def test_table_2_has_hours_and_speed_ups(runs, capsys):
    tables, _ = lay_out(capsys, runs, 2)
    light, skips = list(tables["Table 2"].values())[1:]
    assert (light["hours"], light["hours, paper"]) == ("31.5", "31")
    assert (light["speed-up"], light["speed-up, paper"]) == ("1.27", "1.26")
    assert light["BraTS21 n_cv, paper"] == "58.61 ± 1.94"
    assert skips["BraTS21 n_cv, paper"] == "56.22"
    assert skips["hours"] == skips["speed-up"] == skips["hours, paper"] == "-"
    assert [row["gain, paper"] for row in tables[PATIENTS].values()] == ["+1.96", "-0.43"]


def test_table_3(runs, capsys):
    tables, _ = lay_out(capsys, runs, 3)
    assert list(tables["Table 3"]) == ["unet_xl, --augment none", "unet_xl, amaes"]
    assert [row["gain, paper"] for row in tables[FOLDS].values()] == ["+1.24"]
    assert "-" not in [row["BraTS21 n_cv"] for row in tables["Table 3"].values()]


def test_rows_are_told_apart_by_what_was_pretrained_otherwise():
    def row(**other):
        return compare.row_of({"model": "m", "origin": "amaes", "pretraining": AMAES | other})[1]
    assert row() == row(lr=3e-4) == "amaes"
    assert row(token_size=8, augment="none") == "--augment none --token_size 8"
    published = {"model": "m", "origin": "amaes"}
    assert compare.row_of(published) == ("m", "amaes")
