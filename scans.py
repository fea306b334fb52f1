"""A scan's file: told by its first bytes, its header checked, its voxels numbers; or Rejected."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import zlib

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

import config
from config import UserError


class Rejected(UserError):
    """A scan that cannot be used.

    damage: the file is broken; otherwise a rule of the paper's code keeps the scan out.
    path: the file, with which the message begins. A list that names the file already shows the
    `reason` alone."""

    def __init__(self, reason, damage=True, path=""):
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.damage = damage
        self.path = path


# What nibabel, gzip and numpy raise on files that are cut, overwritten or no NIfTI.
READ_ERRORS = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError,
               EOFError, ValueError, TypeError, OverflowError, MemoryError, zlib.error)


@contextlib.contextmanager
def naming(path):
    """Turn whatever goes wrong with one scan into Rejected, whose message names the file once."""
    try:
        yield
    except Rejected as error:
        raise Rejected(error.reason, error.damage, error.path or path) from None
    except UserError:  # A full disk is not the scan's fault: it ends the whole preparation.
        raise
    except FileNotFoundError:
        raise Rejected("no such file", path=path) from None
    except READ_ERRORS as error:
        raise Rejected(f"unreadable ({one_line(error, path)})", path=path) from None

    # One scan of 45,000 must not end a night's work. A damaged header takes nibabel to places that
    # raise KeyError, AttributeError, ZeroDivisionError and more, so no list of kinds is complete.
    # Nothing is hidden: the scan is rejected by name, with the type and the message.
    except Exception as error:
        raise Rejected(f"{type(error).__name__}: {one_line(error, path)}", path=path) from error


def one_line(error, path):
    """The message of an exception in one line, without the path.

    Its type is added where the message alone would not be understood."""
    text = getattr(error, "strerror", None) or str(error)
    if not text or isinstance(error, (ValueError, TypeError, ArithmeticError, MemoryError)):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.replace(path, "it").split())


# --------------------------------------------------------------------------------- reading a file
# A format by its first bytes: where they stand, what they are, and nibabel's class. A pair of .hdr
# and .img has no such mark, and is left to nibabel.
SIGNATURES = ((344, b"n+1", nib.Nifti1Image), (4, b"n+2", nib.Nifti2Image),
              (0, b"\0\0\0\1", nib.MGHImage))
GZIP = b"\x1f\x8b"
SPARE = 2**20  # bytes that may follow the voxels in a packed file

# What is often found where a scan was expected, told by a mark in its first bytes.
STRANGERS = {b"dicm": "DICOM: run dcm2niix first"} | config.NOT_DOWNLOADED


def first_bytes(file):
    """Tell the format of an open file -> (is it packed by gzip?, nibabel's class or None)."""
    start = file.read(4096)
    file.seek(0)

    # Of a packed file, what is inside counts.
    packed = start.startswith(GZIP)
    if packed:
        start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, 1024)
    for place, mark, kind in SIGNATURES:
        if start.startswith(mark, place):
            return packed, kind
    return packed, None


def load_other(path):
    """Load a pair of .hdr and .img, or what else nibabel knows by its name. Raises Rejected."""
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


def read_header(path, channel=None):
    """Open a scan for its checked header alone -> a nibabel image, whose voxels cannot be read.

    Its `extra` has path and notes. Raises Rejected."""
    with naming(path), open(path, "rb") as file:
        packed, kind = first_bytes(file)
        if kind is None:
            image = load_other(path)
        elif packed:
            # Of a packed file, no more is unpacked than the header.
            image = kind.from_stream(gzip.GzipFile(fileobj=file))
        else:
            image = kind.from_stream(file)
        image, notes = checked(image, channel)
        image.extra = {"path": path, "notes": notes}
        return image


def load_scan(path, channel=None):
    """Open a scan -> a nibabel image with a checked header. Raises Rejected.

    NIfTI-1, NIfTI-2 and FreeSurfer's files (.mgz) are told by their first bytes, pairs of .hdr and
    .img by their names. channel: which volume of a 4-D file.

    What is known of the file stands in the image's `extra`: path, size, mtime, notes, and sha256,
    which is None if the file was not read whole."""
    path = os.fspath(path)
    digest = None
    with naming(path), open(path, "rb") as file:
        state = os.fstat(file.fileno())
        packed, kind = first_bytes(file)
        if kind is None:
            image = load_other(path)
        elif not packed and path.lower().endswith(".mgh" if kind is nib.MGHImage else ".nii"):
            # The voxels stay on the disk until they are asked for. Under another ending, nibabel
            # would take the file for what its name says.
            image = nib.load(path)
        else:
            # A packed file is unpacked whole, in memory: only so is its checksum verified.
            content = file.read()
            digest = hashlib.sha256(content).hexdigest()
            if packed:
                content = unpack(content, unpacked_size(kind, content, channel))
            image = kind.from_bytes(content)

        image, notes = checked(image, channel)
        if channel is not None:
            image = image.slicer[..., channel]
        image.extra = {"path": path, "size": state.st_size, "mtime": state.st_mtime_ns,
                       "sha256": digest, "notes": notes}
        return image


def unpacked_size(kind, content, channel):
    """How many bytes a packed scan may hold, by its header, which is checked first."""
    image = kind.from_stream(gzip.GzipFile(fileobj=io.BytesIO(content)))
    image, _ = checked(image, channel)
    return int(image.dataobj.offset) + size_of_voxels(image) + SPARE


def unpack(content, limit):
    """Unpack a .gz file of one or several members, whose checksums zlib verifies.

    Raises EOFError beyond `limit` bytes, so that a small file cannot fill the memory. In one piece
    by zlib: gzip.GzipFile takes 8 KB at a time, and reads a scan up to a fifth slower."""
    members = []
    while content:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        members.append(member.decompress(content, limit))
        if not member.eof:
            raise EOFError("cut short, or more data than the header says")

        # Tape drives and some writers fill the file up with zeros.
        content = member.unused_data.lstrip(b"\0")
    return b"".join(members)


def as_image(nifti):
    """A nibabel image as it is; the scan at a path, loaded."""
    return nifti if hasattr(nifti, "dataobj") else load_scan(nifti)


def voxel_file(path, image):
    """The file that holds the voxels of a scan: of a pair of .hdr and .img, the second."""
    return image.file_map["image"].filename or path


def size_of_voxels(image):
    """The number of bytes of a scan's voxels, as they are stored."""
    return math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize


def path_of(image):
    """Where an image was read from, for messages."""
    return image.extra.get("path") or image.get_filename() or "image"


# -------------------------------------------------------------------------------------- its header
def checked(image, channel=None):
    """Mend and check a header -> (image, notes on what was mended). Raises Rejected."""
    image, notes = settle_affine(image)
    check_header(image, channel)
    return image, notes


# Notes on what a header says twice, or not at all. Each is a line of the report.
QFORM = "qform used, since the voxel size of the sform is not pixdim's"
MIRRORED = "sform taken, though the qform has left and right the other way"
GUESS = "no orientation in the header: nibabel's guess of left and right is taken"


def settle_affine(image):
    """Choose between a NIfTI header's two affines -> (image, notes). Raises Rejected.

    The header says the voxel size twice: in pixdim, which the qform uses, and in the sform. Where
    they differ, the qform is taken, if it has a code."""
    header = image.header
    if isinstance(header, MGHHeader):
        return image, []
    if not isinstance(header, nib.Nifti1Header):  # Analyze has no affine at all
        return image, [GUESS]
    if header["sform_code"] == 0:
        notes = [] if header["qform_code"] else [GUESS]
        return image, notes

    # 5 % apart is neither rounding nor the shear of a tilted gantry; below that, a head is as
    # large either way.
    sform = image.get_sform()
    by_sform = np.linalg.norm(sform[:3, :3], axis=0)
    by_pixdim = np.abs(header["pixdim"][1:4]).astype(float)
    has_qform = header["qform_code"] > 0
    if np.allclose(by_sform, by_pixdim, rtol=0.05, atol=0):
        mirrored = has_qform and np.linalg.det(image.get_qform()) * np.linalg.det(sform) < 0
        notes = [MIRRORED] if mirrored else []
        return image, notes

    # They contradict each other, so that only one is left.
    if has_qform:
        header = header.copy()
        header.set_sform(None, 0)
        return type(image)(image.dataobj, image.get_qform(), header), [QFORM]

    # An sform with an axis of no length is left to check_header.
    if (by_sform > 1e-6).all():
        raise Rejected(f"the voxels measure {times(by_sform, '.4g')} mm by the sform, "
                       f"{times(by_pixdim, '.4g')} mm by pixdim, and there is no qform: one of "
                       "them is wrong")
    return image, []


def check_header(image, channel=None):
    """Raise Rejected for what no head scan has, so that damage cannot ask for absurd memory."""
    # A fourth axis of one volume is no axis.
    shape = [*image.shape[:3], *(n for n in image.shape[3:] if n > 1)]
    if channel is None:
        wanted = "3-D"
        fits = len(shape) == 3
    else:
        wanted = "4-D"
        fits = len(shape) == 4 and channel < shape[3]
    if not fits:
        raise Rejected(f"not {wanted} but {times(image.shape)}", damage=False)

    # The official code's rule of admission.
    shape = shape[:3]
    if min(shape) < 15:
        raise Rejected(f"a side of {min(shape)} voxels, under 15", damage=False)
    if image.get_data_dtype().kind not in "iuf":
        raise Rejected(f"voxels of type {image.get_data_dtype()}, not numbers")

    # The voxels need a size, and axes that are not parallel.
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    usable = np.isfinite(image.affine).all() and (spacing > 1e-6).all()
    if not usable or abs(np.linalg.det(image.affine)) < 1e-9:
        raise Rejected("no affine scale")

    # A head with the air around it measures more than 5 mm and less than 1 m.
    extent = np.array(shape) * spacing
    if max(shape) > 2000 or extent.min() < 5 or extent.max() > 1000:
        raise Rejected(f"{times(shape)} voxels over {times(extent, '.3g')} mm are no head scan's")


def times(numbers, style=""):
    """Numbers as in "240 x 240 x 155"."""
    return " x ".join(format(number, style) for number in numbers)


def same_grid(a_shape, a_affine, b_shape, b_affine):
    """Do two arrays (D, H, W), each with its affine, lie on one grid?

    They do if both, turned to RAS, have the same shape, and corners no more than 1e-2 mm apart. The
    order and direction of the stored axes are free."""
    a_last, a_corners = ras_corners(a_shape, a_affine)
    b_last, b_corners = ras_corners(b_shape, b_affine)
    return np.array_equal(a_last, b_last) and np.abs(a_corners - b_corners).max() <= 1e-2


def ras_corners(shape, affine):
    """Turn a grid to RAS -> (index of its last voxel, its eight corners (8, 3) in mm)."""
    shape = tuple(shape)[:3]
    affine = np.asarray(affine, float)
    orientation = nib.io_orientation(affine)
    to_ras = affine @ nib.orientations.inv_ornt_aff(orientation, shape)

    last = np.array(shape)[np.argsort(orientation[:, 0])] - 1
    corners = np.array(list(np.ndindex(2, 2, 2))) * last
    return last, nib.affines.apply_affine(to_ras, corners)


# -------------------------------------------------------------------------------------- its voxels
def stored_voxels(image, least=0.01):
    """Read an image -> (voxels float32 (D, H, W) in stored order, number of NaN, which become 0).

    SPM writes NaN outside the field of view. Raises Rejected for infinite values, and if fewer than
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


def label_map(image):
    """Read a label map -> (values uint8 (D, H, W) in stored order, number of NaN, which become 0).

    A value within 1e-3 of an integer is that integer: a scale factor or a float file leaves such.
    Raises Rejected for other values than 0 to 255."""
    with naming(path_of(image)):
        voxels, nan = stored_voxels(image, least=0)

        # Most label maps hold integers. What uint8 cannot hold comes out different here.
        with np.errstate(invalid="ignore"):
            values = voxels.astype(np.uint8)
        if np.array_equal(values, voxels):
            return values, nan

        # A few hold what is almost an integer.
        whole = np.round(voxels)
        wrong = (np.abs(voxels - whole) > 1e-3) | (whole < 0) | (whole > 255)
        if wrong.any():
            first = voxels[wrong][0]
            raise Rejected(f"label values unknown: {first:.6g} is no integer from 0 to 255")
        return whole.astype(np.uint8), nan


FEW = 64  # a volume with fewer distinct values is a label map, and no scan


def is_label_map(path, is_named):
    """Is a file a label map, by its values? What cannot be read is none.

    A file whose name says a sequence is read only if its type or its size leave a doubt: voxels of
    8 bits, or packed to less than a twentieth, to which no noise can be packed."""
    try:
        with naming(path):
            image = read_header(path)
            packed_to = os.path.getsize(voxel_file(path, image)) / size_of_voxels(image)
            if is_named and image.get_data_dtype().itemsize > 1 and packed_to > 1 / 20:
                return False
            return has_few_values(voxel_file(path, image), image)
    except Rejected:
        return False


def has_few_values(path, image):
    """Are there fewer than FEW distinct values in a file with this header?

    It is read from its start to where so many are seen: of most scans that is a small part."""
    left = size_of_voxels(image)
    values = np.zeros(0)
    with open(path, "rb") as file:
        start = file.read(len(GZIP))
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if start == GZIP else file
        stream.seek(int(image.dataobj.offset))

        while left and len(values) < FEW:
            block = stream.read(min(left, 2**18))
            if not block:
                raise EOFError("cut short")
            left -= len(block)
            values = np.union1d(values, np.frombuffer(block, image.get_data_dtype()))
    return len(values) < FEW
