"""A page to listen to: pairs from two models for the same prompts and seeds, in one HTML file that needs nothing else.

    python -m smart.demo --runs runs/quickstart@base runs/quickstart --out page.html

The pieces are not chosen: they are those of prompts 0 to n-1 of the seed, whatever became of them.
"""

import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from smart import UserError, require
from smart.demo.page import Page, Section
from smart.files import parse_toml, sha256, write_atomically
from smart.model import pick_device
from smart.prompts import KINDS
from smart.render import RenderError, check_soundfont, find_soundfont
from smart.reward import load_reward, read_options
from smart.rollout import System, compose, find_system
from smart.run import CONFIG, check_packages, in_one_line, progress
from smart.run.checkpoint import steps
from smart.tokens import load_tokenizer

LARGE = 25_000_000  # bytes; a page above is announced
TOGETHER = 16  # prompts that are drawn at once, however many are asked for: their number changes rounding
WEIGHTS = "model.safetensors"


@click.command()
@click.option(
    "--runs",
    nargs=2,
    metavar="FIRST SECOND",
    help="The two to compare: run folders, RUN@base, RUN@STEP, bases; NAME=... names one.",
)
@click.option(
    "--section",
    "sections",
    nargs=3,
    multiple=True,
    metavar="TITLE FIRST SECOND",
    help="Pairs under a title of their own; repeat it.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The HTML file to write.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--title", default="Before and after tuning", show_default=True)
@click.option(
    "--prompts", "count", default=15, show_default=True, type=click.IntRange(min=1), help="Pairs of a section."
)
@click.option(
    "--kind", default="run", show_default=True, type=click.Choice(["run", *KINDS]),
    help="Of prompts; run: as the second model was tuned on, or procedural for a base.",
)  # fmt: skip
@click.option("--corpus", type=click.Path(path_type=Path), help="For dataset prompts: its test split. [the run's]")
@click.option("--steps", "wanted", default="", metavar="all|N,N,...", help="Checkpoints of SECOND for a slider.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option(
    "--tokens", default=256, show_default=True, type=click.IntRange(min=1), help="New tokens of each piece, at most."
)
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0, 100, min_open=True))
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(min=0), help="0: all tokens.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--reward", "rated_by", default="ce_proxy", show_default=True, help="Rates the pieces.")
@click.option("--reward-option", "options", multiple=True, metavar="KEY=VALUE", help="Of the reward; repeat it.")
@click.option("--soundfont", default="timgm", show_default=True, help="A short name or a file.")
@click.option("--sample-rate", default=44100, show_default=True, type=click.IntRange(8000, 48000), help="Hz.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0, 600, min_open=True))
@click.option("--workers", default=0, show_default=True, type=click.IntRange(min=0), help="That render; 0: one a core.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def main(**options: Any) -> None:
    """Make a page of pairs from two models: audio, piano rolls, ratings, blind listening."""
    with in_one_line("the page", "nothing was written", RenderError):
        demo(**options)


def demo(
    *,
    runs: tuple[str, str] | None,
    sections: Sequence[tuple[str, str, str]],
    out: Path,
    overwrite: bool,
    title: str,
    count: int,
    kind: str,
    corpus: Path | None,
    wanted: str,
    seed: int,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    rated_by: str,
    options: Sequence[str],
    soundfont: str,
    sample_rate: int,
    seconds: float,
    workers: int,
    device: str,
) -> None:
    """Write the page: see the command's help. Raises ``UserError`` for what the user can mend."""
    if bool(runs) == bool(sections):
        raise UserError(
            "give what to compare either as --runs FIRST SECOND, or as one or more --section TITLE FIRST SECOND"
        )
    if out.is_dir() or (out.exists() and not overwrite):
        what = "is a folder" if out.is_dir() else "exists already; replace it with --overwrite"
        raise UserError(f"--out {out}: {what}, or give another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    asked = [("Pairs", *runs)] if runs else list(sections)

    def sound() -> Path:
        path = find_soundfont(soundfont)
        check_soundfont(path)
        return path

    def pairs() -> list[Section]:
        return [_section(name, first, second, wanted, kind, corpus) for name, first, second in asked]

    font, chosen, reward, *_ = require(
        sound,
        pairs,
        lambda: load_reward(rated_by, device=pick_device(device), **read_options(options)),
        check_packages,
    )
    page = Page(reward, sample_rate)
    total = count * sum(1 + len(section.others) for section in chosen)
    with progress(total=total, unit="piece") as bar:
        for section in chosen:
            page.add_section(section)
            names = {number: token for token, number in load_tokenizer(section.first.model).vocab.items()}
            for piece in compose(
                [section.first, *section.others],
                prompts=section.kind,
                corpus=section.corpus,
                split="test",
                count=count,
                seed=seed,
                soundfont=font,
                rewards=(),  # the page rates the audio that it holds
                max_new_tokens=tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seconds=seconds,
                sample_rate=sample_rate,
                workers=workers,
                device=device,
                batch=TOGETHER,
            ):
                page.add(piece, " ".join(names[token] for token in piece.tokens[: piece.prompt_length]))
                bar.update()
    rule = [
        f"Nothing here was chosen by ear or by rating: the prompts are numbers 0 to {count - 1} of seed {seed}, one "
        "piece for each model and prompt, drawn once. Pieces that are silent or could not be rendered are shown too.",
        "Both pieces of a pair were written from the same prompt with the same random numbers.",
        "The ratings are of exactly the audio that you hear: rendered in stereo, rounded to 16 bits, kept without loss "
        "as FLAC. The reward rates the mean of its two channels.",
    ]
    settings = {
        "Seed": seed,
        "Sampling": f"up to {tokens} new tokens, temperature {temperature:g}, top-k {top_k or 'off'}, top-p {top_p:g}",
        "Rendering": f"{sample_rate} Hz, stereo, {seconds:g} s at most, divided by its peak, 16 bits",
        "Soundfont": f"{font.name}, SHA-256 {sha256(font)}",
        "Reward": reward.provenance,
        "Made by": f"smart {version('smart')}, {_commit()}",
    }
    text = page.html(title=title, rule=rule, facts=settings, models=_models(chosen), configs=_configs(chosen)).encode()
    write_atomically(out, text)
    click.echo(f"{out}: {total} pieces in {len(text) / 1e6:.1f} MB")
    if len(text) > LARGE:
        click.echo(
            f"it has more than {LARGE / 1e6:.0f} MB: fewer --prompts, --steps or --seconds make it smaller", err=True
        )


def _section(title: str, first: str, second: str, wanted: str, kind: str, corpus: Path | None) -> Section:
    """Find the two models, the checkpoints before the second, and the prompts that it was tuned on."""
    one, two = find_system(first), find_system(second)
    others = [*_checkpoints(two, wanted), two] if wanted else [two]
    names = [system.name for system in (one, *others)]
    if len(set(names)) < len(names):
        raise UserError(f"{first} and {second}: both are called {names[-1]}; name one, as in other={second}")
    tuned_on: dict[str, Any] = {}
    if kind == "run" and two.run is not None:
        tuned_on = parse_toml((two.run / CONFIG).read_text(encoding="utf-8")).get("prompts", {})
    kind = tuned_on.get("kind", "procedural") if kind == "run" else kind
    if kind != "dataset":
        return Section(title, one, others, kind, None)
    folder = corpus or (Path(tuned_on["corpus"]) if tuned_on.get("corpus") else None)
    if folder is None:
        raise UserError(
            f"{title}: dataset prompts need pieces: give a folder written by `smart corpus build` as --corpus"
        )
    return Section(title, one, others, kind, folder)


def _checkpoints(system: System, wanted: str) -> list[System]:
    """The checkpoints of a run that ``wanted`` names, without those whose weights are the system's own."""
    there = steps(system.run / "checkpoints") if system.run is not None else []
    known = f"it has {', '.join(map(str, there))}" if there else "it has no checkpoints"
    try:
        numbers = there if wanted == "all" else sorted({int(word) for word in wanted.split(",")})
    except ValueError:
        raise UserError(f"--steps {wanted}: expected all, or numbers such as 50,100") from None
    missing = [number for number in numbers if number not in there]
    if missing or not numbers:
        raise UserError(f"--steps {wanted}: {system.name} has no checkpoint {missing[0] if missing else ''}: {known}")
    own = sha256(system.model / WEIGHTS)
    found = [find_system(f"{system.run}@{step}")._replace(name=f"{system.name} at {step}") for step in numbers]
    return [checkpoint for checkpoint in found if sha256(checkpoint.model / WEIGHTS) != own]


def _systems(sections: Sequence[Section]) -> list[System]:
    return list(dict.fromkeys(system for section in sections for system in (section.first, *section.others)))


def _models(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """What the page says about each model."""
    return [
        {"name": system.name, "step": system.step, "path": _shown(system), "sha256": sha256(system.model / WEIGHTS)}
        for system in _systems(sections)
    ]


def _shown(system: System) -> str:
    """Where a model is, without the folders around its run: a page may be published."""
    if system.run is not None and system.model.is_relative_to(system.run.parent):
        return str(system.model.relative_to(system.run.parent))
    return system.model.name


def _configs(sections: Sequence[Section]) -> dict[str, str]:
    """The configuration of every run that made a model of the page."""
    runs = dict.fromkeys(system.run for system in _systems(sections) if system.run is not None)
    return {run.name: (run / CONFIG).read_text(encoding="utf-8") for run in runs}


def _commit() -> str:
    """The commit that this package is at, where it lies in a git repository of its own."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment within another repository is not it
        changed = git("status", "--porcelain", "--", "..")
        return f"commit {git('rev-parse', 'HEAD')}{' with changes' if changed else ''}"
    except (OSError, subprocess.SubprocessError):
        return "no commit known"
