"""The paper's MIDI features (section 4.2): eight low-level numbers and distributions of one piece.

Six of them are MusPy's (Dong et al. 2020) or follow its conventions. They are computed here from arrays, because
MusPy builds a piano roll of ticks by 128 pitches, which takes seconds and gigabytes for a long file with a fine tick
division. The values equal those of MusPy's functions and follow its conventions:

- polyphony counts ticks at which **more than two** pitches sound (``threshold=2`` in MusPy means three or more);
- a piece ends with its last note or controller, whichever is later; a beat is a quarter note in any time signature;
  tempo is ignored;
- drum tracks have no pitch: they count for beats and length, not for pitch, polyphony or scale.

Where MusPy gives NaN, or fails because there is no track, the value here is that of an empty piece: see
``midi_features``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from symusic.core import ScoreTick

FEATURES = (
    "number_of_notes",
    "polyphony_rate",
    "empty_beat_rate",
    "pitches",
    "pitch_range",
    "scale_consistency",
    "velocities",
    "velocity_range",
)
SCALARS = tuple(name for name in FEATURES if name not in ("pitches", "velocities"))

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
# (24, 12): 1 if a pitch class belongs to a scale
_SCALES = np.array(
    [[(pitch - root) % 12 in scale for pitch in range(12)] for scale in (MAJOR, MINOR) for root in range(12)], np.int64
)

Ints = npt.NDArray[np.int64]


def midi_features(score: ScoreTick) -> dict[str, Any]:
    """The eight features of ``score`` by name, in the order of ``FEATURES``.

    - ``number_of_notes``: all notes, drums included
    - ``polyphony_rate``: share of ticks at which more than two pitches sound; 0 for a piece of length 0
    - ``empty_beat_rate``: share of quarter notes in which no note sounds; 1 for a piece without notes
    - ``pitches``: (notes,) int64, MIDI pitch of every note except drums
    - ``pitch_range``: highest minus lowest of ``pitches``; 0 without notes, and -127, as in MusPy, with drums only
    - ``scale_consistency``: largest share of ``pitches`` in one major or natural minor scale; 0 if there are none
    - ``velocities``: (notes,) int64, velocity of every note
    - ``velocity_range``: largest minus smallest velocity; 0 without notes

    No value is NaN. Features of empty pieces distort averages: find such pieces with ``is_empty``.
    """
    columns = [track.notes.numpy() for track in score.tracks]
    pitched = np.concatenate(
        [[], *(np.full(len(track.notes), not track.is_drum) for track in score.tracks)], dtype=bool, casting="unsafe"
    )
    time, duration, pitch, velocity = (
        np.concatenate([np.empty(0, np.int64), *(part[name] for part in columns)]).astype(np.int64)
        for name in ("time", "duration", "pitch", "velocity")
    )
    end = time + duration
    controls = [int(track.controls.numpy()["time"].max()) for track in score.tracks if len(track.controls)]
    length = max([0, int(end.max(initial=0)), *controls])
    pitches = pitch[pitched]
    in_scale = _SCALES @ np.bincount(pitches % 12, minlength=12)
    lowest, highest = pitches.min(initial=127), pitches.max(initial=0)  # MusPy's initial values give -127 for no pitch
    return {
        "number_of_notes": len(pitch),
        "polyphony_rate": _ticks_above_two(time[pitched], end[pitched], pitches) / max(length, 1),
        "empty_beat_rate": _empty_beat_rate(time, end, length, score.ticks_per_quarter),
        "pitches": pitches,
        "pitch_range": int(highest - lowest) if len(pitch) else 0,
        "scale_consistency": int(in_scale.max()) / max(len(pitches), 1),
        "velocities": velocity,
        "velocity_range": int(velocity.max() - velocity.min()) if len(velocity) else 0,
    }


def is_empty(score: ScoreTick) -> bool:
    """Whether ``score`` has no notes except drums, so that its pitch features mean nothing."""
    return not any(len(track.notes) for track in score.tracks if not track.is_drum)


def _ticks_above_two(start: Ints, end: Ints, pitch: Ints) -> int:
    """Number of ticks at which more than two different pitches sound; overlapping notes of one pitch count once."""
    time, change = np.concatenate([start, end]), np.repeat([1, -1], len(start))
    order = np.lexsort((-change, time, np.tile(pitch, 2)))  # by pitch, then time; at the same time starts before ends
    time, change = time[order], change[order]
    sounding = np.cumsum(change)  # notes of the same pitch: 0 before its first note and after its last
    edge = ((change == 1) & (sounding == 1)) | (sounding == 0)
    time, change = time[edge], change[edge]
    order = np.argsort(time, kind="stable")
    time, pitches = time[order], np.cumsum(change[order])
    return int(np.diff(time)[pitches[:-1] > 2].sum())


def _empty_beat_rate(start: Ints, end: Ints, length: int, beat: int) -> float:
    """Share of empty beats; a note fills all beats from its start to its end, both included, as in MusPy."""
    beats = length // beat + 1
    begun = np.bincount(start // beat, minlength=beats + 1)
    ended = np.bincount(end // beat + 1, minlength=beats + 1)
    filled = int(np.count_nonzero(np.cumsum(begun - ended)[:beats]))
    return 1 - filled / beats
