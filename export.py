"""Plain weights of a run's network, for code of others: {name: tensor}, and nothing else.

    python export.py RUN/last.pt weights.pt [--decoder false]

It prints the lines of PyTorch that load them. docs/weights.md has an example.
"""

import dataclasses
import os

import checkpoint
import config
import models
from config import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: tuple[str, ...] = ()  # a last.pt of pretrain.py or finetune.py, and the file to write
    decoder: bool = True  # false: the encoder alone


def read_run(path):
    """A checkpoint of ours, as load_checkpoint reads it. UserError if it is none."""
    saved = checkpoint.load_checkpoint(path)
    if saved.get("kind") not in ("pretrain", "finetune"):
        raise UserError(f"{path} is no checkpoint of pretrain.py or finetune.py")
    return saved


def settings_of(saved):
    """The arguments of models.build_model that make the network of a checkpoint of ours."""
    # Files of earlier versions lack settings that had one value then.
    trained = saved["config"]
    settings = {"name": saved["row"], "purpose": "segment"}

    # A pretrained network reads one scan. Its decoder is one of pretraining's.
    if saved["kind"] == "finetune":
        settings["in_channels"] = len(saved["task"]["sequences"])
        settings["out_channels"] = len(saved["task"]["classes"])
    elif trained.get("objective") == "swin":
        settings["purpose"] = "swin"
    else:
        settings["purpose"] = "pretrain"
        settings["decoder"] = trained.get("decoder", "light")
        settings["skips"] = trained.get("skips", False)

    # A width and a merging that are the row's own need not be said.
    if trained.get("features"):
        settings["features"] = trained["features"]
    if trained.get("merge", "legacy") != "legacy":
        settings["merge"] = trained["merge"]
    return settings


def lines_for(path, settings, prefix, decoder):
    """The lines of PyTorch that load the file at `path`. prefix: of the encoder's tensors."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    lines = ["import torch, models",
             f"weights = torch.load({path!r}, weights_only=True)",
             f"network = models.build_model({arguments})"]

    # The encoder's own names are without the prefix.
    if decoder:
        lines.append("network.load_state_dict(weights)")
    else:
        lines.append(f"encoder = {{name.removeprefix({prefix!r}): tensor "
                     "for name, tensor in weights.items()}")
        lines.append(f"network.{prefix}load_state_dict(encoder)")
    return lines


def main(cfg):
    if len(cfg.inputs) != 2:
        raise UserError(f"got {len(cfg.inputs)} files: give a checkpoint and the file to write, as "
                        "in export.py RUN/last.pt weights.pt")
    source, target = cfg.inputs
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"{target} would be overwritten: give another file to write")

    # Every tensor of the network must be there. They are written as they are in the checkpoint.
    saved = read_run(source)
    settings = settings_of(saved)
    network = models.build_model(**settings)
    checkpoint.load_weights(network, saved, part="all")
    weights = checkpoint.bare_names(saved)
    if not cfg.decoder:
        weights = {name: tensor for name, tensor in weights.items()
                   if name.startswith(network.encoder_prefix)}
    with checkpoint.atomic(target) as temporary, open(temporary, "wb") as file:
        checkpoint.dump(weights, file)

    what = "network" if cfg.decoder else "encoder"
    print(f"wrote {target}: the {len(weights)} tensors of the {what}, a {saved['row']}. "
          "To load them, with the folder of this script in sys.path:\n")
    print("\n".join(lines_for(target, settings, network.encoder_prefix, cfg.decoder)))


if __name__ == "__main__":
    config.run(main, Config)
