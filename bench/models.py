"""Forward and backward of every row, as the scripts run it, beside the same row written plainly.

    python bench/models.py [--rows mednext_m,unet_b] [--side 64] [--threads 2] [--rounds 2] [--compile]

Plain is eager float32 in NCDHW order with torch's own modules and the allocator as it comes; for SwinUNETR it
is MONAI's, where that is installed. `recompute` is bf16 with activation checkpointing, as --recompute. Each
variant runs in a process of its own, one step at a time, turn by turn, so that all of them meet the same
machine; the table has medians and ratios. Ours keeps freed memory, as the scripts do
(training.keep_freed_memory), which costs some of it: the peak of what is alive at once is measured in
processes that give freed memory back at once.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from window import GIVES_BACK  # noqa: E402

import forms  # noqa: E402
import models  # noqa: E402
import training  # noqa: E402

VARIANTS = ("plain", "ours fp32", "ours bf16", "ours bf16 recompute")


def plain_network(row):
    """The row as its authors wrote it: for SwinUNETR MONAI's network, for the others torch's own modules."""
    if models.ROWS[row].family == "swin":
        from monai.networks.nets import SwinUNETR
        return SwinUNETR(in_channels=1, out_channels=2, feature_size=48)

    def norm(x, weight=None, bias=None, slope=None):
        y = F.instance_norm(x, weight=weight, bias=bias)
        return y if slope is None else F.leaky_relu(y, slope, inplace=True)

    models.MedNeXtBlock.branch_cpu = lambda self, x: self.conv3(F.gelu(self.conv2(self.norm(self.conv1(x)))))
    forms.quick_format = torch.Tensor.contiguous
    models.upsample = lambda x, up: up(x)
    forms.instance_norm = norm
    return models.build_model(row, "segment", out_channels=2)


def serve(row, variant, side, threads, compiled):
    """A process that makes one step for each line it reads, and answers with seconds and peak memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if variant.startswith("plain"):
        model = plain_network(row)
    else:
        if not variant.endswith("memory"):
            training.keep_freed_memory()
        model = models.build_model(row, "segment", out_channels=2)
        if "recompute" in variant:
            models.recompute(model)
    run = torch.compile(model) if compiled and not variant.startswith("plain") else model
    x = torch.rand(1, 1, side, side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.startswith("ours bf16")):
            output = run(x)
        output.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(time.perf_counter() - begin, peak / 2 ** 20, flush=True)


def measure(row, variants, arguments, rounds):
    """{variant: (median seconds, peak GiB above the idle process)}, the variants alternating."""
    words = [sys.executable, __file__, "--side", str(arguments.side), "--threads", str(arguments.threads)]
    words += ["--compile"] * arguments.compile
    workers = {v: subprocess.Popen([*words, "--serve", v, "--rows", row], text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   env=os.environ | (GIVES_BACK if "memory" in v else {})) for v in variants}
    times = {v: [] for v in variants}
    for turn in range(rounds + 1):
        for variant, worker in list(workers.items()):
            try:
                worker.stdin.write("step\n")
                worker.stdin.flush()
                seconds, peak = map(float, worker.stdout.readline().split())
            except (BrokenPipeError, ValueError):  # MONAI is not installed
                del workers[variant], times[variant]
                continue
            if turn:  # the first one warms up
                times[variant].append((seconds, peak))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {v: tuple(map(statistics.median, zip(*t, strict=True))) for v, t in times.items()}


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
        return serve(arguments.rows, arguments.serve, arguments.side, arguments.threads, arguments.compile)
    print(f"Segmentation network, batch 1, {arguments.side}^3, {arguments.threads} threads, torch "
          f"{torch.__version__}, ours {'compiled' if arguments.compile else 'eager'}; forward + backward, "
          f"median of {arguments.rounds}\n")
    print("| row | plain fp32 s | ours fp32 s | ours bf16 s | recompute s | fp32 faster | bf16 faster | "
          "recompute faster | peak GiB: plain, fp32, bf16, recompute |\n" + "|---" * 9 + "|")
    for row in arguments.rows.split(","):
        found = measure(row, VARIANTS, arguments, arguments.rounds)
        memory = measure(row, [f"{v} memory" for v in VARIANTS], arguments, 1)
        seconds = [f"{found[v][0]:.2f}" if v in found else "-" for v in VARIANTS]
        plain = found.get("plain", (float("nan"),))[0]
        faster = [f"{plain / found[v][0]:.2f}x" for v in VARIANTS[1:]]
        peaks = ", ".join(f"{memory[f'{v} memory'][1]:.2f}" if v in found else "-" for v in VARIANTS)
        print(f"| {row} | {' | '.join(seconds + faster)} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
