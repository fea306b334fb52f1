"""Dice, surface distances and lesions of masks (section 4); means over cases, folds; p values."""

import itertools
import math

import numpy as np

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

    scores = {}
    for label in labels:
        predicted = np.isin(prediction, label)
        true = np.isin(truth, label)
        voxels = predicted.sum() + true.sum()
        scores[label] = math.nan
        if voxels:
            scores[label] = float(2 * (predicted & true).sum() / voxels)
    return scores


def surface(mask):
    """The voxels of a mask (D, H, W) that have one of their six neighbours outside of it."""
    # The interior is what is left of the mask under a shift by one voxel to each of the six sides.
    padded = np.pad(mask, 1)
    interior = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            shifted = np.roll(padded, step, axis)
            interior &= shifted[1:-1, 1:-1, 1:-1]
    return mask & ~interior


def distances(points, target, spacing):
    """Exact distance in mm from each True voxel of `points` to the nearest one of `target`.

    points, target: bool (D, H, W) on a grid of voxels of `spacing` mm; neither is empty. Returns
    (N,) in no particular order. The squared distance is minimised over one axis after the other."""
    # The cheapest way for each axis depends on its length.
    shortest, middle, longest = np.argsort(target.shape)
    axes = [shortest, longest, middle]
    points = points.transpose(axes)
    target = target.transpose(axes)

    # Where the voxels lie along each axis, in mm.
    sizes = np.asarray(spacing, np.float32)[axes]
    x, y, z = (np.arange(n, dtype=np.float32) * size
               for n, size in zip(target.shape, sizes, strict=True))

    # Longest axis: the nearest voxel of a line is the last one before or the first one after.
    here = y[:, None]
    before = np.maximum.accumulate(np.where(target, here, -np.inf), axis=1)
    after = np.minimum.accumulate(np.where(target, here, np.inf)[:, ::-1], axis=1)[:, ::-1]
    in_line = np.minimum(here - before, after - here) ** 2

    # Shortest axis: try every shift from one line to another.
    in_plane = in_line.copy()
    for shift in range(1, len(x)):
        square = x[shift] ** 2
        np.minimum(in_plane[shift:], in_line[:-shift] + square, out=in_plane[shift:])
        np.minimum(in_plane[:-shift], in_line[shift:] + square, out=in_plane[:-shift])

    # Last axis: look up the points alone, a block at a time, which bounds the memory.
    i, j, k = np.nonzero(points)
    squares = []
    for block in np.array_split(np.arange(len(i)), len(i) // 4096 + 1):
        across = in_plane[i[block], j[block]]
        along = z - z[k[block], None]
        squares.append((across + along ** 2).min(axis=1))
    return np.sqrt(np.concatenate(squares))


def components(mask):
    """The connected component, by 26 neighbours, of each True voxel of a mask (D, H, W).

    Returns (N,) numbers in the order of np.nonzero: voxels with the same number are connected."""
    # A margin of False voxels gives every voxel of the mask its 26 neighbours.
    padded = np.pad(np.ascontiguousarray(mask), 1)

    # Number the True voxels; all others have -1.
    voxels = np.flatnonzero(padded)
    number = np.full(padded.size, -1, np.int32)
    number[voxels] = np.arange(len(voxels))

    # All pairs of neighbours. Half of the 26 directions find each pair once.
    firsts, seconds = [], []
    for direction in itertools.product((-1, 0, 1), repeat=3):
        if direction > (0, 0, 0):
            step = np.dot(padded.strides, direction)  # a bool is one byte, so strides count voxels
            neighbour = number[voxels + step]
            exists = neighbour >= 0
            firsts.append(np.flatnonzero(exists))
            seconds.append(neighbour[exists])
    first = np.concatenate(firsts)
    second = np.concatenate(seconds)

    # At first every voxel is a component of its own. Join them until no pair is apart.
    component = np.arange(len(voxels))
    while len(first):
        # Of two components that touch, the one with the larger number joins the other.
        one, other = component[first], component[second]
        np.minimum.at(component, np.maximum(one, other), np.minimum(one, other))

        # What has joined a component that has itself joined another one follows it there.
        while (component[component] != component).any():
            component = component[component]

        # Pairs within one component are settled.
        apart = component[first] != component[second]
        first = first[apart]
        second = second[apart]
    return component


def share_found(mask, other):
    """The share of the lesions of a mask that have a voxel in the other mask."""
    lesion = components(mask)
    found = lesion[other[mask]]
    return len(np.unique(found)) / len(np.unique(lesion))


def lesion_f1(prediction, truth):
    """F1 of lesions, which are connected components, as in the WMH challenge.

    A lesion of either mask is found if one of its voxels is in the other mask. F1 is the harmonic
    mean of the shares found of the true and of the predicted lesions. Neither mask is empty."""
    recall = share_found(truth, prediction)
    precision = share_found(prediction, truth)
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
    voxel_ml = float(np.prod(spacing)) / 1000
    predicted_ml = float(prediction.sum() * voxel_ml)
    true_ml = float(truth.sum() * voxel_ml)

    scores = dict.fromkeys(SCORES, math.nan)
    scores["dice"] = dice(prediction, truth, [True])[True]
    scores["ml"] = predicted_ml
    scores["ml_error"] = predicted_ml - true_ml

    # Without a surface in each mask there is no distance, and without a lesion no F1.
    empty = [not prediction.any(), not truth.any()]
    if all(empty):
        return scores
    if any(empty):
        return scores | {"nsd": 0.0, "f1": 0.0}

    # The box around both masks holds all that matters from here on.
    box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(prediction | truth))
    prediction = prediction[box]
    truth = truth[box]

    # Distances from each surface to the other one.
    predicted_surface = surface(prediction)
    true_surface = surface(truth)
    to_truth = distances(predicted_surface, true_surface, spacing)
    to_prediction = distances(true_surface, predicted_surface, spacing)
    both = np.concatenate([to_truth, to_prediction])

    scores["hd95"] = float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))
    scores["asd"] = float(both.mean())
    scores["nsd"] = float((both < TOLERANCE + 1e-4).mean())  # 1e-4 mm: float32 rounds
    scores["f1"] = lesion_f1(prediction, truth)
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
        [seen_in_pretraining(cases)],
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


def seen_in_pretraining(cases):
    """One sentence: how many of the evaluated scans the pretraining has seen, without labels."""
    if any(case["seen"] is None for case in cases):
        return "The checkpoint does not say which scans were seen in pretraining."
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
