"""Does an encoder learn what section 3.1 claims and does not measure? Invariance to intensity,
equivariance to space, and the Dice of finetuned networks on corrupted scans.

    python bench/invariance.py runs/unet_xl/last.pt runs/unet_xl-no_augment/last.pt \\
        [--data DIR] [--patches 8]
    python bench/invariance.py runs/wmh-unet_xl-scratch/fold_0/last.pt \\
        runs/wmh-unet_xl-amaes/fold_0/last.pt

Of pretraining checkpoints: features of the encoder's five levels on held-out patches, and beside
them the same network with random weights. The similarity is the correlation of two feature maps,
each channel less its mean over all patches: 1 where a change of the input changes nothing. `other
patch` is what unrelated inputs give. Invariance: the transforms of Table 5 at half strength.
Equivariance: a quarter turn or a flip before the encoder, against after it, where no interpolation
is in the way.

Of finetuned checkpoints: mean Dice of their fold's cases, on the prepared grid, under five
strengths of noise, gamma, bias field and lost resolution together.
"""

import argparse
import dataclasses
import math
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import augment  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import devices  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import predict  # noqa: E402
import pretrain  # noqa: E402
import tasks  # noqa: E402

INTENSITY = {
    "noise": lambda x: augment.gaussian_noise(x, 0.05, 0),
    "gamma": lambda x: augment.gamma(x, 1.5, False),
    "bias field": lambda x: augment.bias_field(x, [n / 3 for n in x.shape[1:]]).clamp(0, 1),
    "blur": lambda x: augment.gaussian_blur(x, 0.75),
    "low resolution": lambda x: augment.low_resolution(x, [n * 2 // 3 for n in x.shape[1:]]),
    "ghosting": lambda x: augment.motion_ghosting(x, 0.7, 4, 0),
}
SPACE = {"quarter turn": lambda x: torch.rot90(x, 1, (-3, -2)), "flip": lambda x: x.flip(-1)}


def correlation(a, b):
    """Mean over levels of the correlation of two lists of feature maps (N, C, d, h, w)."""
    levels = []
    for first, second in zip(a, b, strict=True):
        first = first - first.mean((0, 2, 3, 4), keepdim=True)
        second = second - second.mean((0, 2, 3, 4), keepdim=True)
        levels.append((first * second).sum() / (first.norm() * second.norm()).clamp(min=1e-12))
    return torch.stack(levels).mean().item()


@torch.no_grad()
def similarities(encoder, patches):
    """{change: similarity} of one encoder on patches (N, 1, s, s, s)."""
    def features(x):
        return [level.contiguous().float() for level in encoder(x)]

    plain = features(patches)
    row = {"other patch": correlation(plain, [level.roll(1, 0) for level in plain])}
    for name, change in INTENSITY.items():
        row[name] = correlation(plain, features(torch.stack([change(x) for x in patches])))
    for name, change in SPACE.items():
        row[name] = correlation([change(level) for level in plain], features(change(patches)))
    return row


def pretrained(paths, folder, count):
    """Rows of the first table: every checkpoint, then random weights."""
    checkpoints = [checkpoint.load_checkpoint(path) for path in paths]
    cfg = dataclasses.replace(pretrain.Config(), **checkpoints[0]["config"])
    cfg = dataclasses.replace(cfg, data=folder or cfg.data)
    _, held_out, _ = pretrain.open_data(cfg.data, cfg.val_fraction, cfg.seed)

    # The same patches for all: one of each held-out volume, then a second of each ...
    dataset = data.Crops(held_out, cfg.patch_size, 1, "none")
    batch = data.collate([dataset[i // len(held_out), i % len(held_out)] for i in range(count)])
    crops, _ = data.to_device(batch, torch.device("cpu"))
    patches, _ = augment.spatial(crops, None, batch.draws)

    table = {}
    for name, saved in [*zip(paths, checkpoints, strict=True), ("random weights", None)]:
        torch.manual_seed(1)
        model = models.build_model(cfg.model, "pretrain", merge=cfg.merge,
                                   features=cfg.features).eval()
        if saved:
            checkpoint.load_weights(model, saved, part="encoder")
        table[name] = similarities(devices.quicken(model, "cpu").encoder, patches.float())
    return table


def corrupted(x, strength):
    """(C, D, H, W) in [0, 1] under noise, gamma, bias and lost resolution, of strength 0 to 5."""
    if not strength:
        return x
    x = augment.gamma(x, 1 + 0.2 * strength, False)
    field = augment.bias_field(x, [n / 3 for n in x.shape[1:]]).clamp(0, 1)
    x = x.lerp(field, 0.15 * strength)
    x = augment.low_resolution(x, [max(8, int(n * (1 - 0.1 * strength))) for n in x.shape[1:]])
    return augment.gaussian_noise(x, 0.02 * strength, 0).clamp(0, 1)


def finetuned(paths, folder, count):
    """{checkpoint: {strength: mean Dice in percent}}."""
    table = {}
    for path in paths:
        model, saved = predict.load_network(path, torch.device("cpu"))
        task = saved["task"]
        cases = tasks.labelled_cases(folder or task["data"], task["source"], task["sequences"])
        cases = [case for case in cases if case.name not in saved["cases"]][:count]
        classes = data.class_table(task["labels"], task["ignore"])
        table[path] = {}
        for strength in range(6):
            scores = []
            for case in cases:
                volume, _ = data.read_scan(case)
                image = corrupted(volume.float(), strength)
                side = saved["config"]["patch_size"]
                logits = predict.sliding_window(model, image, side, batch=4)
                truth = classes[np.load(case.label)]
                found = metrics.dice(logits.argmax(0).numpy(), truth,
                                     range(1, len(task["classes"])), data.IGNORE)
                scores += [score for score in found.values() if not math.isnan(score)]
            table[path][f"strength {strength}"] = 100 * sum(scores) / max(1, len(scores))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", help="prepared folder, instead of the checkpoints' own")
    parser.add_argument("--patches", type=int, default=8,
                        help="patches, or cases of a finetuned network")
    arguments = parser.parse_args()
    kinds = {checkpoint.load_checkpoint(path).get("kind") for path in arguments.checkpoints}
    if kinds not in ({"pretrain"}, {"finetune"}):
        sys.exit("error: give last.pt files of pretrain.py, or of finetune.py, not both")
    measure = pretrained if kinds == {"pretrain"} else finetuned
    table = measure(arguments.checkpoints, arguments.data, arguments.patches)
    columns = list(next(iter(table.values())))
    print("| weights | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.3g}" for column in columns) + " |")


if __name__ == "__main__":
    main()
