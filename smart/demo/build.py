"""Pairs of pieces by two models, for the same prompts and seeds, sampled and rendered for one page.

The pieces are not hand-picked: the page shows prompts 0 to n-1 of the seed, however they turned out.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from smart import UserError, __version__, require
from smart.demo.page import Page, Section
from smart.files import parse_toml, sha256, write_atomically
from smart.model import pick_device
from smart.render import checked_soundfont
from smart.reward import load_reward, read_options
from smart.rollout import System, compose, find_system
from smart.run import CONFIG, check_packages, progress
from smart.run.checkpoint import steps
from smart.tokens import load_tokenizer

LARGE = 25_000_000  # bytes; above this the command suggests a smaller page
TOGETHER = 16  # prompts sampled at once; fixed, because the batch size affects rounding
WEIGHTS = "model.safetensors"


def build(
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
    backend: str,
    workers: int,
    device: str,
) -> None:
    """Write the page ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if bool(runs) == bool(sections):
        raise UserError(
            "give the models to compare: either --runs FIRST SECOND, or one or more --section TITLE FIRST SECOND"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; choose another file")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} already exists; choose another file, or replace it with --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    asked = [("Pairs", *runs)] if runs else list(sections)

    def pairs() -> list[Section]:
        return [_section(name, first, second, wanted, kind, corpus) for name, first, second in asked]

    font, chosen, reward, *_ = require(
        lambda: checked_soundfont(soundfont),
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
                rewards=(),  # the page rates its own 16-bit audio
                max_new_tokens=tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seconds=seconds,
                sample_rate=sample_rate,
                workers=workers,
                backend=backend,
                device=device,
                batch=TOGETHER,
            ):
                page.add(piece, " ".join(names[token] for token in piece.tokens[: piece.prompt_length]))
                bar.update()
    rule = [
        f"Nothing here was selected by ear or by rating: the prompts are numbers 0 to {count - 1} of seed {seed}, with "
        "one piece per model and prompt, sampled once. Silent pieces and pieces that failed to render are shown too.",
        "The two pieces of a pair were sampled from the same prompt with the same random numbers.",
        "The ratings are of exactly the audio that you hear: rendered in stereo, rounded to 16 bits, stored losslessly "
        "as FLAC. The reward rates the mean of the two channels.",
    ]
    settings = {
        "Seed": seed,
        "Sampling": f"up to {tokens} new tokens, temperature {temperature:g}, top-k {top_k or 'off'}, top-p {top_p:g}",
        "Rendering": f"{sample_rate} Hz, stereo, at most {seconds:g} s, peak-normalised, 16 bits",
        "Soundfont": f"{font.name}, SHA-256 {sha256(font)}",
        "Reward": reward.provenance,
        "Made by": f"smart {__version__}, {_commit()}",
    }
    text = page.html(title=title, rule=rule, facts=settings, models=_models(chosen), configs=_configs(chosen)).encode()
    write_atomically(out, text)
    click.echo(f"{out}: {total} pieces in {len(text) / 1e6:.1f} MB")
    if len(text) > LARGE:
        click.echo(
            f"The page is larger than {LARGE / 1e6:.0f} MB; use fewer --prompts, --steps or --seconds to shrink it.",
            err=True,
        )


def _section(title: str, first: str, second: str, wanted: str, kind: str, corpus: Path | None) -> Section:
    """Find the two models, the checkpoints of the second, and the kind of prompts that it was tuned on."""
    one, two = find_system(first), find_system(second)
    others = [*_checkpoints(two, wanted), two] if wanted else [two]
    names = [system.name for system in (one, *others)]
    if len(set(names)) < len(names):
        raise UserError(f"{first} and {second}: both are called {names[-1]}; rename one, as in other={second}")
    tuned_on: dict[str, Any] = {}
    if kind == "run" and two.run is not None:
        tuned_on = parse_toml((two.run / CONFIG).read_text(encoding="utf-8-sig")).get("prompts", {})
    kind = tuned_on.get("kind", "procedural") if kind == "run" else kind
    if kind != "dataset":
        return Section(title, one, others, kind, None)
    folder = corpus or (Path(tuned_on["corpus"]) if tuned_on.get("corpus") else None)
    if folder is None:
        raise UserError(
            f"{title}: dataset prompts need a corpus; give a folder written by `smart corpus build` as --corpus"
        )
    return Section(title, one, others, kind, folder)


def _checkpoints(system: System, wanted: str) -> list[System]:
    """The checkpoints of a run that ``wanted`` lists, without those with the same weights as the system itself."""
    there = steps(system.run / "checkpoints") if system.run is not None else []
    try:
        numbers = there if wanted == "all" else sorted({int(word) for word in wanted.split(",")})
    except ValueError:
        raise UserError(f"--steps {wanted}: expected all, or step numbers such as 50,100") from None
    if not there:
        raise UserError(f"--steps {wanted}: {system.name} has no checkpoints")
    missing = [number for number in numbers if number not in there]
    if missing:
        raise UserError(
            f"--steps {wanted}: {system.name} has no checkpoint {missing[0]}; it has {', '.join(map(str, there))}"
        )
    own = sha256(system.model / WEIGHTS)
    found = [find_system(f"{system.run}@{step}")._replace(name=f"{system.name} at {step}") for step in numbers]
    return [checkpoint for checkpoint in found if sha256(checkpoint.model / WEIGHTS) != own]


def _systems(sections: Sequence[Section]) -> list[System]:
    return list(dict.fromkeys(system for section in sections for system in (section.first, *section.others)))


def _models(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The page's entry for each model."""
    return [
        {"name": system.name, "step": system.step, "path": _shown(system), "sha256": sha256(system.model / WEIGHTS)}
        for system in _systems(sections)
    ]


def _shown(system: System) -> str:
    """A model's path without the folders above its run, since a page may be published."""
    if system.run is not None and system.model.is_relative_to(system.run.parent):
        return str(system.model.relative_to(system.run.parent))
    return system.model.name


def _configs(sections: Sequence[Section]) -> dict[str, str]:
    """The configuration of every run with a model on the page."""
    runs = dict.fromkeys(system.run for system in _systems(sections) if system.run is not None)
    return {run.name: (run / CONFIG).read_text(encoding="utf-8") for run in runs}


def _commit() -> str:
    """The git commit of this package, if it is in its own repository."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # fails if it is only installed somewhere inside another repository
        changed = git("status", "--porcelain", "--", "..")
        return f"commit {git('rev-parse', 'HEAD')}{' with changes' if changed else ''}"
    except (OSError, subprocess.SubprocessError):
        return "no commit known"
