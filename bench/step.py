"""How much of the machine a pretraining step uses: its FLOPs a second over the best dense rate.

    python bench/step.py [--rows unet_b,unet_xl] [--sides 64,96] [--threads 2] [--rounds 3]
                         [--modes eager,compiled]

A step is the paper's: AMAES at batch 1, forward with the light decoder, masked reconstruction,
backward, fused AdamW with amsgrad; no augmentation. FLOPs are those of its convolutions and matrix
products, two for each multiply-add, forward and backward. The dense rate is the faster of a 4096^3
matrix product and a 3^3 convolution of 128 channels at 32^3, in the same precision with the same
threads, measured in turns with the step. The table has medians of at least as many turns as
--rounds, over at least 8 s of steps, after 4 s that do not count. The first step of a process
stands apart: compiled, it contains the compilation, from empty caches.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import amaes  # noqa: E402
import devices  # noqa: E402
import models  # noqa: E402


def dense(dtype):
    """(FLOPs, function) of the two dense operations."""
    a, b = torch.randn(2, 4096, 4096).to(dtype)
    x = torch.randn(1, 128, 32, 32, 32).to(dtype)
    w = torch.randn(128, 128, 3, 3, 3).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    product = 2 * 4096 ** 3, lambda: a @ b
    convolution = (2 * 27 * 128 * 128 * 32 ** 3,
                   lambda: torch.nn.functional.conv3d(x, w, padding=1))
    return [product, convolution]


def flops(row, side):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        models.build_model(row, "pretrain")(torch.empty(1, 1, side, side, side)).mean().backward()
    return counter.get_total_flops()


def training_step(row, side, dtype, compiled):
    """A function that does one step."""
    torch.manual_seed(0)
    model = devices.quicken(models.build_model(row, "pretrain"), "cpu")
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=3e-5, amsgrad=True,
                                  fused=True)
    target = torch.rand(1, 1, side, side, side)
    mask = amaes.random_mask([0], target.shape[2:], 4, 0.6, target.device)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = run(target.masked_fill(mask, 0))
        amaes.reconstruction_loss(output, target, mask, "all").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def measure(row, side, dtype, mode, rounds):
    """A row of the table."""
    step = flops(row, side), training_step(row, side, dtype, mode == "compiled")
    work = [*dense(dtype), step]

    def turn():
        """Seconds of each: the dense operations, then the step."""
        seconds = []
        for _, function in work:
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        return seconds

    # In its first seconds it finds its memory.
    first = turn()[-1]
    warm = 0
    while warm < 4:
        warm += turn()[-1]

    times = []
    while len(times) < rounds or sum(seconds[-1] for seconds in times) < 8:
        times.append(turn())
    seconds = [statistics.median(each) for each in zip(*times, strict=True)]

    *dense_rates, rate = [n / s / 1e12 for (n, _), s in zip(work, seconds, strict=True)]
    best = max(dense_rates)
    print(f"| {row} | {side} | {str(dtype)[6:]} | {mode} | {step[0] / 1e12:.3f} | {first:.1f} | "
          f"{seconds[-1]:.2f} | {rate:.3f} | {best:.3f} | {rate / best:.0%} |", flush=True)


EACH = ("modes", "rows", "sides", "precisions")  # every combination, in a process of its own


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="unet_b,unet_xl,mednext_m,mednext_l,swinunetr")
    parser.add_argument("--sides", default="64,96")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        torch.set_num_threads(arguments.threads)
        return measure(arguments.rows, int(arguments.sides), getattr(torch, arguments.precisions),
                       arguments.modes, arguments.rounds)

    print(f"{arguments.threads} threads, torch {torch.__version__}\n")
    print("| row | side | precision | mode | TFLOP a step | first step s | step s | TFLOP/s | "
          "best dense TFLOP/s | share |\n|" + "---|" * 10, flush=True)
    values = [getattr(arguments, key).split(",") for key in EACH]
    for combination in itertools.product(*values):
        words = [f"--{key}={value}" for key, value in zip(EACH, combination, strict=True)]
        words += [f"--threads={arguments.threads}", f"--rounds={arguments.rounds}", "--alone"]
        subprocess.run([sys.executable, "-W", "ignore", __file__, *words], check=True,
                       env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})


if __name__ == "__main__":
    main()
