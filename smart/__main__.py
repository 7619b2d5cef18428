"""``smart PROGRAM ...`` runs ``python -m smart.PROGRAM ...``; each program is imported only when it is called."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import click

from smart import Group, __version__, missing
from smart.cores import SPINS
from smart.process import exhausted

PROGRAMS = {
    "grpo": "Tune a base model with a reward for how its music sounds.",
    "pretrain": "Train a base model on a tokenised corpus.",
    "generate": "Write music with a base or a tuned run.",
    "watch": "Show runs on a local page while they write: curves, pieces, completions, settings.",
    "evaluate": "Sample models, rate and compare their pieces, draw the paper's figures.",
    "corpus": "Turn a folder of MIDI files into a tokenised corpus.",
    "demo": "Make a web page that plays pairs of pieces from two models.",
    "study": "Build and serve a listening study, export and analyse its ratings.",
    "config": "Print a configuration with what differs from the defaults, or a page of all keys.",
    "doctor": "Check whether this machine can run a configuration.",
    "reproduce": "Run every experiment of the paper and compare the results on one page.",
    "push": "Put a run's model, or a base, on the Hugging Face hub.",
    "card": "Print the model card of a run or a base, written from its own records.",
    "calibrate": "Fit the ce_proxy reward to clips that you rated.",
    "naturalness": "Train or test a reward that tells piano music from its corruptions.",
}
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "GPUs that a program may use.",
    "OMP_NUM_THREADS": "Threads to compute with on the CPU (default: one per usable core, or one if a GPU computes).",
    "GOMP_SPINCOUNT": f"How long a thread waits for others before it sleeps (default: {SPINS}).",
    "SMART_SOUNDFONTS": "More folders to search for soundfonts, separated by colons.",
    "XDG_CACHE_HOME": "Folder of the note bank's cache (default: ~/.cache).",
    "HF_TOKEN": "Token for the Hugging Face hub (default: that of `hf auth login`).",
    "HF_HUB_OFFLINE": "Set to 1 to use only models of the Hugging Face hub that were downloaded before.",
}
# where a program's command ``main`` is; what it does stands elsewhere, and is imported once its options are right
MODULES = {
    "generate": "smart.generate.command",
    "watch": "smart.watch.command",
    "evaluate": "smart.evaluate.command",
    "corpus": "smart.corpus.command",
    "demo": "smart.demo.command",
    "study": "smart.study.command",
    "config": "smart.config.command",
    "doctor": "smart.doctor.command",
    "reproduce": "smart.reproduce.command",
    "push": "smart.push",
    "card": "smart.card",
    "calibrate": "smart.reward.command",
    "naturalness": "smart.reward.naturalness.command",
}
# the programs that make a run: their configuration's schema in ``smart.config``, and its default file
RUNS = {"grpo": ("Config", "quickstart.toml"), "pretrain": ("PretrainConfig", "base.toml")}


class Programs(Group):
    """The programs by their names, none of which is imported before it is asked for."""

    def main(self, *args: Any, **options: Any) -> Any:
        with limits_named():
            return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(PROGRAMS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        try:
            return command(cmd_name) if cmd_name in PROGRAMS else None
        except ModuleNotFoundError as error:
            raise missing(cmd_name, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Programs"):
            formatter.write_dl(list(PROGRAMS.items()))
        with formatter.section("Environment"):
            formatter.write_dl(list(ENVIRONMENT.items()))


def command(name: str) -> click.Command:
    """The command line of a program."""
    if name not in RUNS:
        found: click.Command = import_module(MODULES[name]).main
        return found
    from smart import config
    from smart.run import run_command

    schema, default = RUNS[name]
    load = partial(config.load, schema=getattr(config, schema))
    return run_command(f"smart.{name}", load, default=default, help=PROGRAMS[name], rewards=name == "grpo")


def start(name: str) -> None:
    """Run a program that was started as ``python -m``, which names it so in its usage line, and exit."""
    try:
        with limits_named():
            command(name)()
    except ModuleNotFoundError as error:
        problem = missing(name, error)
        problem.show()
        sys.exit(problem.exit_code)


@contextmanager
def limits_named() -> Iterator[None]:
    """End a program with one line if it ran out of memory, open files or disk where nothing else says so."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        limit = exhausted(error)
        if limit is None:
            raise
        click.echo(f"Error: {limit}", err=True)
        raise SystemExit(1) from None


@click.group(cls=Programs)
@click.version_option(__version__)
def main() -> None:
    """Tune symbolic music models with reinforcement learning from audio."""


if __name__ == "__main__":
    main(prog_name="smart")
