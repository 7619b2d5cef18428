"""Sampler: draw completions from a Phi-3, many at a time, and say how likely each drawn token was.

A batched decoder with a preallocated key-value cache. It reads the parameters of transformers'
``Phi3ForCausalLM`` where they lie, at the start of every ``sample``: there is no second copy that lasts, so
an optimiser step is seen by the next call. From the bottom up: ``filter_logits`` and ``draw`` (one token a
row), ``_forward`` (the network over a few new positions), ``_prefill`` (the prompts, once for a whole
group), ``_eager`` and ``_step`` with ``_Graph`` (one position after another until all rows have ended),
``Sampler.sample``.

How it differs from transformers' ``generate``:

- The log-probability returned is that of the distribution drawn from: after temperature, top-k and top-p,
  renormalised. Policy-gradient code may use it as the old policy without a second forward pass.
- The residual stream, the norms, the rotation and the logits are float32 whatever the dtype, which is the
  dtype of the weights in the matrix products (and, on CUDA, of the cache and of attention). This is what
  autocast does in training, but for the output layer, which is float32 here. On a CPU the cache and
  attention stay float32, since attention in bfloat16 is several times slower there.
- One uniform number decides each token (inverse of the cumulative distribution). All N x T of them are drawn
  at the start, so what one row draws does not depend on when another row ends, and the generator advances
  by the same amount whatever is drawn.
- A grammar may forbid what cannot be played, before all other filters.
- On a CPU a row that has ended leaves the batch, so that short completions cost less. On CUDA nothing changes
  its shape or its place: a whole step, the draw and the end of rows included, is one CUDA graph, which the host
  replays without waiting for it. Where a graph cannot be captured the steps run one by one, after one line about it.
- Who wants to work on completions while others are still being drawn is shown them every few steps (``watch``).

Axes: B prompts, N sequences = B x group_size, P prompt length, T completion length, V vocabulary, Q new
positions, H heads, K key-value heads, D size of a head, R rotated part of D, L places of a row at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from smart.tokens import Grammar, Place

if TYPE_CHECKING:
    from transformers import Phi3ForCausalLM

__all__ = ["Rollout", "Sampler", "draw", "filter_logits"]

# Looking whether all rows have ended makes the host wait for the device; a CPU has nothing to wait for.
STEPS_PER_LOOK = {"cpu": 1}
STEPS_PER_LOOK_ELSEWHERE = 16
STEPS_PER_WATCH = 16

GRAPH_DEVICES = {"cuda"}  # where a step is captured
GRAPHS_KEPT = 4  # of a sampler, the newest ones; each holds a cache of its own
PLACES = 16  # rows of a graph are rounded up to a multiple: other prompt lengths use it too, and masks are aligned

# (N, P+t) tokens so far and (N,) which rows have ended; both on the CPU, and good only until the call returns
Watch = Callable[[Tensor, Tensor], None]


class Rollout(NamedTuple):
    """What was drawn. T is the length of the longest completion, at most ``max_new_tokens``.

    tokens: (N, P+T) int64, the prompts as they were given (padding included), then the completions; pad_id
        after a row's end-of-sequence.
    mask: (N, T) bool, True on the tokens that were drawn, up to and including the first end-of-sequence.
    logprobs: (N, T) float32, of each token in the distribution that it was drawn from; 0 where mask is False.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor

    def rows(self, which: slice) -> Rollout:
        """Some of the rows, cut to the longest completion among them: views."""
        length, longest = self.tokens.shape[1] - self.mask.shape[1], int(self.mask[which].any(0).sum())
        return Rollout(
            self.tokens[which, : length + longest], self.mask[which, :longest], self.logprobs[which, :longest]
        )


# ---------------------------------------------------------------------------------------------- one draw


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (N, V) float32 -> logits (N, V) of the distribution to draw from, -inf where nothing is drawn.

    First the temperature, then exactly ``top_k`` tokens are kept (0: all), then the smallest set of the most
    likely of these whose share of their mass reaches ``top_p``. Between equal logits the lower id is kept.
    """
    if temperature != 1.0:
        # subtracting the maximum first keeps a very low temperature from overflowing
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        # not a sort, which takes three times as long; topk alone does not say which of equal logits it keeps
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
    """Draw one token a row: logits (N, V) float32, uniform (N,) float64 in [0, 1) -> ids (N,), logprobs (N,).

    The token is the first one at which the cumulative distribution exceeds the uniform number. The sum is in
    float64 and a token of probability 0 is never drawn. Nothing waits for the device.
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    past = cumulative > uniform[:, None] * cumulative[:, -1:]
    # A parallel sum need not be monotone to the last bit, so a token must be possible as well as past the
    # number; argmax gives the first of the maxima. Rank 1 only serves if rounding left no token of rank 2.
    token = ((probs > 0) * (past.to(torch.int32) + 1)).argmax(-1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


# ------------------------------------------------------------------------------------------- the network


class _Layer(NamedTuple):
    """The weights of one decoder layer; matrices as nn.Linear keeps them, (out, in)."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class _Network(NamedTuple):
    """All that the forward pass needs, read from the model anew by every ``sample``."""

    embedding: Tensor
    layers: list[_Layer]
    norm: Tensor
    head: Tensor
    activation: Callable[[Tensor], Tensor]
    eps: float
    dtype: torch.dtype
    cache_dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int


_Cache = list[tuple[Tensor, Tensor]]  # keys and values of every layer, each (rows, K, positions, D)


def _read(model: Phi3ForCausalLM, dtype: torch.dtype) -> _Network:
    """The model's parameters as they are now: themselves where the dtype fits, else cast for this call."""
    body = model.model
    config: Any = model.config  # its fields' types differ between versions of transformers
    layers = [
        _Layer(
            attention_norm=layer.input_layernorm.weight.detach().float(),
            qkv=layer.self_attn.qkv_proj.weight.detach().to(dtype),
            out=layer.self_attn.o_proj.weight.detach().to(dtype),
            mlp_norm=layer.post_attention_layernorm.weight.detach().float(),
            gate_up=layer.mlp.gate_up_proj.weight.detach().to(dtype),
            down=layer.mlp.down_proj.weight.detach().to(dtype),
        )
        for layer in body.layers
    ]
    weight = body.embed_tokens.weight.detach()
    return _Network(
        embedding=weight,
        layers=layers,
        norm=body.norm.weight.detach().float(),
        head=model.lm_head.weight.detach().float(),
        activation=body.layers[0].mlp.activation_fn,
        eps=config.rms_norm_eps,
        dtype=dtype,
        cache_dtype=torch.float32 if weight.device.type == "cpu" else dtype,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
    )


def _weights(net: _Network) -> list[Tensor]:
    return [net.embedding, *(weight for layer in net.layers for weight in layer), net.norm, net.head]


def _head_dim(config: Any) -> int:
    """Size of one attention head; older configurations have no ``head_dim``, or None."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _new_cache(net: _Network, rows: int, positions: int) -> _Cache:
    shape = (rows, net.kv_heads, positions, net.head_dim)
    empty = [net.embedding.new_empty(shape, dtype=net.cache_dtype) for _ in range(2 * len(net.layers))]
    return list(zip(empty[::2], empty[1::2], strict=True))


def _rotation_table(model: Phi3ForCausalLM, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, R) of the rotary embedding, the first half of the sines negated.

    ``x * cos + roll(x, R/2) * sin`` is then the rotation of the pairs (x[i], x[i + R/2]).
    """
    rotary = model.model.rotary_emb
    angle = torch.arange(positions, device=rotary.inv_freq.device)[:, None] * rotary.inv_freq.float()
    cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """query (N, Q, H, D), keys and values (N, K, positions, D), mask (N, 1, Q, positions) -> (N, Q, H*D).

    The H/K heads that share a key-value head are laid along the query axis, so the cache is never repeated.
    """
    n, q, heads, _ = query.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    folded = query.unflatten(2, (kv_heads, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask is not None and shared > 1:
        mask = mask.repeat(1, 1, shared, 1)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return attended.unflatten(2, (shared, q)).permute(0, 3, 1, 2, 4).reshape(n, q, -1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (F.rms_norm takes four times as long on a CPU)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (norm.square() / x.shape[-1] + eps).rsqrt() * weight


def _remember(full: Tensor, new: Tensor, start: int | Tensor) -> Tensor:
    """Write ``new`` (N, Q, K, D) into the cache ``full`` (N, K, positions, D); returns what attention is to see."""
    new = new.transpose(1, 2)
    if isinstance(start, Tensor):  # on the device: the whole cache, so that no shape depends on it
        return full.index_copy_(2, start, new.to(full.dtype))
    end = start + new.shape[2]
    full[:, :, start:end] = new
    return full[:, :, :end]


def _forward(
    net: _Network, tokens: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: _Cache, start: int | Tensor
) -> Tensor:
    """Run the new positions start..start+Q-1, tokens (N, Q), and write them to the cache.

    cos, sin: (N, Q, R). mask: None, or what is added to the attention scores, (N, 1, Q, start+Q). A ``start`` on the
    device, (1,) int64, is for Q = 1; attention is then over all positions of the cache, and so is the mask.
    Returns the logits (N, V) float32 of the last position.
    """
    n, q = tokens.shape
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = cos.shape[-1]
    hidden = F.embedding(tokens, net.embedding).float().flatten(0, 1)
    for layer, (keys, values) in zip(net.layers, cache, strict=True):
        x = _rms_norm(hidden, layer.attention_norm, net.eps).to(net.dtype)
        heads = F.linear(x, layer.qkv).float().view(n, q, -1, net.head_dim)
        turn = heads[:, :, : net.heads + net.kv_heads, :rotated]  # queries and keys at once
        turn.copy_(torch.addcmul(turn * cos, turn.roll(rotated // 2, -1), sin))
        query, key, value = heads.split((net.heads, net.kv_heads, net.kv_heads), 2)
        x = _attend(query.to(net.cache_dtype), _remember(keys, key, start), _remember(values, value, start), mask)
        hidden += F.linear(x.flatten(0, 1).to(net.dtype), layer.out)
        x = _rms_norm(hidden, layer.mlp_norm, net.eps).to(net.dtype)
        # weights on the left: for the few rows of a decode step the CPU libraries are up to 30% faster so
        gate, up = (layer.gate_up @ x.t()).chunk(2)
        hidden += (layer.down @ net.activation(gate).mul_(up)).t()
    last = hidden.view(n, q, -1)[:, -1]
    return F.linear(_rms_norm(last, net.norm, net.eps), net.head)


def _prefill(
    net: _Network, prompts: Tensor, real: Tensor, cos: Tensor, sin: Tensor, group_size: int, cache: _Cache
) -> Tensor:
    """Run the prompts (B, P) once and write what they leave into the cache of all N = B x group_size rows.

    real: (B, P) bool, False on padding. Returns logits (N, V).
    """
    batch, length = prompts.shape
    place = (real.cumsum(-1) - 1).clamp_min(0)
    later = torch.ones(length, length, dtype=torch.bool, device=real.device).triu(1)
    # padding sees only itself: where a row may attend to nothing some kernels give NaN, and NaN would spread
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    unseen = (later | ~real[:, None, None]) & ~itself
    mask = torch.zeros(unseen.shape, dtype=net.cache_dtype, device=real.device).masked_fill_(unseen, -math.inf)
    small = _new_cache(net, batch, length)
    logits = _forward(net, prompts, cos[place], sin[place], mask, small, 0)
    for pair, source in zip(cache, small, strict=True):
        for full, part in zip(pair, source, strict=True):
            full.unflatten(0, (batch, group_size))[:, :, :, :length] = part[:, None]
    return logits.repeat_interleave(group_size, 0)


def _leave(cache: _Cache, alive: Tensor, positions: int) -> tuple[_Cache, Tensor]:
    """Take the rows that have ended out of the cache. alive: (rows,) bool; ``positions`` of them are filled.

    Rows from the end move into the gaps, in place. Returns the shorter cache (views) and, for each of its
    rows, which row it was before.
    """
    count = int(alive.sum())
    order = torch.arange(count, device=alive.device)
    gaps = (~alive[:count]).nonzero()[:, 0]
    order[gaps] = count + alive[count:].nonzero()[:, 0]
    for pair in cache:
        for full in pair:
            filled = full[:, :, :positions]
            filled[gaps] = filled[order[gaps]]
    return [(keys[:count], values[:count]) for keys, values in cache], order


# ------------------------------------------------------------------------------------------------ decoding


class _Choice(NamedTuple):
    """How a token is chosen; the arguments of ``Sampler`` and ``sample`` of the same names."""

    temperature: float
    top_k: int
    top_p: float
    pad_id: int
    eos_id: int | None
    grammar: Grammar | None

    def to(self, device: torch.device) -> _Choice:
        return self._replace(grammar=None if self.grammar is None else self.grammar.to(device))

    def stand(self, rows: Tensor) -> Place | None:
        """Where rows of tokens (N, P) end; None without a grammar."""
        return None if self.grammar is None else self.grammar.read(rows)

    def choose(
        self, logits: Tensor, uniform: Tensor, alive: Tensor, stand: Place | None
    ) -> tuple[Tensor, Tensor, Tensor, Place | None]:
        """Token, its log-probability, whether the row goes on, and where it stands then, each (N,).

        A row that had ended gets padding, and the log-probability 0.
        """
        if self.grammar is not None and stand is not None:
            logits = logits.masked_fill(~self.grammar.playable(stand), -math.inf)
        filtered = filter_logits(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        drawn, logprob = draw(filtered, uniform)
        drawn, logprob = drawn.masked_fill(~alive, self.pad_id), logprob.masked_fill(~alive, 0.0)
        if self.grammar is not None and stand is not None:
            stand = self.grammar.step(stand, drawn)
        return drawn, logprob, alive if self.eos_id is None else alive & (drawn != self.eos_id), stand


class _Start(NamedTuple):
    """What a batch starts from, on the model's device."""

    prompts: Tensor  # (B, P) int64
    real: Tensor  # (B, P) bool, False on padding
    uniforms: Tensor  # (T, N) float64
    group_size: int


def _eager(
    net: _Network, table: tuple[Tensor, Tensor], start: _Start, choice: _Choice, watch: Watch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Step after step from the host: tokens (N, P+T), mask (N, T), logprobs (N, T), as yet uncut."""
    prompts, real, uniforms, group_size = start
    device, length = prompts.device, prompts.shape[1]
    choice = choice.to(device)
    steps, n = uniforms.shape
    total = length + steps
    cos, sin = table
    cache = _new_cache(net, n, total)
    logits = _prefill(net, prompts, real, cos, sin, group_size, cache)
    tokens = prompts.new_full((n, total), choice.pad_id)
    tokens[:, :length] = prompts.repeat_interleave(group_size, 0)
    mask = torch.zeros(n, steps, dtype=torch.bool, device=device)
    logprobs = torch.zeros(n, steps, device=device)
    # of every row still in the batch: which sequence it is, whether it goes on, its next position
    rows = torch.arange(n, device=device)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    place = real.sum(-1).repeat_interleave(group_size)
    padding = _padding_mask(real, group_size, total, net.cache_dtype)
    stand = choice.stand(tokens[:, :length])
    look = STEPS_PER_LOOK.get(device.type, STEPS_PER_LOOK_ELSEWHERE)

    for step in range(steps):
        mask[rows, step] = alive
        drawn, logprob, alive, stand = choice.choose(logits, uniforms[step, rows], alive, stand)
        tokens[rows, length + step] = drawn
        logprobs[rows, step] = logprob
        if choice.eos_id is not None and (step + 1) % look == 0 and not alive.all():
            if not alive.any():
                break
            if device.type == "cpu":
                cache, kept = _leave(cache, alive, length + step)
                rows, alive, place, drawn = rows[kept], alive[kept], place[kept], drawn[kept]
                padding = None if padding is None else padding[kept]
                stand = None if stand is None else Place(*(part[kept] for part in stand))
        if watch is not None and (step + 1) % STEPS_PER_WATCH == 0:
            ended = torch.ones(n, dtype=torch.bool, device=device)
            ended[rows] = ~alive
            watch(tokens[:, : length + step + 1].cpu(), ended.cpu())
        if step + 1 < steps:
            end = length + step + 1
            seen = None if padding is None else padding[..., :end]
            logits = _forward(net, drawn[:, None], cos[place, None], sin[place, None], seen, cache, end - 1)
            place = place + 1
    return tokens, mask, logprobs


class _Slots(NamedTuple):
    """All that one decode step reads and writes, at addresses that stay; no shape depends on the step."""

    net: _Network
    cache: _Cache
    cos: Tensor  # (L, R)
    sin: Tensor
    places: Tensor  # (L,) int64: 0, 1, 2, ...
    padding: Tensor  # (N, 1, 1, L), -inf on the prompts' padding, else 0
    uniforms: Tensor  # (L, N) float64, at the place that they decide
    tokens: Tensor  # (N, L) int64
    mask: Tensor  # (N, L) bool
    logprobs: Tensor  # (N, L) float32
    logits: Tensor  # (N, V) float32, of the next token
    alive: Tensor  # (N,) bool
    place: Tensor  # (N,) int64, rotary position of the next token
    column: Tensor  # (1,) int64, place of the next token in its row
    stand: Place | None  # (N,) each, where the rows stand in the grammar, if there is one


def _new_slots(model: Phi3ForCausalLM, dtype: torch.dtype, n: int, places: int, choice: _Choice) -> _Slots:
    net = _read(model, dtype)
    device = net.embedding.device
    cos, sin = _rotation_table(model, places)
    tokens = torch.full((n, places), choice.pad_id, device=device)
    stand = choice.stand(tokens[:, :1])
    return _Slots(
        net=net,
        cache=_new_cache(net, n, places),
        cos=cos,
        sin=sin,
        places=torch.arange(places, device=device),
        padding=torch.zeros(n, 1, 1, places, dtype=net.cache_dtype, device=device),
        uniforms=torch.zeros(places, n, dtype=torch.float64, device=device),
        tokens=tokens,
        mask=torch.zeros(n, places, dtype=torch.bool, device=device),
        logprobs=torch.zeros(n, places, device=device),
        logits=torch.zeros(n, net.head.shape[0], device=device),
        alive=torch.zeros(n, dtype=torch.bool, device=device),
        place=torch.zeros(n, dtype=torch.int64, device=device),
        column=torch.zeros(1, dtype=torch.int64, device=device),
        stand=None if stand is None else Place(*(part.clone() for part in stand)),
    )


def _fill(slots: _Slots, model: Phi3ForCausalLM, start: _Start, choice: _Choice) -> None:
    """Make ready for a batch: the weights as they are now, and all that a batch before left behind overwritten."""
    prompts, real, uniforms, group_size = start
    length = prompts.shape[1]
    for held, now in zip(_weights(slots.net), _weights(_read(model, slots.net.dtype)), strict=True):
        if held.data_ptr() != now.data_ptr():  # a cast of the parameter, not the parameter itself
            held.copy_(now)
    for pair in slots.cache:
        for full in pair:
            full.zero_()  # a masked position must be finite: 0 times NaN would be NaN
    padding = _padding_mask(real, group_size, len(slots.places), slots.padding.dtype)
    slots.padding.zero_() if padding is None else slots.padding.copy_(padding)
    slots.uniforms[length : length + len(uniforms)] = uniforms
    slots.tokens.fill_(choice.pad_id)
    slots.tokens[:, :length] = prompts.repeat_interleave(group_size, 0)
    slots.mask.zero_()
    slots.logprobs.zero_()
    slots.alive.fill_(True)
    slots.place.copy_(real.sum(-1).repeat_interleave(group_size))
    slots.column.fill_(length)
    _write(slots.stand, choice.stand(slots.tokens[:, :length]))
    slots.logits.copy_(_prefill(slots.net, prompts, real, slots.cos, slots.sin, group_size, slots.cache))


def _write(held: Place | None, now: Place | None) -> None:
    for there, here in zip(held or (), now or (), strict=True):
        there.copy_(here)


def _step(slots: _Slots, choice: _Choice) -> None:
    """Draw the next token of every row, then run it through the network; all in place, nothing waits for the device."""
    uniform = slots.uniforms.index_select(0, slots.column)[0]
    slots.mask.index_copy_(1, slots.column, slots.alive[:, None])
    drawn, logprob, alive, stand = choice.choose(slots.logits, uniform, slots.alive, slots.stand)
    _write(slots.stand, stand)
    slots.tokens.index_copy_(1, slots.column, drawn[:, None])
    slots.logprobs.index_copy_(1, slots.column, logprob[:, None])
    slots.alive.copy_(alive)
    cos, sin = (part.index_select(0, slots.place)[:, None] for part in (slots.cos, slots.sin))
    seen = slots.padding.masked_fill(slots.places > slots.column, -math.inf)
    slots.logits.copy_(_forward(slots.net, drawn[:, None], cos, sin, seen, slots.cache, slots.column))
    slots.place.add_(1)
    slots.column.add_(1)


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """``step``, which must only use memory that stays where it is, as a CUDA graph; runs it once to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # around both, since a capture that fails does not go back to where it came from
        step()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    replay: Callable[[], None] = graph.replay
    return replay


class _Graph:
    """A captured decode step with its slots, for batches of one size and one way of choosing tokens.

    Raises RuntimeError where the step cannot be captured.
    """

    def __init__(self, model: Phi3ForCausalLM, dtype: torch.dtype, places: int, start: _Start, choice: _Choice) -> None:
        self.model = model
        self.grammar = choice.grammar  # held, so that no other grammar can take its id
        self.choice = choice = choice.to(start.prompts.device)
        self.slots = _new_slots(model, dtype, start.uniforms.shape[1], places, choice)
        pinned = self.slots.tokens.is_cuda
        self.seen = [torch.empty_like(part, device="cpu", pin_memory=pinned) for part in self._watched()]
        _fill(self.slots, model, start, choice)  # the warm-up needs sound numbers
        self.replay = _capture(lambda: _step(self.slots, choice))

    def _watched(self) -> tuple[Tensor, Tensor]:
        return self.slots.tokens, self.slots.alive

    def run(self, start: _Start, watch: Watch | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, P+T), mask (N, T), logprobs (N, T), as yet uncut.

        The host looks at a copy of what had been drawn one look earlier, while the device goes on with the next
        steps: neither waits for the other.
        """
        slots, length, steps = self.slots, start.prompts.shape[1], len(start.uniforms)
        _fill(slots, self.model, start, self.choice)
        copied: torch.cuda.Event | None = None
        ahead = 0  # tokens of a row in the copy that is on its way
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


# -------------------------------------------------------------------------------------------- the sampler


class Sampler:
    """Draws completions from a Phi-3 with the parameters that it has at the time of each call.

    model: transformers' Phi3ForCausalLM on a CPU or a CUDA device. It is only read: its mode, gradients
        and ``requires_grad`` stay as they are, and no dropout is applied in either mode.
    pad_id: the token that prompts are padded with on the left, and completions after their end.
    eos_id: the token that ends a completion; None: nothing does. It may equal pad_id.
    dtype: torch.float32 or torch.bfloat16, of the matrix products; None: the parameters' own. When it is
        another than the parameters', they are cast anew by every ``sample``.

    On CUDA it keeps the graphs of the last few kinds of batch (size, length, options), each with its cache: use one
    sampler again rather than a new one.

    Raises ValueError for a model that is not a Phi-3, a kind of rotary embedding other than the plain one,
    another dtype, or an id outside the vocabulary.
    """

    def __init__(
        self, model: Phi3ForCausalLM, *, pad_id: int, eos_id: int | None, dtype: torch.dtype | None = None
    ) -> None:
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "phi3" or not hasattr(model, "lm_head"):
            raise ValueError(f"model: expected a Phi3ForCausalLM, got {type(model).__name__}")
        rope = model.model.rotary_emb.rope_type
        if rope != "default":
            raise ValueError(f"model: expected plain rotary embeddings ('default'), got {rope!r}")
        self.model = model
        self.dtype = dtype
        self.vocabulary = int(model.lm_head.weight.shape[0])
        for name, token in (("pad_id", pad_id), ("eos_id", eos_id)):
            if token is not None and not 0 <= token < self.vocabulary:
                raise ValueError(f"{name}: expected an id from 0 to {self.vocabulary - 1}, got {token}")
        self.pad_id = pad_id
        self.eos_id = eos_id
        self._graphs: dict[Any, _Graph] = {}
        self._captures = True  # until a capture fails
        self._compute_dtype()

    @torch.no_grad()
    def sample(
        self,
        prompts: Tensor,
        *,
        max_new_tokens: int,
        group_size: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        grammar: Grammar | None = None,
        watch: Watch | None = None,
        share: tuple[int, int] | None = None,
    ) -> Rollout:
        """Draw ``group_size`` completions of each prompt; the rows of one prompt are adjacent.

        prompts: (B, P) int64, padded on the left with pad_id where lengths differ. Only leading pad_id is
            padding; later ones are tokens like any other. The result does not depend on how much there is.
        max_new_tokens: longest completion. The result is cut to the longest that was drawn.
        temperature: above 0; the most likely token itself is top_k=1.
        top_k: how many tokens to draw from, 0 for all of them; more than the vocabulary is all of them.
        top_p: share of the probability to draw from, in (0, 1].
        generator: source of all randomness, on any device; it is advanced by N x max_new_tokens numbers.
            None takes a fresh seed from the operating system: never the global generator, never repeatable.
            Or one for each sequence, advanced by max_new_tokens numbers each: then what decides a sequence's tokens
            is its own generator alone.
        grammar: of the model's vocabulary (``smart.tokens.build_grammar``). With it only tokens are drawn that can
            be played after their prompt, whatever the prompt is: ``smart.tokens.unplayable`` marks none of them.
            All others get the logit -inf before the temperature, so that log-probabilities are, here too, those
            of the distribution drawn from; a learner that takes the full softmax sees others. None: any token.
        share: (first, whole) where these N sequences are those from ``first`` on of a batch of ``whole``, the rest of
            which other processes draw: each sequence is what it would be in the whole batch, and the generator is
            advanced as for all of it.
        watch: called every few steps with the rows so far, (N, P+t) int64, pad_id after a row's end, and (N,) bool,
            which have ended; both lie on the CPU and are overwritten after the call. On CUDA it sees the state of a
            few steps ago. It is not called at the end, nor for a batch that ends before the first look.

        Returns a Rollout of N = B x group_size rows on the model's device. Raises ValueError for an argument
        of the wrong shape, type or range, for a prompt that is padding only, for a grammar of another number of
        tokens, and when prompt and completion together exceed the model's positions or its sliding window;
        FloatingPointError when the model's logits are not finite.
        """
        device = self.model.lm_head.weight.device
        self._check_options(max_new_tokens, group_size, temperature, top_k, top_p)
        real = self._check_prompts(prompts, max_new_tokens)
        if grammar is not None and len(grammar.position) != self.vocabulary:
            raise ValueError(f"grammar: expected one of {self.vocabulary} tokens, got {len(grammar.position)}")
        length = prompts.shape[1]
        n = len(prompts) * group_size
        first, whole = share or (0, n)
        if not 0 <= first <= first + n <= whole:
            raise ValueError(f"share: expected {n} rows within the whole batch, got rows from {first} of {whole}")
        uniforms = _uniforms(max_new_tokens, whole, generator, device)[:, first : first + n]
        start = _Start(prompts.to(device), real.to(device), uniforms, group_size)
        choice = _Choice(temperature, top_k, top_p, self.pad_id, self.eos_id, grammar)

        # an ambient autocast would undo the dtypes chosen here
        with torch.autocast(device.type, enabled=False):
            graph = self._graph(start, choice)
            if graph is not None:
                tokens, mask, logprobs = graph.run(start, watch)
            else:
                net = _read(self.model, self._compute_dtype())
                table = _rotation_table(self.model, length + max_new_tokens)
                tokens, mask, logprobs = _eager(net, table, start, choice, watch)

        if not bool(logprobs.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite: its parameters hold NaN or infinity")
        cut = Rollout(tokens, mask, logprobs).rows(slice(None))
        # not the memory of the next batch
        return Rollout(*(part.clone(memory_format=torch.contiguous_format) for part in cut))

    def _graph(self, start: _Start, choice: _Choice) -> _Graph | None:
        """The captured step for such a batch, captured now if need be; None where that is not to be had."""
        if start.prompts.device.type not in GRAPH_DEVICES or not self._captures:
            return None
        steps, n = start.uniforms.shape
        places = -(-(start.prompts.shape[1] + steps) // PLACES) * PLACES
        dtype = self._compute_dtype()
        # a graph reads the parameters where they lay when it was captured
        weights = (parameter.data_ptr() for parameter in self.model.parameters())
        key = (n, places, dtype, choice._replace(grammar=None), id(choice.grammar), *weights)
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS_KEPT:
                del self._graphs[next(iter(self._graphs))]
            try:
                try:
                    self._graphs[key] = _Graph(self.model, dtype, places, start, choice)
                except torch.OutOfMemoryError:  # the graphs of other batches hold caches of their own
                    self._graphs.clear()
                    self._graphs[key] = _Graph(self.model, dtype, places, start, choice)
            except RuntimeError as error:
                self._captures = False
                self._graphs.clear()
                reason = str(error).strip().partition("\n")[0]
                click.echo(f"Warning: sampling step by step, since no CUDA graph could be captured: {reason}", err=True)
                return None
        return self._graphs[key]

    def _compute_dtype(self) -> torch.dtype:
        dtype = self.dtype or self.model.lm_head.weight.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        return dtype

    def _check_options(
        self, max_new_tokens: int, group_size: int, temperature: float, top_k: int, top_p: float
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if group_size < 1:
            raise ValueError(f"group_size: expected at least 1, got {group_size}")
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature: expected a finite number above 0, got {temperature}"
                + (" (for the most likely token use top_k=1)" if temperature == 0 else "")
            )
        if top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or more, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")

    def _check_prompts(self, prompts: Tensor, max_new_tokens: int) -> Tensor:
        """Check prompts (B, P) and return which of their tokens are real, (B, P) bool."""
        if prompts.ndim != 2 or prompts.numel() == 0 or prompts.dtype != torch.int64:
            raise ValueError(f"prompts: expected (B, P) of torch.int64, got {tuple(prompts.shape)} of {prompts.dtype}")
        if prompts.min() < 0 or prompts.max() >= self.vocabulary:
            raise ValueError(
                f"prompts: expected ids from 0 to {self.vocabulary - 1}, "
                f"got {int(prompts.min())} to {int(prompts.max())}"
            )
        real = (prompts != self.pad_id).cumsum(-1) > 0
        if not real[:, -1].all():
            row = int((~real[:, -1]).nonzero()[0, 0])
            raise ValueError(f"prompts: expected a token in every row, row {row} is padding only")
        longest = int(real.sum(-1).max()) + max_new_tokens
        config: Any = self.model.config
        limits = {
            "max_position_embeddings": config.max_position_embeddings,
            "sliding_window": config.sliding_window,
        }
        for name, limit in limits.items():
            if limit is not None and longest > limit:
                raise ValueError(
                    f"prompts, max_new_tokens: expected at most {limit} tokens together "
                    f"(the model's {name}), got {longest}"
                )
        return real


def _uniforms(
    steps: int, n: int, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> Tensor:
    """(steps, N) float64 in [0, 1), drawn on the generator's device: a CPU one gives any device the same."""
    if isinstance(generator, Sequence):
        if len(generator) != n:
            raise ValueError(f"generator: expected one, or one for each of {n} sequences, got {len(generator)}")
        return torch.cat([_uniforms(steps, 1, own, device) for own in generator], dim=1)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return torch.rand(steps, n, dtype=torch.float64, generator=generator, device=generator.device).to(device)


def _padding_mask(real: Tensor, group_size: int, positions: int, dtype: torch.dtype) -> Tensor | None:
    """(N, 1, 1, positions), -inf on the prompts' padding and 0 elsewhere; None when there is no padding."""
    if bool(real.all()):
        return None
    mask = torch.zeros(real.shape[0], 1, 1, positions, dtype=dtype, device=real.device)
    mask[:, 0, 0, : real.shape[1]].masked_fill_(~real, -math.inf)
    return mask.repeat_interleave(group_size, 0)
