r"""From a folder to its scans and label maps: nine datasets, BIDS, nnU-Net, a layout of your own.

Where a source keeps its files is written in configs/sources/, one layout a file. A layout of your
own is used by its path, as --source my_layout.yaml, and the index then calls the source my_layout:

    # my/scans/P001/2020-01-31/{flair,t1_post}.nii.gz, and lesion.nii.gz beside them
    pattern: (?P<subject>P\d+)/(?P<session>[\d-]+)/(?P<suffix>flair|t1_post)$
    label: (?P<subject>P\d+)/(?P<session>[\d-]+)/lesion$
    suffixes: {t1_post: T1ce}
"""

import dataclasses
import difflib
import functools
import json
import os
import re
from typing import NamedTuple

import config
import data
import names
import scans
from config import UserError
from names import ENDING, Series, classify, readable

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")

# The sources that are known by name, a file each.
SOURCES = tuple(sorted(name.removesuffix(".yaml") for name in os.listdir(f"{CONFIGS}/sources")
                       if name.endswith(".yaml")))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of a source are called.

    A pattern is a regular expression in which blanks do not count; a blank is written as [ ]. It is
    searched in the path below --input, without its ending. Its groups: subject; session, 1 where
    there is none; site, put before the subject; suffix, a word for the sequence; text, from which
    the sequence is guessed; channel, a number that nnU-Net's dataset.json explains; test, which is
    found only in what the paper does not pretrain on."""
    pattern: str = ""  # of a volume
    label: str = ""  # pattern of a label map: with the subject, session and site of its volumes
    suffixes: dict = dataclasses.field(default_factory=dict)  # {suffix: sequence}, see series.yaml
    series: tuple[dict, ...] = ()  # rows as in configs/series.yaml, which come after these
    volumes: tuple[str, ...] = ()  # the sequences in a 4-D file
    hold_out: str = ""  # split of a random quarter of the labelled subjects: test or pretrain
    no_negatives: bool = False  # the official code takes no volume with negative values from here
    skip_few_values: bool = False  # a label map is told by its values, too: see scans.is_label_map


GROUPS = ("subject", "session", "site", "suffix", "text", "channel", "test")
# How label maps end in BIDS, after _; configs/sources/bids.yaml has the same.
LABEL_NAMES = ("lesion", "mask", "msk", "seg", "dseg", "label", "roi")


class Identity(NamedTuple):
    """What a path says of its file."""
    subject: str = ""
    session: str = "1"
    sequences: tuple[str, ...] = ()
    test: bool = False
    skip: str = ""  # why it is no volume to prepare, "label" if it is a label map; or ""


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
    word: str = ""  # what a manifest calls the sequence, if that is not its usual name


HIDDEN = (".", "_", "0AS_data_files")  # how folders and files begin that no source means


def say(text):
    """Print a line that may hold names of files."""
    print(readable(text))


def note(findings, kind, path, number=0):
    """Add one file to {kind: {path: number of voxels}}."""
    findings.setdefault(kind, {})[path] = number


def name_of(source):
    """What the index calls a source: its name, or that of its .yaml file."""
    return os.path.splitext(os.path.basename(source))[0]


@functools.cache
def read_layout(source):
    """The Layout of a source, by its name or by the path of a .yaml file. Raises UserError."""
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

    # What all sources share comes after what the layout says itself. Capitals do not count.
    common = config.read_yaml(Layout, f"{CONFIGS}/series.yaml")
    own = {str(suffix).lower(): str(name) for suffix, name in layout.suffixes.items()}
    return dataclasses.replace(layout, suffixes=common["suffixes"] | own,
                               series=layout.series + common["series"])


@functools.cache
def usual_names():
    """{word in small letters: its sequence}, by configs/series.yaml: the words that are a sequence
    by themselves, and the names of all sequences."""
    common = config.read_yaml(Layout, f"{CONFIGS}/series.yaml")
    named = [row["sequence"] for row in common["series"] if "sequence" in row]
    return {name.lower(): name for name in named} | common["suffixes"]


def check_layout(layout, path):
    """UserError for a layout that cannot be followed."""
    for row in layout.series:
        keys = {key for key, text in row.items() if isinstance(text, str)}
        if keys != row.keys() or keys not in ({"pattern", "sequence"}, {"pattern", "skip"}):
            raise UserError(f"{path}: {row} in series needs pattern, and sequence or skip")
        groups_of(row["pattern"], path)

    # Who was scanned must be known, of volumes and of label maps.
    groups = groups_of(layout.pattern, path)
    label_groups = groups_of(layout.label, path) if layout.label else {"subject"}
    if unknown := (groups | label_groups) - set(GROUPS):
        raise UserError(f"{path}: unknown group {min(unknown)!r}; choose from {', '.join(GROUPS)}")
    if "subject" not in groups & label_groups:
        raise UserError(f"{path}: pattern and label need a group subject, as (?P<subject>P[0-9]+)")

    # So must be the sequences, and the split.
    if not layout.volumes and not groups & {"suffix", "text", "channel"}:
        raise UserError(f"{path}: pattern needs a group suffix or text, as (?P<suffix>flair|t1)")
    if layout.hold_out not in ("", "pretrain", "test"):
        raise UserError(f"{path}: hold_out {layout.hold_out!r}: choose test or pretrain")


def groups_of(pattern, path):
    """The names of the groups in a pattern of the file `path`. UserError if it does not compile."""
    try:
        return set(re.compile(pattern, re.VERBOSE).groupindex)
    except re.error as error:
        raise UserError(f"{path}: {pattern} is no regular expression: {error}") from None


def identify(source, path):
    """Path of a NIfTI file below the input of a source -> Identity."""
    layout = read_layout(source)
    if any(part.startswith(HIDDEN) for part in path.split("/")):
        return Identity(skip="hidden")

    # A label map may fit the pattern of volumes, too, so that its own is asked first.
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
        is_mask = names.is_mask_of_the_head(stem, groups["subject"])
        return who._replace(skip="mask of the head" if is_mask else "label")

    # The layout may know what a file holds.
    if layout.volumes:
        return who._replace(sequences=layout.volumes)
    if "channel" in groups:
        return who._replace(sequences=(groups["channel"],))

    series = series_of(layout, groups, stem)
    if series.skip:
        return who._replace(skip=series.skip)
    return who._replace(sequences=(series.sequence,))


def series_of(layout, groups, stem):
    """The Series of a volume, by its suffix, or else by its free text."""
    if "derivatives" in os.path.dirname(stem).split("/"):
        return Series(skip="derivative")

    # A word that is known decides.
    suffix = groups.get("suffix", "")
    text = groups.get("text", "")
    sequence = layout.suffixes.get((suffix or text).lower(), "")
    if sequence == "T1" and "_ce-" in stem:  # BIDS: a contrast agent was given
        sequence = "T1ce"
    if sequence:
        return Series(sequence)

    # Free text is always some sequence; a suffix that nobody knows is not.
    if not text:
        return Series(skip=classify(suffix, layout.series).skip or f"suffix {suffix}")
    if suffix:
        text = f"{text}_{os.path.basename(stem)}"
    series = classify(text, layout.series)

    # Of a text with folders in it, the file's own name says most.
    own = classify(os.path.basename(text), layout.series)
    if series.sequence and own.sequence not in ("", "other"):
        return own
    return series


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
    """Walk a folder -> (a list of the Scans of each session, {reason: paths that are skipped},
    findings)."""
    layout = read_layout(source)
    sessions, labels, skipped, like_labels = sort_files(source, folder, dry_run)
    labels = names.labels_by_session(labels, sessions)

    # A file that only sounds like a label map matters where a session has none.
    findings = {}
    if not sessions.keys() <= labels.keys():
        for path in like_labels:
            note(findings, "like label", path)

    # A random quarter of the labelled subjects, rounded up as by sklearn.
    held_out = set()
    if layout.hold_out and labels:
        held_out = set(data.split_subjects([subject for subject, _ in labels], 0.25, 0)[1])

    # Where some have a label, the challenge keeps those of the others: these are for testing, too.
    unlabelled = "test" if held_out and layout.hold_out == "test" else "pretrain"

    for key, session in sessions.items():
        split = "train" if key in labels else unlabelled
        if key[0] in held_out:
            split = layout.hold_out
        session = [scan._replace(split=scan.split or split) for scan in session]
        paths = labels.get(key, [])
        sessions[key], used = names.pair_labels(session, paths)

        # Label maps that no scan took.
        why = f"{min(used)} is the label map of its session" if used else "it fits no scan"
        for path in sorted(set(paths) - used):
            note(findings, "unused" if used else "orphan", path)
            if dry_run:
                say(f"{path} is not used: {why}")

    for key in labels.keys() - sessions.keys():
        for path in labels[key]:
            note(findings, "orphan", path)
    return [sessions[key] for key in sorted(sessions)], skipped, findings


def sort_files(source, folder, dry_run):
    """Walk a folder -> ({(subject, session): Scans}, {(subject, session): paths of label maps},
    {reason: paths that are skipped}, those of them that sound like label maps)."""
    layout = read_layout(source)
    sessions, labels = {}, {}
    skipped, like_labels = {}, []
    for path in find_nifti_files(folder):
        identity = identify(source, path)
        if layout.skip_few_values and identity.sequences:
            is_named = identity.sequences != ("other",)
            if scans.is_label_map(os.path.join(folder, path), is_named):
                identity = Identity(skip=f"fewer than {scans.FEW} values")
        key = readable(identity.subject), readable(identity.session)

        if reason := identity.skip:
            skipped.setdefault(reason, []).append(path)
            if dry_run:
                say(f"skip {path}: {reason}")
            if reason == "label":
                labels.setdefault(key, []).append(path)
            elif layout.label and reason != "hidden" and names.is_like_label(path, reason):
                like_labels.append(path)

        # The folder may say the split; otherwise it is settled when all are known.
        split = "test" if identity.test else ""
        for number, sequence in enumerate(identity.sequences):
            channel = number if layout.volumes else None
            scan = Scan(path, *key, readable(sequence), "", split, channel)
            sessions.setdefault(key, []).append(scan)
    return sessions, labels, skipped, like_labels


def settle_labels(root, session):
    """Leave a session's label map to the volumes on its grid: DWI and ADC of ISLES22, not FLAIR.

    If it is on no volume's grid, all keep it, and so are rejected by name. Two scans of one
    sequence cannot share it."""
    session = list(session)
    for label in sorted({scan.label for scan in session if scan.label}):
        sharing = [scan for scan in session if scan.label == label]
        if len(sharing) < 2:
            continue

        # Only the headers are read for this.
        on_grid = [scan for scan in sharing if is_on_grid(root, scan)]
        for number, scan in enumerate(session):
            rivals = [other.path for other in on_grid if other.sequence == scan.sequence]
            if scan in on_grid and len(rivals) > 1:
                fault = f"{label} is the label map of several {scan.sequence}: {', '.join(rivals)}"
                session[number] = scan._replace(fault=fault)
            elif scan in sharing and on_grid and scan not in on_grid:
                session[number] = scan._replace(label="", elsewhere=label)
    return session


def is_on_grid(root, scan):
    """Does a scan lie on the grid of its label map? No, if one of the two cannot be read."""
    path = os.path.join(root, scan.path)
    try:
        with scans.naming(path):
            image = scans.read_header(path, scan.channel)
            label = scans.read_header(os.path.join(root, scan.label))
            return scans.same_grid(label.shape, label.affine, image.shape, image.affine)
    except scans.Rejected:
        return False


def read_dataset(root):
    """nnU-Net's dataset.json -> ({number of a channel: its sequence}, the settings of a task)."""
    path = os.path.join(root, "dataset.json")
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        channels = known.get("channel_names") or known["modality"]
        channels = {int(key): str(value) for key, value in channels.items()}
        labels = dict(known["labels"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; --input is the folder of one "
                        "dataset, such as Dataset501_Lesions") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {path} (channel_names and labels of nnU-Net): "
                        f"{error!r}") from None

    # Channels of one name are told apart by their numbers.
    if len(set(channels.values())) < len(channels):
        channels = {key: f"{key}-{value}" for key, value in channels.items()}

    # Version 1 writes {"0": "background"}; version 2 the other way round, and a region as a list.
    if all(str(key).isdigit() for key in labels):
        labels = {name: int(value) for value, name in labels.items()}
    ignore = [labels.pop("ignore")] if "ignore" in labels else []
    regions = {name: value for name, value in labels.items() if isinstance(value, list)}
    class_names = {value: name for name, value in labels.items() if isinstance(value, int)}

    # Classes count from 0 in the order of the values, where 0 is always one.
    values = {0, *class_names}.union(*regions.values())
    classes = {value: number for number, value in enumerate(sorted(values))}
    names_in_order = [class_names.get(value, f"label {value}") for value in classes]
    task = {"sequences": [channels[key] for key in sorted(channels)], "ignore": ignore,
            "classes": names_in_order, "labels": classes,
            "regions": {name: [classes[v] for v in region] for name, region in regions.items()}}
    return {f"{key:04}": sequence for key, sequence in channels.items()}, task
