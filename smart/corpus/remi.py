"""The tokens of MidiTok's REMI encoder, computed with arrays: the same tokens in a tenth of the time.

MidiTok prepares a score (it resamples, quantises and removes duplicates, all in arrays) and then writes it as one
Python object per event. ``FastRemi`` leaves the preparation to MidiTok, so that MidiTok's rules of quantisation apply,
and computes the tokens by arithmetic on sorted times. It covers vocabularies like the paper's, without programs or with
a Program token before every note. For others ``FastRemi.supports`` is false, and MidiTok's own encoder is used.
"""

from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
from miditok import REMI
from miditok.utils import get_score_ticks_per_beat
from symusic.core import NoteTickList, ScoreTick, TempoTick, TempoTickList, TimeSignatureTickList, TrackTick

from smart.tokens import duration_steps, last_of_each_tick

Ints = npt.NDArray[np.int64]

# options that a configuration must not use; each adds tokens that this encoder does not know
UNSUPPORTED = (
    "program_changes", "use_chords", "use_rests", "use_sustain_pedals", "use_pitch_bends", "use_pitch_intervals",
    "use_key_signatures", "use_control_changes",
)  # fmt: skip
DRUMS = 128  # the voice of drums; the voice of any other track is its program


class FastRemi:
    """Encodes and decodes for ``tokenizer``. Raises ``ValueError`` if ``supports(tokenizer)`` is false."""

    def __init__(self, tokenizer: REMI) -> None:
        if not self.supports(tokenizer):
            raise ValueError("expected a REMI vocabulary like the paper's; use the tokenizer's own encoder")
        vocab: dict[str, int] = tokenizer.vocab
        self.vocab = vocab
        self.tokenizer = deepcopy(tokenizer)
        self.tokenizer.config.remove_duplicated_notes = False  # done in encode, with one sort
        self.steps = int(tokenizer.config.max_num_pos_per_beat)  # positions in a beat
        size = len(vocab)
        self.kind = np.array([token.split("_")[0] for token, _ in sorted(vocab.items(), key=lambda item: item[1])])
        self.value = np.zeros((size, 2))  # the value of each token: a number, or numerator and denominator
        for token, number in vocab.items():
            kind, value = token.split("_", 1)
            if kind in ("Pitch", "PitchDrum", "Velocity", "Position", "Tempo", "Program"):
                self.value[number, 0] = float(value)
            elif kind == "Duration":
                self.value[number, 0] = duration_steps(value, self.steps)
            elif kind == "TimeSig":
                self.value[number] = [int(part) for part in value.split("/")]
        self.pitch, self.velocity, self.duration, self.position = (
            self._table(kind) for kind in ("Pitch", "Velocity", "Duration", "Position")
        )
        self.bar = vocab["Bar_None"]
        self.programs = bool(tokenizer.config.use_programs)
        self.program = np.array([vocab.get(f"Program_{program}", -1) for program in (*range(128), -1)])  # drums last
        drums = "PitchDrum" if tokenizer.config.use_pitchdrum_tokens else "Pitch"
        self.pitch_drum = self._table(drums)

    @staticmethod
    def supports(tokenizer: REMI) -> bool:
        config = tokenizer.config
        return (
            type(tokenizer) is REMI
            and not any(getattr(config, name) for name in UNSUPPORTED)
            and not any(value is True for name, value in vars(config).items() if name.startswith("ac_"))
            and config.use_tempos
            and config.use_time_signatures
            and config.use_velocities
            and config.using_note_duration_tokens
            and (config.one_token_stream_for_programs if config.use_programs else not config.use_pitchdrum_tokens)
            and set(config.programs if config.use_programs else [0]) <= set(config.use_note_duration_programs)
            and len(config.beat_res) == 1
            and config.remove_duplicated_notes
            and config.additional_params.get("max_bar_embedding") is None
            and not config.additional_params.get("use_bar_end_tokens")
            and not config.additional_params.get("add_trailing_bars")
            and not tokenizer.is_trained
        )

    def _table(self, kind: str) -> Ints:
        """Token ids by value, -1 where the vocabulary has no such token."""
        ids = np.flatnonzero(self.kind == kind)
        values = self.value[ids, 0].astype(np.int64)
        table = np.full(values.max() + 2, -1)
        table[values] = ids
        return table

    def encode(self, score: ScoreTick) -> Ints:
        """(L,) ids of a score, equal to those of ``smart.tokens.encode``.

        Raises ``ValueError`` if ``score`` has several tracks with notes and the vocabulary has no programs, or if a
        value lies outside the vocabulary.
        """
        score = self.tokenizer.preprocess_score(score)
        if len(score.tracks) > 1 and not self.programs:
            raise ValueError(f"expected one track with notes, got {len(score.tracks)}: merge them first")
        notes = _sorted_notes(score.tracks)
        onsets = notes["time"]
        signatures, tempos = score.time_signatures.numpy(), score.tempos.numpy()
        sections = signatures["time"].astype(np.int64)  # where each time signature begins: a bar line
        numerators = signatures["numerator"].astype(np.int64)
        beat = score.ticks_per_quarter * 4 // signatures["denominator"].astype(np.int64)  # ticks
        bar = beat * numerators
        tempo_times = tempos["time"].astype(np.int64)

        # every distinct onset of a tempo or note is one event: Position, then Tempo, then for each note [Program] Pitch
        # Velocity Duration
        times = np.sort(np.concatenate([tempo_times, onsets]), kind="stable")  # np.unique takes three times as long
        times = times[np.append(True, np.diff(times) != 0)]
        last = max(int(times[-1]), int(sections[-1]))
        # the bars: each section runs to the next one, the last one to the bar of the last event
        ends = np.append(sections[1:], last + 1)
        bars_in = -(-(ends - sections) // bar)
        first_bar = np.append(0, np.cumsum(bars_in)[:-1])
        section = np.searchsorted(sections, times, side="right") - 1
        bar_of = first_bar[section] + (times - sections[section]) // bar[section]
        position = (times - sections[section]) % bar[section] // (beat[section] // self.steps)

        event = np.searchsorted(times, onsets)
        has_tempo = np.zeros(len(times), dtype=bool)
        has_tempo[np.searchsorted(times, tempo_times)] = True
        chord = np.bincount(event, minlength=len(times))
        width = 3 + self.programs
        sizes = 1 + has_tempo + width * chord
        before = np.append(0, np.cumsum(sizes))  # tokens of the events before each event
        starts = before[:-1] + 2 * (bar_of + 1)
        bars = int(bars_in.sum())
        out = np.full(before[-1] + 2 * bars, -1)
        lines = 2 * np.arange(bars) + before[np.searchsorted(bar_of, np.arange(bars))]
        out[lines] = self.bar
        out[lines + 1] = np.repeat(self._signature_ids(numerators, signatures["denominator"]), bars_in)
        out[starts] = self._look_up(self.position, position, "position")
        out[starts[np.searchsorted(times, tempo_times)] + 1] = self._tempo_ids(tempos["mspq"])
        if len(onsets):
            within = np.arange(len(onsets)) - np.append(0, np.cumsum(chord))[event]
            places = starts[event] + 1 + has_tempo[event] + width * within
            if self.programs:
                out[places] = self._look_up(self.program, notes["voice"], "program")
                places += 1
            tpb = self._beat_at(score, onsets)
            steps, rest = np.divmod(notes["duration"] * self.steps, tpb)
            if rest.any():
                raise ValueError("a duration lies between two tokens")
            for drums, table in ((False, self.pitch), (True, self.pitch_drum)):
                which = (notes["voice"] == DRUMS) == drums
                out[places[which]] = self._look_up(table, notes["pitch"][which], "pitch")
            out[places + 1] = self._look_up(self.velocity, notes["velocity"], "velocity")
            out[places + 2] = self._look_up(self.duration, steps, "duration")
        return out

    def _signature_ids(self, numerators: Ints, denominators: Any) -> Ints:
        return np.array([self.vocab[f"TimeSig_{n}/{d}"] for n, d in zip(numerators, denominators, strict=True)])

    def _tempo_ids(self, mspq: Any) -> Ints:
        values, inverse = np.unique(mspq, return_inverse=True)
        ids = [self.vocab[f"Tempo_{round(TempoTick(0, mspq=int(value)).tempo, 2)}"] for value in values]
        return np.array(ids)[inverse]

    @staticmethod
    def _beat_at(score: ScoreTick, onsets: Ints) -> Ints:
        """Ticks in a beat at each onset, by MidiTok's sections."""
        ends, beats = get_score_ticks_per_beat(score).T
        which = np.searchsorted(ends, onsets, side="right")
        return np.asarray(beats[which])

    @staticmethod
    def _look_up(table: Ints, values: Any, name: str) -> Ints:
        values = np.asarray(values, dtype=np.int64)
        if values.size and (values.min() < 0 or values.max() >= len(table) or table[values].min() < 0):
            raise ValueError(f"a {name} lies outside the vocabulary")
        return table[values]

    def decode(self, tokens: Ints) -> ScoreTick:
        """The music of ids that an encoder wrote, equal to that of ``smart.tokens.decode``.

        Not for a model's samples: they may break the order of tokens that this method relies on.
        """
        division = int(self.tokenizer.time_division)
        kind = self.kind[tokens]
        value = self.value[tokens]
        is_bar = tokens == self.bar
        signature = value[kind == "TimeSig"].astype(np.int64)  # (bars, 2)
        beat = division * 4 // signature[:, 1]
        lengths = beat * signature[:, 0]
        line = np.append(0, np.cumsum(lengths)[:-1])
        bar = np.cumsum(is_bar) - 1
        at = np.flatnonzero(kind == "Position")
        tick = line[bar[at]] + value[at, 0].astype(np.int64) * (beat[bar[at]] // self.steps)
        event = np.searchsorted(at, np.arange(len(tokens)), side="right") - 1

        score = ScoreTick(division)
        changed = np.append(True, np.any(signature[1:] != signature[:-1], axis=1))
        score.time_signatures = TimeSignatureTickList.from_numpy(
            line[changed].astype(np.int32), *signature[changed].astype(np.uint8).T.copy()
        )
        tempos = np.flatnonzero(kind == "Tempo")
        score.tempos = TempoTickList.from_numpy(
            tick[event[tempos]].astype(np.int32),
            np.array([TempoTick(0, float(bpm)).mspq for bpm in value[tempos, 0]], dtype=np.int32),
        )
        # a first encoding may have one position twice, where a time signature ends within a bar
        score.tempos = last_of_each_tick(score.tempos, TempoTickList)
        every = np.flatnonzero((kind == "Pitch") | (kind == "PitchDrum"))
        programs = value[every - 1, 0].astype(np.int64) if self.programs else np.zeros(len(every), np.int64)
        for program in dict.fromkeys(programs.tolist()):  # tracks in the order of their first notes, as MidiTok has it
            pitches = every[programs == program]
            duration = value[pitches + 2, 0].astype(np.int64) * (beat[bar[pitches]] // self.steps)
            track = TrackTick("", max(program, 0), program < 0)
            track.notes = NoteTickList.from_numpy(
                tick[event[pitches]].astype(np.int32),
                duration.astype(np.int32),
                value[pitches, 0].astype(np.int8),
                value[pitches + 1, 0].astype(np.int8),
            )
            score.tracks.append(track)
        return score


def _sorted_notes(tracks: Any) -> dict[str, Ints]:
    """Columns time, duration, pitch, velocity and voice (program, or ``DRUMS``), sorted by time, track and pitch.

    Of a track's notes that share onset and pitch only the shortest, then softest, stays, as in MidiTok.
    """
    parts = []
    for track in tracks:
        notes = {name: column.astype(np.int64) for name, column in track.notes.numpy().items()}
        order = np.lexsort((notes["velocity"], notes["duration"], notes["pitch"], notes["time"]))
        time, pitch = notes["time"][order], notes["pitch"][order]
        order = order[np.append(True, (np.diff(time) != 0) | (np.diff(pitch) != 0))]
        parts.append({name: column[order] for name, column in notes.items()})
        parts[-1]["voice"] = np.full(len(order), DRUMS if track.is_drum else track.program)
    names = ("time", "duration", "pitch", "velocity", "voice")
    columns = {name: np.concatenate([np.zeros(0, np.int64), *(part[name] for part in parts)]) for name in names}
    order = np.argsort(columns["time"], kind="stable")
    return {name: column[order] for name, column in columns.items()}
