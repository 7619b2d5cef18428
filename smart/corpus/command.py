"""The command line of ``smart corpus``: ``build`` and ``stats``."""

import sqlite3
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from smart import FilePath, Group, UserError
from smart.cores import usable_cores
from smart.corpus.build import build, check_list
from smart.corpus.midi import BARS, Limits, Reading
from smart.corpus.shards import SPLITS, Corpus
from smart.corpus.state import DAMAGED
from smart.corpus.stats import check_picture, describe, measure, plot
from smart.run import in_one_line, pedal_option
from smart.tokens import build_tokenizer, load_tokenizer


@click.group(cls=Group)
def main() -> None:
    """Turn folders of MIDI files into a tokenised corpus, and show what a corpus holds."""


def _limit_options(command: Any) -> Any:
    """One option for each field of ``Limits``."""
    for limit in reversed(fields(Limits)):
        kind = click.IntRange(min=0) if isinstance(limit.default, int) else click.FloatRange(min=0)
        name = f"--{limit.name.replace('_', '-')}"
        command = click.option(name, default=limit.default, show_default=True, type=kind, help=limit.metadata["help"])(
            command
        )
    return command


FOLDER = FilePath()


@main.command("build")
@click.option(
    "--midi", "folders", multiple=True, required=True, type=FOLDER, help="Folder to search for MIDI files; repeatable."
)
@click.option("--out", required=True, type=FOLDER, help="Folder for the corpus, new or unfinished.")
@click.option(
    "--workers",
    default=usable_cores(),
    show_default="one per core",
    type=click.IntRange(min=1),
    help="Number of processes that read files.",
)
@click.option(
    "--instruments",
    default="piano",
    type=click.Choice(["piano", "all"]),
    show_default=True,
    help="Tracks to keep: those of a piano, merged into one, or all.",
)
@click.option("--tokenizer", help="A tokenizer.json, a folder with one, or a hub id; replaces --instruments.")
@click.option("--include", multiple=True, help="Glob of FOLDER-NAME/PATH; only matching files are read; repeatable.")
@click.option(
    "--list", "listed", type=FOLDER, help="Text file with one FOLDER-NAME/PATH per line; only these are read."
)
@click.option("--skip-missing", is_flag=True, help="Leave out lines of --list that name no file, instead of refusing.")
@pedal_option
@click.option(
    "--bars",
    default="written",
    type=click.Choice(BARS),
    show_default=True,
    help="Keep bar lines as written, or find the beat of files whose bar lines do not follow it (performances).",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing corpus or unfinished build.")
@_limit_options
def build_command(
    folders: tuple[Path, ...],
    out: Path,
    workers: int,
    instruments: str,
    tokenizer: str | None,
    include: tuple[str, ...],
    listed: Path | None,
    skip_missing: bool,
    pedal: bool,
    bars: str,
    overwrite: bool,
    **limits: Any,
) -> None:
    """Tokenise the MIDI files under the --midi folders. Run again after an interruption, it continues."""
    only = None
    if listed is not None:
        try:
            lines = listed.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--list {listed}: cannot be read ({error})") from None
        only = check_list(lines, folders, skip_missing=skip_missing)
    try:
        # SQLite's error for a full disk is not an OSError
        with in_one_line("the corpus", "run the same command again to continue", sqlite3.OperationalError):
            summary = build(
                folders,
                out,
                workers=workers,
                tokenizer=load_tokenizer(tokenizer) if tokenizer else build_tokenizer(instruments),
                limits=Limits(**limits),
                reading=Reading(pedal, bars),
                include=include,
                listed=only,
                overwrite=overwrite,
            )
    except sqlite3.DatabaseError as error:
        raise UserError(f"--out {out}: {DAMAGED} ({error}); start again with --overwrite") from None
    for reason, number in summary.counts.items():
        click.echo(f"{reason:30}{number:>12,}")
    for kind, number in summary.remarks.items():
        click.echo(f"  {kind} in {number:,} of the kept (pieces.csv)")
    click.echo(f"{'split':30}{'pieces':>12}{'tokens':>16}")
    for split in SPLITS:
        click.echo(f"  {split:28}{summary.pieces[split]:>12,}{summary.tokens[split]:>16,}")
    if summary.pedalled:
        click.echo(
            f"the pedal lengthens notes in {summary.pedalled:,} pieces, to {summary.stretch:.2f} times on average"
        )
    if bars != "written":
        click.echo("bar lines: " + ", ".join(f"{number:,} {how}" for how, number in sorted(summary.placed.items())))
    rate = summary.read / summary.seconds
    click.echo(f"{summary.read:,} files read in {summary.seconds:.1f} s, {rate:.1f} files/s -> {out}")


@main.command("stats")
@click.argument("folder", type=FOLDER)
@click.option(
    "--plot", "picture", type=FOLDER, help="File for the plot, such as .png or .pdf (default: stats.png in the corpus)."
)
def stats_command(folder: Path, picture: Path | None) -> None:
    """Check every byte of a corpus, then print and plot its statistics."""
    picture = picture or folder / "stats.png"
    check_picture(picture)
    corpus = Corpus(folder, verify=True)
    stats = measure(corpus)
    click.echo(describe(corpus, stats))
    with in_one_line("the plot", "choose another file with --plot"):
        plot(corpus, stats, picture)
    click.echo(f"plotted in {picture}")
