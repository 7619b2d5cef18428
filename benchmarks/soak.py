"""Check that a long run's memory, open files and speed stay constant over thousands of iterations.

    python benchmarks/soak.py [--iterations 2000] [--parts 10] [--json FILE]

It tunes a tiny random model with the real program, renderer and reward in a separate process, and inspects that process
and its render workers after each part of the iterations. Memory is the part of each process that is not shared (USS),
and of all samples in a part the lowest: the memory between two iterations, with no garbage waiting to be collected. The
first part warms up. The table comes first, one line of JSON last.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from smart.model import build_model, save_base
from smart.run import METRICS
from smart.tokens import build_tokenizer

SETTINGS = {
    "grpo.prompts": 2, "grpo.group_size": 2, "sampling.max_new_tokens": 16, "render.seconds": 0.5, "render.workers": 1,
    "render.sample_rate": 16000, "track.checkpoint_every": 20, "track.samples_every": 20, "track.keep_checkpoints": 2,
    "track.final_prompts": 2, "track.final_listen": 0, "run.device": "cpu",
}  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            for child in task.read_text().split():
                found += tree(int(child))
    return found


def own_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def look(pid: int) -> dict[str, Any]:
    """The resources that a run holds now."""
    workers = tree(pid)[1:]
    return {
        "mib": own_bytes(pid) / 2**20,
        "workers_mib": sum(map(own_bytes, workers)) / 2**20,
        "workers": len(workers),
        "files": sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in (pid, *workers)),
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
    }


def main() -> None:
    parser = common.parser(__doc__, device=False)
    parser.add_argument("--iterations", type=common.whole, default=2000, help="iterations (default: %(default)s)")
    parser.add_argument("--parts", type=common.whole, default=10, help="parts to report (default: %(default)s)")
    options = common.parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_tokenizer()
        save_base(build_model(tokenizer, layers=1, hidden=32, heads=2, intermediate=48), tokenizer, folder / "base")
        settings = SETTINGS | {"model.base": folder / "base", "run.folder": folder, "run.name": "soak"}
        settings["grpo.iterations"] = options.iterations + 1  # so that it still runs at the last look
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        log = folder / "log"
        with open(log, "w") as output:
            run = subprocess.Popen([sys.executable, "-m", "smart.grpo", *words], stdout=output, stderr=output)
        metrics = folder / "soak" / METRICS
        rows: list[dict[str, Any]] = []
        done, before = 0, 0.0
        print(f"{'iterations':>12} {'per s':>9} {'MiB':>7} {'workers MiB':>12} {'files':>6} {'threads':>8}")
        try:
            for part in range(1, options.parts + 1):
                until = part * options.iterations // options.parts
                seen: list[dict[str, Any]] = []
                while (lines := metrics.read_bytes().count(b"\n") if metrics.exists() else 0) < until:
                    if run.poll() is not None:
                        sys.exit(f"the run ended with exit code {run.returncode}: {log.read_text()[-500:]}")
                    before = before or time.perf_counter() if lines else 0.0
                    time.sleep(0.05)
                    if lines > done:
                        seen.append(look(run.pid))
                now = time.perf_counter()
                seen.append(look(run.pid))
                row = {"until": until, "per_second": (lines - done) / (now - before), **seen[-1]}
                row |= {key: min(one[key] for one in seen) for key in ("mib", "workers_mib")}
                rows.append(row)
                print(
                    f"{until:12,} {row['per_second']:9.2f} {row['mib']:7.1f} {row['workers_mib']:12.1f} "
                    f"{row['files']:6} {row['threads']:8}",
                    flush=True,
                )
                done, before = lines, now
        finally:
            run.kill()
            run.wait()
    common.report("soak", options, {"parts": rows})


if __name__ == "__main__":
    main()
