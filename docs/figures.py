"""Pictures from the files of a run; matplotlib is needed for this alone.

    python docs/figures.py preview runs/unet_xl                 # `pretrain.py --preview N` wrote it
    python docs/figures.py losses runs/unet_xl runs/swinunetr   # by parts; of [23] as in Figure 3
    python docs/figures.py dice runs/wmh-unet_xl-amaes          # Dice of each case
    python docs/figures.py dice runs/wmh-unet_xl-scratch runs/wmh-unet_xl-amaes   # case by case
    python docs/figures.py scan scan.nii.gz seg.nii.gz [truth.nii.gz]             # three planes
    python docs/figures.py cohort segmented                     # what `predict.py --input` wrote
    python docs/figures.py study_errors study/results           # error over patches; study_labels:
                                                                # Dice over the labelled scans
    python docs/figures.py ... --out picture.png                # instead of beside the last file
"""

import argparse
import csv
import glob
import os
import sys
import textwrap

import nibabel as nib
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "study")]
import report  # noqa: E402

import metrics  # noqa: E402
import pictures  # noqa: E402
from config import UserError  # noqa: E402


def load(path):
    """The voxels (D, H, W) of a NIfTI file in RAS order, and their sizes in mm."""
    try:
        image = nib.as_closest_canonical(nib.load(path))
        return np.asarray(image.dataobj), nib.affines.voxel_sizes(image.affine)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def preview(plt, folder):
    """The held-out patches of the last preview: a middle slice of input, reconstruction, target,
    and of what interpolation makes of the input."""
    inputs = sorted(glob.glob(f"{glob.escape(folder)}/preview/*_input.nii.gz"))
    if not inputs:
        raise UserError(f"{folder}/preview holds nothing: pretrain.py --preview N writes it every "
                        "N steps")

    # Names begin with the step, as step0000002_0_input.nii.gz does.
    last = os.path.basename(inputs[-1]).split("_")[0]
    inputs = [path for path in inputs if os.path.basename(path).startswith(last)]
    titles = {"input": "input: augmented and masked", "fill": "interpolation",
              "reconstruction": "reconstruction", "target": "target: clean, unmasked"}
    if not os.path.exists(inputs[0].replace("_input", "_fill")):
        del titles["fill"]  # a run of an earlier version

    # A row for each patch, a column for each kind.
    size = (2.5 * len(titles), 2.6 * len(inputs))
    figure, axes = plt.subplots(len(inputs), len(titles), figsize=size, squeeze=False)
    for number, path in enumerate(inputs):
        for axis, (kind, title) in zip(axes[number], titles.items(), strict=True):
            # The slice is transposed: a picture has its rows first.
            volume, _ = load(path.replace("_input", f"_{kind}"))
            middle = volume[:, :, volume.shape[2] // 2]
            axis.imshow(middle.T, cmap="gray", vmin=0, vmax=1, origin="lower")
            axis.set_title(title if number == 0 else "", fontsize=9)
            axis.axis("off")
    figure.suptitle(f"held-out patches, step {int(last.removeprefix('step'))}", fontsize=9)
    return figure


def dice_of_cases(run, fold):
    """{case: mean Dice of the classes in percent, NaN if it has none} of one fold."""
    found = {}
    for record in run["folds"][fold]:
        mean, _ = metrics.mean_dice([record], run["classes"])
        found[record["case"]] = 100 * mean
    return found


def dice(plt, first, second=None):
    """Of one finetuning run, Dice of each case by class; of two, the mean Dice of each case in one
    against the other. A point for each case and fold."""
    if second is None:
        return pictures.cases(plt, first)
    before, after = (pictures.read_json(f"{folder}/dice.json") for folder in (first, second))
    figure, axis = plt.subplots(figsize=(4.5, 4.5))
    for fold in sorted(set(before["folds"]) & set(after["folds"]), key=int):
        x, y = dice_of_cases(before, fold), dice_of_cases(after, fold)
        shared = sorted(set(x) & set(y))
        if shared:
            axis.plot([x[case] for case in shared], [y[case] for case in shared], "o", markersize=4,
                      alpha=0.7, label=f"fold {fold}")

    # A case on the diagonal scores the same in both.
    axis.plot([0, 100], [0, 100], color="gray", linewidth=0.8)
    axis.set_xlabel(f"Dice, {pictures.name_of(first)}")
    axis.set_ylabel(f"Dice, {pictures.name_of(second)}")
    axis.legend(fontsize=8)
    return figure


def fullest_planes(mask):
    """Along each axis, the plane with most voxels of a mask (D, H, W), the middle one if none."""
    if not mask.any():
        return [n // 2 for n in mask.shape]
    return [int(np.argmax(mask.sum(others))) for others in ((1, 2), (0, 2), (0, 1))]


def scan(plt, path, segmentation, truth=None):
    """Sagittal, coronal and axial slice where most is marked: prediction red, truth green."""
    volume, sizes = load(path)
    found = load(segmentation)[0] > 0
    known = load(truth)[0] > 0 if truth else np.zeros_like(found)

    # The truth decides where to look, if there is any.
    places = fullest_planes(known if known.any() else found)

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6))
    for plane, title in enumerate(("sagittal", "coronal", "axial")):
        draw_slice(axes[plane], volume, sizes, plane, places[plane], known, found)
        legend = ", truth green" if truth else ""
        axes[plane].set_title(f"{title}: prediction red{legend}", fontsize=9)
    return figure


def draw_slice(axis, volume, sizes, plane, place, known, found):
    """A slice of a volume (D, H, W) along the axis `plane`, with outlines of two masks."""
    # Transposed, the later of the two remaining axes is the height of the picture.
    wide, high = np.delete(sizes, plane)
    picture = np.take(volume, place, plane).T
    axis.imshow(picture, cmap="gray", origin="lower", aspect=high / wide,
                vmax=np.quantile(volume, 0.995))

    # The prediction is drawn last, over the truth.
    for mask, colour in ((known, "tab:green"), (found, "tab:red")):
        outline = np.take(mask, place, plane).T
        if outline.any():
            # The edge of the picture is an edge of the mask, too.
            padded = np.pad(outline, 1)
            axis.contour(padded, levels=[0.5], colors=colour, linewidths=1, origin="lower",
                         extent=(-1.5, outline.shape[1] + 0.5, -1.5, outline.shape[0] + 0.5))
    axis.axis("off")


# ------------------------------------------------------------------------------- a whole cohort
SHOWN = 12  # scans of a cohort that are drawn, six in a row


def read_volumes(folder):
    """volumes.csv -> {scan: {class: ml}}, the scans with the least of the first class first."""
    try:
        with open(f"{folder}/volumes.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {folder}/volumes.csv: {error.strerror}; predict.py --input "
                        "writes it") from None
    if not rows:
        raise UserError(f"{folder}/volumes.csv lists no scan")

    volumes = {}
    for row in rows:
        volumes.setdefault(row["scan"], {})[row["class"]] = float(row["ml"])
    first = rows[0]["class"]
    return dict(sorted(volumes.items(), key=lambda scan: scan[1][first]))


def cohort(plt, folder):
    """A segmented cohort: of scans with little to much found in them, the axial slice with most of
    it; below, the ml of all. Prediction red; truth green, where predict.py had it."""
    volumes = read_volumes(folder)
    names = list(volumes)
    classes = list(volumes[names[0]])
    places = np.linspace(0, len(names) - 1, min(SHOWN, len(names)))
    shown = [names[int(place)] for place in places.round()]

    wide = min(6, len(shown))
    rows = -(-len(shown) // wide)
    figure = plt.figure(figsize=(10, 2.1 * rows + 2.2))
    grid = figure.add_gridspec(rows + 1, wide, height_ratios=[2.1] * rows + [1.8])
    for number, name in enumerate(shown):
        axis = figure.add_subplot(grid[number // wide, number % wide])
        draw_case(axis, folder, name)
        who = "\n".join(textwrap.wrap(name.replace("_", " "), 20))
        axis.set_title(f"{who}\n{volumes[name][classes[0]]:.2f} ml", fontsize=7)

    # A point for each scan and class, from the smallest on; a line to those that are shown.
    axis = figure.add_subplot(grid[rows, :])
    for number, label in enumerate(classes):
        values = [volumes[name].get(label, 0) for name in names]
        axis.plot(values, "o", color=f"C{number}", markersize=4, label=label)
    for name in shown:
        axis.axvline(names.index(name), color="lightgray", linewidth=0.8, zorder=0)
    axis.set_xlabel(f"{len(names)} scans, from little {classes[0]} to much; grey lines: the scans "
                    "above, prediction red, truth green")
    axis.set_xticks([])
    axis.set_ylabel("ml")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.legend(fontsize=8)
    return figure


def draw_case(axis, folder, name):
    """The fullest axial slice of one scan of a cohort."""
    pattern = f"{glob.escape(folder)}/sub-*/ses-*/anat/{glob.escape(name)}_space-orig*_dseg.nii.gz"
    paths = glob.glob(pattern)
    if not paths:
        raise UserError(f"{folder} has no label map of {name}, which its volumes.csv lists")

    # The record says where the scan is. Its first channel is drawn; a truth comes last.
    record = pictures.read_json(paths[0].removesuffix(".nii.gz") + ".json")
    volume, sizes = load(record["files"][0][0])
    part = record.get("parts", [None])[0]
    if part is not None:
        volume = volume[..., part]
    found = load(paths[0])[0] > 0
    scored = any("dice" in values for values in record["classes"].values())
    known = load(record["files"][-1][0])[0] > 0 if scored else np.zeros_like(found)

    place = fullest_planes(found | known)[2]
    draw_slice(axis, volume.reshape(found.shape), sizes, 2, place, known, found)


# ------------------------------------------------------------------------------------- the study
def study_results(folder):
    """{name: result} of the runs in study/results."""
    paths = sorted(glob.glob(f"{glob.escape(folder)}/*.json"))
    if not paths:
        raise UserError(f"{folder} holds no result: make study writes study/results")
    return {pictures.name_of(path).removesuffix(".json"): pictures.read_json(path)
            for path in paths}


def study_errors(plt, folder):
    """Error of hidden voxels over the number of patches, for each pretraining of the study on
    synthetic heads, with interpolation as a line."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    fill = None
    for name, result in study_results(folder).items():
        if not report.is_pretraining(name) or "real" in name:
            continue
        # Other masks, or other held-out scans, make another problem with another yardstick.
        settings = result["settings"]
        if {"mask_ratio", "token_size", "seed"} & set(settings):
            continue
        patches = [record["step"] * settings["batch_size"] for record in result["log"]]
        error = [record["val_masked"] for record in result["log"]]
        style = "o:" if settings["skips"] == "false" else "o-"
        axis.plot(patches, error, style, markersize=3, label=name.removeprefix("pretrain-"))
        fill = result["log"][-1]["val_fill"]
    if fill is None:
        raise UserError(f"{folder} holds no result of a pretraining on synthetic heads")
    axis.axhline(fill, linestyle="--", color="black", linewidth=1, label="Gaussian fill")
    axis.set_xlabel("patches; dotted: without skips")
    axis.set_ylabel("error of hidden voxels")
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = [number * fill for number in (0.5, 1, 2, 4)]
    axis.set_yticks(ticks, [f"{tick:.4f}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8, ncols=2)
    return figure


def study_labels(plt, folder):
    """Dice over the number of labelled scans, from scratch and pretrained: means over six folds,
    in bands of one standard error of the folds."""
    results = study_results(folder)
    presets = [preset for preset in ("spatial", "all")
               if any(report.with_start(start, n, preset) in results
                      for start in ("scratch", "base") for n in report.LABELS)]
    if not presets:
        raise UserError(f"{folder} holds no result of claim b")
    figure, axes = plt.subplots(1, len(presets), figsize=(1 + 4 * len(presets), 3.6), sharey=True,
                                squeeze=False)
    for axis, preset in zip(axes[0], presets, strict=True):
        for start, form, title in (("scratch", "", "from scratch"),
                                   ("base", "", "pretrained with skips"),
                                   ("base-noskips", "", "pretrained without skips"),
                                   ("base-noskips", "renewed", "the same, first level new")):
            points = []
            for n in report.LABELS:
                name = report.with_start(start, n, preset, form)
                if name in results:
                    folds = report.fold_means(results[name])
                    points.append((n, folds.mean(), folds.std(ddof=1) / len(folds) ** 0.5))
            if points:
                n, mean, error = np.array(points).T
                axis.plot(n, mean, "o-", markersize=4, label=title)
                axis.fill_between(n, mean - error, mean + error, alpha=0.2)
        axis.set_xscale("log")
        axis.set_xticks(report.LABELS, report.LABELS)
        axis.minorticks_off()
        axis.set_xlabel("labelled scans")
        axis.set_title(f"{preset} augmentation", fontsize=9)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("Dice of lesions, %")
    return figure


KINDS = {"preview": preview, "losses": pictures.losses, "dice": dice,
         "scan": scan, "cohort": cohort, "study_errors": study_errors,
         "study_labels": study_labels}


def place_of(kind, files):
    """Where a picture lies by default: in the last folder named, or beside a segmentation."""
    last = files[-1]
    if kind == "dice" and len(files) > 1:
        return os.path.join(last, "dice_pairs.png")  # a run draws dice.png itself
    if os.path.isdir(last):
        return os.path.join(last, f"{kind}.png")

    # A truth may come after the segmentation, in somebody's raw folder.
    segmentation = files[min(1, len(files) - 1)]
    return segmentation.removesuffix(".gz").removesuffix(".nii") + ".png"


def main():
    """The command line -> one picture. A mistake ends in one line."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out")
    arguments = parser.parse_args()

    # Nothing else in the project needs it, so it may well be missing.
    try:
        plt = pictures.pyplot()
    except ImportError:
        sys.exit("no picture: matplotlib is not installed (pip install matplotlib)")

    out = arguments.out or place_of(arguments.kind, arguments.files)
    try:
        figure = KINDS[arguments.kind](plt, *arguments.files)
        pictures.save(figure, out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except TypeError:
        sys.exit(f"error: {arguments.kind} takes other files; see --help")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
