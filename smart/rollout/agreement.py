"""A run checks its own sampler: do sampler and learner agree about log-probabilities on this device?

The sampler decodes with its own network, its cache and, on CUDA, a graph; the learner runs transformers' model over
whole sequences. Both must give the same log-probabilities up to rounding, or the run would learn from wrong ratios.

Axes: N sequences, P prompt length, T completion length.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from smart import Failure
from smart.distributed import World
from smart.logprobs import completion_logits
from smart.rollout.scorer import Clips
from smart.sampler import Rollout, Sampler, filter_logits

# nats per token: rounding stays under a quarter of them, and a defect far exceeds them
BOUNDS = {torch.float32: 0.005, torch.bfloat16: 0.05}
FAR = 10.0  # times the bound: tokens that are so far off are wrong, not rounded,
FEW = 0.01  # if there are more than this share: at the edge of top-k or top-p, rounding may move a few
CAP = 1.0  # nats: what one token counts at most in the mean

Draw = Callable[[], tuple[Rollout, Clips]]


def device_names(world: World) -> str:
    """The names of the devices of all processes, each once, one a line."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "\n".join(sorted(set(world.gather(name))))


class Gap(NamedTuple):
    """How far the sampler's log-probabilities are from the learner's."""

    mean: float  # nats per token
    far: float  # share of tokens that are far off

    def exceeds(self, bound: float) -> bool:
        return not (self.mean <= bound and self.far <= FEW)  # NaN does


class Agreement:
    """Compares the batches of ``samplers`` with the models' own forward pass in the learner's precision.

    ``precision`` is bfloat16 if sampler or learner use it. ``options`` are those of ``Sampler.sample``, of which
    temperature, top_k and top_p are used. ``log`` prints a line.
    """

    def __init__(
        self,
        samplers: Collection[Sampler],
        world: World,
        *,
        autocast: torch.autocast,
        precision: torch.dtype,
        micro_batch: int,
        options: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.samplers = samplers
        self.world = world
        self.autocast = autocast
        self.bound = BOUNDS[precision]
        self.micro_batch = micro_batch
        self.temperature = options.get("temperature", 1.0)
        self.filters = {key: options[key] for key in ("top_k", "top_p") if key in options}
        self.log = log
        self._said = False

    def draw(self, sampler: Sampler, generator: torch.Generator, draw: Draw) -> tuple[Rollout, Clips]:
        """What ``draw()`` gives; it samples with ``sampler`` and ``generator``.

        If the log-probabilities are too far apart, all samplers go step by step from now on, without CUDA graphs, and
        the batch is drawn again from the same random numbers. Raises ``Failure`` if it is too far off then, too.
        """
        state = generator.get_state()
        rollout, clips = draw()
        gap = self._gap(sampler, rollout)
        if not self._too_far(gap):
            if not self._said:
                self.log(f"sampler and learner agree: log-probabilities differ by {gap.mean:.2g} nats per token")
            self._said = True
            return rollout, clips
        self.log(
            f"Warning: {self._complaint(gap)}; sampling step by step from now on, without CUDA graphs, "
            "and drawing the batch again"
        )
        for each in self.samplers:
            each.step_by_step()
        clips.free_audio()
        generator.set_state(state)
        rollout, clips = draw()
        gap = self._gap(sampler, rollout)
        if self._too_far(gap):
            raise Failure(
                f"{self._complaint(gap)}, also without CUDA graphs, so it cannot learn on this device; `smart doctor "
                "--gpu` checks each part, and grpo.precision = 'float32' with sampling.dtype = 'float32', or "
                "run.device = 'cpu', may avoid the defect"
            )
        return rollout, clips

    def _too_far(self, gap: Gap) -> bool:
        """Whether it is in any process: all draw again, or none."""
        return self.world.any(gap.exceeds(self.bound))

    def _complaint(self, gap: Gap) -> str:
        return (
            f"the sampler's log-probabilities differ from the learner's by {gap.mean:.2g} nats per token, and "
            f"{gap.far:.0%} of the tokens are far off (expected at most {self.bound:g} and {FEW:.0%})"
        )

    @torch.no_grad()
    def _gap(self, sampler: Sampler, rollout: Rollout) -> Gap:
        tokens, mask, logprobs = rollout
        length = tokens.shape[1] - mask.shape[1]
        parts = []
        for rows in tokens.split(self.micro_batch):
            with self.autocast:
                logits = completion_logits(sampler.model, rows, length, temperature=self.temperature)
            filtered = filter_logits(logits.flatten(0, 1), **self.filters).view_as(logits)
            parts.append(filtered.log_softmax(-1).gather(-1, rows[:, length:, None])[..., 0])
        apart = (torch.cat(parts) - logprobs).abs().masked_fill(~mask, 0)
        far = apart > FAR * self.bound
        count = int(mask.sum())
        return Gap(apart.clamp(max=CAP).sum().item() / count, far.sum().item() / count)
