"""Raw scans -> prepared folder: volumes of section 2, labels, geometries, and an index of them.

    python prepare_data.py --source brats21 --input /raw/BraTS2021 --check
    python prepare_data.py --source brats21 --input /raw/BraTS2021 --out datasets/brains45k
    python prepare_data.py --source manifest --input scans.csv --out datasets/mine --dry-run
    python prepare_data.py --out datasets/brains45k --table
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import yaml
from tqdm import tqdm

import check_raw
import checkpoint
import config
import data
import manifest
import preprocess
import records
import scans
import sheet
import sources
from config import UserError
from sources import readable, say


@dataclasses.dataclass(frozen=True)
class Config:
    source: str | None = None  # a name in configs/sources, a .yaml of your own, or manifest
    input: str | None = None  # folder with the raw scans, or the manifest's csv file
    out: str = "datasets/brains45k"  # prepared folder; several sources may share one
    name: str | None = None  # what the index calls this input; default: the source
    workers: int = 2  # number of worker processes
    shard: str = "0/1"  # i/n: every n-th session from the i-th; shards may run at once
    dry_run: bool = False  # list what would be taken and what skipped, and why; write nothing
    check: bool = False  # tabulate what would come of it, from headers and label values alone
    sheet: str | None = None  # a .png: with --check, a picture of the scans with their labels
    table: bool = False  # print Table 1 of a prepared folder, beside the paper's numbers


# ------------------------------------------------------------------------------------- one session
def stem_of(name, scan):
    """Name of a prepared volume without folder and ending: of its scan's identity and a hash.

    The hash of the path tells apart what shares the rest. A sequence is called as in the manifest,
    so that what was prepared under another word is found again."""
    identity = (scan.subject, scan.session, scan.word or scan.sequence)
    parts = [re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in identity]
    digest = hashlib.sha256(scan.path.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name}/{'_'.join([*parts, digest[:8]])}"


def prepare_session(source, name, root, out, session):
    """Prepare the volumes of one session -> ([(index row, findings)], [(path, reason, damage)]).

    Whatever one scan raises, the others go on. Memory: up to 7 times the larger of the float32
    volume on its own and on the 1 mm grid."""
    torch.set_num_threads(1)
    session = sources.settle_labels(root, session)

    # What an earlier run has prepared is not touched, unless its box has to change.
    before = [records.already_prepared(root, out, stem_of(name, scan), scan) for scan in session]
    boxes = shared_boxes(root, session, before)

    done, rejected = [], []
    labels = {}  # those read so far: several scans may share one
    rule = source != "manifest" and sources.read_layout(source).no_negatives
    for scan, geometry in zip(session, before, strict=True):
        path = os.path.join(root, scan.path)
        try:
            with scans.naming(path):
                if scan.fault:
                    raise scans.Rejected(scan.fault)

                # A scan that was mended may have changed its neighbours' box.
                box = boxes.get(scan.label)
                if geometry is None or box not in (None, box_of(geometry)):
                    if scan.label and scan.label not in labels:
                        labels[scan.label] = read_label(root, scan.label)
                    label = labels.get(scan.label)
                    image = scans.load_scan(path, scan.channel)
                    geometry = prepare_volume(root, out, name, scan, image, box, rule, label)

                # Of what was prepared before, the same is said again.
                findings = records.findings_of(scan, geometry["record"])
                done.append((geometry["row"], findings))
        except scans.Rejected as error:
            reason = error.reason if error.path == path else f"{scan.label}: {error.reason}"
            rejected.append((scan.path, reason, error.damage))
    return done, rejected


def shared_boxes(root, session, before):
    """{label map: the box that its volumes share}, of those label maps whose box is to be found.

    That is so if one of the volumes is new, or if a kill left them with different boxes. before:
    the geometry of each scan, or None."""
    boxes = {}
    for label in {scan.label for scan in session if scan.label}:
        sharing, known = [], set()
        for scan, geometry in zip(session, before, strict=True):
            if scan.label == label:
                sharing.append(scan)
                known.add(box_of(geometry) if geometry else None)

        if None in known or len(known) > 1:
            boxes[label] = find_shared_box(root, sharing)
    return boxes


def box_of(geometry):
    """The crop box of a geometry, in the form that preprocess.union_box gives."""
    return tuple(map(tuple, geometry["box"]))


def find_shared_box(root, sharing):
    """The union of the tight boxes of several scans on one grid; None if none can be read."""
    boxes = []
    for scan in sharing:
        path = os.path.join(root, scan.path)
        try:
            with scans.naming(path):
                voxels, _, _ = preprocess.read_voxels(scans.load_scan(path, scan.channel))
                boxes.append(preprocess.tight_box(voxels))
        except scans.Rejected:
            continue  # it is rejected by name when its turn comes
    return preprocess.union_box(boxes) if boxes else None


# ------------------------------------------------------------------------------------- one volume
class Label(NamedTuple):
    """A label map that was read."""
    values: np.ndarray  # uint8 (D, H, W), as stored
    affine: np.ndarray
    nan: int  # voxels that were NaN
    file: dict  # path, size, time and checksum
    notes: list[str]  # on what was mended in its header


def read_label(root, path):
    """Read the label map at a path below the input -> Label. Raises Rejected."""
    image = scans.load_scan(os.path.join(root, path))
    values, nan = scans.label_map(image)
    return Label(values, image.affine, nan, records.file_of(path, image), image.extra["notes"])


def prepare_volume(root, out, name, scan, image, box, rule, label=None):
    """Write volume, label and geometry of one scan -> its geometry, with its row and its record.

    rule: a scan with negative values is rejected. The geometry is written last: where it exists,
    all the rest does."""
    volume, geometry = preprocess.preprocess(image, box)
    if rule and geometry["clamped"]:
        raise scans.Rejected(f"{geometry['clamped']} negative voxels, by the official code's rule "
                             "for this source", damage=False)

    # What was prepared of older files does not count from here on.
    stem = stem_of(name, scan)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{out}/geometry/{stem}.json")

    # Write down what was read, and what became of it.
    record = {"scan": records.file_of(scan.path, image), "label": None,
              "elsewhere": scan.elsewhere, "clamped": geometry["clamped"], "nan": geometry["nan"],
              "notes": image.extra["notes"]}
    if label:
        if not scans.same_grid(label.values.shape, label.affine, geometry["shape"],
                               geometry["affine"]):
            path = os.path.join(root, scan.label)
            raise scans.Rejected("label grid differs from image grid", path=path)
        record["label"] = write_label(f"{out}/labels/{stem}.npy", label, geometry)
    row = records.index_row(name, scan, stem, volume, geometry, record)

    # float16 takes half the disk, and is off by less than 5e-4.
    checkpoint.save_array(f"{out}/volumes/{stem}.npy", volume.astype(np.float16))
    geometry |= {"row": row, "record": record}
    records.write_geometry(f"{out}/geometry/{stem}.json", geometry)
    return geometry


def write_label(path, label, geometry):
    """Write a label map on the grid of its prepared volume, and as it is -> its record.

    As it is, it serves for scores on the scan's own grid."""
    prepared = preprocess.fit_label(label.values, label.affine, geometry)
    checkpoint.save_array(path, prepared)
    with checkpoint.atomic(data.native_of(path)) as temporary:
        nib.Nifti1Image(label.values, label.affine).to_filename(temporary)
    return label.file | records.label_record(label, prepared, geometry)


# ------------------------------------------------------------------------------------ all sessions
def work_on_all(work, sessions, title, out, workers):
    """work(session) of every session, in processes -> (all that is done, all that is rejected)."""
    done, rejected = [], []
    total = sum(map(len, sessions))
    try:
        bar = tqdm(total=total, desc=title, unit="volume")
        with checkpoint.writing(out), bar as progress:
            for ready, refused in run_all(work, sessions, workers):
                done += ready
                rejected += refused
                progress.update(len(ready) + len(refused))
    except BrokenProcessPool:
        raise UserError("a worker was killed, most likely for want of memory: fewer --workers; the "
                        "same command goes on where it stopped") from None
    return done, rejected


def run_all(work, jobs, workers):
    """Yield work(job) of every job on `workers` processes, in the order in which they are done."""
    if workers == 1:
        yield from map(work, jobs)
        return

    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        waiting = set()
        for job in jobs:
            # No more than two jobs a worker wait: 45,000 would fill the memory.
            if len(waiting) == 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            waiting.add(pool.submit(work, job))
        yield from (future.result() for future in as_completed(waiting))


def end_with_parent():
    """End this worker when its parent is killed, on Linux: else it writes beside the next run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def estimate(volumes, root, out, workers):
    """Say how much disk and time it will take, from five volumes prepared for nothing else."""
    sample = volumes[::max(1, len(volumes) // 5)][:5]
    voxels = []
    began = time.perf_counter()
    for scan in sample:
        path = os.path.join(root, scan.path)
        try:
            with scans.naming(path):
                volume, _ = preprocess.preprocess(scans.load_scan(path, scan.channel))
                voxels.append(volume.size)
        except scans.Rejected:
            continue  # it is rejected by name when its turn comes
    if not voxels:
        return

    # The sample is prepared by one worker, the volumes by all.
    seconds = (time.perf_counter() - began) / len(sample) * len(volumes) / workers
    bytes_per_voxel = 3 if volumes[0].label else 2  # float16, and uint8 for the label
    size = np.mean(voxels) * len(volumes) * bytes_per_voxel

    # The folder need not exist yet: what is free is asked of the nearest one that does.
    folder = os.path.abspath(out)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    say(f"estimate from {len(voxels)} of {len(volumes)} volumes: {size / 1e9:.2f} GB ({out} has "
        f"{free / 1e9:.0f} free), {seconds / 3600:.2f} hours with {workers} workers")


# ----------------------------------------------------------------------------------- a whole input
def check_settings(source, folder, workers, shard):
    """Raise UserError for what no preparation can start with."""
    if not source or not folder:
        raise UserError(f"source {source!r}, input {folder!r}: give --input, and choose "
                        f"--source from {', '.join(sources.SOURCES)} and manifest")
    if source != "manifest":
        sources.read_layout(source)
    if not workers:
        raise UserError("workers 0: give 1 or more")
    number, _, count = shard.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"shard {shard!r}: expected i/n with i from 0 to n - 1, as 3/64")


def input_name(name, source, root):
    """What the index calls this input: --name, or the source; of nnU-Net the dataset's folder."""
    if source == "nnunet":
        name = name or os.path.basename(os.path.abspath(root))
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name or sources.name_of(source))


def name_channels(session, channels):
    """Give the scans of an nnU-Net session the sequence that their channel's number stands for."""
    return [scan._replace(sequence=channels.get(scan.sequence, scan.sequence)) for scan in session]


def write_task(out, name, task):
    """Write the task of an nnU-Net dataset, and say how to finetune on it."""
    path = f"{out}/{name}.yaml"
    settings = {"data": out, "source": name} | task
    checkpoint.write_text(path, yaml.safe_dump(settings, sort_keys=False))
    print(f"to finetune on it: python finetune.py --task {path}")


def find_input(source, path, dry_run):
    """Find the scans of an input -> (folder that paths start from, sessions, {reason: paths that
    are skipped}, findings, settings of a task or None)."""
    # Paths in a manifest start from its folder.
    if source == "manifest":
        return os.path.dirname(path), *manifest.read_manifest(path), None

    # Only nnU-Net's own description says what its channels are, and what the labels mean.
    sessions, skipped, findings = sources.find_scans(source, path, dry_run)
    task = None
    if source == "nnunet":
        channels, task = sources.read_dataset(path)
        sessions = [name_channels(session, channels) for session in sessions]
    return path, sessions, skipped, findings, task


def write_sheet(path, root, volumes, workers):
    """Draw some of the scans at `path`, and say how many."""
    chosen = sheet.choose(volumes)
    if not chosen:
        say(f"no scan to draw in {path}")
        return
    drawn = list(run_all(functools.partial(sheet.draw_scan, root), chosen, workers))
    sheet.write(path, sorted(drawn, key=lambda pair: pair[1]))
    say(f"{path} shows {len(chosen)} of {len(volumes)} scans")


def main(cfg):
    """Find the scans, prepare those of this shard, write its part of the index, and report."""
    if cfg.table:
        print(records.table_1(cfg.out))
        return 0
    check_settings(cfg.source, cfg.input, cfg.workers, cfg.shard)
    if cfg.sheet:
        sheet.check_path(cfg.sheet, cfg.check)
    root, sessions, aside, findings, task = find_input(cfg.source, cfg.input, cfg.dry_run)
    name = input_name(cfg.name, cfg.source, root)

    # Choose those of this shard.
    shard, shards = cfg.shard.split("/")
    mine = sessions[int(shard)::int(shards)]
    volumes = list(chain.from_iterable(mine))
    skipped = Counter({reason: len(paths) for reason, paths in aside.items()})
    elsewhere = sum(map(len, sessions)) - len(volumes)
    if elsewhere:
        skipped["other shards"] = elsewhere
    found = len(volumes) + skipped.total()

    # Look, and write nothing.
    if cfg.check:
        work = functools.partial(check_raw.check_session, root)
        looks, rejected = work_on_all(work, mine, f"check {name}", root, cfg.workers)
        code = check_raw.report(name, found, looks, aside, skipped, rejected, findings,
                                cfg.dry_run)
        if cfg.sheet:
            write_sheet(cfg.sheet, root, [look.scan for look in looks], cfg.workers)
        return code
    if cfg.dry_run or len(volumes) > 100:
        estimate(volumes, root, cfg.out, cfg.workers)
    if cfg.dry_run:
        return records.print_plan(name, found, volumes, skipped, findings)

    # Prepare them, a session at a time in each process.
    records.register_input(cfg.out, name, readable(os.path.abspath(cfg.input)), cfg.shard)
    if task:
        write_task(cfg.out, name, task)
    work = functools.partial(prepare_session, cfg.source, name, root, cfg.out)
    done, rejected = work_on_all(work, mine, f"prepare {name}", cfg.out, cfg.workers)

    # Write this shard's part of the index.
    records.write_part(cfg.out, f"{name}-{shard}of{shards}.csv", done, rejected)
    records.forget_other_shards(cfg.out, name, shards)

    # Report, from the records of all, whether they were prepared now or before.
    records.merge(findings, [found_in_one for _, found_in_one in done])
    findings |= records.find_twins(data.read_index(cfg.out), name)
    return records.print_report(name, found, len(done), skipped, rejected, findings)


if __name__ == "__main__":
    config.run(main, Config)
