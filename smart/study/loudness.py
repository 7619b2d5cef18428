"""Loudness of excerpts by ITU-R BS.1770-4, and the gains that make it equal."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TARGET = -23.0  # LUFS (EBU R 128)
PEAK_LIMIT = -1.0  # dB true peak (EBU R 128)
LOWEST_TARGET = -35.0  # LUFS; below, one odd clip would make a whole study hard to hear
BLOCK = 0.4  # seconds that BS.1770 measures at least


class Loudness(NamedTuple):
    """``lufs``: integrated loudness, -inf where no block passes the gate of -70 LUFS: such a clip is silent.
    ``peak``: true peak in dB, at four times the sample rate (BS.1770, annex 2); -inf for zeros."""

    lufs: float
    peak: float

    @property
    def silent(self) -> bool:
        return self.lufs == -np.inf


def measure(audio: npt.NDArray[np.float32], sample_rate: int) -> Loudness:
    """Of a clip (C, S). One that is shorter than a block of 0.4 s is measured with zeros after it."""
    import pyloudnorm
    from scipy.signal import resample_poly

    highest = float(np.abs(resample_poly(audio, 4, 1, axis=1)).max()) if audio.any() else 0.0
    peak = 20 * np.log10(highest) if highest else -np.inf
    missing = max(int(BLOCK * sample_rate) + 1 - audio.shape[1], 0)
    padded = np.pad(audio.astype(np.float64), ((0, 0), (0, missing)))
    if peak < -80:  # no block of such a clip reaches the gate, and the logarithm of nothing warns
        return Loudness(-np.inf, float(peak))
    with np.errstate(divide="ignore"):  # blocks of zeros: -inf, below every gate
        lufs = pyloudnorm.Meter(sample_rate).integrated_loudness(padded.T)
    return Loudness(float(lufs), float(peak))


def gains(clips: Sequence[Loudness], target: float) -> tuple[float, list[float]]:
    """The loudness that all clips get, in LUFS, and the gain of each, in dB.

    There is no limiter, which would change the sound. Where a clip's true peak would pass ``PEAK_LIMIT``, all get less,
    down to ``LOWEST_TARGET``; what would still pass it then gets no more than the limit, and is less loud than the
    others. A silent clip's gain is 0.
    """
    loud = [clip for clip in clips if not clip.silent]
    fitting = min((clip.lufs + PEAK_LIMIT - clip.peak for clip in loud), default=target)
    common = min(target, max(fitting, min(LOWEST_TARGET, target)))
    return common, [0.0 if clip.silent else min(common - clip.lufs, PEAK_LIMIT - clip.peak) for clip in clips]
