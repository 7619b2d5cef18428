"""``smart study export``: the ratings as CSV, one row per rating, in the order in which each participant gave them."""

import csv
import io
from pathlib import Path

import click

from smart import UserError
from smart.files import write_atomically
from smart.plots import plain
from smart.study.folder import Study
from smart.study.store import Store, iso

COLUMNS = [
    "participant", "session", "position", "excerpt", "system", "prompt", "seed", "rating", "play_count", "listened_s",
    "response_ms", "repeat", "check", "user_agent", "utc", "version",
]  # fmt: skip


def ratings_csv(store: Store) -> str:
    """All ratings except practice. ``repeat``: 1 if the excerpt was heard before; ``check``: "silence" or empty.

    The silent check has no system, prompt or seed. ``version`` is that of the consent text at the time of the rating.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in store.rows():
        made = store.study.excerpts[row["excerpt"]]
        table.writerow([
            f"p{row['participant']:04d}", row["session"], row["position"], made.name, plain(made.system),
            plain(made.prompt), plain(made.seed), row["rating"], row["play_count"], f"{row['listened_s']:.3f}",
            row["response_ms"], int(row["kind"] == "repeat"), "silence" if row["kind"] == "silence" else "",
            plain(row["user_agent"]), iso(row["stored"]), plain(row["version"]),
        ])  # fmt: skip
    return text.getvalue()


def export(
    *,
    folder: Path,
    database: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Write the file ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: already exists; use --overwrite to replace it")
    store = Store(Study(folder), database)
    try:
        text = ratings_csv(store)
        people, withdrawn = store.overview(), store.withdrawals()
    finally:
        store.close()
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    finished = sum(person["finished"] is not None for person in people)
    click.echo(
        f"{text.count(chr(10)) - 1} ratings by {len(people)} participants, {finished} of whom finished; "
        f"{withdrawn} withdrew and were deleted -> {out}"
    )
