"""Small inputs for the tests of preparation, written and prepared in a line."""

import csv
import json
import os

import numpy as np
from test_prepare import prepare

import data

COLUMNS = ("path", "subject", "session", "sequence", "label")


def array_of(image):
    return np.asarray(image.dataobj)


def write_manifest(folder, rows, name="scans.csv"):
    """One row (path, subject, sequence, label) a scan."""
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        lines = [(path, subject, "1", sequence, label) for path, subject, sequence, label in rows]
        csv.writer(file).writerows([COLUMNS, *lines])
    return folder / name


def save(folder, images):
    """{path: image or bytes} below a folder."""
    for path, image in images.items():
        os.makedirs(os.path.dirname(folder / path), exist_ok=True)
        if isinstance(image, bytes):
            (folder / path).write_bytes(image)
        else:
            image.to_filename(folder / path)


def rows_of(out):
    return {(row.subject, row.sequence): row for row in data.read_index(str(out))}


def record_of(out, row):
    path = out / row.path.replace("volumes/", "geometry/").replace(".npy", ".json")
    return json.loads(path.read_text())["record"]


def one_scan(folder, image, label=None, ending=".nii.gz"):
    """Prepare one scan by manifest -> (exit code, its row of the index or None)."""
    save(
        folder, {f"scan{ending}": image} | ({f"label{ending}": label} if label is not None else {})
    )
    table = write_manifest(
        folder, [(f"scan{ending}", "a", "FLAIR", f"label{ending}" if label is not None else "")]
    )
    code = prepare("manifest", table, folder / "out")
    return code, rows_of(folder / "out").get(("a", "FLAIR"))


def prepare_tree(folder, images, source="bids"):
    save(folder / "raw", {f"{path}.nii.gz": image for path, image in images.items()})
    return prepare(source, folder / "raw", folder / "out")


def table_text(columns, rows, delimiter=","):
    """The bytes of a csv file."""
    return "\n".join(delimiter.join(row) for row in (columns, *rows)).encode()
