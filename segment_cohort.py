"""predict.py --input: the scans of a cohort, segmented and measured; what was cut off goes on.

Scans are read, and results written, by processes of their own, while the network works on a scan.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from collections import deque
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config
import derivatives
import devices
import label_maps
import networks
import new_scans
import predict
import preprocess
import scans
import scoring
import tasks
import training
from config import UserError


# ------------------------------------------------------------------------------------------ reading
class Reading(NamedTuple):
    """All that is read of a scan. It comes out of another process: arrays, but no images."""
    volume: np.ndarray  # float16 (C, D, H, W), as preprocess.prepare_scan makes it
    geometry: dict
    affine: np.ndarray
    header: nib.Nifti1Header  # of a label map on its grid
    brain_ml: float  # volume of the voxels above 0 of the first channel
    truth: np.ndarray | None  # true label values (D, H, W)
    files: list  # as derivatives.files_of


def read(scan, task):
    """NewScan -> Reading. Raises UserError, for a label value that the task does not name, too."""
    # A fork has none of its parent's threads. The parent itself, with --workers 0, keeps its own.
    if multiprocessing.parent_process():
        torch.set_num_threads(1)

    with scans.naming(scan.paths[0]):
        files = derivatives.files_of(scan)
        volume, geometry, image = preprocess.prepare_scan(scan.paths, scan.parts)

        # What preprocess.tight_box calls the head, on the scan's own grid.
        voxels, _ = scans.stored_voxels(image)
        voxel_ml = float(np.prod(nib.affines.voxel_sizes(image.affine))) / 1000
        brain_ml = np.count_nonzero(voxels > 0) * voxel_ml

    truth = None
    if scan.truth:
        truth = preprocess.read_label(scan.truth, image)
        tasks.classes_of(truth, task)
    return Reading(volume.numpy(), geometry, image.affine, label_maps.grid_header(image), brain_ml,
                   truth, files)


def read_ahead(wanted, task, workers, failed):
    """Yields (NewScan, Reading) in order. failed(name, error): called for one without a Reading.

    Beside the scan that is yielded, as many are in memory or on their way as there are workers."""
    ready, lost = {}, set()

    def lose(name, error):
        lost.add(name)
        failed(name, error)

    readers = scoring.Scorers(workers, ready.__setitem__, lose)
    waiting, begun = deque(wanted), deque()
    try:
        while waiting or begun:
            while waiting and len(begun) <= workers:
                scan = waiting.popleft()
                begun.append(scan)
                readers.begin(scan.name, read, scan, task)

            # They may come in any order.
            scan = begun.popleft()
            while scan.name not in ready and scan.name not in lost:
                readers.wait(len(readers.running) - 1)
            if scan.name in ready:
                yield scan, ready.pop(scan.name)
    finally:
        readers.leave()


# -------------------------------------------------------------------------------------- the network
class Result(NamedTuple):
    """What the networks found in the crop box of a scan, on its own voxels, in RAS order."""
    classes: np.ndarray  # uint8 (D, H, W)
    means: dict  # {class or region: mean probability of its voxels, None if it has none}
    maps: dict  # {class: its probability, uint16 (D, H, W) of label_maps.STEPS}, if asked for


def segment(members, reading, task, device, mirror, probabilities, **window):
    """Reading -> Result. window: how predict.sliding_window moves."""
    size = preprocess.box_size(reading.geometry)
    volume = torch.from_numpy(reading.volume)
    classes, shares = predict.segment_together(members, volume, size, device, mirror, **window)

    # A region has the probability that one of its classes has.
    means = {}
    for name, numbers in tasks.targets_of(task).items():
        mask = sum(classes == number for number in numbers) > 0
        means[name] = None
        if mask.any():
            probability = predict.resize(shares[list(numbers)].sum(0), size)
            means[name] = probability[mask].double().mean().item()

    maps = {}
    for number, name in enumerate(task["classes"]):
        if probabilities and number:
            steps = predict.resize(shares[number], size).mul(label_maps.STEPS).round()
            maps[name] = steps.to(torch.int32).cpu().numpy().astype(np.uint16)
    return Result(classes.cpu().numpy(), means, maps)


# ------------------------------------------------------------------------------------------ writing
def write(out, scan, task, made_by, reading, result):
    """Write all that was found in a scan -> its record, which is written last."""
    classes = preprocess.place(result.classes, reading.geometry)
    for name, steps in result.maps.items():
        label_maps.write_probability(derivatives.probability_of(out, scan.name, name),
                                     preprocess.place(steps, reading.geometry), reading.affine,
                                     reading.header)
    label_maps.write_segmentation(derivatives.label_map_of(out, scan.name, task), classes, task,
                                  reading.affine, reading.header)

    measured = derivatives.measure(classes, result.means, task, reading.affine, reading.brain_ml,
                                   reading.truth)
    record = {"scan": scan.name, "files": reading.files, "parts": scan.parts, "made_by": made_by,
              "brain_ml": round(reading.brain_ml, 6), "classes": measured}
    path = derivatives.record_of(out, scan.name, task)
    checkpoint.write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def cannot_write(name, error):
    """A full disk is not the scan's fault: it ends the call."""
    raise UserError(f"{name}: {error}; the same command goes on")


# --------------------------------------------------------------------------------------- a cohort
def check_settings(cfg):
    """UserError for what cannot be meant."""
    if cfg.features:
        raise UserError("features: give a scan without --input")
    if cfg.out.endswith((".nii", ".nii.gz")):
        raise UserError(f"out {cfg.out}: with --input, name a folder")
    for folder in filter(None, (cfg.truth, cfg.input)):
        inside = os.path.realpath(cfg.out) + os.sep
        if cfg.truth and inside.startswith(os.path.realpath(folder) + os.sep):
            raise UserError(f"out {cfg.out} is in {folder}, where true label maps are looked for: "
                            "choose a folder beside it")


def check_out(out, inputs, scans):
    """UserError if the results would lie among the files to read, or in place of them. They have
    folders sub-* of their own in the folder `out`."""
    place = os.path.realpath(out)
    for path in inputs:
        if os.path.realpath(path) == place:
            raise UserError(f"out {out} is the input itself: choose another folder, as "
                            f"{os.path.join(out, 'derivatives', 'segmented')}")
        if os.path.relpath(place, os.path.realpath(path)).startswith("sub-"):
            raise UserError(f"out {out} is the folder of a subject to read: choose another, as "
                            f"{os.path.join(path, 'derivatives', 'segmented')}")

    for scan in scans:
        for path in filter(None, (*scan.paths, scan.truth)):
            if os.path.relpath(os.path.realpath(path), place).startswith("sub-"):
                raise UserError(f"out {out} would hold results beside {path}, which is read: "
                                "choose another folder")


def load(cfg, device):
    """-> (Members, their task, what results are made by), and a line on them."""
    paths = networks.find(cfg.ckpt)
    members, task = predict.load_members(paths, device, cfg.precision)
    networks.check_mirror(cfg.mirror, task)
    made_by = {"networks": [checkpoint.checksum(path)[:16] for path in paths],
               "precision": [member.precision for member in members],
               "overlap": cfg.overlap, "gaussian": cfg.gaussian, "mirror": cfg.mirror}

    sizes = [sum(weight.nbytes for weight in member.model.parameters()) for member in members]
    if len(members) == 1:
        print(f"network {paths[0]}: {sizes[0] / 1e6:.0f} MB")
    else:
        print(f"the mean of {len(paths)} networks, {', '.join(paths)}: {sum(sizes) / 1e6:.0f} MB "
              f"in the host's memory, {max(sizes) / 1e6:.0f} MB at a time at work on the {device}")
    return members, task, made_by


def open_folder(out, task, made_by, overwrite):
    """Lock the folder of the results -> ({name: record} of the scans that are finished there, the
    names of those that other networks or settings have made).

    UserError if there are such, unless they are to be overwritten."""
    derivatives.check_folder(out)
    checkpoint.lock(out)
    derivatives.clear_parts(out)
    records, others = {}, {}
    for record in derivatives.read_records(out):
        known = records if record["made_by"] == made_by else others
        known[record["scan"]] = record

    if others:
        theirs = others[min(others)]["made_by"]
        changed = " and ".join(key for key in made_by if theirs.get(key) != made_by[key])
        if not overwrite:
            raise UserError(f"{out} holds segmentations of other {changed}: new --out or "
                            "--overwrite")
        print(f"overwrite: all results of other {changed} are removed from {out}, those of "
              f"{len(others)} scans")

    derivatives.write_description(out, task)
    return {name: record for name, record in records.items() if name not in others}, sorted(others)


def main(cfg):
    """Segment what is left of a cohort -> exit code 1 if a scan could not be, else 0."""
    check_settings(cfg)
    device = devices.pick_device(cfg.device)
    members, task, made_by = load(cfg, device)

    # What there is to segment, and what of it is left.
    found = new_scans.find((cfg.input, *cfg.inputs), cfg.source, task["sequences"], cfg.truth)
    print(*found.lines, sep="\n")
    check_out(cfg.out, (cfg.input, *cfg.inputs), found.scans)
    records, others = open_folder(cfg.out, task, made_by, cfg.overwrite)
    left = [scan for scan in found.scans if cfg.overwrite or not derivatives.is_finished(
        records.get(scan.name), scan, cfg.out, task, made_by, cfg.probabilities)]
    without = [scan.name for scan in found.scans if cfg.truth and not scan.truth]
    if without:
        print(f"no true label map, so no scores: {', '.join(without)}")
    print(f"scans: {len(found.scans)}, of which finished before: {len(found.scans) - len(left)}")

    # What is segmented again, or is of others, has no row and then no record. The columns stay.
    dropped = [*others, *(scan.name for scan in left)]
    for name in dropped:
        records.pop(name, None)
    columns = derivatives.columns_of(records.values(), found.scans)
    derivatives.write_table(cfg.out, records, columns)
    for name in dropped:
        derivatives.forget(cfg.out, name)

    failed = dict(found.faults)
    stopped = segment_all(cfg, members, task, made_by, left, records, failed, device, columns)
    derivatives.write_table(cfg.out, records, columns)
    return report(cfg.out, left, records, failed, stopped)


def segment_all(cfg, members, task, made_by, left, records, failed, device, columns):
    """Segment the scans that are left. Adds to records, to failed, {name: why}, and to volumes.csv
    in these columns.

    -> did a signal stop it before all were done?"""
    stop = training.catch_signals()
    progress = tqdm(total=len(left), desc="segment", unit="scan", disable=not left)

    def done(name, record):
        records[name] = record
        derivatives.append_rows(cfg.out, record, columns)
        progress.update()

    def fail(name, error):
        failed[name] = error
        progress.update()

    writers = scoring.Scorers(cfg.workers, done, cannot_write)
    readings = read_ahead(left, task, cfg.workers, fail)
    with progress, contextlib.closing(readings):
        for scan, reading in readings:
            # A signal is heeded between two scans.
            if stop.is_set():
                break
            try:
                result = segment(members, reading, task, device, cfg.mirror, cfg.probabilities,
                                 overlap=cfg.overlap, gaussian=cfg.gaussian, batch=cfg.batch)
            except (RuntimeError, MemoryError) as error:
                # A scan that is too large must not keep the others from their turn.
                if not config.ran_out_of_memory(error):
                    raise
                fail(scan.name, f"{scan.paths[0]}: out of memory; a smaller --batch may help")
                continue
            writers.begin(scan.name, write, cfg.out, scan, task, made_by, reading, result)
        writers.wait()
    return stop.is_set()


def report(out, left, records, failed, stopped):
    """Print how a call ended -> its exit code."""
    done = sum(scan.name in records for scan in left)
    if not left and not failed:
        print(f"nothing is left to segment; {out}/volumes.csv has {len(records)} scans")
        return 0
    print(f"segmented {done} of {len(left)} scans; {out}/volumes.csv has {len(records)}")
    for name, error in failed.items():
        print(f"not segmented: {name}: {' '.join(error.split())}", file=sys.stderr)
    if stopped:
        print("stopped by a signal; the same command goes on")
    return 1 if failed else 0
