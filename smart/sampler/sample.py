"""Sampler: draw completions from a Phi-3, many at a time, with the log-probability of each drawn token.

This is a batched decoder with a preallocated key-value cache. Every ``sample`` reads the current parameters of
transformers' ``Phi3ForCausalLM`` in place; no second copy is kept, so that the next call sees an optimiser step. From
the bottom up: ``filter_logits`` and ``draw`` (one token per row), ``forward`` (the network for a few new positions),
``prefill`` (the prompts, once for a whole group), ``decode_eagerly``, or ``_step`` and ``Graph`` on CUDA (one position
after another until all rows have ended), and ``Sampler.sample``.

How it differs from transformers' ``generate``:

- It returns log-probabilities in the distribution that tokens are drawn from: after temperature, top-k and top-p,
  renormalised. A policy-gradient method can use them for its old policy without a second forward pass.
- ``dtype`` is the dtype of the weights in matrix products and, on CUDA, of the cache and of attention. The residual
  stream, the norms, the rotation and the output layer are always float32. So they are in training (autocast, but for
  the output layer: ``smart.logprobs``). On a CPU the cache and attention stay float32, since attention in bfloat16 is
  several times slower there.
- One uniform number decides each token (inverse of the cumulative distribution). All N x T of them are drawn at the
  start, so that no row depends on when another row ends, and the generator always advances by the same amount.
- A grammar can rule out unplayable tokens, before all other filters.
- On a CPU a row that has ended leaves the batch, so that short completions cost less. On CUDA all shapes and addresses
  are fixed: a whole step, with its draw and its check for ended rows, is one CUDA graph, which the host replays without
  waiting for it. If no graph can be captured, the steps run one by one, after a warning.
- ``watch`` is shown the unfinished completions every few steps, so that work on some can begin while others are drawn.

Axes: B prompts, N sequences = B x group_size, P prompt length, T completion length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
from torch import Tensor

from smart.gpu import exact
from smart.sampler.choice import Choice
from smart.sampler.eager import Start, Watch, decode_eagerly
from smart.sampler.graph import Graph
from smart.sampler.network import read_network, rotation_table
from smart.tokens import Grammar

if TYPE_CHECKING:
    from transformers import Phi3ForCausalLM

GRAPH_DEVICES = {"cuda"}  # device types on which a step is captured
GRAPHS_KEPT = 4  # per sampler, the newest ones; each has its own cache
PLACES = 16  # a graph's row length is a multiple of this, so that similar lengths share it and masks are aligned


class Rollout(NamedTuple):
    """Completions of prompts. T is the length of the longest completion, at most ``max_new_tokens``.

    tokens: (N, P+T) int64, the prompts as they were given (padding included), then the completions; pad_id after a
        row's end-of-sequence.
    mask: (N, T) bool, True on the tokens that were drawn, up to and including the first end-of-sequence.
    logprobs: (N, T) float32, of each token in the distribution that it was drawn from; 0 where mask is False.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor

    def to(self, device: torch.device | str) -> Rollout:
        """The rollout on another device."""
        return Rollout(*(part.to(device) for part in self))

    def rows(self, which: slice) -> Rollout:
        """Some of the rows, cut to the longest completion among them; the tensors are views."""
        length, longest = self.tokens.shape[1] - self.mask.shape[1], int(self.mask[which].any(0).sum())
        return Rollout(
            self.tokens[which, : length + longest], self.mask[which, :longest], self.logprobs[which, :longest]
        )


class Sampler:
    """Draws completions from a Phi-3; each call uses the model's current parameters.

    model: transformers' Phi3ForCausalLM on a CPU or a CUDA device. It is only read: its mode, gradients and
        ``requires_grad`` stay as they are, and no dropout is applied in either mode.
    pad_id: the token that pads prompts on the left, and completions after their end.
    eos_id: the token that ends a completion; None: no token does. It may equal pad_id.
    dtype: torch.float32 or torch.bfloat16, for the matrix products; None: the dtype of the parameters. If it differs
        from theirs, every ``sample`` casts them.

    On CUDA it keeps the graphs of the last few kinds of batch (size, length, options), each with its cache, so use one
    sampler again instead of making a new one.

    Where a graph cannot be captured, no sampler of this process tries again.

    Raises ValueError for a model that is not a Phi-3, a rotary embedding other than the plain one, another dtype, or an
    id outside the vocabulary.
    """

    _captures = True  # until a capture fails, in any sampler; where memory is missing, of that sampler only

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
        self._by_graph = True
        self._graphs: dict[Any, Graph] = {}
        self._compute_dtype()

    def step_by_step(self) -> None:
        """Use no CUDA graphs from now on."""
        self._by_graph = False
        self._graphs.clear()

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

        prompts: (B, P) int64, padded on the left with pad_id if their lengths differ. Only leading pad_id is padding;
            later ones are ordinary tokens. The amount of padding does not change the result.
        max_new_tokens: length of the longest completion. The result is cut to the longest that was drawn.
        temperature: above 0; use top_k=1 for the most likely token.
        top_k: number of tokens to draw from; 0, or more than the vocabulary has: all of them.
        top_p: share of the probability to draw from, in (0, 1].
        generator: source of all randomness, on any device; it advances by N x max_new_tokens numbers. None: a new seed
            from the operating system, so that the result is not repeatable; the global generator is never used. A
            sequence of N generators, which advance by max_new_tokens numbers each: the tokens of a row then depend on
            its own generator alone.
        grammar: that of the model's vocabulary (``smart.tokens.build_grammar``). Then only tokens that are playable
            after any given prompt are drawn: ``smart.tokens.unplayable`` marks none of them. All others get the logit
            -inf before the temperature, so that log-probabilities are again those of the distribution drawn from; they
            differ from those of the full softmax. None: any token may be drawn.
        share: (first, whole) if other processes draw the rest of a batch of ``whole`` sequences, of which these N start
            at ``first``. Each sequence is the same as in the whole batch, and the generator advances as for the whole.
        watch: called every few steps with the tokens so far, (N, P+t) int64, pad_id after a row's end, and (N,) bool,
            which rows have ended; both are on the CPU and are overwritten after the call. On CUDA they are a few steps
            old. It is not called at the end, nor for a batch that ends within the first few steps.

        Returns a Rollout of N = B x group_size rows on the model's device. Raises ValueError for an argument of the
        wrong shape, type or range, for a prompt that is padding only, for a grammar of another vocabulary size, and if
        prompt and completion together exceed the model's positions or its sliding window; FloatingPointError if the
        model's logits are not finite.
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
        start = Start(prompts.to(device), real.to(device), uniforms, group_size)
        choice = Choice(temperature, top_k, top_p, self.pad_id, self.eos_id, grammar)

        # an autocast around this call would override the dtypes chosen here
        with torch.autocast(device.type, enabled=False):
            graph = self._graph(start, choice)
            if graph is not None:
                tokens, mask, logprobs = graph.run(start, watch)
            else:
                net = read_network(self.model, self._compute_dtype())
                table = rotation_table(self.model, length + max_new_tokens)
                tokens, mask, logprobs = decode_eagerly(net, table, start, choice, watch)

        if not bool(logprobs.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite: its parameters hold NaN or infinity")
        cut = Rollout(tokens, mask, logprobs).rows(slice(None))
        # copies, since a graph reuses its memory for the next batch
        return Rollout(*(part.clone(memory_format=torch.contiguous_format) for part in cut))

    def _graph(self, start: Start, choice: Choice) -> Graph | None:
        """The captured step for such a batch, captured now if necessary; None if capturing is not possible."""
        if start.prompts.device.type not in GRAPH_DEVICES or not self._captures or not self._by_graph:
            return None
        steps, n = start.uniforms.shape
        places = -(-(start.prompts.shape[1] + steps) // PLACES) * PLACES
        dtype = self._compute_dtype()
        # a graph reads the parameters at the addresses that they had when it was captured
        weights = (parameter.data_ptr() for parameter in self.model.parameters())
        key = (n, places, dtype, choice._replace(grammar=None), id(choice.grammar), *weights)
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS_KEPT:
                del self._graphs[next(iter(self._graphs))]
            try:
                try:
                    self._graphs[key] = Graph(self.model, dtype, places, start, choice)
                except torch.OutOfMemoryError:  # the graphs of other batches hold caches
                    self._graphs.clear()
                    self._graphs[key] = Graph(self.model, dtype, places, start, choice)
            except RuntimeError as error:
                first: BaseException = error  # the end of a failed capture fails, too: the cause came before
                while first.__context__ is not None:
                    first = first.__context__
                where: Any = self if isinstance(first, torch.OutOfMemoryError) else Sampler
                where._captures = False
                self._graphs.clear()
                reason = str(first).strip().partition("\n")[0]
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
    """(steps, N) in [0, 1), drawn on the generator's device: a CPU generator gives the same on any device.

    They are float64, or float32 where one of the devices lacks that.
    """
    if isinstance(generator, Sequence):
        if len(generator) != n:
            raise ValueError(f"generator: expected one, or one for each of {n} sequences, got {len(generator)}")
        return torch.cat([_uniforms(steps, 1, own, device) for own in generator], dim=1)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    drawn = torch.rand(steps, n, dtype=exact(generator.device), generator=generator, device=generator.device)
    if exact(device) != drawn.dtype:
        drawn = drawn.float().clamp(max=1 - 2**-24)  # rounding must not make it 1
    return drawn.to(device)
