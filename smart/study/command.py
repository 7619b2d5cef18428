"""The command line of ``smart study``; what a command does is imported when it is called."""

from typing import Any

import click

from smart import FilePath, Group, Renamed
from smart.run import accept_option, backend_option, soundfont_option, temperature_option, tokens_option, workers_option
from smart.study.loudness import TARGET
from smart.study.ratings import HIGH, LOW


@click.group(cls=Group)
def main() -> None:
    """Run a listening study: build it, serve it, export and analyse its ratings."""


@main.command("build", short_help="Build a study: loudness-matched excerpts of several systems, under anonymous names.")
@click.option(
    "--runs",
    multiple=True,
    required=True,
    metavar="SYSTEM ...",
    help="Systems to compare, one after another; NAME=PATH names one.",
)
@click.argument("more", nargs=-1, metavar="")
@click.option("--out", required=True, type=FilePath(), help="Folder for the study; must not exist yet.")
@click.option(
    "-n", "--count", "prompts", cls=Renamed, old=["--prompts"], default=15, show_default=True,
    type=click.IntRange(min=1), help="Number of rated excerpts per system.",
)  # fmt: skip
@click.option(
    "--practice",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="Number of practice items per participant, which are not exported.",
)
@click.option(
    "--repeats",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Excerpts that each participant hears a second time.",
)
@click.option(
    "--silence", is_flag=True, help="Add one silent excerpt, to detect participants who rate without listening."
)
@click.option(
    "--seconds",
    default=10.0,
    show_default=True,
    type=click.FloatRange(min=0.1, max=600),
    help="Length of an excerpt in seconds.",
)
@click.option(
    "--sample-rate",
    default=44100,
    show_default=True,
    type=click.IntRange(min=8000, max=192000),
    help="Sample rate of the excerpts in Hz.",
)
@click.option(
    "--lufs",
    default=TARGET,
    show_default=True,
    type=click.FloatRange(max=-5),
    help="Loudness to which all excerpts are brought, in LUFS.",
)
@click.option(
    "--seed", default=1, show_default=True, type=click.IntRange(min=0), help="Seed of the prompts and of the sampling."
)
@click.option(
    "--listeners",
    default=20,
    show_default=True,
    type=click.IntRange(min=3),
    help="Planned number of participants (for the power estimate).",
)
@click.option(
    "--power",
    default=100,
    show_default=True,
    type=click.IntRange(min=0),
    help="Studies simulated for the power estimate (0: none).",
)
@click.option("--completion-code", is_flag=True, help="Show a personal code to each participant who finishes.")
@click.option(
    "--corpus",
    type=FilePath(),
    help="Corpus whose test split the prompts come from (default: procedural prompts).",
)
@soundfont_option
@tokens_option
@temperature_option
@backend_option
@workers_option
@accept_option
def build_command(**given: Any) -> None:
    """Build a study. A SYSTEM is a run's folder, a model's folder or shipped name, or a folder of WAV files."""
    from smart.study.build import build_study

    build_study(**given)


@main.command("serve", short_help="Serve a study's pages and store the ratings.")
@click.argument("folder", type=FilePath())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on (0.0.0.0: all interfaces).")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on (0: any free one).",
)
@click.option(
    "--database", metavar="URL", envvar="SMART_STUDY_DATABASE", help="Database URL (default: an SQLite file in FOLDER)."
)
@click.option("--open", "open_enrolment", is_flag=True, help="Let anyone take part, via /join.")
@click.option("--new-admin-token", is_flag=True, help="Create a new admin token; the old one stops working.")
def serve_command(**given: Any) -> None:
    """Serve the pages of the study in FOLDER until Ctrl-C or SIGTERM; open requests are finished first."""
    from smart.study.serve import serve

    serve(**given)


@main.command("invite", short_help="Create links for participants.")
@click.argument("folder", type=FilePath())
@click.option(
    "-n",
    "--count",
    default=1,
    show_default=True,
    type=click.IntRange(1, 10000),
    help="Number of links, one per participant.",
)
@click.option(
    "--address", default="http://127.0.0.1:8000", show_default=True, help="Server address to use in the links."
)
@click.option(
    "--database", metavar="URL", envvar="SMART_STUDY_DATABASE", help="Database URL (default: an SQLite file in FOLDER)."
)
def invite_command(**given: Any) -> None:
    """Create links for participants of the study in FOLDER and print them, one per line."""
    from smart.study.invite import invite

    invite(**given)


@main.command("export", short_help="Write the ratings to a CSV file, one row per rating.")
@click.argument("folder", type=FilePath())
@click.option(
    "--database", metavar="URL", envvar="SMART_STUDY_DATABASE", help="Database URL (default: an SQLite file in FOLDER)."
)
@click.option("--out", required=True, type=FilePath(), help="CSV file to write the ratings into.")
@click.option("--overwrite", is_flag=True, help="Replace the file --out if it exists.")
def export_command(**given: Any) -> None:
    """Write the ratings of the study in FOLDER to a CSV file, one row per rating."""
    from smart.study.export import export

    export(**given)


@main.command(
    "analyse",
    short_help="Analyse the ratings: exclusions, mixed models, intervals, figures.",
    context_settings={"show_default": True},
)
@click.argument("ratings", type=FilePath())
@click.option("--out", required=True, type=FilePath(), help="Folder for the report, tables and figure.")
@click.option(
    "--study",
    "folder",
    type=FilePath(),
    help="Folder of the study, for its silent excerpts and the length of an excerpt.",
)
@click.option(
    "--reference", metavar="SYSTEM", help='System to compare the others with (default: "base", else the first by name).'
)
@click.option(
    "--silence-max",
    default=3.0,
    type=click.FloatRange(LOW, HIGH),
    help="Exclude participants who rate silence higher than this.",
)
@click.option(
    "--repeat-max",
    default=3.0,
    type=click.FloatRange(0),
    help="Exclude participants whose second ratings differ by more than this on average.",
)
@click.option(
    "--listened-min",
    default=0.8,
    type=click.FloatRange(0, 1),
    help="Exclude ratings if less than this share of the excerpt was heard.",
)
@click.option(
    "--seconds",
    default=10.0,
    type=click.FloatRange(0, min_open=True),
    help="Length of an excerpt in seconds, if there is no --study.",
)
@click.option(
    "--silent", multiple=True, metavar="EXCERPT", help="Name of an excerpt that is silent, in the table (repeatable)."
)
@click.option(
    "--bootstrap",
    "replicates",
    default=200,
    type=click.IntRange(0),
    help="Refits for the intervals of the variances (0: no intervals).",
)
@click.option("--seed", default=1, type=click.IntRange(0), help="Seed of the bootstrap that gives the intervals.")
@click.option("--overwrite", is_flag=True, help="Replace the report of an earlier analysis in --out.")
def analyse_command(**given: Any) -> None:
    """Analyse RATINGS, a CSV file from "smart study export"."""
    from smart.study.analyse import report

    report(**given)


@main.command(
    "power",
    short_help="Simulate how likely a study of a given size is to find an effect.",
    context_settings={"show_default": True},
)
@click.option(
    "--listeners", default=14, type=click.IntRange(3), help="Planned number of listeners; others are shown too."
)
@click.option(
    "-n",
    "--count",
    "prompts",
    cls=Renamed,
    old=["--prompts"],
    default=15,
    type=click.IntRange(2),
    help="Number of prompts; each listener rates two excerpts per prompt.",
)
@click.option("--effect", default=1.221, help="Difference between the systems' mean ratings, in points of the scale.")
@click.option("--intercept", default=4.075, help="Mean rating of the reference (matters only with --rounded).")
@click.option(
    "--intercept-variance", default=0.830, type=click.FloatRange(0), help="Variance of participants' mean ratings."
)
@click.option(
    "--slope-variance", default=0.752, type=click.FloatRange(0), help="Variance of the effect between participants."
)
@click.option(
    "--correlation",
    default=0.488,
    type=click.FloatRange(-1, 1),
    help="Correlation of participants' mean ratings and effects.",
)
@click.option(
    "--residual-variance",
    default=4.194,
    type=click.FloatRange(0, min_open=True),
    help="Residual variance of single ratings.",
)
@click.option(
    "--excerpt-variance",
    default=0.0,
    type=click.FloatRange(0),
    help="Part of the residual variance that is due to excerpts.",
)
@click.option("--rounded", is_flag=True, help="Round and clip the ratings to 1, 2, ..., 10.")
@click.option(
    "--studies",
    default=200,
    type=click.IntRange(20),
    help="Number of studies that are simulated for each number of listeners.",
)
@click.option("--seed", default=1, type=click.IntRange(0), help="Seed of the simulated ratings.")
@click.option("--only", is_flag=True, help="Simulate only the planned number of listeners.")
@click.option("--out", type=FilePath(), help="Folder to write power.csv and the figure into.")
def power_command(**given: Any) -> None:
    """Simulate studies of different sizes, by default with the variances of the paper's Table 5."""
    from smart.study.power import compare_sizes

    compare_sizes(**given)
