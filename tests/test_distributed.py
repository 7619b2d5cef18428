"""smart.distributed: real processes connected by gloo, compared with one process; and one that dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import programs
import pyarrow.parquet as pq
import pytest
import torch
from runs import arguments, metrics, run
from safetensors.torch import load_file

from smart import UserError
from smart.distributed import World, join

pytestmark = pytest.mark.slow  # whole programs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 is set in the environment, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment: expected a whole number from 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK = 2 .* less than WORLD_SIZE"),
        ({"WORLD_SIZE": "1"}, ""),
        ({"WORLD_SIZE": ""}, ""),
        ({"RANK": "3"}, ""),
    ],
)
def test_an_environment_of_several_processes_is_whole(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not message:
        with join(torch.device("cpu")) as world:
            assert world == World(torch.device("cpu"))
        return
    with pytest.raises(UserError, match=message), join(torch.device("cpu")):
        pass


ALONE = """
from datetime import timedelta
import torch
from smart import distributed
distributed.TIMEOUT = timedelta(seconds=3)
try:
    with distributed.join(torch.device("cpu")):
        pass
except Exception as error:
    print(type(error).__name__, error)
"""


def test_who_waits_for_a_process_that_never_comes_gives_up() -> None:
    codes, output = finish(start_two("-c", ALONE, ranks="0"))
    assert codes == [0] and "Failure process 0 of 2 did not find all others at 127.0.0.1:" in output, output
    assert "within 0.05 minutes" in output


AGREES = """
import sys
import torch
from smart import Failure, UserError
from smart.distributed import join

class Wrong(UserError):
    pass

with join(torch.device("cpu")) as world:
    world.confirm({"seed": 1}, "then")
    try:
        world.confirm({"seed": 1, "rate": 0.1 * (1 + world.rank)}, "use one")
    except Exception as error:
        print("confirm", world.rank, type(error).__name__, error.exit_code, error, flush=True)
    with world.together():
        pass
    try:
        with world.together():
            if world.rank == 1:
                raise Failure("the disk is full")
    except Exception as error:
        print("together", world.rank, type(error).__name__, error.exit_code, error, flush=True)
"""


def test_all_confirm_the_same_and_end_together() -> None:
    codes, output = finish(start_two("-c", AGREES))
    assert codes == [0, 0], output
    host = socket.gethostname()
    difference = f"process 1 ({host}) has another rate than process 0 ({host}): 0.2 instead of 0.1; use one"
    assert f"confirm 0 UserError 2 {difference}" in output and f"confirm 1 _Told 2 {difference}" in output
    assert f"together 1 Failure 1 process 1 ({host}): the disk is full" in output
    assert "together 0 _Told 1 the disk is full" in output


def test_a_process_with_another_configuration_is_named(base: Path, tmp_path: Path) -> None:
    words = ("-m", "smart.grpo", *arguments(base, tmp_path), "--set", "grpo.learning_rate=0.001")
    codes, output = finish(start_two(*words, more={"1": ["--set", "grpo.learning_rate=0.002"]}))
    assert codes == [2, 2] and output.count("Error: ") == 1, output
    assert "has another grpo.learning_rate than process 0" in output and "0.002 instead of 0.001" in output
    assert not (tmp_path / "r").exists()


DIVERGES = """
import sys
import torch
from smart import tuning
from smart.__main__ import main

record = tuning.Tuning.record

def diverge(run, step, *rest):
    if run.world.rank == 1 and step == 3:
        with torch.no_grad():
            next(iter(run.policy.parameters())).add_(1e-6)
    record(run, step, *rest)

tuning.Tuning.record = diverge
main(["grpo", *sys.argv[1:]])
"""

BLIND = """
import sys
from smart.__main__ import main
from smart.run import checkpoint
from smart import UserError, distributed

verify = checkpoint.verify

def blind(folder):
    if __import__("os").environ["RANK"] == "1":
        raise UserError(f"checkpoint {folder}: stale")
    verify(folder)

checkpoint.verify = blind
main(["grpo", *sys.argv[1:]])
"""


def test_weights_that_differ_and_a_checkpoint_that_one_does_not_see_end_the_run(base: Path, tmp_path: Path) -> None:
    words = arguments(base, tmp_path)
    codes, output = finish(start_two("-c", DIVERGES, *words))
    assert codes == [1, 1] and output.count("Error: ") == 1 and "Traceback" not in output, output
    assert "has another SHA-256 of the weights after step 4 than process 0" in output
    assert sorted(path.name for path in (tmp_path / "r" / "checkpoints").glob("0*")) == ["00000002"]
    codes, output = finish(start_two("-c", BLIND, *words, "--resume"))
    assert codes == [2, 2] and output.count("Error: ") == 1, output
    assert f"Error: process 1 ({socket.gethostname()}): checkpoint {tmp_path}/r/checkpoints/00000002: stale" in output


def test_shares_are_neighbours_and_complete() -> None:
    for count in range(1, 20):
        for size in range(1, 6):
            shares = [World(torch.device("cpu"), rank, size).share(count) for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged() -> None:
    world = World(torch.device("cpu"))
    assert world.lead and world.gather("a") == ["a"] and world.sum(1.5, 2) == [1.5, 2] and not world.any(False)


EXCHANGES = """
import torch
from smart.distributed import join

with join(torch.device("cpu")) as world:
    assert world.size == world.neighbours == 2 and world.lead == (world.rank == 0)
    assert world.sum(world.rank + 1, 0.5) == [3.0, 1.0]
    assert world.any(world.rank == 1) and not world.any(False)
    parts = world.gather({"rank": world.rank, "rows": torch.arange(world.rank + 1)})
    assert [part["rank"] for part in parts] == [0, 1] and parts[1]["rows"].tolist() == [0, 1]
    rows = world.gather_rows(torch.full((1, world.rank + 1), world.rank), 7)
    assert rows.tolist() == [[0, 7], [1, 1]]
    assert world.gather_rows(torch.ones(1, 2 - world.rank, dtype=torch.bool)).tolist() == [[True, True], [True, False]]
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    for weight in weights:
        weight.grad = torch.full_like(weight, 10.0 ** world.rank)
    world.sum_gradients(weights)
    assert all((weight.grad == 11).all() for weight in weights)
"""

GRADIENTS = """
import sys
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from conftest import make_tiny_model
from test_grpo import gradients
from smart.distributed import join
from smart.tokens import build_tokenizer

model = make_tiny_model(build_tokenizer())
with join(torch.device("cpu")) as world:
    for average in ("token", "sequence", "constant"):
        found, stats = gradients(model, world=world, average=average, micro_batch=3)
        found |= {f"stats.{key}": torch.tensor(value) for key, value in stats.items()}
        save_file(found, f"{average}-{world.rank}.safetensors")
"""


def start_two(
    *words: str, ranks: str = "01", more: dict[str, list[str]] | None = None, **options: Any
) -> list[subprocess.Popen[str]]:
    """Two processes with the environment that torchrun gives its own, by rank; without torchrun, which takes long.

    ``ranks`` are those that are started; ``more``: words that only the process of that rank gets.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [
        programs.start(
            [sys.executable, *words, *(more or {}).get(rank, [])],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            **options,
        )
        for rank in ranks
    ]


def finish(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes by rank, and what both have said."""
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(outputs)


def run_two(*words: str, **options: Any) -> None:
    codes, output = finish(start_two(*words, **options))
    assert codes == [0, 0], output


def test_exchanges(tmp_path: Path) -> None:
    run_two("-c", EXCHANGES)


def test_two_processes_have_the_gradient_of_one(tmp_path: Path, tiny_model: Any) -> None:
    from test_grpo import gradients

    run_two("-c", GRADIENTS, str(Path(__file__).parent), cwd=tmp_path)
    for average in ("token", "sequence", "constant"):
        one, stats = gradients(tiny_model, average=average, micro_batch=3)
        for rank in (0, 1):
            two = load_file(tmp_path / f"{average}-{rank}.safetensors")
            for name, gradient in one.items():
                torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-5)
            for key, value in stats.items():
                assert two[f"stats.{key}"].item() == pytest.approx(value, rel=1e-4, abs=1e-7), key


def launch(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, "-m", "smart.grpo", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers_of(launcher: int) -> dict[int, int]:
    """Process ids by rank of the processes that torchrun started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        rank = next((int(part[5:]) for part in environment if part.startswith(b"RANK=")), None)
        if parent == launcher and rank is not None:
            found[rank] = int(entry.name)
    return found


@pytest.fixture(scope="module")
def together(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two uninterrupted runs of two processes, by their ``grpo.rollouts_ahead``; torchrun starts one of them."""
    folders = [tmp_path_factory.mktemp("together") for _ in range(2)]
    words = [
        ("--config", "quickstart.toml", *arguments(base, folder, **{"grpo.prompts": 3, "grpo.rollouts_ahead": ahead}))
        for ahead, folder in enumerate(folders)
    ]
    process = launch(*words[0])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    run_two("-m", "smart.grpo", *words[1])
    return [folder / "r" for folder in folders]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.slow
def test_two_processes_tune_as_one_does(
    base: Path,
    together: list[Path],
    tmp_path: Path,
    ahead: int,
) -> None:
    """Three prompts for two processes: one writes for both, and the samples are those of one process."""
    changes = {"grpo.prompts": 3, "grpo.rollouts_ahead": ahead}
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **changes))
    assert status == 0, output
    one, two = metrics(tmp_path / "r"), metrics(together[ahead])
    assert [row["step"] for row in two] == [row["step"] for row in one] == [0, 1, 2, 3, 4, 5, 6]
    for key in (key for key in one[0] if key.startswith("held_out/")):  # of the base: shares of one set of pieces
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-3, abs=1e-6), key
    for key in (
        "reward/mean",
        "reward/std",
        "policy/kl",
        "policy/grad_norm",
        "completions/length",
        "clips/silent_rate",
    ):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-4, abs=1e-7), key
    tokens = [pq.read_table(f / "completions")["tokens"].to_pylist() for f in (tmp_path / "r", together[ahead])]
    by_the_base = 9 * (1 + ahead)
    assert tokens[0][:by_the_base] == tokens[1][:by_the_base]
    assert len({tuple(row) for row in tokens[1][:9]}) > 5  # distinct samples
    if ahead:  # the gradient of samples from another policy
        for key in ("policy/kl", "policy/grad_norm", "policy/ratio", "policy/clip_fraction", "policy/dlogp_mean"):
            assert two[2][key] == pytest.approx(one[2][key], rel=1e-2, abs=1e-3), key
    first, second = (sorted(p.name for p in (f / "final").iterdir()) for f in (tmp_path / "r", together[ahead]))
    assert first == second
    a, b = (load_file(folder / "tuned" / "model.safetensors") for folder in (tmp_path / "r", together[ahead]))
    for name, weights in a.items():
        torch.testing.assert_close(b[name], weights, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_its_name(base: Path, together: list[Path], tmp_path: Path) -> None:
    """Each process finds its share of the batch that was sampled ahead."""
    more = arguments(base, tmp_path, **{"grpo.prompts": 3, "grpo.rollouts_ahead": 1})
    process = launch("--config", "quickstart.toml", *more)
    while not list(tmp_path.glob("r/checkpoints/0*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank      : 1" in output and "Signal 9 (SIGKILL)" in output
    run_two("-m", "smart.grpo", "--config", "quickstart.toml", *more, "--resume")
    assert metrics(tmp_path / "r") == metrics(together[1])
    weights = "tuned/model.safetensors"
    assert (tmp_path / "r" / weights).read_bytes() == (together[1] / weights).read_bytes()


def test_one_that_is_asked_to_stop_stops_all(base: Path, tmp_path: Path) -> None:
    words = ("--config", "quickstart.toml", *arguments(base, tmp_path, **{"grpo.iterations": 500}))
    processes = start_two("-m", "smart.grpo", *words)
    path = tmp_path / "r" / "metrics.jsonl"
    while not (path.exists() and path.read_bytes()):
        assert processes[0].poll() is None
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes, output = finish(processes)
    assert codes == 2 * [128 + signal.SIGTERM], output
    assert "lost contact with another" not in output and "Traceback" not in output
    assert f"Continue with: {sys.executable} -m smart.grpo --config {tmp_path}/r/config.toml --resume" in output
    assert [int(folder.name) for folder in (tmp_path / "r" / "checkpoints").glob("0*")][-1] < 500


def test_fewer_prompts_than_processes_are_refused(base: Path, tmp_path: Path) -> None:
    words = ("--config", "quickstart.toml", *arguments(base, tmp_path, **{"grpo.prompts": 1}))
    codes, output = finish(start_two("-m", "smart.grpo", *words))
    assert codes == [2, 2] and "grpo.prompts = 1: expected at least one for each of 2 processes" in output
