"""Notes -> audio as a sum of stored notes on an accelerator: ``NoteBank``.

A soundfont synthesiser is linear in its notes. TinySoundFont plays a note as one voice per region that responds to it,

    y(t) = g  e(b(t))  x(t - onset)

where x is the region's sample at the pitch of the note, interpolated and filtered; g is the gain of region, velocity
and pan; e is the amplitude envelope; and b(t) is the start of the block of t: the synthesiser updates its envelopes
every 64 samples, counted from the last event of the clip, whichever note it belonged to. TinySoundFont itself renders
x, once, from a variant of the soundfont that has only this region, without an envelope (``smart.render.regions``). The
rest is arithmetic, which follows the synthesiser's law: linear attack, hold, exponential decay to the sustained level,
exponential release from the level at note-off, each of which begins at the first block at or after its time. So a batch
of clips is one weighted sum of rows of 64 samples, one row per block and voice, and agrees with ``render_notes`` to
rounding, retriggers and overlaps included.

One case does not have this form: a filter that follows the modulation envelope, whose cutoff turns when the note ends.
Such a region is stored several times: with the filter as it moves while the key is held, and with the envelope's effect
on it lowered in steps. After note-off the two nearest are mixed so that the cutoff agrees. That is an approximation,
which is good if the filter moves slowly. Each stored sound is compared once with a released note of the synthesiser; a
clip whose sounds, weighted by their gains in it, agree to less than 55 dB goes to the pool.

Clips that are not linear at all also go to the pool of ``smart.render``, which is the reference: see
``NoteBank.supports``.
"""

import os
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tinysoundfont import _tinysoundfont as tsf

from smart import UserError
from smart.render.bank_cache import Cache, SoundKey
from smart.render.envelopes import (
    BLOCK,
    FOREVER,
    Grid,
    Law,
    Unfit,
    alone,
    bare,
    law_of,
    not_linear,
    pieces_of,
    stored,
)
from smart.render.mixing import download, mix, normalise, upload
from smart.render.notes import DRUM, OFF, ON, PITCH, PROGRAM, VELOCITY, Notes, check_notes, most_samples, played_notes
from smart.render.regions import Region, Values, read_regions, write_variant
from smart.render.soundfonts import check_soundfont, check_unchanged, file_state, find_soundfont
from smart.render.synth import DRUM_BANK, MAX_VOICES, Audio, RenderError, fresh_synth
from smart.system import path_of

LEAST_SNR = 55.0  # dB; the least agreement between a clip's stored sounds and the synthesiser's
_CHECKED = 0.3  # seconds after which the note that is compared ends
_Frozen = tuple[tuple[str, int], ...]  # generators, by name


class _Sound(NamedTuple):
    """A stored region at one pitch: where its samples are."""

    start: int  # the place of its first sample in the store
    length: int  # samples in each of ``rows``, including a block of silence at the end
    rows: int
    signal: float  # energy of a released note of the synthesiser
    noise: float  # energy of its difference from the same note from the store


class _Voice(NamedTuple):
    preset: tuple[int, int]
    region: Region
    key: SoundKey
    law: Law


class _Part(NamedTuple):
    """Where the audio of a clip is."""

    audio: torch.Tensor  # (2, all samples) of several clips
    start: int
    stop: int


class NoteBank:
    """Regions of a soundfont, rendered once for each pitch that clips need, on a device; and clips mixed from them.

    ``soundfont`` is a path or a short name (``find_soundfont``); ``seconds`` limits clips and stored notes alike. A
    note is rendered when a clip first needs it; the soundfont is loaded for that, once per program. At most
    ``max_bytes`` are stored, in 32-bit floats; the least recently used go first. While the store grows, the old and the
    new one exist together. With a ``cache`` folder, stored notes are also kept there for good, under the SHA-256 of the
    soundfont, and read from there; a damaged file is rendered anew. If everything is in the cache, the soundfont is not
    loaded at all. A cache that cannot be written is a ``UserError``.

    The audio of a clip depends only on that clip, not on its batch or on what was stored before. On one machine it is
    the same every time, also on CUDA: rows are added in a fixed order, without atomic operations.

    On CUDA the bank works on a stream of its own, so that what other streams compute goes on meanwhile. ``render`` and
    ``try_render`` keep the order with the stream that is current where they are called; ``render_on_host`` waits for
    nobody's work but the bank's.

    Raises ``UserError`` if the soundfont is missing, damaged or not a soundfont, and ``Failure`` if it is needed again
    and has changed. Use it from one thread at a time. The synthesiser reads and plays the soundfont in this process, so
    a soundfont that crashes it ends the process.
    """

    def __init__(
        self,
        soundfont: str | os.PathLike[str],
        *,
        sample_rate: int = 44100,
        seconds: float = 10.0,
        device: str | torch.device = "cpu",
        max_bytes: int = 2 << 30,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.limit = most_samples(sample_rate, seconds)
        self.sample_rate = int(sample_rate)
        # where neither float64 nor memory for asynchronous copies exists (mps), clips are mixed on the CPU
        self.device = torch.device(device if torch.device(device).type == "cuda" else "cpu")
        self.max_bytes = int(max_bytes)
        self.soundfont = find_soundfont(soundfont).absolute()
        self.soundfont_state = file_state(self.soundfont)
        check_soundfont(self.soundfont)
        self._presets = read_regions(self.soundfont)
        self._cache = None if cache is None else Cache(Path(cache), self.soundfont, self.sample_rate, self.limit)
        self._notes: dict[int, list[int] | Unfit] = {}  # note -> its voices, or why it is not supported
        self._voices: list[_Voice] = []
        self._sounds: OrderedDict[SoundKey, _Sound] = OrderedDict()  # the most recently used last
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self._on_stream():
            self._store = torch.zeros(BLOCK, device=self.device)
        self._synth: Any = None
        self._programs: dict[_Frozen, int] = {}  # generators -> program in the loaded variant

    @property
    def bytes(self) -> int:
        """The size of the store at the moment."""
        return self._store.numel() * self._store.element_size()

    def supports(self, notes: npt.ArrayLike) -> str | None:
        """None if ``render`` can play the clip, else why it cannot.

        Not supported are clips with a region that has an exclusive class (it cuts off others), a vibrato or tremolo, a
        pitch that follows the modulation envelope, a filter that follows its attack, or a loop that ends with the key;
        clips whose stored sounds disagree with the synthesiser; and clips that may use more than ``MAX_VOICES`` voices
        or need more than ``max_bytes``. Stores what the clip needs. Raises ``ValueError`` like ``check_notes``.
        """
        answer = self.try_render([notes])[0]
        return answer if isinstance(answer, Unfit) else None

    def render(self, clips: Sequence[npt.ArrayLike]) -> list[torch.Tensor]:
        """Audio (2, S) float32 on the device for each note array, as ``render_notes`` makes it.

        Raises ``ValueError`` for impossible notes and for a clip that is not supported.
        """
        answers = self.try_render(clips)
        for number, answer in enumerate(answers):
            if isinstance(answer, Unfit):
                raise ValueError(f"clip {number} is not for a note bank: {answer}")
        return [answer for answer in answers if not isinstance(answer, Unfit)]

    def try_render(self, clips: Sequence[npt.ArrayLike]) -> list[torch.Tensor | Unfit]:
        """Like ``render``, but a clip that is not supported gives the reason instead of audio."""
        if self._stream is None:
            parts = self._try(clips)
        else:
            current = torch.cuda.current_stream(self.device)
            # what came of the last call may still be read there, in memory that is free for this one
            self._stream.wait_stream(current)
            with self._on_stream():
                parts = self._try(clips)
            current.wait_stream(self._stream)
        return [part if isinstance(part, Unfit) else part.audio[:, part.start : part.stop] for part in parts]

    def render_on_host(self, clips: Sequence[npt.ArrayLike]) -> list[Audio | Unfit]:
        """Like ``try_render``, but the audio is copied to the host, and has arrived there."""
        with self._on_stream():
            parts = self._try(clips)
            arrays = download([part.audio for part in parts if not isinstance(part, Unfit)])
        return [
            part if isinstance(part, Unfit) else np.ascontiguousarray(arrays[id(part.audio)][:, part.start : part.stop])
            for part in parts
        ]

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _try(self, clips: Sequence[npt.ArrayLike]) -> list[_Part | Unfit]:
        parts = [check_notes(notes) for notes in clips]
        table = self._table(parts)
        clip, note = table[:, PROGRAM] // 256, _pack(table)
        numbers, place = np.unique(note, return_inverse=True)
        voices = [self._voices_of(number) for number in numbers.tolist()]
        # the voices of each note of the table, one after the other
        counts = np.array([0 if isinstance(answer, Unfit) else len(answer) for answer in voices], np.int64)
        flat = np.array([voice for answer in voices if not isinstance(answer, Unfit) for voice in answer], np.int64)
        many = counts[place]
        voice = flat[np.repeat((np.cumsum(counts) - counts)[place], many) + _count_up(many)]
        row = np.repeat(np.arange(len(table)), many)
        answers: list[_Part | Unfit | None] = [None] * len(parts)
        for index in np.unique(clip[many == 0]).tolist():
            answers[index] = next(
                (reason for at in place[clip == index].tolist() if isinstance(reason := voices[at], Unfit)), None
            )
        laws = np.array([own.law for own in self._voices], np.float64).reshape(-1, len(Law._fields))
        release = laws[voice, Law._fields.index("release")].astype(np.int64)
        crowded = _most_at_once(clip[row], table[row, ON], table[row, OFF] + release + 2 * BLOCK, len(parts))
        group: list[int] = []
        wanted: dict[SoundKey, _Voice] = {}
        for index in range(len(parts)):
            if answers[index]:
                continue
            needed = {
                self._voices[number].key: self._voices[number] for number in set(voice[clip[row] == index].tolist())
            }
            if self._size(needed) > self.max_bytes:
                answers[index] = Unfit("memory", f"its notes need more than {self.max_bytes:,} bytes")
            elif crowded[index] > MAX_VOICES:
                answers[index] = Unfit("voices", f"it may use more than {MAX_VOICES} voices at a time")
            else:
                if self._size(wanted | needed) > self.max_bytes:
                    self._render_group(group, wanted, table, row, voice, laws, answers)
                    group, wanted = [], {}
                group.append(index)
                wanted |= needed
        self._render_group(group, wanted, table, row, voice, laws, answers)
        return [answer for answer in answers if answer is not None]  # none is None any more

    def _table(self, clips: Sequence[Notes]) -> npt.NDArray[np.int64]:
        """``played_notes`` of all clips at once; the program of a note of clip c is 256 c + its program."""
        parts = [notes[notes[:, 3] > 0] for notes in clips]
        together = np.concatenate([*parts, np.empty((0, 6))])
        together[:, 4] += 256.0 * np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return played_notes(together, self.sample_rate)

    # The voices of a note --------------------------------------------------------------------------------------

    def _voices_of(self, note: int) -> list[int] | Unfit:
        if note not in self._notes:
            program, drum, pitch, velocity = _unpack(note)
            preset = self._preset(program, drum)
            # the synthesiser takes velocities as 32-bit fractions, and turns them back into whole numbers
            heard = int(np.float32(velocity / 127.0) * np.float32(127))
            regions = [
                region
                for region in (self._presets[preset] if preset else ())
                if region.keys[0] <= pitch <= region.keys[1] and region.velocities[0] <= heard <= region.velocities[1]
            ]
            reasons = [reason for region in regions if (reason := not_linear(region.values))]
            if reasons:
                self._notes[note] = reasons[0]
            elif preset:
                new = [self._voice(preset, region, pitch, velocity) for region in regions]
                self._notes[note] = list(range(len(self._voices), len(self._voices) + len(new)))
                self._voices += new
            else:
                self._notes[note] = []
        return self._notes[note]

    def _preset(self, program: int, drum: int) -> tuple[int, int] | None:
        """The preset that plays this program, with the same fallbacks as in ``render_notes``."""
        for preset in ((DRUM_BANK * drum, program), (DRUM_BANK * drum, 0)):
            if preset in self._presets:
                return preset
        return None if drum else min(self._presets)

    def _voice(self, preset: tuple[int, int], region: Region, pitch: int, velocity: int) -> _Voice:
        law = law_of(region.values, pitch, velocity, self.sample_rate)
        return _Voice(preset, region, (pitch, law.drop, law.rows, _frozen(bare(region.values))), law)

    # The store ------------------------------------------------------------------------------------------------

    def _size(self, wanted: dict[SoundKey, _Voice]) -> int:
        """An upper bound of the bytes that these sounds take."""
        rows = sum(voice.law.rows for voice in wanted.values())
        return 4 * (rows * (self.limit + BLOCK) + BLOCK)

    def _fetch(self, wanted: dict[SoundKey, _Voice]) -> None:
        """Bring all of ``wanted`` into the store, which may drop others."""
        for key in wanted:
            if key in self._sounds:
                self._sounds.move_to_end(key)
        missing = {key: voice for key, voice in wanted.items() if key not in self._sounds}
        if not missing:
            return
        made = {key: (self._cache and self._cache.read(key)) or self._make(voice) for key, voice in missing.items()}
        room = self.max_bytes // 4 - BLOCK - sum(audio.numel() for audio, *_ in made.values())
        kept: list[SoundKey] = []
        for key, sound in reversed(self._sounds.items()):  # the wanted ones come first
            room -= sound.rows * sound.length
            if room < 0:
                break
            kept.append(key)
        sounds: OrderedDict[SoundKey, _Sound] = OrderedDict()
        pieces, start = [], 0
        for key in reversed(kept):
            sound = self._sounds[key]
            pieces.append(self._store[sound.start : sound.start + sound.rows * sound.length])
            sounds[key] = sound._replace(start=start)
            start += len(pieces[-1])
        pieces.append(upload(torch.cat([audio.flatten() for audio, *_ in made.values()]), self.device))
        for key, (audio, signal, noise) in made.items():
            sounds[key] = _Sound(start, audio.shape[1], len(audio), signal, noise)
            start += audio.numel()
        self._store = torch.cat([*pieces, self._store.new_zeros(BLOCK)])  # a row may begin at the very end
        self._sounds = sounds

    def _make(self, voice: _Voice) -> tuple[torch.Tensor, float, float]:
        """The sound of a voice, (rows, length), and the energies of ``_Sound``."""
        self._load(voice.preset)
        rows = [self._play(values, voice.key[0]) for values in stored(voice.region.values, voice.law)]
        sounding = max((int(np.flatnonzero(row)[-1]) + 1 for row in rows if row.any()), default=0)
        audio = torch.from_numpy(np.stack([row[: sounding + BLOCK] for row in rows]))
        signal, noise = self._compare(voice, audio)
        if self._cache is not None:
            self._cache.write(voice.key, audio, signal, noise)
        return audio, signal, noise

    def _compare(self, voice: _Voice, audio: torch.Tensor) -> tuple[float, float]:
        """Energy of the synthesiser's note that ends after 0.3 s, and of the difference between ours and it."""
        off = max(1, min(round(_CHECKED * self.sample_rate), self.limit // 2))
        stop = min(self.limit, off + voice.law.release)
        expected = self._play(alone(voice.region.values), voice.key[0], off=off)[:stop].astype(np.float64)
        row = [0, off, stop, 0, audio.shape[1], *voice.law._replace(left=1.0)]
        grid = Grid(np.array([0, off]), np.array([off, stop]))
        pieces = pieces_of(torch.tensor([row], dtype=torch.float64), torch.zeros(1, dtype=torch.int64), grid)
        found = mix(torch.cat([audio.flatten(), audio.new_zeros(BLOCK)]), pieces, grid)[0].numpy()
        return float(np.square(expected).sum()), float(np.square(found - expected).sum())

    def _play(self, values: Values, pitch: int, *, off: int | None = None) -> npt.NDArray[np.float32]:
        """The left channel of a loaded region as the synthesiser plays it, and a block of silence."""
        synth = fresh_synth(self._synth, self.sample_rate)
        synth.channel_set_preset_index(0, synth.get_preset_index(0, self._programs[_frozen(values)]))
        audio = np.zeros((self.limit + BLOCK, 2), np.float32)
        frames = audio.reshape(-1).view(np.uint8)[: 8 * self.limit]
        synth.channel_note_on(0, pitch, 1.0)
        if off is not None:
            synth.render(frames[: 8 * off])
            synth.channel_note_off(0, pitch)
            frames = frames[8 * off :]
        synth.render(frames)
        return np.ascontiguousarray(audio[:, 0])

    def _load(self, preset: tuple[int, int]) -> None:
        """Load a variant of the soundfont that also has every region of ``preset`` as a program."""
        wanted: list[Values] = []
        for region in self._presets[preset]:
            if not not_linear(region.values):
                law = law_of(
                    region.values, 60, 127, self.sample_rate
                )  # the rows that are stored are the same for every key
                wanted += [alone(region.values), *stored(region.values, law)]
        needed = dict.fromkeys(map(_frozen, wanted))
        if self._synth is not None and needed.keys() <= self._programs.keys():
            return
        self._synth = None  # frees its memory first
        check_unchanged(self.soundfont, self.soundfont_state)
        for programs in (list(self._programs | needed), list(needed)):  # all of them may be too many for one file
            try:
                synth = self._load_variant(programs)
                break
            except (ValueError, OverflowError, KeyError, struct.error) as error:  # too many; or a hostile file
                problem: Exception = error
            except OSError as error:
                raise UserError(f"soundfont {self.soundfont} cannot be copied to a temporary file: {error}") from None
            except RuntimeError as error:
                raise RenderError(f"soundfont {self.soundfont} cannot be taken apart: {error}") from None
        else:
            raise RenderError(f"soundfont {self.soundfont} cannot be taken apart: {problem}")
        check_unchanged(self.soundfont, self.soundfont_state)
        self._synth = synth
        self._programs = {values: number for number, values in enumerate(programs)}

    def _load_variant(self, programs: Sequence[_Frozen]) -> Any:
        """The synthesiser with a copy of the soundfont that has ``programs`` as its presets."""
        with tempfile.TemporaryFile() as file:  # it has no name, so a process that is killed leaves nothing behind
            if path := path_of(file.fileno()):
                write_variant(self.soundfont, file, [[dict(values) for values in programs]])
                return tsf.SoundFont(path)
        with tempfile.NamedTemporaryFile(suffix=self.soundfont.suffix) as file:
            write_variant(self.soundfont, file, [[dict(values) for values in programs]])
            return tsf.SoundFont(file.name)

    # Mixing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _render_group(
        self,
        group: list[int],
        wanted: dict[SoundKey, _Voice],
        table: npt.NDArray[np.int64],
        row: npt.NDArray[np.int64],
        voice: npt.NDArray[np.int64],
        laws: npt.NDArray[np.float64],
        answers: list[_Part | Unfit | None],
    ) -> None:
        """Fill in ``answers`` for the clips of ``group``, which together need the sounds ``wanted``."""
        self._fetch(wanted)
        clip = table[:, PROGRAM] // 256
        sounds = np.zeros((len(self._voices), len(_Sound._fields)))
        for number in set(voice[np.isin(clip[row], group)].tolist()):
            sounds[number] = self._sounds[self._voices[number].key]
        power = np.square(laws[voice, :2]).sum(axis=1)
        signal, noise = (np.bincount(clip[row], power * sounds[voice, column], len(answers)) for column in (3, 4))
        for index in group:
            if not noise[index] * 10 ** (LEAST_SNR / 10) <= signal[index]:  # with a damaged soundfont they may be NaN
                decibels = 10 * np.log10(max(signal[index], 1e-30) / noise[index])
                answers[index] = Unfit(
                    "moving_filter", f"its stored notes agree with the synthesiser to only {decibels:.0f} dB"
                )
        group = [index for index in group if not answers[index]]
        # all clips, one after the other, on one time line; each begins at a multiple of ``BLOCK``
        played = {index: table[clip == index] for index in group}
        stop = np.zeros(len(answers), np.int64)
        for index, part in played.items():
            stop[index] = min(self.limit, int(part[:, OFF].max())) if len(part) else 0
        blocks = -(-stop // BLOCK)
        at = BLOCK * (blocks.cumsum() - blocks)
        if blocks.any():
            events = [
                at[index] + np.unique(np.append(times[times <= stop[index]], [0, stop[index]]))
                for index, part in played.items()
                if len(times := part[:, [ON, OFF]])
            ]
            times = np.unique(np.concatenate([*events, [BLOCK * blocks.sum()]]))
            grid = Grid(times[:-1], times[1:])
            use = table[row, ON] < stop[clip[row]]
            row, voice = row[use], voice[use]
            own = clip[row]
            off = np.where(table[row, OFF] < stop[own], table[row, OFF], FOREVER)
            voices = np.column_stack([table[row, ON], off, stop[own], sounds[voice, :2], laws[voice]])
            audio = mix(self._store, pieces_of(torch.from_numpy(voices), torch.from_numpy(at[own]), grid), grid)
            normalise(audio, blocks[blocks > 0])
        for index in group:
            if stop[index]:
                answers[index] = _Part(audio, int(at[index]), int(at[index] + stop[index]))
            else:
                silence = min(self.sample_rate, self.limit)
                answers[index] = _Part(torch.zeros((2, silence), device=self.device), 0, silence)


def _frozen(values: Values) -> _Frozen:
    return tuple(sorted(values.items()))


def _pack(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Program, drum, pitch and velocity of each note as one number; ``_unpack`` is the inverse."""
    program, drum, pitch, velocity = table[:, [PROGRAM, DRUM, PITCH, VELOCITY]].T
    return ((program % 256 * 2 + drum) * 128 + pitch) * 128 + velocity


def _unpack(note: int) -> tuple[int, int, int, int]:
    return note >> 15, note >> 14 & 1, note >> 7 & 127, note & 127


def _count_up(many: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 .. m-1 for each m of ``many``, concatenated."""
    return np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)


def _most_at_once(
    clip: npt.NDArray[np.int64], first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], clips: int
) -> npt.NDArray[np.int64]:
    """(clips,) the largest number of intervals from ``first`` to ``last`` that overlap, in each clip."""
    steps = np.repeat([1, -1], len(clip))
    clip = np.tile(clip, 2)
    order = np.lexsort((-steps, np.concatenate([first, last]), clip))
    most = np.zeros(clips, np.int64)
    np.maximum.at(most, clip[order], np.cumsum(steps[order]))
    return most
