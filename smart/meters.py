"""The same music in another time signature: the tokens of a piece with new bars, beats and tempos.

Prompts draw time signatures and tempos uniformly from the vocabulary, while nearly all music is in 4/4 at a moderate
tempo. Since positions and durations count twelfths of a beat, music can be written in any time signature of the
vocabulary and sound the same, apart from notes that become longer than the longest duration; pretraining uses this to
learn from the music it has what to write in the others.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from smart.tokens import duration_steps

Tokens = npt.NDArray[np.int64]

FACTORS = (Fraction(1, 2), Fraction(1), Fraction(2), Fraction(3), Fraction(4))  # new beats per old beat


class Meters:
    """Rewrites rows of a ``tokenizer``'s tokens; positions per beat and tempos are those of its vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        vocab: dict[str, int] = tokenizer.vocab
        self.steps = int(tokenizer.config.max_num_pos_per_beat)
        self.bar = vocab["Bar_None"]
        self.signatures: dict[int, tuple[int, int]] = {}  # id -> beats per bar, the note that is a beat (4: quarter)
        self.tempos: dict[int, float] = {}  # id -> quarter notes per minute
        self.positions: dict[int, int] = {}  # id -> steps after the bar line
        self.durations: dict[int, int] = {}  # id -> steps
        for token, number in vocab.items():
            kind, value = token.split("_", 1)
            if kind == "TimeSig":
                beats, unit = value.split("/")
                self.signatures[number] = int(beats), int(unit)
            elif kind == "Tempo":
                self.tempos[number] = float(value)
            elif kind == "Position":
                self.positions[number] = int(value)
            elif kind == "Duration":
                self.durations[number] = duration_steps(value, self.steps)
        self._position_ids = {value: number for number, value in self.positions.items()}
        self._duration_ids, self._duration_values = _columns(self.durations)
        self._tempo_ids, self._tempo_values = _columns(self.tempos)

    def factors(self, tokens: Tokens, tempo: int, signature: int) -> list[Fraction]:
        """Which of ``FACTORS`` keep every onset of ``rewrite`` on the grid and every tempo in the vocabulary's range.

        Empty if ``tokens`` have time signatures with different beats. Durations do not count: long notes are cut.
        """
        units = {self.signatures[token][1] for token in tokens.tolist() if token in self.signatures}
        if len(units) != 1:
            return []
        ratio = Fraction(units.pop(), self.signatures[signature][1])
        tempos = [self.tempos[token] for token in {tempo, *tokens.tolist()} if token in self.tempos]
        odd = self.steps % 2 or any(self.positions.get(token, 0) % 2 for token in tokens.tolist())
        low, high = self._tempo_values.min(), self._tempo_values.max()
        return [
            factor
            for factor in FACTORS
            if low <= min(tempos) * float(factor * ratio)
            and max(tempos) * float(factor * ratio) <= high
            and not (odd and factor.denominator == 2)
        ]

    def rewrite(self, tokens: Tokens, tempo: int, signature: int, factor: Fraction) -> Tokens:
        """``tokens`` (L,), which begin at a bar line, in bars of ``signature``, (L',).

        ``factor``, one of ``factors``, is the number of beats of the new signature in one beat of the old one. The
        tempo (``tempo`` is the id of the one in force at the start) changes accordingly, to the nearest one of the
        vocabulary, so that onsets keep their times up to this rounding. Durations become the nearest ones that the
        vocabulary has. The result states its tempo at position 0, as a prompt does. The last event may be incomplete,
        as in ``tokens``.
        """
        (_, old_unit), (beats, unit) = self.signatures[int(tokens[1])], self.signatures[signature]
        bar_steps, ratio = beats * self.steps, float(factor * Fraction(old_unit, unit))
        line, length = 0, 0  # steps from the start to this bar line, and of this bar
        events: list[tuple[int, list[int]]] = [(0, [tempo])]
        for token in tokens.tolist():
            if token == self.bar:
                line += length
            elif token in self.signatures:
                length = self.signatures[token][0] * self.steps
            elif token in self.positions:
                step = int((line + self.positions[token]) * factor)
                if step or len(events) > 1:
                    events.append((step, []))
            elif token in self.tempos:
                if events[-1][0]:
                    events[-1][1].append(token)
                else:
                    events[-1][1][0] = token
            else:
                events[-1][1].append(self._longer(token, factor))
        out: list[int] = []
        bars = 0
        for step, content in events:
            while bars <= step // bar_steps:
                out += [self.bar, signature]
                bars += 1
            out.append(self._position_ids[step % bar_steps])
            out += [self._faster(token, ratio) if token in self.tempos else token for token in content]
        return np.array(out)

    def _longer(self, token: int, factor: Fraction) -> int:
        if token not in self.durations:
            return token
        steps = max(round(self.durations[token] * factor), 1)
        return int(self._duration_ids[np.abs(self._duration_values - steps).argmin()])

    def _faster(self, token: int, ratio: float) -> int:
        return int(self._tempo_ids[np.abs(self._tempo_values - self.tempos[token] * ratio).argmin()])


def _columns(values: Mapping[int, float]) -> tuple[Tokens, npt.NDArray[np.float64]]:
    """The ids, and their values."""
    return np.array(list(values)), np.array(list(values.values()), np.float64)
