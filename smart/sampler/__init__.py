"""Tokens from a Phi-3: many completions at a time, and how likely each drawn token was."""

from smart.sampler.choice import draw, filter_logits
from smart.sampler.sample import Rollout, Sampler

__all__ = ["Rollout", "Sampler", "draw", "filter_logits"]
