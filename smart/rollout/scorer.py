"""Tokens -> notes -> audio -> scores: every program renders and rates completions in this way.

The prompt's tokens and the completion are decoded together (paper section 3.5). A clip that could not be rendered gets
NaN for every score, never 0, and is counted.

Rendering overlaps with sampling, and rating with rendering: a completion is rendered as soon as it has settled
(``Horizon``), while others, and its own inaudible rest, are still being sampled (``Clips``); clips are rated as they
arrive, alone or in small batches (``Scorer.collect``). The results depend neither on when a completion was submitted
nor on the order in which clips arrive, since neighbouring rows form a batch.

Axes: N sequences, P prompt length, T completion length, S audio samples.
"""

import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from smart import Failure, brief
from smart.render import SILENT, Audio, Renderer, RenderError, SeveralRenderers
from smart.reward import NoteReward, Reward, resample
from smart.reward.mixture import Part, single_parts
from smart.rollout.horizon import Horizon
from smart.run import Stopwatch
from smart.sampler import Rollout
from smart.tokens import Grammar, decode, unplayable


class Rated(NamedTuple):
    """The ratings of N completions."""

    rewards: torch.Tensor  # (N,) float32, the weighted mean that is optimised; NaN for clips that failed
    scores: dict[str, torch.Tensor]  # axis -> (N,) float32
    audio: list[Audio | None]  # N clips, (2, S); None for rows whose audio was not asked for or that failed
    failed: int  # number of clips that could not be rendered
    silent: int  # number of silent clips

    def check(self) -> None:
        """Raise ``Failure`` if no clip has a reward, so that there is nothing to learn from."""
        if not self.rewards.isfinite().any():
            unrated = [axis for axis, values in self.scores.items() if not values.isfinite().any()]
            reason = f"{self.failed} of them could not be rendered"
            if 0 < len(unrated) < len(self.scores):  # one of several rewards
                reason += f"; none has a rating of {', '.join(unrated)}"
            raise Failure(f"none of {len(self.rewards)} clips could be rated; {reason}")

    def metrics(self, group_size: int) -> dict[str, float]:
        """The metrics ``reward/*`` and ``clips/*`` of a batch of groups, as defined in docs/metrics.md."""
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
        """One table row per completion: its group, prompt length, tokens without padding at the end, and ratings."""
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
    """Mean length in tokens, share of completions cut off before an end-of-sequence, share of unplayable tokens.

    On the device of the rollout; on the CPU it costs a GPU nothing.
    """
    prompt_length = rollout.tokens.shape[1] - rollout.mask.shape[1]
    ended = (rollout.tokens[:, prompt_length:] == eos_id) & rollout.mask
    bad = unplayable(rollout.tokens, prompt_length, rollout.mask, grammar)
    drawn = rollout.mask.sum()
    return {
        "completions/length": (drawn / len(rollout.mask)).item(),
        "completions/truncated_rate": 1 - ended.any(dim=1).float().mean().item(),
        "completions/unplayable_rate": (bad.sum() / drawn).item(),
    }


def rendered_audio(clip: Future[Audio]) -> Audio | None:
    """The audio of a clip, (2, S), once it has been rendered; None if it could not be."""
    # the error is not caught: its traceback would hold the caller's frame, and so the audio of a whole batch
    return None if isinstance(clip.exception(), RenderError) else clip.result()


Fonts = tuple[int, ...]  # through which soundfonts of a ``SeveralRenderers`` a clip is heard


class Clips:
    """The clips of one batch, which are submitted to the pool of ``scorer`` as their completions settle.

    Show it the batch every few steps while it is sampled (``submit_settled``), and once at the end (``submit_rest``).
    """

    def __init__(
        self, scorer: "Scorer", stopwatch: Stopwatch | None = None, *, fonts: Sequence[Fonts] | None = None
    ) -> None:
        self.scorer = scorer
        self.stopwatch = stopwatch
        self.fonts = fonts  # of each row; None: the pool has one soundfont
        self.futures: dict[int, Future[Audio]] = {}  # by row, through its first soundfont
        self.others: dict[int, list[Future[Audio]]] = {}  # through its other ones

    def submit_settled(self, tokens: torch.Tensor, ended: torch.Tensor) -> None:
        """Submit those rows of ``tokens`` (N, P+t) that have settled or ``ended`` (N,) since the last call."""
        for row in (ended | self.scorer.horizon.settled(tokens)).nonzero()[:, 0].tolist():
            self._submit(row, tokens[row])

    def submit_rest(self, rollout: Rollout) -> list[Future[Audio]]:
        """Submit all remaining rows; returns N futures."""
        tokens = rollout.tokens.cpu()
        for row in range(len(tokens)):
            self._submit(row, tokens[row])
        return self.in_order()

    def in_order(self) -> list[Future[Audio]]:
        """The N futures, by row."""
        return [self.futures[row] for row in range(len(self.futures))]

    def rate(self, *, keep: Iterable[int] = (), pieces: Sequence[Any] | None = None) -> Rated:
        """Rate all clips with ``Scorer.collect``; ratings through several soundfonts are averaged."""
        options: dict[str, Any] = {"stopwatch": self.stopwatch, "pieces": pieces}
        rated = [self.scorer.collect(self.in_order(), keep=keep, **options)]
        for clips in zip(*(self.others.get(row, ()) for row in range(len(self.futures))), strict=True):
            rated.append(self.scorer.collect(clips, **options))
        return self.scorer.average(rated) if len(rated) > 1 else rated[0]

    def free_audio(self) -> None:
        """Free the memory of all clips."""
        self.futures.clear()
        self.others.clear()

    def _submit(self, row: int, tokens: torch.Tensor) -> None:
        if row in self.futures:
            return
        submitted = time.perf_counter()
        piece, pool = decode(self.scorer.tokenizer, tokens), self.scorer.pool
        if self.fonts is None:
            futures = [pool.submit(piece)]
        else:
            assert isinstance(pool, SeveralRenderers)
            futures = [pool.submit(piece, font) for font in self.fonts[row]]
            self.others[row] = futures[1:]
        self.futures[row] = futures[0]
        if self.stopwatch is not None:
            # not a method of Clips: a reference cycle would keep the audio until the next full garbage collection
            for future in futures:
                future.add_done_callback(partial(self.scorer.note_rendering, self.stopwatch, submitted))


class Scorer:
    """Has completions rendered by ``pool`` and rates them with ``reward``, ``batch`` clips at a time.

    Without ``batch`` it is as many as the reward asks for (``Reward.together``).
    ``sample_rate`` (Hz) and ``seconds`` must be those of the pool; the shorter ``seconds``, the sooner a completion
    settles. Without a ``reward`` completions can be rendered but not rated (``collect``).

    If the reward raises an exception, it becomes a ``smart.Failure`` that names the reward. If the reward needs more
    than ``deadline`` seconds for a batch, the process ends with a message: nothing else stops a computation that
    hangs. A run keeps what it has saved. Of several rewards (``smart.reward.Mixture``) each has its own name and
    deadline there.
    """

    def __init__(
        self,
        tokenizer: Any,
        pool: Renderer,
        reward: Reward | None,
        *,
        sample_rate: int,
        seconds: float = math.inf,
        batch: int | None = None,
        deadline: float = math.inf,
    ) -> None:
        self.tokenizer = tokenizer
        self.pool = pool
        self.reward = reward
        self.sample_rate = sample_rate
        self.horizon = Horizon(tokenizer, seconds=seconds)
        self.batch = batch or (1 if reward is None else reward.together)
        self.busy_until: dict[str, float] = {}  # when each worker finished its last clip (``time.perf_counter``)
        self.deadline = deadline

    def note_rendering(self, stopwatch: Stopwatch, submitted: float, _: Future[Audio]) -> None:
        """Note when a clip was rendered; called in the thread of its worker, which began as soon as it was free."""
        worker, now = threading.current_thread().name, time.perf_counter()
        stopwatch.span("render", max(submitted, self.busy_until.get(worker, 0.0)), now, worker)
        self.busy_until[worker] = now

    def collect(
        self,
        clips: Sequence[Future[Audio]],
        *,
        keep: Iterable[int] = (),
        stopwatch: Stopwatch | None = None,
        pieces: Sequence[Any] | None = None,
    ) -> Rated:
        """Rate N clips as they arrive; audio is kept only for the rows in ``keep``.

        A batch is rated as soon as its last clip has arrived; other batches do not wait for it. A reward that reads
        notes needs the N ``pieces`` of the clips, and rates those whose clips did not fail.
        """
        reward = self.reward
        if reward is None:
            raise ValueError("this scorer has no reward, so it cannot rate clips")
        if pieces is None and reward.reads_notes:
            raise ValueError(f"reward {reward.name} reads notes: expected the pieces of the clips")
        parts = single_parts(reward)
        kept = set(keep)
        stopwatch = stopwatch or Stopwatch()
        audio: list[Audio | None] = [None] * len(clips)
        # at the sample rates of the rewards, so far smaller
        mono: list[dict[int, torch.Tensor] | None] = [None] * len(clips)
        scores = {axis: torch.full((len(clips),), math.nan) for axis in reward.axes}
        awaited = Counter(row // self.batch for row in range(len(clips)))
        rows_of: dict[Future[Audio], list[int]] = {}
        for row, clip in enumerate(clips):
            rows_of.setdefault(clip, []).append(row)
        arrivals = as_completed(rows_of)
        failed = silent = 0
        for _ in rows_of:
            with stopwatch.timed("wait"):
                clip = next(arrivals)
            with stopwatch.timed("rate"):
                for row in rows_of[clip]:
                    stereo = rendered_audio(clip)
                    if stereo is None:
                        failed += 1
                    else:
                        audio[row] = stereo if row in kept else None
                        channel = torch.from_numpy(stereo).mean(0).to(reward.device)
                        rates = {part.reward.sample_rate for part in parts}
                        waves = {rate: resample(channel, self.sample_rate, rate) for rate in rates}
                        silent += bool(waves[reward.sample_rate].abs().amax() < SILENT)
                        mono[row] = waves
                    number = row // self.batch
                    awaited[number] -= 1
                    if not awaited[number]:
                        rows = range(number * self.batch, min((number + 1) * self.batch, len(clips)))
                        for part in parts:
                            with _within(min(self.deadline, part.deadline), f"reward {part.name or reward.name}"):
                                for begin in range(rows.start, rows.stop, part.reward.together):  # as if it were alone
                                    some = range(begin, min(begin + part.reward.together, rows.stop))
                                    _rate(part, mono, some, scores, pieces)
                        for heard in rows:
                            mono[heard] = None  # to free the memory
        return Rated(reward.combine(scores), scores, audio, failed, silent)

    def average(self, rated: Sequence[Rated]) -> Rated:
        """Ratings of the same N pieces through several soundfonts as one: the mean, NaN where one is NaN.

        Audio and the number of silent clips are those of the first; ``failed`` counts the clips of all.
        """
        assert self.reward is not None
        scores = {axis: torch.stack([one.scores[axis] for one in rated]).mean(0) for axis in rated[0].scores}
        failed = sum(one.failed for one in rated)
        return Rated(self.reward.combine(scores), scores, rated[0].audio, failed, rated[0].silent)


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """End the process if the block takes longer than ``seconds``; ``what`` names it in the message.

    This does not work for a computation that never releases the GIL. Time during which the process was suspended
    (Ctrl-Z, a machine that slept) counts as one second at most.
    """
    done = threading.Event()

    def watch() -> None:
        left = seconds
        while left > 0:
            if done.wait(min(left, 1.0)):
                return
            left -= 1.0
        try:
            sys.stderr.write(
                f"Error: {what} gave no answer within {seconds:g} s, so the process ends; what was saved is kept\n"
            )
            sys.stderr.flush()
        finally:  # also if stderr is closed
            os._exit(1)

    if math.isinf(seconds):
        yield
        return
    threading.Thread(target=watch, name="deadline", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _rate(
    part: Part,
    mono: Sequence[dict[int, torch.Tensor] | None],
    rows: range,
    scores: dict[str, torch.Tensor],
    pieces: Sequence[Any] | None,
) -> None:
    """Rate ``rows`` of ``mono`` and write their scores into ``scores``; a clip that failed stays NaN.

    Raises ``Failure`` if the reward does.
    """
    reward = part.reward
    heard = {row: waves[reward.sample_rate] for row in rows if (waves := mono[row]) is not None}
    if not heard:
        return
    try:
        if isinstance(reward, NoteReward):
            assert pieces is not None
            rated = reward.score_notes([pieces[row] for row in heard])
        else:
            padded = torch.nn.utils.rnn.pad_sequence(list(heard.values()), batch_first=True)
            rated = reward.score(padded, torch.tensor([len(wave) for wave in heard.values()]))
    except Exception as error:  # nothing can be learnt without the reward, whatever is wrong with it
        raise Failure(f"reward {part.name or reward.name} failed on {len(heard)} clips ({brief(error)})") from error
    for axis, values in rated.items():
        scores[f"{part.name}.{axis}" if part.name else axis][list(heard)] = values.cpu()
