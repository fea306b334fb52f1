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

SIDE, COLUMNS = 128, 6
STRONGEST = {  # title: a draw's fields
    "rotation\n30°, here about one axis": {"angles": (0.0, 0.0, 30.0)},
    "zoom\n0.9: the head grows": {"scale": 0.9},
    "elastic deformation\nα 600, σ 20: under 2 voxels": {"elastic": (600.0, 20.0, 3)},
    "additive noise\nσ 0.001": {"intensity": (("gaussian_noise", (1e-3, 1)),)},
    "blur\nσ 1 voxel": {"intensity": (("gaussian_blur", (1.0,)),)},
    "multiplicative noise\nσ 0.001": {"intensity": (("multiplicative_noise", (1e-3, 1)),)},
    "motion ghosting\nevery 2nd plane, α 0.85": {"intensity": (("motion_ghosting", (0.85, 2, 1)),)},
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


def views(volume, draw):
    """Input and target of pretraining, the middle axial slice of each."""
    start = [(n - c) // 2 for n, c in zip(volume.shape, draw.context, strict=True)]
    crop = torch.from_numpy(data.read_box(volume, start, draw.context))[None]
    target, _ = augment.spatial([crop], None, [draw])
    return [batch[0, 0, :, :, SIDE // 2].numpy() for batch in (augment.intensity(target, [draw]), target)]


def strongest(fields):
    size = (SIDE,) * 3
    context = augment.context_of(size, fields.get("angles"), fields.get("scale"), fields.get("elastic"))
    return augment.Draw(size, context, **fields)


def contents(draw):
    """What a draw holds, in a line or two."""
    spatial = {"rotation": any(draw.angles or ()), "zoom": draw.scale, "elastic": draw.elastic}
    names = [name for name, drawn in spatial.items() if drawn] + [NAMES[name] for name, _ in draw.intensity]
    lines = [", ".join(names[i:i + 3]) for i in range(0, len(names), 3)]
    return "\n".join(lines) or "nothing"


def show(axis, image, title="", note="", **options):
    axis.imshow(image.T, origin="lower", interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    axis.text(0.97, 0.03, note, transform=axis.transAxes, fontsize=7, ha="right")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def main(path):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib needs it anyway

    volume = head()
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1}
    figure, axes = plt.subplots(6, COLUMNS, figsize=(9.6, 10.6), dpi=84, layout="constrained")
    plain, _ = views(volume, strongest({}))
    for i, (title, fields) in enumerate(STRONGEST.items()):
        image, _ = views(volume, strongest(fields))
        row, column = 2 * (i // COLUMNS), i % COLUMNS
        change = image - plain
        largest = np.abs(change).max()
        show(axes[row, column], image, title, **grey)
        show(axes[row + 1, column], change, note=f"± {largest:.2g}", cmap="RdBu_r", vmin=-largest,
             vmax=largest)
    for column in range(COLUMNS):
        draw = augment.draw(column, "all", SIDE)
        image, target = views(volume, draw)
        show(axes[4, column], image, contents(draw), **grey)
        show(axes[5, column], target, **grey)
    for row, label in enumerate(("strongest", "change") * 2 + ("whole draws: input", "target")):
        axes[row, 0].set_ylabel(label, fontsize=9)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    # One palette of greys and of differences: a third of the bytes, and no bands.
    colours = [plt.get_cmap(name)(np.linspace(0, 1, 96))[:, :3] for name in ("gray", "RdBu_r")]
    palette = Image.new("P", (1, 1))
    palette.putpalette((np.concatenate(colours) * 255).round().astype(np.uint8).tobytes())
    pixels.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "docs", "augmentations.png"))
