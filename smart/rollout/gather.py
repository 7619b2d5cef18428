"""The whole batch, of which each process has a part."""

import torch

from smart.distributed import World
from smart.rollout.scorer import Rated
from smart.sampler import Rollout


def gather_rollout(world: World, rollout: Rollout, *, pad_id: int) -> Rollout:
    """The whole batch, of which each process has a part; padded to the longest completion."""
    tokens = world.gather_rows(rollout.tokens, pad_id)
    return Rollout(tokens, world.gather_rows(rollout.mask), world.gather_rows(rollout.logprobs))


def together(
    world: World, rollout: Rollout, rated: Rated, ref_logp: torch.Tensor, *, pad_id: int
) -> tuple[Rollout, Rated, torch.Tensor]:
    """The whole batch, of which each process has a part; ``ref_logp`` is (N, T) like the rollout's log-probabilities.

    Every process gets the same, in the order of the ranks, padded to the longest completion, on its own device.
    """
    if world.size == 1:
        return rollout, rated, ref_logp
    ratings = world.gather(rated)
    whole = Rated(
        rewards=torch.cat([part.rewards for part in ratings]),
        scores={axis: torch.cat([part.scores[axis] for part in ratings]) for axis in rated.scores},
        audio=[clip for part in ratings for clip in part.audio],
        failed=sum(part.failed for part in ratings),
        silent=sum(part.silent for part in ratings),
    )
    return gather_rollout(world, rollout, pad_id=pad_id), whole, world.gather_rows(ref_logp)
