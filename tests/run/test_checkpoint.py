"""smart.run.checkpoint: what was saved comes back, whatever happened to the newest copy."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from safetensors.torch import save_file

from smart import UserError
from smart.files import hold, lacks, replace_files, sha256, write_atomically
from smart.run import StopRequest, checkpoint


def write_text(text: str) -> Any:
    return lambda folder: (folder / "weights").write_text(text)


def test_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, write_text(str(step)), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 30]
    assert checkpoint.latest(tmp_path) == tmp_path / "00000030"


def test_the_umask_decides_who_may_read_a_checkpoint(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        saved = checkpoint.save(tmp_path, 1, lambda folder: save_file({"a": torch.zeros(1)}, folder / "weights"))
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in saved.iterdir()} == {"0o640"}


def test_the_best_one_stays_and_has_a_link(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        checkpoint.save(tmp_path, step, write_text(str(step)), keep=1, best=best)
        assert checkpoint.steps(tmp_path) == sorted({best, step})
        assert (tmp_path / checkpoint.BEST / "weights").read_text() == str(best)
    assert checkpoint.latest(tmp_path) == tmp_path / "00000006"
    assert (tmp_path / checkpoint.BEST).readlink() == Path("00000005")  # a run's folder can be moved


def test_what_follows_a_checkpoint_is_done_again_where_a_kill_came_before_it(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, write_text(str(step)), best=1)
    (tmp_path / ".best.link").symlink_to("00000003")
    (tmp_path / "00000002" / checkpoint.MANIFEST).unlink()  # it was being deleted
    (tmp_path / ".00000005.tmp").mkdir()
    checkpoint.tidy(tmp_path, 4, keep=1, best=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000004", "best"]
    assert (tmp_path / checkpoint.BEST).readlink() == Path("00000003")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "manifest removed"])
def test_a_damaged_one_is_named_and_the_one_before_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, write_text("weights" * step))
    newest = tmp_path / "00000002"
    file, manifest = newest / "weights", newest / checkpoint.MANIFEST
    match damage:
        case "flip":
            file.write_text("weightsWeights")
        case "cut":
            file.write_text("w")
        case "remove":
            file.unlink()
        case "manifest":
            manifest.write_text("{")
        case "manifest removed":
            manifest.unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "00000001"
    warning = capsys.readouterr().err
    assert "00000002: " in warning and warning.endswith("; trying the one before it\n")
    (tmp_path / "00000001" / "weights").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used: .*00000002.*00000001"):
        checkpoint.latest(tmp_path)


def test_one_that_the_disk_gives_back_no_more_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, write_text("x"))

    def read(path: Path) -> str:
        if "00000002" in str(path):
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", read)
    assert checkpoint.latest(tmp_path) == tmp_path / "00000001"
    assert "00000002: weights cannot be read (Input/output error)" in capsys.readouterr().err


def test_a_damaged_one_is_not_kept_in_place_of_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 3):
        checkpoint.save(tmp_path, step, write_text("x"))
    (tmp_path / "00000003" / "weights").unlink()
    for step in (2, 3):  # the run goes on from 1
        checkpoint.save(tmp_path, step, write_text("again"), keep=1)
        assert checkpoint.latest(tmp_path) == tmp_path / f"{step:08d}"
    assert checkpoint.steps(tmp_path) == [3]


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, write_text("x"))
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"sha256": {"../../secret": "0"}}))
    with pytest.raises(UserError, match="outside the folder"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "a" * 300])
def test_a_manifest_that_names_what_no_file_can_be_called_is_passed_over(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, write_text("x"))
    (tmp_path / "00000002" / checkpoint.MANIFEST).write_text(json.dumps({"sha256": {name: "0"}}))
    assert checkpoint.latest(tmp_path) == tmp_path / "00000001"
    assert "00000002: " in capsys.readouterr().err


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, write_text("good"))

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, fail, keep=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


@pytest.mark.slow
def test_a_crash_at_any_operation_leaves_a_checkpoint_that_loads(tmp_path: Path, tiny_model: Any) -> None:
    """The process dies before its k-th operation on files, for every k, with and without an older one of that step."""
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    names = ("open", "mkdir", "replace", "rename", "unlink", "rmdir", "fsync")

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(b"x" * 100_000)
        checkpoint.write_state(folder, tiny_model, optimizer)

    def dies_at(operation: int, root: Path) -> bool:
        """Save step 2 in a child that dies there; whether it got so far."""
        child = os.fork()
        if child == 0:
            seen = 0

            def counted(function: Any) -> Any:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal seen
                    seen += 1
                    if seen == operation:
                        os._exit(9)
                    return function(*args, **options)

                return call

            import builtins
            import io

            for name in names:
                setattr(os, name, counted(getattr(os, name)))
            builtins.open = io.open = counted(open)
            checkpoint.save(root, 2, write, keep=1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    for before in ((1,), (1, 2)):
        operation, died = 0, True
        while died:
            operation += 1
            root = tmp_path / f"{len(before)}-{operation}"
            for step in before:
                checkpoint.save(root, step, write)
            died = dies_at(operation, root)
            newest = checkpoint.latest(root)
            assert newest is not None and int(newest.name) in (1, 2), operation
            assert int(newest.name) == 2 or died
            checkpoint.read_tensors(newest / checkpoint.STATE)
            checkpoint.save(root, 3, write)  # and the next one is made
            assert checkpoint.latest(root) == root / "00000003" and not list(root.glob(".*"))
        assert operation > 15


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL at many instants of an endless series of saves: the newest checkpoint is always whole."""
    code = """
import sys, pathlib
from smart.run import checkpoint
root, step = pathlib.Path(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    checkpoint.save(root, step, lambda f: [(f / name).write_bytes(b"%d" % step * 100_000) for name in "ab"], keep=2)
"""
    reached = 0
    for delay in (0.01, 0.05, 0.013, 0.11, 0.027, 0.06):
        process = programs.start([sys.executable, "-c", code, str(tmp_path), str(reached)])
        deadline = time.monotonic() + 60
        while not any(step > reached for step in checkpoint.steps(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert checkpoint.steps(tmp_path)[-1] > reached
        newest = checkpoint.latest(tmp_path)
        assert newest == tmp_path / f"{checkpoint.steps(tmp_path)[-1]:08d}"  # none was damaged
        reached = int(newest.name)
        assert (newest / "a").read_bytes() == b"%d" % reached * 100_000
    checkpoint.save(tmp_path, reached + 1, write_text("x"), keep=2)
    assert not list(tmp_path.glob(".*"))  # no temporary folder is left behind


def test_optimiser_and_generators_come_back_exactly(tiny_model: Any, tmp_path: Path) -> None:
    def step(optimizer: Any, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(413, 32, generator=generator)
        optimizer.zero_grad()
        (tiny_model.lm_head.weight * noise).sum().backward()
        for weights in tiny_model.parameters():
            if weights.grad is None:
                weights.grad = torch.ones_like(weights)
        optimizer.step()
        return tiny_model.lm_head.weight.detach().clone()

    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    step(optimizer, generator)
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    checkpoint.write_state(tmp_path, tiny_model, optimizer, noise=generator)
    expected = [step(optimizer, generator) for _ in range(3)]

    tiny_model.load_state_dict(weights)
    fresh = torch.optim.AdamW(tiny_model.parameters(), lr=0.01)
    other = torch.Generator().manual_seed(99)
    checkpoint.read_state(tmp_path, tiny_model, fresh, noise=other)
    for value in expected:
        assert torch.equal(step(fresh, other), value)


def test_state_that_does_not_fit_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    checkpoint.write_state(tmp_path, tiny_model, optimizer)
    with pytest.raises(UserError, match="does not fit this run"):
        checkpoint.read_state(tmp_path, tiny_model, optimizer)
    tensors = {
        f"optimizer.{key}.{name}": torch.zeros(()) if key == "step" else torch.zeros(2, 3)
        for name, _ in tiny_model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    save_file(tensors, tmp_path / checkpoint.STATE)
    with pytest.raises(UserError, match=r"does not fit this run .*exp_avg.* is \(2, 3\)"):
        checkpoint.read_state(tmp_path, tiny_model, optimizer)
    (tmp_path / checkpoint.STATE).write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        checkpoint.read_state(tmp_path, tiny_model, optimizer)


def test_write_atomically_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"one", b"two"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


def test_no_link_is_followed_and_no_file_of_others_swept(tmp_path: Path) -> None:
    """Temporary names cannot be guessed; links and files that only look like temporary ones stay as they are."""
    (tmp_path / "victim").write_text("precious")
    for name in (".file.tmp", f".file.{'0' * 16}.tmp"):
        (tmp_path / name).symlink_to("victim")
    (tmp_path / ".theirs.tmp").write_text("theirs")
    taken = iter(("0" * 16, "1" * 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smart.files.secrets.token_hex", lambda _: next(taken))
        with pytest.raises(FileExistsError):
            write_atomically(tmp_path / "file", b"new")
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / ".theirs.tmp").read_text() == "theirs"
    write_atomically(tmp_path / ("x" * 255), b"the longest name")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_lacks_something_is_only_reported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No fsync of folders, no symbolic links, no locks: a warning each, once, and everything else is saved."""
    fsync = os.fsync

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    def of_files(descriptor: int) -> None:
        fsync(descriptor) if stat.S_ISREG(os.fstat(descriptor).st_mode) else refuse()

    monkeypatch.setattr("smart.files._warned", set())
    assert lacks(tmp_path) == []
    monkeypatch.setattr(os, "fsync", of_files)
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr("smart.files.fcntl.flock", refuse)
    assert len(lacks(tmp_path)) == 3 and os.listdir(tmp_path) == []
    for step in (1, 2):
        with hold(tmp_path):
            checkpoint.save(tmp_path / "root", step, lambda folder: (folder / "a").write_text("kept"), best=1)
    assert checkpoint.latest(tmp_path / "root") == tmp_path / "root" / "00000002"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(line.startswith("Warning: the file system of ") for line in warnings)


def test_several_may_replace_one_file(tmp_path: Path) -> None:
    """Two processes of two threads each, without end: whoever reads finds the whole of what one of them wrote."""
    code = """
import sys, threading
from pathlib import Path
from smart.files import write_atomically
def write(letter):
    for length in range(50_000, 50_150):
        write_atomically(Path(sys.argv[1]), letter * length)
threads = [threading.Thread(target=write, args=(letter.encode(),)) for letter in sys.argv[2]]
threading.excepthook = lambda failure: __import__("os")._exit(9)
[thread.start() for thread in threads]
"""
    path = tmp_path / "note"
    (tmp_path / ".note.0123456789abcdef.tmp").write_text("z" * 100_000)  # of a process that was killed
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letters]) for letters in ("ab", "cd")]
    while any(writer.poll() is None for writer in writers):
        text = path.read_text() if path.exists() else ""
        assert text == text[:1] * len(text) and (not text or len(text) >= 50_000)
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["note"]


def test_files_are_replaced_whole_and_the_last_one_last(tmp_path: Path) -> None:
    """The process dies at any operation, or the disk is full: each file is as before or new, "a" new only after "b"."""
    folder = tmp_path / "tuned"

    def write(text: str) -> Any:
        return lambda other: [(other / name).write_text(text * 1000) for name in "ab"]

    replace_files(folder, write("old"), last="a")

    def full(other: Path) -> None:
        (other / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_files(folder, full, last="a")
    operation, died = 0, True
    while died:
        operation += 1
        child = os.fork()
        if not child:
            left = operation

            def counted(function: Any) -> Any:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if not left:
                        os._exit(9)
                    return function(*args, **options)

                return call

            for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
                setattr(os, name, counted(getattr(os, name)))
            replace_files(folder, write("new"), last="a")
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        a, b = ((folder / name).read_text() for name in "ab")
        assert {a, b} <= {"old" * 1000, "new" * 1000} and (a <= b or a[0] != "n"), operation
        assert a[0] == "n" or died
        replace_files(folder, write("old"), last="a")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "tuned"]
    assert operation > 6


def test_first_signal_asks_second_interrupts() -> None:
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    try:
        for number in (signal.SIGHUP, signal.SIGINT):
            with StopRequest() as stop:
                os.kill(os.getpid(), number)
                assert stop.requested == number
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hung_up)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    """No name of a temporary file can be guessed, and one that exists is never opened."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".config.toml.tmp", ".tuned.tmp", ".00000001.tmp"):
        (folder / name).symlink_to(victim)
    write_atomically(folder / "config.toml", b"ours")
    replace_files(folder / "tuned", lambda other: (other / "a").write_text("ours"), last="a")
    checkpoint.save(folder, 1, lambda other: (other / "a").write_text("ours") and None)
    assert victim.read_text() == "mine" and (folder / "config.toml").read_bytes() == b"ours"
    assert (folder / "tuned" / "a").read_text() == (folder / "00000001" / "a").read_text() == "ours"


def test_a_file_of_any_length_of_name_can_be_replaced(tmp_path: Path) -> None:
    for length in (1, 120, 255):
        write_atomically(tmp_path / ("n" * length), b"x")
        assert os.listdir(tmp_path) == ["n" * length]
        (tmp_path / ("n" * length)).unlink()
