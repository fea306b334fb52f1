"""Real heads: 30 people in T1 with manual regions, 20 patients with gliomas in four contrasts.

    python study/real.py --oasis OASIS --gliomas GLIOMAS            # all runs, resumable
    python study/real.py --oasis OASIS --gliomas GLIOMAS --only pretrain

OASIS: a folder with <id>_SS.nii.gz and <id>_glm.nii.gz, as the R package malf.templates has them in
inst/extdata (CC BY-NC; credit OASIS and Neuromorphometrics). GLIOMAS: a folder for each patient of
BraTS 2018 with *_t1, *_t1ce, *_t2, *_flair and *_seg.nii.gz. No scan is part of this project.

Ten people and eight patients are for testing only: study/real_split.json, written before the first
run. Two tasks: five deep regions as one class from T1, and the whole tumour from FLAIR.

Scans are made coarse first: a voxel is the mean of 4 x 4 x 4 of 1 mm. So a whole brain fits into
one patch of 48 voxels, and a small network learns it in the steps that a CPU has time for.
"""

import argparse
import csv
import glob
import json
import os
import subprocess
import sys
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import yaml

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import amaes  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402
import validation  # noqa: E402

SPLIT = os.path.join(HERE, "real_split.json")
RAW = os.path.join(HERE, "data", "real_coarse_raw")
PREPARED = os.path.join(HERE, "data", "real_coarse")
BLOCK = 4  # voxels of a scan whose mean is one voxel, along each axis
PATCH = 48  # coarse voxels: a whole brain

# Second scans of a person: they stay on its side of the split.
SAME_PERSON = {"1023": "1003", "1024": "1004", "1025": "1005", "1038": "1018", "1039": "1019"}


class Task(NamedTuple):
    """A task on real heads: one class, beside the background."""
    cohort: str
    sequence: str
    foreground: tuple  # its label values


TASKS = {"deep": Task("oasis", "T1", (59, 60,  # thalamus, right and left
                                      36, 37,  # caudate
                                      57, 58,  # putamen
                                      47, 48,  # hippocampus
                                      31, 32)),  # amygdala
         "tumour": Task("gliomas", "FLAIR", (1, 2, 4))}  # all of a tumour


# ------------------------------------------------------------------------------------- the cohorts
def find(oasis, gliomas):
    """{person: [(session, sequence, scan, label)]} of both folders; says what is missing."""
    people = {}
    for scan in sorted(glob.glob(os.path.join(oasis, "*_SS.nii.gz"))):
        number = os.path.basename(scan).split("_")[0]
        label = os.path.join(oasis, f"{number}_glm.nii.gz")
        if not os.path.exists(label):
            print(f"not found: {label}")
            continue
        person = SAME_PERSON.get(number, number)
        people.setdefault(person, []).append((number, "T1", scan, label))

    patients = {}
    for label in sorted(glob.glob(os.path.join(gliomas, "*", "*_seg.nii.gz"))):
        patient = os.path.basename(os.path.dirname(label))
        for sequence in ("T1", "T1CE", "T2", "FLAIR"):
            scan = label.replace("_seg.", f"_{sequence.lower()}.")
            if os.path.exists(scan):
                patients.setdefault(patient, []).append(("1", sequence, scan, label))
            else:
                print(f"not found: {scan}")
    print(f"{len(people)} people in T1, {len(patients)} patients with gliomas")
    return people, patients


def split_of(people, patients):
    """Who is for testing only, written down before anything is trained: every third person of
    OASIS, and every second patient until there are eight."""
    if os.path.exists(SPLIT):
        return set(json.loads(checkpoint.read_text(SPLIT))["test"])
    test = sorted(people)[::3][:10] + sorted(patients)[1::2][:8]
    checkpoint.write_text(SPLIT, json.dumps({"test": test}, indent=1))
    return set(test)


def coarse(path, foreground=None):
    """A coarse copy of a scan of 1 mm -> its path. Of a label map, given the label values of a
    task: 1 where these fill half of a block or more, elsewhere 0.

    The header of the copy still says 1 mm, to which the program brings every scan."""
    out = os.path.join(RAW, os.path.basename(path))
    if os.path.exists(out):
        return out
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    if foreground:
        values = np.isin(values, foreground)

    # What is left over at the far sides is air.
    shape = np.array(values.shape) // BLOCK
    values = values[tuple(slice(n * BLOCK) for n in shape)]
    blocks = values.reshape(shape[0], BLOCK, shape[1], BLOCK, shape[2], BLOCK)
    means = blocks.mean((1, 3, 5)).astype(np.float32)
    if foreground:
        means = (means >= 0.5).astype(np.uint8)
    nib.Nifti1Image(means, image.affine).to_filename(out)
    return out


def prepare(task, cases, test):
    """Coarse copies of a cohort, its manifest, and prepare it."""
    cohort, _, foreground = TASKS[task]
    path = os.path.join(study.WORK, f"{cohort}.csv")
    os.makedirs(study.WORK, exist_ok=True)
    os.makedirs(RAW, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "subject", "session", "sequence", "label", "split"])
        for person, scans in cases.items():
            split = "test" if person in test else "train"
            for session, sequence, scan, label in scans:
                writer.writerow([coarse(scan), person, session, sequence,
                                 coarse(label, foreground), split])
    subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), "--source", "manifest",
                    "--input", path, "--out", PREPARED, "--name", cohort, "--workers", "2"],
                   check=True)


def write_tasks():
    """deep.yaml and tumour.yaml, in study/work."""
    for name, task in TASKS.items():
        written = {"data": PREPARED, "source": task.cohort, "sequences": [task.sequence],
                   "classes": ["background", name], "labels": {0: 0, 1: 1},
                   "n_train": 5, "folds": study.FOLDS, "evaluate": "test"}
        checkpoint.write_text(os.path.join(study.WORK, f"{name}.yaml"), yaml.safe_dump(written))


# ---------------------------------------------------------------------------------------- the runs
def all_runs(size):
    """Two pretrainings, and both tasks from scratch and from these; a pretraining of the paper's
    form, without skips, twice as wide in half as many steps; the first weights of a pretraining
    without it, as in claim l; at last all augmentations in finetuning."""
    shared = {"data": PREPARED, "patch_size": PATCH, "precision": "bf16"}
    pretrained = study.pretraining("real", "", size, minutes=22, part=1, preview=size["steps"],
                                   **shared)
    without = study.pretraining("real-noskips", "", size, minutes=18, part=1, skips="false",
                                preview=size["steps"], **shared)

    def finetunings(n, preset, starts):
        runs = []
        for task in TASKS:
            for start in starts:
                run = study.finetuning(start, task, n, preset, "", size, minutes=13)
                settings = shared | {"task": os.path.join(study.WORK, f"{task}.yaml")}
                runs.append(run._replace(settings=run.settings | settings))
        return runs

    runs = [pretrained, without, *finetunings(5, "spatial", (None, pretrained, without))]
    for n in (10, 3):
        runs += finetunings(n, "spatial", (None, pretrained))
    runs.append(study.pretraining("real-wide-noskips", "", size, minutes=25, part=2,
                                  features=2 * size["features"], skips="false", **shared))
    begun = study.untrained("real-untrained", "", size, minutes=0.5, **shared)
    runs.append(begun)
    for n in (5, 10, 3):
        runs += finetunings(n, "spatial", (begun,))
    for n in (5, 10, 3):
        runs += finetunings(n, "all", (None, pretrained))
    return runs


# ------------------------------------------------------------------------------------- the pictures
def picture(name):
    """Patches of three tested people of OASIS, whose licence allows pictures, as a preview of a
    pretraining: study/work/<name>-people/preview, for docs/figures.py preview."""
    saved = checkpoint.load_checkpoint(os.path.join(study.WORK, name, "last.pt"))
    settings = saved["config"]
    model = models.build_model(saved["row"], "pretrain", features=settings["features"],
                               skips=settings["skips"], decoder=settings["decoder"])
    model.load_state_dict(saved["model"])
    model.eval()

    cases = [case for case in tasks.labelled_cases(PREPARED, "oasis", ("T1",))
             if case.volumes[0].split == "test"]
    crops = data.Crops(cases[:3], settings["patch_size"], 0, "all")
    batch = validation.read(crops, range(3))
    views = amaes.make_views(batch.crops, batch.draws, batch.mask_seeds)
    with torch.no_grad():
        output = model(views.image)
    validation.write_views(os.path.join(study.WORK, f"{name}-people"), saved["step"], output, views)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--oasis", required=True)
    parser.add_argument("--gliomas", required=True)
    parser.add_argument("--only", default="", help="names of runs that begin so")
    parser.add_argument("--size", choices=study.SIZES, default="cpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    runs = all_runs(study.use_size(options.size))
    people, patients = find(options.oasis, options.gliomas)
    test = split_of(people, patients)
    prepare("deep", people, test)
    prepare("tumour", patients, test)
    write_tasks()
    chosen = [run for run in runs if run.name.startswith(options.only)]
    study.work_off(study.with_needs(chosen), options.jobs, options.device)
    for name in ("pretrain-real", "pretrain-real-noskips", "pretrain-real-wide-noskips"):
        if os.path.exists(os.path.join(study.WORK, name, "last.pt")):
            picture(name)


if __name__ == "__main__":
    main()
