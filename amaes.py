"""AMAES (paper, section 3.1 and Figure 2): reconstruct an augmented, masked patch.

The input of the network is a patch after all augmentations, with 60 % of its 4 x 4 x 4 tokens set
to 0. The target is the same patch after the spatial augmentations alone. So the network learns to
undo the intensity augmentations ("augmentation reversal") and to fill in what is hidden (masked
image modelling).
"""

import math
from typing import NamedTuple

import torch

import augment
import resample


class Views(NamedTuple):
    image: torch.Tensor  # (B, C, D, H, W): what the network sees
    target: torch.Tensor  # (B, C, D, H, W): what it should return
    mask: torch.Tensor  # (B, 1, D, H, W) bool: True where a voxel is hidden


def make_views(crops, draws, mask_seeds, token_size=4, mask_ratio=0.6, dtype=torch.float32,
               augmented_target=False):
    """Figure 2: from the crops of a batch to input, target and mask.

    crops: (C, *context) each, larger than the patch where a transform reads beyond it.
    augmented_target: an ablation without augmentation reversal."""
    # Spatial augmentations move image and target together, and cut the crops to the patch.
    target, _ = augment.spatial(crops, None, draws)

    # Intensity augmentations change the image only.
    image = augment.intensity(target, draws)
    if augmented_target:
        target = image

    # Hidden voxels are set to 0.
    mask = random_mask(mask_seeds, image.shape[2:], token_size, mask_ratio, image.device)
    return Views(image.to(dtype).masked_fill(mask, 0), target.to(dtype), mask)


def random_mask(seeds, shape, token_size=4, ratio=0.6, device="cpu"):
    """One random mask for each seed: (B, 1, D, H, W) bool, True = hidden.

    The paper hides each token "with probability 0.6". We follow the official code, which keeps
    exactly int(tokens * (1 - ratio)) tokens. At 128^3 it keeps 13,107 of 32,768, and hides 19,661.
    Raises ValueError if a side is not a multiple of the token's.
    """
    if any(side % token_size for side in shape):
        raise ValueError(f"patch {tuple(shape)} is not a multiple of the token size {token_size}")
    grid = [side // token_size for side in shape]
    tokens = math.prod(grid)
    visible = int(tokens * (1 - ratio))

    # Masks are drawn on the CPU, so that a seed gives the same mask on every device.
    hidden = torch.ones(len(seeds), tokens, dtype=torch.bool)
    for sample, seed in enumerate(seeds):
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        hidden[sample, order[:visible]] = False

    # From one value per token to one value per voxel.
    mask = resample.upload(hidden.view(len(seeds), 1, *grid), device)
    for axis in (2, 3, 4):
        mask = mask.repeat_interleave(token_size, dim=axis)
    return mask


def reconstruction_loss(output, target, mask, region="all"):
    """Mean squared error between output and target, a scalar in the target's precision.

    region: "all" voxels, as in the official code, or the "masked" ones only. Told to take those,
    the official code still divides by the number of all voxels; we divide by that of the masked.
    """
    error = (output.to(target.dtype) - target) ** 2
    if region == "all":
        return error.mean()

    # The mask has one channel, the error may have several.
    return (error * mask).sum() / (mask.sum() * error.shape[1])


@torch.no_grad()
def error_sums(output, target, mask):
    """Sums for the log, to be added over micro-batches and processes: (4,).

    They are the squared error and the number of voxels of the hidden part, then of the visible one.
    """
    error = (output.to(target.dtype) - target) ** 2
    hidden = mask.expand_as(error)
    visible = ~hidden
    return torch.stack([(error * hidden).sum(), hidden.sum(),
                        (error * visible).sum(), visible.sum()])


def losses_from_sums(sums, region="all"):
    """error_sums, added up -> the numbers of a log line: mean squared errors."""
    hidden_error, hidden, visible_error, visible = sums.tolist()
    losses = {"masked": hidden_error / max(1, hidden), "visible": visible_error / max(1, visible)}

    if region == "masked":
        return {"loss": losses["masked"]} | losses
    return {"loss": (hidden_error + visible_error) / (hidden + visible)} | losses
