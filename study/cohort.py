"""Cohorts of the study: heads of tests/phantom.py made harder, so that no threshold solves a task.

    python study/cohort.py --out study/data

The intensities of the tissues are drawn anew for each scan: no contrast is seen twice. A lesion is
as bright as something between cortex and white matter, so that its place and texture decide. At
the borders of tissues a voxel is a mixture of both. There are 300 unlabelled and 120 labelled
heads, all from seeds. Label values: 0 the rest, 1 white matter, 2 cortex, 3 lesion.

A head is 30 mm long, so that all of it fits into a patch of 32 voxels of 1 mm: a step sees whole
heads, and evaluating one takes one window. So few steps are enough for networks that small.

In `unlike`, each scan has a contrast of its own. In `alike`, the labelled heads appear again in
nearly one contrast, as in scans of one sequence. In `elsewhere`, for the claim out of domain, they
appear again in anisotropic voxels, with more noise and other contrasts.
"""

import argparse
import csv
import functools
import multiprocessing
import os
import subprocess
import sys

import nibabel as nib
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import phantom  # noqa: E402

SIDE = 30  # mm, the length of a head
UNLABELLED = 300
LABELLED = 120
TESTED = 60  # of the labelled heads: never trained on

# Label values of the tissues of phantom.tissue: air, scalp, skull, fluid, cortex, white matter,
# lesion.
VALUES = np.array([0, 0, 0, 0, 2, 1, 3], np.uint8)
LESION = 6


def draw_intensities(rng):
    """An intensity for each tissue, (7,): cortex and white matter differ by a fifth or more."""
    while True:
        scalp, skull, fluid, cortex, white = rng.uniform(100, 1000, 5)
        contrasts = abs(cortex - white), abs(fluid - white), abs(fluid - cortex)
        if min(contrasts) > 200:
            break
    lesion = cortex + rng.uniform(0.3, 0.7) * (white - cortex)
    return np.array([0, scalp, 0.3 * skull, fluid, cortex, white, lesion], np.float32)


def draw_alike(rng):
    """As draw_intensities, but of one sequence: white matter is the brightest, and each tissue
    varies by a tenth."""
    usual = np.array([600, 300, 250, 500, 800])
    scalp, skull, fluid, cortex, white = usual * rng.uniform(0.9, 1.1, 5)
    lesion = cortex + rng.uniform(0.3, 0.7) * (white - cortex)
    return np.array([0, scalp, 0.3 * skull, fluid, cortex, white, lesion], np.float32)


def scan(head, rng, spacing, noise, intensities_of=draw_intensities):
    """One scan of a head and its label map: two nibabel images on one grid."""
    shape = np.ceil(SIDE * 1.04 / np.array(spacing)).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing

    # Partial volume: each voxel is the mean of 2 x 2 x 2 points in it.
    intensities = intensities_of(rng)
    centres = np.moveaxis(np.indices(shape), 0, -1).astype(np.float32)
    values = np.zeros(shape, np.float32)
    for corner in np.ndindex(2, 2, 2):
        offset = (np.array(corner) - 0.5) / 2
        points = nib.affines.apply_affine(affine, centres + offset)
        classes, _ = phantom.tissue(head, points, lesions=True)
        values += intensities[classes] / 8

    # What a lesion has, beside its place: it is coarser than other tissue.
    middle, _ = phantom.tissue(head, nib.affines.apply_affine(affine, centres), lesions=True)
    texture = rng.normal(0, 1, shape)
    values *= 1 + np.where(middle == LESION, 0.10, 0.02) * texture

    # A receive field, and noise as in magnitude images.
    unit = nib.affines.apply_affine(affine, centres) / SIDE
    values *= 1 + unit @ rng.uniform(-0.25, 0.25, 3)
    values = np.hypot(values + rng.normal(0, noise, shape), rng.normal(0, noise, shape))
    return (nib.Nifti1Image(values.astype(np.int16), affine),
            nib.Nifti1Image(VALUES[middle], affine))


def write_one(folder, stream, labelled, spacing, noise, intensities_of, number):
    """The scan of a head, and its label map if it is labelled -> its name."""
    head = phantom.anatomy(np.random.default_rng([1, number]), SIDE)
    rng = np.random.default_rng([stream, number])
    image, label = scan(head, rng, spacing, noise, intensities_of)
    name = f"head{number:04}"
    image.to_filename(os.path.join(folder, f"{name}.nii"))
    if labelled:
        label.to_filename(os.path.join(folder, f"{name}_label.nii"))
    return name


def write(folder, numbers, stream, labelled, spacing, noise, intensities_of, split):
    """Scans of heads and a manifest. stream: of the seeds of scans; a head has one of its own."""
    os.makedirs(folder, exist_ok=True)
    one = functools.partial(write_one, folder, stream, labelled, spacing, noise, intensities_of)
    with multiprocessing.Pool() as pool:
        names = pool.map(one, numbers)
    rows = [[f"{name}.nii", name, "", "MR", f"{name}_label.nii" if labelled else "", split(number)]
            for name, number in zip(names, numbers, strict=True)]
    path = os.path.join(folder, f"{stream}.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "subject", "session", "sequence", "label", "split"])
        writer.writerows(rows)
    return path


def make(out):
    """The cohorts, prepared: out/unlike, out/alike and out/elsewhere. What is there stays.

    Results know their cohort by its name alone: one whose scans change needs another name."""
    first_tested = UNLABELLED + LABELLED - TESTED
    everyone = range(UNLABELLED + LABELLED)

    def split(number):
        if number < UNLABELLED:
            return "pretrain"
        return "test" if number >= first_tested else "train"

    cohorts = {
        "unlike": [("a", 2, everyone[:UNLABELLED], False, (1, 1, 1), 12, draw_intensities),
                   ("b", 2, everyone[UNLABELLED:], True, (1, 1, 1), 12, draw_intensities)],
        "alike": [("d", 4, everyone[UNLABELLED:], True, (1, 1, 1), 12, draw_alike)],
        "elsewhere": [("c", 3, everyone[UNLABELLED:], True, (0.9, 0.9, 1.8), 40,
                       draw_intensities)],
    }
    for cohort, parts in cohorts.items():
        prepared = os.path.join(out, cohort)
        if os.path.exists(os.path.join(prepared, "done")):
            continue
        for name, stream, numbers, labelled, spacing, noise, intensities_of in parts:
            table = write(os.path.join(out, "raw", f"{cohort}_{name}"), numbers, stream, labelled,
                          spacing, noise, intensities_of, split)
            subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), "--source",
                            "manifest", "--input", table, "--out", prepared, "--name",
                            f"phantoms_{name}", "--workers", "2"], check=True)
        open(os.path.join(prepared, "done"), "w").close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=os.path.join(ROOT, "study", "data"))
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
