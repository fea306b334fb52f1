"""The folds of a run (paper, section 4.1): which of them are left, how a fold's cases are segmented
on their own grid and scored, and what all folds say together."""

import dataclasses
import functools
import json
import os

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import checks
import data
import metrics
import pictures
import predict
import scans
import scoring
import tasks
import training
from config import UserError


# ------------------------------------------------------------------------------- what is left
def names_in(folds):
    """The names of all cases that these folds train on or evaluate."""
    names = set()
    for fold in folds:
        names.update(fold["train"], fold["evaluate"])
    return names


def folds_left(out, chosen, task, folds, cases, estimate):
    """The chosen folds (None: those with a number) that are not finished, {fold: its folder}.

    UserError if there is no such fold, if a file that one of them needs is missing, or if nothing
    is left to train for an estimate."""
    chosen = range(len(folds)) if chosen is None else chosen
    every = tuple(chosen) == (tasks.EVERY,)
    if every and task.networks:
        raise UserError(f"folds all: this task has no networks of its own, but those of "
                        f"{task.networks}; name that task")
    if not every and not set(chosen) <= set(range(len(folds))):
        words = ",".join(map(str, chosen))
        raise UserError(f"folds {words}: the task has the folds 0 to {len(folds) - 1}; or all, "
                        "alone")

    # A fold is finished when it has its scores. That of all cases has none.
    folders = {fold: os.path.join(out, f"fold_{fold}") for fold in chosen}
    left = {fold: folder for fold, folder in folders.items()
            if not os.path.exists(os.path.join(folder, "dice.json"))}
    if estimate and (task.networks or not left):
        raise UserError("nothing is left to train, so there is nothing to estimate")

    # A missing file would stop the run only when its turn comes.
    needed = set()
    for fold in left:
        needed.update(*tasks.cases_of_fold(folds, fold, cases.values()))
    checks.check_files(task.data, [path for name in needed for path in tasks.files_of(cases[name])])
    return left


def open_folder(out, files, left, processes):
    """Process 0 locks the folders of the folds that are left, until it ends, and writes the files
    of the run folder, {name: text}."""
    with training.stop_all_on_error():
        if processes.rank == 0:
            for folder in left.values():
                checkpoint.lock(folder)
            for name, text in files.items():
                checkpoint.write_text(os.path.join(out, name), text)


# ----------------------------------------------------------------------------------- one fold
def load_fold(run_folder, fold, task, train, device):
    """The finished network of a fold of another run, in evaluation mode, and its checkpoint.

    train: the training cases of this fold here. The network must have been trained on the same
    ones, while those to evaluate are this task's own. Raises UserError if it was not."""
    path = os.path.join(run_folder, f"fold_{fold}", "last.pt")
    with training.stop_all_on_error():
        model, saved = predict.load_network(path, device)

        # It must be finished.
        if saved["step"] < saved["config"]["steps"]:
            raise UserError(f"{path} is at step {saved['step']}: finish task {task.networks} first")

        # It must know the same classes and sequences, from the same cases.
        theirs = saved["task"]["classes"], saved["task"]["sequences"], saved["cases"]
        if theirs != (task.classes, task.sequences, [case.name for case in train]):
            raise UserError(f"{path} has other classes or sequences, or was trained on other cases "
                            f"than {task.data} gives for this fold")
        checkpoint.check_same_inputs(f"{path} was trained on other data", saved.get("inputs", {}),
                                     tasks.inputs_of(train),
                                     f"finetune {task.networks} again, or the old data")
    return model, saved


def segmenter(model, run_folder, fold, batch, **window):
    """The function (volume, geometry) -> classes of a fold's network, and what it is made by.

    run_folder: of the fold's last.pt; without it, what made the classes is None. window: how
    predict.segment moves over a scan. batch: windows at once, which change only rounding."""
    segment = functools.partial(predict.segment, model.eval(), batch=batch, **window)
    path = os.path.join(run_folder, f"fold_{fold}", "last.pt")
    made_by = [checkpoint.checksum(path), window] if os.path.exists(path) else None
    return segment, made_by


def evaluate_fold(segment, task, seen, cases, folder, made_by, processes, stop, scorers):
    """All scores of every case on the scan's own grid; the processes take turns.

    -> a record for each case, in the order of their names, or None if a signal stopped it.
    segment(volume, geometry) gives classes. seen: what finetune.data_seen says of the network.
    made_by: the network and the settings of `segment`, for scoring.Kept. scorers: processes that
    score beside the network; 0: this one scores."""
    # A pretraining may have seen 45,000 files: sets, since each case is looked up in them.
    seen = {key: None if seen[key] is None else set(seen[key]) for key in ("subjects", "sha256")}

    share = {case.name: case for case in cases[processes.rank::processes.world]}
    kept = scoring.Kept(folder, made_by)
    made_of = {}
    records = {}

    def done(name, record):
        records[name] = record
        kept.write(name, made_of[name], record)

    beside = scoring.Scorers(scorers, done)
    with training.stop_all_on_error():
        for name, case in tqdm(share.items(), disable=processes.rank != 0,
                               desc=f"{folder} evaluate"):
            # A signal is heeded between two cases.
            if stop.is_set():
                break

            try:
                # What was scored before the evaluation was cut off is scored.
                made_of[name] = ingredients(case, task)
                known = kept.read(name, made_of[name])
                if known:
                    records[name] = known
                    continue

                volume, geometry = data.read_scan(case)
                classes = segment(volume, geometry)
            except (UserError, *scans.READ_ERRORS) as error:
                raise UserError(f"cannot evaluate {name}: {error}") from None
            beside.begin(name, score, case, task, seen, classes, geometry)
        beside.wait()

    # A fold that one process left unfinished has no scores.
    stopped, = training.any_process(stop.is_set())
    if stopped:
        return None

    # Each process gets the records of all.
    shares = [None] * processes.world
    dist.all_gather_object(shares, list(records.values()))
    records = [record for share in shares for record in share]
    return sorted(records, key=lambda record: record["case"])


def ingredients(case, task):
    """What the record of a case is made of, beside the network: its files and the task."""
    # The folder of the data may move.
    rules = dataclasses.asdict(task) | {"data": None}
    label = checkpoint.checksum(data.native_of(case.label))
    return [case.subject, tasks.inputs_of([case]), label, rules]


def score(case, task, seen, classes, geometry):
    """Read the true label map of a case and score its segmentation -> its record."""
    truth = data.read_truth(case, geometry)
    scores = tasks.score_case(classes, truth, dataclasses.asdict(task), geometry["affine"])
    return record_of(case, task, seen, scores)


def record_of(case, task, seen, scores):
    """What dice.json says of a case: its files, whether the network has seen it, its scores."""
    # Files of others do not say what they have seen: then it is not known.
    same_scan = any(volume.sha256 in (seen["sha256"] or ()) for volume in case.volumes)
    known = None
    if seen["sha256"] is not None:
        known = same_scan or case.subject in (seen["subjects"] or ())

    made_of = tasks.inputs_of([case])[case.name]
    record = {"case": case.name, "subject": case.subject, "sha256": made_of["sha256"],
              "label_sha256": made_of["label_sha256"], "seen": known, "same_scan": same_scan,
              "site": tasks.site(case) if task.sites else None}

    for kind, values in scores.items():
        record[kind] = {name: metrics.rounded(value) for name, value in values.items()}
    return record


def write_scores(folder, records, processes):
    """dice.json of a fold, by process 0: with it, the fold is finished."""
    with training.stop_all_on_error():
        if processes.rank == 0:
            path = os.path.join(folder, "dice.json")
            checkpoint.write_text(path, json.dumps(records, indent=1))

    # The records of single cases have served. Every node may have a disk of its own.
    scoring.Kept(folder, None).remove()


def end_without_scores(folder, processes, estimate):
    """What is left to do for a network on all cases, once it is trained."""
    if processes.rank == 0 and not estimate:
        pictures.at_end(folder, [folder], scored=False)
        print(f"{folder}/last.pt was trained on all cases: none is left to score it")


def say_cost(cases, seconds, processes):
    """Print what the evaluation of `cases` cases will cost, if one of them took `seconds`."""
    if processes.rank == 0:
        hours = cases * seconds / processes.world / 3600
        print(f"evaluation {seconds:.3g} s a case; {cases} cases: {hours:.2f} hours more")


# ---------------------------------------------------------------------------------- all folds
def about_run(settings, name, task, cases, build, origin, seen):
    """What dice.json says of a run beside its scores.

    build() makes the network. origin, seen: of the weights it starts from, as finetune.py says."""
    # On the device meta there are shapes, but no numbers: a network takes no time.
    with torch.device("meta"):
        params = sum(weight.numel() for weight in build().parameters())

    return {"task": name, "model": settings["model"], "ckpt": settings["ckpt"],
            "augment": settings["augment"], "params": params, "origin": origin,
            "classes": task.classes[1:], "regions": list(task.regions),
            "sites": tasks.sites_of(task, cases), "pretraining": seen["pretraining"],
            "config": settings}


def write_summary(out, about, folds):
    """dice.json and summary.md of the folds that are done, in this run or in others beside it.

    about: what dice.json says beside the scores. folds: all folds of the task."""
    # Other folds may be done by other processes, in the same folder.
    done = {}
    for fold in range(len(folds)):
        path = os.path.join(out, f"fold_{fold}", "dice.json")
        if os.path.exists(path):
            done[fold] = json.loads(checkpoint.read_text(path))

    # The table is of the folds that are done, and made again with each.
    if done:
        about = about | {"folds": done}
        summary = metrics.summarise(about, folds)
        checkpoint.write_text(os.path.join(out, "dice.json"), json.dumps(about, indent=1))
        checkpoint.write_text(os.path.join(out, "summary.md"), summary)
        print(summary)
        pictures.at_end(out, [os.path.join(out, f"fold_{fold}") for fold in done], scored=True)
    if len(done) < len(folds):
        print(f"{len(done)} of {len(folds)} folds done; the same command goes on")
