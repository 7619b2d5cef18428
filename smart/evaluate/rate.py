"""Ratings of audio and MIDI files, next to those of silence and white noise (paper table 1).

    python -m smart.evaluate rate my-clips/*.wav --reward ce_proxy

A file is cut into windows of ten seconds, the receptive field of Audiobox Aesthetics. Its rating is the mean over
windows, weighted by length, as in Audiobox's own predictor. With at least three windows of similar length, the interval
is Student's t over them: it shows how much the ratings vary within the file, not between files.

With the published weights of ``audiobox``, silence and noise test the whole scorer, because the paper prints their
ratings. Weights count as published if they came from the hub under their published id. Weights from any other folder or
file are unknown: if they agree with the paper's eight numbers the scorer is right, since that does not happen by
chance; if they do not agree, there is no verdict.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import numpy.typing as npt
from scipy import stats  # noqa: F401  (intervals need it: if it is missing, that is said before any work)

from smart import UserError, plots, require
from smart.evaluate.ratings import (
    MIDI,
    Audio,
    Row,
    announce,
    columns,
    load_rewards,
    rate,
    read_score,
    table,
    with_interval,
    writing,
)
from smart.intervals import FEWEST, RATING, all_equal, by_student
from smart.model import pick_device
from smart.published import AXES, TABLE_1, tolerance
from smart.render import (
    Renderer,
    RenderError,
    checked_soundfont,
    open_renderer,
    read_audio,
    score_notes,
)
from smart.reward import Reward
from smart.reward.audiobox import HUB_ID
from smart.run import progress

WINDOW_SECONDS = 10
SILENCE, NOISE = "silence", "white noise"
BUILT_IN_RATE = 16000  # Hz, of silence and noise
NOISE_LEVEL = 0.1  # standard deviation
FEWEST_WINDOWS = FEWEST - 0.5  # effective number of windows, which is smaller if the last one is short
PAPER = {name: dict(zip(AXES, TABLE_1[name], strict=True)) for name in (SILENCE, NOISE)}
TOLERANCE = {name: tolerance(name) for name in PAPER}


class Unreadable(NamedTuple):
    """A file that could not be rated, and why."""

    name: str
    reason: str


def windows(audio: Audio, sample_rate: int) -> list[Audio]:
    """Cut audio (S,) into parts of ten seconds, the last one possibly shorter. No samples give no parts."""
    size = WINDOW_SECONDS * sample_rate
    return [audio[start : start + size] for start in range(0, len(audio), size)]


def summarise(ratings: npt.NDArray[np.float64], lengths: Sequence[int]) -> dict[str, float]:
    """Mean over windows weighted by length, and its 95% interval by Student's t (NaN if they do not tell it)."""
    known = np.isfinite(ratings)
    if not known.any():
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    values, weights = ratings[known], np.asarray(lengths, float)[known]
    weights = weights / weights.sum()
    mean = float(weights @ values)
    count = 1 / float((weights**2).sum())  # effective number of windows
    if count < FEWEST_WINDOWS or all_equal(values):
        return {"mean": mean, "low": math.nan, "high": math.nan}
    error = math.sqrt(float(weights @ (values - mean) ** 2) / (count - 1))
    found = by_student(mean, error, count - 1, len(values), RATING)
    return {"mean": mean, "low": found.low, "high": found.high}


def built_in(seed: int) -> Iterator[tuple[str, Audio, int]]:
    samples = WINDOW_SECONDS * BUILT_IN_RATE
    yield SILENCE, np.zeros(samples, np.float32), BUILT_IN_RATE
    noise = np.random.default_rng(seed).normal(0, NOISE_LEVEL, samples)
    yield NOISE, noise.astype(np.float32), BUILT_IN_RATE


def read(
    path: Path, pool: Renderer | None, sample_rate: int, seconds: float, *, pedal: bool = True
) -> tuple[Audio, int]:
    """Read an audio file, or render a MIDI file with ``pool`` at ``sample_rate``: mono audio and its rate.

    Raises ``UserError``.
    """
    if path.suffix.lower() not in MIDI:
        return read_audio(path, seconds)
    assert pool is not None
    score = read_score(path, pedal=pedal)
    try:
        audio = pool.submit(score_notes(score, max_beats=math.inf)).result()
    except (RenderError, ValueError) as error:  # ValueError: impossible notes
        raise UserError(f"MIDI file {path} cannot be rendered ({error})") from error
    return audio.mean(axis=0), sample_rate


def verdict(reward: Reward, found: dict[str, dict[str, float]]) -> str:
    """One line that compares the ratings of silence and noise, name -> axis -> rating, with the paper's."""
    off = {
        f"{axis} of {name}": found[name][axis] - value
        for name, expected in PAPER.items()
        for axis, value in expected.items()
        if not abs(found[name][axis] - value) <= TOLERANCE[name]
    }
    tolerance = ", ".join(f"±{value:g} for {name}" for name, value in TOLERANCE.items())
    if not off:
        return f"audiobox: silence and white noise rate as in the paper's table 1 ({tolerance}): the scorer is right"
    if not getattr(reward, "is_published", False):
        return (
            "audiobox: no verdict is possible: silence and white noise do not rate as in the paper's table 1, "
            f"but these weights did not come from the hub as {HUB_ID}, so they may not be the published ones"
        )
    worst = max(off, key=lambda key: abs(off[key]) if math.isfinite(off[key]) else math.inf)
    return (
        f"audiobox: {len(off)} of 8 ratings differ from the paper's ({tolerance}), most of all {worst} "
        f"({off[worst]:+.2f}): with the published weights the scorer should agree"
    )


def rate_files(
    *,
    files: tuple[Path, ...],
    kinds: tuple[str, ...],
    options: tuple[str, ...],
    device: str,
    soundfont: str,
    sample_rate: int,
    seconds: float,
    pedal: bool,
    backend: str,
    seed: int,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Print the ratings. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if out is not None and out.exists() and not overwrite:
        raise UserError(f"--out {out} already exists; choose another file, or add --overwrite")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    with_midi = any(path.suffix.lower() in MIDI for path in files)
    if not (with_midi or pedal):
        raise UserError("--no-pedal is for MIDI files, and none were given")

    def sound() -> Path | None:
        return checked_soundfont(soundfont) if with_midi else None

    rewards, soundfont_file = require(lambda: load_rewards(kinds, options, device), sound)
    announce(rewards)
    rows: list[Row] = []
    failed: list[Unreadable] = []

    def add(name: str, audio: Audio, rate_of_audio: int) -> None:
        parts = windows(audio, rate_of_audio)
        # a few at a time: an hour has 360 windows
        rated = [rate(rewards, parts[start : start + 8], rate_of_audio) for start in range(0, len(parts), 8)]
        for column in columns(rewards):
            values = np.concatenate([np.empty(0), *(part[column] for part in rated)])
            rows.append(
                {
                    "file": name,
                    "seconds": len(audio) / rate_of_audio,
                    "windows": len(parts),
                    "rating": column,
                    **summarise(values, [len(part) for part in parts]),
                }
            )

    for name, audio, rate_of_audio in built_in(seed):
        add(name, audio, rate_of_audio)
    with contextlib.ExitStack() as opened:
        pool: Renderer | None = None
        if soundfont_file is not None:
            renderer = open_renderer(
                backend,
                soundfont_file,
                sample_rate=sample_rate,
                seconds=seconds,
                workers=1,
                deadline=600.0,
                device=pick_device(device),
            )
            opened.enter_context(renderer)
            pool = renderer
        for path in progress(files, desc="rating", unit="file"):
            try:
                add(str(path), *read(path, pool, sample_rate, seconds, pedal=pedal))
            except UserError as error:
                reason = error.message if str(path) in error.message else f"file {path}: {error.message}"
                failed.append(Unreadable(str(path), reason))
    click.echo(_shown(rows))
    unknown = {row["file"]: None for row in rows if row["windows"] > 1 and not math.isfinite(row["low"])}
    if unknown:
        click.echo(
            "without an interval, since fewer than three windows of similar length, or windows that are rated alike, "
            f"do not tell one: {', '.join(unknown)}"
        )
    for reward in rewards:
        if reward.name == "audiobox":
            ours: dict[str, dict[str, float]] = {name: {} for name in PAPER}
            for row in rows:
                kind, _, axis = row["rating"].partition(".")
                if row["file"] in PAPER and kind == reward.name:
                    ours[row["file"]][axis] = row["mean"]
            click.echo(_against_the_paper(ours))
            click.echo(verdict(reward, ours))
    if out is not None:
        with writing(out):
            plots.write_csv(out, rows)
        click.echo(f"wrote {out}")
    if failed:
        raise UserError(
            "\n- ".join([f"{len(failed)} of {len(files)} files could not be rated:", *(row.reason for row in failed)])
        )


def _shown(rows: Sequence[Row]) -> str:
    """One line per file, one column per rating."""
    by_file: dict[str, Row] = {}
    for row in rows:
        first = {"file": row["file"], "seconds": f"{row['seconds']:.1f}", "windows": row["windows"]}
        by_file.setdefault(row["file"], first)[row["rating"]] = with_interval(row)
    return table(list(by_file.values()))


def _against_the_paper(ours: dict[str, dict[str, float]]) -> str:
    return table(
        [
            {"": name, **{axis: f"{ours[name][axis]:.2f} (paper {value:.2f})" for axis, value in expected.items()}}
            for name, expected in PAPER.items()
        ]
    )
