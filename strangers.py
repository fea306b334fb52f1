"""Files of others: how their checkpoints name tensors; what stands where a checkpoint was expected
and is none, told by its first bytes, and the fix."""

import contextlib
import os
import re
import reprlib
import zipfile
import zlib
from pickle import UnpicklingError

import config

PACKED = "an archive: unpack it and give the checkpoint that is in it"
SCAN = "a scan: --ckpt takes a network, the scans follow without a --key"

# What is given as a checkpoint and is none: its first bytes; what it is, and the likely fix.
OTHERS = {
    **config.NOT_DOWNLOADED, b"<?xml": config.WEB_PAGE, b"<!--": config.WEB_PAGE,
    b"7z\xbc\xaf": PACKED, b"rar!": PACKED, b"\xfd7zxz": PACKED, b"bzh": PACKED,
    b"\x28\xb5\x2f\xfd": PACKED,
    b"\x89hdf": "an HDF5 file, as Keras writes: convert it to a state_dict of torch",
    b"\x93numpy": "an array of numpy: convert it to a state_dict of torch",
    # NIfTI-1 and NIfTI-2 begin with 348 and 540, in either byte order; FreeSurfer's with 1.
    b"\x5c\x01\x00\x00": SCAN, b"\x00\x00\x01\x5c": SCAN,
    b"\x1c\x02\x00\x00": SCAN, b"\x00\x00\x02\x1c": SCAN, b"\x00\x00\x00\x01": SCAN}


def our_name(name):
    """A tensor's name in a checkpoint of others -> its name here."""
    # What wrappers put in front: DistributedDataParallel, Lightning, torch.compile, SuPreM, in any
    # order.
    while name.startswith(("module.", "model.", "_orig_mod.", "backbone.")):
        name = name.split(".", 1)[1]

    # The SSL weights of [23] name swinViT swin_vit or nothing, and the layers of its MLP fc1, fc2.
    if name.startswith("swin_vit."):
        name = name.replace("swin_vit.", "swinViT.", 1)
    elif name.startswith(("patch_embed.", "layers1.", "layers2.", "layers3.", "layers4.")):
        name = f"swinViT.{name}"
    name = name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")

    # The files of resenc_b name every layer twice. Those of nnU-Net's ResEnc have other names, too.
    if name.startswith(("encoder.stem.", "encoder.stages.", "decoder.decoder_conv")):
        name = name.replace(".convs.0.", ".conv1.").replace(".norm.", ".norm_op.")
        name = name.replace(".all_modules.0.", ".conv.")
        name = re.sub(r"\.all_modules\.\d\.", ".norm_op.", name)
    return name


def why_not(path, error):
    """What is wrong with a file that torch cannot read, in words that follow its name."""
    # Most often it is of another kind.
    try:
        what = what_else(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        what = ""
    if what:
        return f"is {what}"

    # Or it holds objects, which torch would have to run code to make.
    if isinstance(error, UnpicklingError):
        names = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
        which = f" ({names[0]})" if names else ""
        return (f"is damaged, or holds more than tensors, numbers and strings{which}: refused, and "
                "nothing in it was run. If it is sound, save its plain state_dict")
    return f"is damaged, truncated or no torch file: {config.reason(error)}"


def what_else(path):
    """What a file is that torch cannot read, and the likely fix; "" if that does not show."""
    if os.path.isdir(path):
        return what_folder(path)
    if zipfile.is_zipfile(path):
        return what_archive(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "empty: copy or download it again"

    # Of a compressed file, what is inside counts: a scan, or an archive of many files.
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        with contextlib.suppress(zlib.error):
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, 512)

    # A text may begin with a byte order mark and spaces.
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for beginning, what in OTHERS.items():
        if start.startswith(beginning) or head.startswith(beginning):
            return what

    # Some formats have their mark further in.
    if packed or head[257:262] == b"ustar":
        return PACKED
    if head[128:132] == b"DICM":
        return SCAN

    # A header of JSON after its length: the format of safetensors.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return ("a safetensors file: read it with safetensors.torch.load_file and torch.save the "
                "dictionary")

    # A text, such as the answer of a server.
    with contextlib.suppress(UnicodeDecodeError):
        words = head[:40].decode("ascii").split()
        if all(word.isprintable() for word in words):
            return f"a text file, which begins {reprlib.repr(' '.join(words))}"
    return ""


def what_archive(path):
    """The same of a zip file; "" if torch.save made it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive: save the state_dict of its module"
    if any(name.endswith("data.pkl") for name in names):
        return ""
    return PACKED


def what_folder(path):
    """The same of a folder: which checkpoint is meant."""
    for name in ("last.pt", "fold_0/last.pt"):
        inside = os.path.join(path, name)
        if os.path.exists(inside):
            return f"a folder: give {inside}"
    if os.path.exists(os.path.join(path, "data.pkl")):
        return ("a checkpoint that the browser has unpacked: download it again, or zip -0 -r the "
                "folder")
    return "a folder without a last.pt: give the checkpoint itself"
