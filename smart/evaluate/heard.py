"""What a report plays: the first pairs of a table, rendered as they were rated."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from smart import UserError, plots
from smart.evaluate.figures import Picture
from smart.evaluate.pieces import Sample
from smart.files import sha256
from smart.listen import in_words
from smart.render import RenderError, RenderPool, checked_soundfont

AXES = 4  # most ratings that a player shows


class Clip(NamedTuple):
    """A piece that can be played: ``audio`` is FLAC in base 64, empty if it could not be rendered."""

    system: str
    audio: str
    ratings: dict[str, float]


class Pair(NamedTuple):
    """What all systems wrote for a prompt."""

    title: str
    picture: Picture
    clips: Sequence[Clip]


def play(sample: Sample, out: Path, *, soundfont: str, count: int) -> tuple[list[Pair], str]:
    """The pieces of the first ``count`` prompts, and a sentence on how they were rendered.

    Without a soundfont there are none. Writes their piano rolls into ``out``.
    """
    settings = sample.settings
    try:
        font = checked_soundfont(soundfont)
    except UserError as error:
        click.echo(f"Note: the page plays nothing: {error.message}", err=True)
        return [], ""
    rate, seconds = int(settings.get("sample_rate", 44_100)), float(settings.get("seconds", 10.0))
    prompts = range(min(count, settings["count"]))
    pairs = []
    with RenderPool(font, sample_rate=rate, seconds=seconds) as pool:
        rendering = {(name, row): pool.submit(sample.scores[name][row]) for row in prompts for name in sample.systems}
        for row in prompts:
            clips = []
            for name in sample.systems:
                try:
                    audio = _flac(rendering[name, row].result(), rate)
                except RenderError:
                    audio = ""
                ratings = {axis: float(sample.measures[name][axis][row]) for axis in sample.axes[:AXES]}
                clips.append(Clip(name, audio, {axis: value for axis, value in ratings.items() if np.isfinite(value)}))
            scores = {name: sample.scores[name][row] for name in sample.systems}
            path = plots.piano_rolls(scores, out / f"{sample.name}-rolls-{row}.png", seconds=seconds)
            notes = ", ".join(f"{score.note_num()} notes by {name}" for name, score in scores.items())
            title = f"Prompt {row}: {_opening(scores[sample.systems[0]])}"
            pairs.append(Pair(title, Picture(title, path, f"piano rolls: {notes}", ""), clips))
    same = sha256(font) == settings["soundfont_sha256"]
    how = "as they were rated" if same else f"with {font.name}, while another soundfont was rated"
    return pairs, f"The first prompts of the table, chosen neither by ear nor by rating, played {how}."


def _opening(score: Any) -> str:
    """Time signature and tempo with which a piece begins, in words."""
    signatures = [f"TimeSig_{each.numerator}/{each.denominator}" for each in score.time_signatures[:1]]
    return in_words([*signatures, *(f"Tempo_{each.qpm}" for each in score.tempos[:1])])


def _flac(audio: Any, rate: int) -> str:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, audio.T, rate, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()
