"""``smart evaluate rerate RUN --reward KIND --out FOLDER``: rate the stored completions of a run with any reward.

Nothing is sampled: a run keeps the tokens of every completion it learnt from, which are rendered as in the run, or with
other soundfonts, and rated. The table has a line for each soundfont and iteration: the mean rating with its 95%
interval, the run's own reward of the same completions, and how the two correlate within groups. If it is interrupted,
the same command continues it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from smart import UserError, plots, require
from smart.config import Config, load
from smart.cores import usable_cores
from smart.evaluate.ratings import (
    MEAN,
    Kept,
    Row,
    announce,
    estimate,
    evenly,
    load_rewards,
    table,
    with_interval,
    writing,
)
from smart.files import sha256, write_atomically
from smart.model import pick_device
from smart.render import Audio, Renderer, checked_soundfont, open_renderer
from smart.reward import Reward, read_options
from smart.reward.mixture import group_correlation
from smart.reward.reference import Nearness, embed_clips, frechet_distance
from smart.rollout import Scorer, find_system
from smart.run import CONFIG, digests, files_in, hold_folder, model_digests, progress
from smart.tokens import decode, load_tokenizer

FRECHET = "frechet"  # with the reward ``reference``: distance of an iteration's pieces to the folder's


class Stored(NamedTuple):
    """The completions of one iteration."""

    step: int
    tokens: list[list[int]]
    rewards: npt.NDArray[np.float64]  # (N,) what the run gave them


def read_completions(run: Path, iterations: int, samples: int) -> list[Stored]:
    """The first ``samples`` completions (0: all) of up to ``iterations`` of a run, evenly spaced, in order.

    Raises ``UserError`` if the run has stored none, or if they cannot be read.
    """
    files = sorted((run / "completions").glob("*.parquet"))
    if not files:
        raise UserError(f"run {run}: has no stored completions; expected completions/*.parquet of a tuning run")
    try:
        steps = sorted({step for file in files for step in pq.read_table(file, columns=["step"])["step"].to_pylist()})
        wanted = set(evenly(steps, iterations))
        tables = [pq.read_table(file, columns=["step", "tokens", "reward"]) for file in files]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"run {run}: its completions cannot be read ({str(error).splitlines()[0][:160]})") from None
    found: dict[int, Stored] = {}
    for one in tables:
        for row in one.filter(pa.compute.is_in(one["step"], pa.array(wanted))).to_pylist():
            stored = found.setdefault(row["step"], Stored(row["step"], [], np.empty(0)))
            if not samples or len(stored.tokens) < samples:
                stored.tokens.append(row["tokens"])
                rewards = np.append(stored.rewards, np.nan if row["reward"] is None else row["reward"])
                found[row["step"]] = stored._replace(rewards=rewards)
    return [found[step] for step in sorted(found)]


def rate_stored(
    stored: Stored, tokenizer: Any, pool: Renderer, rewards: Sequence[Reward], sample_rate: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Render and rate the completions of an iteration: column -> (N,), NaN for clips that failed."""
    pieces = [decode(tokenizer, tokens) for tokens in stored.tokens]
    clips = [pool.submit(piece) for piece in pieces]
    found: dict[str, npt.NDArray[np.float64]] = {}
    for reward in rewards:
        keep = range(len(clips)) if isinstance(reward, Nearness) else ()
        rated = Scorer(tokenizer, pool, reward, sample_rate=sample_rate).collect(clips, keep=keep, pieces=pieces)
        for axis, values in rated.scores.items():
            found[f"{reward.name}.{axis}"] = values.double().numpy()
        if len(reward.axes) > 1:
            found[f"{reward.name}.{MEAN}"] = np.mean([found[f"{reward.name}.{axis}"] for axis in reward.axes], axis=0)
        if isinstance(reward, Nearness):
            found[f"{reward.name}.{FRECHET}"] = np.full(len(clips), distance_to(reward, rated.audio, sample_rate))
    return found


def distance_to(reward: Nearness, audio: Sequence[Audio | None], sample_rate: int) -> float:
    """Frechet distance of clips (2, S) to the excerpts of the folder, in the embedding of ``reward``."""
    heard = [(clip.mean(axis=0), sample_rate) for clip in audio if clip is not None]
    vectors = embed_clips(reward.embedder, heard).double().numpy() if heard else np.empty((0, 1))
    return frechet_distance(vectors, reward.vectors.double().numpy())


def lines_of(
    soundfont: str, stored: Stored, rated: Mapping[str, npt.NDArray[np.float64]], group_size: int
) -> list[Row]:
    """The lines of the table for one iteration, one for each column."""
    rows = []
    whole = len(stored.rewards) // group_size * group_size  # the last group may be cut by --samples
    own = torch.from_numpy(stored.rewards[:whole])
    for column, values in rated.items():
        if column.endswith(f".{FRECHET}"):
            found: dict[str, Any] = {"n": len(values), "mean": float(values[0]), "low": np.nan, "high": np.nan}
            correlation = np.nan
        else:
            found = estimate(values)
            correlation = group_correlation(own, torch.from_numpy(values[:whole]), group_size) if whole else np.nan
        rows.append(
            {
                "soundfont": soundfont,
                "step": stored.step,
                "rating": column,
                **found,
                "run_reward": float(np.nanmean(stored.rewards)) if np.isfinite(stored.rewards).any() else np.nan,
                "correlation": correlation,
            }
        )
    return rows


def rerate(
    *,
    run: Path,
    kinds: tuple[str, ...],
    options: tuple[str, ...],
    soundfonts: tuple[str, ...],
    iterations: int,
    samples: int,
    workers: int,
    backend: str | None,
    device: str,
    out: Path,
) -> None:
    """Write the report into ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a run: it has no {CONFIG}")
    config = load(run / CONFIG, schema=Config)
    names = list(dict.fromkeys(soundfonts or config.render.fonts))
    rewards, base, stored, *fonts = require(
        lambda: load_rewards(kinds, options, device),
        lambda: find_system(f"{run}@base"),
        lambda: read_completions(run, iterations, samples),
        *(lambda name=name: checked_soundfont(name) for name in names),
    )
    announce(rewards)
    tokenizer, render, where = load_tokenizer(base.model), config.render, pick_device(device)
    many = min(len(one.tokens) for one in stored)
    backend = backend or render.backend
    settings = {
        "run": run.resolve().name,
        "rewards": {reward.name: reward.provenance for reward in rewards},
        "reward_options": list(options),
        "soundfonts_sha256": {name: sha256(font) for name, font in zip(names, fonts, strict=True)},
        "seconds": render.seconds,
        "sample_rate": render.sample_rate,
        "backend": backend,
        "samples": many,
        **({"reward_files": reward_files} if (reward_files := digests(files_in(read_options(options)))) else {}),
        "base": model_digests(base.model),
        "completions": {one.step: _digest(one.tokens[:many]) for one in stored},
        "device": where.type,
    }
    kept = Kept(out, settings, [str(number) for number in range(many)])
    rows: list[Row] = []
    with hold_folder(out), progress(total=len(names) * len(stored), unit="iteration") as bar:
        for name, font in zip(names, fonts, strict=True):
            renderer = open_renderer(
                backend,
                font,
                sample_rate=render.sample_rate,
                seconds=render.seconds,
                workers=workers or usable_cores(),
                deadline=render.deadline,
                device=where,
            )
            with renderer as pool:
                for one in stored:
                    part = Stored(one.step, one.tokens[:many], one.rewards[:many])

                    def work(part: Stored = part, pool: Renderer = pool) -> dict[str, npt.NDArray[np.float64]]:
                        return rate_stored(part, tokenizer, pool, rewards, render.sample_rate)

                    rated = kept.get(f"{name}@{one.step}", work)
                    rows += lines_of(name, part, rated, config.grpo.group_size)
                    bar.update()
    with writing(out):
        plots.write_csv(out / "rerate.csv", rows)
        summary = {"settings": settings, "table": [{key: _plain(value) for key, value in row.items()} for row in rows]}
        write_atomically(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    click.echo(table(_shown(rows)))
    for reward in rewards:
        if reward.is_stand_in:
            click.echo(f"{reward.name} is an approximation, not the aesthetic model: see docs/rewards.md")
    click.echo(f"ratings in {out}: rerate.csv, ratings.csv, summary.json")


def _digest(rows: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value for JSON, which has no NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _shown(rows: Sequence[Row]) -> list[Row]:
    """One line for each soundfont and iteration, one column for each rating; correlations are in the file only."""
    lines: dict[tuple[str, int], Row] = {}
    for row in rows:
        line = lines.setdefault(
            (row["soundfont"], row["step"]),
            {"soundfont": row["soundfont"], "iteration": row["step"], "n": row["n"], "run's reward": row["run_reward"]},
        )
        line[row["rating"]] = with_interval(row)
    return list(lines.values())
