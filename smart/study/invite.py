"""``smart study invite``: links for participants. Each is shown once; the database stores only its hash."""

from pathlib import Path

import click

from smart.study.folder import Study
from smart.study.store import Store


@click.command("invite")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(1, 10000), help="Number of links.")
@click.option(
    "--address", default="http://127.0.0.1:8000", show_default=True, help="Server address to use in the links."
)
@click.option(
    "--database", metavar="URL", envvar="SMART_STUDY_DATABASE", help="Database URL (default: an SQLite file in FOLDER)."
)
def main(folder: Path, count: int, address: str, database: str | None) -> None:
    """Create links for participants of the study in FOLDER and print them, one per line."""
    store = Store(Study(folder), database)
    try:
        for token in store.invite(count):
            click.echo(f"{address.rstrip('/')}/s/{token}")
    finally:
        store.close()
