"""Compare two finetuning runs over the same folds, case by case (paper, Table 4: the gain from pretraining).

    python compare.py runs/wmh-unet_xl-scratch runs/wmh-unet_xl-amaes
"""

import dataclasses
import json
import os

import numpy as np

import common
from common import UserError
from finetune import mean_dice


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: tuple[str, ...] = ()  # two run folders of finetune.py: the baseline, then the other
    out: str | None = None  # also write the table to this Markdown file


def read_run(folder):
    """dice.json and folds.json of a run folder; UserError if it is none or has no finished fold."""
    found = []
    for name in ("dice.json", "folds.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found.append(json.load(file))
        except OSError:
            raise UserError(f"{folder} has no {name}: no run folder of finetune.py, or unfinished") from None
        except ValueError:
            raise UserError(f"{folder}/{name} is damaged; finetune.py run again rewrites it") from None
    if not found[0]["folds"]:
        raise UserError(f"{folder} has no finished fold")
    return found


def paired(first, second, names):
    """For the folds both runs finished: mean Dice of each fold in both, and every case's difference
    (percent)."""
    means, differences = [], []
    for fold in sorted(set(first) & set(second), key=int):
        ours = {record["case"]: record for record in second[fold]}
        if set(ours) != {record["case"] for record in first[fold]}:
            raise UserError(f"fold {fold} was evaluated on different cases in the two runs")
        means.append([100 * mean_dice(records, names)[0] for records in (first[fold], second[fold])])
        for record in first[fold]:
            before, after = (mean_dice([r], names)[0] for r in (record, ours[record["case"]]))
            differences.append(100 * (after - before))
    differences = np.array(differences)
    return np.array(means), differences[~np.isnan(differences)]


def main(cfg):
    if len(cfg.inputs) != 2:
        raise UserError("name two run folders: python compare.py runs/BASELINE runs/OTHER")
    (first, first_folds), (second, second_folds) = map(read_run, cfg.inputs)
    if first_folds != second_folds:
        raise UserError(f"{cfg.inputs[0]} and {cfg.inputs[1]} have different tasks or folds; a paired "
                        "comparison needs the same ones")
    classes, regions = first["classes"], first["regions"]
    columns = ({"mean": classes} if len(classes) > 1 else {}) | {c: [c] for c in classes + regions}
    lines = [f"| {first['task']}, Dice % | {cfg.inputs[0]} | {cfg.inputs[1]} | gain a fold | gain a case "
             "| cases better |", "|---|---|---|---|---|---|"]
    for column, names in columns.items():
        means, differences = paired(first["folds"], second["folds"], names)
        spread = [f"{m:.2f} ± {s:.2f}" for m, s in zip(means.mean(0), _deviation(means), strict=True)]
        gain = means[:, 1:] - means[:, :1]
        lines.append(f"| {column} | {spread[0]} | {spread[1]} | {gain.mean():+.2f} ± "
                     f"{_deviation(gain)[0]:.2f} | {differences.mean():+.2f} ± "
                     f"{_deviation(differences[:, None])[0]:.2f} | "
                     f"{(differences > 0).sum()} of {len(differences)} |")
    lines += ["", f"± is one standard deviation: over {len(means)} folds, or over cases in `gain a case`."]
    table = "\n".join(lines)
    print(table)
    if cfg.out:
        common.write_text(cfg.out, table + "\n")


def _deviation(values):
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


if __name__ == "__main__":
    common.run(main, Config)
