"""Few-shot finetuning and training from scratch (paper, sections 3.2 and 4): every fold of a task, scored.

    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh    # pretrained encoder, new decoder with skips
    python finetune.py --model unet_xl --task wmh                  # the same from scratch
"""

import dataclasses
import json
import math
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import augment
import common
import data
import models
import predict
from common import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    task: str  # name of a file in configs/tasks, or a path to one
    ckpt: str | None = None  # pretrained checkpoint: ours, the published AMAES .pth, Lightning, MONAI
    model: str | None = None  # row of models.py; by default the checkpoint's. Without ckpt: from scratch
    merge: str | None = None  # SwinUNETR's patch merging: legacy or fixed; default: the checkpoint's
    features: int | None = None  # width of the first level; by default the checkpoint's, or the row's
    data: str | None = None  # prepared folder, instead of the task's own
    folds: tuple[int, ...] | None = None  # some of the task's folds, as 0,3; by default all
    augment: str | None = None  # none, spatial, all; default: spatial if pretrained, else all (4.3)
    steps: int = 2500  # optimizer steps a fold; section 4.2
    batch_size: int = 4  # over all processes; Appendix A
    patch_size: int = 128  # voxels a side; section 4.2
    lr: float | None = None  # base rate; by default the row's, Appendix A (RATES)
    weight_decay: float = 3e-5  # Appendix A
    amsgrad: bool = True  # Appendix A (the official code: False)
    eps: float = 1e-8  # AdamW; Appendix A
    oversample: float = 0.33  # share of patches that must hold foreground; the official code's
    precision: str = "bf16"  # bf16 (autocast), fp32 or fp64; Appendix A: bf16-mixed
    compile: bool | None = None  # torch.compile; by default, as in Appendix A, all but SwinUNETR
    overlap: float = 0.5  # of the sliding windows in evaluation
    save_every: int = 500  # steps between checkpoints
    log_every: int = 50  # steps between log lines
    workers: int = 4  # loader processes for each training process
    seed: int = 0  # of every draw but the folds, which the task fixes
    device: str = "auto"  # auto, cpu or cuda
    out: str | None = None  # run folder; by default runs/<task>-<model>-<amaes, swin or scratch>


@dataclasses.dataclass(frozen=True)
class Task:
    """configs/tasks/<name>.yaml; section 4.1."""
    data: str  # prepared folder
    classes: tuple[str, ...]  # names, background first
    labels: dict  # label value of the source -> class number
    sequences: tuple[str, ...]  # input channels
    source: str | None = None  # take cases of this source only
    ignore: tuple[int, ...] = ()  # label values that neither loss nor score looks at
    regions: dict = dataclasses.field(default_factory=dict)  # name -> class numbers, scored as their union
    n_train: int = 20  # subjects to train on; section 4.1
    folds: int = 6  # section 4.1; 0: leave one subject out, a fold each
    evaluate: str = "rest"  # rest: the other training subjects (n_cv); test: the test split (n_test)


# Appendix A, read as U-Net XL, B, MedNeXt L, M, SwinUNETR: the printed header names the columns wrongly.
RATES = {"mednext_l": 5e-4, "mednext_l_mednextdec": 5e-4, "mednext_m": 6e-4}
FREE = ("data", "folds", "workers", "device", "out", "save_every", "log_every", "compile", "overlap")


def dice_ce(logits, label, ignore=data.IGNORE):
    """Cross-entropy minus soft Dice, the official code's loss: logits (B, K, D, H, W), label (B, D, H, W) ->
    scalar.

    Dice with smoothing 1, for each sample and class with the background, then the mean: a perfect fit is -1.
    Voxels whose label is `ignore` count in neither."""
    logits, label = logits.to(torch.promote_types(logits.dtype, torch.float32)), label.long()
    counted = label != ignore
    entropy = F.cross_entropy(logits, label, ignore_index=ignore, reduction="sum")
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1, 1)
    truth = label.unsqueeze(1) == classes
    share = logits.softmax(1) * counted.unsqueeze(1)
    overlap = (share * truth).sum((2, 3, 4))
    dice = (2 * overlap + 1) / (share.sum((2, 3, 4)) + truth.sum((2, 3, 4)) + 1 + 1e-8)
    return entropy / counted.sum().clamp(min=1) - dice.mean()


# -------------------------------------------------------------------------------------- the task, section 4.1
def read_task(name):
    """A task by name or path; UserError lists the known ones."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "tasks")
    path = name if name.endswith((".yaml", ".yml")) else os.path.join(folder, f"{name}.yaml")
    if not os.path.exists(path):
        known = ", ".join(sorted(os.path.splitext(file)[0] for file in os.listdir(folder)))
        raise UserError(f"no task {name!r}: give a path to a task file, or one of {known}")
    task = common.build_config(Task, common.read_yaml(Task, path))
    if sorted(set(task.labels.values())) != list(range(len(task.classes))):
        raise UserError(f"{path}: labels must map onto the class numbers 0 to {len(task.classes) - 1}")
    if task.evaluate not in ("rest", "test"):
        raise UserError(f"{path}: evaluate {task.evaluate!r}: choose rest or test")
    return os.path.splitext(os.path.basename(path))[0], task


def make_folds(name, task, cases):
    """Fold f: the subjects permuted by (task, f), the first n_train to train on; the rest, or the test split,
    to evaluate. Leave-one-out takes every subject, held out or not. The paper's own folds were not released.

    -> [{"train": [case names], "evaluate": [case names]}]."""
    held = {c.subject for c in cases if c.volumes[0].split == "test"} if task.folds else set()
    pool = sorted({c.subject for c in cases} - held)
    n_train = task.n_train if task.folds else len(pool) - 1
    if not 0 < n_train <= len(pool) - (task.evaluate == "rest"):
        raise UserError(f"task {name} trains on {task.n_train} subjects and needs more, but {task.data} has "
                        f"{len(pool)} with labels")
    folds = []
    for f in range(task.folds or len(pool)):
        if task.folds:
            order = np.random.default_rng(common.derive_seed(name, f)).permutation(len(pool))
            chosen = {pool[i] for i in order[:n_train]}
        else:
            chosen = set(pool) - {pool[f]}
        rest = held if task.evaluate == "test" else set(pool) - chosen
        folds.append({"train": [c.name for c in cases if c.subject in chosen],
                      "evaluate": [c.name for c in cases if c.subject in rest]})
    return folds


# -------------------------------------------------------------------------------------- one fold, section 3.2
def build(cfg, task, device, dtype, quiet):
    """The network of a fold: new decoder with skips, encoder from the checkpoint if there is one."""
    torch.manual_seed(cfg.seed)
    model = models.build_model(cfg.model, "segment", len(task.sequences), len(task.classes), merge=cfg.merge,
                               features=cfg.features)
    models.check_patch(model, cfg.patch_size, device, cfg.precision)
    if cfg.ckpt:
        report = models.load_weights(model, cfg.ckpt, part="encoder")
        if not quiet:
            print(report)
    return model.to(device, dtype)


def train_fold(cfg, task, cases, folder, processes, stop):
    """Train one fold to its last step, or go on from its last.pt; -> the network, or None if a signal stopped
    it."""
    device = processes.device
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    model = build(cfg, task, device, dtype, quiet=processes.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, eps=cfg.eps,
                                  amsgrad=cfg.amsgrad, fused=True)
    path = os.path.join(folder, "last.pt")
    step = saved = common.resume(path, cfg, FREE, model, optimizer)
    if step == cfg.steps:
        return model
    dist.barrier()
    if processes.rank == 0:
        common.cut_log(folder, step)
    ddp = DistributedDataParallel(model)
    train_model = torch.compile(ddp) if cfg.compile else ddp
    classes = data.class_table(task.labels, task.ignore)
    dataset = data.Crops(cases, cfg.patch_size, cfg.seed, cfg.augment, classes, cfg.oversample)
    stream = data.SampleStream(len(cases), cfg.seed, cfg.batch_size, step, cfg.steps, *processes[:2])
    losses, unreadable = [], False

    def save(step):
        common.check_in(losses, keep=0)
        if processes.rank == 0:
            common.save_checkpoint(path, {
                "kind": "finetune", "row": cfg.model, "step": step, "config": dataclasses.asdict(cfg),
                "task": dataclasses.asdict(task), "cases": [c.name for c in cases],
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "versions": common.versions()})

    progress = tqdm(total=cfg.steps, initial=step, disable=processes.rank != 0, desc=folder)
    for batch in data.make_loader(dataset, stream, cfg.workers, device):
        signalled, unreadable = common.check_in(losses, stop.is_set(), batch.fault)
        if signalled or unreadable:
            break
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg.steps, 0, cfg.lr)
        crops, labels = data.to_device(batch, device)
        image, label = augment.spatial(crops, labels, batch.draws)
        image = augment.intensity(image, batch.draws).to(dtype)
        with autocast:
            output = train_model(image)
        loss = dice_ce(output, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(common.to_host(step, batch.names, loss))
        step += 1
        progress.update()
        if step % cfg.log_every == 0 or step == cfg.steps:
            mean = common.total(loss).item() / processes.world
            if processes.rank == 0:
                common.append_log(folder, {"step": step, "loss": mean, "lr": optimizer.param_groups[0]["lr"]})
                progress.set_postfix(loss=f"{mean:.3f}")
        if step % cfg.save_every == 0:
            save(step)
            saved = step
    progress.close()
    if step > saved:
        save(step)
    if unreadable:
        raise UserError(batch.fault or "stopped: another process could not read its data")
    return model if step == cfg.steps else None


@torch.no_grad()
def evaluate_fold(cfg, task, model, cases, folder, processes):
    """Dice of every case on the scan's own grid, the processes taking turns; -> [{case, subject, dice}] in
    order."""
    model.eval()
    mine = []
    share = cases[processes.rank::processes.world]
    for case in tqdm(share, disable=processes.rank != 0, desc=f"{folder} evaluate"):
        volume, geometry, truth = data.read_case(case)
        classes = predict.segment(model, volume.to(next(model.parameters()).dtype), geometry, cfg.patch_size,
                                  cfg.precision, cfg.overlap)
        scores = predict.score_case(classes, truth, dataclasses.asdict(task))
        mine.append({"case": case.name, "subject": case.subject,
                     "dice": {name: None if math.isnan(s) else round(s, 6) for name, s in scores.items()}})
    shares = [None] * processes.world
    dist.all_gather_object(shares, mine)
    return sorted((record for share in shares for record in share), key=lambda record: record["case"])


# ------------------------------------------------------------------------------------------------ the summary
def mean_dice(records, names):
    """Mean over cases of the mean over `names`, and how many cases had none of them: as the official code, a
    label in neither truth nor prediction does not count. A case without any is dropped."""
    scores = [[r["dice"][n] for n in names if r["dice"][n] is not None] for r in records]
    means = [sum(s) / len(s) for s in scores if s]
    return (sum(means) / len(means) if means else math.nan), len(scores) - len(means)


def summarise(name, cfg, task, done, folds):
    """Markdown: Dice in percent for each fold, mean and standard deviation over folds, as in the paper's
    Table 6."""
    classes, regions = list(task.classes[1:]), list(task.regions)
    columns = {"mean": classes} if len(classes) > 1 else {}
    columns |= {c: [c] for c in classes + regions}
    lines = [f"# {name}, {cfg.model}, {'pretrained by ' + cfg.ckpt if cfg.ckpt else 'from scratch'}", "",
             f"{cfg.steps} steps, batch {cfg.batch_size}, patch {cfg.patch_size}, lr {cfg.lr}, augment "
             f"{cfg.augment}. Dice in percent, on each scan's own grid; dropped: cases with the label in "
             "neither truth nor prediction.",
             "", "| fold | trained on | evaluated | " + " | ".join(columns) + " | dropped |",
             "|---|---|---|" + "---|" * (len(columns) + 1)]
    values = {column: [] for column in columns}
    for fold, records in sorted(done.items()):
        dropped = []
        for column, names in columns.items():
            value, missing = mean_dice(records, names)
            values[column].append(100 * value)
            dropped.append(missing)
        lines.append(f"| {fold} | {len(folds[fold]['train'])} | {len(records)} | "
                     + " | ".join(f"{values[c][-1]:.2f}" for c in columns) + f" | {max(dropped)} |")
    spread = [f"{np.mean(v):.2f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.2f}" for v in values.values()]
    lines.append("| mean ± SD | | | " + " | ".join(spread) + " | |")
    return "\n".join(lines) + "\n"


def resolve(cfg):
    """Defaults that follow from others: the network from the checkpoint, the rate from the row, the preset
    from both."""
    saved = common.load_checkpoint(cfg.ckpt) if cfg.ckpt else {}
    row, then = saved.get("row"), saved.get("config", {})
    model = cfg.model or row
    if not model:
        raise UserError("give --model" + (": the checkpoint has no row" if cfg.ckpt else " or --ckpt"))
    encoders = {name: models.ROWS[name][:4] for name in (model, row) if name in models.ROWS}
    if row and encoders.get(model) != encoders.get(row):
        raise UserError(f"{cfg.ckpt} holds a {row}, not a {model}")
    augmentation = cfg.augment or ("spatial" if cfg.ckpt else "all")
    if augmentation not in ("none", "spatial", "all"):
        raise UserError(f"augment {augmentation!r}: choose none, spatial, all")
    origin = then.get("objective", "amaes") if cfg.ckpt else "scratch"
    task = os.path.splitext(os.path.basename(cfg.task))[0]
    return dataclasses.replace(cfg, model=model, out=cfg.out or f"runs/{task}-{model}-{origin}",
                               lr=cfg.lr or RATES.get(model, 1e-4), augment=augmentation,
                               compile=model != "swinunetr" if cfg.compile is None else cfg.compile,
                               merge=cfg.merge or then.get("merge", "legacy"),
                               features=cfg.features or then.get("features"))


def main(cfg):
    cfg = resolve(cfg)
    name, task = read_task(cfg.task)
    task = dataclasses.replace(task, data=cfg.data or task.data)
    processes = common.init_processes(cfg.device)
    if cfg.batch_size % processes.world:
        raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {processes.world} processes evenly")
    stop = common.catch_signals()
    cases = data.labelled_cases(task.data, task.source, task.sequences)
    if not cases:
        raise UserError(f"{task.data} has no labelled case with {', '.join(task.sequences)}"
                        + (f" of source {task.source}" if task.source else ""))
    by_name = {case.name: case for case in cases}
    folds = make_folds(name, task, cases)
    chosen = range(len(folds)) if cfg.folds is None else cfg.folds
    if not set(chosen) <= set(range(len(folds))):
        raise UserError(f"folds {cfg.folds}: task {name} has the folds 0 to {len(folds) - 1}")
    out = cfg.out
    if processes.rank == 0:
        os.makedirs(out, exist_ok=True)
        common.write_text(f"{out}/config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
        common.write_text(f"{out}/folds.json", json.dumps({"task": name, "folds": folds}, indent=1))
        print(f"task {name}: {len(cases)} cases; each fold trains on {len(folds[0]['train'])} and evaluates "
              f"{len(folds[0]['evaluate'])}; {cfg.model}, augment {cfg.augment}, lr {cfg.lr}\n"
              f"{common.versions()}")

    for fold in chosen:
        folder = os.path.join(out, f"fold_{fold}")
        scores = os.path.join(folder, "dice.json")
        os.makedirs(folder, exist_ok=True)
        if not common.agree(os.path.exists(scores))[0]:
            model = train_fold(cfg, task, [by_name[n] for n in folds[fold]["train"]], folder, processes, stop)
            if model is None:
                break
            rest = [by_name[n] for n in folds[fold]["evaluate"]]
            records = evaluate_fold(cfg, task, model, rest, folder, processes)
            if processes.rank == 0:
                common.write_text(scores, json.dumps(records, indent=1))
        dist.barrier()
    if processes.rank == 0:
        # Whatever folds are there, from this run or from others beside it.
        done = {f: json.load(open(path)) for f in range(len(folds))
                if os.path.exists(path := os.path.join(out, f"fold_{f}", "dice.json"))}
        common.write_text(os.path.join(out, "dice.json"), json.dumps(
            {"task": name, "model": cfg.model, "ckpt": cfg.ckpt, "augment": cfg.augment,
             "classes": task.classes[1:], "regions": list(task.regions), "folds": done}, indent=1))
        if done:
            summary = summarise(name, cfg, task, done, folds)
            common.write_text(os.path.join(out, "summary.md"), summary)
            print(summary)
        if len(done) < len(folds):
            print(f"{len(done)} of {len(folds)} folds done; the same command goes on")
    dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main, Config)
