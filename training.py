"""Processes in step: how they start, agree, stop together; what a run costs; schedule and compilation."""

import contextlib
import importlib.util
import inspect
import itertools
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import typing

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import config
from config import UserError


def learning_rate(step, steps, warmup, base):
    """Appendix A: linear warm-up over `warmup` steps from base/1000, then a cosine, 0 at the last step."""
    if step < warmup:
        return base * (1e-3 + (1 - 1e-3) * step / warmup)
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


class Processes(typing.NamedTuple):
    rank: int
    world: int
    device: torch.device


def pick_device(device):
    """auto, cpu or cuda -> torch.device; UserError if that is not to be had."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 is float32, in convolutions, too
        return torch.device("cuda")
    return torch.device("cpu")


def init_processes(device):
    """Join the process group that torchrun describes, or one of a single process: both run the same code.

    Control messages travel over gloo on the CPU, gradients over nccl on CUDA."""
    device = pick_device(device)
    cuda = device.type == "cuda"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"at least {local + 1} processes on this node, but {torch.cuda.device_count()} GPUs")
    if cuda:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ:  # set by torchrun
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def quicken(model, device):
    """Give a plain network the quick forms of a device, if their file is there: fast_cpu.py, fast_cuda.py.
    -> the model. Call it before models.recompute."""
    device = torch.device(device)
    name = f"fast_{device.type}"
    if importlib.util.find_spec(name) is None:
        return model

    fast = importlib.import_module(name)
    if device.type == "cpu":
        fast.keep_freed_memory()
    return fast.install(model)


def convolves_contiguous(row):
    """Does this row of models.py convolve contiguous volumes on CUDA? Without fast_cuda.py all rows do."""
    if importlib.util.find_spec("fast_cuda") is None:
        return True
    return importlib.import_module("fast_cuda").convolves_contiguous(row)


def any_process(*flags):
    """Is a flag raised on any process? One all-reduce over gloo on the CPU; the device is not waited for."""
    raised = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def stop_all(message=""):
    """If any process brings a message, UserError on all: with the first one on process 0, which prints it."""
    if any_process(message)[0]:
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
        raise UserError(next(filter(None, messages)) if dist.get_rank() == 0 else "")


@contextlib.contextmanager
def stop_all_on_error():
    """For work that may fail on one process alone (its files, a full disk): a UserError in it stops all,
    instead of leaving the others in their next collective. It is a barrier, too."""
    message = ""
    try:
        yield
    except UserError as error:
        message = str(error)
    stop_all(message)


def raise_if_not_finite(losses, *flags, keep=1):
    """any_process() on flags, and stop_all() if a loss of any process is not finite.

    losses: list of to_host() records; all but the last `keep` are read and dropped."""
    bad = ""
    while len(losses) > keep:
        step, names, loss, ready = losses.pop(0)
        if ready is not None:
            ready.synchronize()
        if not bad and not math.isfinite(loss):
            bad = f"loss {loss.item()} at step {step}, samples {', '.join(names)}; last.pt is from before it"
    *flags, diverged = any_process(*flags, bad)
    if diverged:
        stop_all(bad)
    return flags


def to_host(step, names, loss):
    """A loss on its way to the CPU, without waiting for the device: (step, samples, tensor, event)."""
    copy = loss.detach().to("cpu", non_blocking=True)
    return step, names, copy, torch.cuda.current_stream().record_event() if loss.is_cuda else None


def sum_over_processes(tensor):
    """Sum of a tensor over all processes, as float64 on the CPU. Sums are reduced, never means."""
    tensor = tensor.detach().to("cpu", torch.float64, copy=True)
    dist.all_reduce(tensor)
    return tensor


def check_same(message, *numbers):
    """UserError with the message unless the numbers are the same on all processes."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    stop_all(message if (sum_over_processes(mine) != mine * dist.get_world_size()).any() else "")


def distribute(model):
    """DistributedDataParallel. It warns of gradients whose strides are not their weights', even along an axis
    of one, where channels-last convolutions set others: such gradients are viewed in the weights' here.

    Buffers, which here are constants, do not travel. Gradients live in the buckets that travel: one copy
    less."""
    for weight in model.parameters():
        if 1 in weight.shape:
            weight.register_hook(lambda grad: grad.flatten().view(grad.shape))
    known = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers" in known  # from torch 2.13 on
    buffers = "forward_sync_buffers" if new else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})


def choose_compile(wanted, row, device):
    """Whether to compile: true or false as given. None, auto: on CUDA, but not SwinUNETR, as in Appendix A.

    Not on a CPU: a compiled step is no quicker there, and the first one takes minutes (bench/RESULTS.md)."""
    if wanted is not None:
        return wanted
    return device.type == "cuda" and row != "swinunetr"


def say_compile(wanted, row, device):
    """What choose_compile decided, for the header of a run."""
    decided = "on" if choose_compile(wanted, row, device) else "off"
    if wanted is not None:
        return f"torch.compile {decided}"
    why = "no quicker on a CPU" if device.type == "cpu" else "as in Appendix A"
    return f"torch.compile {decided} (auto: {why}; --compile true or false)"


def warn_of_cudnn(device, precision, contiguous):
    """One line if torch does not use this cuDNN for 3-D convolutions in bf16 of contiguous volumes. Its own
    kernels take 4 to 20 times as long, and up to 17 times the memory (pytorch 166122, 166643, 174051)."""
    version = torch.backends.cudnn.version() or 0
    if device.type == "cuda" and precision == "bf16" and contiguous and 90800 <= version < 91500:
        name = f"{version // 10000}.{version // 100 % 100}"
        print(f"warning: with cuDNN {name}, 3-D convolutions in bf16 take 4 to 20 times as long. Install "
              "cuDNN 9.15 or later (torch 2.11 brings 9.19), or give --precision fp32", file=sys.stderr)


def compile_or_warn(model, wanted, device):
    """torch.compile; where that fails on something tiny (no compiler, no Triton), the model as it is and one
    line of warning. All processes compile, or none."""
    reason = ""
    if wanted:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = config.first_line(error)
    if any_process(reason)[0]:
        if dist.get_rank() == 0:
            print(f"warning: torch.compile fails here, going on without it: {reason or 'on another process'}",
                  file=sys.stderr)
        return model
    if not wanted:
        return model
    # On CUDA the layout of volumes is ours: the compiler's own, made for images, would undo it.
    keep = {"options": {"layout_optimization": False}} if device.type == "cuda" else {}
    return torch.compile(model, **keep)


def synchronize(device):
    """Wait for all that is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def estimate(batches, workers, steps, device):
    """Hand a few batches to the training loop, then print what `steps` steps will cost: time, the share of it
    spent waiting for data, peak memory of training (not of evaluation).

    The last ten are measured, as one block: a device that is never waited for runs behind the host. The
    loader has read ahead for the first ones while they compiled."""
    count, measured = 12 + 2 * workers, 10
    waits, marks = [], [time.perf_counter()]
    for batch in itertools.islice(batches, count):
        waits.append(time.perf_counter() - marks[-1])
        yield batch
        if len(waits) == count - measured:
            synchronize(device)
        marks.append(time.perf_counter())
    synchronize(device)
    marks[-1] = time.perf_counter()
    if not waits or dist.get_rank():
        return

    measured = min(measured, len(waits))
    seconds = marks[-1] - marks[-1 - measured]
    waiting = sum(waits[-measured:]) / seconds
    step = seconds / measured
    if device.type == "cuda":
        # What the allocator holds is what must fit: more than what tensors use of it at once.
        peak, memory = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    print(f"step {step:.3g} s, {waiting:.0%} of it waiting for data; {steps} steps: "
          f"{steps * step / 3600:.2f} hours; peak memory of a process {peak / 2 ** 30:.2f} of "
          f"{memory / 2 ** 30:.1f} GiB: {'fits' if peak < 0.9 * memory else 'tight'}")


def catch_signals():
    """SIGTERM and SIGINT (preemption, Ctrl-C) set the returned event; the loop ends after its step."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
