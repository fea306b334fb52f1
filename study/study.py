"""The paper in miniature: which runs there are, and running those that are left.

    make study                      # all of it; the same command goes on
    make study DRY=1                # what would run, with the estimated hours
    python study/study.py --only b   # the runs of one claim
    python study/study.py --size gpu --device cuda

Each run is one command: pretrain.py, finetune.py, or in this folder frozen.py, scaled.py,
renewed.py, moved.py.
Everything it makes lies under study/work. What it found is kept as study/results/<name>.json, and
report.py makes study/RESULTS.md of these. A run whose result is there is done; one that was cut off
goes on from its last checkpoint. Another size has folders of its own, as study/work_gpu.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import cohort  # noqa: E402

import checkpoint  # noqa: E402
import state  # noqa: E402

WORK = os.path.join(HERE, "work")
RESULTS = os.path.join(HERE, "results")
DATA = os.path.join(HERE, "data")

# What the size changes. `tuning`: steps of finetuning.
SIZES = {
    "cpu": {"features": 16, "batch": 2, "lr": 1e-3, "precision": "fp32", "steps": 3200,
            "tuning": 200},
    "gpu": {"features": 32, "batch": 8, "lr": 1e-3, "precision": "bf16", "steps": 6000,
            "tuning": 400},
}
LABELS = (3, 5, 10, 20)  # labelled scans to train on
FOLDS = 6
PATCH = 32  # voxels: a whole head

# The task of most claims: lesions in scans of nearly one contrast, as those of the paper's tasks.
TASK = "lesion"


class Run(NamedTuple):
    name: str
    claims: str  # the letters of the claims that need it
    script: str
    settings: dict
    minutes: float  # of one core, an estimate, for the size "cpu"
    needs: "Run | None" = None  # the run that must be done before


def pretraining(name, claims, size, minutes=3.5, part=4, **changes):
    """part: the longest pretraining has so many times as many steps."""
    steps = size["steps"] // part
    settings = {
        "data": os.path.join(DATA, "unlike"), "model": "unet_demo", "features": size["features"],
        "skips": "true", "patch_size": PATCH, "precision": size["precision"],
        "batch_size": size["batch"], "steps": steps, "warmup_epochs": 0.25, "lr": size["lr"],
        "val_fraction": 0.1, "val_every": steps // 8, "log_every": steps // 40,
        "save_every": 400, "workers": 1}
    return Run(f"pretrain-{name}", claims, "pretrain.py", settings | changes, minutes)


def untrained(name, claims, size, minutes=0.1, **changes):
    """What a pretraining with these changes begins with, as a run of one step of warmup, which
    changes the weights by a ten-thousandth."""
    return pretraining(name, claims, size, minutes, part=size["steps"], val_every=1, log_every=1,
                       **changes)


def name_of_finetuning(start, task, n_train, preset, form=""):
    """start: the name of a pretraining, without pretrain-, or scratch."""
    name = f"{task}-{n_train}-{preset}-{start}"
    return f"{form}-{name}" if form else name


def finetuning(start, task, n_train, preset, claims, size, minutes=6.5, form=""):
    """Six folds. start: a pretraining, or None for scratch. form: "", or how the encoder is
    treated: frozen, scaled or renewed (study/<form>.py)."""
    scans = "alike" if task == TASK else "unlike"
    settings = {
        "task": os.path.join(HERE, f"{task}.yaml"), "data": os.path.join(DATA, scans),
        "n_train": n_train, "augment": preset, "steps": size["tuning"], "patch_size": PATCH,
        "batch_size": 2, "lr": 2e-3, "overlap": 0, "precision": size["precision"],
        "workers": 1, "scorers": 0, "save_every": 200}
    if start is None:
        word = "scratch"
        settings |= {"model": "unet_demo", "features": size["features"]}
    else:
        word = start.name.removeprefix("pretrain-")
        settings |= {"ckpt": os.path.join(WORK, start.name, "last.pt")}
    name = name_of_finetuning(word, task, n_train, preset, form)
    script = f"study/{form}.py" if form else "finetune.py"
    return Run(name, claims, script, settings, minutes, start)


def all_runs(size):
    """The runs of all claims, those that say most first."""
    base = pretraining("base", "abcegijkl", size, minutes=13, part=1)
    without = pretraining("base-noskips", "abcegijkl", size, minutes=9, part=1, skips="false")
    runs = [base, without]

    # b: label efficiency, with the augmentation of the paper's finetuning.
    def efficiency(preset, starts, claims):
        return [finetuning(start, TASK, n, preset, claims, size) for n in (5, 20, 3, 10)
                for start in starts]

    runs += efficiency("spatial", (None, base, without), "bcegjkl")

    # i: what the encoder knows before it sees a label.
    runs += [finetuning(start, TASK, n, "spatial", "il", size, form="frozen") for n in (5, 20)
             for start in (None, base, without)]

    # j: what it costs that weights grow in pretraining.
    runs += [finetuning(start, TASK, n, "spatial", "j", size, form="scaled") for n in (5, 20)
             for start in (without, base)]

    # k: what the first level costs.
    runs += [finetuning(start, TASK, n, "spatial", "k", size, form="renewed")
             for start, numbers in ((without, (5, 20, 3, 10)), (base, (5,))) for n in numbers]

    # l: the same first weights without pretraining, and other first weights with it and without.
    for seed in (0, 1, 2):
        name = f"-seed{seed}" if seed else ""
        begun = untrained(f"untrained{name}", "l", size, seed=seed)
        runs += [begun, finetuning(begun, TASK, 5, "spatial", "l", size)]
        if seed:
            other = pretraining(f"base{name}", "al", size, minutes=13, part=1, seed=seed)
            runs += [other, finetuning(other, TASK, 5, "spatial", "l", size)]
        else:
            runs += [finetuning(begun, TASK, 20, "spatial", "l", size),
                     finetuning(begun, TASK, 5, "spatial", "l", size, form="frozen"),
                     finetuning(begun, TASK, 20, "spatial", "l", size, form="frozen")]

    # What pretraining varies, in a quarter of its length. c: the length. d, e, f, h: decoder,
    # skips, augmentation, mask.
    variants = [pretraining("quarter", "acdefh", size),
                pretraining("noskips", "ae", size, skips="false"),
                pretraining("augment-none", "af", size, augment="none"),
                pretraining("augmented-target", "af", size, augmented_target="true"),
                pretraining("standard", "ad", size, minutes=4.5, decoder="standard"),
                pretraining("length8", "ac", size, minutes=2, part=8),
                pretraining("augment-spatial", "af", size, augment="spatial"),
                pretraining("mask30", "ah", size, mask_ratio=0.3),
                pretraining("mask80", "ah", size, mask_ratio=0.8),
                pretraining("token2", "ah", size, token_size=2),
                pretraining("token8", "ah", size, token_size=8),
                pretraining("half", "ac", size, minutes=6.5, part=2)]
    for run in variants:
        runs += [run, finetuning(run, TASK, 5, "spatial", run.claims.strip("a"), size)]

    # g: what the networks of b do on other scans.
    for start in (None, base, without):
        tuned = finetuning(start, TASK, 5, "spatial", "bcegjkl", size)
        settings = {"run": os.path.join(WORK, tuned.name), "data": os.path.join(DATA, "elsewhere")}
        runs.append(Run(f"moved-{tuned.name}", "g", "study/moved.py", settings, 1, tuned))

    # b: other tasks, in which no contrast is seen twice, and all augmentations in finetuning.
    for task in ("white", "cortex"):
        for start in (None, base):
            runs.append(finetuning(start, task, 5, "spatial", "b", size))
    runs += efficiency("all", (None, base), "b")

    # a: other widths.
    for skips in ("true", "false"):
        name = "" if skips == "true" else "-noskips"
        runs += [pretraining(f"width8{name}", "a", size, minutes=2, features=8, skips=skips),
                 pretraining(f"width32{name}", "a", size, minutes=10, features=32, skips=skips)]
    return runs


# ------------------------------------------------------------------------------------ running them
def result_of(run, seconds):
    """What a run found, small enough to be kept, or None if it has not come to its end.

    seconds: that its last start took."""
    out = os.path.join(WORK, run.name)
    found = {"script": run.script, "settings": identity(run), "seconds": seconds}
    if run.script == "pretrain.py":
        records = state.read_log(out)
        keys = ("step", "val_masked", "val_masked_scaled", "val_masked_head", "val_fill",
                "val_fill_head", "val_mean_r", "weights", "seconds")
        found["log"] = [{key: record[key] for key in keys if key in record} for record in records
                        if "val_masked" in record]
        if not records or records[-1]["step"] < run.settings["steps"]:
            return None
    else:
        with open(os.path.join(out, "dice.json"), encoding="utf-8") as file:
            folds = json.load(file)["folds"]
        found["dice"] = {fold: {record["case"]: record["dice"] for record in records}
                         for fold, records in folds.items()}
        if len(folds) < FOLDS:
            return None
    return found


def is_done(run):
    """Is there a result of this very run, with the same settings from the first run on?"""
    path = os.path.join(RESULTS, f"{run.name}.json")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file)["settings"] == identity(run)


def runs_left(runs):
    """Runs without a result. Also runs whose networks one of these needs, if the networks are gone.

    Results are kept with the code, networks under study/work alone."""
    left = []
    needed = set()
    for run in reversed(runs):  # what a run starts from stands before it
        gone = run.name in needed and not has_networks(run)
        if gone or not is_done(run):
            left.insert(0, run)
            needed.add(run.needs.name if run.needs else "")
    return left


def with_needs(chosen):
    """The runs, each after those that it needs."""
    runs = {}
    for run in chosen:
        chain = [run]
        while chain[-1].needs:
            chain.append(chain[-1].needs)
        runs |= {run.name: run for run in reversed(chain) if run.name not in runs}
    return list(runs.values())


def note_of(run):
    """The file in a run's folder that says which run this is, and whether it is finished."""
    return os.path.join(WORK, run.name, "run_of_the_study.json")


def write_note(run, finished):
    note = {"settings": identity(run), "finished": finished}
    checkpoint.write_text(note_of(run), json.dumps(note))


def read_note(run):
    if not os.path.exists(note_of(run)):
        return {"settings": None, "finished": False}
    return json.loads(checkpoint.read_text(note_of(run)))


def has_networks(run):
    """Are the networks of this very run there, all of them, and trained to the end?"""
    return read_note(run) == {"settings": identity(run), "finished": True}


def identity(run):
    """The settings that make a run this one, and those of the run that it starts from."""
    settings = dict(run.settings)
    for key in {"data", "task", "ckpt", "run"} & set(settings):
        settings[key] = os.path.basename(settings[key])  # the study may lie anywhere
    if run.needs:
        settings["after"] = identity(run.needs)
    return settings


def start(run, threads, device):
    words = [sys.executable, os.path.join(ROOT, run.script)]
    settings = run.settings | {"out": os.path.join(WORK, run.name), "device": device}
    for key, value in settings.items():
        words += [f"--{key}", str(value)]

    # A folder of this name may hold another run, of other settings: it is deleted.
    folder = os.path.join(WORK, run.name)
    if os.path.exists(folder) and read_note(run)["settings"] != identity(run):
        shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)
    write_note(run, finished=False)

    output = open(os.path.join(folder, "output.txt"), "a")
    return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def work_off(runs, jobs, device):
    """Run what is left, `jobs` at a time, in order, each after what it needs."""
    # A signal ends in the `finally` below, so that no run goes on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    left = runs_left(runs)
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // jobs)))
    running = {}
    began = time.time()
    try:
        while left or running:
            # A run can begin once the run that it needs is done.
            waiting = {run.name for run in left} | set(running)
            for run in list(left):
                ready = run.needs is None or run.needs.name not in waiting
                if ready and len(running) < jobs:
                    running[run.name] = run, start(run, threads, device), time.time()
                    left.remove(run)
                    print(f"begins: {run.name}", flush=True)

            time.sleep(1)
            for name, (run, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                output = os.path.join(WORK, name, "output.txt")
                if process.returncode:
                    raise SystemExit(f"error: {name} ended with {process.returncode}: see {output}")

                # A run that got a signal ends well, but early.
                found = result_of(run, round(time.time() - started))
                if not found:
                    raise SystemExit(f"error: {name} was stopped before its end, see {output}; "
                                     "the same command goes on")
                write_note(run, finished=True)
                checkpoint.write_text(os.path.join(RESULTS, f"{name}.json"), json.dumps(found))
                minutes = sum(other.minutes for other in left) / jobs
                print(f"done: {name}, {(time.time() - began) / 3600:.2f} hours so far, about "
                      f"{minutes / 60:.1f} left", flush=True)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would leave runs alone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def use_size(name):
    """The folders of a size, for all that follows -> what it changes."""
    global WORK, RESULTS
    if name != "cpu":
        WORK, RESULTS = (os.path.join(HERE, f"{folder}_{name}") for folder in ("work", "results"))
    os.makedirs(RESULTS, exist_ok=True)
    return SIZES[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default="", help="letters of claims, as ab")
    parser.add_argument("--dry", action="store_true", help="list the runs that are left")
    options = parser.parse_args()

    runs = all_runs(use_size(options.size))
    if options.only:
        runs = with_needs(run for run in runs if set(run.claims) & set(options.only))
    if options.dry:
        left = runs_left(runs)
        for run in left:
            print(f"{run.minutes / 60:5.2f} hours of a core  {run.claims:8}  {run.name}")
        hours = sum(run.minutes for run in left) / 60
        return print(f"{len(left)} of {len(runs)} runs left, {hours:.1f} hours of a core, "
                     f"{hours / options.jobs:.1f} with {options.jobs} at a time")
    cohort.make(DATA)
    work_off(runs, options.jobs, options.device)


if __name__ == "__main__":
    main()
