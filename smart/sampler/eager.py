"""Decode step by step from the host.

Axes: B prompts, N sequences = B x group_size, P prompt length, T completion length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smart.sampler.choice import Choice
from smart.sampler.network import Network, drop_rows, forward, new_cache, padding_mask, prefill
from smart.tokens import Place

# To check whether all rows have ended, the host waits for the device; on a CPU there is nothing to wait for.
STEPS_PER_LOOK = {"cpu": 1}
STEPS_PER_LOOK_ELSEWHERE = 16
STEPS_PER_WATCH = 16
# takes the tokens so far (N, P+t), and which rows have ended (N,); both on the CPU, valid only during the call
Watch = Callable[[Tensor, Tensor], None]


class Start(NamedTuple):
    """The inputs of a batch, on the model's device."""

    prompts: Tensor  # (B, P) int64
    real: Tensor  # (B, P) bool, False on padding
    uniforms: Tensor  # (T, N) float64
    group_size: int


def decode_eagerly(
    net: Network, table: Tensor, start: Start, choice: Choice, watch: Watch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, P+T), mask (N, T) and logprobs (N, T), where T is the longest possible completion.

    ``table`` is the rotary embedding's, from ``rotation_table``.
    """
    prompts, real, uniforms, group_size = start
    device, length = prompts.device, prompts.shape[1]
    choice = choice.to(device)
    steps, n = uniforms.shape
    total = length + steps
    cache = new_cache(net, n, total)
    logits = prefill(net, prompts, real, table, group_size, cache)
    tokens = prompts.new_full((n, total), choice.pad_id)
    tokens[:, :length] = prompts.repeat_interleave(group_size, 0)
    mask = torch.zeros(n, steps, dtype=torch.bool, device=device)
    logprobs = torch.zeros(n, steps, device=device)
    # for every row still in the batch: its sequence, whether it is alive, its next rotary position
    rows = torch.arange(n, device=device)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    place = real.sum(-1).repeat_interleave(group_size)
    padding = padding_mask(real, group_size, total, net.cache_dtype)
    state = choice.read_state(tokens[:, :length])
    look = STEPS_PER_LOOK.get(device.type, STEPS_PER_LOOK_ELSEWHERE)

    for step in range(steps):
        mask[rows, step] = alive
        drawn, logprob, alive, state = choice.choose(logits, uniforms[step, rows], alive, state)
        tokens[rows, length + step] = drawn
        logprobs[rows, step] = logprob
        if choice.eos_id is not None and (step + 1) % look == 0 and not alive.all():
            if not alive.any():
                break
            if device.type == "cpu":
                cache, kept = drop_rows(cache, alive, length + step)
                rows, alive, place, drawn = rows[kept], alive[kept], place[kept], drawn[kept]
                padding = None if padding is None else padding[kept]
                state = None if state is None else Place(*(part[kept] for part in state))
        if watch is not None and (step + 1) % STEPS_PER_WATCH == 0:
            ended = torch.ones(n, dtype=torch.bool, device=device)
            ended[rows] = ~alive
            watch(tokens[:, : length + step + 1].cpu(), ended.cpu())
        if step + 1 < steps:
            end = length + step + 1
            seen = None if padding is None else padding[..., :end]
            logits = forward(net, drawn[:, None], table[place, None], seen, cache, end - 1)
            place = place + 1
    return tokens, mask, logprobs
