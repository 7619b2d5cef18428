"""Pretraining of a base model: next-token prediction on tokenised music (paper section 3.1).

A training row is ``BOS + piece + EOS``, cropped at random to at most ``crop`` tokens and right-padded; padding is not a
target. The optimiser is AdamW or Muon, with linear warm-up and cosine decay. The rows of a step are drawn by a
generator seeded with (seed, step), so that a resumed run sees the same rows in the same order, and so that several
processes that share a batch learn the same as one.

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
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Phi3ForCausalLM

from smart import UserError
from smart.config import Optimisation, PretrainConfig, completed, dumps
from smart.cores import summary
from smart.corpus import MANIFEST, Corpus
from smart.crops import Crops
from smart.distributed import World, join
from smart.files import link, parse_json, replace_files
from smart.model import (
    FILES,
    build_model,
    context_length,
    find_base,
    load_base,
    pick_device,
    pick_precision,
    save_base,
)  # fmt: skip
from smart.plots import curves
from smart.prompts import draw
from smart.render import RenderError, checked_soundfont, open_renderer
from smart.rollout import SILENT, completion_metrics
from smart.run import Opening, Run, Tracker, check_packages, checkpoint, confirm_settings, digests
from smart.sampler import Sampler
from smart.tokens import Grammar, Place, build_grammar, decode, vocabulary


def learning_rate(step: int, settings: Optimisation) -> float:
    """Learning rate of ``step``, counted from 0: linear warm-up, then half a cosine down to the final rate."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    swing = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return settings.final_learning_rate + swing * (settings.learning_rate - settings.final_learning_rate)


def next_token_loss(
    model: Any,
    tokens: torch.Tensor,
    pad_id: int,
    *,
    reduction: str = "mean",
    grammar: Grammar | None = None,
    weight: float = 0.0,
) -> torch.Tensor:
    """Negative log-likelihood, in nats, of all tokens but the first of each row of ``tokens`` (N, L), without padding.

    ``reduction``: the "mean" over these tokens, or their "sum". With a ``grammar``, ``weight`` times the negative log
    of the probability of all tokens that may come next is added for each.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    targets = tokens[:, 1:].flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=pad_id, reduction=reduction)
    if grammar is None or not weight:
        return loss
    playable = grammar.playable(Place(*(part.flatten() for part in grammar.read_all(tokens[:, :-1]))))
    playable = playable.scatter(1, targets[:, None], True)  # a row that begins within a bar may seem to break a rule
    inside = logits.masked_fill(~playable, -math.inf).logsumexp(dim=1)
    penalty = (logits.logsumexp(dim=1) - inside)[targets != pad_id]
    return loss + weight * (penalty.sum() if reduction == "sum" else penalty.mean())


def count_targets(tokens: torch.Tensor, pad_id: int) -> int:
    """How many tokens ``next_token_loss`` counts."""
    return int((tokens[:, 1:] != pad_id).sum())


@torch.no_grad()
def evaluate(model: Any, rows: torch.Tensor, pad_id: int, batch: int, world: World) -> float:
    """Validation loss in nats per token over all ``rows`` (N, L), of which each process of ``world`` takes a share."""
    total, count = 0.0, 0
    for part in rows[world.rank :: world.size].split(batch):
        total += next_token_loss(model, part.to(world.device), pad_id, reduction="sum").item()
        count += count_targets(part, pad_id)
    total, targets = world.sum(total, count)
    return total / targets


@dataclass
class Progress:
    """How far a run has come; a checkpoint stores this next to the weights and the optimiser's state."""

    step: int = 0
    best: float = math.inf  # lowest validation loss
    waited: int = 0  # evaluations since then
    loss: float = 0.0  # sum of the training losses since the last evaluation
    steps: int = 0  # since the last evaluation


def train(config: PretrainConfig, **opening: bool) -> Path:
    """Train a base as ``config`` says; returns the folder of the run, whose ``base/`` contains the best model.

    ``opening`` are flags of ``Pretraining``: ``resume``, ``overwrite``, ``accept_changes``.

    If ``torchrun`` started several processes, each learns from its own rows of every batch, and the result is that of
    one process up to rounding. Raises ``UserError`` for what the user can correct, and ``click.ClickException`` if the
    loss is no longer finite.
    """
    check_packages(config.track.also)
    with Pretraining(config, **opening) as run:
        for step in run.steps():
            # every process draws the whole batch, to know its number of targets, and learns from a share of it
            batch = run.rows.batch(config.optimisation.batch, np.random.default_rng((config.run.seed, step)))
            loss, norm = learn(run, batch)
            run.record(step, loss, norm)
        run.finish()
    return run.folder


def learn(run: "Pretraining", batch: torch.Tensor) -> tuple[float, float]:
    """One optimiser step on ``batch`` (rows, crop); returns this process's share of the loss, and the gradient norm.

    Raises ``click.ClickException`` before the step if the gradient is not finite.
    """
    world, settings, pad_id = run.world, run.config.optimisation, run.facts.pad_id
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.progress.step, settings)
    mine = batch[world.rank :: world.size].to(world.device)
    run.model.train()
    with run.autocast:
        loss = next_token_loss(
            run.forward, mine, pad_id, reduction="sum", grammar=run.grammar, weight=settings.grammar_weight
        ) / count_targets(batch, pad_id)
    run.model.zero_grad(set_to_none=True)
    (loss * world.size).backward()  # gradients of several processes are averaged
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm).item()
    run.model.eval()
    if not math.isfinite(norm):  # also if the loss of any process is not finite
        raise click.ClickException(
            f"step {run.progress.step + 1} stopped before it changed the weights: loss {loss.item():g}, "
            f"gradient norm {norm:g}; try a lower optimisation.learning_rate. "
            f"The last good checkpoint is {checkpoint.latest(run.run.checkpoints)}."
        )
    for optimizer in run.optimizers:
        optimizer.step()
    return loss.item(), norm


class Pretraining:
    """A pretraining run without its optimiser steps, as a context manager: entering it builds or resumes the run.

    Attributes: ``model``; ``forward``, the same model for the forward pass (compiled, or wrapped for several
    processes); ``optimizers``; ``autocast``; ``rows``, the training rows; ``world`` (all processes); ``progress``.
    ``opening`` are flags of ``smart.run.Opening``.
    """

    def __init__(self, config: PretrainConfig, **opening: bool) -> None:
        self.config = config
        self.folder = Path(config.run.folder) / config.run.name
        self.progress = Progress()
        self._opening = Opening(**opening)
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Pretraining":
        with contextlib.ExitStack() as opened:
            self.world = opened.enter_context(join(pick_device(self.config.run.device)))
            settings = dumps(self.config)
            confirm_settings(self.world, "smart.pretrain", settings, self._opening)
            with self.world.together():
                soundfont, sources = self._find_parts()
            run = Run(
                self.folder,
                settings,
                program="smart.pretrain",
                world=self.world,
                opening=self._opening,
                keep=self.config.optimisation.keep_checkpoints,
                sources=sources,
                complete=partial(completed, schema=PretrainConfig),
            )
            self.run = opened.enter_context(run)
            self._build_optimizers()
            self._open_files(opened, soundfont)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _find_parts(self) -> tuple[Path, dict[str, str]]:
        """Read the corpus and make the model; returns the soundfont for samples, and digests of what the run reads."""
        config, settings, data = self.config, self.config.optimisation, self.config.data
        if not data.corpus:
            raise UserError("data.corpus is empty: set it to a folder written by `smart corpus build`")
        for name in ("batch", "evaluate_rows"):
            if (rows := getattr(settings, name)) < (many := self.world.size):
                raise UserError(f"optimisation.{name} = {rows}: expected at least one row for each of {many} processes")
        self.corpus = Corpus(Path(data.corpus))
        soundfont = checked_soundfont(config.render.fonts[0])
        self.tokenizer = self.corpus.tokenizer
        self.facts = vocabulary(self.tokenizer)
        self.grammar = build_grammar(self.tokenizer).to(self.world.device)
        model: Any = _start(config, self.tokenizer)
        self.model = model.to(self.world.device)
        longest = context_length(self.model)
        if data.crop > longest:
            raise UserError(f"data.crop = {data.crop}: expected at most the base's max_positions = {longest}")
        moved = {name: getattr(data, name) for name in ("transpose", "velocity_shift", "tempo_shift", "meters")}
        self.rows = self._crops("train", **moved)
        random = np.random.default_rng((config.run.seed, 0))
        self.validation = self._crops("validation").batch(settings.evaluate_rows, random)
        self._missing = missing_to_compile(self.world.device.type)
        self._compiling = _compiles(settings.compile, self.world.device, self._missing)
        paths = {"data.corpus": Path(data.corpus) / MANIFEST, "render.soundfont": soundfont}
        if config.model.base:
            base = find_base(config.model.base)
            paths |= {f"model.base/{name}": base / name for name in FILES}
        return soundfont, digests(paths)

    def _crops(self, split: str, **moved: Any) -> Crops:
        data = self.config.data
        if not len(pieces := self.corpus.split(split)):
            raise UserError(f"corpus {data.corpus}: its {split} split is empty; build a larger corpus")
        return Crops(pieces, self.tokenizer, crop=data.crop, openings=data.openings, **moved)

    def _build_optimizers(self) -> None:
        """Make optimisers and forward pass; if the run is resumed, restore it from the last checkpoint."""
        settings, device = self.config.optimisation, self.world.device
        self.optimizers = _optimizers(self.model, settings, fused=device.type == "cuda")
        precision = pick_precision(settings.precision, device)
        self.autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
        last = self.run.last
        if last is not None:
            self.model.load_state_dict(load_base(last)[0].state_dict())
            checkpoint.read_state(last, self.model, *self.optimizers)
            try:
                self.progress = Progress(**parse_json((last / "progress.json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"checkpoint {last}: progress.json cannot be read ({error})") from None
            self.run.tidy_checkpoints(self.progress.step)
            if not self.world.lead:
                self.progress.loss = 0.0  # the checkpoint has the sum over all processes, which the lead keeps
        self.forward: Any = self.model if self.world.size == 1 else DistributedDataParallel(self.model)
        self.forward = torch.compile(self.forward) if self._compiling else self.forward

    def _open_files(self, opened: contextlib.ExitStack, soundfont: Path) -> None:
        """Open the run's files and, in the lead process, the renderer for samples."""
        self.run.open(self.progress.step, self.config.optimisation.steps, "step", also=self.config.track.also)
        self.samples = None
        if self.world.lead:
            self.samples = opened.enter_context(Samples(self.config, soundfont, self.model, self.tokenizer))
        others = self.world.size - 1
        self.run.log(
            f"{self.folder}: {sum(weights.numel() for weights in self.model.parameters()):,} parameters on "
            f"{self.world.device}{f' and {others} more' if others else ''}, "
            f"{self.corpus.split('train').tokens:,} tokens to learn from, from step {self.progress.step}"
        )
        self.run.log(summary(workers=1))
        if self._missing and self.config.optimisation.compile == "auto" and self.world.device.type == "cuda":
            self.run.log(f"not compiled (optimisation.compile = 'auto'), which needs {' and '.join(self._missing)}")
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._began, self._since = time.perf_counter(), self.progress.step

    def steps(self) -> Iterator[int]:
        """The remaining steps, counted from 1; they end early if the validation loss stops improving."""
        waits = self.config.optimisation.patience
        return self.run.steps(
            self.progress.step, self.config.optimisation.steps, unless=lambda: self.progress.waited >= waits
        )

    def record(self, step: int, loss: float, norm: float) -> None:
        """Count the step; evaluate and save if it is time; then exit if a signal asked for it.

        ``loss`` is this process's share of the step's loss; ``norm`` is the gradient norm.
        """
        settings, done = self.config.optimisation, self.progress
        done.step, done.loss, done.steps = step, done.loss + loss, done.steps + 1
        self.run.bar.set_postfix(loss=f"{loss * self.world.size:.3f}", best=f"{done.best:.3f}", refresh=False)
        self.run.bar.update()
        stopping = self.run.stopping()
        evaluated = step % settings.evaluate_every == 0 or step == settings.steps
        if evaluated or stopping:
            self.run.confirm_weights(self.model, step)
        if evaluated:
            self._evaluate(norm)
            self._save_checkpoint()
            self._restart_clock()
        elif stopping:
            self._save_checkpoint()
        if stopping and step < settings.steps:
            self.run.leave()

    def _evaluate(self, norm: float) -> None:
        """Measure the validation loss, log it, and save the model as ``base/`` if it is the best so far."""
        settings, done = self.config.optimisation, self.progress
        with self.autocast:
            value = evaluate(self.forward, self.validation, self.facts.pad_id, settings.batch, self.world)
        (loss,) = self.world.sum(done.loss)
        seen = settings.batch * self.config.data.crop  # tokens per step
        metrics = {
            "loss": loss / done.steps,
            "validation_loss": value,
            "validation_perplexity": math.exp(value),
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens": float(done.step * seen),
            "tokens_per_second": (done.step - self._since) * seen / (time.perf_counter() - self._began),
        }
        better = value < done.best
        if self.samples is not None:
            metrics |= self.samples.write(self.run.files, done.step)
            self.run.files.metrics(done.step, metrics)
            self.run.log(
                f"step {done.step}: loss {metrics['loss']:.4f}, validation {value:.4f} (perplexity "
                f"{metrics['validation_perplexity']:.2f}), {metrics['tokens_per_second']:,.0f} tokens/s"
            )
            if better:
                _keep_best(self.folder, done.step, self.model, self.tokenizer)
        done.waited = 0 if better else done.waited + 1
        done.best, done.loss, done.steps = min(value, done.best), 0.0, 0

    def _save_checkpoint(self) -> None:
        (loss,) = self.world.sum(self.progress.loss)
        if self.world.lead:
            self.run.save(self.progress.step, partial(self._write_checkpoint, replace(self.progress, loss=loss)))
            if self.progress.steps == 0:  # this step was evaluated
                self.run.draw(curves, self.folder, ("loss", "validation_loss"), "nats per token", step="step")

    def _write_checkpoint(self, progress: Progress, target: Path) -> None:
        save_base(self.model, self.tokenizer, target)
        checkpoint.write_state(target, self.model, *self.optimizers)
        (target / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    def finish(self) -> None:
        """Log the best validation loss and where the model is."""
        self.run.log(f"best validation loss {self.progress.best:.4f}; the base is in {self.folder / 'base'}")


class Samples:
    """Samples pieces at each evaluation, for the same prompts and seed; use it as a context manager."""

    def __init__(self, config: PretrainConfig, soundfont: Path, model: Any, tokenizer: Any) -> None:
        render = config.render
        self.config, self.model, self.tokenizer, self.facts = config, model, tokenizer, vocabulary(tokenizer)
        # one sampler for all evaluations, since on CUDA each captures a graph with a cache
        self.sampler = Sampler(model, pad_id=self.facts.pad_id, eos_id=self.facts.eos_id)
        self.pool = open_renderer(
            render.backend,
            soundfont,
            sample_rate=render.sample_rate,
            seconds=render.seconds,
            workers=1,
            device=model.device,
            bank_megabytes=render.bank_megabytes,
        )

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def write(self, files: Tracker, step: int) -> dict[str, float]:
        """Write some of the pieces as MIDI and WAV; returns the shares of unplayable tokens and silent pieces."""
        settings, seed = self.config.optimisation, self.config.run.seed
        if not settings.samples:
            return {}
        prompts = draw("procedural", settings.samples, self.tokenizer, torch.Generator().manual_seed(seed))
        rollout = self.sampler.sample(
            prompts.to(self.model.device),
            max_new_tokens=min(256, context_length(self.model) - prompts.shape[1]),
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
                audio = None  # only the MIDI file is written
            if index < settings.listen:
                files.write_piece(f"samples/{step:08d}/{index:02d}", score, audio, self.config.render.sample_rate)
        rates = completion_metrics(rollout, self.facts.eos_id, build_grammar(self.tokenizer))
        return {
            "samples/unplayable_rate": rates["completions/unplayable_rate"],
            "samples/silent_rate": silent / len(scores),
        }


def _start(config: PretrainConfig, tokenizer: Any) -> Phi3ForCausalLM:
    """The model to train: the base ``model.base``, or a new model if it is empty."""
    if not config.model.base:
        return build_model(tokenizer, **asdict(config.architecture), seed=config.run.seed)
    model, its_tokenizer = load_base(config.model.base)
    if its_tokenizer.vocab != tokenizer.vocab:
        raise UserError(
            f"base {config.model.base!r}: its vocabulary is not that of corpus {config.data.corpus}; build the corpus "
            f"with --tokenizer {config.model.base}"
        )
    return model


def _optimizers(model: Any, settings: Optimisation, *, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices within the layers, and AdamW for all others.

    Muon's updates are scaled to the size of AdamW's, so that both take the same learning rate and weight decay
    (Liu et al., *Muon is scalable for LLM training*, 2025).
    """
    adamw = list(model.named_parameters())
    optimizers: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon":
        inner = {name for name, weights in adamw if weights.ndim == 2 and ".layers." in name}
        matrices = [weights for name, weights in adamw if name in inner]
        adamw = [(name, weights) for name, weights in adamw if name not in inner]
        optimizers.append(
            torch.optim.Muon(matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    others = [weights for _, weights in adamw]
    optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=fused))
    return optimizers


def missing_to_compile(device: str, headers: Path | None = None) -> list[str]:
    """What torch.compile needs on a ``device`` of this type and does not find; ``headers`` is Python's own folder.

    On CUDA that is what Triton builds its launchers with, on a CPU what the kernels themselves are built with.
    """
    missing = []
    if device == "cuda":
        if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
            missing.append("a C compiler (gcc or clang, or another one named by CC)")
        if find_spec("triton") is None:
            missing.append("the package triton")
    elif not shutil.which(os.environ.get("CXX") or "g++"):
        missing.append("a C++ compiler (g++, or another one named by CXX)")
    if not ((headers or Path(sysconfig.get_path("include"))) / "Python.h").is_file():
        missing.append(f"Python's headers (Python.h: apt install python{sysconfig.get_python_version()}-dev)")
    return missing


def _compiles(wanted: str, device: torch.device, missing: list[str]) -> bool:
    """Whether to use torch.compile. Raises ``UserError`` if it is "on" but something that it needs is ``missing``."""
    if wanted == "on" and missing:
        raise UserError(
            f"optimisation.compile = 'on': torch.compile needs {' and '.join(missing)}; install it, or use 'off'"
        )
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and not missing)


def _keep_best(folder: Path, step: int, model: Any, tokenizer: Any) -> None:
    """Save a copy of the model and point the link ``base`` to it; without links ``base`` is a copy."""
    copy = checkpoint.save(folder / "best", step, lambda target: save_base(model, tokenizer, target), keep=2)
    base = folder / "base"
    if (base.is_dir() and not base.is_symlink()) or not link(base, str(copy.relative_to(folder))):
        replace_files(base, lambda target: save_base(model, tokenizer, target), last="model.safetensors")
