"""Preparation from file to file, beside yucca's and beside nibabel with scipy; and the memory of a worker.

    python bench/prepare.py [--rounds 3] [--scans DIR]

One worker and one thread each, the three in turns in one process, CPU time, medians over rounds. File to
file: .nii.gz in, one array out (ours float16 with its hash and geometry, the others float32), no label.
yucca 1.1.7: preprocess_case_for_training_without_label, the official code's call. scipy: closest canonical
axes, the same crop and percentile, ndimage.zoom(order=3), which does not smooth where it shrinks. Without
--scans the files are phantoms on the grids of BraTS21, of a sagittal MPRAGE, and of two clinical FLAIRs.
Memory: peak of a fresh process above its idle state, in units of the float32 volume (its own grid or 1 mm,
whichever is larger).
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
import sources  # noqa: E402

# yucca imports fvcore for a FLOP counter, which is not used here.
sys.modules |= {name: types.SimpleNamespace(FlopCountAnalysis=None) for name in ("fvcore", "fvcore.nn")}
try:
    from skimage.transform import resize
    from yucca.functional.preprocessing import preprocess_case_for_training_without_label
except ImportError:
    preprocess_case_for_training_without_label = None
GRIDS = {"brats 240x240x155, 1 mm": ((240, 240, 155), (1, 1, 1), True),
         "mprage 170x256x256, 1.2x1x1": ((170, 256, 256), (1.2, 1, 1), False),
         "flair 256x256x48, 0.96x0.96x3": ((256, 256, 48), (0.96, 0.96, 3), False),
         "flair 512x512x29, 0.45x0.45x5": ((512, 512, 29), (0.45, 0.45, 5), False)}


def write_phantom(path, shape, spacing, stripped):
    """A head in the middle of a grid of `shape` voxels, as LAS: the nearest that yucca takes to what scanners
    store."""
    rng = np.random.default_rng(0)
    image, _ = phantom.scan(phantom.anatomy(rng, 180), rng, "FLAIR", 180, spacing, "LAS", stripped=stripped)
    array = np.asarray(image.dataobj)
    canvas = np.zeros(shape, array.dtype) if stripped else rng.integers(0, 20, shape).astype(array.dtype)
    size = np.minimum(shape, array.shape)
    there = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(shape, size, strict=True))
    here = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(array.shape, size, strict=True))
    canvas[there] = array[here]
    nib.Nifti1Image(canvas, image.affine).to_filename(path)


def ours(path, out):
    scan = sources.Scan(os.path.basename(path), "s", "1", "FLAIR", "", "pretrain")
    image = preprocess.load_scan(path)
    prepare_data.prepare_volume(os.path.dirname(path), out, "bench", scan, image, None, False)


def yucca(path, out):
    volume, _ = preprocess_case_for_training_without_label(
        [nib.load(path)], ["volume_wise_znorm"], target_spacing=np.ones(3), intensities=None,
        image_properties={})
    np.save(os.path.join(out, "yucca.npy"), volume[0].astype(np.float32))


def scipy_zoom(path, out):
    image = nib.as_closest_canonical(nib.load(path))
    voxels = np.maximum(image.get_fdata(dtype=np.float32), 0)
    crop = voxels[tuple(slice(*pair) for pair in preprocess.tight_box(voxels))]
    high = np.quantile(crop[crop > crop.min()], 0.99)
    volume = (np.minimum(crop, high) - crop.min()) / (high - crop.min())
    factors = [round(n * s) / n for n, s in zip(crop.shape, image.header.get_zooms()[:3], strict=True)]
    if any(factor != 1 for factor in factors):
        volume = scipy.ndimage.zoom(volume, factors, order=3, mode="mirror", grid_mode=True)
    np.save(os.path.join(out, "scipy.npy"), volume)


def seconds(work, *arguments):
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began


def peak():
    """Peak resident bytes of this process; unlike getrusage's, it starts anew with the program."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def memory(path):
    """Peak of a fresh process above its idle state, in float32 volumes."""
    with tempfile.TemporaryDirectory() as out:
        above = int(subprocess.check_output([sys.executable, __file__, "--one", path, out], text=True))
    image = nib.load(path)
    native = np.prod(image.shape[:3])
    at_1mm = np.prod(np.array(image.shape[:3]) * nib.affines.voxel_sizes(image.affine))
    return above / (4 * max(native, at_1mm))


def agreement(path):
    """Largest difference to yucca's volume, with yucca's crop box, after float16."""
    theirs, found = preprocess_case_for_training_without_label(
        [nib.load(path)], ["volume_wise_znorm"], target_spacing=np.ones(3), intensities=None,
        image_properties={})
    box = np.reshape(found["crop_to_nonzero"], (3, 2)) + [0, 1]
    volume, _ = preprocess.preprocess(path, np.minimum(box, np.array(nib.load(path).shape)[:, None]))
    return np.abs(volume.astype(np.float16).astype(np.float32) - theirs[0]).max()


def resampling(path):
    """CPU seconds of the resampling alone: (ours, skimage)."""
    image = nib.as_closest_canonical(nib.load(path))
    voxels = image.get_fdata(dtype=np.float32) / 1000
    shape = [round(n * float(s)) for n, s in zip(voxels.shape, image.header.get_zooms()[:3], strict=True)]
    resample.resampling_matrix.cache_clear()
    return [seconds(resample.resample, voxels, shape), seconds(resize, voxels, shape, 3)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scans", help="folder whose .nii.gz files are taken instead of phantoms")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        idle = peak()
        ours(*arguments.one)
        return print(peak() - idle)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.scans:
            files = {os.path.basename(p): p for p in
                     sorted(glob.glob(f"{arguments.scans}/**/*.nii.gz", recursive=True))}
        else:
            files = {name: os.path.join(folder, f"{number}.nii.gz") for number, name in enumerate(GRIDS)}
            for name, path in files.items():
                write_phantom(path, *GRIDS[name])
        peers = [scipy_zoom] if preprocess_case_for_training_without_label is None else [yucca, scipy_zoom]
        print("| file | ours, volumes a minute | yucca | scipy | faster than yucca | than scipy | resampling "
              "alone, faster than skimage | difference to yucca | memory, volumes |\n" + "|---" * 9 + "|")
        for name, path in files.items():
            times = {work: [] for work in (ours, *peers)}
            for turn in range(arguments.rounds + 1):
                for work, found in times.items():
                    try:
                        found.append(seconds(work, path, folder))
                    except AssertionError:  # yucca takes no permuted axes
                        found.append(float("nan"))
                if not turn:
                    times = {work: [] for work in times}
            minute = {work: 60 / statistics.median(found) for work, found in times.items()}
            known = yucca in minute and minute[yucca] == minute[yucca]
            alone = "-"
            if known:
                pairs = [resampling(path) for _ in range(arguments.rounds)]
                alone = f"{statistics.median(b / a for a, b in pairs):.0f}x"
            cells = [f"{minute[ours]:.0f}", f"{minute[yucca]:.1f}" if known else "-",
                     f"{minute[scipy_zoom]:.1f}", f"{minute[ours] / minute[yucca]:.1f}x" if known else "-",
                     f"{minute[ours] / minute[scipy_zoom]:.1f}x", alone,
                     f"{agreement(path):.1e}" if known else "-", f"{memory(path):.1f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
