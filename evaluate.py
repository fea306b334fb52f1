"""The cases of a fold (paper, section 4.1): segmented on their own grid, and scored."""

import dataclasses
import math

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import predict
import scans
import tasks
import training
from config import UserError


@torch.no_grad()
def evaluate_fold(model, task, seen, cases, folder, processes, stop, patch_size, precision, overlap, batch):
    """All scores of every case on the scan's own grid, the processes taking turns.

    -> records in the order of their cases, or None if a signal stopped it. seen: what data_seen says of the
    network. batch: windows at once.
    """
    model.eval()
    records = []
    share = cases[processes.rank::processes.world]
    with training.stop_all_on_error():
        for case in tqdm(share, disable=processes.rank != 0, desc=f"{folder} evaluate"):
            if stop.is_set():
                break
            try:
                volume, geometry, truth = data.read_case(case)
                classes = predict.segment(model, volume, geometry, patch_size, precision, overlap,
                                          batch=batch)
                scores = tasks.score_case(classes, truth, dataclasses.asdict(task), geometry["affine"])
            except (UserError, *scans.READ_ERRORS) as error:
                raise UserError(f"cannot evaluate {case.name}: {error}") from None
            records.append(record_of(case, task, seen, scores))
    stopped, = training.any_process(stop.is_set())
    if stopped:
        return None

    shares = [None] * processes.world
    dist.all_gather_object(shares, records)
    return sorted((record for share in shares for record in share), key=lambda record: record["case"])


def record_of(case, task, seen, scores):
    """What dice.json says of a case: what it was made of, whether the network has seen it, its scores."""
    same_scan = any(volume.sha256 in (seen["sha256"] or ()) for volume in case.volumes)
    known = None  # the checkpoint does not say
    if seen["sha256"] is not None:
        known = same_scan or case.subject in (seen["subjects"] or ())

    made_of = tasks.inputs_of([case])[case.name]
    record = {"case": case.name, "subject": case.subject, "sha256": made_of["sha256"],
              "label_sha256": made_of["label_sha256"], "seen": known, "same_scan": same_scan,
              "site": tasks.site(case) if task.sites else None}
    for kind, values in scores.items():
        record[kind] = {name: None if math.isnan(value) else round(value, 6)
                        for name, value in values.items()}
    return record
