"""Segment a scan (paper, sections 3.2 and 4): sliding window at 1 mm, then back to the scan's own grid.

    python predict.py --ckpt runs/wmh-unet_xl-amaes/fold_0/last.pt scan.nii.gz --out seg.nii.gz
    python predict.py --ckpt ... flair.nii.gz t1ce.nii.gz --truth label.nii.gz    # channels in order
"""

import dataclasses
import itertools

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import models
import prepare_data
from common import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    ckpt: str  # a last.pt of finetune.py
    inputs: tuple[str, ...] = ()  # the scan: one NIfTI file a channel, in the task's order
    out: str = "segmentation.nii.gz"  # label map on the scan's own grid, in the source's label values
    truth: str | None = None  # label map to score against
    overlap: float = 0.5  # of neighbouring windows; the official code: 0.5
    gaussian: bool = False  # weigh window centres more; the official code does not
    device: str = "auto"  # auto, cpu or cuda


def window_starts(size, patch, overlap):
    """First voxels of the windows along one axis: steps of patch * (1 - overlap), the last one flush with the
    end."""
    step = max(1, int(patch * (1 - overlap)))
    return [*range(0, size - patch, step), size - patch]


def gaussian_weights(patch):
    """Product of three Gaussians with sigma = side / 8, at most 1: (D, H, W). A switch; the official code has
    none."""
    lines = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in patch]
    return lines[0][:, None, None] * lines[1][:, None] * lines[2]


@torch.inference_mode()
def sliding_window(model, volume, patch_size, overlap=0.5, gaussian=False):
    """Mean of the logits of all windows over a voxel: volume (C, D, H, W) -> logits (K, D, H, W) float32.

    patch_size: voxels a side, or three of them. A volume smaller than the patch is padded with 0. The
    official code sums the logits, so that the trilinear way back blends unequal counts; the mean is its clean
    equivalent."""
    device = next(model.parameters()).device
    patch = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
    shape = volume.shape[1:]
    before = [max(0, p - s) // 2 for p, s in zip(patch, shape, strict=True)]
    after = [max(0, p - s) - b for p, s, b in zip(patch, shape, before, strict=True)]
    padded = F.pad(volume, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair])
    weights = gaussian_weights(patch) if gaussian else torch.ones(patch)
    logits, counts = None, torch.zeros(padded.shape[1:])
    for corner in itertools.product(*(window_starts(s, p, overlap)
                                      for s, p in zip(padded.shape[1:], patch, strict=True))):
        window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        output = model(padded[(None, slice(None), *window)].to(device))[0].float().cpu()
        if logits is None:
            logits = torch.zeros(len(output), *padded.shape[1:])
        logits[(slice(None), *window)] += output * weights
        counts[window] += weights
    logits /= counts
    return logits[(slice(None), *(slice(b, b + s) for b, s in zip(before, shape, strict=True)))]


def segment(model, volume, geometry, patch_size, precision="fp32", overlap=0.5, gaussian=False):
    """Prepared volume (C, D, H, W) in [0, 1] at 1 mm -> classes uint8 (D, H, W) on the scan's own grid.

    The logits go back trilinearly, then the largest wins; outside the scan's crop box that is the
    background."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = sliding_window(model, volume, patch_size, overlap, gaussian)
    return np.asarray(prepare_data.restore(logits, geometry)).argmax(0).astype(np.uint8)


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


def load_network(path, device):
    """A finetuned checkpoint -> (network in evaluation mode, the checkpoint). Raises UserError if it is
    none."""
    checkpoint = common.load_checkpoint(path)
    if checkpoint.get("kind") != "finetune":
        raise UserError(f"{path} is no finetuned network but {checkpoint.get('kind', 'something else')}: "
                        "finetune.py makes one")
    task, trained = checkpoint["task"], checkpoint["config"]
    model = models.build_model(checkpoint["row"], "segment", len(task["sequences"]), len(task["classes"]),
                               merge=trained.get("merge", "legacy"), features=trained.get("features"))
    models.load_weights(model, checkpoint, part="all")
    return model.to(device).eval(), checkpoint


def prepare_scan(paths):
    """NIfTI files of one session on one grid -> (volume (C, D, H, W) float32 in [0, 1] at 1 mm, geometry,
    first image).

    As in preparation, the channels share the union of their tight boxes. Raises UserError naming the file."""
    images = [prepare_data.load_scan(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape or not np.allclose(image.affine, images[0].affine, atol=1e-2):
            raise UserError(f"{path} is not on the grid of {paths[0]}: register and resample the channels")
    box = prepare_data.union_box(images)
    prepared = [prepare_data.preprocess(image, box) for image in images]
    return torch.from_numpy(np.stack([volume for volume, _ in prepared])), prepared[0][1], images[0]


def main(cfg):
    if not cfg.inputs:
        raise UserError("name the scan: python predict.py --ckpt CKPT scan.nii.gz --out seg.nii.gz")
    model, checkpoint = load_network(cfg.ckpt, common.pick_device(cfg.device))
    task, trained = checkpoint["task"], checkpoint["config"]
    if len(cfg.inputs) != len(task["sequences"]):
        raise UserError(f"the network reads {len(task['sequences'])} channels "
                        f"({', '.join(task['sequences'])}), got {len(cfg.inputs)} files")
    volume, geometry, image = prepare_scan(cfg.inputs)
    classes = segment(model, volume, geometry, trained["patch_size"], trained["precision"],
                      cfg.overlap, cfg.gaussian)
    values = np.zeros(256, np.uint8)  # class -> the source's own label value (BraTS: 4 for enhancing tumour)
    for value, number in sorted(task["labels"].items(), reverse=True):
        values[number] = value
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    with common.atomic(cfg.out) as temporary:
        nib.Nifti1Image(values[classes], image.affine, header).to_filename(temporary)
    names = {number: name for number, name in enumerate(task["classes"])}
    volume_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    for number, name in list(names.items())[1:]:
        print(f"{name}: {(classes == number).sum() * volume_ml:.2f} ml")
    print(f"wrote {cfg.out}: {classes.shape}, the grid of {cfg.inputs[0]}")
    if cfg.truth:
        truth = np.asarray(prepare_data.load_scan(cfg.truth).dataobj)
        for name, score in score_case(classes, truth, task).items():
            print(f"Dice {name}: {score:.4f}")


def score_case(classes, truth, task):
    """Classes and the source's label values on one grid -> {class or region name: Dice}. Ignored voxels do
    not count."""
    truth = data.class_table(task["labels"], task["ignore"])[truth.astype(np.uint8)]
    regions = {name: (number,) for number, name in enumerate(task["classes"]) if number}
    regions |= {name: tuple(numbers) for name, numbers in task["regions"].items()}
    scores = dice(classes, truth, list(regions.values()), data.IGNORE)
    return {name: scores[numbers] for name, numbers in regions.items()}


if __name__ == "__main__":
    common.run(main, Config)
