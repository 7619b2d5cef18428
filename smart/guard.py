"""Detect over-optimisation during training: held-out completions, a second score, and a rule for collapse.

A reward only approximates what we want. Optimised far enough, a policy exploits what its reward overlooks: the reward
keeps rising while the music gets worse or less varied (Gao, Schulman and Hilton 2023: as the distance from the base
grows, a true score falls behind, then drops). Three measurements show this; training optimises none of them:

- the distance from the base, KL in nats: the price of the reward;
- a second score (``Judge``): other axes, another reward, the same reward through another soundfont, or, if there is
  nothing else, how likely the music is under the base;
- how varied the pieces are (``smart.diversity``), compared with the base's for the same prompts.

``HeldOut`` takes these measurements; ``Guard`` stores them and decides which one is best and when to stop.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart import UserError, diversity
from smart.features import midi_features
from smart.files import parse_json, write_atomically
from smart.logprobs import Reference
from smart.render import Audio, Renderer
from smart.reward import Reward
from smart.reward.mixture import single_parts
from smart.rollout import Batch, Batches, Clips, Drawn, Fonts, Scorer
from smart.sampler import Sampler
from smart.tokens import decode

# the second score where no other is named and every axis of the reward has a weight: the first that is not optimised
JUDGES = ("naturalness_mel", "naturalness")
COMPLETIONS = 4  # per held-out prompt, so that pieces for one prompt can be compared
PLAUSIBILITY = "plausibility"
STATE = "guard.json"  # in a checkpoint

# the measures in the rule for collapse: each is large if pieces differ. Velocities are not among them: even
# with beta 0.04 a policy may come to use few loudness levels (docs/overoptimisation.md)
VARIETY = ("vendi", "vendi_within", "distance", "distinct_4grams", "pitches")
COLLAPSED_SHARE = 0.5  # of the base's value
# far from the base a smaller loss is enough; healthy runs of the quickstart lose as much, but stay under 0.2 nats
FAR_KL, FAR_COLLAPSED_SHARE = 0.25, 0.75  # nats per token; of the base's value
JUDGE_DROP = 0.5  # standard deviations of the base's ratings by the judge


def collapsed(baseline: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Why the pieces of ``now`` count as collapsed, or None.

    The rule: one of ``VARIETY`` is under half of the base's value, or under three quarters with a KL to the base of
    more than 0.25 nats per token. ``baseline`` and ``now`` map names to values for the same prompts, as
    ``HeldOut.measure`` returns them; missing names and values that are not finite are ignored. In training the rule
    must hold at two measurements in a row.
    """
    kl = now.get("kl", math.nan)
    for name in VARIETY:
        before, after = baseline.get(name, math.nan), now.get(name, math.nan)
        if after < COLLAPSED_SHARE * before:
            return f"{name} is {after:.3g}, under half of the base's {before:.3g}"
        if after < FAR_COLLAPSED_SHARE * before and kl > FAR_KL:
            reason = f"{name} is {after:.3g}, under three quarters of the base's {before:.3g}"
            return f"{reason}, at a KL of {kl:.2g} nats per token"
    return None


def judged_lower(baseline: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Why the judge speaks against the pieces of ``now``, or None: its mean rating fell by half a standard deviation.

    The deviation is that of the base's pieces; plausibility, which falls in healthy runs too, has none.
    """
    before, after, deviation = baseline["judge"], now["judge"], baseline.get("judge_std", math.nan)
    if deviation > 0 and before - after > JUDGE_DROP * deviation:
        return f"the judge's rating is {after:.3g}, more than half a standard deviation under the base's {before:.3g}"
    return None


def effective_number(values: npt.NDArray[Any]) -> float:
    """exp of the entropy of the frequencies of ``values`` (N,): k values, equally often, give k; no values give 0."""
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(counts) else 0.0


def variety(
    pieces: list[Any], groups: list[int], audio: list[Audio | None] | None = None, sample_rate: int | None = None
) -> dict[str, float]:
    """The measures that ``collapsed`` uses, and others, by name, for pieces with a group each and their ``audio``."""
    notes = [midi_features(piece) for piece in pieces]
    varied = diversity.summary(pieces, audio, sample_rate, groups)
    return {
        **{name: value for name, value in varied.items() if name != "empty_rate"},
        "pitches": effective_number(np.concatenate([note["pitches"] for note in notes])),
        "velocities": effective_number(np.concatenate([note["velocities"] for note in notes])),
    }


def default_judge(reward: Reward) -> str | None:
    """The kind of the reward that judges where none is named; None if the judge needs no other reward."""
    if unweighted(reward):
        return None
    optimised = {part.reward.name for part in single_parts(reward) if part.weight}
    return next((kind for kind in JUDGES if kind not in optimised), None)


def unweighted(reward: Reward) -> list[str]:
    """The axes of a reward that training does not optimise."""
    return [axis for axis in reward.axes if not reward.weights.get(axis)]


class Judge:
    """A second score for held-out completions that training does not optimise. Higher is better.

    It is ``other``, a second reward; without one, the mean of those axes of ``reward`` that have no weight; if there
    are none, or if ``plausible`` is set, plausibility: the mean log-probability of a completion's tokens under the
    base, in nats per token. ``pool`` renders the pieces for ``other`` with ``soundfont``; without it, ``other`` hears
    what the reward hears.
    """

    def __init__(
        self,
        reward: Reward,
        other: Reward | None = None,
        *,
        deadline: float = math.inf,
        plausible: bool = False,
        pool: Renderer | None = None,
        soundfont: str = "",
    ) -> None:
        self.other = other
        self.deadline = deadline  # seconds per batch of clips that ``other`` rates
        self.pool = pool
        self.axes = [] if plausible else unweighted(reward)
        if other is not None:
            self.name = f"{other.name} ({' '.join(other.weights)})" + (f" through {soundfont}" if soundfont else "")
        elif self.axes:
            self.name = f"the mean of the other axes of {reward.name} ({' '.join(self.axes)})"
        else:
            self.name = "plausibility (mean log-probability per token under the base model)"

    @property
    def rates(self) -> bool:
        """Whether it gives ratings; plausibility is a log-probability."""
        return self.other is not None or bool(self.axes)

    def rate(self, drawn: Drawn, batch: Batch, batches: Batches) -> torch.Tensor:
        """(N,) ratings of ``batch``, NaN for clips that failed; ``drawn`` is this process's share of it."""
        if self.other is not None:
            scorer = batches.scorer
            second = Scorer(
                scorer.tokenizer,
                self.pool or scorer.pool,
                self.other,
                sample_rate=scorer.sample_rate,
                seconds=scorer.horizon.seconds,
                deadline=self.deadline,
            )
            if self.pool is None:
                clips = drawn.clips.in_order()
            else:
                clips = Clips(second).submit_rest(drawn.rollout)
            rated = second.collect(clips, pieces=batches.pieces(drawn.rollout, self.other))
            return torch.cat(batches.world.gather(rated.rewards))
        if self.axes:
            return torch.stack([batch.rated.scores[axis] for axis in self.axes]).mean(0)
        return plausibility(batch)


def optimised_axes(reward: Reward, judge: Judge) -> list[str]:
    """The axes that training optimises and ``judge`` rates as well, with the same soundfont; "kind.axis" each."""
    if judge.other is None or judge.pool is not None:
        return []
    judging = {f"{part.reward.name}.{axis}" for part in single_parts(judge.other) for axis in part.reward.weights}
    return [
        name
        for part in single_parts(reward)
        for axis, weight in part.reward.weights.items()
        if part.weight * weight and (name := f"{part.reward.name}.{axis}") in judging
    ]


def plausibility(batch: Batch) -> torch.Tensor:
    """(N,) mean log-probability of each completion's tokens under the base, in nats per token."""
    mask = batch.rollout.mask
    return ((batch.ref_logp * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu()


class HeldOut:
    """A fixed set of prompts; in each measurement a policy writes ``COMPLETIONS`` pieces for each of them.

    Each measurement uses the same prompts and random numbers, so that two of them differ only by the policy; training's
    random numbers are not affected.
    """

    def __init__(
        self,
        prompts: torch.Tensor,
        *,
        seed: int,
        batches: Batches,
        judge: Judge,
        reference: Reference,
        fonts: Sequence[Fonts] | None = None,
    ) -> None:
        self.prompts = prompts  # (B, P)
        self.seed = seed
        self.batches = batches
        self.judge = judge
        self.reference = reference
        self.fonts = fonts  # of each prompt, the same in each measurement; None: there is one soundfont
        self.batch: Batch | None = None  # what was last measured, kept until its pieces are written

    def measure(self, sampler: Sampler) -> dict[str, float]:
        """The metrics that docs/metrics.md defines under ``held_out/``, by name; the same in every process."""
        generator = torch.Generator(self.prompts.device).manual_seed(self.seed)
        drawn = self.batches.draw(sampler, self.prompts, group_size=COMPLETIONS, generator=generator, fonts=self.fonts)
        base_logp = self.reference.logprobs(drawn.rollout)  # while the workers render
        many = len(self.prompts) * COMPLETIONS
        batch = self.batches.rate(drawn, base_logp, keep=range(many))
        judged = self.judge.rate(drawn, batch, self.batches)
        self.batch = batch
        rollout, rated = batch.rollout, batch.rated
        # not k3 as in the loss: a single token that is very unlikely under the base can multiply the mean k3 by ten
        kl = ((rollout.logprobs - batch.ref_logp) * rollout.mask).sum(1)  # (N,)
        length = rollout.mask.sum(1)
        scorer = self.batches.scorer
        pieces = [decode(scorer.tokenizer, row) for row in rollout.tokens.cpu()]
        groups = [row // COMPLETIONS for row in range(many)]
        return {
            "reward": rated.rewards.nanmean().item(),
            "judge": judged.nanmean().item(),
            **({"judge_std": judged[judged.isfinite()].std().item()} if self.judge.rates else {}),
            "plausibility": plausibility(batch).mean().item(),
            "kl": (kl.sum() / length.sum()).item(),
            "kl_sequence": kl.mean().item(),
            **variety(pieces, groups, rated.audio, scorer.sample_rate),
            "silent_rate": rated.silent / many,
            "length": length.float().mean().item(),
        }


class Measured(NamedTuple):
    """A measurement of the policy after ``step`` iterations (0: the base)."""

    step: int
    values: dict[str, float]


class Guard:
    """All measurements of a run; from them it decides which one is best and whether to stop.

    ``kl_budget`` is in nats per completion token on the held-out prompts (0: none). All decisions depend on ``history``
    alone, so a resumed run decides like one that was never interrupted. Without ``held_out`` nothing is measured.
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
        self.history: list[Measured] = []  # the first is of the base

    def look(self, step: int, sampler: Sampler) -> dict[str, float]:
        """Measure the policy after ``step`` iterations (0: the base), every ``every`` iterations.

        Returns ``held_out/*`` and ``seconds/held_out`` for the run's metrics; empty if nothing was measured.
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
        """Why the last two measurements count as collapsed, or None: little variety, or the judge rates them lower."""
        base = self.history[0].values if self.history else {}
        reasons = [self._collapsed(one) or judged_lower(base, one.values) for one in self.history[-2:]]
        return reasons[-1] if len(reasons) == 2 and all(reasons) else None

    @property
    def stop(self) -> str | None:
        """Why training should end now, or None."""
        if len(self.history) > 1 and self._is_over_budget(self.history[-1]):
            return (
                f"KL to the base is {self.history[-1].values['kl']:.3g} nats per token, the budget {self.kl_budget:g}"
            )
        return self.collapse if self.stop_on_collapse else None

    @property
    def best(self) -> int | None:
        """The step with the highest second score among those within the budget and not collapsed, without the base.

        If there are none, the step closest to the base; None before the first measurement of the policy.
        """
        tuned = self.history[1:]
        if not tuned:
            return None
        sound = [one for one in tuned if not self._is_over_budget(one) and not self._collapsed(one)]
        if not sound:
            return min(tuned, key=lambda one: _finite_or(one.values["kl"], math.inf)).step
        return max(sound, key=lambda one: _finite_or(one.values["judge"], -math.inf)).step

    def write(self, folder: Path) -> None:
        """Write all measurements into a checkpoint."""
        write_atomically(folder / STATE, json.dumps(self.history).encode())

    def read(self, folder: Path) -> None:
        """Read all measurements from a checkpoint. Raises ``UserError`` if they cannot be read."""
        try:
            rows = parse_json((folder / STATE).read_text(encoding="utf-8"))
            self.history = [Measured(int(step), dict(values)) for step, values in rows]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"checkpoint {folder}: {STATE} cannot be read ({error})") from None

    def _is_over_budget(self, measured: Measured) -> bool:
        return bool(self.kl_budget) and measured.values["kl"] >= self.kl_budget

    def _collapsed(self, measured: Measured) -> str | None:
        return collapsed(self.history[0].values, measured.values)


def _finite_or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise
