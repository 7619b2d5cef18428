"""A listening study as web pages: build it, serve it, export and analyse its ratings.

Only ``key.csv`` tells which system made which excerpt; the server reads it and never sends it.
"""

import click

from smart import LazyGroup

# subcommand -> its help text; each is the ``main`` of the module of the same name
COMMANDS = {
    "build": "Build a study: loudness-matched excerpts of several systems, under anonymous names.",
    "serve": "Serve a study's pages and store the ratings.",
    "invite": "Create links for participants.",
    "export": "Write the ratings to a CSV file, one row per rating.",
    "analyse": "Analyse the ratings: exclusions, mixed models, intervals, figures.",
    "power": "Simulate how likely a study of a given size is to find an effect.",
}


@click.group(cls=LazyGroup, programs=COMMANDS, package="smart.study")
def main() -> None:
    """Run a listening study: build it, serve it, export and analyse its ratings."""
