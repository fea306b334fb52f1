"""Few-shot finetuning and training from scratch (paper, sections 3.2 and 4): every fold of a task, scored.

    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh    # pretrained encoder, new decoder with skips
    python finetune.py --model unet_xl --task wmh                  # the same from scratch
    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh_ood  # the first line's networks on the test set
"""

import dataclasses
import glob
import json
import math
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from tqdm import tqdm

import augment
import checkpoint
import config
import data
import metrics
import models
import predict
import preprocess
import tasks
import training
from config import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    task: str  # name of a file in configs/tasks, or a path to one
    ckpt: str | None = None  # pretrained checkpoint: ours, the published AMAES .pth, Lightning, MONAI
    model: str | None = None  # row of models.py; by default the checkpoint's. Without ckpt: from scratch
    merge: str | None = None  # SwinUNETR's patch merging: legacy or fixed; default: the checkpoint's
    features: int | None = None  # width of the first level; by default the checkpoint's, or the row's
    data: str | None = None  # prepared folder, instead of the task's own
    networks: str | None = None  # run folder whose networks a task such as wmh_ood evaluates
    folds: tuple[int, ...] | None = None  # some of the task's folds, as 0,3; by default all
    n_train: int | None = None  # subjects to train on, instead of the task's; section 4.1: 20
    augment: str = "auto"  # none, spatial, all; auto: spatial if pretrained (3.2), else all (4.3)
    steps: int = 2500  # optimizer steps a fold; section 4.2
    batch_size: int = 4  # over all processes; Appendix A
    patch_size: int = 128  # voxels a side; section 4.2
    lr: float | None = None  # base rate; by default the row's, Appendix A (RATES)
    weight_decay: float = 3e-5  # Appendix A
    amsgrad: bool = True  # Appendix A (the official code: False)
    eps: float = 1e-8  # AdamW; Appendix A
    oversample: float = 0.33  # share of patches that must hold foreground; the official code's
    precision: str = "bf16"  # bf16 (autocast), fp32 (without TF32) or fp64; Appendix A: bf16-mixed
    compile: bool | None = None  # torch.compile; default, auto: on CUDA, but for SwinUNETR (Appendix A)
    recompute: bool = False  # make activations again in the backward pass: less memory, longer steps
    overlap: float = 0.5  # of the sliding windows in evaluation
    save_every: int = 500  # steps between checkpoints
    log_every: int = 50  # steps between log lines
    workers: int = 4  # loader processes for each training process
    seed: int = 0  # of every draw but the folds, which the task fixes
    device: str = "auto"  # auto, cpu or cuda
    out: str | None = None  # run folder; by default runs/<task>-<model>-<amaes, swin or scratch>
    estimate: bool = False  # time a few steps and a case, print what the run will cost, write nothing


# Appendix A, read as U-Net XL, B, MedNeXt L, M, SwinUNETR: the header is garbled in the text at hand.
RATES = {"mednext_l": 5e-4, "mednext_l_mednextdec": 5e-4, "mednext_m": 6e-4}

PRECISIONS = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}  # of the weights

RESUMABLE_KEYS = ("data", "folds", "workers", "device", "out", "save_every", "log_every", "compile",
                  "recompute", "estimate")


def dice_ce(logits, label, ignore=data.IGNORE):
    """Cross-entropy minus soft Dice, the official code's loss: logits (B, K, D, H, W), label (B, D, H, W) ->
    scalar.

    Both of each sample, Dice with smoothing 1 of each class with the background, then the mean: a perfect fit
    is -1. Voxels whose label is `ignore` count in neither."""
    logits, label = logits.to(torch.promote_types(logits.dtype, torch.float32)), label.long()
    counted = label != ignore
    entropy = F.cross_entropy(logits, label, ignore_index=ignore, reduction="none").sum((1, 2, 3))
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1, 1)
    truth = label.unsqueeze(1) == classes
    share = logits.softmax(1) * counted.unsqueeze(1)
    overlap = (share * truth).sum((2, 3, 4))
    dice = (2 * overlap + 1) / (share.sum((2, 3, 4)) + truth.sum((2, 3, 4)) + 1 + 1e-8)
    return (entropy / counted.sum((1, 2, 3)).clamp(min=1)).mean() - dice.mean()


# -------------------------------------------------------------------------------------- one fold, section 3.2
def data_seen(pretrained, cases=()):
    """What a network has seen that starts from a checkpoint ({}: from scratch) and trains on cases: subjects
    and sha256 of raw files, None if the checkpoint does not say; and the configuration of its pretraining."""
    seen = {"subjects": [c.subject for c in cases], "sha256": [v.sha256 for c in cases for v in c.volumes]}
    for key in seen if pretrained else ():
        known = pretrained.get(key)
        seen[key] = None if known is None else sorted({*known, *seen[key]})
    pretraining = pretrained.get("pretraining")  # of a finetuned network that is finetuned again
    if pretrained and pretrained.get("kind") != "finetune":
        pretraining = pretrained.get("config", {}) | {"hours": pretrained.get("hours")}
    return seen | {"pretraining": pretraining}


def build(cfg, task, pretrained, seed=0):
    """The network of a fold: new decoder with skips, encoder from the checkpoint if there is one; and the
    report of what was taken."""
    torch.manual_seed(seed)
    model = models.build_model(cfg.model, "segment", len(task.sequences), len(task.classes), merge=cfg.merge,
                               features=cfg.features)
    if not pretrained:
        return model, "all weights new"
    return model, checkpoint.load_weights(model, pretrained, part="encoder")


def read_batches(cfg, task, cases, seed, step, processes):
    """Augmented patches of the cases from a step on; the first few of them for an estimate."""
    classes = data.class_table(task.labels, task.ignore)
    dataset = data.Crops(cases, cfg.patch_size, seed, cfg.augment, classes, cfg.oversample)
    stream = data.SampleStream(len(cases), seed, cfg.batch_size, step, cfg.steps, *processes[:2])
    batches = data.make_loader(dataset, stream, cfg.workers, processes.device)
    if cfg.estimate:
        return training.estimate(batches, cfg.workers, cfg.steps * len(cfg.folds), processes.device)
    return batches


def take_step(cfg, model, optimizer, batch, step, device):
    """One optimizer step -> loss of this process's part of the batch."""
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate(step, cfg.steps, 0, cfg.lr)
    crops, labels = data.to_device(batch, device)
    image, label = augment.spatial(crops, labels, batch.draws)
    image = augment.intensity(image, batch.draws).to(PRECISIONS[cfg.precision])
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        output = model(image)
    loss = dice_ce(output, label)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def train_fold(cfg, task, pretrained, cases, seed, folder, processes, stop):
    """Train one fold to its last step, or go on from its last.pt; -> the network, or None if a signal stopped
    it."""
    device, path = processes.device, os.path.join(folder, "last.pt")
    with training.stop_all_on_error():
        model, report = build(cfg, task, pretrained, seed)
        models.check_patch(model, cfg.patch_size, device, cfg.precision)
        training.quicken(model.to(device, PRECISIONS[cfg.precision]), device)
        if cfg.recompute:
            models.recompute(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay,
                                      eps=cfg.eps, amsgrad=cfg.amsgrad, fused=True)
        seen, inputs = data_seen(pretrained, cases), tasks.inputs_of(cases)
        step, _ = checkpoint.resume(path, cfg, RESUMABLE_KEYS, model, optimizer, seen["sha256"], inputs)
        if processes.rank == 0:
            print(report)
            checkpoint.cut_log(folder, step)
    training.check_same(f"{folder} or {task.data} differs between the nodes: share or copy them", step,
                      len(cases))
    if step == cfg.steps:
        return model
    compiled = training.choose_compile(cfg.compile, cfg.model, device)
    train_model = training.compile_or_warn(training.distribute(model), compiled, device)
    losses, saved, unreadable = [], step, False

    def save(step):
        training.raise_if_not_finite(losses, keep=0)
        with training.stop_all_on_error():
            if processes.rank == 0:
                checkpoint.save_checkpoint(path, {
                    "kind": "finetune", "row": cfg.model, "step": step, "config": dataclasses.asdict(cfg),
                    "task": dataclasses.asdict(task), "cases": [c.name for c in cases], "inputs": inputs,
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "versions": checkpoint.versions(), **seen})

    progress = tqdm(total=cfg.steps, initial=step, disable=processes.rank != 0, desc=folder)
    for batch in read_batches(cfg, task, cases, seed, step, processes):
        signalled, unreadable = training.raise_if_not_finite(losses, stop.is_set(), batch.fault)
        if signalled or unreadable:
            break
        loss = take_step(cfg, train_model, optimizer, batch, step, device)
        losses.append(training.to_host(step, batch.names, loss))
        step += 1
        progress.update()
        if cfg.estimate:
            continue
        if step % cfg.log_every == 0 or step == cfg.steps:
            record = {"step": step, "loss": training.sum_over_processes(loss).item() / processes.world,
                      "lr": optimizer.param_groups[0]["lr"]}
            progress.set_postfix(loss=f"{record['loss']:.3f}")
            with training.stop_all_on_error():
                if processes.rank == 0:
                    checkpoint.append_log(folder, record)
        if step % cfg.save_every == 0:
            save(step)
            saved = step
    progress.close()
    if step > saved and not cfg.estimate:
        save(step)
    if unreadable:
        training.stop_all(batch.fault)
    return model if step == cfg.steps or cfg.estimate else None


@torch.no_grad()
def evaluate_fold(cfg, task, model, seen, cases, folder, processes, stop):
    """All scores of every case on the scan's own grid, the processes taking turns; -> records in the order of
    their cases, or None if a signal stopped it. seen: what data_seen says of the network."""
    model.eval()
    mine, share = [], cases[processes.rank::processes.world]
    hashes, subjects = set(seen["sha256"] or ()), set(seen["subjects"] or ())
    with training.stop_all_on_error():
        for case in tqdm(share, disable=processes.rank != 0, desc=f"{folder} evaluate"):
            if stop.is_set():
                break
            try:
                volume, geometry, truth = data.read_case(case)
                classes = predict.segment(model, volume, geometry, cfg.patch_size, cfg.precision, cfg.overlap,
                                          batch=cfg.batch_size)  # not a share: it moves the last bits
                scores = tasks.score_case(classes, truth, dataclasses.asdict(task), geometry["affine"])
            except (UserError, *preprocess.READ_ERRORS) as error:
                raise UserError(f"cannot evaluate {case.name}: {error}") from None
            same = any(v.sha256 in hashes for v in case.volumes)
            made_of = tasks.inputs_of([case])[case.name]
            mine.append({"case": case.name, "subject": case.subject,
                         "sha256": made_of["sha256"], "label_sha256": made_of["label_sha256"],
                         "seen": None if seen["sha256"] is None else same or case.subject in subjects,
                         "same_scan": same, "site": tasks.site(case) if task.sites else None}
                        | {kind: {name: None if math.isnan(value) else round(value, 6)
                                  for name, value in values.items()} for kind, values in scores.items()})
    if training.any_process(stop.is_set())[0]:
        return None
    shares = [None] * processes.world
    dist.all_gather_object(shares, mine)
    return sorted((record for share in shares for record in share), key=lambda record: record["case"])


def estimate(cfg, task, pretrained, cases, folds, processes, stop):
    """What cfg.folds will cost, from a few real steps and one case. The run folder is not touched."""
    if task.networks or not cfg.folds:
        raise UserError("nothing is left to train, so there is nothing to estimate")
    train, evaluate = ([cases[n] for n in folds[cfg.folds[0]][part]] for part in ("train", "evaluate"))
    with tempfile.TemporaryDirectory() as folder:
        model = train_fold(cfg, task, pretrained, train, cfg.seed, folder, processes, stop)
    began, n = time.perf_counter(), sum(len(folds[f]["evaluate"]) for f in cfg.folds)
    evaluate_fold(cfg, task, model, data_seen(pretrained), evaluate[:1], "one case", processes, stop)
    seconds = time.perf_counter() - began
    if processes.rank == 0:
        hours = n * seconds / processes.world / 3600
        print(f"evaluation {seconds:.3g} s a case; {n} cases: {hours:.2f} hours more")


# ---------------------------------------------------------------------------------------------------- the run
def fill_defaults(cfg, task, pretrained):
    """Defaults that follow from others: the network from the checkpoint ({}: from scratch), the rate from the
    row, the preset from both; -> cfg, and the origin of the weights: scratch, amaes, swin, finetune."""
    row, then = pretrained.get("row"), pretrained.get("config", {})
    model = cfg.model or row
    if not model:
        raise UserError("give --model" + (": the checkpoint has no row" if cfg.ckpt else " or --ckpt"))
    encoders = {name: models.ROWS[name][:4] for name in (model, row) if name in models.ROWS}
    if row and encoders.get(model) != encoders.get(row):
        raise UserError(f"{cfg.ckpt} holds a {row}, not a {model}")
    for key, known in (("augment", ("auto", "none", "spatial", "all")), ("precision", tuple(PRECISIONS))):
        if getattr(cfg, key) not in known:
            raise UserError(f"{key} {getattr(cfg, key)!r}: choose {', '.join(known)}")
    automatic = "spatial" if cfg.ckpt else "all"
    if not cfg.ckpt:
        origin = "scratch"
    elif pretrained.get("kind") == "finetune":
        origin = "finetune"
    else:  # files of others do not say: the published ones are AMAES, for SwinUNETR [23]
        origin = then.get("objective", "swin" if model == "swinunetr" else "amaes")
    name = os.path.splitext(os.path.basename(cfg.task))[0]
    networks = f"runs/{task.networks}-{model}-{origin}" if task.networks else None
    return dataclasses.replace(
        cfg, model=model, out=cfg.out or f"runs/{name}-{model}-{origin}", networks=cfg.networks or networks,
        lr=cfg.lr or RATES.get(model, 1e-4), augment=automatic if cfg.augment == "auto" else cfg.augment,
        merge=cfg.merge or then.get("merge", "legacy"), features=cfg.features or then.get("features")), origin


def load_settings(folder, cfg, task):
    """cfg with the settings of the run whose networks the task evaluates (WMH OOD, section 4.1)."""
    path = os.path.join(folder, "config.yaml")
    if not os.path.exists(path):
        raise UserError(f"no run in {folder}: first finetune.py --task {task.networks} with the same --ckpt "
                        "or --model, or name its folder with --networks")
    then = config.read_yaml(Config, path)
    if (then["ckpt"], then["model"]) != (cfg.ckpt, cfg.model):
        raise UserError(f"{folder} is of --ckpt {then['ckpt']} --model {then['model']}: give the same here")
    own = (*RESUMABLE_KEYS, "task", "networks", "overlap", "batch_size")
    return dataclasses.replace(cfg, **{key: value for key, value in then.items() if key not in own})


def load_fold(cfg, task, fold, train, device):
    """The finished network of a fold of that run, and its checkpoint. train: the cases of this fold; the
    network must have been trained on the same, while those to evaluate are this run's own."""
    path = os.path.join(cfg.networks, f"fold_{fold}", "last.pt")
    model, saved = predict.load_network(path, device)
    theirs = saved["task"]
    if saved["step"] < saved["config"]["steps"]:
        raise UserError(f"{path} is at step {saved['step']}: finish task {task.networks} first")
    names = [case.name for case in train]
    if (theirs["classes"], theirs["sequences"], saved["cases"]) != (task.classes, task.sequences, names):
        raise UserError(f"{path} has other classes or sequences, or was trained on other cases than "
                        f"{task.data} gives for this fold")
    checkpoint.check_same_inputs(f"{path} was trained on other data", saved.get("inputs", {}),
                             tasks.inputs_of(train), f"finetune {task.networks} again, or the old data")
    return model, saved


def check_folds(cfg, assignment, inputs):
    """UserError if the run folder has folds of other settings, another task, other cases or other files,
    finished or not: they would be taken for these.

    -> what tasks.check_inputs returns."""
    if not glob.glob(os.path.join(glob.escape(cfg.out), "fold_*", "*")):
        return inputs, []

    path = os.path.join(cfg.out, "config.yaml")
    if os.path.exists(path):
        then = dataclasses.asdict(cfg) | config.read_yaml(Config, path)
        checkpoint.check_same_run(f"{cfg.out} has folds", then, cfg, RESUMABLE_KEYS)
    path = os.path.join(cfg.out, "folds.json")
    if os.path.exists(path) and checkpoint.read_text(path) != assignment:
        raise UserError(f"{cfg.out} has folds of another task, or of other cases: new --out, or the old data")

    return tasks.check_inputs(cfg.out, inputs)


def open_cases(cfg, task, name, quiet):
    """The cases of a task and its folds, checked as far as the index goes.

    -> {name: case} of all, folds, {name: what it was made of} of those that the folds use."""
    cases = data.labelled_cases(task.data, task.source, task.sequences)
    if not cases:
        raise UserError(tasks.why_none(task))
    folds = tasks.make_folds(task.networks or name, task, cases)
    names = {n for fold in folds for part in fold.values() for n in part}
    used = {case.name: case for case in cases if case.name in names}

    # What would stop the run after hours.
    tasks.check_grids(used.values())
    tasks.check_values(cfg.task, task, used.values())

    # What would not stop it, and should be known.
    remarks = tasks.check_foreground(task, used, () if task.networks else folds)
    remarks += tasks.left_out(task, cases) + tasks.same_files(used.values())
    remarks += tasks.other_labels(used.values())
    if not quiet:
        print(f"task {name}: {len(cases)} cases; each fold trains on {len(folds[0]['train'])} and evaluates "
              f"{len(folds[0]['evaluate'])}", *remarks, sep="\n")
    return {case.name: case for case in cases}, folds, tasks.inputs_of(used.values())


def main(cfg):
    processes = training.init_processes(cfg.device)
    stop = training.catch_signals()
    with training.stop_all_on_error():
        name, task = tasks.read_task(cfg.task)
        pretrained = checkpoint.load_checkpoint(cfg.ckpt) if cfg.ckpt else {}
        pretrained.pop("optimizer", None)
        cfg, origin = fill_defaults(cfg, task, pretrained)
        if task.networks:
            cfg = load_settings(cfg.networks, cfg, task)
        if cfg.batch_size % processes.world:
            raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {processes.world} processes")
        task = dataclasses.replace(task, data=cfg.data or task.data, n_train=cfg.n_train or task.n_train)
        cases, folds, made_of = open_cases(cfg, task, name, quiet=processes.rank != 0)
        chosen = range(len(folds)) if cfg.folds is None else cfg.folds
        if not set(chosen) <= set(range(len(folds))):
            raise UserError(f"folds {cfg.folds}: task {name} has the folds 0 to {len(folds) - 1}")

        # What is in the run folder already must be of this run.
        settings = {key: value for key, value in dataclasses.asdict(task).items() if key != "data"}
        assignment = json.dumps({"task": name, "settings": settings, "folds": folds}, indent=1)
        if task.networks:
            start = tasks.networks_of(cfg.networks, len(folds))
        else:
            start = checkpoint.checksum(cfg.ckpt) if cfg.ckpt else None
        inputs, lines = check_folds(cfg, assignment, {"ckpt": start, "cases": made_of})
        if processes.rank == 0:
            for line in lines:
                print(line)
            print(f"{cfg.model}, augment {cfg.augment}, lr {cfg.lr}\n"
                  f"{training.say_compile(cfg.compile, cfg.model, processes.device)}\n"
                  f"{checkpoint.versions()}")
            training.warn_of_cudnn(processes.device, cfg.precision, training.convolves_contiguous(cfg.model))

        # What is left to do needs its files.
        finished = {f: os.path.join(cfg.out, f"fold_{f}", "dice.json") for f in range(len(folds))}
        left = [f for f in chosen if not os.path.exists(finished[f])]
        needed = {n for f in left for part in folds[f].values() for n in part}
        data.check_files(task.data, [path for n in needed for path in tasks.files_of(cases[n])])
    if cfg.estimate:
        cfg = dataclasses.replace(cfg, folds=left)
        return estimate(cfg, task, pretrained, cases, folds, processes, stop)
    with training.stop_all_on_error():
        if processes.rank == 0:
            for fold in chosen:
                checkpoint.lock(os.path.dirname(finished[fold]))
            checkpoint.write_text(f"{cfg.out}/config.yaml",
                              yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
            checkpoint.write_text(f"{cfg.out}/folds.json", assignment)
            checkpoint.write_text(f"{cfg.out}/inputs.json", json.dumps(inputs, indent=1))

    before = data_seen(pretrained)
    for fold in chosen:
        folder = os.path.dirname(finished[fold])
        if training.any_process(os.path.exists(finished[fold]))[0]:
            continue
        train, rest = ([cases[n] for n in folds[fold][part]] for part in ("train", "evaluate"))
        seen = before
        if task.networks:
            with training.stop_all_on_error():
                model, seen = load_fold(cfg, task, fold, train, processes.device)
        else:
            seed = data.derive_seed(cfg.seed, "fold", fold)
            model = train_fold(cfg, task, pretrained, train, seed, folder, processes, stop)
        if model is None:
            break
        records = evaluate_fold(cfg, task, model, seen, rest, folder, processes, stop)
        if records is None:
            break
        with training.stop_all_on_error():
            if processes.rank == 0:
                checkpoint.write_text(finished[fold], json.dumps(records, indent=1))
    if processes.rank == 0:
        with torch.device("meta"):
            params = sum(p.numel() for p in build(cfg, task, {})[0].parameters())
        pool = [case for case in cases.values() if case.volumes[0].split != "test"]
        sites = sorted({tasks.site(case) for case in pool}) if task.sites else None
        # Whatever folds are there, from this run or from others beside it.
        done = {f: json.load(open(path)) for f, path in finished.items() if os.path.exists(path)}
        run = {"task": name, "model": cfg.model, "ckpt": cfg.ckpt, "origin": origin, "augment": cfg.augment,
               "params": params, "classes": task.classes[1:], "regions": list(task.regions), "sites": sites,
               "pretraining": before["pretraining"], "config": dataclasses.asdict(cfg),
               "folds": done}
        if done:
            checkpoint.write_text(os.path.join(cfg.out, "dice.json"), json.dumps(run, indent=1))
            summary = metrics.summarise(run, folds)
            checkpoint.write_text(os.path.join(cfg.out, "summary.md"), summary)
            print(summary)
        if len(done) < len(folds):
            print(f"{len(done)} of {len(folds)} folds done; the same command goes on")


if __name__ == "__main__":
    config.run(main, Config)
