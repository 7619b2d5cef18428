"""``Mixture``: several rewards that are optimised together, each with a weight and, if it has one, a target.

A piece earns min(r_k, t_k) of reward k: past its target t_k nothing more is earned. The value to optimise is the mean
over rewards, weighted by w_k; ``grpo.combine`` may instead compare each reward within its group before adding.

Axes: K rewards, N clips in groups of G.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from smart import UserError, require
from smart.gpu import exact
from smart.reward import load_reward
from smart.reward.reward import Reward


class Part(NamedTuple):
    """One of several rewards."""

    name: str
    reward: Reward
    weight: float = 1.0  # in the mean; 0: it is rated and logged, but not optimised
    target: float = math.inf  # of ``reward.combine``
    deadline: float = math.inf  # seconds per batch of clips


class Mixture(Reward):
    """Several rewards as one: its axes are "part.axis", and ``combine`` is the weighted mean, limited by the targets.

    A clip that one of the rewards with a weight could not rate is NaN. The parts rate clips one by one
    (``smart.rollout.Scorer``): each has its own sample rate, and some rate notes.

    Raises ``UserError`` if two parts have the same name, or if no part has a weight.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        names = [part.name for part in parts]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f'two rewards are called "{name}"; give one of them another name, as in name = "{name}-2"'
                )
            if not name or not name.replace("-", "_").isidentifier():
                raise UserError(f"reward name {name!r}: expected letters, digits, - and _")
        if not any(part.weight for part in parts):
            raise UserError("every reward has weight 0; expected a weight above 0 for at least one of them")
        self.parts = tuple(parts)
        self.axes = tuple(f"{part.name}.{axis}" for part in parts for axis in part.reward.axes)
        self.sample_rate = parts[0].reward.sample_rate
        super().__init__(device=parts[0].reward.device)
        self.name = "+".join(part.name for part in parts)
        self.together = max(part.reward.together for part in parts)
        self.reads_notes = any(part.reward.reads_notes for part in parts)
        self.is_stand_in = any(part.reward.is_stand_in for part in parts)
        self.provenance = "; ".join(map(_described, parts))
        self.weights = {
            f"{part.name}.{axis}": part.weight * weight
            for part in parts
            for axis, weight in part.reward.weights.items()
            if part.weight * weight
        }

    @property
    def part_weights(self) -> torch.Tensor:
        """(K,) float32: the weight of each part."""
        return torch.tensor([part.weight for part in self.parts])

    def values(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(K, N) what each reward gives, without targets; NaN where it could not rate a clip."""
        return torch.stack(
            [
                part.reward.combine({axis: scores[f"{part.name}.{axis}"] for axis in part.reward.axes})
                for part in self.parts
            ]
        )

    def earned(self, scores: Mapping[str, torch.Tensor], group_size: int | None = None) -> torch.Tensor:
        """(K, N) what each reward gives, up to its target.

        With a ``group_size`` G, every member of a group whose mean has reached the target earns the target: the group
        as a whole is as good as it needs to be, so that it has no advantage and the policy is not pulled further.
        """
        values = self.values(scores)
        targets = torch.tensor([part.target for part in self.parts])[:, None]
        earned = values.minimum(targets)  # NaN stays NaN
        if group_size is not None:
            groups = values.view(len(self.parts), -1, group_size)
            arrived = (groups.nanmean(dim=2) >= targets).repeat_interleave(group_size, dim=1)
            earned = torch.where(arrived & values.isfinite(), targets, earned)
        return earned

    def add(self, earned: torch.Tensor) -> torch.Tensor:
        """(N,) the weighted mean of (K, N); a reward with weight 0 does not count."""
        weights = self.part_weights
        counted = weights > 0
        return (weights[counted, None] / weights.sum() * earned[counted]).sum(dim=0)

    def combine(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.add(self.earned(scores))

    def set_weights(self, weights: Mapping[str, float] | None) -> None:
        raise TypeError("the weights of several rewards are those of its parts")

    def metrics(self, scores: Mapping[str, torch.Tensor], group_size: int) -> dict[str, float]:
        """Each reward's metrics as docs/metrics.md defines them, and the correlation of each two within groups."""
        found = {}
        values = self.values(scores)
        for part, rated in zip(self.parts, values, strict=True):
            known = rated[rated.isfinite()]
            name = f"reward/{part.name}"
            found[f"{name}/mean"] = known.mean().item()
            found[f"{name}/std"] = known.std().item() if len(known) > 1 else math.nan
            found[f"{name}/group_std"] = _group_std(rated.view(-1, group_size))
            found[f"{name}/unrated"] = 1 - len(known) / len(rated)
            if math.isfinite(part.target):
                found[f"{name}/at_target"] = (known >= part.target).float().mean().item()
        for (one, a), (other, b) in itertools.combinations(zip(self.parts, values, strict=True), 2):
            found[f"reward/correlation/{one.name}/{other.name}"] = group_correlation(a, b, group_size)
        return found


def single_parts(reward: Reward) -> tuple[Part, ...]:
    """The parts of a ``Mixture``; any other reward is its own only part, without a name."""
    return reward.parts if isinstance(reward, Mixture) else (Part("", reward),)


def _described(part: Part) -> str:
    text = f"{part.name} (weight {part.weight:g}"
    text += f", target {part.target:.4g})" if math.isfinite(part.target) else ")"
    return f"{text}: {part.reward.provenance or part.reward.name}"


def _group_std(groups: torch.Tensor) -> float:
    """Mean over groups (B, G) of the standard deviation of a group's finite members; NaN if no group has two."""
    stds = [row[row.isfinite()].std() for row in groups if row.isfinite().sum() > 1]
    return torch.stack(stds).mean().item() if stds else math.nan


def group_correlation(a: torch.Tensor, b: torch.Tensor, group_size: int) -> float:
    """Pearson correlation of two (N,) after each group's mean is taken away; NaN if one of them never differs."""
    known = (a.isfinite() & b.isfinite()).view(-1, group_size)
    count = known.sum(dim=1, keepdim=True).clamp(min=1)

    def centred(values: torch.Tensor) -> torch.Tensor:
        groups = values.to(exact(values.device)).view(-1, group_size).where(known, 0)
        return (groups - groups.sum(dim=1, keepdim=True) / count).where(known, 0)

    x, y = centred(a), centred(b)
    size = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / size if size > 1e-12 else math.nan


def load_parts(tables: Sequence[Mapping[str, Any]], *, device: str | torch.device) -> list[Part]:
    """The rewards of a configuration, each a table with the keys of ``smart.config.TrainedReward``.

    A target "real" is infinite until ``smart.reward.real`` has found its number. Raises one ``UserError`` that lists
    everything that is missing.
    """
    return require(*(partial(load_part, table, device) for table in tables))


def load_part(table: Mapping[str, Any], device: str | torch.device) -> Part:
    """One reward of a configuration, as ``load_parts``."""
    reward = load_reward(table["kind"], weights=table["weights"] or None, device=device, **table["options"])
    target = math.inf if isinstance(table["target"], str) else table["target"]
    return Part(table["name"] or table["kind"], reward, table["weight"], target, table["deadline"])


def as_one(parts: Sequence[Part], targets: Mapping[str, float] | None = None) -> Reward:
    """A single reward without a target as it is, and anything else as a ``Mixture``.

    ``targets`` replaces the targets of the parts that it names.
    """
    parts = [part._replace(target=(targets or {}).get(part.name, part.target)) for part in parts]
    if len(parts) == 1 and math.isinf(parts[0].target) and parts[0].weight:
        return parts[0].reward
    return Mixture(parts)
