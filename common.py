"""What the scripts share identically: configuration, processes, randomness, checkpoints, logs."""

import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import mmap
import os
import re
import reprlib
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import typing
import zipfile
import zlib
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises when it refuses

import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend. Its message is one line: what is wrong, where, and the likely fix."""


# What torch says when a loader process was killed, or found no room for what it hands over.
LOST = ("DataLoader worker (pid", "shared memory(shm)", "shared memory object")
# How torch, cuDNN, cuBLAS, NCCL and the C library spell that memory has run out.
NO_MEMORY = ("out of memory", "can't allocate memory", "status_alloc_failed")


def run(main, config_class):
    """Entry point of every script: command line -> main(cfg). A UserError is one line and exit code 2."""
    # A file name that is not UTF-8 is printed with an escape, as Python does on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    message, cfg = "", None
    try:
        cfg = parse_config(config_class, sys.argv[1:])
        code = main(cfg) or 0
    except UserError as error:
        message, code = str(error), 2
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            names = [field.name for field in dataclasses.fields(config_class) if field.name in MEMORY]
            message, code = f"out of memory; what helps, see --help: {', '.join(names)}", 1
        elif "gloo/transport" in str(error) or isinstance(error, dist.DistBackendError):
            message, code = "stopped: another process ended, see its own message", 1
        elif any(words in str(error) for words in LOST):
            message = "a loader process was lost, for want of memory or of /dev/shm (docker: --shm-size)?"
            message, code = f"{message} Try fewer --workers", 1
        else:
            raise
    if message and (cfg or os.environ.get("LOCAL_RANK", "0") == "0"):  # a command line is the same on a node
        tqdm.write("error: " + " ".join(message.split()), file=sys.stderr)  # on a line beside its bars
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the end of gloo's threads (torch 2.13) aborts one process in twenty
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def ran_out_of_memory(error):
    """Is that what an exception says? torch's own class is not the only spelling."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error).lower() for words in NO_MEMORY)


def parse_config(config_class, argv):
    """`[file.yaml ...] [--key value ...] [--switch]` -> config_class; later files win over earlier, the
    command line over files.

    Words that are neither go to the field `inputs`. Raises UserError for an unknown key (naming the nearest
    known one), a value of the wrong type, or a missing file."""
    if "-h" in argv or "--help" in argv:
        print(_help(config_class))
        sys.exit(0)
    values, given, inputs, rest = {}, {}, [], list(argv)
    switches = {field.name for field in dataclasses.fields(config_class) if field.type is bool}
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if not equals and key in switches and (not rest or rest[0].startswith("--")):
                value = "true"
            elif not equals and not rest:
                raise UserError(f"{word} needs a value: {word} VALUE")
            given[key] = value if equals or value else rest.pop(0)
        elif word.endswith((".yaml", ".yml")):
            values |= read_yaml(config_class, word)
        else:
            inputs.append(word)
    if inputs and not any(field.name == "inputs" for field in dataclasses.fields(config_class)):
        raise UserError(f"{inputs[0]!r} is neither a --key nor a .yaml file")
    given |= {"inputs": inputs} if inputs else {}
    return build_config(config_class, values | cast_values(config_class, given, "the command line"))


def read_yaml(config_class, path):
    """A YAML file of `key: value` lines -> {key: value cast to the type of config_class's field}."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise yaml.YAMLError("aliases (*name) are not read: a few lines of them can fill any memory")
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 from byte {error.start} on: save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `key: value`, found {type(values).__name__}")
    return cast_values(config_class, values, path)


def cast_values(config_class, values, where):
    """Each value to its field's declared type (PyYAML reads 1e-4 as a string)."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(kinds)}"
            raise UserError(f"unknown key {key!r} in {where}; {hint}")
    return {key: _cast(value, kinds[key], key, where) for key, value in values.items()}


RANGES = {"overlap": (0, 0.95)} | dict.fromkeys(  # of numbers; all others start at 0
    ("batch_size", "micro_batch", "batch", "patch_size", "token_size", "log_every", "save_every", "val_every",
     "preview"), (1, math.inf))
MEMORY = ("micro_batch", "batch_size", "batch", "patch_size", "recompute")  # what may help


def build_config(config_class, values):
    missing = [f.name for f in dataclasses.fields(config_class) if f.name not in values
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise UserError(f"{', '.join('--' + name for name in missing)} must be given; see --help")
    return config_class(**values)


def _cast(value, kind, key, where):
    """bool, int, float, str, dict, tuple[T, ...], or one of these | None."""
    wrong = UserError(f"{key} in {where}: expected {getattr(kind, '__name__', kind)}, got "
                      f"{reprlib.repr(value)}")
    if isinstance(kind, types.UnionType):
        inner = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        nothing = (None, "none", "None", "null", *(["auto"] if inner is bool else []))
        return None if value in nothing else _cast(value, inner, key, where)
    if typing.get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return tuple(_cast(part, typing.get_args(kind)[0], key, where) for part in parts)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    accepted = {int: (int, str), float: (int, float, str)}.get(kind, kind)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise wrong
    try:
        number = kind(value)
    except ValueError:
        raise wrong from None
    if kind is float and not math.isfinite(number):
        raise wrong
    low, high = RANGES.get(key, (0, math.inf))
    if kind in (int, float) and not low <= number <= high:
        raise UserError(f"{key} in {where}: {number} is out of range, {low} to {high}")
    return number


def _help(config_class):
    """The script's docstring, then each field with its default and the comment that stands beside it."""
    doc = sys.modules[config_class.__module__].__doc__ or ""
    lines = [doc.strip(), "", "--key value, or key: value in a YAML file:"]
    field = re.compile(r"^    (\w+): [^=#\n]+?(?: = ([^#\n]*?))?\s*(?:#\s*(.*))?$", re.MULTILINE)
    for name, default, comment in field.findall(inspect.getsource(config_class)):
        lines.append(f"  --{name:<16} {default or 'required':<12} {comment}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- randomness
def derive_seed(*parts):
    """Seed of one draw: a 63-bit hash of (seed, epoch, sample, purpose), the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def learning_rate(step, steps, warmup, base):
    """Appendix A: linear warm-up over `warmup` steps from base/1000, then a cosine, 0 at the last step."""
    if step < warmup:
        return base * (1e-3 + (1 - 1e-3) * step / warmup)
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


# -------------------------------------------------------------------------------------------------- processes
class Processes(typing.NamedTuple):
    rank: int
    world: int
    device: torch.device


# cuDNN tries its kernels on the first batch of each shape. A guess, until bench/gpu.py has measured it.
CUDNN_BENCHMARK = True


def pick_device(device):
    """auto, cpu or cuda -> torch.device; UserError if that is not to be had."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        torch.backends.cudnn.benchmark = CUDNN_BENCHMARK
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 is float32, in convolutions, too
        return torch.device("cuda")
    keep_freed_memory()
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


def keep_freed_memory():
    """glibc gives every large tensor back to the kernel when it is freed, and each new one costs a page fault
    for every 4 KB: much of a training step on a CPU. Keep it instead; elsewhere than glibc, do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing through mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays


def agree(*flags):
    """Is a flag raised on any process? One all-reduce over gloo on the CPU; the device is not waited for."""
    raised = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def stop_all(message=""):
    """If any process brings a message, UserError on all: with the first one on process 0, which prints it."""
    if agree(message)[0]:
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
        raise UserError(next(filter(None, messages)) if dist.get_rank() == 0 else "")


@contextlib.contextmanager
def together():
    """For work that may fail on one process alone (its files, a full disk): a UserError in it stops all,
    instead of leaving the others in their next collective. It is a barrier, too."""
    message = ""
    try:
        yield
    except UserError as error:
        message = str(error)
    stop_all(message)


def check_in(losses, *flags, keep=1):
    """agree() on flags, and stop_all() if a loss of any process is not finite.

    losses: list of to_host() records; all but the last `keep` are read and dropped."""
    bad = ""
    while len(losses) > keep:
        step, names, loss, ready = losses.pop(0)
        if ready is not None:
            ready.synchronize()
        if not bad and not math.isfinite(loss):
            bad = f"loss {loss.item()} at step {step}, samples {', '.join(names)}; last.pt is from before it"
    *flags, diverged = agree(*flags, bad)
    if diverged:
        stop_all(bad)
    return flags


def to_host(step, names, loss):
    """A loss on its way to the CPU, without waiting for the device: (step, samples, tensor, event)."""
    copy = loss.detach().to("cpu", non_blocking=True)
    return step, names, copy, torch.cuda.current_stream().record_event() if loss.is_cuda else None


def total(tensor):
    """Sum of a tensor over all processes, as float64 on the CPU. Sums are reduced, never means."""
    tensor = tensor.detach().to("cpu", torch.float64, copy=True)
    dist.all_reduce(tensor)
    return tensor


def check_same(message, *numbers):
    """UserError with the message unless the numbers are the same on all processes."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    stop_all(message if (total(mine) != mine * dist.get_world_size()).any() else "")


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
            reason = first_line(error)
    if agree(reason)[0]:
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


# --------------------------------------------------------------------------------------------- files and logs
@contextlib.contextmanager
def writing(path):
    """A full disk, a quota, a folder that is not there: UserError naming the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic(path, owner=""):
    """Yields a temporary name beside `path`, whose folder is made; at the end it is on the disk, and renamed:
    what exists under its final name is whole. What a killed process left, the next one overwrites. owner:
    tells apart those that write a file at once."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".part{owner}-{name}")
    try:
        with writing(path):
            os.makedirs(folder or ".", exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


_locks = []


def lock(folder):
    """This process alone works in `folder` until it ends. UserError if another one does, as a job that was
    submitted again while the first still runs."""
    path = os.path.join(folder, ".lock")
    with writing(path):
        os.makedirs(folder, exist_ok=True)
        _locks.append(open(path, "w"))
    try:
        fcntl.lockf(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is at work in {folder}: wait for it, or new --out") from None
    except OSError:  # a file system without locks
        pass


# Names of files that are not UTF-8: Python reads their bytes as surrogates. So do our text files, both ways.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


def write_text(path, text):
    with atomic(path, os.getpid()) as temporary, open(temporary, "w", **TEXT) as file:
        file.write(text)


def read_text(path):
    with open(path, **TEXT) as file:
        return file.read()


def check_files(folder, paths):
    """UserError unless all these files of a prepared folder are there. Each of its folders is listed once,
    which is quick for 45,000 files on a network disk, too."""
    listed, missing = {}, []
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in listed:
            try:
                listed[parent] = {entry.name for entry in os.scandir(parent)}
            except OSError:
                listed[parent] = set()
        if name not in listed[parent]:
            missing.append(path)
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} files that its index names, the first "
                        f"{min(missing)}: copy the whole folder, or prepare it again")


def checksum(path):
    """sha256 of a file; of our checkpoints the one that they carry."""
    with open(path, "rb") as file:
        file.seek(-min(os.path.getsize(path), len(SEAL) + 64), os.SEEK_END)
        end = file.read()
        if end.startswith(SEAL):
            return end.removeprefix(SEAL).decode("ascii")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


FORMAT = 1  # of our checkpoints; counts up when older code could not read them any more
SEAL = b"sha256:"  # and 64 hex digits: the comment of the zip file that a checkpoint is, its last bytes


def seal(file, tail):
    """What the last `tail` bytes of an open checkpoint must be: length of the comment, sha256 of the rest."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view, \
            view[:-tail] as body:
        comment = SEAL + hashlib.sha256(body).hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def save_checkpoint(path, payload):
    """Tensors, numbers, strings and containers of them in one file with its checksum."""
    with atomic(path) as temporary, open(temporary, "w+b") as file:
        try:
            torch.save({"format": FORMAT} | payload, file)
        except RuntimeError as error:  # torch's own, over the one that says that the disk is full
            raise error.__context__ or error from None
        file.flush()
        end = seal(file, 2)  # in place of the last two bytes, the length of no comment
        file.seek(-2, os.SEEK_END)
        file.write(end)


def check_file(path):
    """-> does it have our checksum? ValueError if a wrong one, or if it would unpack to more than it is."""
    tail = 2 + len(SEAL) + 64
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail))
        end = file.read()
        sealed = end.startswith(SEAL, 2)
        if sealed and end != seal(file, tail):
            raise ValueError("its checksum does not fit")
        members = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        if size < sum(member.file_size for member in members):
            raise ValueError("it is compressed, as no checkpoint is")
        if is_torchscript(member.filename for member in members):
            raise ValueError("it is a program")
    return sealed


# What is given as a checkpoint and is none: the first bytes, what the file is, and the likely fix.
PAGE = "a web page: the download needs a login"
PACKED = "an archive: unpack it and give the checkpoint that is in it"
SCAN = "a scan: --ckpt takes a network, the scans follow without a --key"
OTHERS = ((b"version https://git-lfs", "a git-lfs pointer: fetch the file itself with git lfs pull"),
          (b"<!doctype html", PAGE), (b"<html", PAGE), (b"<?xml", PAGE), (b"<!--", PAGE),
          (b"7z\xbc\xaf", PACKED), (b"rar!", PACKED), (b"\xfd7zxz", PACKED), (b"bzh", PACKED),
          (b"\x28\xb5\x2f\xfd", PACKED),
          (b"\x89hdf", "an HDF5 file, as Keras writes: convert it to a state_dict of torch"),
          (b"\x93numpy", "an array of numpy: convert it to a state_dict of torch"),
          *((struct.pack(order + "i", size), SCAN) for order in "<>" for size in (348, 540)),
          (struct.pack(">i", 1), SCAN))  # NIfTI-1, NIfTI-2 and FreeSurfer's


def is_torchscript(names):
    """Are these the members of an archive that torch.jit.save made?"""
    return any(name.endswith("/constants.pkl") for name in names)


def what_else(path):
    """What a file is that torch cannot read, and the likely fix; "" if that does not show."""
    if os.path.isdir(path):
        return what_folder(path)

    with open(path, "rb") as file:
        head = file.read(512)
        is_zip = zipfile.is_zipfile(file)
    if not head:
        return "empty: copy or download it again"

    if is_zip:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if is_torchscript(names):
            return "a TorchScript archive: save the state_dict of its module"
        return "" if any(name.endswith("data.pkl") for name in names) else PACKED

    # Of a compressed file, what is inside counts: a scan, or an archive of many files.
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        with contextlib.suppress(zlib.error):
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, 512)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for beginning, what in OTHERS:
        if start.startswith(beginning) or head.startswith(beginning):
            return what
    if packed or head[257:262] == b"ustar":
        return PACKED
    if head[128:132] == b"DICM":
        return SCAN

    # A header of JSON after its length: the format of safetensors.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return ("a safetensors file: read it with safetensors.torch.load_file and torch.save the "
                "dictionary")
    with contextlib.suppress(UnicodeDecodeError):
        words = head[:40].decode("ascii").split()
        if all(word.isprintable() for word in words):
            return f"a text file, which begins {reprlib.repr(' '.join(words))}"
    return ""


def what_folder(path):
    """The checkpoint that is meant by a folder's name."""
    inside = next((name for name in ("last.pt", "fold_0/last.pt")
                   if os.path.exists(os.path.join(path, name))), None)
    if inside:
        return f"a folder: give {os.path.join(path, inside)}"
    if os.path.exists(os.path.join(path, "data.pkl")):
        return "a checkpoint that the browser has unpacked: download it again, or zip -0 -r the folder"
    return "a folder without a last.pt: give the checkpoint itself"


def largest(tree):
    """Bytes of the largest tensor in nested containers."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return max(map(largest, children), default=0)


# What torch raises on files that are damaged, hostile or of another kind.
UNREADABLE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError,
              RuntimeError, TypeError, ValueError, UnpicklingError, struct.error, zipfile.BadZipFile)


def why_not(path, error):
    """What is wrong with a file that torch cannot read, in words that follow its name."""
    try:
        what = what_else(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        what = ""
    if what:
        return f"is {what}"

    if isinstance(error, UnpicklingError):
        names = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
        which = f" ({names[0]})" if names else ""
        return (f"is damaged, or holds more than tensors, numbers and strings{which}: refused, and nothing "
                "in it was run. If it is sound, save its plain state_dict")
    return f"is damaged, truncated or no torch file: {reason(error)}"


def load_checkpoint(path):
    """torch.load onto the CPU with weights_only=True, always: nothing in the file is ever run. UserError if
    it is damaged, hostile, or of a later format; a file of others needs neither checksum nor format."""
    try:
        sealed = check_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if largest(checkpoint) > os.path.getsize(path):
            raise ValueError("a tensor in it is larger than the file")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint at {path}") from None
    except UNREADABLE as error:
        raise UserError(f"{path} {why_not(path, error)}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    for key, kind in {"format": int, "kind": str, "row": str, "config": dict, "task": dict}.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise UserError(f"{path} is no checkpoint: its {key} is a {type(checkpoint[key]).__name__}")
    if checkpoint.get("format", 0) > FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']}, newer than {FORMAT}, the last that this "
                        "code reads: update it")
    if "format" in checkpoint and not sealed:
        raise UserError(f"{path} is damaged: it lost its checksum")
    return checkpoint


def first_line(error):
    return str(error).strip().split("\n")[0]


def reason(error):
    """First line of an error, without the file's name: the message around it has that."""
    return getattr(error, "strerror", None) or first_line(error)


def check_same_run(what, then, cfg, free):
    """UserError if the settings `then` of what is there are not cfg's; keys in `free` do not touch what is
    computed."""
    now = dataclasses.asdict(cfg)
    changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now
               if key not in free and then.get(key) != now[key]]
    if changed:
        raise UserError(f"{what} of another run ({', '.join(changed)}): new --out, or the old values")


def check_same_inputs(what, then, now, fix="new --out, or the old data"):
    """UserError if cases are made of other files now than then: both {name: {part: checksum or shape}}.

    What one of the two does not say is not compared, as in folders of earlier versions."""
    words = {"sha256": "scan", "label_sha256": "label", "shape": "prepared volume"}
    changed = {}
    for name in sorted(set(then) & set(now)):
        differ = [word for part, word in words.items() if then[name].get(part) and now[name].get(part)
                  and then[name][part] != now[name][part]]
        if differ:
            changed[name] = " and ".join(differ)
    if changed:
        first = min(changed)
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"{what} (another {changed[first]} of {first}{more}): {fix}")


def resume(path, cfg, free, model, optimizer, sha256=None, inputs=None):
    """Continue from `path`: load model and optimizer -> (step to go on with, hours it took); zeros if there
    is no file. UserError if it is another configuration's run, or one on other raw files than `sha256`, or
    `inputs`, as tasks.inputs_of gives them."""
    if not os.path.exists(path):
        return 0, 0.0
    checkpoint = load_checkpoint(path)
    check_same_run(f"{path} is", checkpoint.get("config", {}), cfg, free)
    if None not in (sha256, checkpoint.get("sha256")) and checkpoint["sha256"] != sha256:
        raise UserError(f"{path} is of a run on other data: new --out, or the old data")
    check_same_inputs(f"{path} is of a run on other data", checkpoint.get("inputs", {}), inputs or {})
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return int(checkpoint["step"]), float(checkpoint.get("hours", 0))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this network: {first_line(error)}; new --out") from None


def append_log(folder, record):
    """One JSON line in log.jsonl."""
    path = os.path.join(folder, "log.jsonl")
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_log(folder, step):
    """On resume: drop the lines of steps that will be done again, and a half-written last line."""
    path = os.path.join(folder, "log.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(lines))


def table(header, rows):
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


@functools.cache
def versions():
    """What a run was made with, for its header and its checkpoints."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "cuda": torch.version.cuda or "", "commit": git.stdout.strip() or "unknown"}
