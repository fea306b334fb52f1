"""AMAES pretraining (paper, section 3.1): hide 60 % of the 4x4x4 tokens of an augmented patch and
reconstruct the patch as it was before the intensity augmentations and the mask, with a light
decoder and no skips. Beside it, `objective: swin`: the pretraining of SwinUNETR [23] that the paper
compares with (section 4.3).

    torchrun --nproc_per_node=2 pretrain.py configs/unet_xl.yaml
    python pretrain.py configs/unet_b.yaml --data datasets/mine --batch_size 4
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import yaml

import amaes
import augment
import checks
import config
import data
import devices
import models
import swin
import training
import validation
from config import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "datasets/brains45k"  # prepared folder; section 2, BRAINS-45K
    model: str = "unet_xl"  # row of models.py; Table 4
    objective: str = "amaes"  # amaes (section 3.1) or swin, that of [23] for swinunetr
    decoder: str = "light"  # light or standard; Table 2
    skips: bool = False  # skip connections in pretraining; the ablation of section 3.1
    augment: str = "all"  # none, spatial or all; Table 3 and Table 5
    patch_size: int = 128  # voxels a side, at 1 mm; section 4.2
    token_size: int = 4  # voxels a side of a masked token; section 3.1
    mask_ratio: float = 0.6  # share of hidden tokens; section 3.1. swin: the most cut out (0.3)
    augmented_target: bool = False  # no augmentation reversal: an ablation of section 3.1
    loss_region: str = "all"  # all or masked voxels; the official code: all
    merge: str = "legacy"  # SwinUNETR's merging: legacy (MONAI 1.3.2, the paper's), fixed (>= 1.5)
    features: int | None = None  # width of the first level, instead of the row's
    epochs: float = 100.0  # passes over the data, one patch of each volume a pass; section 4.2
    steps: int | None = None  # instead of epochs: number of optimizer steps
    batch_size: int = 16  # over all processes; Appendix A (the official code: per device)
    micro_batch: int | None = None  # samples a process holds at once; gradients accumulate
    lr: float = 1e-4  # base learning rate; Appendix A
    warmup_epochs: float = 5.0  # linear warm-up, then cosine to 0, per step; Appendix A
    weight_decay: float = 3e-5  # Appendix A (the official code: 0.01)
    amsgrad: bool = True  # Appendix A (the official code: False)
    eps: float = 1e-8  # AdamW; Appendix A
    precision: str = "bf16"  # bf16 (autocast), fp32 (without TF32) or fp64; Appendix A: bf16-mixed
    compile: bool | None = None  # torch.compile; auto: on CUDA, but for SwinUNETR (Appendix A)
    recompute: bool = False  # activation checkpointing: less memory, longer steps
    val_fraction: float = 0.01  # share of subjects held out, at least one
    val_every: int | None = None  # steps between validations; by default once an epoch
    save_every: int = 2000  # steps between checkpoints; a signal saves, too
    log_every: int = 10  # steps between log lines
    preview: int | None = None  # steps between NIfTI files of held-out patches, as in Figure 2
    workers: int = 4  # loader processes for each training process
    seed: int = 0  # of every draw
    device: str = "auto"  # auto, cpu or cuda
    out: str | None = None  # run folder, by default runs/<model>; a run that was cut off goes on
    estimate: bool = False  # time a few steps, print what the run will cost, write nothing

    def __post_init__(self):
        """UserError for values that would only fail later, or silently."""
        choices = {"objective": ("amaes", "swin"), "decoder": ("light", "standard"),
                   "augment": ("none", "spatial", "all"), "loss_region": ("all", "masked"),
                   "precision": tuple(devices.PRECISIONS)}
        for key, known in choices.items():
            config.check_choice(key, getattr(self, key), known)

        if self.preview and self.objective != "amaes":
            raise UserError("preview shows the objective amaes; log.jsonl has the losses of [23]")
        if not 0 < self.mask_ratio < 1 or self.patch_size % self.token_size:
            raise UserError(
                f"mask_ratio {self.mask_ratio} must lie between 0 and 1, and patch_size "
                f"{self.patch_size} be a multiple of token_size {self.token_size}")


def resumable_keys(objective):
    """Keys that may change between a run and its continuation: what is computed stays the same."""
    keys = {"data", "workers", "device", "out", "save_every", "log_every", "val_every", "compile",
            "estimate", "preview", "recompute"}
    # The contrast of [23] is between the samples of a micro-batch.
    return keys if objective == "swin" else keys | {"micro_batch"}


# ---------------------------------------------------------------------------------------- the data
def open_data(folder, val_fraction, seed):
    """Training cases, validation cases, and the held-out subjects: a seeded share of all.

    The official code holds out volumes, not subjects: it validates on subjects it trains on."""
    cases = data.pretraining_cases(folder)
    if not cases:
        raise UserError(f"{folder} has no volume to pretrain on: all are of the split test")
    checks.check_files(folder, [path for case in cases for path in case.images])

    # All volumes of a subject stay on one side.
    kept, held_out = data.split_subjects([case.subject for case in cases], val_fraction, seed)
    kept = set(kept)
    train = [case for case in cases if case.subject in kept]
    held_cases = [case for case in cases if case.subject not in kept]
    if not train:
        raise UserError(f"{folder} holds {len(cases)} volumes of {len(held_out)} subjects, and "
                        f"val_fraction {val_fraction} holds out all of them: none is left to "
                        "train on")
    return train, held_cases, held_out


def contents_of(settings, train, held_cases):
    """What the run's checkpoints hold beside weights, optimizer and step: its settings, and what
    the network has seen (subjects, raw files, the inputs of checkpoint.check_same_inputs)."""
    # Of the training set, which may be of 45,000 volumes, one checksum of all shapes is enough.
    shapes = "".join(case.volumes[0].shape for case in train)
    first = [case.volumes[0] for case in held_cases]
    inputs = {"the training set": {"shape": hashlib.sha256(shapes.encode()).hexdigest()},
              "the held-out set": {"sha256": [volume.sha256 for volume in first],
                                   "shape": [volume.shape for volume in first]}}
    return {"kind": "pretrain", "row": settings["model"], "config": settings,
            "subjects": sorted({case.subject for case in train}),
            "sha256": [volume.sha256 for case in train for volume in case.volumes],
            "inputs": inputs}


# ---------------------------------------------------------------------------------- the objectives
class Objective(NamedTuple):
    """What an objective makes of a batch, as functions. Sums are of a micro-batch: they are added
    up over all of them and over processes before they become numbers of the log."""
    purpose: str  # what models.build_model must make for it
    loss: Callable  # (network, batch, logging=...) -> loss, sums (0 unless logging)
    losses: Callable  # sums -> {name: loss}
    seen: Callable  # sums of validation -> {name: value}
    reconstruct: Callable | None = None  # amaes: (network, batch) -> output, views


def choose_objective(name, device, precision, token_size, mask_ratio, augmented_target, region):
    """The Objective of a name, amaes or swin."""
    if name == "swin":
        loss = functools.partial(swin_loss, device=device, precision=precision, share=mask_ratio)
        return Objective("swin", loss, swin.losses_from_sums, seen=swin.losses_from_sums)

    options = {"device": device, "precision": precision, "token_size": token_size,
               "mask_ratio": mask_ratio, "augmented_target": augmented_target}
    losses = functools.partial(amaes.losses_from_sums, region=region)
    return Objective(
        "pretrain", functools.partial(amaes_loss, region=region, **options), losses,
        reconstruct=functools.partial(reconstruct, **options),
        seen=functools.partial(validation.seen, losses_from_sums=losses))


def reconstruct(network, batch, device, precision, **options):
    """Section 3.1 up to the loss: the output of the network, and the views it was made of.

    network: None makes the views alone. options: of amaes.make_views."""
    crops, _ = data.to_device(batch, device)
    views = amaes.make_views(crops, batch.draws, batch.mask_seeds,
                             dtype=devices.PRECISIONS[precision], **options)
    with devices.autocast(precision, device):
        return None if network is None else network(views.image), views


def amaes_loss(network, batch, region, logging, **options):
    """Section 3.1 on one micro-batch: its loss, and sums for the log (0 unless logging)."""
    output, views = reconstruct(network, batch, **options)

    # The sums are for log lines only: on the other steps nobody reads them.
    loss = amaes.reconstruction_loss(output, views.target, views.mask, region)
    sums = amaes.error_sums(output, views.target, views.mask) if logging else 0
    return loss, sums


def swin_loss(network, batch, device, precision, share, logging):
    """The pretraining of [23] on one micro-batch: its loss, and sums for the log, as amaes_loss.

    share: the most of a patch that is cut out."""
    # [23] augments by turns and cuts alone: configs/swinunetr.yaml has the preset none, under which
    # the next lines only stack the crops.
    crops, _ = data.to_device(batch, device)
    patches, _ = augment.spatial(crops, None, batch.draws)
    patches = augment.intensity(patches, batch.draws).to(devices.PRECISIONS[precision])

    # Two views of each patch, cut and rotated in different ways.
    seeds = [[data.derive_seed(seed, view) for seed in batch.mask_seeds] for view in (0, 1)]
    views = swin.make_views(patches, seeds, share)
    with devices.autocast(precision, device):
        outputs = network(views.image)

    losses = swin.losses(outputs, views)
    sums = swin.loss_sums(losses, len(patches)) if logging else 0
    return losses.sum(), sums


# ----------------------------------------------------------------------------------------- the run
def plan_steps(volumes, batch_size, steps, epochs, warmup_epochs):
    """The number of optimizer steps, how many of them are warm-up, and a line that says so."""
    # The paper counts in epochs: passes over the data, one patch of each volume.
    steps = steps or math.ceil(epochs * volumes / batch_size)
    warmup = math.ceil(warmup_epochs * volumes / batch_size)
    never = " (all: the rate never reaches its base)" if warmup >= steps else ""
    passes = steps * batch_size / volumes
    return steps, warmup, f"{steps} steps ({passes:.1f} epochs), {warmup} of them warm-up{never}"


def begin(run, train, held_cases, held_out, plan):
    """Write down what the run is, in its folder, and print its header. plan: a line of it."""
    settings = run.contents["config"]
    run.write("config.yaml", yaml.safe_dump(settings, sort_keys=False))
    run.write("held_out.json", json.dumps(held_out, indent=1))

    shared = checks.shared_files(train, held_cases)
    lines = [f"{len(train)} volumes, {plan}", *shared, *run.describe()]
    training.print_header(lines, settings["model"], settings["compile"], settings["precision"],
                          run.processes)


def main(cfg):
    processes = training.init_processes(cfg.device)
    stop = training.catch_signals()
    device = processes.device
    objective = choose_objective(cfg.objective, device, cfg.precision, cfg.token_size,
                                 cfg.mask_ratio, cfg.augmented_target, cfg.loss_region)

    # Data, network and plan: a mistake in one of them stops all processes before they write.
    with training.stop_all_on_error():
        train, held_cases, held_out = open_data(cfg.data, cfg.val_fraction, cfg.seed)
        torch.manual_seed(cfg.seed)
        model = models.build_model(cfg.model, objective.purpose, decoder=cfg.decoder,
                                   skips=cfg.skips, merge=cfg.merge, features=cfg.features)
        devices.check_patch(model, cfg.patch_size, device, cfg.precision)
        micro, batch_line = devices.plan_batch(cfg.batch_size, cfg.micro_batch, processes.world,
                                               cfg.objective, model, cfg.patch_size)
        steps, warmup, steps_line = plan_steps(len(train), cfg.batch_size, cfg.steps, cfg.epochs,
                                               cfg.warmup_epochs)
    devices.prepare(model, device, cfg.precision, cfg.recompute)
    optimizer = training.adamw(model, cfg.lr, cfg.weight_decay, cfg.eps, cfg.amsgrad)

    # The run goes on from last.pt if it is there, and refuses the folder of another run.
    run = training.Run(cfg.out or f"runs/{cfg.model}", processes, model, optimizer, steps,
                       cfg.save_every, contents_of(dataclasses.asdict(cfg), train, held_cases),
                       resumable_keys(cfg.objective), stop, dry=cfg.estimate)
    begin(run, train, held_cases, held_out, f"{batch_line}: {steps_line}")

    # `model` is saved and looked at; `network`, the same weights on all processes, is trained.
    network = run.network(cfg.compile)
    crops = data.Crops(train, cfg.patch_size, cfg.seed, cfg.augment)
    loader = data.training_loader(crops, cfg.batch_size, run.step, steps, processes, cfg.workers)
    held = validation.HeldOut(held_cases, objective, cfg.patch_size, cfg.seed, cfg.augment, micro,
                              processes)
    val_every = cfg.val_every or max(1, len(train) // cfg.batch_size)

    for batch in run.batches(loader):  # ends with the last step, or earlier: then on all processes
        rate = training.learning_rate(run.step, steps, warmup, cfg.lr)
        run.set_learning_rate(rate)

        # The gradients of the micro-batches add up to that of the batch's mean loss.
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for part in run.accumulate(data.micro_batches(batch, micro)):
            loss, parts = objective.loss(network, part, logging=run.will_be_due(cfg.log_every))
            run.watch(loss, part.names)
            (loss * len(part.crops) / len(batch.crops)).backward()
            sums += parts
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done()

        record = {}  # of this step, for log.jsonl and the terminal: empty on most
        if run.is_due(cfg.log_every):
            record |= objective.losses(training.sum_over_processes(sums)) | {"lr": rate}
        if run.is_due(val_every):
            record |= held.validate(model)
        if record:
            run.say(run.log(record))
        if cfg.preview and run.is_due(cfg.preview):
            held.write_preview(run)
    held.end(run)


if __name__ == "__main__":
    config.run(main, Config)
