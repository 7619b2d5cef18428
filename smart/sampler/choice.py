"""Choose one token per row: ``filter_logits``, ``draw``, and a grammar that rules out unplayable tokens.

Axes: N sequences, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from smart.gpu import exact
from smart.tokens import Grammar, Place


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (N, V) float32 -> logits (N, V) of the distribution to draw from, -inf where nothing is drawn.

    First the temperature is applied; then the ``top_k`` most likely tokens are kept (0: all); of these, the smallest
    set of the most likely ones that holds a share ``top_p`` of their probability. Of equal logits the lower id is kept.
    """
    if temperature != 1.0:
        # subtracting the maximum first keeps a very low temperature from overflowing
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        # a sort would take three times as long; topk alone does not define which of equal logits it keeps
        least = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        above, equal = logits > least, logits == least
        places = top_k - above.sum(-1, keepdim=True)
        logits = logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= places))), -math.inf)
    if top_p < 1.0:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, ids, drop), -math.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row: logits (N, V) float32, uniform (N,) float64 in [0, 1) -> ids (N,), logprobs (N,).

    The token is the first one at which the cumulative distribution exceeds the uniform number. The sum is in float64
    (float32 on a device that lacks it, where ``uniform`` is, too), and a token of probability 0 is never drawn. There
    is no synchronisation with the device.
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    cumulative = probs.cumsum(-1, dtype=exact(probs.device))
    past = cumulative > uniform[:, None] * cumulative[:, -1:]
    # Rank 2: possible, and past the number (a parallel sum need not be monotone to the last bit). Rank 1: possible;
    # it is only drawn if rounding left no token of rank 2. argmax returns the first of the maxima.
    token = ((probs > 0) * (past + 1)).argmax(-1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


class Choice(NamedTuple):
    """How tokens are chosen; the fields are the arguments of ``Sampler`` and ``sample`` of the same names."""

    temperature: float
    top_k: int
    top_p: float
    pad_id: int
    eos_id: int | None
    grammar: Grammar | None

    def to(self, device: torch.device) -> Choice:
        return self._replace(grammar=None if self.grammar is None else self.grammar.to(device))

    def read_state(self, rows: Tensor) -> Place | None:
        """The grammar's state after rows of tokens (N, P); None without a grammar."""
        return None if self.grammar is None else self.grammar.read(rows)

    def choose(
        self, logits: Tensor, uniform: Tensor, alive: Tensor, state: Place | None
    ) -> tuple[Tensor, Tensor, Tensor, Place | None]:
        """The tokens drawn from ``logits`` (N, V), their log-probabilities, which rows are still alive, and the state.

        All are (N,), as are ``uniform``, ``alive`` and the parts of ``state``. A row that is not alive gets padding and
        the log-probability 0.
        """
        if self.grammar is not None and state is not None:
            logits = logits.masked_fill(~self.grammar.playable(state), -math.inf)
        filtered = filter_logits(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        drawn, logprob = draw(filtered, uniform)
        dead = ~alive
        drawn, logprob = drawn.masked_fill_(dead, self.pad_id), logprob.masked_fill_(dead, 0.0)
        if self.grammar is not None and state is not None:
            state = self.grammar.step(state, drawn)
        return drawn, logprob, alive if self.eos_id is None else alive & (drawn != self.eos_id), state
