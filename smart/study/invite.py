"""``smart study invite``: links for participants. Each is shown once; the database keeps a hash of it only."""

from pathlib import Path

import click

from smart.study.folder import Study
from smart.study.store import Store


@click.command("invite")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(1, 10000), help="How many links.")
@click.option(
    "--address", default="http://127.0.0.1:8000", show_default=True, help="Where participants reach the server."
)
@click.option("--database", metavar="URL", envvar="SMART_STUDY_DATABASE", help="If the ratings are not in FOLDER.")
def main(folder: Path, count: int, address: str, database: str | None) -> None:
    """Print links for participants of the study in FOLDER, one a line."""
    store = Store(Study(folder), database)
    try:
        for token in store.invite(count):
            click.echo(f"{address.rstrip('/')}/s/{token}")
    finally:
        store.close()
