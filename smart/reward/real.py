"""Real pieces as a measure: excerpts of a folder of the user's, and the ratings of real music that a target stands for.

A target "real" of a reward is the median of its ratings of real excerpts through the soundfonts of a run: a figure that
ships (``real.json``), or that of a folder of MIDI or audio files.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart import UserError
from smart.corpus import open_score
from smart.files import parse_json
from smart.render import Audio, Notes, RenderPool, read_audio, score_notes, short_name
from smart.reward.mixture import Part
from smart.reward.resampling import resample
from smart.reward.reward import NoteReward, Reward

FIGURES = Path(__file__).with_name("real.json")
MIDI, AUDIO = (".mid", ".midi"), (".wav", ".flac", ".mp3", ".ogg")
MOST = 128  # files of a folder
LOWEST_RATE = 4000  # Hz, of an audio file
LONGEST = 600  # seconds of an audio file that are read
TOGETHER = 8  # excerpts rated at once


TARGETS = "targets.json"  # in the folder of a run: the number of each target "real"


class Target(NamedTuple):
    """What a target "real" refers to."""

    reward: Reward
    options: Mapping[str, Any]  # of the reward; a figure ships for the default ones only
    folder: str  # of the real pieces; empty: a figure that ships


def find_pieces(folder: str | Path) -> list[Path]:
    """The MIDI and audio files in ``folder`` and its subfolders, sorted; of more than ``MOST``, evenly spaced ones.

    Raises ``UserError`` if there are fewer than two.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with MIDI or audio files")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in MIDI + AUDIO and path.is_file())
    if len(found) < 2:
        raise UserError(
            f"folder {folder} holds {len(found)} MIDI or audio files (mid, wav, flac, mp3, ogg), expected two"
        )
    return [found[place * len(found) // MOST] for place in range(MOST)] if len(found) > MOST else found


def excerpt(notes: Notes, seconds: float) -> Notes:
    """``seconds`` of notes (n, 6) from the first onset after a third of the piece; of a short piece, its beginning."""
    onset = notes[:, 0]
    begin, end = (onset.min(), onset.max()) if len(onset) else (0.0, 0.0)
    later = onset[onset >= begin + (end - begin) / 3]
    if end - begin > 1.5 * seconds and len(later):
        begin = later.min()
    part = notes[(onset >= begin) & (onset < begin + seconds)].copy()
    part[:, 0] -= begin
    return part


def read_excerpts(
    files: Sequence[Path], soundfonts: Sequence[Path], *, sample_rate: int, seconds: float, workers: int | None = 1
) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    """An excerpt of each file, mono (S,), and its sample rate: audio as it is, MIDI once through each soundfont.

    Files that cannot be read or hold no notes raise ``UserError``; silent excerpts are left out.
    """
    notes = []
    for path in files:
        if path.suffix.lower() in MIDI:
            notes.append(excerpt(score_notes(open_score(path)[0], max_beats=math.inf), seconds))
            continue
        audio, rate = read_audio(path, LONGEST)
        if rate < LOWEST_RATE:
            raise UserError(f"audio file {path} has a sample rate of {rate} Hz, at least {LOWEST_RATE} are needed")
        begin = len(audio) // 3 if len(audio) > 1.5 * seconds * rate else 0
        audio = audio[begin : begin + round(seconds * rate)]
        if np.abs(audio).max(initial=0) > 0:
            yield audio, rate
    if not any(map(len, notes)):
        return
    for soundfont in soundfonts:
        with RenderPool(soundfont, sample_rate=sample_rate, seconds=seconds, workers=workers) as pool:
            futures = [pool.submit(part) for part in notes if len(part)]
            for future in futures:
                stereo: Audio = future.result()
                yield stereo.mean(axis=0), sample_rate


@cache
def _figures() -> dict[str, dict[str, dict[str, float]]]:
    """Reward -> axis -> short name of the soundfont -> median."""
    medians: dict[str, dict[str, dict[str, float]]] = json.loads(FIGURES.read_text(encoding="utf-8"))["medians"]
    return medians


def shipped_figure(target: Target, soundfonts: Sequence[Path]) -> float:
    """The figure that ships with the reward, averaged over ``soundfonts``. Raises ``UserError`` if there is none."""
    reward = target.reward
    weights = {axis: weight for axis, weight in reward.weights.items() if weight}
    known = _figures().get(reward.name, {})
    names = [short_name(path) or path.name for path in soundfonts]
    axis, weight = next(iter(weights.items()))
    found = [known.get(axis, {}).get(name, math.nan) for name in names]
    if own := getattr(reward, "real_by_soundfont", None):  # an ear's file has those of its own networks
        found = [own.get(name, {}).get(axis, math.nan) for name in names]
    if len(weights) == 1 and (own or not target.options) and all(map(math.isfinite, found)):
        return math.copysign(1.0, weight) * sum(found) / len(found)
    what = f"reward {reward.name} ({' '.join(weights)}{', with options' if target.options else ''})"
    raise UserError(
        f'target = "real": no figure ships for {what} through {", ".join(names)}; '
        "set real to a folder of MIDI or audio files, or target to a number"
    )


def real_targets(tables: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> dict[str, Target]:
    """The targets "real" of rewards that ``load_parts`` loaded from ``tables``, by the name of the part."""
    return {
        part.name: Target(part.reward, table["options"], table["real"])
        for table, part in zip(tables, parts, strict=True)
        if table["target"] == "real"
    }


def read_targets(folder: Path) -> dict[str, float]:
    """The numbers that a run found for its targets "real". Raises ``UserError`` if they cannot be read."""
    path = folder / TARGETS
    if not path.is_file():
        return {}
    try:
        return {str(name): float(value) for name, value in parse_json(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"run {folder}: {TARGETS} cannot be read ({error})") from None


def check(target: Target, soundfonts: Sequence[Path]) -> None:
    """Raise ``UserError`` unless ``measure`` can find what the target "real" is."""
    if isinstance(target.reward, NoteReward):
        raise UserError(f'target = "real": {target.reward.name} rates notes; set target to a number')
    if target.folder:
        find_pieces(target.folder)
    else:
        shipped_figure(target, soundfonts)


def measure(
    target: Target, soundfonts: Sequence[Path], *, sample_rate: int, seconds: float, workers: int | None = 1
) -> float:
    """What a target "real" is: the median of the combined rating over excerpts of ``seconds``."""
    if not target.folder:
        return shipped_figure(target, soundfonts)
    reward, ratings = target.reward, []
    waves: list[torch.Tensor] = []

    def rate() -> None:
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        ratings.append(reward.combine(reward.score(padded, torch.tensor([len(wave) for wave in waves]))).cpu())
        waves.clear()

    files = find_pieces(target.folder)
    excerpts = read_excerpts(files, soundfonts, sample_rate=sample_rate, seconds=seconds, workers=workers)
    for audio, rate_of_audio in excerpts:
        waves.append(resample(torch.from_numpy(audio), rate_of_audio, reward.sample_rate))
        if len(waves) == TOGETHER:
            rate()
    if waves:
        rate()
    known = torch.cat([torch.empty(0), *ratings])
    known = known[known.isfinite()]
    if not len(known):
        raise UserError(f"reward {reward.name} could rate none of the pieces in {target.folder}")
    return known.median().item()
