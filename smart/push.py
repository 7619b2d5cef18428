"""``smart push RUN_OR_BASE USER/NAME``: put a model on the Hugging Face hub, where ``model.base`` finds it.

It uploads weights, configuration and tokenizer, and a model card (``smart.model_card``), in one commit.
"""

if __name__ == "__main__":  # before what may be missing is imported
    from smart.__main__ import start

    start("push")

from pathlib import Path

import click

from smart import UserError, hub
from smart.run import in_one_line


@click.command()
@click.argument("model", metavar="RUN_OR_BASE")
@click.argument("hub_id", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a model that only you can see (default: everyone can).")
@click.option("--update", is_flag=True, help="Replace another model of this name; the hub keeps its history.")
@click.option(
    "--frontier", metavar="FOLDER", type=click.Path(path_type=Path),
    help="Folder written by `smart evaluate frontier`, whose advice the card then states.",
)  # fmt: skip
def main(model: str, hub_id: str, private: bool, update: bool, frontier: Path | None) -> None:
    """Put a run's model, or a base, on the Hugging Face hub, with a model card written from its own records.

    RUN_OR_BASE is the folder of a run, one of its checkpoints (RUN@STEP), or a base. It asks for a token with write
    access: run `hf auth login` once, or set HF_TOKEN. An interrupted upload can be repeated.
    """
    if not hub.is_hub_id(hub_id):
        raise UserError(f"{hub_id!r}: expected the form USER/NAME, for example {Path(model).name or 'me'}/my-model")
    with in_one_line("the model card", hub.AGAIN):
        from smart.model import FILES
        from smart.model_card import write_card

        card = write_card(model, hub_id=hub_id, frontier=frontier)
        files = {name: card.model / name for name in FILES} | card.files | {"README.md": card.text.encode()}
        sizes = [file.stat().st_size if isinstance(file, Path) else len(file) for file in files.values()]
        done = hub.upload(hub_id, files, private=private, update=update)
    seen = "private" if done.private else "public"
    click.echo(f"{done.url}: {len(files)} files, {sum(sizes) / 1e6:.1f} MB, {seen}")
    click.echo(f"use it:  --set model.base={hub_id}, or smart generate --model {hub_id} --out pieces")
