"""What moves image and label: equality with scipy and with the official lookup, the box that is
read, and whole samples. Every test here runs with both lookups."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from test_augment import GOLDEN, INPUT, SHAPE, SIZES, difference, volume, with_steps

import augment

ANGLES = GOLDEN["spatial_angles_deg"]
NONE = (0, 0, 0)


@pytest.fixture(autouse=True, params=["plain", "quick"])
def form(request, monkeypatch):
    """The lookup: grid_sample, or the gathers of fast_cpu."""
    monkeypatch.setattr(augment, "lookup", augment.lookup_by_grid_sample)
    if request.param == "quick":
        pytest.importorskip("fast_cpu").install_lookup()


def positions(shape, angles, scale, displacement, size):
    """Where each voxel of the result reads the source, by the textbook: (3, *size)."""
    turns = []
    for axis, angle in enumerate(np.deg2rad(angles)):
        c, s = np.cos(angle), np.sin(angle)
        turns.append(np.roll(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), (axis, axis), (0, 1)))
    centred = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in size], indexing="ij"))
    if displacement is not None:
        centred = centred + displacement.double().numpy()
    read = scale * (turns[0] @ turns[1] @ turns[2]).T @ centred.reshape(3, -1)
    return read.reshape(3, *size) + (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2


LOOKUPS = [((30, 0, 0), 1.0, False), ((0, -25, 0), 1.0, False), ((0, 0, 8), 1.0, False),
           (ANGLES, 1.0, False), (NONE, 0.93, False), (NONE, 1.07, False), (NONE, 1.0, True),
           (ANGLES, 0.93, True)]


@pytest.mark.parametrize(("angles", "scale", "displaced"), LOOKUPS)
@pytest.mark.parametrize("size", [(17, 24, 21), (11, 30, 15)])
def test_lookup_equals_scipy(angles, scale, displaced, size):
    x = volume(2, *SHAPE, low=0.3)
    label = (x[0] * 5).to(torch.uint8)
    displacement = volume(3, *size, seed=2, low=-2, high=2) if displaced else None
    moved, found = augment.spatial_transform(x, label, angles, scale, displacement, size)
    read = positions(SHAPE, angles, scale, displacement, size)
    for channel, result in zip(x.double().numpy(), moved, strict=True):
        expected = scipy.ndimage.map_coordinates(channel, read, order=1, mode="grid-constant")
        assert difference(result, expected) < 1e-5
    nearest = np.floor(read + 0.5).astype(int)
    inside = np.all((nearest >= 0) & (nearest < np.reshape(SHAPE, (3, 1, 1, 1))), 0)
    expected = np.where(inside, label.numpy()[tuple(np.where(inside, nearest, 0))], 0)
    decided = (np.abs(read - nearest) < 0.4999).all(0)
    assert decided.mean() > 0.9 and np.array_equal(found.numpy()[decided], expected[decided])
    assert found.dtype == torch.uint8 and found.shape == size


@pytest.mark.parametrize(("name", "angles", "scale"), [
    ("spatial_rot", ANGLES, 1.0), ("spatial_rot_scale0.93", ANGLES, 0.93),
    ("spatial_scale1.08", NONE, 1.08)])
@pytest.mark.parametrize(("suffix", "size"), [("_24", (24, 24, 24)), ("_full", INPUT.shape[1:])])
def test_trilinear_is_close_to_the_official_cubic_lookup(name, angles, scale, suffix, size):
    label = (INPUT[0] > 0.5).byte()
    moved, label = augment.spatial_transform(INPUT, label, angles, scale, None, size)
    golden = GOLDEN[name + suffix]
    assert np.abs(moved[0, ::3, ::3, ::3].numpy() - golden).mean() < 0.02
    if name + suffix + "_label" in GOLDEN:
        assert np.array_equal(label, GOLDEN[name + suffix + "_label"])
    for wrong in ((angles[::-1], scale), (tuple(-a for a in angles), scale), (angles, 1 / scale)):
        if tuple(wrong[0]) != tuple(angles) or wrong[1] != scale:
            other = augment.spatial_transform(INPUT, None, *wrong, None, size)[0][0, ::3, ::3, ::3]
            assert np.abs(other.numpy() - golden).mean() > 0.03, "another convention would be seen"


def test_displacement_is_the_official_one():
    displacement = torch.from_numpy(GOLDEN["elastic_displacement"]).float()
    golden = GOLDEN["spatial_elastic_seed7_alpha500_sigma8"]
    errors = []
    for field in (displacement, -displacement, displacement.flip(0)):
        moved, _ = augment.spatial_transform(INPUT, None, NONE, 1.0, field, INPUT.shape[1:])
        errors.append(np.abs(moved[0, ::3, ::3, ::3].numpy() - golden).mean())
    assert errors[0] < 0.02 and min(errors[1:]) > 0.05


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(12, 12, 12), (13, 13, 13), (10, 16, 12), (9, 15, 11)])
def test_a_quarter_turn_equals_rot90(axis, shape):
    x, label = volume(2, *shape), torch.arange(math.prod(shape)).reshape(shape)
    plane = ((axis + 1) % 3, (axis + 2) % 3)
    expected = torch.rot90(x, 1, (plane[0] + 1, plane[1] + 1))
    angles = tuple(90.0 if a == axis else 0.0 for a in range(3))
    moved, found = augment.spatial_transform(x, label, angles, 1.0, None, expected.shape[1:])
    assert difference(moved, expected) < 1e-5
    assert torch.equal(found, torch.rot90(label, 1, plane))


@pytest.mark.parametrize(("angles", "scale", "displaced"), LOOKUPS)
def test_image_and_label_move_together_to_the_voxel(angles, scale, displaced):
    """The image holds each voxel's coordinates, the label its number: both tell the same voxel."""
    shape, size = (30, 34, 27), (16, 18, 15)
    image = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))
    displacement = augment.elastic_displacement(600, 20, 3, size, "cpu") * 4 if displaced else None
    label = torch.arange(image[0].numel()).reshape(shape)
    moved, number = augment.spatial_transform(image, label, angles, scale, displacement, size)
    voxel = np.stack(np.unravel_index(number.numpy(), shape))
    assert np.abs(voxel - moved.numpy()).max() <= 0.5 + 1e-4
    assert len(np.unique(number)) > 0.6 * number.numel()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_side_of_one_voxel_is_a_voxel(mode):
    """A quarter of a voxel off it, three quarters of it are read; a whole voxel off it, nothing."""
    x = torch.ones(1, 1, 4, 4)
    found = []
    for offset in (0, 0.25, 1):
        field = torch.zeros(3, 1, 4, 4)
        field[0] = offset
        found.append(augment.lookup(x, np.eye(3), field, (1, 4, 4), mode).mean().item())
    assert found == ([1, 0.75, 0] if mode == "bilinear" else [1, 1, 0])


# ---------------------------------------------------------------------------------- the box to read
@pytest.mark.parametrize("size", [(32, 32, 32), (15, 24, 33)])
def test_context_holds_all_that_the_lookup_reads(size):
    """A world of ones stays ones: no padding enters. And the box is no larger than it must be."""
    moved = 0
    for seed in range(250):
        draw = augment.draw(seed, "all", size)
        assert all(c >= s and (c - s) % 2 == 0 for c, s in zip(draw.context, size, strict=True))
        if draw.context == size:
            continue
        moved += 1
        patch, _ = augment.spatial([torch.ones(1, *draw.context)], None, [draw])
        assert patch.min() > 1 - 1e-5, draw
        if draw.elastic is None:
            sides = [c - 2 * (c > s) for c, s in zip(draw.context, size, strict=True)]
            patch, _ = augment.spatial([torch.ones(1, *sides)], None, [draw])
            assert patch.min() < 1 - 1e-5, draw
    assert moved > 100


def test_context_covers_the_strongest_elastic_deformation():
    size, beyond = (56, 64, 60), 0
    for seed in range(30):
        angles = (20.0, -10.0, 5.0) if seed % 2 else None
        context = augment.context_of(size, angles, None, (600, 20, seed))
        beyond += context != augment.context_of(size, angles, None, None)
        draw = augment.Draw(size, context, angles, None, (600, 20, seed))
        assert augment.spatial([torch.ones(1, *context)], None, [draw])[0].min() > 1 - 1e-5
    assert beyond == 30


# ------------------------------------------------------------------------------------ whole samples
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookups_keep_type_and_range_and_gradients_out(size, dtype):
    x = volume(2, *size).to(dtype).requires_grad_()
    for angles, scale, displaced in LOOKUPS:
        field = augment.elastic_displacement(600, 20, 1, size, "cpu") if displaced else None
        result, _ = augment.spatial_transform(x, None, angles, scale, field, size)
        assert result.dtype == dtype and not result.requires_grad and result.isfinite().all()
        assert result.min() >= 0 and result.max() <= x.max()
        flat = torch.full_like(x, 0.7)
        flat, _ = augment.spatial_transform(flat, None, angles, scale, field, size)
        assert flat.max() <= torch.tensor(0.7, dtype=dtype), "the weights sum to 1 but for rounding"


def test_a_draw_depends_on_its_seed_alone():
    draws = [augment.draw(seed, "all", 64) for seed in range(50)]
    assert draws == [augment.draw(seed, "all", (64, 64, 64)) for seed in range(50)]
    assert len(set(draws)) > 35
    x, label = volume(2, 30, 30, 30).half(), torch.arange(27000).reshape(30, 30, 30)
    for seed in (7, 12):
        draw = augment.draw(seed, "all", 20)
        draw = draw._replace(angles=(5.0, 0.0, 3.0), elastic=(500, 20, seed))
        once, again = (augment.spatial([x], [label], [draw]) for _ in range(2))
        assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
        assert torch.equal(augment.intensity(once[0], [draw]), augment.intensity(once[0], [draw]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 8])
def test_whole_draws_stay_inside_the_samples_range(size, count):
    for seed in range(6):
        draws = [augment.draw((seed, i), "all", size) for i in range(count)]
        crops = [volume(1, *d.context, seed=i, low=0.2, high=1).half() for i, d in enumerate(draws)]
        target, _ = augment.spatial(crops, None, draws)
        image = augment.intensity(target, draws)
        for crop, patches in zip(crops, zip(target, image, strict=True), strict=True):
            for patch in patches:
                assert patch.isfinite().all() and patch.max() <= crop.max() and patch.min() >= 0
        assert target.dtype == image.dtype == torch.float32 and image.shape == (count, 1, *size)


def test_only_the_drawn_samples_change():
    size = (12, 14, 10)
    batch = volume(6, 1, *size)
    draws = [augment.draw(seed, "all", size) for seed in range(6)]
    draws[1] = draws[4] = augment.draw(0, "none", size)
    assert sum(bool(d.intensity) for d in draws) >= 3
    result = augment.intensity(batch, draws)
    for i, d in enumerate(draws):
        assert torch.equal(result[i], batch[i]) == (not d.intensity)
        alone = augment.intensity(batch[i:i + 1], [d])
        assert torch.equal(result[i:i + 1], alone), "whatever its batch"
    crops = [volume(1, *d.context, seed=i) for i, d in enumerate(draws)]
    labels = [(crop[0] * 4).byte() for crop in crops]
    moved, found = augment.spatial(crops, labels, draws)
    for i, d in enumerate(draws):
        alone, label = augment.spatial(crops[i:i + 1], labels[i:i + 1], [d])
        assert torch.equal(moved[i:i + 1], alone) and torch.equal(found[i:i + 1], label)
        if d.context == size:
            assert torch.equal(moved[i], crops[i]) and torch.equal(found[i], labels[i])


def test_nothing_drawn_is_the_identity_bitwise():
    size = (9, 12, 10)
    none = augment.draw(3, "none", size)
    crops = [volume(2, *size, seed=i).half() for i in range(3)]
    labels = [torch.ones(size).byte()] * 3
    batch, found = augment.spatial(crops, labels, [none] * 3)
    assert torch.equal(batch, torch.stack(crops).float())
    assert torch.equal(found, torch.stack(labels))
    assert augment.intensity(batch, [none] * 3) is batch
    unturned = none._replace(angles=(0.0, 0.0, 0.0))  # a rotation drawn, but no axis
    assert torch.equal(augment.spatial(crops[:1], None, [unturned])[0][0], crops[0].float())
    steps = [("low_resolution", (size,)), ("gaussian_blur", (0.1,)), ("gibbs_ringing", (12, 1))]
    assert difference(augment.intensity(batch[:1], [with_steps(*steps)]), batch[:1]) < 1e-6
