"""The same prompts and seeds from several models, rendered and rated: what every comparison of systems starts from.

Prompt i has a seed of its own, derived from (seed, i); prompt and completion are drawn from one generator of that
seed. So each system gets the same prompt and the same random numbers, and a piece is the same whichever slice of the
prompts it is drawn in.

Axes: N prompts of a block, P prompt length, T completion length, C = 2 channels, S audio samples.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart import UserError
from smart.corpus import Corpus
from smart.model import load_base, pick_device, pick_precision
from smart.prompts import draw
from smart.render import RenderError, open_renderer
from smart.reward import Reward
from smart.rollout.batch import write
from smart.rollout.scorer import Scorer
from smart.rollout.systems import System
from smart.sampler import Rollout, Sampler
from smart.tokens import decode, load_tokenizer, vocabulary
from smart.workers import usable_cores

Audio = npt.NDArray[np.float32]  # (2, S)
BLOCK = 64  # prompts that are drawn together


class Piece(NamedTuple):
    """What one system wrote for one prompt."""

    system: str
    prompt: int  # index
    seed: int  # of this prompt, whatever the system
    tokens: list[int]  # prompt and completion, up to and including the end-of-sequence
    prompt_length: int
    score: Any  # symusic.Score
    audio: Audio | None  # (2, S); None where it could not be rendered
    scores: dict[str, float]  # "reward.axis" -> rating; NaN where the clip failed or could not be rated
    logprobs: float  # of the completion's tokens in the distribution that they were drawn from, summed
    length: int  # tokens of the completion
    sample: int = 0  # number of the completion, where a prompt has several


def seed_of(seed: int, prompt: int, *sample: int) -> int:
    """The seed of a prompt, or of a further sample of it: 32 bits (a CPU generator takes no more)."""
    return int(np.random.SeedSequence([seed, prompt, *sample]).generate_state(1)[0])


class _Voice(NamedTuple):
    """A system that is ready to write."""

    system: System
    tokenizer: Any
    vocab: dict[str, int]
    sampler: Sampler
    scorers: list[Scorer]  # the first one listens; all that have a reward rate


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

    ``samples`` completions of each prompt; the first one is that of ``samples`` = 1. They come block by block of
    ``batch`` pieces, within a block system by system, within a system by prompt, then by sample.
    Rendering overlaps with drawing as in training (``smart.rollout``); a block is rated while workers render the next.

    A block is always drawn whole, also where a part of it was asked for, since rounding depends on how many rows are
    multiplied at once: so tokens and audio of a prompt are the same, bit for bit, in any slice of the same ``batch``.
    For few pieces give a small ``batch``. ``workers`` 0 is one for each usable core.

    ``prompts`` is a kind of ``smart.prompts``; "dataset" takes them from the ``split`` of a ``corpus`` folder. They are
    drawn in the vocabulary of the corpus, or else of the first system, and said in that of each.

    What is missing, or does not fit, is a ``UserError`` of this call, before the first piece is asked for.
    """
    if first < 0 or count < 0 or samples < 1 or batch < 1:
        given = f"{first}, {count}, {samples} and {batch}"
        raise ValueError(f"expected first >= 0, count >= 0, samples >= 1 and batch >= 1, got {given}")
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise UserError(f"rewards: expected each once, got {', '.join(names)}")
    pieces = tokenizer = None
    if prompts == "dataset":
        if corpus is None:
            raise UserError("prompts of kind 'dataset' need a corpus: a folder written by `smart corpus build`")
        opened = Corpus(corpus)
        pieces, tokenizer = opened.split(split), opened.tokenizer
        if not len(pieces):
            raise UserError(f"corpus {corpus}: its split {split!r} has no pieces")
    where = pick_device(device)
    loaded = [(system, *load_base(system.model, device=where)) for system in systems]
    for system, model, _ in loaded:
        if max_new_tokens > (room := model.config.max_position_embeddings - 8):  # the longest prompt has seven tokens
            raise UserError(f"{system.name}: {max_new_tokens} new tokens are asked for, it has room for {room}")
    speaker = tokenizer or load_tokenizer(systems[0].model)
    said = {number: token for token, number in speaker.vocab.items()}

    def start(index: int) -> tuple[list[str], torch.Generator]:
        """Prompt of the piece at ``index``, and the generator that draws its completion: at sample 0 the prompt's."""
        prompt, sample = divmod(index, samples)
        generator = torch.Generator().manual_seed(seed_of(seed, prompt))
        row = draw(prompts, 1, speaker, generator, pieces=pieces)
        if sample:
            generator = torch.Generator().manual_seed(seed_of(seed, prompt, sample))
        return [said[token] for token in row[0].tolist()], generator

    indices = range(first * samples, (first + count) * samples)
    for system, _, own in loaded:  # all that could not be said, before any work
        if own.vocab != speaker.vocab:
            for index in indices:
                for token in start(index)[0]:
                    if token not in own.vocab:
                        raise UserError(
                            f"{system.name}: its vocabulary has no {token}, which prompt {index // samples} holds"
                        )

    def work() -> Iterator[Piece]:
        with open_renderer(
            backend,
            soundfont,
            sample_rate=sample_rate,
            seconds=seconds,
            workers=workers or usable_cores(),
            device=where,
        ) as pool:
            voices = []
            for system, model, own in loaded:
                facts = vocabulary(own)
                sampler = Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id, dtype=pick_precision("auto", where))
                scorers = [
                    Scorer(own, pool, reward, sample_rate=sample_rate, seconds=seconds) for reward in rewards or (None,)
                ]
                voices.append(_Voice(system, own, own.vocab, sampler, scorers))
            waiting: list[_Drawn] = []
            for number in range(indices.start // batch, -(-indices.stop // batch)):
                block = range(number * batch, (number + 1) * batch)
                for voice in voices:
                    starts = [start(index) for index in block]
                    drawn = _draw(
                        voice, block, starts, indices,
                        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                    )  # fmt: skip
                    while waiting:  # without a name: it would keep this block's audio while the next is drawn
                        yield from _pieces(waiting.pop(), seed, samples)
                    waiting.append(drawn)
            while waiting:
                yield from _pieces(waiting.pop(), seed, samples)

    return work()


class _Drawn(NamedTuple):
    """The pieces of one system for a block, being rendered."""

    voice: _Voice
    indices: list[int]
    tokens: list[list[int]]
    prompt_length: int
    logprobs: list[float]
    clips: list[Future[Audio]]


def _draw(
    voice: _Voice,
    block: range,
    starts: Sequence[tuple[list[str], torch.Generator]],
    indices: range,
    **options: Any,
) -> _Drawn:
    """Draw a whole block and have those of ``indices`` rendered, each as soon as it has settled."""
    rows = [row for row, index in enumerate(block) if index in indices]
    rollout, clips = write(
        voice.sampler,
        voice.scorers[0],
        torch.tensor([[voice.vocab[token] for token in prompt] for prompt, _ in starts]),
        rows=rows,
        generator=[generator for _, generator in starts],
        **options,
    )
    rollout = Rollout(*(part.cpu() for part in rollout))
    prompt_length = len(starts[0][0])
    lengths = rollout.mask.sum(dim=1).tolist()
    return _Drawn(
        voice=voice,
        indices=[block[row] for row in rows],
        tokens=[row[: prompt_length + length] for row, length in zip(rollout.tokens.tolist(), lengths, strict=True)],
        prompt_length=prompt_length,
        logprobs=rollout.logprobs.double().sum(dim=1).tolist(),
        clips=clips.in_order(),
    )


def _pieces(drawn: _Drawn, seed: int, samples: int) -> Iterator[Piece]:
    """Wait for the clips, rate them, and hand out the pieces."""
    scores: dict[str, list[float]] = {}
    for scorer in drawn.voice.scorers:
        if scorer.reward is not None:
            rated = scorer.collect(drawn.clips)
            scores |= {f"{scorer.reward.name}.{axis}": values.tolist() for axis, values in rated.scores.items()}
    for row, index in enumerate(drawn.indices):
        tokens = drawn.tokens[row]
        yield Piece(
            system=drawn.voice.system.name,
            prompt=index // samples,
            seed=seed_of(seed, index // samples),
            tokens=tokens,
            prompt_length=drawn.prompt_length,
            score=decode(drawn.voice.tokenizer, tokens),
            audio=_audio(drawn.clips[row]),
            scores={axis: values[row] for axis, values in scores.items()},
            logprobs=drawn.logprobs[row],
            length=len(tokens) - drawn.prompt_length,
            sample=index % samples,
        )


def _audio(clip: Future[Audio]) -> Audio | None:
    # asked, not caught: the traceback of an error would hold the frames that hold the audio of the whole block
    return None if isinstance(clip.exception(), RenderError) else clip.result()
