"""The networks for torch.hub, one function a row of models.py.

    torch.hub.load(repo, "unet_xl", source="local", ckpt="last.pt", in_channels=2, out_channels=3)

`repo` is the folder of this file. All functions take the same arguments and give a network that
segments: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W). Its `encoder` gives the list of
the levels; SwinUNETR's is called swinViT.

ckpt: a last.pt of pretrain.py or finetune.py, a file of export.py, or one of those in
docs/weights.md. The encoder must fit in every tensor, and a report says what was taken. With None
the weights are new.
part: "encoder", or "all" for the decoder, too, of a finetuned network.
in_channels, out_channels: by default 1, or with "all" those of the finetuned network.
features: another width than the checkpoint's or the row's.
merge: SwinUNETR's patch merging, "legacy" or "fixed"; by default the checkpoint's.

A mistake raises config.UserError, which names the value and the likely fix."""

import os
import sys

dependencies = ["torch", "numpy", "nibabel", "tqdm", "yaml"]

HERE = os.path.dirname(os.path.abspath(__file__))


def _check_modules():
    """ImportError if a module of another project stands where one of ours would be imported."""
    for file in sorted(os.listdir(HERE)):
        name, ending = os.path.splitext(file)
        if ending != ".py" or name not in sys.modules:
            continue

        # Modules that are built in have no file.
        path = vars(sys.modules[name]).get("__file__") or "another place"
        if os.path.dirname(os.path.abspath(path)) != HERE:
            raise ImportError(f"a module {name} is already imported, from {path}: call "
                              f"torch.hub.load on {HERE} in a process of its own")


_check_modules()

import checkpoint  # noqa: E402
import checks  # noqa: E402
import config  # noqa: E402
import models  # noqa: E402


# torch.hub lists every function here whose name does not begin with an underscore.
def _load(row, ckpt, in_channels, out_channels, part, features, merge=None):
    """A row of models.py, for segmentation, with weights of a checkpoint. The arguments are above.

    UserError for a value that is not one of these, or a checkpoint that does not fit."""
    config.check_choice("part", part, ("encoder", "all"))
    numbers = {"in_channels": in_channels, "out_channels": out_channels, "features": features}
    for key, value in numbers.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise config.UserError(f"{key} {value!r}: give a whole number, 1 or more")

    # What is not given is the checkpoint's, where it says so.
    saved = {}
    if ckpt is not None:
        saved = checkpoint.load_checkpoint(ckpt)
        checks.check_encoder(ckpt, saved.get("row"), row)
    trained = saved.get("config", {})
    merge = merge or trained.get("merge", "legacy")
    features = features or trained.get("features")
    if part == "all" and saved.get("kind") == "finetune":
        in_channels = in_channels or len(saved["task"]["sequences"])
        out_channels = out_channels or len(saved["task"]["classes"])

    network = models.build_model(row, "segment", in_channels or 1, out_channels or 1, merge=merge,
                                 features=features)
    if ckpt is not None:
        print(checkpoint.load_weights(network, saved, part))
    return network


def unet_demo(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None):
    """The smallest U-Net, for demonstrations and tests. The arguments: hubconf.py."""
    return _load("unet_demo", ckpt, in_channels, out_channels, part, features)


def unet_b(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None):
    """U-Net B. The arguments: hubconf.py."""
    return _load("unet_b", ckpt, in_channels, out_channels, part, features)


def unet_xl(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None):
    """U-Net XL. The arguments: hubconf.py."""
    return _load("unet_xl", ckpt, in_channels, out_channels, part, features)


def mednext_m(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None):
    """MedNeXt M under the decoder of the U-Net. The arguments: hubconf.py."""
    return _load("mednext_m", ckpt, in_channels, out_channels, part, features)


def mednext_l(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None):
    """MedNeXt L under the decoder of the U-Net. The arguments: hubconf.py."""
    return _load("mednext_l", ckpt, in_channels, out_channels, part, features)


def mednext_l_mednextdec(ckpt=None, in_channels=None, out_channels=None, part="encoder",
                         features=None):
    """MedNeXt L under its own decoder. The arguments: hubconf.py."""
    return _load("mednext_l_mednextdec", ckpt, in_channels, out_channels, part, features)


def resenc_b(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None):
    """The network of the authors' later weights, not in the paper. The arguments: hubconf.py."""
    return _load("resenc_b", ckpt, in_channels, out_channels, part, features)


def swinunetr(ckpt=None, in_channels=None, out_channels=None, part="encoder", features=None,
              merge=None):
    """SwinUNETR. The arguments: hubconf.py."""
    return _load("swinunetr", ckpt, in_channels, out_channels, part, features, merge)
