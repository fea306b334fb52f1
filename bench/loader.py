"""The data path: does the network wait for it, how does the index grow, what is read for a sample.

    python bench/loader.py [--side 64] [--workers 1] [--steps 16] [--volumes 45000]

It measures, in this order:

* Pretraining steps of unet_demo in bf16 with the loader, and with the same batches from memory. The
  two take turns of `steps` steps, of which the first is not counted.
* What the kernel fetches from storage for a crop, without the volume in the page cache and with it.
  Linux counts it; on a file system in memory it is 0.
* The time to open an index of 100,000 rows.
* The time and the memory for `volumes` small files, which are hard links to one: they are opened as
  cases, and sampled. A sample should cost the same however many there are.
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
import data  # noqa: E402
import devices  # noqa: E402
import models  # noqa: E402
import pretrain  # noqa: E402

BATCH = 4
MEBIBYTE = 2 ** 20


def prepared(folder):
    """A prepared folder of phantoms."""
    phantoms = ["tests/phantom.py", "--out", f"{folder}/raw", "--subjects", "8", "--labelled", "0",
                "--size", "120"]
    preparation = ["prepare_data.py", "--source", "bids", "--input", f"{folder}/raw",
                   "--out", f"{folder}/data"]
    for words in (phantoms, preparation):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    return f"{folder}/data"


def steps_a_second(folder, side, workers, steps, rounds=5):
    """Median over rounds of the steps a second: (with the loader, from memory)."""
    cfg = pretrain.Config(data=folder, model="unet_demo", patch_size=side)
    cases = data.pretraining_cases(folder)
    dataset = data.Crops(cases, side, 0, "all")
    device = torch.device("cpu")
    model = devices.quicken(models.build_model(cfg.model, "pretrain"), device)
    objective = pretrain.choose_objective("amaes", device, cfg.precision, cfg.token_size,
                                          cfg.mask_ratio, cfg.augmented_target, cfg.loss_region)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def rate(batches):
        """Steps a second, from the end of the first step on."""
        ends = []
        for batch in batches:
            loss, _ = objective.loss(model, batch, logging=False)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ends.append(time.perf_counter())
        return (len(ends) - 1) / (ends[-1] - ends[0])

    loaded = []
    from_memory = []
    for turn in range(rounds):
        stream = data.SampleStream(len(cases), 0, BATCH, turn * steps, (turn + 1) * steps)
        loaded.append(rate(data.make_loader(dataset, stream, workers, device)))

        # The list is complete before its first step begins.
        batches = [data.collate([dataset[key] for key in keys]) for keys in stream]
        from_memory.append(rate(batches))
    return statistics.median(loaded), statistics.median(from_memory)


def fetched(folder, side, crops=8):
    """MiB from storage for a crop of a scan of usual size: (cold, from the page cache)."""
    path = f"{folder}/scan.npy"
    np.save(path, np.random.default_rng(0).random((176, 208, 176)).astype(np.float16))
    case = data.Case("scan", "scan", (path,), None, ())
    dataset = data.Crops([case], side, 0, "none")

    cold = []
    warm = []
    with open(path, "rb") as file:
        os.fsync(file)
        for epoch in range(crops):
            # Each crop is read twice, and is in the page cache the second time.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for reads in (cold, warm):
                before = storage()
                dataset[epoch, 0]
                reads.append((storage() - before) / MEBIBYTE)
    return statistics.mean(cold), statistics.mean(warm)


def storage():
    """Bytes that this process made the kernel fetch from storage."""
    with open("/proc/self/io", encoding="utf-8") as file:
        counts = dict(line.split(": ") for line in file)
    return int(counts["read_bytes"])


def write_index(folder, n):
    """Writes an index of n rows into the folder `n` below this one -> seconds to open it.

    The volumes that it names need not be there for that."""
    volumes = data.read_index(folder)
    lines = [",".join(data.Volume._fields)]
    for i in range(n):
        volume = volumes[i % len(volumes)]
        row = volume._replace(path=f"volumes/x/{i:06}.npy", subject=f"s{i // 3}")
        lines.append(",".join(row))
    os.makedirs(f"{folder}/{n}/index")
    with open(f"{folder}/{n}/index/all.csv", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")

    began = time.perf_counter()
    data.read_index(f"{folder}/{n}")
    return time.perf_counter() - began


def resident():
    """MiB of memory that this process holds."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def sampling(folder, n, steps=500):
    """The n small volumes of an index: (seconds to open and split the cases, milliseconds a sample,
    MiB that all of this holds)."""
    os.makedirs(f"{folder}/{n}/volumes/x")
    np.save(f"{folder}/small.npy", np.zeros((16, 16, 16), np.float16))
    for i in range(n):
        os.link(f"{folder}/small.npy", f"{folder}/{n}/volumes/x/{i:06}.npy")

    held_before = resident()
    began = time.perf_counter()
    cases = data.pretraining_cases(f"{folder}/{n}")
    data.split_subjects([case.subject for case in cases], 0.01, 0)
    opened = time.perf_counter() - began

    dataset = data.Crops(cases, 16, 0, "none")
    began = time.perf_counter()
    for keys in data.SampleStream(len(cases), 0, BATCH, 0, steps):
        for key in keys:
            dataset[key]
    each = (time.perf_counter() - began) / (steps * BATCH) * 1e3
    return opened, each, resident() - held_before


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--volumes", type=int, default=45_000)
    arguments = parser.parse_args()

    # A core each for the workers, the others for the network.
    torch.set_num_threads(max(1, os.cpu_count() - arguments.workers))
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared(temporary)
        loaded, memory = steps_a_second(folder, arguments.side, arguments.workers, arguments.steps)
        print(f"unet_demo, {arguments.side}^3, batch {BATCH}, {arguments.workers} worker: "
              f"{loaded:.2f} steps a second with the loader, {memory:.2f} from memory: "
              f"{loaded / memory:.0%}")

        for side in (64, 128):
            cold, warm = fetched(temporary, side)
            print(f"a crop of {side}^3, {side ** 3 * 2 / MEBIBYTE:.1f} MiB, of a scan of 12.3 MiB: "
                  f"{cold:.1f} MiB from storage, {warm:.1f} MiB when it is in the page cache")

        print(f"an index of 100,000 rows opens in {write_index(folder, 100_000):.2f} s")
        for n in (arguments.volumes // 10, arguments.volumes):
            write_index(folder, n)
            opened, each, mebibytes = sampling(folder, n)
            print(f"{n:,} volumes: opened and split in {opened:.2f} s, {each:.2f} ms a sample, "
                  f"{mebibytes:.0f} MiB held")


if __name__ == "__main__":
    main()
