"""Each benchmark, as a command, at a small size: a table, then JSON with finite numbers."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import programs
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
PEER = sys.executable if find_spec("trl") else os.environ.get("SMART_PEER_PYTHON", "")

if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)


def run(name: str, options: str, *more: str, cwd: Path, fresh: bool = False) -> tuple[str, dict[str, Any]]:
    """A benchmark's output before its last line, and the JSON in that line, with finite numbers only."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FOLDER / name), *options.split(), *more, "--json", "out.json"]
    done = programs.run(command, fresh=fresh, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    table, _, last = done.stdout.rstrip().rpartition("\n")
    found: dict[str, Any] = json.loads(last)
    assert json.loads((cwd / "out.json").read_text()) == found
    assert found["benchmark"] == name.removesuffix(".py")
    assert found["machine"] and found["torch"] and found["cores"] >= 1
    check_finite(found)
    return table, found


def check_finite(value: Any) -> None:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            check_finite(item)
    elif isinstance(value, float):
        assert math.isfinite(value)


def check_trace(path: Path, *names: str) -> None:
    """Check that it is a Chrome trace with these operations."""
    found = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert found >= set(names)


def test_sampler(tmp_path: Path) -> None:
    sizes = "--rows 4 --group-size 2 --tokens 6 --hidden 32 --heads 2 --intermediate 48 --layers 2 --repeats 2"
    table, found = run("sampler.py", sizes, "--profile", "trace.json", cwd=tmp_path)
    assert "tokens/s" in table
    assert [row["dtype"] for row in found["results"]] == ["float32", "bfloat16"]
    for row in found["results"]:
        assert len(row["smart_seconds_all"]) == len(row["generate_seconds_all"]) == 2
        assert row["ratio"] > 0 and row["times_limit"] > 0
    check_trace(tmp_path / "trace.json", "aten::index_select")


def test_render(tmp_path: Path) -> None:
    table, found = run("render.py", "--clips 2 --rounds 1", cwd=tmp_path)
    assert "ms/clip" in table
    assert [row["way"] for row in found["ways"]] == ["in process", "pool of 1", "pool of 2"]
    assert set(found["scaling"]) == {"pool of 1", "pool of 2"}


def test_arrival(tmp_path: Path) -> None:
    table, found = run("arrival.py", "--clips 4 --clips-per-second 100 --rounds 1 --together 4,1", cwd=tmp_path)
    assert "seconds after the last clip" in table
    assert [row["together"] for row in found["rows"]] == [4, 1]
    assert found["rows"][0]["gain_s"] == 0 < found["rows"][1]["seconds"]


def test_learner(tmp_path: Path) -> None:
    sizes = "--rows 4 --tokens 8 --hidden 32 --heads 2 --intermediate 48 --layers 2 --rounds 1 --micro 1 4"
    table, found = run("learner.py", sizes, "--profile", "trace.json", cwd=tmp_path)
    assert "tokens/s" in table
    rows = found["results"]
    ways = {(row["stage"], row["dtype"], row["micro_batch"]) for row in rows}
    assert len(ways) == len(rows) == 8
    work = {row["stage"]: row["gflop"] for row in rows}
    # forward and backward cost three times the forward, except for products with inputs that need no gradient
    assert 2.5 < work["update"] / work["reference"] <= 3.5
    check_trace(tmp_path / "trace.json", "aten::mm", "Optimizer.step#AdamW.step")


def test_operations_are_counted_as_the_shapes_say() -> None:
    code = """
import sys; sys.path.insert(0, "benchmarks")
import common, torch
a, b = torch.randn(3, 5), torch.randn(5, 7)
assert common.flops(lambda: a @ b) == 2 * 3 * 5 * 7
q = torch.randn(2, 4, 6, 8)
attend = torch.nn.functional.scaled_dot_product_attention
assert common.flops(lambda: attend(q, q, q)) == 2 * (2 * 2 * 4 * 6 * 6 * 8)
"""
    programs.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_reward(tmp_path: Path) -> None:
    """At full size, the only one: scores equal the official predictor's for any weights."""
    table, found = run("reward.py", "--clips 2 --rounds 1 --dtypes float32", cwd=tmp_path)
    assert "clips/s" in table
    rows = {row["way"]: row for row in found["results"]}
    assert list(rows) == ["official", "smart float32"]
    assert rows["official"]["difference"] == 0 and rows["smart float32"]["difference"] < 1e-3
    assert 140 < found["gflop_per_clip"] < 160


SHORT = (
    "--iterations 1 --set grpo.prompts=2 --set grpo.group_size=2 --set sampling.max_new_tokens=24 "
    "--set render.workers=1 --set render.soundfont=timgm"
)


def test_iteration(tmp_path: Path) -> None:
    ahead = "--set grpo.rollouts_ahead=1"
    table, found = run("iteration.py", f"--config quickstart.toml {SHORT} {ahead}", cwd=tmp_path)
    assert len(found["seconds_all"]["iteration"]) == 1 and found["seconds"]["generate"] > 0
    assert "share" in table and "busiest" in table
    assert "listen:" not in table  # the run's report names files that are deleted
    assert sum(found["share"].values()) == pytest.approx(1, abs=0.02)  # of medians
    assert set(found["seconds_alone"]) == {"generate", "reference", "render", "score", "learn"}
    if found["device"] == "cpu":
        assert found["busiest_resource"] == "CPU"
        assert found["busiest_seconds"] == pytest.approx(sum(found["seconds_alone"].values()))
    assert found["times_busiest"] == pytest.approx(found["seconds"]["iteration"] / found["busiest_seconds"])
    assert not list(tmp_path.glob("runs*"))  # its run is deleted


def test_everything_for_a_gpu(tmp_path: Path) -> None:
    """gpu.sh at small sizes on the CPU: it leaves one file with all results, and a timeline."""
    env = os.environ | {"SMALL": "1", "PYTHON": sys.executable, "SMART_PEER_PYTHON": ""}
    out = tmp_path / "out"
    done = subprocess.run(
        ["sh", str(FOLDER / "gpu.sh"), str(out)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "gpu.json").read_text())
    assert found["failed"] == [] and found["machine"]
    assert {"sampler", "render", "learner", "iteration"} <= set(found)
    check_finite(found)
    for name in ("ms per step", "left to workers", "times the limit", "GB at its peak", "not measured: doctor, reward"):
        assert name in done.stdout
    check_trace(out / "timeline.json", "generate", "learn")


def test_a_step_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "sampler.log").write_text("Traceback\nRuntimeError: no kernel image\n")
    (tmp_path / "doctor.log").write_text("")
    (tmp_path / "doctor.json").write_text('{"ok": false, "checks": [{"name": "memory", "verdict": "x", "found": "y"}]}')
    row = {"way": "smart float32", "seconds_per_clip": 0.01, "ratio": 9, "difference": 1e-7, "peak_memory_gb": 2}
    (tmp_path / "reward.json").write_text(json.dumps({"results": [row]}))
    (tmp_path / "peer.json").write_text('{"smart_seconds": 1.0, "peer_seconds": 15.0, "ratio": 15.0}')
    done = programs.run([sys.executable, str(FOLDER / "gather.py"), str(tmp_path)])
    assert done.returncode == 1
    for text in ("failed: RuntimeError: no kernel image", "15.00 times as fast", "10.0 ms per clip", "x: y"):
        assert text in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["doctor", "sampler"]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "iteration.py"), "--config", "quickstart.toml", "--peer", "nowhere"]
    done = programs.run(command, fresh=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: --peer") and done.stderr.count("\n") == 1


@pytest.mark.skipif(
    not PEER, reason="needs TRL: an environment of benchmarks/peers/requirements.txt, named by SMART_PEER_PYTHON"
)
def test_peer(tmp_path: Path) -> None:
    sizes = f"--config paper.toml --random-weights --rounds 1 {SHORT}"
    table, found = run("iteration.py", sizes, "--peer", PEER, cwd=tmp_path)
    assert "ratio" in table
    assert found["ratio"] == pytest.approx(found["peer_seconds"] / found["smart_seconds"])
    assert found["completions"] == found["peer"]["completions"] == 4
    assert {"generate", "render", "score", "learn_and_rest"} <= set(found["peer"]["seconds"])


def test_soak(tmp_path: Path) -> None:
    """From the second third of 60 iterations, open files, threads and memory do not grow."""
    table, found = run("soak.py", "--iterations 60 --parts 3", cwd=tmp_path, fresh=True)
    assert "workers MiB" in table
    _, middle, last = found["parts"]
    assert last["files"] == middle["files"] and last["workers"] == middle["workers"] == 1
    assert last["threads"] < 40  # libraries start the threads of their pools one by one
    assert last["mib"] < middle["mib"] + 8 and last["workers_mib"] < middle["workers_mib"] + 2
