"""The folder of pieces, and the table of those that are finished."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from smart import UserError
from smart.files import write_atomically
from smart.run import claim_folder, hold_folder

TABLE = "pieces.csv"
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
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines):
        values = line.split(",")
        if number == 0 and values == list(columns):
            continue
        try:
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


@contextmanager
def open_pieces(out: Path, settings: dict[str, Any], columns: Sequence[str]) -> Iterator[int]:
    """Create the folder ``out``, or continue one with the same settings; yields how many pieces it already has.

    Inside the ``with`` no other process can use the folder.
    """
    claim_folder(out, settings)
    with hold_folder(out):
        rows = read_table(out, columns)
        lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
        try:
            write_atomically(out / TABLE, "".join(",".join(line) + "\n" for line in lines).encode())
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror})") from None
        yield len(rows)
