"""Evaluation: what scores cost beside other libraries, and how long a fold waits for them.

    python bench/evaluate.py [--gliomas 10] [--peers 3] [--hard 50] [--cases 20] [--standin 0.15]

1. Scores. Each case is a prediction and a truth on the grid of BraTS (evaluation_cases.py). `ours`
is metrics.score: Dice, HD95, ASD, NSD, lesion F1, volumes. The others do the part of it that they
have: scipy the distances and lesions, by a distance transform in the box around both masks or of
the whole grid; surface-distance and MONAI the three surface scores. CPU seconds of one thread, case
by case in turns; the table has medians over gliomas of the sum over their four regions.

2. From logits to classes: peak of resident memory beyond the logits, in megabytes, and seconds; by
predict.segment's own part, and as it is usually written: all classes resampled, placed, argmax.

3. A fold of gliomas with four channels, evaluated as finetune.py does, from a prepared folder, with
a network that is a wait of 0.15 s, as a GPU would be to the host; and with a small network on this
CPU. Wall time of the whole over that of the network's own part (`predict.segment`).
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import evaluation_cases as cases  # noqa: E402

import devices  # noqa: E402
import evaluate  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import predict  # noqa: E402
import preprocess  # noqa: E402
import tasks  # noqa: E402
import training  # noqa: E402

torch.set_num_threads(1)
SPACING = (1.0, 1.0, 1.0)


# ----------------------------------------------------------------------------------- 1. scores
def scipy_whole_grid(prediction, truth, spacing):
    return cases.by_scipy(prediction, truth, spacing, whole_grid=True)


def surface_distance(prediction, truth, spacing):
    """HD95, surface Dice and mean distance of the library of this name."""
    import surface_distance as library
    found = library.compute_surface_distances(truth, prediction, spacing)
    return (library.compute_robust_hausdorff(found, 95),
            library.compute_surface_dice_at_tolerance(found, metrics.TOLERANCE),
            library.compute_average_surface_distance(found))


def monai(prediction, truth, spacing):
    """The same of MONAI, by the functions that its users call."""
    from monai import metrics as library
    one, other = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    return (library.compute_hausdorff_distance(one, other, percentile=95, spacing=spacing),
            library.compute_surface_dice(one, other, [metrics.TOLERANCE], spacing=spacing),
            library.compute_average_surface_distance(one, other, symmetric=True, spacing=spacing))


LIBRARIES = {"ours": metrics.score, "scipy, in the box": cases.by_scipy,
             "scipy, whole grid": scipy_whole_grid, "surface-distance": surface_distance,
             "MONAI": monai}


def time_scores(options):
    """The two tables of part 1."""
    times = {name: [] for name in LIBRARIES}
    for seed in range(options.gliomas):
        pairs = cases.glioma_pairs(seed)
        for name, function in LIBRARIES.items():
            if name == "ours" or seed < options.peers:
                times[name].append(cases.seconds(function, pairs))

    print("| gliomas, four regions | cases | CPU s, median | over ours |\n|---|---|---|---|")
    for name, found in times.items():
        if found:
            # The same cases for both.
            same = statistics.median(times["ours"][:len(found)])
            print(f"| {name} | {len(found)} | {statistics.median(found):.2f} | "
                  f"{statistics.median(found) / same:.1f} |", flush=True)

    hard = {name: cases.seconds(metrics.score, [cases.hard(name)])
            for name in cases.hard_names()[:options.hard]}
    slowest = sorted(hard, key=hard.get, reverse=True)[:6]
    print(f"\n| the slowest of {len(hard)} hard cases | ours, CPU s | scipy, in the box |"
          "\n|---|---|---|")
    for name in slowest:
        theirs = cases.seconds(cases.by_scipy, [cases.hard(name)])
        print(f"| {name} | {hard[name]:.2f} | {theirs:.2f} |", flush=True)


# ------------------------------------------------------------------------ 2. logits to classes
def as_usual(logits, geometry):
    """All classes resampled at once, placed in the full grid, then argmax."""
    size = preprocess.box_size(geometry)
    crop = F.interpolate(logits[None], size, mode="trilinear", align_corners=False)[0]
    full = np.stack([preprocess.place(logit.numpy(), geometry) for logit in crop])
    return full.argmax(0).astype(np.uint8)


def a_class_at_a_time(logits, geometry):
    classes = predict.largest_class(logits, preprocess.box_size(geometry))
    return preprocess.place(classes.numpy(), geometry)


def resident(field):
    """Resident memory of this process in bytes: VmRSS, now, or VmHWM, its peak."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def restore_once(form, classes):
    """Print peak and seconds of one form, in a process that gives freed memory back at once."""
    geometry = {"shape": [240, 240, 155], "box": [[40, 200], [20, 220], [5, 145]],
                "orientation": [[0, -1], [1, -1], [2, 1]]}
    logits = torch.randn(classes, 160, 200, 140)
    restore = {"ours": a_class_at_a_time, "usual": as_usual}[form]
    restore(logits[:, :20, :20, :20], geometry | {"box": [[0, 20]] * 3})  # imports
    before = resident("VmRSS")
    start = time.perf_counter()
    restore(logits, geometry)
    print((resident("VmHWM") - before) / 1e6, time.perf_counter() - start)


def time_restoring(rounds=5):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536",
                                "MALLOC_TRIM_THRESHOLD_": "65536"}
    print("\n| logits to classes, a box of 160 x 200 x 140 | ours, MB | usual, MB | share | "
          "ours, s | usual, s |\n|---|---|---|---|---|---|")
    for classes in (2, 4):
        found = {"ours": [], "usual": []}
        for _ in range(rounds):
            for form, results in found.items():
                command = [sys.executable, __file__, "--restore", form, str(classes)]
                answer = subprocess.run(command, env=environment, check=True, text=True,
                                        capture_output=True).stdout
                results.append([float(word) for word in answer.split()])
        (ours, ours_s), (usual, usual_s) = (np.median(found[form], 0) for form in found)
        print(f"| {classes} classes | {ours:.0f} | {usual:.0f} | {ours / usual:.2f} | {ours_s:.2f} "
              f"| {usual_s:.2f} |", flush=True)


# ------------------------------------------------------------------------------------ 3. a fold
def make_cohort(folder, count):
    """Gliomas in four contrasts, written as NIfTI and prepared -> their cases, predictions."""
    rng = np.random.default_rng(0)
    rows = [["path", "subject", "session", "sequence", "label"]]
    for seed in range(count):
        truth = cases.glioma(seed)
        brain = cases.head(truth.shape)
        label = os.path.join(folder, f"{seed}_label.nii.gz")
        nib.Nifti1Image(truth, np.eye(4)).to_filename(label)
        noise = rng.normal(0, 10, truth.shape).astype(np.float32)
        for sequence in ("T1", "T1CE", "T2", "FLAIR"):
            voxels = np.where(brain, 200 + noise + truth * rng.uniform(10, 60), 0)
            path = os.path.join(folder, f"{seed}_{sequence}.nii")
            nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)).to_filename(path)
            rows.append([path, str(seed), "", sequence, label])
    with open(os.path.join(folder, "scans.csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    prepared = os.path.join(folder, "prepared")
    subprocess.run([sys.executable, os.path.join(root, "prepare_data.py"), "--source", "manifest",
                    "--input", os.path.join(folder, "scans.csv"), "--out", prepared], check=True,
                   stdout=subprocess.DEVNULL)
    found = tasks.labelled_cases(prepared, None, ("T1", "T1CE", "T2", "FLAIR"))
    predictions = {}
    for case in found:
        seed = int(case.subject.rsplit("/")[-1])
        predictions[case.name] = cases.predicted_glioma(seed, cases.glioma(seed))
    return found, predictions


TASK = tasks.Task(
    data="", sequences=("T1", "T1CE", "T2", "FLAIR"), labels={0: 0, 1: 1, 2: 2, 3: 3},
    classes=("background", "necrosis", "oedema", "enhancing"),
    regions={"whole tumour": (1, 2, 3), "core": (1, 3)}, n_train=1)


def evaluate_once(found, segment, scorers, folder):
    """-> seconds of a whole fold, and of `segment` alone in it."""
    own = 0.0

    def timed(volume, geometry):
        nonlocal own
        start = time.perf_counter()
        classes = segment(volume, geometry)
        own += time.perf_counter() - start
        return classes

    seen = {"subjects": [], "sha256": []}
    start = time.perf_counter()
    evaluate.evaluate_fold(timed, TASK, seen, found, folder, ["bench"],
                           training.Processes(0, 1, torch.device("cpu")), threading.Event(),
                           scorers)
    whole = time.perf_counter() - start
    evaluate.scoring.Kept(folder, None).remove()
    return whole, own


def time_fold(options):
    training.init_processes("cpu")
    with tempfile.TemporaryDirectory() as folder:
        found, predictions = make_cohort(folder, options.cases)

        network = devices.quicken(models.build_model("unet_demo", "segment", 4, 4), "cpu").eval()

        def wait(volume, geometry):
            time.sleep(options.standin)

        def small(volume, geometry):
            predict.segment(network, volume, geometry, 64, "bf16", overlap=0, batch=1)

        def instead(work):
            """A network that works, and whose result is the predicted glioma: cases in order."""
            order = iter([predictions[case.name] for case in found])

            def segment(volume, geometry):
                work(volume, geometry)
                return next(order)
            return segment

        print(f"\n| fold of {len(found)} gliomas, six scores of five regions | scoring processes | "
              "network, s | whole, s | whole over network |\n|---|---|---|---|---|")
        evaluate_once(found, instead(wait), 2, folder)  # the page cache
        works = {f"a wait of {options.standin} s a case": wait, "unet_demo on one core": small}
        for name, work in works.items():
            for scorers in (0, 1, 2):
                turns = [evaluate_once(found, instead(work), scorers, folder) for _ in range(3)]
                say_fold(name, scorers, turns)


def say_fold(name, scorers, turns):
    whole, own = np.median(turns, 0)
    print(f"| {name} | {scorers or 'none'} | {own:.1f} | {whole:.1f} | {whole / own:.2f} |",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gliomas", type=int, default=10)
    parser.add_argument("--peers", type=int, default=3, help="gliomas that the others score, too")
    parser.add_argument("--hard", type=int, default=50, help="how many of the 50")
    parser.add_argument("--cases", type=int, default=20, help="of the fold")
    parser.add_argument("--standin", type=float, default=0.15, help="seconds a case")
    parser.add_argument("--parts", default="123")
    parser.add_argument("--restore", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.restore:
        return restore_once(options.restore[0], int(options.restore[1]))
    if "1" in options.parts:
        time_scores(options)
    if "2" in options.parts:
        time_restoring()
    if "3" in options.parts:
        time_fold(options)


if __name__ == "__main__":
    main()
