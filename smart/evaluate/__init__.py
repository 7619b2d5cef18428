"""What models are worth, measured: ``smart evaluate COMMAND``; a command is imported only when it is asked for."""

import click

from smart import LazyGroup

COMMANDS = {
    "sample": "Pieces of several models for the same prompts, rated, as one table.",
    "report": "Figures, statistics and a page from such tables.",
    "rate": "Rate audio and MIDI files, silence and noise.",
    "soundfonts": "How ratings depend on the soundfont.",
    "hacks": "What else than music a reward likes.",
    "frontier": "Reward, a held-out judge and diversity against KL, over the checkpoints of runs.",
}


@click.group(cls=LazyGroup, programs=COMMANDS, package="smart.evaluate")
def main() -> None:
    """Measure what models write: tables, figures, tests."""
