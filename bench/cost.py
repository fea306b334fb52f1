"""The paper's Figure 1, calculated without a GPU: parameters, FLOPs of a step, activations.

    python bench/cost.py [--batch 2] [--side 128]

Runs every row on the meta device, where tensors have shapes and no data. FLOPs are those of forward
and backward (torch.utils.flop_counter: matrix products and convolutions, two for each
multiply-add). Memory is what autograd keeps for the backward pass in float32, each storage once,
without the parameters; bf16 autocast keeps about half. The peak of a step lies above it by the
largest temporary tensors, and by 20 bytes a parameter for weights, gradients and the three moments
of AdamW with amsgrad. The pretraining of [23] takes two views of each sample.

The second table turns them into hours of the paper's pretraining on two H100, by assumptions that
anyone can change. There are 44,756 volumes less 1 %, and 100 epochs. A step takes
FLOPs / 989 TFLOP/s (dense bf16) + bytes / 3.35 TB/s, where it moves what it keeps, in bf16, six
times: written, normalised, activated, read again, and its gradient twice. All rows have one
efficiency, the one at which U-Net XL takes the paper's 31 h. The standard decoder's 39 h are then a
test of the model, not an input.
"""

import argparse
import os
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import devices  # noqa: E402
import models  # noqa: E402


def cost(row, task, batch, side, decoder="light"):
    """(parameters, FLOPs of forward and backward, bytes kept for the backward pass)."""
    with torch.device("meta"):
        classes = 2 if task == "segment" else 1
        views = 2 if task == "swin" else 1
        model = models.build_model(row, task, out_channels=classes, decoder=decoder)
        x = torch.empty(batch * views, 1, side, side, side)
    devices.quicken(model, "cuda")  # what CUDA keeps is counted

    # Autograd shows each tensor that it keeps; parameters are there anyway.
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x)
        parts = output if task == "swin" else [output]
        loss = sum(part.float().square().mean() for part in parts)
        held = sum(storage.nbytes() for storage in kept.values())
        loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops(), held


# Section 4.2.
SAMPLES = 44_756 * 0.99 * 100
GPUS = 2

# An H100, and what a step moves of what it keeps in float32; see above.
FLOP_RATE = 989e12
BYTE_RATE = 3.35e12
MOVES = 6
BF16 = 0.5

PAPER = {("unet_xl", "pretraining, light decoder"): 31,
         ("unet_xl", "pretraining, standard decoder"): 39}


def hours(flops, held, batch):
    """Hours of pretraining at full efficiency, `batch` samples a step: (arithmetic, memory)."""
    steps = SAMPLES / batch / GPUS / 3600
    return steps * flops / FLOP_RATE, steps * held * BF16 * MOVES / BYTE_RATE


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=128)
    arguments = parser.parse_args()
    print(f"Batch {arguments.batch}, {arguments.side}^3, float32.\n")
    print("| row | step | parameters, millions | TFLOP | activations, GiB |\n|---|---|---|---|---|")
    steps = [("pretraining, light decoder", "pretrain", "light"),
             ("pretraining, standard decoder", "pretrain", "standard"),
             ("finetuning", "segment", "light")]
    found = {}
    for row in models.ROWS:
        if row == "unet_demo":
            continue
        extra = [("pretraining of [23]", "swin", "light")] if row == "swinunetr" else []
        for name, task, decoder in steps + extra:
            if row == "mednext_l_mednextdec" and task == "pretrain":
                continue  # the same as mednext_l
            parameters, flops, held = cost(row, task, arguments.batch, arguments.side, decoder)
            if task != "segment":
                found[row, name] = hours(flops, held, arguments.batch)
            print(f"| {row} | {name} | {parameters / 1e6:.1f} | {flops / 1e12:.2f} | "
                  f"{held / 2 ** 30:.1f} |", flush=True)

    # One row of the paper gives the efficiency that all get.
    known = "unet_xl", "pretraining, light decoder"
    efficiency = sum(found[known]) / PAPER[known]
    print(f"\nHours on two H100 at {efficiency:.0%} efficiency, at which U-Net XL takes "
          f"{PAPER[known]} h.\n")
    print("| row | step | arithmetic at 100 % | memory at 100 % | hours | the paper's |")
    print("|---" * 6 + "|")
    for (row, name), (arithmetic, memory) in found.items():
        hours_here = (arithmetic + memory) / efficiency
        print(f"| {row} | {name} | {arithmetic:.1f} | {memory:.1f} | {hours_here:.0f} | "
              f"{PAPER.get((row, name), '-')} |")


if __name__ == "__main__":
    main()
