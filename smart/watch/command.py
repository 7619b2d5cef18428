"""The command line of ``smart watch``; what serves the page is imported when it is called."""

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
@click.option(
    "--port", default=8001, show_default=True, type=click.IntRange(0, 65535),
    help="Port to listen on, at 127.0.0.1 only (0: any free one).",
)  # fmt: skip
def main(folder: Path, port: int) -> None:
    """Watch the runs in FOLDER (default: runs), or the run that FOLDER is, on a page of this machine until Ctrl-C."""
    from smart.watch.serve import serve

    serve(folder, port)
