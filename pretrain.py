"""AMAES pretraining (paper, section 3.1): hide 60 % of the 4x4x4 tokens of an augmented patch and reconstruct
the patch as it was before the intensity augmentations and the mask, with a light decoder and no skips.

    torchrun --nproc_per_node=2 pretrain.py configs/unet_xl.yaml
    python pretrain.py configs/unet_b.yaml --data datasets/mine --batch_size 4
"""

import dataclasses
import json
import math
import os
import time

import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import augment
import common
import data
import models
from common import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "datasets/brains45k"  # prepared folder; section 2, BRAINS-45K
    model: str = "unet_xl"  # row of models.py; Table 4
    decoder: str = "light"  # light or standard; Table 2
    skips: bool = False  # skip connections in pretraining; the ablation of section 3.1
    augment: str = "all"  # none, spatial or all; Table 3 and Table 5
    patch_size: int = 128  # voxels a side, at 1 mm; section 4.2
    token_size: int = 4  # voxels a side of a masked token; section 3.1
    mask_ratio: float = 0.6  # share of hidden tokens; section 3.1
    loss_region: str = "all"  # all or masked voxels; the official code: all
    epochs: float = 100.0  # passes over the data, one patch of each volume a pass; section 4.2
    steps: int | None = None  # instead of epochs: number of optimizer steps
    batch_size: int = 16  # over all processes; Appendix A (the official code: per device)
    micro_batch: int | None = None  # samples a process holds at once; gradients accumulate over the rest
    lr: float = 1e-4  # base learning rate; Appendix A
    warmup_epochs: float = 5.0  # linear warm-up, then cosine to 0, per step; Appendix A
    weight_decay: float = 3e-5  # Appendix A (the official code: 0.01)
    amsgrad: bool = True  # Appendix A (the official code: False)
    eps: float = 1e-8  # AdamW; Appendix A
    precision: str = "bf16"  # bf16 (autocast), fp32 or fp64; Appendix A: bf16-mixed
    compile: bool = True  # torch.compile; Appendix A: yes, but for SwinUNETR
    val_fraction: float = 0.01  # share of subjects held out, at least one
    val_every: int | None = None  # steps between validations; by default once an epoch
    save_every: int = 500  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    workers: int = 4  # loader processes for each training process
    seed: int = 0  # of every draw
    device: str = "auto"  # auto, cpu or cuda
    out: str | None = None  # run folder; by default runs/<model>. A run that was cut off continues there


# Keys that may change between a run and its continuation: they do not touch what is computed.
FREE = ("data", "workers", "device", "out", "save_every", "log_every", "val_every", "compile", "micro_batch")


# --------------------------------------------------------------------------------- the objective, section 3.1
def random_mask(seeds, shape, token_size, ratio, device):
    """Tokens of token_size^3 voxels hidden at random, an exact count a sample: bool (B, 1, D, H, W), True =
    hidden.

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
    hidden = hidden.view(-1, 1, *grid).to(device)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(token_size, axis)
    return hidden


def reconstruction_loss(output, target, mask, region):
    """Mean squared error against the clean target, over all voxels or the masked ones. In the target's
    precision.

    All voxels is what the official code does; its masked option still divides by all voxels, ours by the
    masked."""
    error = (output.to(target.dtype) - target) ** 2
    if region == "all":
        return error.mean()
    return (error * mask).sum() / (mask.sum() * error.shape[1])


def masked_and_visible(output, target, mask):
    """Sum of squared errors and number of voxels, first where the mask hides, then where it does not:
    (4,)."""
    error = (output.detach().to(target.dtype) - target) ** 2
    hidden = mask.expand_as(error)
    return torch.stack([(error * hidden).sum(), hidden.sum(), (error * ~hidden).sum(), (~hidden).sum()])


# --------------------------------------------------------------------------------------------------- the data
def open_data(cfg):
    """Training and validation cases: a seeded share of the subjects is held out (the official code: of
    volumes)."""
    cases = data.pretraining_cases(cfg.data)
    kept, held = data.split_subjects([c.subject for c in cases], cfg.val_fraction, cfg.seed)
    kept = set(kept)
    train = [c for c in cases if c.subject in kept]
    if not train:
        raise UserError(f"{cfg.data} holds {len(cases)} volumes of one subject: none left to train on")
    return train, [c for c in cases if c.subject not in kept], held


def make_views(cfg, batch, device, dtype):
    """One batch on the device: input (augmented, masked), target (spatially transformed only), mask. Figure
    2."""
    crops, _ = data.to_device(batch, device)
    target, _ = augment.spatial(crops, None, batch.draws)
    image = augment.intensity(target, batch.draws).to(dtype)
    mask = random_mask(batch.mask_seeds, image.shape[2:], cfg.token_size, cfg.mask_ratio, device)
    return image.masked_fill(mask, 0), target.to(dtype), mask


@torch.no_grad()
def validate(cfg, model, cases, micro, processes, autocast, dtype):
    """Masked and visible mean squared error on the held-out subjects: always the same crops and masks, no
    augmentation. Every process takes its share; sums are reduced."""
    dataset = data.Crops(cases, cfg.patch_size, common.derive_seed(cfg.seed, "validation"), "none")
    mine = [(0, index) for index in range(processes.rank, len(cases), processes.world)]
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(0, len(mine), micro):
        batch = data.collate([dataset[key] for key in mine[i:i + micro]])
        if batch.fault:
            raise UserError(batch.fault)
        image, target, mask = make_views(cfg, batch, processes.device, dtype)
        with autocast:
            output = model(image)
        sums += masked_and_visible(output, target, mask).to("cpu", torch.float64)
    model.train()
    return losses_of(common.total(sums), cfg.loss_region)


def losses_of(sums, region):
    """(masked sum, count, visible sum, count) -> the three numbers of a log line."""
    masked, hidden, visible, seen = sums.tolist()
    return {"loss": (masked + visible) / (hidden + seen) if region == "all" else masked / hidden,
            "masked": masked / max(1, hidden), "visible": visible / max(1, seen)}


# ---------------------------------------------------------------------------------------------------- the run
def plan(cfg, n, processes):
    """The arithmetic of a run, checked and printed: steps, warm-up steps, micro-batches a process and
    step."""
    if cfg.batch_size % processes.world:
        raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {processes.world} processes evenly")
    local = cfg.batch_size // processes.world
    micro = min(cfg.micro_batch or local, local)
    if local % micro:
        raise UserError(f"micro_batch {micro} does not divide the {local} samples of a process")
    steps = cfg.steps or math.ceil(cfg.epochs * n / cfg.batch_size)
    warmup = math.ceil(cfg.warmup_epochs * n / cfg.batch_size)
    if processes.rank == 0:
        print(f"{n} volumes, batch {cfg.batch_size} = {processes.world} processes x {local // micro} micro-"
              f"batches x {micro}: {steps} steps ({steps * cfg.batch_size / n:.1f} epochs), {warmup} of them "
              "warm-up" + (" (all: the rate never reaches its base)" if warmup >= steps else ""))
    return steps, warmup, micro


def check(cfg):
    """Values that would only fail later, or silently."""
    choices = {"decoder": ("light", "standard"), "augment": ("none", "spatial", "all"),
               "loss_region": ("all", "masked"), "precision": ("bf16", "fp32", "fp64")}
    for key, known in choices.items():
        if getattr(cfg, key) not in known:
            raise UserError(f"{key} {getattr(cfg, key)!r}: choose {', '.join(known)}")
    if not 0 < cfg.mask_ratio < 1 or cfg.patch_size % cfg.token_size:
        raise UserError(f"mask_ratio {cfg.mask_ratio} must lie between 0 and 1, and patch_size "
                        f"{cfg.patch_size} be a multiple of token_size {cfg.token_size}")


def main(cfg):
    check(cfg)
    processes = common.init_processes(cfg.device)
    rank, device = processes.rank, processes.device
    stop = common.catch_signals()
    out = cfg.out or f"runs/{cfg.model}"
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    train, validation, held_out = open_data(cfg)
    steps, warmup, micro = plan(cfg, len(train), processes)
    val_every = cfg.val_every or max(1, len(train) // cfg.batch_size)

    torch.manual_seed(cfg.seed)
    model = models.build_model(cfg.model, "pretrain", decoder=cfg.decoder, skips=cfg.skips).to(device, dtype)
    models.check_patch(model, cfg.patch_size, device, cfg.precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, eps=cfg.eps,
                                  amsgrad=cfg.amsgrad, fused=True)
    step = common.resume(os.path.join(out, "last.pt"), cfg, FREE, model, optimizer)
    ddp = DistributedDataParallel(model)
    train_model = torch.compile(ddp) if cfg.compile else ddp  # `model` is saved and evaluated
    losses = []  # on their way to the host; read a step late, so that the device never waits
    saved = step
    versions = common.versions()

    def save(step):
        """last.pt: all that a continuation or a finetuning needs, with what the network has seen."""
        common.check_in(losses, keep=0)  # never weights that a loss which is not finite has touched
        if rank == 0:
            common.save_checkpoint(os.path.join(out, "last.pt"), {
                "kind": "pretrain", "row": cfg.model, "step": step, "config": dataclasses.asdict(cfg),
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "versions": versions,
                "subjects": sorted({c.subject for c in train}),
                "sha256": [v.sha256 for c in train for v in c.volumes]})

    if rank == 0:
        os.makedirs(out, exist_ok=True)
        common.write_text(f"{out}/config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
        common.write_text(f"{out}/held_out.json", json.dumps(held_out, indent=1))
        common.cut_log(out, step)
        print(f"{cfg.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {processes.world} x "
              f"{device}, {cfg.precision}, compile {cfg.compile}\n{versions}\nrun folder {out}"
              + (f", continues at step {step}" if step else ""))
    dist.barrier()  # nobody writes before the folder is there

    stream = data.SampleStream(len(train), cfg.seed, cfg.batch_size, step, steps, rank, processes.world)
    dataset = data.Crops(train, cfg.patch_size, cfg.seed, cfg.augment)
    batches = iter(data.make_loader(dataset, stream, cfg.workers, device))
    progress = tqdm(total=steps, initial=step, disable=rank != 0, desc="pretrain")
    began, first, unreadable = time.perf_counter(), step, False
    for batch in batches:
        # All processes stop together or not at all: a signal, an unreadable file, a loss not finite.
        signalled, unreadable = common.check_in(losses, stop.is_set(), batch.fault)
        if signalled or unreadable:
            break
        rate = common.learning_rate(step, steps, warmup, cfg.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logging = (step + 1) % cfg.log_every == 0 or step + 1 == steps
        sums, local = torch.zeros(4, dtype=torch.float64, device=device), len(batch.crops)
        for start in range(0, local, micro):
            image, target, mask = make_views(cfg, data.piece(batch, start, micro), device, dtype)
            ddp.require_backward_grad_sync = start + micro == local
            with autocast:
                output = train_model(image)
            loss = reconstruction_loss(output, target, mask, cfg.loss_region) * micro / local
            loss.backward()
            losses.append(common.to_host(step, batch.names, loss))
            if logging:
                sums += masked_and_visible(output, target, mask)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.update()

        record = {}
        if logging:
            record = losses_of(common.total(sums), cfg.loss_region) | {"lr": rate}
        if step % val_every == 0 or step == steps:
            scores = validate(cfg, model, validation, micro, processes, autocast, dtype)
            record |= {f"val_{key}": value for key, value in scores.items()}
        if record and rank == 0:
            record = {"step": step} | record | {"seconds": (time.perf_counter() - began) / (step - first)}
            common.append_log(out, record)
            progress.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
        if step % cfg.save_every == 0:
            save(step)
            saved = step
    progress.close()
    if step > saved:
        save(step)
    if unreadable:
        raise UserError(batch.fault or "stopped: another process could not read its data")
    if rank == 0:
        print(f"{out}/last.pt holds step {step} of {steps}"
              + ("" if step == steps else "; the same command goes on from there"))
    dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main, Config)
