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
import torch.nn.functional as F
import yaml
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
FREE = ("data", "workers", "device", "out", "save_every", "log_every", "val_every", "compile", "micro_batch",
        "estimate", "preview", "recompute")


# --------------------------------------------------------------------------------- the objective, section 3.1
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
    hidden = augment.upload(hidden.view(-1, 1, *grid), device)
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


def masked_and_visible(output, target, mask):
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
    with autocast(cfg, device):
        output = model(image)
    sums = masked_and_visible(output, target, mask) if logging else None
    return reconstruction_loss(output, target, mask, cfg.loss_region), sums


# ------------------------------------------------------------- the objective of [23], section 4.3, Appendix D
def cut_boxes(rng, shape, share):
    """Boxes until their volumes sum to U(0, share) of the patch: [(slices)]. A side is 5 to 25 % of the
    patch's, cut at its border. So the paper's "mask ratio 0.3" hides 14 % on average."""
    target, volume, boxes = rng.uniform(0, share) * math.prod(shape), 0, []
    while volume < target:
        box = []
        for n in shape:
            start = int(rng.integers(0, n - int(0.05 * n)))
            extent = int(rng.integers(int(0.05 * n), int(0.25 * n)))
            box.append(slice(start, min(n, start + extent)))
        boxes.append(tuple(box))
        volume += math.prod(part.stop - part.start for part in box)
    return boxes


def swin_view(target, seeds, share):
    """One view of each sample (B, C, D, H, W): rotated by k * 90 degrees about the first axis; then boxes of
    it filled with noise in [0, 1], and, where another sample of the batch is drawn, boxes of that one pasted.

    -> (rotated, cut, k). One seed a sample. A pasted sample that comes earlier in the batch is cut already,
    as in [23], whose loop works in place."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    turns = [int(rng.integers(4)) for rng in rngs]
    rotated = torch.stack([torch.rot90(x, k, (2, 3)) for x, k in zip(target, turns, strict=True)])
    cut = rotated.clone()
    for i, (x, rng) in enumerate(zip(cut, rngs, strict=True)):
        generator = torch.Generator(x.device).manual_seed(int(rng.integers(2 ** 62)))
        for box in cut_boxes(rng, x.shape[1:], share):
            part = x[(slice(None), *box)]
            noise = torch.randn(part.shape, generator=generator, device=x.device, dtype=x.dtype)
            part.copy_((noise - noise.min()) / (noise.max() - noise.min()).clamp(min=1e-12))
        j = int(rng.integers(len(cut)))
        for box in cut_boxes(rng, x.shape[1:], share) if j != i else ():
            x[(slice(None), *box)] = cut[(j, slice(None), *box)]
    return rotated, cut, augment.upload(torch.tensor(turns), target.device)


def contrastive_loss(vectors, temperature=0.5):
    """NT-Xent: vectors (2B, d), two views of B samples one after the other -> scalar. 0 if B is 1."""
    vectors = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
    similarity = (vectors @ vectors.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(vectors), device=vectors.device).roll(len(vectors) // 2)
    return F.cross_entropy(similarity, partner)


def swin(cfg, model, batch, device, dtype, logging):
    """Rotation (which of four), contrast between two views of a sample, L1 reconstruction of the uncut views:
    the unweighted sum. Paste and contrast are among the samples that a process holds at once, as in [23]."""
    crops, _ = data.to_device(batch, device)
    target, _ = augment.spatial(crops, None, batch.draws)
    target = augment.intensity(target, batch.draws).to(dtype)
    views = [swin_view(target, [common.derive_seed(seed, view) for seed in batch.mask_seeds], cfg.mask_ratio)
             for view in range(2)]
    rotated, cut, turns = (torch.cat(parts) for parts in zip(*views, strict=True))
    with autocast(cfg, device):
        rotation, vectors, output = model(cut)
    parts = torch.stack([F.cross_entropy(rotation.to(dtype), turns), contrastive_loss(vectors),
                         (output.to(dtype) - rotated).abs().mean()])
    sums = torch.cat([parts.detach(), parts.new_ones(1)]) * len(target) if logging else None
    return parts.sum(), sums


def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


# --------------------------------------------------------------------------------------------------- the data
def open_data(cfg):
    """Training and validation cases: a seeded share of the subjects is held out (official code: volumes)."""
    cases = data.pretraining_cases(cfg.data)
    if not cases:
        raise UserError(f"{cfg.data} has no volume to pretrain on: all are of the split test")
    common.check_files(cfg.data, [path for case in cases for path in case.images])
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
    dataset = data.Crops(cases, cfg.patch_size, common.derive_seed(cfg.seed, "validation"), "none")
    mine = [(0, index) for index in range(processes.rank, len(cases), processes.world)]
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    with common.together():
        for i in range(0, len(mine), micro):
            batch = data.collate([dataset[key] for key in mine[i:i + micro]])
            if batch.fault:
                raise UserError(batch.fault)
            sums += OBJECTIVES[cfg.objective](cfg, model, batch, processes.device, dtype, True)[1].to("cpu")
    model.train()
    return losses_of(cfg, common.total(sums))


@torch.no_grad()
def write_preview(cfg, model, cases, stem, device, dtype):
    """Figure 2 on held-out patches, always the same: input (augmented, masked), reconstruction, target."""
    dataset = data.Crops(cases, cfg.patch_size, common.derive_seed(cfg.seed, "preview"), cfg.augment)
    batch = data.collate([dataset[0, index] for index in range(min(3, len(cases)))])
    if batch.fault:
        raise UserError(batch.fault)
    image, target, _ = make_views(cfg, batch, device, dtype)
    with autocast(cfg, device):
        output = model.eval()(image)
    model.train()
    for name, volumes in (("input", image), ("reconstruction", output), ("target", target)):
        for number, volume in enumerate(volumes.float().cpu().numpy()):
            with common.atomic(f"{stem}_{number}_{name}.nii.gz") as temporary:
                nib.Nifti1Image(volume[0], np.eye(4)).to_filename(temporary)


def losses_of(cfg, sums):
    """The sums of an objective -> the numbers of a log line: the loss, and its parts apart."""
    if cfg.objective == "swin":
        rotation, contrast, l1 = (sums[:3] / sums[3]).tolist()
        return {"loss": rotation + contrast + l1, "rotation": rotation, "contrast": contrast, "l1": l1}
    masked, hidden, visible, seen = sums.tolist()
    return {"loss": (masked + visible) / (hidden + seen) if cfg.loss_region == "all" else masked / hidden,
            "masked": masked / max(1, hidden), "visible": visible / max(1, seen)}


OBJECTIVES = {"amaes": amaes, "swin": swin}


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
    processes = common.init_processes(cfg.device)
    rank, device = processes.rank, processes.device
    stop = common.catch_signals()
    out = cfg.out or f"runs/{cfg.model}"
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32

    with common.together():  # nobody goes on before the folder is there
        check(cfg)
        objective = OBJECTIVES[cfg.objective]
        train, validation, held_out = open_data(cfg)
        steps, warmup, micro = plan(cfg, len(train), processes)
        val_every = cfg.val_every or max(1, len(train) // cfg.batch_size)
        torch.manual_seed(cfg.seed)
        task = {"amaes": "pretrain", "swin": "swin"}[cfg.objective]
        model = models.build_model(cfg.model, task, decoder=cfg.decoder, skips=cfg.skips, merge=cfg.merge,
                                   features=cfg.features).to(device, dtype)
        models.check_patch(model, cfg.patch_size, device, cfg.precision)
        if cfg.recompute:
            models.recompute(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay,
                                      eps=cfg.eps, amsgrad=cfg.amsgrad, fused=True)
        raw = [v.sha256 for case in train for v in case.volumes]
        inputs = made_of(train, validation)
        step, hours = common.resume(f"{out}/last.pt", cfg, FREE, model, optimizer, raw, inputs)
        if rank == 0:
            print_shared(train, validation)
            print(f"{cfg.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"{processes.world} x {device}, {cfg.precision}\n"
                  f"{common.say_compile(cfg.compile, cfg.model, device)}\n{common.versions()}\n"
                  f"run folder {out}" + (f", continues at step {step}" if step else ""))
            common.warn_of_cudnn(device, cfg.precision, models.contiguous_on_cuda(cfg.model))
        if rank == 0 and not cfg.estimate:
            common.lock(out)
            common.write_text(f"{out}/config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
            common.write_text(f"{out}/held_out.json", json.dumps(held_out, indent=1))
            common.cut_log(out, step)
    common.check_same(f"{out} or {cfg.data} differs between the nodes: share or copy them", step, len(train))
    ddp = common.distribute(model)
    # `model` is saved and evaluated, `train_model` takes the steps.
    compiled = common.choose_compile(cfg.compile, cfg.model, device)
    train_model = common.compile_or_warn(ddp, compiled, device)
    losses = []  # on their way to the host; read a step late, so that the device never waits

    def save(step):
        """last.pt: all that a continuation or a finetuning needs, with what the network has seen."""
        common.check_in(losses, keep=0)  # never weights that a loss which is not finite has touched
        with common.together():
            if rank == 0:
                common.save_checkpoint(f"{out}/last.pt", {
                    "kind": "pretrain", "row": cfg.model, "step": step, "config": dataclasses.asdict(cfg),
                    "hours": hours + (time.perf_counter() - began) / 3600,  # over all continuations
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "versions": common.versions(),
                    "subjects": sorted({c.subject for c in train}), "sha256": raw, "inputs": inputs})

    stream = data.SampleStream(len(train), cfg.seed, cfg.batch_size, step, steps, rank, processes.world)
    dataset = data.Crops(train, cfg.patch_size, cfg.seed, cfg.augment)
    batches = data.make_loader(dataset, stream, cfg.workers, device)
    if cfg.estimate:
        batches = common.estimate(batches, cfg.workers, steps - step, device)
    progress = tqdm(total=steps, initial=step, disable=rank != 0, desc="pretrain")
    began, first, saved, unreadable = time.perf_counter(), step, step, False
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
            ddp.require_backward_grad_sync = start + micro == local
            part = data.piece(batch, start, micro)
            loss, parts = objective(cfg, train_model, part, device, dtype, logging)
            (loss * micro / local).backward()
            losses.append(common.to_host(step, batch.names, loss))
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
            record = losses_of(cfg, common.total(sums)) | {"lr": rate}
        if step % val_every == 0 or step == steps:
            scores = validate(cfg, model, validation, micro, processes, dtype)
            record |= {f"val_{key}": value for key, value in scores.items()}
        if record:
            record = {"step": step} | record | {"seconds": (time.perf_counter() - began) / (step - first)}
            with common.together():
                if rank == 0:
                    common.append_log(out, record)
                    progress.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
        if cfg.preview and step % cfg.preview == 0:
            with common.together():
                if rank == 0:
                    write_preview(cfg, model, validation, f"{out}/preview/step{step:07}", device, dtype)
        if step % cfg.save_every == 0:
            save(step)
            saved = step
    progress.close()
    if step > saved and not cfg.estimate:
        save(step)
    if unreadable:
        common.stop_all(batch.fault)
    if rank == 0 and not cfg.estimate:
        print(f"{out}/last.pt holds step {step} of {steps}" if step else "stopped before the first step",
              end="\n" if step == steps else "; the same command goes on from there\n")


if __name__ == "__main__":
    common.run(main, Config)
