"""The folder of a segmented cohort, as derivatives of BIDS: names, records, and volumes.csv.

    dataset_description.json, dseg.tsv, volumes.csv
    sub-01/ses-1/anat/sub-01_ses-1_space-orig_label-lesion_dseg.nii.gz   the label map
    sub-01/ses-1/anat/sub-01_ses-1_space-orig_label-lesion_dseg.json     its record, written last

A scan is finished when it has its record. volumes.csv is made of the records.
"""

import contextlib
import csv
import glob
import io
import json
import os
import re

import nibabel as nib
import numpy as np

import checkpoint
import config
import label_maps
import metrics
import new_scans
import tasks
from config import UserError

# What volumes.csv says of each scan and class.
COLUMNS = ("scan", "file", "class", "ml", "components", "largest_ml", "share", "mean_probability")

# What it says beside that, where the true label map is known. ml is there already.
SCORES = tuple(kind for kind in metrics.SCORES if kind != "ml")


# ------------------------------------------------------------------------------------- names
def path_of(out, name, label, ending):
    """A file of a scan, by the name of the scan. label: its class, or None for all of them."""
    subject, session = name.split("_")
    marked = f"_label-{new_scans.bids_word(label, '')}" if label else ""
    return os.path.join(out, subject, session, "anat", f"{name}_space-orig{marked}_{ending}")


def label_map_of(out, name, task):
    """The label map of a scan; its record has the same name with the ending .json."""
    # A single class gives the label map its name.
    classes = task["classes"][1:]
    label = classes[0] if len(classes) == 1 else None
    return path_of(out, name, label, "dseg.nii.gz")


def record_of(out, name, task):
    return label_map_of(out, name, task).removesuffix(".nii.gz") + ".json"


def probability_of(out, name, label):
    """The probability of a class in a scan."""
    return path_of(out, name, label, "probseg.nii.gz")


# ----------------------------------------------------------------------------------- records
def files_of(scan):
    """What is known of a scan's files without reading them: [absolute path, size, time]. UserError
    for one that is not there."""
    known = []
    for path in filter(None, (*scan.paths, scan.truth)):
        try:
            state = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: {config.reason(error)}") from None
        known.append([os.path.abspath(path), state.st_size, state.st_mtime_ns])
    return known


def read_records(out):
    """The records of all scans that are finished in a folder. A scan has several if networks with
    other names of labels have worked on it."""
    records = []
    for path in sorted(glob.glob(f"{glob.escape(out)}/sub-*/ses-*/anat/*_dseg.json")):
        # One that is damaged, or not ours, counts for nothing: its scan is segmented again.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(checkpoint.read_text(path))
            if os.path.basename(path).startswith(record["scan"] + "_") and record["made_by"]:
                records.append(record)
    return records


def forget(out, name):
    """Remove all that was written of a scan, its records first: from here on it is not finished."""
    for ending in ("dseg.json", "dseg.nii.gz", "probseg.nii.gz"):
        for path in glob.glob(glob.escape(path_of(out, name, None, "")) + f"*{ending}"):
            os.unlink(path)


def is_finished(record, scan, out, task, made_by, probabilities):
    """Is a record, or None, that of this scan, these networks and settings, with all its files?"""
    if record is None or record["made_by"] != made_by:
        return False
    wanted = [label_map_of(out, scan.name, task)]
    if probabilities:
        wanted += [probability_of(out, scan.name, label) for label in task["classes"][1:]]
    if not all(map(os.path.exists, wanted)):
        return False

    # Records of earlier versions do not say which volume of a file was read.
    parts = list(scan.parts)
    if record.get("parts", parts) != parts:
        return False

    # The folder of the scans may move. A truth that is not asked for any more may stay.
    now = [[os.path.basename(path), *state] for path, *state in files_of(scan)]
    before = [[os.path.basename(path), *state] for path, *state in record["files"]]
    return now == before[:len(now)] if not scan.truth else now == before


# --------------------------------------------------------------------------------- the folder
AUTHOR = "AMAES in plain PyTorch"  # as dataset_description.json names it

# The files of the folder itself. The first of them says whose they are, and is written first.
OF_FOLDER = ("dataset_description.json", "dseg.tsv", "volumes.csv")


def check_folder(out):
    """UserError if a folder has files of these names that somebody else has written."""
    found = [name for name in OF_FOLDER if os.path.exists(os.path.join(out, name))]
    if not found:
        return
    try:
        described = json.loads(checkpoint.read_text(os.path.join(out, OF_FOLDER[0])))
        is_ours = described["GeneratedBy"][0]["Name"] == AUTHOR
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"out {out} has a {found[0]} that predict.py has not written: name a "
                        "folder of its own, as INPUT/derivatives/segmented")


def clear_parts(out):
    """Remove what a killed call had not finished, by the names of checkpoint.atomic. The folder is
    locked."""
    tops = [out, *glob.glob(f"{glob.escape(out)}/sub-*/ses-*/anat")]
    ours = r"\.part\d+-(sub-.*_space-orig.*_(dseg|probseg)\.(nii\.gz|json)|" \
           + "|".join(map(re.escape, OF_FOLDER)) + ")"
    for top in tops:
        for name in os.listdir(top):
            if re.fullmatch(ours, name):
                os.unlink(os.path.join(top, name))


def write_description(out, task):
    """What BIDS wants of a folder of derivatives, and the names of its labels."""
    made_by = {"Name": AUTHOR, "Version": checkpoint.versions()["commit"]}
    described = {"Name": f"Segmentations of {', '.join(task['classes'][1:])}",
                 "BIDSVersion": "1.9.0", "DatasetType": "derivative", "GeneratedBy": [made_by]}
    checkpoint.write_text(os.path.join(out, "dataset_description.json"),
                          json.dumps(described, indent=1) + "\n")

    values = label_maps.label_values(task).tolist()
    lines = [f"{value}\t{name}" for value, name in zip(values, task["classes"], strict=True)]
    checkpoint.write_text(os.path.join(out, "dseg.tsv"), "\n".join(["index\tname", *lines, ""]))


def columns_of(records, scans):
    """The header of volumes.csv in a call: with scores, if one of the records has any, or one of
    the scans will."""
    scored = any("dice" in row for record in records for row in record["classes"].values())
    if scored or any(scan.truth for scan in scans):
        return (*COLUMNS, *SCORES)
    return COLUMNS


def rows_of(record, columns):
    """The rows of one scan in volumes.csv, as text. What is not defined is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    file = os.path.basename(record["files"][0][0])
    for name, values in record["classes"].items():
        row = {"scan": record["scan"], "file": file, "class": name} | values
        cells = [row.get(column) for column in columns]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def write_table(out, records, columns):
    """volumes.csv of all records, in the order of their names: the same bytes however it came."""
    rows = [rows_of(records[name], columns) for name in sorted(records)]
    checkpoint.write_text(os.path.join(out, "volumes.csv"), ",".join(columns) + "\n"
                          + "".join(rows))


def append_rows(out, record, columns):
    """The rows of a scan that is finished, until all are and `write_table` puts them in order."""
    path = os.path.join(out, "volumes.csv")
    with checkpoint.writing(path), open(path, "a", **checkpoint.TEXT) as file:
        file.write(rows_of(record, columns))


# ----------------------------------------------------------------------------------- one scan
def measure(classes, probabilities, task, affine, brain_ml, truth):
    """{class or region: what volumes.csv says of it}, JSON-ready.

    classes: class numbers (D, H, W) on the scan's grid. probabilities: {class or region: mean
    probability of its voxels, or None}. brain_ml: the volume of what the scan shows. truth: label
    values on the same grid, or None."""
    spacing = nib.affines.voxel_sizes(np.asarray(affine))
    measured = {}
    for name, numbers in tasks.targets_of(task).items():
        values = label_maps.measure(tasks.union(classes, numbers), spacing)
        values["share"] = values["ml"] / brain_ml
        values["mean_probability"] = probabilities[name]
        measured[name] = values

    if truth is not None:
        scores = tasks.score_case(classes, truth, task, affine)
        for kind in SCORES:
            for name, value in scores[kind].items():
                measured[name][kind] = value
    return {name: {key: metrics.rounded(value) for key, value in values.items()}
            for name, values in measured.items()}
