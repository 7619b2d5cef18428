"""A listening study as web pages: ``smart study build``, ``serve``, ``export`` and what follows from the ratings.

Which excerpt came from which system is in one file, ``key.csv``, which the server reads and never sends.
"""

import click

from smart import LazyGroup

# subcommand -> what it does; each is the ``main`` of the module of its name
COMMANDS = {
    "build": "Make a study: excerpts of several systems, loudness-matched, under names that say nothing.",
    "serve": "Serve a study's pages and keep its ratings.",
    "invite": "Make links for participants.",
    "export": "Write the ratings as CSV, one row a rating.",
    "analyse": "What the ratings say: models, intervals, figures, exclusions.",
    "power": "How likely a study of a given size finds an effect of a given size.",
}


@click.group(cls=LazyGroup, programs=COMMANDS, package="smart.study")
def main() -> None:
    """Run a listening study: build it, serve it, export and analyse its ratings."""
