"""One clip: notes -> audio with a soundfont, as a pure function (``render_notes``).

As in section 3.5 of the paper, a score is cut at 100 beats, rendered in stereo to its end or for ``seconds``, whichever
is shorter, and peak-normalised; an empty score is one second of silence. The paper's program wrote a MIDI file for each
clip and let old notes die away for four seconds before the next. Here the synthesiser gets its events directly from the
notes, at the exact sample, and every clip starts from a fresh clone of the loaded soundfont (which shares the samples
but not the voices). So the audio depends only on the notes, not on the worker or on what it rendered before.
"""

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from tinysoundfont import _tinysoundfont as tsf

from smart import UserError
from smart.render.notes import CHANNEL, DRUM, OFF, ON, PITCH, PROGRAM, VELOCITY, check_notes, most_samples, played_notes
from smart.render.soundfonts import check_soundfont, find_soundfont

Audio = npt.NDArray[np.float32]  # (2, S)
MAX_VOICES = 1024  # bounds the work for one clip; a piano soundfont uses 2 to 4 voices per note
DRUM_BANK = 128  # where General MIDI soundfonts keep their drum kits
PEAK_EPS = 1e-6


class RenderError(RuntimeError):
    """A clip could not be rendered; the message says why."""


def load_soundfont(name_or_path: str | os.PathLike[str]) -> Any:
    """Find, check and load a soundfont into this process, for ``render_notes``.

    Raises ``UserError`` if it is missing or not a soundfont. A damaged file that passes the checks may crash the
    synthesiser, and this process with it; ``RenderPool`` survives that.
    """
    path = find_soundfont(name_or_path)
    check_soundfont(path)
    try:
        return tsf.SoundFont(str(path))
    except (RuntimeError, UnicodeError) as error:
        raise UserError(f"soundfont {path} cannot be loaded: {error}") from None


def render_notes(soundfont: Any, notes: npt.ArrayLike, *, sample_rate: int = 44100, seconds: float = 10.0) -> Audio:
    """Audio (2, S) float32 of one clip; a pure function of its arguments.

    ``soundfont`` comes from ``load_soundfont`` (a path or short name is loaded for this one call); ``notes`` is a note
    array. S is the last note's end or ``seconds``, whichever is earlier; a clip without notes is one second of silence
    (or ``seconds``, if less). The audio is divided by its peak over both channels plus 1e-6.

    Times are rounded to the nearest sample. A note lasts at least one sample; notes of velocity 0 are left out. At the
    same sample, notes end before others begin. A pitch that begins again on the same instrument ends there and starts
    anew, and the end of the earlier note is ignored; of equal notes that begin together one is played, with the
    greatest velocity and the latest end. So the order of the rows does not matter.

    Each program has its own channel. A program that the soundfont lacks is played by program 0, or else by the first
    preset; a drum kit that it lacks by kit 0, or else the drums stay silent. At most ``MAX_VOICES`` voices sound at a
    time; beyond them, released ones are cut off first.

    Raises ``ValueError`` for impossible notes (see ``check_notes``), sample rate or seconds, and ``RenderError`` if the
    synthesiser returns NaN or infinity, as a damaged soundfont can make it.
    """
    limit = most_samples(sample_rate, seconds)
    if isinstance(soundfont, str | os.PathLike):
        soundfont = load_soundfont(soundfont)
    notes = check_notes(notes)
    played = played_notes(notes[notes[:, 3] > 0], sample_rate)
    if not len(played):
        return np.zeros((2, min(sample_rate, limit)), np.float32)
    samples = min(limit, int(played[:, OFF].max()))
    played = played[played[:, ON] < samples]
    synth = fresh_synth(soundfont, sample_rate)
    silent = _set_channels(synth, played)
    audio = np.empty((samples, 2), np.float32)
    frames = audio.reshape(-1).view(np.uint8)  # the synthesiser writes into bytes, 8 per frame
    done = 0
    for at, starts, channel, pitch, velocity in _events(played):
        if at >= samples:
            break
        if at > done:
            synth.render(frames[8 * done : 8 * at])
            done = at
        if channel in silent:
            continue
        if starts:
            synth.channel_note_on(channel, pitch, velocity / 127.0)
        else:
            synth.channel_note_off(channel, pitch)
    synth.render(frames[8 * done :])
    return _normalise(audio)


def _events(played: npt.NDArray[np.int64]) -> list[list[int]]:
    """[sample, 1 to start or 0 to end, channel, pitch, velocity], in an order that depends only on the notes."""
    many = len(played)
    on, off = played[:, [ON, CHANNEL, PITCH, VELOCITY]], played[:, [OFF, CHANNEL, PITCH, VELOCITY]]
    both = np.insert(np.concatenate([on, off]), 1, np.repeat([1, 0], many), axis=1)
    events: list[list[int]] = both[np.lexsort((both[:, 3], both[:, 2], both[:, 1], both[:, 0]))].tolist()
    return events


def fresh_synth(soundfont: Any, sample_rate: int) -> Any:
    """A clone that has played nothing yet. It shares the samples; all other settings have to be made on each clone.

    The soundfont itself must never be played or given a limit of voices: clones inherit the limit, but not the voices.
    """
    synth = tsf.SoundFont(soundfont)
    synth.set_output(tsf.OutputMode.StereoInterleaved, int(sample_rate), 0.0)
    synth.set_max_voices(MAX_VOICES)
    return synth


def _set_channels(synth: Any, played: npt.NDArray[np.int64]) -> set[int]:
    """Set the preset of every channel; returns the channels that must stay silent."""
    silent = set()
    for channel, program, drum in np.unique(played[:, [CHANNEL, PROGRAM, DRUM]], axis=0).tolist():
        bank = DRUM_BANK if drum else 0
        preset = synth.get_preset_index(bank, program)
        if preset < 0:
            preset = synth.get_preset_index(bank, 0)
        if preset < 0 and drum:
            silent.add(channel)
        else:
            synth.channel_set_preset_index(channel, max(preset, 0))
    return silent


def _normalise(audio: Audio) -> Audio:
    """Interleaved (S, 2) audio as (2, S), divided by its peak."""
    peak = max(float(audio.max()), -float(audio.min()))
    if not math.isfinite(peak):
        raise RenderError("the synthesiser returned NaN or infinite samples: the soundfont is probably damaged")
    normal = np.empty(audio.shape[::-1], np.float32)
    np.divide(audio.T, np.float32(peak) + np.float32(PEAK_EPS), out=normal)
    return normal
