"""A task (paper, section 4.1): its folds, how a case is scored, and checks of its data."""

import dataclasses
import difflib
import functools
import json
import os
from collections import Counter

import nibabel as nib
import numpy as np

import checkpoint
import config
import data
import metrics
from config import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """configs/tasks/<name>.yaml; section 4.1."""
    data: str  # prepared folder
    classes: tuple[str, ...]  # names, background first
    labels: dict  # label value of the source -> class number
    sequences: tuple[str, ...]  # input channels
    networks: str | None = None  # do not train: evaluate the networks finetuned for that task
    source: str | None = None  # take cases of this source only
    ignore: tuple[int, ...] = ()  # label values that neither loss nor score looks at
    # name -> class numbers, which are scored as their union
    regions: dict = dataclasses.field(default_factory=dict)
    n_train: int = 20  # subjects to train on; section 4.1
    folds: int = 6  # section 4.1; 0: leave one subject out, a fold each
    evaluate: str = "rest"  # rest: the other subjects (n_cv); test: the test split (n_test)
    sites: bool = False  # subjects are <site>_<number>; scores of sites not trained on stand apart


def read_task(name):
    """A task by its name or path -> (name, Task). Raises UserError, with the known names."""
    # A name stands for a file that comes with the project.
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "tasks")
    path = name if name.endswith((".yaml", ".yml")) else os.path.join(folder, f"{name}.yaml")
    if not os.path.exists(path):
        known = ", ".join(sorted(os.path.splitext(file)[0] for file in os.listdir(folder)))
        raise UserError(f"no task {name!r}: give a path to a task file, or one of {known}")

    task = config.build_config(Task, config.read_yaml(Task, path))
    check_task(path, task)
    return os.path.splitext(os.path.basename(path))[0], task


def check_task(path, task):
    """Raises UserError for a task that contradicts itself."""
    if not task.classes or not task.sequences:
        raise UserError(f"{path}: classes and sequences must not be empty")

    # Every class has a label value, and every label value a class.
    numbers = list(range(len(task.classes)))
    found = list(task.labels.values())
    if any(value not in numbers for value in found) or any(n not in found for n in numbers):
        raise UserError(f"{path}: labels must map onto the class numbers 0 to "
                        f"{len(task.classes) - 1}")

    for value in (*task.labels, *task.ignore):
        if not str(value).isdigit() or int(value) > 255:
            raise UserError(f"{path}: labels maps label values, 0 to 255, to class numbers; "
                            "ignore lists values")

    for region in task.regions.values():
        if not isinstance(region, list) or any(n not in numbers for n in region):
            raise UserError(f"{path}: a region is a list of class numbers, as [1, 2]")

    if task.evaluate not in ("rest", "test"):
        raise UserError(f"{path}: evaluate {task.evaluate!r}: choose rest or test")


def make_folds(name, task, cases):
    """The folds of a task: [{"train": [case names], "evaluate": [case names]}].

    For fold f the subjects are permuted, seeded by (task, f): the first n_train are trained on, the
    others, or the test split, are evaluated. The paper's own folds were not released. If each fold
    leaves one subject out, there is no test split. Raises UserError for too few subjects."""
    # Folds divide subjects, so that all sessions of a subject are on one side.
    leave_one_out = task.folds == 0
    test = set()
    if not leave_one_out:
        test = {case.subject for case in cases if case.volumes[0].split == "test"}
    pool = sorted({case.subject for case in cases} - test)
    n_train = len(pool) - 1 if leave_one_out else task.n_train

    # One subject at least must be left to evaluate.
    most = len(pool) if task.evaluate == "test" else len(pool) - 1
    if not 0 < n_train <= most:
        hint = f": --n_train {most} or less" if most > 0 else ""
        raise UserError(f"task {name} trains on {task.n_train} subjects and needs more, but "
                        f"{task.data} has {len(pool)} with labels{hint}")
    if task.evaluate == "test" and not test:
        raise UserError(f"task {name} evaluates the split test, of which {task.data} has no "
                        "labelled case")

    folds = []
    for fold in range(len(pool) if leave_one_out else task.folds):
        if leave_one_out:
            trained = set(pool) - {pool[fold]}
        else:
            order = np.random.default_rng(data.derive_seed(name, fold)).permutation(len(pool))
            trained = {pool[i] for i in order[:n_train]}

        rest = test if task.evaluate == "test" else set(pool) - trained
        folds.append({"train": [case.name for case in cases if case.subject in trained],
                      "evaluate": [case.name for case in cases if case.subject in rest]})
    return folds


# ------------------------------------------------------------------------------------- scoring
def site(case):
    """Scanner of a WMH case: Amsterdam-GE3T of the subject wmh/Amsterdam-GE3T_100."""
    return case.subject.split("/")[-1].rpartition("_")[0]


def sites_of(task, cases):
    """The scanners of a task's training pool, None where it has no sites."""
    if not task.sites:
        return None
    return sorted({site(case) for case in cases if case.volumes[0].split != "test"})


def classes_of(truth, task):
    """Label values (D, H, W) of the source -> class numbers, uint8.

    IGNORE stands where the task, a Task as a dict, ignores the value. Raises UserError for a value
    that it does not name."""
    values = np.asarray(truth).astype(np.uint8)
    classes = data.class_table(task["labels"], task["ignore"])[values]

    # A value that is no whole number from 0 to 255 has changed with its type.
    unknown = np.unique(truth[(values != truth) | (classes == data.UNKNOWN)])
    if len(unknown):
        raise UserError(f"the true label map holds {unknown[0]:g}, which the task's labels do not "
                        "name")
    return classes


def score_case(classes, truth, task, affine):
    """The scores of one case: {key of metrics.SCORES: {class or region: value}}.

    classes: predicted class numbers (D, H, W). truth: the source's label values on the same grid,
    whose affine (4, 4) is in mm. task: a Task as a dict. Voxels that the task ignores count neither
    as predicted nor as true. Raises UserError for a value that the task does not name."""
    true = classes_of(truth, task)
    counted = true != data.IGNORE
    spacing = nib.affines.voxel_sizes(np.asarray(affine))

    # What is scored: each class but the background, and each region, a union of classes.
    targets = {name: (number,) for number, name in enumerate(task["classes"]) if number > 0}
    targets |= {name: tuple(numbers) for name, numbers in task["regions"].items()}

    # An ignored voxel has no class, so that it is in no true mask; the prediction may be anything.
    scores = {kind: {} for kind in metrics.SCORES}
    for name, numbers in targets.items():
        predicted_mask = np.isin(classes, numbers) & counted
        true_mask = np.isin(true, numbers)
        found = metrics.score(predicted_mask, true_mask, spacing)
        for kind in metrics.SCORES:
            scores[kind][name] = found[kind]
    return scores


# --------------------------------------------------------------------- what a run was made of
def inputs_of(cases):
    """What each case was made of, for a later run to compare with.

    -> {name: {"sha256": of its raw scans, "label_sha256", "shape": of the prepared volume}}."""
    inputs = {}
    for case in cases:
        first = case.volumes[0]
        inputs[case.name] = {
            "sha256": [volume.sha256 for volume in case.volumes],
            "label_sha256": first.label_sha256,
            "shape": first.shape,
        }
    return inputs


def check_inputs(folder, inputs):
    """Raises UserError if the folds of a run folder were made of other files than `inputs`.

    inputs: {"ckpt": checksum of the checkpoint that its folds start from, or None; where networks
    of another run are evaluated, {fold: checksum of its network}; "cases": inputs_of}.
    -> inputs as they are to be written down in inputs.json, and lines to print."""
    path = os.path.join(folder, "inputs.json")
    if not os.path.exists(path):
        # A run folder of an earlier version: what it was made of stays unknown.
        cases = {name: dict.fromkeys(parts, "") for name, parts in inputs["cases"].items()}
        line = (f"{folder} has folds of an earlier version, which did not record their scans and "
                "labels: whether these have changed since is not known")
        return {"ckpt": "", "cases": cases}, [line]
    try:
        before = json.loads(checkpoint.read_text(path))
    except ValueError:
        raise UserError(f"{path} is damaged: new --out") from None

    # Neither the cases nor the weights may have changed since.
    checkpoint.check_same_inputs(f"{folder} has folds of other data", before["cases"],
                                 inputs["cases"])
    if isinstance(inputs["ckpt"], dict):
        check_networks(folder, before["ckpt"] or {}, inputs["ckpt"])
    elif before["ckpt"] not in ("", inputs["ckpt"]):
        raise UserError(f"{folder} has folds that started from another --ckpt: the file has "
                        "changed since. New --out, or the old checkpoint")

    # What was not known when the folds were made stays unknown: today's files may be others.
    cases = {name: before["cases"].get(name, parts) for name, parts in inputs["cases"].items()}
    start = "" if before["ckpt"] == "" else inputs["ckpt"]
    unknown = []
    for name, parts in cases.items():
        if inputs["cases"][name]["label_sha256"] and not parts["label_sha256"]:
            unknown.append(name)
    lines = []
    if unknown:
        lines.append(f"the labels of {len(unknown)} cases were not recorded when the folds in "
                     f"{folder} were made, {unknown[0]} the first: whether they have changed since "
                     "is not known")
    return {"ckpt": start, "cases": cases}, lines


def check_networks(folder, before, now):
    """Raises UserError if a finished fold was evaluated with another network than is there now.

    before, now: {fold: checksum of its network}."""
    for fold, digest in now.items():
        finished = os.path.exists(os.path.join(folder, f"fold_{fold}", "dice.json"))
        if finished and before.get(fold, digest) != digest:
            raise UserError(f"{folder} has scores of another network of fold {fold} than "
                            "--networks holds now: new --out, or the old networks")


def networks_of(folder, folds):
    """{fold: checksum of its network} of those that a run folder has."""
    networks = {}
    for fold in range(folds):
        path = os.path.join(folder, f"fold_{fold}", "last.pt")
        if os.path.exists(path):
            networks[str(fold)] = checkpoint.checksum(path)
    return networks


def files_of(case):
    """All files of a prepared case that training and evaluation read."""
    return [*case.images, case.label, data.native_of(case.label), data.geometry_of(case.images[0])]


# ------------------------------------------------------------------- label values, foreground
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


# --------------------------------------------------------------- sessions, sequences and files
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
    sessions = data.sessions_of(task.data, task.source)
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
    for key, session in data.sessions_of(task.data, task.source).items():
        labelled = any(has_label(session.get(sequence, ())) for sequence in task.sequences)
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
