"""The command line of ``smart demo``; what makes the page is imported when it is called."""

from typing import Any

import click

from smart import FilePath, Renamed
from smart.prompts import KINDS
from smart.render import RenderError
from smart.run import backend_option, in_one_line, soundfont_option, temperature_option, tokens_option, workers_option


@click.command()
@click.option(
    "--runs",
    nargs=2,
    metavar="FIRST SECOND",
    help="The two models to compare: run folders, RUN@base, RUN@STEP, or bases; NAME=MODEL sets the name shown.",
)
@click.option(
    "--section",
    "sections",
    nargs=3,
    multiple=True,
    metavar="TITLE FIRST SECOND",
    help="Two models to compare in a section with this title; repeatable, instead of --runs.",
)
@click.option("--out", type=FilePath(), required=True, help="HTML file to write the page into.")
@click.option("--overwrite", is_flag=True, help="Replace the file --out if it exists.")
@click.option("--title", default="Before and after tuning", show_default=True, help="Title that the page shows on top.")
@click.option(
    "-n", "--count", cls=Renamed, old=["--prompts"], default=15, show_default=True, type=click.IntRange(min=1),
    help="Number of pairs in each section.",
)  # fmt: skip
@click.option(
    "--kind", default="run", show_default=True, type=click.Choice(["run", *KINDS]),
    help="Kind of prompts; run: the kind that SECOND was tuned on, or procedural if it is a base.",
)  # fmt: skip
@click.option(
    "--corpus",
    type=FilePath(),
    help="Corpus whose test split gives dataset prompts.  [default: the run's]",
)
@click.option(
    "--steps", "wanted", default="", metavar="all|N,N,...", help="Add a slider over these checkpoints of SECOND."
)
@click.option(
    "--seed",
    default=1,
    show_default=True,
    type=click.IntRange(0, 2**31 - 1),
    help="Seed of the prompts and of the sampling.",
)
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
@click.option(
    "--reward", "rated_by", default="ce_proxy", show_default=True, help="Kind of reward whose ratings the page shows."
)
@click.option(
    "--reward-option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option that is passed to the reward (repeatable).",
)
@soundfont_option
@click.option(
    "--sample-rate", default=44100, show_default=True, type=click.IntRange(8000, 48000),
    help="Sample rate of the audio in Hz.",
)  # fmt: skip
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(0, 600, min_open=True),
    help="Seconds to render, from the beginning of each piece.",
)  # fmt: skip
@backend_option
@workers_option
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where models and rewards run; auto: on CUDA if available; mps: on an Apple GPU (experimental).",
)  # fmt: skip
def main(**options: Any) -> None:
    """Make a page that compares two models pair by pair: audio, piano rolls, ratings, blind listening."""
    from smart.demo.build import build

    with in_one_line("the page", "nothing was written", RenderError):
        build(**options)
