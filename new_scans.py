"""The new scans of a cohort: from a folder, a table or files to a file for each channel.

Three readings: a layout of prepare_data.py (`--source`, or a manifest); BIDS, where a folder has
sub-* folders; and plain files. Of these each is a scan of its own, unless the network has several
channels: then files are told apart as in nnU-Net, CASE_0000, CASE_0001, in the task's order.
"""

import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import manifest
import names
import prepare_data
import sources
import tasks
from config import UserError
from names import ENDING, readable
from scans import FEW, is_label_map


class NewScan(NamedTuple):
    """A scan to segment, of one channel or several."""
    name: str  # of its results: sub-<subject>_ses-<session>
    paths: tuple[str, ...]  # a file for each channel
    parts: tuple[int | None, ...]  # which volume of a 4-D file; None of any other file
    truth: str = ""  # path of its true label map, or ""


class Found(NamedTuple):
    scans: list[NewScan]
    lines: list[str]  # to print: how the input was read, and what was left out
    faults: dict[str, str]  # {name: why it cannot be segmented}


# ------------------------------------------------------------------------------------------- names
def name_of(subject, session):
    """sub-<subject>_ses-<session>, where BIDS knows letters, digits and + alone."""
    return f"sub-{bids_word(subject, 'sub-')}_ses-{bids_word(session or '1', 'ses-')}"


def bids_word(text, prefix):
    # A letter with an accent stays as the letter: Müller is Muller, and Möller somebody else.
    letters = unicodedata.normalize("NFKD", readable(text).removeprefix(prefix))
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    word = re.sub(r"[^A-Za-z0-9+]+", "+", letters).strip("+")
    return word or "unnamed"


def cases_of(paths, single):
    """The paths of plain files -> [(name of its case, number of its channel or None)].

    A case is called after the file, without its ending and nnU-Net's _0000. single: the network has
    one channel. Then another number is no channel's, but a part of the name. So is _0000 itself, if
    there is a file without it."""
    stems = [ENDING.sub("", path) for path in paths]
    known = set(stems)
    cases = []
    for stem in stems:
        short = stem.removesuffix("_0000")
        channel = re.search(r"_(\d{4})$", stem)
        if single:
            cases.append((stem if short in known else short, 0))
        elif channel:
            cases.append((stem[:channel.start()], int(channel[1])))
        else:
            cases.append((stem, None))
    return cases


# How the names of BIDS begin: subject and session, which may be left out.
BIDS_NAME = re.compile(r"(sub-[A-Za-z0-9+]+)(?:_(ses-[A-Za-z0-9+]+))?(?=_|$)")


def name_of_case(case):
    """What the results of a plain file's case are called. A name of BIDS says the session, too."""
    known = BIDS_NAME.match(os.path.basename(case))
    if known:
        return name_of(known[1], known[2] or "1")
    return name_of(case, "1")


# ------------------------------------------------------------------------------ the three readings
def find(inputs, source, sequences, truth=None):
    """All scans of a cohort -> Found.

    inputs: one folder, one manifest, or files. source: a layout of prepare_data.py, or None.
    sequences: the channels of the network. truth: where true label maps are, or None. Raises
    UserError if there is no scan to segment."""
    first = inputs[0]
    is_table = source == "manifest" or first.lower().endswith((".csv", ".tsv"))
    is_folder = os.path.isdir(first)
    if len(inputs) > 1 and (is_table or any(map(os.path.isdir, inputs))):
        raise UserError(f"input {first} {inputs[1]} ...: name one folder, one manifest, or files")
    if source and not is_table and not is_folder:
        raise UserError(f"source {source} is the layout of a folder, and {first} is none")

    if is_table:
        found = from_manifest(first, sequences, truth)
    elif is_folder and (source or has_subjects(first)):
        found = from_source(source or "bids", first, sequences, truth)
    elif is_folder:
        found = from_folder(first, sequences, truth)
    else:
        found = from_files(inputs, sequences, truth)
    return without_missing(without_twins(found))


def has_subjects(folder):
    """Does a folder look like BIDS?"""
    return any(name.startswith("sub-") and os.path.isdir(os.path.join(folder, name))
               for name in os.listdir(folder))


def without_twins(found):
    """Found, with a fault for all scans but the first that would get one name."""
    scans, faults = {}, dict(found.faults)
    for scan in found.scans:
        first = scans.setdefault(scan.name, scan)
        if first is not scan:
            faults[scan.paths[0]] = (f"its results would be called {scan.name}, as those of "
                                     f"{first.paths[0]}: rename it")
    return Found(list(scans.values()), found.lines, faults)


def without_missing(found):
    """Found, with a fault for all scans of which a file is not there: a manifest may list such, and
    a link may lead nowhere."""
    scans, faults = [], dict(found.faults)
    for scan in found.scans:
        missing = [path for path in (*scan.paths, scan.truth) if path and not os.path.exists(path)]
        if missing:
            kind = "true label map" if missing[0] == scan.truth else "scan"
            faults[scan.name] = f"{missing[0]}: no such file, but it is named as a {kind}"
        else:
            scans.append(scan)
    return Found(scans, found.lines, faults)


# ------------------------------------------------------------------------- layouts and manifests
def from_source(source, folder, sequences, truth):
    """A folder in a layout of prepare_data.py -> Found."""
    sessions, skipped, _ = sources.find_scans(source, folder)
    if source == "nnunet":
        channels, _ = sources.read_dataset(folder)
        sessions = [prepare_data.name_channels(session, channels) for session in sessions]
    lines = [f"{folder} is read as --source {source}: {len(sessions)} sessions" + left_out(skipped)]

    # True label maps may lie in the same tree, or in another one that is laid out alike.
    labels = {}
    if truth and os.path.isdir(truth):
        _, labels, _, _ = sources.sort_files(source, truth, False)
        labels = names.labels_by_session(labels, [(s[0].subject, s[0].session) for s in sessions])
    elif truth:
        raise UserError(f"truth {truth}: give a folder in the layout of {source}")

    chosen, more = choose_channels(sessions, sequences, left_out(skipped))
    scans, faults = [], {}
    for name, channels in chosen:
        paths = labels.get((channels[0].subject, channels[0].session), [])
        (first,), _ = names.pair_labels([channels[0]._replace(label="", fault="")], paths)
        if first.fault:
            faults[name] = first.fault
            continue
        scans.append(new_scan(name, folder, channels, truth, first.label))
    return Found(scans, lines + more, faults)


def from_manifest(path, sequences, truth):
    """A manifest of prepare_data.py -> Found. Its column label holds the true label maps."""
    if truth not in (None, path):
        raise UserError(f"truth {truth}: the column label of a manifest has true label maps; "
                        f"give --truth {path}")
    sessions, skipped, _ = manifest.read_manifest(path)
    lines = [f"{path} is read as a manifest: {len(sessions)} sessions" + left_out(skipped)]

    chosen, more = choose_channels(sessions, sequences, left_out(skipped))
    root = os.path.dirname(path)
    scans = []
    for name, channels in chosen:
        label = channels[0].label if truth else ""
        scans.append(new_scan(name, root, channels, root, label))
    return Found(scans, lines + more, {})


def new_scan(name, root, channels, label_root, label):
    """The Scans of one session, a channel each, as a NewScan."""
    paths = tuple(os.path.join(root, scan.path) for scan in channels)
    return NewScan(name, paths, tuple(scan.channel for scan in channels),
                   os.path.join(label_root, label) if label else "")


class Run(NamedTuple):
    """A Scan as tasks.choose_channels takes it. No file is read here: a label map is known by its
    path instead of its checksum."""
    scan: sources.Scan
    label_sha256: str


def choose_channels(sessions, sequences, others=""):
    """The Scans of each session -> ([(name, a Scan for each channel)], lines on what was left out).

    As in training: a session's channels are those of one subject and session. Of several runs
    those with a label map are taken, if there are any, and of these the ones that share it.
    UserError if no session has all, where `others` says what files were left out."""
    chosen, lacking, several = [], {}, []
    for session in sessions:
        name = name_of(session[0].subject, session[0].session)
        by_sequence = {}
        for scan in session:
            by_sequence.setdefault(scan.sequence, []).append(Run(scan, scan.label))

        runs = [tasks.runs_of(by_sequence, sequence) for sequence in sequences]
        if not all(runs):
            pairs = zip(sequences, runs, strict=True)
            missing = [sequence for sequence, found in pairs if not found]
            lacking.setdefault(" and ".join(missing), []).append(name)
            continue

        # Which run is taken: one with a label map, if there is any.
        if max(map(len, runs)) > 1:
            several.append(name)
        labelled = [[run for run in found if run.scan.label] or found for found in runs]
        chosen.append((name, [run.scan for run in tasks.choose_channels(labelled)]))

    if not chosen:
        known = {}
        for session in sessions:
            for scan in session:
                known.setdefault(scan.sequence, []).append(scan.path)
        raise UserError(f"no session has {' and '.join(sequences)}, which the network reads; "
                        f"found: {counts(known) or 'no scan'}{others}")
    lines = [f"no {what}, skipped: {', '.join(without)}" for what, without in lacking.items()]
    if several:
        lines.append(f"several runs of a sequence, of which one is taken: {', '.join(several)}")
    return chosen, lines


def left_out(skipped):
    """The end of a line: how many files were skipped, and why."""
    return f"; files left out: {counts(skipped)}" if skipped else ""


def counts(skipped):
    """{reason: paths} in words, the most frequent first."""
    reasons = sorted(skipped, key=lambda reason: len(skipped[reason]), reverse=True)
    return ", ".join(f"{len(skipped[reason])} {reason}" for reason in reasons)


# ------------------------------------------------------------------------------------- plain files
def from_folder(folder, sequences, truth):
    """A folder of files without a layout, and of folders of them -> Found."""
    paths = list(sources.find_nifti_files(folder))
    skipped, taken = {}, []
    for path in paths:
        reason = why_not(path, sequences)

        # A label map whose name does not say so; only a file that leaves a doubt is read for it.
        if not reason and is_label_map(os.path.join(folder, path), is_named=True):
            reason = f"with fewer than {FEW} values"
        if reason:
            skipped.setdefault(reason, []).append(path)
        else:
            taken.append(path)
    if not taken:
        raise UserError(f"{folder} holds no scan by the names of its files: {counts(skipped)}. To "
                        "segment them all the same, name the files: --input FILE FILE ...")
    what = "each file is a scan of its own"
    if len(sequences) > 1:
        numbered = [f"_{number:04} {sequence}" for number, sequence in enumerate(sequences)]
        what = f"the channels of a case end in {', '.join(numbered)}"
    lines = [f"{folder} has no sub-* folders and is read as plain files: {what}"
             + left_out(skipped)]
    return group_files(folder, taken, sequences, truth, lines)


def from_files(paths, sequences, truth):
    """Files that are named one by one -> Found. Nothing is left out by its name."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(f"input {missing[0]}: no such file or folder")
    lines = [f"{len(paths)} files are read as scans", *names.doubts(paths)]
    return group_files(None, paths, sequences, truth, lines)


def why_not(path, sequences):
    """Why the name of a plain file says that it is no scan for this network, or ""."""
    parts = path.split("/")
    if any(part.startswith(sources.HIDDEN) for part in parts):
        return "hidden"
    if "derivatives" in parts:
        return "in derivatives"
    if names.is_like_label(path, ""):
        return "label map or mask"
    if len(sequences) > 1:
        return ""

    # Whole words alone: a patient1 is no T1.
    known = sources.read_layout("bids").suffixes
    words = re.split("[^a-z0-9]+", ENDING.sub("", parts[-1]).lower())
    named = [known[word] for word in words if word in known]
    if named and not tasks.runs_of({word: [path] for word in named}, sequences[0]):
        return f"named {named[-1]}, not {sequences[0]}"
    return ""


def group_files(folder, paths, sequences, truth, lines):
    """Plain files -> Found. folder: the one in which the paths are, or None."""
    single = len(sequences) == 1
    if folder:
        # The name is that of the path below the folder, so that P1/flair and P2/flair differ.
        known = cases_of(paths, single)
        by_path = set()
    else:
        known, by_path = cases_of_files(paths, single)

    # The files of each case, by the numbers of their channels.
    cases, strangers = {}, []
    for path, (case, channel) in zip(paths, known, strict=True):
        if channel is None or channel >= len(sequences):
            strangers.append(path)
        else:
            full = os.path.join(folder or "", path)
            cases.setdefault(case, []).append((channel, full))

    # A case is a scan if it has each channel, and each once.
    scans, faults, lacking = [], {}, []
    for case, files in cases.items():
        name = name_of(case, "1") if case in by_path else name_of_case(case)
        by_channel = dict(reversed(files))
        if len(by_channel) < len(files):
            faults[name] = "one name: " + ", ".join(path for _, path in files)
        elif len(by_channel) < len(sequences):
            lacking.append(case)
        else:
            channels = tuple(by_channel[number] for number in range(len(sequences)))
            scans.append((case, NewScan(name, channels, (None,) * len(channels))))

    if strangers:
        lines.append(f"no channel of the network by their numbers, skipped: {', '.join(strangers)}")
    if lacking:
        lines.append(f"a channel is missing, skipped: {', '.join(lacking)}")
    if not scans and not faults:
        raise UserError(f"no scan has all of {', '.join(sequences)}: name their files "
                        "CASE_0000.nii.gz and on, or give --source")
    labels = labels_of_cases(truth, scans, faults) if truth else {}
    return Found([scan._replace(truth=labels.get(case, "")) for case, scan in scans
                  if scan.name not in faults], lines, faults)


def cases_of_files(paths, single):
    """Files that are named one by one -> (their cases_of, the cases that are called after a path).

    A case is called after its file alone. Where files in several folders have one name, it is
    called after the path below the folder that all files share."""
    known = cases_of(list(map(os.path.basename, paths)), single)
    counted = Counter(known)
    shared = {case for (case, _), count in counted.items() if count > 1}

    full = [os.path.abspath(path) for path in paths]
    top = os.path.commonpath([os.path.dirname(path) for path in full])
    longer = cases_of([os.path.relpath(path, top) for path in full], single)

    cases, by_path = [], set()
    for short, long in zip(known, longer, strict=True):
        if short[0] in shared:
            by_path.add(long[0])
            cases.append(long)
        else:
            cases.append(short)
    return cases, by_path


def labels_of_cases(truth, scans, faults):
    """{case: path of its label map}. truth: the file of the only scan, or a folder, where a label
    map has the name of its case, or begins with it. Adds to faults, if several could be one's."""
    if not os.path.isdir(truth):
        if len(scans) != 1:
            raise UserError(f"truth {truth}: give a folder of label maps, named as the scans are")
        return {scans[0][0]: truth}

    # In the folder of the scans themselves, these are no label maps.
    own = {os.path.realpath(path) for _, scan in scans for path in scan.paths}
    starts = {}
    for case, _ in scans:
        starts.setdefault(start_of(case), case)

    candidates = {}
    for path in sources.find_nifti_files(truth):
        full = os.path.join(truth, path)
        case = case_that_begins(ENDING.sub("", path), starts)
        if case and os.path.realpath(full) not in own:
            candidates.setdefault(case, []).append(full)

    for case, scan in scans:
        if len(candidates.get(case, ())) > 1:
            found = ", ".join(candidates[case])
            faults[scan.name] = f"several label maps could be its own: {found}"
    return {case: paths[0] for case, paths in candidates.items()}


def start_of(case):
    """How the names of a case's label maps begin."""
    # In BIDS, scan and label map share subject and session alone.
    folder, name = os.path.split(case)
    known = BIDS_NAME.match(name)
    return os.path.join(folder, known[0]) if known else case


def case_that_begins(stem, starts):
    """The case whose start a label map's name begins with, as whole words; the longest of several,
    "" if there is none. starts: {start_of a case: the case}, so that no case is tried in vain."""
    for end in range(len(stem), 0, -1):
        is_whole = not re.match("[A-Za-z0-9]", stem[end:end + 1])
        if is_whole and stem[:end] in starts:
            return starts[stem[:end]]
    return ""
