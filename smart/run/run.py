"""A run in progress: its folder, its files, its checkpoints, and requests to stop; for tuning and pretraining alike."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from smart.run import checkpoint
from smart.run.command import progress
from smart.run.folder import CONFIG, open_run_folder
from smart.run.stop import StopRequest
from smart.run.tracker import Onlooker, Tracker

if TYPE_CHECKING:
    from smart.distributed import World


class Run:
    """Holds a run's folder; use it as a context manager, then ``open`` its files.

    ``config`` is the text of its configuration, ``program`` the module that continues it, ``keep`` how many checkpoints
    stay (0: all). Of several processes the lead writes, and the others wait until the folder is there.
    """

    def __init__(
        self, folder: Path, config: str, *, program: str, world: World, resume: bool, overwrite: bool, keep: int
    ) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.last: Path | None = None  # the checkpoint to continue from
        self.files: Tracker
        self.bar: Any
        self._config, self._resume, self._overwrite = config, resume, overwrite
        self._program, self._world, self._keep = program, world, keep
        self._stop = StopRequest()
        self._opened = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            opened.enter_context(self._stop)  # before all that takes its time
            if self._world.lead:
                opened.enter_context(
                    open_run_folder(self.folder, self._config, resume=self._resume, overwrite=self._overwrite)
                )
            self._world.sum(0)  # the others wait until the folder is there
            if self._resume:
                self.last = checkpoint.latest(self.checkpoints)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def open(self, done: int, total: int, unit: str) -> None:
        """Open the run's files, cut back to step ``done``, and show the progress towards ``total``."""
        lead = self._world.lead
        self.files = self._opened.enter_context(Tracker(self.folder, start=done) if lead else Onlooker(self.folder))
        self.bar = self._opened.enter_context(progress(total=total, initial=done, unit=unit, show=lead))

    def steps(self, done: int, total: int, *, unless: Callable[[], object]) -> Iterator[int]:
        """The steps after ``done``, up to ``total``, as long as ``unless()`` gives no reason to end."""
        for step in range(done + 1, total + 1):
            if unless():
                return
            yield step

    def say(self, text: str) -> None:
        """A line for the user and the run's log."""
        self.files.say(text)

    def stopping(self) -> bool:
        """Whether a signal has asked any of the processes to stop; all get the same answer, at the same moment."""
        return self._world.any(bool(self._stop.requested))

    def leave(self) -> NoReturn:
        """End as the signal asked; ``--resume`` repeats what no checkpoint holds yet."""
        self.say(f"stopped; to go on: python -m {self._program} --config {self.folder / CONFIG} --resume")
        raise SystemExit(128 + (self._stop.requested or signal.SIGTERM))

    def save(self, step: int, write: Callable[[Path], None], *, best: int | None = None) -> None:
        """Make checkpoint ``step``, of what ``write(folder)`` writes; no checkpoint is ahead of the metrics."""
        self.files.flush(step)
        checkpoint.save(self.checkpoints, step, write, keep=self._keep, best=best)

    def settle(self, step: int, *, best: int | None = None) -> None:
        """Finish what a process may have left undone that was killed once checkpoint ``step`` was there."""
        if self._world.lead:
            checkpoint.settle(self.checkpoints, step, keep=self._keep, best=best)
