"""The command line of ``smart evaluate``; what a command does is imported when it is called."""

from collections.abc import Callable
from typing import Any

import click

from smart import FilePath, Group, Renamed
from smart.corpus import SPLITS
from smart.prompts import KINDS
from smart.render import RenderError
from smart.run import (
    accept_option,
    backend_option,
    in_one_line,
    pedal_option,
    soundfont_option,
    temperature_option,
    tokens_option,
    workers_option,
)

BLOCK = 64  # most pieces per prompt: as many as are sampled together (``smart.rollout.BLOCK``)


@click.group(cls=Group)
def main() -> None:
    """Sample, rate and compare models; write reports with the paper's figures."""


def reward_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options --reward, --reward-option and --device, for ``load_rewards``."""
    for option in (
        click.option(
            "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]),
            help="Where models and rewards run; auto: on CUDA if available; mps: on an Apple GPU (experimental).",
        ),
        click.option(
            "--reward-option", "options", multiple=True, metavar="[KIND.]KEY=VALUE",
            help="Setting of a reward, such as audiobox.model=FOLDER; KIND is needed with several rewards. Repeatable.",
        ),
        click.option(
            "--reward", "kinds", multiple=True, default=("ce_proxy",), show_default=True, metavar="KIND",
            help="Kind of reward that rates the pieces (repeatable).",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def clip_options(most_seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options --seconds (up to ``most_seconds``), --sample-rate, --backend and --workers of clips to render."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--workers", default=0, show_default=True, type=click.IntRange(min=0),
                help="Number of processes that render audio (0: one per usable core).",
            ),
            backend_option,
            click.option(
                "--sample-rate", default=44100, show_default=True, type=click.IntRange(8000, 192_000),
                help="Sample rate of the rendered audio in Hz.",
            ),
            click.option(
                "--seconds", default=10.0, show_default=True, type=click.FloatRange(0, most_seconds, min_open=True),
                help="Seconds to render and rate, from the beginning of each piece.",
            ),
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


@main.command("sample", short_help="Sample several models on the same prompts, rate the pieces, and write one table.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--out", type=FilePath(), required=True, help="Parquet file to write the table into.")
@click.option(
    "--kind", "prompts", cls=Renamed, old=["--prompts"], default="procedural", show_default=True,
    type=click.Choice(KINDS),
    help="What pieces start from: a random time signature and tempo (procedural), these and a first note, nothing "
    "(bos), or a time signature and tempo from a corpus (dataset).",
)  # fmt: skip
@click.option("--corpus", type=FilePath(), help="Folder written by `smart corpus build`, for --kind dataset.")
@click.option(
    "--split",
    default="test",
    show_default=True,
    type=click.Choice(SPLITS),
    help="Split of the corpus from which prompts or pieces are taken.",
)
@click.option(
    "-n", "--count", cls=Renamed, old=["--n"], default=1000, show_default=True, type=click.IntRange(min=1),
    help="Number of prompts, for each of which every model writes a piece.",
)  # fmt: skip
@click.option(
    "--seed",
    default=1,
    show_default=True,
    type=click.IntRange(0, 2**31 - 1),
    help="Seed of the prompts and of the sampling.",
)
@soundfont_option
@click.option(
    "--sample-rate", default=44100, show_default=True, type=click.IntRange(8000, 192_000),
    help="Sample rate of the audio in Hz.",
)  # fmt: skip
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(0, 600, min_open=True),
    help="Seconds to render and rate, from the beginning of each piece.",
)  # fmt: skip
@tokens_option
@temperature_option
@click.option(
    "--top-k", default=0, show_default=True, type=click.IntRange(min=0),
    help="Sample only from the K most likely tokens (0: from all).",
)  # fmt: skip
@click.option(
    "--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True),
    help="Sample only from the most likely tokens that together have this probability (1: from all).",
)  # fmt: skip
@click.option("--audio", type=FilePath(), help="Folder to save every piece in, as MIDI and WAV.")
@backend_option
@workers_option
@reward_options
@accept_option
def sample_command(**given: Any) -> None:
    """Sample a piece from each MODEL for the same prompts and seeds, rate the pieces, and write one table.

    A MODEL is a run (its tuned model), RUN@base, RUN@STEP, or a base's folder, shipped name or hub id. NAME=MODEL sets
    the name shown in tables. If interrupted, run the same command again to continue.
    """
    from smart.evaluate.sample import sample

    with in_one_line("the table", "run the same command again to continue", RenderError):
        sample(**given)


@main.command("report", short_help="Draw the paper's figures from such tables, run tests, and write an HTML page.")
@click.argument("tables", nargs=-1, type=FilePath(), metavar="TABLE...")
@click.option("--run", "runs", multiple=True, type=FilePath(), help="Tuning run whose reward to plot; repeatable.")
@click.option(
    "--corpus",
    type=FilePath(),
    help="Compare with this corpus: copies from its train split, distance of the features from all its pieces.",
)
@click.option("--out", required=True, type=FilePath(), help="Folder for the page, figures and numbers.")
@click.option(
    "--seed",
    default=1,
    show_default=True,
    type=click.IntRange(0, 2**31 - 1),
    help="Seed of the bootstrap that gives the intervals.",
)
@click.option(
    "--listen", default=2, show_default=True, type=click.IntRange(min=0), help="Number of prompts whose pieces to play."
)
@click.option(
    "--soundfont", default="timgm", show_default=True, help="Soundfont to play them with: short name or path."
)
def report_command(**given: Any) -> None:
    """Write a page of figures and statistics from TABLEs of `smart evaluate sample`, and from runs."""
    from smart.evaluate.report import report

    report(**given)


@main.command("rate", short_help="Rate audio and MIDI files, and compare silence and noise with the paper.")
@click.argument("files", nargs=-1, type=FilePath())
@reward_options
@click.option(
    "--soundfont", default="timgm", show_default=True, help="Soundfont that plays MIDI files: a short name or a path."
)
@click.option(
    "--sample-rate", default=44100, show_default=True, type=click.IntRange(8000, 192_000),
    help="Sample rate in Hz at which MIDI files are rendered.",
)  # fmt: skip
@click.option(
    "--seconds", default=3600.0, show_default=True, type=click.FloatRange(0, 3600, min_open=True),
    help="Seconds to rate at most, from the beginning of each file.",
)  # fmt: skip
@pedal_option
@backend_option
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**31 - 1),
    help="Seed of the ten seconds of white noise that are rated.",
)
@click.option("--out", type=FilePath(dir_okay=False), help="Also write the ratings to this CSV file.")
@click.option("--overwrite", is_flag=True, help="Replace the file --out if it exists.")
def rate_command(**given: Any) -> None:
    """Rate FILES (wav, flac, mp3, ogg, mid), silence and white noise, in windows of ten seconds."""
    from smart.evaluate.rate import rate_files

    rate_files(**given)


@main.command("rerate", short_help="Rate the stored completions of a run with any reward, without sampling again.")
@click.argument("run", type=FilePath(), metavar="RUN")
@reward_options
@click.option(
    "--soundfont", "soundfonts", multiple=True, metavar="SOUNDFONT",
    help="Soundfont to hear the completions through, short name or path; repeatable.  [default: those of the run]",
)  # fmt: skip
@click.option(
    "--iterations", default=20, show_default=True, type=click.IntRange(min=1),
    help="Iterations to rate at most, evenly spaced up to the last.",
)  # fmt: skip
@click.option(
    "--samples", default=0, show_default=True, type=click.IntRange(min=0),
    help="Completions of each iteration to rate, the first ones (0: all).",
)  # fmt: skip
@workers_option
@click.option(
    "--backend", type=click.Choice(["pool", "bank"]),
    help="Renderer: worker processes (pool), or sums of notes that were rendered in advance (bank).  "
    "[default: render.backend of the run]",
)  # fmt: skip
@click.option("--out", type=FilePath(), required=True, help="Folder for the ratings and the table.")
def rerate_command(**given: Any) -> None:
    """Rate the completions that a tuning RUN learnt from with any reward, without sampling again.

    If interrupted, run the same command again to continue.
    """
    from smart.evaluate.rerate import rerate

    with in_one_line("the report", "run the same command again to continue", RenderError):
        rerate(**given)


@main.command("soundfonts", short_help="Measure how ratings depend on the soundfont.")
@click.argument("files", nargs=-1)
@click.option(
    "--soundfonts", "given", multiple=True, required=True, metavar="SOUNDFONT...",
    help="Soundfonts to compare: short names or paths, as in --soundfonts timgm fluidr3.",
)  # fmt: skip
@click.option("--corpus", type=FilePath(), help="Corpus to take pieces from, instead of MIDI files.")
@click.option(
    "--split",
    default="train",
    show_default=True,
    type=click.Choice(SPLITS),
    help="Split of the corpus from which prompts or pieces are taken.",
)
@click.option(
    "-n", "--count", cls=Renamed, old=["--n"], default=10, show_default=True, type=click.IntRange(min=1),
    help="Number of pieces to take from the corpus.",
)  # fmt: skip
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1),
    help="Seed of the choice of pieces from the corpus.",
)  # fmt: skip
@reward_options
@pedal_option
@clip_options(most_seconds=3600)
@click.option("--out", type=FilePath(), required=True, help="Folder for the tables and the figure.")
def soundfonts_command(**given: Any) -> None:
    """Rate the same pieces with several soundfonts: MIDI FILES, or pieces from a corpus."""
    from smart.evaluate.soundfonts import compare_soundfonts

    compare_soundfonts(**given)


@main.command("hacks", short_help="Test whether a reward can be fooled by silence, noise or loops.")
@click.argument("files", nargs=-1, type=FilePath())
@reward_options
@click.option(
    "--soundfont", "names", multiple=True, metavar="SOUNDFONT",
    help="Soundfont, short name or path; repeatable. The first renders the probes, the others are compared with it.  "
    "[default: timgm, then every other installed soundfont with a short name]",
)  # fmt: skip
@click.option(
    "--model", default="piano", show_default=True, help="Model to sample pieces from if no MIDI FILES are given."
)
@click.option(
    "-n",
    "--count",
    default=24,
    show_default=True,
    type=click.IntRange(min=2),
    help="Number of pieces to sample from --model.",
)
@click.option(
    "--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1),
    help="Seed of the random probes and of the sampled pieces.",
)  # fmt: skip
@pedal_option
@clip_options(most_seconds=600)
@click.option("--out", type=FilePath(), required=True, help="Folder for the tables and the figure.")
def hacks_command(**given: Any) -> None:
    """Test whether a reward can be fooled: rate silence, noise, drones, loops and random notes next to the pieces.

    The pieces are MIDI FILES, or sampled from a model.
    """
    from smart.evaluate.hacks import run_probes

    run_probes(**given)


@main.command(
    "frontier", short_help="Plot reward, a second score and diversity against KL, over the checkpoints of runs."
)
@click.argument("runs", nargs=-1, required=True, type=FilePath(), metavar="RUN...")
@click.option("--out", type=FilePath(), required=True, help="Folder for the report: new, or one to continue.")
@click.option(
    "-n", "--count", "prompts", cls=Renamed, old=["--n"], default=128, show_default=True, type=click.IntRange(min=2),
    help="Number of held-out prompts for which pieces are sampled.",
)  # fmt: skip
@click.option(
    "--samples",
    default=2,
    show_default=True,
    type=click.IntRange(1, BLOCK),
    help="Number of pieces per prompt and checkpoint.",
)
@click.option(
    "--checkpoints", default=10, show_default=True, type=click.IntRange(min=1),
    help="Checkpoints to measure per run at most, evenly spaced up to the last.",
)  # fmt: skip
@click.option(
    "--best-of", default=16, show_default=True, type=click.IntRange(1, BLOCK),
    help="Pieces per prompt from the base, for best-of-n.",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(["pool", "bank"]),
    help="Renderer: worker processes (pool), or sums of notes that were rendered in advance (bank).  "
    "[default: render.backend of the run]",
)  # fmt: skip
@click.option("--judge", metavar="KIND", help="Reward to use as the judge.  [default: guard.judge of the run]")
@click.option(
    "--seed", default=2, show_default=True, type=click.IntRange(0, 2**31 - 1),
    help="Seed of the prompts, the sampling and the bootstrap.",
)  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where models and rewards run; auto: on CUDA if available; mps: on an Apple GPU (experimental).",
)  # fmt: skip
@accept_option
def frontier_command(**given: Any) -> None:
    """Plot reward, a judge's score and diversity against KL to the base, over the checkpoints of each tuning RUN.

    The judge is a second score that training does not optimise. If interrupted, run the same command again to continue.
    """
    from smart.evaluate.frontier import report

    with in_one_line("the report", "run the same command again to continue", RenderError):
        report(**given)
