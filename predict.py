"""Segment a scan (paper, sections 3.2 and 4): sliding window at 1 mm, then back to the scan's own grid.

    python predict.py --ckpt runs/wmh-unet_xl-amaes/fold_0/last.pt scan.nii.gz --out seg.nii.gz
    python predict.py --ckpt ... flair.nii.gz t1ce.nii.gz --truth label.nii.gz    # channels in order
"""

import dataclasses
import itertools
import os

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

import augment
import common
import data
import models
import prepare_data
from common import UserError

TOLERANCE = 2.0  # mm, of the normalised surface Dice
SCORES = {"dice": "Dice", "hd95": "HD95 mm", "asd": "ASD mm", "nsd": f"NSD at {TOLERANCE:g} mm",
          "f1": "lesion F1", "ml": "ml", "ml_error": "ml in excess"}


@dataclasses.dataclass(frozen=True)
class Config:
    ckpt: str  # a last.pt of finetune.py
    inputs: tuple[str, ...] = ()  # the scan: one NIfTI file a channel, in the task's order
    out: str = "segmentation.nii.gz"  # label map on the scan's own grid, in the source's label values
    truth: str | None = None  # label map to score against
    features: str | None = None  # instead of a segmentation: the encoder's features, to this .npy (no width)
    overlap: float = 0.5  # of neighbouring windows; the official code: 0.5
    gaussian: bool = False  # weigh window centres more; the official code does not
    batch: int = 1  # windows that pass through the network at once
    skip_empty: bool = False  # take windows without a voxel above 0 for background: quicker, not the same
    device: str = "auto"  # auto, cpu or cuda


def window_starts(size, patch, overlap):
    """First voxels of the windows along one axis: steps of patch * (1 - overlap), the last one flush with the
    end."""
    step = max(1, int(patch * (1 - overlap)))
    return [*range(0, size - patch, step), size - patch]


def axis_weights(n, gaussian):
    """Weights of a window along one axis; a window's are the product of three: 1, or a Gaussian with sigma =
    side / 8 and at most 1, a switch that the official code does not have."""
    return torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) if gaussian else torch.ones(n)


@torch.inference_mode()
def sliding_window(model, volume, patch_size, overlap=0.5, gaussian=False, batch=1, skip_empty=False):
    """Mean of the logits of all windows over a voxel: volume (C, D, H, W), float16 as stored or any other ->
    logits (K, D, H, W) float32, on the model's device.

    patch_size: voxels a side, or three of them. batch: windows at once. A volume smaller than the patch is
    padded with 0. skip_empty: windows without a voxel above 0 count as logits of 0 and are not computed. The
    official code sums the logits, so that the trilinear way back blends unequal counts; the mean is its clean
    equivalent."""
    weight = next(model.parameters())
    volume = augment.upload(volume, weight.device)
    patch = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
    shape = volume.shape[1:]
    before = [max(0, p - s) // 2 for p, s in zip(patch, shape, strict=True)]
    after = [max(0, p - s) - b for p, s, b in zip(patch, shape, before, strict=True)]
    if any(after):
        volume = F.pad(volume, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
    size = volume.shape[1:]
    starts = [window_starts(s, p, overlap) for s, p in zip(size, patch, strict=True)]
    windows = [(slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
               for corner in itertools.product(*starts)]
    if skip_empty:
        windows = [window for window in windows if (volume[window] > 0).any()] or windows[:1]
    lines = [augment.upload(axis_weights(p, gaussian), weight.device).view(-1, *[1] * (2 - axis))
             for axis, p in enumerate(patch)]
    logits = None
    for i in range(0, len(windows), batch):
        part = windows[i:i + batch]
        # Each window by itself to the weights' type: autocast cannot stack float16 (torch 2.13).
        outputs = model(torch.stack([volume[window].to(weight.dtype) for window in part]))
        if logits is None:
            logits = torch.zeros(outputs.shape[1], *size, device=weight.device)
        for window, output in zip(part, outputs.float(), strict=True):
            logits[window].addcmul_(output.mul_(lines[0]) if gaussian else output, lines[1] * lines[2])
        del outputs, output  # or they would be alive beside the next forward pass
    for line, places, n, p in zip(lines, starts, size, patch, strict=True):
        count = line.new_zeros(n, *line.shape[1:])
        for place in places:
            count[place:place + p] += line
        logits /= count  # the sum of the weights over all windows is a product of three, too
    return logits[(slice(None), *(slice(b, b + s) for b, s in zip(before, shape, strict=True)))]


def segment(model, volume, geometry, patch_size, precision="fp32", overlap=0.5, gaussian=False, batch=1,
            skip_empty=False):
    """Prepared volume (C, D, H, W) in [0, 1] at 1 mm -> classes uint8 (D, H, W) on the scan's own grid.

    The logits go back trilinearly, then the largest wins; outside the scan's crop box that is the
    background."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = sliding_window(model, volume, patch_size, overlap, gaussian, batch, skip_empty)
    return np.asarray(prepare_data.restore(logits.cpu(), geometry)).argmax(0).astype(np.uint8)


def dice(prediction, truth, labels, ignore=None):
    """Dice of each label, {label: 2 TP / (2 TP + FP + FN)}: NaN if it is in neither, 0 if it is in one alone.

    prediction, truth: integer arrays of one shape. A label may be a tuple of values, scored as their union
    (whole tumour). ignore: value or values of the truth whose voxels do not count (WMH's label 2, the
    challenge's rule)."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    if ignore is not None:
        counted = ~np.isin(truth, ignore)
        prediction, truth = prediction[counted], truth[counted]
    scores = {}
    for label in labels:
        p, t = np.isin(prediction, label), np.isin(truth, label)
        voxels = p.sum() + t.sum()
        scores[label] = float(2 * (p & t).sum() / voxels) if voxels else float("nan")
    return scores


def surface(mask):
    """The voxels of a mask (D, H, W) with one of their six neighbours outside it or outside the grid."""
    padded, inside = np.pad(mask, 1), mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return mask & ~inside


def distances(points, target, spacing):
    """Distance in mm from every True voxel of `points` to the nearest of `target`: exact, in no order.

    The square is minimised axis by axis: along the longest, the nearest voxel is the last before or the first
    after; along the shortest, every shift is tried; along the third, only the points are looked up."""
    order = np.argsort(target.shape)[[0, 2, 1]]
    points, target = points.transpose(order), target.transpose(order)
    x, y, z = (np.arange(n, dtype=np.float32) * np.float32(s)
               for n, s in zip(target.shape, np.array(spacing)[order], strict=True))
    place = y[:, None]
    before = np.maximum.accumulate(np.where(target, place, -np.inf), 1)
    after = np.minimum.accumulate(np.where(target, place, np.inf)[:, ::-1], 1)[:, ::-1]
    along = np.minimum(place - before, after - place) ** 2
    best = along.copy()
    for shift in range(1, len(x)):
        np.minimum(best[shift:], along[:-shift] + x[shift] ** 2, out=best[shift:])
        np.minimum(best[:-shift], along[shift:] + x[shift] ** 2, out=best[:-shift])
    i, j, k = np.nonzero(points)
    parts = [(best[i[part], j[part]] + (z - z[k[part], None]) ** 2).min(1)
             for part in np.array_split(np.arange(len(i)), len(i) // 4096 + 1)]
    return np.sqrt(np.concatenate(parts))


def components(mask):
    """The connected component, by 26 neighbours, of each True voxel of (D, H, W): (N,) voxel numbers.

    Every voxel starts on its own; of two neighbours the larger number is hooked to the smaller."""
    padded = np.pad(np.ascontiguousarray(mask), 1)
    voxels = np.flatnonzero(padded)
    number = np.full(padded.size, -1, np.int32)
    number[voxels] = np.arange(len(voxels))
    pairs = []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        if offset > (0, 0, 0):
            other = number[voxels + np.dot(padded.strides, offset)]  # a bool is one byte
            pairs.append((np.flatnonzero(other >= 0), other[other >= 0]))
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    component = np.arange(len(voxels))
    while len(a):
        one, other = component[a], component[b]
        np.minimum.at(component, np.maximum(one, other), np.minimum(one, other))
        while (component[component] != component).any():
            component = component[component]
        apart = component[a] != component[b]
        a, b = a[apart], b[apart]
    return component


def lesion_f1(prediction, truth):
    """F1 of connected lesions, as in the WMH challenge: a lesion of either mask is found if one of its voxels
    is in the other mask; the harmonic mean of the share found of the true and of the predicted lesions."""
    shares = []
    for mask, other in ((truth, prediction), (prediction, truth)):
        lesion = components(mask)
        shares.append(len(np.unique(lesion[other[mask]])) / len(np.unique(lesion)))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def score(prediction, truth, spacing):
    """All of SCORES for two masks, bool (D, H, W), on a grid of voxels of `spacing` mm.

    hd95: the 95th percentile of the distances from one surface to the other, the larger of both directions.
    asd: their mean over both surfaces. nsd: the share of both within TOLERANCE of the other. ml: the volume
    predicted; ml_error: less the true one. Both masks empty: NaN, but for the volumes. One empty: dice, nsd
    and f1 are 0, the distances NaN."""
    voxel = float(np.prod(spacing)) / 1000
    ml, true_ml = float(prediction.sum() * voxel), float(truth.sum() * voxel)
    found = {name: float("nan") for name in SCORES} | {"ml": ml, "ml_error": ml - true_ml}
    if ml and true_ml:
        box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(prediction | truth))
        prediction, truth = prediction[box], truth[box]
        p, t = surface(prediction), surface(truth)
        to_truth, to_prediction = distances(p, t, spacing), distances(t, p, spacing)
        both = np.concatenate([to_truth, to_prediction])
        found |= {"hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))),
                  "asd": float(both.mean()), "nsd": float((both < TOLERANCE + 1e-4).mean()),  # rounding
                  "f1": lesion_f1(prediction, truth)}
    elif ml or true_ml:
        found |= {"nsd": 0.0, "f1": 0.0}
    return found | {"dice": dice(prediction, truth, [True])[True]}


def classes_of(truth, task):
    """A source's label values -> class numbers, IGNORE where the task ignores the value. UserError for a
    value that it does not name."""
    values = np.asarray(truth).astype(np.uint8)
    true = data.class_table(task["labels"], task["ignore"])[values]
    unknown = np.unique(truth[(values != truth) | (true == data.UNKNOWN)])
    if len(unknown):
        raise UserError(f"the true label map holds {unknown[0]:g}, which the task's labels do not name")
    return true


def score_case(classes, truth, task, affine):
    """Classes and the source's label values on one grid -> {key of SCORES: {class or region: value}}.

    Voxels that the task ignores are taken out of both masks. UserError for a value that it does not name."""
    true = classes_of(truth, task)
    regions = {name: (number,) for number, name in enumerate(task["classes"]) if number}
    regions |= {name: tuple(numbers) for name, numbers in task["regions"].items()}
    counted, spacing = true != data.IGNORE, nib.affines.voxel_sizes(np.asarray(affine))
    found = {name: score(np.isin(classes, numbers) & counted, np.isin(true, numbers), spacing)
             for name, numbers in regions.items()}
    return {kind: {name: scores[kind] for name, scores in found.items()} for kind in SCORES}


class FirstLevel(torch.nn.Module):
    """An encoder as a network whose output is its first level at the patch's own size; `pooled` gathers the
    mean of all five levels over the windows."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.pooled = model.get_submodule(model.encoder_prefix.rstrip(".")), []

    def forward(self, x):
        levels = [level.float() for level in self.encoder(x)]
        self.pooled.append(torch.cat([level.mean((2, 3, 4)) for level in levels], 1).cpu())
        return F.interpolate(levels[0], x.shape[2:])


def load_encoder(checkpoint):
    """A network with the encoder of a checkpoint of pretrain.py or finetune.py; its number of channels."""
    if checkpoint.get("kind") not in ("pretrain", "finetune"):
        raise UserError("features are taken from a checkpoint of pretrain.py or finetune.py; this is none")
    channels = len(checkpoint["task"]["sequences"]) if checkpoint["kind"] == "finetune" else 1
    return rebuild(checkpoint, channels, 1, part="encoder"), channels


def print_channels(sequences, paths):
    """Which file is taken for which channel: they are told by their order alone."""
    for name, path in zip(sequences, paths, strict=True):
        print(f"{name}: {path}")


def write_features(cfg):
    """--features x.npy: pooled features (31 f,), mean over the windows; x_voxels.npy: the first level's,
    float16 (f, D, H, W) on the 1 mm grid of the cropped scan."""
    checkpoint = common.load_checkpoint(cfg.ckpt)
    model, channels = load_encoder(checkpoint)
    if len(cfg.inputs) != channels:
        raise UserError(f"the encoder reads {channels} channels, got {len(cfg.inputs)} files")
    print_channels(checkpoint.get("task", {}).get("sequences", ["scan"]), cfg.inputs)
    network = FirstLevel(model).to(common.pick_device(cfg.device))
    volume, _, _ = prepare_scan(cfg.inputs)
    voxels = sliding_window(network, volume, checkpoint["config"]["patch_size"], cfg.overlap, cfg.gaussian,
                            cfg.batch)
    stem = cfg.features.removesuffix(".npy")
    pooled = torch.cat(network.pooled).mean(0)
    for path, array in ((f"{stem}.npy", pooled), (f"{stem}_voxels.npy", voxels.half())):
        prepare_data.save_array(path, array.cpu().numpy())
        print(f"wrote {path}: {tuple(array.shape)}")


def read_label(path, image):
    """The values of a label map on the stored axes of `image`. UserError if it is not on its grid."""
    label = prepare_data.load_scan(path)
    prepare_data.check_same_grid(label, {"shape": image.shape[:3], "affine": image.affine})

    # The same rule as in preparation: what is almost an integer is that integer.
    values, _ = prepare_data.label_map(label)
    return data.on_axes(nib.Nifti1Image(values, label.affine), image.affine)


def rebuild(checkpoint, channels, classes, part):
    """The segmentation network that a checkpoint's row and settings describe, with its weights, to
    evaluate."""
    trained = checkpoint["config"]
    model = models.build_model(checkpoint["row"], "segment", channels, classes,
                               merge=trained.get("merge", "legacy"), features=trained.get("features"))
    models.load_weights(model, checkpoint, part)
    return model.eval()


def load_network(path, device):
    """A finetuned checkpoint -> (network in evaluation mode, the checkpoint). Raises UserError if it is
    none."""
    checkpoint = common.load_checkpoint(path)
    if checkpoint.get("kind") != "finetune":
        raise UserError(f"{path} is no finetuned network but {checkpoint.get('kind', 'something else')}: "
                        "finetune.py makes one")
    task = checkpoint["task"]
    model = rebuild(checkpoint, len(task["sequences"]), len(task["classes"]), part="all")
    return model.to(device), checkpoint


def prepare_scan(paths):
    """Scans of one session on one grid, a file a channel -> (volume (C, D, H, W) in [0, 1] at 1 mm, geometry
    and image of the first).

    Their axes may be stored in different orders: all become RAS. As in preparation, the channels share the
    union of their tight boxes, and values are float16: the network was trained on such. Prints what was
    mended in a scan. Raises UserError naming the file."""
    images = [prepare_data.load_scan(path) for path in paths]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        if not prepare_data.same_grid(image.shape, image.affine, first.shape, first.affine):
            raise UserError(f"{path} is not on the grid of {paths[0]}: register and resample the channels")

    boxes = []
    for path, image in zip(paths, images, strict=True):
        with prepare_data.naming(os.fspath(path)):
            boxes.append(prepare_data.tight_box(prepare_data.read_voxels(image)[0]))
    box = prepare_data.union_box(boxes)

    volumes, geometries = [], []
    for path, image in zip(paths, images, strict=True):
        volume, geometry = prepare_data.preprocess(image, box)
        volumes.append(volume.astype(np.float16))
        geometries.append(geometry)
        for line in mended(image, geometry):
            print(f"{path}: {line}")
    return torch.from_numpy(np.stack(volumes)), geometries[0], first


def mended(image, geometry):
    """What was not taken as it stands in a scan's file, as lines to print."""
    lines = list(image.extra["notes"])
    if geometry["nan"]:
        lines.append(f"{geometry['nan']:,} voxels are NaN: set to 0")
    if geometry["clamped"]:
        lines.append(f"{geometry['clamped']:,} voxels are negative: set to 0")
    return lines


# All that a NIfTI header says of its grid: voxel sizes, units, and two transforms with what they mean.
GRID = ("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
        "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")


def grid_header(image):
    """Header of a label map on the grid of a scan. Of the scan's own it takes the grid alone: descriptions,
    display ranges and extensions are the scan's, and may name the patient."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(image.shape[:3])

    if isinstance(image.header, nib.Nifti1Header):  # NIfTI-2 and pairs, too
        for field in GRID:
            header[field] = image.header[field]
        header["pixdim"][4:] = 1  # of time and other axes
    else:  # FreeSurfer's and Analyze's are in mm, and have no form codes
        header.set_zooms(image.header.get_zooms()[:3])
        header.set_xyzt_units("mm")
    return header


def main(cfg):
    if not cfg.out.endswith((".nii", ".nii.gz")):
        raise UserError(f"out {cfg.out}: a NIfTI file ends in .nii or .nii.gz")
    if not cfg.inputs:
        raise UserError("name the scan: python predict.py --ckpt CKPT scan.nii.gz --out seg.nii.gz")
    if os.path.realpath(cfg.out) in map(os.path.realpath, (*cfg.inputs, cfg.truth or "")):
        raise UserError(f"out {cfg.out} is one of the files to read: name another")
    if cfg.features:
        return write_features(cfg)
    model, checkpoint = load_network(cfg.ckpt, common.pick_device(cfg.device))
    task, trained = checkpoint["task"], checkpoint["config"]
    if len(cfg.inputs) != len(task["sequences"]):
        raise UserError(f"the network reads {len(task['sequences'])} channels "
                        f"({', '.join(task['sequences'])}), got {len(cfg.inputs)} files")
    print_channels(task["sequences"], cfg.inputs)
    volume, geometry, image = prepare_scan(cfg.inputs)
    truth = read_label(cfg.truth, image) if cfg.truth else None
    if cfg.truth:  # an unknown value is found now, not after minutes
        classes_of(truth, task)
    classes = segment(model, volume, geometry, trained["patch_size"], trained["precision"], cfg.overlap,
                      cfg.gaussian, cfg.batch, cfg.skip_empty)
    values = np.zeros(256, np.uint8)  # class -> the source's own label value (BraTS: 4 for enhancing tumour)
    for value, number in sorted(task["labels"].items(), reverse=True):
        values[number] = value
    with common.atomic(cfg.out) as temporary:
        nib.Nifti1Image(values[classes], image.affine, grid_header(image)).to_filename(temporary)
    voxel_ml = np.prod(nib.affines.voxel_sizes(image.affine)) / 1000
    for number, name in list(enumerate(task["classes"]))[1:]:
        print(f"{name}: {(classes == number).sum() * voxel_ml:.2f} ml")
    print(f"wrote {cfg.out}: {classes.shape}, the grid of {cfg.inputs[0]}")
    if cfg.truth:
        scores = score_case(classes, truth, task, image.affine)
        for name in scores["dice"]:
            values = [f"{title} {scores[kind][name]:.4g}" for kind, title in SCORES.items()]
            print(f"{name}: {', '.join(values)}")


if __name__ == "__main__":
    common.run(main, Config)
