"""AMAES (paper, section 3.1, Figure 2): hide 60 % of the 4x4x4 tokens of an augmented patch, and reconstruct
it as it was before the intensity augmentations and the mask.
"""

import math

import torch

import augment
import data
import resample
import training


def random_mask(seeds, shape, token_size, ratio, device):
    """Tokens of token_size^3 voxels hidden at random, an exact count each: (B, 1, D, H, W), True = hidden.

    One seed a sample, drawn on the CPU. The paper says "with probability 0.6"; like its code we keep exactly
    int(L * (1 - ratio)) of L tokens: 19,661 of 32,768 hidden at 128^3. ValueError if a side is no
    multiple."""
    if any(side % token_size for side in shape):
        raise ValueError(f"patch {tuple(shape)} is not a multiple of the token size {token_size}")
    grid = [side // token_size for side in shape]
    length = math.prod(grid)
    hidden = torch.ones(len(seeds), length, dtype=torch.bool)
    for row, seed in zip(hidden, seeds, strict=True):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        row[order[:int(length * (1 - ratio))]] = False
    hidden = resample.upload(hidden.view(-1, 1, *grid), device)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(token_size, axis)
    return hidden


def reconstruction_loss(output, target, mask, region):
    """Mean squared error against the clean target, over all voxels or the masked; in the target's precision.

    All voxels is what the official code does; its masked option divides by all voxels, ours by the masked."""
    error = (output.to(target.dtype) - target) ** 2
    if region == "all":
        return error.mean()
    return (error * mask).sum() / (mask.sum() * error.shape[1])


def error_sums(output, target, mask):
    """Sum of squared errors and number of voxels, where the mask hides, then where it does not: (4,)."""
    error = (output.detach().to(target.dtype) - target) ** 2
    hidden = mask.expand_as(error)
    return torch.stack([(error * hidden).sum(), hidden.sum(), (error * ~hidden).sum(), (~hidden).sum()])


def make_views(cfg, batch, device, dtype):
    """One batch on the device: input (augmented, masked), target (only moved in space), mask. Figure 2."""
    crops, _ = data.to_device(batch, device)
    target, _ = augment.spatial(crops, None, batch.draws)
    image = augment.intensity(target, batch.draws).to(dtype)
    mask = random_mask(batch.mask_seeds, image.shape[2:], cfg.token_size, cfg.mask_ratio, device)
    return image.masked_fill(mask, 0), target.to(dtype), mask


def amaes(cfg, model, batch, device, dtype, logging):
    """Loss of one micro-batch, and what a log line is made of (or None)."""
    image, target, mask = make_views(cfg, batch, device, dtype)
    with training.autocast(cfg, device):
        output = model(image)
    sums = error_sums(output, target, mask) if logging else None
    return reconstruction_loss(output, target, mask, cfg.loss_region), sums
