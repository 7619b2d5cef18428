"""Loudness of excerpts by ITU-R BS.1770-4, and the gains that equalise it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TARGET = -23.0  # LUFS (EBU R 128)
PEAK_LIMIT = -1.0  # dB true peak (EBU R 128)
LOWEST_TARGET = -35.0  # LUFS; without this bound, one odd clip could make a whole study hard to hear
BLOCK = 0.4  # seconds; BS.1770 cannot measure less


class Loudness(NamedTuple):
    """``lufs``: integrated loudness, -inf if no block passes the gate of -70 LUFS: such a clip is silent.
    ``peak``: true peak in dB, at four times the sample rate (BS.1770, annex 2); -inf for zeros."""

    lufs: float
    peak: float

    @property
    def silent(self) -> bool:
        return self.lufs == -np.inf


def measure(audio: npt.NDArray[np.float32], sample_rate: int) -> Loudness:
    """The loudness of a clip (C, S). A clip shorter than a block of 0.4 s is padded with zeros."""
    import pyloudnorm
    from scipy.signal import resample_poly

    highest = float(np.abs(resample_poly(audio, 4, 1, axis=1)).max()) if audio.any() else 0.0
    peak = 20 * np.log10(highest) if highest else -np.inf
    missing = max(int(BLOCK * sample_rate) + 1 - audio.shape[1], 0)
    padded = np.pad(audio.astype(np.float64), ((0, 0), (0, missing)))
    if peak < -80:  # no block of such a clip reaches the gate; measuring it would warn of log(0)
        return Loudness(-np.inf, float(peak))
    with np.errstate(divide="ignore"):  # blocks of zeros give -inf, below every gate
        lufs = pyloudnorm.Meter(sample_rate).integrated_loudness(padded.T)
    return Loudness(float(lufs), float(peak))


def gains(clips: Sequence[Loudness], target: float) -> tuple[float, list[float]]:
    """The common loudness of all clips, in LUFS, and each clip's gain, in dB.

    There is no limiter, since it would change the sound. If a clip's true peak would exceed ``PEAK_LIMIT``, the common
    loudness is lowered, but not below ``LOWEST_TARGET``; a clip that would still exceed the limit gets only as much
    gain as it allows, and is quieter than the others. A silent clip's gain is 0.
    """
    loud = [clip for clip in clips if not clip.silent]
    fitting = min((clip.lufs + PEAK_LIMIT - clip.peak for clip in loud), default=target)
    common = min(target, max(fitting, min(LOWEST_TARGET, target)))
    return common, [0.0 if clip.silent else min(common - clip.lufs, PEAK_LIMIT - clip.peak) for clip in clips]
