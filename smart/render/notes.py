"""Notes and scores as arrays, which the renderers read.

A note array is (n, 6) float64, one note per row. Its columns are ``NOTE_COLUMNS``: onset and duration in
seconds, pitch 0-127, velocity 0-127, program 0-127, and drum, 0 or 1. A structured array with fields of these names
is accepted too.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Notes = npt.NDArray[np.float64]  # (n, 6), columns NOTE_COLUMNS
MAX_BEATS = 100.0  # quarter notes of a score that are rendered (paper section 3.5)
NOTE_COLUMNS = ("onset", "duration", "pitch", "velocity", "program", "drum")
_HIGHEST = (86_400.0, 86_400.0, 127.0, 127.0, 127.0, 1.0)  # value of each column; no piece lasts a day


def check_notes(notes: npt.ArrayLike) -> Notes:
    """``notes`` as a contiguous (n, 6) float64 array; structured arrays are unfolded.

    Raises ``ValueError`` for another shape, and for a value that is not finite, negative, too large, or a fraction in a
    column of whole numbers; the message names the column.
    """
    array = np.asarray(notes)
    if array.dtype.names is not None:
        missing = [name for name in NOTE_COLUMNS if name not in array.dtype.names]
        if missing:
            raise ValueError(f"expected the fields {NOTE_COLUMNS}, got {array.dtype.names}: no {missing[0]}")
        array = np.stack([array[name].astype(np.float64) for name in NOTE_COLUMNS], axis=-1)
    array = np.ascontiguousarray(array, dtype=np.float64)
    if array.shape == (0,):
        array = array.reshape(0, 6)
    if array.ndim != 2 or array.shape[1] != len(NOTE_COLUMNS):
        raise ValueError(f"expected notes of shape (n, 6), columns {NOTE_COLUMNS}, got {array.shape}")
    for column, (name, highest) in enumerate(zip(NOTE_COLUMNS, _HIGHEST, strict=True)):
        values = array[:, column]
        whole = column >= 2
        good = (values >= 0) & (values <= highest)  # False for NaN
        if whole:
            good &= values == np.floor(values)
        if not good.all():
            row = int(np.argmin(good))
            kind = "a whole number" if whole else "seconds"
            raise ValueError(f"{name} of note {row} is {values[row]}: expected {kind} from 0 to {highest:g}")
    return array


def score_notes(score: Any, *, max_beats: float = MAX_BEATS, from_beat: float = 0.0) -> Notes:
    """The notes of a ``symusic.Score`` of any time unit as an (n, 6) array, in seconds by its tempo map.

    The score is cut at ``max_beats`` quarter notes: notes that start there or later are dropped, longer ones end there.
    The quarter note ``from_beat`` becomes second 0: notes that end by then are dropped, those that sound begin there.
    Until the first tempo it is 120 beats per minute; of two tempos at one time the later in the list counts. Rows are
    sorted by onset, drum, program, pitch, velocity and duration, whatever the order of the tracks.

    Raises ``TypeError`` for anything but a score, and ``ValueError`` for a negative onset or duration or a pitch,
    velocity, program or tempo out of range; the message names the column.
    """
    if not all(hasattr(score, name) for name in ("tracks", "tempos", "ttype")):
        raise TypeError(f"expected a symusic.Score, got {type(score).__name__}")
    unit = str(score.ttype).rpartition(".")[2].lower()
    if unit not in ("tick", "quarter", "second"):
        raise TypeError(f"expected a score in ticks, quarters or seconds, got {score.ttype}")
    scale = float(score.ticks_per_quarter) if unit == "tick" else 1.0
    beats, seconds, pace = _tempo_map(score.tempos.numpy(), unit, scale)

    def to_seconds(beat: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        at = np.maximum(np.searchsorted(beats, beat, side="right") - 1, 0)
        return np.asarray(seconds[at] + (beat - beats[at]) * pace[at])

    first, stop = (beat if unit != "second" else float(to_seconds(beat)) for beat in (from_beat, max_beats))
    rows = []
    for track in score.tracks:
        notes = track.notes.numpy()
        start = notes["time"].astype(np.float64) / scale
        end = np.minimum(start + notes["duration"].astype(np.float64) / scale, stop)
        keep = start < stop
        if from_beat:
            keep &= (start >= first) | (end > first)
            start, end = np.maximum(start, first), np.maximum(end, first)
        if unit != "second":
            start, end = to_seconds(start), to_seconds(end)
        same = np.ones_like(start)
        columns = (
            start,
            end - start,
            notes["pitch"],
            notes["velocity"],
            same * track.program,
            same * track.is_drum,
        )
        rows.append(np.stack([np.asarray(column, np.float64) for column in columns], axis=1)[keep])
    notes = np.concatenate(rows) if rows else np.empty((0, 6))
    if from_beat:
        notes[:, 0] -= float(to_seconds(first)) if unit != "second" else first
    onset, duration, pitch, velocity, program, drum = notes.T
    return check_notes(notes[np.lexsort((duration, velocity, pitch, program, drum, onset))])


def _tempo_map(
    tempos: dict[str, npt.NDArray[Any]], unit: str, scale: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Times of the tempo changes in beats and in seconds, starting at 0, and the seconds per beat from each on."""
    at = tempos["time"].astype(np.float64) / scale
    pace = tempos["mspq"].astype(np.float64) / 1e6
    if not ((at >= 0) & np.isfinite(at)).all() or not (pace > 0).all():
        raise ValueError("tempo: expected times from 0 and a positive number of microseconds per beat")
    order = np.argsort(at, kind="stable")
    at, pace = np.append(0.0, at[order]), np.append(0.5, pace[order])
    steps = np.diff(at)
    other = np.append(0.0, np.cumsum(steps / pace[:-1] if unit == "second" else steps * pace[:-1]))
    return (other, at, pace) if unit == "second" else (at, other, pace)


def to_notes(score: Any) -> Notes:
    """A score or a note array as a checked note array."""
    if isinstance(score, np.ndarray | list | tuple):
        return check_notes(score)
    return score_notes(score)


def most_samples(sample_rate: int, seconds: float) -> int:
    """The largest number of samples that a clip may have."""
    if not (isinstance(sample_rate, int | np.integer) and 1000 <= sample_rate <= 384_000):
        raise ValueError(f"sample_rate: expected a whole number from 1000 to 384000, got {sample_rate!r}")
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds: expected more than 0 and at most 3600, got {seconds!r}")
    return max(1, round(seconds * sample_rate))


ON, OFF, CHANNEL, PITCH, VELOCITY, PROGRAM, DRUM = range(7)  # columns of played_notes


def played_notes(notes: Notes, sample_rate: int) -> npt.NDArray[np.int64]:
    """Notes as they are played, (m, 7) int64: on and off in samples, channel, pitch, velocity, program, drum.

    Each pitch of a channel sounds only once at a time: ``render_notes`` says how overlaps are resolved.
    """
    on = np.floor(notes[:, 0] * sample_rate + 0.5).astype(np.int64)
    off = np.floor((notes[:, 0] + notes[:, 1]) * sample_rate + 0.5).astype(np.int64)
    off = np.maximum(off, on + 1)
    pitch, velocity, program, drum = notes[:, 2:].astype(np.int64).T
    _, channel = np.unique(drum * 128 + program, return_inverse=True)
    table = np.stack([on, off, channel, pitch, velocity, program, drum], axis=1)
    table = table[np.lexsort((table[:, ON], table[:, PITCH], table[:, CHANNEL]))]
    if not len(table):
        return table
    same_key = (np.diff(table[:, [CHANNEL, PITCH]], axis=0) == 0).all(axis=1)
    together = same_key & (np.diff(table[:, ON]) == 0)
    first = np.flatnonzero(np.append(True, ~together))
    merged = table[first]
    merged[:, OFF] = np.maximum.reduceat(table[:, OFF], first)
    merged[:, VELOCITY] = np.maximum.reduceat(table[:, VELOCITY], first)
    again = (np.diff(merged[:, [CHANNEL, PITCH]], axis=0) == 0).all(axis=1)
    merged[:-1, OFF] = np.where(again, np.minimum(merged[:-1, OFF], merged[1:, ON]), merged[:-1, OFF])
    return merged
