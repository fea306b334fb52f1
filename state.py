"""Where a run stands, finished or at work, from the files in its folder."""

import glob
import json
import os

import checkpoint
import metrics
import validation
from config import UserError


def describe(folder):
    """The lines that say where the run in `folder` stands. UserError if there is none.

    It may be of pretrain.py or of finetune.py, and may be at work meanwhile."""
    if not os.path.exists(os.path.join(folder, "config.yaml")):
        raise UserError(f"{folder} holds no run: there is no config.yaml in it")
    if os.path.exists(os.path.join(folder, "folds.json")):
        return describe_folds(folder)
    return describe_pretraining(folder)


def describe_pretraining(folder):
    """The lines for a run of pretrain.py: how far it is, and its last validation."""
    log = read_log(folder)
    lines = [f"{folder}: pretraining, {how_far(folder, log)}"]

    # The last validation may lie some log lines back.
    looks = [record for record in log if "val_loss" in record]
    if looks:
        last = looks[-1]
        lines.append(f"validation at step {last['step']}: loss {last['val_loss']:.4g}")
        lines.append(validation.verdict(last))
    return [line for line in lines if line]


def describe_folds(folder):
    """The lines for a run of finetune.py: a line for each fold."""
    with open(os.path.join(folder, "folds.json"), encoding="utf-8") as file:
        assignment = json.load(file)
    planned = len(assignment["folds"])
    classes = assignment["settings"]["classes"][1:]

    # The folds of the task, and beside them a network on all cases.
    lines = [f"{folder}: finetuning"]
    done = 0
    names = [f"fold_{number}" for number in range(planned)]
    if os.path.isdir(os.path.join(folder, "fold_all")):
        names.append("fold_all")
    for name in names:
        path = os.path.join(folder, name)
        scores = os.path.join(path, "dice.json")
        if os.path.exists(scores):
            done += 1
            lines.append(f"{name}: done, Dice {mean_dice(scores, classes)}")
        else:
            lines.append(f"{name}: {how_far(path, read_log(path))}")
    return [*lines, f"{done} of {planned} folds done"]


def mean_dice(path, classes):
    """Mean Dice in percent over the cases and classes of a finished fold, without its regions."""
    with open(path, encoding="utf-8") as file:
        records = json.load(file)
    mean, _ = metrics.mean_dice(records, classes)
    return f"{100 * mean:.2f} %"


def unequal(runs):
    """A sentence for the table of runs that have not finished the same folds; "" if they have.

    runs: as tasks.read_run gives them."""
    done = {run["path"]: sorted(run["folds"], key=int) for run in runs}
    if len(set(map(tuple, done.values()))) == 1:
        return ""
    words = "; ".join(f"{path} {', '.join(folds)}" for path, folds in done.items())
    return (f" The runs have finished different folds ({words}): their means are of these, and the "
            "gains of those in common.")


def read_log(folder):
    """The whole lines of log.jsonl; the last one may be being written."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def how_far(folder, log):
    """The last step that was logged, the time left, and whether a process is at work."""
    if checkpoint.is_locked(folder):
        doing = "at work"
    else:
        doing = "nobody is at work"
    if not log:
        begun = glob.glob(os.path.join(glob.escape(folder), "*"))
        return f"no step is logged yet, {doing}" if begun else "not begun"

    # Logs of earlier versions do not say how many steps there are.
    last = log[-1]
    steps = last.get("steps")
    text = f"step {last['step']} of {steps or '?'}"
    if steps and last["step"] < steps:
        minutes = (steps - last["step"]) * last["seconds"] / 60
        text += f", {last['seconds']:.3g} s a step: {minutes:.1f} minutes left"

    # Finetuning also logs Dice on the crops that it trains on, which differs from step to step.
    dice = [record["dice"] for record in log if "dice" in record][-5:]
    if dice:
        mean = 100 * sum(dice) / len(dice)
        text += f", Dice of training crops {mean:.0f} % (mean of the last {len(dice)} logged)"
    if steps == last["step"] and doing != "at work":
        return f"{text}, finished"
    return f"{text}, {doing}"
