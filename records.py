"""What a preparation writes down of its files, and what it reports: records, index, Table 1."""

import contextlib
import csv
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter

import numpy as np

import checkpoint
import data
import metrics
import preprocess
import sources
from config import UserError
from sources import note, readable, say


# ----------------------------------------------------------------------- the record of one volume
def file_of(path, image):
    """What is recorded of the file at `path` below the input, from which `image` was read."""
    known = image.extra
    return {"path": path, "size": known["size"], "mtime": known["mtime"],
            "sha256": known["sha256"] or checksum(known["path"])}


def checksum(path):
    """The sha256 of a file; of a pair of .hdr and .img, of both."""
    digest = hashlib.sha256()
    for name in both_of(path):
        with open(name, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def both_of(path):
    """The files of a scan: its own; of a pair of .hdr and .img, both."""
    swap = {"hdr": "img", "img": "hdr"}
    other = re.sub(r"(?<=\.)(hdr|img)(?=(\.gz)?$)", lambda name: swap[name[0]], path)
    return [path] if other == path or not os.path.exists(other) else [path, other]


def label_record(label, prepared, geometry):
    """What became of a label map: {value: [voxels native, voxels prepared]}, voxels lost, notes."""
    native = count_values(label.values)
    after = count_values(prepared)
    values = {str(value): [native[value], after.get(value, 0)] for value in sorted(native)}

    # What is marked, but does not lie in the box of the head, was cut off.
    marked = sum(native.values()) - native.get(0, 0)
    inside = np.count_nonzero(preprocess.crop_label(label.values, label.affine, geometry))
    return {"values": values, "outside": marked - int(inside), "nan": label.nan,
            "notes": label.notes}


def count_values(values):
    """{value: number of voxels} of a uint8 array."""
    # A label map is 0 nearly everywhere, and counting only the rest is quicker.
    values = values.ravel(order="K")
    counts = np.bincount(values[values > 0])
    found = {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    background = values.size - sum(found.values())
    return found | {0: background} if background else found


def index_row(name, scan, stem, volume, geometry, record):
    """{column of the index: text} of one volume."""
    # Without a label map, its columns are empty.
    label = record["label"] or {"sha256": "", "values": {}}
    values = [f"{value}:{native}/{prepared}"
              for value, (native, prepared) in label["values"].items()]
    return {"path": f"volumes/{stem}.npy", "source": name, "subject": scan.subject,
            "session": scan.session, "sequence": scan.sequence, "split": scan.split,
            "label": f"labels/{stem}.npy" if scan.label else "",
            "shape": "x".join(map(str, volume.shape)),
            "spacing": "x".join(f"{size:g}" for size in geometry["spacing"]),
            "sha256": record["scan"]["sha256"], "label_sha256": label["sha256"],
            "label_values": " ".join(values)}


def write_geometry(path, geometry):
    """Write the geometry of a volume, with its record and its row, whole or not at all."""
    with checkpoint.atomic(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(geometry, file)


def already_prepared(root, out, stem, scan):
    """The geometry of a scan that was prepared from the files as they are now; None otherwise.

    None, too, in a folder of older code, where nothing is recorded."""
    path = f"{out}/geometry/{stem}.json"
    try:
        with open(path, encoding="utf-8") as file:
            geometry = json.load(file)
        record, row = geometry["record"], geometry["row"]
        if bool(record["label"]) != bool(scan.label) or not are_whole(out, row):
            return None

        # Where a checksum has changed, the scan is prepared again.
        now = {"scan": seen_again(root, scan.path, record["scan"])}
        if now["scan"]["sha256"] != record["scan"]["sha256"]:
            return None
        if scan.label:
            now["label"] = record["label"] | seen_again(root, scan.label, record["label"])
            if now["label"]["sha256"] != record["label"]["sha256"]:
                return None
    except (OSError, ValueError, LookupError, TypeError):  # not yet, not whole, or of older code
        return None

    # Files may be touched, and subjects be called otherwise: then the record is written again, and
    # the arrays stay.
    identity = {"subject": scan.subject, "session": scan.session, "sequence": scan.sequence,
                "split": scan.split}
    record = record | now | {"elsewhere": scan.elsewhere}
    renewed = geometry | {"record": record, "row": row | identity}
    if renewed != geometry:
        write_geometry(path, renewed)
    return renewed


def are_whole(out, row):
    """Are the arrays there that a row of the index names? Not if somebody deleted or emptied them.

    Raises OSError for a file that is missing."""
    names = [row["path"]]
    if row["label"]:
        names += [row["label"], data.native_of(row["label"])]
    return all(os.stat(os.path.join(out, name)).st_size for name in names)


def seen_again(root, path, before):
    """What is known of a file now, against what was recorded. Raises OSError if it is not there."""
    # A file that was moved away after it was prepared counts as it was.
    place = os.path.join(root, path)
    if path == before["path"] and not os.path.exists(place):
        return {key: before[key] for key in ("path", "size", "mtime", "sha256")}

    # The checksum is taken only if path, size or time have changed; of a pair always, since it has
    # two times and one record.
    state = os.stat(place)
    now = {"path": path, "size": state.st_size, "mtime": state.st_mtime_ns}
    unchanged = now == {key: before[key] for key in now} and len(both_of(place)) == 1
    return now | {"sha256": before["sha256"] if unchanged else checksum(place)}


# ------------------------------------------------------------------------------------ the findings
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
    """What a careful colleague would say of one volume: {kind: {path: number of voxels}}."""
    found = {}
    place = scan.path if scan.channel is None else f"{scan.path}, channel {scan.channel}"
    if record["nan"]:
        note(found, "nan", place, record["nan"])
    if record["clamped"]:
        note(found, "clamped", place, record["clamped"])
    if record["elsewhere"]:
        note(found, "elsewhere", place)
    for text in record["notes"]:
        note(found, text, scan.path)

    # What became of its label map.
    label = record["label"]
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


def merge(findings, others):
    """Add the findings of several volumes to those of the whole, {kind: {path: voxels}}."""
    for found in others:
        for kind, paths in found.items():
            findings.setdefault(kind, {}).update(paths)


def find_twins(volumes, source):
    """The same file, or the same label map that is not empty, under two subjects -> findings.

    They may stand on both sides of a split. volumes: all of a folder; only twins with a part in
    `source` are named."""
    owners = {}  # (kind, checksum) -> {(source, subject): volume}
    for volume in volumes:
        files = [("twins", volume.sha256)]

        # An empty label map has one value, 0.
        if volume.label_values.partition(":")[0] != "0" or " " in volume.label_values:
            files.append(("label twins", volume.label_sha256))
        for file in files:
            owners.setdefault(file, {})[volume.source, volume.subject] = volume

    # Of several owners, the first two are named. Folders of older code may lack checksums.
    findings = {}
    for (kind, digest), found in owners.items():
        if digest and len(found) > 1 and source in {origin for origin, _ in found}:
            (_, one), (_, other), *_ = sorted(found)
            note(findings, kind, f"{one} and {other} ({min(found.values()).sequence})")
    return findings


def print_findings(findings):
    """One line a kind, worst first: how many files, the first of them, how many voxels in all."""
    # The notes on headers have no word of their own, and come last.
    others = sorted(findings.keys() - FINDINGS.keys())
    for kind in [*FINDINGS, *others]:
        paths = findings.get(kind)
        if paths:
            line = f"  {FINDINGS.get(kind, kind)}: {len(paths)}, first {min(paths)}"

            # A kind that is not about voxels counts none.
            voxels = sum(paths.values())
            if voxels:
                line += f"; {voxels:,} voxels in all"
            say(line)


# -------------------------------------------------------------------------------------- the report
def print_plan(name, found, volumes, skipped, findings):
    """Print what --dry-run says -> exit code."""
    for scan in volumes:
        say(f"take {plan_line(scan)}")
    say(f"{name}: {found} found = {len(volumes)} to prepare + {count_by_reason(skipped)}")
    print_findings(findings)

    if volumes or skipped["other shards"]:
        return 0
    return print_nothing(found, skipped)


def plan_line(scan):
    """What a scan is understood to be."""
    line = f"{scan.path}: {scan.subject}, {scan.session}, {scan.sequence}, {scan.split}"
    if scan.label:
        return f"{line}, label {scan.label}"
    if scan.fault:
        return f"{line}: {scan.fault}"
    return line


def print_report(name, found, prepared, skipped, rejected, findings):
    """Print the counts, then a line for each finding -> exit code.

    The code is 1 if a scan is damaged, or if nothing was prepared."""
    print_rejected(rejected)
    say(f"{name}: {found} found = {prepared} prepared + {count_by_reason(skipped)} + "
        f"{len(rejected)} rejected")
    print_findings(findings)

    if not prepared and not skipped["other shards"]:
        return print_nothing(found, skipped)
    return int(any(damage for _, _, damage in rejected))


def print_rejected(rejected):
    """One line for each scan that is rejected."""
    for path, reason, _ in sorted(rejected):
        say(f"rejected {path}: {reason}")


def print_nothing(found, skipped):
    """Say in one line that nothing came of all files -> exit code 1."""
    hint = "see the reasons above"

    # If every file was skipped by its name, none was even opened.
    if skipped.total() == found:
        hint = "no name is as --source expects it: --dry-run says of each file why"
    print(f"error: nothing prepared of {found} found: {hint}", file=sys.stderr)
    return 1


def count_by_reason(skipped):
    """{reason: number of files} as in "4 skipped by rule (label 4)"."""
    text = f"{skipped.total()} skipped by rule"
    if skipped:
        reasons = [f"{reason} {count}" for reason, count in sorted(skipped.items())]
        text += f" ({', '.join(reasons)})"
    return text


# ------------------------------------------------------------------------- the tables of a folder
def register_input(out, name, folder, shard):
    """Hold one name to one input. UserError if the name is another input's.

    Of two BIDS folders with a sub-01 each, the second would be taken for the first."""
    # The file beside the index says whose name it is.
    path = f"{out}/index/{name}.txt"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = file.read()
        if before != folder:
            raise UserError(f"{out} holds {name} of {before}: give this one another --name. If it "
                            "takes that one's place, or that one was only moved, delete "
                            f"{path}")
        return

    # Shards may write it at once. What this shard left when it was killed is overwritten.
    owner = shard.replace("/", "of")
    with checkpoint.atomic(path, owner) as temporary:
        with open(temporary, "w", **checkpoint.TEXT) as file:
            file.write(folder)


def write_part(out, part, done, rejected):
    """Write one part of the index, and of the list of the rejected."""
    columns = data.Volume._fields
    rows = sorted((row for row, _ in done), key=lambda row: row["path"])
    cells = [[row[column] for column in columns] for row in rows]
    write_table(f"{out}/index/{part}", columns, cells)

    # An index is UTF-8, whatever the names of the files are.
    reasons = sorted((readable(path), readable(reason)) for path, reason, _ in rejected)
    write_table(f"{out}/rejected/{part}", ("path", "reason"), reasons)


def write_table(path, columns, rows):
    """Write a csv file, whole or not at all."""
    with checkpoint.atomic(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def forget_other_shards(out, name, shards):
    """Remove the tables of runs in another number of shards: they hold the splits of then."""
    for path in glob.glob(f"{glob.escape(out)}/*/{glob.escape(name)}-*of*.csv"):
        count = re.fullmatch(rf"{re.escape(name)}-\d+of(\d+)\.csv", os.path.basename(path))
        if count and count[1] != shards:
            with contextlib.suppress(FileNotFoundError):  # another shard was quicker
                os.unlink(path)


# ----------------------------------------------------------------------------------------- Table 1
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
    """Markdown: what a prepared folder holds for pretraining; the paper's numbers in brackets."""
    taken = [volume for volume in data.read_index(folder) if volume.split != "test"]

    # The paper's sources come first, in its order.
    others = sorted({volume.source for volume in taken} - set(TABLE_1))
    rows = []
    totals = np.zeros(3, int)
    for source in [*TABLE_1, *others]:
        found = [volume for volume in taken if volume.source == source]
        subjects = {volume.subject for volume in found}
        sessions = {(volume.subject, volume.session) for volume in found}
        counts = [len(subjects), len(sessions), len(found)]
        totals += counts

        # The commonest sequence comes first.
        sequences = Counter(volume.sequence for volume in found).most_common()
        sequences = ", ".join(f"{name} {count:,}" for name, count in sequences)
        if source in TABLE_1:
            *printed, in_paper = TABLE_1[source]
            rows.append([source, *beside_paper(counts, printed), sequences, in_paper])
        else:
            rows.append([source, *(f"{count:,}" for count in counts), sequences, ""])

    printed = np.sum([numbers for *numbers, _ in TABLE_1.values()], 0)
    rows.append(["total", *beside_paper(totals, printed), "", ""])
    header = ["source", "subjects", "sessions", "volumes", "sequences", "in the paper"]
    return "\n".join(metrics.table(header, rows))


def beside_paper(counts, printed):
    """Our counts, with the paper's in brackets."""
    return [f"{count:,} ({paper:,})" for count, paper in zip(counts, printed, strict=True)]
