"""What the augmentations cost a pretraining run: pretrain.py with `augment: all` and `none`, in turn.

    python bench/pipeline.py [--model unet_b] [--side 64] [--steps 12] [--rounds 2] [--threads 2]

The whole pipeline on phantoms: loader, spatial and intensity transforms, mask, network, optimizer, in bf16.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(words, threads):
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def step_times(folder):
    """Seconds of each step but the first two, from the running means of log.jsonl."""
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
        totals = [json.loads(line)["seconds"] * i for i, line in enumerate(file, start=1)]
    return [after - before for before, after in zip(totals[1:], totals[2:], strict=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet_b")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    times = {"all": [], "none": []}
    with tempfile.TemporaryDirectory() as folder:
        run(["tests/phantom.py", "--out", f"{folder}/raw", "--subjects", 8, "--labelled", 0, "--size", 96],
            options.threads)
        run(["prepare_data.py", "--source", "bids", "--input", f"{folder}/raw", "--out",
             f"{folder}/prepared"], options.threads)
        for turn in range(options.rounds):
            for preset in times:
                out = f"{folder}/{preset}{turn}"
                run(["pretrain.py", "--data", f"{folder}/prepared", "--out", out, "--model", options.model,
                     "--augment", preset, "--patch_size", options.side, "--batch_size", 2, "--workers", 1,
                     "--steps", options.steps, "--log_every", 1, "--val_every", 10 ** 6, "--compile", "false",
                     "--save_every", 10 ** 6], options.threads)
                times[preset] += step_times(out)[:-1]  # the last step validates
    both = {preset: statistics.median(values) for preset, values in times.items()}
    print(f"{options.model}, {options.side}^3, batch 2, bf16, {options.threads} threads: {both['all']:.3f} s "
          f"a step with augment all, {both['none']:.3f} s with none: {both['all'] / both['none'] - 1:+.1%}")


if __name__ == "__main__":
    main()
