"""What the commands share: ratings of audio and of scores, saved ratings, tables."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
import torch

from smart import UserError, plots
from smart.corpus import open_score
from smart.evaluate import statistics
from smart.files import is_empty, parse_json, write_atomically
from smart.intervals import RATING, Scale, differences
from smart.model import pick_device
from smart.render import Renderer, RenderError
from smart.reward import Reward, load_reward, read_options, resample
from smart.run import progress, text_changes

if TYPE_CHECKING:
    from symusic.core import ScoreTick

Audio = npt.NDArray[np.float32]
Row = dict[str, Any]

MIDI = (".mid", ".midi")
TOGETHER = 32  # clips in memory at a time
MEAN = "mean"  # name of the mean over a reward's axes, if it has several (the last row of the paper's table 2)


def load_rewards(kinds: Sequence[str], options: Sequence[str], device: str) -> list[Reward]:
    """Load the rewards of ``kinds``, each with its own ``options``.

    Raises ``UserError`` for a kind that is unknown or named twice, and for an option that does not name its kind where
    there are several.
    """
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--reward: expected each kind once, got {', '.join(kinds)}")
    given: dict[str, list[str]] = {kind: [] for kind in kinds}
    for text in options:
        kind, separator, _ = text.partition("=")[0].partition(".")
        if separator and kind in given:
            given[kind].append(text[len(kind) + 1 :])
        elif len(kinds) == 1:
            given[kinds[0]].append(text)
        else:
            raise UserError(f"--reward-option {text!r}: say for which reward it is, as in {kinds[0]}.{text}")
    where = str(pick_device(device))
    return [load_reward(kind, device=where, **read_options(texts)) for kind, texts in given.items()]


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``steps``, evenly spaced and including the last."""
    count = min(most, len(steps))
    return [steps[round(place * len(steps) / count) - 1] for place in range(1, count + 1)]


def announce(rewards: Sequence[Reward]) -> None:
    """Print where each reward's weights come from, and which rewards are approximations."""
    for reward in rewards:
        note = " (an approximation, not the aesthetic model)" if reward.is_stand_in else ""
        click.echo(f"{reward.name}{note}: {reward.provenance}", err=True)


def columns(rewards: Sequence[Reward]) -> list[str]:
    """Column names, "reward.axis"; a reward with several axes has one more column, for their mean."""
    return [
        f"{reward.name}.{axis}" for reward in rewards for axis in (*reward.axes, *([MEAN] * (len(reward.axes) > 1)))
    ]


def rate(
    rewards: Sequence[Reward], clips: Sequence[Audio | None], sample_rate: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Rate mono or stereo clips, (S,) or (2, S): column -> (N,). None and clips that cannot be rated give NaN."""
    rated = {name: np.full(len(clips), math.nan) for name in columns(rewards)}
    heard = [row for row, clip in enumerate(clips) if clip is not None]
    if not heard:
        return rated
    mono = [torch.from_numpy(np.atleast_2d(clip).mean(axis=0, dtype=np.float32)) for clip in clips if clip is not None]
    for reward in rewards:
        waves = [resample(wave, sample_rate, reward.sample_rate) for wave in mono]
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        scores = reward.score(padded, torch.tensor([len(wave) for wave in waves]))
        for axis, values in scores.items():
            rated[f"{reward.name}.{axis}"][heard] = values.cpu().double().numpy()
        if len(reward.axes) > 1:
            rated[f"{reward.name}.{MEAN}"] = np.mean([rated[f"{reward.name}.{axis}"] for axis in reward.axes], axis=0)
    return rated


def rate_scores(
    scores: Sequence[Any],
    pool: Renderer,
    rewards: Sequence[Reward],
    sample_rate: int,
    *,
    change: Callable[[Audio], Audio] | None = None,
    label: str = "",
) -> dict[str, npt.NDArray[np.float64]]:
    """Render scores or note arrays with ``pool``, which renders at ``sample_rate``, and rate them: column -> (N,).

    None and failed clips give NaN. ``change`` is applied to the audio (2, S) of each clip before it is rated.
    """
    parts = []
    for start in progress(range(0, len(scores), TOGETHER), desc=label, unit="batch"):
        futures = [None if score is None else pool.submit(score) for score in scores[start : start + TOGETHER]]
        clips: list[Audio | None] = []
        for future in futures:
            # not raised and caught: the traceback would keep this frame alive, and with it the audio of the whole batch
            if future is None or isinstance(future.exception(), RenderError):
                clips.append(None)
            else:
                clips.append(future.result() if change is None else change(future.result()))
        parts.append(rate(rewards, clips, sample_rate))
    return {name: np.concatenate([np.empty(0), *(part[name] for part in parts)]) for name in columns(rewards)}


class Kept:
    """Ratings of a long job, saved in ``<folder>/ratings.csv`` so that the same command continues where it stopped.

    The file has one line per unit of work (a probe, a soundfont), piece and column. ``ratings.sha256.json`` has a
    digest of each unit's ratings: a unit that is damaged is reported and made again. Raises ``UserError`` if the folder
    holds ratings made with other ``settings``, or other files.
    """

    FILES = ("settings.json", "ratings.csv", "ratings.sha256.json")

    def __init__(self, folder: Path, settings: Mapping[str, Any], pieces: Sequence[str]) -> None:
        self.folder, self.pieces = folder, pieces
        self.units: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
        settings_file, self._table, self._digests = (folder / name for name in self.FILES)
        text = json.dumps(settings, indent=1) + "\n"
        with writing(folder):
            if folder.exists() and (not folder.is_dir() or (not is_empty(folder) and not settings_file.is_file())):
                raise UserError(f"--out {folder} holds something else; choose a new folder")
            if settings_file.is_file():
                if (before := settings_file.read_text(encoding="utf-8", errors="replace")) != text:
                    raise UserError(
                        f"--out {folder}: holds ratings made with other settings ({text_changes(before, text)}); "
                        "give a new folder"
                    )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(settings_file, text.encode())
            if self._table.is_file():
                self._read()

    def _read(self) -> None:
        """Take up the units whose ratings are as they were written, and report the others."""
        text = self._table.read_text(encoding="utf-8", errors="replace")
        found: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
        for line in text.split("\n")[1:-1]:  # line by line, so that damage stays within a unit
            try:
                unit, piece, _, column, rating = next(csv.reader([line], strict=True))
                ratings = found.setdefault(unit, {}).setdefault(column, np.full(len(self.pieces), math.nan))
                ratings[int(piece)] = float(rating or "nan")
            except (ValueError, IndexError, csv.Error):  # its unit does not have the recorded digest then
                continue
        try:
            digests = dict(parse_json(self._digests.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            digests = {}
        self.units = {unit: columns for unit, columns in found.items() if digests.get(unit) == _digest(columns)}
        damaged = [unit for unit in found if unit not in self.units]
        if damaged:
            named = ", ".join(damaged[:3]) + (" ..." if len(damaged) > 3 else "")
            click.echo(f"Warning: {self._table} is damaged; made again: {named:.200}", err=True)

    def get(
        self, unit: str, work: Callable[[], dict[str, npt.NDArray[np.float64]]]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """The ratings of ``unit``, column -> (pieces,): loaded if they were saved, else made by ``work`` and saved."""
        unit = plots.plain(unit)  # as the table has it
        if unit not in self.units:
            self.units[unit] = work()
            rows = [
                {"unit": name, "piece": row, "name": self.pieces[row], "column": column, "rating": value}
                for name, found in self.units.items()
                for column, values in found.items()
                for row, value in enumerate(values)
            ]
            digests = {name: _digest(found) for name, found in self.units.items()}
            with writing(self.folder):
                write_atomically(self._digests, (json.dumps(digests, indent=1) + "\n").encode())
                plots.write_csv(self._table, rows)
        return self.units[unit]


def _digest(ratings: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """SHA-256 of a unit's ratings; it does not depend on how NaN is written."""
    found = hashlib.sha256()
    for column, values in ratings.items():
        found.update(f"{column}\0{len(values)}\0".encode())
        found.update(np.where(np.isnan(values), math.nan, values).astype("<f8").tobytes())
    return found.hexdigest()


def read_score(path: Path, *, pedal: bool = True) -> "ScoreTick":
    """Read a MIDI file and print what will not be heard. Raises ``UserError``: see ``smart.corpus.open_score``."""
    score, remarks = open_score(path, pedal=pedal)
    for remark in remarks:
        click.echo(f"Note: {path}: {remark}", err=True)
    return score


# Numbers ----------------------------------------------------------------------------------------------------


DIFFERENCE = differences(RATING)
UNKNOWN = "a number without an interval: too few pieces were rated, or all of them alike, to tell one"


def estimate(values: npt.NDArray[np.float64], scale: Scale = RATING) -> dict[str, float | int]:
    """Mean, 95% interval over pieces (NaN: none is known), and n of the finite values, as columns of a table."""
    found = statistics.mean(values, scale=scale)
    return {"n": found.n, "mean": found.value, "low": found.low, "high": found.high}


# Tables -----------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A value as it is printed in a table; NaN is a dash."""
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return str(value)


def with_interval(found: Mapping[str, float], digits: int = 2, sign: bool = False) -> str:
    """``mean [low, high]`` of an ``estimate``; only the mean if it has no interval."""
    form = f"{'+' if sign else ''}.{digits}f"
    if not math.isfinite(found["mean"]):
        return "-"
    text = format(found["mean"], form)
    if math.isfinite(found["low"]):
        text += f" [{found['low']:{form}}, {found['high']:{form}}]"
    return text


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a text table; the first column is aligned left, the others right."""
    if not rows:
        return ""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a ``UserError`` that names ``folder``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
