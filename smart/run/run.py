"""A run in progress: its folder, files, checkpoints, and requests to stop. Tuning and pretraining share it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smart.run import checkpoint
from smart.run.command import progress
from smart.run.folder import CONFIG, open_run_folder
from smart.run.stop import StopRequest
from smart.run.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from smart.distributed import World


class Run:
    """Holds a run's folder; use it as a context manager, then ``open`` its files.

    ``config`` is the text of its configuration, ``program`` the module that continues it, with its options, ``keep``
    the number of checkpoints that are kept (0: all), ``complete`` that of ``open_run_folder``. Only the lead process
    writes; the others wait until the folder exists.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        program: str,
        world: World,
        resume: bool,
        overwrite: bool,
        keep: int,
        complete: Callable[[Path], str] | None = None,
    ) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.last: Path | None = None  # the checkpoint to continue from
        self.files: Tracker
        self.bar: Any
        self._config, self._resume, self._overwrite = config, resume, overwrite
        self._program, self._world, self._keep, self._complete = program, world, keep, complete
        self._stop = StopRequest()
        self._opened = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            opened.enter_context(self._stop)  # first, since all that follows takes time
            if self._world.lead:
                opened.enter_context(
                    open_run_folder(
                        self.folder,
                        self._config,
                        resume=self._resume,
                        overwrite=self._overwrite,
                        complete=self._complete,
                    )
                )
            self._world.wait()  # until the folder exists
            if self._resume:
                self.last = checkpoint.latest(self.checkpoints)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def open(self, done: int, total: int, unit: str, *, also: Sequence[str] = ()) -> None:
        """Open the run's files, cut back to step ``done``, and show a progress bar up to step ``total``.

        ``also`` names further trackers that get the run's values and samples (``smart.run.also``).
        """
        lead = self._world.lead
        files = Tracker(self.folder, start=done, also=also) if lead else NullTracker()
        self.files = self._opened.enter_context(files)
        self.bar = self._opened.enter_context(progress(total=total, initial=done, unit=unit, show=lead))

    def next_bar(self, total: int, unit: str, description: str) -> None:
        """Close the progress bar and show another one, for what follows the steps."""
        self.bar.close()
        self.bar = self._opened.enter_context(progress(total=total, unit=unit, desc=description, show=self._world.lead))

    def steps(self, done: int, total: int, *, unless: Callable[[], object]) -> Iterator[int]:
        """The steps after ``done``, up to ``total``; they end early as soon as ``unless()`` is true."""
        for step in range(done + 1, total + 1):
            if unless():
                return
            yield step

    def log(self, text: str) -> None:
        """Print a line and append it to the run's log."""
        self.files.log(text)

    def stopping(self) -> bool:
        """Whether a signal has asked any process to stop; every process gets the same answer at the same point."""
        return self._world.any(bool(self._stop.requested))

    def leave(self) -> NoReturn:
        """Exit as the signal asked, and log the command that continues from the last checkpoint."""
        config = shlex.quote(str(self.folder / CONFIG))
        python = shlex.quote(sys.executable)
        self.log(f"Stopped. Continue with: {python} -m {self._program} --config {config} --resume")
        raise SystemExit(128 + (self._stop.requested or signal.SIGTERM))

    def save(self, step: int, write: Callable[[Path], None], *, best: int | None = None) -> None:
        """Save what ``write(folder)`` writes as checkpoint ``step``, after flushing all metrics to the disk."""
        self.files.flush(step)
        checkpoint.save(self.checkpoints, step, write, keep=self._keep, best=best)

    def tidy_checkpoints(self, step: int, *, best: int | None = None) -> None:
        """Finish what ``save`` does after checkpoint ``step`` exists, in case the process was killed in between."""
        if self._world.lead:
            checkpoint.tidy(self.checkpoints, step, keep=self._keep, best=best)
