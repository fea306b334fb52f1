"""study/RESULTS.md of what study/results holds: every claim with its verdict and its numbers.

    python study/report.py
"""

import argparse
import itertools
import json
import math
import os
import sys
from typing import NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import real  # noqa: E402

import checkpoint  # noqa: E402
import compare  # noqa: E402
import metrics  # noqa: E402
import study  # noqa: E402

SEEN, NOT_SEEN, CANNOT = "seen", "not seen", "cannot be seen at this scale"
OPPOSITE = "not seen: the opposite is"
WORTH = 5  # Dice %: a gain that would be worth finding
LABELS = study.LABELS

# What stands above the tables, a paragraph each.
HOW = [
    "A gain is the mean over six folds, paired, with its 95 % interval (t, over folds), as the "
    "first one of compare.py. It is of other training sets from one pool of labelled scans: folds "
    "draw 3 to 20 of 60 synthetic heads, 3 to 10 of 20 people or 12 patients, so their sets "
    "overlap. All folds share the unlabelled data, the tested scans, and the weights that a "
    "pretraining begins with. So it does not cover another pretraining, nor other scans. Claim l "
    "has other first weights.",
    f"A claim is **{SEEN}** if the interval is above 0. It is **{NOT_SEEN}** if the interval ends "
    f"below {WORTH} % of Dice: then no gain worth finding is left. If the interval is below 0, the "
    f"opposite is seen. Else it **{CANNOT}**. \"Could "
    "find\" is the gain that would be found in four of five tries. The verdicts are not corrected "
    f"for their number: one in forty claims without any truth in it is \"{SEEN}\".",
    "Heads, tasks, steps and rates were chosen by pilots with 5 and 20 labelled scans in folds 0 "
    "and 1 of these cohorts, from scratch and pretrained. These folds count here as well. The "
    "longest pretraining without skips (`base-noskips`) and claim j were added when results "
    "of claims c to f were known, and claims k and l when all of those were. The first weights on "
    "real heads were added when all but augmentation was known there."]


def read_results(runs):
    """{name: result} of those runs that are done, with the settings that they have now."""
    results = {}
    for run in filter(study.is_done, runs):
        with open(os.path.join(study.RESULTS, f"{run.name}.json"), encoding="utf-8") as file:
            results[run.name] = json.load(file)
    return results


# ----------------------------------------------------------------------------------------- numbers
def fold_means(result):
    """Mean Dice in percent of each fold."""
    means = []
    for fold in sorted(result["dice"], key=int):
        values = [value for dice in result["dice"][fold].values() for value in dice.values()]
        means.append(100 * np.mean([value for value in values if value is not None]))
    return np.array(means)


def differences_of(results, after, before):
    """The gain of one run over another in each fold, in percent, or None if one is missing.

    As in compare.py, a case without a Dice in one of the two is left out of both."""
    if after not in results or before not in results:
        return None
    gains = []
    for fold in sorted(results[after]["dice"], key=int):
        pairs = []
        for case, scores in results[after]["dice"][fold].items():
            others = results[before]["dice"][fold][case]
            pairs += [(scores[name], others[name]) for name in scores]
        known = [new - old for new, old in pairs if None not in (new, old)]
        gains.append(100 * np.mean(known))
    return np.array(gains)


def gain(results, after, before):
    """The paired gain of one run over another -> compare.Estimate, or None if one is missing."""
    differences = differences_of(results, after, before)
    if differences is None:
        return None
    return compare.over_folds(differences, np.arange(len(differences)))


def verdict(estimate):
    """Of a claim that says: better."""
    if estimate.low > 0:
        return SEEN
    if estimate.high < 0:
        return OPPOSITE
    return NOT_SEEN if estimate.high < WORTH else CANNOT


def cells(estimate):
    return [f"{estimate.gain:+.2f}", f"{estimate.low:+.2f} to {estimate.high:+.2f}",
            f"{estimate.smallest:.2f}", verdict(estimate)]


def last(result):
    return result["log"][-1]


def table(header, rows):
    return "\n".join(metrics.table(header, rows))


# ------------------------------------------------------------------------------------------ claims
class Comparison(NamedTuple):
    """A claim about Dice: one run scores more than another."""
    claim: str  # its letter
    text: str
    after: str
    before: str


def with_start(name, n=5, preset="spatial", form=""):
    """The finetuning that starts from a pretraining, or from scratch. form: as in study.py."""
    return study.name_of_finetuning(name, study.TASK, n, preset, form)


# The longest pretrainings, as a claim names them.
LONGEST = (("", "base"), (" without skips", "base-noskips"))

# Pretrainings that begin with other weights than the rest, and these weights without pretraining.
SEEDS = ("", "-seed1", "-seed2")

# Pretrainings that vary one thing are a quarter as long as the longest, as `quarter` is.
COMPARISONS = [
    *(Comparison("b", f"pretraining helps with {n} labelled scans, {preset} augmentation",
                 with_start("base", n, preset), with_start("scratch", n, preset))
      for preset in ("spatial", "all") for n in LABELS),
    *(Comparison("b", f"pretraining without skips helps with {n} labelled scans, spatial "
                 "augmentation", with_start("base-noskips", n), with_start("scratch", n))
      for n in LABELS),
    *(Comparison("b", f"pretraining helps with 5 labelled scans: {task}",
                 study.name_of_finetuning("base", task, 5, "spatial"),
                 study.name_of_finetuning("scratch", task, 5, "spatial"))
      for task in ("white", "cortex")),
    *(Comparison("c", f"the longest pretraining is better than 1/{part} of it",
                 with_start("base"), with_start(name))
      for part, name in ((8, "length8"), (4, "quarter"), (2, "half"))),
    Comparison("d", "the light decoder is better than the standard one", with_start("quarter"),
               with_start("standard")),
    Comparison("e", "pretraining without skips is better", with_start("noskips"),
               with_start("quarter")),
    Comparison("e", "the longest pretraining without skips is better than with them",
               with_start("base-noskips"), with_start("base")),
    Comparison("e", "the longest pretraining without skips is better than 1/4 of it",
               with_start("base-noskips"), with_start("noskips")),
    Comparison("f", "all augmentations in pretraining are better than none", with_start("quarter"),
               with_start("augment-none")),
    Comparison("f", "all augmentations are better than the spatial ones", with_start("quarter"),
               with_start("augment-spatial")),
    Comparison("f", "the clean target is better than the augmented one", with_start("quarter"),
               with_start("augmented-target")),
    *(Comparison("g", f"pretraining{words} helps on another grid and other contrasts",
                 with_start(start, form="moved"), with_start("scratch", form="moved"))
      for words, start in LONGEST),
    *(Comparison("h", f"60 % in tokens of 4 are better than {words}", with_start("quarter"),
                 with_start(name))
      for words, name in (("30 %", "mask30"), ("80 %", "mask80"), ("tokens of 2", "token2"),
                          ("tokens of 8", "token8"))),
    *(Comparison("i", f"an encoder that stays as it is helps more if pretrained{words}, {n} "
                 "labelled scans", with_start(start, n, form="frozen"),
                 with_start("scratch", n, form="frozen"))
      for words, start in LONGEST for n in (5, 20)),
    *(Comparison("j", f"a pretrained encoder{words} is better if scaled to the size of a new one, "
                 f"{n} labelled scans", with_start(start, n, form="scaled"), with_start(start, n))
      for words, start in LONGEST for n in (5, 20)),
    *(Comparison("j", f"pretraining{words} helps if the encoder is scaled, {n} labelled scans",
                 with_start(start, n, form="scaled"), with_start("scratch", n))
      for words, start in LONGEST for n in (5, 20)),
    *(Comparison("k", "a pretrained encoder without skips is better if its first level is new, "
                 f"{n} labelled scans", with_start("base-noskips", n, form="renewed"),
                 with_start("base-noskips", n)) for n in LABELS),
    Comparison("k", "a pretrained encoder is better if its first level is new, 5 labelled scans",
               with_start("base", form="renewed"), with_start("base")),
    *(Comparison("k", f"pretraining without skips helps if the first level is new, {n} labelled "
                 "scans", with_start("base-noskips", n, form="renewed"), with_start("scratch", n))
      for n in LABELS),
    *(Comparison("l", f"pretraining helps over the same first weights{seed.replace('-', ', ')}",
                 with_start(f"base{seed}"), with_start(f"untrained{seed}")) for seed in SEEDS),
    *(Comparison("l", f"pretraining{words} helps over the same first weights, {n} labelled scans",
                 with_start(start, n), with_start("untrained", n))
      for words, start, n in (("", "base", 20), (" without skips", "base-noskips", 5),
                              (" without skips", "base-noskips", 20))),
    *(Comparison("l", f"an encoder that stays as it is helps more than its first weights if "
                 f"pretrained{words}, {n} labelled scans", with_start(start, n, form="frozen"),
                 with_start("untrained", n, form="frozen"))
      for words, start in LONGEST for n in (5, 20)),
]


def is_pretraining(name):
    """Is this the name of a pretraining, and not of first weights alone?"""
    return name.startswith("pretrain-") and "untrained" not in name


def errors(results):
    """a: errors of hidden voxels of all pretrainings."""
    rows = []
    for name in sorted(results):
        if is_pretraining(name):
            end, early = last(results[name]), results[name]["log"][0]
            below = "yes" if end["val_masked"] < end["val_fill"] else "no"
            grown = f"{end['weights']:.1f}" if "weights" in end else "-"  # not in older results
            rows.append([name.removeprefix("pretrain-"), end["step"], f"{early['val_masked']:.4f}",
                         f"{end['val_masked']:.4f}", f"{end['val_masked_scaled']:.4f}",
                         f"{end['val_fill']:.4f}", below,
                         f"{end['val_masked_head']:.4f}", f"{end['val_fill_head']:.4f}",
                         f"{end['val_mean_r']:.2f}", grown, f"{end['seconds']:.2f}"])
    return table(["pretraining", "steps", "first look", "at the end", "scaled", "fill",
                  "below the fill", "head", "fill, head", "r of means", "weights grown",
                  "s a step"], rows)


def claims(results):
    """b to l: what each says, with its verdict and the command that runs it."""
    rows = []
    for claim, text, after, before in COMPARISONS:
        found = gain(results, after, before)
        means = [f"{fold_means(results[name]).mean():.2f}" if name in results else "-"
                 for name in (before, after)]
        found = cells(found) if found else ["-", "-", "-", "not run yet"]
        rows.append([claim, text, *means, *found, f"`python study/study.py --only {claim}`"])
    return table(["", "claim", "without, Dice %", "with, Dice %", "gain", "95 % interval",
                  "could find", "verdict", "command"], rows)


def real_heads(results):
    """Gains on real heads (study/real.py): deep regions in T1, whole tumours in FLAIR."""
    rows = []
    for task, preset, n, start, against in itertools.product(
            ("tumour", "deep"), ("spatial", "all"), LABELS, ("real", "real-noskips"),
            ("scratch", "real-untrained")):
        before, after = (study.name_of_finetuning(word, task, n, preset)
                         for word in (against, start))
        found = gain(results, after, before)
        if found:
            skips = "no" if "noskips" in start else "yes"
            words = "scratch" if against == "scratch" else "the same first weights"
            means = [f"{fold_means(results[name]).mean():.2f}" for name in (before, after)]
            rows.append([task, n, preset, skips, words, *means, *cells(found)])
    if not rows:
        return "Not run yet."
    return table(["task", "labelled", "augmentation", "skips", "against", "without", "pretrained",
                  "gain", "95 % interval", "could find", "pretraining helps"], rows)


# Claim b has a curve over the labelled scans for each of these: its words, start and augmentation.
CURVES = (("spatial augmentation", "base", "spatial"),
          ("spatial augmentation, pretrained without skips", "base-noskips", "spatial"),
          ("all augmentation", "base", "all"))


# Several comparisons that have one mean: what they vary, in words, and the names (after, before).
POOLED = [
    *((f"b, {words}, mean over {{}} numbers of labelled scans",
       [(with_start(start, n, preset), with_start("scratch", n, preset)) for n in LABELS])
      for words, start, preset in CURVES),
    *((f"b, {words}, mean over {{}} numbers of labelled scans",
       [(with_start(start, n, "spatial"), with_start("scratch", n, "all")) for n in LABELS])
      for words, start in (
          ("as the paper compares: pretrained and spatial augmentation, against scratch and all "
           "augmentation", "base"),
          ("as the paper compares, pretrained without skips", "base-noskips"),
          ("from scratch, spatial augmentation against all", "scratch"))),
    *((f"k, pretrained without skips, the first level new, against {words}, mean over {{}} numbers "
       "of labelled scans",
       [(with_start("base-noskips", n, form="renewed"), with_start(before, n)) for n in LABELS])
      for words, before in (("pretrained, too", "base-noskips"), ("scratch", "scratch"))),
    *((f"real heads, {words}, {preset} augmentation, pretrained with skips against {against}, mean "
       "over {} numbers of labelled people",
       [tuple(study.name_of_finetuning(start, task, n, preset) for start in ("real", before))
        for n in LABELS])
      for task, words in (("tumour", "tumours"), ("deep", "deep regions"))
      for preset, before, against in (
          ("spatial", "scratch", "scratch"), ("all", "scratch", "scratch"),
          ("spatial", "real-untrained", "the same first weights"))),
]

# Comparisons of which each has first weights of its own.
OVER_SEEDS = [
    ("l, pretrained against the same first weights as they were, mean over {} first weights",
     [(with_start(f"base{seed}"), with_start(f"untrained{seed}")) for seed in SEEDS]),
    ("l, first weights that all folds share against own ones of each, mean over {} first weights",
     [(with_start(f"untrained{seed}"), with_start("scratch")) for seed in SEEDS]),
]


def pooled(results):
    """Means over several comparisons, in one line each."""
    lines = []
    for words, pairs in POOLED + OVER_SEEDS:
        differences = gains_that_are_there(results, pairs)
        if len(differences) < 2:
            continue
        count = len(differences)

        # Of first weights, these are what is drawn: the interval is over them.
        over = ""
        if (words, pairs) in OVER_SEEDS:
            over = ", interval over these"
            differences = np.transpose(differences)
        lines.append(f"* {words.format(count)}{over}: {mean_of(differences)}")
    return "\n".join(lines) or "Too few runs are done yet."


def first_weights(start):
    """What a pretraining begins with, as a run of its own."""
    seed = next((seed for seed in SEEDS[1:] if start.endswith(seed)), "")
    return f"untrained{seed}"


def over_pretrainings(results):
    """b, l: the gain of any pretraining with 5 labelled scans. No single one is picked."""
    starts = [name.removeprefix("pretrain-") for name in filter(is_pretraining, results)]
    against = {"scratch": ["scratch"] * len(starts),
               "the same first weights as they were": [first_weights(start) for start in starts]}
    lines = []
    for words, before in against.items():
        pairs = zip(map(with_start, starts), map(with_start, before), strict=True)
        differences = gains_that_are_there(results, pairs)
        if len(differences) > 1:
            better = sum(found.mean() > 0 for found in differences)
            lines.append(f"* 5 labelled scans, spatial augmentation, against {words}, mean over "
                         f"{len(differences)} pretrainings, of which {better} point up: "
                         f"{mean_of(differences)}")
    return "\n".join(lines) or "Not all pretrainings are done yet."


def gains_that_are_there(results, pairs):
    """The gains in each fold of those pairs of runs, (after, before), of which both are done."""
    found = [differences_of(results, after, before) for after, before in pairs]
    return [differences for differences in found if differences is not None]


def mean_of(differences):
    """The mean over several comparisons, with its interval and verdict, in words.

    differences: (comparisons, folds). They share their folds: the training sets are the same, or
    nested. So the folds alone are drawn independently, and the interval is over them."""
    means = np.mean(differences, 0)
    size, interval, smallest, word = cells(compare.over_folds(means, np.arange(len(means))))
    return f"{size} ({interval}; could find {smallest}): {word}."


def worth(results):
    """b: how many labelled scans from scratch score what a pretrained start has with n of them."""
    lines = []
    for words, start, preset in CURVES:
        curves = []
        for word in ("scratch", start):
            names = [with_start(word, n, preset) for n in LABELS]
            if not set(names) <= set(results):
                break
            curves.append([fold_means(results[name]).mean() for name in names])
        if len(curves) < 2:
            continue
        scratch, pretrained = curves
        for n, score in zip(LABELS, pretrained, strict=True):
            lines.append(f"* {words}: {n} labelled scans, as from scratch with "
                         f"{labels_for(score, scratch)}.")
    note = ("Where the curve from scratch is flat, the steps of finetuning limit it, and these "
            "numbers say little.")
    return "\n".join([note, "", *lines]) if lines else "Not all runs of b are done yet."


def labels_for(score, scratch):
    """The number of labelled scans at which the curve of scratch has the score, in words."""
    # Between two points the curve is a line over the logarithm of the number.
    highest = np.maximum.accumulate(scratch)
    if score <= highest[0]:
        return f"{LABELS[0]} or fewer"
    if score > highest[-1]:
        return f"more than {LABELS[-1]}"
    after = int(np.argmax(highest >= score))  # the first number that reaches it
    steps = highest[after - 1:after + 1]
    return f"{math.exp(np.interp(score, steps, np.log(LABELS[after - 1:after + 1]))):.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=study.SIZES, default="cpu")
    size = study.use_size(parser.parse_args().size)

    planned = study.all_runs(size)
    results = read_results(planned + real.all_runs(size))
    done = [run for run in planned if run.name in results]
    hours = sum(results[run.name]["seconds"] for run in done) / 3600
    parts = [
        "# The paper in miniature", *HOW,
        f"Made by `make study`; {len(done)} of its {len(planned)} runs are done. Their last starts "
        f"took {hours:.1f} hours together.",
        "## a. Errors of hidden voxels, beside the best Gaussian fill", errors(results),
        "Each row is one pretraining. Rows named `real` are of real heads (study/real.py), the "
        "others of synthetic ones. `wide` is twice as wide. `seed1` and `seed2` hold out other "
        "scans than the rest, so their errors are of other patches.",
        "## b to l. Dice of lesions in synthetic heads", "Labelled scans have nearly one contrast, "
        "as those of the paper's tasks. Where a claim names another task, no contrast is seen "
        "twice. Those of pretraining are with 5 labelled scans.", claims(results),
        "## Means over several of these", pooled(results), over_pretrainings(results),
        "## b. What a pretrained start is worth", worth(results),
        "## Real heads in voxels of 4 mm: Dice %",
        "`python study/real.py --oasis FOLDER --gliomas FOLDER`; ten "
        "people, two of them in two scans, and eight patients are tested. No network has seen "
        "anything of them.",
        real_heads(results)]
    text = "\n\n".join(parts) + "\n"
    checkpoint.write_text(f"{study.RESULTS.replace('results', 'RESULTS')}.md", text)
    print(text)


if __name__ == "__main__":
    main()
