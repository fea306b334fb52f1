"""Synthetic head scans as NIfTI, for the tests and the demo: no patient's data.

    python tests/phantom.py --out raw --subjects 24 --labelled 12 --layout bids --size 64 --seed 0

A head is a set of ellipsoids in mm: scalp, skull, cortex with folds, white matter, ventricles; its shape
differs from subject to subject, and so do noise, bias field, voxel size, axis order and obliqueness. The
labelled subjects have lesions in the white matter, bright in FLAIR, with an exact label map.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np

# Intensity of air, scalp, skull, cerebrospinal fluid, cortex, white matter, lesion, in each contrast.
CONTRASTS = {
    "T1": (0, 800, 120, 180, 480, 700, 380), "T2": (0, 500, 80, 950, 560, 400, 800),
    "FLAIR": (0, 450, 70, 120, 520, 420, 950), "T1ce": (0, 850, 130, 180, 500, 700, 900),
    "DWI": (0, 90, 30, 150, 480, 400, 900),
}
SUFFIX = {"T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR", "DWI": "dwi"}
# Axis order and flips of the stored grid, and voxel size relative to the first axis.
GRIDS = (("RAS", (1, 1, 1)), ("LPS", (1, 1, 1)), ("LAS", (0.9, 0.9, 1.6)), ("PSR", (1, 1, 1.2)),
         ("RAS", (1.2, 1, 1)))


def anatomy(rng, size):
    """Everything about one subject: semi-axes in mm for a head `size` mm long, folds, ventricles, lesions."""
    axes = size / 2 * np.array([0.74, 0.95, 0.80]) * rng.uniform(0.92, 1.05, 3)
    lesions = []
    for _ in range(rng.integers(2, 5)):
        direction = rng.normal(size=3)
        place = direction / np.linalg.norm(direction) * rng.uniform(0.3, 0.55) * axes
        lesions.append((place, size * rng.uniform(0.06, 0.13), rng.uniform(0.7, 1.4, 3)))
    return {"axes": axes, "folds": rng.uniform(0, 2 * np.pi, (6, 3)), "waves": rng.uniform(4, 9, (6, 3)),
            "ventricle": rng.uniform(0.8, 1.5), "lesions": lesions}


def tissue(head, points, lesions):
    """Class (see CONTRASTS) of points (..., 3) in mm, and which lesion they lie in (0: none)."""
    unit = points / head["axes"]
    radius = np.linalg.norm(unit, axis=-1)
    angle = unit / np.maximum(radius, 1e-6)[..., None]
    folds = sum(np.cos(angle @ (2 * wave) + phase.sum())
                for wave, phase in zip(head["waves"], head["folds"], strict=True))
    classes = np.zeros(radius.shape, np.uint8)
    classes[radius < 1.0] = 1
    classes[radius < 0.93] = 2
    classes[radius < 0.87] = 3
    classes[radius < 0.83 + 0.012 * folds] = 4
    classes[radius < 0.68 + 0.03 * folds] = 5
    for side in (-1, 1):
        offset = (unit - np.array([0.13 * side, 0.05, 0.08])) / np.array([0.07, 0.3, 0.14])
        classes[np.linalg.norm(offset, axis=-1) < head["ventricle"]] = 3
    found = np.zeros(radius.shape, np.uint8)
    for number, (place, size, shape) in enumerate(head["lesions"] if lesions else (), start=1):
        inside = (np.linalg.norm((points - place) / shape, axis=-1) < size) & (radius < 0.8)
        classes[inside], found[inside] = 6, number
    return classes, found


def scan(head, rng, contrast, size, spacing=(1, 1, 1), axes="RAS", degrees=0.0, lesions=False,
         stripped=False):
    """One scan of a head and its lesion map: two nibabel images on one grid.

    spacing in mm; axes: order and direction of the stored axes; degrees: obliqueness about the first one.
    stripped: brain only, on exact 0, as BraTS; otherwise with scalp, skull and noisy air."""
    shape = np.maximum(16, np.ceil(size * 1.04 / np.array(spacing)).astype(int))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ affine
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    classes, found = tissue(head, points, lesions)
    values = np.array(CONTRASTS[contrast], np.float32)[classes]
    values *= rng.normal(1, 0.02, values.shape)
    values *= 1 + 0.15 * (points / size @ rng.uniform(-1, 1, 3))  # receive field
    values = np.hypot(values + rng.normal(0, 12, shape), rng.normal(0, 12, shape))  # Rician noise
    if stripped:
        values[(classes < 3)] = 0
    images = []
    for array in (values.astype(np.int16), found):
        image = nib.Nifti1Image(array, affine)
        wanted = nib.orientations.axcodes2ornt(axes)
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
        images.append(image.as_reoriented(turn))
    return images


def write_bids(out, subjects, labelled, size, seed):
    """sub-001/ses-01/anat/sub-001_ses-01_{T1w,T2w,FLAIR}.nii.gz; the labelled have FLAIR and *_lesion.nii.gz
    only."""
    for number in range(subjects + labelled):
        rng = np.random.default_rng([seed, number])
        head, lesions = anatomy(rng, size), number >= subjects
        axes, ratio = GRIDS[rng.integers(len(GRIDS))]
        name = f"sub-{'L' if lesions else 'U'}{number:03}"
        folder = Path(out, name, "ses-01", "anat")
        folder.mkdir(parents=True, exist_ok=True)
        for contrast in ["FLAIR"] if lesions else rng.permutation(["T1", "T2", "FLAIR"])[:2]:
            image, label = scan(head, rng, str(contrast), size, ratio, axes, rng.uniform(-12, 12), lesions)
            image.to_filename(folder / f"{name}_ses-01_{SUFFIX[contrast]}.nii.gz")
            if lesions:
                label = nib.Nifti1Image((np.asarray(label.dataobj) > 0).astype(np.uint8), label.affine)
                label.to_filename(folder / f"{name}_ses-01_lesion.nii.gz")


def write_brats21(out, subjects, labelled, size, seed):
    """BraTS2021_00001/BraTS2021_00001_{flair,t1,t1ce,t2,seg}.nii.gz: LPS, 1 mm, skull-stripped, labels 0, 1,
    2, 4."""
    for number in range(subjects + labelled):
        rng = np.random.default_rng([seed, number])
        head = anatomy(rng, size)
        name = f"BraTS2021_{number:05}"
        folder = Path(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        for contrast in ("FLAIR", "T1", "T1ce", "T2"):
            image, label = scan(head, rng, contrast, size, axes="LPS", lesions=True, stripped=True)
            image.to_filename(folder / f"{name}_{contrast.lower()}.nii.gz")
        values = np.array([0, 1, 2, 4, 2, 2], np.uint8)[np.asarray(label.dataobj)]
        if number >= subjects:
            nib.Nifti1Image(values, label.affine).to_filename(folder / f"{name}_seg.nii.gz")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--subjects", type=int, default=24, help="unlabelled subjects")
    parser.add_argument("--labelled", type=int, default=12, help="subjects with lesions and label maps")
    parser.add_argument("--layout", choices=("bids", "brats21"), default="bids")
    parser.add_argument("--size", type=int, default=64, help="length of the head in mm")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write = write_bids if arguments.layout == "bids" else write_brats21
    write(arguments.out, arguments.subjects, arguments.labelled, arguments.size, arguments.seed)


if __name__ == "__main__":
    main()
