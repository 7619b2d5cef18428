"""``smart PROGRAM ...`` is ``python -m smart.PROGRAM ...``; a program is imported only when it is asked for."""

from importlib import import_module

import click

PROGRAMS = {
    "grpo": "Tune a base model by how its music sounds.",
    "pretrain": "Train a base model on a tokenised corpus.",
    "generate": "Write music with a base or a tuned run.",
    "corpus": "Turn a folder of MIDI files into a tokenised corpus.",
    "doctor": "Say whether this machine is ready for a run.",
    "study": "Run a listening study: build it, serve it, export and analyse its ratings.",
    "calibrate": "Fit the ce_proxy reward to clips that were rated.",
}
MODULES = {"calibrate": "smart.reward.calibrate"}


class Programs(click.Group):
    """A group whose commands live in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(PROGRAMS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in PROGRAMS:
            return None
        command: click.Command = import_module(MODULES.get(cmd_name, f"smart.{cmd_name}")).main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Programs"):  # without importing any of them
            formatter.write_dl(list(PROGRAMS.items()))


@click.group(cls=Programs)
@click.version_option(package_name="smart")
def main() -> None:
    """Tune symbolic music models with reinforcement learning from audio."""


if __name__ == "__main__":
    main(prog_name="smart")
