"""AMAES pretraining (paper, section 3.1): hide 60 % of the 4x4x4 tokens of an augmented patch and reconstruct
the patch as it was before the intensity augmentations and the mask, with a light decoder and no skips.
Beside it, `objective: swin`, the pretraining of SwinUNETR [23] that the paper compares with (section 4.3).

    torchrun --nproc_per_node=2 pretrain.py configs/unet_xl.yaml
    python pretrain.py configs/unet_b.yaml --data datasets/mine --batch_size 4
"""

import dataclasses
import hashlib
import json
import math
import time

import nibabel as nib
import numpy as np
import torch
import yaml
from tqdm import tqdm

import amaes
import checkpoint
import config
import data
import models
import swin
import training
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
    mask_ratio: float = 0.6  # share of hidden tokens; section 3.1. swin: the largest share cut out (0.3)
    loss_region: str = "all"  # all or masked voxels; the official code: all
    merge: str = "legacy"  # SwinUNETR's patch merging: legacy (MONAI 1.3.2, the paper's) or fixed (>= 1.5)
    features: int | None = None  # width of the first level, instead of the row's
    epochs: float = 100.0  # passes over the data, one patch of each volume a pass; section 4.2
    steps: int | None = None  # instead of epochs: number of optimizer steps
    batch_size: int = 16  # over all processes; Appendix A (the official code: per device)
    micro_batch: int | None = None  # samples a process holds at once; gradients accumulate over the rest
    lr: float = 1e-4  # base learning rate; Appendix A
    warmup_epochs: float = 5.0  # linear warm-up, then cosine to 0, per step; Appendix A
    weight_decay: float = 3e-5  # Appendix A (the official code: 0.01)
    amsgrad: bool = True  # Appendix A (the official code: False)
    eps: float = 1e-8  # AdamW; Appendix A
    precision: str = "bf16"  # bf16 (autocast), fp32 (without TF32) or fp64; Appendix A: bf16-mixed
    compile: bool | None = None  # torch.compile; default, auto: on CUDA, but for SwinUNETR (Appendix A)
    recompute: bool = False  # make activations again in the backward pass: less memory, longer steps
    val_fraction: float = 0.01  # share of subjects held out, at least one
    val_every: int | None = None  # steps between validations; by default once an epoch
    save_every: int = 2000  # steps between checkpoints, which all processes wait for; a signal saves, too
    log_every: int = 10  # steps between log lines
    preview: int | None = None  # steps between NIfTI files of held-out patches: input, reconstruction, target
    workers: int = 4  # loader processes for each training process
    seed: int = 0  # of every draw
    device: str = "auto"  # auto, cpu or cuda
    out: str | None = None  # run folder; by default runs/<model>. A run that was cut off continues there
    estimate: bool = False  # time a few steps, print what the run will cost, write nothing


# Keys that may change between a run and its continuation: they do not touch what is computed.
RESUMABLE_KEYS = ("data", "workers", "device", "out", "save_every", "log_every", "val_every", "compile",
                  "micro_batch", "estimate", "preview", "recompute")


# --------------------------------------------------------------------------------------------------- the data
def open_data(cfg):
    """Training and validation cases: a seeded share of the subjects is held out (official code: volumes)."""
    cases = data.pretraining_cases(cfg.data)
    if not cases:
        raise UserError(f"{cfg.data} has no volume to pretrain on: all are of the split test")
    data.check_files(cfg.data, [path for case in cases for path in case.images])
    kept, held = data.split_subjects([c.subject for c in cases], cfg.val_fraction, cfg.seed)
    kept = set(kept)
    train = [c for c in cases if c.subject in kept]
    if not train:
        raise UserError(f"{cfg.data} holds {len(cases)} volumes of {len(held)} subjects, and val_fraction "
                        f"{cfg.val_fraction} holds out all of them: none is left to train on")
    return train, [c for c in cases if c.subject not in kept], held


def made_of(train, validation):
    """What a continued run compares beside the raw files that it trains on; see check_same_inputs."""
    shapes = "".join(case.volumes[0].shape for case in train)
    return {"the training set": {"shape": hashlib.sha256(shapes.encode()).hexdigest()},
            "the held-out set": {"sha256": [case.volumes[0].sha256 for case in validation],
                                 "shape": [case.volumes[0].shape for case in validation]}}


def print_shared(train, validation):
    """Say it if the raw file of a held-out volume is trained on, too, under another subject."""
    trained = {case.volumes[0].sha256: case.subject for case in train}
    shared = [case for case in validation if case.volumes[0].sha256 in trained]
    if shared:
        twin = trained[shared[0].volumes[0].sha256]
        print(f"{len(shared)} of {len(validation)} held-out volumes are trained on, too: the first is "
              f"{shared[0].name}, the same file as one of {twin}")


@torch.no_grad()
def validate(cfg, model, cases, micro, processes, dtype):
    """The objective on the held-out subjects: always the same crops and masks, no augmentation. Every
    process takes its share; sums are reduced."""
    dataset = data.Crops(cases, cfg.patch_size, data.derive_seed(cfg.seed, "validation"), "none")
    mine = [(0, index) for index in range(processes.rank, len(cases), processes.world)]
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    with training.stop_all_on_error():
        for i in range(0, len(mine), micro):
            batch = data.collate([dataset[key] for key in mine[i:i + micro]])
            if batch.fault:
                raise UserError(batch.fault)
            sums += OBJECTIVES[cfg.objective](cfg, model, batch, processes.device, dtype, True)[1].to("cpu")
    model.train()
    return losses_of(cfg, training.sum_over_processes(sums))


@torch.no_grad()
def write_preview(cfg, model, cases, stem, device, dtype):
    """Figure 2 on held-out patches, always the same: input (augmented, masked), reconstruction, target."""
    dataset = data.Crops(cases, cfg.patch_size, data.derive_seed(cfg.seed, "preview"), cfg.augment)
    batch = data.collate([dataset[0, index] for index in range(min(3, len(cases)))])
    if batch.fault:
        raise UserError(batch.fault)
    image, target, _ = amaes.make_views(cfg, batch, device, dtype)
    with training.autocast(cfg, device):
        output = model.eval()(image)
    model.train()
    for name, volumes in (("input", image), ("reconstruction", output), ("target", target)):
        for number, volume in enumerate(volumes.float().cpu().numpy()):
            with checkpoint.atomic(f"{stem}_{number}_{name}.nii.gz") as temporary:
                nib.Nifti1Image(volume[0], np.eye(4)).to_filename(temporary)


def losses_of(cfg, sums):
    """The sums of an objective -> the numbers of a log line: the loss, and its parts apart."""
    if cfg.objective == "swin":
        rotation, contrast, l1 = (sums[:3] / sums[3]).tolist()
        return {"loss": rotation + contrast + l1, "rotation": rotation, "contrast": contrast, "l1": l1}
    masked, hidden, visible, seen = sums.tolist()
    return {"loss": (masked + visible) / (hidden + seen) if cfg.loss_region == "all" else masked / hidden,
            "masked": masked / max(1, hidden), "visible": visible / max(1, seen)}


OBJECTIVES = {"amaes": amaes.amaes, "swin": swin.swin}


# ---------------------------------------------------------------------------------------------------- the run
def most_samples(cfg, device):
    """How many samples of AMAES a forward pass may hold, so that none of its tensors has 2^31 elements or
    more: from there on kernels count in 64 bits, or not at all."""
    with torch.device("meta"):
        model = models.build_model(cfg.model, "pretrain", decoder=cfg.decoder, skips=cfg.skips,
                                   merge=cfg.merge, features=cfg.features)
        patch = torch.empty(1, 1, *(cfg.patch_size,) * 3)
    models.check_patch(model, cfg.patch_size, device, cfg.precision)
    return (2 ** 31 - 1) // models.largest_tensor(model, patch)


def plan(cfg, n, processes):
    """The arithmetic of a run, checked and printed: steps, warm-up steps, size of a micro-batch.

    Where that size is not given, most_samples bounds it. Not so for the objective of [23], which another
    size would change."""
    if cfg.batch_size % processes.world:
        raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {processes.world} processes evenly")
    local = cfg.batch_size // processes.world
    micro, why = min(cfg.micro_batch or local, local), ""
    if not cfg.micro_batch and cfg.objective == "amaes":
        most = max(1, most_samples(cfg, processes.device))
        if local > most:
            micro = max(size for size in range(1, most + 1) if local % size == 0)
            why = f" (micro_batch {micro}, so that no tensor has 2^31 elements)"
    if local % micro:
        raise UserError(f"micro_batch {micro} does not divide the {local} samples of a process")
    if cfg.objective == "swin" and micro < 2:
        raise UserError("objective swin contrasts the samples that a process holds at once, here one: give "
                        f"--batch_size {2 * processes.world} or more, or fewer processes")
    steps = cfg.steps or math.ceil(cfg.epochs * n / cfg.batch_size)
    warmup = math.ceil(cfg.warmup_epochs * n / cfg.batch_size)
    if processes.rank == 0:
        print(f"{n} volumes, batch {cfg.batch_size} = {processes.world} processes x {local // micro} micro-"
              f"batches x {micro}{why}: {steps} steps ({steps * cfg.batch_size / n:.1f} epochs), {warmup} of "
              "them warm-up" + (" (all: the rate never reaches its base)" if warmup >= steps else ""))
    return steps, warmup, micro


def check(cfg):
    """Values that would only fail later, or silently."""
    choices = {"objective": tuple(OBJECTIVES), "decoder": ("light", "standard"),
               "augment": ("none", "spatial", "all"), "loss_region": ("all", "masked"),
               "precision": ("bf16", "fp32", "fp64")}
    for key, known in choices.items():
        if getattr(cfg, key) not in known:
            raise UserError(f"{key} {getattr(cfg, key)!r}: choose {', '.join(known)}")
    if cfg.preview and cfg.objective != "amaes":
        raise UserError("preview shows the objective amaes; log.jsonl has the losses of [23]")
    if not 0 < cfg.mask_ratio < 1 or cfg.patch_size % cfg.token_size:
        raise UserError(f"mask_ratio {cfg.mask_ratio} must lie between 0 and 1, and patch_size "
                        f"{cfg.patch_size} be a multiple of token_size {cfg.token_size}")


def main(cfg):
    processes = training.init_processes(cfg.device)
    rank, device = processes.rank, processes.device
    stop = training.catch_signals()
    out = cfg.out or f"runs/{cfg.model}"
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32

    with training.stop_all_on_error():  # nobody goes on before the folder is there
        check(cfg)
        objective = OBJECTIVES[cfg.objective]
        train, validation, held_out = open_data(cfg)
        steps, warmup, micro = plan(cfg, len(train), processes)
        val_every = cfg.val_every or max(1, len(train) // cfg.batch_size)
        torch.manual_seed(cfg.seed)
        task = {"amaes": "pretrain", "swin": "swin"}[cfg.objective]
        model = models.build_model(cfg.model, task, decoder=cfg.decoder, skips=cfg.skips, merge=cfg.merge,
                                   features=cfg.features).to(device, dtype)
        training.quicken(model, device)
        models.check_patch(model, cfg.patch_size, device, cfg.precision)
        if cfg.recompute:
            models.recompute(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay,
                                      eps=cfg.eps, amsgrad=cfg.amsgrad, fused=True)
        raw = [v.sha256 for case in train for v in case.volumes]
        inputs = made_of(train, validation)
        step, hours = checkpoint.resume(f"{out}/last.pt", cfg, RESUMABLE_KEYS, model, optimizer, raw, inputs)
        if rank == 0:
            print_shared(train, validation)
            print(f"{cfg.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"{processes.world} x {device}, {cfg.precision}\n"
                  f"{training.say_compile(cfg.compile, cfg.model, device)}\n{checkpoint.versions()}\n"
                  f"run folder {out}" + (f", continues at step {step}" if step else ""))
            training.warn_of_cudnn(device, cfg.precision, training.convolves_contiguous(cfg.model))
        if rank == 0 and not cfg.estimate:
            checkpoint.lock(out)
            settings = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)
            checkpoint.write_text(f"{out}/config.yaml", settings)
            checkpoint.write_text(f"{out}/held_out.json", json.dumps(held_out, indent=1))
            checkpoint.cut_log(out, step)
    training.check_same(f"{out} or {cfg.data} differs between the nodes: share or copy them", step,
                        len(train))
    ddp = training.distribute(model)
    # `model` is saved and evaluated, `train_model` takes the steps.
    compiled = training.choose_compile(cfg.compile, cfg.model, device)
    train_model = training.compile_or_warn(ddp, compiled, device)
    losses = []  # on their way to the host; read a step late, so that the device never waits

    def save(step):
        """last.pt: all that a continuation or a finetuning needs, with what the network has seen."""
        # Never weights that a loss which is not finite has touched.
        training.raise_if_not_finite(losses, keep=0)
        with training.stop_all_on_error():
            if rank == 0:
                checkpoint.save_checkpoint(f"{out}/last.pt", {
                    "kind": "pretrain", "row": cfg.model, "step": step, "config": dataclasses.asdict(cfg),
                    "hours": hours + (time.perf_counter() - began) / 3600,  # over all continuations
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "versions": checkpoint.versions(),
                    "subjects": sorted({c.subject for c in train}), "sha256": raw, "inputs": inputs})

    stream = data.SampleStream(len(train), cfg.seed, cfg.batch_size, step, steps, rank, processes.world)
    dataset = data.Crops(train, cfg.patch_size, cfg.seed, cfg.augment)
    batches = data.make_loader(dataset, stream, cfg.workers, device)
    if cfg.estimate:
        batches = training.estimate(batches, cfg.workers, steps - step, device)
    progress = tqdm(total=steps, initial=step, disable=rank != 0, desc="pretrain")
    began, first, saved, unreadable = time.perf_counter(), step, step, False
    for batch in batches:
        # All processes stop together or not at all: a signal, an unreadable file, a loss not finite.
        signalled, unreadable = training.raise_if_not_finite(losses, stop.is_set(), batch.fault)
        if signalled or unreadable:
            break
        rate = training.learning_rate(step, steps, warmup, cfg.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logging = (step + 1) % cfg.log_every == 0 or step + 1 == steps
        sums, local = torch.zeros(4, dtype=torch.float64, device=device), len(batch.crops)
        for start in range(0, local, micro):
            ddp.require_backward_grad_sync = start + micro == local
            part = data.micro_batch(batch, start, micro)
            loss, parts = objective(cfg, train_model, part, device, dtype, logging)
            (loss * micro / local).backward()
            losses.append(training.to_host(step, batch.names, loss))
            if logging:
                sums += parts
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.update()
        if cfg.estimate:
            continue

        record = {}
        if logging:
            record = losses_of(cfg, training.sum_over_processes(sums)) | {"lr": rate}
        if step % val_every == 0 or step == steps:
            scores = validate(cfg, model, validation, micro, processes, dtype)
            record |= {f"val_{key}": value for key, value in scores.items()}
        if record:
            record = {"step": step} | record | {"seconds": (time.perf_counter() - began) / (step - first)}
            with training.stop_all_on_error():
                if rank == 0:
                    checkpoint.append_log(out, record)
                    progress.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
        if cfg.preview and step % cfg.preview == 0:
            with training.stop_all_on_error():
                if rank == 0:
                    write_preview(cfg, model, validation, f"{out}/preview/step{step:07}", device, dtype)
        if step % cfg.save_every == 0:
            save(step)
            saved = step
    progress.close()
    if step > saved and not cfg.estimate:
        save(step)
    if unreadable:
        training.stop_all(batch.fault)
    if rank == 0 and not cfg.estimate:
        print(f"{out}/last.pt holds step {step} of {steps}" if step else "stopped before the first step",
              end="\n" if step == steps else "; the same command goes on from there\n")


if __name__ == "__main__":
    config.run(main, Config)
