"""Small inputs for the tests of preparation, written and prepared in a line."""

import csv
import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np

import data
import phantom
import prepare_data

COLUMNS = ("path", "subject", "session", "sequence", "label")


def image_of(array, affine=None):
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine)


def head(spacing=(1, 1, 1), axes="RAS", degrees=0.0, size=80, contrast="FLAIR", seed=0):
    """A phantom scan with its lesion map: two nibabel images."""
    rng = np.random.default_rng(seed)
    return phantom.scan(
        phantom.anatomy(rng, size), rng, contrast, size, spacing, axes, degrees, lesions=True
    )


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


def prepare(source, folder, out, **settings):
    """prepare_data.py in this process, which is quicker; -> its exit code."""
    settings = {"workers": 1} | settings
    return prepare_data.main(prepare_data.Config(source, str(folder), str(out), **settings))


def tables(out, kind):
    return [
        row
        for path in sorted((Path(out) / kind).glob("*.csv"))
        for row in csv.DictReader(path.open())
    ]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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


def session_of_two(folder):
    """A FLAIR and a T2 on one grid with a label; the T2 reaches 3 mm further to one side."""
    image, label = head(size=48)
    narrow = np.asarray(image.dataobj).copy()
    narrow[:3] = 0
    os.makedirs(folder / "sub-1" / "anat", exist_ok=True)
    for name, file in (
        ("FLAIR", image_of(narrow, image.affine)),
        ("T2w", image),
        ("lesion", label),
    ):
        file.to_filename(folder / "sub-1" / "anat" / f"sub-1_{name}.nii.gz")
    return folder / "sub-1" / "anat" / "sub-1_T2w.nii.gz"


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def bad_voxels(kind, array):
    """The voxels of one bad scan, from those of a good one; those if it is bad in another way."""
    if kind == "4-D":
        return np.stack([array, array], -1)
    if kind == "infinite":
        array[3, 4, 5] = np.inf
    elif kind == "constant":
        array[:] = 7
    elif kind == "empty":
        array[:] = 0
    elif kind == "thin":
        return array[:, :, :14]
    elif kind == "complex":
        return array.astype(np.complex64)
    return array


def bad_scan(kind, folder):
    """Write one bad scan of a kind, return its path."""
    image, _ = head(size=40)
    array = bad_voxels(kind, np.asarray(image.dataobj).astype(np.float32))
    path = folder / "sub-1_T1w.nii.gz"
    image_of(array, image.affine).to_filename(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "huge":  # a header that asks for 30,000^3 voxels
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[42:48] = np.array([30000] * 3, "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "bomb":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**26)))
    elif kind == "no scale":
        image = nib.load(path)
        header = image.header.copy()
        header.set_sform(np.zeros((4, 4)), 1)
        nib.Nifti1Image(array, None, header).to_filename(path)
    return path
