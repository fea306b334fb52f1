"""From a folder or a table to its scans and their label maps: nine datasets, BIDS, nnU-Net, manifest."""

import csv
import io
import json
import os
import re
from collections import Counter
from typing import NamedTuple

import data
from config import UserError


class Source(NamedTuple):
    """A native layout. The patterns are searched in the path below --input, without its ending .nii
    or .nii.gz; a match of the group `test` marks what the paper does not pretrain on."""
    pattern: str  # of a volume: groups subject, session, suffix, text (free); site in front of the subject
    label: str = ""  # of a label map: the same subject, session and site
    volumes: tuple[str, ...] = ()  # the sequences in a 4-D file
    rule: bool = False  # the official code takes no volume with negative values from here
    hold_out: str = ""  # split of a random quarter of the labelled subjects, by sklearn's count: ceil(n / 4)


LONI = (r"/(?P<text>[^/]+)/(?P<session>\d{4}-\d\d-\d\d)_[\d_.]+/[IS]\d+/([^/]+/)?[^/]+$")

OASIS = (r"(?P<subject>OAS[34]\d{4})_MR_(?P<session>d\d{4})/(scans/)?(?P<text>[^/]+)/(.*/)?"
         r"([^/]*_)?(?P<suffix>[A-Za-z0-9]+)$")

WMH = r"(training|(?P<test>test))/(?P<site>Utrecht|Singapore|Amsterdam/[^/]+)/(?P<subject>\d+)/"

BIDS = r"(?P<subject>sub-[A-Za-z0-9+]+)/((?P<session>ses-[A-Za-z0-9+]+)/)?"

LABEL_NAMES = ("lesion", "mask", "msk", "seg", "dseg", "label", "roi")  # how label maps end, after _

MSSEG = r"(?P<site>((?P<test>[Tt]esting)/)?Center_\d\d)/(?P<subject>Patient_\d\d)/"

SOURCES = {
    "adni": Source(r"(^|/)(?P<subject>\d{3}_S_\d{4})" + LONI, rule=True),
    "oasis3": Source(OASIS, rule=True),
    "oasis4": Source(OASIS, rule=True),
    "ppmi": Source(r"(^|/)(?P<subject>\d{4,6})" + LONI, rule=True),
    # 1,251 -> 938 to train on and 313 to test; the text's "20 %" would be 251.
    "brats21": Source(r"(?P<subject>BraTS2021_\d{5})/(?P=subject)_(?P<suffix>flair|t1|t1ce|t2)$",
                      r"(?P<subject>BraTS2021_\d{5})_seg$", hold_out="test"),
    # 250 -> 187, 20 of them to train on, 167 to evaluate; the 63 set aside are pretrained on all
    # the same.
    "isles22": Source(r"(?P<subject>sub-[^/]+)/(?P<session>ses-[^/]+)/((anat|dwi)/)?[^/]+_"
                      r"(?P<suffix>FLAIR|flair|dwi|adc)$",
                      r"(?P<subject>sub-[^/]+)/(?P<session>ses-[^/]+)/[^/]+_msk$", hold_out="pretrain"),
    "wmh": Source(WMH + "pre/(?P<suffix>FLAIR|T1)$", WMH + "wmh$"),
    # Numbers of patients start again in Testing, so that its centres go by another name.
    "msseg1": Source(MSSEG + r"Preprocessed_Data/(?P<suffix>FLAIR|T1|T2|DP|GADO)_preprocessed$",
                     MSSEG + "Masks/Consensus$"),
    # Table 1 says "train", but its 266 are imagesTs.
    "msd": Source(r"(imagesTs|(?P<test>imagesTr))/(?P<subject>BRATS_\d{3})$",
                  r"labelsTr/(?P<subject>BRATS_\d{3})$", volumes=("FLAIR", "T1", "T1ce", "T2")),
    "fomo60k": Source(r"(?P<subject>sub_[^/]+)/(?P<session>ses_[^/]+)/(?P<text>[^/]+)$"),
    "bids": Source(rf"{BIDS}((anat|dwi|swi|perf)/)?(?P=subject)(_[a-z]+-[A-Za-z0-9+]+)*"
                   r"_(?P<suffix>[A-Za-z0-9]+)$",
                   rf"{BIDS}([^/]+/)?(?P=subject)[^/]*"
                   rf"_(?i:{'|'.join(LABEL_NAMES)}|lesion[A-Za-z0-9+-]*)$"),
    "nnunet": Source(r"(imagesTr|(?P<test>imagesTs))/(?P<subject>[^/]+)_(?P<suffix>\d{4})$",
                     r"labels(Tr|Ts)/(?P<subject>[^/]+)$"),
}

SUFFIXES = {"t1": "T1", "t1w": "T1", "t2": "T2", "t2w": "T2", "flair": "FLAIR", "t1ce": "T1ce", "t1c": "T1ce",
            "gado": "T1ce", "pdw": "PD", "dp": "PD", "t2star": "T2star", "t2starw": "T2star", "t2s": "T2star",
            "gre": "T2star", "swi": "SWI", "minip": "SWI", "dwi": "DWI", "adc": "ADC", "angio": "TOF"}

# Series names as scanners write them: the first match wins; "-" in front of what is no volume of
# the brain. What matches nothing is taken: training ignores the name, but a scan that is left out
# is lost.
SERIES = (
    ("-derivative", r"_derivatives_"), ("-localizer", r"localiz|scout|survey|_3_?pl(ane)?_|_loc_"),
    ("-calibration", r"calib|_cal_|_field|b[01]_?map|phase_?(map|diff)|magnitude|shim"),
    ("-fMRI", r"fmri|bold|_rs_?mri|rest(ing)?_|_func|_task_"), ("-perfusion", r"asl_|perf|cbf|moco|_dsc_"),
    ("-PET", r"_pet\d*_|fdg|amyloid|av45|av1451|_pib_|datscan"), ("-derived map", r"_(col)?fa_|tensor"),
    ("-mask", r"_masks?_|_seg(mentation)?_|_labels?_|harp"), ("-magnetisation transfer", r"_mt_|_nm_|_nmmt_"),
    ("FLAIR", r"flair|dark_fluid"), ("ADC", r"_adc_"), ("DWI", r"dwi|dti|diff|trace|_dw_|_dt_"),
    ("-EPI", r"_epi_"), ("SWI", r"swi|swan|min_?ip"), ("T1ce", r"t1ce|t1gd|gado|_t1c_"),
    ("T1", r"t1|mp_?rage|spgr|bravo|mpr_|_tfe"), ("T2star", r"star|gre_|t2s_|hemo"),
    ("T2", r"t2|tse|fse|space|ciss|cube"), ("TOF", r"_tof|angio|_mra_"), ("PD", r"_pd|proton"), ("other", ""))


class Identity(NamedTuple):
    """What a path says of its file. skip: why it is no volume to prepare ("label" if it is a label
    map), or ""."""
    subject: str = ""
    session: str = "1"
    sequences: tuple[str, ...] = ()
    test: bool = False
    skip: str = ""


class Scan(NamedTuple):
    """One volume to prepare."""
    path: str
    subject: str
    session: str
    sequence: str
    label: str  # path of its session's label map, or ""
    split: str
    channel: int | None = None  # of a 4-D file
    fault: str = ""  # why it cannot be prepared, known before it is opened
    elsewhere: str = ""  # path of its session's label map, which is on another grid


# What a name says of a label map. A mask of the head is none, unless the name speaks of a lesion.
LESION = re.compile("lesion|wmh|tumou?r|stroke|infarct|plaque", re.IGNORECASE)

HEAD = re.compile(r"(?<![a-z])(bet|brain|head|skull)(?![a-z])|(brain|head|skull)_?mask",
                  re.IGNORECASE)

LIKE_LABEL = re.compile("lesion|seg|mask|wmh|tumou?r", re.IGNORECASE)

NO_VALUE = ("", "na", "n/a", "nan", "none", "null")  # cells of a manifest, in lower case

# How a file ends that can be read. An .img goes with its .hdr.
ENDING = re.compile(r"\.(nii|mgh|hdr)(\.gz)?$|\.mgz$", re.IGNORECASE)


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


def own_name(path, subject):
    """The last part of a path without its subject."""
    return os.path.basename(path).replace(subject, "")


def classify(text):
    """Free text of a series -> its sequence, or "-" and the reason it is none; see SERIES."""
    words = f"_{re.sub('[^a-z0-9]+', '_', text.lower().replace('t2*', 't2_star'))}_"
    return next(name for name, pattern in SERIES if re.search(pattern, words))


def identify(source, path):
    """Path of a NIfTI file below the input of a source -> Identity."""
    row, stem = SOURCES[source], ENDING.sub("", path)
    if any(part.startswith((".", "_", "0AS_data_files")) for part in path.split("/")):
        return Identity(skip="hidden")
    label = re.search(row.label, stem) if row.label else None
    match = label or re.search(row.pattern, stem)
    if not match:
        reason = classify(path)
        return Identity(skip=reason[1:] if reason[0] == "-" else "name not of this source")
    groups = match.groupdict()
    site = (groups.get("site") or "").replace("/", "-").replace(" ", "").rstrip(".")
    who = Identity("_".join(filter(None, (site, groups["subject"]))), groups.get("session") or "1",
                   test=bool(groups.get("test")))
    if label:
        rest = re.sub(r"ses-[A-Za-z0-9+]+", "", own_name(stem, groups["subject"]))
        head = HEAD.search(rest) and not LESION.search(rest)
        return who._replace(skip="mask of the head" if head else "label")
    suffix, text = groups.get("suffix") or "", groups.get("text")
    if row.volumes or source == "nnunet":
        return who._replace(sequences=row.volumes or (suffix,))
    sequence = SUFFIXES.get((suffix or text).lower())
    if "_ce-" in stem and sequence == "T1":
        sequence = "T1ce"
    if text and not sequence:
        sequence = classify(f"{text}_{os.path.basename(stem)}" if suffix else text)
    reason = "-derivative" if "derivatives" in path.split("/") else sequence or classify(suffix)
    if reason[0] == "-":
        return who._replace(skip=reason[1:])
    return who._replace(sequences=(sequence,)) if sequence else who._replace(skip=f"suffix {suffix}")


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
        raise UserError(f"no .nii or .nii.gz file under {folder}" + (
            f", but {dicom} of DICOM: run dcm2niix first" if dicom else "; for DICOM, run dcm2niix first"))
    if dicom:
        say(f"{dicom} DICOM files are not read: run dcm2niix on those without a NIfTI beside them")


def find_scans(source, folder, dry_run=False):
    """Walk a folder -> (a list of the Scans of each session, {reason: number of files skipped},
    findings)."""
    row = SOURCES[source]
    sessions, labels, skipped, findings = {}, {}, Counter(), {}
    for path in find_nifti_files(folder):
        who = identify(source, path)
        key = readable(who.subject), readable(who.session)

        if who.skip:
            skipped[who.skip] += 1
            if dry_run:
                say(f"skip {path}: {who.skip}")
            if who.skip == "label":
                labels.setdefault(key, []).append(path)
            elif row.label and who.skip != "hidden" and is_like_label(path, who.skip):
                note(findings, "like label", path)

        for channel, sequence in enumerate(who.sequences):
            scan = Scan(path, *key, readable(sequence), "", "test" if who.test else "",
                        channel if row.volumes else None)
            sessions.setdefault(key, []).append(scan)

    labels = labels_by_session(labels, sessions)
    if sessions.keys() <= labels.keys():
        findings.pop("like label", None)  # nothing is missing

    held = ()
    if row.hold_out and labels:
        held = set(data.split_subjects([subject for subject, _ in labels], 0.25, 0)[1])

    for key, scans in sessions.items():
        # Without a label where others have one: those that the challenge holds back are for
        # testing, too.
        split = "test" if held and row.hold_out == "test" else "pretrain"
        if key in labels:
            split = "train"
        if key[0] in held:
            split = row.hold_out
        scans = [scan._replace(split=scan.split or split) for scan in scans]
        sessions[key] = pair_labels(scans, labels.pop(key, []), findings, dry_run)

    for paths in labels.values():
        for path in paths:
            note(findings, "orphan", path)
    return [sessions[key] for key in sorted(sessions)], skipped, findings


def is_like_label(path, reason):
    """Does the name of a skipped file sound like a label map's? A mask of the head does not, but a
    segmentation that is called the head's may be meant for one."""
    name = os.path.basename(path)
    if reason == "mask of the head" and re.search(r"(mask|msk|bet)$", ENDING.sub("", name), re.IGNORECASE):
        return False
    return bool(LIKE_LABEL.search(name))


def labels_by_session(labels, sessions):
    """{(subject, session): label maps}: where only one of the two trees names sessions, a subject's
    label maps belong to its only session."""
    by_subject = {}
    for subject, session in sessions:
        by_subject.setdefault(subject, []).append(session)

    placed = {}
    for (subject, session), paths in labels.items():
        key, own = (subject, session), by_subject.get(subject, ())
        if len(own) == 1 and "1" in (session, own[0]):
            key = subject, own[0]
        placed.setdefault(key, []).extend(paths)
    return placed


def entities(path):
    """{"run": "1", "acq": "sag", ...} of a BIDS name, but for what only says how it was made; and
    its words without a key."""
    name = ENDING.sub("", os.path.basename(path))
    pairs = re.findall(r"(?<![^_])([a-z]+)-([A-Za-z0-9+]+)", name)
    keys = {key: value.lstrip("0") for key, value in pairs if key not in ("desc", "label")}
    return keys, {word.lower() for word in name.split("_") if "-" not in word}


def keep_best(paths, points):
    """Those of `paths` with the most points."""
    most = max(map(points, paths), default=0)
    return [path for path in paths if points(path) == most]


def label_candidates(scan, paths):
    """Which of a session's label maps could be a scan's: one, none, or several that nothing tells
    apart.

    A label map whose entities (run, acq, echo, ...) contradict the scan's is another scan's. Of the
    others, those that are named a lesion's win, then those that share most entities, then those
    that name the scan's sequence."""
    ours, words = entities(scan.path)
    fitting = []
    for path in paths:
        theirs, _ = entities(path)
        if all(theirs.get(key, value) == value for key, value in ours.items()):
            fitting.append(path)

    # A subject may be called sub-stroke01: that says nothing of a file.
    fitting = keep_best(fitting, lambda path: bool(LESION.search(own_name(path, scan.subject))))
    fitting = keep_best(fitting, lambda path: len(ours.items() & entities(path)[0].items()))
    return keep_best(fitting, lambda path: len(words & entities(path)[1]))


def pair_labels(scans, paths, findings, dry_run=False):
    """The scans of one session, each with its label map of `paths`, or with a fault that names
    several."""
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

    for path in sorted(set(paths) - used):
        note(findings, "unused" if used else "orphan", path)
        if dry_run:
            better = f"{min(used)} is the label map of its session" if used else "it fits no scan"
            say(f"{path} is not used: {better}")
    return paired


def read_manifest(path):
    """csv with the columns path, subject, session, sequence and optionally label, split -> like
    find_scans. A delimiter of , ; tab or | is found; capitals and blanks are forgiven."""
    table = read_table(path)
    header = [column.lower() for column in table[0]]
    sessions, skipped, seen = {}, Counter(), {}
    for number, cells in enumerate(table[1:], start=2):
        if all(cell.lower() in NO_VALUE for cell in cells):
            continue
        if any(cells[len(header):]):
            raise UserError(f"{path}, row {number}: {len(cells)} cells, but {len(header)} columns: "
                            "a name with the delimiter in it needs quotes")

        row = dict.fromkeys(("label", "split"), "") | dict.fromkeys(header, "")
        row |= dict(zip(header, cells, strict=False))
        for column in ("path", "subject"):
            if not row[column]:
                raise UserError(f"{path}, row {number}: no {column}")
        scan = scan_of_row(row, f"{path}, row {number}", os.path.dirname(path))

        first = seen.setdefault((scan.path, scan.subject, scan.session, scan.sequence), scan)
        if first != scan:
            raise UserError(f"{path}, row {number}: {row['path']} is listed twice, with different "
                            "labels or splits")
        if first is not scan:
            skipped["listed twice"] += 1
        else:
            sessions.setdefault((scan.subject, scan.session), []).append(scan)

    if not sessions:
        raise UserError(f"{path} lists no scan")
    return [sessions[key] for key in sorted(sessions)], skipped, {}


def scan_of_row(row, where, root):
    """{column: cell} -> Scan. In a table that is no UTF-8, a path is the bytes of a file's name, or
    else the letters that they stand for in Latin-1."""
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
        raise UserError(f"{where}: split {split!r} of {row['path']}: choose pretrain, train or "
                        "test")
    who = [readable(row[column]) for column in ("subject", "session", "sequence")]
    return Scan(paths[0], *who, paths[1], split)


def read_table(path):
    """The rows of a manifest, cells stripped; the first has the columns. UserError naming what it
    found.

    What no UTF-8 is comes back in surrogates, as the names of files do. A spreadsheet may write
    UTF-16."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = content.decode(encoding, "surrogateescape")
        text = re.sub(r"\A\s*(sep=.\s*\n)?\s*", "", text)  # Excel may begin with "sep=;"

        tables = []
        for delimiter in ",;\t|":
            lines = io.StringIO(text, newline="")
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            tables.append([[cell.strip() for cell in cells] for cells in rows])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the manifest {path}: {reason}") from None

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
        raise UserError(f"cannot read {path} (channel_names and labels of nnU-Net): {error!r}") from None
    if len(set(channels.values())) < len(channels):
        channels = {key: f"{key}-{value}" for key, value in channels.items()}
    if all(str(key).isdigit() for key in labels):  # version 1: {"0": "background"}; version 2 the other way
        labels = {value: int(key) for key, value in labels.items()}
    ignore = [labels.pop("ignore")] if "ignore" in labels else []
    regions = {key: value for key, value in labels.items() if isinstance(value, list)}
    names = {value: key for key, value in labels.items() if isinstance(value, int)}
    values = sorted({0, *names, *(v for region in regions.values() for v in region)})
    task = {"sequences": [channels[key] for key in sorted(channels)], "ignore": ignore,
            "classes": [names.get(v, f"label {v}") for v in values],
            "labels": {v: i for i, v in enumerate(values)},
            "regions": {key: [values.index(v) for v in region] for key, region in regions.items()}}
    return {f"{key:04}": sequence for key, sequence in channels.items()}, task
