"""Group relative policy optimization (GRPO, Shao et al. 2024) of a music model, rewarded for how it sounds.

For each prompt q the policy writes a group of G completions o_1 .. o_G; each is rendered, rated with r_i, and compared
with its own group:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                 std over the group, ddof 1

    L = - 1/|O| sum_i sum_t [ min(rho_it A_i, clip(rho_it, 1-c, 1+c) A_i) - beta KL_it ]

    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)                  ratio to the policy that sampled
    KL_it  = pi_ref/pi - log(pi_ref/pi) - 1 >= 0                            k3 estimator, to the frozen base
    |O|    = number of completion tokens of the batch, each completion's first end-of-sequence token included

How this differs from its sources, and why:
- The paper prints (r_i + mean(r)) / std(r); the plus is a misprint.
- Its equation 1 shows no clip. The clip is there for ``inner_epochs`` > 1: with one step a batch, drawn by the policy
  that takes it, rho is 1.
- pi_old is the distribution that the tokens were drawn from, as the sampler reports it, not a second forward pass.
  With top-k or top-p that is the truncated distribution; with neither, both agree to rounding (``policy/dlogp_max``).
- With ``rollouts_ahead`` = 1 the next batch is drawn before this one is learnt from, so that this one's clips are
  rendered meanwhile: from the second iteration on pi_old is the policy as it was one iteration ago. The clip is then
  around pi_start, the policy as this update found it, and a token's gain is weighted by pi_start/pi_old, 2 at most
  (the decoupled objective of Hilton et al. 2022): a clip around pi_old would undo a part of the update before.
- A completion that could not be rated has reward NaN: it is left out of its group's mean and std, has advantage 0,
  and is counted. It is never rated 0.
- One loss, with two choices: how it is averaged (``average``) and whether advantages are divided by the group's
  standard deviation (``scale``; "none" with "constant" is Dr. GRPO).

Axes: B prompts, G completions a prompt, N = B x G sequences, P prompt length, T completion length, V vocabulary.

    python -m smart.grpo --config quickstart.toml
"""

import contextlib
import copy
import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors.torch import save_file

from smart import Failure, UserError, distributed, require
from smart.config import Config, Grpo, RewardConfig, dumps, load
from smart.corpus import Corpus
from smart.distributed import World
from smart.files import replace_files
from smart.guard import Guard, HeldOut, Judge, alikeness
from smart.model import find_base, load_base, pick_device, pick_precision, save_base
from smart.plots import curves, timeline
from smart.prompts import Pieces, draw
from smart.render import check_soundfont, find_soundfont, open_renderer
from smart.render.bank_pool import BankPool
from smart.reward import Reward, load_reward
from smart.rollout import Clips, Scorer, completion_metrics, gather_rollout, together
from smart.run import (
    CONFIG,
    Onlooker,
    StopRequest,
    Stopwatch,
    Tracker,
    check_packages,
    checkpoint,
    prepare,
    progress,
    run_command,
    summarise,
)
from smart.sampler import Rollout, Sampler
from smart.tokens import build_grammar, decode, vocabulary
from smart.workers import usable_cores

MOST_WEIGHT = 2.0  # of a token that an older policy drew
AHEAD = "ahead.safetensors"  # in a checkpoint: what was drawn ahead


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4
) -> torch.Tensor:
    """How much better than its group each completion is: (N,) from rewards (N,), group after group.

    ``scale`` "group" divides by the group's standard deviation (ddof 1) plus ``eps``, "none" does not. Rewards that
    are not finite are left out of the statistics and get advantage 0, as does the only rated member of a group.
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards: expected (N,) with N a multiple of {group_size}, got {tuple(rewards.shape)}")
    if scale not in ("group", "none"):
        raise ValueError(f"scale: expected 'group' or 'none', got {scale!r}")
    groups = rewards.view(-1, group_size)  # (B, G)
    rated = groups.isfinite()
    count = rated.sum(dim=1, keepdim=True)
    mean = groups.where(rated, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (groups - mean).where(rated, 0)
    if scale == "group":
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    return centred.flatten()


def distinct_rewards(rewards: torch.Tensor, alike: torch.Tensor, *, weight: float) -> torch.Tensor:
    """Rewards (N,) with a bonus for being unlike the rest of one's group: r_i + weight (1 - mean of k_ij over j != i).

    ``alike`` (B, G, G) holds k, 0 to 1, of each group's members, N = B x G. An expected k is of two completions of one
    policy, so the gradient of these rewards is that of E[r] + weight/2 Q, where Q = E[1 - k(o, o')] is Rao's quadratic
    entropy (Rao 1982, "Diversity and dissimilarity coefficients"). Members that are all equally alike get what plain
    GRPO gives them. DRA-GRPO (Chen et al. 2025) divides rewards by 1 + sum of k_ij instead; ratings of 7 that differ by
    0.3 would be drowned by that. Rewards that are not finite stay so, and are no neighbours of the others.
    """
    if alike.ndim != 3 or alike.shape[1] != alike.shape[2] or alike.shape[:2].numel() != len(rewards):
        raise ValueError(f"alike: expected (B, G, G) for {len(rewards)} rewards, got {tuple(alike.shape)}")
    rated = rewards.view(alike.shape[:2]).isfinite()
    others = rated[:, None, :] & ~torch.eye(alike.shape[1], dtype=torch.bool, device=alike.device)
    mean = alike.where(others, 0).sum(dim=2) / others.sum(dim=2).clamp(min=1)
    return rewards + weight * (1 - mean).flatten()


def completion_logits(
    model: Any, tokens: torch.Tensor, prompt_length: int, *, temperature: float = 1.0
) -> torch.Tensor:
    """Logits (N, T, V) in float32 of the T tokens after the prompt in ``tokens`` (N, P+T), left padding masked."""
    pad = model.config.pad_token_id
    # padding that matters stands in front: nothing looks back at what follows the end of a sequence
    real = (tokens != (-1 if pad is None else pad)).cumsum(dim=1) > 0
    padding = {}
    if not real[:, 0].all():
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        padding = {"attention_mask": real.long(), "position_ids": positions}
    logits = model(input_ids=tokens, use_cache=False, **padding).logits[:, prompt_length - 1 : -1]
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(
    model: Any,
    tokens: torch.Tensor,
    prompt_length: int,
    *,
    temperature: float = 1.0,
    micro_batch: int | None = None,
) -> torch.Tensor:
    """Log-probability (N, T) of every token after the prompt in ``tokens`` (N, P+T), under the full softmax.

    ``micro_batch`` rows at a time (None: all), so that N x T x V numbers never exist at once.
    """
    parts = []
    for rows in tokens.split(micro_batch or len(tokens)):
        logits = completion_logits(model, rows, prompt_length, temperature=temperature)
        parts.append(_gather(logits.log_softmax(dim=-1), rows[:, prompt_length:]))
    return torch.cat(parts)


def _gather(logp: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    return logp.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _logp_and_entropy(logits: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the drawn tokens, and entropy, (N, T) each; one (N, T, V) stays, which the gradient needs."""
    logp = logits.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -logp.exp().mul_(logp).sum(dim=-1)
    return _gather(logp, drawn), entropy


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) for each token (N, T): unbiased and never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
    average: str = "token",
    start_logp: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss above, a scalar, and what it was made of.

    ``logp``, ``old_logp``, ``ref_logp`` are (N, T), of the policy, of the policy that sampled, and of the reference;
    ``advantages`` (N,); ``mask`` (N, T) bool is True on completion tokens. ``average``: "token" over all completion
    tokens of the batch, "sequence" the mean of each sequence's mean, "constant" the sum divided by N x T (Dr. GRPO).
    ``start_logp`` (N, T), of the policy before the update, is given where an older one sampled; None: ``old_logp``.
    Stats, each a mean over completion tokens: kl, ratio, clip_fraction, dlogp_mean = |logp - old_logp|; and dlogp_max.
    """
    if not logp.shape == old_logp.shape == ref_logp.shape == mask.shape or advantages.shape != logp.shape[:1]:
        shapes = [tuple(part.shape) for part in (logp, old_logp, ref_logp, advantages, mask)]
        raise ValueError(f"expected logp, old_logp, ref_logp and mask (N, T) and advantages (N,), got {shapes}")
    log_ratio = (logp - old_logp.detach()).masked_fill(~mask, 0)
    ratio, weighted = log_ratio.exp(), advantages[:, None]
    step = ratio
    if start_logp is not None:
        step = (logp - start_logp).masked_fill(~mask, 0).exp()
        weighted = weighted * (start_logp - old_logp).masked_fill(~mask, 0).exp().clamp(max=MOST_WEIGHT)
    gain = step * weighted
    clipped = step.clamp(1 - clip, 1 + clip) * weighted
    kl = kl_k3(logp.masked_fill(~mask, 0), ref_logp.detach().masked_fill(~mask, 0))
    loss = (beta * kl - torch.minimum(gain, clipped)).masked_fill(~mask, 0)
    tokens = mask.sum().clamp(min=1)
    stats = {
        "kl": (kl.detach().sum() / tokens).item(),
        "ratio": (ratio.detach().masked_fill(~mask, 0).sum() / tokens).item(),
        "clip_fraction": ((clipped < gain) & mask).sum().item() / tokens.item(),
        "dlogp_mean": (log_ratio.detach().abs().sum() / tokens).item(),
        "dlogp_max": log_ratio.detach().abs().max().item() if log_ratio.numel() else 0.0,
    }
    if average == "token":
        return loss.sum() / tokens, stats
    if average == "sequence":
        return (loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean(), stats
    if average == "constant":
        return loss.sum() / mask.numel(), stats
    raise ValueError(f"average: expected 'token', 'sequence' or 'constant', got {average!r}")


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    ref_logp: torch.Tensor,
    advantages: torch.Tensor,
    settings: Grpo,
    *,
    temperature: float = 1.0,
    autocast: torch.autocast,
    behind: bool = False,
    world: World | None = None,
) -> dict[str, float]:
    """``inner_epochs`` optimiser steps on one batch, in micro-batches whose size does not change the gradient.

    ``behind`` says that an older policy drew the batch: the clip is then around the policy as it is now. Each process
    of ``world`` (None: this one alone) has the whole batch, learns from its share of the rows, and steps on the sum of
    all gradients. Returns the stats of the first epoch (before any step) and the last ``grad_norm`` before clipping.
    Raises ``FloatingPointError`` before a step when the loss or the gradient is not finite.
    """
    tokens, mask, old_logp = rollout
    world = world or World(tokens.device)
    length = mask.shape[1]
    first: dict[str, float] = {}
    norm = math.nan
    start_logp = torch.zeros_like(old_logp) if behind else None
    for epoch in range(settings.inner_epochs):
        optimizer.zero_grad(set_to_none=True)
        stats: dict[str, float] = {}
        for rows in torch.tensor(world.share(len(tokens)), device=tokens.device).split(settings.micro_batch):
            with autocast:
                logits = completion_logits(policy, tokens[rows], tokens.shape[1] - length, temperature=temperature)
            logp, entropy = _logp_and_entropy(logits, tokens[rows, -length:])
            del logits  # (n, T, V), before the gradient takes as much again
            if start_logp is not None and not epoch:
                start_logp[rows] = logp.detach()
            loss, parts = grpo_loss(
                logp,
                old_logp[rows],
                ref_logp[rows],
                advantages[rows],
                mask[rows],
                clip=settings.clip,
                beta=settings.beta,
                average=settings.average,
                start_logp=None if start_logp is None else start_logp[rows],
            )
            token_share = (mask[rows].sum() / mask.sum()).item()
            share = token_share if settings.average == "token" else len(rows) / len(tokens)
            (loss * share).backward()
            parts |= {"loss": loss.item() * share / token_share, "entropy": entropy[mask[rows]].mean().item()}
            dlogp = max(parts.pop("dlogp_max"), stats.get("dlogp_max", 0.0))
            stats = {key: stats.get(key, 0.0) + value * token_share for key, value in parts.items()}
            stats["dlogp_max"] = dlogp
        world.sum_gradients(policy.parameters())
        dlogp = max(world.gather(stats.pop("dlogp_max")))
        stats = dict(zip(stats, world.sum(*stats.values()), strict=True)) | {"dlogp_max": dlogp}
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm).item()
        if not math.isfinite(stats["loss"]) or not math.isfinite(norm):
            found = ", ".join(f"{key} {value:g}" for key, value in stats.items())
            raise FloatingPointError(
                f"epoch {epoch + 1} has gradient norm {norm:g}, {found}; try a lower grpo.learning_rate"
            )
        optimizer.step()
        first = first or stats
    return first | {"grad_norm": norm}


class Parts(NamedTuple):
    """What a run needs from outside, found before any work starts."""

    base: Path
    soundfont: Path
    reward: Reward
    judge: Reward | None  # of held-out completions, where it is a reward of its own
    pieces: Pieces | None  # for prompts of kind "dataset"
    unseen: Pieces | None  # the same, for held-out prompts


def preflight(config: Config, world: World) -> Parts:
    """Find everything that a run needs. Raises one ``UserError`` that lists all that is missing."""

    def reward(wanted: RewardConfig) -> Reward:
        return load_reward(wanted.kind, weights=wanted.weights or None, device=world.device, **wanted.options)

    def judge() -> Reward | None:
        if config.guard.judge.kind == "auto" or not config.track.held_out_every:
            return None
        return reward(config.guard.judge)

    def soundfont() -> Path:
        path = find_soundfont(config.render.soundfont)
        check_soundfont(path)
        return path

    def pieces(split: str) -> Pieces | None:
        if config.prompts.kind != "dataset":
            return None
        if not config.prompts.corpus:
            raise UserError("prompts.corpus is empty: set it to a folder written by `smart corpus build`")
        return Corpus(Path(config.prompts.corpus)).split(split)

    def unseen() -> Pieces | None:
        if not config.track.held_out_every:
            return None
        split = "train" if config.prompts.split == "validation" else "validation"
        found = pieces(split)
        if found is not None and not len(found):
            raise UserError(f"the corpus has no {split} pieces for held-out prompts: set track.held_out_every = 0")
        return found

    found = require(
        lambda: find_base(config.model.base),
        soundfont,
        lambda: reward(config.reward),
        judge,
        lambda: pieces(config.prompts.split),
        unseen,
        check_packages,
    )
    return Parts(*found[:6])


def open_guard(
    config: Config,
    world: World,
    parts: Parts,
    scorer: Scorer,
    base_logprobs: Callable[[Rollout], torch.Tensor],
    drawing: dict[str, Any],
) -> Guard:
    """What watches the run on held-out prompts: a set of its own, drawn with a generator of its own."""
    every, held_out = config.track.held_out_every, None
    if every:
        seed = config.run.seed + 2**32
        generator = torch.Generator().manual_seed(seed)
        kind, count = config.prompts.kind, config.track.held_out_prompts
        held_out = HeldOut(
            draw(kind, count, scorer.tokenizer, generator, pieces=parts.unseen).to(world.device),
            seed=seed,
            scorer=scorer,
            judge=Judge(parts.reward, parts.judge),
            base_logprobs=base_logprobs,
            world=world,
            drawing=drawing,
        )
    return Guard(held_out, every=every, kl_budget=config.grpo.kl_budget, stop_on_collapse=config.grpo.stop_on_collapse)


def best_whole(guard: Guard, root: Path, say: Callable[[str], None]) -> Path:
    """The best checkpoint in ``root`` that is as it was written; a better one that is damaged is named.

    What the guard has measured of those passed over is forgotten. Raises ``UserError`` where all are damaged.
    """
    while (best := guard.best) is not None:
        folder = root / f"{best:08d}"
        try:
            checkpoint.verify(folder)
            return folder
        except UserError as error:
            if folder.exists():  # not all are kept
                say(f"Warning: {error.message}; taking the next best")
            guard.history = [one for one in guard.history if one.step != best]
    newest = checkpoint.latest(root)
    if newest is None:
        raise UserError(f"{root} holds no checkpoint any more; start anew with --overwrite")
    return newest


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Tune a base by ``config``; returns the folder of the run, whose ``tuned/`` holds the model in the form of a base.

    With ``resume`` it goes on from the last checkpoint, on a CPU exactly. Started by ``torchrun``, each process
    draws, renders and rates whole groups of its own, and learns from them. Raises ``UserError`` for what the user
    can mend and ``Failure`` where training cannot go on.
    """
    with distributed.join(pick_device(config.run.device)) as world, contextlib.ExitStack() as held:
        return _train(config, world, held, resume=resume, overwrite=overwrite)


def _train(config: Config, world: World, held: contextlib.ExitStack, *, resume: bool, overwrite: bool) -> Path:
    parts = preflight(config, world)
    settings, sampling, render, device = config.grpo, config.sampling, config.render, world.device
    if not config.track.held_out_every and (settings.kl_budget or settings.stop_on_collapse):
        raise UserError("grpo.kl_budget and grpo.stop_on_collapse need measurements: set track.held_out_every above 0")
    shared = {"grpo.prompts": settings.prompts, "track.final_prompts": config.track.final_prompts}
    if config.track.held_out_every:
        shared["track.held_out_prompts"] = config.track.held_out_prompts
    for name, count in shared.items():
        if count < world.size:
            raise UserError(f"{name} = {count}: expected at least one for each of {world.size} processes")
    policy, tokenizer = load_base(parts.base, device=device)
    longest = policy.config.max_position_embeddings - 8  # the longest prompt has seven tokens
    if sampling.max_new_tokens > longest:
        raise UserError(f"sampling.max_new_tokens = {sampling.max_new_tokens}: this base has room for {longest}")
    folder = Path(config.run.folder) / config.run.name
    stop = held.enter_context(StopRequest())  # before all that takes its time
    if world.lead:
        held.enter_context(prepare(folder, dumps(config), resume=resume, overwrite=overwrite))
    world.sum(0)  # the others wait until the folder is there

    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=device.type == "cuda")
    generators = {
        "prompts": torch.Generator().manual_seed(config.run.seed),
        "sampler": torch.Generator(device).manual_seed(config.run.seed),
    }
    groups = world.share(settings.prompts)  # this process's part of a batch, and the rows that they are
    rows = slice(groups.start * settings.group_size, groups.stop * settings.group_size)
    done, restored = 0, None
    last = checkpoint.latest(folder / "checkpoints") if resume else None
    if last is not None:
        policy.load_state_dict(load_base(last, device=device)[0].state_dict())
        checkpoint.read_state(last, policy, optimizer, **generators)
        done = int(last.name)
        if (last / AHEAD).is_file():
            try:
                drawn = Rollout(**checkpoint.read_tensors(last / AHEAD)).rows(rows)
            except TypeError as error:
                raise UserError(f"checkpoint {last}: {AHEAD} is not what a run writes ({error})") from None
            restored = Rollout(*(part.to(device) for part in drawn))

    def save(target: Path) -> None:
        save_base(policy, tokenizer, target)
        checkpoint.write_state(target, policy, optimizer, **generators)
        guard.write(target)
        if kept is not None:
            save_file(kept._asdict(), target / AHEAD)

    def prompts(count: int, generator: torch.Generator) -> torch.Tensor:
        return draw(config.prompts.kind, count, tokenizer, generator, pieces=parts.pieces).to(device)

    def base_logprobs(rollout: Rollout) -> torch.Tensor:
        length = rollout.tokens.shape[1] - rollout.mask.shape[1]
        with torch.no_grad(), autocast:
            return token_logprobs(
                reference,
                rollout.tokens,
                length,
                temperature=sampling.temperature,
                micro_batch=settings.micro_batch,
            )

    def listen(name: str, tokens: torch.Tensor, audio: Any) -> None:
        run.listen(name, decode(tokenizer, tokens), audio, render.sample_rate)

    facts, grammar = vocabulary(tokenizer), build_grammar(tokenizer)
    drawn_in = pick_precision(sampling.dtype, device)
    samplers = {
        name: Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id, dtype=drawn_in)
        for name, model in (("base", reference), ("tuned", policy))
    }
    drawing: dict[str, Any] = {
        name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")
    }
    precision = pick_precision(settings.precision, device)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with (
        Tracker(folder, start=done) if world.lead else Onlooker(folder) as run,
        open_renderer(
            render.backend,
            parts.soundfont,
            sample_rate=render.sample_rate,
            seconds=render.seconds,
            workers=render.workers or max(usable_cores() // world.neighbours, 1),
            deadline=render.deadline,
            device=device,
        ) as pool,
        progress(total=settings.iterations, initial=done, unit="iteration", show=world.lead) as bar,
    ):
        scorer = Scorer(
            tokenizer,
            pool,
            parts.reward,
            sample_rate=render.sample_rate,
            seconds=render.seconds,
            deadline=config.reward.deadline,
        )
        guard = open_guard(config, world, parts, scorer, base_logprobs, drawing)
        if last is not None:
            guard.read(last)
            if world.lead:  # whoever wrote it may have been killed at once
                checkpoint.settle(last.parent, done, keep=config.track.keep_checkpoints, best=guard.best)
        watch = Stopwatch()

        def draw_batch() -> tuple[Rollout, Clips]:
            """Have the policy write this process's part of a batch; what has settled is being rendered already."""
            starts = prompts(settings.prompts, generators["prompts"])
            clips = scorer.listen(watch)
            rollout = samplers["tuned"].sample(
                starts[groups.start : groups.stop],
                group_size=settings.group_size,
                generator=generators["sampler"],
                share=(rows.start, settings.prompts * settings.group_size),
                watch=clips.look,
                **drawing,
            )
            clips.finish(rollout)
            return rollout, clips

        def leave() -> NoReturn:
            """End as a signal asked for: what a checkpoint does not hold yet is done again by ``--resume``."""
            run.say(f"stopped; to go on: python -m smart.grpo --config {folder / CONFIG} --resume")
            raise SystemExit(128 + (stop.requested or signal.SIGTERM))

        ahead: tuple[Rollout, Clips] | None = None
        if restored is not None:
            ahead = restored, scorer.listen(watch)
            ahead[1].finish(restored)
        run.say(f"run {folder}: base {parts.base} on {device}, {done} of {settings.iterations} iterations done")
        run.say(f"reward: {parts.reward.provenance}")
        if guard.held_out:
            run.say(f"held-out judge: {guard.held_out.judge.name}")
        if world.any(bool(stop.requested)):
            leave()
        if not done and (measured := guard.look(0, samplers["base"])):
            run.metrics(0, measured)
        for step in range(done + 1, settings.iterations + 1):
            if guard.stop:
                break
            rate = settings.learning_rate * (1 - (step - 1) / settings.iterations)  # linear to 0
            for group in optimizer.param_groups:
                group["lr"] = rate
            watch.restart()
            try:
                rollout, clips = ahead or draw_batch()
                more = settings.rollouts_ahead and step < settings.iterations
                ahead = draw_batch() if more else None  # while the workers render ``clips``
                watch.lap("generate")
                ref_logp = base_logprobs(rollout)  # while the workers render
                watch.lap("reference")
                heard = range(config.track.samples) if step % config.track.samples_every == 0 else range(0)
                rated = clips.rate(keep=[row - rows.start for row in heard])
                left = {}
                if isinstance(pool, BankPool):
                    left["render/fallback_fraction"] = pool.fallback_fraction(clips.futures.values())
                del clips  # and the audio with them, before anything is learnt
                rollout, rated, ref_logp = together(world, rollout, rated, ref_logp, pad_id=facts.pad_id)
                rated.check()
                watch.lap("score")
                optimised = rated.rewards
                if settings.diversity:
                    pieces = [decode(tokenizer, row) for row in rollout.tokens.cpu()]
                    alike = alikeness(pieces, settings.group_size)
                    optimised = distinct_rewards(optimised, alike, weight=settings.diversity)
                advantages = group_advantages(optimised, settings.group_size, scale=settings.scale)
                stats = update(
                    policy,
                    optimizer,
                    rollout,
                    ref_logp,
                    advantages.to(device),
                    settings,
                    temperature=sampling.temperature,
                    autocast=autocast,
                    behind=bool(settings.rollouts_ahead) and step > 1,
                    world=world,
                )
                watch.lap("learn")
            except (FloatingPointError, Failure) as error:
                raise Failure(
                    f"iteration {step} stopped before it changed the weights: {error}. "
                    f"The last good checkpoint is {checkpoint.latest(folder / 'checkpoints')}."
                ) from None

            metrics = {
                **rated.metrics(settings.group_size),
                **{f"policy/{key}": value for key, value in stats.items()},
                "policy/learning_rate": rate,
                **completion_metrics(rollout, facts.eos_id, grammar),
                **left,
                **watch.metrics(),
                **(measured := guard.look(step, samplers["tuned"])),
            }
            run.metrics(step, metrics)
            if measured and guard.collapse:
                run.say(f"iteration {step}: the pieces have become alike: {guard.collapse}")
            if world.lead and config.track.trace_every and step % config.track.trace_every == 0:
                timeline(watch.write(folder / "traces" / f"{step:08d}.json"))
            table = rated.rows(rollout, settings.group_size)
            run.completions(
                row | {"step": step, "advantage": advantage}
                for row, advantage in zip(table, advantages.tolist(), strict=True)
            )
            for row in heard:
                listen(f"samples/{step:08d}/{row:02d}", rollout.tokens[row], rated.audio[row])
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward/mean']:.3f}", kl=f"{stats['kl']:.4f}")
            stopping = world.any(bool(stop.requested))
            saving = bool(
                step % config.track.checkpoint_every == 0
                or step in (settings.iterations, guard.best)
                or guard.stop
                or stopping
            )
            kept = gather_rollout(world, ahead[0], pad_id=facts.pad_id) if saving and ahead else None
            if world.lead and saving:
                run.flush(step)
                checkpoint.save(folder / "checkpoints", step, save, keep=config.track.keep_checkpoints, best=guard.best)
                curves(folder, ("reward/mean",), "reward")
                run.say(
                    f"iteration {step}: reward {metrics['reward/mean']:.3f}, KL {stats['kl']:.4f}, "
                    f"{metrics['seconds/iteration']:.1f} s"
                )
            if stopping:
                leave()

        if guard.stop:
            world.sum(0)  # the best checkpoint is there
            why, best = guard.stop, best_whole(guard, folder / "checkpoints", run.say)
            policy.load_state_dict(load_base(best, device=device)[0].state_dict())
            run.say(f"stopped early: {why}; tuned/ is iteration {int(best.name)}, the best by the held-out judge")

        # base against tuned: fresh samples for the same prompts and from the same seed
        bar.set_description("base against tuned")
        seed = config.run.seed + 2**31
        starts = prompts(config.track.final_prompts, torch.Generator().manual_seed(seed))
        heard, mine = range(min(config.track.final_listen, len(starts))), world.share(len(starts))
        rewards = {}
        for name, sampler in samplers.items():
            if world.any(bool(stop.requested)):
                leave()
            rollout = sampler.sample(
                starts[mine.start : mine.stop],
                generator=torch.Generator(device).manual_seed(seed),
                share=(mine.start, len(starts)),
                **drawing,
            )
            futures = scorer.submit(rollout)
            if world.any(bool(stop.requested)):  # rating many takes long, too
                leave()
            rated = scorer.collect(futures, keep=[row - mine.start for row in heard])
            rollout, rated, _ = together(world, rollout, rated, rollout.logprobs, pad_id=facts.pad_id)
            rewards[name] = rated.rewards[rated.rewards.isfinite()].numpy()
            for row in heard:
                listen(f"final/{row:02d}-{name}", rollout.tokens[row], rated.audio[row])
        if world.lead:
            # one that is there already, of a run that is resumed once more, stays whole
            replace_files(folder / "tuned", partial(save_base, policy, tokenizer), last="model.safetensors")
            curves(folder, ("reward/mean",), "reward")  # whoever wrote the last checkpoint may not have come to it
            run.say(summarise(folder, rewards))
        if parts.reward.is_stand_in:
            run.say(f"{config.reward.kind} is a stand-in, not the aesthetic model: see docs/rewards.md")
    return folder


@run_command(default="quickstart.toml")
def main(path: str, overrides: tuple[str, ...], resume: bool, overwrite: bool) -> None:
    """Tune a base model by how its music sounds."""
    train(load(path, overrides), resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    main()
