"""A small prepared folder by hand: volumes, labels, geometry and index, as prepare_data.py writes them."""

import csv
import json
import os

import nibabel as nib
import numpy as np

import data
import preprocess

TASK = {"data": "set by --data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
        "labels": {0: 0, 1: 1}, "n_train": 2, "folds": 2}
TINY = {"model": "unet_demo", "features": 4, "steps": 4, "patch_size": 32, "batch_size": 2, "save_every": 2,
        "log_every": 1, "compile": "false", "precision": "fp32", "workers": 0, "lr": 1e-3, "overlap": 0}


def head(seed, n=30):
    z, y, x = np.indices((n, n, n)) - (n - 1) / 2
    radius = np.sqrt(z ** 2 + y ** 2 + x ** 2)
    noise = np.random.default_rng(seed).normal(0, 20, radius.shape)
    return np.where(radius < 0.42 * n, 300 + 100 * np.cos(z / 4) + noise, 0).clip(0).astype(np.float32)


def lesion(value=1, at=10, n=30):
    label = np.zeros((n, n, n), np.uint8)
    label[at:at + 4, 12:16, 12:16] = value
    return label


def volume_of(subject, sequence="FLAIR", label=None, **fields):
    """A row of the index. label: the values and voxels, as the index has them."""
    stem = f"mine/{subject}_1_{sequence}"
    row = data.Volume(f"volumes/{stem}.npy", "mine", subject, "1", sequence, "train", "", "30x30x30", "1x1x1",
                      f"scan of {subject} {sequence}")
    if label is not None:
        row = row._replace(label=f"labels/{stem}.npy", label_sha256=f"label of {subject}", label_values=label)
    return row._replace(**fields)


def write_index(folder, volumes, columns=data.Volume._fields):
    path = folder / "index" / "mine-0of1.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = [volume._asdict() for volume in volumes]
        csv.writer(file).writerows([columns, *([row[column] for column in columns] for row in rows)])


def counts(native, prepared):
    """The label values of two arrays, as the index has them."""
    return " ".join(f"{value}:{(native == value).sum()}/{(prepared == value).sum()}"
                    for value in np.unique(native))


def prepare(folder, labels, columns=data.Volume._fields):
    """A prepared folder, as prepare_data.py writes it, of heads with these label arrays: {subject: array}."""
    volumes = []
    for number, (subject, label) in enumerate(sorted(labels.items())):
        row = volume_of(subject, label="")
        voxels, geometry = preprocess.preprocess(nib.Nifti1Image(head(number), np.eye(4)))
        truth = preprocess.preprocess_label(nib.Nifti1Image(label, np.eye(4)), geometry)
        stem = os.path.splitext(row.label)[0]
        for path, array in ((row.path, voxels.astype(np.float16)), (row.label, truth)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / path, array)
        nib.Nifti1Image(label, np.eye(4)).to_filename(folder / f"{stem}_native.nii.gz")
        record = folder / stem.replace("labels", "geometry", 1)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.with_name(f"{record.name}.json").write_text(json.dumps(geometry))
        volumes.append(row._replace(label_values=counts(label, truth), shape="x".join(map(str, voxels.shape)),
                                    label_sha256=f"label of {label.sum()} at {label.argmax()}"))
    write_index(folder, volumes, columns)
    return folder
