"""Building a corpus: ``smart.corpus`` against MidiTok's ``tokenize_dataset``, against a limit, and as it grows.

    python benchmarks/corpus.py [--midi DIR] [--files 400 --workers 1 2 --repeats 3 --growth 1 10 50] [--json out.json]

The files are copies of those under ``--midi``, or of random pieces with a fixed seed; each copy is transposed
and has some pitches and all velocities changed, so that all pieces differ. MidiTok gets the same files and the
same tokenizer, in this process; it checks nothing, decodes nothing and removes no duplicates. After a warm-up
the two alternate; figures are medians, ratios are medians of the paired ratios. The builder's times include the
start of its workers.

The limit is the work that every builder of this design must do: read the bytes and parse them with symusic,
once, in one process. ``--growth`` builds multiples of the files, each in a new process with the last number of
``--workers``, and samples memory: the resident set of the builder, and the proportional set of the builder and
its workers together. A table comes first, JSON last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from symusic.core import NoteTick, NoteTickList, ScoreTick, TempoTick, TimeSignatureTick, TrackTick

from smart.corpus import Corpus
from smart.corpus.build import EXTENSIONS, build
from smart.tokens import build_tokenizer

PROGRAMS = {"piano": [0], "all": [0, 33, 48, 128]}  # of random pieces; 128 means drums


def drawn_piece(seed: int, instruments: str) -> ScoreTick:
    """64 bars of 4/4: about 800 notes per track, in chords on a grid of sixteenths."""
    rng = np.random.default_rng(seed)
    score = ScoreTick(480)
    score.time_signatures.append(TimeSignatureTick(0, 4, 4))
    score.tempos.append(TempoTick(0, float(rng.integers(60, 160))))
    for program in PROGRAMS[instruments]:
        track = TrackTick("", program % 128, program == 128)
        for place in np.flatnonzero(rng.random(64 * 16) < 0.4):
            for pitch in rng.integers(40, 85, rng.integers(1, 4)):
                length, velocity = 120 * int(rng.integers(1, 9)), int(rng.integers(20, 120))
                track.notes.append(NoteTick(120 * int(place), length, int(pitch), velocity))
        score.tracks.append(track)
    return score


def sources(options: argparse.Namespace) -> Iterator[ScoreTick]:
    """At most ``--files`` pieces: random, or from files under ``--midi`` that symusic can parse, evenly spread."""
    if options.midi is None:
        yield from (drawn_piece(seed, options.instruments) for seed in range(options.files))
        return
    paths = sorted(path for path in options.midi.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    for path in paths[:: max(len(paths) // options.files, 1)][: options.files]:
        with contextlib.suppress(RuntimeError, ValueError):
            yield ScoreTick.from_file(path)


def changed(score: ScoreTick, rng: np.random.Generator) -> ScoreTick:
    """A copy that does not count as a duplicate: transposed, a tenth of the pitches moved, other velocities."""
    copy, shift = score.copy(), int(rng.integers(-6, 7))
    for track in copy.tracks:
        notes = track.notes.numpy()
        moved = rng.choice([-1, 0, 1], len(notes["pitch"]), p=[0.05, 0.9, 0.05]) + (0 if track.is_drum else shift)
        notes["pitch"] = np.clip(notes["pitch"] + moved, 21, 108).astype(np.int8)
        notes["velocity"] = np.clip(notes["velocity"] + rng.integers(-9, 10), 1, 127).astype(np.int8)
        track.notes = NoteTickList.from_numpy(*notes.values())
    return copy


def write_files(pieces: list[ScoreTick], folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000}" / f"{number}.mid"
        path.parent.mkdir(parents=True, exist_ok=True)
        changed(pieces[number % len(pieces)], rng).dump_midi(path)


def ours(folder: Path, workers: int, instruments: str) -> int:
    """Build with smart.corpus; returns how many tokens were written."""
    with tempfile.TemporaryDirectory() as out:
        made = build([folder], Path(out), workers=workers, tokenizer=build_tokenizer(instruments))
        return sum(made.tokens.values())


def theirs(folder: Path, instruments: str) -> int:
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):  # without its progress bar
        build_tokenizer(instruments).tokenize_dataset(sorted(folder.rglob("*.mid")), out, verbose=False)
        return 0


def parse_alone(folder: Path) -> int:
    for path in folder.rglob("*.mid"):
        ScoreTick.from_midi(path.read_bytes())
    return 0


def seconds(function: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    tokens = function()
    return time.perf_counter() - start, tokens


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Files and tokens per second of each contestant; a folder's tokens are those that the builder keeps."""
    names = {f"smart, {n} workers": partial(ours, folder, n, options.instruments) for n in options.workers}
    names |= {
        "tokenize_dataset": partial(theirs, folder, options.instruments),
        "parse alone": partial(parse_alone, folder),
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    written = 0
    for repeat in range(options.repeats + 1):
        for name in names if repeat % 2 == 0 else reversed(names):
            spent, tokens = seconds(names[name])
            written = tokens or written
            if repeat:  # the first round warms up
                times[name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    return [
        {
            "name": name,
            "seconds_all": times[name],
            "files_per_second": options.files / medians[name],
            "tokens_per_second": written / medians[name] if name != "parse alone" else None,
            "times_as_fast": statistics.median(
                t / o for t, o in zip(times["tokenize_dataset"], times[name], strict=True)
            ),
            "times_limit": medians[name] / medians["parse alone"],
        }
        for name in names
    ]


def kilobytes(path: str, name: str) -> int:
    """A value in KiB from a file in /proc; 0 if the process has just ended."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return 0


def grow(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build ``folder`` in a new process; returns its wall time and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "smart.corpus", "build", "--midi", str(folder), "--out", out]
        command += ["--workers", str(options.workers[-1]), "--instruments", options.instruments]
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        alone = together = 0
        while process.poll() is None:
            children: list[str] = []
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            alone = max(alone, kilobytes(f"/proc/{process.pid}/status", "VmHWM:"))
            shares = (kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in [process.pid, *children])
            together = max(together, sum(shares))
            time.sleep(0.1)
        spent = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
        kept = sum(Corpus(out).manifest["pieces"].values())
    return {"seconds": spent, "kept": kept, "builder_mib": alone / 1024, "together_mib": together / 1024}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the corpus builder with MidiTok and with a limit, and let it grow."
    )
    parser.add_argument("--midi", type=Path, help="folder of MIDI files to copy (default: random pieces)")
    parser.add_argument("--files", type=int, default=400, help="number of files to build (default: 400)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="worker processes of the builder (default: 1 2)"
    )
    parser.add_argument(
        "--instruments", choices=sorted(PROGRAMS), default="piano", help="tokenizer and random pieces (default: piano)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs per contestant; 0: only --growth (default: 3)"
    )
    parser.add_argument(
        "--growth", type=int, nargs="*", default=[], help="multiples of --files to build as well (default: none)"
    )
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if options.midi is not None and not options.midi.is_dir():
        parser.error(f"--midi {options.midi}: no such folder")
    if min(options.files, *options.workers, *options.growth) < 1 or options.repeats < 0:
        parser.error("--files, --workers and --growth: expected numbers of at least 1, --repeats of at least 0")
    return options


def main() -> None:
    options = parse()
    results, growth = [], []
    pieces = list(sources(options))
    if not pieces:
        sys.exit(f"--midi {options.midi}: no MIDI file there can be parsed")
    with tempfile.TemporaryDirectory() as place:
        if options.repeats:
            folder = Path(place) / "midi"
            write_files(pieces, folder, options.files)
            size = sum(path.stat().st_size for path in folder.rglob("*.mid"))
            results = compare(folder, options)
            print(f"{options.files} files, {size / 1e6:.1f} MB")
            print(f"{'':20}{'files/s':>10}{'tokens/s':>12}{'x MidiTok':>11}{'x limit':>9}")
            for r in results:
                tokens = "" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:,.0f}"
                print(
                    f"{r['name']:20}{r['files_per_second']:>10.1f}{tokens:>12}{r['times_as_fast']:>11.2f}"
                    f"{r['times_limit']:>9.1f}"
                )
        if options.growth:
            print(f"{'files':>8}{'kept':>8}{'seconds':>10}{'ms/file':>9}{'more':>9}{'builder MiB':>13}{'all MiB':>9}")
        for factor in options.growth:
            folder, count = Path(place) / f"grown{factor}", factor * options.files
            write_files(pieces, folder, count)
            r = {"files": count, **grow(folder, options)}
            before = growth[-1] if growth else {"seconds": 0.0, "files": 0}
            more = max(r["files"] - before["files"], 1)
            r["ms_per_file"] = 1000 * r["seconds"] / r["files"]
            r["ms_per_further_file"] = 1000 * (r["seconds"] - before["seconds"]) / more
            growth.append(r)
            print(
                f"{r['files']:>8}{r['kept']:>8}{r['seconds']:>10.1f}{r['ms_per_file']:>9.2f}"
                f"{r['ms_per_further_file']:>9.2f}{r['builder_mib']:>13.0f}{r['together_mib']:>9.0f}"
            )
    report = {
        "benchmark": "corpus",
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"},
        "versions": {name: version(name) for name in ("miditok", "symusic", "numpy")},
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor(),
        "results": results,
        "growth": growth,
    }
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
