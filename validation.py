"""Looking at held-out subjects in pretraining: losses, a yardstick for them, and pictures.

The yardstick is interpolation. `gaussian_fill` gives every hidden voxel the mean of the visible
ones around it. A network that fills in worse than that has not learned what a head looks like.
"""

import math

import nibabel as nib
import numpy as np
import torch

import amaes
import checkpoint
import data
import models
import pictures
import resample
import training
from config import UserError

SIGMAS = (1.5, 2, 3)  # voxels: the fill is the best of these
GROWN = 2  # times as large as new ones: the end of a run warns from here on
HEAD = 0.05  # what is brighter in the target is head; air is near 0, and 1 is the brightest


class HeldOut:
    """The held-out cases of a run: the same patches at every look."""

    def __init__(self, cases, objective, patch_size, seed, preset, size, processes):
        """objective: of pretrain.py. preset: the augmentations of the pictures; the losses are of
        plain patches. size: samples at a time."""
        self.objective = objective
        self.crops = data.Crops(cases, patch_size, data.derive_seed(seed, "validation"), "none")
        self.preview = data.Crops(cases, patch_size, data.derive_seed(seed, "preview"), preset)
        self.size = size
        self.processes = processes
        self.fill = None  # what interpolation scores, from the first look on
        self.last = {}  # what the last look said

    @torch.no_grad()
    def validate(self, model):
        """The losses on the held-out patches and their yardstick, {"val_loss": ..., ...}."""
        def sums_of(batch):
            if self.objective.reconstruct:
                return look(*self.objective.reconstruct(model, batch))
            return self.objective.loss(model, batch, logging=True)[1]

        model.eval()
        found = self.objective.seen(self.add_up(sums_of))
        model.train()

        # The patches are the same at every look: so is what interpolation makes of them.
        if self.fill is None:
            self.fill = self.interpolate()
        self.last = {f"val_{name}": value for name, value in (found | self.fill).items()}
        self.last |= weights_grown(model)
        return self.last

    def interpolate(self):
        """What the best Gaussian fill scores on the held-out patches, {"fill": ..., ...}."""
        if not self.objective.reconstruct:
            return {}
        return best_fill(self.add_up(
            lambda batch: fill_sums(self.objective.reconstruct(None, batch)[1])))

    def add_up(self, sums_of):
        """Sum of sums_of(batch) over all patches: of all processes, each of which has its share."""
        share = range(self.processes.rank, len(self.crops.cases), self.processes.world)
        total = torch.zeros(SUMS, dtype=torch.float64)  # a process may have no share at all
        with training.stop_all_on_error():
            for first in range(0, len(share), self.size):
                batch = read(self.crops, share[first:first + self.size])
                parts = sums_of(batch).to("cpu")
                total[:len(parts)] += parts
        return training.sum_over_processes(total)

    def end(self, run):
        """Say how the run ended, and after its last step draw its losses."""
        run.print_end(verdict(self.last))
        if run.step == run.steps and run.processes.rank == 0 and not run.dry:
            pictures.at_end(run.folder, [run.folder], scored=False)

    @torch.no_grad()
    def write_preview(self, run):
        """Figure 2 on up to three held-out patches: input (augmented, masked), reconstruction,
        target, and the fill for comparison.

        Process 0 writes them as NIfTI in the run folder; the others wait for it."""
        # If process 0 fails, all stop.
        with training.stop_all_on_error():
            if run.processes.rank:
                return
            batch = read(self.preview, range(min(3, len(self.preview.cases))))
            run.model.eval()
            output, views = self.objective.reconstruct(run.model, batch)
            run.model.train()

            write_views(run.folder, run.step, output, views)


def write_views(folder, step, output, views):
    """What a network made of views, and the fill, as NIfTI files in folder/preview."""
    # One file for each volume, with voxels of 1 mm.
    fill = gaussian_fill(views.image, views.mask, 2)
    shown = {"input": views.image, "reconstruction": output, "target": views.target, "fill": fill}
    for name, volumes in shown.items():
        for number, volume in enumerate(volumes.float().cpu().numpy()):
            path = f"{folder}/preview/step{step:07}_{number}_{name}.nii.gz"
            with checkpoint.atomic(path) as temporary:
                nib.Nifti1Image(volume[0], np.eye(4)).to_filename(temporary)


def weights_grown(model):
    """How large the weights of an encoder have become, {"weights": the largest ratio to new ones}.

    Of the convolutions of the paper's U-Nets, which have an instance norm behind each; {} of other
    networks. There the size of the weights does not change the output, but a step of AdamW has the
    size of its rate: it turns large weights less. docs/experiments.md has what this costs."""
    ratios = []
    for name, block in model.named_modules():
        if name.startswith("encoder.") and isinstance(block, models.ConvNormAct):
            ratios.append(growth_of(block.conv.weight))
    return {"weights": max(ratios)} if ratios else {}


def growth_of(weight):
    """How many times as large as new ones the weights (out, in, k, k, k) of a convolution are."""
    new = 1 / math.sqrt(3 * weight[0].numel())  # root of the mean square, as torch draws it
    return weight.double().square().mean().sqrt().item() / new


def verdict(look):
    """The end of a run in words: does the network do better than interpolation, and are its
    weights of a size that finetuning can move?

    look: what `validate` said, or a line of log.jsonl that has it; "" without a yardstick."""
    if "val_fill" not in look:
        return ""
    grown = ""
    if look.get("weights", 1) > GROWN:
        grown = (f"\nthe encoder's weights have grown up to {look['weights']:.1f} times: finetuning"
                 " moves them that much less; a lower --lr keeps them small (docs/experiments.md)")

    error = look["val_masked"]
    fill = look["val_fill"]
    scaled = look.get("val_masked_scaled", error)  # logs of earlier versions have none
    better = "the network does better" if error < fill else "interpolation does better"
    if scaled < fill <= error:
        better += (f", but not if the brightness of each output is that of the visible voxels: "
                   f"{scaled:.4g}")
    return (f"hidden voxels of held-out patches: error {error:.4g}, of the best Gaussian fill "
            f"{fill:.4g}: {better}{grown}")


def read(crops, indices):
    """A batch of held-out patches. Raises UserError for one that cannot be read."""
    epoch = 0  # of a seed, as in training
    batch = data.collate([crops[epoch, index] for index in indices])
    if batch.fault:
        raise UserError(batch.fault)
    return batch


# ------------------------------------------------------------------------- what a network makes
SUMS = 13  # as many as `look` gives; other sums are fewer


def look(output, views):
    """Sums over a batch of reconstructions, for `seen`: (13,) float64.

    Those of amaes.error_sums; the squared error and the number of the hidden voxels of the head;
    of the patches' mean intensities over the head, in the target (x) and the output (y): the
    number, and the sums of x, y, x^2, y^2, xy; and the squared error of scale_to_visible."""
    target = views.target
    output = output.to(target.dtype)
    head = target > HEAD
    hidden = head & views.mask
    error = (((output - target) ** 2) * hidden).sum()

    # The mean over the head, of each patch. Patches without a head have none.
    voxels = head.flatten(1).sum(1).double()
    there = voxels > 0
    x = (target * head).flatten(1).sum(1).double()[there] / voxels[there]
    y = (output * head).flatten(1).sum(1).double()[there] / voxels[there]

    errors = amaes.error_sums(output, target, views.mask)
    scaled = (((scale_to_visible(output, target, views.mask) - target) ** 2) * views.mask).sum()
    others = [error, hidden.sum(), there.sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(),
              (x * y).sum(), scaled]
    return torch.stack([value.double() for value in (*errors, *others)])


def scale_to_visible(output, target, mask):
    """The output (B, C, D, H, W), each sample times the number that brings it nearest to the
    visible voxels of its target.

    A U-Net cannot see how bright a patch is: instance norm takes that away. So this is how well it
    knows the rest, as interpolation, which sees the visible voxels, does."""
    visible = (~mask).expand_as(output)
    seen_output = (output * visible).flatten(1)
    product = (seen_output * target.flatten(1)).sum(1)
    scale = product / (seen_output ** 2).sum(1).clamp(min=1e-12)
    return output * scale.view(-1, 1, 1, 1, 1)


def seen(sums, losses_from_sums):
    """`look`, added up -> {name: value}: the losses; the error of the hidden voxels in head and
    air, and of scale_to_visible; the correlation `mean_r` between the mean intensities of target
    and output."""
    found = losses_from_sums(sums[:4])
    error, hidden = sums[:2].tolist()
    head_error, head, n, x, y, xx, yy, xy, scaled = sums[4:].tolist()
    found["masked_scaled"] = scaled / max(1, hidden)

    # What is not head is air.
    found["masked_head"] = head_error / max(1, head)
    found["masked_air"] = (error - head_error) / max(1, hidden - head)

    # Pearson's correlation, from its sums. Of a single patch there is none: 0.
    spread = (n * xx - x * x) * (n * yy - y * y)
    found["mean_r"] = 0.0
    if spread > 0:
        found["mean_r"] = (n * xy - x * y) / math.sqrt(spread)
    return found


# ------------------------------------------------------------------------ what interpolation makes
def gaussian_fill(image, mask, sigma):
    """Every hidden voxel becomes the mean of the visible ones around it, weighted by a Gaussian of
    sigma voxels (normalised convolution). Visible ones stay.

    image: (B, C, D, H, W), 0 where hidden. mask: bool (B, 1, D, H, W), True where hidden."""
    image = image.float()
    visible = (~mask).float()
    channels = image.shape[1]

    # One blur for both: of the values, which are 0 where hidden, and of where there are any.
    kernel = resample.gaussian_kernel(sigma)
    volumes = torch.cat([image, visible], 1).flatten(0, 1)
    for axis, n in enumerate(image.shape[2:]):
        matrix = resample.filter_matrix(kernel, n, "constant")
        volumes = resample.apply_matrix(volumes, matrix, axis)
    volumes = volumes.unflatten(0, (len(image), channels + 1))
    values = volumes[:, :channels]
    weight = volumes[:, channels:]

    # Deep in a hole there may be nothing visible: there, take the mean of all that is.
    total = image.sum((2, 3, 4), keepdim=True)
    count = visible.sum((2, 3, 4), keepdim=True)
    mean = total / count.clamp(min=1)
    filled = torch.where(weight > 1e-4, values / weight.clamp(min=1e-4), mean)
    return torch.where(mask, filled, image)


def fill_sums(views):
    """Squared errors of the fill on a batch of views, for `best_fill`: (8,) float64.

    The number of hidden voxels and of those in the head; then for each sigma the errors of both."""
    target = views.target.float()
    hidden = views.mask.expand_as(target)
    hidden_head = hidden & (target > HEAD)
    sums = [hidden.sum(), hidden_head.sum()]

    for sigma in SIGMAS:
        error = (gaussian_fill(views.image, views.mask, sigma) - target) ** 2
        sums += [(error * hidden).sum(), (error * hidden_head).sum()]
    return torch.stack([value.double() for value in sums])


def best_fill(sums):
    """`fill_sums`, added up -> the errors of the sigma with the least error of hidden voxels."""
    hidden, head, *errors = sums[:8].tolist()

    # The errors come in pairs, of all hidden voxels and of those in the head.
    pairs = zip(errors[0::2], errors[1::2], strict=True)
    error, head_error = min(pairs)
    return {"fill": error / max(1, hidden), "fill_head": head_error / max(1, head),
            "fill_air": (error - head_error) / max(1, hidden - head)}
