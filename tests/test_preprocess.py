"""Section 2: the official preprocessing exactly, its inverse, and label maps on the scan's grid."""

import folders
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT
from inputs import dice, head, image_of, prepare
from skimage.transform import resize

import predict
import preprocess
import resample
import scans
import tasks

GOLDEN = np.load(ROOT / "tests" / "golden" / "preprocess.npz")
BOX = GOLDEN["crop_box"].reshape(3, 2) + [0, 1]  # half-open, as the official code slices it


# ----------------------------------------------------------------------------- the official result
def test_equals_the_official_preprocessing():
    volume, geometry = preprocess.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]), BOX)
    label = preprocess.preprocess_label(image_of(GOLDEN["lab"], GOLDEN["affine"]), geometry)
    assert np.abs(volume - GOLDEN["out_img"]).max() < 1e-5
    assert np.array_equal(label, GOLDEN["out_lab"])
    tight = np.array(preprocess.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]))[1]["box"])
    assert np.array_equal(tight, BOX - [0, 1]), (
        "the official box is one voxel larger at the high side"
    )


def test_equals_the_official_way_back():
    _, geometry = preprocess.preprocess(image_of(GOLDEN["img"], GOLDEN["affine"]), BOX)
    pad = GOLDEN["padding"].reshape(3, 2)
    unpadded = tuple(slice(before, 64 - after) for before, after in pad)
    size = preprocess.box_size(geometry)
    logits = []
    for logit in GOLDEN["rev_logits_in"][0]:
        resized = predict.resize(torch.from_numpy(logit[unpadded]), size)
        logits.append(preprocess.place(resized.numpy(), geometry))
    official = np.flip(
        GOLDEN["rev_logits_out"][0], 1
    )  # it was stored in RAS order, before the last flip
    assert np.allclose(logits, official, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((30, 41, 12), (30, 41, 60)),
        ((50, 31, 29), (22, 14, 13)),
        ((33, 20, 27), (15, 47, 27)),
        ((16, 17, 18), (16, 17, 18)),
        ((40, 8, 9), (3, 30, 31)),
    ],
)
def test_resampling_equals_scikit_image(shape, target):
    volume = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = resize(volume.astype(np.float64), target, order=3, anti_aliasing=None, clip=True)
    assert np.abs(resample.resample(volume, target) - expected).max() < 1e-5


def test_values_negative_voxels_and_the_tight_box():
    array = np.zeros((20, 20, 20), np.float32)
    array[3:17, 4:15, 5:18] = np.random.default_rng(0).uniform(10, 100, (14, 11, 13))
    array[0, 0, :7] = -5
    volume, geometry = preprocess.preprocess(image_of(array))
    assert geometry["box"] == [[3, 17], [4, 15], [5, 18]] and geometry["clamped"] == 7
    crop = array[3:17, 4:15, 5:18]
    high = np.quantile(crop[crop > crop.min()], 0.99)
    assert np.allclose(
        volume, (np.minimum(crop, high) - crop.min()) / (high - crop.min()), atol=1e-6
    )
    assert volume.dtype == np.float32 and volume.min() == 0 and volume.max() == 1


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA", "AIL"])
@pytest.mark.parametrize("coded", [True, False])
def test_axis_order_does_not_change_the_volume(axes, coded):
    reference, _ = preprocess.preprocess(head((1, 1.5, 2))[0])
    image, label = head((1, 1.5, 2), axes)
    if (
        not coded
    ):  # both form codes 0: nibabel's own affine is the truth then, and must give a usable volume
        image.header.set_sform(None, 0)
        image.header.set_qform(None, 0)
        assert image.header["sform_code"] == image.header["qform_code"] == 0
    volume, geometry = preprocess.preprocess(image)
    assert volume.shape == reference.shape and np.abs(volume - reference).max() < 1e-5
    native = folders.restore(preprocess.preprocess_label(label, geometry), geometry)
    assert native.shape == image.shape


def test_float16_is_near(raw):
    scan = next(raw.rglob("*T1w.nii.gz"))
    volume, _ = preprocess.preprocess(scan)
    assert np.abs(volume - volume.astype(np.float16).astype(np.float32)).max() < 5e-4


# ------------------------------------------------------------------------------------- round trips
GRIDS = {
    "1 mm": ((1, 1, 1), "RAS", 0),
    "1 mm LPS": ((1, 1, 1), "LPS", 0),
    "1 mm oblique": ((1, 1, 1), "PSR", 17),
    "0.45 x 0.45 x 5 mm": ((0.45, 0.45, 5), "LAS", 0),
    "3 mm": ((3, 3, 3), "RAS", 0),
    "thick oblique": ((0.9, 0.9, 4), "AIL", 12),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_label_round_trip(grid):
    """No worse than nearest-neighbour round trips by scipy; a probability map comes back better."""
    image, label = head(*GRIDS[grid], size=96)
    truth = np.asarray(label.dataobj) > 0
    _, geometry = preprocess.preprocess(image)
    there = preprocess.preprocess_label(image_of(truth.astype(np.uint8), label.affine), geometry)
    back = folders.restore(there, geometry)
    assert back.shape == truth.shape and back.dtype == np.uint8
    box = tuple(slice(*pair) for pair in geometry["box"])
    ras = nib.apply_orientation(truth, np.array(geometry["orientation"]))
    crop = ras[box].astype(np.uint8)
    zoom = {"order": 0, "mode": "nearest", "grid_mode": True}
    once = scipy.ndimage.zoom(crop, np.array(geometry["resampled"]) / crop.shape, **zoom)
    again = scipy.ndimage.zoom(once, np.array(crop.shape) / once.shape, **zoom)
    ours = dice(back > 0, truth)
    assert ours >= dice(again > 0, crop > 0) - 0.005
    if "1 mm" in grid:
        assert ours >= 0.99
    soft = torch.from_numpy(resample.resample(crop.astype(np.float32), geometry["resampled"]))
    classes = predict.largest_class(torch.stack([1 - soft, soft]), preprocess.box_size(geometry))
    assert dice(preprocess.place(classes.numpy(), geometry) > 0, truth) >= ours - 1e-9


def test_a_sheared_grid_goes_there_and_back():
    image, label = head((1, 1, 2), degrees=20, size=60)
    shear = np.eye(4)
    shear[0, 2], shear[1, 0] = 0.3, 0.1
    affine = shear @ image.affine
    volume, geometry = preprocess.preprocess(image_of(np.asarray(image.dataobj), affine))
    truth = (np.asarray(label.dataobj) > 0).astype(np.uint8)
    there = preprocess.preprocess_label(image_of(truth, affine), geometry)
    back = folders.restore(there, geometry)
    assert (
        there.shape == volume.shape
        and back.shape == truth.shape
        and dice(back > 0, truth > 0) > 0.97
    )


# -------------------------------------------------------------------------------------- label maps
def test_a_label_on_another_grid_is_rejected(tmp_path):
    image, label = head(size=40)
    _, geometry = preprocess.preprocess(image)
    moved = label.affine.copy()
    moved[0, 3] += 0.005
    assert preprocess.preprocess_label(image_of(np.asarray(label.dataobj), moved), geometry).any()
    moved[0, 3] += 0.01
    with pytest.raises(scans.Rejected, match="label grid differs"):
        preprocess.preprocess_label(image_of(np.asarray(label.dataobj), moved), geometry)
    with pytest.raises(scans.Rejected, match="label grid differs"):
        preprocess.preprocess_label(
            image_of(np.asarray(label.dataobj)[:-1], label.affine), geometry
        )
    with pytest.raises(scans.Rejected, match="label values unknown"):
        preprocess.preprocess_label(
            image_of(np.full(image.shape, 0.5, np.float32), image.affine), geometry
        )


def test_a_scaled_label_is_the_same_for_training_and_for_scores(tmp_path):
    """Stored as 65535 with the slope 1/65535: 1 - 2^-32 in float64, 1 in float32."""
    image, label = head(size=48)
    mask = nib.Nifti1Image((np.asarray(label.dataobj) > 0).astype(np.uint16) * 65535, label.affine)
    mask.header.set_slope_inter(np.float32(1 / 65535), 0)
    folder = tmp_path / "raw" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    image.to_filename(folder / "sub-1_FLAIR.nii.gz")
    mask.to_filename(folder / "sub-1_lesion.nii.gz")
    assert nib.load(folder / "sub-1_lesion.nii.gz").dataobj.slope != 1
    prepare("bids", tmp_path / "raw", tmp_path / "out")
    (case,) = tasks.labelled_cases(str(tmp_path / "out"), None, ["FLAIR"])
    assert folders.read_case(case)[2].max() == 1
    assert preprocess.read_label(folder / "sub-1_lesion.nii.gz", image).max() == 1


def test_labels_on_two_grids_of_one_session(tmp_path):
    """Each volume is cropped with those that share its label."""
    lines = ["path,subject,session,sequence,label"]
    for name, spacing in (("FLAIR", (1, 1, 1)), ("DWI", (2, 2, 2))):
        image, label = head(spacing, size=48)
        image.to_filename(tmp_path / f"{name}.nii.gz")
        label.to_filename(tmp_path / f"{name}_label.nii.gz")
        lines.append(f"{name}.nii.gz,a,1,{name},{name}_label.nii.gz")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    assert prepare("manifest", tmp_path / "scans.csv", tmp_path / "out") == 0
    for name in ("FLAIR", "DWI"):
        (case,) = tasks.labelled_cases(str(tmp_path / "out"), None, [name])
        volume, geometry, truth = folders.read_case(case)
        back = folders.restore(volume[0].numpy(), geometry)
        assert back.shape == truth.shape and truth.any()
