"""One batch of completions, from prompts to rewards: sampled, rendered meanwhile, rated, gathered from all processes.

Training, held-out measurements and the comparison at the end of a run all use ``Batches``.

Axes: B prompts, G completions per prompt, N = B x G sequences, of which this process has n; P prompt length, T
completion length.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from smart.distributed import World
from smart.reward import Reward
from smart.rollout.agreement import Agreement
from smart.rollout.scorer import Clips, Fonts, Rated, Scorer
from smart.run import Stopwatch
from smart.sampler import Rollout, Sampler
from smart.tokens import decode, vocabulary


class Drawn(NamedTuple):
    """This process's share of a batch: sampled, and being rendered."""

    rollout: Rollout  # n rows
    clips: Clips  # n
    first: int  # index of the first row in the whole batch
    stale: bool = False  # an older policy than the one that learns from it sampled it


class Batch(NamedTuple):
    """A whole batch with its ratings, the same in every process."""

    rollout: Rollout  # tokens (N, P+T), mask (N, T), logprobs (N, T)
    rated: Rated  # rewards (N,), scores, audio
    ref_logp: torch.Tensor  # (N, T) log-probabilities under the base; empty where they are not needed


def write(
    sampler: Sampler,
    scorer: Scorer,
    prompts: torch.Tensor,
    *,
    rows: list[int] | None = None,
    stopwatch: Stopwatch | None = None,
    fonts: Sequence[Fonts] | None = None,
    **options: Any,
) -> tuple[Rollout, Clips]:
    """Sample completions of ``prompts`` (B, P); each is submitted for rendering as soon as it has settled.

    Returns the rollout and its clips, of ``rows`` only (None: of all rows). ``fonts`` are those of each clip, where
    there are several. ``options`` go to ``Sampler.sample``.
    """
    clips = Clips(scorer, stopwatch, fonts=fonts)
    if rows is None:
        rollout = sampler.sample(prompts, watch=clips.submit_settled, **options)
    else:
        rollout = sampler.sample(
            prompts, watch=lambda tokens, ended: clips.submit_settled(tokens[rows], ended[rows]), **options
        )
        rollout = Rollout(*(part[rows] for part in rollout))
    clips.submit_rest(rollout)
    return rollout, clips


class Batches:
    """Samples and rates whole batches; each process of ``world`` does its share.

    ``options`` go to ``Sampler.sample``: max_new_tokens, temperature, top_k, top_p. While ``agreement`` is set, it
    checks each batch that is drawn.
    """

    def __init__(self, scorer: Scorer, world: World, **options: Any) -> None:
        self.scorer = scorer
        self.world = world
        self.options = options
        self.agreement: Agreement | None = None

    def draw(
        self,
        sampler: Sampler,
        prompts: torch.Tensor,
        *,
        group_size: int = 1,
        generator: torch.Generator,
        stopwatch: Stopwatch | None = None,
        fonts: Sequence[Fonts] | None = None,
    ) -> Drawn:
        """Sample this process's share of ``group_size`` completions for each of ``prompts`` (B, P).

        ``fonts`` has the soundfonts of each of the B groups, where there are several. All processes together sample the
        same completions as a single process.
        """
        mine = self.world.share(len(prompts))
        first = mine.start * group_size
        attempt = partial(
            write,
            sampler,
            self.scorer,
            prompts[mine.start : mine.stop],
            stopwatch=stopwatch,
            fonts=self.fonts_of_rows(fonts, group_size),
            group_size=group_size,
            generator=generator,
            share=(first, len(prompts) * group_size),
            **self.options,
        )
        rollout, clips = self.agreement.draw(sampler, generator, attempt) if self.agreement else attempt()
        return Drawn(rollout, clips, first)

    def fonts_of_rows(self, fonts: Sequence[Fonts] | None, group_size: int) -> list[Fonts] | None:
        """The soundfonts of this process's clips, from those of all groups; None where there is one soundfont."""
        if fonts is None:
            return None
        mine = self.world.share(len(fonts))
        return [font for font in fonts[mine.start : mine.stop] for _ in range(group_size)]

    def pieces(self, rollout: Rollout, reward: Reward | None) -> list[Any] | None:
        """The pieces of a rollout, complete with what is not heard, if ``reward`` reads notes."""
        if reward is None or not reward.reads_notes:
            return None
        return [decode(self.scorer.tokenizer, row) for row in rollout.tokens.cpu()]

    def rate(self, drawn: Drawn, ref_logp: torch.Tensor | None = None, *, keep: Iterable[int] = ()) -> Batch:
        """Rate the clips as they arrive, then gather the whole batch.

        ``ref_logp`` (n, T) holds the log-probabilities of the rollout's tokens under the base, which are gathered with
        the rest. Audio is kept only for the rows in ``keep``, which are indices into the whole batch.
        """
        pieces = self.pieces(drawn.rollout, self.scorer.reward)
        rated = drawn.clips.rate(keep=[row - drawn.first for row in keep], pieces=pieces)
        ref_logp = drawn.rollout.logprobs[:, :0] if ref_logp is None else ref_logp
        if self.world.size == 1:
            return Batch(drawn.rollout, rated, ref_logp)
        return Batch(self.gather(drawn.rollout), _merge(self.world.gather(rated)), self.world.gather_rows(ref_logp))

    def gather(self, rollout: Rollout) -> Rollout:
        """The whole batch from the shares of all processes, by rank, padded to the longest completion."""
        tokens = self.world.gather_rows(rollout.tokens, vocabulary(self.scorer.tokenizer).pad_id)
        return Rollout(tokens, self.world.gather_rows(rollout.mask), self.world.gather_rows(rollout.logprobs))


def _merge(shares: list[Rated]) -> Rated:
    return Rated(
        rewards=torch.cat([share.rewards for share in shares]),
        scores={axis: torch.cat([share.scores[axis] for share in shares]) for axis in shares[0].scores},
        audio=[clip for share in shares for clip in share.audio],
        failed=sum(share.failed for share in shares),
        silent=sum(share.silent for share in shares),
    )
