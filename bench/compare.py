"""What the intervals of compare.py cover, and how often its tests err, in simulated experiments.

    python bench/compare.py [--experiments 500]

Two runs of six folds, 40 cases a fold out of 60 patients, so that folds share patients. The gain of
a case is 2 Dice + what the two training runs of its fold make of it (fold SD) + what is its
patient's own, the same in every fold, + a rest; case SD is that of the last two. Each interval is
asked for two truths: the gain over all patients, and the gain over these 60.
"""

import argparse
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import compare  # noqa: E402

GAIN, FOLDS, CASES, PATIENTS = 2.0, 6, 40, 60


def experiment(rng, fold_sd, case_sd, share, gain=GAIN):
    """One experiment -> gain (N,), fold (N,), patient (N,), and the gain over its patients.

    share: of the variance of a case that is its patient's, the same in every fold."""
    own = rng.normal(0, case_sd * math.sqrt(share), PATIENTS)
    patient = np.concatenate([rng.permutation(PATIENTS)[:CASES] for _ in range(FOLDS)])
    fold = np.repeat(np.arange(FOLDS), CASES)
    rest = rng.normal(0, case_sd * math.sqrt(1 - share), len(fold))
    of_fold = rng.normal(0, fold_sd, FOLDS)
    return gain + of_fold[fold] + own[patient] + rest, fold, patient, gain + own.mean()


def rates(experiments, fold_sd, case_sd, share, resamples=10_000, seed=0):
    """Shares of the experiments in which something happens: (6,) in this order.

    The fold interval covers the gain over all patients, and that over these; the patient interval
    covers them, in the same order; the permutation test, and the t test, find a gain (p < .05)
    where there is none."""
    rng = np.random.default_rng(seed)
    hits = np.zeros(6)
    for number in range(experiments):
        gain, fold, patient, here = experiment(rng, fold_sd, case_sd, share)
        patient = np.unique(patient, return_inverse=True)[1]
        folds = compare.over_folds(gain, fold)
        patients = compare.over_patients(gain, patient, resamples, number)

        # What the two intervals cover.
        hits[:4] += [e.low <= truth <= e.high for e in (folds, patients) for truth in (GAIN, here)]

        # Without the true gain there is nothing to find.
        hits[4:] += [compare.over_patients(gain - GAIN, patient, resamples, number).p < 0.05,
                     compare.over_folds(gain - GAIN, fold).p < 0.05]
    return hits / experiments


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiments", type=int, default=500)
    experiments = parser.parse_args().experiments
    print(f"{experiments} experiments a row, in percent; one standard error is "
          f"{100 * math.sqrt(0.95 * 0.05 / experiments):.1f} at 95.\n\n"
          "| fold SD | case SD | patient's share | fold interval covers: all patients "
          "| these patients | patient interval covers: all patients | these patients "
          "| permutation test errs | t test errs |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for fold_sd, case_sd in ((0, 12), (1.5, 12), (1.5, 6)):
        for share in (0, 0.25, 0.5):
            shares = rates(experiments, fold_sd, case_sd, share)
            cells = [fold_sd, case_sd, share, *(f"{100 * s:.1f}" for s in shares)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
