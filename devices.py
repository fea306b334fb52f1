"""A device: which one, the precision and form it computes in, what fits on it and what it used."""

import copy
import functools
import importlib.util
import os
import resource
import sys

import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import config
import models
import resenc
import swin
from config import UserError

# --precision -> dtype of weights and inputs. bf16 is autocast over float32 weights.
PRECISIONS = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def pick_device(device):
    """auto, cpu or cuda -> torch.device. Raises UserError for a GPU where there is none."""
    config.check_choice("device", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu")

    if device != "cpu" and torch.cuda.is_available():
        # With --precision fp32, convolutions shall be in float32, too.
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda")
    return torch.device("cpu")


def autocast(precision, device):
    """The context of a forward pass.

    With bf16 it computes in bfloat16 where that is safe; with fp32 and fp64 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# -------------------------------------------------------------------- quicker forms and compilation
def quicken(model, device):
    """Give a plain network the quick forms of its device, in place -> the model.

    Call it before recompute. Without the file of the device, fast_cpu.py or fast_cuda.py, the
    model stays plain."""
    # These files are optional, so they are looked up by name.
    device = torch.device(device)
    name = f"fast_{device.type}"
    if importlib.util.find_spec(name) is None:
        return model

    # On a CPU the allocator and the augmentations have quicker forms, too.
    fast = importlib.import_module(name)
    if device.type == "cpu":
        fast.keep_freed_memory()
        fast.install_lookup()
    return fast.install(model)


def prepare(model, device, precision, recomputes):
    """Make a plain network ready to train, in place: on its device, in its precision and quick
    forms, and with activation checkpointing if it recomputes."""
    quicken(model.to(device, PRECISIONS[precision]), device)
    if recomputes:
        recompute(model)


def convolves_contiguous(row):
    """Does a row of models.py convolve contiguous volumes on CUDA?"""
    # Volumes are contiguous unless fast_cuda.py makes them channels-last.
    if importlib.util.find_spec("fast_cuda") is None:
        return True
    return importlib.import_module("fast_cuda").convolves_contiguous(row)


def choose_compile(wanted, row, device):
    """Whether to compile a row of models.py: as `wanted`; for None on CUDA, but not SwinUNETR."""
    if wanted is not None:
        return wanted

    # So does Appendix A. On a CPU a compiled step is no quicker, and the first one takes minutes
    # (bench/RESULTS.md).
    return device.type == "cuda" and row != "swinunetr"


def say_compile(wanted, row, device):
    """What choose_compile decided, for the header of a run."""
    decided = "on" if choose_compile(wanted, row, device) else "off"
    if wanted is not None:
        return f"torch.compile {decided}"

    why = "no quicker on a CPU" if device.type == "cpu" else "as in Appendix A"
    return f"torch.compile {decided} (auto: {why}; --compile true or false)"


def warn_of_cudnn(device, precision, contiguous):
    """One line if torch does not use this cuDNN for 3-D convolutions in bf16 of contiguous volumes.

    Its own kernels take 4 to 20 times as long, and up to 17 times the memory (pytorch 166122,
    166643, 174051)."""
    # 91500 is how cuDNN writes its version 9.15.0.
    version = torch.backends.cudnn.version() or 0
    concerned = device.type == "cuda" and precision == "bf16" and contiguous
    if concerned and 90800 <= version < 91500:
        name = f"{version // 10000}.{version // 100 % 100}"
        print(f"warning: with cuDNN {name}, 3-D convolutions in bf16 take 4 to 20 times as long. "
              "Install cuDNN 9.15 or later (torch 2.11 brings 9.19), or give --precision fp32",
              file=sys.stderr)


# ---------------------------------------------------------------------------------------- what fits
def recompute(model):
    """Activation checkpointing: in the backward pass every block computes its activations again
    instead of keeping them. Call it after quicken. bench/models.py measures memory and time."""
    blocks = (models.Block, models.MedNeXtBlock, swin.SwinBlock, swin.ResidualBlock,
              resenc.ConvBlock, resenc.ResidualBlock)
    for module in model.modules():
        if isinstance(module, blocks):
            module.forward = functools.partial(torch.utils.checkpoint.checkpoint, module.forward,
                                               use_reentrant=False, preserve_rng_state=False)


def check_patch(model, size, device, precision):
    """Raises UserError unless the model takes patches of this side, in voxels."""
    # Instance norm needs more than one voxel at the coarsest level.
    least = 2
    where = ""

    # With torch 2.13, oneDNN leaves some of the weight gradient of a 3^3 convolution unwritten, in
    # bf16 and where the first axis has two voxels: it is whatever the memory held.
    if device.type == "cpu" and precision == "bf16":
        least = 3
        where = " in bf16 on a CPU"

    multiple = model.size_multiple
    if size % multiple or size < least * multiple:
        raise UserError(f"patch_size {size}: choose a multiple of {multiple}, at least {least} "
                        f"times that{where}")


class LargestTensor(TorchDispatchMode):
    """While it is on, `elements` is the size of the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@torch.no_grad()
def largest_tensor(model, x):
    """Number of elements of the largest tensor in a forward pass of x."""
    with LargestTensor() as largest:
        model(x)
    return largest.elements


def most_samples(model, patch_size):
    """How many samples a forward pass may hold, so that no tensor has 2^31 elements or more.

    From there on kernels count in 64 bits, or do not work at all."""
    # On the device meta there are shapes, but no numbers: nothing is computed.
    patch = torch.empty(1, 1, patch_size, patch_size, patch_size, device="meta")
    largest = largest_tensor(copy.deepcopy(model).to("meta"), patch)
    return max(1, (2 ** 31 - 1) // largest)


def plan_batch(batch_size, micro_batch, world, objective, model, patch_size):
    """How many samples a process holds at once, and a line that says how they make a batch.

    micro_batch: as given, or None for as many as most_samples allows. For the objective of [23],
    None is all: it contrasts the samples that are held at once, and fewer would change it.
    UserError if the samples cannot be shared out evenly."""
    if batch_size % world:
        raise UserError(f"batch_size {batch_size} cannot be shared by {world} processes evenly")
    local = batch_size // world

    # Of the sizes that divide the share of a process, the largest that is allowed.
    why = ""
    micro = min(micro_batch or local, local)
    if objective == "amaes" and not micro_batch:
        most = most_samples(model, patch_size)
        if most < local:
            micro = max(size for size in range(1, most + 1) if local % size == 0)
            why = f" (micro_batch {micro}, so that no tensor has 2^31 elements)"

    if local % micro:
        raise UserError(f"micro_batch {micro} does not divide the {local} samples of a process")
    if objective == "swin" and micro < 2:
        raise UserError("objective swin contrasts the samples that a process holds at once, here "
                        f"one: give --batch_size {2 * world} or more, or fewer processes")
    line = f"batch {batch_size} = {world} processes x {local // micro} micro-batches x {micro}{why}"
    return micro, line


# ------------------------------------------------------------------------------------- what it used
def synchronize(device):
    """Wait for all that is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """The most memory that this process has held so far, and what there is for it, in bytes."""
    if device.type == "cuda":
        # What the allocator holds is what must fit: more than what tensors use of it at once.
        return torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]

    # The kernel counts in bytes on macOS, and elsewhere in KiB. The processes of a node share its
    # memory.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return peak, memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
