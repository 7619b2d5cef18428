"""In which order a participant hears the excerpts.

N = n prompts x k systems excerpts form a Williams design: a Latin square whose first row is 0, 1, N-1, 2, N-2, ...
and whose further rows add 1, 2, ... modulo N (for odd N, these rows and the same ones reversed). Its rows are called
a block. Over a block, exactly:

- every excerpt stands at every position once (twice for odd N), and so does every prompt and every system its share;
- every excerpt follows every other one once (twice for odd N): first-order carry-over is balanced.

Excerpt (prompt p, system s) has the number p + s n, so that rows r, r + n, r + 2n, ... hear the same prompts in the
same order from each of the systems in turn. These follow each other, so that already over every k participants

- every position is heard from every system once, with the same prompt.

Within a row the two halves of a Williams row hold each prompt once (k = 2); which of its systems comes first is
drawn by prompt and block, so that no alternation can be learnt. Blocks differ in that draw, in the order of the
prompts and in the order of the rows. All follows from a seed that nobody must be able to guess: who knows it, and how
many came before, knows the systems.

Hidden repeats and the silent check are put into the second half of the row, at places drawn by participant. They shift
what follows them: the balance is one of the order of the N excerpts.
"""

from typing import NamedTuple

import numpy as np


class Trial(NamedTuple):
    """What is heard at one position. ``kind``: "practice", "main", "repeat" or "silence"."""

    excerpt: str
    kind: str


def williams(count: int) -> list[list[int]]:
    """A Williams design of ``count`` treatments: ``count`` rows, or twice as many where it is odd."""
    first = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    rows = [[(number + shift) % count for number in first] for shift in range(count)]
    return rows if count % 2 == 0 else [*rows, *(row[::-1] for row in rows)]


def order(prompts: int, systems: int, slot: int, seed: int) -> list[tuple[int, int]]:
    """The (prompt, system) pairs as the participant of number ``slot`` (0, 1, ...) hears them."""
    square = williams(prompts * systems)
    block, place = divmod(slot, len(square))
    draw = np.random.default_rng([seed, block])
    shuffled = draw.permutation(prompts)
    turned = draw.integers(systems, size=prompts)
    groups = draw.permutation(len(square) // systems)  # of rows that are each other's exchange of systems
    turns = draw.permuted(np.tile(np.arange(systems), (len(groups), 1)), axis=1)
    half, shift = divmod(int(groups[place // systems]), prompts)
    row = square[half * prompts * systems + shift + prompts * int(turns[place // systems][place % systems])]
    heard = []
    for number in row:
        system, prompt = divmod(number, prompts)
        heard.append((int(shuffled[prompt]), int((system + turned[prompt]) % systems)))
    return heard


def with_checks(main: list[str], repeats: int, silence: str | None, slot: int, seed: int) -> list[Trial]:
    """A participant's excerpts, ``repeats`` of the first third again in the second half, and the silence.

    None of these is the last trial.
    """
    draw = np.random.default_rng([seed, slot, 1])
    trials = [Trial(excerpt, "main") for excerpt in main]
    again = draw.choice(main[: max(len(main) // 3, repeats)], size=repeats, replace=False)
    checks = [Trial(str(excerpt), "repeat") for excerpt in again]
    checks += [Trial(silence, "silence")] if silence is not None else []
    for check in checks:
        trials.insert(int(draw.integers((len(main) + 1) // 2, max(len(trials), (len(main) + 1) // 2 + 1))), check)
    return trials
