"""The picture of Table 5: each transform at its strongest, and whole draws, input above target.

    python docs/augment_figure.py [docs/augmentations.png]
"""

import os
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import augment  # noqa: E402
import data  # noqa: E402
import phantom  # noqa: E402
import preprocess  # noqa: E402

SIDE = 128
COLUMNS = 6
GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}

# Title: the fields of a draw.
STRONGEST = {
    "rotation\n30°, here about one axis": {"angles": (0.0, 0.0, 30.0)},
    "zoom\n0.9: the head grows": {"scale": 0.9},
    "elastic deformation\nα 600, σ 20: under 2 voxels": {"elastic": (600.0, 20.0, 3)},
    "additive noise\nσ 0.001": {"intensity": (("gaussian_noise", (1e-3, 1)),)},
    "blur\nσ 1 voxel": {"intensity": (("gaussian_blur", (1.0,)),)},
    "multiplicative noise\nσ 0.001": {"intensity": (("multiplicative_noise", (1e-3, 1)),)},
    "motion ghosting\nevery 2nd plane, α 0.85": {
        "intensity": (("motion_ghosting", (0.85, 2, 1)),)},
    "Gibbs ringing\n3/4 of the frequencies": {"intensity": (("gibbs_ringing", (96, 0)),)},
    "low resolution\nhalf, along each axis": {"intensity": (("low_resolution", ((64, 64, 64),)),)},
    "bias field\nfrom a corner": {"intensity": (("bias_field", ((16, 16, 64),)),)},
    "gamma\n2": {"intensity": (("gamma", (2.0, False)),)},
    "gamma on the negative\n2": {"intensity": (("gamma", (2.0, True)),)},
}
NAMES = {"gaussian_noise": "noise", "gaussian_blur": "blur", "multiplicative_noise": "mult. noise",
         "motion_ghosting": "ghosting", "gibbs_ringing": "Gibbs", "low_resolution": "low res.",
         "bias_field": "bias", "gamma": "gamma"}


def head():
    """A prepared phantom: (D, H, W) in [0, 1]."""
    rng = np.random.default_rng(2)
    scan, _ = phantom.scan(phantom.anatomy(rng, SIDE), rng, "T1", SIDE)
    return preprocess.preprocess(scan)[0]


def middle_slices(volume, draw):
    """Input and target of pretraining under a draw: the middle axial slice of each."""
    # The patch is the centre of the volume.
    start = [(n - c) // 2 for n, c in zip(volume.shape, draw.context, strict=True)]
    crop = torch.from_numpy(data.read_box(volume, start, draw.context))[None]

    target, _ = augment.spatial([crop], None, [draw])
    image = augment.intensity(target, [draw])
    return image[0, 0, :, :, SIDE // 2].numpy(), target[0, 0, :, :, SIDE // 2].numpy()


def draw_of(fields):
    """A draw in which nothing but these fields is drawn."""
    size = (SIDE,) * 3
    spatial = [fields.get(name) for name in ("angles", "scale", "elastic")]
    return augment.Draw(size, augment.context_of(size, *spatial), **fields)


def contents(draw):
    """What a draw holds, three names a line."""
    spatial = {"rotation": any(draw.angles or ()), "zoom": draw.scale, "elastic": draw.elastic}
    names = [name for name, drawn in spatial.items() if drawn]
    names += [NAMES[name] for name, _ in draw.intensity]
    lines = [", ".join(names[i:i + 3]) for i in range(0, len(names), 3)]
    return "\n".join(lines) or "nothing"


def show(axis, image, title="", note="", **options):
    """Draw one slice, without ticks or frame, on a matplotlib axis."""
    axis.imshow(image.T, origin="lower", interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    axis.text(0.97, 0.03, note, transform=axis.transAxes, fontsize=7, ha="right")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_figure(plt):
    """All of Table 5 on one matplotlib figure."""
    volume = head()
    figure, axes = plt.subplots(6, COLUMNS, figsize=(9.6, 10.6), dpi=84, layout="constrained")

    # Each transform at its strongest, and what it changes.
    plain, _ = middle_slices(volume, draw_of({}))
    for i, (title, fields) in enumerate(STRONGEST.items()):
        image, _ = middle_slices(volume, draw_of(fields))
        change = image - plain
        largest = np.abs(change).max()
        row = 2 * (i // COLUMNS)
        column = i % COLUMNS
        show(axes[row, column], image, title, **GREY)
        show(axes[row + 1, column], change, note=f"± {largest:.2g}", cmap="RdBu_r", vmin=-largest,
             vmax=largest)

    # Whole draws, as the training sees them.
    for column in range(COLUMNS):
        draw = augment.draw(column, "all", SIDE)
        image, target = middle_slices(volume, draw)
        show(axes[4, column], image, contents(draw), **GREY)
        show(axes[5, column], target, **GREY)

    labels = ("strongest", "change", "strongest", "change", "whole draws: input", "target")
    for row, label in enumerate(labels):
        axes[row, 0].set_ylabel(label, fontsize=9)
    return figure


def main(path):
    """Draw the figure and write it as a PNG of few colours."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib needs it anyway

    figure = draw_figure(plt)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")

    # One palette of greys and of differences: a third of the bytes, and no bands.
    colours = [plt.get_cmap(name)(np.linspace(0, 1, 96))[:, :3] for name in ("gray", "RdBu_r")]
    values = (np.concatenate(colours) * 255).round().astype(np.uint8)
    palette = Image.new("P", (1, 1))
    palette.putpalette(values.tobytes())
    pixels = pixels.quantize(palette=palette, dither=Image.Dither.NONE)
    pixels.save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "docs", "augmentations.png"))
