"""How much of a scan's fine detail the first level of an encoder carries.

    python study/detail.py study/work/pretrain-base/last.pt study/work/pretrain-base-noskips/last.pt

Fine detail is a voxel less the mean of the 27 around it. A linear function of the channels of the
first level guesses it, fitted on ten of the tested heads of the cohort `alike` and scored on ten
others: 1 is all of it, 0 none. Also the number of channels that are independent of each other.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import checkpoint  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402
from config import UserError  # noqa: E402

HEADS = 20
AIR = 0.02  # of the [0, 1] of a prepared scan: voxels below are outside of the head


def tested_heads():
    """The first tested heads of the cohort, (1, D, H, W) each."""
    cases = tasks.labelled_cases(os.path.join(study.DATA, "alike"), "phantoms_d", ("MR",))
    tested = [case for case in cases if case.volumes[0].split == "test"]
    return [torch.as_tensor(np.asarray(data.read_scan(case)[0])).float() for case in tested[:HEADS]]


def first_level(path):
    """The first level of a checkpoint's encoder."""
    saved = checkpoint.load_checkpoint(path)
    model = models.build_model(saved["row"], "segment", features=saved["config"]["features"])
    checkpoint.load_weights(model, saved, part="encoder")
    return model.encoder.in_conv.eval()


@torch.no_grad()
def voxels_of(level, head):
    """Channels (N, f) and fine detail (N) of the N voxels of a head."""
    detail = (head - F.avg_pool3d(head[None], 3, 1, 1)[0])[0]
    inside = head[0] > AIR
    return level(head[None])[0][:, inside].T, detail[inside]


def explained(channels, values, new_channels, new_values):
    """The share of the variance of new_values that a linear function explains, fitted on values."""
    mean, deviation = channels.mean(0), channels.std(0) + 1e-6
    known = (channels - mean) / deviation
    square = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1])
    weights = torch.linalg.solve(square, known.T @ (values - values.mean()))

    guess = (new_channels - mean) / deviation @ weights + values.mean()
    rest = (new_values - guess).square().mean()
    return 1 - (rest / (new_values - new_values.mean()).square().mean()).item()


def independent(channels):
    """How many channels are independent: exp of the entropy of their correlations' eigenvalues."""
    share = torch.linalg.eigvalsh(torch.atleast_2d(torch.corrcoef(channels.T)))
    share = share.clamp(min=1e-9) / share.sum()
    return torch.exp(-(share * share.log()).sum()).item()


def measure(level, heads):
    """-> how much detail the first level carries, and how many of its channels are independent."""
    pairs = [voxels_of(level, head) for head in heads]
    half = len(pairs) // 2
    fitted, scored = ([torch.cat(part) for part in zip(*some, strict=True)]
                      for some in (pairs[:half], pairs[half:]))
    return explained(*fitted, *scored), independent(torch.cat([fitted[0], scored[0]]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    paths = parser.parse_args().checkpoints
    try:
        heads = tested_heads()
        for path in paths:
            carried, channels = measure(first_level(path), heads)
            print(f"{path}: detail {carried:.3f}, independent channels {channels:.1f}")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
