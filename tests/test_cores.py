"""smart.cores: who gets which cores, and how long a thread may spin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smart import cores
from smart.cores import SPINS, bound_spin, limit_threads, share, summary, usable_cores
from smart.model import pick_device


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu.max": "of another kernel"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_usable_cores(files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(tmp_path) == expected


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with eight cores, where torch has as many threads; the list ends with the number that it has now."""
    threads = [8]
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return threads


def test_threads_of_the_main_process(eight_cores: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    limit_threads("cpu")
    assert eight_cores == [8] and summary(8) == "8 usable cores: 8 threads to compute, 8 render workers"
    limit_threads("cpu", processes=3)
    assert eight_cores == [8, 2] and share(3) == 2 and share(9) == 1
    limit_threads("cuda")
    assert eight_cores == [8, 2, 1] and summary(1) == "8 usable cores: 1 thread to compute, 1 render worker"
    limit_threads("cpu")  # never more than there are: somebody has set them
    assert eight_cores == [8, 2, 1]
    eight_cores.append(5)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads("cuda")
    assert eight_cores[-1] == 5


def test_every_program_that_picks_cuda_computes_with_one_thread(
    eight_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pick_device("cpu")
    assert eight_cores == [8]
    monkeypatch.setattr("smart.gpu.problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda" and eight_cores == [8, 1]


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_way_of_waiting_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(each, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv(name, "7")
        bound_spin()
        assert os.environ[name] == "7" and ("GOMP_SPINCOUNT" in os.environ) == (name == "GOMP_SPINCOUNT")
    bound_spin()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
    monkeypatch.delenv("GOMP_SPINCOUNT")


def test_threads_spin_for_a_bounded_time_wherever_a_program_begins() -> None:
    """OpenMP says what it read when torch was imported."""
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for code in ("import smart, torch", "import smart.model, torch", "import common"):
        path = os.pathsep.join([str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
            env=env | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": path},
        )  # fmt: skip
        assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr, done.stderr
