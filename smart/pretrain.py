"""Pretraining of a base model: next-token prediction on tokenised music (paper section 3.1).

A training row is ``BOS + piece + EOS``, cropped at random to at most ``crop`` tokens and right-padded; padding is no
target. AdamW with linear warm-up and cosine decay. Every row of every step is drawn from a generator seeded with
(seed, step), so that a run that was killed and resumed sees the same rows in the same order.

    python -m smart.pretrain --config base.toml
"""

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F

from smart import UserError, checkpoint, track
from smart.bank import open_renderer
from smart.config import Data, Optimisation, PretrainConfig, dumps, load
from smart.model import build_model, load_base, pick_device, pick_precision, save_base
from smart.plots import curves
from smart.prompts import Pieces, draw
from smart.render import Renderer, RenderError
from smart.sampler import Sampler
from smart.shards import Corpus
from smart.soundfonts import check_soundfont, find_soundfont
from smart.tokens import Vocabulary, decode, vocabulary


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


def next_token_loss(model: Any, tokens: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Mean negative log-likelihood in nats of ``tokens`` (N, L) but the first; padding is not counted."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=pad_id)


@torch.no_grad()
def evaluate(model: Any, rows: torch.Tensor, pad_id: int, batch: int) -> float:
    """Validation loss: nats a token over all ``rows``."""
    total, count = 0.0, 0
    for part in rows.split(batch):
        targets = int((part[:, 1:] != pad_id).sum())
        total += next_token_loss(model, part.to(model.device), pad_id).item() * targets
        count += targets
    return total / count


def train(config: PretrainConfig, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train a base by ``config``; returns the folder of the run, whose ``base/`` holds the best model so far.

    Raises ``UserError`` for what the user can mend and ``click.ClickException`` where the loss stops being finite.
    """
    settings, data, seed = config.optimisation, config.data, config.run.seed
    track.check_packages()
    if not data.corpus:
        raise UserError("data.corpus is empty: set it to a folder written by `smart corpus build`")
    longest = config.architecture.max_positions
    if data.crop > longest:
        raise UserError(f"data.crop = {data.crop}: expected at most architecture.max_positions = {longest}")
    corpus = Corpus(Path(data.corpus))
    soundfont = find_soundfont(config.render.soundfont)
    check_soundfont(soundfont)
    device = pick_device(config.run.device)
    tokenizer = corpus.tokenizer
    facts = vocabulary(tokenizer)
    rows = Crops(corpus.split("train"), facts, data)
    validation = Crops(corpus.split("validation"), facts, replace(data, transpose=0)).batch(
        settings.evaluate_rows, np.random.default_rng((seed, 0))
    )
    folder = Path(config.run.folder) / config.run.name
    track.prepare(folder, dumps(config), resume=resume, overwrite=overwrite)

    model: Any = build_model(tokenizer, **asdict(config.architecture), seed=seed)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    precision = pick_precision(settings.precision, device)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)

    step, best, waited = 0, math.inf, 0
    last = checkpoint.latest(folder / "checkpoints") if resume else None
    if last is not None:
        model.load_state_dict(load_base(last)[0].state_dict())
        checkpoint.read_state(last, model, optimizer)
        step, best, waited = json.loads((last / "progress.json").read_text(encoding="utf-8"))

    with (
        track.Tracker(folder, start=step) as run,
        open_renderer(
            config.render.backend,
            soundfont,
            sample_rate=config.render.sample_rate,
            seconds=config.render.seconds,
            workers=1,
            device=device,
        ) as pool,
        track.progress(total=settings.steps, initial=step, unit="step") as bar,
    ):
        run.say(
            f"{folder}: {sum(weights.numel() for weights in model.parameters()):,} parameters on {device}, "
            f"{corpus.split('train').tokens:,} tokens to learn from, from step {step}"
        )
        began, losses = time.perf_counter(), []
        while step < settings.steps and waited < settings.patience:
            rate = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = rows.batch(settings.batch, np.random.default_rng((seed, 1 + step))).to(device)
            model.train()
            with autocast:
                loss = next_token_loss(model, batch, facts.pad_id)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm).item()
            model.eval()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]) or not math.isfinite(norm):
                raise click.ClickException(
                    f"step {step + 1}: loss {losses[-1]:g}, gradient norm {norm:g}: stopped before the weights were "
                    f"spoiled; the last good checkpoint is {checkpoint.latest(folder / 'checkpoints')}; "
                    "try a lower optimisation.learning_rate"
                )
            optimizer.step()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", best=f"{best:.3f}")
            if step % settings.evaluate_every and step < settings.steps:
                continue

            with autocast:
                value = evaluate(model, validation, facts.pad_id, settings.batch)
            waited = 0 if value < best else waited + 1
            metrics = {
                "loss": sum(losses) / len(losses),
                "validation_loss": value,
                "validation_perplexity": math.exp(value),
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": float(step * settings.batch * data.crop),
                "tokens_per_second": len(losses) * settings.batch * data.crop / (time.perf_counter() - began),
            }
            run.metrics(step, metrics)
            run.say(
                f"step {step}: loss {metrics['loss']:.4f}, validation {value:.4f} (perplexity "
                f"{metrics['validation_perplexity']:.2f}), {metrics['tokens_per_second']:,.0f} tokens/s"
            )
            curves(folder, ("loss", "validation_loss"), "nats a token")
            _write_samples(run, model, tokenizer, pool, config, step)
            if value < best:
                best = value
                _keep_best(folder, step, model, tokenizer)

            def write(target: Path, progress: tuple[int, float, int] = (step, best, waited)) -> None:
                save_base(model, tokenizer, target)
                checkpoint.write_state(target, model, optimizer)
                (target / "progress.json").write_text(json.dumps(progress), encoding="utf-8")

            checkpoint.save(folder / "checkpoints", step, write, keep=settings.keep_checkpoints)
            began, losses = time.perf_counter(), []
        run.say(f"best validation loss {best:.4f}; the base is in {folder / 'base'}")
    return folder


def _keep_best(folder: Path, step: int, model: Any, tokenizer: Any) -> None:
    """Point ``base`` at a new copy of the model, in one rename."""
    copy = checkpoint.save(folder / "best", step, lambda target: save_base(model, tokenizer, target), keep=2)
    link = folder / ".base.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(copy.relative_to(folder))
    os.replace(link, folder / "base")


def _write_samples(
    run: track.Tracker, model: Any, tokenizer: Any, pool: Renderer, config: PretrainConfig, step: int
) -> None:
    """A few pieces for the same prompts and seed at every evaluation, as MIDI and WAV."""
    count = config.optimisation.samples
    if not count:
        return
    facts = vocabulary(tokenizer)
    prompts = draw("procedural", count, tokenizer, torch.Generator().manual_seed(config.run.seed))
    rollout = Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id).sample(
        prompts,
        max_new_tokens=min(256, config.architecture.max_positions - prompts.shape[1]),
        generator=torch.Generator(model.device).manual_seed(config.run.seed),
    )
    for index, row in enumerate(rollout.tokens.cpu()):
        score = decode(tokenizer, row)
        try:
            audio = pool.submit(score).result()
        except RenderError:
            audio = None  # the MIDI file is written all the same
        run.listen(f"samples/{step:08d}/{index:02d}", score, audio, config.render.sample_rate)


@track.run_command(default="base.toml")
def main(path: str, overrides: tuple[str, ...], resume: bool, overwrite: bool) -> None:
    """Train a base model on a tokenised corpus."""
    train(load(path, overrides, schema=PretrainConfig), resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    main()
