"""A task (paper, section 4.1): its folds, how a case is scored, what a run of it was made of and
found, and its cases in a prepared folder."""

import dataclasses
import json
import os
from collections import Counter, defaultdict

import nibabel as nib
import numpy as np

import checkpoint
import config
import data
import distances
import metrics
import sources
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

    # The task is named after its file.
    task = config.build_config(Task, config.read_yaml(Task, path), path)
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

    # A region is scored as the union of its classes.
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
        # The seed is of the task and the fold alone: every run of the task has the same folds.
        if leave_one_out:
            trained = set(pool) - {pool[fold]}
        else:
            order = np.random.default_rng(data.derive_seed(name, fold)).permutation(len(pool))
            trained = {pool[i] for i in order[:n_train]}

        rest = test if task.evaluate == "test" else set(pool) - trained
        folds.append({"train": [case.name for case in cases if case.subject in trained],
                      "evaluate": [case.name for case in cases if case.subject in rest]})
    return folds


EVERY = "all"  # in place of a fold's number: one network on all cases, for use


def cases_of_fold(folds, fold, cases):
    """Names of the cases that a fold trains on, and of those that it evaluates.

    folds: of make_folds. fold: a number, or EVERY: all labelled cases outside the test split, and
    none to evaluate. cases: all of the task."""
    if fold == EVERY:
        return [case.name for case in cases if case.volumes[0].split != "test"], []
    return folds[fold]["train"], folds[fold]["evaluate"]


# ------------------------------------------------------------------------------------------ scoring
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
    spacing = nib.affines.voxel_sizes(np.asarray(affine))

    targets = targets_of(task)

    # Nothing lies beyond the box of what either calls foreground, unless the background is scored.
    if all(0 not in numbers for numbers in targets.values()):
        box = distances.box_of((classes > 0) | (true > 0))
        classes, true = classes[box], true[box]

    # An ignored voxel has no class, in the truth as in the prediction.
    true = np.ascontiguousarray(true)
    classes = np.where(true == data.IGNORE, np.uint8(data.IGNORE), classes)

    scores = {kind: {} for kind in metrics.SCORES}
    for name, numbers in targets.items():
        found = metrics.score(union(classes, numbers), union(true, numbers), spacing)
        for kind in metrics.SCORES:
            scores[kind][name] = found[kind]
    return scores


def targets_of(task):
    """What is scored: {name: class numbers} of each class but the background, and of each region, a
    union of classes. task: a Task as a dict."""
    targets = {name: (number,) for number, name in enumerate(task["classes"]) if number > 0}
    return targets | {name: tuple(numbers) for name, numbers in task["regions"].items()}


def union(classes, numbers):
    """The voxels of an array that have one of these class numbers, as bool. (np.isin is slower.)"""
    mask = np.zeros(classes.shape, bool)
    for number in numbers:
        mask |= classes == number
    return mask


# --------------------------------------------------------------------------- what a run was made of
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


# --------------------------------------------------------------------------------- what a run found
def read_json(folder, name):
    """A file of a run folder. UserError if it is missing or damaged."""
    # The folder may hold anything: it is named on the command line.
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)
    except OSError:
        raise UserError(f"{folder} has no {name}: no run folder of finetune.py, or "
                        "unfinished") from None
    except ValueError:
        raise UserError(f"{folder}/{name} is damaged; finetune.py run again rewrites it") from None


def read_run(folder):
    """dice.json of a run folder, with `path` and, from folds.json, `assignment` of cases to folds.

    UserError if a file is missing or damaged, or no fold is finished."""
    assignment = read_json(folder, "folds.json")
    run = read_json(folder, "dice.json")
    if not run["folds"]:
        raise UserError(f"{folder} has no finished fold")
    return run | {"path": folder, "assignment": assignment}


# ---------------------------------------------------------------------------- its cases in a folder
def sessions_of(folder, source):
    """What a task may take from a folder: {(source, subject, session): {sequence: its volumes}}.

    These are the volumes of one source, or of all where source is None, without those of the split
    pretrain, which the paper sets aside (63 of ISLES22). A sequence may have been scanned several
    times in a session, and each of these runs is a volume."""
    sessions = defaultdict(lambda: defaultdict(list))
    for volume in data.read_index(folder):
        if source not in (None, volume.source) or volume.split == "pretrain":
            continue
        session = sessions[volume.source, volume.subject, volume.session]
        session[volume.sequence].append(volume)
    return sessions


def labelled_cases(folder, source, sequences):
    """A Case for each session that has all of `sequences` with a label: these are its channels.

    Raises UserError if two sources have a case of one name."""
    cases = []
    for (origin, subject, number), session in sorted(sessions_of(folder, source).items()):
        # The runs of each sequence that have a label.
        runs = []
        for sequence in sequences:
            volumes = runs_of(session, sequence)
            runs.append([volume for volume in volumes if volume.label])
        if not all(runs):
            continue

        # A case is named after its subject, and its session if that has a name.
        name = "_".join(part for part in (subject, number) if part)
        channels = choose_channels(runs)
        images = tuple(os.path.join(folder, volume.path) for volume in channels)
        label = os.path.join(folder, channels[0].label)
        cases.append(data.Case(name, f"{origin}/{subject}", images, label, channels))

    # A run files its scores under the names of its cases.
    counts = Counter(case.name for case in cases)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"{folder} has {name} in several sources: name one in the task, as "
                            "`source`")
    return cases


def runs_of(session, sequence):
    """A session's volumes of a sequence, whose usual name counts, too: flair finds FLAIR."""
    usual = sources.usual_names().get(sequence.lower(), sequence)
    return session.get(sequence) or session.get(usual, [])


def choose_channels(runs):
    """One volume for each sequence, out of the labelled runs of each.

    Every run may have a label map of its own. Runs of one label map belong together, so the label
    map is chosen that most of the sequences share; of several such, the first."""
    choices = []
    for first in runs[0]:
        # Of every other sequence, the run with the same label map, or else its first.
        channels = [first]
        for volumes in runs[1:]:
            same = [volume for volume in volumes if volume.label_sha256 == first.label_sha256]
            channels.append(same[0] if same else volumes[0])
        choices.append(tuple(channels))

    def sharing(channels):
        return sum(volume.label_sha256 == channels[0].label_sha256 for volume in channels)

    return max(choices, key=sharing)
