"""Pretraining of a base model: next-token prediction on tokenised music (paper section 3.1).

A training row is ``BOS + piece + EOS``, cropped at random to at most ``crop`` tokens and right-padded; padding is no
target. AdamW with linear warm-up and cosine decay. Every row of every step is drawn from a generator seeded with
(seed, step), so that a run that was killed and resumed sees the same rows in the same order, and so that several
processes that share a batch learn what one would.

    python -m smart.pretrain --config base.toml
    torchrun --nproc-per-node 4 -m smart.pretrain --config base.toml
"""

if __name__ == "__main__":  # before torch is imported: --help and a misspelt key are answered at once
    from smart.__main__ import start

    start("pretrain")

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Phi3ForCausalLM

from smart import UserError
from smart.config import Data, Optimisation, PretrainConfig, dumps
from smart.corpus import Corpus
from smart.distributed import World, join
from smart.files import parse_json, sync
from smart.model import build_model, load_base, pick_device, pick_precision, save_base
from smart.plots import curves
from smart.prompts import Pieces, draw
from smart.render import RenderError, check_soundfont, find_soundfont, open_renderer
from smart.rollout import SILENT, completion_metrics
from smart.run import Run, Tracker, check_packages, checkpoint
from smart.sampler import Sampler
from smart.tokens import Vocabulary, build_grammar, decode, vocabulary


class Crops:
    """Rows of at most ``crop`` tokens out of ``pieces``, drawn by a seeded generator.

    A piece is drawn in proportion to the rows that it would fill, so that every token is seen about equally often.
    ``transpose`` shifts all pitches of a row by the same number of semitones, within the vocabulary's range.
    ``openings`` is the share of rows that start where the piece starts, half of them without BOS, since that is
    how prompts look.
    """

    def __init__(self, pieces: Pieces, facts: Vocabulary, data: Data) -> None:
        self.pieces, self.facts, self.data = pieces, facts, data
        if not len(pieces):
            raise UserError(f"corpus {data.corpus}: a split that training needs has no pieces; build a larger corpus")
        lengths = np.array([len(pieces[index]) for index in range(len(pieces))])
        self.cumulative = np.cumsum(np.ceil((lengths + 2) / data.crop))
        self.is_pitch = np.zeros(facts.size, dtype=bool)
        self.is_pitch[list(facts.pitch_ids)] = True

    def batch(self, rows: int, random: np.random.Generator) -> torch.Tensor:
        """(rows, crop) int64, right-padded with PAD; the stream of draws is the generator's."""
        out = torch.full((rows, self.data.crop), self.facts.pad_id)
        for row in range(rows):
            tokens = self._row(random)
            out[row, : len(tokens)] = torch.from_numpy(tokens)
        return out

    def _row(self, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        crop = self.data.crop
        index = int(np.searchsorted(self.cumulative, random.uniform(0, self.cumulative[-1]), side="right"))
        piece = self.pieces[min(index, len(self.pieces) - 1)]
        tokens = np.concatenate([[self.facts.bos_id], piece, [self.facts.eos_id]]).astype(np.int64)
        start = int(random.integers(max(len(tokens) - crop, 0) + 1))
        if random.random() < self.data.openings:
            start = int(random.integers(2))
        tokens = tokens[start : start + crop]
        pitches = self.is_pitch[tokens]
        if self.data.transpose and pitches.any():
            shift = int(random.integers(-self.data.transpose, self.data.transpose + 1))
            low, high = self.facts.pitch_ids[0], self.facts.pitch_ids[-1]
            shift = min(max(shift, low - tokens[pitches].min()), high - tokens[pitches].max())
            tokens[pitches] += shift
        return tokens


def learning_rate(step: int, settings: Optimisation) -> float:
    """Rate of ``step`` (0-based): linear warm-up, then half a cosine down to the final rate."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    swing = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return settings.final_learning_rate + swing * (settings.learning_rate - settings.final_learning_rate)


def next_token_loss(model: Any, tokens: torch.Tensor, pad_id: int, *, reduction: str = "mean") -> torch.Tensor:
    """Negative log-likelihood in nats of ``tokens`` (N, L) but the first; padding is not counted.

    ``reduction``: "mean" over the tokens counted, or their "sum".
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets = tokens[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=pad_id, reduction=reduction)


def count_targets(tokens: torch.Tensor, pad_id: int) -> int:
    """How many tokens ``next_token_loss`` counts."""
    return int((tokens[:, 1:] != pad_id).sum())


@torch.no_grad()
def evaluate(model: Any, rows: torch.Tensor, pad_id: int, batch: int, world: World) -> float:
    """Validation loss: nats a token over all ``rows``, of which every process of ``world`` takes its share."""
    total, count = 0.0, 0
    for part in rows[world.rank :: world.size].split(batch):
        total += next_token_loss(model, part.to(world.device), pad_id, reduction="sum").item()
        count += count_targets(part, pad_id)
    total, targets = world.sum(total, count)
    return total / targets


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside weights and moments."""

    step: int = 0
    best: float = math.inf  # validation loss
    waited: int = 0  # evaluations since then
    loss: float = 0.0  # sum of the steps' losses since the last evaluation
    steps: int = 0  # how many these are


def train(config: PretrainConfig, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train a base by ``config``; returns the folder of the run, whose ``base/`` holds the best model so far.

    Started by ``torchrun``, each process learns from its own rows of every batch, and the result is that of one
    process to rounding. Raises ``UserError`` for what the user can correct and ``click.ClickException`` where the loss
    stops being finite.
    """
    check_packages()
    with Pretraining(config, resume=resume, overwrite=overwrite) as run:
        for step in run.steps():
            # every process draws the whole batch, so that all know how many targets it has, and learns from its share
            batch = run.rows.batch(config.optimisation.batch, np.random.default_rng((config.run.seed, step)))
            loss, norm = learn(run, batch)
            run.record(step, loss, norm)
        run.finish()
    return run.folder


def learn(run: "Pretraining", batch: torch.Tensor) -> tuple[float, float]:
    """One optimiser step on ``batch`` (rows, crop); returns this process's share of the loss, and the gradient norm.

    Raises ``click.ClickException`` before the step where the gradient is not finite.
    """
    world, settings, pad_id = run.world, run.config.optimisation, run.facts.pad_id
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.progress.step, settings)
    mine = batch[world.rank :: world.size].to(world.device)
    run.model.train()
    with run.autocast:
        loss = next_token_loss(run.forward, mine, pad_id, reduction="sum") / count_targets(batch, pad_id)
    run.optimizer.zero_grad(set_to_none=True)
    (loss * world.size).backward()  # gradients of several processes are averaged
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm).item()
    run.model.eval()
    if not math.isfinite(norm):  # as it is where the loss is not, in any of the processes
        raise click.ClickException(
            f"step {run.progress.step + 1}: loss {loss.item():g}, gradient norm {norm:g}: stopped before the weights "
            f"were spoiled; the last good checkpoint is {checkpoint.latest(run.folder / 'checkpoints')}; "
            "try a lower optimisation.learning_rate"
        )
    run.optimizer.step()
    return loss.item(), norm


class Pretraining:
    """A pretraining run around its optimiser steps; use it as a context manager, which builds, or resumes, the run.

    Attributes: ``model``; ``forward``, the same model as it is called (compiled, or shared among processes);
    ``optimizer``; ``autocast``; ``rows``, the training rows; ``world``, this process among all; ``progress``.
    """

    def __init__(self, config: PretrainConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        self.config = config
        self.folder = Path(config.run.folder) / config.run.name
        self.progress = Progress()
        self._resume, self._overwrite = resume, overwrite
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Pretraining":
        with contextlib.ExitStack() as opened:
            self.world = opened.enter_context(join(pick_device(self.config.run.device)))
            soundfont = self._prepare(opened)
            self._build()
            self._open(opened, soundfont)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def _prepare(self, opened: contextlib.ExitStack) -> Path:
        """Read the corpus, make the model, and hold the run's folder; returns the soundfont for samples."""
        config, settings, data = self.config, self.config.optimisation, self.config.data
        if not data.corpus:
            raise UserError("data.corpus is empty: set it to a folder written by `smart corpus build`")
        if settings.batch < self.world.size:
            many = self.world.size
            raise UserError(f"optimisation.batch = {settings.batch}: expected at least one row for each of {many}")
        self.corpus = Corpus(Path(data.corpus))
        soundfont = find_soundfont(config.render.soundfont)
        check_soundfont(soundfont)
        self.tokenizer = self.corpus.tokenizer
        self.facts = vocabulary(self.tokenizer)
        model: Any = _start(config, self.tokenizer)
        self.model = model.to(self.world.device)
        longest = self.model.config.max_position_embeddings
        if data.crop > longest:
            raise UserError(f"data.crop = {data.crop}: expected at most the base's max_positions = {longest}")
        self.rows = Crops(self.corpus.split("train"), self.facts, data)
        self.validation = Crops(self.corpus.split("validation"), self.facts, replace(data, transpose=0)).batch(
            settings.evaluate_rows, np.random.default_rng((config.run.seed, 0))
        )
        self._compiling = _compiles(settings.compile, self.world.device)
        run = Run(
            self.folder,
            dumps(config),
            program="smart.pretrain",
            world=self.world,
            resume=self._resume,
            overwrite=self._overwrite,
            keep=settings.keep_checkpoints,
        )
        self.run = opened.enter_context(run)
        return soundfont

    def _build(self) -> None:
        """Optimiser and precision; of a run that is resumed, everything as the last checkpoint holds it."""
        settings, device = self.config.optimisation, self.world.device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=device.type == "cuda"
        )
        precision = pick_precision(settings.precision, device)
        self.autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
        last = self.run.last
        if last is not None:
            self.model.load_state_dict(load_base(last)[0].state_dict())
            checkpoint.read_state(last, self.model, self.optimizer)
            try:
                self.progress = Progress(**parse_json((last / "progress.json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"checkpoint {last}: progress.json cannot be read ({error})") from None
            self.run.settle(self.progress.step)
            if not self.world.lead:
                self.progress.loss = 0.0  # the lead holds what all had lost
        self.forward: Any = self.model if self.world.size == 1 else DistributedDataParallel(self.model)
        self.forward = torch.compile(self.forward) if self._compiling else self.forward

    def _open(self, opened: contextlib.ExitStack, soundfont: Path) -> None:
        """The run's files and, in the lead process, the samples."""
        self.run.open(self.progress.step, self.config.optimisation.steps, "step")
        self.samples = None
        if self.world.lead:
            self.samples = opened.enter_context(Samples(self.config, soundfont, self.model, self.tokenizer))
        others = self.world.size - 1
        self.run.say(
            f"{self.folder}: {sum(weights.numel() for weights in self.model.parameters()):,} parameters on "
            f"{self.world.device}{f' and {others} more' if others else ''}, "
            f"{self.corpus.split('train').tokens:,} tokens to learn from, from step {self.progress.step}"
        )
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._began, self._since = time.perf_counter(), self.progress.step

    def steps(self) -> Iterator[int]:
        """The steps that are still to be done, from 1, as long as the validation loss gets better."""
        waits = self.config.optimisation.patience
        return self.run.steps(
            self.progress.step, self.config.optimisation.steps, unless=lambda: self.progress.waited >= waits
        )

    def record(self, step: int, loss: float, norm: float) -> None:
        """Note a step; evaluate and save where it is due; then end, if a signal asked for it."""
        settings, done = self.config.optimisation, self.progress
        done.step, done.loss, done.steps = step, done.loss + loss, done.steps + 1
        self.run.bar.update()
        self.run.bar.set_postfix(loss=f"{loss * self.world.size:.3f}", best=f"{done.best:.3f}")
        stopping = self.run.stopping()
        if step % settings.evaluate_every == 0 or step == settings.steps:
            self._evaluate(norm)
            self._save()
            self._restart_clock()
        elif stopping:
            self._save()
        if stopping and step < settings.steps:
            self.run.leave()

    def _evaluate(self, norm: float) -> None:
        """Measure the validation loss, log, and keep the model where it is the best so far."""
        settings, done = self.config.optimisation, self.progress
        with self.autocast:
            value = evaluate(self.forward, self.validation, self.facts.pad_id, settings.batch, self.world)
        (loss,) = self.world.sum(done.loss)
        seen = settings.batch * self.config.data.crop  # tokens per step
        metrics = {
            "loss": loss / done.steps,
            "validation_loss": value,
            "validation_perplexity": math.exp(value),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens": float(done.step * seen),
            "tokens_per_second": (done.step - self._since) * seen / (time.perf_counter() - self._began),
        }
        better = value < done.best
        if self.samples is not None:
            metrics |= self.samples.write(self.run.files, done.step)
            self.run.files.metrics(done.step, metrics)
            self.run.say(
                f"step {done.step}: loss {metrics['loss']:.4f}, validation {value:.4f} (perplexity "
                f"{metrics['validation_perplexity']:.2f}), {metrics['tokens_per_second']:,.0f} tokens/s"
            )
            curves(self.folder, ("loss", "validation_loss"), "nats per token", step="step")
            if better:
                _keep_best(self.folder, done.step, self.model, self.tokenizer)
        done.waited = 0 if better else done.waited + 1
        done.best, done.loss, done.steps = min(value, done.best), 0.0, 0

    def _save(self) -> None:
        (loss,) = self.world.sum(self.progress.loss)
        if self.world.lead:
            self.run.save(self.progress.step, partial(self._write, replace(self.progress, loss=loss)))

    def _write(self, progress: Progress, target: Path) -> None:
        save_base(self.model, self.tokenizer, target)
        checkpoint.write_state(target, self.model, self.optimizer)
        (target / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    def finish(self) -> None:
        """Say how good the best model is, and where."""
        self.run.say(f"best validation loss {self.progress.best:.4f}; the base is in {self.folder / 'base'}")


class Samples:
    """Pieces that the model writes at each evaluation, for the same prompts and seed; use it as a context manager."""

    def __init__(self, config: PretrainConfig, soundfont: Path, model: Any, tokenizer: Any) -> None:
        render = config.render
        self.config, self.model, self.tokenizer, self.facts = config, model, tokenizer, vocabulary(tokenizer)
        # one for all evaluations: on CUDA each captures a graph, and holds its cache
        self.sampler = Sampler(model, pad_id=self.facts.pad_id, eos_id=self.facts.eos_id)
        self.pool = open_renderer(
            render.backend,
            soundfont,
            sample_rate=render.sample_rate,
            seconds=render.seconds,
            workers=1,
            device=model.device,
        )

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def write(self, files: Tracker, step: int) -> dict[str, float]:
        """Write some of the pieces as MIDI and WAV; returns the rates of those that are no music."""
        settings, seed = self.config.optimisation, self.config.run.seed
        if not settings.samples:
            return {}
        prompts = draw("procedural", settings.samples, self.tokenizer, torch.Generator().manual_seed(seed))
        rollout = self.sampler.sample(
            prompts.to(self.model.device),
            max_new_tokens=min(256, self.model.config.max_position_embeddings - prompts.shape[1]),
            generator=torch.Generator(self.model.device).manual_seed(seed),
        )
        scores = [decode(self.tokenizer, row) for row in rollout.tokens.cpu()]
        clips = [self.pool.submit(score) for score in scores]
        silent = 0
        for index, (score, clip) in enumerate(zip(scores, clips, strict=True)):
            try:
                audio = clip.result()
                silent += bool(abs(audio).max() < SILENT)
            except RenderError:
                audio = None  # the MIDI file is written all the same
            if index < settings.listen:
                files.listen(f"samples/{step:08d}/{index:02d}", score, audio, self.config.render.sample_rate)
        rates = completion_metrics(rollout, self.facts.eos_id, build_grammar(self.tokenizer))
        return {
            "samples/unplayable_rate": rates["completions/unplayable_rate"],
            "samples/silent_rate": silent / len(scores),
        }


def _start(config: PretrainConfig, tokenizer: Any) -> Phi3ForCausalLM:
    """The model to train: that of ``model.base``, or a new one."""
    if not config.model.base:
        return build_model(tokenizer, **asdict(config.architecture), seed=config.run.seed)
    model, its_tokenizer = load_base(config.model.base)
    if its_tokenizer.vocab != tokenizer.vocab:
        raise UserError(
            f"base {config.model.base!r}: its vocabulary is not that of corpus {config.data.corpus}; build the corpus "
            f"with --tokenizer {config.model.base}"
        )
    return model


def _compiles(wanted: str, device: torch.device) -> bool:
    """Whether to use torch.compile, which needs a C++ compiler: ``UserError`` where it is asked for without one."""
    compiler = next(filter(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++")), None)
    if wanted == "on" and compiler is None:
        raise UserError("optimisation.compile = 'on': torch.compile needs g++ or clang++; install one, or use 'off'")
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and compiler is not None)


def _keep_best(folder: Path, step: int, model: Any, tokenizer: Any) -> None:
    """Point ``base`` at a new copy of the model, in one rename."""
    copy = checkpoint.save(folder / "best", step, lambda target: save_base(model, tokenizer, target), keep=2)
    link = folder / ".base.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(copy.relative_to(folder))
    os.replace(link, folder / "base")
    sync(folder)
