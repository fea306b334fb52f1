"""The data path: does the network wait for it, how does the index grow, what is read for a sample.

    python bench/loader.py [--side 64] [--workers 1] [--steps 16] [--volumes 45000]

First, pretraining steps of unet_demo in bf16 with the loader and from memory (the same batches, read before),
in turns: loaders of the length of a turn, the first step of each not counted. Then what the kernel fetches
from storage for a crop, once without the volume in the page cache and once with it (Linux counts it; 0 on a
file system in memory). Then an index of 10^5 rows; and `volumes` small files (hard links to a few), whose
cases are opened and sampled: time and memory should not depend on how many there are.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import amaes  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import pretrain  # noqa: E402
import training  # noqa: E402


def prepared(folder):
    """A prepared folder of phantoms."""
    for words in (["tests/phantom.py", "--out", f"{folder}/raw", "--subjects", "8", "--labelled", "0",
                   "--size", "120"],
                  ["prepare_data.py", "--source", "bids", "--input", f"{folder}/raw", "--out",
                   f"{folder}/data"]):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    return f"{folder}/data"


def steps_a_second(folder, side, workers, steps, rounds=5):
    """(with the loader, from memory): medians over rounds."""
    cfg = pretrain.Config(data=folder, model="unet_demo", patch_size=side)
    cases, device = data.pretraining_cases(folder), torch.device("cpu")
    model = training.quicken(models.build_model(cfg.model, "pretrain"), device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    dataset = data.Crops(cases, side, 0, "all")

    def run(batches):
        times = []
        mark = time.perf_counter()
        for batch in batches:
            loss, _ = amaes.amaes(cfg, model, batch, device, torch.float32, False)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - mark)
            mark = time.perf_counter()
        return 1 / statistics.mean(times[1:])

    found = [], []
    for turn in range(rounds):
        stream = data.SampleStream(len(cases), 0, 4, turn * steps, (turn + 1) * steps)
        found[0].append(run(data.make_loader(dataset, stream, workers, device)))
        found[1].append(run([data.collate([dataset[key] for key in keys]) for keys in stream]))
    return [statistics.median(rates) for rates in found]


def fetched(folder, side, crops=8):
    """MiB that a crop of side^3 from a scan of usual size takes from storage: (cold, from the page cache)."""
    path = f"{folder}/scan.npy"
    np.save(path, np.random.default_rng(0).random((176, 208, 176)).astype(np.float16))
    case = data.Case("scan", "scan", (path,), None, ())
    dataset, found = data.Crops([case], side, 0, "none"), ([], [])
    with open(path, "rb") as file:
        os.fsync(file)
        for epoch in range(crops):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for turn in found:
                before = storage()
                dataset[epoch, 0]
                turn.append((storage() - before) / 2 ** 20)
    return [statistics.mean(turn) for turn in found]


def storage():
    """Bytes that this process made the kernel fetch from storage."""
    with open("/proc/self/io", encoding="utf-8") as file:
        return int(dict(line.split(": ") for line in file)["read_bytes"])


def index_of(folder, n):
    """Write an index of n rows over 8 volumes, hard links each -> seconds to open it."""
    volumes = data.read_index(folder)
    lines = [",".join(data.Volume._fields)]
    lines += [",".join(volumes[i % len(volumes)]._replace(path=f"volumes/x/{i:06}.npy", subject=f"s{i // 3}"))
              for i in range(n)]
    os.makedirs(f"{folder}/{n}/index")
    with open(f"{folder}/{n}/index/all.csv", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    began = time.perf_counter()
    data.read_index(f"{folder}/{n}")
    return time.perf_counter() - began


def resident():
    """MiB of this process."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def sampling(folder, n):
    """n small volumes: (seconds to open and split the cases, milliseconds a sample, MiB that all this
    holds)."""
    os.makedirs(f"{folder}/{n}/volumes/x")
    np.save(f"{folder}/small.npy", np.zeros((16, 16, 16), np.float16))
    for i in range(n):
        os.link(f"{folder}/small.npy", f"{folder}/{n}/volumes/x/{i:06}.npy")
    before, began = resident(), time.perf_counter()
    cases = data.pretraining_cases(f"{folder}/{n}")
    data.split_subjects([case.subject for case in cases], 0.01, 0)
    opened = time.perf_counter() - began
    dataset, began = data.Crops(cases, 16, 0, "none"), time.perf_counter()
    for keys in data.SampleStream(len(cases), 0, 4, 0, 500):
        for key in keys:
            dataset[key]
    each = (time.perf_counter() - began) / 2000 * 1e3
    return opened, each, resident() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--volumes", type=int, default=45_000)
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, os.cpu_count() - arguments.workers))
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared(temporary)
        loaded, memory = steps_a_second(folder, arguments.side, arguments.workers, arguments.steps)
        print(f"unet_demo, {arguments.side}^3, batch 4, {arguments.workers} worker: {loaded:.2f} steps a "
              f"second with the loader, {memory:.2f} from memory: {loaded / memory:.0%}")
        for side in (64, 128):
            cold, warm = fetched(temporary, side)
            print(f"a crop of {side}^3, {side ** 3 / 2 ** 19:.1f} MiB, of a scan of 12.3 MiB: {cold:.1f} MiB "
                  f"from storage, {warm:.1f} MiB when it is in the page cache")
        print(f"an index of 100,000 rows opens in {index_of(folder, 100_000):.2f} s")
        for n in (arguments.volumes // 10, arguments.volumes):
            index_of(folder, n)
            opened, each, mebibytes = sampling(folder, n)
            print(f"{n:,} volumes: opened and split in {opened:.2f} s, {each:.2f} ms a sample, "
                  f"{mebibytes:.0f} MiB held")


if __name__ == "__main__":
    main()
