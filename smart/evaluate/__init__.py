"""Evaluation: ``python -m smart.evaluate COMMAND``. A command's module is imported only when that command runs."""

import click

from smart import LazyGroup

COMMANDS = {
    "sample": "Sample several models on the same prompts, rate the pieces, and write one table.",
    "report": "Draw the paper's figures from such tables, run tests, and write an HTML page.",
    "rate": "Rate audio and MIDI files, and compare silence and noise with the paper.",
    "soundfonts": "Measure how ratings depend on the soundfont.",
    "hacks": "Test whether a reward can be fooled by silence, noise or loops.",
    "frontier": "Plot reward, a second score and diversity against KL, over the checkpoints of runs.",
}


@click.group(cls=LazyGroup, programs=COMMANDS, package="smart.evaluate")
def main() -> None:
    """Sample, rate and compare models; write reports with the paper's figures."""
