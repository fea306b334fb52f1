"""predict.sliding_window beside MONAI's, with the same network, windows, overlap and weights.

    python bench/window.py [--rows pointwise:2,unet_demo:4] [--shape 240,240,155] [--patch 128]
                           [--threads 2] [--rounds 3] [--gaussian] [--batch 1]

A row is a network and its number of classes. `pointwise` is a single 1^3 convolution: it shows what
the windows cost without a network. Each variant runs in a process of its own, turn by turn, all
with freed memory kept (fast_cpu.keep_freed_memory). A first run does not count; the table has
medians of at least --rounds runs and 5 s after it, or the first run if it takes over a minute.

Memory is the peak of resident memory above the process before it makes the volume, measured in
processes that give freed memory back at once. What counts is how much of it lies above one bare
forward pass of a window. The volume is float32, as MONAI and the forward pass need it. For ours it
is also float16, as it is stored: then each window becomes float32 by itself.
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
import fast_cpu  # noqa: E402
import models  # noqa: E402
import predict  # noqa: E402

# glibc: every block from 64 KB on is a mapping of its own: resident memory is what is alive.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TITLES = {"ours": "ours", "ours float16": "ours, float16 volume", "monai": "MONAI"}


def runner(variant, model, volume, options):
    """A function that runs the variant once -> logits (K, D, H, W)."""
    patch = (options.patch,) * 3
    if variant == "bare":
        return lambda: model(volume[(None, slice(None), *(slice(p) for p in patch))])[0]
    if variant.startswith("ours"):
        return lambda: predict.sliding_window(model, volume, patch, 0.5, options.gaussian,
                                              options.batch)

    # MONAI is installed by `make bench` alone.
    from monai.inferers import sliding_window_inference
    line = [predict.axis_weights(p, True) for p in patch]
    weights = line[0][:, None, None] * line[1][:, None] * line[2] if options.gaussian else None
    return lambda: sliding_window_inference(volume[None], patch, options.batch, model, overlap=0.5,
                                            roi_weight_map=weights)[0]


def peak_memory():
    """Peak of resident memory of this process, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(options):
    """A process that runs once for each line it reads, and answers with seconds and peak MiB.

    To the line "compare" it answers with the largest difference between ours and its own logits."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not options.memory:
        fast_cpu.keep_freed_memory()
    network, classes = options.rows.split(":")
    model = (torch.nn.Conv3d(1, int(classes), 1) if network == "pointwise"
             else models.build_model(network, "segment", out_channels=int(classes))).eval()
    fast_cpu.install(model)
    with torch.inference_mode():
        model(torch.rand(1, 1, 32, 32, 32))
        runner(options.serve, model, torch.rand(1, 1, 1, 1), options)  # imports
        before = peak_memory()

        # Filled plane by plane, without a second volume on the way.
        shape = [1, *map(int, options.shape.split(","))]
        dtype = torch.float16 if "float16" in options.serve else torch.float32
        volume = torch.empty(shape, dtype=dtype)
        for plane in volume[0]:
            plane.copy_(torch.rand(plane.shape))

        run = runner(options.serve, model, volume, options)
        for line in sys.stdin:
            if line.strip() == "compare":
                ours = runner("ours", model, volume, options)()
                print((run() - ours).abs().max().item(), flush=True)
                continue
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
            print(seconds, (peak_memory() - before) / 1024, flush=True)


def start(variant, row, options, memory=False):
    words = [sys.executable, __file__, "--serve", variant, "--rows", row]
    words += [word for key in ("shape", "patch", "threads", "batch")
              for word in (f"--{key}", str(getattr(options, key)))]
    if options.gaussian:
        words.append("--gaussian")
    environment = dict(os.environ)
    if memory:
        words.append("--memory")
        environment |= GIVES_BACK
    return subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, env=environment)


def ask(worker, line="run"):
    """The numbers that a worker answers; NaN if it has died, as where MONAI is not installed."""
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        return [float(word) for word in worker.stdout.readline().split()] or [float("nan")] * 2
    except BrokenPipeError:
        return [float("nan")] * 2


def measure(row, options):
    """-> ({variant: median seconds}, {variant: peak MiB}, largest difference of a logit)."""
    peak = {}
    for variant in ("bare", *TITLES):
        worker = start(variant, row, options, memory=True)
        peak[variant] = ask(worker)[1]
        worker.communicate()

    # Turn by turn, so that what else the machine does meets all variants alike.
    workers = {variant: start(variant, row, options) for variant in TITLES}
    times = {variant: [] for variant in TITLES}
    while len(times["ours"]) <= options.rounds or sum(times["ours"]) < 5:
        for variant, worker in workers.items():
            times[variant] += ask(worker)[:1]
        if times["ours"][0] > 60:
            break
    difference = ask(workers["monai"], "compare")[0]
    for worker in workers.values():
        worker.communicate()
    seconds = {variant: statistics.median(runs[1:] or runs) for variant, runs in times.items()}
    return seconds, peak, difference


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", help="networks and their numbers of classes",
                        default="pointwise:2,pointwise:4,unet_demo:2,unet_demo:4,unet_b:4")
    parser.add_argument("--shape", default="240,240,155", help="voxels of the volume")
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="windows at once, in both")
    parser.add_argument("--gaussian", action="store_true", help="the same Gaussian weights in both")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)

    weights = "Gaussian" if options.gaussian else "equal"
    print(f"Sliding window over {options.shape}, patch {options.patch}, overlap 0.5, {weights} "
          f"weights, batch {options.batch}, {options.threads} threads, torch {torch.__version__}; "
          "medians, alternated\n\n"
          "| network: classes | | seconds | faster than MONAI | MiB beyond a forward pass "
          "| of MONAI's |\n"
          "|---|---|---|---|---|---|")
    differences = {}
    for row in options.rows.split(","):
        seconds, peak, differences[row] = measure(row, options)
        for variant, title in TITLES.items():
            beyond, theirs = (peak[v] - peak["bare"] for v in (variant, "monai"))
            faster = seconds["monai"] / seconds[variant]
            print(f"| {row} | {title} | {seconds[variant]:.2f} | {faster:.2f}x | {beyond:.0f} | "
                  f"{beyond / theirs:.2f} |", flush=True)
    print("\nLargest difference of a logit from MONAI's: "
          + ", ".join(f"{row} {difference:.1e}" for row, difference in differences.items()))


if __name__ == "__main__":
    main()
