"""Measurements: ``python -m smart.evaluate COMMAND``; a command's module is imported only when it is asked for."""

import click

from smart import LazyGroup

COMMANDS = {
    "rate": "Rate audio and MIDI files, silence and noise.",
    "soundfonts": "How ratings depend on the soundfont.",
    "hacks": "What else than music a reward likes.",
}


@click.group(cls=LazyGroup, programs=COMMANDS, package="smart.evaluate")
def main() -> None:
    """Rate audio, compare soundfonts, see what a reward likes."""
