"""What the augmentations cost a pretraining run: pretrain.py with `augment: all` and `none`.

    python bench/pipeline.py [--model unet_b] [--side 64] [--steps 12] [--rounds 2] [--threads 2]

It is the whole pipeline on phantoms: loader, spatial and intensity transforms, mask, network and
optimizer, in bf16.
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
    """A script with its options, quietly, on so many threads."""
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def step_times(folder):
    """Seconds of each step but the first two, from the running means of log.jsonl."""
    # The mean after so many steps, times their number, is the time since the start.
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
        run(["tests/phantom.py", "--out", f"{folder}/raw", "--subjects", 8, "--labelled", 0,
             "--size", 96], options.threads)
        run(["prepare_data.py", "--source", "bids", "--input", f"{folder}/raw",
             "--out", f"{folder}/prepared"], options.threads)

        # In turn, so that both meet the same moods of the machine.
        for turn in range(options.rounds):
            for preset in times:
                out = f"{folder}/{preset}{turn}"
                run(["pretrain.py", "--data", f"{folder}/prepared", "--out", out,
                     "--model", options.model, "--augment", preset, "--patch_size", options.side,
                     "--batch_size", 2, "--workers", 1, "--steps", options.steps, "--log_every", 1,
                     "--val_every", 10 ** 6, "--compile", "false", "--save_every", 10 ** 6],
                    options.threads)
                times[preset] += step_times(out)[:-1]  # the last step validates

    augmented = statistics.median(times["all"])
    plain = statistics.median(times["none"])
    print(f"{options.model}, {options.side}^3, batch 2, bf16, {options.threads} threads: "
          f"{augmented:.3f} s a step with augment all, {plain:.3f} s with none: "
          f"{augmented / plain - 1:+.1%}")


if __name__ == "__main__":
    main()
