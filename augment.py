from typing import NamedTuple

import torch


class Draw(NamedTuple):
    context: tuple
def draw(seed,preset,patch_size): return Draw(tuple(patch_size))
def spatial(crops,labels,draws): return torch.stack([c.float() for c in crops]), None if labels is None else torch.stack(labels)
def intensity(b,d): return b
