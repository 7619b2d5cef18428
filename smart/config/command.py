"""The command line of ``smart config``."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from smart.config import Config, PretrainConfig, find, load
from smart.config.toml import compared
from smart.files import parse_toml


@click.command()
@click.argument("file", default="quickstart.toml")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Set one key of the configuration to another value (repeatable).",
)
@click.option("--changed", is_flag=True, help="Print only the keys that differ from their defaults.")
@click.option("--markdown", is_flag=True, help="Print docs/configuration.md, which explains every key, instead.")
def main(file: str, overrides: tuple[str, ...], changed: bool, markdown: bool) -> None:
    """Check a configuration and print all its keys, with the default of each that differs from it.

    FILE is a TOML file, the name of a shipped one (default: quickstart.toml), or the folder of a run. What is printed
    is a configuration again.
    """
    if markdown:
        from smart.config.page import markdown as page

        click.echo(page(), nl=False)
        return
    path = Path(file) / "config.toml" if Path(file).is_dir() else find(file)
    click.echo(compared(load(path, overrides, schema=_schema(path)), changed=changed), nl=False)


def _schema(path: Path) -> Any:
    """The schema of a file: that of pretraining if the file has a section that only pretraining has."""
    names = [{field.name for field in dataclasses.fields(schema)} for schema in (PretrainConfig, Config)]
    try:
        return PretrainConfig if (names[0] - names[1]) & set(parse_toml(path.read_text(encoding="utf-8"))) else Config
    except (OSError, ValueError):
        return Config  # load says what is wrong
