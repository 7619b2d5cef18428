"""smart doctor: it names missing things with a command that fixes each, and sets the exit code."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import smart.doctor.command
import smart.doctor.machine
from smart.config import dumps, load
from smart.model import SHIPPED

READY = ["--set", "render.workers=1"]


def ask(*arguments: str) -> tuple[int, dict[str, list[str]]]:
    """The exit code, and the state, the text and the remedy of each row."""
    done = CliRunner().invoke(smart.doctor.command.main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    rows: dict[str, list[str]] = {}
    name = ""
    for line in done.output.splitlines():
        if line.strip().startswith("-> "):
            rows[name].append(line.strip()[3:])
        elif line and line.split()[0] in ("ready", "MISSING", "note"):
            state, name, text = line.split(maxsplit=2)
            rows[name] = [state, text]
    return done.exit_code, rows


@pytest.mark.slow
def test_a_machine_that_is_ready(tmp_path: Path) -> None:
    """In a new process, from an empty folder, without a network; it leaves no files."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "smart.doctor"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSING" not in done.stdout and "a worker process rendered middle C" in done.stdout
    assert done.stdout.endswith(f"ready: {shlex.quote(sys.executable)} -m smart.grpo --config quickstart.toml\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "row", "found", "mend"),
    [
        ("grpo.beta=-1", "configuration", "grpo.beta = -1", "correct that setting"),
        ("model.base=nowhere", "base", "nowhere", "--set model.base=piano"),
        ("model.base=owner/model", "base", "owner/model is not in the cache", "download owner/model"),
        ("model.base=owner/my--model", "base", "owner/my--model is not in the cache", "download owner/my--model"),
        ("model.base=owner/model.git", "base", "owner/model.git is not in the cache", None),
        ("render.soundfont=~unknown/x.sf2", "soundfont", "~unknown/x.sf2 does not exist", None),
        ("render.soundfont=musescore", "soundfont", "is not on this machine", "apt-get install musescore-general"),
        ("render.soundfont=no.sf2", "soundfont", "does not exist", None),
        ("reward.kind=taste", "reward", 'no reward "taste"', "--set reward.kind=ce_proxy"),
        ("reward.kind=audiobox", "reward", "is not in the cache", "download facebook/audiobox-aesthetics"),
        ("prompts.kind=dataset", "prompts", "prompts.corpus is empty", "smart corpus build"),
        ("run.folder=/proc/none", "disk", "cannot be written", "--set run.folder="),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    override: str, row: str, found: str, mend: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("smart.render.soundfonts._folders", lambda: [tmp_path])
    code, rows = ask("--set", override, *READY)
    assert code == 1 and rows[row][0] == "MISSING" and found in rows[row][1], rows
    assert [name for name in rows if rows[name][0] == "MISSING"] == [row]
    assert mend is None or mend in rows[row][2]


def test_the_folder_of_a_user_whom_nobody_knows(tmp_path: Path) -> None:
    code, rows = ask("--set", "reward.kind=audiobox", "--set", "reward.options.model=~unknown/x.pt", *READY)
    assert code == 1 and "there is no such folder or file" in rows["reward"][1], rows


def test_a_small_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smart.doctor.machine, "_available_memory", lambda: 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    code, rows = ask("--set", f"run.folder={tmp_path}", "--set", "render.workers=999")
    assert code == 1 and rows["disk"][0] == "MISSING" and "0.0 GiB free" in rows["disk"][1]
    assert rows["memory"][0] == "note" and "micro_batch" in rows["memory"][2]
    assert rows["cores"][0] == "note" and "render.workers=0" in rows["cores"][2]


def test_a_base_that_is_damaged_and_a_run_that_exists(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(SHIPPED / "piano-small", base)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    overrides = [f"model.base={base}", f"run.folder={tmp_path / 'runs'}", "run.name=mine"]
    words = [*(word for text in overrides for word in ("--set", text)), *READY]
    begin(tmp_path / "runs" / "mine", words)
    code, rows = ask(*words)
    assert code == 1 and rows["base"][0] == "MISSING" and "cannot be read" in rows["base"][1]
    assert rows["run"][0] == "note" and "--resume" in rows["run"][1]
    code, rows = ask(*words, "--set", "grpo.beta=0.3")  # --resume would be refused
    assert rows["run"][0] == "MISSING" and "grpo.beta was 0.04 and is 0.3" in rows["run"][1]
    assert "run.name=mine-2" in rows["run"][2]
    (tmp_path / "runs" / "mine" / "config.toml").rename(tmp_path / "runs" / "mine" / "other")
    code, rows = ask(*words)
    assert rows["run"][0] == "MISSING" and "nothing to resume" in rows["run"][1]


def begin(folder: Path, words: Sequence[str]) -> None:
    """What a run leaves that was killed before its first checkpoint."""
    folder.mkdir(parents=True)
    settings = [word for word in words if word != "--set"]
    (folder / "config.toml").write_text(dumps(load("quickstart.toml", settings)))


def test_a_file_system_that_lacks_something_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.symlink", refuse)
    code, rows = ask("--set", f"run.folder={tmp_path}", *READY)
    assert code == 0 and rows["disk"][0] == "note" and "its file system has no symbolic links" in rows["disk"][1]


def test_a_ready_run_that_exists_is_continued(tmp_path: Path) -> None:
    overrides = ["--set", f"run.folder={tmp_path}", "--set", "run.name=mine", *READY]
    begin(tmp_path / "mine", overrides)
    done = CliRunner().invoke(smart.doctor.command.main, overrides)
    command = [sys.executable, "-m", "smart.grpo", "--config", "quickstart.toml", *overrides, "--resume"]
    assert done.exit_code == 0 and done.output.endswith(f"ready: {shlex.join(command)}\n"), done.output


def test_memory_of_the_control_group_counts() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < smart.doctor.machine._available_memory() <= total
