"""Prompts (paper sections 3.5 and 5.3): the short token rows that completions start from, drawn with a seed.

- ``procedural``: ``Bar_None, TimeSig_*, Position_0, Tempo_*``, time signature and tempo uniform over the vocabulary.
- ``first_note``: the same, then ``Pitch_*, Velocity_*, Duration_*``, each uniform. If the vocabulary has programs, a
  uniform ``Program_*`` comes before the pitch, which is a ``PitchDrum_*`` if that program is the drums.
- ``bos``: the beginning-of-sequence token alone.
- ``dataset``: the same four tokens as ``procedural``, with the first time signature and tempo of a piece from a corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from smart import UserError
from smart.tokens import Vocabulary, vocabulary

if TYPE_CHECKING:
    import torch

KINDS = ("procedural", "first_note", "bos", "dataset")
LONGEST = 8  # tokens of the longest prompt: a first note with its program


class Pieces(Protocol):
    """Tokenised pieces, such as a split of ``smart.corpus.Corpus``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> npt.NDArray[np.uint16]: ...


def draw(
    kind: str, count: int, tokenizer: Any, generator: torch.Generator, *, pieces: Pieces | None = None
) -> torch.Tensor:
    """``count`` prompts of one ``kind``: (B, P) int64, without padding since they have the same length.

    ``dataset`` needs ``pieces``. Raises ``UserError`` if a drawn piece has no time signature or tempo, ``ValueError``
    for an unknown kind.
    """
    import torch

    facts = vocabulary(tokenizer)

    def pick(ids: Sequence[int]) -> torch.Tensor:  # (B,), uniform
        return torch.tensor(ids)[torch.randint(len(ids), (count,), generator=generator)]

    def opening(time_signatures: torch.Tensor, tempos: torch.Tensor) -> list[torch.Tensor]:
        bar, position = (torch.full((count,), token) for token in (facts.bar_id, facts.position0_id))
        return [bar, time_signatures, position, tempos]

    if kind == "bos":
        columns = [torch.full((count,), facts.bos_id)]
    elif kind in ("procedural", "first_note"):
        columns = opening(pick(facts.time_signature_ids), pick(facts.tempo_ids))
        if kind == "first_note":
            pitches = pick(facts.pitch_ids)
            if facts.program_ids:
                columns.append(programs := pick(facts.program_ids))
                if facts.drum_ids:
                    pitches = torch.where(programs == facts.drum_program_id, pick(facts.drum_ids), pitches)
            columns += [pitches, pick(facts.velocity_ids), pick(facts.duration_ids)]
    elif kind == "dataset":
        if pieces is None or not len(pieces):
            raise UserError("prompts of kind 'dataset' need pieces: set prompts.corpus to a corpus folder")
        rows = torch.randint(len(pieces), (count,), generator=generator).tolist()
        firsts = [_first_signs(pieces[row], facts, row) for row in rows]
        columns = opening(*torch.tensor(firsts).T)
    else:
        raise ValueError(f"prompt kind {kind!r}: expected one of {', '.join(KINDS)}")
    return torch.stack(columns, dim=1)


def _first_signs(tokens: npt.NDArray[np.uint16], facts: Vocabulary, row: int) -> tuple[int, int]:
    """The first time signature and the first tempo of a piece."""
    found = []
    for name, ids in (("time signature", facts.time_signature_ids), ("tempo", facts.tempo_ids)):
        places = np.flatnonzero(np.isin(tokens, ids))
        if not len(places):
            raise UserError(f"piece {row} of the corpus has no {name}; build the corpus again with smart.corpus")
        found.append(int(tokens[places[0]]))
    return found[0], found[1]
