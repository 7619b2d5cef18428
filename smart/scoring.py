"""Tokens -> notes -> audio -> scores: how a completion is heard and rated, the same for every program.

The prompt's tokens and the completion are decoded together (paper section 3.5). A clip that could not be rendered
has NaN for every score; it is counted, and never becomes a 0.
"""

import math
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart.render import Renderer, RenderError
from smart.reward import Reward, resample
from smart.sampler import Rollout
from smart.tokens import Grammar, decode, unplayable

SILENT = 1e-3  # of full scale: a clip that never passes it counts as silent (clips are peak-normalised)


class Rated(NamedTuple):
    """What became of N completions."""

    rewards: torch.Tensor  # (N,) float32, the weighted mean that is optimised; NaN where the clip failed
    scores: dict[str, torch.Tensor]  # axis -> (N,) float32
    audio: list[npt.NDArray[np.float32] | None]  # (2, S) of the rows asked for, else None
    failed: int  # clips that could not be rendered
    silent: int  # clips without a sound

    def metrics(self, group_size: int) -> dict[str, float]:
        """Health of a batch of groups: see docs/metrics.md."""
        rated = self.rewards[self.rewards.isfinite()]
        rated = rated if len(rated) else torch.tensor([math.nan])
        groups = self.rewards.view(-1, group_size)
        spread = groups.nan_to_num(torch.inf).amin(1) < groups.nan_to_num(-torch.inf).amax(1)
        out = {
            "reward/mean": rated.mean().item(),
            "reward/std": rated.std().item() if len(rated) > 1 else 0.0,
            "reward/min": rated.min().item(),
            "reward/max": rated.max().item(),
            "reward/zero_variance_groups": 1 - spread.float().mean().item(),
            "clips/silent_rate": self.silent / len(self.rewards),
            "clips/failed": float(self.failed),
        }
        return out | {f"reward/axis_{axis}": values.nanmean().item() for axis, values in self.scores.items()}

    def rows(self, rollout: Rollout, group_size: int) -> list[dict[str, Any]]:
        """One mapping a completion, for a table: its group, tokens without padding after the end, and scores."""
        prompt_length = rollout.tokens.shape[1] - rollout.mask.shape[1]
        return [
            {
                "group": row // group_size,
                "prompt_length": prompt_length,
                "tokens": tokens[: prompt_length + length].tolist(),
                "reward": self.rewards[row].item(),
                **{axis: values[row].item() for axis, values in self.scores.items()},
            }
            for row, (tokens, length) in enumerate(
                zip(rollout.tokens.cpu(), rollout.mask.sum(dim=1).tolist(), strict=True)
            )
        ]


def completion_metrics(rollout: Rollout, eos_id: int, grammar: Grammar) -> dict[str, float]:
    """Mean length in tokens, share cut off before their end, share of tokens that cannot be played."""
    prompt_length = rollout.tokens.shape[1] - rollout.mask.shape[1]
    ended = (rollout.tokens[:, prompt_length:] == eos_id) & rollout.mask
    bad = unplayable(rollout.tokens, prompt_length, rollout.mask, grammar)
    drawn = rollout.mask.sum()
    return {
        "completions/length": (drawn / len(rollout.mask)).item(),
        "completions/truncated_rate": 1 - ended.any(dim=1).float().mean().item(),
        "completions/unplayable_rate": (bad.sum() / drawn).item(),
    }


class Scorer:
    """Renders completions in ``pool`` and rates them with ``reward``, ``batch`` clips at a time."""

    def __init__(self, tokenizer: Any, pool: Renderer, reward: Reward, *, sample_rate: int, batch: int = 16) -> None:
        self.tokenizer = tokenizer
        self.pool = pool
        self.reward = reward
        self.sample_rate = sample_rate
        self.batch = batch

    def submit(self, rollout: Rollout) -> list[Future[npt.NDArray[np.float32]]]:
        """Start rendering N completions, each with its prompt; returns N futures."""
        return [self.pool.submit(decode(self.tokenizer, row)) for row in rollout.tokens.cpu().numpy()]

    def collect(self, clips: list[Future[npt.NDArray[np.float32]]], *, keep: Iterable[int] = ()) -> Rated:
        """Wait for the clips, in order, and rate them; the audio of the rows in ``keep`` is returned too."""
        kept = set(keep)
        audio: list[npt.NDArray[np.float32] | None] = [None] * len(clips)
        mono: list[torch.Tensor | None] = []  # at the reward's rate: a fifth of the bytes of what was rendered
        for row, clip in enumerate(clips):
            try:
                stereo = clip.result()
            except RenderError:
                mono.append(None)
                continue
            if row in kept:
                audio[row] = stereo
            mono.append(resample(torch.from_numpy(stereo).mean(0), self.sample_rate, self.reward.sample_rate))
        heard = [row for row, wave in enumerate(mono) if wave is not None]
        scores = {axis: torch.full((len(clips),), float("nan")) for axis in self.reward.axes}
        for start in range(0, len(heard), self.batch):
            rows = heard[start : start + self.batch]
            batch = [wave for row in rows if (wave := mono[row]) is not None]
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            lengths = torch.tensor([len(wave) for wave in batch])
            for axis, values in self.reward.score(padded, lengths).items():
                scores[axis][rows] = values.cpu()
        return Rated(
            rewards=self.reward.combine(scores),
            scores=scores,
            audio=audio,
            failed=len(clips) - len(heard),
            silent=sum(bool(wave.abs().amax() < SILENT) for wave in mono if wave is not None),
        )
