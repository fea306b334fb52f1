"""Processes in step: start, agreement, stop; optimizer and network; the loop (`Run`), its cost."""

import contextlib
import inspect
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import typing

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config
import devices
from config import UserError


# ---------------------------------------------------------------------------------------- the start
class Processes(typing.NamedTuple):
    rank: int
    world: int  # number of processes
    device: torch.device


def init_processes(device):
    """Join the process group that torchrun describes, or one of a single process.

    Both run the same code. Control messages travel over gloo on the CPU, gradients over nccl on
    CUDA. Raises UserError where there are fewer GPUs than processes."""
    device = devices.pick_device(device)
    backend = "gloo"
    if device.type == "cuda":
        # Each process has a GPU of its own: the one with its number on this node.
        local = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(f"at least {local + 1} processes on this node, but {count} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"

    # A program that starts several runs, one after the other, stays in the group it has joined.
    started_by_torchrun = "RANK" in os.environ
    if not dist.is_initialized() and started_by_torchrun:
        dist.init_process_group(backend)
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def catch_signals():
    """SIGTERM (preemption) and SIGINT (Ctrl-C) set the returned event: a run ends after a step."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


# ---------------------------------------------------------------------------- agreeing and stopping
def any_process(*flags):
    """Is a flag raised on any process? -> one bool for each flag."""
    # The flags travel over gloo on the CPU, so that nobody waits for the device.
    raised = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def stop_all(message=""):
    """Raises UserError on all processes if any brings a message. Process 0 prints the first one."""
    brought, = any_process(message)
    if not brought:
        return

    # Only now, when the run ends anyway, the messages themselves travel.
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    first = next(filter(None, messages))
    raise UserError(first if dist.get_rank() == 0 else "")


@contextlib.contextmanager
def stop_all_on_error():
    """For work that may fail on one process alone, such as reading its files: a UserError there
    stops all. Without it, the others would wait in their next collective. It is a barrier, too."""
    message = ""
    try:
        yield
    except UserError as error:
        message = str(error)
    stop_all(message)


def sum_over_processes(tensor):
    """Sum of a tensor over all processes, as float64 on the CPU. Sums are reduced, never means."""
    tensor = tensor.detach().to("cpu", torch.float64, copy=True)
    dist.all_reduce(tensor)
    return tensor


def check_same(message, *numbers):
    """UserError with the message unless the numbers are the same on all processes."""
    # If all have the same numbers, each sum is this process's own, times the number of processes.
    own = torch.tensor(numbers, dtype=torch.float64)
    same = torch.equal(sum_over_processes(own), own * dist.get_world_size())
    stop_all("" if same else message)


# ---------------------------------------------------------------------------- optimizer and network
def learning_rate(step, steps, warmup, base):
    """Appendix A: linear warm-up from base/1000, then a cosine, which is 0 at the last step."""
    if step < warmup:
        return base * (1e-3 + (1 - 1e-3) * step / warmup)
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


def adamw(model, lr, weight_decay, eps, amsgrad):
    """The optimizer of Appendix A."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, eps=eps,
                             amsgrad=amsgrad, fused=True)


def distribute(model):
    """DistributedDataParallel, which gives every process the mean of all gradients."""
    # It warns of gradients whose strides are not their weights', even along an axis of one, where
    # channels-last convolutions set others: such gradients are viewed in the weights' strides here.
    for weight in model.parameters():
        if 1 in weight.shape:
            weight.register_hook(lambda grad: grad.flatten().view(grad.shape))

    # Buffers are constants in all networks here, and need not travel. Gradients live in the buckets
    # that do, which saves a copy of them.
    known = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers" in known  # from torch 2.13 on
    buffers = "forward_sync_buffers" if new else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})


def compile_or_warn(model, wanted, device):
    """torch.compile; or, where that fails on something tiny, the model as it is and a warning.

    It fails without a compiler, or without Triton. All processes compile, or none."""
    reason = ""
    if wanted:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = config.first_line(error)

    fails, = any_process(reason)
    if fails and dist.get_rank() == 0:
        print("warning: torch.compile fails here, going on without it: "
              f"{reason or 'on another process'}", file=sys.stderr)
    if fails or not wanted:
        return model

    # On CUDA the layout of volumes is ours: the compiler's own, made for images, would undo it.
    if device.type == "cuda":
        return torch.compile(model, options={"layout_optimization": False})
    return torch.compile(model)


def print_header(lines, row, compiled, precision, processes):
    """Print the lines, then what the run computes with, on process 0."""
    if processes.rank:
        return

    device = processes.device
    print(*lines, f"{processes.world} x {device}, {precision}",
          devices.say_compile(compiled, row, device), checkpoint.versions(), sep="\n")
    devices.warn_of_cudnn(device, precision, devices.convolves_contiguous(row))


# ----------------------------------------------------------------------------------------- the loop
class Run:
    """A training run in its folder: it resumes, refuses the folder of another run, logs, saves, and
    stops on all processes together. It owns no model logic and calls nothing back:

        run = Run(folder, processes, model, optimizer, steps, contents, ...)
        for batch in run.batches(loader):  # ends with the last step, or earlier on all processes
            ...                            # forward, run.watch(loss, names), backward, optimizer
            run.step_done()
            run.log({"step": run.step, "loss": ...})

    contents: what last.pt holds beside weights, optimizer and step: kind, row, config, and what the
    network has seen (subjects, sha256, inputs). resumable: keys of the config that may change in a
    continuation. stop: the event of catch_signals. dry: a few steps are timed to estimate what
    is left of the run costs, or what `runs` new ones do; nothing is written or ever due."""

    def __init__(self, folder, processes, model, optimizer, steps, save_every, contents, resumable,
                 stop, dry=False, runs=1):
        self.folder = folder
        self.processes = processes
        self.model = model
        self.optimizer = optimizer
        self.steps = steps
        self.save_every = save_every
        self.contents = contents
        self.stop = stop
        self.dry = dry
        self.runs = runs
        self.path = os.path.join(folder, "last.pt")

        # How far the run has come, in this part of it or before.
        self.step = 0
        self.hours = 0.0  # of all parts of a run that was continued
        if not dry or runs == 1:
            self.resume(resumable)
        self.first = self.saved = self.step

        # Losses on their way to the host: read a step late, so that the device never waits.
        self.losses = []

    def resume(self, resumable):
        """Go on from last.pt if it is there. UserError for the folder of another run, or in use."""
        with stop_all_on_error():
            if self.processes.rank == 0 and not self.dry:
                checkpoint.lock(self.folder)
            self.step, self.hours = checkpoint.resume(self.path, self.contents, resumable,
                                                      self.model, self.optimizer)

            # Steps after the last checkpoint are made again, and logged again.
            if self.processes.rank == 0 and not self.dry:
                checkpoint.cut_log(self.folder, self.step)

        # Every node may have a disk of its own.
        check_same(f"{self.folder} or the data differs between the nodes: share or copy them",
                   self.step, len(self.contents["inputs"]), len(self.contents["sha256"] or ()))

    def write(self, name, text):
        """Write a small file in the run folder, on process 0."""
        with stop_all_on_error():
            if self.processes.rank == 0 and not self.dry:
                checkpoint.write_text(os.path.join(self.folder, name), text)

    def describe(self):
        """The network and where the run stands, for a header."""
        count = sum(weight.numel() for weight in self.model.parameters())
        goes_on = f", continues at step {self.step}" if self.step else ""
        return [f"{self.contents['row']}, {count:,} parameters",
                f"run folder {self.folder}{goes_on}"]

    def network(self, compiled):
        """The model that takes the steps: distributed, and compiled where devices.choose_compile
        says so. `model` itself is saved and evaluated."""
        device = self.processes.device
        self.ddp = distribute(self.model)
        wanted = devices.choose_compile(compiled, self.contents["row"], device)
        return compile_or_warn(self.ddp, wanted, device)

    def batches(self, loader):
        """Yield the batches of all steps that are left. Save every `save_every` steps and at last.

        All processes stop together: after the last step, after a signal to one of them, or with a
        UserError for a batch that cannot be read or a loss that is not finite."""
        # Log lines count the seconds of a step from here: what came before is done once.
        self.began = time.perf_counter()
        self.progress = tqdm(total=self.steps, initial=self.step, disable=self.processes.rank != 0,
                             desc=self.folder)
        if self.dry:
            left = (self.steps - self.step) * self.runs
            loader = estimate(loader, loader.num_workers, left, self.processes.device)
        fault = ""
        for batch in loader:
            # What one process knows, all must know before they begin the step.
            signalled, unreadable = agree(self.losses, self.stop.is_set(), batch.fault)
            if unreadable:
                fault = batch.fault
            if signalled or unreadable:
                break
            yield batch
            if self.step % self.save_every == 0:
                self.save()

        # A signal or an unreadable batch does not cost the steps since the last checkpoint.
        self.progress.close()
        if self.step > self.saved:
            self.save()
        stop_all(fault)

    def accumulate(self, parts):
        """Yield the micro-batches of a step; with the last one, the processes share gradients."""
        parts = list(parts)
        for number, part in enumerate(parts, start=1):
            self.ddp.require_backward_grad_sync = number == len(parts)
            yield part

    def watch(self, loss, names):
        """Stop the run, a step later, if this loss of the samples `names` is not finite."""
        self.losses.append(to_host(self.step, names, loss))

    def set_learning_rate(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def will_be_due(self, every):
        """Will the step that is being made be a multiple of `every`, or the last one?"""
        step = self.step + 1
        return not self.dry and (step % every == 0 or step == self.steps)

    def step_done(self):
        self.step += 1
        self.progress.update()

    def is_due(self, every):
        """Is the step that was just made a multiple of `every`, or the last one?"""
        return not self.dry and (self.step % every == 0 or self.step == self.steps)

    def log(self, record):
        """A line of log.jsonl: the record, its step of how many, and the seconds a step takes."""
        seconds = (time.perf_counter() - self.began) / (self.step - self.first)
        record = {"step": self.step} | record | {"seconds": seconds}
        with stop_all_on_error():
            if self.processes.rank == 0:
                checkpoint.append_log(self.folder, record | {"steps": self.steps})
        return record

    def say(self, record):
        """Print a record as a line above the progress bar, on process 0."""
        if self.processes.rank == 0:
            self.progress.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))

    def save(self):
        """Write last.pt: all that a continuation or a finetuning needs."""
        if self.dry:
            return

        # Weights that a loss which is not finite has touched are never saved.
        agree(self.losses, keep=0)
        with stop_all_on_error():
            if self.processes.rank == 0:
                hours = self.hours + (time.perf_counter() - self.began) / 3600
                checkpoint.save_checkpoint(self.path, self.contents | {
                    "step": self.step, "hours": hours, "versions": checkpoint.versions(),
                    "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        self.saved = self.step

    def print_end(self, verdict=""):
        """Print where the run stands, on process 0, and after its last step the verdict."""
        if self.processes.rank or self.dry:
            return
        if not self.step:
            print("stopped before the first step")
            return
        more = "; the same command goes on from there"
        if self.step == self.steps:
            more = f"\n{verdict}" if verdict else ""
        print(f"{self.path} holds step {self.step} of {self.steps}{more}")


def to_host(step, names, loss):
    """A loss on its way to the CPU, which nobody waits for: (step, samples, tensor, event)."""
    # The event tells later whether the copy, which is queued on the device, has arrived.
    copy = loss.detach().to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream().record_event() if loss.is_cuda else None
    return step, names, copy, arrived


def agree(losses, *flags, keep=1):
    """Share the flags between processes, as any_process does, and stop all if a loss is not finite.

    losses: list of to_host() records; all but the last `keep` are read and dropped. Raises
    UserError on all processes if one of those read is not finite."""
    bad = ""
    while len(losses) > keep:
        step, names, loss, arrived = losses.pop(0)
        if arrived is not None:
            arrived.synchronize()
        if not bad and not math.isfinite(loss):
            bad = (f"loss {loss.item()} at step {step}, samples {', '.join(names)}; "
                   "last.pt is from before it")

    # Flags and losses go in one message: most steps need no other, save the gradients.
    *flags, diverged = any_process(*flags, bad)
    if diverged:
        stop_all(bad)
    return flags


# ------------------------------------------------------------------------------------ what it costs
def estimate(batches, workers, steps, device):
    """Hand a few batches to the training loop, then print what `steps` steps will cost.

    That is the time, the share of it spent waiting for data, and the peak memory of training, not
    of evaluation."""
    # The last ten are measured. For the first ones, which compile, the loader has read ahead.
    measured = 10
    count = 2 + measured + 2 * workers

    waits = []
    marks = [time.perf_counter()]
    for batch in itertools.islice(batches, count):
        waits.append(time.perf_counter() - marks[-1])
        yield batch

        # The ten are one block: a device that is never waited for runs behind the host.
        if len(waits) == count - measured:
            devices.synchronize(device)
        marks.append(time.perf_counter())
    devices.synchronize(device)
    marks[-1] = time.perf_counter()
    if not waits or dist.get_rank():
        return

    measured = min(measured, len(waits))
    seconds = marks[-1] - marks[-1 - measured]
    waiting = sum(waits[-measured:]) / seconds
    step = seconds / measured
    peak, memory = devices.peak_memory(device)
    fits = "fits" if peak < 0.9 * memory else "tight"
    print(f"step {step:.3g} s, {waiting:.0%} of it waiting for data; {steps} steps: "
          f"{steps * step / 3600:.2f} hours; peak memory of a process {peak / 2 ** 30:.2f} of "
          f"{memory / 2 ** 30:.1f} GiB: {fits}")
