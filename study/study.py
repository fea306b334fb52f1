"""The paper in miniature: which runs there are, and running those that are left.

    make study                      # all of it; the same command goes on
    make study DRY=1                # what would run, with the estimated hours
    python study/study.py --only b   # the runs of one claim
    python study/study.py --size gpu --device cuda

Each run is one command of pretrain.py, finetune.py or study/moved.py, with everything it makes
under study/work. What it found is kept as study/results/<name>.json, and report.py makes
study/RESULTS.md of these. A run whose result is there is done; one that was cut off goes on from
its last checkpoint.
"""

import argparse
import glob
import json
import os
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

WORK = os.path.join(HERE, "work")
RESULTS = os.path.join(HERE, "results")
DATA = os.path.join(HERE, "data")

# What the size changes: width, steps, and how many minutes of one core a run takes.
SIZES = {
    "cpu": {"features": 16, "patch": 48, "batch": 2, "lr": 3e-3, "steps": 2400, "tuning": 200},
    "gpu": {"features": 32, "patch": 48, "batch": 8, "lr": 1e-3, "steps": 6000, "tuning": 400},
}
LABELS = (3, 5, 10, 20)  # labelled scans to train on
FOLDS = 6


class Run(NamedTuple):
    name: str
    claims: str  # the letters of the claims that need it
    script: str
    settings: dict
    minutes: float  # of one core, on the machine that study/RESULTS.md names
    needs: str = ""  # the run that must be done before


def pretraining(name, claims, size, minutes=4.5, part=2, **changes):
    """part: how many times shorter it is than the longest."""
    steps = size["steps"] // part
    settings = {
        "data": os.path.join(DATA, "native"), "model": "unet_demo", "features": size["features"],
        "skips": "true", "patch_size": size["patch"], "batch_size": size["batch"],
        "steps": steps, "warmup_epochs": 0.25, "lr": size["lr"], "val_fraction": 0.1,
        "val_every": steps // 8, "log_every": steps // 40, "save_every": 100, "workers": 1}
    return Run(f"pretrain-{name}", claims, "pretrain.py", settings | changes, minutes)


def finetuning(start, task, n_train, preset, claims, size, minutes=5.0):
    """Six folds. start: the name of a pretraining, or scratch."""
    settings = {
        "task": os.path.join(HERE, f"{task}.yaml"), "data": os.path.join(DATA, "native"),
        "n_train": n_train, "augment": preset, "steps": size["tuning"], "patch_size": 32,
        "batch_size": 2, "lr": 2e-3, "overlap": 0, "precision": "fp32", "workers": 1,
        "scorers": 1, "save_every": 50}
    needs = ""
    if start == "scratch":
        settings |= {"model": "unet_demo", "features": size["features"]}
    else:
        needs = f"pretrain-{start}"
        settings |= {"ckpt": os.path.join(WORK, needs, "last.pt")}
    name = f"{task}-{n_train}-{preset}-{start}"
    return Run(name, claims, "finetune.py", settings, minutes, needs)


def all_runs(size):
    """The runs of all claims, those that say most first."""
    runs = [pretraining("base", "abcg", size, minutes=9, part=1)]

    # b: label efficiency, with the augmentation of the paper's finetuning.
    for n in (5, 20, 3, 10):
        for start in ("scratch", "base"):
            runs.append(finetuning(start, "lesion", n, "spatial", "bcg", size))

    # What pretraining varies, in half of its length. c: the length. d, e, f, h: decoder, skips,
    # augmentation, mask. i: the rate.
    variants = [pretraining("half", "acdefhi", size),
                pretraining("noskips", "ae", size, skips="false"),
                pretraining("rate3", "i", size, lr=3 * size["lr"]),
                pretraining("augment-none", "f", size, augment="none"),
                pretraining("augmented-target", "f", size, augmented_target="true"),
                pretraining("standard", "ad", size, minutes=6, decoder="standard"),
                pretraining("length8", "c", size, minutes=1.5, part=8),
                pretraining("augment-spatial", "f", size, augment="spatial"),
                pretraining("mask30", "h", size, mask_ratio=0.3),
                pretraining("mask80", "h", size, mask_ratio=0.8),
                pretraining("token2", "h", size, token_size=2),
                pretraining("token8", "h", size, token_size=8),
                pretraining("length4", "c", size, minutes=2.5, part=4)]
    for run in variants:
        start = run.name.removeprefix("pretrain-")
        runs += [run, finetuning(start, "lesion", 5, "spatial", run.claims.strip("a"), size)]

    # g: what the networks of b do on other scans. b: two tasks of tissues.
    for start in ("scratch", "base"):
        name = f"lesion-5-spatial-{start}"
        runs.append(Run(f"moved-{name}", "g", "study/moved.py",
                        {"run": os.path.join(WORK, name), "data": os.path.join(DATA, "moved")},
                        2, name))
    for task in ("white", "ventricles"):
        for start in ("scratch", "base"):
            runs.append(finetuning(start, task, 5, "spatial", "b", size))

    # b: label efficiency with all augmentations.
    for n in (5, 20, 3, 10):
        for start in ("scratch", "base"):
            runs.append(finetuning(start, "lesion", n, "all", "b", size))

    # a: other widths. The widest takes as long as many others together.
    for skips in ("true", "false"):
        name = "" if skips == "true" else "-noskips"
        runs += [pretraining(f"width8{name}", "a", size, minutes=2.5, features=8, skips=skips),
                 pretraining(f"width32{name}", "a", size, minutes=15, features=32, skips=skips)]
    return runs


# ------------------------------------------------------------------------------------ running them
def result_of(run, seconds):
    """What a finished run found, small enough to be kept. seconds: that its last start took."""
    out = os.path.join(WORK, run.name)
    found = {"script": run.script, "settings": without_folders(run.settings), "seconds": seconds}
    if run.script == "pretrain.py":
        with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        keys = ("step", "val_masked", "val_masked_scaled", "val_masked_head", "val_fill",
                "val_fill_head", "val_mean_r", "seconds")
        found["log"] = [{key: record[key] for key in keys if key in record} for record in records
                        if "val_masked" in record]
    else:
        with open(os.path.join(out, "dice.json"), encoding="utf-8") as file:
            folds = json.load(file)["folds"]
        found["dice"] = {fold: {record["case"]: record["dice"] for record in records}
                         for fold, records in folds.items()}
    return found


def is_done(run):
    """Is there a result of this very run, with the same settings?"""
    path = os.path.join(RESULTS, f"{run.name}.json")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        known = json.load(file)["settings"]
    return known == without_folders(run.settings)


def runs_left(runs):
    """Those without a result, and those whose networks they start from, if these are gone.

    Results are kept with the code, networks under study/work alone."""
    left, needed = [], set()
    for run in reversed(runs):  # what a run starts from stands before it
        gone = run.name in needed and not has_networks(run)
        if gone or not is_done(run):
            left.insert(0, run)
            needed.add(run.needs)

    # What starts from a run with other settings is another run, too.
    changed = {run.name for run in left if not is_done(run)}
    for run in runs:
        if run.needs in changed and run not in left:
            left.append(run)
            changed.add(run.name)
    return sorted(left, key=runs.index)


def has_networks(run):
    """Are the last checkpoints of a run still there?"""
    pattern = "last.pt" if run.script == "pretrain.py" else "fold_*/last.pt"
    return bool(glob.glob(os.path.join(WORK, run.name, pattern)))


def without_folders(settings):
    """Settings that say what a run is, wherever its files are."""
    return {key: value for key, value in settings.items()
            if key not in ("data", "ckpt", "task", "run")}


def start(run, threads, device):
    words = [sys.executable, os.path.join(ROOT, run.script)]
    settings = run.settings | {"out": os.path.join(WORK, run.name), "device": device}
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    os.makedirs(os.path.join(WORK, run.name), exist_ok=True)
    output = open(os.path.join(WORK, run.name, "output.txt"), "a")
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
            # Whatever has its start can begin.
            waiting = {run.name for run in left} | set(running)
            for run in [run for run in left if run.needs not in waiting]:
                if len(running) < jobs:
                    running[run.name] = run, start(run, threads, device), time.time()
                    left.remove(run)
                    print(f"begins: {run.name}", flush=True)

            time.sleep(1)
            for name, (run, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise SystemExit(f"error: {name} ended with {process.returncode}: see "
                                     f"{os.path.join(WORK, name, 'output.txt')}")
                found = result_of(run, round(time.time() - started))
                checkpoint.write_text(os.path.join(RESULTS, f"{name}.json"), json.dumps(found))
                minutes = sum(other.minutes for other in left) / jobs
                print(f"done: {name}, {(time.time() - began) / 3600:.2f} hours so far, about "
                      f"{minutes / 60:.1f} left", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default="", help="letters of claims, as ab")
    parser.add_argument("--dry", action="store_true", help="list the runs that are left")
    options = parser.parse_args()

    runs = all_runs(SIZES[options.size])
    if options.only:
        runs = [run for run in runs if set(run.claims) & set(options.only)]
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
