"""Raw NIfTI scans -> prepared folder (paper, section 2): RAS, clipped, in [0, 1], cropped to the head, 1 mm.

    python prepare_data.py --source brats21 --input /raw/BraTS2021 --out datasets/brains45k --workers 8
    python prepare_data.py --source manifest --input scans.csv --out datasets/mine --dry-run
    python prepare_data.py --out datasets/brains45k --table

Order as in the official code: crop, normalise, resample (the paper's text: resample, clip, normalise, crop).
"""

import contextlib
import csv
import ctypes
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import yaml
from tqdm import tqdm

import checkpoint
import config
import data
import metrics
import preprocess
import sources
from config import UserError
from sources import note, readable, say


@dataclasses.dataclass(frozen=True)
class Config:
    source: str | None = None  # a name in configs/sources, a .yaml of your own, or manifest
    input: str | None = None  # folder with the raw scans, or the manifest's csv file
    out: str = "datasets/brains45k"  # prepared folder; several sources may share one
    name: str | None = None  # what the index calls it, for several inputs of one source; default: the source
    workers: int = 2  # processes, at least one, one session at a time each
    shard: str = "0/1"  # i/n: prepare every n-th session, from the i-th; shards of one folder may run at once
    dry_run: bool = False  # list what would be taken and what skipped, and why; write nothing
    table: bool = False  # print Table 1 of a prepared folder, beside the paper's numbers


# ---------------------------------------------------------------------------------- prepared folder
def stem_of(source, scan):
    """Name of a prepared volume without folder and ending; the hash tells apart what shares the
    rest."""
    parts = [re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in (scan.subject, scan.session, scan.sequence)]
    digest = hashlib.sha256(scan.path.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{source}/{'_'.join([*parts, digest[:8]])}"


def prepare_session(source, name, root, out, scans):
    """Prepare the volumes of one session; those that share a label share the union of their boxes.

    -> ([(index row, findings)], [(path, reason, damage)]). The geometry is written last: where it
    exists, all the rest does. Whatever one scan raises, the others go on. Memory: up to 7 times the
    larger of the float32 volume on its own and on the 1 mm grid."""
    torch.set_num_threads(1)
    scans = settle_labels(root, scans)
    before = [already_prepared(root, f"{out}/geometry/{stem_of(name, scan)}.json", scan) for scan in scans]

    # A box that is shared is found again if one of its scans is new, or was left behind by a kill.
    boxes = {}
    for label in {scan.label for scan in scans if scan.label}:
        sharing = [(s, g) for s, g in zip(scans, before, strict=True) if s.label == label]
        known = {json.dumps(geometry and geometry["box"]) for _, geometry in sharing}
        if "null" in known or len(known) > 1:
            boxes[label] = shared_box(root, [scan for scan, _ in sharing])

    done, rejected, labels = [], [], {}
    rule = source != "manifest" and sources.read_layout(source).no_negatives
    for scan, geometry in zip(scans, before, strict=True):
        path = os.path.join(root, scan.path)
        try:
            with preprocess.naming(path):
                if scan.fault:
                    raise preprocess.Rejected(scan.fault)

                # A mended scan may change its neighbours' box.
                box = boxes.get(scan.label)
                if not geometry or box and box != tuple(map(tuple, geometry["box"])):
                    if scan.label and scan.label not in labels:
                        labels[scan.label] = read_label(root, scan.label)
                    label = labels.get(scan.label)
                    image = preprocess.load_scan(path, scan.channel)
                    geometry = prepare_volume(root, out, name, scan, image, box, rule, label)

                done.append((geometry["row"], findings_of(scan, geometry["record"])))
        except preprocess.Rejected as error:
            reason = error.reason if error.path == path else f"{scan.label}: {error.reason}"
            rejected.append((scan.path, reason, error.damage))
    return done, rejected


def settle_labels(root, scans):
    """A session's label map belongs to the volumes on its grid (DWI and ADC of ISLES22, not its
    FLAIR); to all if it is on none's, so that they are rejected by name. Two scans of one sequence
    cannot share it."""
    scans = list(scans)
    for label in sorted({scan.label for scan in scans if scan.label}):
        sharing = [scan for scan in scans if scan.label == label]
        if len(sharing) < 2:
            continue

        on_grid = [scan for scan in sharing if is_on_grid(root, scan)]
        for number, scan in enumerate(scans):
            rivals = [other.path for other in on_grid if other.sequence == scan.sequence]
            if scan in on_grid and len(rivals) > 1:
                fault = f"{label} is the label map of several {scan.sequence}: {', '.join(rivals)}"
                scans[number] = scan._replace(fault=fault)
            elif scan in sharing and on_grid and scan not in on_grid:
                scans[number] = scan._replace(label="", elsewhere=label)
    return scans


def is_on_grid(root, scan):
    """Does a scan lie on the grid of its label map? No, if one of the two cannot be read."""
    paths = [os.path.join(root, path) for path in (scan.path, scan.label)]
    try:
        with preprocess.naming(paths[0]):
            image = preprocess.read_header(paths[0], scan.channel)
            label = preprocess.read_header(paths[1])
            return preprocess.same_grid(label.shape, label.affine, image.shape, image.affine)
    except preprocess.Rejected:
        return False


def shared_box(root, scans):
    """Union of the tight boxes of a session's volumes on one grid, those that can be read; None if
    none can."""
    boxes = []
    for scan in scans:
        path = os.path.join(root, scan.path)
        try:
            with preprocess.naming(path):
                voxels, _ = preprocess.read_voxels(preprocess.load_scan(path, scan.channel))
                boxes.append(preprocess.tight_box(voxels))
        except preprocess.Rejected:
            continue  # it is rejected by name when its turn comes
    return preprocess.union_box(boxes) if boxes else None


class Label(NamedTuple):
    """A label map that was read."""
    values: np.ndarray  # uint8 (D, H, W), as stored
    affine: np.ndarray
    nan: int  # voxels that were NaN
    file: dict  # path, size, time and checksum
    notes: list[str]


def read_label(root, path):
    """A label map whose values are known -> Label. Raises Rejected."""
    image = preprocess.load_scan(os.path.join(root, path))
    values, nan = preprocess.label_map(image)
    return Label(values, image.affine, nan, file_of(path, image), image.extra["notes"])


def prepare_volume(root, out, name, scan, image, box, rule, label=None):
    """Write volume, label (also as it is, for scores on the scan's own grid) and geometry of one
    scan; -> its geometry, with its row of the index and the record of what was read."""
    stem = stem_of(name, scan)
    volume, geometry = preprocess.preprocess(image, box)
    if rule and geometry["clamped"]:
        raise preprocess.Rejected(f"{geometry['clamped']} negative voxels, by the official code's rule for "
                                  "this source", damage=False)

    # What was prepared of older files does not count from here on.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{out}/geometry/{stem}.json")

    record = {"scan": file_of(scan.path, image), "label": None, "elsewhere": scan.elsewhere,
              "clamped": geometry["clamped"], "nan": geometry["nan"], "notes": image.extra["notes"]}
    if label:
        if not preprocess.same_grid(label.values.shape, label.affine, geometry["shape"], geometry["affine"]):
            path = os.path.join(root, scan.label)
            raise preprocess.Rejected("label grid differs from image grid", path=path)
        prepared = preprocess.fit_label(label.values, label.affine, geometry)
        place = f"{out}/labels/{stem}.npy"
        checkpoint.save_array(place, prepared)
        with checkpoint.atomic(data.native_of(place)) as temporary:
            nib.Nifti1Image(label.values, label.affine).to_filename(temporary)
        record["label"] = label.file | label_record(label, prepared, geometry)

    row = index_row(name, scan, stem, volume, geometry, record)
    checkpoint.save_array(f"{out}/volumes/{stem}.npy", volume.astype(np.float16))
    geometry |= {"row": row, "record": record}
    write_geometry(f"{out}/geometry/{stem}.json", geometry)
    return geometry


def label_record(label, prepared, geometry):
    """What became of a label map: {value: [voxels native, voxels prepared]}, and the voxels that
    the box cut off."""
    native, after = count_values(label.values), count_values(prepared)
    inside = int(np.count_nonzero(preprocess.crop_label(label.values, label.affine, geometry)))
    outside = sum(native.values()) - native.get(0, 0) - inside
    values = {str(value): [native[value], after.get(value, 0)] for value in sorted(native)}
    return {"values": values, "outside": outside, "nan": label.nan, "notes": label.notes}


def count_values(values):
    """{value: number of voxels} of a uint8 array that is 0 nearly everywhere."""
    values = values.ravel(order="K")
    counts = np.bincount(values[values > 0])
    found = {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    background = values.size - sum(found.values())
    return found | {0: background} if background else found


def index_row(name, scan, stem, volume, geometry, record):
    """{column of the index: text} of one volume."""
    label = record["label"] or {"sha256": "", "values": {}}
    values = " ".join(f"{value}:{native}/{prepared}"
                      for value, (native, prepared) in label["values"].items())
    return {"path": f"volumes/{stem}.npy", "source": name, "subject": scan.subject,
            "session": scan.session, "sequence": scan.sequence, "split": scan.split,
            "label": f"labels/{stem}.npy" if scan.label else "",
            "shape": "x".join(map(str, volume.shape)),
            "spacing": "x".join(f"{s:g}" for s in geometry["spacing"]),
            "sha256": record["scan"]["sha256"], "label_sha256": label["sha256"], "label_values": values}


def write_geometry(path, geometry):
    with checkpoint.atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(geometry, file)


# --------------------------------------------------------------------------- the record, the report
def both_of(path):
    """A file; of a pair of .hdr and .img, both."""
    swap = {"hdr": "img", "img": "hdr"}
    other = re.sub(r"(?<=\.)(hdr|img)(?=(\.gz)?$)", lambda name: swap[name[0]], path)
    return [path] if other == path or not os.path.exists(other) else [path, other]


def checksum(path):
    """sha256 of a file; of a pair of .hdr and .img, of both."""
    digest = hashlib.sha256()
    for name in both_of(path):
        with open(name, "rb") as file:
            while block := file.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest()


def file_of(path, image):
    """What is recorded of the file at `path` below the input, which `image` was read from."""
    known = image.extra
    return {"path": path, "size": known["size"], "mtime": known["mtime"],
            "sha256": known["sha256"] or checksum(known["path"])}


def already_prepared(root, place, scan):
    """The geometry of a scan that was prepared from the files as they are now; None otherwise, and
    in an old folder, where nothing is recorded."""
    try:
        with open(place, encoding="utf-8") as file:
            geometry = json.load(file)
        record, row = geometry["record"], geometry["row"]
        if bool(record["label"]) != bool(scan.label) or not are_whole(place, row):
            return None

        now = {"scan": seen_again(root, scan.path, record["scan"])}
        if scan.label:
            now["label"] = record["label"] | seen_again(root, scan.label, record["label"])
            if now["label"]["sha256"] != record["label"]["sha256"]:
                return None
        if now["scan"]["sha256"] != record["scan"]["sha256"]:
            return None
    except (OSError, ValueError, LookupError, TypeError):  # not yet, not whole, or of old code
        return None

    # Files may be touched, and identities be written otherwise: the arrays stay.
    who = {"subject": scan.subject, "session": scan.session, "sequence": scan.sequence,
           "split": scan.split}
    renewed = geometry | {"record": record | now | {"elsewhere": scan.elsewhere}, "row": row | who}
    if renewed != geometry:
        write_geometry(place, renewed)
    return renewed


def are_whole(place, row):
    """Are the arrays there that the geometry at `place` belongs to? Not where somebody deleted them."""
    out = place.rpartition("/geometry/")[0]
    names = [row["path"]]
    if row["label"]:
        names += [row["label"], data.native_of(row["label"])]
    return all(os.stat(os.path.join(out, name)).st_size for name in names)


def seen_again(root, path, before):
    """What is known of a file now, against what was recorded. Its checksum is taken only if path,
    size or time have changed; a pair's always, since it has two times. A file that was moved away
    is as it was."""
    place = os.path.join(root, path)
    if path == before["path"] and not os.path.exists(place):
        return {key: before[key] for key in ("path", "size", "mtime", "sha256")}

    state = os.stat(place)
    now = {"path": path, "size": state.st_size, "mtime": state.st_mtime_ns,
           "sha256": before["sha256"]}
    if now != {key: before[key] for key in now} or len(both_of(place)) > 1:
        now["sha256"] = checksum(place)
    return now


# What is said at the end of a preparation, worst first.
FINDINGS = {
    "lost": "label maps that lost a class at 1 mm",
    "outside": "label maps with voxels outside the box of the head, which are cut off",
    "twins": "files that stand under two subjects",
    "label twins": "label maps, not empty, that stand under two subjects",
    "elsewhere": "scans without a label, since their session's is on another grid",
    "orphan": "label maps that fit no scan",
    "unused": "label maps left aside, since another one fits better",
    "like label": f"files skipped though they hold lesion, seg or mask (known endings in BIDS: "
                  f"{', '.join(f'_{name}' for name in sources.LABEL_NAMES)}, _lesion-*)",
    "nan": "scans with NaN, set to 0",
    "label nan": "label maps with NaN, set to 0",
    "clamped": "scans with negative values, set to 0",
}


def findings_of(scan, record):
    """What a careful colleague would say of one volume, from its record: {kind: {path: number of
    voxels}}."""
    found, label = {}, record["label"]
    place = scan.path if scan.channel is None else f"{scan.path}, channel {scan.channel}"
    if record["nan"]:
        note(found, "nan", place, record["nan"])
    if record["clamped"]:
        note(found, "clamped", place, record["clamped"])
    if record["elsewhere"]:
        note(found, "elsewhere", place)
    for text in record["notes"]:
        note(found, text, scan.path)

    if label:
        if any(native and not prepared for native, prepared in label["values"].values()):
            note(found, "lost", scan.label)
        if label["outside"]:
            note(found, "outside", scan.label, label["outside"])
        if label["nan"]:
            note(found, "label nan", scan.label, label["nan"])
        for text in label["notes"]:
            note(found, text, scan.label)
    return found


def find_twins(volumes, source):
    """The same file, or the same label map that is not empty, under two subjects: it may stand on
    both sides of a split. Among all volumes of a folder, those that `source` has a part in ->
    findings."""
    owners = {}
    for volume in volumes:
        files = [("twins", volume.sha256)]
        # An empty label map has one value, 0.
        if volume.label_values.partition(":")[0] != "0" or " " in volume.label_values:
            files.append(("label twins", volume.label_sha256))
        for file in files:
            owners.setdefault(file, {})[volume.source, volume.subject] = volume

    findings = {}
    for (kind, digest), found in owners.items():
        if digest and len(found) > 1 and source in {origin for origin, _ in found}:
            (_, one), (_, other), *_ = sorted(found)
            note(findings, kind, f"{one} and {other} ({min(found.values()).sequence})")
    return findings


def print_findings(findings):
    """One line a kind, worst first: how many files, the first of them, how many voxels in all."""
    order = [*FINDINGS, *sorted(findings.keys() - FINDINGS.keys())]
    for kind in order:
        if paths := findings.get(kind):
            voxels = sum(paths.values())
            say(f"  {FINDINGS.get(kind, kind)}: {len(paths)}, first {min(paths)}"
                + (f"; {voxels:,} voxels in all" if voxels else ""))


def end_with_parent():
    """On Linux: a worker ends when its parent is killed, so that none goes on writing beside the
    next run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_all(work, jobs, workers):
    """work(job) of every job on `workers` processes, as they are done; no more than two a worker
    wait."""
    if workers == 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        waiting = set()
        for job in jobs:
            if len(waiting) == 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            waiting.add(pool.submit(work, job))
        yield from (future.result() for future in as_completed(waiting))


def estimate(scans, root, out, workers):
    """Before it starts: disk and time from five volumes spread over the list, prepared and thrown
    away."""
    began, voxels, sample = time.perf_counter(), [], scans[::max(1, len(scans) // 5)][:5]
    for scan in sample:
        path = os.path.join(root, scan.path)
        try:
            with preprocess.naming(path):
                voxels.append(preprocess.preprocess(preprocess.load_scan(path, scan.channel))[0].size)
        except preprocess.Rejected:
            continue
    if voxels:
        hours = (time.perf_counter() - began) / len(sample) * len(scans) / workers / 3600
        need, folder = np.mean(voxels) * len(scans) * (3 if scans[0].label else 2) / 1e9, os.path.abspath(out)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        say(f"estimate from {len(voxels)} of {len(scans)} volumes: {need:.2f} GB ({out} has "
            f"{shutil.disk_usage(folder).free / 1e9:.0f} free), {hours:.2f} hours with {workers} "
            "workers")


# Table 1 of the paper: subjects, sessions, volumes, sequences.
TABLE_1 = {"adni": (1563, 8019, 9548, "T1, Flair, T2*"),
           "oasis3": (1376, 2839, 15872, "T1, T2, Flair, TOF, DWI, T2*, SWI"),
           "oasis4": (661, 674, 4021, "T1, T2, Flair, T2*, SWI"),
           "ppmi": (2011, 2979, 9554, "T1, T2, Flair, DWI, T2*"),
           "brats21": (938, 938, 3752, "T1, T2, Flair, T1ce"),
           "isles22": (250, 250, 750, "DWI, Flair, ADC"),
           "wmh": (60, 60, 120, "T1, Flair"),
           "msseg1": (15, 15, 75, "T1, T2, Flair, T1ce"),  # 75 is five sequences: PD is not listed
           "msd": (266, 266, 1064, "T1, T2, Flair, T1ce")}


def table_1(folder):
    """Markdown: what is in a prepared folder for pretraining, and the paper's numbers in
    brackets."""
    taken = [v for v in data.read_index(folder) if v.split != "test"]
    rows, totals, paper = [], np.zeros(3, int), np.sum([row[:3] for row in TABLE_1.values()], 0)
    for source in [*TABLE_1, *sorted({v.source for v in taken} - set(TABLE_1))]:
        found = [v for v in taken if v.source == source]
        counts = [len({v.subject for v in found}), len({(v.subject, v.session) for v in found}), len(found)]
        totals += counts
        cells = [f"{count:,}" + (f" ({known:,})" if source in TABLE_1 else "")
                 for count, known in zip(counts, TABLE_1.get(source, (0, 0, 0))[:3], strict=True)]
        kinds = Counter(v.sequence for v in found).most_common()
        kinds = ", ".join(f"{name} {count:,}" for name, count in kinds)
        rows.append([source, *cells, kinds, TABLE_1.get(source, ("",))[-1]])
    cells = [f"{count:,} ({known:,})" for count, known in zip(totals, paper, strict=True)]
    header = ["source", "subjects", "sessions", "volumes", "sequences", "in the paper"]
    return "\n".join(metrics.table(header, [*rows, ["total", *cells, "", ""]]))


def check_settings(cfg):
    """Raises UserError for what no preparation can start with."""
    if not cfg.source or not cfg.input:
        raise UserError(f"source {cfg.source!r}, input {cfg.input!r}: give --input, and choose --source from "
                        f"{', '.join(sources.SOURCES)} and manifest")
    if cfg.source != "manifest":
        sources.read_layout(cfg.source)
    if not cfg.workers:
        raise UserError("workers 0: give 1 or more")
    shard, _, shards = cfg.shard.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise UserError(f"shard {cfg.shard!r}: expected i/n with i from 0 to n - 1, as 3/64")


def main(cfg):
    """Find the scans, prepare those of this shard, write its part of the index, and report."""
    if cfg.table:
        print(table_1(cfg.out))
        return 0
    check_settings(cfg)
    shard, shards = cfg.shard.split("/")

    # Find the scans.
    manifest = cfg.source == "manifest"
    root = os.path.dirname(cfg.input) if manifest else cfg.input
    if manifest:
        sessions, skipped, findings = sources.read_manifest(cfg.input)
    else:
        sessions, skipped, findings = sources.find_scans(cfg.source, root, cfg.dry_run)
    name = os.path.basename(os.path.abspath(root)) if cfg.source == "nnunet" else sources.name_of(cfg.source)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", cfg.name or name)
    if cfg.source == "nnunet":
        channels, task = sources.read_dataset(root)
        sessions = [[scan._replace(sequence=channels.get(scan.sequence, scan.sequence)) for scan in scans]
                    for scans in sessions]

    # Those of this shard.
    found = sum(map(len, sessions)) + skipped.total()
    mine = sessions[int(shard)::int(shards)]
    volumes = [scan for scans in mine for scan in scans]
    if elsewhere := found - skipped.total() - len(volumes):
        skipped["other shards"] = elsewhere
    if cfg.dry_run or len(volumes) > 100:
        estimate(volumes, root, cfg.out, cfg.workers)
    if cfg.dry_run:
        return print_plan(name, found, volumes, skipped, findings)

    # Prepare them.
    register_input(cfg.out, name, readable(os.path.abspath(cfg.input)), cfg.shard)
    if cfg.source == "nnunet":
        path = f"{cfg.out}/{name}.yaml"
        checkpoint.write_text(path, yaml.safe_dump({"data": cfg.out, "source": name} | task, sort_keys=False))
        print(f"to finetune on it: python finetune.py --task {path}")
    work = functools.partial(prepare_session, cfg.source, name, root, cfg.out)
    done, rejected = prepare_all(work, mine, name, cfg)

    # Write the index, then the report, from the records of all, whether prepared now or before.
    part = f"{name}-{shard}of{shards}.csv"
    write_part(cfg.out, part, done, rejected)
    forget_other_shards(cfg.out, name, shards)
    for _, more in done:
        for kind, paths in more.items():
            findings.setdefault(kind, {}).update(paths)
    findings |= find_twins(data.read_index(cfg.out), name)
    return print_report(name, found, len(done), skipped, rejected, findings)


def prepare_all(work, sessions, name, cfg):
    """work(scans) of every session, in several processes -> (all that is done, all that is
    rejected)."""
    done, rejected = [], []
    total = sum(map(len, sessions))
    try:
        bar = tqdm(total=total, desc=f"prepare {name}", unit="volume")
        with checkpoint.writing(cfg.out), bar as progress:
            for ready, refused in run_all(work, sessions, cfg.workers):
                done += ready
                rejected += refused
                progress.update(len(ready) + len(refused))
    except BrokenProcessPool:
        raise UserError("a worker was killed, most likely for want of memory: fewer --workers; the same "
                        "command goes on where it stopped") from None
    return done, rejected


def write_part(out, part, done, rejected):
    """One part of the index, and of the list of the rejected."""
    rows = sorted((row for row, _ in done), key=lambda row: row["path"])
    columns = data.Volume._fields
    cells = [[row[column] for column in columns] for row in rows]
    write_table(f"{out}/index/{part}", columns, cells)
    reasons = sorted((readable(path), readable(reason)) for path, reason, _ in rejected)
    write_table(f"{out}/rejected/{part}", ("path", "reason"), reasons)


def print_plan(name, found, volumes, skipped, findings):
    """What --dry-run says -> exit code."""
    for scan in volumes:
        end = f", label {scan.label}" if scan.label else f": {scan.fault}" if scan.fault else ""
        say(f"take {scan.path}: {scan.subject}, {scan.session}, {scan.sequence}, {scan.split}{end}")
    say(f"{name}: {found} found = {len(volumes)} to prepare + {count_by_reason(skipped)}")
    print_findings(findings)
    return 0 if volumes or skipped["other shards"] else nothing_of(found, skipped)


def print_report(name, found, prepared, skipped, rejected, findings):
    """Counts, then one line for each thing a careful colleague would say -> exit code: 1 if a scan
    is damaged, or if nothing was prepared."""
    for path, reason, _ in sorted(rejected):
        say(f"rejected {path}: {reason}")
    say(f"{name}: {found} found = {prepared} prepared + {count_by_reason(skipped)} + "
        f"{len(rejected)} rejected")
    print_findings(findings)
    if not prepared and not skipped["other shards"]:
        return nothing_of(found, skipped)
    return int(any(damage for *_, damage in rejected))


def nothing_of(found, skipped):
    """One line where nothing came of all files -> exit code 1."""
    hint = "see the reasons above"
    if skipped.total() == found:
        hint = "no name is as --source expects it: --dry-run says of each file why"
    print(f"error: nothing prepared of {found} found: {hint}", file=sys.stderr)
    return 1


def register_input(out, name, folder, shard):
    """One input a name: of two BIDS folders with a sub-01 each, the second would be taken for the
    first. Shards may claim it at once."""
    path = f"{out}/index/{name}.txt"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = file.read()
        if before != folder:
            raise UserError(f"{out} holds {name} of {before}: give this one another --name. If it takes that "
                            f"one's place, or that one was only moved, delete {path}")
        return
    owner = shard.replace("/", "of")  # what this shard left when it was killed is overwritten
    with checkpoint.atomic(path, owner) as temporary, open(temporary, "w", **checkpoint.TEXT) as file:
        file.write(folder)


def forget_other_shards(out, name, shards):
    """Remove the tables of runs in another number of shards: they hold the splits of then."""
    for path in glob.glob(f"{glob.escape(out)}/*/{glob.escape(name)}-*of*.csv"):
        count = re.fullmatch(rf"{re.escape(name)}-\d+of(\d+)\.csv", os.path.basename(path))
        if count and count[1] != shards:
            with contextlib.suppress(FileNotFoundError):  # another shard was quicker
                os.unlink(path)


def count_by_reason(skipped):
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    return f"{skipped.total()} skipped by rule" + (f" ({reasons})" if reasons else "")


def write_table(path, columns, rows):
    with checkpoint.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    # A name may be in letters that the terminal does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    config.run(main, Config)
