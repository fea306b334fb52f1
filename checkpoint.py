"""Files that are whole or absent: checkpoints and logs; weights from anywhere, strictly."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises when it refuses
from typing import NamedTuple

import numpy as np
import torch

import config
import strangers
from config import UserError


# -------------------------------------------------------------------------------------- whole files
@contextlib.contextmanager
def writing(path):
    """A full disk, a quota, a folder that is not there: UserError naming the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic(path, owner=""):
    """Yields a temporary name beside `path`; what was written there is renamed at the end.

    So what exists under its final name is whole. The folder is made. What a killed process left
    is overwritten by the next one. owner tells apart those that write one file at once."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".part{owner}-{name}")
    try:
        with writing(path):
            os.makedirs(folder or ".", exist_ok=True)
            yield temporary

            # The content must be on the disk before the name is.
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


# Names of files may be no UTF-8. Python reads such bytes as surrogates, and so do our text files.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


def write_text(path, text):
    with atomic(path, os.getpid()) as temporary, open(temporary, "w", **TEXT) as file:
        file.write(text)


def read_text(path):
    with open(path, **TEXT) as file:
        return file.read()


def save_array(path, array):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


_locks = []  # open files: a lock lasts until the process ends


def lock(folder):
    """Lock `folder`, so that no second run writes into it.

    UserError if it is locked, as by the first of two jobs where one was submitted again."""
    path = os.path.join(folder, ".lock")
    with writing(path):
        os.makedirs(folder, exist_ok=True)
        file = open(path, "w")
    _locks.append(file)

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is at work in {folder}: wait for it, or new "
                        "--out") from None
    except OSError:
        pass  # a file system without locks


def is_locked(folder):
    """Is another process at work in `folder`?"""
    path = os.path.join(folder, ".lock")
    if not os.path.exists(path):
        return False
    with open(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            pass  # a file system without locks
    return False


# -------------------------------------------------------------------------------------- checkpoints
FORMAT = 1  # of our checkpoints; counts up when older code could not read them any more

# A checkpoint is a zip file. Its last bytes are a comment, and before that the comment's length in
# two bytes. Ours is "sha256:" and the 64 hex digits of all that comes before those two.
SEAL = (71).to_bytes(2, "little") + b"sha256:"
SEAL_SIZE = len(SEAL) + 64


def read_seal(path):
    """The sha256 that a checkpoint of ours carries, in hex digits; "" if a file carries none."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_SIZE))
        end = file.read()
    if not end.startswith(SEAL):
        return ""
    return end.removeprefix(SEAL).decode("ascii", "replace")


def checksum(path):
    """sha256 of a file; of a checkpoint of ours the one that it carries."""
    carried = read_seal(path)
    if carried:
        return carried
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump(payload, file):
    """torch.save with the error that says that the disk is full, which torch's own hides."""
    try:
        torch.save(payload, file)
    except RuntimeError as error:
        raise error.__context__ or error from None


def save_checkpoint(path, payload):
    """Tensors, numbers, strings and containers of them in one file with its checksum."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        dump({"format": FORMAT} | payload, file)

        # As torch leaves it, the file ends with the length of no comment: the seal replaces it.
        file.seek(-2, os.SEEK_END)
        file.truncate()
        file.write(SEAL + checksum(temporary).encode())


def check_file(path):
    """ValueError if a file has changed since it was sealed, or is none that torch.save makes."""
    # The file is mapped, not read: a checkpoint may be larger than what memory is free.
    seal = read_seal(path)
    if seal:
        body = np.memmap(path, np.uint8, "r")[:-SEAL_SIZE]
        if hashlib.sha256(body).hexdigest() != seal:
            raise ValueError("its checksum does not fit")

    # Before 1.6 torch.save wrote no zip file.
    if not zipfile.is_zipfile(path):
        return

    # A few bytes may unpack to more than any memory holds. torch itself stores without packing.
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if os.path.getsize(path) < sum(member.file_size for member in members):
        raise ValueError("it is compressed, as no checkpoint is")
    if strangers.what_archive(path):
        raise ValueError("it is an archive, but not of torch.save")


def largest(tree):
    """Bytes of the largest tensor in nested containers."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = list(tree.values())
    if not isinstance(tree, (list, tuple)):
        return 0
    return max(map(largest, tree), default=0)


# What torch raises on files that are damaged, hostile or of another kind.
UNREADABLE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
              OSError, RuntimeError, TypeError, ValueError, UnpicklingError, struct.error,
              zipfile.BadZipFile)


def load_checkpoint(path):
    """torch.load onto the CPU with weights_only=True, always: nothing in the file is ever run.

    UserError if it is damaged, hostile, or of a later format. A file of others needs neither
    checksum nor format."""
    try:
        check_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)

        # A tensor with strides of 0 is small in the file, and fills any memory when it is copied.
        if largest(saved) > os.path.getsize(path):
            raise ValueError("a tensor in it is larger than the file")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint at {path}") from None
    except UNREADABLE as error:
        raise UserError(f"{path} {strangers.why_not(path, error)}") from None

    # What the scripts read of it must be of the right kind, if it is there at all.
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, not a checkpoint")
    kinds = {"format": int, "kind": str, "row": str, "config": dict, "task": dict}
    for key, kind in kinds.items():
        if key in saved and not isinstance(saved[key], kind):
            raise UserError(f"{path} is no checkpoint: its {key} is a {type(saved[key]).__name__}")

    # What has a format is ours, and ours is never without a seal.
    if "format" in saved and saved["format"] > FORMAT:
        raise UserError(f"{path} has format {saved['format']}, newer than {FORMAT}, the last that "
                        "this code reads: update it")
    if "format" in saved and not read_seal(path):
        raise UserError(f"{path} is damaged: it lost its checksum")
    return saved


# ------------------------------------------------------------------------------ to go on with a run
def check_same_run(what, saved, now, resumable):
    """UserError if the settings `saved` of what is there differ from `now` in a key that is not
    among the `resumable` ones."""
    changed = []
    for key, value in now.items():
        # A switch that is off may be newer than the run.
        newer = key not in saved and not value
        if key not in resumable and not newer and saved.get(key) != value:
            changed.append(f"{key} {saved.get(key)} -> {value}")
    if changed:
        raise UserError(f"{what} of another run ({', '.join(changed)}): new --out, or the old "
                        "values")


def check_same_inputs(what, before, now, fix="new --out, or the old data"):
    """UserError if cases that are in both were made of other files before than now.

    Both are {name: {part: checksum or shape}}. What one of the two does not say is not compared."""
    words = {"sha256": "scan", "label_sha256": "label", "shape": "prepared volume"}
    changed = {}
    for name in sorted(set(before) & set(now)):
        differ = []
        for part, word in words.items():
            # "" and None stand for what an earlier version did not write down.
            one, other = before[name].get(part), now[name].get(part)
            if one and other and one != other:
                differ.append(word)
        if differ:
            changed[name] = " and ".join(differ)

    if changed:
        first = min(changed)
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"{what} (another {changed[first]} of {first}{more}): {fix}")


def resume(path, contents, resumable, model, optimizer):
    """Load model and optimizer from `path` -> (step to go on with, hours it took), or zeros.

    UserError if it is of a run with other settings, or on other data, than `contents` says, what
    the new run's checkpoints will hold: config, sha256, inputs."""
    # A run that begins has no file yet.
    if not os.path.exists(path):
        return 0, 0.0

    # The run must be the same, in its settings and in its data.
    saved = load_checkpoint(path)
    check_same_run(f"{path} is", saved.get("config", {}), contents["config"], resumable)
    other_data = f"{path} is of a run on other data"
    known = None not in (contents["sha256"], saved.get("sha256"))
    if known and saved["sha256"] != contents["sha256"]:
        raise UserError(f"{other_data}: new --out, or the old data")
    check_same_inputs(other_data, saved.get("inputs", {}), contents["inputs"])

    # Of a file that is not ours, settings may fit and tensors not.
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"]), float(saved.get("hours", 0))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = config.first_line(error)
        raise UserError(f"{path} does not fit this network: {why}; new --out") from None


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
            whole = [line for line in file if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


@functools.cache
def versions():
    """What a run was made with, for its header and its checkpoints."""
    here = os.path.dirname(os.path.abspath(__file__))

    # Through a shell, since a machine may have no git.
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "cuda": torch.version.cuda or "", "commit": git.stdout.strip() or "unknown"}


# ------------------------------------------------------------------------------------------ weights
class Report(NamedTuple):
    """What load_weights did with each tensor of the model, and what it left unread in the file."""
    part: str
    taken: list
    reshaped: list
    new: list
    unused: list

    def __str__(self):
        groups = {"taken": self.taken, "reshaped": self.reshaped, "new": self.new,
                  "unused": self.unused}
        lines = []
        for what, names in groups.items():
            first = f"{names[0]} ..." if names else ""
            lines.append(f"  {what:<9} {len(names):>4}  {first}")

        # There is a report only if they all arrived.
        arrived = len(self.taken) + len(self.reshaped)
        lines.append(f"{self.part}: all {arrived} tensors taken (100 %)")
        return "\n".join(lines)


# Weights whose shape depends on the number of input channels.
STEMS = ("encoder.in_conv.conv1.conv.weight", "encoder.stem.weight",
         "swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight",
         "encoder1.layer.conv3.conv.weight", "encoder.stem.conv1.conv.weight")


def bare_names(saved):
    """The tensors of a checkpoint by the names used here: of ours ({"model": ...}), Lightning's and
    MONAI's ({"state_dict": ...}), nnU-Net's and SuPreM's ({"network_weights" or "net": ...}), or a
    flat dict."""
    state = saved
    for key in ("net", "network_weights", "state_dict", "model"):
        state = saved.get(key, state)
    if not isinstance(state, dict):
        return {}
    return {strangers.our_name(name): tensor for name, tensor in state.items()
            if isinstance(name, str) and isinstance(tensor, torch.Tensor)}


def fits_repeated(weight, target):
    """Would `weight` (out, in, k, k, k) have target's shape if its input channels were repeated?"""
    if weight.shape[:1] + weight.shape[2:] != target.shape[:1] + target.shape[2:]:
        return False
    return weight.shape[1] > 0 and target.shape[1] % weight.shape[1] == 0


def load_weights(model, path, part="encoder"):
    """Copy weights into the model and report on every tensor; none is ever left out silently.

    path: a file, or a checkpoint already read. part: "encoder", each of whose tensors must be there
    (the rest of the model stays new), or "all". The first convolution may have had fewer input
    channels: its weights are then repeated and divided by how often, so that repeated input gives
    the same output. UserError names what does not fit."""
    saved = path if isinstance(path, dict) else load_checkpoint(path)
    found = bare_names(saved)
    state = model.state_dict()
    wanted = [name for name in state if part == "all" or name.startswith(model.encoder_prefix)]

    # A weight is taken as it is if its shape fits. The first convolution is reshaped if that helps.
    # All else is wrong, and nothing is loaded then.
    taken, reshaped, wrong = [], [], []
    for name in wanted:
        weight = found.get(name)
        target = state[name]
        if weight is None:
            wrong.append(f"{name} is missing, not {tuple(target.shape)}")
        elif weight.shape == target.shape:
            state[name] = weight
            taken.append(name)
        elif name in STEMS and fits_repeated(weight, target):
            repeats = target.shape[1] // weight.shape[1]
            state[name] = weight.repeat(1, repeats, 1, 1, 1) / repeats
            reshaped.append(name)
        else:
            wrong.append(f"{name} is {tuple(weight.shape)}, not {tuple(target.shape)}")

    if wrong:
        whose = f" of a {saved['row']}" if "row" in saved else ""
        raise UserError(f"the checkpoint{whose} does not fit: of {len(wanted)} {part} tensors "
                        f"{len(wrong)} are missing or of another shape; {'; '.join(wrong[:2])}")

    # An encoder of which some layers are left out would be another one.
    more = [name for name in found
            if name.startswith(model.encoder_prefix) and name not in state]
    if more:
        raise UserError(f"the checkpoint holds another encoder, which has {len(more)} tensors more "
                        f"than this network's, the first of them {more[0]}")
    model.load_state_dict(state)
    new = [name for name in state if name not in wanted]
    unused = [name for name in found if name not in wanted]
    return Report(part, taken, reshaped, new, unused)
