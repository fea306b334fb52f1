"""What is looked at before the first step: all that would stop a run after hours or spoil it."""

import dataclasses
import difflib
import functools
import glob
import json
import os
from collections import Counter

import yaml

import checkpoint
import config
import data
import models
import tasks
from config import UserError


# -------------------------------------------------------------------------------- files and weights
def check_files(folder, paths):
    """Raises UserError unless all these files of a prepared folder are there."""
    # To list each folder once is quick for 45,000 files, even on a network disk.
    missing = []
    names_in = {}  # {folder: names of its files}
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in names_in:
            names_in[parent] = list_folder(parent)
        if name not in names_in[parent]:
            missing.append(path)

    if missing:
        raise UserError(f"{folder} lacks {len(missing)} files that its index names, the first "
                        f"{min(missing)}: copy the whole folder, or prepare it again")


def list_folder(folder):
    """The names in a folder; none if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def shared_files(train, validation):
    """Held-out volumes whose raw file is trained on, under another subject: [a line], or []."""
    # The checksum of a raw file tells it, whatever its name.
    trained = {case.volumes[0].sha256: case.subject for case in train}
    shared = [case for case in validation if case.volumes[0].sha256 in trained]
    if not shared:
        return []
    twin = trained[shared[0].volumes[0].sha256]
    return [f"{len(shared)} of {len(validation)} held-out volumes are trained on, too: the first "
            f"is {shared[0].name}, the same file as one of {twin}"]


def check_encoder(path, row, model):
    """UserError unless the checkpoint at `path` fits the model. row: its own, None if not known."""
    if row is None or row == model:
        return

    # Rows such as mednext_l and mednext_l_mednextdec differ in their decoder only.
    rows = [models.ROWS[name] for name in (row, model) if name in models.ROWS]
    encoders = [known._replace(segments_with="") for known in rows]
    if len(encoders) < 2 or encoders[0] != encoders[1]:
        raise UserError(f"{path} holds a {row}, not a {model}")


# ---------------------------------------------------------------------- label values and foreground
@functools.cache
def parse_values(text):
    """"0:87120/87040 1:257/254", as in the index -> {0: (87120, 87040), 1: (257, 254)}.

    Raises ValueError if it is written otherwise."""
    counts = {}
    for word in text.split():
        value, _, voxels = word.partition(":")
        native, _, prepared = voxels.partition("/")
        counts[int(value)] = int(native), int(prepared)
    return counts


def values_of(volume):
    """Label values of a prepared volume: {value: (voxels on the scan's own grid, at 1 mm)}.

    {} if an earlier version prepared it, which did not count them."""
    try:
        return parse_values(volume.label_values)
    except ValueError:
        raise UserError(f"the index has the label values {volume.label_values!r} for "
                        f"{volume.path}: prepare it again") from None


def check_values(path, task, cases):
    """Raises UserError for a label value that the task does not name.

    Training would stop at it, or the evaluation after it."""
    # All cases are looked through first, so that one message names every such value.
    named = {int(value) for value in (*task.labels, *task.ignore)}
    holders = {}  # {value without a name: the cases that hold it}
    for case in cases:
        for value in set(values_of(case.volumes[0])) - named:
            holders.setdefault(value, []).append(case)
    if not holders:
        return

    # The two lines of which one would mend it, as they would stand in the task's file.
    values = sorted(holders)
    labels = {int(value): number for value, number in task.labels.items()}
    labels |= dict.fromkeys(values, max(labels.values()))
    labels = ", ".join(f"{value}: {number}" for value, number in labels.items())
    ignore = sorted({*map(int, task.ignore), *values})

    first = holders[values[0]][0]
    voxels, _ = values_of(first.volumes[0])[values[0]]
    raise UserError(
        f"{first.name} has {voxels} voxels of label value {values[0]}, which task {path} does not "
        f"name (values without a name: {', '.join(map(str, values))}; cases with {values[0]}: "
        f"{len(holders[values[0]])}). Write there `labels: {{{labels}}}`, with the class you want, "
        f"or `ignore: {ignore}`")


def foreground(task, case):
    """Voxels of a case in each class but the background: {class number: (native, at 1 mm)}.

    None if an earlier version prepared it."""
    counts = values_of(case.volumes[0])
    if not counts:
        return None

    # Several label values may be of one class.
    classes = {int(value): number for value, number in task.labels.items()}
    found = {number: (0, 0) for number in range(1, len(task.classes))}
    for value, (native, prepared) in counts.items():
        number = classes.get(value, 0)
        if number > 0 and value not in task.ignore:
            before = found[number]
            found[number] = before[0] + native, before[1] + prepared
    return found


def check_foreground(task, cases, folds):
    """Cases and training sets that lack a class, as lines to print. cases: {name: case}.

    Raises UserError for a fold whose training cases are all empty: it could learn nothing."""
    # Of what an earlier version prepared, nothing can be said.
    known = {}  # {name: foreground}
    for name, case in cases.items():
        found = foreground(task, case)
        if found is not None:
            known[name] = found

    # Cases without any foreground at 1 mm, and those of them that lost it on the way there.
    empty = []
    lost = []
    for name, found in known.items():
        if not any(prepared for _, prepared in found.values()):
            empty.append(name)
            if any(native for native, _ in found.values()):
                lost.append(name)
    lines = []
    if empty:
        line = f"{len(empty)} of {len(cases)} cases have no foreground voxel, {empty[0]} the first"
        if lost:
            line += f"; {len(lost)} of them had some on the scan's own grid"
        lines.append(line)

    return lines + check_training_sets(task, known, set(empty), folds)


def check_training_sets(task, known, empty, folds):
    """Classes that a fold cannot learn, as lines to print.

    known: {case name: foreground}. empty: names of the cases that have none."""
    lacking = {title: [] for title in task.classes[1:]}  # {class: folds without a voxel of it}
    for number, fold in enumerate(folds):
        trained = fold["train"]
        if not set(trained) <= set(known):
            continue  # a case that is not known may have any class
        if set(trained) <= empty:
            raise UserError(f"fold {number} would be trained on no foreground at all: none of its "
                            f"{len(trained)} label maps holds any, {trained[0]} the first. Are "
                            "these the right ones?")
        for index, title in enumerate(task.classes[1:], start=1):
            if not any(known[name][index][1] for name in trained):
                lacking[title].append(str(number))

    lines = []
    for title, numbers in lacking.items():
        if numbers:
            lines.append(f"{title}: no voxel to train on in fold {', '.join(numbers)}")
    return lines


# ------------------------------------------------------------------------------ the cases of a task
def has_label(runs):
    """Does one of these volumes, the runs of a sequence, have a label?"""
    return any(volume.label for volume in runs)


def describe(key, session):
    """One session, as "s1 session 2: FLAIR 40x40x40 (voxels of 1x1x1 mm) with a label"."""
    _, subject, number = key
    volumes = []
    for sequence, runs in sorted(session.items()):
        # Of several runs, the one that a task would take.
        volume = next((volume for volume in runs if volume.label), runs[0])
        labelled = "with a label" if volume.label else "without"
        volumes.append(f"{sequence} {volume.shape} (voxels of {volume.spacing} mm) {labelled}")
    who = f"{subject} session {number}" if number else subject
    return f"{who}: {', '.join(volumes)}"


def say_counts(counter):
    """"FLAIR 3, T1 1", the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def why_none(task):
    """Why a folder has no case for a task, in one line."""
    start = f"{task.data} has no labelled case with {', '.join(task.sequences)}"
    volumes = data.read_index(task.data)
    if task.source:
        start += f" of source {task.source}"
        sources = Counter(volume.source for volume in volumes)
        if task.source not in sources:
            return f"{start}: its sources, with their volumes, are {say_counts(sources)}"

    # There may be no label for any task.
    sessions = tasks.sessions_of(task.data, task.source)
    labelled = Counter()  # sessions that have a sequence with a label
    for session in sessions.values():
        labelled.update(sequence for sequence, runs in session.items() if has_label(runs))
    if not labelled:
        line = f"{start}: none of its {len(volumes)} volumes has a label"
        aside = sum(volume.split == "pretrain" and volume.label != "" for volume in volumes)
        if aside:
            line += f" but {aside} of the split pretrain, which no task takes"
        return line

    # A sequence may be written otherwise in the task.
    start = f"{start}; with a label it has {say_counts(labelled)}"
    known = {sequence.lower(): sequence for sequence in labelled}
    for name in task.sequences:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        if name not in labelled and near:
            return f"{start}. Is {name} meant to be {known[near[0]]}?"

    # No session has all of them with a label: most often its grid fits one of them alone. The
    # session that has most of them shows it best.
    best = None
    most = -1
    for key, session in sessions.items():
        shared = len(set(task.sequences) & set(session))
        if shared > most and any(has_label(runs) for runs in session.values()):
            best = key
            most = shared
    return (f"{start}. A label counts for the scans on its own grid: register and resample the "
            f"others. {describe(best, sessions[best])}")


def left_out(task, cases):
    """Labelled sessions that lack one of the sequences, as lines to print."""
    if len(task.sequences) == 1:
        return []

    # The sessions that are cases.
    taken = set()
    for case in cases:
        volume = case.volumes[0]
        taken.add((volume.source, volume.subject, volume.session))

    # All others in which a sequence of the task has a label.
    rest = {}
    for key, session in tasks.sessions_of(task.data, task.source).items():
        labelled = any(has_label(tasks.runs_of(session, sequence))
                       for sequence in task.sequences)
        if labelled and key not in taken:
            rest[key] = session

    if not rest:
        return []
    first = min(rest)
    return [f"{len(rest)} labelled sessions are left out: they lack one of "
            f"{', '.join(task.sequences)} on the label's grid. {describe(first, rest[first])}"]


def check_grids(cases):
    """Raises UserError if the channels of a case differ in shape.

    They do where only some of them were prepared again."""
    for case in cases:
        shapes = {volume.sequence: volume.shape for volume in case.volumes}
        if len(set(shapes.values())) > 1:
            shapes = ", ".join(f"{sequence} {shape}" for sequence, shape in shapes.items())
            raise UserError(f"the channels of {case.name} differ in shape ({shapes}): prepare it "
                            "again")


def same_files(cases):
    """Raw files that several subjects share, as lines to print.

    What is trained on may then be evaluated as well."""
    subjects = {}  # {checksum of a scan: the subjects that have it}
    for case in cases:
        for volume in case.volumes:
            subjects.setdefault(volume.sha256, set()).add(case.subject)
    shared = [sorted(names) for names in subjects.values() if len(names) > 1]
    if not shared:
        return []
    return [f"{len(shared)} scans are the same file under several subjects, "
            f"{' and '.join(min(shared))} the first: what is trained on may be evaluated"]


def other_labels(cases):
    """Cases whose channels have label maps that differ, as lines to print."""
    found = []
    for case in cases:
        if len({volume.label_sha256 for volume in case.volumes}) > 1:
            found.append(case.name)
    if not found:
        return []
    return [f"{len(found)} cases have another label map for each sequence, {found[0]} the first: "
            "that of the task's first sequence is taken"]


# ------------------------------------------------------------------------- the run folder of a task
def check_share(batch_size, processes):
    """UserError if the processes cannot have the same number of a batch's samples."""
    if batch_size % processes:
        raise UserError(f"batch_size {batch_size} cannot be shared by {processes} processes")


def check_folder(settings, config_class, resumable, name, task, folds, made_of):
    """UserError if the run folder has folds, finished or not, of other settings, another task,
    other cases or other files: they would be taken for these.

    -> the files that the folder gets, {name: text}, and lines that should be known."""
    # What the folds start from: the checkpoint, or the networks of another run.
    out = settings["out"]
    start = checkpoint.checksum(settings["ckpt"]) if settings["ckpt"] else None
    if task.networks:
        start = tasks.networks_of(settings["networks"], len(folds))
    inputs = {"ckpt": start, "cases": made_of}

    # The folder of the data may change, as long as the data are the same.
    task_settings = dataclasses.asdict(task)
    del task_settings["data"]
    assignment = json.dumps({"task": name, "settings": task_settings, "folds": folds}, indent=1)

    # Folds that are there must be of the same settings, the same cases and the same files.
    lines = []
    if glob.glob(os.path.join(glob.escape(out), "fold_*", "*")):
        path = os.path.join(out, "config.yaml")
        if os.path.exists(path):
            saved = settings | config.read_yaml(config_class, path)
            checkpoint.check_same_run(f"{out} has folds", saved, settings, resumable)
        path = os.path.join(out, "folds.json")
        if os.path.exists(path) and checkpoint.read_text(path) != assignment:
            raise UserError(f"{out} has folds of another task, or of other cases: new --out, or "
                            "the old data")
        inputs, lines = tasks.check_inputs(out, inputs)

    files = {"config.yaml": yaml.safe_dump(settings, sort_keys=False), "folds.json": assignment,
             "inputs.json": json.dumps(inputs, indent=1)}
    return files, lines
