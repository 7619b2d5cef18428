"""The tokens of a piece: its opening, and what follows, one window of the model's context at a time.

Axes: N pieces that are written together, P prompt length, T completion length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from smart import UserError
from smart.tokens import Grammar, Vocabulary, unplayable, vocabulary

if TYPE_CHECKING:  # imported where they are used: the command line answers at once
    import torch

    from smart.sampler import Rollout, Sampler

WINDOW = 512  # tokens that the model sees at once: the length of its training rows (paper section 3.1)
ROWS = 64  # pieces, including candidates, that are written together


def opening(tokenizer: Any, time_signature: str, tempo: float) -> list[int]:
    """The first four tokens of a new piece: Bar, TimeSig, Position_0, and the nearest Tempo.

    Raises ``UserError`` for a time signature or tempo that is not in the vocabulary.
    """
    vocab, facts = tokenizer.vocab, vocabulary(tokenizer)
    signatures = {name.removeprefix("TimeSig_") for name in vocab if name.startswith("TimeSig_")}
    tempos = {float(name.removeprefix("Tempo_")): name for name in vocab if name.startswith("Tempo_")}
    if time_signature not in signatures:
        known = ", ".join(sorted(signatures, key=lambda name: [int(part) for part in name.split("/")][::-1]))
        raise UserError(f"--time-signature {time_signature}: expected one of {known}")
    if not min(tempos) <= tempo <= max(tempos):
        raise UserError(f"--tempo {tempo:g}: expected {min(tempos):g} to {max(tempos):g} quarter notes per minute")
    nearest = min(tempos, key=lambda value: abs(value - tempo))
    return [facts.bar_id, vocab[f"TimeSig_{time_signature}"], facts.position0_id, vocab[tempos[nearest]]]


def last_bars(tokens: Sequence[int], facts: Vocabulary, *, bars: int, longest: int) -> list[int]:
    """The end of a piece, from a bar line: at most ``bars`` bars and ``longest`` tokens, with the current tempo.

    A single bar that is too long is cut at its beginning.
    """
    lines = [place for place, token in enumerate(tokens) if token == facts.bar_id][-bars:]
    fitting = [place for place in lines if len(tokens) - place < longest]  # one token is for the tempo
    start = fitting[0] if fitting else max(len(tokens) - longest + 1, 0)
    end = list(tokens[start:])
    tempos, positions = set(facts.tempo_ids), set(facts.position_ids)
    in_force = next((token for token in reversed(tokens[:start]) if token in tempos), None)
    first = next((place for place, token in enumerate(end) if token in positions), None)
    if in_force is not None and first is not None and not tempos.intersection(end[first + 1 : first + 2]):
        end.insert(first + 1, in_force)
    return end


class Writer(NamedTuple):
    """Writes tokens: the sampler and its options. ``window``: tokens that the model sees at once."""

    sampler: Sampler
    facts: Vocabulary
    temperature: float
    top_k: int
    top_p: float
    window: int = WINDOW

    @property
    def context(self) -> int:
        """At most this many tokens of a window are context for new ones."""
        return self.window * 3 // 4

    def write(
        self, prompts: Sequence[Sequence[int]], tokens: int, generator: torch.Generator, grammar: Grammar | None
    ) -> list[list[int]]:
        """Up to ``tokens`` new tokens after each of N prompts, one window at a time, without the end token."""
        written: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        done = 0
        while going and done < tokens:
            seen = [
                last_bars([*prompts[row], *written[row]], self.facts, bars=self.window, longest=self.context)
                for row in going
            ]
            width = max(map(len, seen))
            rollout = self._sample(seen, min(tokens - done, self.window - width), generator, grammar)
            lengths = rollout.mask.sum(1).tolist()
            for row, drawn, length in zip(going, rollout.tokens[:, width:].tolist(), lengths, strict=True):
                written[row] += drawn[:length]
            going = [row for row in going if written[row][-1] != self.facts.eos_id]
            done += max(lengths)
        return [row[:-1] if row and row[-1] == self.facts.eos_id else row for row in written]

    def write_bar(
        self, prompts: Sequence[Sequence[int]], tokens: int, generator: torch.Generator, grammar: Grammar
    ) -> list[list[int]]:
        """The rest of the bar in which each of N prompts ends, at most ``tokens`` of it, without the next bar line."""
        from smart.sampler import Sampler

        seen = [last_bars(row, self.facts, bars=self.window, longest=self.context) for row in prompts]
        width = max(map(len, seen))
        stopping = self._replace(
            sampler=Sampler(self.sampler.model, pad_id=self.facts.pad_id, eos_id=self.facts.bar_id)
        )
        rollout = stopping._sample(seen, min(tokens, self.window - width), generator, grammar)
        rows = zip(rollout.tokens[:, width:].tolist(), rollout.mask.sum(1).tolist(), strict=True)
        return [[token for token in row[:length] if token != self.facts.bar_id] for row, length in rows]

    def _sample(
        self, seen: Sequence[list[int]], tokens: int, generator: torch.Generator, grammar: Grammar | None
    ) -> Rollout:
        import torch

        width = max(map(len, seen))
        return self.sampler.sample(
            torch.tensor([[self.facts.pad_id] * (width - len(row)) + row for row in seen]),
            max_new_tokens=tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=generator,
            grammar=grammar,
        )


def unplayable_tokens(
    prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], grammar: Grammar
) -> list[int]:
    """How many of each piece's new tokens cannot be played after its prompt."""
    import torch

    counts = []
    for prompt, new in zip(prompts, written, strict=True):
        row = torch.tensor([[*prompt, *new]])
        counts.append(int(unplayable(row, len(prompt), torch.ones(1, len(new), dtype=torch.bool), grammar).sum()))
    return counts
