"""What the names of files say: the series of a scan, and whose a session's label maps are.

Where names do not tell label maps apart, nothing is guessed: the scan gets a fault that lists them.
"""

import os
import re
from typing import NamedTuple

# How a file ends that can be read. An .img goes with its .hdr.
ENDING = re.compile(r"\.(nii|mgh|hdr)(\.gz)?$|\.mgz$", re.IGNORECASE)

# What a name says of a label map. A mask of the head is none, unless the name speaks of a lesion.
LESION = re.compile("lesion|wmh|tumou?r|stroke|infarct|plaque", re.IGNORECASE)

HEAD = re.compile(r"(?<![a-z])(bet|brain|head|skull)(?![a-z])|(brain|head|skull)_?mask",
                  re.IGNORECASE)

LIKE_LABEL = re.compile("lesion|seg|mask|wmh|tumou?r", re.IGNORECASE)


class Series(NamedTuple):
    """What the name of a series says: its sequence, or else why it is not prepared."""
    sequence: str = ""
    skip: str = ""


def readable(text):
    """A name whose bytes are no UTF-8, which os.walk hands over in surrogates: its bytes read as
    Latin-1."""
    return re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), text)


def classify(text, series):
    """Free text -> Series: the first row of `series` whose pattern is found in it."""
    text = text.lower().replace("t2*", "t2_star")
    words = "_" + re.sub("[^a-z0-9]+", "_", text) + "_"
    row = next(row for row in series if re.search(row["pattern"], words, re.VERBOSE))
    return Series(row.get("sequence", ""), row.get("skip", ""))


def own_name(path, subject):
    """The last part of a path without its subject, who may be called sub-stroke01."""
    return os.path.basename(path).replace(subject, "")


def is_mask_of_the_head(stem, subject):
    """Does the name of a label map say that it is a mask of the head?"""
    # A session may be called head: that says nothing of a file.
    name = re.sub(r"ses-[A-Za-z0-9+]+", "", own_name(stem, subject))
    return bool(HEAD.search(name)) and not LESION.search(name)


def is_like_label(path, reason):
    """Does the name of a file that was skipped for `reason` sound like a label map's?"""
    # A mask of the head is meant for none. A segmentation that is called the head's may be one.
    name = os.path.basename(path)
    ends_as_mask = re.search(r"(mask|msk|bet)$", ENDING.sub("", name), re.IGNORECASE)
    if reason == "mask of the head" and ends_as_mask:
        return False
    return bool(LIKE_LABEL.search(name))


def doubts(paths):
    """Lines on files that were named as scans one by one, though they sound like label maps."""
    like_labels = [path for path in paths if is_like_label(path, "")]
    if not like_labels:
        return []
    return [f"named as scans, though they sound like label maps: {', '.join(like_labels)}"]


def labels_by_session(labels, sessions):
    """{(subject, session): label maps}, where only one of the two trees may name sessions: a
    subject's label maps then belong to its only session."""
    by_subject = {}
    for subject, session in sessions:
        by_subject.setdefault(subject, []).append(session)

    placed = {}
    for (subject, session), paths in labels.items():
        # A session without a name is called 1.
        known = by_subject.get(subject, [])
        if len(known) == 1 and "1" in (session, known[0]):
            session = known[0]
        placed.setdefault((subject, session), []).extend(paths)
    return placed


def entities(path):
    """{"run": "1", "acq": "sag", ...} of a BIDS name, and its words without a key."""
    name = ENDING.sub("", os.path.basename(path))
    pairs = re.findall(r"(?<![^_])([a-z]+)-([A-Za-z0-9+]+)", name)

    # Run 01 is run 1. How a file was made, and what it marks, does not tell scans apart.
    keys = {key: value.lstrip("0") for key, value in pairs if key not in ("desc", "label")}
    words = {word.lower() for word in name.split("_") if "-" not in word}
    return keys, words


def keep_best(paths, points):
    """Those of `paths` with the most points."""
    most = max(map(points, paths), default=0)
    return [path for path in paths if points(path) == most]


def label_candidates(scan, paths):
    """Which of a session's label maps could be a scan's: one, none, or several that nothing tells
    apart."""
    # A label map whose entities (run, acq, echo, ...) contradict the scan's is another scan's.
    ours, words = entities(scan.path)
    fitting = []
    for path in paths:
        theirs, _ = entities(path)
        if all(theirs.get(key, value) == value for key, value in ours.items()):
            fitting.append(path)

    # Of the others, those that are named a lesion's win, then those that share most entities, then
    # those that name the scan's sequence.
    fitting = keep_best(fitting, lambda path: bool(LESION.search(own_name(path, scan.subject))))
    fitting = keep_best(fitting, lambda path: len(ours.items() & entities(path)[0].items()))
    return keep_best(fitting, lambda path: len(words & entities(path)[1]))


def pair_labels(scans, paths):
    """The scans of one session, each with its label map of `paths`, or with a fault that names
    several; and the set of the paths that were used."""
    # Where one label map of a session is named a lesion's, the others are of tissues: never labels.
    lesions = [path for path in paths if LESION.search(own_name(path, scans[0].subject))]

    paired, used = [], set()
    for scan in scans:
        candidates = label_candidates(scan, lesions or paths)
        used.update(candidates)

        if len(candidates) > 1:
            names = ", ".join(candidates)
            scan = scan._replace(fault=f"several label maps could be its own: {names}")
        elif candidates:
            scan = scan._replace(label=candidates[0])
        paired.append(scan)
    return paired, used
