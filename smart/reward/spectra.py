"""What an ear hears of ten seconds of audio: spectra of bands by time, in steps of 0.3 dB.

Two kinds, so that two ears hear differently:

* ``log``: 36 bands an octave, three a semitone, from A0 up (windows of 256 ms, every 50 ms), and the 88 semitones
  through windows of 64 ms, which show when a note begins. As the three bands of a semitone are channels, a step along
  the other axis is a semitone, and a transposed chord is the same pattern elsewhere.
* ``mel``: 128 bands on the mel scale (windows of 128 ms, every 32 ms).

Levels are relative to the strongest band, so that gain does not matter. One clip is computed at a time: its numbers
cannot depend on other clips, on padding or on the batch.
"""

import functools
import math
from collections.abc import Callable

import torch

from smart.reward.precision import exact_float32

__all__ = ["KINDS", "SAMPLE_RATE", "WINDOW", "hear"]

SAMPLE_RATE = 16_000  # Hz
WINDOW = 10 * SAMPLE_RATE  # samples that an ear hears at once
RANGE_DB = 80.0  # below the strongest band
INAUDIBLE = 1e-9  # power relative to a sine of full scale, -90 dB: below this is silence
LOWEST_HZ = 27.5  # A0
SEMITONES = 88
MEL_BANDS, MEL_HZ = 128, (40.0, 7600.0)

# kind -> channels, bands and frames of ten seconds
KINDS = {"log": (4, SEMITONES, 200), "mel": (1, MEL_BANDS, 312)}


@exact_float32()
def hear(clip: torch.Tensor, kind: str) -> torch.Tensor:
    """The spectra of one clip.

    Args:
        clip: (S,) float32, mono, ``SAMPLE_RATE`` Hz, finite, S from 1 to ``WINDOW``; silence follows a shorter one.
        kind: "log" or "mel".

    Returns:
        (channels, bands, frames) uint8 on the clip's device: 255 is the strongest band, 0 is 80 dB below it or less.
    """
    if clip.ndim != 1 or not 0 < len(clip) <= WINDOW:
        raise ValueError(f"a clip must have the shape (S,), S from 1 to {WINDOW}, got {tuple(clip.shape)}")
    return _HEAR[kind](clip)


def _log(clip: torch.Tensor) -> torch.Tensor:
    channels, bands, frames = KINDS["log"]
    fine = _bands(_power(clip, 4096, 800, frames), _log_bank(4096, 36, clip.device))  # (T, 264)
    short = _bands(_power(clip, 1024, 800, frames), _log_bank(1024, 12, clip.device))  # (T, 88)
    thirds = _steps(fine).reshape(frames, bands, channels - 1)  # the three bands of each semitone
    return torch.cat([thirds, _steps(short)[:, :, None]], dim=2).permute(2, 1, 0).contiguous()


def _mel(clip: torch.Tensor) -> torch.Tensor:
    frames = KINDS["mel"][2]
    return _steps(_bands(_power(clip, 2048, 512, frames), _mel_bank(2048, clip.device))).t()[None].contiguous()


_HEAR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"log": _log, "mel": _mel}


def _power(clip: torch.Tensor, window: int, hop: int, frames: int) -> torch.Tensor:
    """Power spectra (frames, bins) around the times 0, hop, 2 hop, ...; a sine of full scale has the power 1."""
    samples = (frames - 1) * hop + window
    # the last window may end before the clip does
    padded = torch.nn.functional.pad(clip[: samples - window // 2], (window // 2, 0))
    padded = torch.nn.functional.pad(padded, (0, samples - len(padded)))
    spectrum = torch.fft.rfft(padded.unfold(0, window, hop) * _window(window, clip.device))
    return torch.view_as_real(spectrum).square().sum(dim=2)


def _bands(power: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """The power (T, B) in each band of a bank, which leaves out the bins above its last band."""
    return power[:, : len(bank)] @ bank


def _steps(power: torch.Tensor) -> torch.Tensor:
    """Power (T, B) as uint8: decibels relative to the strongest."""
    strongest = power.max().clamp(min=INAUDIBLE)
    decibels = 10 * (power / strongest).clamp(min=1e-10).log10()
    return ((decibels / RANGE_DB + 1) * 255).clamp(min=0).round().to(torch.uint8)


@functools.lru_cache(maxsize=8)
def _window(length: int, device: torch.device) -> torch.Tensor:
    """A Hann window under which a sine of amplitude 1 has the power 1."""
    return torch.hann_window(length, device=device) * (4 / length)


@functools.lru_cache(maxsize=8)
def _log_bank(window: int, per_octave: int, device: torch.device) -> torch.Tensor:
    """Triangles (bins, bands), as wide as a band or, where bins are wider, as a bin."""
    bands = torch.arange(SEMITONES * per_octave // 12, dtype=torch.float64)
    # the middle one of the three bands of a semitone is its pitch
    centre = LOWEST_HZ * 2 ** ((bands - (per_octave // 12 - 1) / 2) / per_octave)
    width = (centre * (2 ** (1 / per_octave) - 1)).clamp(min=SAMPLE_RATE / window)
    return _triangles(window, centre - width, centre, centre + width, device)


@functools.lru_cache(maxsize=8)
def _mel_bank(window: int, device: torch.device) -> torch.Tensor:
    """Triangles (bins, bands), evenly spaced on the mel scale 2595 log10(1 + f / 700), at least a bin wide."""
    first, last = (2595 * math.log10(1 + f / 700) for f in MEL_HZ)
    edges = 700 * (10 ** (torch.linspace(first, last, MEL_BANDS + 2, dtype=torch.float64) / 2595) - 1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    least = SAMPLE_RATE / window
    return _triangles(window, torch.minimum(left, centre - least), centre, torch.maximum(right, centre + least), device)


def _triangles(
    window: int, left: torch.Tensor, centre: torch.Tensor, right: torch.Tensor, device: torch.device
) -> torch.Tensor:
    hz = torch.arange(window // 2 + 1, dtype=torch.float64)[:, None] * SAMPLE_RATE / window
    rising, falling = (hz - left) / (centre - left), (right - hz) / (right - centre)
    bank = torch.minimum(rising, falling).clamp(min=0)
    return bank[: int(bank.any(dim=1).nonzero().max()) + 1].float().to(device)
