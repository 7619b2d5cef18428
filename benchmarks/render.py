"""How fast notes become audio: in this process, and through worker processes.

    python benchmarks/render.py [--clips 64] [--workers 1,2] [--soundfont timgm] [--rounds 5] [--json FILE]

Clips are like the paper's: about 70 piano notes within 10 seconds, stereo at 44.1 kHz, drawn with a fixed
seed. Every round times all ways once, in alternating order, so that a change of the machine's speed meets them
all; a warm-up round is not counted. Times are medians over rounds, ratios medians of the ratios within
a round. Rendering uses neither torch nor a GPU. The table comes first, one line of JSON last.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import common
import numpy as np

from smart import UserError
from smart.render import Notes, RenderPool, load_soundfont, render_notes


def random_clip(rng: np.random.Generator, *, count: int = 70, seconds: float = 10.0) -> Notes:
    """(count, 6) notes of a piano, spread over ``seconds``."""
    columns = (
        rng.uniform(0, seconds, count),
        rng.uniform(0.1, 1.5, count),
        rng.integers(30, 91, count),
        rng.integers(20, 128, count),
        np.zeros(count),
        np.zeros(count),
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def in_process(soundfont: Any, clips: list[Notes]) -> None:
    for clip in clips:
        render_notes(soundfont, clip)


def through_pool(pool: RenderPool, clips: list[Notes]) -> None:
    for _ in pool.map(clips):
        pass


def whole_numbers(text: str) -> list[int]:
    return sorted({common.whole(part) for part in text.split(",")})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    clips, workers, soundfont = options.clips, options.workers, options.soundfont
    rng = np.random.default_rng(0)
    music = [random_clip(rng) for _ in range(clips)]
    with ExitStack() as stack:
        ways: dict[str, Callable[[], None]] = {"in process": partial(in_process, load_soundfont(soundfont), music)}
        starts = {}
        for many in workers:
            began = time.perf_counter()
            pool = stack.enter_context(RenderPool(soundfont, workers=many))
            starts[f"pool of {many}"] = time.perf_counter() - began
            ways[f"pool of {many}"] = partial(through_pool, pool, music)
        times = common.alternate(ways, options.rounds)

    rows = []
    for name, seconds in times.items():
        rows.append(
            {
                "way": name,
                "start_s": starts.get(name, 0.0),
                "ms_per_clip": 1000 * statistics.median(seconds) / clips,
                "clips_per_s": clips / statistics.median(seconds),
                "speed_up": common.ratio(times["in process"], seconds),  # over rendering in process
            }
        )
    found: dict[str, Any] = {"clips": clips, "rounds": options.rounds, "soundfont": soundfont, "ways": rows}
    if "pool of 1" in times:
        alone = times["pool of 1"]
        found["overhead_of_one_worker"] = common.ratio(alone, times["in process"])
        found["scaling"] = {
            name: common.ratio(alone, seconds) for name, seconds in times.items() if name != "in process"
        }
    return found


def main() -> None:
    parser = common.parser(__doc__, device=False)
    parser.add_argument("--clips", type=common.whole, default=64, help="clips of a run (default: %(default)s)")
    parser.add_argument("--workers", type=whole_numbers, default=[1, 2], help="sizes of pools (default: 1,2)")
    parser.add_argument("--soundfont", default="timgm", help="path or short name (default: %(default)s)")
    parser.add_argument("--rounds", type=common.whole, default=5, help="timed runs of each way (default: %(default)s)")
    options = common.parse(parser)
    try:
        found = measure(options)
    except UserError as error:
        parser.exit(2, f"Error: {error.message}\n")
    cores = len(os.sched_getaffinity(0))
    print(f"{options.clips} clips, {options.rounds} rounds, {cores} usable cores, {options.soundfont}")
    print(f"{'':12}{'start s':>9}{'ms/clip':>9}{'clips/s':>9}{'speed-up':>10}")
    for row in found["ways"]:
        print(
            f"{row['way']:12}{row['start_s']:9.2f}{row['ms_per_clip']:9.1f}{row['clips_per_s']:9.1f}"
            f"{row['speed_up']:10.2f}"
        )
    if "overhead_of_one_worker" in found:
        print(f"one worker takes {found['overhead_of_one_worker']:.3f} times as long as no worker")
    common.report("render", options, found)


if __name__ == "__main__":
    main()
