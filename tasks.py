"""A task (paper, section 4.1): folds, how a case is scored, what the index tells before the first step."""

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
    networks: str | None = None  # evaluate the networks finetuned for that task instead of training any
    source: str | None = None  # take cases of this source only
    ignore: tuple[int, ...] = ()  # label values that neither loss nor score looks at
    regions: dict = dataclasses.field(default_factory=dict)  # name -> class numbers, scored as their union
    n_train: int = 20  # subjects to train on; section 4.1
    folds: int = 6  # section 4.1; 0: leave one subject out, a fold each
    evaluate: str = "rest"  # rest: the other training subjects (n_cv); test: the test split (n_test)
    sites: bool = False  # subjects are named <site>_<number>; sites that were not trained on are scored apart


def read_task(name):
    """A task by name or path; UserError lists the known ones."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "tasks")
    path = name if name.endswith((".yaml", ".yml")) else os.path.join(folder, f"{name}.yaml")
    if not os.path.exists(path):
        known = ", ".join(sorted(os.path.splitext(file)[0] for file in os.listdir(folder)))
        raise UserError(f"no task {name!r}: give a path to a task file, or one of {known}")
    task = config.build_config(Task, config.read_yaml(Task, path))
    found, numbers = list(task.labels.values()), list(range(len(task.classes)))
    if any(value not in numbers for value in found) or any(number not in found for number in numbers):
        raise UserError(f"{path}: labels must map onto the class numbers 0 to {len(task.classes) - 1}")
    if not all(str(value).isdigit() and int(value) < 256 for value in (*task.labels, *task.ignore)):
        raise UserError(f"{path}: labels maps label values, 0 to 255, to class numbers; ignore lists values")
    if not all(isinstance(region, list) and all(n in numbers for n in region)
               for region in task.regions.values()):
        raise UserError(f"{path}: a region is a list of class numbers, as [1, 2]")
    if task.evaluate not in ("rest", "test"):
        raise UserError(f"{path}: evaluate {task.evaluate!r}: choose rest or test")
    return os.path.splitext(os.path.basename(path))[0], task


def make_folds(name, task, cases):
    """Fold f: the subjects permuted by (task, f), the first n_train to train on; the rest, or the test split,
    to evaluate. Leave-one-out takes every subject, held out or not. The paper's own folds were not released.

    -> [{"train": [case names], "evaluate": [case names]}]."""
    held = {c.subject for c in cases if c.volumes[0].split == "test"} if task.folds else set()
    pool = sorted({c.subject for c in cases} - held)
    n_train = task.n_train if task.folds else len(pool) - 1
    if not 0 < n_train <= len(pool) - (task.evaluate == "rest"):
        most = len(pool) - (task.evaluate == "rest")
        raise UserError(f"task {name} trains on {task.n_train} subjects and needs more, but {task.data} has "
                        f"{len(pool)} with labels" + (f": --n_train {most} or less" if most > 0 else ""))
    if task.evaluate == "test" and not held:
        raise UserError(f"task {name} evaluates the split test, of which {task.data} has no labelled case")
    folds = []
    for f in range(task.folds or len(pool)):
        if task.folds:
            order = np.random.default_rng(data.derive_seed(name, f)).permutation(len(pool))
            chosen = {pool[i] for i in order[:n_train]}
        else:
            chosen = set(pool) - {pool[f]}
        rest = held if task.evaluate == "test" else set(pool) - chosen
        folds.append({"train": [c.name for c in cases if c.subject in chosen],
                      "evaluate": [c.name for c in cases if c.subject in rest]})
    return folds


def site(case):
    """Scanner of a WMH case: Amsterdam-GE3T of the subject wmh/Amsterdam-GE3T_100."""
    return case.subject.split("/")[-1].rpartition("_")[0]


def sites_of(task, cases):
    """The scanners of a task's training pool, None where it has no sites."""
    if not task.sites:
        return None
    return sorted({site(case) for case in cases if case.volumes[0].split != "test"})


def classes_of(truth, task):
    """A source's label values -> class numbers, IGNORE where the task ignores the value. UserError for a
    value that it does not name."""
    values = np.asarray(truth).astype(np.uint8)
    true = data.class_table(task["labels"], task["ignore"])[values]
    unknown = np.unique(truth[(values != truth) | (true == data.UNKNOWN)])
    if len(unknown):
        raise UserError(f"the true label map holds {unknown[0]:g}, which the task's labels do not name")
    return true


def score_case(classes, truth, task, affine):
    """Classes and the source's label values on one grid -> {key of SCORES: {class or region: value}}.

    Voxels that the task ignores are taken out of both masks. UserError for a value that it does not name."""
    true = classes_of(truth, task)
    regions = {name: (number,) for number, name in enumerate(task["classes"]) if number}
    regions |= {name: tuple(numbers) for name, numbers in task["regions"].items()}
    counted, spacing = true != data.IGNORE, nib.affines.voxel_sizes(np.asarray(affine))
    found = {name: metrics.score(np.isin(classes, numbers) & counted, np.isin(true, numbers), spacing)
             for name, numbers in regions.items()}
    return {kind: {name: scores[kind] for name, scores in found.items()} for kind in metrics.SCORES}


# ------------------------------------------------------------------ what a run was made of
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
    """UserError if the folds of a run folder were made of other files than inputs, as inputs.json
    has them: {"ckpt": checksum of the checkpoint they start from, or None; where the networks of
    another run are evaluated, {fold: checksum of its network}; "cases": inputs_of}.

    -> inputs as they are to be written down, and lines to print. What was not known when the folds
    were made stays unknown: today's files may be others."""
    path = os.path.join(folder, "inputs.json")
    if not os.path.exists(path):  # a run folder of an earlier version: nothing to compare
        unknown = {name: dict.fromkeys(parts, "") for name, parts in inputs["cases"].items()}
        return {"ckpt": "", "cases": unknown}, [
            f"{folder} has folds of an earlier version, which did not record their scans and labels: "
            "whether these have changed since is not known"]
    try:
        then = json.loads(checkpoint.read_text(path))
    except ValueError:
        raise UserError(f"{path} is damaged: new --out") from None

    checkpoint.check_same_inputs(f"{folder} has folds of other data", then["cases"], inputs["cases"])
    if isinstance(inputs["ckpt"], dict):
        check_networks(folder, then["ckpt"] or {}, inputs["ckpt"])
    elif then["ckpt"] not in ("", inputs["ckpt"]):
        raise UserError(f"{folder} has folds that started from another --ckpt: the file has "
                        "changed since. New --out, or the old checkpoint")

    cases = {name: then["cases"].get(name, parts) for name, parts in inputs["cases"].items()}
    start = then["ckpt"] if then["ckpt"] == "" else inputs["ckpt"]
    lines = []
    unknown = [name for name, parts in cases.items()
               if inputs["cases"][name]["label_sha256"] and not parts["label_sha256"]]
    if unknown:
        lines = [f"the labels of {len(unknown)} cases were not recorded when the folds in {folder} were "
                 f"made, {unknown[0]} the first: whether they have changed since is not known"]
    return {"ckpt": start, "cases": cases}, lines


def check_networks(folder, then, now):
    """UserError if a fold that is finished was evaluated with another network than is there now."""
    for fold, digest in now.items():
        finished = os.path.exists(os.path.join(folder, f"fold_{fold}", "dice.json"))
        if finished and then.get(fold, digest) != digest:
            raise UserError(f"{folder} has scores of another network of fold {fold} than --networks holds "
                            "now: new --out, or the old networks")


def networks_of(folder, folds):
    """{fold: checksum of its network} of those that a run folder has."""
    paths = {str(fold): os.path.join(folder, f"fold_{fold}", "last.pt") for fold in range(folds)}
    return {fold: checkpoint.checksum(path) for fold, path in paths.items() if os.path.exists(path)}


def files_of(case):
    """All files of a prepared case that training and evaluation read."""
    return [*case.images, case.label, data.native_of(case.label), data.geometry_of(case.images[0])]


# ------------------------------------------------------------------------ label values
@functools.cache
def parse_values(text):
    """"0:87120/87040 1:257/254", as the index has label values -> {0: (87120, 87040), 1: ...}.

    ValueError if it is written otherwise."""
    counts = {}
    for word in text.split():
        value, native, prepared = map(int, word.replace("/", ":").split(":"))
        counts[value] = native, prepared
    return counts


def values_of(volume):
    """Label values of a prepared volume: {value: (voxels on the scan's own grid, at 1 mm)}.

    {} if an earlier version prepared it, which did not count."""
    try:
        return parse_values(volume.label_values)
    except ValueError:
        raise UserError(f"the index has the label values {volume.label_values!r} for "
                        f"{volume.path}: prepare it again") from None


def check_values(path, task, cases):
    """UserError for a label value that the task does not name: training would stop at it, or
    the evaluation after it."""
    named = {int(value) for value in (*task.labels, *task.ignore)}
    holders = {}
    for case in cases:
        for value in set(values_of(case.volumes[0])) - named:
            holders.setdefault(value, []).append(case)
    if not holders:
        return

    # The lines that would name them, as a task file has them.
    labels = {int(value): number for value, number in task.labels.items()}
    labels |= dict.fromkeys(sorted(holders), max(labels.values()))
    labels = ", ".join(f"{value}: {number}" for value, number in labels.items())
    ignore = sorted({*map(int, task.ignore), *holders})

    value = min(holders)
    first = holders[value][0]
    voxels, _ = values_of(first.volumes[0])[value]
    raise UserError(
        f"{first.name} has {voxels} voxels of label value {value}, which task {path} does not name "
        f"(values without a name: {', '.join(map(str, sorted(holders)))}; cases with {value}: "
        f"{len(holders[value])}). Write there `labels: {{{labels}}}`, with the class you want, or "
        f"`ignore: {ignore}`")


def foreground(task, case):
    """Voxels of a case in each class but the background: {class number: (native, at 1 mm)}.

    None if an earlier version prepared it."""
    counts = values_of(case.volumes[0])
    if not counts:
        return None

    classes = {int(value): number for value, number in task.labels.items()}
    found = {number: (0, 0) for number in range(1, len(task.classes))}
    for value, (native, prepared) in counts.items():
        number = classes.get(value, 0)
        if number and value not in task.ignore:
            before = found[number]
            found[number] = before[0] + native, before[1] + prepared
    return found


def check_foreground(task, cases, folds):
    """Cases and training sets that lack a class, as lines to print. cases: {name: case}.

    UserError for a fold whose training cases are all empty: it could only learn background."""
    known = {}
    for name, case in cases.items():
        found = foreground(task, case)
        if found is not None:
            known[name] = found
    lines = []

    empty, lost = [], 0
    for name, found in known.items():
        if not any(prepared for _, prepared in found.values()):
            empty.append(name)
            lost += any(native for native, _ in found.values())
    if empty:
        line = f"{len(empty)} of {len(cases)} cases have no foreground voxel, {empty[0]} the first"
        lines.append(f"{line}; {lost} of them had some on the scan's own grid" if lost else line)

    lacking = {title: [] for title in task.classes[1:]}
    for number, fold in enumerate(folds):
        trained = fold["train"]
        if not set(trained) <= set(known):
            continue
        if set(trained) <= set(empty):
            raise UserError(
                f"fold {number} would be trained on no foreground at all: none of its "
                f"{len(trained)} label maps holds any, {trained[0]} the first. Are these the "
                "right ones?")
        for index, title in enumerate(task.classes[1:], start=1):
            if not any(known[name][index][1] for name in trained):
                lacking[title].append(str(number))
    for title, numbers in lacking.items():
        if numbers:
            lines.append(f"{title}: no voxel to train on in fold {', '.join(numbers)}")
    return lines


# ------------------------------------------------------------------ sessions, sequences, files
def usable(task):
    """What a task may take from its folder: {(source, subject, session): {sequence: volume}}.

    Of two volumes of a sequence it is the one with a label, as in data.labelled_cases."""
    sessions = {}
    for volume in sorted(data.read_index(task.data), key=lambda volume: not volume.label):
        if task.source in (None, volume.source) and volume.split != "pretrain":
            key = volume.source, volume.subject, volume.session
            sessions.setdefault(key, {}).setdefault(volume.sequence, volume)
    return sessions


def describe(key, found):
    """One session, as "s1 session 2: FLAIR 40x40x40 (voxels of 1x1x1 mm) with a label"."""
    _, subject, session = key
    volumes = []
    for sequence, volume in sorted(found.items()):
        labelled = "with a label" if volume.label else "without"
        volumes.append(f"{sequence} {volume.shape} (voxels of {volume.spacing} mm) {labelled}")
    who = f"{subject} session {session}" if session else subject
    return f"{who}: {', '.join(volumes)}"


def counted(counter):
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def why_none(task):
    """Why a folder has no case for a task, in one line."""
    start = f"{task.data} has no labelled case with {', '.join(task.sequences)}"
    volumes = data.read_index(task.data)
    if task.source:
        start += f" of source {task.source}"
        sources = Counter(volume.source for volume in volumes)
        if task.source not in sources:
            return f"{start}: its sources, with their volumes, are {counted(sources)}"

    sessions = usable(task)
    labelled = Counter()
    for found in sessions.values():
        labelled.update(name for name, volume in found.items() if volume.label)
    if not labelled:
        aside = sum(bool(volume.label) for volume in volumes if volume.split == "pretrain")
        but = f" but {aside} of the split pretrain, which no task takes" if aside else ""
        return f"{start}: none of its {len(volumes)} volumes has a label{but}"

    # A name that is written otherwise, or not there.
    start = f"{start}; with a label it has {counted(labelled)}"
    for name in task.sequences:
        known = {other.lower(): other for other in labelled}
        near = difflib.get_close_matches(name.lower(), known, n=1)
        if name not in labelled and near:
            return f"{start}. Is {name} meant to be {known[near[0]]}?"

    # No session has them all with the label: most often its grid fits one of them alone.
    def shared(key):
        return len(set(task.sequences) & set(sessions[key]))

    some = [key for key in sessions if any(volume.label for volume in sessions[key].values())]
    key = max(some, key=shared)
    return (f"{start}. A label counts for the scans on its own grid: register and resample the "
            f"others. {describe(key, sessions[key])}")


def left_out(task, cases):
    """Labelled sessions that lack one of the sequences, as lines to print."""
    if len(task.sequences) == 1:
        return []

    taken = set()
    for case in cases:
        first = case.volumes[0]
        taken.add((first.source, first.subject, first.session))
    rest = {}
    for key, found in usable(task).items():
        labelled = any(name in found and found[name].label for name in task.sequences)
        if labelled and key not in taken:
            rest[key] = found
    if not rest:
        return []
    first = min(rest)
    return [f"{len(rest)} labelled sessions are left out: they lack one of "
            f"{', '.join(task.sequences)} on the label's grid. {describe(first, rest[first])}"]


def check_grids(cases):
    """UserError if channels of a case differ in shape, as where a part of it was prepared again."""
    for case in cases:
        shapes = {volume.sequence: volume.shape for volume in case.volumes}
        if len(set(shapes.values())) > 1:
            shapes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise UserError(f"the channels of {case.name} differ in shape ({shapes}): prepare it "
                            "again")


def same_files(cases):
    """Raw files that several subjects share, as lines to print: they may be trained on and
    evaluated."""
    subjects = {}
    for case in cases:
        for volume in case.volumes:
            subjects.setdefault(volume.sha256, set()).add(case.subject)
    shared = [sorted(names) for names in subjects.values() if len(names) > 1]
    if not shared:
        return []
    return [f"{len(shared)} scans are the same file under several subjects, "
            f"{' and '.join(min(shared))} the first: what is trained on may be evaluated"]


def other_labels(cases):
    """Cases whose channels have label files of their own, which differ, as lines to print."""
    cases = [case.name for case in cases
             if len({volume.label_sha256 for volume in case.volumes}) > 1]
    if not cases:
        return []
    return [f"{len(cases)} cases have another label map for each sequence, {cases[0]} the first: "
            "that of the task's first sequence is taken"]
