"""What pages that play pieces share: the player and the piano roll (``player.js``, ``player.css``), and their data.

``player.js`` defines ``Listen``, whose functions make the elements; it asks for nothing by itself, so that it works in
a file and from a server alike.
"""

from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from smart.render import Notes, score_notes

NAMES = ("C", "C sharp ", "D", "E flat ", "E", "F", "F sharp ", "G", "A flat ", "A", "B flat ", "B")


def asset(name: str) -> str:
    """The text of ``player.js`` or ``player.css``."""
    return files("smart.listen").joinpath(name).read_text(encoding="utf-8").strip()


def notes_of(midi: bytes) -> list[list[float]]:
    """The notes of a MIDI file as the page draws them: onset and length in seconds, pitch, velocity."""
    from symusic import Score

    return rows_of(score_notes(Score.from_midi(midi)))


def rows_of(notes: Notes) -> list[list[float]]:
    """``notes`` (n, 6) of ``smart.render.score_notes`` as rows of onset and length in seconds, pitch, velocity."""
    columns: npt.NDArray[np.float64] = notes[:, :4]
    return [[round(onset, 4), round(length, 4), int(p), int(v)] for onset, length, p, v in columns.tolist()]


def in_words(tokens: Sequence[str]) -> str:
    """A prompt, given as names of tokens, as a person would say it: "2/4, 93 beats a minute"."""
    said = []
    for token in tokens:
        kind, _, value = token.partition("_")
        if kind == "TimeSig":
            said.append(value)
        elif kind == "Tempo":
            said.append(f"{float(value):.0f} beats a minute")
        elif kind == "Pitch":
            said.append(f"first note {NAMES[int(value) % 12]}{int(value) // 12 - 1}")
        elif kind == "PitchDrum":
            said.append(f"first drum {value}")
        elif kind == "Program":
            said.append("drums" if value == "-1" else f"program {int(value) + 1}")
    return ", ".join(said) or "an empty beginning"
