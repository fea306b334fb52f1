"""A small prepared folder by hand, as prepare_data.py writes it: files and index."""

import csv
import json

import nibabel as nib
import numpy as np

import data
import preprocess
import resample

# A task on such a folder, and the settings of a run that takes seconds.
TASK = {"data": "set by --data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
        "labels": {0: 0, 1: 1}, "n_train": 2, "folds": 2}
TINY = {"model": "unet_demo", "features": 4, "steps": 4, "patch_size": 32, "batch_size": 2,
        "save_every": 2, "log_every": 1, "compile": "false", "precision": "fp32", "workers": 0,
        "lr": 1e-3, "overlap": 0}


def read_case(case):
    """All that an evaluation reads of a case: volume, geometry, true label values."""
    volume, geometry = data.read_scan(case)
    return volume, geometry, data.read_truth(case, geometry)


def restore(classes, geometry):
    """Class numbers of a prepared volume back on the scan's own grid, by the nearest voxel."""
    return preprocess.place(resample.nearest(classes, preprocess.box_size(geometry)), geometry)


def head(seed, n=30):
    """A ball of n voxels across with layers and noise: (n, n, n) float32."""
    z, y, x = np.indices((n, n, n)) - (n - 1) / 2
    radius = np.sqrt(z ** 2 + y ** 2 + x ** 2)
    noise = np.random.default_rng(seed).normal(0, 20, radius.shape)
    voxels = np.where(radius < 0.42 * n, 300 + 100 * np.cos(z / 4) + noise, 0)
    return voxels.clip(0).astype(np.float32)


def lesion(value=1, at=10, n=30):
    """A label map with one cube of 4 voxels a side, which begins at plane `at`."""
    label = np.zeros((n, n, n), np.uint8)
    label[at:at + 4, 12:16, 12:16] = value
    return label


def volume_of(subject, sequence="FLAIR", label=None, **fields):
    """A row of the index. label: the values and voxels, as the index has them."""
    stem = f"mine/{subject}_1_{sequence}"
    row = data.Volume(
        path=f"volumes/{stem}.npy",
        source="mine",
        subject=subject,
        session="1",
        sequence=sequence,
        split="train",
        label="",
        shape="30x30x30",
        spacing="1x1x1",
        sha256=f"scan of {subject} {sequence}",
    )
    if label is not None:
        row = row._replace(label=f"labels/{stem}.npy", label_sha256=f"label of {subject}",
                           label_values=label)
    return row._replace(**fields)


def write_index(folder, volumes, columns=data.Volume._fields):
    """The index of a folder. columns: fewer than all, as an earlier version wrote it."""
    path = folder / "index" / "mine-0of1.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for volume in volumes:
            row = volume._asdict()
            writer.writerow([row[column] for column in columns])


def counts(native, prepared):
    """The label values of two arrays, as the index has them."""
    return " ".join(f"{value}:{(native == value).sum()}/{(prepared == value).sum()}"
                    for value in np.unique(native))


def prepare(folder, labels, columns=data.Volume._fields):
    """A prepared folder, as prepare_data.py writes it, of heads with label maps.

    labels: {subject: (D, H, W) uint8}. columns: as in write_index."""
    volumes = []
    for number, (subject, label) in enumerate(sorted(labels.items())):
        row = volume_of(subject, label="")
        voxels, geometry = preprocess.preprocess(nib.Nifti1Image(head(number), np.eye(4)))
        native = nib.Nifti1Image(label, np.eye(4))
        prepared = preprocess.preprocess_label(native, geometry)

        # The files: volume, label map at 1 mm, label map as it was, geometry.
        places = [row.path, row.label, data.native_of(row.label), data.geometry_of(row.path)]
        places = [folder / place for place in places]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        np.save(places[0], voxels.astype(np.float16))
        np.save(places[1], prepared)
        native.to_filename(places[2])
        places[3].write_text(json.dumps(geometry))

        # The row of the index. The checksum tells apart what differs in size or place.
        volumes.append(row._replace(
            shape="x".join(map(str, voxels.shape)),
            label_sha256=f"label of {label.sum()} at {label.argmax()}",
            label_values=counts(label, prepared)))
    write_index(folder, volumes, columns)
    return folder
