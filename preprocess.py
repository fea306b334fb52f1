"""Section 2: a scan becomes a volume in [0, 1] at 1 mm, RAS, cropped to the head; results go back to it."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import zlib

import nibabel
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.freesurfer.mghformat import MGHHeader

import resample
from config import UserError


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


# What nibabel, gzip and numpy raise on files that are cut, overwritten or no NIfTI.
READ_ERRORS = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError, EOFError,
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
    except READ_ERRORS as error:
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
        elif not packed and path.lower().endswith(".mgh" if kind is nib.MGHImage else ".nii"):
            # Read from the disk as needed. Named otherwise, nibabel would take it for what its name says.
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
        volume = resample.resample(crop, shape)

    geometry = {"shape": list(map(int, image.shape[:3])), "affine": image.affine.tolist(),
                "orientation": orientation.tolist(), "spacing": spacing.tolist(), "box": box,
                "resampled": shape, "clamped": clamped, "nan": nan}
    return volume, geometry


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
    return resample.nearest(crop_label(values, affine, geometry), geometry["resampled"])


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
        crop = resample.nearest(array, size)[None]
    order = np.argsort(orientation[:, 0])
    full = np.zeros((len(crop), *np.array(geometry["shape"])[order]), crop.dtype)
    full[(slice(None), *(slice(*pair) for pair in box))] = crop
    # RAS axis orientation[a, 0] came from stored axis a, flipped where orientation[a, 1] is -1.
    full = np.flip(full, [1 + int(axis) for axis, sign in orientation if sign < 0])
    full = full.transpose(0, *(1 + int(axis) for axis, _ in orientation))
    return np.ascontiguousarray(full if array.ndim == 4 else full[0])


def on_axes(label, affine):
    """Values (D, H, W) of a label map, a nibabel image, in the axis order and directions that a scan of the
    same grid is stored in. As in preparation, a value within 1e-3 of an integer is that, and NaN is 0."""
    values = label.get_fdata(dtype=np.float32, caching="unchanged").reshape(label.shape[:3])
    values = np.where(np.isnan(values), np.float32(0), values)
    whole = np.round(values)
    values = np.where(np.abs(values - whole) <= 1e-3, whole, values)

    axes = [nibabel.io_orientation(one) for one in (label.affine, affine)]
    return nibabel.apply_orientation(values, nibabel.orientations.ornt_transform(*axes))


def read_label(path, image):
    """The values of a label map on the stored axes of `image`. UserError if it is not on its grid."""
    label = load_scan(path)
    check_same_grid(label, {"shape": image.shape[:3], "affine": image.affine})

    # The same rule as in preparation: what is almost an integer is that integer.
    values, _ = label_map(label)
    return on_axes(nib.Nifti1Image(values, label.affine), image.affine)


def prepare_scan(paths):
    """Scans of one session on one grid, a file a channel -> (volume (C, D, H, W) in [0, 1] at 1 mm, geometry
    and image of the first).

    Their axes may be stored in different orders: all become RAS. As in preparation, the channels share the
    union of their tight boxes, and values are float16: the network was trained on such. Prints what was
    mended in a scan. Raises UserError naming the file."""
    images = [load_scan(path) for path in paths]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        if not same_grid(image.shape, image.affine, first.shape, first.affine):
            raise UserError(f"{path} is not on the grid of {paths[0]}: register and resample the channels")

    boxes = []
    for path, image in zip(paths, images, strict=True):
        with naming(os.fspath(path)):
            boxes.append(tight_box(read_voxels(image)[0]))
    box = union_box(boxes)

    volumes, geometries = [], []
    for path, image in zip(paths, images, strict=True):
        volume, geometry = preprocess(image, box)
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
