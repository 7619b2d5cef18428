"""A run in progress: its folder, files, checkpoints, and requests to stop. Tuning and pretraining share it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smart import Failure, brief
from smart.files import sha256
from smart.run import checkpoint
from smart.run.command import continue_command, progress
from smart.run.folder import Opening, open_run_folder
from smart.run.sources import check_sources
from smart.run.stop import StopRequest
from smart.run.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from smart.distributed import World

FIRST = "Stopping: the current iteration is finished and saved first. Once more stops at once, without saving."


class Run:
    """Holds a run's folder; use it as a context manager, then ``open`` its files.

    ``config`` is the text of its configuration, ``program`` the module that continues it, ``keep``
    the number of checkpoints that are kept (0: all), ``sources`` what the run is made of (``check_sources``),
    ``complete`` that of ``open_run_folder``. Only the lead process writes; the others wait until the folder exists.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        program: str,
        world: World,
        opening: Opening,
        keep: int,
        sources: Mapping[str, str],
        complete: Callable[[Path], str] | None = None,
    ) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.last: Path | None = None  # the checkpoint to continue from
        self.files: Tracker
        self.bar: Any
        self._config, self._opening = config, opening
        self._program, self._world, self._keep, self._complete = program, world, keep, complete
        self._sources, self._notes = sources, list[str]()
        self._stop = StopRequest(FIRST if world.lead else "")
        self._opened = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            opened.enter_context(self._stop)  # first, since all that follows takes time
            with self._world.together():
                if self._world.lead:
                    resume, overwrite, _ = self._opening
                    opened.enter_context(
                        open_run_folder(
                            self.folder, self._config, resume=resume, overwrite=overwrite, complete=self._complete
                        )
                    )
            self._world.confirm(self._sources, "give every process the same files")
            if self._opening.resume:
                self.last = self.agree_on(lambda: checkpoint.latest(self.checkpoints))
            with self._world.together():
                if self._world.lead:
                    step = int(self.last.name) if self.last else 0
                    accept = self._opening.accept_changes
                    self._notes = check_sources(self.folder, self._sources, accept=accept, step=step)
            self._opened = opened.pop_all()
        return self

    def agree_on(self, choose: Callable[[], Path | None]) -> Path | None:
        """The checkpoint that ``choose`` finds in the lead process; all others confirm that they see the same one."""
        chosen = None
        with self._world.together():
            if self._world.lead:
                chosen = choose()
        name = self._world.gather(chosen and chosen.name)[0]
        if name is None:
            return None
        folder = self.checkpoints / name
        with self._world.together():
            if not self._world.lead:
                checkpoint.verify(folder)
        if self._world.size > 1:
            self._world.confirm(
                {f"checkpoint {name}": sha256(folder / checkpoint.MANIFEST)}, "give every process the same run folder"
            )
        return folder

    def confirm_weights(self, model: Any, step: int) -> None:
        """Raise ``Failure`` in every process if their weights differ after ``step``: nothing of them may be saved."""
        if self._world.size > 1:
            self._world.confirm(
                {f"SHA-256 of the weights after step {step}": checkpoint.weights_digest(model)},
                "no checkpoint of this step is written; continue from the last one with --resume",
                error=Failure,
            )

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def open(self, done: int, total: int, unit: str, *, also: Sequence[str] = ()) -> None:
        """Open the run's files, cut back to step ``done``, and show a progress bar up to step ``total``.

        ``also`` names further trackers that get the run's values and samples (``smart.run.also``).
        """
        lead = self._world.lead
        files = Tracker(self.folder, start=done, also=also) if lead else NullTracker()
        self.files = self._opened.enter_context(files)
        for note in self._notes:
            self.log(note)
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
        self.log(f"Stopped. Continue with: {continue_command(self._program, self.folder)}")
        raise SystemExit(128 + (self._stop.requested or signal.SIGTERM))

    def draw(self, figure: Callable[..., object], *args: Any, **options: Any) -> None:
        """Draw a figure of the run. A figure that cannot be drawn is only reported, since it never ends a run."""
        try:
            figure(*args, **options)
        except Exception as error:  # matplotlib raises anything, for example for a font that is missing
            self.log(f"Warning: a figure could not be drawn ({brief(error)})")

    def save(self, step: int, write: Callable[[Path], None], *, best: int | None = None) -> None:
        """Save what ``write(folder)`` writes as checkpoint ``step``, after flushing all metrics to the disk."""
        self.files.flush(step)
        checkpoint.save(self.checkpoints, step, write, keep=self._keep, best=best)

    def tidy_checkpoints(self, step: int, *, best: int | None = None) -> None:
        """Finish what ``save`` does after checkpoint ``step`` exists, in case the process was killed in between."""
        if self._world.lead:
            checkpoint.tidy(self.checkpoints, step, keep=self._keep, best=best)
