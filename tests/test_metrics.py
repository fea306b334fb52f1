"""Dice, and the summary of a run."""

import dataclasses
import math

import numpy as np
import pytest

import finetune
import metrics


def test_dice_rules():
    truth = np.array([1, 1, 0, 2, 0, 0])
    found = np.array([1, 0, 0, 1, 0, 0])
    scores = metrics.dice(found, truth, [1, 2, 3, (1, 2)])
    assert scores[1] == 0.5 and scores[2] == 0 and math.isnan(scores[3]) and scores[1, 2] == 0.8
    assert metrics.dice(found, truth, [1], ignore=2)[1] == pytest.approx(2 / 3)
    assert metrics.dice(np.array([3]), np.array([0]), [3])[3] == 0
    with pytest.raises(ValueError, match="shape"):
        metrics.dice(found, truth[:3], [1])


def record(case, dice, seen, site, hd95):
    """A record of dice.json, of the class a and the region b, which no case has."""
    scores = {kind: {"a": 0.5, "b": None} for kind in metrics.SCORES}
    scores |= {"dice": {"a": dice, "b": None}, "hd95": {"a": hd95, "b": None}}
    return {"case": case, "subject": case, "seen": seen, "same_scan": seen, "site": site} | scores


def test_summary_of_groups_and_dropped_cases():
    done = {}
    for fold in range(2):
        done[fold] = [record("x", 0.5 + fold / 10, True, "Utrecht", 3.0),
                      record("y", 0.1, False, "GE1T5", None),
                      record("z", None, False, "GE1T5", None)]
    result = {"task": "t", "model": "unet_b", "ckpt": "c.pt", "augment": "all", "classes": ["a"],
              "regions": ["b"], "sites": ["Utrecht"], "folds": done,
              "config": dataclasses.asdict(finetune.Config("t", lr=1e-4))}
    lines = metrics.summarise(result, [{"train": ["u"] * 20}] * 2).splitlines()
    for line in ("| 0 | 20 | 3 | 30.00 | nan | 3 |",
                 "| mean ± SD |  |  | 32.50 ± 3.54 | - |  |",
                 "| seen in pretraining | 1 | 55.00 ± 7.07 | - |",
                 "| not seen | 2 | 10.00 ± 0.00 | - |",
                 "| sites of the training set | 1 | 55.00 ± 7.07 | - |",
                 "| other sites | 2 | 10.00 ± 0.00 | - |",
                 "| HD95 mm | 3.00 ± 0.00 | 4 | - | 6 |",
                 "| lesion F1 | 0.50 ± 0.00 | 0 | - | 6 |",
                 "Of 3 evaluated scans 1 were seen, unlabelled, in pretraining: 1 the same file, 0 "
                 "another of the subject."):
        assert line in lines, "\n".join(lines)

    for records in done.values():
        records[0]["seen"] = None
    assert "does not say which scans" in metrics.summarise(result, [{"train": []}] * 2)
