"""From the bytes of one MIDI file to one tokenised piece, or the reason why it is left out: ``PieceReader.read``.

What is kept (paper section 3.1): the piano tracks (General MIDI 1-8), merged and without duplicate notes, of pieces
that have no overfull bars, few empty bars, and enough bars for a prompt and a continuation. Beyond the paper's rules,
``Limits`` rejects what is not music: files that are truncated, or whose division, tempo, length or silences are absurd.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from symusic.core import ScoreTick

from smart.corpus.bars import fit_signatures, signatures_of
from smart.corpus.beats import find_bars
from smart.corpus.midi import Limits, Piece, Reading, Reject
from smart.corpus.notes import gather, seconds_at
from smart.corpus.pedal import sustain
from smart.corpus.remi import FastRemi
from smart.corpus.score import read_score
from smart.tokens import all_tracks, decode, encode, merge_piano, vocabulary

TOKEN = np.dtype("<u2")


def check_notes(score: ScoreTick, notes: dict[str, npt.NDArray[np.int64]], tail: int, limits: Limits) -> float:
    """The length in seconds of ``notes``, which are followed by ``tail`` silent ticks.

    Raises ``Reject`` for absurd values, before any costly work on them.
    """
    onsets = notes["time"]
    sounding = np.maximum.accumulate(onsets + notes["duration"])
    division = score.ticks_per_quarter
    if onsets[0] < 0 or notes["duration"].min() < 0 or sounding[-1] >= 2**31:
        raise Reject("absurd times", "ticks overflow 31 bits")
    quarters = onsets[-1] / division
    if quarters > limits.max_quarters:
        raise Reject("too long", f"{quarters:.0f} quarter notes, expected at most {limits.max_quarters}")
    # no bar of the vocabulary is shorter than a quarter, so notes within one quarter are in one bar, or nearly so
    crowd = limits.max_bar_notes
    if len(onsets) > crowd and (onsets[crowd:] - onsets[:-crowd]).min() < division:
        raise Reject("too many notes in a bar", f"over {crowd} within a quarter note")
    tempos = score.tempos.numpy()
    if len(tempos["mspq"]):
        longest, shortest = float(tempos["mspq"].max()), float(tempos["mspq"].min())  # microseconds per quarter
        slow, fast = (60e6 / length if length > 0 else np.inf for length in (longest, shortest))
        if slow < limits.min_tempo or fast > limits.max_tempo:
            wanted = f"expected {limits.min_tempo:g} to {limits.max_tempo:g} quarter notes per minute"
            raise Reject("absurd tempo", f"{slow:.4g} to {fast:.4g}, {wanted}")
    starts = seconds_at(onsets, tempos, division)
    stops = seconds_at(sounding, tempos, division)
    silence = float(max(starts[0], (starts[1:] - stops[:-1]).max(initial=0.0)))
    if silence > limits.max_silence:
        raise Reject("long silence", f"{silence:.0f} s, expected at most {limits.max_silence:.0f} s")
    after = tail * float(np.append(500_000, tempos["mspq"])[-1]) / 1e6 / division
    if after > limits.max_tail:
        raise Reject("long silence", f"{after:.0f} s at the end, expected at most {limits.max_tail:.0f} s")
    return float(stops[-1])


def content_hash(score: ScoreTick) -> bytes:
    """16 bytes that depend only on the notes' onsets (in quarter notes), pitches and programs."""
    notes, division = gather(score), score.ticks_per_quarter
    # twelfths of a quarter, rounded half up in integers, so that a file keeps its hash when its division is multiplied
    onsets = (notes["time"] * 24 + division) // (2 * division)
    keys = np.sort((notes["voice"] << 48) + onsets * 128 + notes["pitch"], kind="stable")
    keys = keys[np.append(True, np.diff(keys) != 0)[: len(keys)]]
    return hashlib.blake2b(keys.astype("<i8").tobytes(), digest_size=16).digest()


class PieceReader:
    """Reads MIDI files for one tokenizer within ``limits``; keeps all tracks if the vocabulary has programs."""

    def __init__(self, tokenizer: Any, limits: Limits, reading: Reading) -> None:
        self.tokenizer, self.limits, self.reading = tokenizer, limits, reading
        self.facts = vocabulary(tokenizer)
        self.signatures = signatures_of(tokenizer.vocab)
        self.is_pitch = np.zeros(self.facts.size, dtype=bool)
        self.is_pitch[[*self.facts.pitch_ids, *self.facts.drum_ids]] = True
        self.fast = FastRemi(tokenizer) if FastRemi.supports(tokenizer) else None
        self._tokens(ScoreTick(480))  # loads what is loaded lazily, before a worker limits its memory

    def read(self, data: bytes) -> Piece:
        """The piece in the bytes of a MIDI file. Raises ``Reject`` with the reason for leaving it out."""
        found = read_score(data, self.limits)
        whole, remarks = found.score, found.remarks()
        score = self._kept_tracks(whole)
        if not len(score.tracks):
            raise Reject("no notes" if self.tokenizer.config.use_programs else "no piano notes")
        seconds = check_notes(score, gather(score), found.tail, self.limits)
        digest, stretch = content_hash(score), 1.0  # of what was written, so that a piece stays in its split
        if self.reading.pedal:
            held = self._kept_tracks(sustain(whole, found.data))
            stretch = float(gather(held)["duration"].mean() / max(gather(score)["duration"].mean(), 1e-9))
            score = held
        placed = "as written"
        if self.reading.bars == "found":
            score, placed = find_bars(score)
        if placed == "as written" and (remark := fit_signatures(score, self.signatures, whole.time_signatures)):
            remarks.append(remark)
        tokens = self._tokens(score)
        notes, bars = self._check_bars(tokens)
        packed = tokens.astype(TOKEN).tobytes()
        return Piece(digest, packed, notes, bars, seconds, stretch, placed, "; ".join(remarks))

    def _kept_tracks(self, score: ScoreTick) -> ScoreTick:
        if self.tokenizer.config.use_programs:
            return all_tracks(score)
        return merge_piano(score, tuple(self.tokenizer.config.pitch_range))

    def _tokens(self, score: ScoreTick) -> npt.NDArray[np.int64]:
        """Tokens of ``score`` that survive decoding and encoding again. Raises ``Reject`` if there are none."""
        try:
            tokens = self._encode(score)
            for _ in range(3):
                again = self._encode(self._decode(tokens))
                if np.array_equal(again, tokens):
                    return tokens
                tokens = again
        except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
            raise Reject("cannot be tokenised", f"{type(error).__name__}: {error}"[:200]) from None
        raise Reject("no round trip", "its tokens do not decode to music with the same tokens")

    def _encode(self, score: ScoreTick) -> npt.NDArray[np.int64]:
        return self.fast.encode(score) if self.fast else np.array(encode(self.tokenizer, score))

    def _decode(self, tokens: npt.NDArray[np.int64]) -> ScoreTick:
        return self.fast.decode(tokens) if self.fast else decode(self.tokenizer, tokens)

    def _check_bars(self, tokens: npt.NDArray[np.int64]) -> tuple[int, int]:
        """The number of notes and of bars. Raises ``Reject`` for a piece that breaks the paper's rules."""
        bar = np.cumsum(tokens == self.facts.bar_id) - 1
        counts = np.bincount(bar[self.is_pitch[tokens]], minlength=bar[-1] + 1)
        empty, filled = float((counts == 0).mean()), int((counts > 0).sum())
        limits = self.limits
        if counts.max() > limits.max_bar_notes:
            raise Reject("too many notes in a bar", f"{counts.max()}, expected at most {limits.max_bar_notes}")
        if empty > limits.max_empty_bars:
            raise Reject("too many empty bars", f"{empty:.0%}, expected at most {limits.max_empty_bars:.0%}")
        if filled < limits.min_bars:
            raise Reject("too short", f"{filled} bars with notes, expected at least {limits.min_bars}")
        return int(counts.sum()), len(counts)
