"""Segment scans (paper, sections 3.2 and 4): a sliding window at 1 mm, then back to their own grid.

    python predict.py --ckpt runs/wmh-unet_xl-amaes/fold_0/last.pt scan.nii.gz --out seg.nii.gz
    python predict.py --ckpt ... flair.nii.gz t1ce.nii.gz --truth label.nii.gz   # channels in order
    python predict.py --ckpt runs/wmh-unet_xl-amaes --input FOLDER --out FOLDER  # many scans

The last form takes the networks of all folds together. docs/segment.md has more of it.
"""

import dataclasses
import itertools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F

import checkpoint
import config
import devices
import label_maps
import metrics
import models
import names
import networks
import preprocess
import resample
import tasks
from config import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    ckpt: str  # a last.pt of finetune.py, several (a.pt,b.pt), or a run folder: all its folds
    inputs: tuple[str, ...] = ()  # the scan: one NIfTI file a channel, in the task's order
    out: str = "segmentation.nii.gz"  # label map on the scan's grid, in the source's label values
    truth: str | None = None  # label map to score against; with --input a folder of them
    features: str | None = None  # instead of a segmentation: the encoder's output, to this .npy
    input: str | None = None  # many scans, out a folder: a folder, files, or a manifest's csv file
    source: str | None = None  # of --input, as of prepare_data.py; by default BIDS, or plain files
    probabilities: bool = False  # with --input: write the probability of each class, too
    overwrite: bool = False  # with --input: segment again what is in out already
    workers: int = 2  # with --input: processes that read, and that write, beside the network
    overlap: float = 0.5  # of neighbouring windows; the official code: 0.5
    gaussian: bool = False  # weigh the centres of windows more; the official code does not
    mirror: bool = False  # mean over the scan's eight mirror images; the official code: without
    precision: str | None = None  # bf16 or fp32; by default as in training
    batch: int = 1  # windows that pass through the network at once
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self):
        """UserError for values that would only fail later."""
        if self.precision is not None:
            config.check_choice("precision", self.precision, ("bf16", "fp32"))


# ------------------------------------------------------------------------- the sliding window
def window_starts(size, patch, overlap):
    """First voxels of the windows along one axis. The last window ends with the axis."""
    step = max(1, int(patch * (1 - overlap)))
    return [*range(0, size - patch, step), size - patch]


def axis_weights(n, gaussian):
    """Weights (n,) along one axis of a window: 1, or a Gaussian with a peak of 1 and sigma n / 8.

    The weights of a window are the product of those along its three axes."""
    if not gaussian:
        return torch.ones(n)
    distance = torch.arange(n) - (n - 1) / 2
    return torch.exp(-0.5 * (distance / (n / 8)) ** 2)


def pad_to(volume, patch):
    """Pad (C, D, H, W) with 0 on both sides, to no less than the patch.

    Returns the volume and the number of voxels that were added before each axis."""
    missing = [max(0, p - n) for p, n in zip(patch, volume.shape[1:], strict=True)]
    before = [m // 2 for m in missing]
    if not any(missing):
        return volume, before

    # F.pad counts the axes from the last one.
    padding = []
    for m, b in zip(reversed(missing), reversed(before), strict=True):
        padding += [b, m - b]
    return F.pad(volume, padding), before


def box(start, size):
    """The slices of a box in (C, D, H, W), all channels of it."""
    return (slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))


@torch.inference_mode()
def sliding_window(model, volume, patch_size, overlap=0.5, gaussian=False, batch=1):
    """Logits of a whole volume: the mean over all windows that cover a voxel.

    volume: (C, D, H, W), float16 as stored or any other. patch_size: voxels a side of a window, or
    three of them. batch: windows in one forward pass. Returns (K, D, H, W) float32 on the model's
    device.

    The official code sums the logits instead, so that on the way back to the scan's grid voxels
    under many windows outweigh their neighbours. Gaussian weights are a switch it does not have."""
    weight = next(model.parameters())
    volume = resample.upload(volume, weight.device)
    patch = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)

    # A volume smaller than a window is padded, and cut again at the end.
    original = volume.shape[1:]
    volume, before = pad_to(volume, patch)
    padded = volume.shape[1:]

    # All windows, each as slices of the volume.
    starts = [window_starts(n, p, overlap) for n, p in zip(padded, patch, strict=True)]
    windows = [box(corner, patch) for corner in itertools.product(*starts)]

    # The weights in a window are the product of a line along each axis.
    lines = []
    for axis, p in enumerate(patch):
        line = resample.upload(axis_weights(p, gaussian), weight.device)
        lines.append(line.view(-1, *[1] * (2 - axis)))
    plane = lines[1] * lines[2]

    # Add up the weighted logits of all windows.
    logits = None
    for first in range(0, len(windows), batch):
        part = windows[first:first + batch]
        # Convert each window by itself: autocast cannot stack float16 (torch 2.13).
        inputs = torch.stack([volume[window].to(weight.dtype) for window in part])
        outputs = model(inputs).float()
        if logits is None:
            logits = torch.zeros(outputs.shape[1], *padded, device=weight.device)
        for window, output in zip(part, outputs, strict=True):
            if gaussian:
                output *= lines[0]
            logits[window].addcmul_(output, plane)
        del inputs, outputs, output  # or they would be alive beside the next forward pass

    # Divide by the sum of the weights: over all windows, that is a product of three lines again.
    for line, along, n, p in zip(lines, starts, padded, patch, strict=True):
        total = line.new_zeros(n, *line.shape[1:])
        for start in along:
            total[start:start + p] += line
        logits /= total

    return logits[box(before, original)]


def resize(logit, size):
    """The logit of one class (D, H, W) -> the given size, trilinearly."""
    return F.interpolate(logit[None, None], size, mode="trilinear", align_corners=False)[0, 0]


def largest_class(logits, size):
    """Logits (K, D, H, W) at 1 mm -> the class of the largest in each voxel, uint8 of the given
    size, on the device of the logits.

    The logits are resized before the largest wins. Of equal ones the first does, as in argmax. A
    class at a time: only the largest logit so far is kept beside the next."""
    largest = classes = None
    for number, logit in enumerate(logits):
        logit = resize(logit, size)
        if largest is None:
            largest = logit
            classes = torch.zeros(logit.shape, dtype=torch.uint8, device=logit.device)
            continue
        classes.masked_fill_(logit > largest, number)
        torch.maximum(largest, logit, out=largest)
    return classes


@torch.inference_mode()
def segment(model, volume, geometry, patch_size, precision="fp32", overlap=0.5, gaussian=False,
            batch=1):
    """Prepared volume (C, D, H, W) in [0, 1] at 1 mm -> classes uint8 (D, H, W) on the scan's grid.

    Outside the crop box of the scan that is the background. precision: bf16 is autocast. The others
    are arguments of sliding_window."""
    device = next(model.parameters()).device
    with devices.autocast(precision, device):
        logits = sliding_window(model, volume, patch_size, overlap, gaussian, batch)
    classes = largest_class(logits, preprocess.box_size(geometry))
    return preprocess.place(classes.cpu().numpy(), geometry)


# -------------------------------------------------------------------- networks of checkpoints
def rebuild(saved, part):
    """The segmentation network that a checkpoint describes, in evaluation mode.

    part: "all" of a finetuned checkpoint; "encoder" also of a pretrained one, whose network reads
    one scan and gets a decoder with weights as they are drawn."""
    channels, classes = 1, 1
    if saved["kind"] == "finetune":
        channels, classes = len(saved["task"]["sequences"]), len(saved["task"]["classes"])

    # Files of earlier versions lack settings that had one value then.
    trained = saved["config"]
    model = models.build_model(saved["row"], "segment", channels, classes,
                               merge=trained.get("merge", "legacy"),
                               features=trained.get("features"))
    checkpoint.load_weights(model, saved, part)
    return model.eval()


def load_network(path, device):
    """A finetuned checkpoint -> its network on the device, in evaluation mode, and the checkpoint.

    UserError if it is none."""
    saved = checkpoint.load_checkpoint(path)
    if saved.get("kind") != "finetune":
        kind = saved.get("kind", "weights without a task")
        raise UserError(f"{path} is no finetuned network but {kind}: "
                        "finetune.py makes one, a last.pt")
    model = rebuild(saved, part="all")
    return devices.quicken(model.to(device), device), saved


# -------------------------------------------------------------------------- several networks
class Member(NamedTuple):
    """A network of an ensemble, and how it was trained."""
    model: torch.nn.Module
    patch_size: int
    precision: str


def load_members(paths, device, precision=None):
    """Finetuned checkpoints -> (a Member each, their task as a dict).

    One alone is on the device. Several wait on the host for their turn there. precision: instead of
    the one that each was trained in. UserError if they are no ensemble."""
    members, task = [], None
    for path in paths:
        model, saved = load_network(path, device)
        task = task or saved["task"]
        if len(paths) > 1:
            networks.check_member(path, saved, task)
            model.to("cpu")

        trained = saved["config"]
        members.append(Member(model, trained["patch_size"], precision or trained["precision"]))
    return members, task


# The axes of (C, D, H, W) along which each mirror image is flipped; the scan itself comes first.
FLIPS = [axes for count in range(4) for axes in itertools.combinations((1, 2, 3), count)]


@torch.inference_mode()
def segment_together(members, volume, size, device, mirror=False, overlap=0.5, gaussian=False,
                     batch=1):
    """Prepared volume (C, D, H, W) in [0, 1] at 1 mm -> (classes uint8 of the given size,
    probabilities (K, D, H, W) at 1 mm), both on the device.

    The probabilities are the mean of the softmax over all members and mirror images, and the
    classes are those of the largest. A network alone, without mirror, decides by its logits, as
    `segment` does."""
    flips = FLIPS if mirror else FLIPS[:1]
    total = None
    for member in members:
        # The others stay on the host meanwhile, where a member returns after an error, too.
        try:
            model = member.model.to(device)
            for axes in flips:
                with devices.autocast(member.precision, device):
                    logits = sliding_window(model, volume.flip(axes), member.patch_size, overlap,
                                            gaussian, batch).flip(axes)
                probabilities = logits.softmax(0)
                total = probabilities if total is None else total.add_(probabilities)
        finally:
            if len(members) > 1:
                member.model.to("cpu")

    count = len(members) * len(flips)
    if count == 1:
        return largest_class(logits, size), total
    total /= count
    return largest_class(total, size), total


# ------------------------------------------------------------------ --features: no segmentation
class FirstLevel(torch.nn.Module):
    """An encoder as a network whose output is its first level, at the size of the patch.

    `pooled` gathers the mean of each channel of all levels, a tensor for each forward pass."""

    def __init__(self, model):
        super().__init__()
        self.encoder = model.get_submodule(model.encoder_prefix.rstrip("."))
        self.pooled = []

    def forward(self, x):
        levels = [level.float() for level in self.encoder(x)]
        self.pooled.append(torch.cat([level.mean((2, 3, 4)) for level in levels], 1).cpu())
        return F.interpolate(levels[0], x.shape[2:])


def write_encoding(ckpt, paths, out, device, overlap, gaussian, batch):
    """What the encoder makes of a scan, in two files: x.npy and x_voxels.npy for the out x.npy.

    The first holds all levels, pooled, as means over the windows: (31 f,), where f is the width of
    the first level, or (35 f,) of resenc_b. The second holds the first level: float16 (f, D, H, W)
    on the 1 mm grid of the cropped scan. UserError if the checkpoint is neither of pretrain.py nor
    of finetune.py."""
    saved = checkpoint.load_checkpoint(ckpt)
    if saved.get("kind") not in ("pretrain", "finetune"):
        raise UserError("features are taken from a checkpoint of pretrain.py or finetune.py; this "
                        "is none")

    sequences = saved["task"]["sequences"] if saved["kind"] == "finetune" else ["scan"]
    model = rebuild(saved, part="encoder")
    if len(paths) != len(sequences):
        raise UserError(f"the encoder reads {len(sequences)} channels, got {len(paths)} files")
    print_channels(sequences, paths)

    # One pass over the windows gives both.
    network = devices.quicken(FirstLevel(model).to(device), device)
    volume, _, _ = preprocess.prepare_scan(paths)
    voxels = sliding_window(network, volume, saved["config"]["patch_size"], overlap,
                            gaussian, batch)
    pooled = torch.cat(network.pooled).mean(0)

    stem = out.removesuffix(".npy")
    for path, array in ((f"{stem}.npy", pooled), (f"{stem}_voxels.npy", voxels.half())):
        checkpoint.save_array(path, array.cpu().numpy())
        print(f"wrote {path}: {tuple(array.shape)}")


# --------------------------------------------------------------------- the segmentation, written
def print_channels(sequences, paths):
    """Which file is taken for which channel: they are told apart by their order alone."""
    for name, path in zip(sequences, paths, strict=True):
        print(f"{name}: {path}")
    for line in names.doubts(paths):
        print(line)


def print_scores(classes, truth, task, affine):
    """All scores of each class and region against the true label map."""
    scores = tasks.score_case(classes, truth, task, affine)
    for name in scores["dice"]:
        values = [f"{title} {scores[kind][name]:.4g}" for kind, title in metrics.SCORES.items()]
        print(f"{name}: {', '.join(values)}")


def check_paths(inputs, truth, out):
    """UserError for names of files that cannot be meant."""
    folders = [path for path in inputs if os.path.isdir(path)]
    if folders:
        raise UserError(f"{folders[0]} is a folder: name it as --input to segment all scans in it")
    if not out.endswith((".nii", ".nii.gz")):
        raise UserError(f"out {out}: a NIfTI file ends in .nii or .nii.gz; give the scans as "
                        "--input to write a folder")
    if not inputs:
        raise UserError("name the scan: python predict.py --ckpt CKPT scan.nii.gz --out seg.nii.gz")
    if os.path.realpath(out) in map(os.path.realpath, (*inputs, truth or "")):
        raise UserError(f"out {out} is one of the files to read: name another")


def main(cfg):
    if cfg.input:
        import segment_cohort  # which imports this file in its turn
        return segment_cohort.main(cfg)

    if cfg.source or cfg.probabilities or cfg.overwrite:
        raise UserError("source, probabilities and overwrite are for scans that --input names")
    check_paths(cfg.inputs, cfg.truth, cfg.out)
    device = devices.pick_device(cfg.device)
    if cfg.features:
        write_encoding(cfg.ckpt, cfg.inputs, cfg.features, device, cfg.overlap, cfg.gaussian,
                       cfg.batch)
        return 0

    # The networks, and one scan for each of their channels.
    members, task = load_members(networks.find(cfg.ckpt), device, cfg.precision)
    networks.check_mirror(cfg.mirror, task)
    if len(cfg.inputs) != len(task["sequences"]):
        raise UserError(f"the network reads {len(task['sequences'])} channels "
                        f"({', '.join(task['sequences'])}), got {len(cfg.inputs)} files")
    print_channels(task["sequences"], cfg.inputs)

    # Read all there is to read: an unknown label value is found now, not after minutes.
    volume, geometry, image = preprocess.prepare_scan(cfg.inputs)
    truth = None
    if cfg.truth:
        truth = preprocess.read_label(cfg.truth, image)
        tasks.classes_of(truth, task)

    classes, _ = segment_together(members, volume, preprocess.box_size(geometry), device,
                                  cfg.mirror, cfg.overlap, cfg.gaussian, cfg.batch)
    classes = preprocess.place(classes.cpu().numpy(), geometry)
    label_maps.write_segmentation(cfg.out, classes, task, image.affine,
                                  label_maps.grid_header(image))
    label_maps.print_volumes(classes, task, image.affine)
    print(f"wrote {cfg.out}: {classes.shape}, the grid of {cfg.inputs[0]}")
    if cfg.truth:
        print_scores(classes, truth, task, image.affine)
    return 0


if __name__ == "__main__":
    config.run(main, Config)
