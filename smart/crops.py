"""Training rows: random crops of tokenised pieces, moved to other keys, touches, tempos and time signatures."""

from typing import Any

import numpy as np
import torch

from smart.meters import Meters, Tokens
from smart.prompts import Pieces
from smart.tokens import vocabulary


class Crops:
    """Rows of at most ``crop`` tokens (BOS and EOS included) from ``pieces``, drawn by a seeded generator.

    A piece is drawn in proportion to the number of rows that it would fill, so that every token is seen about equally
    often. All pitches of a row are shifted by the same number of semitones, at most ``transpose``, within the
    vocabulary's range; ``velocity_shift`` and ``tempo_shift`` do the same to its velocities and tempos, in steps of the
    vocabulary. ``openings`` is the share of rows that start at the beginning of a piece, half of them without BOS, like
    prompts. ``meters`` is the share of rows that are written in a random time signature (``smart.meters``); these begin
    at a bar line, after BOS if they have it. ``pieces`` must not be empty.
    """

    def __init__(
        self,
        pieces: Pieces,
        tokenizer: Any,
        *,
        crop: int,
        transpose: int = 0,
        velocity_shift: int = 0,
        tempo_shift: int = 0,
        openings: float = 0.0,
        meters: float = 0.0,
    ) -> None:
        self.pieces, self.facts, self.crop = pieces, vocabulary(tokenizer), crop
        self.openings, self.share = openings, meters
        self.meters = Meters(tokenizer)
        lengths = np.array([len(pieces[index]) for index in range(len(pieces))])
        self.cumulative = np.cumsum(np.ceil((lengths + 2) / crop))
        self.shifts = [
            (np.isin(np.arange(self.facts.size), ids), ids[0], ids[-1], largest)
            for ids, largest in (
                (self.facts.pitch_ids, transpose),
                (self.facts.velocity_ids, velocity_shift),
                (self.facts.tempo_ids, tempo_shift),
            )
            if largest
        ]

    def batch(self, rows: int, random: np.random.Generator) -> torch.Tensor:
        """(rows, crop) int64, right-padded with PAD; ``random`` decides everything."""
        out = torch.full((rows, self.crop), self.facts.pad_id)
        for row in range(rows):
            tokens = self._row(random)
            out[row, : len(tokens)] = torch.from_numpy(tokens)
        return out

    def _row(self, random: np.random.Generator) -> Tokens:
        index = int(np.searchsorted(self.cumulative, random.uniform(0, self.cumulative[-1]), side="right"))
        piece = self.pieces[min(index, len(self.pieces) - 1)]
        tokens = np.concatenate([[self.facts.bos_id], piece, [self.facts.eos_id]]).astype(np.int64)
        start = int(random.integers(max(len(tokens) - self.crop, 0) + 1))
        if random.random() < self.openings:
            start = int(random.integers(2))
        if self.share and random.random() < self.share:
            tokens = self._rewritten(tokens, start, random)[: self.crop]
        else:
            tokens = tokens[start : start + self.crop]
        for of_this_kind, low, high, largest in self.shifts:
            places = of_this_kind[tokens]
            if places.any():
                shift = int(random.integers(-largest, largest + 1))
                tokens[places] += min(max(shift, low - tokens[places].min()), high - tokens[places].max())
        return tokens

    def _rewritten(self, piece: Tokens, start: int, random: np.random.Generator) -> Tokens:
        """The tokens from the last bar line at or before ``start`` on, in a random time signature, if it fits."""
        lines = np.flatnonzero(piece == self.facts.bar_id)
        if start > 1 and len(lines):
            start = _latest(lines, start)
        begin = piece[:1] if start == 0 else piece[:0]  # BOS
        start = max(start, 1)
        music = piece[start : start + 2 * self.crop]  # the new row may need fewer tokens
        music, end = (music[:-1], music[-1:]) if music[-1] == self.facts.eos_id else (music, music[:0])
        signature = int(random.choice(self.facts.time_signature_ids))
        tempos = np.flatnonzero(np.isin(piece, self.facts.tempo_ids))
        if len(tempos) and len(music) and music[0] == self.facts.bar_id:
            tempo = int(piece[_latest(tempos, start)])
            if factors := self.meters.factors(music, tempo, signature):
                music = self.meters.rewrite(music, tempo, signature, factors[int(random.integers(len(factors)))])
        return np.concatenate([begin, music, end])


def _latest(places: Tokens, start: int) -> int:
    """The last of ``places``, increasing, up to ``start``; the first one if all are later."""
    return int(places[max(int(np.searchsorted(places, start, side="right")) - 1, 0)])
