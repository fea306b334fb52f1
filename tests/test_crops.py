"""The stream of samples and the patches that are cut for it."""

import numpy as np
import torch

import data


# ------------------------------------------------------------------------------------- the stream
def test_stream_is_the_same_for_any_number_of_processes_and_after_a_restart():
    one = list(data.SampleStream(7, 0, 4, 0, 9))
    assert [len(batch) for batch in one] == [4] * 9
    for world in (2, 4):
        parts = [list(data.SampleStream(7, 0, 4, 0, 9, rank, world)) for rank in range(world)]
        together = [sorted(sum(step, [])) for step in zip(*parts, strict=True)]
        assert together == [sorted(step) for step in one]
    assert list(data.SampleStream(7, 0, 4, 5, 9)) == one[5:]

    flat = [key for step in one for key in step]
    for epoch in range(5):
        assert sorted(i for e, i in flat if e == epoch) == list(range(7)), "every sample once"
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]


def test_crops_do_not_depend_on_workers(prepared):
    cases = data.pretraining_cases(str(prepared))
    crops = data.Crops(cases, 16, seed=1, preset="all")
    stream = data.SampleStream(len(cases), 1, 3, 0, 4)
    device = torch.device("cpu")
    batches = [list(data.make_loader(crops, stream, workers, device)) for workers in (0, 2)]
    for alone, worked in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone.crops, worked.crops, strict=True))
        assert alone.mask_seeds == worked.mask_seeds and alone.names == worked.names


# ------------------------------------------------------------------------------------ the patches
def test_every_position_is_drawn(tmp_path):
    volume = np.arange(20 ** 3, dtype=np.float32).reshape(20, 20, 20).astype(np.float16)
    np.save(tmp_path / "v.npy", volume)
    case = data.Case("v", "s", (str(tmp_path / "v.npy"),), None, ())
    crops = data.Crops([case], 16, 0, "none")
    starts = np.array([crops.patch_start((20, 20, 20), None, np.random.default_rng(seed))
                       for seed in range(400)])
    counts = np.stack([np.bincount(axis, minlength=5) for axis in starts.T])
    assert counts.shape == (3, 5)
    assert counts.min() > 50, "each of the five positions about 80 times"

    centred = crops.patch_start((10, 16, 13), None, np.random.default_rng(0))
    assert centred == [-3, 0, -1], "a volume smaller than the patch is centred in it"


def test_read_box_pads_with_zero():
    array = np.arange(1, 28).reshape(3, 3, 3)
    box = data.read_box(array, (-1, 1, 2), (3, 4, 2))
    inside = array[0:2, 1:3, 2:3]
    assert np.array_equal(box[1:, :2, :1], inside) and box.sum() == inside.sum()
    assert data.read_box(array, (5, 0, 0), (2, 2, 2)).sum() == 0


# ----------------------------------------------------------------------------- and their foreground
def test_oversampling_finds_the_foreground_and_survives_an_empty_label(tmp_path):
    label = np.zeros((40, 40, 40), np.uint8)
    np.save(tmp_path / "image.npy", label.astype(np.float16))
    np.save(tmp_path / "empty.npy", label)
    label[33, 5, 20] = 1
    label[2, 2, 2] = 2  # ignored: never looked for
    np.save(tmp_path / "label.npy", label)
    classes = data.class_table({0: 0, 1: 1}, (2,))

    def share(name, oversample):
        path = str(tmp_path / f"{name}.npy")
        case = data.Case("c", "s", (str(tmp_path / "image.npy"),), path, ())
        crops = data.Crops([case], 16, 0, "none", classes, oversample)
        return np.mean([(crops[epoch, 0].label == 1).any().item() for epoch in range(200)])

    assert share("label", 1.0) == 1.0, "the reference's bound could just miss the voxel"
    assert 0.25 < share("label", 0.33) < 0.5
    assert share("empty", 1.0) == 0.0


def test_a_label_value_the_task_does_not_name_is_an_error(tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((16, 16, 16), np.float16))
    np.save(tmp_path / "label.npy", np.full((16, 16, 16), 3, np.uint8))
    image = str(tmp_path / "image.npy")
    case = data.Case("c", "s", (image,), str(tmp_path / "label.npy"), ())
    sample = data.Crops([case], 16, 0, "none", data.class_table({0: 0, 1: 1}))[0, 0]
    assert "do not name" in sample.fault
