"""Which networks --ckpt names, and whether they go together as an ensemble."""

import os
import re

from config import UserError


def find(ckpt):
    """The checkpoints that --ckpt names: one, several with commas between them, or the folds of a
    run folder."""
    words = [ckpt] if os.path.exists(ckpt) else ckpt.split(",")
    files = []
    for word in words:
        files += networks_in(word) if os.path.isdir(word) else [word]
    return files


def networks_in(folder):
    """The networks of a run folder: its numbered folds, or else that of all cases, fold_all."""
    numbers = []
    for name in os.listdir(folder):
        fold = re.fullmatch(r"fold_(\d+)", name)
        if fold and os.path.exists(os.path.join(folder, name, "last.pt")):
            numbers.append(int(fold[1]))
    if numbers:
        return [os.path.join(folder, f"fold_{number}", "last.pt") for number in sorted(numbers)]

    # The folder of a single fold has its network in itself.
    for name in ("fold_all/last.pt", "last.pt"):
        if os.path.exists(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
    return [folder]  # refused when it is read, with the likely fix


def check_member(path, saved, task):
    """UserError if the network of a checkpoint is unfinished, or of another task than the first of
    its ensemble. task: that of the first, as a dict."""
    # They must mean the same by their channels and by their classes.
    for key in ("sequences", "classes", "labels", "regions"):
        if saved["task"].get(key) != task.get(key):
            raise UserError(f"{path} has other {key} than the network before it: they make no "
                            "ensemble")

    steps = saved["config"].get("steps", 0)
    if saved.get("step", steps) < steps:
        raise UserError(f"{path} is at step {saved['step']} of {steps}: finish it, or name the "
                        "networks to take, with commas between them")


def check_mirror(mirror, task):
    """UserError if classes would change their names in a mirror."""
    # Left and right count as whole words. A capital letter begins a word, as in LeftHippocampus,
    # so that a bright lesion is no right one.
    sided = []
    for name in (*task["classes"], *task["regions"]):
        words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
        if {"left", "right"} & {word.lower() for word in words}:
            sided.append(name)
    if mirror and sided:
        raise UserError(f"mirror: {sided[0]} is another class in the mirror; leave --mirror out")
