"""study/RESULTS.md of what study/results holds: every claim with its verdict and its numbers.

    python study/report.py

An interval is of the mean gain over the six folds, paired, as compare.py's first one: of new
training sets, for the same unlabelled data and the same tested scans. All folds share both, so the
interval does not cover another pretraining, nor other scans.
"""

import glob
import json
import math
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import checkpoint  # noqa: E402
import compare  # noqa: E402
import metrics  # noqa: E402
import study  # noqa: E402

SEEN, NOT_SEEN, CANNOT = "seen", "not seen", "cannot be seen at this scale"
LABELS = (3, 5, 10, 20)


def read_results():
    results = {}
    for path in glob.glob(os.path.join(HERE, "results", "*.json")):
        with open(path, encoding="utf-8") as file:
            results[os.path.basename(path).removesuffix(".json")] = json.load(file)
    return results


# ----------------------------------------------------------------------------------------- numbers
def fold_means(result):
    """Mean Dice in percent of each fold."""
    means = []
    for fold in sorted(result["dice"], key=int):
        values = [value for dice in result["dice"][fold].values() for value in dice.values()]
        means.append(100 * np.mean([value for value in values if value is not None]))
    return np.array(means)


def gain(results, after, before):
    """The paired gain of one run over another -> compare.Estimate, or None if one is missing."""
    if after not in results or before not in results:
        return None
    differences = fold_means(results[after]) - fold_means(results[before])
    return compare.over_folds(differences, np.arange(len(differences)))


def verdict(estimate):
    """Of a claim that says: better."""
    if estimate.low > 0:
        return SEEN
    return NOT_SEEN if estimate.smallest < 5 or estimate.high < 0 else CANNOT


def cells(estimate):
    return [f"{estimate.gain:+.2f}", f"{estimate.low:+.2f} to {estimate.high:+.2f}",
            f"{estimate.smallest:.2f}", verdict(estimate)]


def last(result):
    return result["log"][-1]


def table(header, rows):
    return "\n".join(metrics.table(header, rows))


# ------------------------------------------------------------------------------------------ claims
def errors(results):
    """a: errors of hidden voxels of all pretrainings."""
    rows = []
    for name in sorted(results):
        if name.startswith("pretrain-"):
            end, early = last(results[name]), results[name]["log"][0]
            below = "below" if end["val_masked"] < end["val_fill"] else "above"
            rows.append([name.removeprefix("pretrain-"), end["step"], f"{early['val_masked']:.4f}",
                         f"{end['val_masked']:.4f}", f"{end['val_fill']:.4f}", below,
                         f"{end['val_masked_head']:.4f}", f"{end['val_fill_head']:.4f}",
                         f"{end['val_mean_r']:.2f}"])
    return table(["pretraining", "steps", "error after 1/8", "at the end", "fill", "fill?",
                  "head", "fill, head", "r of means"], rows)


def labels(results):
    """b: Dice over the number of labelled scans."""
    rows = []
    for task in ("lesion", "white", "ventricles"):
        for preset in ("spatial", "all"):
            for n in LABELS:
                names = [f"{task}-{n}-{preset}-{start}" for start in ("scratch", "base")]
                found = gain(results, names[1], names[0])
                if found:
                    means = [f"{fold_means(results[name]).mean():.2f}" for name in names]
                    rows.append([task, n, preset, *means, *cells(found)])
    if not rows:
        return "Not run yet."
    return table(["task", "labelled", "augmentation", "scratch", "pretrained", "gain",
                  "95 % interval", "could find", "pretraining helps"], rows)


def variants(results):
    """c to h: Dice with 5 labelled scans after other pretrainings."""
    rows = []
    base = "lesion-5-spatial-base"
    for name in sorted(results):
        if not name.startswith("lesion-5-spatial-") or name == base:
            continue
        found = gain(results, base, name)
        if found:
            rows.append([name.removeprefix("lesion-5-spatial-"),
                         f"{fold_means(results[name]).mean():.2f}",
                         f"{fold_means(results[base]).mean():.2f}", *cells(found)[:3]])
    if not rows:
        return "Not run yet."
    moved = gain(results, f"moved-{base}", "moved-lesion-5-spatial-scratch")
    text = table(["pretraining", "its Dice", "that of base", "base over it", "95 % interval",
                  "could find"], rows)
    if moved:
        text += "\n\nOut of domain (g): " + ", ".join(cells(moved))
    return text


def main():
    results = read_results()
    hours = sum(entry["log"][-1]["step"] * entry["log"][-1]["seconds"] for entry in
                results.values() if "log" in entry) / 3600
    planned = study.all_runs(study.SIZES["cpu"])
    done = sum(run.name in results for run in planned)
    known = f"{done} of its {len(planned)} runs are done"
    parts = [
        "# The paper in miniature", __doc__.split("\n\n")[2].replace("\n", " "),
        f"Made by `make study`; {known}. Pretraining took {hours:.1f} hours of a core.",
        "## a. Errors of hidden voxels, beside the best Gaussian fill", errors(results),
        "Rows named `real` are of real heads (study/real.py), the others of synthetic ones.",
        "## b. Label efficiency: Dice %", labels(results),
        "## c to h. Other pretrainings, 5 labelled scans, spatial augmentation", variants(results)]
    text = "\n\n".join(parts) + "\n"
    assert not math.isnan(hours)
    checkpoint.write_text(os.path.join(HERE, "RESULTS.md"), text)
    print(text)


if __name__ == "__main__":
    main()
