"""Few-shot finetuning and training from scratch (paper, sections 3.2 and 4): every fold of a task
is trained and scored.

    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh      # pretrained encoder, new decoder
    python finetune.py --model unet_xl --task wmh                  # the same from scratch
    python finetune.py --ckpt runs/unet_xl/last.pt --task wmh_ood  # its networks on the test set
    python finetune.py ... --task wmh --folds all   # one network on all labelled cases, for use
"""

import dataclasses
import functools
import os
import time

import torch
import torch.nn.functional as F

import augment
import checkpoint
import checks
import config
import data
import devices
import evaluate
import models
import tasks
import training
from config import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    task: str  # name of a file in configs/tasks, or a path to one
    ckpt: str | None = None  # pretrained: ours, the published AMAES .pth, Lightning, MONAI
    model: str | None = None  # row of models.py, by default the checkpoint's; alone: from scratch
    merge: str | None = None  # SwinUNETR's merging: legacy or fixed; by default the checkpoint's
    features: int | None = None  # width of the first level, instead of the checkpoint's or row's
    data: str | None = None  # prepared folder, instead of the task's own
    networks: str | None = None  # run folder whose networks a task such as wmh_ood evaluates
    folds: tuple[int | str, ...] | None = None  # some, as 0,3; all: one network on all cases
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
    compile: bool | None = None  # torch.compile; auto: on CUDA, but for SwinUNETR (Appendix A)
    recompute: bool = False  # activation checkpointing: less memory, longer steps
    overlap: float = 0.5  # of the sliding windows in evaluation
    save_every: int = 500  # steps between checkpoints
    log_every: int = 50  # steps between log lines
    workers: int = 4  # loader processes for each training process
    scorers: int = 4  # processes that score cases while the network segments the next; 0: none
    seed: int = 0  # of every draw but the folds, which the task fixes
    device: str = "auto"  # auto, cpu or cuda
    out: str | None = None  # run folder; by default runs/<task>-<model>-<origin>
    estimate: bool = False  # time a few steps and a case, print what the run costs; write nothing

    def __post_init__(self):
        """UserError for values that would only fail later."""
        choices = {"augment": ("auto", "none", "spatial", "all"),
                   "precision": tuple(devices.PRECISIONS)}
        for key, known in choices.items():
            config.check_choice(key, getattr(self, key), known)

    def fill_defaults(self, name, task, pretrained):
        """The settings with those filled in that follow from others: the network from the
        checkpoint ({}: from scratch), the preset from whether there is one, the rate from the
        network, and the names of folders. Raises UserError if they contradict each other."""
        saved = pretrained.get("config", {})
        model = self.model or pretrained.get("row")
        if not model:
            why = ": the checkpoint has no row" if self.ckpt else " or --ckpt"
            raise UserError(f"give --model{why}")
        checks.check_encoder(self.ckpt, pretrained.get("row"), model)

        # Pretrained networks get fewer augmentations (section 3.2) than others (section 4.3).
        preset = self.augment
        if preset == "auto":
            preset = "spatial" if self.ckpt else "all"

        origin = origin_of(self.ckpt, pretrained, model)
        networks = f"runs/{task.networks}-{model}-{origin}" if task.networks else None
        filled = dataclasses.replace(
            self, model=model, augment=preset, lr=self.lr or RATES.get(model),
            merge=self.merge or saved.get("merge", "legacy"),
            features=self.features or saved.get("features"),
            out=self.out or f"runs/{name}-{model}-{origin}", networks=self.networks or networks)
        if task.networks:
            return filled.with_settings_of(filled.networks, task.networks)
        return filled

    def with_settings_of(self, folder, task):
        """The settings of the run in `folder`, whose networks this one evaluates (WMH OOD, section
        4.1). Raises UserError if there is none, or if it is of another network."""
        path = os.path.join(folder, "config.yaml")
        if not os.path.exists(path):
            raise UserError(f"no run in {folder}: first finetune.py --task {task} with the same "
                            "--ckpt or --model, or name its folder with --networks")
        saved = config.read_yaml(Config, path)
        if (saved["ckpt"], saved["model"]) != (self.ckpt, self.model):
            raise UserError(f"{folder} is of --ckpt {saved['ckpt']} --model {saved['model']}: give "
                            "the same here")

        # Its networks come with all settings but those of running and evaluating them.
        own = (*RESUMABLE_KEYS, "task", "networks", "overlap", "batch_size")
        theirs = {key: value for key, value in saved.items() if key not in own}
        return dataclasses.replace(self, **theirs)


# Appendix A's columns, read as U-Net XL, B, MedNeXt L, M, SwinUNETR: their header is garbled.
RATES = dict.fromkeys(models.ROWS, 1e-4) | {
    "mednext_l": 5e-4, "mednext_l_mednextdec": 5e-4, "mednext_m": 6e-4}

# Keys that may change between a run and its continuation: they do not touch what is computed.
RESUMABLE_KEYS = ("data", "folds", "workers", "device", "out", "save_every", "log_every", "compile",
                  "recompute", "estimate", "scorers")


# ----------------------------------------------------------------------- one fold, section 3.2
def dice_ce(logits, label, ignore=data.IGNORE):
    """Cross-entropy minus soft Dice, the official code's loss, a scalar: -1 for a perfect fit.

    logits: (B, K, D, H, W). label: (B, D, H, W), class numbers; voxels that are `ignore` count in
    neither part. Both are of each sample, then their mean is taken. Dice is the mean over all
    classes, the background among them, with smoothing 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = label.long()
    counted = label != ignore

    # Cross-entropy: the mean over the voxels that count.
    entropy = F.cross_entropy(logits, label, ignore_index=ignore, reduction="none").sum((1, 2, 3))
    entropy = entropy / counted.sum((1, 2, 3)).clamp(min=1)

    # Dice: overlap and sizes of the predicted share and the truth of each class, (B, K).
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1, 1)
    truth = label.unsqueeze(1) == classes
    share = logits.softmax(1) * counted.unsqueeze(1)
    overlap = (share * truth).sum((2, 3, 4))
    sizes = share.sum((2, 3, 4)) + truth.sum((2, 3, 4))
    dice = (2 * overlap + 1) / (sizes + 1 + 1e-8)
    return entropy.mean() - dice.mean()


def class_overlaps(logits, label, ignore=data.IGNORE):
    """Voxels in common of prediction and label, and the sizes of both together, of each class but
    the background: (2, K - 1) float64. Shapes are those of dice_ce."""
    counted = label != ignore
    predicted = logits.argmax(1)
    sums = []
    for number in range(1, logits.shape[1]):
        found = (predicted == number) & counted
        truth = label == number
        sums.append(torch.stack([(found & truth).sum(), found.sum() + truth.sum()]))
    return torch.stack(sums, 1).double()


def dice_of_overlaps(sums):
    """`class_overlaps`, added up -> {"dice": mean over the classes that are there}, {} if none."""
    common, sizes = sums
    there = sizes > 0
    if not there.any():
        return {}
    return {"dice": (2 * common[there] / sizes[there]).mean().item()}


def segmentation_loss(network, batch, device, precision, logging=False):
    """Section 3.2 on one batch: augmentation on the device, then dice_ce.

    -> its loss, and class_overlaps for the log (0 unless logging)."""
    # Image and label move together; then the image alone changes.
    crops, labels = data.to_device(batch, device)
    image, label = augment.spatial(crops, labels, batch.draws)
    image = augment.intensity(image, batch.draws).to(devices.PRECISIONS[precision])

    with devices.autocast(precision, device):
        output = network(image)
    sums = class_overlaps(output, label) if logging else 0
    return dice_ce(output, label), sums


def new_network(build, pretrained, seed):
    """The network of a fold, and a report of the weights that it takes from the checkpoint.

    build() makes it, with a new decoder and skips; the encoder is the checkpoint's ({}: new)."""
    torch.manual_seed(seed)
    model = build()
    if not pretrained:
        return model, "all weights new"
    return model, checkpoint.load_weights(model, pretrained, part="encoder")


def train_fold(cfg, build, task, pretrained, cases, fold, folder, processes, stop, runs):
    """Train one fold to its last step, or go on from its last.pt. -> the network, or None if a
    signal came before the end.

    It is the main of a fold, and so the one function below main that takes the whole cfg. cases:
    those to train on. runs: how many folds are left, for an estimate."""
    device = processes.device
    seed = data.derive_seed(cfg.seed, "fold", fold)

    # The network starts from the checkpoint's encoder. What does not fit stops all processes.
    with training.stop_all_on_error():
        model, report = new_network(build, pretrained, seed)
        devices.check_patch(model, cfg.patch_size, device, cfg.precision)
        devices.prepare(model, device, cfg.precision, cfg.recompute)
        if processes.rank == 0:
            print(report)
    optimizer = training.adamw(model, cfg.lr, cfg.weight_decay, cfg.eps, cfg.amsgrad)

    # The run goes on from last.pt if it is there, and refuses the folder of another run.
    contents = {"kind": "finetune", "row": cfg.model, "config": dataclasses.asdict(cfg),
                "task": dataclasses.asdict(task), "cases": [case.name for case in cases],
                "inputs": tasks.inputs_of(cases), **data_seen(pretrained, cases)}
    run = training.Run(folder, processes, model, optimizer, cfg.steps, cfg.save_every, contents,
                       RESUMABLE_KEYS, stop, dry=cfg.estimate, runs=runs)
    if run.step == cfg.steps:
        return model

    # `model` is saved and evaluated; `network`, the same weights on all processes, is trained.
    network = run.network(cfg.compile)
    classes = data.class_table(task.labels, task.ignore)
    crops = data.Crops(cases, cfg.patch_size, seed, cfg.augment, classes, cfg.oversample)
    loader = data.training_loader(crops, cfg.batch_size, run.step, cfg.steps, processes,
                                  cfg.workers)

    for batch in run.batches(loader):  # ends with the last step, or earlier: then on all processes
        rate = training.learning_rate(run.step, cfg.steps, 0, cfg.lr)
        run.set_learning_rate(rate)

        # One step: forward, loss, backward. The processes exchange their gradients in backward.
        loss, sums = segmentation_loss(network, batch, device, cfg.precision,
                                       logging=run.will_be_due(cfg.log_every))
        run.watch(loss, batch.names)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done()

        if run.is_due(cfg.log_every):
            # Dice of the crops that it trains on: one that stays near 0 has learned nothing.
            mean = training.sum_over_processes(loss).item() / processes.world
            record = {"loss": mean} | dice_of_overlaps(training.sum_over_processes(sums))
            run.progress.set_postfix({key: f"{value:.3f}" for key, value in record.items()})
            run.log(record | {"lr": rate})
    return model if run.step == cfg.steps or cfg.estimate else None


# ------------------------------------------------------------------------- what it starts from
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

    -> {"subjects": ..., "sha256": of raw files, "pretraining": its settings}; None where the
    checkpoint does not say."""
    seen = {"subjects": [case.subject for case in cases],
            "sha256": [volume.sha256 for case in cases for volume in case.volumes]}
    if not pretrained:
        return seen | {"pretraining": None}

    # To these comes what the checkpoint has seen.
    for key in seen:
        known = pretrained.get(key)
        seen[key] = None if known is None else sorted({*known, *seen[key]})

    # A network that was finetuned, and is finetuned again, names its pretraining itself.
    if pretrained.get("kind") == "finetune":
        return seen | {"pretraining": pretrained.get("pretraining")}
    settings = pretrained.get("config", {}) | {"hours": pretrained.get("hours")}
    return seen | {"pretraining": settings}


# ------------------------------------------------------------------- its cases, and its folder
def open_cases(task, path, name, every, quiet):
    """The cases of a task and its folds, checked as far as the index goes. path: its file. every:
    one network is trained on all of them.

    -> {name: case} of all, folds, {name: what it was made of} of those that are used."""
    cases = tasks.labelled_cases(task.data, task.source, task.sequences)
    if not cases:
        raise UserError(checks.why_none(task))
    folds = tasks.make_folds(task.networks or name, task, cases)
    names = evaluate.names_in(folds)
    if every:
        names.update(*tasks.cases_of_fold(folds, tasks.EVERY, cases))
    used = {case.name: case for case in cases if case.name in names}

    # What would stop the run after hours.
    checks.check_grids(used.values())
    checks.check_values(path, task, used.values())

    # What would not stop it, and should be known.
    trained = () if task.networks or every else folds
    remarks = checks.check_foreground(task, used, trained)
    remarks += checks.left_out(task, cases) + checks.same_files(used.values())
    remarks += checks.other_labels(used.values())
    if not quiet:
        train, test = map(len, tasks.cases_of_fold(folds, tasks.EVERY if every else 0, cases))
        plan = f"each fold trains on {train} and evaluates {test}"
        if every:
            plan = f"one network trains on {train}, and none is left to score it"
        print(f"task {name}: {len(cases)} cases; {plan}", *remarks, sep="\n")
    return {case.name: case for case in cases}, folds, tasks.inputs_of(used.values())


# ------------------------------------------------------------------------------------ all folds
def main(cfg):
    processes = training.init_processes(cfg.device)
    stop = training.catch_signals()

    # What is wrong is found before anything is written, and stops all processes.
    with training.stop_all_on_error():
        name, task = tasks.read_task(cfg.task)
        pretrained = checkpoint.load_checkpoint(cfg.ckpt) if cfg.ckpt else {}
        pretrained.pop("optimizer", None)
        cfg = cfg.fill_defaults(name, task, pretrained)
        checks.check_share(cfg.batch_size, processes.world)
        task = dataclasses.replace(task, data=cfg.data or task.data,
                                   n_train=cfg.n_train or task.n_train)

        # The folds, and those of them that are left to do.
        every = cfg.folds == (tasks.EVERY,)
        cases, folds, made_of = open_cases(task, cfg.task, name, every, quiet=processes.rank != 0)
        files, lines = checks.check_folder(dataclasses.asdict(cfg), Config, RESUMABLE_KEYS, name,
                                           task, folds, made_of)
        left = evaluate.folds_left(cfg.out, cfg.folds, task, folds, cases, cfg.estimate)
    training.print_header([*lines, f"{cfg.model}, augment {cfg.augment}, lr {cfg.lr}"],
                          cfg.model, cfg.compile, cfg.precision, processes)
    if not cfg.estimate:
        evaluate.open_folder(cfg.out, files, left, processes)

    build = functools.partial(models.build_model, cfg.model, "segment", len(task.sequences),
                              len(task.classes), merge=cfg.merge, features=cfg.features)
    for fold, folder in left.items():
        train, evaluated = ([cases[name] for name in names] for names in
                            tasks.cases_of_fold(folds, fold, cases.values()))
        # Its network is trained here, or was trained for another task.
        if task.networks:
            model, seen = evaluate.load_fold(cfg.networks, fold, task, train, processes.device)
        else:
            model = train_fold(cfg, build, task, pretrained, train, fold, folder, processes, stop,
                               runs=len(left))
            seen = data_seen(pretrained)
        if model is None:
            break
        if every:
            evaluate.end_without_scores(folder, processes, cfg.estimate)
            break

        # Its cases are segmented and scored.
        began = time.perf_counter()
        segment, made_by = evaluate.segmenter(
            model, cfg.networks if task.networks else cfg.out, fold, cfg.batch_size,
            patch_size=cfg.patch_size, precision=cfg.precision, overlap=cfg.overlap)
        if cfg.estimate:
            evaluated, made_by = evaluated[:1], None
        records = evaluate.evaluate_fold(segment, task, seen, evaluated, folder, made_by, processes,
                                         stop, cfg.scorers)
        if cfg.estimate:
            count = sum(len(folds[fold]["evaluate"]) for fold in left)
            return evaluate.say_cost(count, time.perf_counter() - began, processes)
        if records is None:
            break
        evaluate.write_scores(folder, records, processes)

    if processes.rank == 0 and not every:
        origin = origin_of(cfg.ckpt, pretrained, cfg.model)
        evaluate.write_summary(cfg.out, evaluate.about_run(
            dataclasses.asdict(cfg), name, task, cases.values(), build, origin,
            data_seen(pretrained)), folds)


if __name__ == "__main__":
    config.run(main, Config)
