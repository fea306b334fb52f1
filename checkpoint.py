"""Files that are whole or absent: checkpoints and logs; weights from anywhere, strictly."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import mmap
import os
import re
import reprlib
import struct
import subprocess
import sys
import zipfile
import zlib
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises when it refuses
from typing import NamedTuple

import numpy as np
import torch

import config
from config import UserError


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
PACKED = "an archive: unpack it and give the checkpoint that is in it"

SCAN = "a scan: --ckpt takes a network, the scans follow without a --key"

OTHERS = (*config.NOT_DOWNLOADED.items(), (b"<?xml", config.WEB_PAGE), (b"<!--", config.WEB_PAGE),
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
    return f"is damaged, truncated or no torch file: {config.reason(error)}"


def load_checkpoint(path):
    """torch.load onto the CPU with weights_only=True, always: nothing in the file is ever run. UserError if
    it is damaged, hostile, or of a later format; a file of others needs neither checksum nor format."""
    try:
        sealed = check_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if largest(saved) > os.path.getsize(path):
            raise ValueError("a tensor in it is larger than the file")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint at {path}") from None
    except UNREADABLE as error:
        raise UserError(f"{path} {why_not(path, error)}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, not a checkpoint")
    for key, kind in {"format": int, "kind": str, "row": str, "config": dict, "task": dict}.items():
        if not isinstance(saved.get(key, kind()), kind):
            raise UserError(f"{path} is no checkpoint: its {key} is a {type(saved[key]).__name__}")
    if saved.get("format", 0) > FORMAT:
        raise UserError(f"{path} has format {saved['format']}, newer than {FORMAT}, the last that this "
                        "code reads: update it")
    if "format" in saved and not sealed:
        raise UserError(f"{path} is damaged: it lost its checksum")
    return saved


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
    saved = load_checkpoint(path)
    check_same_run(f"{path} is", saved.get("config", {}), cfg, free)
    if None not in (sha256, saved.get("sha256")) and saved["sha256"] != sha256:
        raise UserError(f"{path} is of a run on other data: new --out, or the old data")
    check_same_inputs(f"{path} is of a run on other data", saved.get("inputs", {}), inputs or {})
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"]), float(saved.get("hours", 0))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this network: {config.first_line(error)}; new --out") from None


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


@functools.cache
def versions():
    """What a run was made with, for its header and its checkpoints."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "cuda": torch.version.cuda or "", "commit": git.stdout.strip() or "unknown"}


class Report(NamedTuple):
    """What load_weights did with each tensor of the model, and what it left unread in the file."""
    part: str
    taken: list
    reshaped: list
    new: list
    unused: list

    def __str__(self):
        arrived = len(self.taken) + len(self.reshaped)  # load_weights raises unless that is all of them
        lines = [f"  {what:<9} {len(names):>4}  {names[0] + ' ...' if names else ''}"
                 for what, names in (("taken", self.taken), ("reshaped", self.reshaped), ("new", self.new),
                                     ("unused", self.unused))]
        return "\n".join(lines + [f"{self.part}: all {arrived} tensors taken (100 %)"])


# Weights whose shape depends on the number of input channels.
STEMS = ("encoder.in_conv.conv1.conv.weight", "encoder.stem.weight", "swinViT.patch_embed.proj.weight",
         "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")


def bare_names(saved):
    """The tensors of a checkpoint by the names used here.

    Ours ({"model": ...}), Lightning's and MONAI's ({"state_dict": ...}), or a flat dict; the prefixes
    module., model. and _orig_mod. are stripped in any order. The SSL weights of [23] name swinViT swin_vit or
    nothing, and the layers of its MLP fc1 and fc2."""
    state = saved.get("model", saved.get("state_dict", saved))
    bare = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        while name.startswith(("module.", "model.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if name.startswith("swin_vit."):
            name = name.replace("swin_vit.", "swinViT.", 1)
        elif name.startswith(("patch_embed.", "layers1.", "layers2.", "layers3.", "layers4.")):
            name = f"swinViT.{name}"
        name = name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
        if isinstance(tensor, torch.Tensor):
            bare[name] = tensor
    return bare


def load_weights(model, path, part="encoder"):
    """Copy weights into the model and report on every tensor; nothing is ever left out silently.

    path: a file, or a checkpoint already read. part: "encoder", each of whose tensors must be there (the rest
    of the model stays new), or "all". The first convolution may have had fewer input channels: its weights
    are then repeated and divided by their number, so that repeated input gives the same output. UserError
    names what does not fit."""
    saved = path if isinstance(path, dict) else load_checkpoint(path)
    found, own = bare_names(saved), model.state_dict()
    wanted = [name for name in own if part == "all" or name.startswith(model.encoder_prefix)]
    taken, reshaped, wrong = [], [], []
    for name in wanted:
        tensor, target = found.get(name), own[name]
        if tensor is not None and tensor.shape == target.shape:
            own[name] = tensor
            taken.append(name)
        elif tensor is not None and name in STEMS and tensor.shape[:1] + tensor.shape[2:] == \
                target.shape[:1] + target.shape[2:] and target.shape[1] % tensor.shape[1] == 0:
            repeats = target.shape[1] // tensor.shape[1]
            own[name] = tensor.repeat(1, repeats, 1, 1, 1) / repeats
            reshaped.append(name)
        else:
            shape = "missing" if tensor is None else tuple(tensor.shape)
            wrong.append(f"{name} is {shape}, not {tuple(target.shape)}")
    if wrong:
        whose = f" of a {saved['row']}" if "row" in saved else ""
        raise UserError(f"the checkpoint{whose} does not fit: of {len(wanted)} {part} tensors {len(wrong)} "
                        f"are missing or of another shape; {'; '.join(wrong[:2])}")
    model.load_state_dict(own)
    new, unused = [n for n in own if n not in wanted], [n for n in found if n not in wanted]
    return Report(part, taken, reshaped, new, unused)


def save_array(path, array):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
