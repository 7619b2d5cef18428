"""``smart card RUN``: print the model card of a run or a base, which ``smart push`` uploads with it."""

if __name__ == "__main__":  # before what may be missing is imported
    from smart.__main__ import start

    start("card")

from pathlib import Path

import click


@click.command()
@click.argument("model", metavar="RUN_OR_BASE")
@click.option(
    "--frontier", metavar="FOLDER", type=click.Path(path_type=Path),
    help="Folder written by `smart evaluate frontier`, whose advice the card then states.",
)  # fmt: skip
def main(model: str, frontier: Path | None) -> None:
    """Print the model card of a run or a base (Markdown), written from its own records.

    RUN_OR_BASE is the folder of a run, one of its checkpoints (RUN@STEP), or a base.
    """
    from smart.model_card import write_card

    click.echo(write_card(model, frontier=frontier).text, nl=False)
