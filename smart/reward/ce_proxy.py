"""ce_proxy: an approximation of Audiobox Aesthetics' Content Enjoyment (CE) that needs no download.

    CE = b + sum_d w_d (clamp(x_d, low_d, high_d) - mean_d) / scale_d

with four descriptors x_d of a clip, listed in ``DESCRIPTORS``. Coefficients come from a JSON file written by
``python -m smart.reward.calibrate``; the shipped one was fitted to published piano clips whose CE is known, and
records its data and its cross-validated figures. A linear model of four numbers is not the aesthetic model: it
notices gaps, stagnation, thinness and missing bass, but not consonance, rhythm or form (random notes that
fill the clip score as high as music).

Reinforcement learning exploits whatever a reward overlooks, therefore:

* each descriptor is clamped to its range in calibration: the score saturates and never extrapolates;
* all four count only frames that contain music: loud enough (compared with the clip's loudest frame), tonal
  (noise and clicks are not), and with a change of harmony nearby (a held chord or a repeated note has none).
  Silence, noise and a drone therefore all get the lowest score;
* levels are relative to the clip and every threshold is a ramp, so gain does not matter, and small changes
  of timbre matter little.

Clips are described one at a time: a score cannot depend on other clips, on padding or on the batch size, and
memory is that of one clip.
"""

import functools
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smart import UserError
from smart.files import parse_json
from smart.reward import Reward
from smart.reward.precision import exact_float32

__all__ = ["DESCRIPTORS", "CEProxy", "Coefficients", "Term", "describe", "load_coefficients"]

FORMAT = "smart.ce_proxy"
VERSION = 1
AXIS = "CE"
LOWEST, HIGHEST = 1.0, 10.0  # the scale of the ratings
SHIPPED = Path(__file__).with_name("ce_proxy.json")

SAMPLE_RATE = 16000  # Hz, the same as Audiobox
FRAME = 2048  # samples, 128 ms
HOP = 512  # samples, 32 ms
LAG = 16  # frames, 0.5 s: harmony is compared over this distance
REACH = 46  # frames, 1.5 s: how far to either side a change of harmony keeps a frame musical

LEVEL_DB = (-50.0, -35.0)  # frame energy relative to the loudest frame: silent .. sounding
TONALITY_DB = (3.0, 6.0)  # arithmetic over geometric mean of a spectrum; 2.5 for any Gaussian noise
CHANGE = (0.4, 0.7)  # distance of chroma vectors, at most sqrt(2): stagnant .. moving
CELL_DB = (-60.0, -40.0)  # mel cell relative to the clip's strongest: empty .. filled
BASS_DB = (-40.0, -10.0)  # energy under BASS_HZ relative to the loudest frame: absent .. present
BASS_HZ = 200.0
LOWEST_HZ = 40.0  # constant offset and rumble below this are inaudible
MEL_BANDS, MEL_HZ = 64, (50.0, 6000.0)
CHROMA_PITCHES = (36, 108)  # MIDI, C2 to B7
OCTAVES_HZ = (LOWEST_HZ, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, SAMPLE_RATE / 2 + 1)
FAINT = 1e-7  # -70 dB, energy relative to the loudest frame: below this there is no harmony
INAUDIBLE = 1e-8  # -80 dB, frame energy relative to a sine with the clip's peak: below this is silence

DESCRIPTORS: dict[str, str] = {
    "active": "mean over frames of m, the music in a frame: the product of three ramps in 0..1, of frame "
    "energy -50..-35 dB against the loudest frame, tonality 3..6 dB, and the largest chroma change within "
    "1.5 s, 0.4..0.7",
    "movement": "mean over frames of m times the chroma change, the Euclidean distance of the square roots "
    "of the 12 pitch-class shares 0.5 s apart",
    "fullness": "mean over frames of m times the mean over 64 mel bands (50-6000 Hz) of a ramp -60..-40 dB "
    "against the clip's strongest cell",
    "bass": "mean over frames of m times a ramp -40..-10 dB of the energy under 200 Hz against the loudest frame",
}


@dataclass(frozen=True)
class Term:
    """One descriptor's part in the score: its weight, its standardisation, and the range it is clamped to."""

    weight: float
    mean: float
    scale: float
    low: float
    high: float


@dataclass(frozen=True)
class Coefficients:
    """The result of calibration: ``intercept`` and one ``Term`` per name in ``DESCRIPTORS``.

    ``clips`` and ``spearman`` (cross-validated; None if unknown) are only used in the log.
    """

    intercept: float
    terms: Mapping[str, Term]
    clips: int | None = None
    spearman: float | None = None


class CEProxy(Reward):
    """Content Enjoyment on the 1-10 scale, approximated from four audio descriptors (see the module).

    Args:
        coefficients: JSON file written by ``python -m smart.reward.calibrate``; None: the shipped one.
        device: the device on which descriptors are computed.

    Raises:
        UserError: the file is missing or was not written by the calibration program.
    """

    axes = (AXIS,)
    sample_rate = SAMPLE_RATE
    is_stand_in = True
    together = 1  # clips are described one at a time

    def __init__(self, *, coefficients: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device=device)
        self.coefficients = load_coefficients(SHIPPED if coefficients is None else coefficients)
        self.provenance = _provenance(self.coefficients, coefficients)

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """CE of clips (N, S) float32 of the given lengths (N,), each at least 1: {"CE": (N,) float32}."""
        found = torch.stack([describe(clip[:length]) for clip, length in zip(audio, lengths.tolist(), strict=True)])
        return {AXIS: predict(found.cpu().double(), self.coefficients).float()}


def predict(descriptors: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """Scores (N,) of descriptors (N, 4), float64: the module's equation, clamped to 1-10."""
    score = torch.full((len(descriptors),), coefficients.intercept, dtype=torch.float64)
    for column, name in enumerate(DESCRIPTORS):
        term = coefficients.terms[name]
        value = descriptors[:, column].clamp(term.low, term.high)
        score = score + term.weight * (value - term.mean) / term.scale
    return score.clamp(LOWEST, HIGHEST)


@exact_float32()
def describe(clip: torch.Tensor) -> torch.Tensor:
    """The descriptors of one clip, in the order of ``DESCRIPTORS``.

    Args:
        clip: (S,) float32, mono, ``SAMPLE_RATE`` Hz, finite, S >= 1, any gain.

    Returns:
        (4,) float32 on the clip's device; all 0 for a silent clip.
    """
    if clip.ndim != 1 or len(clip) == 0 or clip.dtype != torch.float32:
        raise ValueError(f"a clip must be float32 of shape (S,), S >= 1, got {clip.dtype} {tuple(clip.shape)}")
    banks = _banks(clip.device)
    power = _power(clip) * banks.audible  # (frames, bins)
    energy = power.sum(dim=1)
    # a sine of amplitude 1 has the amplitude FRAME / 4 under a Hann window and the energy 1.5 (FRAME / 4)^2
    loudest = energy.max().clamp(min=INAUDIBLE * 1.5 * (FRAME / 4) ** 2)
    change = _chroma_change(power @ banks.chroma, loudest)
    music = (
        _ramp(_decibels(energy / loudest), *LEVEL_DB)
        * _ramp(_tonality(power, banks.octaves), *TONALITY_DB)
        * _ramp(_within_reach(change), *CHANGE)
    )
    cells = power @ banks.mel
    filled = _ramp(_decibels(cells / cells.max().clamp(min=1e-30)), *CELL_DB).mean(dim=1)
    bass = _ramp(_decibels(power @ banks.bass / loudest), *BASS_DB)
    # the first frames have no earlier frame to compare with: with them short clips would seem static
    moved = (music * change)[LAG:]
    return torch.stack(
        [
            music.mean(),
            moved.mean() if len(moved) else music.new_zeros(()),
            (music * filled).mean(),
            (music * bass).mean(),
        ]
    )


def load_coefficients(path: str | Path) -> Coefficients:
    """Read and check a calibration file.

    Raises:
        UserError: no such file, not JSON, another version, an unknown or missing descriptor, or an invalid
            number; it names the file and the entry.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"coefficients {path} cannot be read ({_reason(error)}); create them with: "
            "python -m smart.reward.calibrate --audio DIR --scores CSV"
        ) from error
    try:
        # a bare NaN, or an integer of thousands of digits, is a ValueError as well
        data = parse_json(text)
    except ValueError as error:
        raise UserError(f"coefficients {path}: not valid JSON ({error}); calibrate again") from error
    return _parse(data, str(path))


@dataclass(frozen=True)
class _Banks:
    """Matrices that turn a power spectrum (frames, bins) into the descriptors' inputs."""

    audible: torch.Tensor  # (bins,) 0 or 1
    mel: torch.Tensor  # (bins, 64)
    chroma: torch.Tensor  # (bins, 12)
    bass: torch.Tensor  # (bins,) 0 or 1
    octaves: tuple[slice, ...]  # bins of each octave


@functools.lru_cache(maxsize=4)
def _banks(device: torch.device) -> _Banks:
    hz = torch.arange(FRAME // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / FRAME
    pitch = 69 + 12 * torch.log2(hz.clamp(min=1.0) / 440)
    semitones = torch.arange(*CHROMA_PITCHES)
    triangles = (1 - (pitch[:, None] - semitones).abs()).clamp(min=0)  # one semitone to either side
    chroma = triangles.reshape(len(hz), -1, 12).sum(dim=1)  # the first pitch is C2, so column 0 is C
    bounds = [int(torch.searchsorted(hz, edge)) for edge in torch.tensor(OCTAVES_HZ, dtype=torch.float64)]
    return _Banks(
        audible=(hz >= LOWEST_HZ).float().to(device),
        mel=_mel_bank(hz).float().to(device),
        chroma=chroma.float().to(device),
        bass=(hz < BASS_HZ).float().to(device),
        octaves=tuple(slice(a, b) for a, b in itertools.pairwise(bounds)),
    )


def _mel_bank(hz: torch.Tensor) -> torch.Tensor:
    """Triangles of height 1, evenly spaced on the mel scale 2595 log10(1 + f / 700): (bins, MEL_BANDS)."""
    first, last = (2595 * math.log10(1 + f / 700) for f in MEL_HZ)
    edges = 700 * (10 ** (torch.linspace(first, last, MEL_BANDS + 2, dtype=torch.float64) / 2595) - 1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (hz[:, None] - left) / (centre - left)
    falling = (right - hz[:, None]) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def _power(clip: torch.Tensor) -> torch.Tensor:
    """Power spectra (frames, bins) of the clip scaled to a peak of 1; all frames lie inside the clip."""
    clip = clip / clip.abs().max().clamp(min=1e-30)
    if len(clip) < FRAME:
        clip = torch.nn.functional.pad(clip, (0, FRAME - len(clip)))
    window = torch.hann_window(FRAME, device=clip.device)
    return torch.fft.rfft(clip.unfold(0, FRAME, HOP) * window).abs().square()


def _chroma_change(chroma: torch.Tensor, loudest: torch.Tensor) -> torch.Tensor:
    """Distance (frames,) of each frame's harmony from the one LAG frames before; 0 for the first LAG frames.

    The harmony is the square root of the 12 pitch-class shares: a vector of length 1 that shrinks to 0 in silence.
    """
    shares = (chroma / (chroma.sum(dim=1, keepdim=True) + FAINT * loudest)).sqrt()
    change = torch.zeros_like(shares[:, 0])
    if len(shares) > LAG:
        change[LAG:] = (shares[LAG:] - shares[:-LAG]).norm(dim=1)
    return change


def _within_reach(change: torch.Tensor) -> torch.Tensor:
    """The largest change within REACH frames to either side, (frames,)."""
    return torch.nn.functional.max_pool1d(change[None, None], 2 * REACH + 1, stride=1, padding=REACH)[0, 0]


def _tonality(power: torch.Tensor, octaves: tuple[slice, ...]) -> torch.Tensor:
    """By how many decibels (frames,) the mean power exceeds its geometric mean; octaves weighted by energy.

    Measuring each octave by itself gives coloured noise the same low value as white noise: 10 log10(e) x
    Euler's constant, 2.5 dB.
    """
    total = power.sum(dim=1)
    floor = 1e-12 * total[:, None] + 1e-20
    excess = torch.zeros_like(total)
    for octave in octaves:
        bins = power[:, octave] + floor
        excess += power[:, octave].sum(dim=1) * (bins.mean(dim=1).log() - bins.log().mean(dim=1))
    return 10 / math.log(10) * excess / (total + 1e-20)


def _ramp(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """0 up to ``low``, 1 from ``high``, linear between them."""
    return ((value - low) / (high - low)).clamp(0, 1)


def _decibels(ratio: torch.Tensor) -> torch.Tensor:
    """A ratio of energies in decibels, at least -100."""
    return 10 * ratio.clamp(min=1e-10).log10()


def _provenance(coefficients: Coefficients, path: str | Path | None) -> str:
    """The line for the log."""
    source = "shipped coefficients" if path is None else f"coefficients {path}"
    fitted = "" if coefficients.clips is None else f", fitted to {coefficients.clips} rated clips"
    if coefficients.spearman is not None:
        fitted += f" (cross-validated Spearman {coefficients.spearman:.2f})"
    return (
        f"ce_proxy: a linear model of {len(DESCRIPTORS)} audio descriptors standing in for "
        f"Audiobox Aesthetics CE, not that model; {source}{fitted}"
    )


def _parse(data: Any, path: str) -> Coefficients:
    """Coefficients from decoded JSON; a ``UserError`` names a wrong entry."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f'coefficients {path}: expected a JSON object with "format": "{FORMAT}"')
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise UserError(f"coefficients {path}: version {data.get('version')!r}, expected {VERSION}; calibrate again")
    if data.get("axis") != AXIS or data.get("sample_rate") != SAMPLE_RATE:
        raise UserError(f'coefficients {path}: expected "axis": "{AXIS}" and "sample_rate": {SAMPLE_RATE}')
    entries = data.get("descriptors")
    if not isinstance(entries, dict):
        raise UserError(f'coefficients {path}: "descriptors" must be an object with {", ".join(DESCRIPTORS)}')
    for name in entries:
        if name not in DESCRIPTORS:
            raise UserError(f'coefficients {path}: unknown descriptor "{name}"; known are {", ".join(DESCRIPTORS)}')
    return Coefficients(
        intercept=_number(data, "intercept", path, ""),
        terms={name: _parse_term(entries.get(name), name, path) for name in DESCRIPTORS},
        clips=_parse_clips(data.get("clips"), path),
        spearman=_parse_spearman(data.get("cross_validation"), path),
    )


def _parse_term(entry: Any, name: str, path: str) -> Term:
    if not isinstance(entry, dict):
        raise UserError(f'coefficients {path}: descriptor "{name}" is missing or not an object')
    term = Term(*(_number(entry, key, path, f"{name}.") for key in Term.__dataclass_fields__))
    if term.scale <= 0:
        raise UserError(f"coefficients {path}: {name}.scale must be above 0, got {term.scale}")
    if term.low > term.high:
        raise UserError(f"coefficients {path}: {name}.low {term.low} is above {name}.high {term.high}")
    return term


def _parse_clips(clips: Any, path: str) -> int | None:
    if clips is not None and (type(clips) is not int or clips < 1):
        raise UserError(f'coefficients {path}: "clips" must be a positive whole number, got {clips!r}')
    return clips


def _parse_spearman(validation: Any, path: str) -> float | None:
    """The ungrouped Spearman correlation, or None if the file has no cross-validation."""
    if validation is None:
        return None
    try:
        figures = validation["ungrouped"]["spearman"]
    except (KeyError, TypeError):
        raise UserError(f'coefficients {path}: "cross_validation" lacks ungrouped.spearman') from None
    if not isinstance(figures, dict):
        raise UserError(f'coefficients {path}: ungrouped.spearman must be an object with a "mean"')
    return _number(figures, "mean", path, "cross_validation.ungrouped.spearman.")


def _number(entry: Mapping[str, Any], key: str, path: str, prefix: str) -> float:
    value: Any = entry.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    # compared before the conversion: an integer of 400 digits is valid JSON but too large for a float
    if not usable or not -1e12 <= value <= 1e12:
        raise UserError(f"coefficients {path}: {prefix}{key} must be a finite number, got {value!r:.40}")
    return float(value)


def _reason(error: Exception) -> str:
    """The operating system's reason, without the path, which the message already has."""
    return getattr(error, "strerror", None) or str(error)
