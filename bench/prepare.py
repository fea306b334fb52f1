"""Preparation from file to file, beside yucca's and nibabel with scipy; and the memory of a worker.

    python bench/prepare.py [--rounds 3] [--scans DIR]

The three take turns in one process, with one worker and one thread each: CPU time, medians over
rounds. File to file means .nii.gz in and one array out, without a label. Ours writes float16 with
its checksum and geometry, the others write float32.

yucca 1.1.7 is called as the official code calls it: preprocess_case_for_training_without_label.
scipy is closest canonical axes, the same crop and percentile, and ndimage.zoom(order=3), which does
not smooth where it shrinks. Without --scans, the files are phantoms on the grids of BraTS21, of a
sagittal MPRAGE, and of two clinical FLAIRs. Memory is the peak of a fresh process above its idle
state, in units of the float32 volume (on its own grid or at 1 mm, whichever is larger).
"""

import argparse
import glob
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types

import nibabel as nib
import numpy as np
import scipy.ndimage
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import phantom  # noqa: E402
import prepare_data  # noqa: E402
import preprocess  # noqa: E402
import resample  # noqa: E402
import scans  # noqa: E402
import sources  # noqa: E402

# yucca imports fvcore for a FLOP counter, which is not used here.
sys.modules |= {name: types.SimpleNamespace(FlopCountAnalysis=None)
                for name in ("fvcore", "fvcore.nn")}
try:
    from skimage.transform import resize
    from yucca.functional.preprocessing import preprocess_case_for_training_without_label
except ImportError:
    preprocess_case_for_training_without_label = None

# Name of a phantom: its shape in voxels, its voxel size in mm, whether its skull is stripped.
GRIDS = {"brats 240x240x155, 1 mm": ((240, 240, 155), (1, 1, 1), True),
         "mprage 170x256x256, 1.2x1x1": ((170, 256, 256), (1.2, 1, 1), False),
         "flair 256x256x48, 0.96x0.96x3": ((256, 256, 48), (0.96, 0.96, 3), False),
         "flair 512x512x29, 0.45x0.45x5": ((512, 512, 29), (0.45, 0.45, 5), False)}

COLUMNS = ("file", "ours, volumes a minute", "yucca", "scipy", "faster than yucca", "than scipy",
           "resampling alone, faster than skimage", "difference to yucca", "memory, volumes")


# ----------------------------------------------------------------------------------------- inputs
def write_phantom(path, shape, spacing, stripped):
    """Write a head in the middle of a grid of `shape` voxels.

    Its axes are LAS, the nearest that yucca takes to what scanners store."""
    rng = np.random.default_rng(0)
    anatomy = phantom.anatomy(rng, 180)
    image, _ = phantom.scan(anatomy, rng, "FLAIR", 180, spacing, "LAS", stripped=stripped)
    head = np.asarray(image.dataobj)

    # Air is 0 in a stripped scan, and noise in others.
    if stripped:
        canvas = np.zeros(shape, head.dtype)
    else:
        canvas = rng.integers(0, 20, shape).astype(head.dtype)
    size = np.minimum(shape, head.shape)
    canvas[middle(canvas.shape, size)] = head[middle(head.shape, size)]
    nib.Nifti1Image(canvas, image.affine).to_filename(path)


def middle(shape, size):
    """The index of the middle `size` voxels of an array."""
    starts = (np.array(shape) - size) // 2
    return tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))


def find_files(folder, directory):
    """{name: path} of the scans below --scans, or of phantoms that are written into a folder."""
    if directory:
        paths = sorted(glob.glob(f"{directory}/**/*.nii.gz", recursive=True))
        return {os.path.basename(path): path for path in paths}

    files = {}
    for number, (name, grid) in enumerate(GRIDS.items()):
        files[name] = os.path.join(folder, f"{number}.nii.gz")
        write_phantom(files[name], *grid)
    return files


# ------------------------------------------------------------------------------ three ways to work
def ours(path, out):
    """Prepare one scan as prepare_data.py does."""
    scan = sources.Scan(os.path.basename(path), "s", "1", "FLAIR", "", "pretrain")
    image = scans.load_scan(path)
    prepare_data.prepare_volume(os.path.dirname(path), out, "bench", scan, image, None, False)


def run_yucca(path):
    """Prepare one scan as the official code does -> (volume (1, D, H, W), properties)."""
    return preprocess_case_for_training_without_label(
        [nib.load(path)], ["volume_wise_znorm"], target_spacing=np.ones(3), intensities=None,
        image_properties={})


def yucca(path, out):
    """Prepare one scan as the official code does, and write it."""
    volume, _ = run_yucca(path)
    np.save(os.path.join(out, "yucca.npy"), volume[0].astype(np.float32))


def scipy_zoom(path, out):
    """Prepare one scan with what a researcher would reach for."""
    image = nib.as_closest_canonical(nib.load(path))
    voxels = np.maximum(image.get_fdata(dtype=np.float32), 0)
    crop = voxels[preprocess.slices(preprocess.tight_box(voxels))]
    high = np.quantile(crop[crop > crop.min()], 0.99)
    volume = (np.minimum(crop, high) - crop.min()) / (high - crop.min())

    spacing = image.header.get_zooms()[:3]
    factors = [round(n * size) / n for n, size in zip(crop.shape, spacing, strict=True)]
    if any(factor != 1 for factor in factors):
        volume = scipy.ndimage.zoom(volume, factors, order=3, mode="mirror", grid_mode=True)
    np.save(os.path.join(out, "scipy.npy"), volume)


# ------------------------------------------------------------------------------------ measurements
def seconds(work, *arguments):
    """CPU seconds of one call."""
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began


def time_in_turns(workers, path, folder, rounds):
    """{function: median CPU seconds}, or NaN for a function that does not take this file."""
    times = {work: [] for work in workers}
    for turn in range(rounds + 1):
        for work, found in times.items():
            try:
                spent = seconds(work, path, folder)
            except AssertionError:  # yucca takes no permuted axes
                spent = float("nan")

            # The first turn warms up: it fills caches, and does not count.
            if turn > 0:
                found.append(spent)
    return {work: statistics.median(found) for work, found in times.items()}


def peak():
    """Peak resident bytes of this process; unlike getrusage's, it starts anew with the program."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def memory(path):
    """Peak of a fresh process above its idle state, in float32 volumes."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--one", path, out]
        above = int(subprocess.check_output(command, text=True))
    image = nib.load(path)
    native = np.prod(image.shape[:3])
    at_1mm = np.prod(np.array(image.shape[:3]) * nib.affines.voxel_sizes(image.affine))
    return above / (4 * max(native, at_1mm))


def agreement(path):
    """Largest difference to yucca's volume, with yucca's crop box, after float16."""
    theirs, found = run_yucca(path)

    # Half-open, as their code slices it; that may reach one voxel beyond the scan.
    box = np.reshape(found["crop_to_nonzero"], (3, 2)) + [0, 1]
    box = np.minimum(box, np.array(nib.load(path).shape)[:, None])
    volume, _ = preprocess.preprocess(path, box)
    return np.abs(volume.astype(np.float16).astype(np.float32) - theirs[0]).max()


def resampling_gain(path):
    """How many times faster the resampling alone is than skimage's."""
    image = nib.as_closest_canonical(nib.load(path))
    voxels = image.get_fdata(dtype=np.float32) / 1000
    spacing = image.header.get_zooms()[:3]
    shape = [round(n * float(size)) for n, size in zip(voxels.shape, spacing, strict=True)]

    # The matrices are made anew, as for the first scan of a grid.
    resample.resampling_matrix.cache_clear()
    our_time = seconds(resample.resample, voxels, shape)
    return seconds(resize, voxels, shape, 3) / our_time


# ------------------------------------------------------------------------------------------- table
def measure(path, folder, rounds):
    """The cells of one file's row, in the order of COLUMNS; "-" where yucca cannot be compared."""
    workers = [ours, scipy_zoom]
    if preprocess_case_for_training_without_label is not None:
        workers = [ours, yucca, scipy_zoom]
    spent = time_in_turns(workers, path, folder, rounds)

    their_rate, gain, alone, difference = "-", "-", "-", "-"
    if yucca in spent and not np.isnan(spent[yucca]):
        their_rate = f"{60 / spent[yucca]:.1f}"
        gain = f"{spent[yucca] / spent[ours]:.1f}x"
        alone = f"{statistics.median(resampling_gain(path) for _ in range(rounds)):.0f}x"
        difference = f"{agreement(path):.1e}"
    return [f"{60 / spent[ours]:.0f}", their_rate, f"{60 / spent[scipy_zoom]:.1f}", gain,
            f"{spent[scipy_zoom] / spent[ours]:.1f}x", alone, difference, f"{memory(path):.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scans", help="folder whose .nii.gz files are taken instead of phantoms")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    # The fresh process of memory().
    if arguments.one:
        idle = peak()
        ours(*arguments.one)
        return print(peak() - idle)

    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in find_files(folder, arguments.scans).items():
            cells = measure(path, folder, arguments.rounds)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
