"""Over-optimisation, measured and stopped while a policy trains: held-out completions, a judge, a rule for collapse.

A reward is a stand-in for what is wanted. Pushed far enough, a policy finds what its reward overlooks: the reward goes
on rising while the music gets worse, or more alike (Gao, Schulman and Hilton 2023: with the distance from the base a
true score lags ever further behind, then falls). Three things tell, none of which training optimises:

- the distance from the base, KL in nats: what has been paid for the reward;
- a judge (``Judge``): ratings on other axes, by another reward, or, where there is none, how likely the base finds the
  music;
- how varied the pieces are (``smart.diversity``), against the base's own for the same prompts.

``HeldOut`` measures them, ``Guard`` remembers the measurements and says which is the best and when to stop.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart import UserError, diversity
from smart.distributed import World
from smart.features import midi_features
from smart.files import parse_json, write_atomically
from smart.reward import Reward
from smart.rollout import Rated, Scorer, together
from smart.rollout.scorer import Audio
from smart.sampler import Rollout, Sampler
from smart.tokens import decode, vocabulary

COMPLETIONS = 4  # of each held-out prompt, so that pieces for one prompt can be compared
STATE = "guard.json"  # in a checkpoint

# what the rule for collapse looks at: each is large where pieces differ. Not velocities: with beta 0.04 as well
# a policy may come to use few loudness levels (docs/overoptimisation.md)
VARIETY = ("vendi", "vendi_within", "distance", "distinct_4grams", "pitches")
FEWEST = 0.5  # of the base's own
# far from the base, less is enough. Healthy runs of the quickstart narrow as much, but stay under 0.2 nats
FAR, FEWER = 0.25, 0.75  # nats a token; of the base's own


def collapsed(baseline: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Why the pieces of ``now`` count as collapsed, or None.

    One of ``VARIETY`` is under half of the base's; or under three quarters, with a KL to the base of more than 0.25
    nats a token: what was gained was bought with both. ``baseline`` and ``now`` map names to values, as
    ``HeldOut.measure`` returns them, of pieces for the same prompts; a name that either lacks, or a value that is not
    finite, says nothing. In training the rule must hold at two measurements in a row.
    """
    kl = now.get("kl", math.nan)
    for name in VARIETY:
        before, after = baseline.get(name, math.nan), now.get(name, math.nan)
        if after < FEWEST * before:
            return f"{name} is {after:.3g}, under half of the base's {before:.3g}"
        if after < FEWER * before and kl > FAR:
            reason = f"{name} is {after:.3g}, under three quarters of the base's {before:.3g}"
            return f"{reason}, at {kl:.2g} nats a token from it"
    return None


def effective_number(values: npt.NDArray[Any]) -> float:
    """exp of the entropy of how often each of ``values`` (N,) occurs: k values equally often give k; none give 0."""
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(counts) else 0.0


def variety(
    pieces: list[Any], groups: list[int], audio: list[Audio | None] | None = None, sample_rate: int | None = None
) -> dict[str, float]:
    """All that ``collapsed`` looks at, and more, by name, of pieces with a group each, and of their ``audio``."""
    notes = [midi_features(piece) for piece in pieces]
    varied = diversity.summary(pieces, audio, sample_rate, groups)
    return {
        **{name: value for name, value in varied.items() if name != "empty_rate"},
        "pitches": effective_number(np.concatenate([note["pitches"] for note in notes])),
        "velocities": effective_number(np.concatenate([note["velocities"] for note in notes])),
    }


def alikeness(pieces: list[Any], group_size: int) -> torch.Tensor:
    """(B, G, G) float32 from N = B x G pieces, group after group: how alike the members of each group are, 0 to 1."""
    vectors = [diversity.symbolic_vector(piece) for piece in pieces]
    groups = [vectors[first : first + group_size] for first in range(0, len(vectors), group_size)]
    return torch.from_numpy(np.stack([diversity.kernel(np.stack(group)) for group in groups])).float()


class Judge:
    """Who rates held-out completions beside the reward: someone whose rating is not optimised. Higher is better.

    By order: ``other``, a reward of its own; the mean of those axes of ``reward`` that have no weight; where there is
    no such axis, plausibility, the mean log-probability of a completion's tokens under the base, in nats a token.
    """

    def __init__(self, reward: Reward, other: Reward | None = None) -> None:
        self.other = other
        self.axes = [axis for axis in reward.axes if not reward.weights.get(axis)]
        if other is not None:
            self.name = f"{other.name} ({' '.join(other.weights)})"
        elif self.axes:
            self.name = f"the mean of the other axes of {reward.name} ({' '.join(self.axes)})"
        else:
            self.name = "plausibility (mean log-probability a token under the base)"

    def rate(
        self, clips: list[Future[Audio]], scorer: Scorer, rated: Rated, plausibility: torch.Tensor
    ) -> torch.Tensor:
        """(N,) ratings, NaN where a clip failed; ``rated`` is what ``scorer`` made of ``clips``."""
        if self.other is not None:
            second = Scorer(scorer.tokenizer, scorer.pool, self.other, sample_rate=scorer.sample_rate)
            return second.collect(clips).rewards
        if self.axes:
            return torch.stack([rated.scores[axis] for axis in self.axes]).mean(0)
        return plausibility


class HeldOut:
    """A fixed set of prompts, for which a policy writes ``COMPLETIONS`` pieces each, whenever it is measured.

    Each measurement begins from the same seed: the same prompts and the same random numbers, so that two of them differ
    by the policy alone, and nothing of what training draws is touched. ``base_logprobs`` maps a rollout to the base's
    log-probabilities of its tokens, (N, T); ``drawing`` is for ``Sampler.sample``.
    """

    def __init__(
        self,
        prompts: torch.Tensor,
        *,
        seed: int,
        scorer: Scorer,
        judge: Judge,
        base_logprobs: Callable[[Rollout], torch.Tensor],
        world: World,
        drawing: Mapping[str, Any],
    ) -> None:
        self.prompts = prompts  # (B, P)
        self.seed = seed
        self.scorer = scorer
        self.judge = judge
        self.base_logprobs = base_logprobs
        self.world = world
        self.drawing = drawing

    def measure(self, sampler: Sampler) -> dict[str, float]:
        """All that docs/metrics.md defines under ``held_out/``, by name; every process gets the same."""
        mine = self.world.share(len(self.prompts))
        clips = self.scorer.listen()
        rollout = sampler.sample(
            self.prompts[mine.start : mine.stop],
            group_size=COMPLETIONS,
            generator=torch.Generator(self.prompts.device).manual_seed(self.seed),
            share=(mine.start * COMPLETIONS, len(self.prompts) * COMPLETIONS),
            watch=clips.look,
            **self.drawing,
        )
        futures = clips.finish(rollout)
        base_logp = self.base_logprobs(rollout)  # while the workers render
        plausibility = ((base_logp * rollout.mask).sum(1) / rollout.mask.sum(1).clamp(min=1)).cpu()
        rated = clips.rate(keep=range(len(futures)))
        judged = self.judge.rate(futures, self.scorer, rated, plausibility)
        judged, plausibility = (torch.cat(self.world.gather(part)) for part in (judged, plausibility))
        rollout, rated, base_logp = together(
            self.world, rollout, rated, base_logp, pad_id=vocabulary(self.scorer.tokenizer).pad_id
        )
        # not k3 as in the loss: one token that the base finds very unlikely can make k3 of thousands ten times as large
        kl = ((rollout.logprobs - base_logp) * rollout.mask).sum(1)  # (N,)
        length = rollout.mask.sum(1)
        pieces = [decode(self.scorer.tokenizer, row) for row in rollout.tokens.cpu()]
        groups = [row // COMPLETIONS for row in range(len(pieces))]
        return {
            "reward": rated.rewards.nanmean().item(),
            "judge": judged.nanmean().item(),
            "plausibility": plausibility.mean().item(),
            "kl": (kl.sum() / length.sum()).item(),
            "kl_sequence": kl.mean().item(),
            **variety(pieces, groups, rated.audio, self.scorer.sample_rate),
            "silent_rate": rated.silent / len(pieces),
            "length": length.float().mean().item(),
        }


class Measured(NamedTuple):
    """One measurement, of the policy after ``step`` iterations (0: the base)."""

    step: int
    values: dict[str, float]


class Guard:
    """All measurements of a run, and what follows from them: the best one, and whether to stop.

    ``kl_budget`` is in nats a completion token on the held-out prompts (0: none). Everything follows from ``history``
    alone, so a run that is resumed decides as one that was never interrupted. Without ``held_out`` nothing is measured.
    """

    def __init__(
        self,
        held_out: HeldOut | None,
        *,
        every: int = 1,
        kl_budget: float = 0.0,
        stop_on_collapse: bool = False,
    ) -> None:
        self.held_out = held_out
        self.every = every  # iterations
        self.kl_budget = kl_budget
        self.stop_on_collapse = stop_on_collapse
        self.history: list[Measured] = []  # the first is the base's

    def look(self, step: int, sampler: Sampler) -> dict[str, float]:
        """Measure the policy after ``step`` iterations (0: the base); empty where it is not its turn.

        Returns ``held_out/*`` and ``seconds/held_out``, for the run's metrics.
        """
        if self.held_out is None or step % self.every:
            return {}
        began = time.perf_counter()
        self.history.append(Measured(step, self.held_out.measure(sampler)))
        values = self.history[-1].values | {"collapsed": float(self.collapse is not None)}
        return {f"held_out/{name}": value for name, value in values.items()} | {
            "seconds/held_out": time.perf_counter() - began
        }

    @property
    def collapse(self) -> str | None:
        """Why the last two measurements count as collapsed, or None."""
        reasons = [self._collapsed(measured) for measured in self.history[-2:]]
        return reasons[-1] if len(reasons) == 2 and all(reasons) else None

    @property
    def stop(self) -> str | None:
        """Why training should end now, or None."""
        if len(self.history) > 1 and self._is_over_budget(self.history[-1]):
            return f"KL to the base is {self.history[-1].values['kl']:.3g} nats a token, the budget {self.kl_budget:g}"
        return self.collapse if self.stop_on_collapse else None

    @property
    def best(self) -> int | None:
        """The step that the judge rates highest, of those within the budget and not collapsed, the base left out.

        Where all are beyond, the one that is nearest to the base; None before the first measurement of the policy.
        """
        tuned = self.history[1:]
        if not tuned:
            return None
        sound = [one for one in tuned if not self._is_over_budget(one) and not self._collapsed(one)]
        if not sound:
            return min(tuned, key=lambda one: _or(one.values["kl"], math.inf)).step
        return max(sound, key=lambda one: _or(one.values["judge"], -math.inf)).step

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        write_atomically(folder / STATE, json.dumps(self.history).encode())

    def read(self, folder: Path) -> None:
        """From a checkpoint. Raises ``UserError`` where it cannot be read."""
        try:
            rows = parse_json((folder / STATE).read_text(encoding="utf-8"))
            self.history = [Measured(int(step), dict(values)) for step, values in rows]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"checkpoint {folder}: {STATE} cannot be read ({error})") from None

    def _is_over_budget(self, measured: Measured) -> bool:
        return bool(self.kl_budget) and measured.values["kl"] >= self.kl_budget

    def _collapsed(self, measured: Measured) -> str | None:
        return collapsed(self.history[0].values, measured.values)


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise
