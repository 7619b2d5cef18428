"""How fast notes become audio: in this process, through worker processes, and from a note bank.

    python benchmarks/render.py [--clips 64] [--workers 1,2] [--soundfont timgm] [--rounds 5] [--json FILE]
                                [--bank cpu] [--midi FOLDER]

Clips are like the paper's: about 70 piano notes in 10 seconds, stereo at 44.1 kHz, random with a fixed seed;
with ``--midi`` they are ten seconds of the piano tracks of files in a folder. Every round times all variants
once, in alternating order, so that a change of the machine's speed affects all of them; a warm-up round is not
counted. Times are medians over rounds, ratios are medians of the ratios within a round. With ``--bank`` the
clips are also compared with those rendered in process: the signal-to-noise ratio of each, and the difference of
their ``ce_proxy`` rewards. The table comes first, one line of JSON last.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import symusic
import torch

from smart import UserError
from smart.doctor.made_up import random_clip
from smart.render import Notes, RenderPool, load_soundfont, render_notes, score_notes
from smart.render.bank import NoteBank
from smart.reward import load_reward, resample

SAMPLE_RATE = 44100


def real_clips(folder: Path, count: int, rng: np.random.Generator, *, seconds: float = 10.0) -> list[Notes]:
    """``count`` excerpts of ``seconds`` from different files: piano tracks, merged, with at least ten notes."""
    files = sorted(folder.rglob("*.mid"))
    clips: list[Notes] = []
    for place in rng.permutation(len(files)).tolist():
        if len(clips) == count:
            break
        try:
            notes = score_notes(symusic.Score(files[place]), max_beats=1e6)
        except (RuntimeError, ValueError):
            continue  # not a MIDI file, or not playable
        notes = notes[(notes[:, 4] < 8) & (notes[:, 5] == 0)]
        notes[:, 4] = 0
        onset = notes[:, 0] - rng.uniform(0, max(notes[:, 0].max(initial=0) - seconds, 0))
        inside = (onset >= 0) & (onset < seconds)
        if inside.sum() >= 10:
            clips.append(np.column_stack([onset, notes[:, 1:]])[inside])
    if len(clips) < count:
        raise UserError(f"--midi {folder} has {len(clips)} suitable files, expected {count}")
    return clips


def in_process(soundfont: Any, clips: list[Notes]) -> None:
    for clip in clips:
        render_notes(soundfont, clip)


def through_pool(pool: RenderPool, clips: list[Notes]) -> None:
    for _ in pool.map(clips):
        pass


def from_bank(bank: NoteBank, clips: list[Notes]) -> None:
    bank.try_render(clips)
    if bank.device.type == "cuda":
        torch.cuda.synchronize()


def compare(bank: NoteBank, soundfont: Any, clips: list[Notes]) -> dict[str, float]:
    """How well the bank's clips agree with those of ``render_notes``; clips it leaves to the pool are only counted."""
    reward = load_reward("ce_proxy")
    decibels, differences = [], []
    for clip, found in zip(clips, bank.try_render(clips), strict=True):
        if isinstance(found, str):
            continue
        reference = torch.from_numpy(render_notes(soundfont, clip))
        noise = (found.cpu().double() - reference).square().sum().item()
        decibels.append(10 * math.log10(reference.double().square().sum().item() / max(noise, 1e-30)))
        mono = [resample(audio.mean(0), SAMPLE_RATE, reward.sample_rate) for audio in (found.cpu(), reference)]
        ours, theirs = reward.score(torch.stack(mono))["CE"].tolist()
        differences.append(abs(ours - theirs))
    return {
        "rendered": len(decibels),
        "to_the_pool": len(clips) - len(decibels),
        "snr_min_db": min(decibels, default=math.nan),
        "snr_median_db": statistics.median(decibels) if decibels else math.nan,
        "ce_proxy_difference_max": max(differences, default=math.nan),
        "stored_mb": bank.bytes / 1e6,
    }


def whole_numbers(text: str) -> list[int]:
    return sorted({common.whole(part) for part in text.split(",")})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    clips, workers, soundfont = options.clips, options.workers, options.soundfont
    rng = np.random.default_rng(0)
    music = real_clips(options.midi, clips, rng) if options.midi else [random_clip(rng) for _ in range(clips)]
    agreement: dict[str, float] = {}
    with ExitStack() as stack:
        loaded = load_soundfont(soundfont)
        ways: dict[str, Callable[[], None]] = {"in process": partial(in_process, loaded, music)}
        starts = {}
        if options.bank:
            began = time.perf_counter()
            bank = NoteBank(soundfont, sample_rate=SAMPLE_RATE, device=options.bank, max_bytes=4 << 30)
            agreement = compare(bank, loaded, music)
            starts[f"bank, {options.bank}"] = time.perf_counter() - began
            ways[f"bank, {options.bank}"] = partial(from_bank, bank, music)
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
                "speed_up": common.ratio(times["in process"], seconds),  # compared with in process
            }
        )
    found: dict[str, Any] = {"clips": clips, "rounds": options.rounds, "soundfont": soundfont, "ways": rows}
    if "pool of 1" in times:
        alone = times["pool of 1"]
        found["overhead_of_one_worker"] = common.ratio(alone, times["in process"])
        found["scaling"] = {
            name: common.ratio(alone, seconds) for name, seconds in times.items() if name != "in process"
        }
    return found | ({"bank": agreement} if agreement else {})


def main() -> None:
    parser = common.parser(__doc__, device=False)
    parser.add_argument("--clips", type=common.whole, default=64, help="clips per run (default: %(default)s)")
    parser.add_argument("--workers", type=whole_numbers, default=[1, 2], help="pool sizes (default: 1,2)")
    parser.add_argument("--soundfont", default="timgm", help="path or short name (default: %(default)s)")
    parser.add_argument("--bank", choices=("cpu", "cuda"), help="also time a note bank on this device")
    parser.add_argument("--midi", type=Path, help="take the clips from the MIDI files in this folder")
    parser.add_argument("--rounds", type=common.whole, default=5, help="timed runs per variant (default: %(default)s)")
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
        print(f"one worker takes {found['overhead_of_one_worker']:.3f} times as long as rendering in process")
    if "bank" in found:
        print("bank: " + ", ".join(f"{name} {value:.6g}" for name, value in found["bank"].items()))
    common.report("render", options, found)


if __name__ == "__main__":
    main()
