"""The prepared folder: its index, its cases and its files; the stream of crops and its batches.

Every draw is a function of (seed, epoch, sample, purpose) alone. So the stream of samples, crops,
augmentations and masks is the same with any number of processes or workers, and after a restart.
"""

import csv
import functools
import glob
import hashlib
import json
import math
import os
import signal
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import augment
import preprocess
import resample
from config import UserError


def derive_seed(*parts):
    """The seed of one draw: a hash of (seed, epoch, sample, purpose), the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits


# ---------------------------------------------------------------------------------------- the index
class Volume(NamedTuple):
    """One row of the index, as prepare_data.py writes it. Every field is text."""
    path: str  # of the volume, below the prepared folder
    source: str  # the dataset
    subject: str
    session: str
    sequence: str
    split: str  # pretrain, train or test, as the paper uses the source
    label: str  # path of the label map, or ""
    shape: str  # of the prepared volume, as "150x180x160"
    spacing: str  # of the raw scan in mm, as "0.9x0.9x3"
    sha256: str  # of the raw scan
    label_sha256: str = ""  # of the raw label map
    label_values: str = ""  # value:voxels native/prepared, by value: "0:87120/87040 1:257/254"


def read_index(folder):
    """All parts of a prepared folder's index as one list of Volume, sorted by path.

    Raises UserError if there is no index, or if it is damaged or points out of the folder."""
    parts = sorted(glob.glob(os.path.join(glob.escape(folder), "index", "*.csv")))
    if not parts:
        raise UserError(f"{folder} has no index/*.csv: not a prepared folder, as "
                        "prepare_data.py makes")

    # A volume that several parts name is of the last one.
    volumes = {}
    for part in parts:
        volumes |= {volume.path: volume for volume in read_part(part)}

    # An index may come from anybody, so it must not lead to other files.
    for volume in volumes.values():
        for path in (volume.path, volume.label):
            if os.path.isabs(path) or ".." in path.split("/"):
                raise UserError(f"the index of {folder} points outside of it: {path}")

    return [volumes[path] for path in sorted(volumes)]


def read_part(part):
    """The Volumes of one part of the index, a csv file. Raises UserError if it is damaged."""
    try:
        with open(part, newline="", encoding="utf-8") as file:
            return list(parse_rows(part, csv.reader(file)))
    except FileNotFoundError as error:
        # A preparation in other shards may have removed the part since it was listed. A link to
        # nowhere is still listed, and is a loss.
        if not os.path.lexists(part):
            return []
        raise UserError(f"cannot read {part}: {error.strerror}; prepare it again") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {part}: {error}; prepare it again") from None


def parse_rows(part, rows):
    """Yields the Volume of each row. rows: the header, then lists of cells."""
    header = next(rows, [])
    missing = set(Volume._fields) - set(Volume._field_defaults) - set(header)
    if missing:
        raise UserError(f"{part} lacks the columns {', '.join(sorted(missing))}; prepare it again")

    # Older versions wrote fewer columns: those fields keep their defaults.
    columns = {field: header.index(field) for field in Volume._fields if field in header}
    for row in rows:
        if not row:
            continue  # an empty line
        if len(row) != len(header):
            raise UserError(f"{part} is damaged at the volume {row[0]}; prepare it again")
        yield Volume(**{field: row[column] for field, column in columns.items()})


# -------------------------------------------------------------------------------------------- cases
class Case(NamedTuple):
    """What one sample is cut from."""
    name: str
    subject: str  # with its source: sources may number their subjects alike
    images: tuple[str, ...]  # a file for each channel, all on one grid
    label: str | None  # file of the label map
    volumes: tuple[Volume, ...]  # the channels' rows of the index


def pretraining_cases(folder):
    """A Case for each volume, since the paper pretrains on every sequence alone (section 2).

    Test cases are left out."""
    cases = []
    for volume in read_index(folder):
        if volume.split != "test":
            image = os.path.join(folder, volume.path)
            subject = f"{volume.source}/{volume.subject}"
            cases.append(Case(volume.path, subject, (image,), None, (volume,)))
    return cases


def split_subjects(subjects, fraction, seed):
    """Subjects, in any order -> (kept, held out), both sorted, each subject once.

    A seeded ceil(fraction) of them is held out, at least one."""
    # The order in which they are given must not matter.
    subjects = sorted(set(subjects))
    count = max(1, math.ceil(fraction * len(subjects)))
    order = np.random.default_rng(seed).permutation(len(subjects))

    held_out = {subjects[i] for i in order[:count]}
    kept = [subject for subject in subjects if subject not in held_out]
    return kept, sorted(held_out)


# -------------------------------------------------------------------------------- the sample stream
@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def epoch_order(n, seed, epoch):
    """The order of n samples in one epoch."""
    return np.random.default_rng(derive_seed(seed, epoch, "order")).permutation(n)


class SampleStream(Sampler):
    """The batches of one process, lists of (epoch, index), from first_step until `steps`.

    All processes share one endless stream, in which each of the n samples comes once an epoch; the
    last batch of an epoch goes on into the next. Step s takes the batch_size positions from
    s * batch_size on, and the process of `rank` takes every world-th of them."""

    def __init__(self, n, seed, batch_size, first_step, steps, rank=0, world=1):
        self.n = n
        self.seed = seed
        self.batch_size = batch_size
        self.first_step = first_step
        self.steps = steps
        self.rank = rank
        self.world = world

    def __iter__(self):
        for step in range(self.first_step, self.steps):
            # The processes take turns, so that together they take the whole batch.
            start = step * self.batch_size
            positions = range(start + self.rank, start + self.batch_size, self.world)
            yield [self.sample_at(position) for position in positions]

    def sample_at(self, position):
        """(epoch, index) of the sample at a position of the stream."""
        epoch, place = divmod(position, self.n)
        return epoch, int(epoch_order(self.n, self.seed, epoch)[place])


# -------------------------------------------------------------------------------------------- crops
IGNORE = 255  # the class of voxels that neither the loss nor the score looks at
UNKNOWN = 254  # the class of label values that a task does not name


def class_table(labels, ignore=()):
    """The class of every label value: (256,) uint8.

    labels: {value: class}. ignore: values that become IGNORE. All others become UNKNOWN."""
    table = np.full(256, UNKNOWN, np.uint8)
    for value, number in labels.items():
        table[int(value)] = number
    for value in ignore:
        table[value] = IGNORE
    return table


class Sample(NamedTuple):
    """One crop, or why there is none."""
    crop: torch.Tensor | None  # (C, *context) float16, as stored
    label: torch.Tensor | None  # (*context) uint8 classes
    draw: augment.Draw
    mask_seed: int
    name: str  # of the case
    fault: str  # why this sample could not be read, or ""


class Crops(Dataset):
    """(epoch, index) -> Sample: a random patch of case `index`, and what lies around it.

    preset: of augment.draw. A patch that is turned or shrunk needs voxels from beyond its border;
    so what is read is a larger box, its context.
    classes: a class_table; None where there are no labels.
    oversample: the probability that the patch must hold foreground (0.33 in finetuning)."""

    def __init__(self, cases, patch_size, seed, preset, classes=None, oversample=0.0):
        self.cases = cases
        self.patch = (patch_size,) * 3
        self.seed = seed
        self.preset = preset
        self.classes = classes
        self.oversample = oversample

    def __getitem__(self, key):
        epoch, index = key
        case = self.cases[index]

        # The draw comes first: it decides how large the context must be.
        draw = augment.draw(derive_seed(self.seed, epoch, index, "augment"), self.preset,
                            self.patch)
        crop_seed = derive_seed(self.seed, epoch, index, "crop")
        mask_seed = derive_seed(self.seed, epoch, index, "mask")

        # A file that cannot be read is noted, not raised: all processes have to stop together.
        try:
            crop, label = self.read(case, draw.context, crop_seed)
        except (OSError, EOFError, ValueError) as error:
            fault = f"cannot read {case.name}: {error}"
            return Sample(None, None, draw, mask_seed, case.name, fault)
        return Sample(crop, label, draw, mask_seed, case.name, fault="")

    def read(self, case, context, seed):
        """A random patch in its context: crop (C, *context) float16 and label (*context) uint8.

        Beyond the volume both are 0. Raises ValueError if the files do not fit each other or the
        task."""
        # Nothing is read of a memory-mapped file yet.
        volumes = [np.load(path, mmap_mode="r") for path in case.images]
        shapes = {volume.shape for volume in volumes}
        label = None
        if self.classes is not None:
            label = np.load(case.label, mmap_mode="r")
            shapes.add(label.shape)
        if len(shapes) > 1:
            raise ValueError(f"channels and label differ in shape: {sorted(shapes)}")

        # The patch lies in the middle of its context.
        start = self.patch_start(volumes[0].shape, label, np.random.default_rng(seed))
        margin = np.subtract(context, self.patch) // 2
        start = np.subtract(start, margin)

        crop = torch.from_numpy(np.stack([read_box(volume, start, context) for volume in volumes]))
        if label is None:
            return crop, None

        # From the source's label values to the task's classes.
        label = self.classes[read_box(label, start, context)]
        if (label == UNKNOWN).any():
            raise ValueError(f"{case.label} holds a value that the task's `labels` and `ignore` "
                             "do not name")
        return crop, torch.from_numpy(label)

    def patch_start(self, shape, label, rng):
        """The first voxel of a random patch in a volume, [d, h, w] (section 4.2 does not say how).

        All positions inside the volume are equally likely, or, where the patch must hold
        foreground, all that hold one random voxel of it. (The official code's lowest position just
        misses that voxel.) Where a volume is smaller than the patch, the start is negative."""
        needs_foreground = rng.random() < self.oversample
        fractions = rng.random(3)
        voxel = None
        if label is not None and needs_foreground:
            voxel = self.foreground_voxel(label, rng)

        start = []
        for axis in range(3):
            size = shape[axis]
            patch = self.patch[axis]
            if size <= patch:
                # The volume is centred in the patch.
                start.append(-((patch - size) // 2))
                continue

            # Along this axis, the patch may start at any voxel from lowest to highest.
            lowest = 0
            highest = size - patch
            if voxel is not None:
                lowest = max(lowest, voxel[axis] - patch + 1)
                highest = min(highest, voxel[axis])
            start.append(int(lowest + fractions[axis] * (highest - lowest + 1)))
        return start

    def foreground_voxel(self, label, rng):
        """A random voxel of any class but the background, (d, h, w); None if there is none.

        (The official code crashes on an empty label.)"""
        # Voxels that the task ignores are not looked for.
        is_foreground = (self.classes > 0) & (self.classes < UNKNOWN)
        voxels = np.flatnonzero(np.take(is_foreground, label))
        if len(voxels) == 0:
            return None
        chosen = voxels[rng.integers(len(voxels))]
        return np.unravel_index(chosen, label.shape)


def read_box(array, start, size):
    """A copy of the box [start, start + size) of an array; voxels outside the array are 0."""
    box = np.zeros(size, array.dtype)
    inside = []  # where the overlap lies in the array, as slices
    target = []  # where it lies in the box
    for first, length, n in zip(start, size, array.shape, strict=True):
        low = max(first, 0)
        high = min(first + length, n)
        if low >= high:
            return box  # there is no overlap
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first))

    box[tuple(target)] = array[tuple(inside)]
    return box


# ------------------------------------------------------------------------------------------ batches
class Batch(NamedTuple):
    """Samples, field by field. Crops differ in size, since their contexts do: they are a list."""
    crops: list
    labels: list | None
    draws: list
    mask_seeds: list
    names: list
    fault: str  # the first of its samples' faults, or ""


def collate(samples):
    """Samples -> Batch. It is augment.spatial that makes one tensor of the crops."""
    labels = [sample.label for sample in samples]
    faults = [sample.fault for sample in samples if sample.fault]
    return Batch(
        crops=[sample.crop for sample in samples],
        labels=None if labels[0] is None else labels,
        draws=[sample.draw for sample in samples],
        mask_seeds=[sample.mask_seed for sample in samples],
        names=[sample.name for sample in samples],
        fault=faults[0] if faults else "",
    )


def micro_batches(batch, size):
    """Yields the micro-batches of a batch, `size` samples each, in order."""
    for start in range(0, len(batch.crops), size):
        part = slice(start, start + size)
        yield batch._replace(
            crops=batch.crops[part],
            labels=None if batch.labels is None else batch.labels[part],
            draws=batch.draws[part],
            mask_seeds=batch.mask_seeds[part],
            names=batch.names[part],
        )


def make_loader(dataset, stream, workers, device):
    """The batches of a SampleStream, read ahead by `workers` processes."""
    return DataLoader(dataset, batch_sampler=stream, collate_fn=collate, num_workers=workers,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def ignore_signals(*_):
    """Ctrl-C and Slurm signal all processes of a job: a loader goes on until its trainer ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def training_loader(crops, batch_size, first_step, steps, processes, workers):
    """The batches of this process from first_step on, as a SampleStream with the crops' seed."""
    stream = SampleStream(len(crops.cases), crops.seed, batch_size, first_step, steps,
                          processes.rank, processes.world)
    return make_loader(crops, stream, workers, processes.device)


def to_device(batch, device):
    """Crops and labels of a batch on the device, as stored: float16 is half the bytes to copy."""
    crops = [resample.upload(crop, device) for crop in batch.crops]
    if batch.labels is None:
        return crops, None
    return crops, [resample.upload(label, device) for label in batch.labels]


# -------------------------------------------------------------------------------- files of a folder
def geometry_of(volume):
    """Path of the geometry of a prepared volume: out/volumes/x.npy -> out/geometry/x.json."""
    folder, source, name = volume.removesuffix(".npy").rsplit("/", 2)
    return f"{folder.removesuffix('volumes')}geometry/{source}/{name}.json"


def native_of(label):
    """Path of a label map as it was, on the scan's own grid, beside the prepared one."""
    return label.removesuffix(".npy") + "_native.nii.gz"


def read_scan(case):
    """What is segmented of a case -> volume (C, D, H, W) float16 tensor, and its geometry."""
    volume = np.stack([np.load(path) for path in case.images])
    with open(geometry_of(case.images[0]), encoding="utf-8") as file:
        geometry = json.load(file)
    return torch.from_numpy(volume), geometry


def read_truth(case, geometry):
    """What a segmentation is scored against: the source's label values (D, H, W), on the scan's
    own grid. So the label map is read as it was, not as it was prepared."""
    label = nibabel.load(native_of(case.label))
    return preprocess.on_axes(label, np.array(geometry["affine"]))
