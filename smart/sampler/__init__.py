"""Sample completions from a Phi-3, many at a time, with the log-probability of each drawn token."""

from smart.sampler.choice import draw, filter_logits
from smart.sampler.sample import Rollout, Sampler

__all__ = ["Rollout", "Sampler", "draw", "filter_logits"]
