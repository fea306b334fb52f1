"""A device: which one, in what precision and form it computes, and what fits on it."""

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
import swin
from config import UserError

# --precision -> dtype of weights and inputs. bf16 is autocast over float32 weights.
PRECISIONS = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def pick_device(device):
    """auto, cpu or cuda -> torch.device; UserError if that is not to be had."""
    config.check_choice("device", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu")

    if device != "cpu" and torch.cuda.is_available():
        # --precision fp32 is float32, in convolutions, too.
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda")
    return torch.device("cpu")


def autocast(precision, device):
    """The context of a forward pass: bfloat16 where it is safe for bf16, as it is for fp32 and fp64."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ------------------------------------------------------------------- quicker forms and compilation
def quicken(model, device):
    """Give a plain network the quick forms of its device, in place -> the model.

    Call it before recompute. Without the file of the device, fast_cpu.py or fast_cuda.py, the
    model stays plain.
    """
    device = torch.device(device)
    name = f"fast_{device.type}"
    if importlib.util.find_spec(name) is None:
        return model

    fast = importlib.import_module(name)
    if device.type == "cpu":
        fast.keep_freed_memory()
        fast.install_lookup()
    return fast.install(model)


def convolves_contiguous(row):
    """Does a row of models.py convolve contiguous volumes on CUDA? Without fast_cuda.py all do."""
    if importlib.util.find_spec("fast_cuda") is None:
        return True
    return importlib.import_module("fast_cuda").convolves_contiguous(row)


def choose_compile(wanted, row, device):
    """Whether to compile: true or false as given. None, auto: on CUDA, but not SwinUNETR, as in Appendix A.

    Not on a CPU: a compiled step is no quicker there, and the first one takes minutes (bench/RESULTS.md).
    """
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
    """One line if torch does not use this cuDNN for 3-D convolutions in bf16 of contiguous volumes.

    Its own kernels take 4 to 20 times as long, and up to 17 times the memory (pytorch 166122, 166643, 174051).
    """
    version = torch.backends.cudnn.version() or 0
    if device.type == "cuda" and precision == "bf16" and contiguous and 90800 <= version < 91500:
        name = f"{version // 10000}.{version // 100 % 100}"
        print(f"warning: with cuDNN {name}, 3-D convolutions in bf16 take 4 to 20 times as long. Install "
              "cuDNN 9.15 or later (torch 2.11 brings 9.19), or give --precision fp32", file=sys.stderr)


# ------------------------------------------------------------------------------------- what fits
def recompute(model):
    """Activation checkpointing, after devices.quicken: in the backward pass every block computes
    its activations again instead of keeping them. bench/models.py measures memory and time."""
    for module in model.modules():
        if isinstance(module, (models.Block, models.MedNeXtBlock, swin.SwinBlock, swin.ResidualBlock)):
            module.forward = functools.partial(torch.utils.checkpoint.checkpoint, module.forward,
                                               use_reentrant=False, preserve_rng_state=False)


def check_patch(model, size, device, precision):
    """UserError unless the model takes patches of this side, in voxels."""
    # Instance norm needs more than one voxel at the coarsest level.
    least = 2
    where = ""

    # In bf16, oneDNN's weight gradient of a 3^3 convolution over 2^3 voxels is not finite (torch
    # 2.13).
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
    """Elements of the largest tensor in a forward pass. On the device meta it computes nothing."""
    with LargestTensor() as largest:
        model(x)
    return largest.elements


def most_samples(model, patch_size):
    """How many samples a forward pass may hold, so that no tensor has 2^31 elements or more.

    From there on kernels count in 64 bits, or not at all."""
    # On the device meta there are shapes, but no numbers: nothing is computed.
    patch = torch.empty(1, 1, patch_size, patch_size, patch_size, device="meta")
    largest = largest_tensor(copy.deepcopy(model).to("meta"), patch)
    return max(1, (2 ** 31 - 1) // largest)


def synchronize(device):
    """Wait for all that is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Most memory that this process has held so far, and what there is for it, in bytes."""
    if device.type == "cuda":
        # What the allocator holds is what must fit: more than what tensors use of it at once.
        return torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return peak, memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
