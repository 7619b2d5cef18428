"""Pretraining of a base model: next-token prediction on tokenised music (paper section 3.1).

A training row is ``BOS + piece + EOS``, cropped at random to at most ``crop`` tokens and right-padded; padding is no
target. AdamW with linear warm-up and cosine decay. Every row of every step is drawn from a generator seeded with
(seed, step), so that a run that was killed and resumed sees the same rows in the same order, and so that several
processes that share a batch learn what one would.

    python -m smart.pretrain --config base.toml
    torchrun --nproc-per-node 4 -m smart.pretrain --config base.toml
"""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Phi3ForCausalLM

from smart import UserError, distributed
from smart.config import Data, Optimisation, PretrainConfig, dumps, load
from smart.corpus import Corpus
from smart.distributed import World
from smart.files import parse_json, sync
from smart.model import build_model, load_base, pick_device, pick_precision, save_base
from smart.plots import curves
from smart.prompts import Pieces, draw
from smart.render import Renderer, RenderError, check_soundfont, find_soundfont, open_renderer
from smart.rollout import SILENT, completion_metrics
from smart.run import CONFIG, StopRequest, Tracker, check_packages, checkpoint, prepare, progress, run_command
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
    process to rounding. Raises ``UserError`` for what the user can mend and ``click.ClickException`` where the loss
    stops being finite.
    """
    check_packages()
    with distributed.join(pick_device(config.run.device)) as world, contextlib.ExitStack() as held:
        return _train(config, world, held, resume=resume, overwrite=overwrite)


def _train(config: PretrainConfig, world: World, held: contextlib.ExitStack, *, resume: bool, overwrite: bool) -> Path:
    settings, data, seed, device = config.optimisation, config.data, config.run.seed, world.device
    if not data.corpus:
        raise UserError("data.corpus is empty: set it to a folder written by `smart corpus build`")
    if settings.batch < world.size:
        raise UserError(f"optimisation.batch = {settings.batch}: expected at least one row for each of {world.size}")
    corpus = Corpus(Path(data.corpus))
    soundfont = find_soundfont(config.render.soundfont)
    check_soundfont(soundfont)
    tokenizer = corpus.tokenizer
    facts = vocabulary(tokenizer)
    model: Any = _start(config, tokenizer)
    model.to(device)
    longest = model.config.max_position_embeddings
    if data.crop > longest:
        raise UserError(f"data.crop = {data.crop}: expected at most the base's max_positions = {longest}")
    rows = Crops(corpus.split("train"), facts, data)
    validation = Crops(corpus.split("validation"), facts, replace(data, transpose=0)).batch(
        settings.evaluate_rows, np.random.default_rng((seed, 0))
    )
    compiling = _compiles(settings.compile, device)
    folder = Path(config.run.folder) / config.run.name
    stop = held.enter_context(StopRequest())  # before all that takes its time
    if world.lead:
        held.enter_context(prepare(folder, dumps(config), resume=resume, overwrite=overwrite))
    world.sum(0)  # the others wait until the folder is there

    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    precision = pick_precision(settings.precision, device)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    done = Progress()
    last = checkpoint.latest(folder / "checkpoints") if resume else None
    if last is not None:
        model.load_state_dict(load_base(last)[0].state_dict())
        checkpoint.read_state(last, model, optimizer)
        try:
            done = Progress(**parse_json((last / "progress.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"checkpoint {last}: progress.json cannot be read ({error})") from None
        if world.lead:  # whoever wrote it may have been killed at once
            checkpoint.settle(last.parent, done.step, keep=settings.keep_checkpoints)
        else:
            done.loss = 0.0  # the lead holds what all had lost
    forward: Any = model if world.size == 1 else DistributedDataParallel(model)
    forward = torch.compile(forward) if compiling else forward

    def save() -> None:
        (loss,) = world.sum(done.loss)
        if not world.lead:
            return

        def write(target: Path) -> None:
            save_base(model, tokenizer, target)
            checkpoint.write_state(target, model, optimizer)
            progress = json.dumps(asdict(replace(done, loss=loss)))
            (target / "progress.json").write_text(progress, encoding="utf-8")

        if report:
            report.run.flush(done.step)  # no checkpoint is ahead of the metrics
        checkpoint.save(folder / "checkpoints", done.step, write, keep=settings.keep_checkpoints)

    with contextlib.ExitStack() as opened:
        report = None
        if world.lead:
            report = Report(config, folder, soundfont, model, tokenizer, start=done.step, device=device)
            opened.enter_context(report)
            report.run.say(
                f"{folder}: {sum(weights.numel() for weights in model.parameters()):,} parameters on {device}"
                f"{f' and {world.size - 1} more' if world.size > 1 else ''}, "
                f"{corpus.split('train').tokens:,} tokens to learn from, from step {done.step}"
            )
        began, since = time.perf_counter(), done.step
        while done.step < settings.steps and done.waited < settings.patience:
            rate = learning_rate(done.step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # every process draws the whole batch, so that all know how many targets it has, and learns from its share
            batch = rows.batch(settings.batch, np.random.default_rng((seed, 1 + done.step)))
            mine = batch[world.rank :: world.size].to(device)
            model.train()
            with autocast:
                loss = next_token_loss(forward, mine, facts.pad_id, reduction="sum") / count_targets(
                    batch, facts.pad_id
                )
            optimizer.zero_grad(set_to_none=True)
            (loss * world.size).backward()  # gradients of several processes are averaged
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm).item()
            model.eval()
            if not math.isfinite(norm):  # as it is where the loss is not, in whichever process
                raise click.ClickException(
                    f"step {done.step + 1}: loss {loss.item():g}, gradient norm {norm:g}: stopped before the weights "
                    f"were spoiled; the last good checkpoint is {checkpoint.latest(folder / 'checkpoints')}; "
                    "try a lower optimisation.learning_rate"
                )
            optimizer.step()
            done.step, done.loss, done.steps = done.step + 1, done.loss + loss.item(), done.steps + 1
            if report:
                report.tick(loss.item() * world.size, done.best)
            stopping = world.any(bool(stop.requested))
            if done.step % settings.evaluate_every == 0 or done.step == settings.steps:
                with autocast:
                    value = evaluate(forward, validation, facts.pad_id, settings.batch, world)
                (loss_sum,) = world.sum(done.loss)
                better = value < done.best
                if report:
                    spent = time.perf_counter() - began
                    report.evaluated(
                        done.step,
                        {
                            "loss": loss_sum / done.steps,
                            "validation_loss": value,
                            "validation_perplexity": math.exp(value),
                            "learning_rate": rate,
                            "gradient_norm": norm,
                            "tokens": float(done.step * settings.batch * data.crop),
                            "tokens_per_second": (done.step - since) * settings.batch * data.crop / spent,
                        },
                    )
                    if better:
                        _keep_best(folder, done.step, model, tokenizer)
                done.waited = 0 if better else done.waited + 1
                done.best, done.loss, done.steps = min(value, done.best), 0.0, 0
                save()
                began, since = time.perf_counter(), done.step
            elif stopping:
                save()
            if stopping and done.step < settings.steps:
                if report:
                    report.run.say(f"stopped; to go on: python -m smart.pretrain --config {folder / CONFIG} --resume")
                raise SystemExit(128 + (stop.requested or signal.SIGTERM))
        if report:
            report.run.say(f"best validation loss {done.best:.4f}; the base is in {folder / 'base'}")
    return folder


class Report:
    """What the lead writes and shows while it trains; use it as a context manager."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        soundfont: Path,
        model: Any,
        tokenizer: Any,
        *,
        start: int,
        device: torch.device,
    ) -> None:
        render, self.config, self.folder, self.tokenizer = config.render, config, folder, tokenizer
        self.model, self.facts = model, vocabulary(tokenizer)
        # one for all evaluations: on CUDA each captures a graph, and holds its cache
        self.sampler = Sampler(model, pad_id=self.facts.pad_id, eos_id=self.facts.eos_id)
        with contextlib.ExitStack() as opened:
            self.run = opened.enter_context(Tracker(folder, start=start))
            pool = open_renderer(
                render.backend,
                soundfont,
                sample_rate=render.sample_rate,
                seconds=render.seconds,
                workers=1,
                device=device,
            )
            opened.enter_context(pool)
            self.pool: Renderer = pool
            self.bar = opened.enter_context(progress(total=config.optimisation.steps, initial=start, unit="step"))
            self._opened = opened.pop_all()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def tick(self, loss: float, best: float) -> None:
        """One step is done."""
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", best=f"{best:.3f}")

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics, the curves and some samples of ``step``."""
        metrics = metrics | self._sample(step)
        self.run.metrics(step, metrics)
        self.run.say(
            f"step {step}: loss {metrics['loss']:.4f}, validation {metrics['validation_loss']:.4f} (perplexity "
            f"{metrics['validation_perplexity']:.2f}), {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        curves(self.folder, ("loss", "validation_loss"), "nats a token")

    def _sample(self, step: int) -> dict[str, float]:
        """Pieces for the same prompts and seed each time: how many are music, and some as MIDI and WAV."""
        settings, render, seed = self.config.optimisation, self.config.render, self.config.run.seed
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
                self.run.listen(f"samples/{step:08d}/{index:02d}", score, audio, render.sample_rate)
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


@run_command(default="base.toml")
def main(path: str, overrides: tuple[str, ...], resume: bool, overwrite: bool) -> None:
    """Train a base model on a tokenised corpus."""
    train(load(path, overrides, schema=PretrainConfig), resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    main()
