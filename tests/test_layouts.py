"""configs/sources/: each layout that is shipped, a user's own, and the mistakes one can make."""

import contextlib
import io
import re
import textwrap

import numpy as np
import pytest
from conftest import ROOT, mistake, script
from inputs import array_of, head, image_of, prepare, rows_of, save, tables

import config
import phantom
import prepare_data
import sources

SHIPPED = sorted((ROOT / "configs" / "sources").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_layout_loads_and_says_what_it_is_of(path):
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment, "the comment stands above the keys"
    assert any(line.startswith("# Tree, below --input") for line in comment)
    assert any(re.search(r"\.nii|NIFTI", line) for line in comment), "the tree has images"
    assert any(line.startswith("# From: ") for line in comment)
    assert any(line.startswith("# Licence: ") for line in comment)

    layout = sources.read_layout(path.stem)
    assert "(?P<subject>" in layout.pattern
    assert layout == sources.read_layout(str(path)), "the same by its path"

    # Only what differs is listed.
    default = sources.Layout()
    listed = config.read_yaml(sources.Layout, str(path))
    assert all(getattr(default, key) != value for key, value in listed.items())


def test_the_sources_are_those_of_table_1_and_the_generic_ones():
    nine = "adni oasis3 oasis4 ppmi brats21 isles22 wmh msseg1 msd".split()
    assert set(sources.SOURCES) == {*nine, "fomo60k", "bids", "nnunet", "any"}
    assert list(sources.SOURCES) == [path.stem for path in SHIPPED]


def test_each_row_of_series_is_a_sequence_or_a_reason_and_the_last_takes_all():
    series = sources.read_layout("adni").series
    assert all(set(row) in ({"pattern", "sequence"}, {"pattern", "skip"}) for row in series)
    assert series[-1] == {"sequence": "other", "pattern": ""}


@pytest.mark.parametrize("name", sources.LABEL_NAMES)
def test_the_endings_that_are_said_are_those_of_bids(name):
    pattern = sources.read_layout("bids").label
    assert re.search(pattern, f"sub-1/anat/sub-1_{name}", re.VERBOSE)
    assert not re.search(pattern, f"sub-1/anat/sub-1_{name}x", re.VERBOSE) or name == "lesion"
    endings = re.search(r"\(\?i:(.*)\)", pattern)[1].replace(" ", "").split("|")
    assert endings == [*sources.LABEL_NAMES, "lesion[A-Za-z0-9+-]*"]


# ------------------------------------------------------------------------------------ a user's own
@pytest.fixture
def hospital(tmp_path):
    """A tree that no shipped source knows: two patients, three visits, one with a lesion map."""
    image, label = head(size=24)
    visits = {"P001/2020-01-31": 0, "P001/2021-02-03": 1, "P002/2020-05-05": 2}
    files = {f"{visit}/flair.nii.gz": head(size=24, seed=seed)[0] for visit, seed in visits.items()}
    files |= {
        "P001/2020-01-31/flair.nii.gz": image,
        "P001/2020-01-31/lesion.nii.gz": label,
        "P002/2020-05-05/t1_post.nii.gz": head(contrast="T1ce", size=24, seed=3)[0],
        "P002/2020-05-05/notes.nii.gz": image,
    }
    save(tmp_path / "hospital", files)
    return tmp_path / "hospital"


def write_layout(folder, text, name="my_layout.yaml"):
    (folder / name).write_text(textwrap.dedent(text))
    return folder / name


def example():
    """The layout in the docstring of sources.py."""
    block = re.findall(r"^    .*$", sources.__doc__, re.MULTILINE)
    return "\n".join(line.strip() for line in block) + "\n"


def test_the_layout_in_the_docstring_works(hospital, tmp_path):
    path = write_layout(tmp_path, example())
    words = ["--source", path, "--input", hospital, "--out", tmp_path / "out", "--workers", 2]
    result = script("prepare_data.py", *words)
    assert (
        "my_layout: 6 found = 4 prepared + 2 skipped by rule (label 1, name not of this source 1)"
        in result.stdout
    )
    index = tables(tmp_path / "out", "index")
    columns = ("source", "subject", "session", "sequence", "split")
    rows = [tuple(row[column] for column in columns) for row in index]
    assert sorted(rows) == [
        ("my_layout", "P001", "2020-01-31", "FLAIR", "train"),
        ("my_layout", "P001", "2021-02-03", "FLAIR", "pretrain"),
        ("my_layout", "P002", "2020-05-05", "FLAIR", "pretrain"),
        ("my_layout", "P002", "2020-05-05", "T1ce", "pretrain"),
    ]
    assert [row["session"] for row in index if row["label"]] == ["2020-01-31"]
    assert all(row["path"].startswith("volumes/my_layout/") for row in index)
    assert not tables(tmp_path / "out", "rejected")


@pytest.mark.parametrize("word", ["--source={}", "--source {}"])
@pytest.mark.parametrize("ending", ["yaml", "yml"])
def test_a_layout_is_the_value_of_source_and_no_config_file(word, ending):
    argv = word.format(f"my_layout.{ending}").split()
    assert config.parse_config(prepare_data.Config, argv).source == f"my_layout.{ending}"


def test_a_layout_may_hold_out_a_quarter_by_folder_and_by_chance(tmp_path):
    """What brats21 and wmh need can be written in a layout of one's own, in blanks and lines."""
    path = write_layout(
        tmp_path,
        """
        pattern: |
          (train | (?P<test>held[ ]back)) / (?P<site>[AB]) /
          (?P<subject>\\d+) _ (?P<suffix>flair) $
        label: (train | (?P<test>held[ ]back)) / (?P<site>[AB]) / (?P<subject>\\d+) _ truth $
        hold_out: pretrain
        """,
    )
    image, label = head(size=24)
    files = {f"train/A/{i}_flair.nii.gz": head(size=24, seed=i)[0] for i in range(4)}
    files |= {f"train/A/{i}_truth.nii.gz": label for i in range(4)}
    files |= {"held back/B/0_flair.nii.gz": image}
    save(tmp_path / "raw", files)
    with contextlib.redirect_stdout(io.StringIO()):
        assert prepare(str(path), tmp_path / "raw", tmp_path / "out", name="mine") == 0
    splits = {row["subject"]: row["split"] for row in tables(tmp_path / "out", "index")}
    assert splits.pop("B_0") == "test"
    assert sorted(splits) == ["A_0", "A_1", "A_2", "A_3"]
    assert sorted(splits.values()) == ["pretrain", "train", "train", "train"]


def test_negative_values_and_4d_files_are_keys_of_a_layout(tmp_path):
    path = write_layout(
        tmp_path,
        """
        pattern: (?P<subject>P\\d+)$
        volumes: [FLAIR, T1]
        no_negatives: true
        """,
    )
    image, other = head(size=24)[0], head(contrast="T1", size=24)[0]
    both = np.stack([array_of(image), array_of(phantom.below_zero(other))], axis=-1)
    save(tmp_path / "raw", {"P1.nii.gz": image_of(both, image.affine)})
    assert prepare(str(path), tmp_path / "raw", tmp_path / "out") == 0, "turned away by a rule"
    assert list(rows_of(tmp_path / "out")) == [("P1", "FLAIR")]
    (row,) = tables(tmp_path / "out", "rejected")
    assert "negative voxels" in row["reason"]


def test_own_series_are_asked_before_the_common_ones(tmp_path):
    path = write_layout(
        tmp_path,
        """
        pattern: (?P<subject>P\\d+)/(?P<text>[^/]+)$
        series:
        - {pattern: post, sequence: T1ce}
        - {pattern: junk, skip: not wanted}
        """,
    )
    names = ("T1 post", "junk T1", "a T1")
    found = [sources.identify(str(path), f"P1/{name}.nii") for name in names]
    assert [who.sequences for who in found] == [("T1ce",), (), ("T1",)]
    assert found[1].skip == "not wanted"


def test_own_suffixes_win_over_the_common_ones(tmp_path):
    path = write_layout(
        tmp_path,
        """
        pattern: (?P<subject>P\\d+)_(?P<suffix>[A-Za-z0-9]+)$
        suffixes: {SWI: T2star, 3: PD}
        series: [{pattern: private, skip: private}]
        """,
    )
    found = {
        word: sources.identify(str(path), f"P1_{word}.nii.gz")
        for word in ("swi", "3", "FLAIR", "private", "x")
    }
    assert {word: who.sequences for word, who in found.items()} == {
        "swi": ("T2star",), "3": ("PD",), "FLAIR": ("FLAIR",), "private": (), "x": ()
    }
    assert (found["private"].skip, found["x"].skip) == ("private", "suffix x")


# ---------------------------------------------------------------------------------------- mistakes
GOOD = "pattern: (?P<subject>P\\d+)_(?P<suffix>flair)$\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "patern: x", "unknown key 'patern' in {path}; did you mean 'pattern'?"),
        (GOOD + "volumes: {a: b}", "volumes in {path}: expected"),
        (GOOD + "no_negatives: maybe", "no_negatives in {path}: expected bool, got 'maybe'"),
        ("pattern: (?P<subject>P_(x)", "{path}: (?P<subject>P_(x) is no regular expression"),
        (GOOD + "label: '[P'", "{path}: [P is no regular expression: unterminated character set"),
        (GOOD + "series: [{pattern: '(', skip: x}]", "{path}: ( is no regular expression"),
        (GOOD + "series: [{patern: a, skip: x}]", "needs pattern, and sequence or skip"),
        (GOOD + "series: [{pattern: 3, skip: x}]", "needs pattern, and sequence or skip"),
        ("hold_out: test", "{path}: pattern and label need a group subject"),
        ("pattern: (?P<suffix>flair)", "{path}: pattern and label need a group subject"),
        (GOOD + "label: lesion", "{path}: pattern and label need a group subject"),
        ("pattern: (?P<subject>P)", "{path}: pattern needs a group suffix or text"),
        ("pattern: (?P<subjet>P)(?P<suffix>x)", "{path}: unknown group 'subjet'; choose from subj"),
        (GOOD + "hold_out: valid", "{path}: hold_out 'valid': choose test or pretrain"),
        ("pattern: [", "{path} is not valid YAML"),
        ("just words", "{path}: expected lines of `key: value`"),
    ],
)
def test_a_mistake_in_a_layout_is_one_line_with_its_file(text, message, tmp_path):
    path = write_layout(tmp_path, text)
    line = mistake("prepare_data", source=path, input=tmp_path, out=tmp_path / "out")
    assert message.format(path=path) in line
    assert not (tmp_path / "out").exists()


def test_a_layout_that_is_not_there_is_one_line(tmp_path):
    path = tmp_path / "no.yaml"
    line = mistake("prepare_data", source=path, input=tmp_path, out=tmp_path / "out")
    assert line == f"error: cannot read {path}: No such file or directory\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("brats", "did you mean 'brats21'? "), ("xyz", ""), ("Manifest", "did you mean 'manifest'? ")],
)
def test_an_unknown_source_lists_the_known_and_the_nearest(name, hint, tmp_path):
    line = mistake("prepare_data", source=name, input=tmp_path, out=tmp_path / "out")
    known = ", ".join([*sources.SOURCES, "manifest"])
    assert f"unknown source {name!r}: {hint}choose from {known}, or give the path" in line
    assert "of a .yaml file with your own layout" in line


def test_a_config_file_cannot_be_taken_for_a_layout(tmp_path):
    path = write_layout(tmp_path, GOOD)
    line = mistake("prepare_data", path, input=tmp_path, out=tmp_path / "out")
    assert "unknown key 'pattern'" in line


def test_no_source_at_all_says_what_to_give(tmp_path):
    line = mistake("prepare_data", out=tmp_path / "out")
    assert "give --input, and choose --source from adni, " in line
