"""``smart study invite``: links for participants. Each is shown once; the database stores only its hash."""

from pathlib import Path

import click

from smart.study.folder import Study
from smart.study.store import Store


def invite(
    *,
    folder: Path,
    count: int,
    address: str,
    database: str | None,
) -> None:
    """Print the links. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    store = Store(Study(folder), database)
    try:
        for token in store.invite(count):
            click.echo(f"{address.rstrip('/')}/s/{token}")
    finally:
        store.close()
