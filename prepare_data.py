"""Raw NIfTI scans -> prepared folder (paper, section 2): RAS, clipped, in [0, 1], cropped to the head, 1 mm.

    python prepare_data.py --source brats21 --input /raw/BraTS2021 --out datasets/brains45k --workers 8
    python prepare_data.py --source manifest --input scans.csv --out datasets/mine --dry-run
    python prepare_data.py --out datasets/brains45k --table

Order as in the official code: crop, normalise, resample (the paper's text: resample, clip, normalise, crop).
"""

import csv
import ctypes
import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
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
from tqdm import tqdm

import augment
import common
import data
from common import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    source: str | None = None  # layout of the input: a row of SOURCES, or manifest
    input: str | None = None  # folder with the raw scans, or the manifest's csv file
    out: str = "datasets/brains45k"  # prepared folder; several sources may share one
    name: str | None = None  # what the index calls it, for several inputs of one source; default: the source
    workers: int = 2  # processes, at least one, one session at a time each
    shard: str = "0/1"  # i/n: prepare every n-th session, from the i-th; shards of one folder may run at once
    dry_run: bool = False  # list what would be taken and what skipped, and why; write nothing
    table: bool = False  # print Table 1 of a prepared folder, beside the paper's numbers


class Rejected(UserError):
    """A scan that cannot be used. damage: it is broken; otherwise a rule of the paper's code keeps it out."""

    def __init__(self, reason, damage=True):
        super().__init__(reason)
        self.damage = damage


# ----------------------------------------------------------------------------------- preprocessing, section 2
def load_scan(path, channel=None):
    """A NIfTI file, its header checked, as a nibabel image. Raises Rejected.

    .nii.gz is unpacked whole, in memory: only so is its checksum looked at. channel: which volume of a 4-D
    file."""
    try:
        image = nib.load(path)
        check_header(image, path, channel)
        if path_of(image).endswith(".gz") and hasattr(image, "from_bytes"):  # not a pair of .hdr and .img
            size = math.prod(image.shape) * image.get_data_dtype().itemsize + image.dataobj.offset
            image = type(image).from_bytes(unpack(path, size + 2 ** 20))
        image = image if channel is None else image.slicer[..., channel]
        image.set_filename(path)
        return image
    except FileNotFoundError:
        raise Rejected(f"{path}: no such file") from None
    except DAMAGE as error:
        raise Rejected(f"{path}: unreadable ({error})") from None


# What nibabel, gzip and numpy raise on files that are cut, overwritten or no NIfTI.
DAMAGE = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError, EOFError,
          ValueError, TypeError, OverflowError, MemoryError, zlib.error)


def unpack(path, limit):
    """Contents of a .gz file, of one or several members, their checksums verified; EOFError beyond `limit`
    bytes."""
    with open(path, "rb") as file:
        rest, parts = file.read(), []
    while rest:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        parts.append(member.decompress(rest, limit))
        if not member.eof:
            raise EOFError("cut short, or more data than the header says")
        rest = member.unused_data.lstrip(b"\0")
    return b"".join(parts)


def path_of(image):
    return image.get_filename() or "image"


def check_header(image, path, channel=None):
    """Raises Rejected for what no head scan has; so a damaged header cannot ask for absurd memory."""
    shape = image.shape[:3] + tuple(n for n in image.shape[3:] if n > 1)
    if len(shape) != 3 + (channel is not None) or (channel or 0) >= (*shape, 1)[3]:
        raise Rejected(f"{path}: not {'3-D' if channel is None else '4-D'} but "
                       f"{' x '.join(map(str, image.shape))}", damage=False)
    if min(shape[:3]) < 15:  # the official code's rule of admission
        raise Rejected(f"{path}: a side of {min(shape[:3])} voxels, under 15", damage=False)
    if image.get_data_dtype().kind not in "iuf":
        raise Rejected(f"{path}: voxels of type {image.get_data_dtype()}, not numbers")
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    usable = np.isfinite(image.affine).all() and (spacing > 1e-6).all()
    if not usable or abs(np.linalg.det(image.affine)) < 1e-9:
        raise Rejected(f"{path}: no affine scale")
    extent = np.array(shape[:3]) * spacing
    if max(shape[:3]) > 2000 or extent.min() < 5 or extent.max() > 1000:
        raise Rejected(f"{path}: {' x '.join(map(str, shape[:3]))} voxels over "
                       f"{' x '.join(f'{e:.3g}' for e in extent)} mm are no head scan's")


def read_voxels(nifti):
    """A nibabel image (or path) -> float32 (D, H, W) in RAS order, and the orientation it was stored in.

    The closest canonical axes of nibabel's affine, whatever the form codes say; an oblique grid stays oblique
    (the official code flips only, and stops at permuted axes). Raises Rejected for damage."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    try:
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(image.shape[:3])
    except DAMAGE as error:
        raise Rejected(f"{path_of(image)}: truncated or unreadable ({error})") from None
    if not np.isfinite(voxels).all():
        raise Rejected(f"{path_of(image)}: {np.count_nonzero(~np.isfinite(voxels))} voxels are not finite")
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


def union_box(boxes):
    """The box that holds several, on one grid: the channels of one task share it."""
    boxes = np.array(boxes)
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
        raise Rejected(f"{path_of(image)}: constant")
    high = np.quantile(crop[crop > low], 0.99)
    spacing = nib.affines.voxel_sizes(image.affine)[np.argsort(orientation[:, 0])]
    shape = [max(1, round(n * s)) for n, s in zip(crop.shape, spacing.tolist(), strict=True)]
    crop = np.minimum(crop, high)  # a copy
    crop -= low
    crop /= high - low
    volume = resample(crop, shape)
    geometry = {"shape": list(image.shape[:3]), "affine": image.affine.tolist(),
                "orientation": orientation.tolist(), "spacing": spacing.tolist(),
                "box": [list(pair) for pair in box], "resampled": shape,
                "clamped": clamped}
    return volume, geometry


@functools.lru_cache(maxsize=64)
def resampling_matrix(n_in, n_out):
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
    """(D, H, W) -> shape, as scikit-image's resize(order=3): one matrix product an axis, clipped to the
    input's range. Like there, every axis is smoothed that shrinks."""
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None]
    for axis in sorted(range(3), key=lambda a: shape[a] / volume.shape[a]):  # those that shrink most first
        if shape[axis] != volume.shape[axis]:
            x = augment.apply_matrix(x, resampling_matrix(volume.shape[axis], shape[axis]), axis)
    return x[0].clamp(float(volume.min()), float(volume.max())).numpy()


def preprocess_label(nifti, geometry):
    """Label map on the scan's grid -> uint8 (D, H, W) on the grid of its prepared volume, nearest voxel.

    Raises Rejected if the grids differ by more than 1e-2 mm at a corner, or for values that are no integers
    0-255."""
    image = nifti if hasattr(nifti, "dataobj") else load_scan(nifti)
    check_same_grid(image, geometry)
    voxels, _ = read_voxels(image)
    if (voxels != np.round(voxels)).any() or voxels.min() < 0 or voxels.max() > 255:
        raise Rejected(f"{path_of(image)}: label values unknown (not integers 0-255)")
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
        raise Rejected(f"{path_of(label)}: label grid differs from image grid")


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
    """A native layout. The patterns are searched in the path below --input, without its ending .nii or
    .nii.gz; a match of the group `test` marks what the paper does not pretrain on."""
    pattern: str  # of a volume: groups subject, session, suffix, text (free); site in front of the subject
    label: str = ""  # of a label map: the same subject, session and site
    volumes: tuple[str, ...] = ()  # the sequences in a 4-D file
    rule: bool = False  # the official code takes no volume with negative values from here
    hold_out: str = ""  # split of a random quarter of the labelled subjects, by sklearn's count: ceil(n / 4)


LONI = (r"/(?P<text>[^/]+)/(?P<session>\d{4}-\d\d-\d\d)_[\d_.]+/[IS]\d+/([^/]+/)?[^/]+$")
OASIS = (r"(?P<subject>OAS[34]\d{4})_MR_(?P<session>d\d{4})/(scans/)?(?P<text>[^/]+)/(.*/)?"
         r"([^/]*_)?(?P<suffix>[A-Za-z0-9]+)$")
WMH = r"(training|(?P<test>test))/(?P<site>Utrecht|Singapore|Amsterdam/[^/]+)/(?P<subject>\d+)/"
MSSEG = r"(?P<site>((?P<test>[Tt]esting)/)?Center_\d\d)/(?P<subject>Patient_\d\d)/"
SOURCES = {
    "adni": Source(r"(^|/)(?P<subject>\d{3}_S_\d{4})" + LONI, rule=True),
    "oasis3": Source(OASIS, rule=True),
    "oasis4": Source(OASIS, rule=True),
    "ppmi": Source(r"(^|/)(?P<subject>\d{4,6})" + LONI, rule=True),
    # 1,251 -> 938 to train on and 313 to test; the text's "20 %" would be 251.
    "brats21": Source(r"(?P<subject>BraTS2021_\d{5})/(?P=subject)_(?P<suffix>flair|t1|t1ce|t2)$",
                      r"(?P<subject>BraTS2021_\d{5})_seg$", hold_out="test"),
    # 250 -> 187, 20 of them to train on, 167 to evaluate; the 63 set aside are pretrained on all the same.
    "isles22": Source(r"(?P<subject>sub-[^/]+)/(?P<session>ses-[^/]+)/((anat|dwi)/)?[^/]+_"
                      r"(?P<suffix>FLAIR|flair|dwi|adc)$",
                      r"(?P<subject>sub-[^/]+)/(?P<session>ses-[^/]+)/[^/]+_msk$", hold_out="pretrain"),
    "wmh": Source(WMH + "pre/(?P<suffix>FLAIR|T1)$", WMH + "wmh$"),
    # Numbers of patients start again in Testing, so that its centres go by another name.
    "msseg1": Source(MSSEG + r"Preprocessed_Data/(?P<suffix>FLAIR|T1|T2|DP|GADO)_preprocessed$",
                     MSSEG + "Masks/Consensus$"),
    # Table 1 says "train", but its 266 are imagesTs.
    "msd": Source(r"(imagesTs|(?P<test>imagesTr))/(?P<subject>BRATS_\d{3})$",
                  r"labelsTr/(?P<subject>BRATS_\d{3})$", volumes=("FLAIR", "T1", "T1ce", "T2")),
    "fomo60k": Source(r"(?P<subject>sub_[^/]+)/(?P<session>ses_[^/]+)/(?P<text>[^/]+)$"),
    "bids": Source(r"(?P<subject>sub-[A-Za-z0-9]+)/((?P<session>ses-[A-Za-z0-9]+)/)?((anat|dwi|swi|perf)/)?"
                   r"(?P=subject)(_[a-z]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)$",
                   r"(?P<subject>sub-[A-Za-z0-9]+)/((?P<session>ses-[A-Za-z0-9]+)/)?([^/]+/)?(?P=subject)"
                   r"(?![^/]*_desc-brain_)[^/]*_(lesion|msk|mask|dseg|label|roi)$"),
    "nnunet": Source(r"(imagesTr|(?P<test>imagesTs))/(?P<subject>[^/]+)_(?P<suffix>\d{4})$",
                     r"labels(Tr|Ts)/(?P<subject>[^/]+)$"),
}
SUFFIXES = {"t1": "T1", "t1w": "T1", "t2": "T2", "t2w": "T2", "flair": "FLAIR", "t1ce": "T1ce", "t1c": "T1ce",
            "gado": "T1ce", "pdw": "PD", "dp": "PD", "t2star": "T2star", "t2starw": "T2star", "t2s": "T2star",
            "gre": "T2star", "swi": "SWI", "minip": "SWI", "dwi": "DWI", "adc": "ADC", "angio": "TOF"}
# Series names as scanners write them: the first match wins; "-" in front of what is no volume of the brain.
# What matches nothing is taken: training ignores the name, but a scan that is left out is lost.
SERIES = (
    ("-derivative", r"_derivatives_"), ("-localizer", r"localiz|scout|survey|_3_?pl(ane)?_|_loc_"),
    ("-calibration", r"calib|_cal_|_field|b[01]_?map|phase_?(map|diff)|magnitude|shim"),
    ("-fMRI", r"fmri|bold|_rs_?mri|rest(ing)?_|_func|_task_"), ("-perfusion", r"asl_|perf|cbf|moco|_dsc_"),
    ("-PET", r"_pet\d*_|fdg|amyloid|av45|av1451|_pib_|datscan"), ("-derived map", r"_(col)?fa_|tensor"),
    ("-mask", r"_masks?_|_seg(mentation)?_|_labels?_|harp"), ("-magnetisation transfer", r"_mt_|_nm_|_nmmt_"),
    ("FLAIR", r"flair|dark_fluid"), ("ADC", r"_adc_"), ("DWI", r"dwi|dti|diff|trace|_dw_|_dt_"),
    ("-EPI", r"_epi_"), ("SWI", r"swi|swan|min_?ip"), ("T1ce", r"t1ce|t1gd|gado|_t1c_"),
    ("T1", r"t1|mp_?rage|spgr|bravo|mpr_|_tfe"), ("T2star", r"star|gre_|t2s_|hemo"),
    ("T2", r"t2|tse|fse|space|ciss|cube"), ("TOF", r"_tof|angio|_mra_"), ("PD", r"_pd|proton"), ("other", ""))


class Identity(NamedTuple):
    """What a path says of its file. skip: why it is no volume to prepare ("label" if it is a label map), or
    ""."""
    subject: str = ""
    session: str = "1"
    sequences: tuple[str, ...] = ()
    test: bool = False
    skip: str = ""


class Scan(NamedTuple):
    """One volume to prepare."""
    path: str
    subject: str
    session: str
    sequence: str
    label: str  # path of its session's label map, or ""
    split: str
    channel: int | None = None  # of a 4-D file


def classify(text):
    """Free text of a series -> its sequence, or "-" and the reason it is none; see SERIES."""
    words = f"_{re.sub('[^a-z0-9]+', '_', text.lower().replace('t2*', 't2_star'))}_"
    return next(name for name, pattern in SERIES if re.search(pattern, words))


def identify(source, path):
    """Path of a NIfTI file below the input of a source -> Identity."""
    row, stem = SOURCES[source], re.sub(r"\.nii(\.gz)?$", "", path)
    if any(part.startswith((".", "_", "0AS_data_files")) for part in path.split("/")):
        return Identity(skip="hidden")
    label = re.search(row.label, stem) if row.label else None
    match = label or re.search(row.pattern, stem)
    if not match:
        reason = classify(path)
        return Identity(skip=reason[1:] if reason[0] == "-" else "name not of this source")
    groups = match.groupdict()
    site = (groups.get("site") or "").replace("/", "-").replace(" ", "").rstrip(".")
    who = Identity("_".join(filter(None, (site, groups["subject"]))), groups.get("session") or "1",
                   test=bool(groups.get("test")))
    if label:
        return who._replace(skip="label")
    suffix, text = groups.get("suffix") or "", groups.get("text")
    if row.volumes or source == "nnunet":
        return who._replace(sequences=row.volumes or (suffix,))
    sequence = SUFFIXES.get((suffix or text).lower())
    if "_ce-" in stem and sequence == "T1":
        sequence = "T1ce"
    if text and not sequence:
        sequence = classify(f"{text}_{os.path.basename(stem)}" if suffix else text)
    reason = "-derivative" if "derivatives" in path.split("/") else sequence or classify(suffix)
    if reason[0] == "-":
        return who._replace(skip=reason[1:])
    return who._replace(sequences=(sequence,)) if sequence else who._replace(skip=f"suffix {suffix}")


def walk(folder):
    """Relative paths of the NIfTI files below a folder, in order. UserError if there is none."""
    if not os.path.isdir(folder):
        raise UserError(f"--input {folder} is not a folder")
    found = dicom = 0
    for top, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            dicom += name.lower().endswith((".dcm", ".ima"))
            if name.endswith((".nii", ".nii.gz")):
                found += 1
                yield os.path.relpath(os.path.join(top, name), folder)
    if not found:
        raise UserError(f"no .nii or .nii.gz file under {folder}" + (
            f", but {dicom} of DICOM: run dcm2niix first" if dicom else "; for DICOM, run dcm2niix first"))
    if dicom:
        print(f"{dicom} DICOM files are not read: run dcm2niix on those without a NIfTI beside them")


def find_scans(source, folder, dry_run=False):
    """Walk a folder -> (a list of the Scans of each session, {reason: number of files skipped})."""
    row, sessions, labels, skipped = SOURCES[source], {}, {}, Counter()
    for path in walk(folder):
        who = identify(source, path)
        key = who.subject, who.session
        if who.skip:
            skipped[who.skip] += 1
            if who.skip == "label" and labels.setdefault(key, path) != path:
                print(f"{path} is not used: {labels[key]} is the label map of its session already")
            if dry_run:
                print(f"skip {path}: {who.skip}")
        for channel, sequence in enumerate(who.sequences):
            sessions.setdefault(key, []).append(Scan(path, *key, sequence, "", "test" if who.test else "",
                                                     channel if row.volumes else None))
    held = ()
    if row.hold_out and labels:
        held = set(data.split_subjects([subject for subject, _ in labels], 0.25, 0)[1])
    for key, scans in sessions.items():
        label = labels.get(key, "")
        # Without a label where others have one: those that the challenge holds back are for testing, too.
        split = "train" if label else "test" if held and row.hold_out == "test" else "pretrain"
        split = row.hold_out if key[0] in held else split
        sessions[key] = [scan._replace(label=label, split=scan.split or split) for scan in scans]
    return [sessions[key] for key in sorted(sessions)], skipped


def read_manifest(path):
    """csv with the columns path, subject, session, sequence and optionally label, split -> like
    find_scans."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel's begins with a mark
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from None
    if not rows or not {"path", "subject", "session", "sequence"} <= set(rows[0]):
        raise UserError(f"{path}: a manifest needs the columns path,subject,session,sequence[,label][,split]")
    sessions = {}
    for row in rows:
        label = row.get("label") or ""
        split = row.get("split") or ("train" if label else "pretrain")
        if split not in ("pretrain", "train", "test"):
            raise UserError(f"{path}: split {split!r} of {row['path']}: choose pretrain, train or test")
        scan = Scan(*(row[key] or "" for key in ("path", "subject", "session", "sequence")), label, split)
        sessions.setdefault((scan.subject, scan.session), []).append(scan)
    return [sessions[key] for key in sorted(sessions)], Counter()


# -------------------------------------------------------------------------------------------- prepared folder
def stem_of(source, scan):
    """Name of a prepared volume without folder and ending; the hash tells apart what shares the rest."""
    parts = [re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in (scan.subject, scan.session, scan.sequence)]
    return f"{source}/{'_'.join([*parts, hashlib.sha256(scan.path.encode()).hexdigest()[:8]])}"


def save_array(path, array):
    with common.atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def prepare_session(source, name, root, out, scans):
    """Prepare the volumes of one session; those that share a label share the union of their boxes.

    -> ([index rows], [(path, reason, damage)]). The geometry is written last: where it exists, all the rest
    does. Memory: up to 7 times the larger of the float32 volume on its own and on the 1 mm grid."""
    torch.set_num_threads(1)
    rows, rejected, boxes = [], [], {}
    scans = label_by_grid(root, scans)
    before = [recorded(root, f"{out}/geometry/{stem_of(name, scan)}.json", scan) for scan in scans]
    for scan, (row, _) in zip(scans, before, strict=True):
        if scan.label and not row and scan.label not in boxes:
            boxes[scan.label] = shared_box(root, [s for s in scans if s.label == scan.label])
    for scan, (row, box) in zip(scans, before, strict=True):
        try:
            shared = boxes.get(scan.label)
            if not row or shared and shared != box:  # a mended scan may change its neighbours' box
                image = load_scan(os.path.join(root, scan.path), scan.channel)
                row = prepare_volume(root, out, name, scan, image, shared,
                                     source in SOURCES and SOURCES[source].rule)
            rows.append(row | {"split": scan.split})  # more subjects may have come: the split is of now
        except Rejected as reason:
            rejected.append((scan.path, str(reason), reason.damage))
    return rows, rejected


def recorded(root, record, scan):
    """(row, box) of a scan that was prepared, from its files as they are now; (None, None) otherwise."""
    try:
        with open(record, encoding="utf-8") as file:
            geometry = json.load(file)
        row, done = geometry["row"], os.path.getmtime(record)
    except (FileNotFoundError, ValueError):  # not yet, or not whole
        return None, None
    files = [os.path.join(root, path) for path in (scan.path, scan.label) if path]
    if bool(row["label"]) != bool(scan.label) or any(os.path.getmtime(f) > done for f in files
                                                     if os.path.exists(f)):
        return None, None
    return row, tuple(map(tuple, geometry["box"]))


def label_by_grid(root, scans):
    """A session's label map belongs to the volumes on its grid (DWI and ADC of ISLES22, not its FLAIR); to
    all if it is on none's, so that they are rejected by name."""
    def fits(scan):
        try:
            image, label = (nib.load(os.path.join(root, path)) for path in (scan.path, scan.label))
            check_header(image, scan.path, scan.channel)
            check_header(label, scan.label)
            check_same_grid(label, {"shape": image.shape[:3], "affine": image.affine})
        except (Rejected, *DAMAGE):
            return False
        return True

    if len(scans) == 1 or not scans[0].label:
        return scans
    on_grid = [fits(scan) for scan in scans]
    return [scan if fit or not any(on_grid) else scan._replace(label="")
            for scan, fit in zip(scans, on_grid, strict=True)]


def shared_box(root, scans):
    """Union of the tight boxes of a session's volumes on one grid, those that can be read; None if none
    can."""
    boxes = []
    for scan in scans:
        try:
            boxes.append(tight_box(read_voxels(load_scan(os.path.join(root, scan.path), scan.channel))[0]))
        except Rejected:
            continue  # it is rejected by name when its turn comes
    return union_box(boxes) if boxes else None


def prepare_volume(root, out, name, scan, image, box, rule):
    """Write volume, label (also as it is, for scores on the scan's own grid) and geometry of one scan;
    -> its row of the index."""
    stem = stem_of(name, scan)
    volume, geometry = preprocess(image, box)
    if rule and geometry["clamped"]:
        raise Rejected(f"{scan.path}: {geometry['clamped']} negative voxels, by the official code's rule for "
                       "this source", damage=False)
    label = ""
    if scan.label:
        label = f"labels/{stem}.npy"
        truth = load_scan(os.path.join(root, scan.label))
        save_array(f"{out}/{label}", preprocess_label(truth, geometry))
        values = truth.get_fdata(dtype=np.float32).reshape(truth.shape[:3]).astype(np.uint8)
        with common.atomic(f"{out}/labels/{stem}_native.nii.gz") as temporary:
            nib.Nifti1Image(values, truth.affine).to_filename(temporary)
    with open(os.path.join(root, scan.path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    row = {"path": f"volumes/{stem}.npy", "source": name, "subject": scan.subject,
           "session": scan.session, "sequence": scan.sequence, "split": scan.split, "label": label,
           "shape": "x".join(map(str, volume.shape)),
           "spacing": "x".join(f"{s:g}" for s in geometry["spacing"]), "sha256": digest}
    save_array(f"{out}/volumes/{stem}.npy", volume.astype(np.float16))
    with common.atomic(f"{out}/geometry/{stem}.json") as temporary, open(temporary, "w") as file:
        json.dump(geometry | {"row": row}, file)
    return row


def end_with_parent():
    """On Linux: a worker ends when its parent is killed, so that none goes on writing beside the next run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_all(work, jobs, workers):
    """work(job) of every job on `workers` processes, as they are done; no more than two a worker wait."""
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
    """Before it starts: disk and time from five volumes spread over the list, prepared and thrown away."""
    began, voxels, sample = time.perf_counter(), [], scans[::max(1, len(scans) // 5)][:5]
    for scan in sample:
        try:
            voxels.append(preprocess(load_scan(os.path.join(root, scan.path), scan.channel))[0].size)
        except Rejected:
            continue
    if voxels:
        hours = (time.perf_counter() - began) / len(sample) * len(scans) / workers / 3600
        need, folder = np.mean(voxels) * len(scans) * (3 if scans[0].label else 2) / 1e9, os.path.abspath(out)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        print(f"estimate from {len(voxels)} of {len(scans)} volumes: {need:.2f} GB ({out} has "
              f"{shutil.disk_usage(folder).free / 1e9:.0f} free), {hours:.2f} hours with {workers} workers")


def read_dataset(root):
    """nnU-Net's dataset.json -> ({number of a channel: its sequence}, the settings of a task)."""
    path = os.path.join(root, "dataset.json")
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        channels = known.get("channel_names") or known["modality"]
        channels = {int(key): str(value) for key, value in channels.items()}
        labels = dict(known["labels"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {path} (channel_names and labels of nnU-Net): {error!r}") from None
    if len(set(channels.values())) < len(channels):
        channels = {key: f"{key}-{value}" for key, value in channels.items()}
    if all(str(key).isdigit() for key in labels):  # version 1: {"0": "background"}; version 2 the other way
        labels = {value: int(key) for key, value in labels.items()}
    ignore = [labels.pop("ignore")] if "ignore" in labels else []
    regions = {key: value for key, value in labels.items() if isinstance(value, list)}
    names = {value: key for key, value in labels.items() if isinstance(value, int)}
    values = sorted({0, *names, *(v for region in regions.values() for v in region)})
    task = {"sequences": [channels[key] for key in sorted(channels)], "ignore": ignore,
            "classes": [names.get(v, f"label {v}") for v in values],
            "labels": {v: i for i, v in enumerate(values)},
            "regions": {key: [values.index(v) for v in region] for key, region in regions.items()}}
    return {f"{key:04}": sequence for key, sequence in channels.items()}, task


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
    """Markdown: what is in a prepared folder for pretraining, and the paper's numbers in brackets."""
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


def main(cfg):
    if cfg.table:
        print(table_1(cfg.out))
        return 0
    if cfg.source not in (*SOURCES, "manifest") or not cfg.input:
        raise UserError(f"source {cfg.source!r}, input {cfg.input!r}: give --input, and choose --source from "
                        f"{', '.join(SOURCES)} and manifest")
    shard, _, shards = cfg.shard.partition("/")
    if not cfg.workers:
        raise UserError("workers 0: give 1 or more")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise UserError(f"shard {cfg.shard!r}: expected i/n with i from 0 to n - 1, as 3/64")
    manifest = cfg.source == "manifest"
    root = os.path.dirname(cfg.input) if manifest else cfg.input
    sessions, skipped = read_manifest(cfg.input) if manifest else find_scans(cfg.source, root, cfg.dry_run)
    name = cfg.name or (os.path.basename(os.path.abspath(root)) if cfg.source == "nnunet" else cfg.source)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    if cfg.source == "nnunet":
        channels, task = read_dataset(root)
        sessions = [[scan._replace(sequence=channels.get(scan.sequence, scan.sequence)) for scan in scans]
                    for scans in sessions]
    found = sum(map(len, sessions)) + skipped.total()
    mine = sessions[int(shard)::int(shards)]
    volumes = [scan for scans in mine for scan in scans]
    total = len(volumes)
    if elsewhere := found - skipped.total() - total:
        skipped["other shards"] = elsewhere
    if cfg.dry_run or total > 100:
        estimate(volumes, root, cfg.out, cfg.workers)
    if cfg.dry_run:
        for scan in volumes:
            print(f"take {scan.path}: {scan.subject}, {scan.session}, {scan.sequence}, {scan.split}"
                  + (f", label {scan.label}" if scan.label else ""))
        print(f"{name}: {found} found = {total} to prepare + {count_by_reason(skipped)}")
        return 0

    claim(cfg.out, name, os.path.abspath(cfg.input))
    if cfg.source == "nnunet":
        path = f"{cfg.out}/{name}.yaml"
        common.write_text(path, yaml.safe_dump({"data": cfg.out, "source": name} | task, sort_keys=False))
        print(f"to finetune on it: python finetune.py --task {path}")
    rows, rejected = [], []
    work = functools.partial(prepare_session, cfg.source, name, root, cfg.out)
    try:
        with common.writing(cfg.out), tqdm(total=total, desc=f"prepare {name}", unit="volume") as progress:
            for done, refused in run_all(work, mine, cfg.workers):
                rows += done
                rejected += refused
                progress.update(len(done) + len(refused))
        part = f"{name}-{shard}of{shards}.csv"
        rows.sort(key=lambda row: row["path"])
        columns = data.Volume._fields
        write_table(f"{cfg.out}/index/{part}", columns, [[row.get(c, "") for c in columns] for row in rows])
        write_table(f"{cfg.out}/rejected/{part}", ("path", "reason"), sorted(row[:2] for row in rejected))
        forget_other_shards(cfg.out, name, shards)
    except BrokenProcessPool:
        raise UserError("a worker was killed, most likely for want of memory: fewer --workers; the same "
                        "command goes on where it stopped") from None
    for path, reason, _ in sorted(rejected):
        print(f"rejected {path}: {reason}")
    print(f"{name}: {found} found = {len(rows)} prepared + {count_by_reason(skipped)} + {len(rejected)} "
          "rejected")
    return int(any(damage for *_, damage in rejected))


def claim(out, name, folder):
    """One input a name: of two BIDS folders with a sub-01 each, the second would be taken for the first."""
    path = f"{out}/index/{name}.txt"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = file.read()
        if before != folder:
            raise UserError(f"{out} holds {name} of {before}: give this one another --name, or, if that "
                            f"folder was only moved, delete {path}")
    common.write_text(path, folder)


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
    common.run(main, Config)
