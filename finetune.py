"""Few-shot finetuning and training from scratch (paper, sections 3.2 and 4): every fold of a task, scored.

    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh    # pretrained encoder, new decoder with skips
    python finetune.py --model unet_xl --task wmh                  # the same from scratch
    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh_ood  # the first line's networks on the test set
"""

import dataclasses
import functools
import glob
import json
import os
import time

import torch
import torch.nn.functional as F
import yaml

import augment
import checkpoint
import config
import data
import evaluate
import metrics
import models
import predict
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

    def __post_init__(self):
        """UserError for values that would only fail later."""
        choices = {"augment": ("auto", "none", "spatial", "all"), "precision": tuple(training.PRECISIONS)}
        for key, known in choices.items():
            config.check_choice(key, getattr(self, key), known)

    def fill_defaults(self, name, task, pretrained):
        """The settings with those filled in that follow from others: the network from the checkpoint ({}: from
        scratch), the rate from the row, the preset from both, and the names of the folders."""
        saved = pretrained.get("config", {})
        model = self.model or pretrained.get("row")
        if not model:
            why = ": the checkpoint has no row" if self.ckpt else " or --ckpt"
            raise UserError(f"give --model{why}")
        check_encoder(self.ckpt, pretrained.get("row"), model)

        augment_default = "spatial" if self.ckpt else "all"  # sections 3.2 and 4.3
        origin = origin_of(self.ckpt, pretrained, model)
        networks = f"runs/{task.networks}-{model}-{origin}" if task.networks else None
        filled = dataclasses.replace(
            self, model=model, lr=self.lr or RATES.get(model, 1e-4),
            augment=augment_default if self.augment == "auto" else self.augment,
            merge=self.merge or saved.get("merge", "legacy"),
            features=self.features or saved.get("features"),
            out=self.out or f"runs/{name}-{model}-{origin}", networks=self.networks or networks)
        if task.networks:
            return filled.with_settings_of(filled.networks, task.networks)
        return filled

    def with_settings_of(self, folder, task):
        """The settings of the run in `folder`, whose networks this one evaluates (WMH OOD, section 4.1)."""
        path = os.path.join(folder, "config.yaml")
        if not os.path.exists(path):
            raise UserError(f"no run in {folder}: first finetune.py --task {task} with the same --ckpt or "
                            "--model, or name its folder with --networks")
        saved = config.read_yaml(Config, path)
        if (saved["ckpt"], saved["model"]) != (self.ckpt, self.model):
            raise UserError(f"{folder} is of --ckpt {saved['ckpt']} --model {saved['model']}: give the same "
                            "here")

        own = (*RESUMABLE_KEYS, "task", "networks", "overlap", "batch_size")
        return dataclasses.replace(self, **{key: saved[key] for key in saved if key not in own})


# Appendix A, read as U-Net XL, B, MedNeXt L, M, SwinUNETR: the header is garbled in the text at hand.
RATES = {"mednext_l": 5e-4, "mednext_l_mednextdec": 5e-4, "mednext_m": 6e-4}

# Keys that may change between a run and its continuation: they do not touch what is computed.
RESUMABLE_KEYS = ("data", "folds", "workers", "device", "out", "save_every", "log_every", "compile",
                  "recompute", "estimate")


# ------------------------------------------------------------------------------ one fold, section 3.2
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


def new_network(build, pretrained, seed):
    """The network of a fold: new decoder with skips, encoder from the checkpoint ({}: new, too). -> the
    network, and the report of what was taken. build() makes it with new weights."""
    torch.manual_seed(seed)
    model = build()
    if not pretrained:
        return model, "all weights new"
    return model, checkpoint.load_weights(model, pretrained, part="encoder")


def segmentation_loss(network, batch, device, precision):
    """Section 3.2 on one batch: augmentation on the device, Dice and cross-entropy."""
    # Image and label move together; then the image alone changes.
    crops, labels = data.to_device(batch, device)
    image, label = augment.spatial(crops, labels, batch.draws)
    image = augment.intensity(image, batch.draws).to(training.PRECISIONS[precision])

    with training.autocast(precision, device):
        output = network(image)
    return dice_ce(output, label)


def train_fold(cfg, build, task, pretrained, cases, seed, run_folder, processes, stop, runs=1):
    """Train one fold to its last step, or go on from its last.pt. -> the network, None if a signal came.

    It is the main of a fold, and so the one function below main that takes the whole cfg. runs: how many
    folds are left, for an estimate.
    """
    device = processes.device
    with training.stop_all_on_error():
        model, report = new_network(build, pretrained, seed)
        models.check_patch(model, cfg.patch_size, device, cfg.precision)
        training.quicken(model.to(device, training.PRECISIONS[cfg.precision]), device)
        if cfg.recompute:
            models.recompute(model)
        if processes.rank == 0:
            print(report)
    optimizer = training.adamw(model, cfg.lr, cfg.weight_decay, cfg.eps, cfg.amsgrad)

    # The run goes on from last.pt if it is there, and refuses the folder of another run.
    contents = {"kind": "finetune", "row": cfg.model, "config": dataclasses.asdict(cfg),
                "task": dataclasses.asdict(task), "cases": [case.name for case in cases],
                "inputs": tasks.inputs_of(cases), **data_seen(pretrained, cases)}
    run = training.Run(run_folder, processes, model, optimizer, cfg.steps, cfg.save_every, contents,
                       RESUMABLE_KEYS, stop, dry=cfg.estimate, runs=runs)
    if run.step == cfg.steps:
        return model

    network = run.network(cfg.compile)
    classes = data.class_table(task.labels, task.ignore)
    crops = data.Crops(cases, cfg.patch_size, seed, cfg.augment, classes, cfg.oversample)
    loader = data.training_loader(crops, cfg.batch_size, run.step, cfg.steps, processes, cfg.workers)

    for batch in run.batches(loader):  # ends after the last step, or on all processes together
        run.set_learning_rate(training.learning_rate(run.step, cfg.steps, 0, cfg.lr))

        loss = segmentation_loss(network, batch, device, cfg.precision)
        run.watch(loss, batch.names)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done()

        if run.is_due(cfg.log_every):
            mean = training.sum_over_processes(loss).item() / processes.world
            run.log({"loss": mean, "lr": optimizer.param_groups[0]["lr"]})
            run.progress.set_postfix(loss=f"{mean:.3f}")
    return model if run.step == cfg.steps or cfg.estimate else None


# ----------------------------------------------------------------------------- what it starts from
def check_encoder(path, row, model):
    """UserError unless the checkpoint at `path`, of a row or of none that is known, fits the model."""
    if row is None or row == model:
        return

    # Rows that differ in their decoder only, as mednext_l and mednext_l_mednextdec, share an encoder.
    encoders = [models.ROWS[name]._replace(decoder="") for name in (row, model) if name in models.ROWS]
    if len(encoders) < 2 or encoders[0] != encoders[1]:
        raise UserError(f"{path} holds a {row}, not a {model}")


def origin_of(ckpt, pretrained, model):
    """Where the weights come from: scratch, amaes, swin or finetune."""
    if not ckpt:
        return "scratch"
    if pretrained.get("kind") == "finetune":
        return "finetune"

    # Files of others do not say: the published ones are AMAES, those of SwinUNETR are of [23].
    published = "swin" if model == "swinunetr" else "amaes"
    return pretrained.get("config", {}).get("objective", published)


def data_seen(pretrained, cases=()):
    """What a network has seen that starts from a checkpoint ({}: from scratch) and trains on cases.

    -> subjects and sha256 of raw files, each None if the checkpoint does not say; pretraining: its settings.
    """
    seen = {"subjects": [case.subject for case in cases],
            "sha256": [volume.sha256 for case in cases for volume in case.volumes]}
    if not pretrained:
        return seen | {"pretraining": None}

    for key in seen:
        known = pretrained.get(key)
        seen[key] = None if known is None else sorted({*known, *seen[key]})
    if pretrained.get("kind") == "finetune":  # it was finetuned, and is finetuned again
        return seen | {"pretraining": pretrained.get("pretraining")}
    return seen | {"pretraining": pretrained.get("config", {}) | {"hours": pretrained.get("hours")}}


def load_fold(path, task, train, device):
    """The finished network of a fold of another task, and its checkpoint. train: the cases of this fold; the
    network must have been trained on the same, while those to evaluate are this run's own."""
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


# ---------------------------------------------------------------------------------------------- the run
def open_cases(task, path, name, quiet):
    """The cases of a task and its folds, checked as far as the index goes. path: of the task's file.

    -> {name: case} of all, folds, {name: what it was made of} of those that the folds use."""
    cases = data.labelled_cases(task.data, task.source, task.sequences)
    if not cases:
        raise UserError(tasks.why_none(task))
    folds = tasks.make_folds(task.networks or name, task, cases)
    names = {n for fold in folds for part in fold.values() for n in part}
    used = {case.name: case for case in cases if case.name in names}

    # What would stop the run after hours.
    tasks.check_grids(used.values())
    tasks.check_values(path, task, used.values())

    # What would not stop it, and should be known.
    remarks = tasks.check_foreground(task, used, () if task.networks else folds)
    remarks += tasks.left_out(task, cases) + tasks.same_files(used.values())
    remarks += tasks.other_labels(used.values())
    if not quiet:
        print(f"task {name}: {len(cases)} cases; each fold trains on {len(folds[0]['train'])} and evaluates "
              f"{len(folds[0]['evaluate'])}", *remarks, sep="\n")
    return {case.name: case for case in cases}, folds, tasks.inputs_of(used.values())


def check_folder(settings, name, task, folds, made_of):
    """UserError if the run folder has folds of other settings, another task, other cases or other files,
    finished or not: they would be taken for these.

    -> the files that the folder gets, {name: text}, and lines that should be known."""
    out = settings["out"]
    start = checkpoint.checksum(settings["ckpt"]) if settings["ckpt"] else None
    if task.networks:
        start = tasks.networks_of(settings["networks"], len(folds))
    inputs = {"ckpt": start, "cases": made_of}
    task_settings = {key: value for key, value in dataclasses.asdict(task).items() if key != "data"}
    assignment = json.dumps({"task": name, "settings": task_settings, "folds": folds}, indent=1)

    lines = []
    if glob.glob(os.path.join(glob.escape(out), "fold_*", "*")):
        path = os.path.join(out, "config.yaml")
        if os.path.exists(path):
            saved = settings | config.read_yaml(Config, path)
            checkpoint.check_same_run(f"{out} has folds", saved, settings, RESUMABLE_KEYS)
        path = os.path.join(out, "folds.json")
        if os.path.exists(path) and checkpoint.read_text(path) != assignment:
            raise UserError(f"{out} has folds of another task, or of other cases: new --out, or the old data")
        inputs, lines = tasks.check_inputs(out, inputs)

    files = {"config.yaml": yaml.safe_dump(settings, sort_keys=False), "folds.json": assignment,
             "inputs.json": json.dumps(inputs, indent=1)}
    return files, lines


def folds_left(out, chosen, task, folds, cases):
    """Of the chosen folds (None: all) of a task, those that are not finished: {fold: its folder}. What they
    need is there."""
    chosen = range(len(folds)) if chosen is None else chosen
    if not set(chosen) <= set(range(len(folds))):
        raise UserError(f"folds {tuple(chosen)}: the task has the folds 0 to {len(folds) - 1}")
    folders = {fold: os.path.join(out, f"fold_{fold}") for fold in chosen}
    left = {fold: folder for fold, folder in folders.items()
            if not os.path.exists(os.path.join(folder, "dice.json"))}

    needed = {n for fold in left for part in folds[fold].values() for n in part}
    data.check_files(task.data, [path for n in needed for path in tasks.files_of(cases[n])])
    return left


def open_folder(out, files, left):
    """The run folder with its files, and those of the folds that are left, which are now ours alone."""
    for folder in left.values():
        checkpoint.lock(folder)
    for name, text in files.items():
        checkpoint.write_text(os.path.join(out, name), text)


def say_evaluation(cases, seconds, processes):
    """What the evaluation of `cases` cases will cost, if one of them took `seconds`."""
    if processes.rank == 0:
        hours = cases * seconds / processes.world / 3600
        print(f"evaluation {seconds:.3g} s a case; {cases} cases: {hours:.2f} hours more")


def write_summary(out, run, folds):
    """dice.json and summary.md of whatever folds are there, from this run or from others beside it."""
    done = {}
    for fold in range(len(folds)):
        path = os.path.join(out, f"fold_{fold}", "dice.json")
        if os.path.exists(path):
            done[fold] = json.loads(checkpoint.read_text(path))

    if done:
        run = run | {"folds": done}
        summary = metrics.summarise(run, folds)
        checkpoint.write_text(os.path.join(out, "dice.json"), json.dumps(run, indent=1))
        checkpoint.write_text(os.path.join(out, "summary.md"), summary)
        print(summary)
    if len(done) < len(folds):
        print(f"{len(done)} of {len(folds)} folds done; the same command goes on")


def main(cfg):
    processes = training.init_processes(cfg.device)
    stop = training.catch_signals()

    # What is wrong is found before anything is written, and stops all processes.
    with training.stop_all_on_error():
        name, task = tasks.read_task(cfg.task)
        pretrained = checkpoint.load_checkpoint(cfg.ckpt) if cfg.ckpt else {}
        pretrained.pop("optimizer", None)
        cfg = cfg.fill_defaults(name, task, pretrained)
        if cfg.batch_size % processes.world:
            raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {processes.world} processes")
        task = dataclasses.replace(task, data=cfg.data or task.data, n_train=cfg.n_train or task.n_train)
        cases, folds, made_of = open_cases(task, cfg.task, name, quiet=processes.rank != 0)
        files, lines = check_folder(dataclasses.asdict(cfg), name, task, folds, made_of)
        left = folds_left(cfg.out, cfg.folds, task, folds, cases)
        if cfg.estimate and (task.networks or not left):
            raise UserError("nothing is left to train, so there is nothing to estimate")
    lines += [f"{cfg.model}, augment {cfg.augment}, lr {cfg.lr}"]
    training.print_header(lines, cfg.model, cfg.compile, cfg.precision, processes)
    with training.stop_all_on_error():
        if processes.rank == 0 and not cfg.estimate:
            open_folder(cfg.out, files, left)

    build = functools.partial(models.build_model, cfg.model, "segment", len(task.sequences),
                              len(task.classes), merge=cfg.merge, features=cfg.features)
    for fold, folder in left.items():
        train = [cases[n] for n in folds[fold]["train"]]
        test = [cases[n] for n in folds[fold]["evaluate"]]
        if task.networks:
            path = os.path.join(cfg.networks, f"fold_{fold}", "last.pt")
            with training.stop_all_on_error():
                model, seen = load_fold(path, task, train, processes.device)
        else:
            seed = data.derive_seed(cfg.seed, "fold", fold)
            model = train_fold(cfg, build, task, pretrained, train, seed, folder, processes, stop, len(left))
            seen = data_seen(pretrained)
        if model is None:
            break

        began = time.perf_counter()
        records = evaluate.evaluate_fold(model, task, seen, test[:1] if cfg.estimate else test, folder,
                                processes, stop, cfg.patch_size, cfg.precision, cfg.overlap, cfg.batch_size)
        if cfg.estimate:
            n = sum(len(folds[fold]["evaluate"]) for fold in left)
            return say_evaluation(n, time.perf_counter() - began, processes)
        if records is None:
            break
        with training.stop_all_on_error():
            if processes.rank == 0:
                checkpoint.write_text(os.path.join(folder, "dice.json"), json.dumps(records, indent=1))

    if processes.rank == 0:
        with torch.device("meta"):
            params = sum(weight.numel() for weight in build().parameters())
        write_summary(cfg.out, {
            "task": name, "model": cfg.model, "ckpt": cfg.ckpt, "augment": cfg.augment, "params": params,
            "origin": origin_of(cfg.ckpt, pretrained, cfg.model), "classes": task.classes[1:],
            "regions": list(task.regions), "sites": tasks.sites_of(task, cases.values()),
            "pretraining": data_seen(pretrained)["pretraining"], "config": dataclasses.asdict(cfg)}, folds)


if __name__ == "__main__":
    config.run(main, Config)
