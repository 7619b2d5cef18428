"""What a real excerpt is compared with: corruptions of it, and notes that nobody wrote.

Each is a function of the notes of an excerpt (``smart.render.NOTE_COLUMNS``, in seconds from its start), of another
excerpt of the same kind of music, and of a random generator. It returns new notes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smart.render import Notes

__all__ = ["HELD_OUT", "KINDS", "SECONDS", "Kind", "corrupt"]

SECONDS = 10.0
LOWEST, HIGHEST = 21, 108  # pitches of a piano
ON, LONG, PITCH, LOUD = range(4)
Corruption = Callable[[Notes, Notes, np.random.Generator], Notes]


@dataclass(frozen=True)
class Kind:
    """A corruption, how far from music it leads (0 to 1), and how often it is drawn in training."""

    make: Corruption
    harm: float
    weight: float = 1.0


def corrupt(name: str, notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """``notes`` with the corruption ``name``: sorted, inside the piano's range and within ``SECONDS``."""
    made = ALL[name].make(notes.copy(), other, draw)
    made = made[(made[:, ON] >= 0) & (made[:, ON] < SECONDS)]
    made[:, PITCH] = _into_range(made[:, PITCH])
    made[:, LOUD] = np.clip(np.round(made[:, LOUD]), 1, 127)
    made[:, LONG] = np.clip(made[:, LONG], 0.03, SECONDS)
    return made[np.lexsort((made[:, PITCH], made[:, ON]))]


def _into_range(pitch: np.ndarray) -> np.ndarray:
    """Pitches outside the piano, moved by octaves into it."""
    pitch = np.round(pitch)
    pitch = np.where(pitch < LOWEST, pitch + 12 * np.ceil((LOWEST - pitch) / 12), pitch)
    return np.where(pitch > HIGHEST, pitch - 12 * np.ceil((pitch - HIGHEST) / 12), pitch)


# --- wrong notes in right places


def _wrong_notes(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    wrong = draw.random(len(notes)) < draw.uniform(0.15, 0.6)
    low, high = notes[:, PITCH].min(), notes[:, PITCH].max()
    notes[wrong, PITCH] = draw.integers(low, high + 1, int(wrong.sum()))
    return notes


def _semitones(share: float | None) -> Corruption:
    """This share of the notes is a semitone too high or too low."""

    def make(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
        wrong = draw.random(len(notes)) < (share or draw.uniform(0.2, 0.6))
        notes[:, PITCH] += wrong * draw.choice([-1, 1], len(notes))
        return notes

    return make


def _right_hand(notes: Notes, draw: np.random.Generator) -> np.ndarray:
    """Which notes the right hand plays: those above a gap near the middle, by their neighbours in time."""
    return notes[:, PITCH] >= draw.normal(np.median(notes[:, PITCH]), 2)


def _hand(step: int | None) -> Corruption:
    """One hand is a semitone off."""

    def make(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
        right = _right_hand(notes, draw)
        if step is None and draw.random() < 0.4:
            right = ~right
        notes[right, PITCH] += step or draw.choice([-1, 1])
        return notes

    return make


def _shuffled_pitches(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    notes[:, PITCH] = draw.permutation(notes[:, PITCH])
    return notes


def _mirror(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    notes[:, PITCH] = notes[:, PITCH].min() + notes[:, PITCH].max() - notes[:, PITCH]
    return notes


def _octaves(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    notes[:, PITCH] += 12 * draw.integers(-2, 3, len(notes))
    return notes


# --- right notes in wrong places


def _jitter(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    notes[:, ON] = np.abs(notes[:, ON] + draw.normal(0, draw.uniform(0.07, 0.25), len(notes)))
    return notes


def _cells(seconds: float | None) -> Corruption:
    """Pieces of the excerpt of this length in another order."""

    def make(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
        cell = seconds or draw.choice([0.35, 0.5, 0.5, 0.7])
        many = int(np.ceil(SECONDS / cell))
        to = draw.permutation(many)
        at = np.minimum((notes[:, ON] / cell).astype(int), many - 1)
        notes[:, ON] += (to[at] - at) * cell
        return notes

    return make


def _hand_late(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """One hand is late, by no part of a beat."""
    late = _right_hand(notes, draw)
    notes[late, ON] += draw.uniform(0.12, 0.45)
    return notes


def _reversed(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    notes[:, ON] = notes[:, ON].max() + notes[:, ON].min() - notes[:, ON]
    return notes


def _random_velocities(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    notes[:, LOUD] = draw.integers(10, 128, len(notes))
    return notes


# --- two pieces


def _two_pieces(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    other = other.copy()
    other[:, PITCH] += draw.choice([-6, -4, -3, -1, 1, 2, 3, 6])
    return np.concatenate([notes, other])


def _other_hand(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """The right hand of one piece over the left hand of another, in any key."""
    other = other.copy()
    other[:, PITCH] += draw.integers(-6, 6)
    return np.concatenate([notes[_right_hand(notes, draw)], other[~_right_hand(other, draw)]])


def _medley(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """Two pieces in turn, a cell each."""
    cell = draw.uniform(0.4, 1.2)
    other = other.copy()
    other[:, PITCH] += draw.choice([-4, -3, -1, 1, 3, 6])
    first = (notes[:, ON] // cell) % 2 == 0
    second = (other[:, ON] // cell) % 2 == 1
    return np.concatenate([notes[first], other[second]])


# --- notes that nobody wrote


def _notes(on: np.ndarray, long: np.ndarray, pitch: np.ndarray, loud: np.ndarray) -> Notes:
    zeros = np.zeros(len(on))
    return np.stack(np.broadcast_arrays(on, long, pitch, loud, zeros, zeros), axis=1).astype(np.float64)


def _step(draw: np.random.Generator) -> float:
    """Seconds of a grid: a sixteenth, an eighth or a quarter, at 60 to 160 beats per minute."""
    return float(60 / draw.uniform(60, 160) / draw.choice([1, 2, 2, 4, 4]))


def _density(notes: Notes, draw: np.random.Generator) -> int:
    """How many notes: as many as the excerpt, or any number."""
    return max(8, int(len(notes) * draw.uniform(0.7, 1.4)) if draw.random() < 0.6 else int(draw.integers(15, 160)))


def _range(notes: Notes, draw: np.random.Generator) -> tuple[int, int]:
    if draw.random() < 0.5:
        return int(notes[:, PITCH].min()), int(notes[:, PITCH].max()) + 1
    middle, half = draw.integers(50, 75), draw.integers(6, 40)
    return max(LOWEST, int(middle - half)), min(HIGHEST, int(middle + half)) + 1


def _loudness(many: int, draw: np.random.Generator) -> np.ndarray:
    middle, spread = draw.uniform(45, 105), draw.choice([0.0, 5.0, 15.0, 30.0])
    return np.clip(draw.normal(middle, spread, many), 8, 127)


def _random(on_grid: bool, scale: bool) -> Corruption:
    """Random pitches, of a scale or all twelve, on a grid or anywhere, each alone or in chords."""

    def make(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
        many, step = _density(notes, draw), _step(draw)
        on = draw.uniform(0, SECONDS, many)
        if draw.random() < 0.3:  # several at once
            on = draw.choice(on, many)
        if on_grid:
            on = np.floor(on / step) * step
        low, high = _range(notes, draw)
        pitches = np.arange(low, high)
        if scale:
            kept = np.isin((pitches - draw.integers(12)) % 12, [0, 2, 4, 5, 7, 9, 11])
            pitches = pitches[kept] if kept.any() else pitches
        long = step * draw.choice([1, 1, 2, 4], many) if on_grid else draw.uniform(0.08, 1.0, many)
        return _notes(on, long, draw.choice(pitches, many), _loudness(many, draw))

    return make


def _walk(steps: tuple[int, ...], voices: bool = True) -> Corruption:
    """One to three voices that walk by these steps, straight or at random."""

    def make(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
        parts = []
        for _ in range(int(draw.integers(1, 4)) if voices else 1):
            step = max(_step(draw), 0.12)
            on = np.arange(0, SECONDS, step)
            low, high = LOWEST + 12, HIGHEST - 12
            moves = draw.choice(steps, len(on)) * draw.choice([-1, 1], len(on))
            if draw.random() < 0.5:  # straight for a while
                moves = np.abs(moves) * np.repeat(draw.choice([-1, 1], len(on)), draw.integers(4, 20))[: len(on)]
            pitch = draw.integers(low + 12, high - 12) + np.cumsum(moves)
            span = high - low
            pitch = low + np.abs((pitch - low + span) % (2 * span) - span)  # reflected at the ends
            parts.append(_notes(on, np.full(len(on), step), pitch, _loudness(len(on), draw)))
        return np.concatenate(parts)

    return make


# --- too little


def _loop(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """A short part of the excerpt, again and again."""
    length = draw.uniform(0.4, 2.1)
    start = draw.choice(notes[:, ON])
    start = min(start, SECONDS - length)
    part = notes[(notes[:, ON] >= start) & (notes[:, ON] < start + length)]
    parts = []
    for k in range(int(np.ceil(SECONDS / length))):
        again = part.copy()
        again[:, ON] += k * length - start
        parts.append(again)
    return np.concatenate(parts)


def _chord(notes: Notes, draw: np.random.Generator) -> np.ndarray:
    """Pitches that sound together: of the excerpt, or a chord that a policy may settle on."""
    if draw.random() < 0.4:
        at = draw.choice(notes[:, ON])
        return np.unique(notes[np.abs(notes[:, ON] - at) < draw.uniform(0.05, 0.8), PITCH])[:8]
    root = draw.integers(30, 66)
    shape = [[0, 4, 7], [0, 3, 7], [0, 7, 12, 16], [0, 12, 19, 24], [0, 4, 7, 11], [0, 5, 10], [0, 12], [0, 3, 6, 9]]
    chord = np.array(shape[draw.integers(len(shape))])
    return root + np.concatenate([chord, chord + 12 * draw.integers(1, 4)] if draw.random() < 0.5 else [chord])


def _repeated_chord(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """One or two chords that never rest."""
    step = _step(draw)
    chords = [_chord(notes, draw) for _ in range(int(draw.integers(1, 3)))]
    every = int(draw.choice([4, 8, 16]))
    parts = []
    for k, on in enumerate(np.arange(0, SECONDS, step)):
        chord = chords[(k // every) % len(chords)]
        if draw.random() < 0.2:  # arpeggiated
            chord = draw.choice(chord, 1)
        parts.append(_notes(np.full(len(chord), on), np.full(len(chord), step), chord, _loudness(len(chord), draw)))
    return np.concatenate(parts)


def _collapsed(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """What an over-optimised policy writes: a few pitches over all registers, dense, in a rhythm without phrases."""
    pitches = np.unique(np.concatenate([_chord(notes, draw) for _ in range(int(draw.integers(1, 4)))]))
    step, many = _step(draw), int(draw.integers(60, 260))
    on = np.floor(draw.uniform(0, SECONDS, many) / step) * step
    weight = draw.dirichlet(np.ones(len(pitches)))
    long = step * draw.choice([1, 2, 4, 8], many)
    return _notes(on, long, draw.choice(pitches, many, p=weight), _loudness(many, draw))


def _held_chord(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """A chord or a note, struck one to four times and held."""
    chord = _chord(notes, draw)[: draw.integers(1, 9)]
    on = np.repeat(np.arange(draw.integers(1, 5)) * draw.uniform(1.5, 4), len(chord))
    return _notes(on, np.full(len(on), SECONDS), np.resize(chord, len(on)), _loudness(len(on), draw))


def _few_notes(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """Only a few notes of the excerpt, or only its first second or two."""
    if draw.random() < 0.5:
        return notes[notes[:, ON] < draw.uniform(0.3, 2.5)]
    return notes[np.sort(draw.permutation(len(notes))[: draw.integers(1, 7)])]


def _too_many(notes: Notes, other: Notes, draw: np.random.Generator) -> Notes:
    """Every note comes with neighbours: clusters."""
    copies = [notes]
    for _ in range(int(draw.integers(1, 3))):
        more = notes[draw.random(len(notes)) < draw.uniform(0.4, 1.0)].copy()
        more[:, PITCH] += draw.choice([-2, -1, 1, 2], len(more))
        copies.append(more)
    return np.concatenate(copies)


KINDS: dict[str, Kind] = {
    "wrong notes": Kind(_wrong_notes, 0.6, 1.5),
    "semitone errors": Kind(_semitones(None), 0.5, 3.0),
    "one hand a semitone off": Kind(_hand(None), 0.5, 4.0),
    "shuffled pitches": Kind(_shuffled_pitches, 0.7, 1.0),
    "jittered onsets": Kind(_jitter, 0.4, 1.0),
    "shuffled cells": Kind(_cells(None), 0.5, 6.0),
    "one hand late": Kind(_hand_late, 0.4, 0.7),
    "random velocities": Kind(_random_velocities, 0.2, 0.4),
    "two pieces at once": Kind(_two_pieces, 0.5, 1.0),
    "two pieces in turn": Kind(_medley, 0.5, 1.0),
    "random notes on a grid": Kind(_random(True, False), 1.0, 1.5),
    "random notes of a scale": Kind(_random(True, True), 0.8, 1.5),
    "random notes anywhere": Kind(_random(False, False), 1.0, 0.7),
    "chromatic walk": Kind(_walk((1,)), 1.0, 1.0),
    "loop": Kind(_loop, 0.5, 1.2),
    "repeated chord": Kind(_repeated_chord, 0.8, 2.0),
    "collapsed": Kind(_collapsed, 0.8, 2.0),
    "held chord": Kind(_held_chord, 1.0, 1.5),
    "few notes": Kind(_few_notes, 0.7, 0.5),
    "clusters": Kind(_too_many, 0.8, 0.8),
}
# never in training: at the strength of published comparisons, and kinds that no member has heard
MEASURED: dict[str, Kind] = {
    "half of the notes a semitone off": Kind(_semitones(0.5), 0.5),
    "right hand a semitone up": Kind(_hand(1), 0.5),
    "half-second cells shuffled": Kind(_cells(0.5), 0.5),
}
HELD_OUT: dict[str, Kind] = {
    "mirrored pitches": Kind(_mirror, 0.5),
    "random octaves": Kind(_octaves, 0.5),
    "reversed in time": Kind(_reversed, 0.3),
    "hands of two pieces": Kind(_other_hand, 0.5),
    "whole-tone walk": Kind(_walk((2,)), 1.0),
}
ALL = KINDS | MEASURED | HELD_OUT
