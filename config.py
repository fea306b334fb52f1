"""A dataclass, YAML files and the command line -> the settings of a script; a mistake is one line."""

import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import reprlib
import sys
import types
import typing

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend. Its message is one line: what is wrong, where, and the likely fix."""


# What a download may leave in the place of a file: how that begins, what it is, and the likely fix.
WEB_PAGE = "a web page: the download needs a login"
NOT_DOWNLOADED = {
    b"version https://git-lfs": "a git-lfs pointer: fetch the file itself with git lfs pull",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
}

# What torch says when a loader process was killed, or found no room for what it hands over.
LOADER_ERRORS = ("DataLoader worker (pid", "shared memory(shm)", "shared memory object")

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
        elif any(words in str(error) for words in LOADER_ERRORS):
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


def first_line(error):
    return str(error).strip().split("\n")[0]


def reason(error):
    """First line of an error, without the file's name: the message around it has that."""
    return getattr(error, "strerror", None) or first_line(error)
