"""Measurements: ``python -m smart.evaluate COMMAND``; a command's module is imported only when it is asked for."""

import click

from smart import LazyGroup

COMMANDS = {
    "sample": "Pieces of several models for the same prompts, rated, as one table.",
    "report": "The paper's figures, statistics and a page from such tables.",
    "rate": "Rate audio and MIDI files, silence and noise.",
    "soundfonts": "How ratings depend on the soundfont.",
    "hacks": "What else than music a reward likes.",
    "frontier": "Reward, a held-out judge and diversity against KL, over the checkpoints of runs.",
}


@click.group(cls=LazyGroup, programs=COMMANDS, package="smart.evaluate")
def main() -> None:
    """Sample, rate and compare; reports with the paper's figures."""
