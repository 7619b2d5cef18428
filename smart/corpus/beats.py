"""Bars for performances: ``find_bars`` tracks beats and writes a tempo map, so that bars are musical bars.

A recorded performance has one nominal tempo, and its notes fall anywhere between the bar lines. Here beats are found by
dynamic programming over time and period, after D. Ellis, *Beat tracking by dynamic programming*, 2007, whose period
is fixed; here it may drift. Files whose bar lines are only displaced are shifted, and those that already follow a
beat are left alone.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from symusic.core import NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList

from smart.corpus.notes import gather, seconds_at

DIVISION = 480  # ticks per quarter note of what is written
FRAME = 0.02  # seconds
PERIODS = 0.28 * 2 ** (np.arange(49) / 20)  # seconds per beat: 214 to 41 beats per minute, 20 steps per octave
USUAL = 0.6  # seconds per beat, as 100 beats per minute: the prior's centre
BEATS = np.array([1.0, 0.4, 0.6, 0.4])  # the stress of the beats of 4/4
SIXTEENTHS = np.kron(BEATS, [1, 0, 0, 0]) + np.tile([0, 0, 0.2, 0], 4)
FEWEST = 16  # notes of a piece whose beat is looked for
ON_GRID = 0.8  # share of onsets on the grid of sixteenths from which on a file is said to follow a beat


def find_bars(score: ScoreTick) -> tuple[ScoreTick, str]:
    """``score`` with bar lines where a listener would put them, and how they were placed.

    A score that follows a beat already is returned "as written": its onsets lie on the grid of sixteenths, or its
    tempo changes from beat to beat. If the grid is displaced, the score is "shifted" by less than a bar and keeps its
    tempos. All others are "tracked", and come back with one tempo per beat.
    """
    notes = gather(score)
    division, onsets = score.ticks_per_quarter, notes["time"]
    if len(onsets) < FEWEST:
        return score, "as written"
    step = division / 4
    # a circular mean, so that it finds the displacement of the grid
    phases = onsets % step * (2 * np.pi / step)
    shift = round(float(np.angle(np.exp(1j * phases).mean())) * step / (2 * np.pi))
    beats = onsets[-1] / division
    if _on_grid(onsets, step) >= ON_GRID or len(score.tempos) > beats / 4:
        return score, "as written"
    if _on_grid(onsets - shift, step) >= ON_GRID:
        return _shifted(score, shift + round(_downbeat(notes, shift, step, SIXTEENTHS) * step)), "shifted"
    return _tracked(score, notes), "tracked"


def _on_grid(onsets: npt.NDArray[np.int64], step: float) -> float:
    """The share of ``onsets`` within a tenth of ``step`` of its multiples."""
    return float((np.abs((onsets / step + 0.5) % 1 - 0.5) <= 0.1).mean())


def _downbeat(notes: dict[str, npt.NDArray[np.int64]], shift: int, step: float, stress: npt.NDArray[Any]) -> int:
    """Which of the first places, ``step`` ticks apart from tick ``shift`` on, begins a bar.

    ``stress`` (places of a bar,): how much of its bass and its chords music has at each place of a bar.
    """
    place = (notes["time"] - shift) / step
    nearest = np.rint(place).astype(np.int64)
    weight = _weights(notes) * (np.abs(place - nearest) < 0.1)
    found = np.bincount(nearest % len(stress), weight, minlength=len(stress))
    return int(np.argmax([(np.roll(found, -start) * stress).sum() for start in range(len(stress))]))


def _weights(notes: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    """How much a note marks a beat: low and long notes more than high and short ones."""
    low = np.clip((72 - notes["pitch"]) / 36, 0, 1)
    return 1 + 3 * low


def _shifted(score: ScoreTick, ticks: int) -> ScoreTick:
    """``score`` moved later by so little that the tick ``ticks`` falls on a bar line."""
    bar = 4 * score.ticks_per_quarter
    moved = score.shift_time(-ticks % bar)
    for change in (moved.tempos, moved.time_signatures):
        if len(change):
            change[0].time = 0
    return moved


def _tracked(score: ScoreTick, notes: dict[str, npt.NDArray[np.int64]]) -> ScoreTick:
    tempos = score.tempos.numpy()
    division = score.ticks_per_quarter
    beats = track(seconds_at(notes["time"], tempos, division), _weights(notes) * np.sqrt(_velocities(score)))

    def ticks(times: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.rint(np.interp(times, beats, np.arange(len(beats)) * float(DIVISION))).astype(np.int64)

    found = ScoreTick(DIVISION)
    for track_ in score.tracks:
        copy = track_.copy()
        columns = track_.notes.numpy()
        start = ticks(seconds_at(columns["time"].astype(np.int64), tempos, division))
        stop = ticks(seconds_at(columns["time"].astype(np.int64) + columns["duration"], tempos, division))
        copy.notes = NoteTickList.from_numpy(
            start.astype(np.int32),
            np.maximum(stop - start, 1).astype(np.int32),
            columns["pitch"],
            columns["velocity"],
        )
        found.tracks.append(copy)
    first = _downbeat(gather(found), 0, DIVISION, BEATS)
    lead = -first % 4
    found = found.shift_time(lead * DIVISION)
    lengths = np.diff(beats)
    lengths = np.append(np.full(lead, lengths[0]), lengths)
    found.tempos = TempoTickList.from_numpy(
        (np.arange(len(lengths)) * DIVISION).astype(np.int32), np.rint(lengths * 1e6).astype(np.int32)
    )
    found.time_signatures = TimeSignatureTickList.from_numpy(*(np.array([value], np.int32) for value in (0, 4, 4)))
    return found


def _velocities(score: ScoreTick) -> npt.NDArray[np.float64]:
    """Velocities in the order of ``gather``."""
    times = np.concatenate([track.notes.numpy()["time"] for track in score.tracks])
    values = np.concatenate([track.notes.numpy()["velocity"] for track in score.tracks])
    return np.asarray(values[np.argsort(times, kind="stable")], dtype=np.float64)


def track(onsets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Times of beats, in seconds, for notes at ``onsets`` (notes,) with ``weights`` (notes,); they cover all onsets.

    Maximises the mean strength of onsets on beats and, with half the weight, halfway between them, each beat weighted
    by its length, minus a cost for changes of the period and for unusual periods.
    """
    before = float(PERIODS[-1]) + 0.1
    size = int((onsets[-1] - onsets[0] + 2 * before) / FRAME) + 2
    strength = np.bincount(((onsets - onsets[0] + before) / FRAME).astype(int), weights, minlength=size)
    # chords count less than their number of notes; neighbours within 60 ms are one chord
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 1.2) ** 2)
    strength = np.sqrt(np.convolve(strength, kernel, "same"))
    strength /= strength.std() + 1e-9
    steps = np.rint(PERIODS / FRAME).astype(int)
    count, longest = len(steps), int(steps[-1])
    gain = steps * FRAME
    prior = -0.25 * (np.log2(PERIODS / USUAL)) ** 2 * gain * 4
    halves = steps // 2
    # totals[t + longest, p]: the best sum of gains of a sequence of beats that ends at frame t with period p
    totals = np.full((size + longest, count), 0.0)
    came = np.zeros((size, count), dtype=np.int8)
    moves = np.arange(-2, 3)
    cost = 0.35 * moves**2
    neighbours = (np.arange(count)[None] + moves[:, None]).clip(0, count - 1)  # (5, count)
    rows = np.arange(count)
    padded = np.concatenate([np.zeros(longest), strength])
    for frame in range(size):
        at = frame + longest
        origin = totals[at - steps]  # (count, count): row p: all periods at the frame one period p earlier
        options = origin[rows[None], neighbours] - cost[:, None] * gain[None]
        best = options.argmax(0)
        came[frame] = best
        totals[at] = options[best, rows] + gain * (strength[frame] + 0.5 * padded[at - halves]) + prior
    frame, period = divmod(int(totals[-longest // 2 - 1 :].argmax()), count)
    frame += size + longest - (longest // 2 + 1) - longest
    beats = []
    while frame >= 0:
        beats.append(frame)
        step, period = int(steps[period]), int(neighbours[came[frame, period], period])
        frame -= step
    times = np.array(beats[::-1]) * FRAME + onsets[0] - before
    while times[0] > onsets[0]:
        times = np.append(times[0] - (times[1] - times[0]), times)
    while times[-1] < onsets[-1] + before:
        times = np.append(times, times[-1] + (times[-1] - times[-2]))
    return _snapped(times, onsets, weights)


def _snapped(
    beats: npt.NDArray[np.float64], onsets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Each beat moved to the centre of the onsets within 50 ms of it, so that notes of a chord share a position."""
    near = np.searchsorted(beats, onsets).clip(1, len(beats) - 1)
    near -= onsets - beats[near - 1] < beats[near] - onsets
    close = np.abs(onsets - beats[near]) <= 0.05
    mass = np.bincount(near[close], weights[close], minlength=len(beats))
    moment = np.bincount(near[close], (weights * (onsets - beats[near]))[close], minlength=len(beats))
    return beats + np.divide(moment, mass, out=np.zeros_like(moment), where=mass > 0)
