"""Runs of ``python -m smart.grpo`` that end before their time: killed, asked to stop, damaged, out of disk."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import arguments, assert_same_run, metrics, rewrite, run, shared, start
from safetensors.torch import load_file, save_file

from smart.tuning import AHEAD

pytestmark = pytest.mark.slow


def test_an_existing_run_is_kept(finished: Path, base: Path, tmp_path: Path) -> None:
    finished = shutil.copytree(finished, tmp_path / "r", symlinks=True)
    before = (finished / "metrics.jsonl").read_bytes()
    again = arguments(base, tmp_path)
    status, output = run("grpo", *again)
    assert status == 2 and "already exists; use --resume to continue it, --overwrite to replace it" in output
    status, output = run("grpo", *again, "--resume", "--overwrite")
    assert status == 2 and "contradict" in output
    status, output = run("grpo", *again, "--resume", "--set", "grpo.beta=0.5", "--set", "grpo.rollouts_ahead=1")
    assert status == 2 and "grpo.beta" in output and "0.04" in output and "grpo.rollouts_ahead was 0" in output
    assert (finished / "metrics.jsonl").read_bytes() == before
    tuned = finished / "tuned" / "model.safetensors"
    whole, limit = tuned.read_bytes(), tuned.stat().st_size // 2
    status, output = run(
        "grpo", *again, "--resume", file_size=limit
    )  # nothing is left to do but the comparison; a full disk
    assert status == 1 and "could not be written" in output and tuned.read_bytes() == whole, output
    status, output = run("grpo", *again, "--resume")
    assert status == 0, output
    assert (finished / "metrics.jsonl").read_bytes() == before and tuned.read_bytes() == whole
    assert not list(finished.glob(".*"))


@pytest.mark.parametrize("ahead", [0, 1])
def test_killed_again_and_again_then_resumed_is_the_same_run(
    base: Path, either: list[Path], tmp_path: Path, ahead: int
) -> None:
    """SIGKILL at random instants; what is resumed ends bit for bit like what was never interrupted."""
    instants = random.Random(7)
    shared_memory = shared()
    changes = {"grpo.rollouts_ahead": ahead}
    settings = ("--config", "quickstart.toml", *arguments(base, tmp_path, **changes))

    def words() -> tuple[str, ...]:
        return (*settings, *(["--resume"] if (tmp_path / "r" / "config.toml").exists() else []))

    for attempt in range(12):
        # the first one is killed while it imports, or soon after; later ones are given time to get further
        process = start("grpo", *words(), fresh=attempt == 0)
        time.sleep(instants.uniform(1, 6) if attempt == 0 else instants.uniform(0.1, 1 + attempt / 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
    status, output = run("grpo", *words(), fresh=ahead == 1)
    assert status == 0, output
    assert_same_run(tmp_path / "r", either[ahead])
    assert shared() <= shared_memory
    assert not [path for path in (tmp_path / "r").rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize(("number", "ahead"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGHUP, 0)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    base: Path, either: list[Path], tmp_path: Path, number: signal.Signals, ahead: int
) -> None:
    changes = {"grpo.rollouts_ahead": ahead}
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **changes))
    path = tmp_path / "r" / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"--config {tmp_path}/r/config.toml --resume" in output and "Traceback" not in output
    assert (tmp_path / "r" / "checkpoints" / f"{metrics(tmp_path / 'r')[-1]['step']:08d}").is_dir()
    status, output = run("grpo", "--config", str(tmp_path / "r" / "config.toml"), "--resume")
    assert status == 0, output
    assert_same_run(tmp_path / "r", either[ahead])


def test_killed_right_after_the_last_checkpoint_the_rest_is_made_up_for(
    base: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "r", symlinks=True)
    best = (finished / "checkpoints" / "best").readlink()
    (tmp_path / "r" / "checkpoints" / "best").unlink()
    curve = tmp_path / "r" / "reward_mean.png"
    curve.write_bytes(b"older")
    for leftover in (curve.with_name(f".{name}.{'a' * 16}.tmp") for name in ("reward_mean.png", "summary.json")):
        leftover.write_bytes(b"half")
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path), "--resume")
    assert status == 0, output
    assert (tmp_path / "r" / "checkpoints" / "best").readlink() == best
    assert curve.read_bytes() == (finished / "reward_mean.png").read_bytes()
    assert not list((tmp_path / "r").glob(".*"))


def stop_once_there_is(path: Path, process: subprocess.Popen[str], folder: Path) -> None:
    """SIGTERM as soon as a run has written ``path``: it prints the command that continues."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"--config {folder}/config.toml --resume" in output and "Traceback" not in output


def test_asked_to_stop_before_its_first_iteration_it_says_how_to_go_on(base: Path, tmp_path: Path) -> None:
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path))
    stop_once_there_is(tmp_path / "r" / "config.toml", process, tmp_path / "r")
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.parametrize("after", ["checkpoints/00000002", "final/00-base.mid"])
def test_asked_to_stop_after_the_last_iteration_it_stops(base: Path, tmp_path: Path, after: str) -> None:
    """While base and tuned are compared, of many prompts; only that is done again."""
    short = {"grpo.iterations": 2, "track.held_out_every": 0, "track.final_prompts": 300, "render.seconds": 0.5}
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **short))
    stop_once_there_is(tmp_path / "r" / after, process, tmp_path / "r")
    assert not (tmp_path / "r" / "summary.json").exists()
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    status, output = run("grpo", "--config", str(tmp_path / "r" / "config.toml"), "--resume")
    assert status == 0 and (tmp_path / "r" / "summary.json").exists(), output
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_a_render_worker_that_is_killed_costs_nothing(base: Path, finished: Path, tmp_path: Path) -> None:
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path))
    killed = 0
    path = tmp_path / "r" / "metrics.jsonl"
    while process.poll() is None and killed < 3:
        if path.exists() and len(path.read_text().splitlines()) > killed:  # one in each of the first iterations
            for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                    for pid in task.read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
            killed += 1
        time.sleep(0.01)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert killed
    assert_same_run(tmp_path / "r", finished)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(base: Path, finished: Path, tmp_path: Path) -> None:
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path))
    shutil.copytree(finished, tmp_path / "r", symlinks=True)
    newest = tmp_path / "r" / "checkpoints" / "00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    status, output = run("grpo", *args, "--resume")
    assert status == 0 and "00000006: state.safetensors is damaged" in output
    assert "Traceback" not in output
    assert_same_run(tmp_path / "r", finished)
    for file in (tmp_path / "r" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    status, output = run("grpo", *args, "--resume")
    assert status == 2 and "can be used" in output and "Traceback" not in output


def test_two_processes_do_not_work_in_one_run(base: Path, finished: Path, tmp_path: Path) -> None:
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path))
    first = start("grpo", *args)
    while not (tmp_path / "r" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    for how in ("--resume", "--overwrite"):
        status, output = run("grpo", *args, how)
        assert status == 2 and "another process is working in it" in output and "Traceback" not in output
    first.send_signal(signal.SIGCONT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert_same_run(tmp_path / "r", finished)


def test_a_run_goes_on_when_nobody_reads_what_it_says(base: Path, finished: Path, tmp_path: Path) -> None:
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert_same_run(tmp_path / "r", finished)


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(base: Path, tmp_path: Path) -> None:
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path))
    process = start("grpo", *args)
    checkpoints = tmp_path / "r" / "checkpoints"
    while not (checkpoints / "00000002").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    # the damage of a bad step, in a checkpoint that is otherwise whole
    newest = max(path for path in checkpoints.iterdir() if path.name.isdecimal())
    weights = load_file(newest / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "other", metadata={"format": "pt"})
    rewrite(newest, "model.safetensors", (tmp_path / "other").read_bytes())
    status, output = run("grpo", *args, "--resume")
    assert status == 1 and "Traceback" not in output, output
    assert "stopped before it changed the weights" in output and "not finite" in output
    assert f"last good checkpoint is {newest}" in output


def test_a_batch_drawn_ahead_that_is_none_is_refused(base: Path, either: list[Path], tmp_path: Path) -> None:
    shutil.copytree(either[1], tmp_path / "r")
    for step in ("00000006", "00000004"):
        shutil.rmtree(tmp_path / "r" / "checkpoints" / step, ignore_errors=True)
    (newest,) = [path for path in (tmp_path / "r" / "checkpoints").glob("0*") if path.name == "00000002"]
    save_file({"tokens": torch.zeros(2, 2)}, tmp_path / "other")
    rewrite(newest, AHEAD, (tmp_path / "other").read_bytes())
    args = arguments(base, tmp_path, **{"grpo.rollouts_ahead": 1})
    status, output = run("grpo", "--config", "quickstart.toml", *args, "--resume")
    assert status == 2 and f"{AHEAD} does not hold a batch" in output and "Traceback" not in output, output


def test_a_disk_that_takes_no_more_ends_the_run_in_one_line(base: Path, tmp_path: Path) -> None:
    """A limit on the size of a file, between that of a checkpoint's weights and that of its optimiser's state."""
    limit = 3 * (base / "model.safetensors").stat().st_size // 2

    settings = arguments(base, tmp_path, **{"render.seconds": 0.25})
    status, output = run("grpo", "--config", "quickstart.toml", *settings, file_size=limit)
    assert status == 1 and "Traceback" not in output, output
    assert "could not be written" in output and "--resume" in output
    assert list((tmp_path / "r" / "checkpoints").iterdir()) == []
    status, output = run("grpo", "--config", "quickstart.toml", *settings, "--resume")
    assert status == 0, output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system in memory: called with mount options, it is made, or mounted anew with them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def test_a_folder_that_is_moved_ends_the_run_in_one_line(base: Path, tmp_path: Path) -> None:
    """TensorBoard's thread meets it first, and would print its own traceback."""
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **{"grpo.iterations": 1000}))
    path = tmp_path / "r" / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not be written" in output and "Traceback" not in output, output


def test_a_disk_that_fills_up_and_then_is_read_only(
    base: Path, finished: Path, small_disk: Callable[[str], Path]
) -> None:
    """It fills up at the first checkpoint, then at a later file, then is read-only: a line each, no byte lost."""
    folder = small_disk("size=900k")
    args = ("--config", "quickstart.toml", *arguments(base, folder))
    checkpoints = folder / "r" / "checkpoints"
    for size, made, more in (("900k", 0, ()), ("2600k", 1, ("--resume",))):
        small_disk(f"size={size}")
        status, output = run("grpo", *args, *more)
        assert status == 1 and "Traceback" not in output, output
        assert "could not be written" in output and "--resume" in output
        assert len(list(checkpoints.glob("*"))) >= made, output
    small_disk("size=64m,ro")
    status, output = run("grpo", *args, "--resume")
    assert status == 1 and "Read-only" in output and "Traceback" not in output, output
    small_disk("rw")
    status, output = run("grpo", *args, "--resume")
    assert status == 0, output
    assert_same_run(folder / "r", finished)
