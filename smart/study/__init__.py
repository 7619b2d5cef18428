"""A listening study as web pages: ``smart study build``, ``serve``, ``export`` and what follows from the ratings.

Which excerpt came from which system is in one file, ``key.csv``, which the server reads and never sends.
"""

from importlib import import_module

import click

# subcommand -> what it does; each is the ``main`` of the module of its name
COMMANDS = {
    "build": "Make a study: excerpts of several systems, loudness-matched, under names that say nothing.",
    "serve": "Serve a study's pages and keep its ratings.",
    "invite": "Make links for participants.",
    "export": "Write the ratings as CSV, one row a rating.",
    "analyse": "What the ratings say: models, intervals, figures, exclusions.",
    "power": "How likely a study of a given size finds an effect of a given size.",
}


class Commands(click.Group):
    """A group whose commands live in modules of their own, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"smart.study.{cmd_name}").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # without importing any of them
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands)
def main() -> None:
    """Run a listening study: build it, serve it, export and analyse its ratings."""
