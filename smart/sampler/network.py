"""The network for a few new positions, with a preallocated key-value cache.

It uses the parameters of transformers' ``Phi3ForCausalLM`` in place; no second copy is kept.

Axes: B prompts, N sequences, P prompt length, V vocabulary, Q new positions, H heads, K key-value heads, D size of a
head, R rotated part of D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import Phi3ForCausalLM


class _Layer(NamedTuple):
    """The weights of one decoder layer; matrices are (out, in), as in nn.Linear."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Network(NamedTuple):
    """Everything that the forward pass needs; every ``sample`` reads it again from the model."""

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


Cache = list[Tensor]  # of every layer (rows, 2K, positions, D): the keys, then the values


def read_network(model: Phi3ForCausalLM, dtype: torch.dtype) -> Network:
    """The model's current parameters, without a copy if they have the right dtype, else cast."""
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
    return Network(
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


def weights_of(net: Network) -> list[Tensor]:
    """All weights, always in the same order."""
    return [net.embedding, *(weight for layer in net.layers for weight in layer), net.norm, net.head]


def _head_dim(config: Any) -> int:
    """Size of one attention head; older configurations have no ``head_dim``, or None."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def new_cache(net: Network, rows: int, positions: int) -> Cache:
    """An empty cache; its memory is not initialised."""
    shape = (rows, 2 * net.kv_heads, positions, net.head_dim)
    return [net.embedding.new_empty(shape, dtype=net.cache_dtype) for _ in net.layers]


def rotation_table(model: Phi3ForCausalLM, positions: int) -> Tensor:
    """Cosines and sines (positions, 2, R) of the rotary embedding, the first half of the sines negated.

    ``x * cos + roll(x, R/2) * sin`` is then the rotation of the pairs (x[i], x[i + R/2]).
    """
    rotary = model.model.rotary_emb
    angle = torch.arange(positions, device=rotary.inv_freq.device)[:, None] * rotary.inv_freq.float()
    cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """query (N, Q, H, D), keys and values (N, K, positions, D), mask (N, 1, Q*H/K, positions) -> (N, Q, H*D).

    The H/K heads that share a key-value head are folded into the query axis, so that the cache is never repeated.
    """
    n, q, heads, _ = query.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    folded = query.unflatten(2, (kv_heads, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return attended.unflatten(2, (shared, q)).permute(0, 3, 1, 2, 4).reshape(n, q, -1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis."""
    if x.is_cuda:  # one kernel
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # F.rms_norm takes four times as long on a CPU
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (norm.square() / x.shape[-1] + eps).rsqrt() * weight


def _remember(full: Tensor, new: Tensor, start: int | Tensor) -> Tensor:
    """Write ``new`` (N, Q, 2K, D) into the cache ``full`` (N, 2K, positions, D); returns the part to attend to."""
    new = new.transpose(1, 2)
    if isinstance(start, Tensor):  # on the device; returns the whole cache, so that no shape depends on it
        return full.index_copy_(2, start, new)
    end = start + new.shape[2]
    full[:, :, start:end] = new
    return full[:, :, :end]


def forward(
    net: Network, tokens: Tensor, turns: Tensor, mask: Tensor | None, cache: Cache, start: int | Tensor
) -> Tensor:
    """Run the new positions start..start+Q-1, tokens (N, Q), and write them to the cache.

    turns: (N, Q, 2, R), the places' rows of the rotation table. mask: None, or (N, 1, Q, start+Q), which is added to
    the attention scores. ``start`` may be a tensor (1,) int64 on the device if Q = 1; attention and mask then cover all
    positions of the cache.
    Returns the logits (N, V) float32 of the last position.
    """
    n, q = tokens.shape
    cos, sin = turns[:, :, :1], turns[:, :, 1:]
    rotated = cos.shape[-1]
    if mask is not None and net.heads > net.kv_heads:
        mask = mask.repeat(1, 1, net.heads // net.kv_heads, 1)
    hidden = F.embedding(tokens, net.embedding).float().flatten(0, 1)
    for layer, full in zip(net.layers, cache, strict=True):
        x = _rms_norm(hidden, layer.attention_norm, net.eps).to(net.dtype)
        heads = F.linear(x, layer.qkv).to(net.cache_dtype).view(n, q, -1, net.head_dim)
        turn = heads[:, :, : net.heads + net.kv_heads, :rotated]  # queries and keys at once
        torch.addcmul(turn * cos, turn.roll(rotated // 2, -1), sin, out=turn)  # computed in float32
        keys, values = _remember(full, heads[:, :, net.heads :], start).chunk(2, 1)
        x = _attend(heads[:, :, : net.heads], keys, values, mask)
        hidden += F.linear(x.flatten(0, 1).to(net.dtype), layer.out)
        x = _rms_norm(hidden, layer.mlp_norm, net.eps).to(net.dtype)
        # weights on the left: with the few rows of a decode step, CPU libraries are up to 30% faster this way
        gate, up = (layer.gate_up @ x.t()).chunk(2)
        hidden += (layer.down @ net.activation(gate).mul_(up)).t()
    last = hidden.view(n, q, -1)[:, -1]
    return F.linear(_rms_norm(last, net.norm, net.eps), net.head)


def prefill(net: Network, prompts: Tensor, real: Tensor, table: Tensor, group_size: int, cache: Cache) -> Tensor:
    """Run the prompts (B, P) once and write their keys and values into the cache of all N = B x group_size rows.

    real: (B, P) bool, False on padding. Returns logits (N, V).
    """
    batch, length = prompts.shape
    place = (real.cumsum(-1) - 1).clamp_min(0)
    later = torch.ones(length, length, dtype=torch.bool, device=real.device).triu(1)
    # padding attends to itself only: with nothing to attend to some kernels give NaN, which would spread
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    unseen = (later | ~real[:, None, None]) & ~itself
    mask = torch.zeros(unseen.shape, dtype=net.cache_dtype, device=real.device).masked_fill_(unseen, -math.inf)
    small = new_cache(net, batch, length)
    logits = forward(net, prompts, table[place], mask, small, 0)
    for full, part in zip(cache, small, strict=True):
        full.unflatten(0, (batch, group_size))[:, :, :, :length] = part[:, None]
    return logits.repeat_interleave(group_size, 0)


def drop_rows(cache: Cache, alive: Tensor, positions: int) -> tuple[Cache, Tensor]:
    """Remove the rows that have ended from the cache. alive: (rows,) bool; the first ``positions`` are filled.

    Rows from the end move into the gaps, in place. Returns the shorter cache (views) and, for each of its rows, the
    index that it had before.
    """
    count = int(alive.sum())
    order = torch.arange(count, device=alive.device)
    gaps = (~alive[:count]).nonzero()[:, 0]
    order[gaps] = count + alive[count:].nonzero()[:, 0]
    for full in cache:
        filled = full[:, :, :positions]
        filled[gaps] = filled[order[gaps]]
    return [full[:count] for full in cache], order


def padding_mask(real: Tensor, group_size: int, positions: int, dtype: torch.dtype) -> Tensor | None:
    """(N, 1, 1, positions), -inf on the prompts' padding and 0 elsewhere; None when there is no padding."""
    if bool(real.all()):
        return None
    mask = torch.zeros(real.shape[0], 1, 1, positions, dtype=dtype, device=real.device)
    mask[:, 0, 0, : real.shape[1]].masked_fill_(~real, -math.inf)
    return mask.repeat_interleave(group_size, 0)
