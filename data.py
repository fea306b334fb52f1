"""Prepared folder -> crops: the index, splits by subject, the stateless sample stream, memory-mapped reading.

Every draw is a function of (seed, epoch, sample, purpose) alone, so the stream of samples, crops,
augmentations and masks is the same with any number of processes or workers, and after a restart. """

import csv
import functools
import glob
import hashlib
import json
import os
import signal
from collections import Counter
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
    """Seed of one draw: a 63-bit hash of (seed, epoch, sample, purpose), the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


IGNORE = 255  # class of voxels that neither the loss nor the score looks at
UNKNOWN = 254  # class of label values that a task does not name


class Volume(NamedTuple):
    """One row of the index, as prepare_data.py writes it; all text."""
    path: str
    source: str
    subject: str
    session: str
    sequence: str
    split: str
    label: str
    shape: str
    spacing: str
    sha256: str
    label_sha256: str = ""  # of the raw label file
    label_values: str = ""  # value:voxels native/prepared, sorted by value: "0:87120/87040 1:257/254"


class Case(NamedTuple):
    """What one sample is cut from: its channels (files on one grid), its label file or None."""
    name: str
    subject: str
    images: tuple[str, ...]
    label: str | None
    volumes: tuple[Volume, ...]


class Sample(NamedTuple):
    crop: torch.Tensor  # (C, *context) float16, as stored
    label: torch.Tensor | None  # (*context) uint8 classes
    draw: augment.Draw
    mask_seed: int
    name: str
    fault: str  # why this sample could not be read, or ""


class Batch(NamedTuple):
    crops: list
    labels: list | None
    draws: list
    mask_seeds: list
    names: list
    fault: str


def read_index(folder):
    """All index parts of a prepared folder as one list of Volume, sorted by path. UserError for a damaged
    part, or one that points out of the folder."""
    parts = sorted(glob.glob(os.path.join(glob.escape(folder), "index", "*.csv")))
    if not parts:
        raise UserError(f"{folder} has no index/*.csv: not a prepared folder, as prepare_data.py makes")

    volumes = {}
    for part in parts:
        try:
            with open(part, newline="", encoding="utf-8") as file:
                volumes |= {volume.path: volume for volume in read_part(part, csv.reader(file))}
        except FileNotFoundError as error:
            # A preparation in other shards may have replaced it meanwhile; a link to nowhere is a loss.
            if os.path.lexists(part):
                raise UserError(f"cannot read {part}: {error.strerror}; prepare it again") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read {part}: {error}; prepare it again") from None

    for volume in volumes.values():
        for path in (volume.path, volume.label):
            if ".." in path.split("/") or os.path.isabs(path):
                raise UserError(f"the index of {folder} points outside of it: {path}")
    return [volumes[path] for path in sorted(volumes)]


def read_part(part, rows):
    """Yields the Volumes of one index part, whose rows csv has split."""
    header = next(rows, [])
    missing = set(Volume._fields) - set(Volume._field_defaults) - set(header)
    if missing:
        raise UserError(f"{part} lacks the columns {', '.join(sorted(missing))}; prepare it again")

    # A column that older versions did not write is read from behind the row's end, where "" stands.
    places = [header.index(field) if field in header else len(header) for field in Volume._fields]
    for row in rows:
        if len(row) == len(header):
            row.append("")
            yield Volume._make([row[place] for place in places])
        elif row:
            raise UserError(f"{part} is damaged at the volume {row[0]}; prepare it again")


def pretraining_cases(folder):
    """Each volume the paper pretrains on is a sample of its own (section 2); test cases are left out."""
    return [Case(v.path, f"{v.source}/{v.subject}", (os.path.join(folder, v.path),), None, (v,))
            for v in read_index(folder) if v.split != "test"]


def labelled_cases(folder, source, sequences):
    """Subjects' sessions that have a label and every one of `sequences`, the channels, in that order;
    not those whose split is pretrain, which the paper sets aside (63 of ISLES22)."""
    sessions = {}
    for volume in read_index(folder):
        if volume.label and source in (None, volume.source) and volume.split != "pretrain":
            session = sessions.setdefault((volume.source, volume.subject, volume.session), {})
            session.setdefault(volume.sequence, []).append(volume)

    cases = []
    for (origin, subject, session), found in sorted(sessions.items()):
        if all(sequence in found for sequence in sequences):
            channels = choose_channels([found[sequence] for sequence in sequences])
            cases.append(Case("_".join(p for p in (subject, session) if p), f"{origin}/{subject}",
                              tuple(os.path.join(folder, v.path) for v in channels),
                              os.path.join(folder, channels[0].label), channels))

    if twice := [name for name, n in Counter(case.name for case in cases).items() if n > 1]:
        raise UserError(f"{folder} has {twice[0]} in several sources: name one in the task, as "
                        "`source`")
    return cases


def choose_channels(candidates):
    """One volume a sequence, of lists of labelled ones. A sequence may have several runs, each with a
    label map of its own: the first whose label map most channels share, so that runs do not mix."""
    best, most = None, 0
    for first in candidates[0]:
        channels = []
        for volumes in candidates:
            same = [v for v in volumes if v.label_sha256 == first.label_sha256]
            channels.append((same or volumes)[0])
        channels[0] = first

        shared = sum(v.label_sha256 == first.label_sha256 for v in channels)
        if shared > most:
            best, most = tuple(channels), shared
    return best


def class_table(labels, ignore=()):
    """256 numbers, raw label value -> class. Values that the task does not name are errors: class 254."""
    table = np.full(256, UNKNOWN, np.uint8)
    for value, number in labels.items():
        table[int(value)] = number
    table[list(ignore)] = IGNORE
    return table


def split_subjects(subjects, fraction, seed):
    """Sorted unique subjects -> (kept, held out): a seeded ceil(fraction) of them, at least one."""
    subjects = sorted(set(subjects))
    order = np.random.default_rng(seed).permutation(len(subjects))
    held = {subjects[i] for i in order[:max(1, int(np.ceil(fraction * len(subjects))))]}
    return [s for s in subjects if s not in held], sorted(held)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order of n samples in one epoch."""
    return np.random.default_rng(derive_seed(seed, epoch, "order")).permutation(n)


class SampleStream(Sampler):
    """Batches of (epoch, index) for one process: an endless stream, each sample once an epoch, that wraps
    into the next epoch inside a batch. Step s takes positions s * batch_size ... of it, process r every
    world-th of those."""

    def __init__(self, n, seed, batch_size, first_step, steps, rank=0, world=1):
        self.n, self.seed, self.batch_size = n, seed, batch_size
        self.first_step, self.steps, self.rank, self.world = first_step, steps, rank, world

    def __iter__(self):
        for step in range(self.first_step, self.steps):
            positions = range(step * self.batch_size, (step + 1) * self.batch_size)[self.rank::self.world]
            yield [(p // self.n, int(epoch_order(self.n, self.seed, p // self.n)[p % self.n]))
                   for p in positions]


class Crops(Dataset):
    """(epoch, index) -> Sample: one randomly placed patch of one case, with the context its augmentation
    needs.

    classes: 256 numbers, raw label value -> class (IGNORE where the task ignores it); None without labels.
    oversample: probability that the patch holds a foreground voxel (0.33 in finetuning, per sample).
    """

    def __init__(self, cases, patch_size, seed, preset, classes=None, oversample=0.0):
        self.cases, self.patch, self.seed, self.preset = cases, (patch_size,) * 3, seed, preset
        self.classes, self.oversample = classes, oversample

    def __getitem__(self, key):
        epoch, index = key
        case = self.cases[index]
        draw = augment.draw(derive_seed(self.seed, epoch, index, "augment"), self.preset, self.patch)
        mask_seed = derive_seed(self.seed, epoch, index, "mask")
        try:
            crop, label = self.read(case, draw.context, derive_seed(self.seed, epoch, index, "crop"))
        except (OSError, EOFError, ValueError) as error:  # as a value, so that all processes stop together
            return Sample(None, None, draw, mask_seed, case.name, f"cannot read {case.name}: {error}")
        return Sample(crop, label, draw, mask_seed, case.name, "")

    def read(self, case, context, seed):
        """Crop (C, *context) float16 and label (*context) uint8 around one placed patch; 0 beyond the
        volume."""
        volumes = [np.load(path, mmap_mode="r") for path in case.images]
        label = np.load(case.label, mmap_mode="r") if self.classes is not None else None
        grids = {v.shape for v in volumes} | ({label.shape} if label is not None else set())
        if len(grids) > 1:
            raise ValueError(f"channels and label differ in shape: {sorted(grids)}")
        rng = np.random.default_rng(seed)
        start = self.patch_start(volumes[0].shape, label, rng)
        start = [s - (c - p) // 2 for s, c, p in zip(start, context, self.patch, strict=True)]
        crop = torch.from_numpy(np.stack([read_box(v, start, context) for v in volumes]))
        if label is None:
            return crop, None
        label = self.classes[read_box(label, start, context)]
        if (label == UNKNOWN).any():
            raise ValueError(f"{case.label} holds a value that the task's `labels` and `ignore` do not name")
        return crop, torch.from_numpy(label)

    def patch_start(self, shape, label, rng):
        """First voxel of the patch: uniform over the volume, or around a random foreground voxel. A volume
        smaller than the patch is centred in it. The reference's lower bound, voxel - patch, could just miss
        the voxel."""
        forced = rng.random() < self.oversample
        fraction = rng.random(3)
        low, high = [0, 0, 0], [s - p for s, p in zip(shape, self.patch, strict=True)]
        if label is not None and forced:
            foreground = np.flatnonzero((self.classes > 0) & (self.classes < UNKNOWN))
            voxels = np.flatnonzero(np.isin(label, foreground))
            if len(voxels):  # an empty label is placed uniformly; the reference crashes
                voxel = np.unravel_index(voxels[rng.integers(len(voxels))], shape)
                low = [max(0, v - p + 1) for v, p in zip(voxel, self.patch, strict=True)]
                high = [min(v, h) for v, h in zip(voxel, high, strict=True)]
        return [-((p - s) // 2) if s <= p else int(lo + f * (h - lo + 1))
                for lo, h, f, s, p in zip(low, high, fraction, shape, self.patch, strict=True)]


def geometry_of(volume):
    """Where the geometry of a prepared volume stands: out/volumes/x.npy -> out/geometry/x.json."""
    folder, source, name = volume.removesuffix(".npy").rsplit("/", 2)
    return f"{folder.removesuffix('volumes')}geometry/{source}/{name}.json"


def native_of(label):
    """Where a prepared label stands as it was, on the scan's own grid."""
    return label.removesuffix(".npy") + "_native.nii.gz"


def read_case(case):
    """A whole case: (volume (C, D, H, W) float16 tensor, geometry, label values on the scan's own grid)."""
    volume = np.stack([np.load(path) for path in case.images])
    with open(geometry_of(case.images[0]), encoding="utf-8") as file:
        geometry = json.load(file)
    label = nibabel.load(native_of(case.label))
    return torch.from_numpy(volume), geometry, preprocess.on_axes(label, np.array(geometry["affine"]))


def read_box(array, start, size):
    """Copy the box [start, start + size) out of a memory-mapped array; voxels outside the array are 0."""
    box = np.zeros(size, array.dtype)
    inside = tuple(slice(max(0, s), max(0, min(n, s + e)))
                   for s, e, n in zip(start, size, array.shape, strict=True))
    target = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    if all(i.stop > i.start for i in inside):
        box[target] = array[inside]
    return box


def collate(samples):
    """Crops of unequal context travel as a list; augment.spatial makes the batch."""
    labels = [s.label for s in samples]
    fault = next((s.fault for s in samples if s.fault), "")
    return Batch([s.crop for s in samples], None if labels[0] is None else labels, [s.draw for s in samples],
                 [s.mask_seed for s in samples], [s.name for s in samples], fault)


def micro_batch(batch, start, size):
    """Micro-batch: `size` samples of a batch."""
    part = slice(start, start + size)
    labels = None if batch.labels is None else batch.labels[part]
    return batch._replace(crops=batch.crops[part], labels=labels, draws=batch.draws[part],
                          mask_seeds=batch.mask_seeds[part])


def ignore_signals(_):
    """A loader process goes on when all of a job are signalled (Ctrl-C, Slurm): its trainer ends it, after
    the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, stream, workers, device):
    return DataLoader(dataset, batch_sampler=stream, collate_fn=collate, num_workers=workers,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def to_device(batch, device):
    """Crops to the device as stored (float16, half the bytes), labels likewise."""
    crops = [resample.upload(crop, device) for crop in batch.crops]
    labels = None if batch.labels is None else [resample.upload(label, device) for label in batch.labels]
    return crops, labels


def check_files(folder, paths):
    """UserError unless all these files of a prepared folder are there. Each of its folders is listed once,
    which is quick for 45,000 files on a network disk, too."""
    listed, missing = {}, []
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in listed:
            try:
                listed[parent] = {entry.name for entry in os.scandir(parent)}
            except OSError:
                listed[parent] = set()
        if name not in listed[parent]:
            missing.append(path)
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} files that its index names, the first "
                        f"{min(missing)}: copy the whole folder, or prepare it again")
