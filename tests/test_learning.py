"""Training learns: with the real sampler, advantages and update, a toy reward rises from under 0.2 to over 0.8."""

from typing import Any

import torch

from smart.config import Grpo
from smart.grpo import group_advantages, token_logprobs, update
from smart.model import build_model
from smart.prompts import draw
from smart.sampler import Sampler
from smart.tokens import vocabulary

CPU = torch.autocast("cpu", enabled=False)


def test_a_toy_reward_is_learnt(tokenizer: Any) -> None:
    """The reward is the share of 64 pitches among the tokens; an untrained model draws all tokens about equally."""
    facts = vocabulary(tokenizer)
    policy = build_model(tokenizer, layers=2, hidden=32, heads=4, intermediate=64, seed=1)
    reference = build_model(tokenizer, layers=2, hidden=32, heads=4, intermediate=64, seed=1)
    wanted = torch.tensor(facts.pitch_ids[:64])
    settings = Grpo(prompts=4, group_size=8, beta=0.001, micro_batch=32)
    sampler = Sampler(policy, pad_id=facts.pad_id, eos_id=facts.eos_id)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    means = []
    for _ in range(60):
        prompts = draw("procedural", settings.prompts, tokenizer, generator)
        rollout = sampler.sample(prompts, max_new_tokens=24, group_size=settings.group_size, generator=generator)
        completions = rollout.tokens[:, prompts.shape[1] :]
        rewards = (torch.isin(completions, wanted) & rollout.mask).sum(1) / rollout.mask.sum(1)
        means.append(rewards.mean().item())
        with torch.no_grad():
            ref_logp = token_logprobs(reference, rollout.tokens, prompts.shape[1])
        advantages = group_advantages(rewards, settings.group_size)
        update(policy, optimizer, rollout, ref_logp, advantages, settings, autocast=CPU)
    assert means[0] < 0.2, means[0]
    assert sum(means[-5:]) / 5 > 0.8, means[-5:]
