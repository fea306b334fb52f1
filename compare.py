"""Compare finetuning runs over the same folds, case by case, and lay them out as the paper's tables.

    python compare.py runs/wmh-unet_xl-scratch runs/wmh-unet_xl-amaes   # every other run against the first
    python compare.py --table 4 runs/*                                  # as the paper's Table 2, 3, 4 or 6

A gain is asked about twice. New training sets, the same patients: t over the paired fold means, the headline.
These trained networks, new patients: bootstrap over patients. bench/compare.py measures what each covers.
"""

import csv
import dataclasses
import json
import math
import os
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

import checkpoint
import config
import metrics
import pretrain
from config import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: tuple[str, ...] = ()  # run folders of finetune.py; without --table the baseline first
    table: int | None = None  # lay them out as the paper's Table 2, 3, 4 or 6
    out: str | None = None  # also write the tables to this Markdown file
    csv: str | None = None  # also write them to this csv file


# ------------------------------------------------------------------------------------- what the paper printed
TASKS = {"brats21": "BraTS21", "isles22": "ISLES22", "wmh": "WMH", "wmh_ood": "WMH OOD"}

MAIN = {  # (model, pretraining) -> million parameters; Dice and deviation over six folds, for each of TASKS
    ("unet_xl", "scratch"): (90, "56.00 ± 2.55", "48.30 ± 2.94", "68.32 ± 1.75", "67.22 ± 1.59"),
    ("unet_b", "scratch"): (22, "55.28 ± 1.75", "45.66 ± 2.40", "66.18 ± 2.28", "64.96 ± 2.52"),
    ("mednext_m", "scratch"): (21, "58.38 ± 1.44", "56.15 ± 2.77", "70.01 ± 1.48", "67.64 ± 1.74"),
    ("mednext_l", "scratch"): (55, "58.28 ± 1.23", "55.40 ± 1.88", "70.32 ± 1.77", "67.57 ± 1.48"),
    ("mednext_l_mednextdec", "scratch"): (62, "55.42 ± 2.25", "53.88 ± 1.52", "68.75 ± 2.18", "67.14 ± 1.28"),
    ("swinunetr", "scratch"): (62, "50.00 ± 2.59", "42.55 ± 2.49", "64.96 ± 3.90", "65.02 ± 2.86"),
    ("unet_xl", "amaes"): (90, "58.98 ± 0.88", "53.58 ± 0.76", "70.40 ± 1.46", "68.22 ± 1.16"),
    ("unet_b", "amaes"): (22, "57.20 ± 1.75", "48.42 ± 1.32", "69.11 ± 2.28", "67.51 ± 1.56"),
    ("mednext_m", "amaes"): (21, "56.81 ± 2.40", "55.89 ± 2.17", "71.70 ± 1.62", "68.80 ± 0.79"),
    ("mednext_l", "amaes"): (55, "58.73 ± 1.33", "56.83 ± 1.39", "71.63 ± 1.67", "68.68 ± 0.97"),
    ("swinunetr", "swin"): (62, "49.54 ± 0.94", "48.42 ± 3.14", "67.28 ± 2.67", "68.14 ± 1.43"),
}

# Tables 2 and 3, and the skips of section 3.1: options of pretrain.py -> hours of pretraining, Dice and
# deviation. Of a "U-Net", XL by Figure 1, on the training cases outside the fold (n_cv = 866; here 918).
CV_TASKS = {"brats21_cv": "BraTS21 n_cv"}

DECODERS = {("unet_xl", "--decoder standard --augment none"): (39, "56.65 ± 1.85"),
            ("unet_xl", "--augment none"): (31, "58.61 ± 1.94"),
            ("unet_xl", "--decoder standard --skips True --augment none"): (None, "56.22")}

AUGMENTATIONS = {("unet_xl", "--augment none"): (None, "58.61 ± 1.94"),
                 ("unet_xl", "amaes"): (None, "59.85 ± 0.98")}

# Table -> rows, columns, and the pretraining that the others gain over. The paper's gains are computed from
# its cells: it prints +1.75 and +1.59 for SwinUNETR's +5.87 and +3.12, and 1.25 x or 20 % for 39 h to 31 h.
TABLES = {2: (DECODERS, CV_TASKS, "--decoder standard --augment none"),
          3: (AUGMENTATIONS, CV_TASKS, "--augment none"),
          4: (MAIN, TASKS, "scratch"), 6: (MAIN, TASKS, "scratch")}

WELCH = (" By Welch's test on the printed means and deviations, 3 of the paper's 16 AMAES gains pass "
         "p < .05, none of them after Holm.")


# ------------------------------------------------------------------------------------------------- statistics
class Estimate(NamedTuple):
    """A mean gain in Dice points, its 95 % interval, two-sided p, and the smallest gain that the design finds
    with 80 % power at p < .05. NaN: a single fold or patient says nothing."""
    gain: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    smallest: float = math.nan


NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def student_p(t, df):
    """Two-sided p of Student's t; df need not be whole.

    With t = sqrt(df) tan(angle) the density goes as cos(angle)^(df - 1): Gauss-Legendre over the angle."""
    half = math.atan(abs(t) / math.sqrt(df)) / 2
    scale = 2 * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return max(0.0, 1 - scale * half * float(WEIGHTS @ np.cos(half * (NODES + 1)) ** (df - 1)))


def student_quantile(q, df):
    """The t that a Student variable stays below with probability q > 0.5: bisection of student_p."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        above = student_p(math.sqrt(df) * math.tan(middle), df) < 2 - 2 * q
        low, high = (low, middle) if above else (middle, high)
    return math.sqrt(df) * math.tan(low)


def over_folds(gain, fold):
    """New training sets, the same patients: t over the fold means. gain (N,) Dice points, fold (N,) numbers.

    smallest = (t_.975 + t_.80) x standard error. A sign flip could not go below p = 2/64 with six folds."""
    means = np.bincount(fold, gain) / np.bincount(fold)
    mean, df = means.mean(), len(means) - 1
    if df == 0:
        return Estimate(mean)
    error = means.std(ddof=1) / math.sqrt(len(means))
    half = student_quantile(0.975, df) * error
    p = student_p(mean / error, df) if error else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, p, half + student_quantile(0.8, df) * error)


def over_patients(gain, patient, resamples=10_000, seed=0):
    """These trained networks, new patients: percentile bootstrap, and p from sign flips, of whole patients,
    with all their cases in all folds. gain (N,) Dice points, patient (N,) numbers.

    smallest = (z_.975 + z_.80) x standard error."""
    sums, counts = np.bincount(patient, gain), np.bincount(patient)
    if len(sums) == 1:
        return Estimate(gain.mean())
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    flipped = (2 * rng.integers(0, 2, drawn.shape) - 1) @ sums
    p = (1 + np.sum(np.abs(flipped) >= abs(sums.sum()) - 1e-9)) / (1 + resamples)
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    return Estimate(gain.mean(), *np.quantile(means, (0.025, 0.975)), p, z * means.std(ddof=1))


def holm(ps):
    """p values corrected for their number, step down (Holm 1979); NaN do not count."""
    adjusted, largest = list(ps), 0.0
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        adjusted[i] = largest = max(largest, min(1.0, p * (len(order) - rank)))
    return adjusted


# --------------------------------------------------------------------------------------------------- the runs
def read_run(folder):
    """dice.json of a run folder, with path and folds.json. UserError if it has none, or no finished fold."""
    found = []
    for name in ("folds.json", "dice.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found.append(json.load(file))
        except OSError:
            raise UserError(f"{folder} has no {name}: no run folder of finetune.py, or unfinished") from None
        except ValueError:
            raise UserError(f"{folder}/{name} is damaged; finetune.py run again rewrites it") from None
    if not found[1]["folds"]:
        raise UserError(f"{folder} has no finished fold")
    return found[1] | {"path": folder, "assignment": found[0]}


def parts(run):
    """{name: the run scored by that alone}: the mean of the classes, each of them, each region, and the
    classes on scanners that the training set does not have (20 of the 110 cases of WMH OOD)."""
    classes, sites = run["classes"], run.get("sites")
    found = {"mean": run} if len(classes) > 1 else {}
    found |= {name: run | {"classes": [name]} for name in classes + run["regions"]}
    if sites:
        found["unseen scanners"] = run | {"folds": {fold: [r for r in records if r["site"] not in sites]
                                                    for fold, records in run["folds"].items()}}
    return found


def same_folds(first, second):
    """The folds that both runs finished. UserError unless both trained and evaluated on the same cases."""
    shared = sorted(set(first["folds"]) & set(second["folds"]))
    cases = [[{r["case"] for r in run["folds"][fold]} for fold in shared] for run in (first, second)]
    if first["assignment"] != second["assignment"] or cases[0] != cases[1] or not shared:
        raise UserError(f"{first['path']} and {second['path']} have different tasks or folds, or none that "
                        "both finished; a paired comparison needs the same ones")

    # Runs of earlier versions do not say which files they were scored on: nothing to compare.
    for fold in shared:
        before = {record["case"]: record for record in first["folds"][fold]}
        after = {record["case"]: record for record in second["folds"][fold]}
        checkpoint.check_same_inputs(f"{first['path']} and {second['path']} were scored on different data",
                                 before, after, "evaluate both on the same")
    return shared


def pair(first, second):
    """Every (fold, case) that two runs share; a case scores the mean Dice of the run's classes.

    -> gain (N,) in Dice points, second minus first; fold (N,), patient (N,), numbers from 0; how many pairs
    lack a Dice in one run or both and are left out. UserError: see same_folds."""
    rows, classes = [], first["classes"]
    for fold in same_folds(first, second):
        after = {record["case"]: record for record in second["folds"][fold]}
        for before in first["folds"][fold]:
            gain = (metrics.mean_dice([after[before["case"]]], classes)[0]
                    - metrics.mean_dice([before], classes)[0])
            rows.append((100 * gain, fold, before["subject"]))
    scored = [row for row in rows if not math.isnan(row[0])]
    fold, patient = (np.unique([row[i] for row in scored], return_inverse=True)[1] for i in (1, 2))
    return np.array([row[0] for row in scored]), fold, patient, len(rows) - len(scored)


def row_of(run):
    """(model, pretraining): scratch, swin, amaes as the paper has it, or the options of pretrain.py that
    differ."""
    then, paper = run.get("pretraining") or {}, dataclasses.asdict(pretrain.Config())
    options = [f"--{key} {then[key]}" for key in ("decoder", "skips", "augment", "mask_ratio", "token_size",
                                                  "loss_region") if then.get(key, paper[key]) != paper[key]]
    return run["model"], " ".join(options) if options and run["origin"] == "amaes" else run["origin"]


def fill(runs, table):
    """{(row, task): run} of a table, and the paths of the runs without a place: another task, pretraining or
    n_train, or not finetuned with spatial augmentations and from scratch with all (section 3.2)."""
    printed, tasks, _ = TABLES[table]
    cells, rest = {}, []
    for run in runs:
        row, task = row_of(run), run["task"]
        if (task not in tasks or row[1] not in {pretraining for _, pretraining in printed}
                or run["config"]["n_train"]
                or run["augment"] != ("all" if row[1] == "scratch" else "spatial")):
            rest.append(run["path"])
        elif (row, task) in cells:
            raise UserError(f"{cells[row, task]['path']} and {run['path']} are one cell of Table {table}: "
                            "name one of them")
        else:
            cells[row, task] = run
    if not cells:
        raise UserError(f"no run for Table {table} among {', '.join(rest) or 'the folders named'}")
    return cells, rest


# ------------------------------------------------------------------------------------------------- the tables
class Table(NamedTuple):
    header: list
    lines: list
    note: str


def text(value, form=".2f"):
    return "-" if value is None or math.isnan(value) else format(value, form)


def dice_of(run):
    """Dice in percent, mean over the finished folds ± one standard deviation; - if there is no run."""
    folds = run["folds"].values() if run else ()
    return metrics.spread([100 * metrics.mean_dice(records, run["classes"])[0] for records in folds])


def gain_tables(gains):
    """[(label, the paper's gain or None, pairs)] -> the two questions, a table each."""
    left_out = sum(pairs[3] for *_, pairs in gains)
    gains = [row for row in gains if len(row[2][0])]
    if not gains:
        return
    for title, how, estimates in (
            ("New training sets, the same patients", "t over the fold means. Could find: (t_.975 + t_.80)",
             [over_folds(gain, fold) for *_, (gain, fold, _, _) in gains]),
            ("These trained networks, new patients", "Bootstrap, sign flips. Could find: (z_.975 + z_.80)",
             [over_patients(gain, patient) for *_, (gain, _, patient, _) in gains])):
        lines, corrected = [], holm([estimate.p for estimate in estimates])
        for (label, paper, (gain, fold, patient, _)), e, p in zip(gains, estimates, corrected, strict=True):
            interval = "-" if math.isnan(e.low) else f"{e.low:+.2f} to {e.high:+.2f}"
            lines.append([label, text(e.gain, "+.2f"), text(paper, "+.2f"), interval, text(e.p, ".4f"),
                          text(p, ".4f"), text(e.smallest), str(fold.max() + 1), str(patient.max() + 1),
                          f"{(gain > 0).sum()} of {len(gain)}"])
        yield Table([title, "gain", "gain, paper", "95 % interval", "p", "p, Holm", "could find", "folds",
                     "patients", "cases better"], lines,
                    f"{how} x standard error, the smallest gain found at p < .05 with 80 % power. Holm: over "
                    f"the rows. Left out: {left_out} pairs without a Dice in one run or both.")


def against_first(runs):
    """Every other run against the first: Dice of each of their parts; then the gains."""
    for run in runs[1:]:
        same_folds(runs[0], run)
    lines, gains = [], []
    for name, before in parts(runs[0]).items():
        others = [parts(run)[name] for run in runs[1:]]
        lines.append([name, *map(dice_of, [before, *others])])
        gains += [(name if len(runs) == 2 else f"{run['path']}, {name}", None, pair(before, run))
                  for run in others]
    yield Table([f"{runs[0]['task']}, Dice %", *(run["path"] for run in runs)], lines,
                "Mean over folds ± one standard deviation.")
    yield from gain_tables(gains)


def as_in_paper(cells, table):
    """A table of the paper, its numbers beside ours; then the gains over its base."""
    printed, tasks, base = TABLES[table]
    timed, lines, gains = table in (2, 3), [], []

    def amounts(row):
        """Hours of pretraining or millions of parameters: ours, the paper's."""
        run = next((run for (name, _), run in cells.items() if name == row), {})
        ours = (run.get("pretraining") or {}).get("hours") if timed else run.get("params", math.nan) / 1e6
        return ours, printed.get(row, [None])[0]

    for row in dict.fromkeys([*printed, *(row for row, _ in cells)]):  # the paper's, then what else was run
        first = row[0], base
        lines.append([*row, *(text(amount, ".3g") for amount in amounts(row))])
        if timed:
            lines[-1] += [text(b and a and b / a) for a, b in zip(amounts(row), amounts(first), strict=True)]
        for i, (task, title) in enumerate(tasks.items(), start=1):
            run, before = cells.get((row, task)), cells.get((first, task))
            theirs = printed[row][i] if row in printed else "-"
            lines[-1] += [word.split(" ± ")[0] if table == 4 else word for word in (dice_of(run), theirs)]
            if run and before and row != first:
                known = row in printed and first in printed
                gain = float(theirs.split()[0]) - float(printed[first][i].split()[0]) if known else None
                gains.append((f"{' '.join(row)}, {title}", gain, pair(before, run)))
    columns = [*(["hours", "speed-up"] if timed else ["params, M"]), *tasks.values()]
    header = [word for column in columns for word in (column, f"{column}, paper")]
    note = "Dice %, mean over folds" + " ± one standard deviation" * (table != 4) + "." + WELCH * (table == 6)
    yield Table([f"Table {table}", "pretraining", *header], lines, note)
    yield from gain_tables(gains)


# ------------------------------------------------------------------------------------------------- the output
def markdown(tables):
    lines = []
    for table in tables:
        lines += [*metrics.table(table.header, table.lines), "", table.note, ""]
    return "\n".join(lines)


def main(cfg):
    if cfg.table not in (None, *TABLES):
        raise UserError(f"table {cfg.table}: choose {', '.join(map(str, TABLES))}")
    if cfg.table is None and len(cfg.inputs) < 2:
        raise UserError("name two run folders or more: python compare.py runs/BASELINE runs/OTHER")
    if cfg.table is None:
        tables = list(against_first([read_run(folder) for folder in cfg.inputs]))
    else:  # runs/* also names what pretrain.py made
        scored = [folder for folder in cfg.inputs if os.path.exists(os.path.join(folder, "dice.json"))]
        cells, rest = fill([read_run(folder) for folder in scored], cfg.table)
        tables = list(as_in_paper(cells, cfg.table))
        rest += [f"{folder} (no dice.json)" for folder in cfg.inputs if folder not in scored]
        print(f"not in Table {cfg.table}: {', '.join(rest) or 'none of the folders'}\n")
    print(markdown(tables))
    if cfg.out:
        checkpoint.write_text(cfg.out, markdown(tables))
    if cfg.csv:  # the same tables one under the other, an empty line between
        with checkpoint.atomic(cfg.csv) as path, open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(row for table in tables for row in (table.header, *table.lines, []))


if __name__ == "__main__":
    config.run(main, Config)
