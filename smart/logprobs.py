"""Log-probabilities of completions under a model: of the policy, and of the frozen reference.

Axes: N sequences, P prompt length, T completion length, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch.nn import functional as F

from smart.sampler import Rollout


def completion_logits(
    model: Any, tokens: torch.Tensor, prompt_length: int, *, temperature: float = 1.0
) -> torch.Tensor:
    """Logits (N, T, V) float32 for the T tokens after the prompt in ``tokens`` (N, P+T); left padding is masked.

    The output layer is computed in float32 under any autocast, as in the sampler. In bfloat16 it would cost about as
    much, and log-probabilities would be twice as far from the sampler's: 0.011 instead of 0.005 nats on average.
    """
    pad = model.config.pad_token_id
    # only padding on the left matters: no token attends to what follows the end of its sequence
    real = (tokens != (-1 if pad is None else pad)).cumsum(dim=1) > 0
    padding = {}
    if not real[:, 0].all():
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        padding = {"attention_mask": real.long(), "position_ids": positions}
    hidden = model.model(input_ids=tokens, use_cache=False, **padding).last_hidden_state
    with torch.autocast(tokens.device.type, enabled=False):
        logits = F.linear(hidden.float(), model.lm_head.weight.float())[:, prompt_length - 1 : -1]
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

    The model takes ``micro_batch`` rows at a time (None: all), which bounds the memory for logits.
    """
    parts = []
    for rows in tokens.split(micro_batch or len(tokens)):
        logits = completion_logits(model, rows, prompt_length, temperature=temperature)
        parts.append(_gather(logits.log_softmax(dim=-1), rows[:, prompt_length:]))
    return torch.cat(parts)


def logprobs_and_entropy(logits: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the ``drawn`` tokens (N, T), and entropies (N, T), from ``logits`` (N, T, V).

    Only one tensor (N, T, V) stays in memory, for the gradient.
    """
    logp = logits.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -logp.exp().mul_(logp).sum(dim=-1)
    return _gather(logp, drawn), entropy


def _gather(logp: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    return logp.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


class Reference:
    """A frozen copy of ``model``, the base: the KL term keeps the policy close to it.

    ``autocast`` is the precision of its forward pass, ``micro_batch`` the number of rows that it takes at a time.
    """

    def __init__(self, model: Any, *, temperature: float, micro_batch: int, autocast: torch.autocast) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.temperature = temperature
        self.micro_batch = micro_batch
        self.autocast = autocast

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities (N, T) of the completions' tokens."""
        prompt_length = rollout.tokens.shape[1] - rollout.mask.shape[1]
        with torch.no_grad(), self.autocast:
            return token_logprobs(
                self.model,
                rollout.tokens,
                prompt_length,
                temperature=self.temperature,
                micro_batch=self.micro_batch,
            )
