"""A piano roll as a picture, for trackers: made with numpy alone, in milliseconds."""

from typing import Any

import numpy as np
import numpy.typing as npt

from smart.render import score_notes

LOWEST, KEYS = 21, 88  # the keys of a piano; notes outside them are drawn at the edge
ROW, COLUMNS = 4, 50  # pixels per key, and per second
LONGEST = 60.0  # seconds that are drawn, at most

Picture = npt.NDArray[np.uint8]  # (H, W, 3)


def piano_roll(score: Any, seconds: float | None = None) -> Picture:
    """A picture (H, W, 3) of a ``symusic.Score``, high notes on top; louder notes are darker, lines mark C and seconds.

    ``seconds`` is its length, None: that of the notes; at least one second, and at most ``LONGEST``.
    """
    notes = score_notes(score)
    end = float((notes[:, 0] + notes[:, 1]).max(initial=0.0)) if seconds is None else seconds
    width = round(COLUMNS * min(max(end, 1.0), LONGEST))
    picture = np.full((KEYS * ROW, width, 3), 255, np.uint8)
    picture[:, ::COLUMNS] = 235
    for pitch in range(24, LOWEST + KEYS, 12):
        picture[_top(pitch) + ROW - 1] = 215
    for onset, duration, pitch, velocity, *_ in notes:
        left, right = round(onset * COLUMNS), round((onset + duration) * COLUMNS)
        top, shade = _top(int(pitch)), 1 - (0.25 + 0.75 * velocity / 127)
        # a repeated note begins visibly: the last column of the one before stays free
        columns = slice(left, max(right - 1, left + 1))
        picture[top : top + ROW - 1, columns] = [int(colour + (255 - colour) * shade) for colour in (0, 60, 140)]
    return picture


def _top(pitch: int) -> int:
    """The first row of a key."""
    return (KEYS - 1 - min(max(pitch - LOWEST, 0), KEYS - 1)) * ROW
