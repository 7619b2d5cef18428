"""The folder of pieces, and the table of those that are finished."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from smart import UserError
from smart.files import write_atomically
from smart.run import claim_folder, hold_folder

TABLE = "pieces.csv"
SUMS = ".pieces.sha256"  # of each line of the table, so that a damaged one is found
COLUMNS = ("piece", "file", "notes", "seconds", "tokens", "unplayable", "candidate")


def read_table(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The finished pieces, in order, up to the first line that is damaged or incomplete after a crash.

    A damaged line is reported on stderr; the pieces from there on are written again.
    """
    path = folder / TABLE
    if not path.is_file():
        return []
    # no value contains a comma or a quotation mark; text after the last line break is an incomplete line
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    sums = (folder / SUMS).read_text(encoding="utf-8", errors="replace").split() if (folder / SUMS).is_file() else []
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines):
        values = line.split(",")
        if number == 0 and values == list(columns):
            continue
        try:
            if sums[number : number + 1] != [_digest(line)]:
                raise ValueError
            row = dict(zip(columns, values, strict=True))
            numbers = {name: float(value) for name, value in row.items() if name != "file"}
            whole = [int(row[name]) for name in ("piece", "tokens", "unplayable")]
            if number == 0 or whole[0] != len(rows) or not all(map(math.isfinite, numbers.values())):
                raise ValueError
        except ValueError:
            click.echo(
                f"Warning: {path}: line {number + 1} is damaged; the pieces from there on are written again", err=True
            )
            break
        rows.append(row)
    return rows


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


class Lines:
    """A file for ``csv.writer`` that appends lines to the table, each after its digest; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()

    def __enter__(self) -> Lines:
        self._table, self._sums = (
            self._open.enter_context((self._folder / name).open("a", encoding="utf-8", newline=""))
            for name in (TABLE, SUMS)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, line: str) -> None:
        self._sums.write(f"{_digest(line.rstrip())}\n")
        self._sums.flush()
        self._table.write(line)
        self._table.flush()


@contextmanager
def open_pieces(out: Path, settings: dict[str, Any], columns: Sequence[str]) -> Iterator[int]:
    """Create the folder ``out``, or continue one with the same settings; yields how many pieces it already has.

    Inside the ``with`` no other process can use the folder.
    """
    claim_folder(out, settings)
    with hold_folder(out):
        rows = read_table(out, columns)
        lines = [",".join(line) for line in (list(rows[0]), *(row.values() for row in rows))] if rows else []
        try:
            write_atomically(out / SUMS, "".join(f"{_digest(line)}\n" for line in lines).encode())
            write_atomically(out / TABLE, "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror})") from None
        yield len(rows)
