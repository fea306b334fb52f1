"""Seconds a scan of predict.py: a call for each scan, against one call for the folder.

    python bench/segment.py [--scans 6] [--side 56] [--patch 64] [--threads 2] [--rounds 3]

Phantoms of one window on the CPU, and the U-Net of the demo with weights as drawn, in fp32: alone,
and as an ensemble of three. The forms take turns, and their medians count. All of a call counts:
Python's start, reading, network, writing. --workers 0 reads and writes in one process with the
network; by default up to two read, and up to two write, beside it.
"""

import argparse
import dataclasses
import glob
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import checkpoint  # noqa: E402
import finetune  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import tasks  # noqa: E402


def make_network(path, seed, patch):
    """A finetuned checkpoint with weights as they are drawn."""
    torch.manual_seed(seed)
    model = models.build_model("unet_demo", "segment", 1, 2, features=16)
    task = tasks.Task("none", ("background", "lesion"), {0: 0, 1: 1}, ("FLAIR",))
    cfg = finetune.Config("none", patch_size=patch, precision="fp32", features=16, merge="legacy")
    checkpoint.save_checkpoint(path, {
        "kind": "finetune", "row": "unet_demo", "config": dataclasses.asdict(cfg),
        "task": dataclasses.asdict(task), "model": model.state_dict()})


def seconds(commands, threads):
    """How long predict.py takes with these words, one command after the other."""
    began = time.perf_counter()
    for words in commands:
        subprocess.run([sys.executable, "predict.py", *words], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=int, default=6)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "tests/phantom.py", "--out", f"{folder}/raw", "--subjects",
                        "0", "--labelled", str(options.scans), "--size", str(options.side)],
                       cwd=ROOT, check=True)
        paths = sorted(glob.glob(f"{folder}/raw/sub-*/*/*/*FLAIR.nii.gz"))
        for fold in range(3):
            make_network(f"{folder}/run/fold_{fold}/last.pt", fold, options.patch)

        for count, ckpt in ((1, f"{folder}/run/fold_0"), (3, f"{folder}/run")):
            words = ["--ckpt", ckpt, "--device", "cpu"]
            cohort = [*words, "--input", f"{folder}/raw", "--out", f"{folder}/out{count}",
                      "--overwrite"]
            forms = {
                "a call a scan": [[*words, path, "--out", f"{folder}/x.nii.gz"] for path in paths],
                "a folder, --workers 0": [[*cohort, "--workers", "0"]],
                "a folder": [cohort],
            }
            times = {form: [] for form in forms}
            for _ in range(options.rounds):
                for form, commands in forms.items():
                    times[form].append(seconds(commands, options.threads) / len(paths))

            # The first form is what the others are compared with.
            medians = {form: statistics.median(each) for form, each in times.items()}
            for form, each in medians.items():
                share = each / medians["a call a scan"]
                lines.append([count, form, f"{each:.2f}", f"{share:.2f}"])

    print(f"{len(paths)} phantoms of {options.side} mm, patch {options.patch}, "
          f"{options.threads} threads, CPU\n")
    print("\n".join(metrics.table(["networks", "form", "s a scan", "over a call a scan"], lines)))


if __name__ == "__main__":
    main()
