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

if __name__ == "__main__":  # before torch is imported: --help and a misspelt key are answered at once
    from smart.__main__ import start

    start("grpo")

import math
from pathlib import Path
from typing import Any

import torch

from smart.config import Config, Grpo
from smart.distributed import World
from smart.logprobs import completion_logits, logprobs_and_entropy, token_logprobs
from smart.reward import Reward
from smart.sampler import Rollout
from smart.tuning import Tuning

__all__ = ["group_advantages", "grpo_loss", "kl_k3", "token_logprobs", "train", "update"]

MOST_WEIGHT = 2.0  # of a token that an older policy drew


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
            logp, entropy = logprobs_and_entropy(logits, tokens[rows, -length:])
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


def train(config: Config, *, reward: Reward | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Tune a base by ``config``; returns the folder of the run, whose ``tuned/`` holds the model in the form of a base.

    ``reward`` replaces the configured one. With ``resume`` the run continues from its last checkpoint, on a CPU
    exactly. Started by ``torchrun``, each process draws, renders and rates whole groups, its share of the batch, and
    learns from them. Raises ``UserError`` for what the user can correct and ``Failure`` where training cannot continue.
    """
    settings = config.grpo
    with Tuning(config, reward=reward, resume=resume, overwrite=overwrite) as run:
        for step in run.steps():
            for group in run.optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - (step - 1) / settings.iterations)  # linear to 0
            # 1. the policy writes G completions of each prompt; workers render what has settled
            drawn = run.draw(step)
            # 2. meanwhile: how likely the frozen base finds them
            ref_logp = run.reference.logprobs(drawn.rollout)
            # 3. rate the clips as they arrive; every process gets the whole batch
            batch = run.rate(step, drawn, ref_logp)
            # 4. compare each completion with its group
            advantages = group_advantages(run.rewards(batch), settings.group_size, scale=settings.scale)
            # 5. learn
            stats = update(
                run.policy,
                run.optimizer,
                batch.rollout,
                batch.ref_logp,
                advantages.to(run.world.device),
                settings,
                temperature=config.sampling.temperature,
                autocast=run.autocast,
                behind=bool(settings.rollouts_ahead) and step > 1,
                world=run.world,
            )
            # 6. measure, log, save
            run.record(step, batch, advantages, stats)
        run.finish()
    return run.folder
