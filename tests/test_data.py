"""Cases and batches: what data.py makes of an index, and how a batch is taken apart."""

import itertools

import pytest
import torch
from folders import volume_of, write_index

import augment
import config
import data
import tasks


def names_of(volumes):
    return [volume.path.split("/")[-1] for volume in volumes]


def test_of_two_runs_the_one_with_a_label_is_the_case(tmp_path):
    bare = volume_of("a", path="volumes/first.npy")
    labelled = volume_of("a", path="volumes/second.npy", label="")
    write_index(tmp_path, [bare, labelled])
    session, = tasks.sessions_of(str(tmp_path), None).values()
    assert names_of(session["FLAIR"]) == ["first.npy", "second.npy"]

    case, = tasks.labelled_cases(str(tmp_path), None, ["FLAIR"])
    assert case.name == "a_1" and names_of(case.volumes) == ["second.npy"]


def test_channels_share_a_label_map_where_they_can(tmp_path):
    runs = [volume_of("a", sequence, label="", path=f"volumes/{sequence}-{run}.npy",
                      label_sha256=digest)
            for sequence, run, digest in (("FLAIR", 1, "x"), ("FLAIR", 2, "y"), ("T1", 1, "z"),
                                          ("T1", 2, "y"), ("T2", 1, "x"), ("T2", 2, "y"))]
    for order in itertools.permutations(runs, 6):
        write_index(tmp_path, order)
        case, = tasks.labelled_cases(str(tmp_path), None, ["FLAIR", "T1", "T2"])
        assert names_of(case.volumes) == ["FLAIR-2.npy", "T1-2.npy", "T2-2.npy"]

    # Without a common one, the first run counts, and the others keep their own.
    write_index(tmp_path, [volume for volume in runs if volume.label_sha256 != "y"])
    case, = tasks.labelled_cases(str(tmp_path), None, ["T1", "FLAIR"])
    assert names_of(case.volumes) == ["T1-1.npy", "FLAIR-1.npy"]


def test_an_index_of_an_earlier_version_lacks_columns(tmp_path):
    volume = volume_of("a", label="0:9/9")
    write_index(tmp_path, [volume], data.Volume._fields[:-2])
    assert data.read_index(str(tmp_path)) == [volume._replace(label_sha256="", label_values="")]
    write_index(tmp_path, [volume], data.Volume._fields[:-3])
    with pytest.raises(config.UserError, match="lacks the columns sha256; prepare it again"):
        data.read_index(str(tmp_path))


@pytest.mark.parametrize(("with_labels", "size"), [(True, 1), (True, 2), (False, 4), (True, 4)])
def test_micro_batches_are_the_batch_in_order(with_labels, size):
    samples = []
    for number in range(4):
        draw = augment.draw(number, "all", 8)
        label = torch.full(draw.context, number, dtype=torch.uint8) if with_labels else None
        crop = torch.full((1, *draw.context), number, dtype=torch.float16)
        samples.append(data.Sample(crop, label, draw, number, f"case {number}", ""))
    batch = data.collate(samples)
    parts = list(data.micro_batches(batch, size))
    assert [len(part.crops) for part in parts] == [size] * (4 // size)

    for field in ("crops", "draws", "mask_seeds", "names", *(["labels"] if with_labels else [])):
        together = [value for part in parts for value in getattr(part, field)]
        assert all(a is b for a, b in zip(together, getattr(batch, field), strict=True)), field
    assert with_labels or {part.labels for part in parts} == {None}
