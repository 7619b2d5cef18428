"""The notes of a score as columns (``gather``), and ticks as seconds (``seconds_at``)."""

from typing import Any

import numpy as np
import numpy.typing as npt
from symusic.core import ScoreTick


def gather(score: ScoreTick) -> dict[str, npt.NDArray[np.int64]]:
    """The notes of all tracks, (notes,) each: time, duration, pitch, voice (program, drums 128); sorted by time."""
    columns = [
        {**track.notes.numpy(), "voice": np.full(len(track.notes), 128 if track.is_drum else track.program)}
        for track in score.tracks
    ]
    names = ("time", "duration", "pitch", "voice")
    notes = {name: np.concatenate([[], *(part[name] for part in columns)]).astype(np.int64) for name in names}
    order = np.argsort(notes["time"], kind="stable")
    return {name: column[order] for name, column in notes.items()}


def seconds_at(
    ticks: npt.NDArray[np.int64], tempos: dict[str, npt.NDArray[Any]], per_quarter: int
) -> npt.NDArray[np.float64]:
    """Seconds at each of ``ticks``; ``tempos`` has sorted columns time and mspq; 120 bpm before the first tempo."""
    changes = np.append(0, tempos["time"]).astype(np.float64)
    length = np.append(500_000, tempos["mspq"]) / 1e6 / per_quarter  # seconds per tick
    begins = np.append(0.0, np.cumsum(np.diff(changes) * length[:-1]))
    which = np.searchsorted(changes, ticks, side="right") - 1
    return np.asarray(begins[which] + (ticks - changes[which]) * length[which])
