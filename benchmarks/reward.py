"""Scoring speed: smart.reward.audiobox against the official predictor, one clip at a time.

    python benchmarks/reward.py [--clips 64] [--batch 4] [--dtypes float32 bfloat16] [--model FOLDER] [--json FILE]

Both have the same weights: random ones of the full architecture, which are as fast as real ones, unless
``--model`` names a folder with config.json and model.safetensors. The clips are written by the small base that
ships with the package and rendered at 16 kHz; resampling is not timed. The variants alternate; the ratio is the
median of the paired ratios. The limit is the operations of the official network's matrix products, convolutions
and attention per clip, at the measured rate of one large product in the same dtype. ``difference`` is the largest
difference from the official ratings, ``rank`` Spearman's correlation with them.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from scipy.stats import spearmanr

from smart.doctor.made_up import random_audiobox
from smart.model import load_base
from smart.prompts import draw
from smart.render import RenderPool
from smart.reward import Reward, load_reward, resample
from smart.sampler import Sampler
from smart.tokens import decode, vocabulary

RATE = 16_000


def music(count: int) -> list[torch.Tensor]:
    """``count`` clips (S,) of at most ten seconds, mono."""
    model, tokenizer = load_base("piano-small")
    generator = torch.Generator().manual_seed(1)
    facts = vocabulary(tokenizer)
    starts = draw("procedural", count, tokenizer, generator)
    sampler = Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id)
    tokens = sampler.sample(starts, max_new_tokens=256, generator=generator).tokens
    with RenderPool("timgm", sample_rate=48_000) as pool:
        audio = list(pool.map([decode(tokenizer, row) for row in tokens]))
    return [resample(torch.from_numpy(stereo).mean(0), 48_000, RATE) for stereo in audio]


def one_by_one(network: Any, clips: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = [common.official_rating(network, clip) for clip in clips]
    return {axis: torch.tensor([row[axis] for row in rows]) for axis in rows[0]}


def batched(reward: Reward, clips: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    return reward.score(padded, torch.tensor([len(clip) for clip in clips]))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    clips = music(options.clips)
    network = common.official_audiobox(folder, options.device)
    ways = {"official": partial(one_by_one, network, clips)}
    for dtype in options.dtypes:
        reward = load_reward(
            "audiobox", model=str(folder), dtype=dtype, batch_size=options.batch, device=options.device
        )
        ways[dtype] = partial(batched, reward, clips)
    scores: dict[str, dict[str, torch.Tensor]] = {}

    def keep(name: str) -> None:
        scores[name] = ways[name]()

    memory = {name: common.peak_memory(partial(keep, name), options.device) for name in ways}
    times = common.alternate(ways, options.rounds, options.device, warm=True)
    gflop = common.flops(partial(one_by_one, network, clips[:1])) / 1e9
    rows = []
    for name, taken in times.items():
        rate = common.matmul_rate(common.DTYPES.get(name, torch.float32), options.device) / 1e9
        median = statistics.median(taken) / len(clips)
        gaps = {axis: (scores[name][axis] - values).abs().max().item() for axis, values in scores["official"].items()}
        ranks = {
            axis: float(spearmanr(scores[name][axis], values).statistic) for axis, values in scores["official"].items()
        }
        rows.append(
            {
                "way": "official" if name == "official" else f"smart {name}",
                "seconds_all": taken,
                "seconds_per_clip": median,
                "clips_per_second": 1 / median,
                "ratio": common.ratio(times["official"], taken),
                "gflop_per_second": gflop / median,
                "matmul_gflop_per_second": rate,
                "times_limit": median / (gflop / rate),
                "peak_memory_gb": memory[name],
                "difference": max(gaps.values()),
                "difference_by_axis": gaps,
                "rank": min(ranks.values()),
                "rank_by_axis": ranks,
            }
        )
    common.trace(options.profile, ways[options.dtypes[0]])
    return {
        "gflop_per_clip": gflop,
        "seconds_of_audio": sum(len(clip) for clip in clips) / RATE / len(clips),
        "padded_clips": sum(len(clip) < 10 * RATE for clip in clips),
        "results": rows,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--clips", type=common.whole, default=16, help="clips per run (default: %(default)s)")
    parser.add_argument("--batch", type=common.whole, help="clips per forward pass (default: the reward decides)")
    parser.add_argument("--rounds", type=common.whole, default=3, help="timed runs per variant (default: %(default)s)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=sorted(common.DTYPES),
        default=list(common.DTYPES),
        help="precisions (default: both)",
    )
    parser.add_argument("--model", type=Path, help="folder with real weights (default: random ones)")
    options = common.parse(parser)
    if options.clips < 2:
        parser.error("--clips 1: a rank correlation needs at least 2")
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options, options.model or random_audiobox(Path(temporary)))
    print(
        f"{options.clips} clips ({found['padded_clips']} shorter than ten seconds), "
        f"{found['gflop_per_clip']:.0f} GFLOP per clip"
    )
    print(
        f"{'':16}{'s/clip':>9}{'clips/s':>9}{'ratio':>7}{'GFLOP/s':>9}{'x limit':>9}"
        f"{'GB':>7}{'difference':>12}{'rank':>8}"
    )
    for row in found["results"]:
        print(
            f"{row['way']:16}{row['seconds_per_clip']:9.3f}{row['clips_per_second']:9.2f}{row['ratio']:7.2f}"
            f"{row['gflop_per_second']:9.0f}{row['times_limit']:9.2f}{row['peak_memory_gb']:7.2f}"
            f"{row['difference']:12.1e}{row['rank']:8.4f}"
        )
    common.report("reward", options, found)


if __name__ == "__main__":
    main()
