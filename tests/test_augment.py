"""Table 5: equality with the official transforms and with scipy, the policy's statistics, and what
must never happen to a sample. What moves a sample is in test_augment_spatial.py.

The golden file holds the official outputs, every third voxel of them along each axis."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT
from skimage.transform import resize

import augment

GOLDEN = np.load(ROOT / "tests" / "golden" / "augment.npz")
INPUT = torch.from_numpy(GOLDEN["input"])[None]
N = 2000  # draws of the statistics


def volume(*shape, seed=0, low=0.0, high=1.0):
    """Noise without any border of zeros, so that what happens at the border counts."""
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def difference(a, b):
    """Largest absolute difference."""
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()


def with_steps(*steps, size=(1, 1, 1)):
    return augment.Draw(size, size, intensity=steps)


# -------------------------------------------------------------------------- the official transforms
@pytest.mark.parametrize(("name", "transform", "parameters"), [
    ("blur_sigma0.5", augment.gaussian_blur, (0.5,)),
    ("blur_sigma1.0", augment.gaussian_blur, (1.0,)),
    ("ghost_n2_alpha0.9_axis0", augment.motion_ghosting, (0.9, 2, 0)),
    ("ghost_n3_alpha0.85_axis1", augment.motion_ghosting, (0.85, 3, 1)),
    ("ghost_n10_alpha0.95_axis2", augment.motion_ghosting, (0.95, 10, 2)),
    # The official code swaps the axes 0 and 1.
    ("gibbs_keep24_axis0", augment.gibbs_ringing, (24, 1)),
    ("gibbs_keep25_axis1", augment.gibbs_ringing, (25, 0)),
    ("gibbs_keep30_axis2", augment.gibbs_ringing, (30, 2)),
    ("lowres_18x32x40", augment.low_resolution, ((18, 32, 40),)),
    ("lowres_36x21x40", augment.low_resolution, ((36, 21, 40),)),
    ("lowres_25x23x28", augment.low_resolution, ((25, 23, 28),)),
    ("bias_seed5_clipped", augment.bias_field, (tuple(GOLDEN["bias_center"].tolist()),)),
    ("gamma1.7", augment.gamma, (1.7, False)),
    ("gamma1.7_inverted", augment.gamma, (1.7, True)),
])
def test_equals_the_official_transform(name, transform, parameters):
    result = transform(INPUT, *parameters)
    assert difference(result[0, ::3, ::3, ::3], GOLDEN[name]) < 1e-5


# The official head has a border of zeros. Here: the same formulas on odd sides, with data up to
# the border.
SHAPE = (17, 24, 21)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.77, 1.0, 4.5])
def test_blur_equals_scipy_up_to_the_border(sigma):
    x = volume(2, *SHAPE)
    expected = [scipy.ndimage.gaussian_filter(c.double().numpy(), sigma, mode="reflect") for c in x]
    assert difference(augment.gaussian_blur(x, sigma), expected) < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("every", [2, 3, 7, 10])
def test_ghosting_equals_the_three_dimensional_transform(axis, every):
    x = volume(1, *SHAPE, low=-0.4)
    low = x.min().item()
    spectrum = np.moveaxis(np.fft.fftn(x[0].double().numpy() - low), axis, 0)
    spectrum[0:-1:every] *= 0.87
    expected = np.abs(np.fft.ifftn(np.moveaxis(spectrum, 0, axis))) + low
    assert difference(augment.motion_ghosting(x, 0.87, every, axis)[0], expected) < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("share", [0.75, 0.8, 1])
def test_gibbs_equals_the_three_dimensional_transform(axis, share):
    x = volume(1, *SHAPE)
    side, keep = SHAPE[axis], round(share * SHAPE[axis])
    spectrum = np.moveaxis(np.fft.fftshift(np.fft.fftn(x[0].double().numpy())), axis, 0)
    spectrum[:max(0, math.ceil(side / 2) - math.ceil(keep / 2))] = 0
    spectrum[math.ceil(side / 2) + math.ceil(keep / 2):] = 0
    expected = np.abs(np.fft.ifftn(np.fft.ifftshift(np.moveaxis(spectrum, 0, axis))))
    result = augment.gibbs_ringing(x, keep, axis)[0]
    assert difference(result, expected) < 1e-5
    assert (difference(result, x[0]) < 1e-5) == (share == 1), "all frequencies kept is the identity"


@pytest.mark.parametrize("low", [(9, 24, 21), (17, 15, 12), (13, 18, 16)])
def test_low_resolution_equals_skimage_up_to_the_border(low):
    x = volume(2, *SHAPE, seed=1)
    for channel, result in zip(x.double().numpy(), augment.low_resolution(x, low), strict=True):
        small = resize(channel, low, order=0, mode="edge", anti_aliasing=False)
        expected = resize(small, SHAPE, order=3, mode="edge", anti_aliasing=False)
        assert difference(result, expected) < 1e-5


def test_bias_field_is_a_paraboloid_that_stops_at_zero():
    center = (16, 0, 20)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    field = 1 - (((grid - center) / SHAPE) ** 2).sum(-1)
    result = augment.bias_field(torch.ones(1, *SHAPE), center)[0]
    assert difference(result, field.clip(min=0)) < 1e-6 and (field < 0).any()
    assert result[center] == 1


def test_inverted_gamma_keeps_the_colours():
    x = volume(2, *SHAPE)
    for low, high in ((0, 1), (-3, 5)):
        scaled = low + (high - low) * x
        straight, inverted = (augment.gamma(scaled, 1.7, invert) for invert in (False, True))
        assert (straight <= scaled + 1e-5).all() and (inverted >= scaled - 1e-5).all()
        order = scaled[0].flatten().argsort()
        assert (inverted[0].flatten()[order].diff() >= 0).all(), "brighter stays brighter"
        assert difference(augment.gamma(-scaled, 1.7, True), -straight) < 1e-5


def test_noise_is_normal_with_the_given_deviation():
    x = volume(2, 40, 40, 40)
    added = augment.gaussian_noise(x, 0.02, 5) - x
    share = (augment.multiplicative_noise(x, 0.02, 5) - x)[x > 0.1] / x[x > 0.1]
    for noise in (added[0], added[1], share):
        assert noise.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(noise.mean().item()) < 5e-4
        assert ((noise / 0.02).abs() < 1).double().mean().item() == pytest.approx(0.683, abs=0.01)
    assert (added[0] != added[1]).any() and (added != augment.gaussian_noise(x, 0.02, 6) - x).any()
    assert torch.equal(augment.gaussian_noise(x, 0.02, 5), augment.gaussian_noise(x, 0.02, 5))


# ------------------------------------------------------------------------------ elastic deformation
@pytest.mark.parametrize(("alpha", "sigma", "deviation"), [
    (600, 20, 0.58), (400, 25, 0.28), (200, 30, 0.11)])
def test_elastic_displacement_has_the_official_deviation(alpha, sigma, deviation):
    """In the middle of a patch; at its border the reference, too, filters into nothing."""
    size, middle = (128, 122, 135), (slice(None), slice(54, 74), slice(51, 71), slice(57, 78))
    fields = torch.stack([augment.elastic_displacement(alpha, sigma, seed, size, "cpu")[middle]
                          for seed in range(120)])
    assert fields.std().item() == pytest.approx(deviation, rel=0.1)
    assert fields.std((0, 2, 3, 4)).numpy() == pytest.approx(np.full(3, deviation), rel=0.2)
    assert abs(fields.mean().item()) < 0.15 * deviation
    axes = np.corrcoef(fields.movedim(1, 0).flatten(1).numpy())
    assert np.abs(axes - np.eye(3)).max() < 0.2, "the three axes move independently"


def test_elastic_displacement_is_as_smooth_as_the_filter():
    """Neighbours t voxels apart correlate by exp(-t^2 / 4 sigma^2), as after a Gaussian filter."""
    sigma, size = 8, (96, 90, 100)
    fields = torch.stack([augment.elastic_displacement(100, sigma, seed, size, "cpu")
                          for seed in range(12)])
    inside = fields[..., 24:-24, 24:-24, 24:-24]
    for axis in (2, 3, 4):
        n = inside.shape[axis] - 8
        product = (inside.narrow(axis, 0, n) * inside.narrow(axis, 8, n)).mean()
        correlation = product / (inside ** 2).mean()
        assert correlation.item() == pytest.approx(math.exp(-0.25), abs=0.06)
    steps = fields.diff(n=2, dim=2).abs().max() / fields.std()
    assert steps < 0.12, "no kinks between the nodes"


# --------------------------------------------------------------------------------------- the policy
@pytest.fixture(scope="module")
def draws():
    return [augment.draw(seed, "all", (128, 96, 65)) for seed in range(N)]


def values(draws, name):
    """Parameters of the samples that drew the transform `name`."""
    return [dict(d.intensity)[name] for d in draws if name in dict(d.intensity)]


def within(count, p, n):
    """Within three standard errors of n chances of p."""
    return abs(count / n - p) < 3 * math.sqrt(p * (1 - p) / n)


def test_frequencies_are_table_5s(draws):
    counts = {name: len(values(draws, name)) for name in augment.TRANSFORMS}
    for name in ("angles", "scale", "elastic"):
        counts[name] = sum(getattr(d, name) is not None for d in draws)
    table = {"angles": 0.2, "scale": 0.2, "elastic": 0.33, "gaussian_noise": 0.2,
             "gaussian_blur": 0.1, "multiplicative_noise": 0.2, "motion_ghosting": 0.2,
             "gibbs_ringing": 0.2, "low_resolution": 0.1, "bias_field": 0.33, "gamma": 0.2}
    assert counts.keys() == table.keys()
    assert all(within(counts[name], p, N) for name, p in table.items()), counts
    rotations = [a for d in draws if d.angles for a in d.angles]
    assert within(sum(a != 0 for a in rotations), 0.66, len(rotations))
    size = draws[0].size
    lows = [m < n for low, in values(draws, "low_resolution")
            for m, n in zip(low, size, strict=True)]
    assert within(sum(lows), 0.33, len(lows))
    assert within(sum(invert for _, invert in values(draws, "gamma")), 0.01, N)
    # Independent of each other: 0.433 of the samples are moved by nothing.
    untouched = sum(d.angles is d.scale is d.elastic is None for d in draws)
    assert within(untouched, 0.8 * 0.8 * 0.67, N)


def test_order_is_the_official_one(draws):
    order = list(augment.TRANSFORMS)
    assert order == ["gaussian_noise", "gaussian_blur", "multiplicative_noise", "motion_ghosting",
                     "gibbs_ringing", "low_resolution", "bias_field", "gamma"]
    for d in draws:
        names = [name for name, _ in d.intensity]
        assert names == [name for name in order if name in names]


def test_parameters_fill_table_5s_ranges(draws):
    def fills(numbers, low, high):
        span, error = high - low, (high - low) / math.sqrt(12 * len(numbers))
        assert low <= min(numbers) < low + 0.1 * span and high - 0.1 * span < max(numbers) <= high
        assert np.mean(numbers) == pytest.approx((low + high) / 2, abs=4 * error)

    fills([a for d in draws if d.angles for a in d.angles if a], -30, 30)
    fills([d.scale for d in draws if d.scale], 0.9, 1.1)
    fills([d.elastic[0] for d in draws if d.elastic], 200, 600)
    fills([d.elastic[1] for d in draws if d.elastic], 20, 30)
    for noise in ("gaussian_noise", "multiplicative_noise"):
        fills([sigma for sigma, _ in values(draws, noise)], 1e-4, 1e-3)
        assert len({seed for _, seed in values(draws, noise)}) == len(values(draws, noise))
    fills([sigma for sigma, in values(draws, "gaussian_blur")], 0, 1)
    ghosting = values(draws, "motion_ghosting")
    fills([alpha for alpha, _, _ in ghosting], 0.85, 0.95)
    assert {every for _, every, _ in ghosting} == set(range(2, 11))
    gibbs, size = values(draws, "gibbs_ringing"), draws[0].size
    fills([keep / size[axis] for keep, axis in gibbs], 0.745, 1)
    assert {axis for _, axis in gibbs} == {axis for *_, axis in ghosting} == {0, 1, 2}
    zooms = [[m / n for m, n in zip(low, size, strict=True) if m < n]
             for low, in values(draws, "low_resolution")]
    fills([zoom for drawn in zooms for zoom in drawn], 0.49, 1)
    spreads = [max(drawn) - min(drawn) for drawn in zooms if drawn]
    assert max(spreads) < 0.016, "one for all axes, but for rounding"
    for axis, side in enumerate(size):
        fills([center[axis] for center, in values(draws, "bias_field")], 0, side - 1)
    gammas = [value for value, _ in values(draws, "gamma")]
    fills([value for value in gammas if value < 1], 0.5, 1)
    fills([value for value in gammas if value >= 1], 1, 2)
    assert within(sum(value < 1 for value in gammas), 0.5, len(gammas))


def test_presets(draws):
    for seed in range(100):
        assert augment.draw(seed, "none", 32) == augment.Draw((32,) * 3, (32,) * 3)
        spatial = augment.draw(seed, "spatial", 32)
        assert spatial.elastic is None and spatial.intensity == ()
        assert (spatial.angles, spatial.scale) == augment.draw(seed, "all", 32)[2:4]
    moved = [augment.draw(seed, "spatial", 32) for seed in range(N)]
    assert within(sum(d.angles is not None for d in moved), 0.2, N)
    assert within(sum(d.scale is not None for d in moved), 0.2, N)


# ----------------------------------------------------------------- what must not happen to a sample
SIZES = [(16, 16, 16), (15, 22, 9)]


def every_step(size, seed):
    """Each transform once, at drawn strengths: [(name, parameters)]."""
    found = {}
    while len(found) < len(augment.TRANSFORMS):
        found |= dict(augment.draw(seed, "all", size).intensity)
        seed += 1000
    return list(found.items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intensity_keeps_range_type_and_gradients_out(size, count, dtype):
    x = volume(count, 2, *size)
    x[:, 1] = x[:, 1] * 7 - 3  # each channel its own range, one with negative values
    x[-1, 0] = 0.25  # and one that is constant, as a patch of air
    x = x.to(dtype).requires_grad_()
    before = x.detach().clone()
    low, high = (getattr(before, name)((2, 3, 4), keepdim=True) for name in ("amin", "amax"))
    for seed in range(3):
        steps = every_step(size, seed)
        for case in ([step] for step in steps) if seed else [steps]:
            result = augment.intensity(x, [with_steps(*case, size=size)] * count)
            assert result.isfinite().all(), case
            assert (result >= low).all() and (result <= high).all(), case
            assert result.dtype == dtype and result.device == x.device and result.shape == x.shape
            assert not result.requires_grad
            assert torch.equal(x, before), "a function leaves its input as it is"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transforms_alone_keep_type_and_gradients_out(size, dtype):
    x = volume(2, *size).to(dtype).requires_grad_()
    identities = [("gaussian_blur", (0.05,)), ("low_resolution", (size,))]
    for name, parameters in every_step(size, 0) + identities:
        result = augment.TRANSFORMS[name](x, *parameters)
        assert result.dtype == dtype and result.shape == x.shape and not result.requires_grad, name
        assert result.data_ptr() != x.data_ptr() and result.isfinite().all(), name


def test_each_step_is_clipped_to_the_range_before_it():
    x = volume(1, 2, 20, 18, 16, seed=3)
    x[:, 1] *= 0.3
    steps = [("gibbs_ringing", (14, 0)), ("gamma", (0.6, False)),
             ("low_resolution", ((12, 18, 9),)), ("gaussian_noise", (0.05, 4)),
             ("bias_field", ((3, 4, 5),))]
    expected = x[0]
    for name, parameters in steps:
        after = augment.TRANSFORMS[name](expected, *parameters)
        after = [c.clamp(b.min(), b.max()) for b, c in zip(expected, after, strict=True)]
        expected = torch.stack(after)
    result = augment.intensity(x, [with_steps(*steps)])[0]
    assert torch.equal(result, expected)
    assert result[1].max() <= x[0, 1].max() < result[0].max()


def test_bfloat16_is_rounded_once():
    x = volume(1, 1, 20, 18, 16).bfloat16()
    steps = [("gaussian_noise", (1e-3, 1)), ("gaussian_blur", (0.8,)), ("gamma", (1.5, True))]
    draw = with_steps(*steps)
    rounded = augment.intensity(x.float(), [draw]).bfloat16()
    assert torch.equal(augment.intensity(x, [draw]), rounded)
