"""Tokens -> notes -> audio -> scores: how a completion is heard and rated, the same for every program.

The prompt's tokens and the completion are decoded together (paper section 3.5). A clip that could not be rendered
has NaN for every score; it is counted, and never becomes a 0.

Nothing waits that need not: a completion is rendered as soon as it is settled what will be heard of it, while others,
and its own inaudible rest, are still being drawn (``Clips``, ``Horizon``); clips are rated in small batches as they
arrive (``Scorer.collect``). What comes out depends neither on when a completion was submitted nor on the order in which
clips arrive: batches are made of neighbouring rows.
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

import numpy as np
import numpy.typing as npt
import torch

from smart import Failure, brief
from smart.render import Renderer, RenderError
from smart.reward import Reward, resample
from smart.rollout.horizon import Horizon
from smart.run import Stopwatch
from smart.sampler import Rollout
from smart.tokens import Grammar, decode, unplayable

SILENT = 1e-3  # of full scale: a clip that never passes it counts as silent (clips are peak-normalised)
Audio = npt.NDArray[np.float32]  # (2, S)


class Rated(NamedTuple):
    """What became of N completions."""

    rewards: torch.Tensor  # (N,) float32, the weighted mean that is optimised; NaN where the clip failed
    scores: dict[str, torch.Tensor]  # axis -> (N,) float32
    audio: list[npt.NDArray[np.float32] | None]  # (2, S) of the rows asked for, else None
    failed: int  # clips that could not be rendered
    silent: int  # clips without a sound

    def check(self) -> None:
        """Raise ``FloatingPointError`` where not one clip has a reward: there is nothing to learn from."""
        if not self.rewards.isfinite().any():
            raise FloatingPointError(
                f"none of {len(self.rewards)} clips could be rated; {self.failed} of them could not be rendered"
            )

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


class Clips:
    """The clips of one batch, submitted as their completions settle; made by ``Scorer.listen``."""

    def __init__(self, scorer: "Scorer", stopwatch: Stopwatch | None) -> None:
        self.scorer = scorer
        self.stopwatch = stopwatch
        self.futures: dict[int, Future[Audio]] = {}  # by row

    def look(self, tokens: torch.Tensor, ended: torch.Tensor) -> None:
        """Submit the rows of ``tokens`` (N, P+t) that have settled or ``ended`` (N,), and were not before."""
        for row in (ended | self.scorer.horizon.settled(tokens)).nonzero()[:, 0].tolist():
            self._submit(row, tokens[row])

    def finish(self, rollout: Rollout) -> list[Future[Audio]]:
        """Submit all that remain; returns N futures."""
        tokens = rollout.tokens.cpu()
        for row in range(len(tokens)):
            self._submit(row, tokens[row])
        return self.in_order()

    def rate(self, *, keep: Iterable[int] = ()) -> Rated:
        """``Scorer.collect`` of all clips."""
        return self.scorer.collect(self.in_order(), keep=keep, stopwatch=self.stopwatch)

    def forget(self) -> None:
        """Let go of the audio."""
        self.futures.clear()

    def in_order(self) -> list[Future[Audio]]:
        """The clips by row."""
        return [self.futures[row] for row in range(len(self.futures))]

    def _submit(self, row: int, tokens: torch.Tensor) -> None:
        if row in self.futures:
            return
        submitted = time.perf_counter()
        future = self.futures[row] = self.scorer.pool.submit(decode(self.scorer.tokenizer, tokens))
        if self.stopwatch is not None:
            # not a method of this object: a circle would keep the batch's audio until the next full collection
            future.add_done_callback(partial(self.scorer.rendered, self.stopwatch, submitted))


class Scorer:
    """Has completions rendered by ``pool`` and rates them with ``reward``, ``batch`` clips at a time.

    ``sample_rate`` (Hz) and ``seconds`` are those of the pool; the shorter ``seconds``, the sooner a completion is
    settled, and clips must not be longer. Without a ``reward`` it only listens: it cannot ``collect``.

    A reward that raises is ``smart.Failure``, which names it. One that gives no answer within ``deadline`` seconds for
    a batch ends the process with a line that says so: nothing else stops a computation that hangs, and a run keeps
    what it saved.
    """

    def __init__(
        self,
        tokenizer: Any,
        pool: Renderer,
        reward: Reward | None,
        *,
        sample_rate: int,
        seconds: float = math.inf,
        batch: int = 16,
        deadline: float = math.inf,
    ) -> None:
        self.tokenizer = tokenizer
        self.pool = pool
        self.reward = reward
        self.sample_rate = sample_rate
        self.horizon = Horizon(tokenizer, seconds=seconds)
        self.batch = batch
        self.busy_until: dict[str, float] = {}  # of each worker: when it rendered its last clip
        self.deadline = deadline

    def listen(self, stopwatch: Stopwatch | None = None) -> Clips:
        """To be shown a batch while it is drawn (``Clips.look``), and once at its end (``Clips.finish``)."""
        return Clips(self, stopwatch)

    def rendered(self, stopwatch: Stopwatch, submitted: float, _: Future[Audio]) -> None:
        """Called in the thread of the worker that did it, which began when it was free."""
        worker, now = threading.current_thread().name, time.perf_counter()
        stopwatch.span("render", max(submitted, self.busy_until.get(worker, 0.0)), now, worker)
        self.busy_until[worker] = now

    def submit(self, rollout: Rollout) -> list[Future[Audio]]:
        """Start rendering N completions, each with its prompt; returns N futures."""
        return self.listen().finish(rollout)

    def collect(
        self, clips: Sequence[Future[Audio]], *, keep: Iterable[int] = (), stopwatch: Stopwatch | None = None
    ) -> Rated:
        """Rate the clips as they arrive; the audio of the rows in ``keep`` is returned too.

        A batch is rated when its last clip is there; other batches do not wait for it.
        """
        reward = self.reward
        if reward is None:
            raise ValueError("a scorer without a reward cannot rate")
        kept = set(keep)
        stopwatch = stopwatch or Stopwatch()
        audio: list[Audio | None] = [None] * len(clips)
        mono: list[torch.Tensor | None] = [None] * len(clips)  # at the reward's rate: a fifth of what was rendered
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
                    # asked, not caught: the traceback of an error would hold this frame, and so the whole batch
                    if isinstance(clip.exception(), RenderError):
                        failed += 1
                    else:
                        stereo = clip.result()
                        audio[row] = stereo if row in kept else None
                        channel = torch.from_numpy(stereo).mean(0).to(reward.device)
                        wave = resample(channel, self.sample_rate, reward.sample_rate)
                        silent += bool(wave.abs().amax() < SILENT)
                        mono[row] = wave
                    number = row // self.batch
                    awaited[number] -= 1
                    if not awaited[number]:
                        rows = range(number * self.batch, min((number + 1) * self.batch, len(clips)))
                        with _within(self.deadline, f"reward {reward.name}"):
                            _rate(reward, mono, rows, scores)
        return Rated(
            rewards=reward.combine(scores),
            scores=scores,
            audio=audio,
            failed=failed,
            silent=silent,
        )


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """End the process if this takes longer than ``seconds``. A computation that never lets go of the GIL escapes it.

    Time in which the process was stopped (Ctrl-Z, a machine that slept) counts for a second at most.
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
                f"Error: {what} gave no answer within {seconds:g} s; this process ends, what was saved is kept\n"
            )
            sys.stderr.flush()
        finally:  # also where nobody reads it any more
            os._exit(1)

    if math.isinf(seconds):
        yield
        return
    threading.Thread(target=watch, name="deadline", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _rate(reward: Reward, mono: list[torch.Tensor | None], rows: range, scores: dict[str, torch.Tensor]) -> None:
    """Rate one batch of ``mono``, which is forgotten, and write into ``scores``; a clip that failed stays NaN."""
    heard = {row: wave for row in rows if (wave := mono[row]) is not None}
    if not heard:
        return
    padded = torch.nn.utils.rnn.pad_sequence(list(heard.values()), batch_first=True)
    lengths = torch.tensor([len(wave) for wave in heard.values()])
    try:
        rated = reward.score(padded, lengths)
    except Exception as error:  # whatever is wrong with it, nothing can be learnt without it
        raise Failure(f"reward {reward.name} failed on {len(heard)} clips ({brief(error)})") from error
    for axis, values in rated.items():
        scores[axis][list(heard)] = values.cpu()
    for row in rows:
        mono[row] = None
