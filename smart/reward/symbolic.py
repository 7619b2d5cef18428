"""``symbolic``: rules on the notes of a piece, each with a direction or a target.

    load_reward("symbolic", dissonance="low", note_density=6.0)

Each rule is an axis, rated from 1 to 10. With x the measured value and [a, b] the range of its measure:

    "high"      1 + 9 (x - a) / (b - a)                 x outside the range counts as its nearer end
    "low"       1 + 9 (b - x) / (b - a)
    a number t  10 - 9 min(2 |x - t| / (b - a), 1)      10 at the target, 1 at half the range from it

A piece without notes rates 1 by every rule, so that silence is never the best way to avoid something.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart import UserError
from smart.features import is_empty, midi_features
from smart.render import score_notes
from smart.reward.reward import NoteReward

LOWEST, HIGHEST = 1.0, 10.0
DIRECTIONS = ("high", "low")
DISSONANT = (1, 2, 6)  # interval classes in semitones: seconds and sevenths, and the tritone
SPAN, FINGERS = 14, 5  # semitones that a hand reaches (a ninth), and notes that it plays at once
# how well each scale degree fits a major and a minor key (Krumhansl 1990, p. 30)
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

Notes = npt.NDArray[np.float64]


def dissonance(notes: Notes) -> float:
    """Share of the time of all sounding pairs of pitches in which they are a second, a seventh or a tritone apart.

    ``notes`` (n, 6) as ``smart.render.score_notes`` returns them. Intervals count modulo the octave; no pairs give 0.
    """
    onset, end, pitch = notes[:, 0], notes[:, 0] + notes[:, 1], notes[:, 2].astype(int)
    first, second = np.triu_indices(len(notes), 1)
    together = np.minimum(end[first], end[second]) - np.maximum(onset[first], onset[second])
    interval = np.abs(pitch[first] - pitch[second])
    together = np.where((together > 0) & (interval > 0), together, 0)
    harsh = np.isin(np.minimum(interval % 12, -interval % 12), DISSONANT)
    return float(together[harsh].sum() / total) if (total := together.sum()) > 0 else 0.0


def playability(notes: Notes) -> float:
    """Share of onsets at which two hands can strike all notes, each at most five within a ninth (``SPAN``)."""
    order = np.lexsort((notes[:, 2], notes[:, 0]))
    onset, pitch = notes[order, 0], notes[order, 2]
    begins = np.flatnonzero(np.diff(onset, prepend=-1.0) > 1e-6)
    chords = np.split(pitch, begins[1:])
    return float(np.mean([_two_hands(np.unique(chord)) for chord in chords]))


def _two_hands(chord: npt.NDArray[np.float64]) -> bool:
    """Whether some split of sorted pitches gives each hand at most ``FINGERS`` notes within ``SPAN``."""

    def reached(hand: npt.NDArray[np.float64]) -> bool:
        return len(hand) <= FINGERS and (not len(hand) or hand[-1] - hand[0] <= SPAN)

    return any(reached(chord[:split]) and reached(chord[split:]) for split in range(len(chord) + 1))


def key(notes: Notes) -> float:
    """How clearly the piece is in one key, 0 to 1.

    It is the best correlation of the pitch classes, weighted by duration, with Krumhansl's profiles of the 24 keys.
    """
    heard = np.bincount(notes[:, 2].astype(int) % 12, weights=notes[:, 1], minlength=12)
    if heard.std() == 0:
        return 0.0
    profiles = [np.roll(profile, root) for profile in (MAJOR, MINOR) for root in range(12)]
    return float(max(0.0, *(np.corrcoef(heard, profile)[0, 1] for profile in profiles)))


def note_density(notes: Notes) -> float:
    """Notes per second, from the first onset to the end of the last note."""
    length = (notes[:, 0] + notes[:, 1]).max() - notes[:, 0].min()
    return len(notes) / max(float(length), 0.1)


class Measure(NamedTuple):
    """What a rule measures: of the paper's features, or of the pitched notes (n, 6); and the range of its values."""

    of_features: Callable[[Mapping[str, Any]], float] | None
    of_notes: Callable[[Notes], float] | None
    low: float
    high: float


def _feature(name: str, low: float, high: float) -> Measure:
    return Measure(lambda features: float(features[name]), None, low, high)


def _mean(name: str, low: float, high: float) -> Measure:
    return Measure(lambda features: float(np.mean(features[name])), None, low, high)


MEASURES = {
    "number_of_notes": _feature("number_of_notes", 0, 200),
    "polyphony_rate": _feature("polyphony_rate", 0, 1),
    "empty_beat_rate": _feature("empty_beat_rate", 0, 1),
    "mean_pitch": _mean("pitches", 21, 108),
    "pitch_range": _feature("pitch_range", 0, 87),
    "scale_consistency": _feature("scale_consistency", 0, 1),
    "mean_velocity": _mean("velocities", 1, 127),
    "velocity_range": _feature("velocity_range", 0, 126),
    "dissonance": Measure(None, dissonance, 0, 1),
    "playability": Measure(None, playability, 0, 1),
    "key": Measure(None, key, 0, 1),
    "note_density": Measure(None, note_density, 0, 20),
}


def measure(piece: Any, names: Sequence[str]) -> dict[str, float]:
    """The measures ``names`` of a piece (``symusic.Score`` in ticks) that has notes other than drums."""
    features, notes = midi_features(piece), score_notes(piece)
    pitched = notes[notes[:, 5] == 0]
    found = {}
    for name in names:
        of_features, of_notes, _, _ = MEASURES[name]
        found[name] = of_features(features) if of_features else of_notes(pitched) if of_notes and len(pitched) else 0.0
    return found


def grade(value: float, rule: str | float, low: float, high: float) -> float:
    """The rating of ``value`` by a rule, 1 to 10: see the module."""
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    if isinstance(rule, str):
        return LOWEST + (HIGHEST - LOWEST) * (share if rule == "high" else 1 - share)
    return HIGHEST - (HIGHEST - LOWEST) * min(2 * abs(value - rule) / (high - low), 1.0)


class Symbolic(NoteReward):
    """Rules on notes: each option is a measure with "high", "low" or a number. Without weights all count alike."""

    def __init__(self, *, device: str | torch.device = "cpu", **rules: str | float) -> None:
        if not rules:
            raise UserError(
                f'reward "symbolic" needs a rule, such as dissonance = "low"; it knows {", ".join(MEASURES)}'
            )
        for name, rule in rules.items():
            if name not in MEASURES:
                raise UserError(f'reward "symbolic" has no rule "{name}"; its rules are: {", ".join(MEASURES)}')
            _check_rule(name, rule)
        self.rules = rules
        self.axes = tuple(rules)
        self.provenance = f"rules on notes: {', '.join(f'{name} {rule}' for name, rule in rules.items())}"
        super().__init__(device=device)
        self.set_weights(None)

    def set_weights(self, weights: Mapping[str, float] | None) -> None:
        super().set_weights(dict.fromkeys(self.axes, 1.0) if weights is None else weights)

    def rate_notes(self, pieces: Sequence[Any]) -> dict[str, torch.Tensor]:
        measured = [None if is_empty(piece) else measure(piece, self.axes) for piece in pieces]
        return {
            name: torch.tensor(
                [LOWEST if one is None else grade(one[name], rule, *MEASURES[name][2:]) for one in measured]
            )
            for name, rule in self.rules.items()
        }


def _check_rule(name: str, rule: Any) -> None:
    number = isinstance(rule, int | float) and not isinstance(rule, bool)
    if rule in DIRECTIONS if isinstance(rule, str) else number and MEASURES[name].low <= rule <= MEASURES[name].high:
        return
    low, high = MEASURES[name][2:]
    raise UserError(f'symbolic.{name} = {rule!r}: expected "high", "low", or a number from {low:g} to {high:g}')
