r"""From a folder or a table to its scans and their label maps: nine datasets, BIDS, nnU-Net, manifest.

Where a source keeps its files is written in configs/sources/, one layout a file. A layout of your
own is used by its path, as in --source my_layout.yaml, and the index calls the source my_layout:

    # my/scans/P001/2020-01-31/{flair,t1_post}.nii.gz, and lesion.nii.gz beside them
    pattern: (?P<subject>P\d+)/(?P<session>[\d-]+)/(?P<suffix>flair|t1_post)$
    label: (?P<subject>P\d+)/(?P<session>[\d-]+)/lesion$
    suffixes: {t1_post: T1ce}
"""

import csv
import dataclasses
import difflib
import functools
import io
import json
import os
import re
from collections import Counter
from typing import NamedTuple

import config
import data
import label_maps
from config import UserError
from label_maps import ENDING

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")

# The sources that are known by name.
SOURCES = tuple(sorted(os.path.splitext(name)[0] for name in os.listdir(f"{CONFIGS}/sources")))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of a source are called.

    A pattern is a regular expression in which blanks do not count; it is searched in the path below
    --input, without its ending. Its groups: subject; session, 1 where there is none; site, put before
    the subject where sites count alike; suffix, a word for the sequence, or text, from which it is
    guessed, or channel, which dataset.json explains; test, found in what is not pretrained on."""
    pattern: str = ""  # of a volume
    label: str = ""  # pattern of a label map: with the subject, session and site of its volumes
    suffixes: dict = dataclasses.field(default_factory=dict)  # {suffix or text: sequence}
    series: tuple[dict, ...] = ()  # rows as in configs/series.yaml, which are asked after these
    volumes: tuple[str, ...] = ()  # the sequences in a 4-D file
    hold_out: str = ""  # split of a random quarter of the labelled subjects: test or pretrain
    no_negatives: bool = False  # the official code takes no volume with negative values from here


GROUPS = ("subject", "session", "site", "suffix", "text", "channel", "test")

# How label maps end in BIDS, after _; configs/sources/bids.yaml has the same.
LABEL_NAMES = ("lesion", "mask", "msk", "seg", "dseg", "label", "roi")


class Series(NamedTuple):
    """What the name of a series says: its sequence, or else why it is not prepared."""
    sequence: str = ""
    skip: str = ""


class Identity(NamedTuple):
    """What a path says of its file. skip: why it is no volume to prepare ("label" if it is a label
    map), or ""."""
    subject: str = ""
    session: str = "1"
    sequences: tuple[str, ...] = ()
    test: bool = False
    skip: str = ""


class Scan(NamedTuple):
    """One volume to prepare; paths are below the input."""
    path: str
    subject: str
    session: str
    sequence: str
    label: str  # path of its session's label map, or ""
    split: str
    channel: int | None = None  # of a 4-D file
    fault: str = ""  # why it cannot be prepared, known before it is opened
    elsewhere: str = ""  # path of its session's label map, which is on another grid


HIDDEN = (".", "_", "0AS_data_files")  # how folders and files begin that no source means

NO_VALUE = ("", "na", "n/a", "nan", "none", "null")  # cells of a manifest, in lower case

def readable(text):
    """A name whose bytes are no UTF-8, which os.walk hands over in surrogates: its bytes read as
    Latin-1."""
    return re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), text)


def say(text):
    """Print a line that may hold names of files."""
    print(readable(text))


def note(findings, kind, path, number=0):
    """Add one file to {kind: {path: number of voxels}}."""
    findings.setdefault(kind, {})[path] = number


# ------------------------------------------------------------------------------------------ layouts
def name_of(source):
    """What the index calls a source: its name, or that of its .yaml file."""
    return os.path.splitext(os.path.basename(source))[0]


@functools.cache
def read_layout(source):
    """The Layout of a source by its name, or by the path of a .yaml file, with what series.yaml has
    for all. Raises UserError."""
    own_file = source.endswith((".yaml", ".yml"))
    path = source if own_file else f"{CONFIGS}/sources/{source}.yaml"
    if not own_file and source not in SOURCES:
        known = (*SOURCES, "manifest")
        near = difflib.get_close_matches(source, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown source {source!r}: {hint}choose from {', '.join(known)}, or give "
                        "the path of a .yaml file with your own layout")

    layout = Layout(**config.read_yaml(Layout, path))
    check_layout(layout, path)
    common = config.read_yaml(Layout, f"{CONFIGS}/series.yaml")
    own = {str(suffix).lower(): str(name) for suffix, name in layout.suffixes.items()}
    return dataclasses.replace(layout, suffixes=common["suffixes"] | own,
                               series=layout.series + common["series"])


def check_layout(layout, path):
    """UserError for a layout that cannot be followed."""
    groups = {}
    for pattern in (layout.pattern, layout.label, *(str(row.get("pattern")) for row in layout.series)):
        try:
            groups[pattern] = set(re.compile(pattern, re.VERBOSE).groupindex)
        except re.error as error:
            raise UserError(f"{path}: {pattern} is no regular expression: {error}") from None
    for row in layout.series:
        if set(row) not in ({"pattern", "sequence"}, {"pattern", "skip"}):
            raise UserError(f"{path}: series {row} needs pattern, and sequence or skip")

    of_volume, of_label = groups[layout.pattern], groups[layout.label]
    if unknown := (of_volume | of_label) - set(GROUPS):
        raise UserError(f"{path}: unknown group {min(unknown)!r}; choose from {', '.join(GROUPS)}")
    if "subject" not in of_volume or (layout.label and "subject" not in of_label):
        raise UserError(f"{path}: pattern and label need a group subject, as (?P<subject>P[0-9]+)")
    if not layout.volumes and not of_volume & {"suffix", "text", "channel"}:
        raise UserError(f"{path}: pattern needs a group suffix or text, as (?P<suffix>flair|t1)")
    if layout.hold_out not in ("", "pretrain", "test"):
        raise UserError(f"{path}: hold_out {layout.hold_out!r}: choose test or pretrain")


# ---------------------------------------------------------------------- what a path says of its file
def classify(text, series):
    """Free text -> Series: the first row of `series` whose pattern is found in it."""
    words = f"_{re.sub('[^a-z0-9]+', '_', text.lower().replace('t2*', 't2_star'))}_"
    row = next(row for row in series if re.search(row["pattern"], words))
    return Series(row.get("sequence", ""), row.get("skip", ""))


def identify(source, path):
    """Path of a NIfTI file below the input of a source -> Identity."""
    layout = read_layout(source)
    if any(part.startswith(HIDDEN) for part in path.split("/")):
        return Identity(skip="hidden")

    # A label map may fit the pattern of volumes, too: its own goes first.
    stem = ENDING.sub("", path)
    label = re.search(layout.label, stem, re.VERBOSE) if layout.label else None
    match = label or re.search(layout.pattern, stem, re.VERBOSE)
    if not match or not match["subject"]:
        return Identity(skip=classify(path, layout.series).skip or "name not of this source")

    # Who was scanned, and when.
    groups = match.groupdict("")
    site = groups.get("site", "").replace("/", "-").replace(" ", "").rstrip(".")
    subject = f"{site}_{groups['subject']}" if site else groups["subject"]
    who = Identity(subject, groups.get("session") or "1", test=bool(groups.get("test")))

    if label:
        is_mask = label_maps.is_mask_of_the_head(stem, groups["subject"])
        return who._replace(skip="mask of the head" if is_mask else "label")
    if layout.volumes:
        return who._replace(sequences=layout.volumes)
    if "channel" in groups:
        return who._replace(sequences=(groups["channel"],))
    series = series_of(layout, groups, stem)
    return who._replace(sequences=() if series.skip else (series.sequence,), skip=series.skip)


def series_of(layout, groups, stem):
    """The Series of a volume, by its suffix, or else by its free text."""
    if "derivatives" in os.path.dirname(stem).split("/"):
        return Series(skip="derivative")

    suffix, text = groups.get("suffix", ""), groups.get("text", "")
    sequence = layout.suffixes.get((suffix or text).lower(), "")
    if sequence == "T1" and "_ce-" in stem:  # BIDS: a contrast agent was given
        sequence = "T1ce"
    if sequence:
        return Series(sequence)

    if text:
        both = f"{text}_{os.path.basename(stem)}"
        return classify(both if suffix else text, layout.series)
    return Series(skip=classify(suffix, layout.series).skip or f"suffix {suffix}")


# ----------------------------------------------------------------------- from a folder to its scans
def find_nifti_files(folder):
    """Relative paths of the NIfTI files below a folder, in order. UserError if there is none."""
    if not os.path.isdir(folder):
        raise UserError(f"--input {folder} is not a folder")
    found = dicom = 0
    for top, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            dicom += name.lower().endswith((".dcm", ".ima"))
            if ENDING.search(name):
                found += 1
                yield os.path.relpath(os.path.join(top, name), folder)

    if not found:
        hint = f", but {dicom} of DICOM:" if dicom else "; for DICOM,"
        raise UserError(f"no .nii or .nii.gz file under {folder}{hint} run dcm2niix first")
    if dicom:
        say(f"{dicom} DICOM files are not read: run dcm2niix on those without a NIfTI beside them")


def find_scans(source, folder, dry_run=False):
    """Walk a folder -> (a list of the Scans of each session, {reason: number of files skipped},
    findings)."""
    layout = read_layout(source)
    sessions, labels, skipped, like_labels = sort_files(source, folder, dry_run)
    labels = label_maps.labels_by_session(labels, sessions)

    # A file that only sounds like a label map matters where a session has none.
    findings = {}
    if not sessions.keys() <= labels.keys():
        for path in like_labels:
            note(findings, "like label", path)

    # A random quarter of the labelled subjects, rounded up as by sklearn.
    held_out = set()
    if layout.hold_out and labels:
        held_out = set(data.split_subjects([subject for subject, _ in labels], 0.25, 0)[1])
    # What has no label where others have one is held back by the challenge: for testing, too.
    unlabelled = "test" if held_out and layout.hold_out == "test" else "pretrain"

    for key, scans in sessions.items():
        split = "train" if key in labels else unlabelled
        if key[0] in held_out:
            split = layout.hold_out
        scans = [scan._replace(split=scan.split or split) for scan in scans]
        paths = labels.get(key, [])
        sessions[key], used = label_maps.pair_labels(scans, paths)
        note_unused(paths, used, findings, dry_run)

    for key in labels.keys() - sessions.keys():
        for path in labels[key]:
            note(findings, "orphan", path)
    return [sessions[key] for key in sorted(sessions)], skipped, findings


def note_unused(paths, used, findings, dry_run):
    """Add those of a session's label maps that are no scan's to the findings."""
    for path in sorted(set(paths) - used):
        note(findings, "unused" if used else "orphan", path)
        if dry_run:
            better = f"{min(used)} is the label map of its session" if used else "it fits no scan"
            say(f"{path} is not used: {better}")


def sort_files(source, folder, dry_run):
    """-> ({(subject, session): Scans}, {(subject, session): paths of label maps}, {reason: number of
    files skipped}, paths of skipped files that sound like label maps)."""
    layout = read_layout(source)
    sessions, labels, skipped, like_labels = {}, {}, Counter(), []
    for path in find_nifti_files(folder):
        identity = identify(source, path)
        key = readable(identity.subject), readable(identity.session)

        if reason := identity.skip:
            skipped[reason] += 1
            if dry_run:
                say(f"skip {path}: {reason}")
            if reason == "label":
                labels.setdefault(key, []).append(path)
            elif layout.label and reason != "hidden" and label_maps.is_like_label(path, reason):
                like_labels.append(path)

        split = "test" if identity.test else ""
        for number, sequence in enumerate(identity.sequences):
            channel = number if layout.volumes else None
            scan = Scan(path, *key, readable(sequence), "", split, channel)
            sessions.setdefault(key, []).append(scan)
    return sessions, labels, skipped, like_labels


# ------------------------------------------------------------------------- a manifest; nnU-Net's table
def read_manifest(path):
    """csv with the columns path, subject, session, sequence and optionally label, split -> like
    find_scans. A delimiter of , ; tab or | is found; capitals and blanks are forgiven."""
    table = read_table(path)
    header = [column.lower() for column in table[0]]
    sessions, skipped, seen = {}, Counter(), {}
    for number, cells in enumerate(table[1:], start=2):
        where = f"{path}, row {number}"
        if all(cell.lower() in NO_VALUE for cell in cells):
            continue
        if any(cells[len(header):]):
            raise UserError(f"{where}: {len(cells)} cells, but {len(header)} columns: a name with the "
                            "delimiter in it needs quotes")

        # A short row, and a column that is not there, are empty.
        row = dict.fromkeys(("label", "split", *header), "")
        row |= dict(zip(header, cells, strict=False))
        scan = scan_of_row(row, where, os.path.dirname(path))

        first = seen.setdefault((scan.path, scan.subject, scan.session, scan.sequence), scan)
        if first != scan:
            raise UserError(f"{where}: {row['path']} is listed twice, with different labels or splits")
        if first is not scan:
            skipped["listed twice"] += 1
        else:
            sessions.setdefault((scan.subject, scan.session), []).append(scan)

    if not sessions:
        raise UserError(f"{path} lists no scan")
    return [sessions[key] for key in sorted(sessions)], skipped, {}


def scan_of_row(row, where, root):
    """{column: cell} -> Scan."""
    for column in ("path", "subject"):
        if not row[column]:
            raise UserError(f"{where}: no {column}")

    # In a table that is no UTF-8, a path is the bytes of a file's name, or else the letters that
    # they stand for in Latin-1.
    paths = []
    for cell in (row["path"], row["label"]):
        cell = "" if cell.lower() in NO_VALUE else cell
        if cell != readable(cell) and not os.path.exists(os.path.join(root, cell)):
            cell = readable(cell)
        paths.append(cell)

    split = row["split"].lower()
    if split in NO_VALUE:
        split = "train" if paths[1] else "pretrain"
    if split not in ("pretrain", "train", "test"):
        raise UserError(f"{where}: split {split!r} of {row['path']}: choose pretrain, train or test")
    who = [readable(row[column]) for column in ("subject", "session", "sequence")]
    return Scan(paths[0], *who, paths[1], split)


def read_table(path):
    """The rows of a manifest, cells stripped; the first has the columns. UserError naming what it
    found."""
    try:
        with open(path, "rb") as file:
            content = file.read()

        # A spreadsheet may write UTF-16, and begin with "sep=;". What is no UTF-8 comes back in
        # surrogates, as the names of files do.
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = content.decode(encoding, "surrogateescape")
        text = re.sub(r"\A\s*(sep=.\s*\n)?\s*", "", text)

        tables = []
        for delimiter in ",;\t|":
            lines = io.StringIO(text, newline="")
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            tables.append([[cell.strip() for cell in cells] for cells in rows])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the manifest {path}: {reason}") from None

    # The delimiter is the one that finds the columns.
    needed = {"path", "subject", "session", "sequence"}
    for table in tables:
        if table and needed <= {column.lower() for column in table[0]}:
            return table
    columns = max((table[0] for table in tables if table), key=len, default=[])
    raise UserError(f"{path}: a manifest needs the columns path,subject,session,sequence[,label]"
                    f"[,split]; this one has {', '.join(map(readable, columns)) or 'none'}")


def read_dataset(root):
    """nnU-Net's dataset.json -> ({number of a channel: its sequence}, the settings of a task)."""
    path = os.path.join(root, "dataset.json")
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        channels = known.get("channel_names") or known["modality"]
        channels = {int(key): str(value) for key, value in channels.items()}
        labels = dict(known["labels"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {path} (channel_names and labels of nnU-Net): "
                        f"{error!r}") from None
    if len(set(channels.values())) < len(channels):
        channels = {key: f"{key}-{value}" for key, value in channels.items()}

    # Version 1 writes {"0": "background"}; version 2 the other way round, and a region as a list.
    if all(str(key).isdigit() for key in labels):
        labels = {name: int(value) for value, name in labels.items()}
    ignore = [labels.pop("ignore")] if "ignore" in labels else []
    regions = {name: value for name, value in labels.items() if isinstance(value, list)}
    names = {value: name for name, value in labels.items() if isinstance(value, int)}

    # Classes count from 0 in the order of the values, where 0 is always one.
    values = {0, *names}.union(*regions.values())
    classes = {value: number for number, value in enumerate(sorted(values))}
    task = {"sequences": [channels[key] for key in sorted(channels)], "ignore": ignore,
            "classes": [names.get(value, f"label {value}") for value in classes], "labels": classes,
            "regions": {name: [classes[v] for v in region] for name, region in regions.items()}}
    return {f"{key:04}": sequence for key, sequence in channels.items()}, task
