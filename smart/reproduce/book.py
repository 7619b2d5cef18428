"""The steps of a reproduction: which are done, from which inputs, and running the rest."""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from smart import UserError
from smart.files import hold, is_empty, parse_json, sha256, write_atomically
from smart.run import StopRequest

STATE, LOGS, REPLACED = "state.json", "logs", "replaced"
OUT = "{out}"  # stands for the output folder in a step's words


class Step(NamedTuple):
    """One program to run, and its outputs in the folder ``<OUT>/<name>``."""

    name: str
    title: str
    words: tuple[str, ...]  # module and arguments, after ``python -m``
    outputs: tuple[str, ...]  # patterns in the step's folder: the files that later steps and the page read
    after: tuple[str, ...] = ()  # steps whose outputs it reads
    given: str = ""  # other inputs: a configuration's text, checksums of files from elsewhere
    resume: tuple[str, ...] = ()  # further arguments to continue an unfinished step
    last: str = ""  # the file that the program writes last, in one rename, if it refuses to run once that exists

    def key(self, done: dict[str, dict[str, Any]]) -> str:
        """A hash of the command and of the outputs of the steps before it."""
        made = {name: done[name]["outputs"] for name in self.after}
        return hashlib.sha256(json.dumps([self.words, self.given, made], sort_keys=True).encode()).hexdigest()


class Book:
    """``state.json``: for each step its key, whether it was finished, its seconds, and its outputs' SHA-256."""

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            if out.exists() and (not out.is_dir() or (not is_empty(out) and not (out / STATE).is_file())):
                raise UserError(f"--out {out} holds something else; choose a new folder")
            out.mkdir(parents=True, exist_ok=True)
            self.rows: dict[str, dict[str, Any]] = {}
            if (out / STATE).is_file():
                self.rows = parse_json((out / STATE).read_text(encoding="utf-8"))
                if not isinstance(self.rows, dict) or not all(map(self._is_row, self.rows.values())):
                    raise ValueError("it has a different structure")
            else:
                self._write()
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"--out {out}: {STATE} cannot be read ({error}); choose a new folder") from None

    @staticmethod
    def _is_row(row: Any) -> bool:
        return (
            isinstance(row, dict)
            and isinstance(row.get("key"), str)
            and isinstance(row.get("seconds"), int | float)
            and isinstance(row.get("outputs", {}), dict)
        )

    def _write(self) -> None:
        write_atomically(self.out / STATE, json.dumps(self.rows, indent=1).encode())

    def is_done(self, step: Step) -> bool:
        """Whether a step was finished with this command and these inputs, and its outputs are unchanged."""
        row = self.rows.get(step.name)
        if row is None or "outputs" not in row or any(name not in self.rows for name in step.after):
            return False
        return bool(row["key"] == step.key(self.rows)) and self.made(step) == row["outputs"]

    def was_begun(self, step: Step) -> bool:
        """Whether the step's folder holds unfinished work of this command and these inputs."""
        row = self.rows.get(step.name)
        return row is not None and "outputs" not in row and bool(row["key"] == step.key(self.rows))

    def made(self, step: Step) -> dict[str, str]:
        """SHA-256 of each existing output, by name."""
        folder = self.out / step.name
        files = sorted({path for pattern in step.outputs for path in folder.glob(pattern) if path.is_file()})
        return {str(path.relative_to(folder)): sha256(path) for path in files}

    def begin(self, step: Step) -> None:
        """Record that a step has begun; earlier contents of its folder are moved to ``replaced/``."""
        folder = self.out / step.name
        if folder.exists():
            aside = self.out / REPLACED
            aside.mkdir(exist_ok=True)
            number = len(list(aside.glob(f"{step.name}-*"))) + 1
            os.replace(folder, aside / f"{step.name}-{number}")
        self.rows[step.name] = {"key": step.key(self.rows), "seconds": 0.0}
        self._write()

    def spend(self, step: Step, seconds: float) -> float:
        """Add to a step's time; returns the total."""
        self.rows[step.name]["seconds"] = total = self.rows[step.name]["seconds"] + seconds
        self._write()
        return float(total)

    def forget(self, name: str) -> None:
        """Have a step run again."""
        if self.rows.pop(name, None) is not None:
            self._write()

    def finish(self, step: Step) -> None:
        """Record that a step is done."""
        self.rows[step.name]["outputs"] = self.made(step)
        self._write()


@contextlib.contextmanager
def hold_out(out: Path) -> Iterator[int]:
    """Hold the folder's lock. Each step's process gets its descriptor and keeps it, even if it outlives this one."""
    with contextlib.ExitStack() as held:
        for patience in range(100, -1, -1):  # a step takes a moment to end after its parent was killed
            try:
                lock = held.enter_context(hold(out))
                break
            except BlockingIOError:
                if not patience:
                    raise UserError(f"--out {out}: another process works in it; wait for it, or stop it") from None
                time.sleep(0.1)
        yield lock


# runs before a step's program: the process ends as soon as its parent (its first argument) does
START = """
import runpy, sys
from smart.system import die_with_parent
die_with_parent(int(sys.argv[1]))
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(step: Step, out: Path, log: Path, lock: int, stop: StopRequest, say: str, *, again: bool) -> int:
    """Run one step's program with its output in ``log``; returns its exit code, or minus the signal that ended it.

    A request to stop is passed on as SIGINT, on which every program saves its work.
    """
    (out / step.name).mkdir(exist_ok=True)
    again = again and not is_empty(out / step.name)  # otherwise it was stopped before it had anything to continue
    words = [word.replace(OUT, str(out)) for word in (*step.words, *(step.resume if again else ()))]
    log.parent.mkdir(exist_ok=True)
    shown = sys.stderr.isatty()
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join([sys.executable, '-m', *words])}\n".encode())
        file.flush()
        child = subprocess.Popen(
            [sys.executable, "-c", START, str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on below
            pass_fds=(lock,),
        )
        began, told = time.monotonic(), 0
        try:
            while True:
                try:
                    code = child.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    pass
                if stop.requested and not told:
                    told = stop.requested
                    child.send_signal(signal.SIGINT)
                if shown:
                    _overwrite(f"{say} {_clock(time.monotonic() - began)}  {_last_line(log)}")
        except BaseException:  # a second Ctrl-C, or a failure here
            child.kill()
            child.wait()
            raise
        finally:
            if shown:
                _overwrite("")
    return code


def _overwrite(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        sys.stderr.write(f"\r\033[K{text[:width]}")
        sys.stderr.flush()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed, or nobody reads the pipe any more
        click.echo(text, err=True)


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def perform(steps: Sequence[Step], out: Path, book: Book, lock: int) -> None:
    """Run the steps that are not done yet. Raises ``click.ClickException`` with the step's exit code if one fails."""
    with StopRequest() as stop:
        for number, step in enumerate(steps, 1):
            say = f"[{number:2}/{len(steps)}] {step.name}: {step.title}"
            if book.is_done(step):
                _say(f"{say} - done before ({_clock(book.rows[step.name]['seconds'])})")
                continue
            log = out / LOGS / f"{step.name}.log"
            again = book.was_begun(step)
            if not again:
                book.begin(step)
            _say(f"{say} - {'continues' if again else 'begins'}")
            began = time.monotonic()
            finished = again and step.last and (out / step.name / step.last).is_file()
            code = 0 if finished else run(step, out, log, lock, stop, say, again=again)
            seconds = book.spend(step, time.monotonic() - began)
            if stop.requested and code:
                raise _Failed(
                    f"stopped in step {step.name}; run the same command again to continue", 128 + stop.requested
                )
            missing = [pattern for pattern in step.outputs if not any((out / step.name).glob(pattern))]
            if code or missing:
                what = _ended(code) if code else f"did not write {', '.join(missing)}"
                raise _Failed(
                    f"step {step.name} {what}; its log is {log}, which ends:\n"
                    f"  {_last_line(log)}\nRun the same command again to continue with this step.",
                    code if code > 0 else 1,
                )
            book.finish(step)
            _say(f"{say} - done in {_clock(seconds)}")
            if stop.requested:
                raise _Failed("stopped; run the same command again to continue", 128 + stop.requested)


def _ended(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by signal {signal.Signals(-code).name}"


class _Failed(click.ClickException):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # click reads it from the instance
