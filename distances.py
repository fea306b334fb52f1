"""Exact distances from surface to surface, and lesions, at a cost that follows the two masks.

A mask is a bool array (D, H, W). Its surface is sparse: a tumour of 100 ml, in a scan of nine
million voxels, has some thirty thousand surface voxels, and most of them lie within a few voxels of
the other surface. So `to_surface` finds the distances to the other surface in two steps:

* `by_rings` looks at the voxels around, in the order of their distance. It settles what is near.
* What is far is compared with the whole other surface, `by_pairs`, if there is little of it.
  Otherwise `by_lines` transforms the grid, one axis after the other.

All three ways are exact, so that the choice between them changes nothing but rounding.
"""

import itertools

import numpy as np

REACH = 4  # voxels, on the mean of the axes, that by_rings looks far: 257 voxels if they are cubes
BATCH = 1 << 16  # surface voxels that are looked up at a time
PRODUCTS = 1 << 18  # distances that are calculated at a time: as many as the fast cache holds
PAIRS_PER_VOXEL = 64  # pairs that take by_pairs as long as a voxel of the grid takes by_lines
CELLS = 1 << 19  # cells of `fold` that are joined at a time
NO_TARGET = 1 << 15  # more steps than a line has voxels; twice as many still fit into uint16


def box_of(mask):
    """The smallest box, as slices, that holds a mask (D, H, W); it is empty if the mask is."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        box.append(slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0))
    return tuple(box)


def surface(mask):
    """The voxels of a mask (D, H, W) with one of their six neighbours outside it or the grid."""
    interior = mask.copy()
    for axis in range(3):
        # Views in which the axis comes first; to write to one is to write to `interior`.
        inside = np.moveaxis(interior, axis, 0)
        voxels = np.moveaxis(mask, axis, 0)

        inside[1:] &= voxels[:-1]
        inside[:-1] &= voxels[1:]
        inside[0] = False
        inside[-1] = False
    return mask & ~interior


# ----------------------------------------------------------------------------------- distances
def to_surface(queries, targets, spacing):
    """Distance in mm from each True voxel of `queries` to the nearest one of `targets`.

    queries, targets: bool (D, H, W), on a grid of voxels of `spacing` mm; `targets` is not empty.
    Returns float32 (N,) in the order of np.nonzero(queries). ValueError if the shapes differ."""
    if queries.shape != targets.shape:
        raise ValueError(f"queries {queries.shape} and targets {targets.shape} differ in shape")

    # Each way fills in what is still inf.
    found = np.full(np.count_nonzero(queries), np.inf, np.float32)
    by_rings(queries, targets, spacing, found)
    far = np.count_nonzero(np.isinf(found))
    if not far:
        return found

    # The cost of the one follows the pairs, that of the other the grid.
    pairs = far * np.count_nonzero(targets)
    if pairs <= PAIRS_PER_VOXEL * targets.size:
        by_pairs(queries, targets, spacing, found)
    else:
        by_lines(queries, targets, spacing, found)
    return found


def unsettled(queries, found):
    """The queries whose place in `found` (N,) is inf, one plane of the grid after the other.

    Yields the number of the plane and three (M,): places in `found`, rows, columns."""
    end = 0
    for number, plane in enumerate(queries):
        start = end
        end += np.count_nonzero(plane)
        far = np.flatnonzero(np.isinf(found[start:end]))
        if len(far):
            rows, columns = np.divmod(np.flatnonzero(plane)[far], plane.shape[1])
            yield number, start + far, rows, columns


def ring_offsets(shape, spacing):
    """The offsets (K, 3) in voxels within reach, nearest first, and their lengths (K,) in mm.

    An offset that leads out of a grid of this shape from everywhere is left out."""
    size = np.asarray(spacing, float)
    reach = REACH * np.prod(size) ** (1 / 3)
    margin = np.minimum(reach // size, np.array(shape) - 1).astype(int)

    steps = [range(-far, far + 1) for far in margin]
    offsets = np.array(list(itertools.product(*steps)))
    lengths = np.linalg.norm(offsets * size, axis=1)

    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= reach]
    return offsets[order], lengths[order]


def by_rings(queries, targets, spacing, found):
    """Fill in `found` (N,), in the order of np.nonzero(queries), where a target is within reach.

    The offsets come in the order of their lengths. So the first one that leads to a target leads to
    the nearest, and a query that has met none is farther from all targets than the reach."""
    offsets, lengths = ring_offsets(targets.shape, spacing)

    # With a margin around the targets, no offset leads out of the array or into another line.
    margin = offsets.max(axis=0)
    around = [(far, far) for far in margin]
    padded = np.pad(np.ascontiguousarray(targets), around)
    is_target = padded.ravel()
    steps = offsets @ padded.strides  # a bool is one byte, so strides count voxels

    # Planes go together while they have few queries, which bounds the memory for dense masks.
    ends = np.cumsum(np.count_nonzero(queries, axis=(1, 2)))
    batches = np.unique(ends // BATCH, return_index=True)[1]
    for first, last in itertools.pairwise([*batches, len(queries)]):
        planes = np.pad(queries[first:last], [(0, 0), *around[1:]])
        voxels = np.flatnonzero(planes) + (first + margin[0]) * padded.strides[0]
        places = np.arange(ends[last - 1] - len(voxels), ends[last - 1])

        for step, length in zip(steps, lengths, strict=True):
            hit = is_target[voxels + step]
            if hit.any():
                found[places[hit]] = length
                places = places[~hit]
                voxels = voxels[~hit]
            if not len(voxels):
                break


def by_pairs(queries, targets, spacing, found):
    """Fill in what is inf in `found`, as in by_rings: from each query to every target."""
    size = np.asarray(spacing, float)
    target = np.argwhere(targets) * size
    origin = target.mean(axis=0)  # sums of large squares would round more
    target -= origin

    # |q - t|^2 is |q|^2 plus the product of (-2 q, 1) and (t, |t|^2). The least one is nearest.
    target_squares = (target ** 2).sum(axis=1)
    right = np.vstack([target.T, target_squares])
    batch = max(1, PRODUCTS // len(target))
    for plane, places, rows, columns in unsettled(queries, found):
        planes = np.full_like(rows, plane)
        query = np.stack([planes, rows, columns], axis=1) * size - origin
        left = np.column_stack([-2 * query, np.ones(len(query))])
        query_squares = (query ** 2).sum(axis=1)

        for first in range(0, len(query), batch):
            part = slice(first, first + batch)
            squares = (left[part] @ right).min(axis=1) + query_squares[part]
            found[places[part]] = np.sqrt(np.maximum(squares, 0))  # 0 may have become just less


def by_lines(queries, targets, spacing, found):
    """Fill in what is inf in `found`, as in by_rings: by a transform of the planes that need it.

    The squared distance is a sum over the three axes, so that its least value over all targets is
    found one axis after the other: along each, the least of what the axes before have left plus the
    squared distance to there."""
    # First axis: voxels to the nearest target of the line. It is the last one or the next one.
    gap = np.where(targets, np.uint16(0), np.uint16(NO_TARGET))
    for plane in range(1, len(gap)):
        np.minimum(gap[plane], gap[plane - 1] + 1, out=gap[plane])
    for plane in range(len(gap) - 2, -1, -1):
        np.minimum(gap[plane], gap[plane + 1] + 1, out=gap[plane])

    # Columns that have no target in any plane give nothing to the others.
    filled = np.flatnonzero(targets.any(axis=(0, 1)))
    depth, height, width = np.asarray(spacing, np.float32)
    steps = np.arange(targets.shape[2])[:, None] - filled
    across = (steps.astype(np.float32) * width) ** 2
    batch = max(1, PRODUCTS // len(filled))

    for plane, places, rows, columns in unsettled(queries, found):
        # Second axis: a lower envelope over the lines of the plane.
        in_line = gap[plane][:, filled]
        squares = np.where(in_line < NO_TARGET, (in_line * depth) ** 2, np.float32(np.inf))
        in_plane = lower_envelope(squares, height)

        # Third axis: only the queries are looked up.
        for first in range(0, len(places), batch):
            part = slice(first, first + batch)
            least = (in_plane[rows[part]] + across[columns[part]]).min(axis=1)
            found[places[part]] = np.sqrt(least)


def lower_envelope(squares, size):
    """The least of squares[j] + ((i - j) * size)^2 over all j, for each i along the first axis.

    squares: float32 (H, W), small enough for the fast cache; size in mm. All shifts are tried, the
    short ones first, until the shift alone costs as much as the worst voxel has: a longer one
    cannot improve any."""
    best = squares.copy()
    for shift in range(1, len(squares)):
        cost = np.float32((shift * size) ** 2)
        if cost >= best.max():
            break
        shifted = squares + cost
        np.minimum(best[shift:], shifted[:-shift], out=best[shift:])
        np.minimum(best[:-shift], shifted[shift:], out=best[:-shift])
    return best


# ------------------------------------------------------------------------------------- lesions
def fold(mask):
    """The cells of 2 x 2 x 2 voxels of a mask, as uint8 codes with one bit for each voxel.

    After the last cell of each axis comes an empty one. Voxel (i, j, k) of a cell has bit
    i + 2 j + 4 k."""
    margin = [(0, 2 + side % 2) for side in mask.shape]
    bits = np.pad(np.ascontiguousarray(mask), margin).view(np.uint8)
    bits = bits[::2] | bits[1::2] << 1
    bits = bits[:, ::2] | bits[:, 1::2] << 2
    return bits[..., ::2] | bits[..., 1::2] << 4


def facing(direction):
    """The bits of the voxels on that side of a cell which faces a direction, of -1, 0 and 1."""
    sides = {-1: (0,), 0: (0, 1), 1: (1,)}
    voxels = itertools.product(*(sides[step] for step in direction))
    return np.uint8(sum(1 << (i + 2 * j + 4 * k) for i, j, k in voxels))


def connected_cells(codes):
    """The places (N,) of the cells with voxels in codes.ravel(), and the component (N,) of each.

    codes: of `fold`. A component, by 26 neighbours, is named by the number of its first cell.
    The voxels of one cell are all neighbours. Those of two adjacent cells are neighbours if each is
    on the side that faces the other cell: then they are at most one voxel apart along every axis,
    and else at least two along one. So cells touch exactly if both have voxels on these sides."""
    flat = codes.ravel()
    cells = np.flatnonzero(flat)
    number = np.zeros(flat.size, np.int32)
    number[cells] = np.arange(len(cells))
    component = np.arange(len(cells), dtype=np.int32)

    # Half of the 26 directions find each pair once. The empty cell at the end of each line keeps
    # the others from running into the next line.
    for direction in itertools.product((-1, 0, 1), repeat=3):
        if direction <= (0, 0, 0):
            continue
        here = facing(direction)
        there = facing([-step for step in direction])
        step = np.dot(codes.strides, direction)
        for start in range(0, len(cells), CELLS):
            part = cells[start:start + CELLS]
            part = part[(flat[part] & here) > 0]
            part = part[(flat[part + step] & there) > 0]
            join(component, number[part], number[part + step])
    return cells, component


def join(component, first, second):
    """Join, in place, the components (N,) of cells `first` (M,) with those of `second` (M,)."""
    while True:
        # Pairs within one component are settled.
        apart = component[first] != component[second]
        if not apart.any():
            return
        first = first[apart]
        second = second[apart]

        # Of two components that touch, the one with the larger number joins the other.
        one = component[first]
        other = component[second]
        np.minimum.at(component, np.maximum(one, other), np.minimum(one, other))

        # What has joined a component that has itself joined another one follows it there.
        while (component[component] != component).any():
            component[:] = component[component]


def components(mask):
    """The connected component, by 26 neighbours, of each True voxel of a mask (D, H, W).

    Returns int32 (N,) in the order of np.nonzero: voxels with the same number are connected."""
    codes = fold(mask)
    cells, component = connected_cells(codes)
    of_cell = np.zeros(codes.shape, np.int32)
    of_cell.ravel()[cells] = component

    planes, rows, columns = np.nonzero(mask)
    return of_cell[planes // 2, rows // 2, columns // 2]


def lesions_found(mask, other):
    """How many components of a mask (D, H, W) have a voxel in the other one, of how many."""
    cells, component = connected_cells(fold(mask))
    shared = fold(mask & other).ravel()[cells] > 0

    is_found = np.zeros(len(cells), bool)
    is_found[component[shared]] = True
    return np.count_nonzero(is_found), len(np.unique(component))
