"""Dice, surface distances, lesions of two masks (section 4); means over cases and folds."""

import itertools
import math

import numpy as np

TOLERANCE = 2.0  # mm, of the normalised surface Dice
SCORES = {"dice": "Dice", "hd95": "HD95 mm", "asd": "ASD mm", "nsd": f"NSD at {TOLERANCE:g} mm",
          "f1": "lesion F1", "ml": "ml", "ml_error": "ml in excess"}


def dice(prediction, truth, labels, ignore=None):
    """Dice of each label, {label: 2 TP / (2 TP + FP + FN)}: NaN if it is in neither, 0 if it is in one alone.

    prediction, truth: integer arrays of one shape. A label may be a tuple of values, scored as their union
    (whole tumour). ignore: value or values of the truth whose voxels do not count (WMH's label 2, the
    challenge's rule)."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    if ignore is not None:
        counted = ~np.isin(truth, ignore)
        prediction, truth = prediction[counted], truth[counted]
    scores = {}
    for label in labels:
        p, t = np.isin(prediction, label), np.isin(truth, label)
        voxels = p.sum() + t.sum()
        scores[label] = float(2 * (p & t).sum() / voxels) if voxels else float("nan")
    return scores


def surface(mask):
    """The voxels of a mask (D, H, W) with one of their six neighbours outside it or outside the grid."""
    padded, inside = np.pad(mask, 1), mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return mask & ~inside


def distances(points, target, spacing):
    """Distance in mm from every True voxel of `points` to the nearest of `target`: exact, in no order.

    The square is minimised axis by axis: along the longest, the nearest voxel is the last before or the first
    after; along the shortest, every shift is tried; along the third, only the points are looked up."""
    order = np.argsort(target.shape)[[0, 2, 1]]
    points, target = points.transpose(order), target.transpose(order)
    x, y, z = (np.arange(n, dtype=np.float32) * np.float32(s)
               for n, s in zip(target.shape, np.array(spacing)[order], strict=True))
    place = y[:, None]
    before = np.maximum.accumulate(np.where(target, place, -np.inf), 1)
    after = np.minimum.accumulate(np.where(target, place, np.inf)[:, ::-1], 1)[:, ::-1]
    along = np.minimum(place - before, after - place) ** 2
    best = along.copy()
    for shift in range(1, len(x)):
        np.minimum(best[shift:], along[:-shift] + x[shift] ** 2, out=best[shift:])
        np.minimum(best[:-shift], along[shift:] + x[shift] ** 2, out=best[:-shift])
    i, j, k = np.nonzero(points)
    parts = [(best[i[part], j[part]] + (z - z[k[part], None]) ** 2).min(1)
             for part in np.array_split(np.arange(len(i)), len(i) // 4096 + 1)]
    return np.sqrt(np.concatenate(parts))


def components(mask):
    """The connected component, by 26 neighbours, of each True voxel of (D, H, W): (N,) voxel numbers.

    Every voxel starts on its own; of two neighbours the larger number is hooked to the smaller."""
    padded = np.pad(np.ascontiguousarray(mask), 1)
    voxels = np.flatnonzero(padded)
    number = np.full(padded.size, -1, np.int32)
    number[voxels] = np.arange(len(voxels))
    pairs = []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        if offset > (0, 0, 0):
            other = number[voxels + np.dot(padded.strides, offset)]  # a bool is one byte
            pairs.append((np.flatnonzero(other >= 0), other[other >= 0]))
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    component = np.arange(len(voxels))
    while len(a):
        one, other = component[a], component[b]
        np.minimum.at(component, np.maximum(one, other), np.minimum(one, other))
        while (component[component] != component).any():
            component = component[component]
        apart = component[a] != component[b]
        a, b = a[apart], b[apart]
    return component


def lesion_f1(prediction, truth):
    """F1 of connected lesions, as in the WMH challenge: a lesion of either mask is found if one of its voxels
    is in the other mask; the harmonic mean of the share found of the true and of the predicted lesions."""
    shares = []
    for mask, other in ((truth, prediction), (prediction, truth)):
        lesion = components(mask)
        shares.append(len(np.unique(lesion[other[mask]])) / len(np.unique(lesion)))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def score(prediction, truth, spacing):
    """All of SCORES for two masks, bool (D, H, W), on a grid of voxels of `spacing` mm.

    hd95: the 95th percentile of the distances from one surface to the other, the larger of both directions.
    asd: their mean over both surfaces. nsd: the share of both within TOLERANCE of the other. ml: the volume
    predicted; ml_error: less the true one. Both masks empty: NaN, but for the volumes. One empty: dice, nsd
    and f1 are 0, the distances NaN."""
    voxel = float(np.prod(spacing)) / 1000
    ml, true_ml = float(prediction.sum() * voxel), float(truth.sum() * voxel)
    found = {name: float("nan") for name in SCORES} | {"ml": ml, "ml_error": ml - true_ml}
    if ml and true_ml:
        box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(prediction | truth))
        prediction, truth = prediction[box], truth[box]
        p, t = surface(prediction), surface(truth)
        to_truth, to_prediction = distances(p, t, spacing), distances(t, p, spacing)
        both = np.concatenate([to_truth, to_prediction])
        found |= {"hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))),
                  "asd": float(both.mean()), "nsd": float((both < TOLERANCE + 1e-4).mean()),  # rounding
                  "f1": lesion_f1(prediction, truth)}
    elif ml or true_ml:
        found |= {"nsd": 0.0, "f1": 0.0}
    return found | {"dice": dice(prediction, truth, [True])[True]}


def table(header, rows):
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def mean_dice(records, names, kind="dice"):
    """Mean over cases of the mean over `names`, and how many cases had none of them: as the official code, a
    label in neither truth nor prediction does not count. A case without any is dropped. kind: of SCORES."""
    scores = [[r[kind][n] for n in names if r[kind][n] is not None] for r in records]
    means = [sum(s) / len(s) for s in scores if s]
    return (sum(means) / len(means) if means else math.nan), len(scores) - len(means)


def spread(means):
    """Mean and standard deviation over folds, of those that have a value."""
    means = [m for m in means if not math.isnan(m)]
    return f"{np.mean(means):.2f} ± {np.std(means, ddof=1) if len(means) > 1 else 0:.2f}" if means else "-"


def summarise(run, folds):
    """dice.json and folds -> Markdown: Dice in percent for each fold, mean and standard deviation over folds
    as in the paper's Table 6; Dice of the groups that differ in what was seen; the other scores."""
    names, cfg, done = [*run["classes"], *run["regions"]], run["config"], sorted(run["folds"].items())
    columns = ({"mean": run["classes"]} if len(run["classes"]) > 1 else {}) | {n: [n] for n in names}
    rows = []
    for fold, records in done:
        means, dropped = zip(*(mean_dice(records, group) for group in columns.values()), strict=True)
        rows.append([fold, len(folds[fold]["train"]), len(records), *(f"{100 * m:.2f}" for m in means),
                     max(dropped)])

    def over_folds(belongs=lambda record: True):
        return [spread([100 * mean_dice(filter(belongs, records), group)[0] for _, records in done])
                for group in columns.values()]

    lines = [f"# {run['task']}, {run['model']}, {run['ckpt'] or 'from scratch'}", "",
             f"{cfg['steps']} steps, batch {cfg['batch_size']}, patch {cfg['patch_size']}, lr {cfg['lr']}, "
             f"augment {run['augment']}. Scores on each scan's own grid, Dice in percent. Dropped: cases "
             "with the label in neither truth nor prediction; for distances, also those with it in one.",
             "", *table(["fold", "trained on", "evaluated", *columns, "dropped"],
                               [*rows, ["mean ± SD", "", "", *over_folds(), ""]])]
    cases = {r["case"]: r for _, records in done for r in records}.values()
    seen, same = sum(bool(r["seen"]) for r in cases), sum(r["same_scan"] for r in cases)
    lines += ["", "The checkpoint does not say which scans were seen in pretraining."
              if any(r["seen"] is None for r in cases) else
              f"Of {len(cases)} evaluated scans {seen} were seen, unlabelled, in pretraining: {same} the "
              f"same file, {seen - same} another of the subject."]
    groups = {}
    if 0 < seen < len(cases):
        groups |= {"seen in pretraining": lambda r: r["seen"], "not seen": lambda r: not r["seen"]}
    if run["sites"]:
        groups |= {"sites of the training set": lambda r: r["site"] in run["sites"],
                   "other sites": lambda r: r["site"] not in run["sites"]}
    if groups:
        rows = [[title, sum(map(belongs, cases)), *over_folds(belongs)] for title, belongs in groups.items()]
        lines += ["", *table(["Dice of", "cases", *columns], rows)]
    rows = []
    for kind, title in list(SCORES.items())[1:]:
        cells = []
        for name in names:
            means, dropped = zip(*(mean_dice(records, [name], kind) for _, records in done), strict=True)
            cells += [spread(means), sum(dropped)]
        rows.append([title, *cells])
    header = ["mean ± SD", *(word for name in names for word in (name, "dropped"))]
    lines += ["", *table(header, rows)]
    return "\n".join(lines) + "\n"
