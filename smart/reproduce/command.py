"""The whole paper in one command: ``python -m smart.reproduce --config paper.toml --corpus FOLDER --out FOLDER``.

It runs the other programs one after another, each in its own process: a check of the base, the tuning of section 3.5,
the longer runs of section 5.2, the dataset prompts of section 5.3, then every table and figure. Finally it writes
``index.html``, which puts the paper's numbers next to those measured here. ``--smoke`` does all of this at a tiny size,
offline and in minutes, with what the package ships: it shows that everything works, and says nothing about music.

Each step has its own folder in OUT. A step is finished when its process has succeeded and its outputs are listed in
``state.json`` with their SHA-256. It is repeated if its command, a configuration that it reads, or the output of an
earlier step has changed; its old outputs are moved to ``replaced/``. After a failure, Ctrl-C or SIGKILL at any time the
same command continues: it skips finished steps and resumes an unfinished one where its program can.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from smart import FilePath, UserError
from smart.config import Config, dumps, load
from smart.files import write_atomically
from smart.published import TABLE_2
from smart.reproduce.book import OUT, STATE, Book, Step, _clock, hold_out, perform
from smart.reproduce.page import write_page
from smart.reproduce.steps import CONFIGS, SMOKE, drop_checkpoints, each_alone, find, plan, retune, variants
from smart.run import in_one_line


@click.command()
@click.option("--config", "path", help="Config file (TOML), or the name of a shipped one.  [default: paper.toml]")
@click.option("--out", type=FilePath(), required=True, help="Output folder: a new one, or one to continue.")
@click.option(
    "--corpus",
    type=FilePath(),
    help="Corpus for dataset prompts: a folder written by smart corpus build.",
)
@click.option(
    "--recording",
    "recordings",
    multiple=True,
    type=FilePath(),
    help="Recording to rate for table 1 (repeatable).",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Set one key of the configuration of all runs to another value (repeatable).",
)
@click.option(
    "--smoke", is_flag=True, help="Run everything at a tiny size, offline and in minutes, with what the package ships."
)
@click.option(
    "--each-reward",
    is_flag=True,
    help="Also tune with each of the configuration's rewards alone, with and without the KL term, and compare.",
)
@click.option("--list", "listing", is_flag=True, help="List the steps and everything that is missing, then exit.")
def main(
    path: str | None,
    out: Path,
    corpus: Path | None,
    recordings: tuple[Path, ...],
    overrides: tuple[str, ...],
    smoke: bool,
    each_reward: bool,
    listing: bool,
) -> None:
    """Run every experiment of the paper into one folder, with a page that compares the results."""
    if smoke and (path is not None or corpus is not None):
        raise click.UsageError("--smoke brings its own configuration and corpus: leave out --config and --corpus")
    config: Config = load("quickstart.toml", (*SMOKE, *overrides)) if smoke else load(path or "paper.toml", overrides)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder="runs"))
    fonts = [config.render.fonts[0]] if smoke else list(TABLE_2)
    try:
        found = find(config, corpus, fonts, recordings, smoke=smoke)
    except UserError as error:
        if not listing:
            raise
        found, problem = None, error.message
    where = None if smoke else corpus or Path("CORPUS")
    checksums = found.checksums() if found else ""
    steps = plan(config, where, fonts, recordings, checksums, each_reward=each_reward)
    if listing:
        _list(steps, out)
        click.echo("All requirements found." if found else problem)
        return
    assert found is not None
    book = Book(out)
    with in_one_line("the reproduction", "run the same command again to continue"), hold_out(out) as lock:
        (out / CONFIGS).mkdir(exist_ok=True)
        runs = variants(config, str(corpus) if corpus else str(out / "corpus"))
        for name, one in (runs | (each_alone(config) if each_reward else {})).items():
            write_atomically(out / CONFIGS / f"{name}.toml", dumps(one).encode())
        if smoke:
            retune(steps, book)
        perform(steps, out, book, lock)
        page = write_page(steps, out, book, config, found, smoke=smoke)
        if smoke:
            drop_checkpoints(out)
    total = sum(book.rows[step.name]["seconds"] for step in steps)
    click.echo(f"all {len(steps)} steps are done, in {_clock(total)}; see {page}")


def _list(steps: Sequence[Step], out: Path) -> None:
    book = Book(out) if (out / STATE).is_file() else None
    for place, step in enumerate(steps, 1):
        state = "to do"
        if book is not None:
            state = "done" if book.is_done(step) else "begun" if book.was_begun(step) else state
        words = shlex.join([sys.executable, "-m", *(word.replace(OUT, str(out)) for word in step.words)])
        click.echo(f"[{place:2}/{len(steps)}] {step.name}: {step.title} ({state})\n        {words}")
