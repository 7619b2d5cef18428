"""Completions of several models for the same prompts and seeds, rendered and rated: the basis of every comparison.

Each prompt has its own seed, derived from (seed, index); a generator with that seed draws both the prompt and its
completion. So every system gets the same prompt and the same random numbers, and a piece does not depend on the slice
of prompts that it belongs to.

Axes: N pieces of a block, P prompt length, T completion length, S audio samples.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from smart import UserError
from smart.cores import share
from smart.corpus import Corpus
from smart.model import context_length, load_base, pick_device, pick_precision
from smart.prompts import LONGEST, Pieces, draw
from smart.render import Audio, Renderer, open_renderer
from smart.reward import Reward
from smart.rollout.batch import write
from smart.rollout.scorer import Scorer, rendered_audio
from smart.rollout.systems import System
from smart.sampler import Sampler
from smart.tokens import decode, load_tokenizer, vocabulary

BLOCK = 64  # pieces that are sampled together


class Piece(NamedTuple):
    """One completion of one system."""

    system: str
    prompt: int  # index
    seed: int  # of this prompt, the same for every system
    tokens: list[int]  # prompt and completion, up to and including the end-of-sequence
    prompt_length: int
    score: Any  # symusic.Score
    audio: Audio | None  # (2, S); None if it could not be rendered
    scores: dict[str, float]  # "reward.axis" -> rating; NaN if the clip failed or could not be rated
    logprobs: float  # sum of the completion's log-probabilities in the distribution that it was drawn from
    length: int  # tokens of the completion
    sample: int = 0  # index among the completions of its prompt


def seed_of(seed: int, prompt: int, *sample: int) -> int:
    """The seed of a prompt, or of a further sample of it: 32 bits, the most that a CPU generator takes."""
    return int(np.random.SeedSequence([seed, prompt, *sample]).generate_state(1)[0])


class _Prompts:
    """The prompt of every piece, as names of tokens, since each system has its own vocabulary."""

    def __init__(self, kind: str, tokenizer: Any, pieces: Pieces | None, *, seed: int, samples: int) -> None:
        self.kind, self.tokenizer, self.pieces = kind, tokenizer, pieces
        self.seed, self.samples = seed, samples
        self.names = {number: name for name, number in tokenizer.vocab.items()}

    def start(self, index: int) -> tuple[list[str], torch.Generator]:
        """Prompt of the piece at ``index``, and the generator for its completion: at sample 0 that of the prompt."""
        prompt, sample = divmod(index, self.samples)
        generator = torch.Generator().manual_seed(seed_of(self.seed, prompt))
        row = draw(self.kind, 1, self.tokenizer, generator, pieces=self.pieces)
        if sample:
            generator = torch.Generator().manual_seed(seed_of(self.seed, prompt, sample))
        return [self.names[token] for token in row[0].tolist()], generator

    def check(self, system: System, tokenizer: Any, indices: range) -> None:
        """Raise ``UserError`` if a prompt of ``indices`` has a token that the vocabulary of ``system`` lacks."""
        if tokenizer.vocab == self.tokenizer.vocab:
            return
        for index in indices:
            for name in self.start(index)[0]:
                if name not in tokenizer.vocab:
                    raise UserError(
                        f"{system.name}: its vocabulary has no {name}, which prompt {index // self.samples} contains"
                    )


class _Loaded(NamedTuple):
    """A system with its model and tokenizer."""

    system: System
    model: Any
    tokenizer: Any


class _Writer(NamedTuple):
    """A system that is ready to write pieces."""

    system: System
    tokenizer: Any
    vocab: dict[str, int]
    sampler: Sampler
    scorers: list[Scorer]  # one per reward; one without a reward if there is none. The first has the pieces rendered


def compose(
    systems: Sequence[System],
    *,
    prompts: str = "procedural",
    corpus: str | Path | None = None,
    split: str = "test",
    count: int,
    first: int = 0,
    samples: int = 1,
    seed: int = 1,
    soundfont: str | os.PathLike[str],
    rewards: Sequence[Reward] = (),
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seconds: float = 10.0,
    sample_rate: int = 44100,
    workers: int = 0,
    backend: str = "pool",
    device: str = "auto",
    batch: int = BLOCK,
) -> Iterator[Piece]:
    """Pieces of every system for prompts ``first`` .. ``first + count - 1``, rendered, and rated by every reward.

    Each prompt gets ``samples`` completions; the first is the one that ``samples`` = 1 gives. Pieces come in blocks of
    ``batch``; within a block they are ordered by system, then by prompt, then by sample. Rendering overlaps with
    sampling as in training (``smart.rollout``); a block is rated while workers render the next.

    A block is always sampled as a whole, even if only a part of it was asked for, since rounding depends on how many
    rows are multiplied at once. So the tokens and audio of a prompt are the same, bit for bit, in any slice for the
    same ``batch``. For few pieces use a small ``batch``. ``workers``: render processes (0: one per usable core).

    ``prompts`` is a kind of ``smart.prompts``; "dataset" takes them from the ``split`` of a ``corpus`` folder. They are
    drawn in the vocabulary of the corpus, or without a corpus in that of the first system, and translated into the
    vocabulary of each system.

    Raises ``UserError`` for what is missing or does not fit when it is called, not when the first piece is asked for.
    """
    if first < 0 or count < 0 or samples < 1 or batch < 1:
        given = f"{first}, {count}, {samples} and {batch}"
        raise ValueError(f"expected first >= 0, count >= 0, samples >= 1 and batch >= 1, got {given}")
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise UserError(f"rewards: expected each once, got {', '.join(names)}")
    pieces, tokenizer = _open_corpus(corpus, split) if prompts == "dataset" else (None, None)
    where = pick_device(device)
    loaded = [_Loaded(system, *load_base(system.model, device=where)) for system in systems]
    for system, model, _ in loaded:
        if max_new_tokens > (room := context_length(model) - LONGEST):
            raise UserError(f"{system.name}: {max_new_tokens} new tokens were asked for, but it has room for {room}")
    wanted = _Prompts(prompts, tokenizer or load_tokenizer(systems[0].model), pieces, seed=seed, samples=samples)
    indices = range(first * samples, (first + count) * samples)
    for system, _, own in loaded:
        wanted.check(system, own, indices)
    return _compose(
        loaded,
        rewards,
        wanted,
        indices,
        batch=batch,
        soundfont=soundfont,
        backend=backend,
        workers=workers or share(),
        device=where,
        rendering={"sample_rate": sample_rate, "seconds": seconds},
        sampling={"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p},
    )


def _open_corpus(corpus: str | Path | None, split: str) -> tuple[Pieces, Any]:
    """The pieces of a corpus, and its tokenizer."""
    if corpus is None:
        raise UserError("prompts of kind 'dataset' need a corpus: a folder written by `smart corpus build`")
    opened = Corpus(corpus)
    pieces = opened.split(split)
    if not len(pieces):
        raise UserError(f"corpus {corpus}: its split {split!r} has no pieces")
    return pieces, opened.tokenizer


def _compose(
    loaded: Sequence[_Loaded],
    rewards: Sequence[Reward],
    prompts: _Prompts,
    indices: range,
    *,
    batch: int,
    soundfont: str | os.PathLike[str],
    backend: str,
    workers: int,
    device: torch.device,
    rendering: dict[str, Any],
    sampling: dict[str, Any],
) -> Iterator[Piece]:
    """The pieces at ``indices``; ``rendering`` goes to the renderer and the scorers, ``sampling`` to the samplers."""
    with open_renderer(backend, soundfont, workers=workers, device=device, **rendering) as pool:
        writers = [_make_writer(system, pool, rewards, rendering) for system in loaded]
        waiting: list[_Drawn] = []
        for number in range(indices.start // batch, -(-indices.stop // batch)):
            block = range(number * batch, (number + 1) * batch)
            for writer in writers:
                drawn = _draw(writer, block, [prompts.start(index) for index in block], indices, **sampling)
                while waiting:  # no variable for it, which would hold that block's audio while the next is sampled
                    yield from _pieces(waiting.pop(), prompts)
                waiting.append(drawn)
        while waiting:
            yield from _pieces(waiting.pop(), prompts)


def _make_writer(loaded: _Loaded, pool: Renderer, rewards: Sequence[Reward], rendering: dict[str, Any]) -> _Writer:
    system, model, tokenizer = loaded
    facts = vocabulary(tokenizer)
    dtype = pick_precision("auto", model.device)
    sampler = Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id, dtype=dtype)
    scorers = [Scorer(tokenizer, pool, reward, **rendering) for reward in rewards or (None,)]
    return _Writer(system, tokenizer, tokenizer.vocab, sampler, scorers)


class _Drawn(NamedTuple):
    """The pieces of one system for a block, which are being rendered."""

    writer: _Writer
    indices: list[int]
    tokens: list[list[int]]
    prompt_length: int
    logprobs: list[float]
    clips: list[Future[Audio]]


def _draw(
    writer: _Writer,
    block: range,
    starts: Sequence[tuple[list[str], torch.Generator]],
    indices: range,
    **options: Any,
) -> _Drawn:
    """Sample a whole block and have the pieces at ``indices`` rendered, each as soon as it has settled."""
    rows = [row for row, index in enumerate(block) if index in indices]
    rollout, clips = write(
        writer.sampler,
        writer.scorers[0],
        torch.tensor([[writer.vocab[name] for name in prompt] for prompt, _ in starts]),
        rows=rows,
        generator=[generator for _, generator in starts],
        **options,
    )
    rollout = rollout.to("cpu")
    prompt_length = len(starts[0][0])
    lengths = rollout.mask.sum(dim=1).tolist()
    return _Drawn(
        writer=writer,
        indices=[block[row] for row in rows],
        tokens=[row[: prompt_length + length] for row, length in zip(rollout.tokens.tolist(), lengths, strict=True)],
        prompt_length=prompt_length,
        logprobs=rollout.logprobs.double().sum(dim=1).tolist(),
        clips=clips.in_order(),
    )


def _pieces(drawn: _Drawn, prompts: _Prompts) -> Iterator[Piece]:
    """Wait for the clips, rate them with every reward, and yield the pieces."""
    scores: dict[str, list[float]] = {}
    pieces = [decode(drawn.writer.tokenizer, tokens) for tokens in drawn.tokens]
    for scorer in drawn.writer.scorers:
        if scorer.reward is not None:
            rated = scorer.collect(drawn.clips, pieces=pieces)
            scores |= {f"{scorer.reward.name}.{axis}": values.tolist() for axis, values in rated.scores.items()}
    for row, index in enumerate(drawn.indices):
        tokens = drawn.tokens[row]
        prompt, sample = divmod(index, prompts.samples)
        yield Piece(
            system=drawn.writer.system.name,
            prompt=prompt,
            seed=seed_of(prompts.seed, prompt),
            tokens=tokens,
            prompt_length=drawn.prompt_length,
            score=pieces[row],
            audio=rendered_audio(drawn.clips[row]),
            scores={axis: values[row] for axis, values in scores.items()},
            logprobs=drawn.logprobs[row],
            length=len(tokens) - drawn.prompt_length,
            sample=sample,
        )
