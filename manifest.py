"""A manifest: a csv file with a scan a row, as any spreadsheet writes it -> its scans."""

import csv
import io
import os
import re
from collections import Counter

import config
import sources
from config import UserError
from names import readable
from sources import Scan, say

NO_VALUE = ("", "na", "n/a", "nan", "none", "null")  # empty cells, in lower case


def read_manifest(path):
    """csv with the columns path, subject, session, sequence[,label][,split] -> like find_scans. Its
    delimiter is one of , ; tab and |. Capitals and blanks are forgiven."""
    table = read_table(path)
    header = [column.lower() for column in table[0]]
    sessions, skipped, seen = {}, {}, {}
    for number, cells in enumerate(table[1:], start=2):
        where = f"{path}, row {number}"
        if all(cell.lower() in NO_VALUE for cell in cells):
            continue
        if any(cells[len(header):]):
            raise UserError(f"{where}: {len(cells)} cells, but {len(header)} columns: a name with "
                            "the delimiter in it needs quotes")

        # A short row, and a column that is not there, are empty.
        row = dict.fromkeys(("label", "split", *header), "")
        row |= dict(zip(header, cells, strict=False))
        scan = scan_of_row(row, where, os.path.dirname(path))

        # A scan may be listed twice, if both rows say the same.
        first = seen.setdefault((scan.path, scan.subject, scan.session, scan.sequence), scan)
        if first != scan:
            raise UserError(f"{where}: {row['path']} is listed twice, with different labels or "
                            "splits")
        if first is not scan:
            skipped.setdefault("listed twice", []).append(scan.path)
        else:
            sessions.setdefault((scan.subject, scan.session), []).append(scan)

    if not sessions:
        raise UserError(f"{path} lists no scan")
    name_sequences(sessions)
    return [sessions[key] for key in sorted(sessions)], skipped, {}


def name_sequences(sessions):
    """Call each sequence as in the folders of all sources: flair and Flair become FLAIR. What was
    renamed, and what is not known, is said once.

    sessions: {(subject, session): its Scans}, which are replaced."""
    usual = sources.usual_names()
    apart = words_apart(sessions, usual)
    renamed, unknown = {}, Counter()
    for session in sessions.values():
        for number, scan in enumerate(session):
            word = scan.sequence
            name = usual.get(word.lower())
            if name is None:
                unknown[word] += 1
            elif word not in apart and word != name:
                renamed[word] = name
                session[number] = scan._replace(sequence=name, word=word)

    if renamed:
        pairs = [f"{word} is {name}" for word, name in sorted(renamed.items())]
        say(f"sequences by their usual names: {', '.join(pairs)}")
    if apart:
        say(f"sequences of one session stay apart, though they are often one: "
            f"{', '.join(sorted(apart))}")
    if unknown:
        counts = [f"{word or 'no name'} {count}{hint(word, usual)}"
                  for word, count in unknown.most_common()]
        say(f"sequences that are not known are taken as they are: {', '.join(counts)}")


def words_apart(sessions, usual):
    """The words that would become one name in a session that has both, as SWI and minIP."""
    apart = set()
    for session in sessions.values():
        words = {}
        for scan in session:
            name = usual.get(scan.sequence.lower())
            words.setdefault(name, set()).add(scan.sequence)
        words.pop(None, None)
        for several in words.values():
            if len(several) > 1:
                apart |= several
    return apart


def hint(word, usual):
    """The nearest known word in brackets, for one that may be misspelt."""
    near = config.did_you_mean(word.lower(), usual)
    return f" ({near})" if near else ""


def scan_of_row(row, where, root):
    """{column: cell} -> Scan."""
    for column in ("path", "subject"):
        if not row[column]:
            raise UserError(f"{where}: no {column}")

    # In a table that is no UTF-8, a path is the bytes of a file's name, or else the letters that
    # they stand for in Latin-1.
    paths = []
    for cell in (row["path"], row["label"]):
        cell = "" if cell.lower() in NO_VALUE else cell
        if cell != readable(cell) and not os.path.exists(os.path.join(root, cell)):
            cell = readable(cell)
        paths.append(cell)

    split = row["split"].lower()
    if split in NO_VALUE:
        split = "train" if paths[1] else "pretrain"
    if split not in ("pretrain", "train", "test"):
        raise UserError(f"{where}: split {split!r} of {row['path']}: choose pretrain, train or "
                        "test")
    who = [readable(row[column]) for column in ("subject", "session", "sequence")]
    return Scan(paths[0], *who, paths[1], split)


def read_table(path):
    """The rows of a manifest, cells stripped; the first has the columns. Raises UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read()

        # A spreadsheet may write UTF-16, and begin with "sep=;". What is no UTF-8 comes back in
        # surrogates, as the names of files do.
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = content.decode(encoding, "surrogateescape")
        text = re.sub(r"\A\s*(sep=.\s*\n)?\s*", "", text)

        tables = []
        for delimiter in ",;\t|":
            lines = io.StringIO(text, newline="")
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            tables.append([[cell.strip() for cell in cells] for cells in rows])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the manifest {path}: {config.reason(error)}") from None

    # The delimiter is the one that finds the columns.
    needed = {"path", "subject", "session", "sequence"}
    for table in tables:
        if table and needed <= {column.lower() for column in table[0]}:
            return table
    columns = max((table[0] for table in tables if table), key=len, default=[])
    raise UserError(f"{path}: a manifest needs the columns path,subject,session,sequence[,label]"
                    f"[,split]; this one has {', '.join(map(readable, columns)) or 'none'}")
