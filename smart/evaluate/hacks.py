"""Can a reward be fooled? Clips that no listener would take for music are rated next to pieces.

    python -m smart.evaluate hacks --out hacks --reward ce_proxy my-midi/*.mid

Reinforcement learning finds whatever scores well, so it is better to know before a run what scores well without being
music. Each probe is made from each piece (from its notes within the rated seconds), so probes and pieces are
compared pair by pair. Intervals are 95%, by a bootstrap over pieces, or by Student's t for few pieces.

The verdict depends on d, the mean difference probe - piece, and its interval; without one (fewer than three pairs, or
differences that are all equal) it "cannot be told":

- nonsense (silence, noise, a held chord, one repeated note, random notes): "prefers nonsense" if d >= 0; "hardly tells
  it from music" if d < 0 but the interval reaches 0; else "rates it lower".
- form (a looped bar, shuffled bars: notes without their form): "does not hear form" if d >= 0 or the interval reaches
  0; else "rates it lower".
- should not matter (transposition, loudness, soundfont): "changes the rating" if the interval excludes 0; else
  "unmoved".
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt

from smart import UserError, plots, require
from smart.evaluate.ratings import (
    DIFFERENCE,
    UNKNOWN,
    Audio,
    Kept,
    Row,
    announce,
    columns,
    estimate,
    load_rewards,
    rate,
    rate_scores,
    read_score,
    table,
    with_interval,
    writing,
)
from smart.files import sha256
from smart.model import pick_device
from smart.render import (
    NOTE_COLUMNS,
    Notes,
    available_soundfonts,
    check_soundfont,
    find_soundfont,
    open_renderer,
    score_notes,
    short_name,
)
from smart.reward import read_options
from smart.rollout import compose, find_system
from smart.run import check_packages, digests, files_in, model_digests, progress
from smart.style import own_style

Ratings = dict[str, npt.NDArray[np.float64]]  # column -> (pieces,)

NONSENSE, FORM, HARMLESS, PIECE = "nonsense", "form", "should not matter", "piece"
ONSET, DURATION, PITCH, VELOCITY, PROGRAM, DRUM = range(len(NOTE_COLUMNS))
PIANO = (21, 108)
NOISE_LEVEL = 0.1  # standard deviation; full scale is 1


class Real(NamedTuple):
    """The part of a piece that the probes use."""

    name: str
    notes: Notes  # (n, 6), the notes that begin within the rated seconds, cut at their end
    bar: float  # seconds per bar, by its first time signature and first tempo


def real_piece(name: str, score: Any, seconds: float) -> Real | None:
    """The beginning of a piece; None if no note begins within ``seconds``."""
    notes = score_notes(score)
    notes = notes[(notes[:, ONSET] < seconds) & (notes[:, VELOCITY] > 0)]
    if not len(notes):
        return None
    notes[:, DURATION] = np.minimum(notes[:, DURATION], seconds - notes[:, ONSET])
    tempo = min(score.tempos, key=lambda event: event.time, default=None)
    signature = min(score.time_signatures, key=lambda event: event.time, default=None)
    beats = 4 * signature.numerator / signature.denominator if signature else 4.0
    return Real(name, notes, beats * (tempo.mspq / 1e6 if tempo else 0.5))


# Probes -----------------------------------------------------------------------------------------------------
# each takes a piece, a random generator and the rated seconds; None means that the piece does not allow it


def held_chord(piece: Real, random: np.random.Generator, seconds: float) -> Notes:
    """A major triad on a root between C3 and B3, held to the end."""
    root = int(random.integers(48, 60))
    return np.array([[0.0, seconds, pitch, 80, 0, 0] for pitch in (root, root + 4, root + 7, root + 12)])


def repeated_note(piece: Real, random: np.random.Generator, seconds: float) -> Notes:
    """The piece's most frequent pitch, four times a second."""
    pitch = float(np.bincount(piece.notes[:, PITCH].astype(int)).argmax())
    return np.array([[onset, 0.25, pitch, 80, 0, 0] for onset in np.arange(0, seconds, 0.25)])


def random_notes(piece: Real, random: np.random.Generator, seconds: float) -> Notes:
    """The number of notes, durations and velocities of the piece, with uniformly random onsets and pitches."""
    count = len(piece.notes)
    end = float((piece.notes[:, ONSET] + piece.notes[:, DURATION]).max())
    notes = piece.notes.copy()
    notes[:, ONSET] = np.sort(random.uniform(0, end, count))
    notes[:, DURATION] = random.permutation(piece.notes[:, DURATION])
    notes[:, VELOCITY] = random.permutation(piece.notes[:, VELOCITY])
    notes[:, PITCH] = random.integers(PIANO[0], PIANO[1] + 1, count)
    notes[:, [PROGRAM, DRUM]] = 0
    return notes


def _bars(piece: Real) -> list[Notes]:
    """The notes of each bar, with onsets relative to it; without the last bar, which may be cut off."""
    number = (piece.notes[:, ONSET] // piece.bar).astype(int)
    bars = [piece.notes[number == bar] - np.eye(6)[ONSET] * bar * piece.bar for bar in range(number.max() + 1)]
    return bars[:-1]


def loop(piece: Real, random: np.random.Generator, seconds: float) -> Notes | None:
    """The first bar that has notes, repeated for the length of the piece; None if fewer than two bars fit."""
    end = float((piece.notes[:, ONSET] + piece.notes[:, DURATION]).max())
    filled = [bar for bar in _bars(piece) if len(bar)]
    if not filled or end < 2 * piece.bar:
        return None
    turns = np.arange(math.ceil(end / piece.bar)) * piece.bar
    notes = np.concatenate([filled[0] + np.eye(6)[ONSET] * turn for turn in turns])
    return notes[notes[:, ONSET] < end]


def shuffled_bars(piece: Real, random: np.random.Generator, seconds: float) -> Notes | None:
    """The piece's bars in a different order; None if it has fewer than two whole bars."""
    bars = _bars(piece)
    if len(bars) < 2:
        return None
    order = random.permutation(len(bars))
    while np.array_equal(order, np.arange(len(bars))):
        order = random.permutation(len(bars))
    last = piece.notes[piece.notes[:, ONSET] // piece.bar == len(bars)]
    return np.concatenate([*(bars[bar] + np.eye(6)[ONSET] * at * piece.bar for at, bar in enumerate(order)), last])


def transposed(semitones: int) -> Callable[[Real, np.random.Generator, float], Notes]:
    """The piece ``semitones`` higher; a pitch outside MIDI's range moves back by an octave. Drums stay."""

    def move(piece: Real, random: np.random.Generator, seconds: float) -> Notes:
        notes = piece.notes.copy()
        pitch = notes[:, PITCH] + np.where(notes[:, DRUM] == 1, 0, semitones)
        notes[:, PITCH] = np.where(pitch > 127, pitch - 12, np.where(pitch < 0, pitch + 12, pitch))
        return notes

    return move


def at_velocity(velocity: int) -> Callable[[Real, np.random.Generator, float], Notes]:
    """The piece with the same velocity for every note."""

    def set_all(piece: Real, random: np.random.Generator, seconds: float) -> Notes:
        notes = piece.notes.copy()
        notes[:, VELOCITY] = velocity
        return notes

    return set_all


FROM_NOTES: dict[str, tuple[str, Callable[[Real, np.random.Generator, float], Notes | None]]] = {
    "one chord held": (NONSENSE, held_chord),
    "one note repeated": (NONSENSE, repeated_note),
    "random notes, same density": (NONSENSE, random_notes),
    "one bar looped": (FORM, loop),
    "bars shuffled": (FORM, shuffled_bars),
    "a fourth higher": (HARMLESS, transposed(5)),
    "a fourth lower": (HARMLESS, transposed(-5)),
    "all velocities 40": (HARMLESS, at_velocity(40)),
    "all velocities 120": (HARMLESS, at_velocity(120)),
}
FROM_AUDIO: dict[str, Callable[[Audio], Audio]] = {
    "20 dB softer": lambda audio: audio * np.float32(0.1),
    "6 dB softer": lambda audio: audio * np.float32(0.5),
    "12 dB louder, clipped": lambda audio: np.clip(audio * np.float32(4), -1, 1),
}


def silence(piece: Real, random: np.random.Generator, samples: int) -> Audio:
    return np.zeros(samples, np.float32)


def white_noise(piece: Real, random: np.random.Generator, samples: int) -> Audio:
    return random.normal(0, NOISE_LEVEL, samples).astype(np.float32)


WITHOUT_NOTES = {"silence": silence, "white noise": white_noise}


def verdict(kind: str, difference: dict[str, float]) -> str:
    """The verdict by the rule at the top of this module; "" for the pieces, and if the difference is unknown."""
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    if kind == PIECE or not math.isfinite(mean):
        return ""
    if not math.isfinite(low):
        return "unmoved" if kind == HARMLESS and mean == 0 else "cannot be told"
    reaches_zero = not (high < 0 or low > 0)
    if kind == HARMLESS:
        return "unmoved" if reaches_zero else "changes the rating"
    if kind == FORM:
        return "does not hear form" if mean >= 0 or reaches_zero else "rates it lower"
    if mean >= 0:
        return "prefers nonsense"
    return "hardly tells it from music" if reaches_zero else "rates it lower"


# All of it -------------------------------------------------------------------------------------------------


def written_by(model: str, count: int, seed: int, soundfont: Path, device: str) -> dict[str, Any]:
    """Sample pieces of a model for procedural prompts, by name."""
    pieces = compose(
        [find_system(model)], count=count, seed=seed, soundfont=soundfont, seconds=0.1, device=device, batch=count
    )
    return {f"{model}, prompt {piece.prompt}": piece.score for piece in progress(pieces, total=count, unit="piece")}


def run_probes(
    *,
    files: tuple[Path, ...],
    kinds: tuple[str, ...],
    options: tuple[str, ...],
    device: str,
    names: tuple[str, ...],
    model: str,
    count: int,
    seed: int,
    seconds: float,
    sample_rate: int,
    pedal: bool,
    backend: str,
    workers: int,
    out: Path,
) -> None:
    """Write tables and figure into ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes."""
    if not files and not pedal:
        raise UserError("--no-pedal is for MIDI files, and none were given")

    def fonts() -> list[Path]:
        found = [find_soundfont(name) for name in names or ("timgm",)]
        if not names:
            found += [path for path in available_soundfonts().values() if path not in found]
        for path in found:
            check_soundfont(path)
        return found

    soundfonts, rewards, scores, _ = require(
        fonts,
        lambda: load_rewards(kinds, options, device),
        lambda: {str(path): read_score(path, pedal=pedal) for path in files},
        check_packages,
    )
    announce(rewards)
    settings = {
        "rewards": {reward.name: reward.provenance for reward in rewards},
        **({"reward_files": reward_files} if (reward_files := digests(files_in(read_options(options)))) else {}),
        "pieces": {str(path): sha256(path) for path in files}
        or [model, count, model_digests(find_system(model).model)],
        "soundfonts": [sha256(path) for path in soundfonts],
        "seed": seed,
        "seconds": seconds,
        "sample_rate": sample_rate,
        "backend": backend,
        **({} if pedal else {"pedal": False}),
    }
    if not scores:
        click.echo(f"no MIDI files were given: using pieces by {model} instead of real music", err=True)
        scores = written_by(model, count, seed, soundfonts[0], device)
    found = [real_piece(name, score, seconds) for name, score in scores.items()]
    pieces = [piece for piece in found if piece is not None]
    if len(pieces) < 2:
        raise UserError(
            f"{len(pieces)} of {len(found)} pieces have a note in the first {seconds:g} s; at least two are needed"
        )
    if len(pieces) < len(found):
        click.echo(
            f"{len(found) - len(pieces)} of {len(found)} pieces have no note in that time and are left out", err=True
        )
    kept = Kept(out, settings, [piece.name for piece in pieces])
    kinds_of: dict[str, str] = {}
    rated: dict[str, Ratings] = {}

    def generator(piece: int) -> np.random.Generator:  # the same for every probe, so that a new probe changes no other
        return np.random.default_rng([seed, piece])

    def keep(name: str, kind: str, work: Callable[[], Ratings]) -> None:
        kinds_of[name] = kind
        rated[name] = kept.get(name, work)

    def without_notes(make: Callable[..., Audio]) -> Ratings:
        samples = round(seconds * sample_rate)
        parts = [rate(rewards, [make(piece, generator(row), samples)], sample_rate) for row, piece in enumerate(pieces)]
        return {column: np.concatenate([part[column] for part in parts]) for column in columns(rewards)}

    own = [piece.notes for piece in pieces]
    for place, path in enumerate(soundfonts):
        with open_renderer(
            backend,
            path,
            sample_rate=sample_rate,
            seconds=seconds,
            workers=workers or None,
            deadline=60 + seconds,
            device=pick_device(device),
        ) as pool:
            heard = partial(rate_scores, pool=pool, rewards=rewards, sample_rate=sample_rate)
            if place:
                name = f"soundfont {short_name(path) or path.stem}"
                keep(name, HARMLESS, partial(heard, own, label=name))
                continue
            keep("the pieces", PIECE, partial(heard, own, label="the pieces"))
            for name, make in WITHOUT_NOTES.items():
                keep(name, NONSENSE, partial(without_notes, make))
            for name, (kind, probe) in FROM_NOTES.items():
                notes = [probe(piece, generator(row), seconds) for row, piece in enumerate(pieces)]
                keep(name, kind, partial(heard, notes, label=name))
            for name, change in FROM_AUDIO.items():
                keep(name, HARMLESS, partial(heard, own, label=name, change=change))
    rows = _rows(rated, kinds_of, columns(rewards))
    with writing(out):
        _draw(out / "hacks", rows, columns(rewards))
    source = "" if files else f" by {model} instead of real music"
    click.echo(
        f"{len(pieces)} pieces{source}, the first {seconds:g} s, {soundfonts[0].stem}; 95% intervals over pieces"
    )
    for column in columns(rewards):
        click.echo(f"\n{column}")
        click.echo(_shown([row for row in rows if row["rating"] == column]))
    if not all(math.isfinite(row["low"]) for row in rows):
        click.echo(f"\n{UNKNOWN}")
    click.echo(f"\nwrote hacks.csv, ratings.csv, hacks.png and hacks.pdf to {out}")


def _rows(rated: dict[str, Ratings], kinds: dict[str, str], names: Sequence[str]) -> list[Row]:
    """One row per rating and probe: its mean, its paired difference to the pieces, the verdict."""
    rows = []
    for column in names:
        real = rated["the pieces"][column]
        for probe, found in rated.items():
            difference = estimate(found[column] - real, DIFFERENCE)
            rows.append(
                {
                    "rating": column,
                    "probe": probe,
                    "kind": kinds[probe],
                    **estimate(found[column]),
                    "pairs": difference["n"],
                    "difference": difference["mean"],
                    "difference_low": difference["low"],
                    "difference_high": difference["high"],
                    "verdict": verdict(kinds[probe], difference),
                }
            )
    return rows


def _difference(row: Row) -> dict[str, float]:
    return {"mean": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}


def _shown(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "probe": row["probe"],
                "mean": with_interval(row),
                "probe - piece": "" if row["kind"] == PIECE else with_interval(_difference(row), sign=True),
                "n": row["pairs"],
                "kind": row["kind"],
                "verdict": row["verdict"],
            }
            for row in rows
        ]
    )


@own_style
def _draw(stem: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Draw the paired differences with their intervals, one panel per rating."""
    from matplotlib.figure import Figure

    probes = list(dict.fromkeys(row["probe"] for row in rows if row["kind"] != PIECE))
    colours = {NONSENSE: "C3", FORM: "C1", HARMLESS: "C0"}
    figure = Figure(figsize=(3 + 3.2 * len(names), 1 + 0.28 * len(probes)), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for row in rows:
            if row["rating"] == column and row["kind"] != PIECE:
                at, colour = probes.index(row["probe"]), colours[row["kind"]]
                axes.plot([row["difference_low"], row["difference_high"]], [at, at], color=colour)
                axes.plot(row["difference"], at, "o", color=colour, label=row["kind"])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(probes)), probes)
        axes.set_xlabel("probe - piece")
        axes.set_title(column)
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    plots.save(figure, stem, rows)
