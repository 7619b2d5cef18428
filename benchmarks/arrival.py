"""What it costs to wait for neighbours: from the arrival of the last clip until all are rated, by clips rated at once.

    python benchmarks/arrival.py [--together 16,8,1] [--clips 64] [--clips-per-second 40] [--rounds 5] [--json FILE]
    python benchmarks/arrival.py --rating-ms 5

Clips of ten seconds arrive at an even pace, in another order in each round, and ``Scorer.collect`` rates them with
ce_proxy. With ``--rating-ms`` a rating only takes that long and computes nothing: what a reward on a GPU costs the
host. Times are medians; the gain is the median of the differences to the first of ``--together`` within a round.
"""

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import Future
from typing import Any

import common
import numpy as np
import torch

from smart.reward import Reward, load_reward
from smart.rollout import Scorer
from smart.tokens import build_tokenizer

SAMPLE_RATE, SECONDS = 44100, 10


class Waits(Reward):
    """Rates nothing, but takes its time: ``seconds`` for each clip."""

    axes, sample_rate = ("X",), SAMPLE_RATE

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds * len(audio))
        return {"X": torch.ones(len(audio))}


def seconds_after_the_last(scorer: Scorer, audio: list[Any], order: list[int], pause: float) -> float:
    """Rate clips that arrive in ``order``, ``pause`` seconds apart."""
    clips: list[Future[Any]] = [Future() for _ in audio]
    last = 0.0

    def arrive() -> None:
        nonlocal last
        for row in order:
            time.sleep(pause)
            last = time.perf_counter()
            clips[row].set_result(audio[row])

    thread = threading.Thread(target=arrive)
    thread.start()
    scorer.collect(clips)
    end = time.perf_counter()
    thread.join()
    return end - last


def measure(options: argparse.Namespace) -> dict[str, Any]:
    reward = load_reward("ce_proxy") if options.rating_ms is None else Waits(options.rating_ms / 1000)
    rng = np.random.default_rng(0)
    audio = [rng.normal(0, 0.1, (2, SECONDS * SAMPLE_RATE)).astype(np.float32) for _ in range(options.clips)]
    tokenizer = build_tokenizer()
    times: dict[int, list[float]] = {together: [] for together in options.together}
    for number in range(options.rounds + 1):
        order = random.Random(number).sample(range(options.clips), options.clips)
        for together, seconds in times.items():
            scorer = Scorer(tokenizer, None, reward, sample_rate=SAMPLE_RATE, batch=together)  # type: ignore[arg-type]
            taken = seconds_after_the_last(scorer, audio, order, 1 / options.clips_per_second)
            if number:  # the first round warms up
                seconds.append(taken)
    first = times[options.together[0]]
    rows = [
        {
            "together": together,
            "seconds": statistics.median(seconds),
            "gain_s": statistics.median(slow - fast for slow, fast in zip(first, seconds, strict=True)),
        }
        for together, seconds in times.items()
    ]
    return {"rows": rows}


def main() -> None:
    parser = common.parser(__doc__, device=False)
    parser.add_argument("--together", type=numbers, default=[16, 8, 1], help="clips at once (default: 16,8,1)")
    parser.add_argument("--clips", type=common.whole, default=64, help="clips (default: %(default)s)")
    parser.add_argument("--clips-per-second", type=float, default=40.0, help="the pace (default: %(default)s)")
    parser.add_argument("--rating-ms", type=float, help="milliseconds that a rating takes (default: ce_proxy rates)")
    parser.add_argument("--rounds", type=common.whole, default=5, help="timed rounds (default: %(default)s)")
    options = common.parse(parser)
    found = measure(options)
    print(f"{'at once':>8}{'seconds after the last clip':>29}{'gain':>9}")
    for row in found["rows"]:
        print(f"{row['together']:8}{row['seconds']:29.3f}{row['gain_s']:9.3f}")
    common.report("arrival", options, found)


def numbers(text: str) -> list[int]:
    return [common.whole(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
