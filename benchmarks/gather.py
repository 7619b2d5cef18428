"""One table and one JSON file of what ``gpu.sh`` measured.

    python benchmarks/gather.py FOLDER

Reads the JSON of each benchmark in FOLDER, prints a table, and writes FOLDER/gpu.json. The exit code is 1 if a
benchmark left no result, or if ``smart doctor --gpu`` found a difference.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = ("doctor", "sampler", "render", "reward", "learner", "iteration", "peer")
BANK_MS = 20  # what mixing a batch of 64 clips may take
Row = tuple[str, str]
Found = dict[str, Any]


def read(folder: Path) -> dict[str, Any]:
    """What each step found; a step that was started and left no result has the last line that it printed instead."""
    found: dict[str, Any] = {}
    for step in STEPS:
        log, result = folder / f"{step}.log", folder / f"{step}.json"
        if result.exists() and (text := result.read_text().strip()):
            found[step] = json.loads(text)
        elif log.exists():
            found[step] = {"failed": (log.read_text().strip().splitlines() or ["no output"])[-1]}
    return found


def doctor(found: Found) -> Iterator[Row]:
    for row in found["checks"]:
        yield row["name"], f"{row['verdict']}: {row['found']}"


def sampler(found: Found) -> Iterator[Row]:
    steps = found["options"]["tokens"]
    for row in found["results"]:
        taken = row["smart_seconds"]
        yield (
            f"sampling {row['dtype']}",
            f"{taken:.3f} s, {1000 * taken / steps:.3f} ms per step, {row['ratio']:.2f} times as fast as generate, "
            f"{row['times_limit']:.2f} times the limit",
        )


def render(found: Found) -> Iterator[Row]:
    for row in found["ways"]:
        batch = f"{64 * row['ms_per_clip']:.1f} ms per 64 clips"
        if row["way"].startswith("bank"):
            batch += (
                f" (at most {BANK_MS} on a GPU), {found['bank']['to_the_pool']} of {found['clips']} left to workers"
            )
        yield f"render, {row['way']}", f"{row['ms_per_clip']:.2f} ms per clip, {batch}"


def reward(found: Found) -> Iterator[Row]:
    for row in found["results"]:
        yield (
            f"rating, {row['way']}",
            f"{1000 * row['seconds_per_clip']:.1f} ms per clip, ratio {row['ratio']:.2f}, difference "
            f"{row['difference']:.1e}, {row['peak_memory_gb']:.1f} GB",
        )


def learner(found: Found) -> Iterator[Row]:
    for row in found["results"]:
        yield (
            f"{row['stage']} {row['dtype']}, {row['micro_batch']} at a time",
            f"{row['seconds']:.3f} s, {row['times_limit']:.2f} times the limit, {row['peak_memory_gb']:.1f} GB",
        )


def iteration(found: Found) -> Iterator[Row]:
    for stage, taken in found["seconds"].items():
        yield f"iteration: {stage}", f"{taken:.3f} s"
    yield "iteration: busiest", f"{found['busiest_resource']}, {found['times_busiest']:.2f} times its work"
    yield "iteration: memory", f"{found['peak_memory_gb']:.1f} GB at its peak"


def peer(found: Found) -> Iterator[Row]:
    yield (
        "against TRL",
        f"{found['smart_seconds']:.2f} s against {found['peer_seconds']:.2f} s: {found['ratio']:.2f} times as fast",
    )


TABLES = {function.__name__: function for function in (doctor, sampler, render, reward, learner, iteration, peer)}


def driver() -> str:
    """The NVIDIA driver's version line, or "" without one."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what gpu.sh wrote")
    folder = parser.parse_args().folder
    found = read(folder)
    failed = [step for step, result in found.items() if "failed" in result or result.get("ok") is False]
    for step, result in found.items():
        rows = [(step, f"failed: {result['failed']}")] if "failed" in result else TABLES[step](result)
        for name, text in rows:
            print(f"{name:36} {text}")
    if absent := [step for step in STEPS if step not in found]:
        print(f"not measured: {', '.join(absent)}")
    machine = next((result["machine"] for result in found.values() if "machine" in result), "")
    (folder / "gpu.json").write_text(
        json.dumps({"machine": machine, "driver": driver(), "failed": failed, **found}) + "\n"
    )
    print(f"{folder / 'gpu.json'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed or not found else 0)


if __name__ == "__main__":
    main()
