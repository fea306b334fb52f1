"""Manifests as spreadsheets write them, and what is said of mistakes in them."""

import pytest
from conftest import mistake
from inputs import COLUMNS, array_of, head, image_of, prepare, save, table_text, write_manifest

import data
import manifest
import tasks

ROW = ["scan 1.nii.gz", "s1", "1", "FLAIR", ""]


TABLES = {
    "capitals and blanks": table_text(
        [f" {name.title()} " for name in COLUMNS], [[f" {cell}" for cell in ROW]]
    ),
    "semicolons": b"\xef\xbb\xbf" + table_text(COLUMNS, [ROW], ";"),
    "tabs": table_text(COLUMNS, [ROW], "\t"),
    "bars": table_text(COLUMNS, [ROW], "|"),
    "sep line": b"sep=;\r\n" + table_text(COLUMNS, [ROW], ";"),
    "UTF-16": table_text(COLUMNS, [ROW], "\t").decode().encode("utf-16"),
    "other order": table_text(COLUMNS[::-1], [ROW[::-1]], ";"),
    "empty rows": table_text(COLUMNS, [[""] * 5, ROW, [""] * 5, []]),
    "quotes": table_text(COLUMNS, [[f'"{cell}"' for cell in ROW]], "; "),
} | {
    f"no label: {word}": table_text(COLUMNS, [ROW[:4] + [word]])
    for word in ("NA", "n/a", "NaN", "None")
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_as_spreadsheets_write_it(kind, tmp_path, capsys):
    head(size=24)[0].to_filename(tmp_path / "scan 1.nii.gz")
    (tmp_path / "table.csv").write_bytes(TABLES[kind])
    assert prepare("manifest", tmp_path / "table.csv", tmp_path / "out") == 0
    assert "1 found = 1 prepared + 0 skipped by rule + 0 rejected" in capsys.readouterr().out
    (row,) = data.read_index(str(tmp_path / "out"))
    assert row[2:7] == ("s1", "1", "FLAIR", "pretrain", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            table_text(("file", "subject", "session", "sequence"), [ROW], ";"),
            "this one has file, subject, session",
        ),
        (b"", "this one has none"),
        (b"PK\3\4\0\0", "this one has PK"),
        (table_text(COLUMNS, [["a, b.nii", *ROW[1:4], "l.nii"]]), "row 2: 6 cells, but 5 columns"),
        (table_text(COLUMNS, [["", *ROW[1:]]]), "row 2: no path"),
        (table_text(COLUMNS, [[ROW[0], "", *ROW[2:]]]), "row 2: no subject"),
        (
            table_text(COLUMNS, [ROW, ROW[:4] + ["x.nii.gz"]]),
            "row 3: scan 1.nii.gz is listed twice, with different",
        ),
        (table_text(COLUMNS, []), "lists no scan"),
    ],
)
def test_a_mistake_in_a_table_is_shown(content, message, tmp_path):
    (tmp_path / "table.csv").write_bytes(content)
    line = mistake(
        "prepare_data", source="manifest", input=tmp_path / "table.csv", out=tmp_path / "out"
    )
    assert message in line


def test_a_row_that_stands_twice_is_skipped_once(tmp_path, capsys):
    head(size=24)[0].to_filename(tmp_path / "scan 1.nii.gz")
    (tmp_path / "table.csv").write_bytes(table_text(COLUMNS, [ROW, ROW]))
    assert prepare("manifest", tmp_path / "table.csv", tmp_path / "out") == 0
    assert "2 found = 1 prepared + 1 skipped by rule (listed twice 1)" in capsys.readouterr().out


def test_the_same_file_under_two_subjects_is_said(tmp_path, capsys):
    image, label = head(size=24)
    save(
        tmp_path,
        {
            "a.nii.gz": image,
            "b.nii.gz": image,
            "c.nii.gz": head(size=24, seed=3)[0],
            "la.nii.gz": label,
            "lc.nii.gz": label,
            "empty.nii.gz": image_of(0 * array_of(label), label.affine),
        },
    )
    table = write_manifest(
        tmp_path,
        [
            ("a.nii.gz", "ann", "FLAIR", "la.nii.gz"),
            ("b.nii.gz", "bob", "FLAIR", "empty.nii.gz"),
            ("c.nii.gz", "cid", "FLAIR", "empty.nii.gz"),
        ],
    )
    prepare("manifest", table, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "files that stand under two subjects: 1, first ann and bob (FLAIR)" in printed
    assert "label maps, not empty" not in printed, "two empty ones may well be alike"

    write_manifest(
        tmp_path,
        [("a.nii.gz", "ann", "FLAIR", "la.nii.gz"), ("c.nii.gz", "cid", "FLAIR", "lc.nii.gz")],
    )
    prepare("manifest", table, tmp_path / "out")
    assert (
        "label maps, not empty, that stand under two subjects: 1, first ann and cid (FLAIR)"
        in capsys.readouterr().out
    )


# --------------------------------------------------------------------------- names of sequences
def three(folder, *words):
    """Three subjects, each with a scan of the same file name, called by one of the words."""
    rows = []
    for number, word in enumerate(words):
        head(size=24, seed=number)[0].to_filename(folder / f"{number}.nii.gz")
        rows.append((f"{number}.nii.gz", f"s{number}", word, ""))
    return write_manifest(folder, rows)


def test_a_sequence_has_one_name_whatever_its_capitals(tmp_path, capsys):
    table = three(tmp_path, "FLAIR", "flair", "Flair")
    assert prepare("manifest", table, tmp_path / "out") == 0
    assert {row.sequence for row in data.read_index(str(tmp_path / "out"))} == {"FLAIR"}
    printed = capsys.readouterr().out
    assert printed.count("sequences by their usual names: Flair is FLAIR, flair is FLAIR\n") == 1
    assert "not known" not in printed


def test_an_unknown_sequence_is_said_and_taken_as_it_is(tmp_path, capsys):
    table = three(tmp_path, "MR", "MR", "FLIAR")
    assert prepare("manifest", table, tmp_path / "out") == 0
    assert [row.sequence for row in data.read_index(str(tmp_path / "out"))] == ["MR", "MR", "FLIAR"]
    line = "sequences that are not known are taken as they are: MR 2, FLIAR 1 (did you mean 'flair'"
    assert capsys.readouterr().out.count(line) == 1


def test_sequences_that_a_session_has_side_by_side_stay_apart(tmp_path, capsys):
    """Both share a label map, which two scans of one sequence could not."""
    image, label = head(size=24)
    save(tmp_path, {"a.nii.gz": image, "b.nii.gz": image, "l.nii.gz": label})
    rows = [("a.nii.gz", "s", "SWI", "l.nii.gz"), ("b.nii.gz", "s", "minIP", "l.nii.gz")]
    assert prepare("manifest", write_manifest(tmp_path, rows), tmp_path / "out") == 0
    assert "stay apart, though they are often one: SWI, minIP" in capsys.readouterr().out
    assert len(tasks.labelled_cases(str(tmp_path / "out"), None, ["SWI", "minIP"])) == 1


def test_what_an_earlier_version_prepared_under_another_word_serves(tmp_path, monkeypatch):
    """Neither the folder nor its task has to change: the volumes stay, and flair finds FLAIR."""
    image, label = head(size=24)
    save(tmp_path, {"a.nii.gz": image, "l.nii.gz": label})
    table = write_manifest(tmp_path, [("a.nii.gz", "s", "flair", "l.nii.gz")])
    with monkeypatch.context() as earlier:
        earlier.setattr(manifest, "name_sequences", lambda sessions: None)
        prepare("manifest", table, tmp_path / "out")
    [before] = data.read_index(str(tmp_path / "out"))
    assert before.sequence == "flair"
    assert len(tasks.labelled_cases(str(tmp_path / "out"), None, ["flair"])) == 1

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    prepare("manifest", table, tmp_path / "out")
    [after] = data.read_index(str(tmp_path / "out"))
    assert (after.sequence, after.path) == ("FLAIR", before.path)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    for word in ("flair", "FLAIR"):
        assert len(tasks.labelled_cases(str(tmp_path / "out"), None, [word])) == 1
