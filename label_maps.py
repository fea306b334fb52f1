"""What was found in a scan: label map and probabilities on the scan's own grid, and volumes."""

import os

import nibabel as nib
import numpy as np

import checkpoint
import distances

# All that a NIfTI header says of its grid: voxel sizes, units, two transforms and their meaning.
GRID = ("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
        "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")


def grid_header(image):
    """Header of a label map on the grid of a scan, of which it takes the grid alone.

    Descriptions, display ranges and extensions are the scan's own, and may name the patient."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(image.shape[:3])

    if isinstance(image.header, nib.Nifti1Header):  # NIfTI-2 and pairs, too
        for field in GRID:
            header[field] = image.header[field]
        header["pixdim"][4:] = 1  # of time and other axes
    else:
        # Headers of FreeSurfer and Analyze are in mm, and have no form codes.
        header.set_zooms(image.header.get_zooms()[:3])
        header.set_xyzt_units("mm")
    return header


def label_values(task):
    """The label value that is written for each class of a task, by class number: (K,) uint8."""
    # A class may have several values: the smallest is written. BraTS has 4 for enhancing tumour.
    values = []
    for number in range(len(task["classes"])):
        values.append(min(value for value, known in task["labels"].items() if known == number))
    return np.array(values, np.uint8)


def write_segmentation(path, classes, task, affine, header):
    """The label map (D, H, W) on the grid of a scan, in the label values of its source.

    What a killed process began may be written once more, while it still ends: each writes under a
    name of its own."""
    with checkpoint.atomic(path, os.getpid()) as temporary:
        label_map = nib.Nifti1Image(label_values(task)[classes], affine, header)
        label_map.to_filename(temporary)


# Of a stored probability. NIfTI has no 16-bit floats, but whole numbers with a scale.
STEPS = 65535


def write_probability(path, steps, affine, header):
    """The probability of a class on the grid of a scan. steps: uint16 (D, H, W), 0 to STEPS."""
    header = header.copy()
    header.set_data_dtype(np.uint16)
    with checkpoint.atomic(path, os.getpid()) as temporary:
        image = nib.Nifti1Image(steps, affine, header)
        image.header.set_slope_inter(1 / STEPS, 0)
        image.to_filename(temporary)


# ------------------------------------------------------------------------------------------ volumes
def measure(mask, spacing):
    """The volume of a mask, bool (D, H, W), on a grid of voxels of `spacing` mm.

    -> {"ml", "components": how many, by 26 neighbours, "largest_ml": of the largest}."""
    voxel_ml = float(np.prod(spacing)) / 1000
    found = distances.components(mask[distances.box_of(mask)])

    # A component is named by a number, and not all numbers are used.
    sizes = np.bincount(found)
    sizes = sizes[sizes > 0]
    return {"ml": len(found) * voxel_ml, "components": len(sizes),
            "largest_ml": float(sizes.max(initial=0)) * voxel_ml}


def print_volumes(classes, task, affine):
    """How much was found of each class but the background."""
    voxel_ml = np.prod(nib.affines.voxel_sizes(affine)) / 1000
    for number, name in enumerate(task["classes"]):
        if number:
            print(f"{name}: {(classes == number).sum() * voxel_ml:.2f} ml")
