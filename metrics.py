"""Dice, surface distances and lesions of masks (section 4); means over cases, folds; p values."""

import math

import numpy as np

import distances

TOLERANCE = 2.0  # mm, of the normalised surface Dice

# What `score` finds, and what a table calls it.
SCORES = {
    "dice": "Dice",
    "hd95": "HD95 mm",
    "asd": "ASD mm",
    "nsd": f"NSD at {TOLERANCE:g} mm",
    "f1": "lesion F1",
    "ml": "ml",
    "ml_error": "ml in excess",
}


# ---------------------------------------------------------------------------------------- two masks
def dice(prediction, truth, labels, ignore=None):
    """Dice of each label: {label: 2 TP / (2 TP + FP + FN)}.

    It is NaN for a label that is in neither array, and 0 for one that is in only one of them.
    prediction, truth: integer arrays of one shape. labels: a label may be a tuple of values, which
    are scored as their union (whole tumour). ignore: value or values of the truth whose voxels do
    not count (label 2 of WMH, by the rule of that challenge). ValueError if the shapes differ."""
    prediction = np.asarray(prediction)
    truth = np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")

    if ignore is not None:
        counted = ~np.isin(truth, ignore)
        prediction = prediction[counted]
        truth = truth[counted]

    return {label: dice_of_masks(np.isin(prediction, label), np.isin(truth, label))
            for label in labels}


def dice_of_masks(prediction, truth):
    """Dice of two masks, bool: 2 TP / (2 TP + FP + FN), or NaN if both are empty."""
    voxels = np.count_nonzero(prediction) + np.count_nonzero(truth)
    if not voxels:
        return math.nan
    return 2 * np.count_nonzero(prediction & truth) / voxels


def lesion_f1(prediction, truth):
    """F1 of lesions, which are connected components, as in the WMH challenge.

    A lesion of either mask is found if one of its voxels is in the other mask. F1 is the harmonic
    mean of the shares found of the true and of the predicted lesions. Neither mask is empty."""
    true_found, true_lesions = distances.lesions_found(truth, prediction)
    predicted_found, predicted_lesions = distances.lesions_found(prediction, truth)
    recall = true_found / true_lesions
    precision = predicted_found / predicted_lesions
    if recall + precision == 0:
        return 0.0
    return 2 * recall * precision / (recall + precision)


def score(prediction, truth, spacing):
    """All of SCORES for two masks, bool (D, H, W), on a grid of voxels of `spacing` mm.

    hd95: the 95th percentile of the distances from one surface to the other, the larger of both
    directions. asd: the mean of these distances, of both surfaces together. nsd: the share of them
    within TOLERANCE. ml: the predicted volume. ml_error: the predicted minus the true volume.

    If both masks are empty, all scores but the volumes are NaN. If one of them is, dice, nsd and f1
    are 0 and the distances are NaN."""
    predicted = np.count_nonzero(prediction)
    true = np.count_nonzero(truth)
    voxel_ml = float(np.prod(spacing)) / 1000

    scores = dict.fromkeys(SCORES, math.nan)
    scores["dice"] = dice_of_masks(prediction, truth)
    scores["ml"] = predicted * voxel_ml
    scores["ml_error"] = predicted * voxel_ml - true * voxel_ml

    # Without a surface in each mask there is no distance, and without a lesion no F1.
    if not predicted and not true:
        return scores
    if not predicted or not true:
        return scores | {"nsd": 0.0, "f1": 0.0}

    # The box around both masks holds all that matters from here on.
    box = distances.box_of(prediction | truth)
    prediction = prediction[box]
    truth = truth[box]

    # Lesions come first, so that their arrays are gone before the surfaces are made.
    scores["f1"] = float(lesion_f1(prediction, truth))

    # Distances from each surface to the other one.
    predicted_surface = distances.surface(prediction)
    true_surface = distances.surface(truth)
    both = [distances.to_surface(predicted_surface, true_surface, spacing),
            distances.to_surface(true_surface, predicted_surface, spacing)]

    count = sum(len(found) for found in both)
    near = sum(np.count_nonzero(found < TOLERANCE + 1e-4) for found in both)  # float32 rounds
    scores["hd95"] = float(max(np.percentile(found, 95) for found in both))
    scores["asd"] = float(sum(found.sum(dtype=np.float64) for found in both) / count)
    scores["nsd"] = near / count
    return scores


# --------------------------------------------------------------------------------- means and tables
def mean_dice(records, names, kind="dice"):
    """Mean over cases of the mean over `names`, and how many cases were dropped.

    As in the official code, a label in neither truth nor prediction does not count; a case in which
    no label counts is dropped. records: cases of dice.json. kind: a key of SCORES."""
    means = []
    dropped = 0
    for record in records:
        values = [record[kind][name] for name in names if record[kind][name] is not None]
        if values:
            means.append(sum(values) / len(values))
        else:
            dropped += 1
    return (sum(means) / len(means) if means else math.nan), dropped


def spread(means):
    """Mean ± one standard deviation over the folds that have a value, or - if none has."""
    known = [mean for mean in means if not math.isnan(mean)]
    if not known:
        return "-"
    deviation = 0
    if len(known) > 1:
        deviation = np.std(known, ddof=1)
    return f"{np.mean(known):.2f} ± {deviation:.2f}"


def spread_of_dice(folds, names, belongs=lambda record: True):
    """Dice in percent over the folds, as `spread` writes it, of the records that belong."""
    percent = []
    for records in folds.values():
        mean, _ = mean_dice(filter(belongs, records), names)
        percent.append(100 * mean)
    return spread(percent)


def markdown(tables):
    """Tables of a header, lines and a note, one after the other, as one page of Markdown."""
    lines = []
    for each in tables:
        lines += [*table(each.header, each.lines), "", each.note, ""]
    return "\n".join(lines)


def table(header, rows):
    """Lines of a Markdown table."""
    rule = ["---"] * len(header)
    return [f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows)]


# ----------------------------------------------------------------------------------------- p values
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def student_p(t, df):
    """Two-sided p of Student's t; the degrees of freedom need not be whole."""
    # With t = sqrt(df) tan(angle) the density goes as cos(angle)^(df - 1), which Gauss-Legendre
    # quadrature integrates from 0 to the angle of this t.
    half = math.atan(abs(t) / math.sqrt(df)) / 2
    angles = half * (NODES + 1)
    total = float(WEIGHTS @ np.cos(angles) ** (df - 1))

    # With this factor, the integral over all angles is 1.
    log_ratio = math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    scale = 2 * math.exp(log_ratio) / math.sqrt(math.pi)
    return max(0.0, 1 - scale * half * total)


def student_quantile(q, df):
    """The t below which a Student variable stays with probability q > 0.5."""
    # Bisection over the same angle: the p of the middle tells on which side of it the t lies.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if student_p(math.sqrt(df) * math.tan(middle), df) < 2 - 2 * q:
            high = middle
        else:
            low = middle
    return math.sqrt(df) * math.tan(low)


def holm(ps):
    """p values corrected for their number, step down (Holm 1979); NaN do not count."""
    adjusted = list(ps)
    known = [(p, i) for i, p in enumerate(ps) if not math.isnan(p)]
    order = sorted(known)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        # A larger p never gets a smaller corrected value.
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def rounded(value):
    """A number as it is written. JSON has no NaN: what is not defined is null."""
    if value is None or math.isnan(value):
        return None
    return round(value, 6)


# ------------------------------------------------------------------------------ summary.md of a run
def summarise(run, assignment):
    """summary.md of a finetuning run, in Markdown.

    It has the Dice of each fold with mean and standard deviation as in the paper's Table 6; whether
    scans were seen in pretraining; the Dice of groups of cases; and the other scores. run: what
    dice.json holds. assignment: [{"train": [case names]}], one entry a fold."""
    folds = dict(sorted(run["folds"].items()))
    names = [*run["classes"], *run["regions"]]

    # A column for each class and region, and where there are several classes one for their mean.
    columns = {name: [name] for name in names}
    if len(run["classes"]) > 1:
        columns = {"mean": run["classes"]} | columns

    # A case that several folds evaluate counts once.
    by_name = {}
    for records in folds.values():
        by_name |= {record["case"]: record for record in records}
    cases = list(by_name.values())

    settings = run["config"]
    blocks = [
        [f"# {run['task']}, {run['model']}, {run['ckpt'] or 'from scratch'}"],
        [f"{settings['steps']} steps, batch {settings['batch_size']}, patch "
         f"{settings['patch_size']}, lr {settings['lr']}, augment {run['augment']}. Scores on each "
         "scan's own grid, Dice in percent. Dropped: cases with the label in neither truth nor "
         "prediction; for distances, also those with it in one."],
        fold_table(folds, assignment, columns),
        [seen_in_pretraining(cases, bool(run["ckpt"]))],
        group_table(folds, cases, columns, run["sites"]),
        score_table(folds, names),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def fold_table(folds, assignment, columns):
    """Dice of each fold, then mean and standard deviation over folds."""
    rows = []
    for fold, records in folds.items():
        found = [mean_dice(records, names) for names in columns.values()]
        percent = [f"{100 * mean:.2f}" for mean, _ in found]
        trained = len(assignment[fold]["train"])

        # A case without any class is dropped from several columns: count it once.
        dropped = max(dropped for _, dropped in found)
        rows.append([fold, trained, len(records), *percent, dropped])
    over_folds = [spread_of_dice(folds, names) for names in columns.values()]
    rows.append(["mean ± SD", "", "", *over_folds, ""])
    return table(["fold", "trained on", "evaluated", *columns, "dropped"], rows)


def seen_in_pretraining(cases, pretrained):
    """One sentence: how many of the evaluated scans the pretraining has seen, without labels.

    pretrained: was there one?"""
    if any(case["seen"] is None for case in cases):
        return "The checkpoint does not say which scans were seen in pretraining."
    if not pretrained:
        return "There was no pretraining, so no scan was seen in it."
    seen = sum(case["seen"] for case in cases)
    same = sum(case["same_scan"] for case in cases)
    return (f"Of {len(cases)} evaluated scans {seen} were seen, unlabelled, in pretraining: {same} "
            f"the same file, {seen - same} another of the subject.")


def group_table(folds, cases, columns, sites):
    """Dice of cases seen and not seen in pretraining, and of known and new sites.

    [] where there is nothing to tell apart. sites: those of the training set, or None."""
    # The folds mix the groups: a function for each says which records belong to it.
    groups = {}
    if 0 < sum(bool(case["seen"]) for case in cases) < len(cases):
        groups["seen in pretraining"] = lambda record: record["seen"]
        groups["not seen"] = lambda record: not record["seen"]
    if sites:
        groups["sites of the training set"] = lambda record: record["site"] in sites
        groups["other sites"] = lambda record: record["site"] not in sites
    if not groups:
        return []

    rows = []
    for title, belongs in groups.items():
        count = sum(bool(belongs(case)) for case in cases)
        means = [spread_of_dice(folds, names, belongs) for names in columns.values()]
        rows.append([title, count, *means])
    return table(["Dice of", "cases", *columns], rows)


def score_table(folds, names):
    """All scores but Dice: mean and standard deviation over folds, and how many cases dropped."""
    # How many were dropped stands beside each column: it differs from one score to the next.
    header = ["mean ± SD"]
    for name in names:
        header += [name, "dropped"]

    rows = []
    for kind, title in SCORES.items():
        if kind == "dice":
            continue
        cells = []
        for name in names:
            found = [mean_dice(records, [name], kind) for records in folds.values()]
            means = [mean for mean, _ in found]
            dropped = sum(count for _, count in found)
            cells += [spread(means), dropped]
        rows.append([title, *cells])
    return table(header, rows)
