"""Look before a preparation: what would come of an input, from headers and label values alone."""

import math
import os
import re
import textwrap
from collections import Counter
from typing import NamedTuple

import metrics
import records
import scans
import sources
from sources import Scan, say

# What only the voxels of a scan can say.
NOT_LOOKED_AT = (
    "Nothing was written. The voxels of the scans were not looked at. For what they hold, a "
    "preparation may still reject a scan: normalised before, constant, infinite, hardly a number, "
    "damaged inside, or negative (adni, oasis3, oasis4, ppmi).",
    "Which label maps lose a class at 1 mm or reach out of the head's box, and which files stand "
    "under two subjects, a preparation says, too.")


class Look(NamedTuple):
    """A scan that a preparation would take, as far as this shows without its voxels."""
    scan: Scan
    values: tuple[int, ...]  # of its label map
    findings: dict  # as a preparation has them


# ------------------------------------------------------------------------------------- one session
def check_session(root, session):
    """Look at the scans of one session -> (a Look of each that is fit, [(path, reason, damage)]).

    It does without voxels what prepare_data.py does in prepare_session, in the same order."""
    fit, rejected = [], []
    labels = {}  # records of those read so far: several scans may share one
    for scan in sources.settle_labels(root, session):
        path = os.path.join(root, scan.path)
        try:
            with scans.naming(path):
                fit.append(look_at(root, scan, labels))
        except scans.Rejected as error:
            reason = error.reason if error.path == path else f"{scan.label}: {error.reason}"
            rejected.append((scan.path, reason, error.damage))
    return fit, rejected


def look_at(root, scan, labels):
    """Look at one scan and its label map -> Look. Raises Rejected.

    labels: {path of a label map: (its image, its record)}, to which its own is added."""
    if scan.fault:
        raise scans.Rejected(scan.fault)
    if scan.label and scan.label not in labels:
        labels[scan.label] = read_values(os.path.join(root, scan.label))
    label, label_record = labels.get(scan.label, (None, None))

    # The header, and whether the file is as long as it says.
    path = os.path.join(root, scan.path)
    image = scans.read_header(path, scan.channel)
    if not is_as_long_as_it_says(path, image):
        scans.stored_voxels(scans.load_scan(path, scan.channel))

    if label and not scans.same_grid(label.shape, label.affine, image.shape, image.affine):
        raise scans.Rejected("label grid differs from image grid",
                             path=os.path.join(root, scan.label))

    # What is said of it, as a preparation says it.
    record = {"nan": 0, "clamped": 0, "elsewhere": scan.elsewhere, "label": label_record,
              "notes": image.extra["notes"]}
    values = tuple(map(int, label_record["values"])) if label_record else ()
    return Look(scan, values, records.findings_of(scan, record))


def read_values(path):
    """Read the label map at a path -> (its image, its record, as if no voxel were lost)."""
    image = scans.load_scan(path)
    values, nan = scans.label_map(image)
    counts = {value: [count, count] for value, count in records.count_values(values).items()}
    return image, {"values": counts, "outside": 0, "nan": nan, "notes": image.extra["notes"]}


def is_as_long_as_it_says(path, image):
    """Does a scan's file hold as many bytes as its header asks for? If not, it is read to be sure.

    A file packed by gzip says in its last four bytes how long it is unpacked. A download that
    broke off ends in others."""
    path = scans.voxel_file(path, image)
    wanted = int(image.dataobj.offset) + scans.size_of_voxels(image)
    with open(path, "rb") as file:
        packed = file.read(2) == scans.GZIP
        if not packed:
            return os.path.getsize(path) >= wanted
        file.seek(-4, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")

    # It is counted modulo 2^32. A few bytes may follow the voxels.
    return (length - wanted) % 2**32 <= scans.SPARE


# -------------------------------------------------------------------------------------- the report
# What to do about a reason: the first pattern that is found in it decides.
ADVICE = (
    ("^not [34]-D", "nothing, if it is fMRI or diffusion; else save its volumes one by one"),
    ("^a side of", "nothing: it is too thin to train on"),
    ("not numbers", "save it as numbers, not as colours or complex values"),
    ("affine scale|by the sform|head scan's", "correct its header, or convert it again from DICOM"),
    ("several label maps|is the label map of", "say in a manifest which belong together"),
    ("label grid differs", "resample the label map to its scan, by the nearest voxel"),
    ("label values unknown", "save whole numbers: a map of probabilities is no label map"),
    ("DICOM|git-lfs|web page", "as it says"),
    ("^no such file", "correct its path, or the link"),
    ("unreadable|Error", "copy or download it again"),
    ("^label$", "nothing: label maps go with their scans"),
    ("^hidden$", "nothing: no scan begins with a dot or an underscore"),
    ("^name not of this source", "if many: --source any, a manifest, or a layout of your own"),
    ("^suffix ", "if you want it: list it in a manifest"),
    ("^listed twice", "nothing"),
    ("^fewer than", "nothing, if it is a label map: a scan has more values"),
    ("", "nothing, if it is what it says; else list it in a manifest"),
)

MOST = 10  # reasons that are shown of the rejected, and of the skipped


def report(name, found, looks, aside, skipped, rejected, findings, list_all):
    """Print what --check says -> exit code, as of a preparation.

    aside: {reason: paths that are skipped}; list_all: name each scan that is rejected; the others
    as in records.print_report."""
    if list_all:
        records.print_rejected(rejected)
    say(f"{name}: {found} found = {len(looks)} to prepare + {records.count_by_reason(skipped)} + "
        f"{len(rejected)} rejected")
    describe([look.scan for look in looks])
    describe_labels(looks)

    rows = rows_of("rejected", kinds_of(rejected)) + rows_of("skipped", aside_of(aside))
    if rows:
        header = ["what", "files", "why", "the first of them", "what to do"]
        say("\n".join(["", *metrics.table(header, rows), ""]))

    records.merge(findings, [look.findings for look in looks])
    records.print_findings(findings)
    for line in NOT_LOOKED_AT:
        say(line)
    if not looks and not skipped["other shards"]:
        return records.print_nothing(found, skipped)
    return int(any(damage for _, _, damage in rejected))


def describe(volumes):
    """Say what the scans to prepare were understood to be."""
    if not volumes:
        return
    subjects = sorted({scan.subject for scan in volumes})
    sessions = {(scan.subject, scan.session) for scan in volumes}
    sequences = Counter(scan.sequence or "no name" for scan in volumes)
    splits = Counter(scan.split for scan in volumes)
    say(f"  {len(volumes)} scans of {len(subjects)} subjects in {len(sessions)} sessions: "
        f"{count(sequences)}; split: {count(splits)}")

    # Three of them, from all over the input.
    volumes = sorted(volumes, key=lambda scan: scan.path)
    for scan in volumes[::math.ceil(len(volumes) / 3)]:
        say(f"  such as {records.plan_line(scan)}")

    # Folders that were taken for subjects, and are none.
    usual = sources.usual_names()
    odd = [subject for subject in subjects if subject.lower() in usual]
    if odd:
        say(f"  is {odd[0]} a subject? That is how a sequence is called: the tree may not be as "
            "--source expects it")
    if len(subjects) == 1 and len(volumes) > MOST:
        say(f"  is {subjects[0]} the subject of all {len(volumes)}? If not, --input may be the "
            "folder above the right one")


def count(counter):
    """{name: number} as in "FLAIR 12, T1 10": the most frequent first, of several by name."""
    pairs = sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {number}" for name, number in pairs)


def describe_labels(looks):
    """Say which value how many label maps have, and how many are empty."""
    values = {look.scan.label: look.values for look in looks if look.scan.label}
    if not values:
        return
    maps = Counter(value for known in values.values() for value in known)
    empty = sum(known == (0,) for known in values.values())
    end = f"; {empty} of them are empty" if empty else ""
    counts = ", ".join(f"{value} in {number}" for value, number in sorted(maps.items()))
    say(f"  {len(values)} label maps; values: {counts}{end}")


def kinds_of(rejected):
    """[(path, reason, damage)] -> {kind of reason: (its first reason, the paths)}."""
    kinds = {}
    for path, reason, _ in sorted(rejected):
        # Reasons are of one kind if they differ in numbers, and in the names of label maps.
        kind = reason.partition("label grid differs")[1] or reason.partition("label values")[1]
        kind = kind or reason.partition("is the label map of several")[1] or reason
        kind = re.sub(r"\d[\d.]*", "N", kind.partition(": ")[0])
        kinds.setdefault(kind, (reason, []))[1].append(path)
    return kinds.values()


def aside_of(aside):
    """{reason: paths} in the same form."""
    return [(reason, sorted(paths)) for reason, paths in aside.items()]


def rows_of(what, kinds):
    """The rows of the table for [(reason, paths)], the most frequent first."""
    kinds = sorted(kinds, key=lambda kind: len(kind[1]), reverse=True)
    rows = []
    for reason, paths in kinds[:MOST]:
        advice = next(text for pattern, text in ADVICE if re.search(pattern, reason))
        rows.append([what, len(paths), textwrap.shorten(reason, 90, placeholder=" ..."), paths[0],
                     advice])

    rest = sum(len(paths) for _, paths in kinds[MOST:])
    if rest:
        rows.append([what, rest, f"{len(kinds) - MOST} other reasons", "", "see --check --dry-run"])
    return rows
