"""Group relative policy optimization (GRPO, Shao et al. 2024) of a music model, rewarded for how it sounds.

For each prompt q the policy writes a group of G completions o_1 .. o_G; each is rendered, rated with r_i, and compared
with its own group:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                 over the group; std divides by G - 1

    L = - 1/|O| sum_i sum_t [ min(rho_it A_i, clip(rho_it, 1-c, 1+c) A_i) - beta KL_it ]

    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)                  ratio to the policy that sampled
    KL_it  = pi_ref/pi - log(pi_ref/pi) - 1 >= 0                            "k3" estimate, to the frozen base
    |O|    = number of completion tokens in the batch, end-of-sequence tokens included

How this differs from its sources, and why:
- The SMART paper (Jonason et al. 2025), which this package reproduces, prints (r_i + mean(r)) / std(r); the plus is a
  misprint. Its equation shows no clip: with one step per batch, on the policy that drew it, rho is 1 and the clip never
  acts. It matters for ``inner_epochs`` > 1.
- One loss, two choices. ``average``: "token" as above (TRL, DAPO), "sequence" the mean per completion first (Shao et
  al.), "constant" a divisor that no completion's length changes (Dr. GRPO). ``scale``: whether advantages are divided
  by the group's standard deviation ("none": Dr. GRPO).
- pi_old is the distribution that the tokens were drawn from, as the sampler reports it; there is no second forward
  pass. With top-k or top-p it is the truncated one; without them the two agree to rounding (``policy/dlogp_max``).
- Of several rewards, ``combine`` "sum" compares their weighted mean; "normalised_sum" compares each reward within the
  group, adds these advantages and normalises the sum over the batch (GDPO, Liu et al. 2026).
- A completion that could not be rated has reward NaN: it is left out of its group's mean and std, has advantage 0,
  and is counted. It is never rated 0.
- With ``rollouts_ahead`` = 1 the next batch is drawn before the update, so that workers render it meanwhile: from the
  second iteration on pi_old is the policy of one iteration ago. The bracket then becomes, with s = pi/pi_start and
  w = min(pi_start/pi_old, 2), min(s w A, clip(s) w A) - beta KL (the decoupled objective of Hilton et al. 2022);
  pi_start is the policy before this update. A clip around pi_old would undo a part of the previous update.

Axes: B prompts, G completions per prompt, N = B x G sequences, P prompt length, T completion length, V vocabulary.
``smart.tuning`` does the rest of a run: it finds the parts, renders, rates, logs and saves. Elsewhere you need only the
functions before ``update``, which are plain PyTorch, and those of ``smart.logprobs``.

    python -m smart.grpo --config quickstart.toml
"""

if __name__ == "__main__":  # before torch is imported: --help and a misspelt key are answered at once
    from smart.__main__ import start

    start("grpo")

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from smart.config import Config, Grpo
from smart.distributed import World
from smart.logprobs import completion_logits, logprobs_and_entropy, token_logprobs
from smart.reward import Reward
from smart.sampler import Rollout
from smart.tuning import Tuning

__all__ = [
    "decoupled_advantages",
    "group_advantages",
    "grpo_loss",
    "kl_k3",
    "token_logprobs",
    "token_losses",
    "token_weights",
    "train",
    "update",
]

MAX_IMPORTANCE_WEIGHT = 2.0  # cap on pi_start / pi_old


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4
) -> torch.Tensor:
    """How much better than its group each completion is: (N,) from rewards (N,), those of one prompt adjacent.

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


def decoupled_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, group_size: int, *, eps: float = 1e-4
) -> torch.Tensor:
    """GDPO (Liu et al. 2026): (N,) from K rewards (K, N) with weights (K,), none of which drowns the others.

    A_i = sum over k of w_k times reward k's ``group_advantages``; then (A_i - mean(A)) / (std(A) + eps) over the batch.
    A completion that lacks one of the rewards is left out of all statistics and has advantage 0.
    """
    rated = rewards.isfinite().all(dim=0)
    each = [group_advantages(reward.where(rated, math.nan), group_size, eps=eps) for reward in rewards]
    total = (weights[:, None] * torch.stack(each)).sum(dim=0)
    count = rated.sum()
    centred = (total - total.sum() / count.clamp(min=1)).where(rated, 0)
    return centred / ((centred.square().sum() / (count - 1).clamp(min=1)).sqrt() + eps)


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) per token (N, T): never negative, and unbiased on the policy's own tokens.

    It is k3 of Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1


def token_weights(mask: torch.Tensor, average: str = "token", *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """How much each token counts in the loss: (N, T) from mask (N, T) bool, 0 where the mask is False.

    ``average``: "token", all completion tokens of the batch alike; "sequence", all sequences alike; "constant",
    1 / (N x T) per token, with T the longest completion of this batch (Dr. GRPO fixes T). Weights of a whole batch
    hold for any part of it, so that the losses of micro-batches and processes simply add up.
    """
    counted = mask.to(dtype)
    if average == "token":
        return counted / counted.sum().clamp(min=1)
    if average == "sequence":
        return counted / (len(mask) * counted.sum(dim=1, keepdim=True).clamp(min=1))
    if average == "constant":
        return counted / mask.numel()
    raise ValueError(f"average: expected 'token', 'sequence' or 'constant', got {average!r}")


def token_losses(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
    start_logp: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The bracket of the loss above, negated, for each token (N, T), and its parts for the log, (N, T) each.

    ``logp``, ``old_logp``, ``ref_logp`` are (N, T): under the policy, the policy that sampled, and the reference.
    ``advantages`` (N,); ``mask`` (N, T) bool is True on completion tokens. ``start_logp`` (N, T) is under the policy
    before the update; None: the policy that sampled.
    """
    if not logp.shape == old_logp.shape == ref_logp.shape == mask.shape or advantages.shape != logp.shape[:1]:
        shapes = [tuple(part.shape) for part in (logp, old_logp, ref_logp, advantages, mask)]
        raise ValueError(f"expected logp, old_logp, ref_logp and mask (N, T) and advantages (N,), got {shapes}")
    logp, old_logp, ref_logp = (part.masked_fill(~mask, 0) for part in (logp, old_logp.detach(), ref_logp.detach()))
    start_logp = old_logp if start_logp is None else start_logp.detach().masked_fill(~mask, 0)
    importance = (start_logp - old_logp).exp().clamp(max=MAX_IMPORTANCE_WEIGHT)  # 1 where the policy itself sampled
    weighted_advantages = advantages[:, None] * importance
    ratio = (logp - start_logp).exp()
    plain, clipped = ratio * weighted_advantages, ratio.clamp(1 - clip, 1 + clip) * weighted_advantages
    kl = kl_k3(logp, ref_logp)
    loss = beta * kl - torch.minimum(plain, clipped)
    dlogp = logp - old_logp
    parts = {"kl": kl, "ratio": dlogp.exp(), "clip_fraction": clipped < plain, "dlogp_mean": dlogp.abs()}
    return loss, {name: part.detach() for name, part in parts.items()}


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
    """The loss above, a scalar: ``token_losses`` weighted by ``token_weights``, which explain the arguments.

    This is for a whole batch; ``update`` does the same in micro-batches. Stats, each a mean over completion tokens: kl,
    ratio, clip_fraction, dlogp_mean = |logp - old_logp|; and dlogp_max.
    """
    loss, parts = token_losses(logp, old_logp, ref_logp, advantages, mask, clip=clip, beta=beta, start_logp=start_logp)
    even_weights = token_weights(mask, dtype=loss.dtype)
    stats = {name: (part * even_weights).sum().item() for name, part in parts.items()}
    stats["dlogp_max"] = parts["dlogp_mean"].max().item() if mask.numel() else 0.0
    return (loss * token_weights(mask, average, dtype=loss.dtype)).sum(), stats


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
    stale: bool = False,
    world: World | None = None,
) -> dict[str, float]:
    """``inner_epochs`` optimiser steps on one batch, in micro-batches whose size does not change the gradient.

    ``stale`` says that an older policy drew the batch. Each process of ``world`` (None: this one alone) has the whole
    batch, learns from its share of the rows, and steps on the sum of all gradients. Returns the stats of the first
    epoch, which describe the policy before any step, and the last ``grad_norm`` before clipping. Raises
    ``FloatingPointError`` before a step if the loss or the gradient is not finite.
    """
    tokens, mask, old_logp = rollout
    world = world or World(tokens.device)
    prompt_length = tokens.shape[1] - mask.shape[1]
    weights, even_weights = token_weights(mask, settings.average), token_weights(mask)
    start_logp = old_logp.clone()
    first_stats: dict[str, float] = {}
    norm = math.nan
    for epoch in range(settings.inner_epochs):
        optimizer.zero_grad(set_to_none=True)
        stats: dict[str, float] = defaultdict(float)
        dlogp_max = 0.0
        for rows in torch.tensor(world.share(len(tokens)), device=tokens.device).split(settings.micro_batch):
            with autocast:
                logits = completion_logits(policy, tokens[rows], prompt_length, temperature=temperature)
            logp, entropy = logprobs_and_entropy(logits, tokens[rows, prompt_length:])
            del logits  # (n, T, V), before the gradient takes as much again
            if stale and epoch == 0:  # no step has been taken yet
                start_logp[rows] = logp.detach()
            loss, parts = token_losses(
                logp, old_logp[rows], ref_logp[rows], advantages[rows], mask[rows],
                clip=settings.clip, beta=settings.beta, start_logp=start_logp[rows],
            )  # fmt: skip
            weighted = (loss * weights[rows]).sum()
            weighted.backward()
            stats["loss"] += weighted.item()
            for name, part in (*parts.items(), ("entropy", entropy)):
                stats[name] += (part * even_weights[rows]).sum().item()
            dlogp_max = max(dlogp_max, parts["dlogp_mean"].max().item())
        world.sum_gradients(policy.parameters())
        total = dict(zip(stats, world.sum(*stats.values()), strict=True))
        total["dlogp_max"] = max(world.gather(dlogp_max))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm).item()
        if not math.isfinite(total["loss"]) or not math.isfinite(norm):
            found = ", ".join(f"{name} {value:g}" for name, value in total.items())
            raise FloatingPointError(
                f"epoch {epoch + 1} has gradient norm {norm:g}, {found}; try a lower grpo.learning_rate"
            )
        optimizer.step()
        first_stats = first_stats or total
    return first_stats | {"grad_norm": norm}


def train(config: Config, *, reward: Reward | None = None, **opening: bool) -> Path:
    """Tune a base by ``config``; returns the folder of the run, whose ``tuned/`` has the same format as a base.

    ``reward`` replaces the configured one. ``opening`` are flags of ``Tuning``: with ``resume`` the run continues from
    its last checkpoint, on a CPU exactly; ``overwrite`` replaces a run of that name. Started by ``torchrun``, each
    process draws, renders and rates its share of the groups, and learns from its share of the batch. Raises
    ``UserError`` for a mistake that the user can correct, ``Failure`` if training cannot continue.
    """
    settings = config.grpo
    with Tuning(config, reward=reward, **opening) as run:
        for step in run.steps():
            for parameters in run.optimizer.param_groups:
                parameters["lr"] = settings.learning_rate * (1 - (step - 1) / settings.iterations)  # linear to 0
            # 1. sample: the policy writes G completions per prompt; workers render each once its audio is settled
            drawn = run.draw(step)
            # 2. meanwhile: how likely the frozen base finds these completions
            ref_logp = run.reference_logprobs(drawn)
            # 3. rate each clip when it arrives, then gather: every process gets the whole batch
            batch = run.rate(step, drawn, ref_logp)
            # 4. compare each completion with its group
            if settings.combine == "sum":
                advantages = group_advantages(run.rewards(batch), settings.group_size, scale=settings.scale)
            else:
                advantages = decoupled_advantages(*run.each_reward(batch), settings.group_size)
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
                stale=drawn.stale,
                world=run.world,
            )
            # 6. measure, log, save
            run.record(step, batch, advantages, stats)
        run.finish()
    return run.folder
