"""Time of the augmentations on a 128^3 sample, beside yucca, batchgeneratorsv2, TorchIO and MONAI.

    python bench/augment.py [--threads 1] [--draws 40] [--repeats 9] [--quick]

The peers that are installed (`pip install --no-deps yucca==1.1.7 batchgenerators batchgeneratorsv2
torchio monai`, and what they import) and ours run in turns in one process, with equal threads. The
input must survive, as the target of pretraining does: peers that write in place get a copy. The
whole policy is Table 5 of yucca's own transforms, with the clip to the input's range; transforms
alone run without it. "-": there is no such transform.

Nearest equivalents are not the same work. The peers' low resolution is trilinear, ours and yucca's
is cubic. Yucca's lookups are cubic, all others are trilinear; ours on a CPU are those of
fast_cpu.py. TorchIO's elastic deformation is a B-spline on 7^3 points; MONAI's filter has sigma 5,
since 25, as the others have it, needs over 16 GB. Their bias fields are polynomials. Our filters
of k-space transform complex numbers; real transforms of the even and odd halves, which are harder
to read, would take 8 % off the mean of the policy.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
import types

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import augment  # noqa: E402
import fast_cpu  # noqa: E402

SIDE = 128

# One strength of each transform, for all libraries.
ANGLES = (20.0, -10.0, 15.0)
SCALE = 1.08
ALPHA = 400.0
SIGMA = 25.0
NOISE = 1e-3
BLUR = 0.75
KEEP = 104
LOW = 96
GAMMA = 1.5


def volume(side):
    """A ball with texture, in [0, 1], on 0: (side, side, side) float32."""
    line = np.linspace(-1.2, 1.2, side)
    radius = np.sqrt(sum(axis ** 2 for axis in np.meshgrid(line, line, line, indexing="ij")))
    texture = np.random.default_rng(0).uniform(0.2, 1, radius.shape)
    return np.where(radius < 1, texture * (1 - 0.5 * radius), 0).astype(np.float32)


X = torch.from_numpy(volume(SIDE))[None]


def ours(device="cpu"):
    """{row: function of a seed}, as all functions below."""
    x = X.to(device)
    size = x.shape[1:]
    none = (0, 0, 0)

    # What the patches of the policy are cut from, in the precision in which volumes are stored.
    wide = torch.from_numpy(volume(2 * SIDE)).to(device, torch.float16)[None]

    def policy(seed):
        draw = augment.draw(seed, "all", SIDE)
        first = [SIDE - n // 2 for n in draw.context]
        box = [slice(a, a + n) for a, n in zip(first, draw.context, strict=True)]
        crop = wide[(slice(None), *box)]
        target, _ = augment.spatial([crop], None, [draw])
        return augment.intensity(target, [draw])

    def elastic(seed):
        field = augment.elastic_displacement(ALPHA, SIGMA, seed, size, x.device)
        return augment.spatial_transform(x, None, none, 1.0, field, size)

    return {
        "whole policy": policy,
        "rotation": lambda s: augment.spatial_transform(x, None, ANGLES, 1.0, None, size),
        "zoom": lambda s: augment.spatial_transform(x, None, none, SCALE, None, size),
        "elastic deformation": elastic,
        "additive noise": lambda s: augment.gaussian_noise(x, NOISE, s),
        "blur": lambda s: augment.gaussian_blur(x, BLUR),
        "multiplicative noise": lambda s: augment.multiplicative_noise(x, NOISE, s),
        "motion ghosting": lambda s: augment.motion_ghosting(x, 0.9, 3, s % 3),
        "Gibbs ringing": lambda s: augment.gibbs_ringing(x, KEEP, s % 3),
        "low resolution": lambda s: augment.low_resolution(x, (LOW,) * 3),
        "bias field": lambda s: augment.bias_field(x, (40, 60, 80)),
        "gamma": lambda s: augment.gamma(x, GAMMA, False),
    }


def yucca_policy(t):
    """Table 5 by yucca's transforms, a module t: a function of a seed."""
    clip = {"clip_to_input_range": True}
    turn = (-30, 30)
    steps = [
        t.Spatial(crop=True, patch_size=(SIDE,) * 3, random_crop=False, skip_label=True,
                  p_deform_per_sample=0.33, deform_alpha=(200, 600), deform_sigma=(20, 30),
                  p_rot_per_sample=0.2, p_rot_per_axis=0.66, x_rot_in_degrees=turn,
                  y_rot_in_degrees=turn, z_rot_in_degrees=turn, p_scale_per_sample=0.2,
                  scale_factor=(0.9, 1.1), **clip),
        t.CopyImageToLabel(copy=True),
        t.AdditiveNoise(p_per_sample=0.2, **clip),
        t.Blur(p_per_sample=0.2, sigma=(0, 1), **clip),
        t.MultiplicativeNoise(p_per_sample=0.2, **clip),
        t.MotionGhosting(p_per_sample=0.2, num_reps=(2, 11), **clip),
        t.GibbsRinging(p_per_sample=0.2, **clip),
        t.SimulateLowres(p_per_sample=0.2, **clip),
        t.BiasField(p_per_sample=0.33, **clip),
        t.Gamma(p_per_sample=0.2, **clip),
    ]

    # What it reads for a patch of 128^3 is sqrt(2) times the side.
    wide = volume(181)[None, None]

    def policy(seed):
        np.random.seed(seed)
        sample = {"image": wide}
        for step in steps:
            sample = step(sample)

    return policy


def yucca(threads):
    # Modules that it imports on the way, but that its transforms do not use.
    for name in ("fvcore", "fvcore.nn", "timm", "torchvision", "torchvision.transforms"):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].FlopCountAnalysis = object
            sys.modules[name].Compose = object
    f = importlib.import_module("yucca.functional.transforms")
    x = volume(SIDE)

    def spatial(deform=0, rotate=0, zoom=0):
        f.spatial(x[None, None], (SIDE,) * 3, deform, rotate, 1, zoom, ALPHA, SIGMA,
                  *np.deg2rad(ANGLES), SCALE, False, random_crop=False)

    return {
        "whole policy": yucca_policy(
            importlib.import_module("yucca.modules.data.augmentation.transforms")),
        "rotation": lambda s: spatial(rotate=1),
        "zoom": lambda s: spatial(zoom=1),
        "elastic deformation": lambda s: spatial(deform=1),
        "additive noise": lambda s: f.additive_noise(x.copy(), 0, NOISE),
        "blur": lambda s: f.blur(x, BLUR, False),
        "multiplicative noise": lambda s: f.multiplicative_noise(x.copy(), 0, NOISE),
        "motion ghosting": lambda s: f.motion_ghosting(x.copy(), 0.9, 3, s % 3, False),
        "Gibbs ringing": lambda s: f.gibbs_ringing(x.copy(), KEEP, s % 3),
        "low resolution": lambda s: f.simulate_lowres(x, (LOW,) * 3, False),
        "bias field": lambda s: f.bias_field(x),
        "gamma": lambda s: f.augment_gamma(x.copy()[None], (GAMMA, GAMMA), per_channel=True),
    }


def batchgeneratorsv2(threads):
    def load(module, name):
        return getattr(importlib.import_module(f"batchgeneratorsv2.transforms.{module}"), name)

    radians = dict(enumerate(np.deg2rad(ANGLES).tolist()))
    spatial = load("spatial.spatial", "SpatialTransform")
    noise = load("intensity.gaussian_noise", "GaussianNoiseTransform")
    blur = load("noise.gaussian_blur", "GaussianBlurTransform")
    low_resolution = load("spatial.low_resolution", "SimulateLowResolutionTransform")
    gamma = load("intensity.gamma", "GammaTransform")
    patch = ((SIDE,) * 3, 0, False)
    transforms = {
        "rotation": spatial(*patch, p_rotation=1, rotation=lambda dim, **_: radians[dim]),
        "zoom": spatial(*patch, p_scaling=1, scaling=(SCALE, SCALE),
                        p_synchronize_scaling_across_axes=1),
        "elastic deformation": spatial(*patch, p_elastic_deform=1,
                                       elastic_deform_scale=(SIGMA / SIDE, SIGMA / SIDE),
                                       elastic_deform_magnitude=(1, 1)),
        "additive noise": noise((NOISE, NOISE)),
        "blur": blur((BLUR, BLUR), True, True, benchmark=True),
        "low resolution": low_resolution((LOW / SIDE, LOW / SIDE), True, True, None),
        "gamma": gamma((GAMMA, GAMMA), 0, True, 1, 0),
    }
    return {name: lambda s, t=t: t(image=X.clone()) for name, t in transforms.items()}


def torchio(threads):
    t = importlib.import_module("torchio")
    importlib.import_module("SimpleITK").ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    points = np.random.default_rng(0).uniform(-1, 1, (7, 7, 7, 3))
    transforms = {
        "rotation": t.Affine((1, 1, 1), ANGLES, (0, 0, 0)),
        "zoom": t.Affine((1 / SCALE,) * 3, (0, 0, 0), (0, 0, 0)),
        "elastic deformation": t.ElasticDeformation(points, (1, 1, 1)),
        "additive noise": t.Noise(0, NOISE, 0),
        "blur": t.Blur((BLUR,) * 3),
        "gamma": t.Gamma(GAMMA),
        "motion ghosting": t.Ghosting(3, 0, 0.1, 0.02),
        "bias field": t.BiasField([0.1] * 10, 2),
        "low resolution": t.RandomAnisotropy((0,), SIDE / LOW),
    }
    return {name: lambda s, t=t: t(X) for name, t in transforms.items()}


def monai(threads):
    t = importlib.import_module("monai.transforms")
    importlib.import_module("monai.data").set_track_meta(False)  # plain tensors: less to do
    transforms = {
        "rotation": t.Rotate(np.deg2rad(ANGLES).tolist(), padding_mode="zeros"),
        "zoom": t.Zoom(1 / SCALE, mode="trilinear", padding_mode="constant"),
        "elastic deformation": t.Rand3DElastic((5, 5), (9, 9), prob=1, padding_mode="zeros"),
        "additive noise": t.RandGaussianNoise(prob=1, std=NOISE, sample_std=False),
        "blur": t.GaussianSmooth(BLUR),
        "Gibbs ringing": t.GibbsNoise(1 - KEEP / SIDE),
        "low resolution": t.RandSimulateLowResolution(prob=1, zoom_range=(LOW / SIDE, LOW / SIDE)),
        "bias field": t.RandBiasField(degree=2, prob=1),
        "gamma": t.AdjustContrast(GAMMA),
    }
    return {name: lambda s, t=t: t(X) for name, t in transforms.items()}


def compare(libraries, row, repeats):
    """CPU and wall milliseconds of one row, in turns: {library: [(cpu, wall)]}."""
    times = {name: [] for name, functions in libraries.items() if row in functions}
    for seed in range(repeats + 1):
        for name in times:
            cpu = time.process_time()
            wall = time.perf_counter()
            libraries[name][row](seed)
            cpu = time.process_time() - cpu
            wall = time.perf_counter() - wall
            times[name].append((1e3 * cpu, 1e3 * wall))

    # The first turn warms up.
    return {name: found[1:] for name, found in times.items()}


def cells(times, libraries, average):
    """A row of the table: what each library takes, and its CPU time over ours."""
    ours = average(cpu for cpu, _ in times["ours"])
    for library in libraries:
        if library not in times:
            yield "-"
            continue
        cpu, wall = (average(column) for column in zip(*times[library], strict=True))
        ratio = "" if library == "ours" else f" ({cpu / ours:.1f}x)"
        yield f"{cpu:.1f} / {wall:.1f}{ratio}"


def on_cuda(draws):
    """A table of ours on a GPU: the mean over the draws, after three that warm up."""
    print(f"\n{torch.cuda.get_device_name()}, milliseconds per sample, mean\n")
    print("| | ours |\n|---|---:|")
    for row, function in ours("cuda").items():
        for seed in range(-3, draws):
            if seed == 0:
                torch.cuda.synchronize()
                start = time.perf_counter()
            function(seed % draws)
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        print(f"| {row} | {1e3 * took / draws:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=40, help="of the whole policy")
    parser.add_argument("--repeats", type=int, default=9, help="of each transform")
    parser.add_argument("--quick", action="store_true", help="4 draws, 3 repeats")
    options = parser.parse_args()
    draws, repeats = (4, 3) if options.quick else (options.draws, options.repeats)

    # BLAS reads its number of threads when it is loaded: start again with the right one.
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        limits = {f"{library}_NUM_THREADS": str(options.threads)
                  for library in ("OMP", "MKL", "OPENBLAS")}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)
    torch.set_num_threads(options.threads)

    # Ours as a training on a CPU has it, and the peers that are installed.
    fast_cpu.install_lookup()
    libraries = {"ours": ours()}
    for peer in (yucca, batchgeneratorsv2, torchio, monai):
        try:
            libraries[peer.__name__] = peer(options.threads)
        except ImportError as error:
            print(f"{peer.__name__} is left out: {error}")

    print(f"{SIDE}^3, {options.threads} thread(s), torch {torch.__version__}; CPU / wall ms a"
          f" sample, median of {draws} draws of the policy, {repeats} runs of a transform"
          " (a peer's CPU over ours)\n")
    print(f"| | {' | '.join(libraries)} |\n|---|{'---:|' * len(libraries)}")
    for row in libraries["ours"]:
        times = compare(libraries, row, draws if row == "whole policy" else repeats)
        print(f"| {row} | {' | '.join(cells(times, libraries, statistics.median))} |", flush=True)
        if row == "whole policy":
            print(f"| {row}, mean | {' | '.join(cells(times, libraries, statistics.mean))} |")

    if torch.cuda.is_available():
        on_cuda(draws)
    else:
        print("\nno GPU here")


if __name__ == "__main__":
    main()
