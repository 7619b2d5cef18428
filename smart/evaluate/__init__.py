"""What models are worth, measured: ``smart evaluate sample|report``; a command is imported only when asked for."""

from importlib import import_module

import click

COMMANDS = {
    "sample": "Pieces of several models for the same prompts, rated, as one table.",
    "report": "Figures, statistics and a page from such tables.",
    "frontier": "Reward, a held-out judge and diversity against KL, over the checkpoints of runs.",
}


class Commands(click.Group):
    """A group whose commands live in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"smart.evaluate.{cmd_name}").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # without importing any of them
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands)
def main() -> None:
    """Measure what models write: tables, figures, tests."""
