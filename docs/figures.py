"""Pictures from the files of a run; matplotlib is needed for this alone.

    python docs/figures.py preview runs/unet_xl     # what `pretrain.py --preview N` wrote: input to target
    python docs/figures.py losses runs/unet_xl runs/swinunetr  # by parts; of [23] the three of Figure 3
    python docs/figures.py dice runs/wmh-unet_xl-scratch runs/wmh-unet_xl-amaes  # case by case
    python docs/figures.py scan scan.nii.gz seg.nii.gz [truth.nii.gz]  # three planes
    python docs/figures.py ... --out picture.png    # instead of beside the last file
"""

import argparse
import glob
import json
import os
import sys

import nibabel as nib
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
import metrics  # noqa: E402
from config import UserError  # noqa: E402


def load(path):
    try:
        return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_json(path, lines=False):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file] if lines else json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def preview(plt, folder):
    """Each held-out patch of the last preview: a middle slice of input, reconstruction and target."""
    inputs = sorted(glob.glob(f"{glob.escape(folder)}/preview/*_input.nii.gz"))
    if not inputs:
        raise UserError(f"{folder}/preview holds nothing: pretrain.py --preview N writes it every N steps")
    last = os.path.basename(inputs[-1]).split("_")[0]
    inputs = [path for path in inputs if os.path.basename(path).startswith(last)]
    titles = ("input: augmented and masked", "reconstruction", "target: clean, unmasked")
    figure, axes = plt.subplots(len(inputs), 3, figsize=(7.5, 2.6 * len(inputs)), squeeze=False)
    for row, path in zip(axes, inputs, strict=True):
        for axis, kind, title in zip(row, ("input", "reconstruction", "target"), titles, strict=True):
            volume = load(path.replace("_input", f"_{kind}"))
            axis.imshow(volume[:, :, volume.shape[2] // 2].T, cmap="gray", vmin=0, vmax=1, origin="lower")
            axis.set_title(title if path is inputs[0] else "", fontsize=9)
            axis.axis("off")
    figure.suptitle(f"held-out patches, step {int(last.removeprefix('step'))}", fontsize=9)
    return figure


def losses(plt, *folders):
    """log.jsonl of each run: training (lines) and validation (points) over the steps."""
    figure, axes = plt.subplots(1, len(folders), figsize=(5 * len(folders), 3.5), squeeze=False)
    for axis, folder in zip(axes[0], folders, strict=True):
        log = read_json(f"{folder}/log.jsonl", lines=True)
        known = set().union(*log) if log else set()
        parts = [k for k in ("masked", "visible", "rotation", "contrast", "l1") if k in known] or ["loss"]
        for number, part in enumerate(parts):
            for key, style in ((part, "-"), (f"val_{part}", "o")):
                points = [(record["step"], record[key]) for record in log if key in record]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=key, markersize=3)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(os.path.basename(os.path.normpath(folder)), fontsize=9)
        axis.legend(fontsize=8)
    return figure


def dice(plt, first, second):
    """Mean Dice of each case in two finetuning runs, a point a case and fold; on the diagonal, no change."""
    runs = [read_json(f"{folder}/dice.json") for folder in (first, second)]
    figure, axis = plt.subplots(figsize=(4.5, 4.5))
    for fold in sorted(set(runs[0]["folds"]) & set(runs[1]["folds"]), key=int):
        means = [{r["case"]: 100 * metrics.mean_dice([r], run["classes"])[0] for r in run["folds"][fold]}
                 for run in runs]
        points = [(means[0][case], means[1][case]) for case in set(means[0]) & set(means[1])]
        if points:
            axis.plot(*zip(*points, strict=True), "o", markersize=4, alpha=0.7, label=f"fold {fold}")
    axis.plot([0, 100], [0, 100], color="gray", linewidth=0.8)
    axis.set_xlabel(f"Dice, {os.path.basename(os.path.normpath(first))}")
    axis.set_ylabel(f"Dice, {os.path.basename(os.path.normpath(second))}")
    axis.legend(fontsize=8)
    return figure


def scan(plt, path, segmentation, truth=None):
    """Sagittal, coronal and axial slice through the middle of what was found: prediction red, truth green."""
    volume, found = load(path), load(segmentation) > 0
    known = load(truth) > 0 if truth else np.zeros_like(found)
    marked = known if known.any() else found
    at = [int(np.argmax(marked.sum(tuple(a for a in range(3) if a != axis)))) if marked.any()
          else volume.shape[axis] // 2 for axis in range(3)]
    sizes = nib.affines.voxel_sizes(nib.as_closest_canonical(nib.load(path)).affine)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6))
    for axis, plane, title in zip(axes, range(3), ("sagittal", "coronal", "axial"), strict=True):
        high, wide = np.delete(sizes, plane)[::-1]
        axis.imshow(np.take(volume, at[plane], plane).T, cmap="gray", origin="lower", aspect=high / wide,
                    vmax=np.quantile(volume, 0.995))
        for mask, colour in ((known, "tab:green"), (found, "tab:red")):
            part = np.take(mask, at[plane], plane).T
            if part.any():
                axis.contour(part, levels=[0.5], colors=colour, linewidths=1)
        axis.set_title(f"{title}: prediction red" + (", truth green" if truth else ""), fontsize=9)
        axis.axis("off")
    return figure


KINDS = {"preview": preview, "losses": losses, "dice": dice, "scan": scan}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("no picture: matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    last = arguments.files[-1]
    out = arguments.out or (os.path.join(last, f"{arguments.kind}.png") if os.path.isdir(last)
                            else last.removesuffix(".gz").removesuffix(".nii") + ".png")
    try:
        figure = KINDS[arguments.kind](plt, *arguments.files)
        figure.tight_layout()
        with checkpoint.atomic(out) as temporary:
            figure.savefig(temporary, dpi=110)
    except UserError as error:
        sys.exit(f"error: {error}")
    except TypeError:
        sys.exit(f"error: {arguments.kind} takes other files; see --help")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
