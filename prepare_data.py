"""Raw NIfTI scans -> prepared folder (paper, section 2): RAS, clipped, in [0, 1], cropped to the head, 1 mm.

    python prepare_data.py --source brats21 --input /raw/BraTS2021 --out datasets/brains45k --workers 8
    python prepare_data.py --source manifest --input scans.csv --out datasets/mine --dry-run
    python prepare_data.py --out datasets/brains45k --table

Order as in the official code: crop, normalise, resample (the paper's text: resample, clip, normalise, crop).
"""

import contextlib
import csv
import ctypes
import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from nibabel.freesurfer.mghformat import MGHHeader
from tqdm import tqdm

import augment
import common
import data
import sources
from common import UserError
from sources import note, readable, say


@dataclasses.dataclass(frozen=True)
class Config:
    source: str | None = None  # layout of the input: a row of sources.SOURCES, or manifest
    input: str | None = None  # folder with the raw scans, or the manifest's csv file
    out: str = "datasets/brains45k"  # prepared folder; several sources may share one
    name: str | None = None  # what the index calls it, for several inputs of one source; default: the source
    workers: int = 2  # processes, at least one, one session at a time each
    shard: str = "0/1"  # i/n: prepare every n-th session, from the i-th; shards of one folder may run at once
    dry_run: bool = False  # list what would be taken and what skipped, and why; write nothing
    table: bool = False  # print Table 1 of a prepared folder, beside the paper's numbers


class Rejected(UserError):
    """A scan that cannot be used. damage: it is broken; otherwise a rule of the paper's code keeps
    it out.

    path: the file, with which the message begins. A list that names the file already shows the
    `reason`."""

    def __init__(self, reason, damage=True, path=""):
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.damage = damage
        self.path = path


# ----------------------------------------------------------------------------------- reading a scan
# What nibabel, gzip and numpy raise on files that are cut, overwritten or no NIfTI.
DAMAGE = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError, EOFError,
          ValueError, TypeError, OverflowError, MemoryError, zlib.error)

# A format by its first bytes: where they stand, what they are. A pair of .hdr and .img is left to
# nibabel.
SIGNATURES = ((344, b"n+1", nib.Nifti1Image), (4, b"n+2", nib.Nifti2Image),
              (0, b"\0\0\0\1", nib.MGHImage))
GZIP = b"\x1f\x8b"


@contextlib.contextmanager
def naming(path):
    """Whatever goes wrong with one scan inside is Rejected, and the message names its file,
    once."""
    try:
        yield
    except Rejected as error:
        raise Rejected(error.reason, error.damage, error.path or path) from None
    except UserError:  # a full disk is no fault of the scan: it ends the whole preparation
        raise
    except FileNotFoundError:
        raise Rejected("no such file", path=path) from None
    except DAMAGE as error:
        raise Rejected(f"unreadable ({one_line(error, path)})", path=path) from None
    # One scan of 45,000 must not end a night's work, whatever a reader raises that was never seen
    # before. Nothing is hidden: the scan is rejected by name, with the type and the message.
    except Exception as error:
        raise Rejected(f"{type(error).__name__}: {one_line(error, path)}", path=path) from error


def one_line(error, path):
    """The message of an exception in one line, without the path; with its type where the message
    does not stand alone."""
    text = getattr(error, "strerror", None) or str(error)
    if not text or isinstance(error, (ValueError, TypeError, ArithmeticError, MemoryError)):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.replace(path, "it").split())


# What stands where a scan was expected, by a mark in its first bytes.
STRANGERS = {b"dicm": "DICOM: run dcm2niix first", b"<html": "a web page: the download needs a login",
             b"<!doctype html": "a web page: the download needs a login",
             b"https://git-lfs": "a git-lfs pointer: run git lfs pull"}


def load_other(path):
    """A pair of .hdr and .img, or what else nibabel reads by its name. Raises Rejected."""
    with open(path, "rb") as file:
        start = file.read(512).lower()
    for mark, what in STRANGERS.items():
        if mark in start:
            raise Rejected(f"unreadable ({what})")

    try:
        return nib.load(path)
    except (nib.filebasedimages.ImageFileError, gzip.BadGzipFile, TypeError):
        what = "no scan by its first bytes" if start else "an empty file"
        raise Rejected(f"unreadable ({what})") from None


def first_bytes(file):
    """Of an open file -> (is it packed by gzip?, nibabel's class for what is inside, or None)."""
    start = file.read(4096)
    file.seek(0)

    packed = start.startswith(GZIP)
    if packed:
        start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, 1024)
    kinds = [kind for place, mark, kind in SIGNATURES if start.startswith(mark, place)]
    return packed, kinds[0] if kinds else None


def read_header(path, channel=None):
    """The nibabel image of a file, its header checked, its voxels not to be read. Raises
    Rejected."""
    with naming(path), open(path, "rb") as file:
        packed, kind = first_bytes(file)
        if kind is None:
            image = load_other(path)
        elif packed:
            image = kind.from_stream(gzip.GzipFile(fileobj=file))
        else:
            image = kind.from_stream(file)
        return checked(image, channel)[0]


def load_scan(path, channel=None):
    """A file of NIfTI-1, NIfTI-2 or FreeSurfer (.mgz), told by its first bytes, or a pair of .hdr
    and .img -> a nibabel image, its header checked. Raises Rejected.

    A packed file is unpacked whole, in memory: only so is its checksum looked at. channel: which
    volume of a 4-D file. What is known of the file stands in the image's `extra`: path, size, time,
    notes, sha256 (None if it was not read whole)."""
    path = os.fspath(path)
    with naming(path), open(path, "rb") as file:
        state = os.fstat(file.fileno())
        packed, kind = first_bytes(file)
        digest = None
        if kind is None:
            image, notes = checked(load_other(path), channel)
        elif not packed and path.lower().endswith((".nii", ".mgh")):  # read from the disk as needed
            image, notes = checked(nib.load(path), channel)
        else:
            content = file.read()
            digest = hashlib.sha256(content).hexdigest()
            if packed:
                header = kind.from_stream(gzip.GzipFile(fileobj=io.BytesIO(content)))
                header, _ = checked(header, channel)
                size = math.prod(header.shape) * header.get_data_dtype().itemsize
                content = unpack(content, header.dataobj.offset + size + 2 ** 20)
            image, notes = checked(kind.from_bytes(content), channel)

        if channel is not None:
            image = image.slicer[..., channel]
        image.extra = {"path": path, "size": state.st_size, "mtime": state.st_mtime_ns,
                       "sha256": digest, "notes": notes}
        return image


def unpack(content, limit):
    """What a .gz file holds, of one or several members, their checksums verified; EOFError beyond
    `limit` bytes."""
    parts = []
    while content:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        parts.append(member.decompress(content, limit))
        if not member.eof:
            raise EOFError("cut short, or more data than the header says")
        content = member.unused_data.lstrip(b"\0")
    return b"".join(parts)


def path_of(image):
    return image.extra.get("path") or image.get_filename() or "image"


def checked(image, channel=None):
    """An image whose header can be trusted -> (the image, notes on what was mended). Raises
    Rejected."""
    image, notes = settle_affine(image)
    check_header(image, channel)
    return image, notes


# Notes on what a header says twice, or not at all; each is a line of the report.
QFORM = "qform used, since the voxel size of the sform is not pixdim's"
MIRRORED = "sform taken, though the qform has left and right the other way"
GUESS = "no orientation in the header: nibabel's guess of left and right is taken"


def settle_affine(image):
    """NIfTI says the voxel size twice: in pixdim, which the qform uses, and in the sform. Where
    they differ, the qform is taken, if it has a code. -> (image, notes); Raises Rejected.

    5 % apart is no rounding, nor the shear of a tilted gantry; below, a head is as large either
    way."""
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        return image, [] if isinstance(header, MGHHeader) else [GUESS]
    if not header["sform_code"]:
        return image, [] if header["qform_code"] else [GUESS]

    sform = image.get_sform()
    by_sform = np.linalg.norm(sform[:3, :3], axis=0)
    by_pixdim = np.abs(header["pixdim"][1:4]).astype(float)
    coded = int(header["qform_code"]) > 0
    if np.allclose(by_sform, by_pixdim, rtol=0.05, atol=0):
        mirrored = coded and np.linalg.det(image.get_qform()) * np.linalg.det(sform) < 0
        return image, [MIRRORED] if mirrored else []

    if coded:
        header = header.copy()
        header.set_sform(None, 0)
        return type(image)(image.dataobj, image.get_qform(), header), [QFORM]

    if (by_sform > 1e-6).all():
        sizes = [" x ".join(f"{size:.4g}" for size in three) for three in (by_sform, by_pixdim)]
        raise Rejected(f"the voxels measure {sizes[0]} mm by the sform, {sizes[1]} mm by pixdim, "
                       "and there is no qform: one of them is wrong")
    return image, []  # no affine scale: check_header says so


def check_header(image, channel=None):
    """Raises Rejected for what no head scan has; so a damaged header cannot ask for absurd
    memory."""
    shape = image.shape[:3] + tuple(n for n in image.shape[3:] if n > 1)
    if len(shape) != 3 + (channel is not None) or (channel or 0) >= (*shape, 1)[3]:
        wanted = "3-D" if channel is None else "4-D"
        raise Rejected(f"not {wanted} but {' x '.join(map(str, image.shape))}", damage=False)
    if min(shape[:3]) < 15:  # the official code's rule of admission
        raise Rejected(f"a side of {min(shape[:3])} voxels, under 15", damage=False)
    if image.get_data_dtype().kind not in "iuf":
        raise Rejected(f"voxels of type {image.get_data_dtype()}, not numbers")

    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    usable = np.isfinite(image.affine).all() and (spacing > 1e-6).all()
    if not usable or abs(np.linalg.det(image.affine)) < 1e-9:
        raise Rejected("no affine scale")
    extent = np.array(shape[:3]) * spacing
    if max(shape[:3]) > 2000 or extent.min() < 5 or extent.max() > 1000:
        raise Rejected(f"{' x '.join(map(str, shape[:3]))} voxels over "
                       f"{' x '.join(f'{e:.3g}' for e in extent)} mm are no head scan's")


def stored_voxels(image, least=0.01):
    """A nibabel image -> (float32 (D, H, W) as it is stored, number of NaN, which are 0 in it).

    SPM writes NaN outside the field of view. Raises Rejected for infinite values, and if less than
    the share `least` of the voxels, or none, are numbers."""
    voxels = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(image.shape[:3])
    finite = np.isfinite(voxels)
    if finite.all():
        return voxels, 0

    infinite = np.count_nonzero(np.isinf(voxels))
    if infinite:
        raise Rejected(f"{infinite} voxels are infinite")
    numbers = np.count_nonzero(finite)
    if numbers == 0 or numbers < least * voxels.size:
        raise Rejected(f"only {numbers} of {voxels.size} voxels are numbers, the others NaN")
    return np.where(finite, voxels, np.float32(0)), int(voxels.size - numbers)


def read_voxels(nifti):
    """A nibabel image (or path) -> float32 (D, H, W) in RAS order, and the orientation it was
    stored in.

    The closest canonical axes of nibabel's affine, whatever the form codes say; an oblique grid
    stays oblique (the official code flips only, and stops at permuted axes). NaN is 0. Raises
    Rejected for damage."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    with naming(path_of(image)):
        voxels, _ = stored_voxels(image)
        orientation = nib.io_orientation(image.affine)
        return nib.apply_orientation(voxels, orientation), orientation


# ------------------------------------------------------------------------- preprocessing, section 2
def clamp(voxels):
    """Negative values become 0, since MR magnitudes are not negative -> (voxels, how many there were).

    Raises Rejected for a scan that was normalised before. After a z-normalisation the negative values
    add up to as much as the positive ones. What ringing and interpolation leave adds up to less than a
    thousandth of them; an offset that takes all air under 0, to a third and more. The border is half.
    The number of negative voxels would not tell, since most of a scan is air."""
    below = voxels < 0
    count = int(np.count_nonzero(below))
    clamped = np.maximum(voxels, 0)
    if count and -2 * voxels[below].sum(dtype=np.float64) > clamped.sum(dtype=np.float64):
        share = 100 * count / np.count_nonzero(voxels)
        raise Rejected(f"{share:.0f} % of the voxels that are not 0 are negative: is it normalised "
                       "already? Give the scan as the scanner wrote it")
    return clamped, count


def tight_box(voxels):
    """Half-open box ((start, stop), ...) of the voxels > 0. The official code's is one voxel larger
    at the high side."""
    box = []
    for axis in range(3):
        filled = np.flatnonzero((voxels > 0).any(tuple(a for a in range(3) if a != axis)))
        if not len(filled):
            raise Rejected("constant or empty: no voxel above 0")
        box.append((int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def union_box(boxes):
    """The box that holds several, on one grid: the channels of one task share it."""
    boxes = np.array(boxes)
    return tuple(zip(boxes[:, :, 0].min(0).tolist(), boxes[:, :, 1].max(0).tolist(), strict=True))


def preprocess(nifti, box=None):
    """nibabel image or path -> (volume (D, H, W) float32 in [0, 1], RAS at 1 mm; geometry, what
    `restore` needs).

    NaN is set to 0, negative values are clamped to 0; then y = (min(x, q99) - m) / (q99 - m), with
    m the minimum of the crop and q99 the 99th percentile of its voxels > m: what the official clip,
    z-normalisation and rescaling come to together. box: half-open voxel ranges ((start, stop), ...)
    of the RAS grid instead of the tight ones. Raises Rejected."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    with naming(path_of(image)):
        voxels, nan = stored_voxels(image)
        voxels, clamped = clamp(voxels)
        orientation = nib.io_orientation(image.affine)
        voxels = nib.apply_orientation(voxels, orientation)

        # Crop to the head.
        if box is None:
            box = tight_box(voxels)
        box = [list(map(int, pair)) for pair in np.reshape(box, (3, 2))]
        crop = voxels[tuple(slice(*pair) for pair in box)]

        # Normalise to [0, 1].
        low = crop.min()
        if not (crop > low).any():
            raise Rejected("constant")
        high = np.quantile(crop[crop > low], 0.99)
        crop = np.minimum(crop, high)  # a copy
        crop -= low
        crop /= high - low

        # Resample to 1 mm.
        spacing = nib.affines.voxel_sizes(image.affine)[np.argsort(orientation[:, 0])]
        shape = [max(1, round(n * s)) for n, s in zip(crop.shape, spacing.tolist(), strict=True)]
        volume = resample(crop, shape)

    geometry = {"shape": list(map(int, image.shape[:3])), "affine": image.affine.tolist(),
                "orientation": orientation.tolist(), "spacing": spacing.tolist(), "box": box,
                "resampled": shape, "clamped": clamped, "nan": nan}
    return volume, geometry


@functools.lru_cache(maxsize=64)
def resampling_matrix(n_in, n_out):
    """Cubic spline resampling of one axis as a matrix (n_out, n_in), float64: scikit-image's
    resize(order=3).

    Gaussian antialias filter, spline prefilter (the inverse of the B-spline's values at the
    voxels), cubic weights at the new pixel centres; every boundary is mirrored about the outermost
    voxel."""
    def mirrored(index):  # ... 2 1 | 0 1 2 ... n-1 | n-2 ...
        period = max(1, 2 * (n_in - 1))
        index = index % period
        return np.minimum(index, period - index) if n_in > 1 else index * 0

    def matrix(index, weights):
        rows = np.zeros((len(index), n_in))
        np.add.at(rows, (np.arange(len(index))[:, None], mirrored(index)), weights)
        return rows

    at = np.arange(n_in)[:, None]
    sigma = max(0.0, (n_in / n_out - 1) / 2)
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
    """(D, H, W) -> shape, as scikit-image's resize(order=3): one matrix product an axis, clipped to
    the input's range. Like there, every axis is smoothed that shrinks."""
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None]
    for axis in sorted(range(3), key=lambda a: shape[a] / volume.shape[a]):  # those that shrink most first
        if shape[axis] != volume.shape[axis]:
            x = augment.apply_matrix(x, resampling_matrix(volume.shape[axis], shape[axis]), axis)
    return x[0].clamp(float(volume.min()), float(volume.max())).numpy()


def label_map(image):
    """A nibabel image -> (its label values uint8 (D, H, W) as stored, number of NaN, which are 0 in
    it).

    A value within 1e-3 of an integer is that integer: a slope or a float file leaves such. Raises
    Rejected for other values than 0-255."""
    with naming(path_of(image)):
        voxels, nan = stored_voxels(image, least=0)
        with np.errstate(invalid="ignore"):  # of values that no uint8 can hold: they differ then
            values = voxels.astype(np.uint8)
        if np.array_equal(values, voxels):
            return values, nan

        whole = np.round(voxels)
        wrong = (np.abs(voxels - whole) > 1e-3) | (whole < 0) | (whole > 255)
        if wrong.any():
            first = voxels[wrong][0]
            raise Rejected(f"label values unknown: {first:.6g} is no integer from 0 to 255")
        return whole.astype(np.uint8), nan


def preprocess_label(nifti, geometry):
    """Label map on the scan's grid -> uint8 (D, H, W) on the grid of its prepared volume, nearest
    voxel.

    Raises Rejected if the grids differ by more than 1e-2 mm at a corner, or for values that are no
    integers 0-255."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    check_same_grid(image, geometry)
    values, _ = label_map(image)
    return fit_label(values, image.affine, geometry)


def fit_label(values, affine, geometry):
    """Label values as stored, on the scan's grid -> on the grid of its prepared volume."""
    return nearest(crop_label(values, affine, geometry), geometry["resampled"])


def crop_label(values, affine, geometry):
    """Label values as stored -> in RAS order, in the box of the scan."""
    values = nib.apply_orientation(values, nib.io_orientation(affine))
    return values[tuple(slice(*pair) for pair in geometry["box"])]


def same_grid(a_shape, a_affine, b_shape, b_affine):
    """Do two arrays (D, H, W), each with its affine, lie on one grid? They do if both, turned to
    RAS, have the same shape, and corners no more than 1e-2 mm apart. The order and direction of the
    stored axes are free."""
    ends, corners = zip(ras_corners(a_shape, a_affine), ras_corners(b_shape, b_affine), strict=True)
    return np.array_equal(*ends) and np.abs(corners[0] - corners[1]).max() <= 1e-2


def ras_corners(shape, affine):
    """Index of the last voxel of a grid turned to RAS, and its eight corners (8, 3) in mm."""
    shape, affine = tuple(shape)[:3], np.asarray(affine, float)
    orientation = nib.io_orientation(affine)
    canonical = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    last = np.array(shape)[np.argsort(orientation[:, 0])] - 1
    return last, nib.affines.apply_affine(canonical, np.array(list(np.ndindex(2, 2, 2))) * last)


def check_same_grid(label, geometry):
    """Raises Rejected if the label is not on the grid of the scan with this geometry."""
    if not same_grid(label.shape, label.affine, geometry["shape"], geometry["affine"]):
        raise Rejected("label grid differs from image grid", path=path_of(label))


def nearest(array, shape):
    """Nearest voxel, pixel centres aligned: index floor((i + 0.5) * n_in / n_out) on each axis."""
    for axis, n in enumerate(shape):
        index = ((np.arange(n) + 0.5) * array.shape[axis] / n).astype(int)
        array = array.take(index, axis)
    return array


def restore(array, geometry):
    """Back to the scan's own grid and axis order: (C, D, H, W) logits trilinearly, (D, H, W)
    integers nearest.

    Numpy array or tensor in, numpy array out. Outside the crop box everything is 0: with logits, a
    tie that argmax gives to class 0, the background."""
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


# ---------------------------------------------------------------------------------- prepared folder
def stem_of(source, scan):
    """Name of a prepared volume without folder and ending; the hash tells apart what shares the
    rest."""
    parts = [re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in (scan.subject, scan.session, scan.sequence)]
    digest = hashlib.sha256(scan.path.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{source}/{'_'.join([*parts, digest[:8]])}"


def save_array(path, array):
    with common.atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def prepare_session(source, name, root, out, scans):
    """Prepare the volumes of one session; those that share a label share the union of their boxes.

    -> ([(index row, findings)], [(path, reason, damage)]). The geometry is written last: where it
    exists, all the rest does. Whatever one scan raises, the others go on. Memory: up to 7 times the
    larger of the float32 volume on its own and on the 1 mm grid."""
    torch.set_num_threads(1)
    scans = settle_labels(root, scans)
    before = [recorded(root, f"{out}/geometry/{stem_of(name, scan)}.json", scan) for scan in scans]

    # A box that is shared is found again if one of its scans is new, or was left behind by a kill.
    boxes = {}
    for label in {scan.label for scan in scans if scan.label}:
        sharing = [(s, g) for s, g in zip(scans, before, strict=True) if s.label == label]
        known = {json.dumps(geometry and geometry["box"]) for _, geometry in sharing}
        if "null" in known or len(known) > 1:
            boxes[label] = shared_box(root, [scan for scan, _ in sharing])

    done, rejected, labels = [], [], {}
    rule = source in sources.SOURCES and sources.SOURCES[source].rule
    for scan, geometry in zip(scans, before, strict=True):
        path = os.path.join(root, scan.path)
        try:
            with naming(path):
                if scan.fault:
                    raise Rejected(scan.fault)

                # A mended scan may change its neighbours' box.
                box = boxes.get(scan.label)
                if not geometry or box and box != tuple(map(tuple, geometry["box"])):
                    if scan.label and scan.label not in labels:
                        labels[scan.label] = read_label(root, scan.label)
                    label = labels.get(scan.label)
                    image = load_scan(path, scan.channel)
                    geometry = prepare_volume(root, out, name, scan, image, box, rule, label)

                done.append((geometry["row"], findings_of(scan, geometry["record"])))
        except Rejected as error:
            reason = error.reason if error.path == path else f"{scan.label}: {error.reason}"
            rejected.append((scan.path, reason, error.damage))
    return done, rejected


def settle_labels(root, scans):
    """A session's label map belongs to the volumes on its grid (DWI and ADC of ISLES22, not its
    FLAIR); to all if it is on none's, so that they are rejected by name. Two scans of one sequence
    cannot share it."""
    scans = list(scans)
    for label in sorted({scan.label for scan in scans if scan.label}):
        sharing = [scan for scan in scans if scan.label == label]
        if len(sharing) < 2:
            continue

        on_grid = [scan for scan in sharing if is_on_grid(root, scan)]
        for number, scan in enumerate(scans):
            rivals = [other.path for other in on_grid if other.sequence == scan.sequence]
            if scan in on_grid and len(rivals) > 1:
                fault = f"{label} is the label map of several {scan.sequence}: {', '.join(rivals)}"
                scans[number] = scan._replace(fault=fault)
            elif scan in sharing and on_grid and scan not in on_grid:
                scans[number] = scan._replace(label="", elsewhere=label)
    return scans


def is_on_grid(root, scan):
    """Does a scan lie on the grid of its label map? No, if one of the two cannot be read."""
    paths = [os.path.join(root, path) for path in (scan.path, scan.label)]
    try:
        with naming(paths[0]):
            image = read_header(paths[0], scan.channel)
            label = read_header(paths[1])
            return same_grid(label.shape, label.affine, image.shape, image.affine)
    except Rejected:
        return False


def shared_box(root, scans):
    """Union of the tight boxes of a session's volumes on one grid, those that can be read; None if
    none can."""
    boxes = []
    for scan in scans:
        path = os.path.join(root, scan.path)
        try:
            with naming(path):
                boxes.append(tight_box(read_voxels(load_scan(path, scan.channel))[0]))
        except Rejected:
            continue  # it is rejected by name when its turn comes
    return union_box(boxes) if boxes else None


class Label(NamedTuple):
    """A label map that was read."""
    values: np.ndarray  # uint8 (D, H, W), as stored
    affine: np.ndarray
    nan: int  # voxels that were NaN
    file: dict  # path, size, time and checksum
    notes: list[str]


def read_label(root, path):
    """A label map whose values are known -> Label. Raises Rejected."""
    image = load_scan(os.path.join(root, path))
    values, nan = label_map(image)
    return Label(values, image.affine, nan, file_of(path, image), image.extra["notes"])


def prepare_volume(root, out, name, scan, image, box, rule, label=None):
    """Write volume, label (also as it is, for scores on the scan's own grid) and geometry of one
    scan; -> its geometry, with its row of the index and the record of what was read."""
    stem = stem_of(name, scan)
    volume, geometry = preprocess(image, box)
    if rule and geometry["clamped"]:
        raise Rejected(f"{geometry['clamped']} negative voxels, by the official code's rule for this "
                       "source", damage=False)

    # What was prepared of older files does not count from here on.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{out}/geometry/{stem}.json")

    record = {"scan": file_of(scan.path, image), "label": None, "elsewhere": scan.elsewhere,
              "clamped": geometry["clamped"], "nan": geometry["nan"], "notes": image.extra["notes"]}
    if label:
        if not same_grid(label.values.shape, label.affine, geometry["shape"], geometry["affine"]):
            path = os.path.join(root, scan.label)
            raise Rejected("label grid differs from image grid", path=path)
        prepared = fit_label(label.values, label.affine, geometry)
        save_array(f"{out}/labels/{stem}.npy", prepared)
        with common.atomic(f"{out}/labels/{stem}_native.nii.gz") as temporary:
            nib.Nifti1Image(label.values, label.affine).to_filename(temporary)
        record["label"] = label.file | label_record(label, prepared, geometry)

    row = index_row(name, scan, stem, volume, geometry, record)
    save_array(f"{out}/volumes/{stem}.npy", volume.astype(np.float16))
    geometry |= {"row": row, "record": record}
    write_geometry(f"{out}/geometry/{stem}.json", geometry)
    return geometry


def label_record(label, prepared, geometry):
    """What became of a label map: {value: [voxels native, voxels prepared]}, and the voxels that
    the box cut off."""
    native, after = count_values(label.values), count_values(prepared)
    inside = int(np.count_nonzero(crop_label(label.values, label.affine, geometry)))
    outside = sum(native.values()) - native.get(0, 0) - inside
    values = {str(value): [native[value], after.get(value, 0)] for value in sorted(native)}
    return {"values": values, "outside": outside, "nan": label.nan, "notes": label.notes}


def count_values(values):
    """{value: number of voxels} of a uint8 array that is 0 nearly everywhere."""
    values = values.ravel(order="K")
    counts = np.bincount(values[values > 0])
    found = {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    background = values.size - sum(found.values())
    return found | {0: background} if background else found


def index_row(name, scan, stem, volume, geometry, record):
    """{column of the index: text} of one volume."""
    label = record["label"] or {"sha256": "", "values": {}}
    values = " ".join(f"{value}:{native}/{prepared}"
                      for value, (native, prepared) in label["values"].items())
    return {"path": f"volumes/{stem}.npy", "source": name, "subject": scan.subject,
            "session": scan.session, "sequence": scan.sequence, "split": scan.split,
            "label": f"labels/{stem}.npy" if scan.label else "",
            "shape": "x".join(map(str, volume.shape)),
            "spacing": "x".join(f"{s:g}" for s in geometry["spacing"]),
            "sha256": record["scan"]["sha256"], "label_sha256": label["sha256"], "label_values": values}


def write_geometry(path, geometry):
    with common.atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(geometry, file)


# --------------------------------------------------------------------------- the record, the report
def both_of(path):
    """A file; of a pair of .hdr and .img, both."""
    swap = {"hdr": "img", "img": "hdr"}
    other = re.sub(r"(?<=\.)(hdr|img)(?=(\.gz)?$)", lambda name: swap[name[0]], path)
    return [path] if other == path or not os.path.exists(other) else [path, other]


def checksum(path):
    """sha256 of a file; of a pair of .hdr and .img, of both."""
    digest = hashlib.sha256()
    for name in both_of(path):
        with open(name, "rb") as file:
            while block := file.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest()


def file_of(path, image):
    """What is recorded of the file at `path` below the input, which `image` was read from."""
    known = image.extra
    return {"path": path, "size": known["size"], "mtime": known["mtime"],
            "sha256": known["sha256"] or checksum(known["path"])}


def recorded(root, place, scan):
    """The geometry of a scan that was prepared from the files as they are now; None otherwise, and
    in an old folder, where nothing is recorded."""
    try:
        with open(place, encoding="utf-8") as file:
            geometry = json.load(file)
        record, row = geometry["record"], geometry["row"]
        if bool(record["label"]) != bool(scan.label):
            return None

        now = {"scan": seen_again(root, scan.path, record["scan"])}
        if scan.label:
            now["label"] = record["label"] | seen_again(root, scan.label, record["label"])
            if now["label"]["sha256"] != record["label"]["sha256"]:
                return None
        if now["scan"]["sha256"] != record["scan"]["sha256"]:
            return None
    except (OSError, ValueError, LookupError, TypeError):  # not yet, not whole, or of old code
        return None

    # Files may be touched, and identities be written otherwise: the arrays stay.
    who = {"subject": scan.subject, "session": scan.session, "sequence": scan.sequence,
           "split": scan.split}
    renewed = geometry | {"record": record | now | {"elsewhere": scan.elsewhere}, "row": row | who}
    if renewed != geometry:
        write_geometry(place, renewed)
    return renewed


def seen_again(root, path, before):
    """What is known of a file now, against what was recorded. Its checksum is taken only if path,
    size or time have changed; a pair's always, since it has two times. A file that was moved away
    is as it was."""
    place = os.path.join(root, path)
    if path == before["path"] and not os.path.exists(place):
        return {key: before[key] for key in ("path", "size", "mtime", "sha256")}

    state = os.stat(place)
    now = {"path": path, "size": state.st_size, "mtime": state.st_mtime_ns,
           "sha256": before["sha256"]}
    if now != {key: before[key] for key in now} or len(both_of(place)) > 1:
        now["sha256"] = checksum(place)
    return now


# What is said at the end of a preparation, worst first.
FINDINGS = {
    "lost": "label maps that lost a class at 1 mm",
    "outside": "label maps with voxels outside the box of the head, which are cut off",
    "twins": "files that stand under two subjects",
    "label twins": "label maps, not empty, that stand under two subjects",
    "elsewhere": "scans without a label, since their session's is on another grid",
    "orphan": "label maps that fit no scan",
    "unused": "label maps left aside, since another one fits better",
    "like label": f"files skipped though they hold lesion, seg or mask (known endings in BIDS: "
                  f"{', '.join(f'_{name}' for name in sources.LABEL_NAMES)}, _lesion-*)",
    "nan": "scans with NaN, set to 0",
    "label nan": "label maps with NaN, set to 0",
    "clamped": "scans with negative values, set to 0",
}


def findings_of(scan, record):
    """What a careful colleague would say of one volume, from its record: {kind: {path: number of
    voxels}}."""
    found, label = {}, record["label"]
    if record["nan"]:
        note(found, "nan", scan.path, record["nan"])
    if record["clamped"]:
        note(found, "clamped", scan.path, record["clamped"])
    if record["elsewhere"]:
        note(found, "elsewhere", scan.path)
    for text in record["notes"]:
        note(found, text, scan.path)

    if label:
        if any(native and not prepared for native, prepared in label["values"].values()):
            note(found, "lost", scan.label)
        if label["outside"]:
            note(found, "outside", scan.label, label["outside"])
        if label["nan"]:
            note(found, "label nan", scan.label, label["nan"])
        for text in label["notes"]:
            note(found, text, scan.label)
    return found


def find_twins(volumes, source):
    """The same file, or the same label map that is not empty, under two subjects: it may stand on
    both sides of a split. Among all volumes of a folder, those that `source` has a part in ->
    findings."""
    owners = {}
    for volume in volumes:
        files = [("twins", volume.sha256)]
        # An empty label map has one value, 0.
        if volume.label_values.partition(":")[0] != "0" or " " in volume.label_values:
            files.append(("label twins", volume.label_sha256))
        for file in files:
            owners.setdefault(file, set()).add((volume.source, volume.subject))

    findings = {}
    for (kind, digest), found in owners.items():
        if digest and len(found) > 1 and source in {origin for origin, _ in found}:
            note(findings, kind, " and ".join(subject for _, subject in sorted(found)[:2]))
    return findings


def print_findings(findings):
    """One line a kind, worst first: how many files, the first of them, how many voxels in all."""
    order = [*FINDINGS, *sorted(findings.keys() - FINDINGS.keys())]
    for kind in order:
        if paths := findings.get(kind):
            voxels = sum(paths.values())
            say(f"  {FINDINGS.get(kind, kind)}: {len(paths)}, first {min(paths)}"
                + (f"; {voxels:,} voxels in all" if voxels else ""))


def end_with_parent():
    """On Linux: a worker ends when its parent is killed, so that none goes on writing beside the
    next run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_all(work, jobs, workers):
    """work(job) of every job on `workers` processes, as they are done; no more than two a worker
    wait."""
    if workers == 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        waiting = set()
        for job in jobs:
            if len(waiting) == 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            waiting.add(pool.submit(work, job))
        yield from (future.result() for future in as_completed(waiting))


def estimate(scans, root, out, workers):
    """Before it starts: disk and time from five volumes spread over the list, prepared and thrown
    away."""
    began, voxels, sample = time.perf_counter(), [], scans[::max(1, len(scans) // 5)][:5]
    for scan in sample:
        path = os.path.join(root, scan.path)
        try:
            with naming(path):
                voxels.append(preprocess(load_scan(path, scan.channel))[0].size)
        except Rejected:
            continue
    if voxels:
        hours = (time.perf_counter() - began) / len(sample) * len(scans) / workers / 3600
        need, folder = np.mean(voxels) * len(scans) * (3 if scans[0].label else 2) / 1e9, os.path.abspath(out)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        say(f"estimate from {len(voxels)} of {len(scans)} volumes: {need:.2f} GB ({out} has "
            f"{shutil.disk_usage(folder).free / 1e9:.0f} free), {hours:.2f} hours with {workers} "
            "workers")


# Table 1 of the paper: subjects, sessions, volumes, sequences.
TABLE_1 = {"adni": (1563, 8019, 9548, "T1, Flair, T2*"),
           "oasis3": (1376, 2839, 15872, "T1, T2, Flair, TOF, DWI, T2*, SWI"),
           "oasis4": (661, 674, 4021, "T1, T2, Flair, T2*, SWI"),
           "ppmi": (2011, 2979, 9554, "T1, T2, Flair, DWI, T2*"),
           "brats21": (938, 938, 3752, "T1, T2, Flair, T1ce"),
           "isles22": (250, 250, 750, "DWI, Flair, ADC"),
           "wmh": (60, 60, 120, "T1, Flair"),
           "msseg1": (15, 15, 75, "T1, T2, Flair, T1ce"),  # 75 is five sequences: PD is not listed
           "msd": (266, 266, 1064, "T1, T2, Flair, T1ce")}


def table_1(folder):
    """Markdown: what is in a prepared folder for pretraining, and the paper's numbers in
    brackets."""
    taken = [v for v in data.read_index(folder) if v.split != "test"]
    rows, totals, paper = [], np.zeros(3, int), np.sum([row[:3] for row in TABLE_1.values()], 0)
    for source in [*TABLE_1, *sorted({v.source for v in taken} - set(TABLE_1))]:
        found = [v for v in taken if v.source == source]
        counts = [len({v.subject for v in found}), len({(v.subject, v.session) for v in found}), len(found)]
        totals += counts
        cells = [f"{count:,}" + (f" ({known:,})" if source in TABLE_1 else "")
                 for count, known in zip(counts, TABLE_1.get(source, (0, 0, 0))[:3], strict=True)]
        kinds = Counter(v.sequence for v in found).most_common()
        kinds = ", ".join(f"{name} {count:,}" for name, count in kinds)
        rows.append([source, *cells, kinds, TABLE_1.get(source, ("",))[-1]])
    cells = [f"{count:,} ({known:,})" for count, known in zip(totals, paper, strict=True)]
    header = ["source", "subjects", "sessions", "volumes", "sequences", "in the paper"]
    return "\n".join(common.table(header, [*rows, ["total", *cells, "", ""]]))


def check_settings(cfg):
    """Raises UserError for what no preparation can start with."""
    if cfg.source not in (*sources.SOURCES, "manifest") or not cfg.input:
        raise UserError(f"source {cfg.source!r}, input {cfg.input!r}: give --input, and choose --source from "
                        f"{', '.join(sources.SOURCES)} and manifest")
    if not cfg.workers:
        raise UserError("workers 0: give 1 or more")
    shard, _, shards = cfg.shard.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise UserError(f"shard {cfg.shard!r}: expected i/n with i from 0 to n - 1, as 3/64")


def main(cfg):
    """Find the scans, prepare those of this shard, write its part of the index, and report."""
    if cfg.table:
        print(table_1(cfg.out))
        return 0
    check_settings(cfg)
    shard, shards = cfg.shard.split("/")

    # Find the scans.
    manifest = cfg.source == "manifest"
    root = os.path.dirname(cfg.input) if manifest else cfg.input
    if manifest:
        sessions, skipped, findings = sources.read_manifest(cfg.input)
    else:
        sessions, skipped, findings = sources.find_scans(cfg.source, root, cfg.dry_run)
    name = cfg.name or (os.path.basename(os.path.abspath(root)) if cfg.source == "nnunet" else cfg.source)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    if cfg.source == "nnunet":
        channels, task = sources.read_dataset(root)
        sessions = [[scan._replace(sequence=channels.get(scan.sequence, scan.sequence)) for scan in scans]
                    for scans in sessions]

    # Those of this shard.
    found = sum(map(len, sessions)) + skipped.total()
    mine = sessions[int(shard)::int(shards)]
    volumes = [scan for scans in mine for scan in scans]
    if elsewhere := found - skipped.total() - len(volumes):
        skipped["other shards"] = elsewhere
    if cfg.dry_run or len(volumes) > 100:
        estimate(volumes, root, cfg.out, cfg.workers)
    if cfg.dry_run:
        return print_plan(name, found, volumes, skipped, findings)

    # Prepare them.
    claim(cfg.out, name, readable(os.path.abspath(cfg.input)), cfg.shard)
    if cfg.source == "nnunet":
        path = f"{cfg.out}/{name}.yaml"
        common.write_text(path, yaml.safe_dump({"data": cfg.out, "source": name} | task, sort_keys=False))
        print(f"to finetune on it: python finetune.py --task {path}")
    work = functools.partial(prepare_session, cfg.source, name, root, cfg.out)
    done, rejected = prepare_all(work, mine, name, cfg)

    # Write the index, then the report, from the records of all, whether prepared now or before.
    part = f"{name}-{shard}of{shards}.csv"
    write_part(cfg.out, part, done, rejected)
    forget_other_shards(cfg.out, name, shards)
    for _, more in done:
        for kind, paths in more.items():
            findings.setdefault(kind, {}).update(paths)
    findings |= find_twins(data.read_index(cfg.out), name)
    return print_report(name, found, len(done), skipped, rejected, findings)


def prepare_all(work, sessions, name, cfg):
    """work(scans) of every session, in several processes -> (all that is done, all that is
    rejected)."""
    done, rejected = [], []
    total = sum(map(len, sessions))
    try:
        bar = tqdm(total=total, desc=f"prepare {name}", unit="volume")
        with common.writing(cfg.out), bar as progress:
            for ready, refused in run_all(work, sessions, cfg.workers):
                done += ready
                rejected += refused
                progress.update(len(ready) + len(refused))
    except BrokenProcessPool:
        raise UserError("a worker was killed, most likely for want of memory: fewer --workers; the same "
                        "command goes on where it stopped") from None
    return done, rejected


def write_part(out, part, done, rejected):
    """One part of the index, and of the list of the rejected."""
    rows = sorted((row for row, _ in done), key=lambda row: row["path"])
    columns = data.Volume._fields
    cells = [[row[column] for column in columns] for row in rows]
    write_table(f"{out}/index/{part}", columns, cells)
    reasons = sorted((readable(path), readable(reason)) for path, reason, _ in rejected)
    write_table(f"{out}/rejected/{part}", ("path", "reason"), reasons)


def print_plan(name, found, volumes, skipped, findings):
    """What --dry-run says -> exit code."""
    for scan in volumes:
        end = f", label {scan.label}" if scan.label else f": {scan.fault}" if scan.fault else ""
        say(f"take {scan.path}: {scan.subject}, {scan.session}, {scan.sequence}, {scan.split}{end}")
    say(f"{name}: {found} found = {len(volumes)} to prepare + {count_by_reason(skipped)}")
    print_findings(findings)
    return 0 if volumes or skipped["other shards"] else nothing_of(found, skipped)


def print_report(name, found, prepared, skipped, rejected, findings):
    """Counts, then one line for each thing a careful colleague would say -> exit code: 1 if a scan
    is damaged, or if nothing was prepared."""
    for path, reason, _ in sorted(rejected):
        say(f"rejected {path}: {reason}")
    say(f"{name}: {found} found = {prepared} prepared + {count_by_reason(skipped)} + "
        f"{len(rejected)} rejected")
    print_findings(findings)
    if not prepared and not skipped["other shards"]:
        return nothing_of(found, skipped)
    return int(any(damage for *_, damage in rejected))


def nothing_of(found, skipped):
    """One line where nothing came of all files -> exit code 1."""
    hint = "see the reasons above"
    if skipped.total() == found:
        hint = "no name is as --source expects it: --dry-run says of each file why"
    print(f"error: nothing prepared of {found} found: {hint}", file=sys.stderr)
    return 1


def claim(out, name, folder, shard):
    """One input a name: of two BIDS folders with a sub-01 each, the second would be taken for the
    first. Shards may claim it at once."""
    path = f"{out}/index/{name}.txt"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = file.read()
        if before != folder:
            raise UserError(f"{out} holds {name} of {before}: give this one another --name, or, if that "
                            f"folder was only moved, delete {path}")
        return
    owner = shard.replace("/", "of")  # what this shard left when it was killed is overwritten
    with common.atomic(path, owner) as temporary, open(temporary, "w", **common.TEXT) as file:
        file.write(folder)


def forget_other_shards(out, name, shards):
    """Remove the tables of runs in another number of shards: they hold the splits of then."""
    for path in glob.glob(f"{glob.escape(out)}/*/{glob.escape(name)}-*of*.csv"):
        count = re.fullmatch(rf"{re.escape(name)}-\d+of(\d+)\.csv", os.path.basename(path))
        if count and count[1] != shards:
            os.unlink(path)


def count_by_reason(skipped):
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    return f"{skipped.total()} skipped by rule" + (f" ({reasons})" if reasons else "")


def write_table(path, columns, rows):
    with common.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    # A name may be in letters that the terminal does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    common.run(main, Config)
