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

import checkpoint
import config
import metrics
import models
import preprocess
import resample
import tasks
import training
from config import UserError


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
    volume = resample.upload(volume, weight.device)
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
    lines = [resample.upload(axis_weights(p, gaussian), weight.device).view(-1, *[1] * (2 - axis))
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
    return np.asarray(preprocess.restore(logits.cpu(), geometry)).argmax(0).astype(np.uint8)


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


def load_encoder(saved):
    """A network with the encoder of a checkpoint of pretrain.py or finetune.py; its number of channels."""
    if saved.get("kind") not in ("pretrain", "finetune"):
        raise UserError("features are taken from a checkpoint of pretrain.py or finetune.py; this is none")
    channels = len(saved["task"]["sequences"]) if saved["kind"] == "finetune" else 1
    return rebuild(saved, channels, 1, part="encoder"), channels


def print_channels(sequences, paths):
    """Which file is taken for which channel: they are told by their order alone."""
    for name, path in zip(sequences, paths, strict=True):
        print(f"{name}: {path}")


def write_features(cfg):
    """--features x.npy: pooled features (31 f,), mean over the windows; x_voxels.npy: the first level's,
    float16 (f, D, H, W) on the 1 mm grid of the cropped scan."""
    saved = checkpoint.load_checkpoint(cfg.ckpt)
    model, channels = load_encoder(saved)
    if len(cfg.inputs) != channels:
        raise UserError(f"the encoder reads {channels} channels, got {len(cfg.inputs)} files")
    print_channels(saved.get("task", {}).get("sequences", ["scan"]), cfg.inputs)
    device = training.pick_device(cfg.device)
    network = training.quicken(FirstLevel(model).to(device), device)
    volume, _, _ = preprocess.prepare_scan(cfg.inputs)
    voxels = sliding_window(network, volume, saved["config"]["patch_size"], cfg.overlap, cfg.gaussian,
                            cfg.batch)
    stem = cfg.features.removesuffix(".npy")
    pooled = torch.cat(network.pooled).mean(0)
    for path, array in ((f"{stem}.npy", pooled), (f"{stem}_voxels.npy", voxels.half())):
        checkpoint.save_array(path, array.cpu().numpy())
        print(f"wrote {path}: {tuple(array.shape)}")


def rebuild(saved, channels, classes, part):
    """The segmentation network that a checkpoint's row and settings describe, with its weights, to
    evaluate."""
    trained = saved["config"]
    model = models.build_model(saved["row"], "segment", channels, classes,
                               merge=trained.get("merge", "legacy"), features=trained.get("features"))
    checkpoint.load_weights(model, saved, part)
    return model.eval()


def load_network(path, device):
    """A finetuned checkpoint -> (network in evaluation mode, the checkpoint). Raises UserError if it is
    none."""
    saved = checkpoint.load_checkpoint(path)
    if saved.get("kind") != "finetune":
        raise UserError(f"{path} is no finetuned network but {saved.get('kind', 'something else')}: "
                        "finetune.py makes one")
    task = saved["task"]
    model = rebuild(saved, len(task["sequences"]), len(task["classes"]), part="all")
    return training.quicken(model.to(device), device), saved


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
    model, saved = load_network(cfg.ckpt, training.pick_device(cfg.device))
    task, trained = saved["task"], saved["config"]
    if len(cfg.inputs) != len(task["sequences"]):
        raise UserError(f"the network reads {len(task['sequences'])} channels "
                        f"({', '.join(task['sequences'])}), got {len(cfg.inputs)} files")
    print_channels(task["sequences"], cfg.inputs)
    volume, geometry, image = preprocess.prepare_scan(cfg.inputs)
    truth = preprocess.read_label(cfg.truth, image) if cfg.truth else None
    if cfg.truth:  # an unknown value is found now, not after minutes
        tasks.classes_of(truth, task)
    classes = segment(model, volume, geometry, trained["patch_size"], trained["precision"], cfg.overlap,
                      cfg.gaussian, cfg.batch, cfg.skip_empty)
    values = np.zeros(256, np.uint8)  # class -> the source's own label value (BraTS: 4 for enhancing tumour)
    for value, number in sorted(task["labels"].items(), reverse=True):
        values[number] = value
    with checkpoint.atomic(cfg.out) as temporary:
        nib.Nifti1Image(values[classes], image.affine, grid_header(image)).to_filename(temporary)
    voxel_ml = np.prod(nib.affines.voxel_sizes(image.affine)) / 1000
    for number, name in list(enumerate(task["classes"]))[1:]:
        print(f"{name}: {(classes == number).sum() * voxel_ml:.2f} ml")
    print(f"wrote {cfg.out}: {classes.shape}, the grid of {cfg.inputs[0]}")
    if cfg.truth:
        scores = tasks.score_case(classes, truth, task, image.affine)
        for name in scores["dice"]:
            values = [f"{title} {scores[kind][name]:.4g}" for kind, title in metrics.SCORES.items()]
            print(f"{name}: {', '.join(values)}")


if __name__ == "__main__":
    config.run(main, Config)
