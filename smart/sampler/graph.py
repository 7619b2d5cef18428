"""Decode with one CUDA graph per step, which the host replays without waiting for it.

Axes: N sequences, P prompt length, T completion length, V vocabulary, R rotated part of a head, L longest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from smart.sampler.choice import Choice
from smart.sampler.eager import STEPS_PER_LOOK_ELSEWHERE, Start, Watch
from smart.sampler.network import (
    Cache,
    Network,
    forward,
    new_cache,
    padding_mask,
    prefill,
    read_network,
    rotation_table,
    weights_of,
)
from smart.tokens import Place

if TYPE_CHECKING:
    from transformers import Phi3ForCausalLM

_ABANDONED: list[torch.cuda.CUDAGraph] = []


class _Slots(NamedTuple):
    """Everything that a decode step reads and writes, at fixed addresses; no shape depends on the step."""

    net: Network
    cache: Cache
    table: Tensor  # (L, 2, R), the rotation
    seen: Tensor  # (N, 1, 1, L), 0 where attention may look, else -inf: on the prompts' padding and on later places
    uniforms: Tensor  # (L, N) float64, at the place of the token that they decide
    tokens: Tensor  # (N, L) int64
    mask: Tensor  # (N, L) bool
    logprobs: Tensor  # (N, L) float32
    logits: Tensor  # (N, V) float32, of the next token
    alive: Tensor  # (N,) bool
    next: Tensor  # (N+1,) int64, of the next token: each row's rotary position, then its place in all rows
    state: Place | None  # (N,) each: the grammar's state, if there is a grammar


def _new_slots(model: Phi3ForCausalLM, dtype: torch.dtype, n: int, places: int, choice: Choice) -> _Slots:
    net = read_network(model, dtype)
    device = net.embedding.device
    tokens = torch.full((n, places), choice.pad_id, device=device)
    state = choice.read_state(tokens[:, :1])
    return _Slots(
        net=net,
        cache=new_cache(net, n, places),
        table=rotation_table(model, places),
        seen=torch.zeros(n, 1, 1, places, dtype=net.cache_dtype, device=device),
        uniforms=torch.zeros(places, n, dtype=torch.float64, device=device),
        tokens=tokens,
        mask=torch.zeros(n, places, dtype=torch.bool, device=device),
        logprobs=torch.zeros(n, places, device=device),
        logits=torch.zeros(n, net.head.shape[0], device=device),
        alive=torch.zeros(n, dtype=torch.bool, device=device),
        next=torch.zeros(n + 1, dtype=torch.int64, device=device),
        state=None if state is None else Place(*(part.clone() for part in state)),
    )


def _fill(slots: _Slots, model: Phi3ForCausalLM, start: Start, choice: Choice) -> None:
    """Prepare a batch: copy the current weights and inputs, and overwrite everything that the last batch left."""
    prompts, real, uniforms, group_size = start
    length = prompts.shape[1]
    for held, now in zip(weights_of(slots.net), weights_of(read_network(model, slots.net.dtype)), strict=True):
        if held.data_ptr() != now.data_ptr():  # a cast copy of the parameter
            held.copy_(now)
    for full in slots.cache:
        full.zero_()  # a masked position must be finite: 0 times NaN would be NaN
    padding = padding_mask(real, group_size, length, slots.seen.dtype)
    slots.seen.fill_(-math.inf)
    slots.seen[..., :length] = 0.0 if padding is None else padding
    slots.uniforms[length : length + len(uniforms)] = uniforms
    slots.tokens.fill_(choice.pad_id)
    slots.tokens[:, :length] = prompts.repeat_interleave(group_size, 0)
    slots.mask.zero_()
    slots.logprobs.zero_()
    slots.alive.fill_(True)
    slots.next[:-1] = real.sum(-1).repeat_interleave(group_size)
    slots.next[-1] = length
    _write(slots.state, choice.read_state(slots.tokens[:, :length]))
    slots.logits.copy_(prefill(slots.net, prompts, real, slots.table, group_size, slots.cache))


def _write(held: Place | None, now: Place | None) -> None:
    for there, here in zip(held or (), now or (), strict=True):
        there.copy_(here)


def _step(slots: _Slots, choice: Choice) -> None:
    """Draw the next token of every row and run it through the network, in place, without synchronisation."""
    place, column = slots.next[:-1], slots.next[-1:]
    uniform = slots.uniforms.index_select(0, column)[0]
    slots.mask.index_copy_(1, column, slots.alive[:, None])
    drawn, logprob, alive, state = choice.choose(slots.logits, uniform, slots.alive, slots.state)
    _write(slots.state, state)
    slots.tokens.index_copy_(1, column, drawn[:, None])
    slots.logprobs.index_copy_(1, column, logprob[:, None])
    slots.alive.copy_(alive)
    slots.seen.index_fill_(3, column, 0.0)
    turns = slots.table.index_select(0, place)[:, None]
    slots.logits.copy_(forward(slots.net, drawn[:, None], turns, slots.seen, slots.cache, column))
    slots.next.add_(1)


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph; it may only use memory that stays where it is. Runs it once to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    pool = None
    with suppress(RuntimeError):  # a build of torch without CUDA has none
        pool = torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):  # around both, since a failed capture does not restore the stream
        step()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        except BaseException:
            _abandon(graph, pool)
            raise
    torch.cuda.current_stream().wait_stream(stream)
    replay: Callable[[], None] = graph.replay
    return replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Take back from torch's allocator that ``graph`` is being captured; a capture that fails leaves it so.

    Until then memory is kept back from others, and each allocation asks the graph, which must not have been freed.
    """
    _ABANDONED.append(graph)  # the allocator of pinned memory will always ask it
    if pool is None:
        return
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # it had ended already
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


class Graph:
    """A captured decode step with its slots, for batches of one size and one way of choosing tokens.

    Raises RuntimeError if the step cannot be captured.
    """

    def __init__(self, model: Phi3ForCausalLM, dtype: torch.dtype, places: int, start: Start, choice: Choice) -> None:
        self.model = model
        self.grammar = choice.grammar  # held, so that its id is not reused for another grammar
        self.choice = choice = choice.to(start.prompts.device)
        self.slots = _new_slots(model, dtype, start.uniforms.shape[1], places, choice)
        pinned = self.slots.tokens.is_cuda
        self.seen = [torch.empty_like(part, device="cpu", pin_memory=pinned) for part in self._watched()]
        _fill(self.slots, model, start, choice)  # the warm-up needs valid numbers
        self.replay = _capture(lambda: _step(self.slots, choice))

    def _watched(self) -> tuple[Tensor, Tensor]:
        return self.slots.tokens, self.slots.alive

    def run(self, start: Start, watch: Watch | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, P+T), mask (N, T) and logprobs (N, T), where T is the longest possible completion.

        Every few steps the host checks a copy of what had been drawn at its previous check, while the device computes
        the next steps: neither waits for the other.
        """
        slots, length, steps = self.slots, start.prompts.shape[1], len(start.uniforms)
        _fill(slots, self.model, start, self.choice)
        copied: torch.cuda.Event | None = None
        ahead = 0  # tokens per row in the copy that is being made
        for step in range(1, steps + 1):
            self.replay()
            if step % STEPS_PER_LOOK_ELSEWHERE == 0:
                if ahead:
                    if copied is not None:
                        copied.synchronize()
                    tokens, alive = self.seen
                    if watch is not None:
                        watch(tokens[:, :ahead], ~alive)
                    if not alive.any():
                        break
                for host, device in zip(self.seen, self._watched(), strict=True):
                    host.copy_(device, non_blocking=True)
                if slots.tokens.is_cuda:
                    copied = torch.cuda.Event()
                    copied.record()
                ahead = length + step
        end = length + steps
        return slots.tokens[:, :end], slots.mask[:, length:end], slots.logprobs[:, length:end]
