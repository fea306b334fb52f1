"""A contact sheet of raw scans: three planes of each, with the outline of its label map.

A wrong orientation or a shifted label is seen at a glance. matplotlib is needed for this alone."""

import math
import os

import nibabel as nib
import numpy as np

import checkpoint
import pictures
import preprocess
import scans
import sources
from config import UserError

TILE = 128  # pixels of one plane, a side
GAP = 6  # pixels between two planes
WIDTH = 3 * TILE + 2 * GAP
CAPTION = 46  # pixels of the caption above
COLUMNS = 4  # scans beside each other
MOST = 48  # scans on a sheet
OUTLINE = (255, 60, 40)  # red, green, blue

# The planes, by RAS axes: the one to the right, the one upwards, the one that the plane cuts.
PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))
ENDS = ("LR", "PA", "IS")  # of each axis


def check_path(path, check):
    """Raise UserError if no sheet can be drawn at a path. check: the setting of that name."""
    if not check:
        raise UserError("--sheet is drawn by --check: give both")
    if not path.lower().endswith(".png"):
        raise UserError(f"sheet {path}: give a name that ends in .png")
    try:
        pictures.pyplot()
    except ImportError:
        raise UserError("--sheet needs matplotlib, which is not installed: pip install "
                        "matplotlib") from None


def choose(volumes):
    """Of many scans, at most MOST from all over the input."""
    volumes = sorted(volumes, key=lambda scan: (scan.subject, scan.session, scan.sequence))
    return volumes[::max(1, math.ceil(len(volumes) / MOST))]


# --------------------------------------------------------------------------------------- one scan
def draw_scan(root, scan):
    """Draw one scan -> (picture uint8 (TILE, WIDTH, 3), its caption in three lines).

    What cannot be read stays black, with the reason in its caption."""
    who = sources.readable(f"{scan.subject}  {scan.session}  {scan.sequence}\n"
                           f"{os.path.basename(scan.path)}")
    path = os.path.join(root, scan.path)
    try:
        with scans.naming(path):
            image = scans.load_scan(path, scan.channel)
            voxels, _, _ = preprocess.read_voxels(image)
            label = read_label(root, scan) if scan.label else np.zeros(voxels.shape, bool)
            if label.shape != voxels.shape:
                raise scans.Rejected("label grid differs from image grid")
    except scans.Rejected as error:
        return np.zeros((TILE, WIDTH, 3), np.uint8), f"{who}\n{error.reason}"

    axes = "".join(nib.aff2axcodes(image.affine))
    size = scans.times(nib.affines.voxel_sizes(image.affine), ".3g")
    picture = draw_planes(voxels, label, spacing_in_ras(image.affine))
    return picture, f"{who}\nstored {axes}, {size} mm"


def read_label(root, scan):
    """Where the label map of a scan is not 0, bool (D, H, W) in RAS order."""
    image = scans.load_scan(os.path.join(root, scan.label))
    values, _ = scans.label_map(image)
    return nib.apply_orientation(values, nib.io_orientation(image.affine)) > 0


def spacing_in_ras(affine):
    """The voxel size (3,) in mm along the RAS axes."""
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    return nib.affines.voxel_sizes(affine)[order]


def draw_planes(voxels, label, spacing):
    """Draw three planes side by side -> uint8 (TILE, WIDTH, 3).

    voxels, label: (D, H, W) in RAS order; spacing in mm. The planes go through the middle of the
    label, or else of the field of view, whose longest side fills a tile. So a wrong voxel size is
    seen, too."""
    # A few bright vessels must not make the rest dark.
    low, high = np.quantile(voxels[::3, ::3, ::3], (0.01, 0.995))
    grey = np.clip((voxels - low) / max(high - low, 1e-6), 0, 1)

    # Which voxels the pixels show along each axis.
    sides = np.array(voxels.shape) * spacing
    pixels = np.round(sides * TILE / sides.max()).astype(int)
    shown = [nearest(*pair) for pair in zip(voxels.shape, pixels, strict=True)]

    picture = np.full((TILE, WIDTH, 3), 255, np.uint8)
    for number, (right, up, cut) in enumerate(PLANES):
        # Cut both at the same place.
        place = middle_of(label, cut)
        grid = np.ix_(shown[right], shown[up])
        plane = grey.take(place, cut)[grid]
        inside = label.take(place, cut)[grid]

        # Grey, with the outline in red.
        tile = np.stack([255 * plane] * 3, -1)
        tile[outline(inside)] = OUTLINE

        # The first row of a picture is the top one.
        tile = np.flip(tile.transpose(1, 0, 2), 0)
        start = number * (TILE + GAP)
        picture[:, start:start + TILE] = centred(tile)
    return picture


def centred(tile):
    """A picture of at most TILE x TILE pixels in the middle of a black one of that size."""
    square = np.zeros((TILE, TILE, 3), np.uint8)
    top = (TILE - tile.shape[0]) // 2
    left = (TILE - tile.shape[1]) // 2
    square[top:top + tile.shape[0], left:left + tile.shape[1]] = tile
    return square


def middle_of(label, axis):
    """Where to cut an axis: where most of the label is, or else in the middle."""
    others = tuple({0, 1, 2} - {axis})
    marked = label.sum(others)
    if not marked.any():
        return label.shape[axis] // 2
    return int(marked.argmax())


def nearest(length, count):
    """Which of `length` voxels each of `count` pixels shows."""
    centres = (np.arange(count) + 0.5) / count
    return (centres * length).astype(int)


def outline(inside):
    """The pixels of a mask (H, W) that touch what is not in it."""
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


# -------------------------------------------------------------------------------------- the sheet
def write(path, drawn):
    """Write the sheet of [(picture, caption)] as a .png."""
    plt = pictures.pyplot()

    # Each picture lies in a cell, with room for its caption above.
    height = TILE + CAPTION
    width = WIDTH + 2 * GAP
    rows = math.ceil(len(drawn) / COLUMNS)
    columns = min(COLUMNS, len(drawn))
    canvas = np.full((rows * height, columns * width, 3), 255, np.uint8)

    # A figure of exactly these pixels.
    figure = plt.figure(figsize=(columns * width / 100, rows * height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")

    for number, (picture, caption) in enumerate(drawn):
        row, column = divmod(number, COLUMNS)
        top = row * height + CAPTION
        left = column * width + GAP
        canvas[top:top + TILE, left:left + WIDTH] = picture

        # A long name is cut where the next cell begins.
        lines = "\n".join(line[:60] for line in caption.split("\n"))
        axis.text(left, top - 4, lines, fontsize=7, parse_math=False)
        for place in range(len(PLANES)):
            write_ends(axis, place, left + place * (TILE + GAP), top)

    axis.imshow(canvas)
    with checkpoint.atomic(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def write_ends(axis, number, left, top):
    """Write at the four sides of a plane which way it lies: L R, P A, I S."""
    right, up, _ = PLANES[number]
    places = {ENDS[right][0]: (5, TILE / 2), ENDS[right][1]: (TILE - 5, TILE / 2),
              ENDS[up][0]: (TILE / 2, TILE - 5), ENDS[up][1]: (TILE / 2, 5)}
    for word, (x, y) in places.items():
        axis.text(left + x, top + y, word, color="yellow", fontsize=6, ha="center", va="center")
