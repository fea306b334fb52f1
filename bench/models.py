"""Forward and backward of every row, as the scripts run it, beside the plain network.

    python bench/models.py [--rows mednext_m,unet_b] [--side 64] [--threads 2] [--rounds 2]
                           [--compile]
 Plain is models.py in eager float32, with the allocator as it comes. Ours has the forms of
fast_cpu.py. `recompute` is bf16 with activation checkpointing, as --recompute. Each variant runs
in a process of its own, one step at a time, turn by turn, so that all of them meet the same
machine. The table has medians and ratios.
 Ours keeps freed memory, as the scripts do (fast_cpu.keep_freed_memory), which costs some of it.
So the peak of what is alive at once is measured in processes that give freed memory back at once.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from window import GIVES_BACK  # noqa: E402

import devices  # noqa: E402
import fast_cpu  # noqa: E402
import models  # noqa: E402

VARIANTS = ("plain", "ours fp32", "ours bf16", "ours bf16 recompute")


def build(row, variant):
    """The network of a variant, in this process."""
    torch.manual_seed(0)
    model = models.build_model(row, "segment", out_channels=2)
    if variant.startswith("plain"):
        return model

    if not variant.endswith("memory"):
        fast_cpu.keep_freed_memory()
    fast_cpu.install(model)
    if "recompute" in variant:
        devices.recompute(model)
    return model


def serve(row, variant, side, threads, compiled):
    """A process that makes one step for each line it reads, and answers with seconds and peak
    GiB."""
    torch.set_num_threads(threads)
    model = build(row, variant)
    ours = not variant.startswith("plain")
    run = torch.compile(model) if compiled and ours else model
    half = variant.startswith("ours bf16")
    x = torch.rand(1, 1, side, side, side)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = run(x)
        output.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(time.perf_counter() - begin, peak / 2 ** 20, flush=True)


def start(row, variant, arguments):
    """The process of a variant, which waits for lines."""
    words = [sys.executable, __file__, "--serve", variant, "--rows", row]
    words += ["--side", str(arguments.side), "--threads", str(arguments.threads)]
    if arguments.compile:
        words.append("--compile")
    allocator = GIVES_BACK if variant.endswith("memory") else {}
    return subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, env=os.environ | allocator)


def measure(row, variants, arguments, rounds):
    """{variant: (median seconds, median peak GiB above the idle process)}, the variants in turn."""
    workers = {variant: start(row, variant, arguments) for variant in variants}
    found = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            seconds, peak = map(float, worker.stdout.readline().split())

            # The first step warms up.
            if turn > 0:
                found[variant].append((seconds, peak))

    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {variant: tuple(map(statistics.median, zip(*steps, strict=True)))
            for variant, steps in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="unet_b,unet_xl,mednext_m,mednext_l,swinunetr")
    parser.add_argument("--side", type=int, default=64, help="voxels of the patch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.rows, arguments.serve, arguments.side, arguments.threads,
                     arguments.compile)

    mode = "compiled" if arguments.compile else "eager"
    print(f"Segmentation network, batch 1, {arguments.side}^3, {arguments.threads} threads, torch "
          f"{torch.__version__}, ours {mode}; forward + backward, median of {arguments.rounds}\n")
    print("| row | plain fp32 s | ours fp32 s | ours bf16 s | recompute s | fp32 faster | "
          "bf16 faster | recompute faster | peak GiB: plain, fp32, bf16, recompute |")
    print("|---" * 9 + "|")

    for row in arguments.rows.split(","):
        found = measure(row, VARIANTS, arguments, arguments.rounds)
        memory = measure(row, [f"{variant} memory" for variant in VARIANTS], arguments, rounds=1)

        seconds = [found[variant][0] for variant in VARIANTS]
        cells = [f"{value:.2f}" for value in seconds]
        cells += [f"{seconds[0] / value:.2f}x" for value in seconds[1:]]
        cells.append(", ".join(f"{peak:.2f}" for _, peak in memory.values()))
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
