"""Compare finetuning runs over the same folds, case by case; lay them out as the paper's tables.

    python compare.py runs/wmh-unet_xl-scratch runs/wmh-unet_xl-amaes   # others against the first
    python compare.py --table 4 runs/*                           # as the paper's Table 2, 3, 4 or 6
    python compare.py runs/unet_xl                   # where one run stands, finished or at work

Each gain gets two tests. New training sets, the same patients: t over the paired fold means, which
is the headline. These trained networks, new patients: a bootstrap over patients. bench/compare.py
measures what the interval of each covers.
"""

import csv
import dataclasses
import math
import os
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import yaml

import checkpoint
import config
import metrics
import state
from config import UserError
from tasks import read_run


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: tuple[str, ...] = ()  # run folders of finetune.py; without --table the baseline first
    table: int | None = None  # lay them out as the paper's Table 2, 3, 4 or 6
    out: str | None = None  # also write the tables to this Markdown file
    csv: str | None = None  # also write them to this csv file


# --------------------------------------------------------------------------- what the paper printed
class PaperTable(NamedTuple):
    rows: dict  # (model, pretraining) -> {hours or params: number, task: "Dice ± deviation"}
    tasks: dict  # task -> title of its column
    base: str  # the pretraining that the other rows gain over


def read_paper():
    """configs/paper.yaml -> {number: PaperTable}, and the settings of the paper's pretraining."""
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "configs", "paper.yaml"), encoding="utf-8") as file:
        paper = yaml.safe_load(file)

    tables = {}
    for number, table in paper["tables"].items():
        rows = {}
        for values in table["rows"]:
            row = dict(zip(table["columns"], values, strict=True))
            rows[row.pop("model"), row.pop("pretraining")] = row
        tables[number] = PaperTable(rows, table["tasks"], table["base"])

    # Table 4 is Table 6 without the deviations.
    return {2: tables[2], 3: tables[3], 4: tables[6], 6: tables[6]}, paper["pretraining"]


TABLES, PRETRAINING = read_paper()

MEANS = "Dice %, mean over folds."
DEVIATIONS = "Dice %, mean over folds ± one standard deviation."
WELCH = ("By Welch's test on the printed means and deviations, 3 of the paper's 16 AMAES gains "
         "pass p < .05, none of them after Holm.")
NOTES = {2: DEVIATIONS, 3: DEVIATIONS, 4: MEANS, 6: f"{DEVIATIONS} {WELCH}"}


# --------------------------------------------------------------------------------------- statistics
class Estimate(NamedTuple):
    """What a test says of a gain, in Dice points. NaN: a single fold or patient says nothing."""
    gain: float  # the mean
    low: float = math.nan  # of the 95 % interval
    high: float = math.nan
    p: float = math.nan  # two-sided
    smallest: float = math.nan  # the gain that the design finds with 80 % power at p < .05


def over_folds(gain, fold):
    """New training sets, the same patients: a t test on the fold means -> Estimate.

    gain: (N,) Dice points. fold: (N,) numbers from 0. smallest = (t_.975 + t_.80) x standard error.
    No sign flips: with six folds their p could not go below 2/64."""
    means = np.bincount(fold, gain) / np.bincount(fold)
    mean = means.mean()
    df = len(means) - 1
    if df == 0:
        return Estimate(mean)

    # The 95 % interval of the mean.
    error = means.std(ddof=1) / math.sqrt(len(means))
    half = metrics.student_quantile(0.975, df) * error
    smallest = half + metrics.student_quantile(0.8, df) * error

    # Where all folds gain exactly the same, the gain is certain, or there is none.
    p = metrics.student_p(mean / error, df) if error else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, p, smallest)


def over_patients(gain, patient, resamples=10_000, seed=0):
    """These trained networks, new patients: bootstrap interval, p from sign flips -> Estimate.

    gain: (N,) Dice points. patient: (N,) numbers from 0. A patient is drawn, or changes its sign,
    with all its cases in all folds. smallest = (z_.975 + z_.80) x standard error."""
    sums = np.bincount(patient, gain)
    counts = np.bincount(patient)
    if len(sums) == 1:
        return Estimate(gain.mean())

    # The interval: percentiles of the mean gain of as many patients, drawn with replacement.
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))

    # p: how often random signs lead as far from 0 as the gains do. 1e-9 is for rounding.
    signs = 2 * rng.integers(0, 2, drawn.shape) - 1
    as_far = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
    p = (1 + np.sum(as_far)) / (1 + resamples)

    # The standard deviation over the resamples is the standard error.
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    return Estimate(gain.mean(), low, high, p, z * means.std(ddof=1))


# ----------------------------------------------------------------------------------------- the runs
def parts(run):
    """{name: the run scored by that alone}: the mean of the classes, each of them, each region, and
    the classes on scanners that the training set does not have (20 of the 110 cases of WMH OOD)."""
    found = {}
    if len(run["classes"]) > 1:
        found["mean"] = run
    for name in run["classes"] + run["regions"]:
        found[name] = run | {"classes": [name]}

    # Only a task that names its subjects by site has sites: those of the training set.
    sites = run.get("sites")
    if sites:
        unseen = {fold: [record for record in records if record["site"] not in sites]
                  for fold, records in run["folds"].items()}
        found["unseen scanners"] = run | {"folds": unseen}
    return found


def by_case(run, fold):
    """{case: its record} of one fold."""
    return {record["case"]: record for record in run["folds"][fold]}


def same_folds(first, second):
    """The folds that both runs finished. UserError unless both trained and evaluated on the same
    cases, and scored them on the same files."""
    names = f"{first['path']} and {second['path']}"
    shared = sorted(set(first["folds"]) & set(second["folds"]))
    evaluated = [by_case(first, fold).keys() == by_case(second, fold).keys() for fold in shared]
    if first["assignment"] != second["assignment"] or not shared or not all(evaluated):
        raise UserError(f"{names} have different tasks or folds, or none that both finished; a "
                        "paired comparison needs the same ones")

    # Runs of earlier versions do not say which files they were scored on: nothing to compare.
    for fold in shared:
        checkpoint.check_same_inputs(
            f"{names} were scored on different data", by_case(first, fold), by_case(second, fold),
            "evaluate both on the same")
    return shared


class Pairs(NamedTuple):
    """The cases that two runs share, once for each fold."""
    gain: np.ndarray  # (N,) Dice points, second run minus first
    fold: np.ndarray  # (N,) numbers from 0
    patient: np.ndarray  # (N,) numbers from 0
    left_out: int  # how many more pairs lack a Dice in one run or both


def pair(first, second):
    """The Pairs of two runs, as same_folds allows; a case scores the mean Dice of its classes."""
    gains = []
    folds = []
    patients = []
    left_out = 0
    for fold in same_folds(first, second):
        after = by_case(second, fold)
        for case, before in by_case(first, fold).items():
            dice, _ = metrics.mean_dice([before], first["classes"])
            dice_after, _ = metrics.mean_dice([after[case]], first["classes"])
            gain = 100 * (dice_after - dice)

            # Dice is NaN where no class is in prediction or truth.
            if math.isnan(gain):
                left_out += 1
                continue
            gains.append(gain)
            folds.append(fold)
            patients.append(before["subject"])

    # The tests count with numbers instead of names.
    _, fold = np.unique(folds, return_inverse=True)
    _, patient = np.unique(patients, return_inverse=True)
    return Pairs(np.array(gains), fold, patient, left_out)


def row_of(run):
    """(model, pretraining) of a run: scratch, swin, amaes as in the paper, or the options of
    pretrain.py by which the pretraining differs from the paper's."""
    if run["origin"] != "amaes":
        return run["model"], run["origin"]

    # A published checkpoint does not say how it was pretrained: as in the paper.
    settings = PRETRAINING | (run.get("pretraining") or {})
    options = [f"--{key} {settings[key]}" for key, value in PRETRAINING.items()
               if settings[key] != value]
    return run["model"], " ".join(options) or "amaes"


def has_place(run, paper):
    """Is there a row and a column for a run in a table of the paper?"""
    _, pretraining = row_of(run)
    known = pretraining in {printed for _, printed in paper.rows}
    if not known or run["task"] not in paper.tasks or run["config"]["n_train"]:
        return False

    # Section 3.2: spatial augmentations after pretraining. Section 4.3: all from scratch.
    return run["augment"] == ("all" if pretraining == "scratch" else "spatial")


def fill(runs, number):
    """{(row, task): run} of Table `number`, and the paths of the runs that have no place in it.

    UserError if two runs have the same place, or none has one."""
    cells = {}
    others = []
    for run in runs:
        cell = row_of(run), run["task"]
        if not has_place(run, TABLES[number]):
            others.append(run["path"])
        elif cell in cells:
            raise UserError(f"{cells[cell]['path']} and {run['path']} are one cell of Table "
                            f"{number}: name one of them")
        else:
            cells[cell] = run
    if not cells:
        raise UserError(f"no run for Table {number} among "
                        f"{', '.join(others) or 'the folders named'}")
    return cells, others


# --------------------------------------------------------------------------------------- the tables
class Table(NamedTuple):
    header: list
    lines: list
    note: str


class Gain(NamedTuple):
    label: str
    printed: float | None  # by the paper
    pairs: Pairs


def text(value, form=".2f"):
    return "-" if value is None or math.isnan(value) else format(value, form)


def dice_of(run):
    """Dice in percent, mean over finished folds ± one standard deviation; - if there is no run."""
    return metrics.spread_of_dice(run["folds"], run["classes"]) if run else "-"


def gain_tables(gains):
    """A Table for each of the two tests, from a list of Gain."""
    # Two runs may share no pair that has a Dice.
    left_out = sum(gain.pairs.left_out for gain in gains)
    gains = [gain for gain in gains if len(gain.pairs.gain)]
    if not gains:
        return []

    folds = [over_folds(gain.pairs.gain, gain.pairs.fold) for gain in gains]
    patients = [over_patients(gain.pairs.gain, gain.pairs.patient) for gain in gains]
    end = (" x standard error, the smallest gain found at p < .05 with 80 % power. Holm: over the "
           f"rows. Left out: {left_out} pairs without a Dice in one run or both.")
    return [gain_table("New training sets, the same patients", gains, folds,
                       f"t over the fold means. Could find: (t_.975 + t_.80){end}"),
            gain_table("These trained networks, new patients", gains, patients,
                       f"Bootstrap, sign flips. Could find: (z_.975 + z_.80){end}")]


def gain_table(title, gains, estimates, note):
    """The Table of one test: a line for each gain and its Estimate."""
    header = [title, "gain", "gain, paper", "95 % interval", "p", "p, Holm", "could find", "folds",
              "patients", "cases better"]
    corrected = metrics.holm([estimate.p for estimate in estimates])
    lines = []
    for gain, estimate, p_holm in zip(gains, estimates, corrected, strict=True):
        # A single fold or patient gives no interval.
        interval = "-"
        if not math.isnan(estimate.low):
            interval = f"{estimate.low:+.2f} to {estimate.high:+.2f}"
        better = f"{(gain.pairs.gain > 0).sum()} of {len(gain.pairs.gain)}"
        lines.append([
            gain.label, text(estimate.gain, "+.2f"), text(gain.printed, "+.2f"), interval,
            text(estimate.p, ".4f"), text(p_holm, ".4f"), text(estimate.smallest),
            str(gain.pairs.fold.max() + 1), str(gain.pairs.patient.max() + 1), better])
    return Table(header, lines, note)


def against_first(runs):
    """Every other run against the first: Dice of each of their parts; then the gains."""
    # Runs that cannot be paired are refused before the work begins.
    first, *others = runs
    for run in others:
        same_folds(first, run)

    lines = []
    gains = []
    for name, before in parts(first).items():
        after = [parts(run)[name] for run in others]
        lines.append([name, *map(dice_of, [before, *after])])
        for run in after:
            label = name if len(others) == 1 else f"{run['path']}, {name}"
            gains.append(Gain(label, None, pair(before, run)))

    header = [f"{first['task']}, Dice %", *(run["path"] for run in runs)]
    note = f"Mean over folds ± one standard deviation.{state.unequal(runs)}"
    return [Table(header, lines, note), *gain_tables(gains)]


def cost_of(run, column):
    """Hours of pretraining or millions of parameters of a run; None if it is not known."""
    if run is None:
        return None
    if column == "hours":
        return (run.get("pretraining") or {}).get("hours")
    return run.get("params", math.nan) / 1e6


def as_in_paper(cells, number):
    """Table `number` of the paper, its numbers beside ours, and the gains over its base.

    cells: {(row, task): run}, as fill() finds them."""
    paper = TABLES[number]
    cost = "hours" if number in (2, 3) else "params"

    # All runs of a row have one network and one pretraining: the first tells what these cost.
    runs = {}
    for (row, _), run in cells.items():
        runs.setdefault(row, run)

    # The rows that the paper has come first, then what else was run.
    lines = []
    gains = []
    for row in dict.fromkeys([*paper.rows, *runs]):
        base = row[0], paper.base
        printed, printed_base = (paper.rows.get(name, {}) for name in (row, base))

        # What the row costs, and how many times as fast as the base it is.
        costs = [cost_of(runs.get(row), cost), printed.get(cost)]
        line = [*row, *(text(value, ".3g") for value in costs)]
        if cost == "hours":
            costs_of_base = [cost_of(runs.get(base), cost), printed_base.get(cost)]
            line += [text(before / own if before and own else None)
                     for before, own in zip(costs_of_base, costs, strict=True)]

        for task, title in paper.tasks.items():
            # Table 4 has the means alone.
            run = cells.get((row, task))
            dice = [dice_of(run), printed.get(task, "-")]
            line += [cell.split(" ± ")[0] for cell in dice] if number == 4 else dice

            # The paper's gain is that of its cells; the gains that it prints differ at times.
            before = cells.get((base, task))
            if run and before and row != base:
                gain = None
                if task in printed and task in printed_base:
                    gain = float(printed[task].split()[0]) - float(printed_base[task].split()[0])
                gains.append(Gain(f"{' '.join(row)}, {title}", gain, pair(before, run)))
        lines.append(line)

    columns = ["hours", "speed-up"] if cost == "hours" else ["params, M"]
    header = [f"Table {number}", "pretraining"]
    for column in [*columns, *paper.tasks.values()]:
        header += [column, f"{column}, paper"]
    return [Table(header, lines, NOTES[number]), *gain_tables(gains)]


# --------------------------------------------------------------------------------------- the output
def main(cfg):
    if cfg.table not in (None, *TABLES):
        raise UserError(f"table {cfg.table}: choose {', '.join(map(str, TABLES))}")
    if cfg.table is None:
        if not cfg.inputs:
            raise UserError("name run folders: python compare.py runs/BASELINE runs/OTHER")
        if len(cfg.inputs) == 1:
            return print(*state.describe(cfg.inputs[0]), sep="\n")
        tables = against_first([read_run(folder) for folder in cfg.inputs])
    else:
        # runs/* also names the runs of pretrain.py, which have no scores.
        scored = [folder for folder in cfg.inputs if os.path.exists(f"{folder}/dice.json")]
        cells, others = fill([read_run(folder) for folder in scored], cfg.table)
        tables = as_in_paper(cells, cfg.table)
        others += [f"{folder} (no dice.json)" for folder in cfg.inputs if folder not in scored]
        print(f"not in Table {cfg.table}: {', '.join(others) or 'none of the folders'}\n")

    page = metrics.markdown(tables)
    print(page)
    if cfg.out:
        checkpoint.write_text(cfg.out, page)
    if cfg.csv:
        # The tables one under the other, an empty line after each.
        lines = [line for table in tables for line in (table.header, *table.lines, [])]
        with checkpoint.atomic(cfg.csv) as path:
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(lines)


if __name__ == "__main__":
    config.run(main, Config)
