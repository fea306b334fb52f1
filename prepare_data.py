"""Raw NIfTI scans -> prepared folder (paper, section 2): RAS, clipped, in [0, 1], cropped to the head, 1 mm.

    python prepare_data.py --source brats21 --input /raw/BraTS2021 --out datasets/brains45k --workers 8
    python prepare_data.py --source manifest --input scans.csv --out datasets/mine

Order as in the official code: crop, normalise, resample (the paper's text: resample, clip, normalise, crop).
"""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
from common import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    source: str  # layout of the input: a row of SOURCES, or manifest
    input: str  # folder with the raw scans, or the manifest's csv file
    out: str  # prepared folder; several sources may share one
    workers: int = 2  # processes, one session at a time each
    shard: str = "0/1"  # i/n: prepare every n-th session, from the i-th; shards of one folder may run at once


class Rejected(UserError):
    """A scan that cannot be used. damage: it is broken; otherwise a rule of the paper's code keeps it out."""

    def __init__(self, reason, damage=True):
        super().__init__(reason)
        self.damage = damage


# ----------------------------------------------------------------------------------- preprocessing, section 2
def load_scan(path):
    """A NIfTI file, its header checked, as a nibabel image without trailing axes of one. Raises Rejected."""
    try:
        image = nib.load(path)
    except FileNotFoundError:
        raise Rejected(f"{path}: no such file") from None
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError, EOFError,
            ValueError, zlib.error) as error:
        raise Rejected(f"{path}: unreadable ({error})") from None
    shape = image.shape[:3] + tuple(n for n in image.shape[3:] if n > 1)
    if len(shape) != 3:
        raise Rejected(f"{path}: not 3-D but {' x '.join(map(str, image.shape))}", damage=False)
    if min(shape) < 15:  # the official code's rule of admission
        raise Rejected(f"{path}: a side of {min(shape)} voxels, under 15", damage=False)
    columns = np.linalg.norm(image.affine[:3, :3], axis=0)
    if not np.isfinite(columns).all() or (columns < 1e-6).any() or abs(np.linalg.det(image.affine)) < 1e-9:
        raise Rejected(f"{path}: no affine scale")
    return image


def read_voxels(nifti):
    """A nibabel image (or path) -> float32 (D, H, W) in RAS order, and the orientation it was stored in.

    The closest canonical axes of nibabel's affine, whatever the form codes say; an oblique grid stays oblique
    (the official code flips only, and stops at permuted axes). Raises Rejected for damage."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    name = image.get_filename() or "image"
    try:
        voxels = image.get_fdata(dtype=np.float32).reshape(image.shape[:3])
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise Rejected(f"{name}: truncated or unreadable ({error})") from None
    if not np.isfinite(voxels).all():
        raise Rejected(f"{name}: {np.count_nonzero(~np.isfinite(voxels))} voxels are not finite")
    orientation = nib.io_orientation(image.affine)
    return nib.apply_orientation(voxels, orientation), orientation


def tight_box(voxels):
    """Half-open box ((start, stop), ...) of the voxels > 0. The official code's is one voxel larger at the
    high side."""
    box = []
    for axis in range(3):
        filled = np.flatnonzero((voxels > 0).any(tuple(a for a in range(3) if a != axis)))
        if not len(filled):
            raise Rejected("constant or empty: no voxel above 0")
        box.append((int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def union_box(images):
    """The box that holds the tight boxes of several images on one grid: the channels of one task share it."""
    boxes = np.array([tight_box(read_voxels(image)[0]) for image in images])
    return tuple(zip(boxes[:, :, 0].min(0).tolist(), boxes[:, :, 1].max(0).tolist(), strict=True))


def preprocess(nifti, box=None):
    """nibabel image or path -> (volume (D, H, W) float32 in [0, 1], RAS at 1 mm; geometry, what `restore`
    needs).

    Negative values are clamped to 0; then y = (min(x, q99) - m) / (q99 - m), with m the minimum of the crop
    and q99 the 99th percentile of its voxels > m: what the official clip, z-normalisation and rescaling come
    to together. box: half-open voxel ranges ((start, stop), ...) of the RAS grid instead of the tight ones.
    Raises Rejected."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    voxels, orientation = read_voxels(image)
    clamped = int(np.count_nonzero(voxels < 0))
    voxels = np.maximum(voxels, 0)
    box = tight_box(voxels) if box is None else [tuple(map(int, pair)) for pair in np.reshape(box, (3, 2))]
    crop = voxels[tuple(slice(*pair) for pair in box)]
    low = crop.min()
    if not (crop > low).any():
        raise Rejected(f"{image.get_filename() or 'image'}: constant")
    high = np.quantile(crop[crop > low], 0.99)
    spacing = nib.affines.voxel_sizes(image.affine)[np.argsort(orientation[:, 0])]
    shape = [max(1, round(n * s)) for n, s in zip(crop.shape, spacing.tolist(), strict=True)]
    volume = resample((np.minimum(crop, high) - low) / (high - low), shape)
    geometry = {"shape": list(image.shape[:3]), "affine": image.affine.tolist(),
                "orientation": orientation.tolist(), "spacing": spacing.tolist(),
                "box": [list(pair) for pair in box], "resampled": shape,
                "clamped": clamped}
    return volume, geometry


@functools.lru_cache(maxsize=64)
def resampling_matrix(n_in, n_out, antialias):
    """Cubic spline resampling of one axis as a matrix (n_out, n_in), float64: scikit-image's resize(order=3).

    Gaussian antialias filter, spline prefilter (the inverse of the B-spline's values at the voxels), cubic
    weights at the new pixel centres; every boundary is mirrored about the outermost voxel."""
    def mirrored(index):  # ... 2 1 | 0 1 2 ... n-1 | n-2 ...
        period = max(1, 2 * (n_in - 1))
        index = index % period
        return np.minimum(index, period - index) if n_in > 1 else index * 0

    def matrix(index, weights):
        rows = np.zeros((len(index), n_in))
        np.add.at(rows, (np.arange(len(index))[:, None], mirrored(index)), weights)
        return rows

    at = np.arange(n_in)[:, None]
    sigma = max(0.0, (n_in / n_out - 1) / 2) if antialias else 0.0
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / max(sigma, 1e-12)) ** 2)
    smooth = matrix(at + offsets, kernel / kernel.sum())
    spline = matrix(at + np.arange(-1, 2), np.array([1, 4, 1]) / 6)
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    first = np.floor(centres).astype(int)
    t = (centres - first)[:, None]
    cubic = np.concatenate([(1 - t) ** 3, 4 - 6 * t ** 2 + 3 * t ** 3,
                            1 + 3 * t + 3 * t ** 2 - 3 * t ** 3, t ** 3], 1) / 6
    return matrix(first[:, None] + np.arange(-1, 3), cubic) @ np.linalg.solve(spline, smooth)


def resample(volume, shape):
    """(D, H, W) -> shape, as scikit-image's resize(order=3): one matrix product an axis, clipped to the
    input's range. Like there, every axis is smoothed that shrinks."""
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))
    for axis in sorted(range(3), key=lambda a: shape[a] / volume.shape[a]):  # those that shrink most first
        if shape[axis] != volume.shape[axis]:
            operator = resampling_matrix(volume.shape[axis], shape[axis], True)
            operator = torch.from_numpy(operator.astype(np.float32))
            x = torch.tensordot(operator, x, ([1], [axis])).movedim(0, axis)
    return x.clamp(float(volume.min()), float(volume.max())).contiguous().numpy()


def preprocess_label(nifti, geometry):
    """Label map on the scan's grid -> uint8 (D, H, W) on the grid of its prepared volume, nearest voxel.

    Raises Rejected if the grids differ by more than 1e-2 mm at a corner, or for values that are no integers
    0-255."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    check_same_grid(image, geometry)
    voxels, _ = read_voxels(image)
    if (voxels != np.round(voxels)).any() or voxels.min() < 0 or voxels.max() > 255:
        raise Rejected(f"{image.get_filename() or 'label'}: label values unknown (not integers 0-255)")
    crop = voxels[tuple(slice(*pair) for pair in geometry["box"])].astype(np.uint8)
    return nearest(crop, geometry["resampled"])


def check_same_grid(label, geometry):
    """Corners of the label's RAS grid against those of the scan's."""
    shapes, corners = [], []
    for shape, affine in ((label.shape[:3], label.affine), (geometry["shape"], np.array(geometry["affine"]))):
        canonical = affine @ nib.orientations.inv_ornt_aff(nib.io_orientation(affine), shape)
        order = np.argsort(nib.io_orientation(affine)[:, 0])
        ends = np.array([n - 1 for n in np.array(shape)[order]])
        shapes.append(tuple(ends))
        corners.append(nib.affines.apply_affine(canonical, np.array(list(np.ndindex(2, 2, 2))) * ends))
    if shapes[0] != shapes[1] or np.abs(corners[0] - corners[1]).max() > 1e-2:
        raise Rejected(f"{label.get_filename() or 'label'}: label grid differs from image grid")


def nearest(array, shape):
    """Nearest voxel, pixel centres aligned: index floor((i + 0.5) * n_in / n_out) on each axis."""
    for axis, n in enumerate(shape):
        index = ((np.arange(n) + 0.5) * array.shape[axis] / n).astype(int)
        array = array.take(index, axis)
    return array


def restore(array, geometry):
    """Back to the scan's own grid and axis order: (C, D, H, W) logits trilinearly, (D, H, W) integers
    nearest.

    Numpy array or tensor in, numpy array out. Outside the crop box everything is 0: with logits, a tie that
    argmax gives to class 0, the background."""
    array = array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    box = geometry["box"]
    size = [stop - start for start, stop in box]
    orientation = np.array(geometry["orientation"])
    if array.ndim == 4:
        crop = torch.from_numpy(array)[None]
        crop = F.interpolate(crop, size=size, mode="trilinear", align_corners=False)[0].numpy()
    else:
        crop = nearest(array, size)[None]
    order = np.argsort(orientation[:, 0])
    full = np.zeros((len(crop), *np.array(geometry["shape"])[order]), crop.dtype)
    full[(slice(None), *(slice(*pair) for pair in box))] = crop
    # RAS axis orientation[a, 0] came from stored axis a, flipped where orientation[a, 1] is -1.
    full = np.flip(full, [1 + int(axis) for axis, sign in orientation if sign < 0])
    full = full.transpose(0, *(1 + int(axis) for axis, _ in orientation))
    return np.ascontiguousarray(full if array.ndim == 4 else full[0])


# ------------------------------------------------------------------------------------------- sources, Table 1
class Source(NamedTuple):
    """A layout: pattern on the relative path (subject, session, suffix), sequence of each suffix, label
    suffixes."""
    pattern: str
    sequences: dict
    labels: tuple
    hold_out: float = 0.0  # share of the subjects that are kept for testing, seeded


class Scan(NamedTuple):
    """One volume to prepare."""
    path: str
    subject: str
    session: str
    sequence: str
    label: str  # path of its label map, or ""
    split: str


SOURCES = {
    "brats21": Source(r"(?P<subject>BraTS2021_\d{5})/(?P=subject)_(?P<suffix>flair|t1|t1ce|t2|seg)"
                      r"\.nii(\.gz)?$",
                      {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}, ("seg",),
                      hold_out=0.25),  # 1,251 -> 938 and 313; the text's "20 %" would be 251
    "bids": Source(r"(?P<subject>sub-[A-Za-z0-9]+)/((?P<session>ses-[A-Za-z0-9]+)/)?((anat|dwi|swi|perf)/)?"
                   r"(?P=subject)(_[a-z]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?$",
                   {"T1w": "T1", "T2w": "T2", "FLAIR": "FLAIR", "flair": "FLAIR", "PDw": "PD",
                    "T2star": "T2star", "T2starw": "T2star", "swi": "SWI", "dwi": "DWI", "adc": "ADC",
                    "angio": "TOF", "T1ce": "T1ce"},
                   ("lesion", "msk", "mask", "dseg", "label", "roi")),
}


def find_scans(source, folder):
    """Walk a folder -> (volumes, number of files found, {reason: number of files skipped}).

    Labels are no volumes of their own: they count as skipped, "label". Raises UserError if there is
    nothing."""
    if not os.path.isdir(folder):
        raise UserError(f"--input {folder} is not a folder")
    row, volumes, labels, skipped, found = SOURCES[source], [], {}, Counter(), 0
    for top, folders, files in os.walk(folder):
        folders.sort()
        for path in (os.path.relpath(os.path.join(top, name), folder) for name in sorted(files)):
            if not path.endswith((".nii", ".nii.gz")):
                continue
            found += 1
            match = re.search(row.pattern, path)
            if any(part.startswith((".", "_")) for part in path.split("/")):
                skipped["hidden"] += 1
            elif not match:
                skipped["name not of this source"] += 1
            elif match["suffix"] in row.labels:
                labels.setdefault((match["subject"], match.groupdict().get("session") or ""), path)
                skipped["label"] += 1
            elif "derivatives" in path.split("/"):
                skipped["derivative"] += 1
            elif match["suffix"] not in row.sequences:
                skipped[f"sequence {match['suffix']}"] += 1
            else:
                sequence = "T1ce" if "_ce-" in path else row.sequences[match["suffix"]]
                session = match.groupdict().get("session") or ""
                volumes.append(Scan(path, match["subject"], session, sequence, "", ""))
    if not found:
        raise UserError(f"no .nii or .nii.gz file under {folder}; for DICOM, run dcm2niix first")
    return attach_labels(row, folder, volumes, labels), found, skipped


def attach_labels(row, folder, volumes, labels):
    """Give each volume its session's label map, if it lies on its grid or on no volume's, and its split."""
    held = set()
    if row.hold_out and labels:
        held = set(data.split_subjects([subject for subject, _ in labels], row.hold_out, 0)[1])
    matches = {}
    for volume in volumes:
        label = labels.get((volume.subject, volume.session), "")
        matches[volume] = label and _same_header(f"{folder}/{volume.path}", f"{folder}/{label}")
    fits = {(v.subject, v.session) for v, match in matches.items() if match}
    finished = []
    for volume in volumes:
        key = volume.subject, volume.session
        label = labels.get(key, "") if matches[volume] or key not in fits else ""
        split = "test" if volume.subject in held else "train" if label else "pretrain"
        finished.append(volume._replace(label=label, split=split))
    return finished


def _same_header(scan, label):
    try:
        scan, label = load_scan(scan), load_scan(label)
    except Rejected:
        return False
    return scan.shape[:3] == label.shape[:3] and np.allclose(scan.affine, label.affine, atol=1e-2)


def read_manifest(path):
    """csv with the columns path, subject, session, sequence and optionally label, split -> like
    find_scans."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from None
    if not rows or not {"path", "subject", "session", "sequence"} <= set(rows[0]):
        raise UserError(f"{path}: a manifest needs the columns path,subject,session,sequence[,label][,split]")
    scans = []
    for row in rows:
        label = row.get("label") or ""
        split = row.get("split") or ("train" if label else "pretrain")
        if split not in ("pretrain", "train", "test"):
            raise UserError(f"{path}: split {split!r} of {row['path']}: choose pretrain, train or test")
        scans.append(Scan(row["path"], row["subject"], row["session"], row["sequence"], label, split))
    return scans, len(scans), Counter()


# -------------------------------------------------------------------------------------------- prepared folder
def stem_of(source, scan):
    """Name of a prepared volume without folder and ending; the hash tells apart what shares the rest."""
    parts = [re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in (scan.subject, scan.session, scan.sequence)]
    return f"{source}/{'_'.join([*parts, hashlib.sha256(scan.path.encode()).hexdigest()[:8]])}"


def save_array(path, array):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with common.atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def prepare_session(source, root, out, scans):
    """Prepare the volumes of one session; those that share a label share the union of their boxes.

    -> ([index rows], [(path, reason, damage)]). The geometry is written last: where it exists, all the rest
    does."""
    torch.set_num_threads(1)
    rows, rejected, boxes = [], [], {}
    for scan in scans:
        stem = stem_of(source, scan)
        record = f"{out}/geometry/{stem}.json"
        try:
            if not os.path.exists(record):
                image = load_scan(os.path.join(root, scan.path))
                channels = [s.path for s in scans if s.label == scan.label] if scan.label else [scan.path]
                if len(channels) > 1 and scan.label not in boxes:
                    boxes[scan.label] = shared_box(root, channels, image)
                prepare_volume(root, out, stem, scan, image, boxes.get(scan.label))
            with open(record, encoding="utf-8") as file:
                rows.append(json.load(file)["row"])
        except Rejected as reason:
            rejected.append((scan.path, str(reason), reason.damage))
    return rows, rejected


def shared_box(root, paths, image):
    """Union of the tight boxes of a session's volumes that can be read and lie on the same grid as
    `image`."""
    usable = []
    for path in paths:
        try:
            other = load_scan(os.path.join(root, path))
            tight_box(read_voxels(other)[0])
        except Rejected:
            continue  # it is rejected by name when its turn comes
        if other.shape == image.shape and np.allclose(other.affine, image.affine, atol=1e-2):
            usable.append(other)
    return union_box(usable) if usable else None


def prepare_volume(root, out, stem, scan, image, box):
    """Write volume, label (also as it is, for scores on the scan's own grid) and geometry of one scan."""
    volume, geometry = preprocess(image, box)
    label = ""
    if scan.label:
        label = f"labels/{stem}.npy"
        truth = load_scan(os.path.join(root, scan.label))
        save_array(f"{out}/{label}", preprocess_label(truth, geometry))
        values = np.asarray(truth.dataobj).reshape(truth.shape[:3]).astype(np.uint8)
        with common.atomic(f"{out}/labels/{stem}_native.nii.gz") as temporary:
            nib.Nifti1Image(values, truth.affine).to_filename(temporary)
    with open(os.path.join(root, scan.path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    row = {"path": f"volumes/{stem}.npy", "source": stem.split("/")[0], "subject": scan.subject,
           "session": scan.session, "sequence": scan.sequence, "split": scan.split, "label": label,
           "shape": "x".join(map(str, volume.shape)),
           "spacing": "x".join(f"{s:g}" for s in geometry["spacing"]), "sha256": digest}
    save_array(f"{out}/volumes/{stem}.npy", volume.astype(np.float16))
    os.makedirs(os.path.dirname(f"{out}/geometry/{stem}"), exist_ok=True)
    common.write_text(f"{out}/geometry/{stem}.json", json.dumps(geometry | {"row": row}))


def main(cfg):
    if cfg.source not in (*SOURCES, "manifest"):
        raise UserError(f"source {cfg.source!r}: choose {', '.join(SOURCES)} or manifest")
    shard, _, shards = cfg.shard.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise UserError(f"shard {cfg.shard!r}: expected i/n with i from 0 to n - 1, as 3/64")
    root = os.path.dirname(cfg.input) if cfg.source == "manifest" else cfg.input
    manifest = cfg.source == "manifest"
    scans, found, skipped = read_manifest(cfg.input) if manifest else find_scans(cfg.source, root)
    sessions = {}
    for scan in scans:
        sessions.setdefault((scan.subject, scan.session), []).append(scan)
    mine = [sessions[key] for key in sorted(sessions)][int(shard)::int(shards)]
    elsewhere = len(scans) - sum(map(len, mine))

    rows, rejected = [], []
    work = functools.partial(prepare_session, cfg.source, root, cfg.out)
    with (ProcessPoolExecutor(cfg.workers) as pool,
          tqdm(total=len(scans) - elsewhere, desc=f"prepare {cfg.source}", unit="volume") as progress):
        for done, refused in (pool.map(work, mine) if cfg.workers > 1 else map(work, mine)):
            rows += done
            rejected += refused
            progress.update(len(done) + len(refused))
    part = f"{cfg.source}-{shard}of{shards}.csv"
    write_table(f"{cfg.out}/index/{part}", data.Volume._fields, [row.values() for row in rows])
    write_table(f"{cfg.out}/rejected/{part}", ("path", "reason"), [reason[:2] for reason in rejected])

    for path, reason, _ in rejected:
        print(f"rejected {path}: {reason}")
    if elsewhere:
        skipped["other shards"] = elsewhere
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    print(f"{cfg.source}: {found} files found = {len(rows)} prepared + {skipped.total()} skipped by rule"
          + (f" ({reasons})" if reasons else "") + f" + {len(rejected)} rejected")
    return int(any(damage for *_, damage in rejected))


def write_table(path, columns, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with common.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    common.run(main, Config)
