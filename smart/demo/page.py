"""One self-contained page of pieces: the HTML file contains all audio, notes, MIDI and ratings.

The page's audio is lossless 16-bit FLAC with two channels, at the sample rate of the rendering. The renderer makes
float32 audio with its peak at full scale; ``quantise`` rounds it to the nearest of 65,536 levels. The page rates the
audio after that rounding, so what you hear is what was rated, bit for bit.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from smart.listen import asset, in_words, notes_of
from smart.reward import Reward, resample
from smart.rollout import SILENT, Piece, System

FULL_SCALE = 32768  # 16-bit audio


def quantise(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Round float audio (C, S) in [-1, 1] to 16-bit audio (C, S); 1.0, one step too loud for it, is clipped."""
    return np.clip(np.rint(audio * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def to_flac(audio: npt.NDArray[np.int16], sample_rate: int) -> bytes:
    """16-bit audio (C, S) as the bytes of a FLAC file with maximum compression."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, audio.T, sample_rate, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def rate(reward: Reward, audio: npt.NDArray[np.int16], sample_rate: int) -> dict[str, float]:
    """Rate 16-bit audio (C, S) on each axis. As in training, the reward gets the mean of the channels."""
    wave = torch.from_numpy(audio.astype(np.float32) / FULL_SCALE).mean(0)
    scores = reward.score(resample(wave, sample_rate, reward.sample_rate)[None])
    return {axis: values.item() for axis, values in scores.items()}


class Section(NamedTuple):
    """Pairs under one heading: ``first`` against each of ``others``, a model at several steps of its training."""

    title: str
    first: System
    others: Sequence[System]
    kind: str  # kind of prompts
    corpus: Path | None  # its test split gives dataset prompts


class Page:
    """Collects the pieces of all sections; ``html`` makes the page."""

    def __init__(self, reward: Reward, sample_rate: int) -> None:
        self.reward = reward
        self.sample_rate = sample_rate
        self.sections: list[dict[str, Any]] = []
        self.clips: list[dict[str, Any]] = []
        self.audio: dict[bytes, int] = {}  # FLAC -> number; sections with the same base share its audio

    def add_section(self, section: Section) -> None:
        """Begin a section; pieces added from now on belong to it."""
        self.sections.append(
            {
                "title": section.title,
                "prompts": f"Prompts: {section.kind}"
                + (f", from the test split of {section.corpus.name}." if section.corpus else "."),
                "first": section.first.name,
                "others": [{"name": system.name, "step": system.step} for system in section.others],
                "pairs": [],
            }
        )

    def add(self, piece: Piece, opening: str) -> None:
        """Add a piece to the last section; ``opening`` is its prompt as names of tokens."""
        section = self.sections[-1]
        pairs = {pair["prompt"]: pair for pair in section["pairs"]}
        pair = pairs.get(piece.prompt)
        if pair is None:
            pair = {"prompt": piece.prompt, "seed": piece.seed, "opening": opening, "clips": {}}
            pair["words"] = in_words(opening.split())
            section["pairs"].append(pair)
        pair["clips"][piece.system] = len(self.clips)
        self.clips.append(self._clip(piece))

    def _clip(self, piece: Piece) -> dict[str, Any]:
        midi: bytes = piece.score.dumps_midi()
        clip: dict[str, Any] = {
            "midi": _text(midi),
            "notes": notes_of(midi),  # from the same file that the page offers for download
            "audio": None,
            "ratings": {},
        }
        if piece.audio is None:
            return clip
        audio = quantise(piece.audio)
        ratings = rate(self.reward, audio, self.sample_rate)
        flac = to_flac(audio, self.sample_rate)
        return clip | {
            "audio": self.audio.setdefault(flac, len(self.audio)),
            "seconds": audio.shape[1] / self.sample_rate,
            "silent": bool(np.abs(piece.audio).max() < SILENT),
            "ratings": {axis: value if math.isfinite(value) else None for axis, value in ratings.items()},
        }

    def html(
        self,
        *,
        title: str,
        rule: Sequence[str],
        facts: Mapping[str, Any],
        models: Sequence[Mapping[str, Any]],
        configs: Mapping[str, str],
    ) -> str:
        """The page as HTML. ``rule`` lists sentences on how the pieces were selected; the rest is their provenance.

        The same arguments and pieces give the same bytes.
        """
        data: dict[str, Any] = {
            "axes": self.reward.axes,
            "sections": self.sections,
            "clips": self.clips,
            "sample_rate": self.sample_rate,
        }
        audio = [_text(flac) for flac in self.audio]
        # the browser stores choices under this id, so that two pages do not mix theirs
        data["id"] = hashlib.sha256(json.dumps([data, audio]).encode()).hexdigest()[:16]
        style, script, template = (
            files("smart.demo").joinpath(name).read_text(encoding="utf-8").strip()
            for name in ("page.css", "page.js", "page.html")
        )
        style, script = f"{asset('player.css')}\n{style}", f"{asset('player.js')}\n{script}"
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(template).render(
            title=title,
            rule=rule,
            facts=facts,
            models=models,
            configs=configs,
            reward=self.reward,
            style=Markup(style),  # safe: a file of this package
            script=Markup(script),
            hashes={"style": _hash(style), "script": _hash(script)},
            sections=self.sections,
            data=htmlsafe_json_dumps(data),
            audio=map(Markup, audio),
        )


def _text(content: bytes) -> str:
    """Bytes in base 85 (RFC 1924), a quarter longer. "," replaces "<", which could end the script element."""
    return base64.b85encode(content).decode().replace("<", ",")


def _hash(text: str) -> str:
    """Hash of an inline script or style for the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
