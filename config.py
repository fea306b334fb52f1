"""A dataclass, YAML files, the command line -> the settings of a script; a mistake is one line."""

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
    """A mistake the user can mend, in one line: what is wrong, where, and the likely fix."""


# What a download may leave in the place of a file: how that begins, what it is, and the likely fix.
WEB_PAGE = "a web page: the download needs a login"
NOT_DOWNLOADED = {
    b"version https://git-lfs": "a git-lfs pointer: fetch the file itself with git lfs pull",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
}

# Messages of torch when a loader worker was killed or ran out of shared memory.
LOADER_ERRORS = ("DataLoader worker (pid", "shared memory(shm)", "shared memory object")

# How torch, cuDNN, cuBLAS, NCCL and the C library spell that memory has run out.
NO_MEMORY = ("out of memory", "can't allocate memory", "status_alloc_failed")

# Settings that may help then.
MEMORY = ("micro_batch", "batch_size", "batch", "patch_size", "recompute")

# Numbers start at 0, but for these.
RANGES = dict.fromkeys(("batch_size", "micro_batch", "batch", "patch_size", "token_size",
                        "log_every", "save_every", "val_every", "preview"), (1, math.inf))
RANGES["overlap"] = (0, 0.95)


# ------------------------------------------------------------------------------ running a script
def run(main, config_class):
    """Entry point of all scripts: command line -> main(cfg). A UserError is one line and code 2."""
    # A file name that is not UTF-8 is printed with an escape, as Python does on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")

    message = ""
    started = False
    try:
        cfg = parse_config(config_class, sys.argv[1:])
        started = True
        code = main(cfg) or 0
    except UserError as error:
        message = str(error)
        code = 2
    except (RuntimeError, MemoryError) as error:
        # What has no explanation is a mistake in the code, and is shown whole.
        message = explain(error, config_class)
        code = 1
        if not message:
            raise

    # All processes of a node got the same command line: a mistake in it is reported once.
    if message and (started or os.environ.get("LOCAL_RANK", "0") == "0"):
        # tqdm prints beside its progress bars, not into them.
        one_line = " ".join(message.split())
        tqdm.write(f"error: {one_line}", file=sys.stderr)
    leave(code)


def leave(code):
    """End this process, and its part in the process group."""
    # An orderly end of gloo's threads (torch 2.13) aborts one process in twenty.
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def explain(error, config_class):
    """One line for an error of torch that is no mistake in the code; "" for any other."""
    if ran_out_of_memory(error):
        names = [field.name for field in dataclasses.fields(config_class) if field.name in MEMORY]
        return f"out of memory; what helps, see --help: {', '.join(names)}"
    if "gloo/transport" in str(error) or isinstance(error, dist.DistBackendError):
        return "stopped: another process ended, see its own message"
    if any(words in str(error) for words in LOADER_ERRORS):
        return ("a loader process was lost, for want of memory or of /dev/shm (docker: "
                "--shm-size)? Try fewer --workers")
    return ""


def ran_out_of_memory(error):
    """Does an exception say so? torch's own class is not the only spelling."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error).lower() for words in NO_MEMORY)


# ------------------------------------------------------------------------ the command line and YAML
def parse_config(config_class, argv):
    """`[file.yaml ...] [--key value ...] [--switch]` -> config_class.

    Later files win over earlier ones, and the command line wins over files. Words that are neither
    go to the field `inputs`. UserError for an unknown key (naming the nearest known one), a value
    of the wrong type, or a missing file."""
    if "-h" in argv or "--help" in argv:
        print(help_text(config_class))
        sys.exit(0)

    # Files are read as they come; what --key says is kept apart, to win in the end.
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    from_files = {}
    given = {}
    inputs = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, value = read_option(word, words, kinds)
            given[key] = value
        elif word.endswith((".yaml", ".yml")):
            from_files |= read_yaml(config_class, word)
        else:
            inputs.append(word)

    if inputs and "inputs" not in kinds:
        raise UserError(f"{inputs[0]!r} is neither a --key nor a .yaml file")
    if inputs:
        given["inputs"] = inputs
    given = cast_values(config_class, given, "the command line")
    return build_config(config_class, from_files | given)


def read_option(word, words, kinds):
    """--key=value, --key value, --switch value, or --switch -> (key, value). `words` are those that
    follow; the value is taken off them."""
    key, equals, value = word[2:].partition("=")
    key = key.replace("-", "_")
    if equals:
        return key, value

    # A switch alone is true. Of any other key the next word is the value, whatever it looks like.
    alone = not words or words[0].startswith("--")
    if alone and kinds.get(key) is bool:
        return key, "true"
    if not words and key in kinds:
        raise UserError(f"{word} needs a value: {word} VALUE")
    if not words:
        return key, ""  # whoever casts it says that there is no such key
    return key, words.pop(0)


def read_yaml(config_class, path):
    """A YAML file of `key: value` lines -> {key: value, cast to the type of its field}."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()

        # Events come before anything is built: a few aliases of aliases would fill any memory.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise yaml.YAMLError("aliases (*name) are not read: a few lines of them can fill any "
                                 "memory")

        # An empty file has no values.
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 from byte {error.start} on: save it as "
                        "UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None

    if not isinstance(values, dict):
        found = type(values).__name__
        raise UserError(f"{path}: expected lines of `key: value`, found {found}")
    return cast_values(config_class, values, path)


def cast_values(config_class, values, where):
    """Each value to its field's declared type (PyYAML reads 1e-4 as a string)."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}

    # A name that is not known is most often misspelt. One that is far from all known ones gets the
    # list of them.
    for key in values:
        if key not in kinds:
            hint = did_you_mean(key, kinds, cutoff=0.4) or f"known keys: {', '.join(kinds)}"
            raise UserError(f"unknown key {key!r} in {where}; {hint}")
    return {key: cast(value, kinds[key], key, where) for key, value in values.items()}


def build_config(config_class, values, where=""):
    """config_class(**values). UserError if a field without a default is not among the values.

    where: the file that the values are from; by default they may be typed."""
    missing = [field.name for field in dataclasses.fields(config_class)
               if field.name not in values and field.default is dataclasses.MISSING
               and field.default_factory is dataclasses.MISSING]
    if missing and where:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    if missing:
        options = ", ".join(f"--{name}" for name in missing)
        raise UserError(f"{options} must be given; see --help")
    return config_class(**values)


def cast(value, kind, key, where):
    """A value as a bool, int, float, str, int | str, dict, tuple[T, ...], or one | None."""
    # Of int | str, what is no number is a word.
    if kind == int | str:
        number = str(value).lstrip("-").isdigit()
        return cast(value, int if number else str, key, where)

    # Of T | None and tuple[T, ...] it is the T that is cast.
    if isinstance(kind, types.UnionType):
        inner = next(part for part in typing.get_args(kind) if part is not types.NoneType)
        if value in (None, "none", "None", "null") or (value == "auto" and inner is bool):
            return None
        return cast(value, inner, key, where)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(cast(part, inner, key, where) for part in parts_of(value))

    # All others are what they are, or the words that say it.
    wrong = UserError(f"{key} in {where}: expected {getattr(kind, '__name__', kind)}, got "
                      f"{reprlib.repr(value)}")

    # bool("false") would be true.
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]

    # A bool is an int to Python, but true is no number of steps.
    accepted = {int: (int, str), float: (int, float, str)}.get(kind, kind)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise wrong
    try:
        result = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None

    # Of numbers, neither nan nor what lies out of the range makes sense.
    if kind is float and not math.isfinite(result):
        raise wrong
    low, high = RANGES.get(key, (0, math.inf))
    if kind in (int, float) and not low <= result <= high:
        raise UserError(f"{key} in {where}: {result} is out of range, {low} to {high}")
    return result


def parts_of(value):
    """The parts of a tuple's value: of "1,2" on the command line, a list in YAML, or one alone."""
    if isinstance(value, str):
        return value.split(",")
    if isinstance(value, list):
        return value
    return [value]


def check_choice(key, value, known):
    """UserError unless `value` is one of the `known` words; it lists them and names the nearest."""
    if value not in known:
        hint = did_you_mean(value, known)
        end = f"; {hint}" if hint else ""
        raise UserError(f"{key} {value!r}: choose {', '.join(known)}{end}")


def did_you_mean(word, known, cutoff=0.6):
    """The question after the nearest of the `known` words; "" if none is as near as `cutoff`."""
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else ""


# ------------------------------------------------------------------------------------------ texts
def help_text(config_class):
    """The script's docstring, then each field with its default and the comment beside it."""
    doc = sys.modules[config_class.__module__].__doc__ or ""
    lines = [doc.strip(), "", "--key value, or key: value in a YAML file:"]

    # Python forgets comments, so they are read from the source: `name: kind = default  # comment`.
    field = re.compile(r"^    (\w+): [^=#\n]+?(?: = ([^#\n]*?))?\s*(?:#\s*(.*))?$", re.MULTILINE)
    for name, default, comment in field.findall(inspect.getsource(config_class)):
        lines.append(f"  --{name:<16} {default or 'required':<12} {comment}")
    return "\n".join(lines)


def first_line(error):
    return str(error).strip().split("\n")[0]


def reason(error):
    """First line of an error, without the file's name: the message around it has that."""
    return getattr(error, "strerror", None) or first_line(error)
