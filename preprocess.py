"""Section 2: a scan becomes a [0, 1] volume at 1 mm, and a result goes back to the scan's grid."""

import os

import nibabel as nib
import numpy as np
import torch

import resample
import scans
from config import UserError
from scans import Rejected


# ------------------------------------------------------------------------------ a scan to a volume
def preprocess(nifti, box=None):
    """Prepare one scan -> (volume float32 (D, H, W) in [0, 1], RAS at 1 mm; its geometry).

    nifti: a nibabel image or a path. box: half-open voxel ranges ((start, stop), ...) of the RAS
    grid, to crop to instead of the head. The geometry is what `place` needs. Raises Rejected."""
    image = scans.as_image(nifti)
    with scans.naming(scans.path_of(image)):
        voxels, orientation, nan = read_voxels(image)
        voxels, clamped = clamp(voxels)

        # This order is the official code's. The paper's text has resampling first, the crop last.

        # Crop to the head.
        if box is None:
            box = tight_box(voxels)
        box = [list(map(int, pair)) for pair in np.reshape(box, (3, 2))]
        crop = voxels[slices(box)]

        # Normalise to [0, 1].
        crop = normalise(crop)

        # Resample to 1 mm. Row a of the orientation says which RAS axis the stored axis a is.
        spacing = nib.affines.voxel_sizes(image.affine)[np.argsort(orientation[:, 0])]
        sides_mm = np.array(crop.shape) * spacing
        shape = [max(1, round(side)) for side in sides_mm.tolist()]
        volume = resample.resample(crop, shape)

    geometry = {"shape": list(map(int, image.shape[:3])), "affine": image.affine.tolist(),
                "orientation": orientation.tolist(), "spacing": spacing.tolist(), "box": box,
                "resampled": shape, "clamped": clamped, "nan": nan}
    return volume, geometry


def read_voxels(image):
    """Read a scan -> (voxels float32 (D, H, W) in RAS order, its orientation, number of NaN).

    The axes are the closest canonical ones of nibabel's affine, whatever the form codes say; an
    oblique grid stays oblique. (The official code flips only, and stops at permuted axes.) NaN
    become 0. Raises Rejected for damage."""
    voxels, nan = scans.stored_voxels(image)
    orientation = nib.io_orientation(image.affine)
    return nib.apply_orientation(voxels, orientation), orientation, nan


def clamp(voxels):
    """Set negative values to 0, since MR magnitudes are not negative -> (voxels, how many).

    Raises Rejected for a scan that was normalised before: after a z-normalisation, the negative
    values add up to as much as the positive ones. What ringing and interpolation leave adds up to
    less than a thousandth of those. An offset under which all air is negative may reach a third. So
    the border is half. Their number would not tell, since most of a scan is air."""
    below = voxels < 0
    count = int(np.count_nonzero(below))
    clamped = np.maximum(voxels, 0)
    if not count:
        return clamped, 0

    # Compare what lies on the two sides of 0.
    negative = -voxels[below].sum(dtype=np.float64)
    positive = clamped.sum(dtype=np.float64)
    if 2 * negative > positive:
        share = 100 * count / np.count_nonzero(voxels)
        raise Rejected(f"{share:.0f} % of the voxels that are not 0 are negative: is it normalised "
                       "already? Give the scan as the scanner wrote it")
    return clamped, count


def tight_box(voxels):
    """Find the half-open box ((start, stop), ...) of the voxels > 0. Raises Rejected without any.

    The official code's box is one voxel larger at the high side."""
    head = voxels > 0
    box = []
    for others in ((1, 2), (0, 2), (0, 1)):
        filled = np.flatnonzero(head.any(others))
        if not len(filled):
            raise Rejected("constant or empty: no voxel above 0")
        box.append((int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def union_box(boxes):
    """The smallest box that holds several on one grid: the channels of one task share it."""
    boxes = np.array(boxes)
    starts = boxes[:, :, 0].min(0).tolist()
    stops = boxes[:, :, 1].max(0).tolist()
    return tuple(zip(starts, stops, strict=True))


def slices(box):
    """A box as an index of an array."""
    return tuple(slice(start, stop) for start, stop in box)


def normalise(crop):
    """Map intensities to [0, 1]: y = (min(x, q99) - m) / (q99 - m). Raises Rejected if constant.

    m is the minimum of the crop, q99 the 99th percentile of its voxels > m. This is what the
    official clip, z-normalisation and rescaling come to together."""
    low = crop.min()
    above = crop[crop > low]
    if not len(above):
        raise Rejected("constant")
    high = np.quantile(above, 0.99)

    # The first step makes a copy, the others work in place.
    crop = np.minimum(crop, high)
    crop -= low
    crop /= high - low
    return crop


# ------------------------------------------------------------------------- a label map to its grid
def preprocess_label(nifti, geometry):
    """Prepare the label map of a scan -> uint8 (D, H, W) on its volume's grid, nearest voxel.

    Raises Rejected if the label map is not on the scan's grid (a corner more than 1e-2 mm away), or
    holds other values than integers from 0 to 255."""
    image = scans.as_image(nifti)
    check_same_grid(image, geometry)
    values, _ = scans.label_map(image)
    return fit_label(values, image.affine, geometry)


def check_same_grid(label, geometry):
    """Raise Rejected if a label map is not on the grid of the scan with this geometry."""
    if not scans.same_grid(label.shape, label.affine, geometry["shape"], geometry["affine"]):
        raise Rejected("label grid differs from image grid", path=scans.path_of(label))


def fit_label(values, affine, geometry):
    """Bring label values (D, H, W) from the scan's grid to that of its prepared volume."""
    return resample.nearest(crop_label(values, affine, geometry), geometry["resampled"])


def crop_label(values, affine, geometry):
    """Turn label values (D, H, W), as stored, to RAS order and crop them to the scan's box."""
    values = nib.apply_orientation(values, nib.io_orientation(affine))
    return values[slices(geometry["box"])]


# -------------------------------------------------------------------------------- and back again
def box_size(geometry):
    """Voxels of the crop box along its three axes, in the scan's own voxel size."""
    return [stop - start for start, stop in geometry["box"]]


def place(crop, geometry):
    """Put what was found in the crop box of a scan, integers in RAS order, in the scan's whole
    field of view and on its stored axes. Outside the box all is 0, the background."""
    orientation = np.array(geometry["orientation"])
    ras_shape = np.array(geometry["shape"])[np.argsort(orientation[:, 0])]
    full = np.zeros(ras_shape, crop.dtype)
    full[slices(geometry["box"])] = crop

    # RAS axis orientation[a, 0] came from the stored axis a, flipped where orientation[a, 1] is -1.
    full = np.flip(full, [int(axis) for axis, sign in orientation if sign < 0])
    return np.ascontiguousarray(full.transpose([int(axis) for axis, _ in orientation]))


# ----------------------------------------------------------------------------- what is segmented
def prepare_scan(paths, parts=None):
    """Prepare the scans of one session on one grid, a file a channel, as prepare_data.py does.

    parts: for each file the number of its volume, if it is 4-D, or None.
    -> (volume (C, D, H, W) in [0, 1] at 1 mm; geometry and image of the first). The axes may be
    stored in different orders: all become RAS. The channels share the union of their tight boxes,
    and values are float16, since the network was trained on such. Prints what was mended in a scan.
    Raises UserError naming the file."""
    parts = parts or [None] * len(paths)
    images = [scans.load_scan(path, part) for path, part in zip(paths, parts, strict=True)]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        if not scans.same_grid(image.shape, image.affine, first.shape, first.affine):
            raise UserError(f"{path} is not on the grid of {paths[0]}: register and resample the "
                            "channels")

    # One box that holds the head in every channel.
    boxes = []
    for path, image in zip(paths, images, strict=True):
        with scans.naming(os.fspath(path)):
            voxels, _, _ = read_voxels(image)
            boxes.append(tight_box(voxels))
    box = union_box(boxes)

    # Each channel is normalised by itself. On one grid and in one box, the geometry of the first
    # leads back for all.
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


def read_label(path, image):
    """Read the label map at a path -> its values (D, H, W) on the stored axes of a scan's image.

    The values are held to the same rule as in preparation. Raises UserError if the label map is not
    on the image's grid."""
    label = scans.load_scan(path)
    check_same_grid(label, {"shape": image.shape[:3], "affine": image.affine})
    values, _ = scans.label_map(label)
    return on_axes(nib.Nifti1Image(values, label.affine), image.affine)


def on_axes(label, affine):
    """Turn a label map, a nibabel image, to the stored axes of a scan on the same grid.

    -> values (D, H, W), integers or float32. As in preparation, a value within 1e-3 of an integer
    is that integer, and NaN is 0; other values stay, for the caller to name."""
    values = np.asanyarray(label.dataobj).reshape(label.shape[:3])
    if values.dtype.kind not in "iu":
        values = values.astype(np.float32)
        values = np.where(np.isnan(values), np.float32(0), values)
        whole = np.round(values)
        values = np.where(np.abs(values - whole) <= 1e-3, whole, values)

    # Both grids are turned to RAS by their orientations, so one leads to the other.
    here = nib.io_orientation(label.affine)
    there = nib.io_orientation(affine)
    return nib.apply_orientation(values, nib.orientations.ornt_transform(here, there))
