"""The files of a run: ``metrics.jsonl``, TensorBoard events, ``log.txt``, completions, MIDI, WAV and a summary.

TensorBoard gets the curves, and the audio and piano roll of each sample; so do the trackers of ``smart.run.also``.

Metrics and completions can be cut back to a step, so that a run that is resumed from a checkpoint writes the same files
as one that was never interrupted.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from smart import Failure, UserError
from smart.files import is_leftover, parse_json, write_atomically
from smart.render import Audio, write_midi, write_wav
from smart.run.also import Also, describe
from smart.run.roll import piano_roll

METRICS = "metrics.jsonl"


class Tracker:
    """Writes a run's files; use it as a context manager.

    ``start`` is the last step that is already done (0: none); ``also`` names further trackers.
    """

    def __init__(self, folder: Path, *, start: int = 0, also: Iterable[str] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._step = start
        self._completions: list[dict[str, Any]] = []
        _cut_back(folder, start)
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115  # closed by __exit__
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._also = [Also(name, describe(folder), self.log) for name in dict.fromkeys(also)]

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for tracker in self._also:
                tracker.close()
        finally:  # also if Ctrl-C ends the waiting for them
            threading.excepthook = self._hook
            self._metrics.close()
            self._board.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback if TensorBoard's thread cannot write: the next point raises that error."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
            self._hook(failure)

    def log(self, text: str) -> None:
        """Print a line on stderr, above any progress bar, and append it to ``log.txt``."""
        with suppress(OSError):  # a terminal or pipe that was closed is no reason to stop
            tqdm.write(text, file=sys.stderr)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of ``metrics.jsonl`` and one point per curve; a value that is not finite becomes null."""
        line = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **line}) + "\n")
        self._metrics.flush()
        self._step = step
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        for tracker in self._also:
            tracker.metrics(step, values)

    def completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows (step, group, tokens, reward, ...) until the next ``flush`` writes them."""
        self._completions += map(dict, rows)

    def flush(self, step: int) -> None:
        """Write the rows kept since the last flush as ``completions/<step>.parquet``, and force metrics to the disk."""
        os.fsync(self._metrics.fileno())
        if not self._completions:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.folder / "completions"
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(self._completions)
        write_atomically(folder / f"{step:08d}.parquet", lambda file: pq.write_table(table, file))
        self._completions.clear()

    def write_piece(self, name: str, score: Any, audio: Audio | None, sample_rate: int) -> None:
        """Write ``<name>.mid`` and, unless the clip failed, ``<name>.wav`` from ``audio`` (2, S).

        Trackers show it at the step that ``name`` contains as a folder, or else at the last one with metrics.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_midi(path.with_suffix(".mid"), score)
        wav = None if audio is None else path.with_suffix(".wav")
        if audio is not None and wav is not None:
            write_wav(wav, audio, sample_rate)
        *folders, last = name.split("/")
        step = next((int(part) for part in folders if part.isdecimal()), self._step)
        tag = "/".join([*(part for part in folders if not part.isdecimal()), last])
        roll = piano_roll(score, None if audio is None else audio.shape[1] / sample_rate)
        self._board.add_image(f"{tag}/roll", roll, step, dataformats="HWC")
        if audio is not None:
            self._board.add_audio(f"{tag}/audio", audio.mean(axis=0).clip(-1, 1), step, sample_rate)
        for tracker in self._also:
            tracker.piece(step, tag, roll, wav)

    def write_ratings(self, name: str, ratings: Mapping[str, Mapping[str, float]]) -> None:
        """Write ratings by piece and name as a JSON file; one that is not finite becomes null."""
        finite = {
            piece: {key: value if math.isfinite(value) else None for key, value in rated.items()}
            for piece, rated in ratings.items()
        }
        write_atomically(self.folder / name, json.dumps(finite, indent=1).encode())


class NullTracker(Tracker):
    """A tracker that writes nothing, for processes other than the lead."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def flush(self, step: int) -> None:
        pass

    def write_piece(self, name: str, score: Any, audio: Audio | None, sample_rate: int) -> None:
        pass

    def write_ratings(self, name: str, ratings: Mapping[str, Mapping[str, float]]) -> None:
        pass


def summarise(folder: Path, ratings: Mapping[str, Mapping[str, npt.NDArray[np.float32]]]) -> str:
    """Write ``summary.json``: mean rewards of new base and tuned samples, and their difference; returns it as text.

    ``ratings`` maps "base" and "tuned" to the rewards of each, (n,) without NaN: "reward", which was optimised, and of
    several rewards each by its name. Raises ``Failure`` if n is below 2.
    """
    rewards = {name: each["reward"] for name, each in ratings.items()}
    if min(map(len, rewards.values())) < 2:
        rated = ", ".join(f"{len(values)} of the {name} model" for name, values in rewards.items())
        raise Failure(
            f"base and tuned model cannot be compared: too few fresh samples could be rated ({rated}; expected at "
            f"least 2 each). The tuned model is saved in {folder / 'tuned'}"
        )
    mean = {name: float(values.mean()) for name, values in rewards.items()}
    error = {name: float(values.std(ddof=1)) / math.sqrt(len(values)) for name, values in rewards.items()}
    difference, its_error = mean["tuned"] - mean["base"], math.hypot(*error.values())
    parts = {  # model -> reward -> mean; empty for a single reward
        name: {part: float(values.mean()) for part, values in each.items() if part != "reward" and len(values)}
        for name, each in ratings.items()
    }
    summary: dict[str, Any] = {
        name: {"n": len(rewards[name]), "reward": mean[name], "standard_error": error[name]}
        | ({"rewards": parts[name]} if parts[name] else {})
        for name in rewards
    }
    summary["difference"] = {"reward": difference, "standard_error": its_error}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    times = f" = {difference / its_error:.1f} standard errors" if its_error else ""
    return "\n".join(
        [
            *(
                f"{name:>10} {mean[name]:7.3f} ± {error[name]:.3f}  mean reward of {len(rewards[name])} fresh samples"
                for name in rewards
            ),
            f"difference {difference:+7.3f} ± {its_error:.3f}{times}",
            *(
                f"{part}: {parts['base'][part]:.3f} -> {parts['tuned'][part]:.3f}"
                for part in parts["base"]
                if part in parts["tuned"]
            ),
            f"listen:       {folder / 'final'}/00-base.wav, then 00-tuned.wav, 01-base.wav, ... (and .mid)",
            f"reward curve: {folder / 'reward_mean.png'}",
            f"tuned model:  {folder / 'tuned'}",
        ]
    )


def read_metrics(folder: Path, keys: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The run's metrics, one mapping per step, in order: "step" and those of ``keys`` that it has (None: all).

    A last line that a crash cut short is left out. So is any other line that cannot be read, with a warning on stderr.
    Raises ``UserError`` if there are no metrics.
    """
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"run {folder}: has no {METRICS}")
    rows, damaged = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if damaged:  # and not the last
                click.echo(f"Warning: {path}: line {damaged} is damaged and left out", err=True)
            damaged = 0
            try:
                row = parse_json(line)
                if not isinstance(row["step"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                damaged = number
                continue
            rows.append(row if keys is None else {key: row[key] for key in ("step", *keys) if key in row})
    return rows


def _cut_back(folder: Path, step: int) -> None:
    """Delete what was written after ``step``, since it will be written again."""
    if (folder / METRICS).exists():
        # with step 0 everything is written again, the metrics of the base included
        rows = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step and step > 0]
        write_atomically(folder / METRICS, "".join(rows).encode())
    for path in (folder / "completions").glob("*"):
        if is_leftover(path) or (path.suffix == ".parquet" and path.stem.isdecimal() and int(path.stem) > step):
            path.unlink()
