"""Pictures of a run, drawn at its end where matplotlib is installed: losses.png and dice.png.

docs/figures.py draws these and others by hand."""

import glob
import json
import os

import checkpoint
from config import UserError


def pyplot():
    """matplotlib's, for files alone. Raises ImportError where it is not installed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def read_json(path):
    """A JSON file, or the list of the lines of a .jsonl file."""
    try:
        with open(path, encoding="utf-8") as file:
            if path.endswith(".jsonl"):
                return [json.loads(line) for line in file]
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def name_of(folder):
    return os.path.basename(os.path.normpath(folder))


# What is drawn of a log line, the first of these that it has.
PARTS = (("masked", "visible"), ("rotation", "contrast", "l1"), ("loss", "dice"))


def losses(plt, *folders):
    """log.jsonl of each folder: training (lines) and validation (points) over the steps.

    A folder is of a pretraining, of a finetuning, or of a fold of one."""
    # A finetuning has a log in each of its folds.
    logged = []
    for folder in folders:
        folds = sorted(glob.glob(f"{glob.escape(str(folder))}/fold_*/log.jsonl"))
        logged += [os.path.dirname(path) for path in folds] or [folder]
    folders = logged

    size = (5 * len(folders), 3.5)
    figure, axes = plt.subplots(1, len(folders), figsize=size, squeeze=False)
    for axis, folder in zip(axes[0], folders, strict=True):
        log = read_json(f"{folder}/log.jsonl")
        known = set().union(*log)
        parts = next((parts for parts in PARTS if known & set(parts)), ())
        for number, part in enumerate(parts):
            for key, style in ((part, ".-"), (f"val_{part}", "o")):
                draw_key(axis, log, key, style, f"C{number}")

        # What interpolation scores on the patches of the validation.
        draw_key(axis, log, "val_fill", "--", "gray")

        # Losses of pretraining fall by orders of magnitude. That of finetuning is cross-entropy
        # minus Dice, which ends at -1.
        if "loss" in parts:
            axis.set_ylabel("cross-entropy minus Dice; Dice of crops", fontsize=8)
        else:
            axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(name_of(folder), fontsize=9)
        axis.legend(fontsize=8)
    return figure


def draw_key(axis, log, key, style, color):
    """One value over the steps, where a log has it."""
    steps = [record["step"] for record in log if key in record]
    values = [record[key] for record in log if key in record]
    if steps:
        axis.plot(steps, values, style, color=color, label=key, markersize=3)


def cases(plt, folder):
    """Dice of all cases in a finetuning run: a dot for each, by class and by fold."""
    run = read_json(f"{folder}/dice.json")
    names = [*run["classes"], *run.get("regions", ())]
    figure, axes = plt.subplots(1, len(names), figsize=(max(3, 3 * len(names)), 3.5), sharey=True,
                                squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        folds = sorted(run["folds"], key=int)
        for place, fold in enumerate(folds):
            scores = [record["dice"].get(name) for record in run["folds"][fold]]
            scores = [100 * score for score in scores if score is not None]
            if scores:
                # Dots are moved apart, so that equal ones are seen.
                apart = [place + 0.3 * (i / len(scores) - 0.5) for i in range(len(scores))]
                axis.plot(apart, scores, ".", markersize=4)
                mean = sum(scores) / len(scores)
                axis.hlines(mean, place - 0.3, place + 0.3, color="black", linewidth=1)
        axis.set_xticks(range(len(folds)), folds)
        axis.set_xlabel("fold; the line is its mean")
        axis.set_title(f"{name}, Dice %", fontsize=9)
        axis.set_ylim(-2, 102)
    return figure


def save(figure, path):
    figure.tight_layout()
    # Processes that finish folds of one run side by side each write under a name of their own.
    with checkpoint.atomic(path, os.getpid()) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def at_end(out, logged, scored):
    """losses.png of the folders that have a log, and dice.png if cases were scored, in `out`.

    Nothing is drawn where matplotlib is not installed."""
    try:
        plt = pyplot()
    except ImportError:
        return
    figures = {}
    logged = [folder for folder in logged if os.path.exists(f"{folder}/log.jsonl")]
    if logged:
        figures["losses.png"] = losses(plt, *logged)
    if scored:
        figures["dice.png"] = cases(plt, out)
    for name, figure in figures.items():
        save(figure, os.path.join(out, name))
        plt.close(figure)
