"""How fast notes become audio: in this process, and through worker processes.

    python benchmarks/render.py [--clips 64] [--workers 1,2] [--soundfont timgm] [--rounds 5] [--json FILE]

Clips are like the paper's: about 70 piano notes within 10 seconds, stereo at 44.1 kHz, drawn with a fixed
seed. Every round times all ways once, in alternating order, so that a change of the machine's speed meets them
all; a warm-up round is not counted. Times are medians over rounds, ratios medians of the ratios within
a round. The table comes first, one line of JSON last.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

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


def timed(way: Callable[[], None]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; every other round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        names = list(ways) if index % 2 else list(reversed(ways))
        for name in names:
            seconds = timed(ways[name])
            if index:  # the first round warms up
                times[name].append(seconds)
    return times


def whole_numbers(_: Any, __: Any, value: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"expected whole numbers separated by commas, got {value!r}") from None
    if numbers[0] < 1:
        raise click.BadParameter(f"expected numbers from 1, got {numbers[0]}")
    return numbers


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--clips", default=64, show_default=True, type=click.IntRange(1))
@click.option("--workers", default="1,2", show_default=True, callback=whole_numbers, help="Sizes of pools.")
@click.option("--soundfont", default="timgm", show_default=True, help="Path or short name.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write here.")
def main(clips: int, workers: list[int], soundfont: str, rounds: int, json_path: Path | None) -> None:
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
        times = measure(ways, rounds)

    rows = []
    for name, seconds in times.items():
        against = [other / own for other, own in zip(times["in process"], seconds, strict=True)]
        rows.append(
            {
                "way": name,
                "start_s": starts.get(name, 0.0),
                "ms_per_clip": 1000 * statistics.median(seconds) / clips,
                "clips_per_s": clips / statistics.median(seconds),
                "speed_up": statistics.median(against),  # over rendering in process
            }
        )
    click.echo(f"{clips} clips, {rounds} rounds, {len(os.sched_getaffinity(0))} usable cores, {soundfont}")
    click.echo(f"{'':12}{'start s':>9}{'ms/clip':>9}{'clips/s':>9}{'speed-up':>10}")
    for row in rows:
        click.echo(
            f"{row['way']:12}{row['start_s']:9.2f}{row['ms_per_clip']:9.1f}{row['clips_per_s']:9.1f}"
            f"{row['speed_up']:10.2f}"
        )
    result: dict[str, Any] = {"clips": clips, "rounds": rounds, "soundfont": soundfont, "ways": rows}
    if "pool of 1" in times:
        alone = times["pool of 1"]
        result["overhead_of_one_worker"] = statistics.median(
            pool / plain for pool, plain in zip(alone, times["in process"], strict=True)
        )
        result["scaling"] = {
            name: statistics.median(one / more for one, more in zip(alone, seconds, strict=True))
            for name, seconds in times.items()
            if name != "in process"
        }
        click.echo(f"one worker takes {result['overhead_of_one_worker']:.3f} times as long as no worker")
    text = json.dumps(result)
    if json_path is not None:
        json_path.write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
