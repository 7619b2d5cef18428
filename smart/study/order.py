"""The order in which a participant hears the excerpts.

N = n prompts x k systems excerpts form a Williams design: a Latin square whose first row is 0, 1, N-1, 2, N-2, ...
and whose other rows add 1, 2, ... modulo N (for odd N, followed by the same rows reversed). Its rows are called a
block. Within a block, exactly:

- every excerpt is heard at every position once (twice for odd N), so prompts and systems are balanced over positions;
- every excerpt follows every other one once (twice for odd N): first-order carry-over is balanced.

Excerpt (prompt p, system s) has the number p + s n, so that rows r, r + n, r + 2n, ... have the same prompts in the
same order, with the systems rotated. These rows follow each other, so that for every k participants in a row

- each position has every system once, with the same prompt.

For k = 2, each half of a row holds every prompt once; which of its systems comes first is drawn per prompt and block,
so that participants cannot learn an alternation. Blocks differ in that draw, in the order of the prompts and in the
order of the rows. Everything follows from one seed, which must be secret: it and the number of earlier participants
give away the systems.

Hidden repeats and the silent check are inserted into the second half of the row, at positions drawn per participant.
They shift the trials after them: the balance is that of the order of the N excerpts.
"""

from typing import NamedTuple

import numpy as np


class Trial(NamedTuple):
    """One position of a participant's order. ``kind``: "practice", "main", "repeat" or "silence"."""

    excerpt: str
    kind: str


def williams(count: int) -> list[list[int]]:
    """A Williams design for ``count`` treatments: ``count`` rows, or twice as many if it is odd."""
    first = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    rows = [[(number + shift) % count for number in first] for shift in range(count)]
    return rows if count % 2 == 0 else [*rows, *(row[::-1] for row in rows)]


def order(prompts: int, systems: int, slot: int, seed: int) -> list[tuple[int, int]]:
    """The (prompt, system) pairs as participant number ``slot`` (0, 1, ...) hears them."""
    square = williams(prompts * systems)
    block, place = divmod(slot, len(square))
    draw = np.random.default_rng([seed, block])
    shuffled = draw.permutation(prompts)
    turned = draw.integers(systems, size=prompts)
    groups = draw.permutation(len(square) // systems)  # of rows that differ only by a rotation of the systems
    turns = draw.permuted(np.tile(np.arange(systems), (len(groups), 1)), axis=1)
    half, shift = divmod(int(groups[place // systems]), prompts)
    row = square[half * prompts * systems + shift + prompts * int(turns[place // systems][place % systems])]
    heard = []
    for number in row:
        system, prompt = divmod(number, prompts)
        heard.append((int(shuffled[prompt]), int((system + turned[prompt]) % systems)))
    return heard


def with_checks(main: list[str], repeats: int, silence: str | None, slot: int, seed: int) -> list[Trial]:
    """Insert ``repeats`` excerpts of the first third again, and the silent one, into the second half of an order.

    None of them becomes the last trial.
    """
    draw = np.random.default_rng([seed, slot, 1])
    trials = [Trial(excerpt, "main") for excerpt in main]
    again = draw.choice(main[: max(len(main) // 3, repeats)], size=repeats, replace=False)
    checks = [Trial(str(excerpt), "repeat") for excerpt in again]
    checks += [Trial(silence, "silence")] if silence is not None else []
    for check in checks:
        trials.insert(int(draw.integers((len(main) + 1) // 2, max(len(trials), (len(main) + 1) // 2 + 1))), check)
    return trials
