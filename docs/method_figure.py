"""The picture of Figure 2: a patch of a synthetic head, in pretraining and in finetuning.

    python docs/method_figure.py [docs/method.png]
"""

import os
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import amaes  # noqa: E402
import augment  # noqa: E402
import data  # noqa: E402
import phantom  # noqa: E402
import preprocess  # noqa: E402

SIDE = 96  # voxels a side of the patch; the paper's patches have 128
PRETRAINING_DRAW = 5401  # a seed whose draw can be seen: the head turns, its front darkens
FINETUNING_DRAW = 44  # another one, which turns the head

WIDTH, HEIGHT = 10.0, 6.1  # of the figure, in inches, which are the units of all places below
SMALL, LARGE = 10, 12  # font sizes in points
BLUE, BLUE_FILL = "#2b6cb0", "#bcd7f2"  # what the network sees, and the encoder
ORANGE = "#c05621"  # what it should return
GREY = "#555555"


# ---------------------------------------------------------------------------------- the real arrays
def head(seed, contrast, lesions):
    """A synthetic head after preprocessing: (volume (D, H, W) in [0, 1], lesion map (D, H, W))."""
    rng = np.random.default_rng(seed)
    image, found = phantom.scan(phantom.anatomy(rng, SIDE), rng, contrast, SIDE, lesions=lesions)
    volume, geometry = preprocess.preprocess(image)
    label = preprocess.preprocess_label(phantom.relabel(found, (0, 1, 1, 1, 1, 1)), geometry)
    return volume, label


def read_patch(volume, size):
    """The central box of a volume, as a crop (1, *size)."""
    start = [(have - want) // 2 for have, want in zip(volume.shape, size, strict=True)]
    return torch.from_numpy(data.read_box(volume, start, size))[None]


def pretraining_views():
    """The steps of amaes.make_views, one by one -> {name: axial slice}."""
    volume, _ = head(2, "T1", lesions=False)
    draw = augment.draw(PRETRAINING_DRAW, "all", SIDE)

    target, _ = augment.spatial([read_patch(volume, draw.context)], None, [draw])
    augmented = augment.intensity(target, [draw])
    mask = amaes.random_mask([0], target.shape[2:], 4, 0.6, torch.device("cpu"))

    volumes = {
        "patch": read_patch(volume, (SIDE,) * 3)[None],
        "target": target,
        "augmented": augmented,
        "input": augmented.masked_fill(mask, 0),
    }
    return {name: x[0, 0, :, :, SIDE // 2].numpy() for name, x in volumes.items()}


def finetuning_views():
    """A labelled patch after spatial augmentation -> its axial slice, and the label's."""
    volume, label = head(5, "FLAIR", lesions=True)
    draw = augment.draw(FINETUNING_DRAW, "spatial", SIDE)

    crop, truth = read_patch(volume, draw.context), read_patch(label, draw.context)
    image, moved = augment.spatial([crop], [truth[0]], [draw])

    # The slice that shows most of the lesions.
    at = int(moved[0].sum((0, 1)).argmax())
    return image[0, 0, :, :, at].numpy(), moved[0, :, :, at].numpy()


# -------------------------------------------------------------------------------------- the drawing
class Canvas:
    """One pair of axes that covers the figure, in inches from its lower left corner."""

    def __init__(self, plt):
        self.figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, WIDTH)
        self.axes.set_ylim(0, HEIGHT)
        self.axes.axis("off")

    def text(self, x, y, words, size=SMALL, **options):
        options = {"ha": "center", "va": "center", "color": "black"} | options
        self.axes.text(x, y, words, fontsize=size, linespacing=1.25, **options)

    def picture(self, x, y, side, image, color, label=None):
        """A slice in a coloured frame; its centre is (x, y)."""
        extent = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
        self.axes.imshow(image.T, cmap="gray", vmin=0, vmax=1, origin="lower", extent=extent,
                         interpolation="nearest")
        if label is not None:
            shown = np.ma.masked_equal(label.T, 0)
            self.axes.imshow(shown, cmap="autumn", vmin=0, vmax=3, origin="lower", extent=extent,
                             interpolation="nearest", alpha=0.9)
        self.frame(x, y, side, color)

        # imshow sets the limits to its own extent.
        self.axes.set_xlim(0, WIDTH)
        self.axes.set_ylim(0, HEIGHT)
        self.axes.set_aspect("auto")

    def frame(self, x, y, side, color, **options):
        from matplotlib.patches import Rectangle

        corner = (x - side / 2, y - side / 2)
        self.axes.add_patch(Rectangle(corner, side, side, edgecolor=color, linewidth=2,
                                      **({"fill": False} | options)))

    def funnel(self, x, y, left, right, width, words, color):
        """Half of a network: a trapezium of the given heights at its two ends."""
        from matplotlib.patches import Polygon

        corners = [(x - width / 2, y - left / 2), (x - width / 2, y + left / 2),
                   (x + width / 2, y + right / 2), (x + width / 2, y - right / 2)]
        self.axes.add_patch(Polygon(corners, facecolor=color, edgecolor="black", linewidth=1))
        self.text(x, y, words)

    def box(self, x, y, words):
        shape = {"boxstyle": "round,pad=0.45", "facecolor": "#fde8d7", "edgecolor": ORANGE}
        self.text(x, y, words, bbox=shape)

    def arrow(self, start, end, color="black", line="-"):
        options = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "linestyle": line,
                   "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=options)


def draw_pretraining(canvas, views):
    side, top, low = 1.35, 4.85, 2.85
    columns = (0.85, 3.1, 3.1, 5.35)
    canvas.text(0.12, 5.93, "Pretraining, without labels", LARGE, ha="left", weight="bold")

    # A patch, and what the network should return: the same patch, moved in space.
    canvas.picture(columns[0], top, side, views["patch"], GREY)
    canvas.text(columns[0], top - 0.86, "patch of a scan")
    canvas.arrow((1.57, top), (2.38, top))
    canvas.text(1.975, top + 0.46, "spatial\naugmen-\ntation")
    canvas.picture(columns[1], top, side, views["target"], ORANGE)
    canvas.text(columns[1] + 0.78, top + 0.2, "target", color=ORANGE, ha="left", weight="bold")

    # What the network sees: the moved patch, changed in intensity and then masked.
    canvas.arrow((columns[2], top - 0.7), (columns[2], low + 0.71))
    canvas.text(columns[2] - 0.12, (top + low) / 2, "intensity\naugmentation", ha="right")
    canvas.picture(columns[2], low, side, views["augmented"], GREY)
    canvas.arrow((3.82, low), (4.63, low))
    canvas.text(4.225, low + 0.46, "hide 60 %\nof tokens\nof 4³ voxels")
    canvas.picture(columns[3], low, side, views["input"], BLUE)
    canvas.text(columns[3] + 0.02, low - 0.86, "input", color=BLUE, weight="bold")

    # The network, without skip connections, and its loss.
    canvas.arrow((6.06, low), (6.33, low))
    canvas.funnel(6.82, low, 1.35, 0.6, 0.94, "encoder", BLUE_FILL)
    canvas.funnel(7.72, low, 0.6, 1.1, 0.78, "light\ndecoder", "#e6e6e6")
    canvas.text(7.27, low + 0.86, "no skip connections")
    canvas.arrow((8.13, low), (8.43, low))
    canvas.frame(9.12, low, side, GREY, linestyle="--")
    canvas.text(9.12, low, "recon-\nstruction")
    canvas.arrow((3.8, top), (8.56, top), ORANGE)
    canvas.arrow((9.12, low + 0.7), (9.12, top - 0.29))
    canvas.box(9.12, top, "loss: mean\nsquared error")


def draw_finetuning(canvas, image, label):
    side, y = 1.15, 0.9
    canvas.axes.plot([0.1, WIDTH - 0.1], [1.82, 1.82], color="#bbbbbb", linewidth=1)
    canvas.text(0.12, 1.62, "Finetuning, on few labels", LARGE, ha="left", weight="bold")

    # A labelled patch is moved in space, and nothing else is done to it.
    canvas.text(2.42, y, "spatial augmentation alone,\nthe label moves along", ha="right")
    canvas.picture(3.15, y, side, image, ORANGE, label)
    canvas.text(3.8, y, "label", color=ORANGE, ha="left", weight="bold")
    canvas.picture(5.35, y, side, image, BLUE)

    # The network with skip connections, and its loss.
    canvas.arrow((5.96, y), (6.33, y))
    canvas.funnel(6.82, y, 1.1, 0.5, 0.94, "encoder", BLUE_FILL)
    canvas.funnel(7.76, y, 0.5, 1.1, 0.86, "new\ndecoder", "#d5ecd0")
    canvas.axes.plot([6.75, 6.75, 7.85, 7.85], [1.34, 1.5, 1.5, 1.34], color="black", linewidth=1.4)
    canvas.text(7.3, 1.62, "skip connections")
    canvas.arrow((8.21, y), (8.56, y))
    canvas.box(9.12, y, "loss: Dice +\ncross-entropy")
    canvas.axes.plot([3.15, 3.15, 9.12], [y - side / 2, 0.12, 0.12], color=ORANGE, linewidth=1.6)
    canvas.arrow((9.12, 0.11), (9.12, y - 0.29), ORANGE)

    # The one thing that moves from the first network to the second.
    canvas.arrow((6.52, 2.28), (6.52, 1.4), BLUE, line="--")
    canvas.text(6.62, 2.02, "its weights are the start", color=BLUE, ha="left")


def main(path):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas = Canvas(plt)
    draw_pretraining(canvas, pretraining_views())
    draw_finetuning(canvas, *finetuning_views())
    canvas.figure.savefig(path, dpi=160)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "docs", "method.png"))
