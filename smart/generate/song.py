"""A MIDI file to continue or to change: its notes, its tokens, its bars, and every event as the file has it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smart import UserError
from smart.corpus import (
    Limits,
    ReaderPool,
    Reject,
    check_length,
    events,
    fit_bars,
    read_bytes,
    read_score,
    signatures_of,
)
from smart.corpus.events import Event, MidiFile
from smart.tokens import PIANO_PROGRAMS, decode, vocabulary

if TYPE_CHECKING:  # imported where they are used: the command line answers at once
    from symusic.core import ScoreTick

LIMITS = Limits(max_empty_bars=1.0, min_bars=1)
OVERHANG = 4  # notes may ring into the next bar for a part of a quarter note: a sixteenth


class Song(NamedTuple):
    """A MIDI file. Its tokens go on to its end, in empty bars where the model's instruments are silent."""

    midi: MidiFile
    score: ScoreTick
    tokens: list[int]
    token_lines: npt.NDArray[np.int64]  # (bars of the tokens + 1,) ticks
    lines: npt.NDArray[np.int64]  # (the song's own bars + 1,) ticks: others where its time signatures are not known
    hanging: int  # notes whose end the file does not say
    remark: str  # what was read otherwise than the file has it

    @property
    def end(self) -> int:
        """The first bar line after all notes of all tracks, in ticks."""
        return int(self.token_lines[-1])

    def last_bars(self, bars: int) -> float:
        """The quarter note with which the last ``bars`` bars begin."""
        return float(self.token_lines[max(len(self.token_lines) - 1 - bars, 0)]) / self.midi.division


def read_song(path: Path, option: str, tokenizer: Any, tokenizer_file: Path) -> Song:
    """Read a MIDI file, first in a separate process, so that a file that crashes or hangs the parser does no harm.

    Raises ``UserError``, which names ``option``, if it cannot be read, is longer than a day, or contains nothing that
    the model can represent.
    """
    with ReaderPool(tokenizer_file, LIMITS, 1) as pool:
        ((_, answer),) = pool.answers(iter([(b"song", os.fsencode(path))]))
    if isinstance(answer, tuple):
        raise UserError(f"{option} {path}: {': '.join(filter(None, answer))}")
    try:
        found = read_score(data := read_bytes(path, LIMITS), LIMITS)
        check_length(found.score, LIMITS)
        ends = [track.notes.numpy() for track in found.score.tracks if len(track.notes)]
        last = max(int((notes["time"] + notes["duration"]).max()) for notes in ends)
        onset = max(int(notes["time"].max()) for notes in ends)
        division = found.score.ticks_per_quarter
        bars = fit_bars(
            found.score.time_signatures,
            division,
            max(onset + 1, last - division // OVERHANG),
            signatures_of(tokenizer.vocab),
        )
    except (OSError, Reject) as error:
        raise UserError(f"{option} {path}: {': '.join(filter(None, map(str, error.args)))}") from None
    tokens = np.frombuffer(answer.tokens, "<u2").tolist()
    signatures = [token for token in tokens if token in set(vocabulary(tokenizer).time_signature_ids)]
    fitted = list(_each_bar(bars.signatures, int(bars.lines[-1]), division))
    more = [tokenizer.vocab[f"TimeSig_{beats}/{unit}"] for beats, unit in fitted][len(signatures) :]
    bar_id = vocabulary(tokenizer).bar_id
    for signature in more:
        tokens += [bar_id, signature]
    lengths = [bar_length(token, tokenizer) * division for token in (*signatures, *more)]
    lines = np.rint(np.cumsum([0.0, *lengths])).astype(np.int64)
    return Song(events.read_file(data), found.score, tokens, lines, bars.lines, found.hanging, answer.remarks)


def _each_bar(signatures: Any, end: int, division: int) -> Iterator[tuple[int, int]]:
    """The signature of each bar up to tick ``end``."""
    starts = [*(signature.time for signature in signatures), end]
    for number, signature in enumerate(signatures):
        length = 4 * division * signature.numerator / signature.denominator
        for _ in range(round((starts[number + 1] - starts[number]) / length)):
            yield signature.numerator, signature.denominator


def bar_length(time_signature: int, tokenizer: Any) -> float:
    """The quarter notes in a bar of a TimeSig token."""
    beats, unit = tokenizer[time_signature].removeprefix("TimeSig_").split("/")
    return 4 * int(beats) / int(unit)


def tempo_token(song: Song, tick: int, tokenizer: Any) -> int:
    """The Tempo token nearest to the song's tempo at a tick; it is 120 before the first."""
    tempos = {float(name.removeprefix("Tempo_")): token for name, token in tokenizer.vocab.items() if "Tempo_" in name}
    tempo = next((float(each.qpm) for each in reversed(song.score.tempos) if each.time <= tick), 120.0)
    return tempos[min(tempos, key=lambda value: abs(value - tempo))]


# --- What is written into the file --------------------------------------------------------------------------------


class Part(NamedTuple):
    """New notes of one instrument: rows of onset and end in ticks, pitch, velocity."""

    name: str
    program: int
    is_drum: bool
    notes: list[tuple[int, int, int, int]]


def add_parts(midi: MidiFile, parts: Iterable[Part]) -> MidiFile:
    """The file with one more track for each part, on a channel that is not in use if there is one."""
    used = {event.data[0] & 0x0F for track in midi.tracks for event in track if event.data[0] < 0xF0}
    free = [channel for channel in range(16) if channel not in {*used, events.DRUM_CHANNEL}]
    tracks = list(midi.tracks)
    for part in parts:
        channel = events.DRUM_CHANNEL if part.is_drum else free.pop(0) if free else 0
        name = part.name.encode("ascii")
        rows = [Event(0, b"\xff\x03" + bytes([len(name)]) + name)]
        if not part.is_drum:
            rows.append(Event(0, bytes([0xC0 | channel, part.program])))
        ends = [Event(end, bytes([0x80 | channel, pitch, 64])) for _, end, pitch, _ in part.notes]
        ons = [Event(time, bytes([0x90 | channel, pitch, velocity])) for time, _, pitch, velocity in part.notes]
        body = sorted([*ends, *ons], key=lambda event: event.tick)  # stable: a key is released, then pressed again
        tracks.append([*rows, *body, Event(body[-1].tick if body else 0, events.END_OF_TRACK)])
    return MidiFile(midi.division, tracks)


def new_parts(name: str, whole: ScoreTick, start: int, stop: float, division: int) -> list[Part]:
    """The notes of ``whole`` from tick ``start`` to ``stop`` of a file of ``division`` ticks per quarter note.

    A note that lasts longer ends with ``stop``. Ticks are those of the file, of which ``whole`` may have others.
    """
    scale = division / whole.ticks_per_quarter
    parts = []
    for track in whole.tracks:
        notes = [
            (round(note.time * scale), round(min(note.end * scale, stop)), note.pitch, note.velocity)
            for note in track.notes
            if start <= round(note.time * scale) < stop
        ]
        if notes:
            parts.append(Part(name, track.program, track.is_drum, notes))
    return parts


# --- Continuations ------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """The bar that follows the end of ``song``, as the tokens that the model reads before it writes."""

    song: Song
    line: list[int]  # bar line and time signature and, if it changes after the last note that is read, the tempo
    tokenizer: Any

    def alone(self, tokens: Sequence[int]) -> ScoreTick:
        """The music of ``tokens`` as a piece: in the tempo, time signature and key in which the song ends."""
        from symusic.core import KeySignatureTick, NoteTick, ScoreTick, TempoTick, TimeSignatureTick, TrackTick

        whole, line = self._decoded(tokens)
        score = ScoreTick(whole.ticks_per_quarter)
        for name, copy in (
            ("tempos", lambda event, tick: TempoTick(tick, mspq=event.mspq)),
            ("time_signatures", lambda event, tick: TimeSignatureTick(tick, event.numerator, event.denominator)),
        ):
            changes = list(getattr(whole, name))
            later = [copy(event, event.time - line) for event in changes if event.time >= line]
            if not later or later[0].time:
                later[:0] = [copy(event, 0) for event in changes if event.time < line][-1:]
            setattr(score, name, type(getattr(score, name))(later))
        keys = [each for each in self.song.score.key_signatures if -7 <= each.key <= 7 and each.tonality in (0, 1)]
        for key in keys[-1:]:
            score.key_signatures.append(KeySignatureTick(0, key.key, key.tonality))
        for part in whole.tracks:
            notes = [note for note in part.notes if note.time >= line]
            if notes:
                score.tracks.append(TrackTick("continuation", part.program, part.is_drum))
            for note in notes:
                score.tracks[-1].notes.append(NoteTick(note.time - line, note.duration, note.pitch, note.velocity))
        return score

    def joined(self, tokens: Sequence[int]) -> bytes:
        """The song's file with the music of ``tokens`` after its end, as new tracks.

        All events of the song stay as they are, byte for byte, except tempos and time signatures after its end.
        """
        whole, line = self._decoded(tokens)
        song, division, end = self.song, self.song.midi.division, self.song.end
        scale = division / whole.ticks_per_quarter
        changes = [_time_signature(end, *_signature(self.line[1], self.tokenizer))]
        for signature in whole.time_signatures:
            if signature.time > line:
                beats, unit = signature.numerator, signature.denominator
                changes.append(_time_signature(round(signature.time * scale), beats, unit))
        for tempo in whole.tempos:
            # at the line itself the song's own tempo goes on; a token only comes near it
            if tempo.time > line or (tempo.time == line and len(self.line) == 2):
                changes.append(Event(round(tempo.time * scale), events.TEMPO + b"\x03" + tempo.mspq.to_bytes(3, "big")))
        timing = (events.TEMPO, events.TIME_SIGNATURE)
        kept = song.midi.mapped(
            lambda track: (each for each in track if each.tick < end or each.data[:2] not in timing)
        )
        # the first track holds a file's tempos; where its notes end with it, it must not become longer
        first, rest = (kept.tracks[0], kept.tracks[1:]) if not song.hanging else ([], kept.tracks)
        tracks = [events.insert(first or [Event(0, events.END_OF_TRACK)], changes), *rest]
        return add_parts(MidiFile(division, tracks), new_parts("continuation", whole, end, math.inf, division)).dumps()

    def _decoded(self, tokens: Sequence[int]) -> tuple[ScoreTick, int]:
        whole = decode(self.tokenizer, [*self.song.tokens, *self.line, *tokens])
        return whole, round(self.song.end * whole.ticks_per_quarter / self.song.midi.division)


def continue_song(song: Song, tokenizer: Any) -> Continuation:
    """The continuation starts a new bar, in the time signature and tempo with which the whole song ends."""
    facts = vocabulary(tokenizer)
    signatures = [token for token in song.tokens if token in facts.time_signature_ids]
    # the one that the song's last bar begins with: 7/4 is read as 4/4 and 3/4
    last = int(np.searchsorted(song.token_lines, song.lines[-2], side="right")) - 1
    line = [facts.bar_id, signatures[min(last, len(signatures) - 1)]]
    tempo = tempo_token(song, song.end, tokenizer)
    if tempo != next((token for token in reversed(song.tokens) if token in facts.tempo_ids), None):
        line += [facts.position0_id, tempo]
    return Continuation(song, line, tokenizer)


def _signature(token: int, tokenizer: Any) -> tuple[int, int]:
    beats, unit = tokenizer[token].removeprefix("TimeSig_").split("/")
    return int(beats), int(unit)


def _time_signature(tick: int, beats: int, unit: int) -> Event:
    return Event(tick, events.TIME_SIGNATURE + bytes([4, beats, unit.bit_length() - 1, 24, 8]))


def is_piano(program: int, channel: int) -> bool:
    """Whether a piano model reads the notes of a channel."""
    return program in PIANO_PROGRAMS and channel != events.DRUM_CHANNEL
