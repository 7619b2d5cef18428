"""Worker processes that render clips (``RenderPool``).

A worker imports neither torch nor symusic, so it starts fast and stays small: about 50 MiB plus the samples, which the
synthesiser keeps as 32-bit floats (twice the size of an sf2 file, 12 to 15 times that of an sf3).
"""

import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tinysoundfont import _tinysoundfont as tsf

from smart import Failure, UserError
from smart.cores import share
from smart.render.notes import NOTE_COLUMNS, Notes, most_samples, to_notes
from smart.render.soundfonts import check_soundfont, check_unchanged, file_state, find_soundfont
from smart.render.synth import Audio, RenderError, render_notes
from smart.system import anonymous_file
from smart.workers import STARTS, Answer, Died, GarbledAnswer, Refused, Worker, WorkerFailure

GIVE_UP = 16  # clips that may fail in a row, each of them twice, before a pool stops trying
# seconds between attempts to start a worker: a system that lacks files or processes may have them again
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# signals by which a synthesiser dies that a damaged soundfont leads astray
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

PROGRAM = """
from smart.render.pool import prepare
from smart.workers import serve
serve(int(sys.argv[1]), prepare)
"""


class Renderer(Protocol):
    """Takes scores and returns their audio some time later: ``RenderPool`` or ``smart.render.bank_pool.BankPool``."""

    def submit(self, score: Any) -> Future[Audio]:
        """Start rendering a ``symusic.Score`` or a note array; the future's result is float32 audio (2, S)."""
        ...

    def fallback_fraction(self, clips: Collection[Future[Audio]]) -> float | None:
        """Share of these finished clips that a fallback rendered; None for a renderer that has no fallback."""
        ...

    def fallback_kinds(self, clips: Collection[Future[Audio]]) -> dict[str, float]:
        """The same share by the kind of its reason."""
        ...


# The process ------------------------------------------------------------------------------------------------


def prepare(soundfont: str, sample_rate: int, seconds: float, audio_fd: int) -> Callable[[bytes], Answer]:
    """Load the soundfont; returns what a worker process does with a request.

    The audio goes back through a file in memory that both sides hold open. It has no name, so nothing is left behind
    however either side dies.
    """
    loaded = tsf.SoundFont(soundfont)

    def render(data: bytes) -> Answer:
        notes = np.frombuffer(data, np.float64).reshape(-1, len(NOTE_COLUMNS))
        audio = render_notes(loaded, notes, sample_rate=sample_rate, seconds=seconds)
        left, done = audio.reshape(-1).view(np.uint8).data, 0
        while done < len(left):
            done += os.pwrite(audio_fd, left[done:], done)
        return {"samples": audio.shape[1]}, b""

    return render


# The caller -------------------------------------------------------------------------------------------------


class _NotStarted(WorkerFailure):
    """The system refuses a process, or something that one needs."""


class _CannotLoad(WorkerFailure):
    """A worker did not load the soundfont, and others are not likely to."""


class _ClipWorker(Worker):
    """A worker that renders clips, and the file through which their audio comes back."""

    def __init__(self, soundfont: Path, sample_rate: int, seconds: float) -> None:
        self.limit = most_samples(sample_rate, seconds)
        self.audio_fd = anonymous_file()
        settings = {"soundfont": str(soundfont), "sample_rate": sample_rate, "seconds": seconds}
        try:
            super().__init__(PROGRAM, settings | {"audio_fd": self.audio_fd}, files=(self.audio_fd,))
        except BaseException:
            os.close(self.audio_fd)
            raise

    def close(self, patience: float = 0.0) -> int:
        status = super().close(patience)
        os.close(self.audio_fd)
        return status

    def render(self, notes: Notes, deadline: float) -> Audio:
        fields, _ = self.ask(notes.tobytes(), deadline)
        samples = fields.get("samples")
        if not isinstance(samples, int) or not 1 <= samples <= self.limit:
            raise GarbledAnswer(fields)
        audio = np.empty((2, samples), np.float32)
        left, done = audio.reshape(-1).view(np.uint8).data, 0
        while done < len(left):
            part = os.pread(self.audio_fd, len(left) - done, done)
            if not part:
                raise GarbledAnswer(f"{done} bytes of audio, {len(left)} announced")
            left[done : done + len(part)] = part
            done += len(part)
        return audio


class RenderPool:
    """Worker processes that each hold a loaded soundfont and render clips; use it as a context manager.

    ``soundfont`` is a path or a short name (``find_soundfont``); ``workers`` is the number of processes, by default one
    per usable core. The constructor waits until all have loaded the soundfont. It raises ``UserError`` if that fails,
    and ``Failure`` if the system starts no workers or kills them. The file must not change: if a worker that starts
    later finds another, clips get ``Failure``.

    A worker is a fresh Python interpreter that imports only this module, not the caller's main program: no
    ``if __name__ == "__main__"`` is needed, and neither torch nor the caller's threads come along.

    A worker is killed and replaced when it dies, does not answer within ``deadline`` seconds (a stopped one, say),
    answers nonsense or reports an error (its memory may be full). Its clip is rendered once more; if that fails too,
    the clip's future gets ``RenderError``. ``retries`` counts the clips that were tried again, ``failures`` those that
    failed, ``restarts`` the workers that were replaced. When ``GIVE_UP`` clips fail in a row, the soundfont or the
    machine is to blame: from then on every clip gets ``Failure`` at once.

    Workers die with the process that owns the pool, however it ends, and Ctrl-C does not reach them. This protects
    against a synthesiser that crashes or hangs; it is no sandbox against a hostile soundfont.
    """

    def __init__(
        self,
        soundfont: str | os.PathLike[str],
        *,
        sample_rate: int = 44100,
        seconds: float = 10.0,
        workers: int | None = None,
        deadline: float = 30.0,
        load_deadline: float = 300.0,
    ) -> None:
        most_samples(sample_rate, seconds)
        if workers is None:
            workers = share()
        if not (isinstance(workers, int) and workers >= 1):
            raise ValueError(f"workers: expected a whole number from 1, got {workers!r}")
        for name, value in (("deadline", deadline), ("load_deadline", load_deadline)):
            if not 0 < value <= threading.TIMEOUT_MAX:
                raise ValueError(f"{name}: expected a positive number of seconds, got {value!r}")
        self.soundfont = find_soundfont(soundfont).absolute()
        check_soundfont(self.soundfont)
        self.sample_rate, self.seconds = int(sample_rate), float(seconds)
        self.deadline, self.load_deadline = deadline, load_deadline
        self._state = file_state(self.soundfont)
        self.retries = self.failures = self.restarts = 0
        self._failed_in_a_row, self._hopeless = 0, ""
        self._lock = threading.Lock()  # for the counters, _closed and _workers
        self._closed = False
        self._ending = threading.Event()  # wakes up threads that wait to start a worker
        self._workers: list[_ClipWorker | None] = [None] * workers
        self._jobs: queue.SimpleQueue[tuple[Future[Audio], Notes] | None] = queue.SimpleQueue()
        ready: list[Future[None]] = [Future() for _ in range(workers)]
        # Linux kills a worker when the *thread* that started it ends, so each worker has a thread that starts it, feeds
        # it and reaps it
        self._threads = [
            threading.Thread(target=self._feed, args=(place, ready[place]), name=f"render-{place}", daemon=True)
            for place in range(workers)
        ]
        try:
            for thread in self._threads:
                thread.start()
            for future in ready:
                future.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RenderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        with self._lock:
            return [worker.process.pid for worker in self._workers if worker is not None]

    def submit(self, score: Any) -> Future[Audio]:
        """Start rendering a ``symusic.Score`` or a note array; the future's result is float32 audio (2, S).

        Raises ``RuntimeError`` if the pool is closed, ``ValueError`` and ``TypeError`` as ``score_notes`` does.
        """
        notes = to_notes(score)
        future: Future[Audio] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this RenderPool is closed")
            self._jobs.put((future, notes))
        return future

    def fallback_fraction(self, clips: Collection[Future[Audio]]) -> float | None:
        """None: this renderer has no fallback."""
        return None

    def fallback_kinds(self, clips: Collection[Future[Audio]]) -> dict[str, float]:
        """Nothing: this renderer has no fallback."""
        return {}

    def map(self, scores: Iterable[Any]) -> Iterator[Audio]:
        """Audio of each score, in order; submits only a few in advance, so that memory is bounded.

        Raises ``RenderError`` at the first clip that fails, which ends the iteration; ``submit`` goes past it.
        """
        ahead: deque[Future[Audio]] = deque()
        try:
            for score in scores:
                ahead.append(self.submit(score))
                if len(ahead) > 4 * len(self._threads):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the workers. Clips that wait are cancelled, those being rendered get ``RenderError``. May be repeated."""
        with self._lock:
            first, self._closed = not self._closed, True
            self._ending.set()
            for worker in self._workers:
                if worker is not None:
                    worker.kill()  # its thread wakes up, reaps it and ends
        if first:
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def _feed(self, place: int, ready: "Future[None]") -> None:
        """The life of the thread that owns the worker at ``place``."""
        try:
            self._start(place, replaces=False)
        except BaseException as error:
            self._discard(place)
            ready.set_exception(self._why_not_started(error))
            return
        ready.set_result(None)
        while (job := self._jobs.get()) is not None:
            self._answer(place, *job)
            del job  # or the clip would be kept until the next one comes
        self._discard(place)

    def _answer(self, place: int, future: "Future[Audio]", notes: Notes) -> None:
        if self._closed:
            future.cancel()
        if future.set_running_or_notify_cancel():
            try:
                audio = self._render(place, notes)
            except Exception as error:
                # without its traceback, which holds this frame and so the future that holds the error: a cycle
                future.set_exception(error.with_traceback(None))
            else:
                future.set_result(audio)

    def _start(self, place: int, *, replaces: bool) -> _ClipWorker:
        """Start the worker at ``place`` and wait until it has loaded the soundfont; several attempts, with pauses.

        If the system has no room for a process, or kills one that is loading, the clip that waits for it is not to
        blame, and it may pass.
        """
        deaths, failure = 0, WorkerFailure()
        for pause in (*PAUSES, 0.0):
            self._discard(place)
            try:
                return self._try_to_start(place, replaces or deaths > 0)
            except WorkerFailure as error:
                failure, deaths = error, deaths + 1
                if deaths == STARTS or (isinstance(error, _CannotLoad) and not replaces):
                    break
            except OSError as error:
                failure = _NotStarted(f"no worker process can be started: {error}")
            if self._ending.wait(pause):
                break
        raise failure

    def _try_to_start(self, place: int, again: bool) -> _ClipWorker:
        worker = _ClipWorker(self.soundfont, self.sample_rate, self.seconds)
        with self._lock:
            self._workers[place] = worker
            self.restarts += again
            if self._closed:
                worker.kill()
        try:
            worker.receive(self.load_deadline)
        except WorkerFailure as error:
            check_unchanged(self.soundfont, self._state)
            if isinstance(error, Refused):
                raise _CannotLoad(f"the synthesiser refused it ({error})") from None
            if isinstance(error, Died) and error.status is not None and -error.status not in _CRASHES:
                raise  # the system killed it, perhaps for lack of memory
            raise _CannotLoad(str(error)) from None
        try:
            check_unchanged(self.soundfont, self._state)
        except Failure:
            self._discard(place)
            raise
        return worker

    def _discard(self, place: int) -> None:
        with self._lock:
            worker, self._workers[place] = self._workers[place], None
        if worker is not None:
            worker.close()

    def _why_not_started(self, error: BaseException) -> BaseException:
        if isinstance(error, _CannotLoad):
            return UserError(
                f"soundfont {self.soundfont} cannot be loaded (the render worker: {error}): "
                "download it again, or choose another"
            )
        return Failure(f"the render workers do not start: {error}") if isinstance(error, WorkerFailure) else error

    def _render(self, place: int, notes: Notes) -> Audio:
        """Render with the worker at ``place``, and once more if that fails."""
        reasons: list[str] = []
        with self._lock:
            if self._failed_in_a_row >= GIVE_UP:
                raise Failure(self._hopeless)
        for attempt in range(2):
            try:
                audio = self._living_worker(place).render(notes, self.deadline)
                with self._lock:
                    self._failed_in_a_row = 0
                return audio
            except (WorkerFailure, OSError) as error:  # OSError: its audio cannot be read
                reasons.append(str(error))
                advice = "" if isinstance(error, _NotStarted) else "; choose another soundfont"
                self._discard(place)
            with self._lock:
                if self._closed:
                    raise RenderError("the pool was closed while this clip was being rendered")
                if attempt == 0:
                    self.retries += 1
                else:
                    self.failures += 1
                    self._failed_in_a_row += 1
                    self._hopeless = (
                        f"none of the last {self._failed_in_a_row} clips could be rendered with soundfont "
                        f"{self.soundfont} (the last one: {'; again: '.join(reasons)}){advice}"
                    )
        raise RenderError(f"this clip could not be rendered: {reasons[0]}; again: {reasons[1]}")

    def _living_worker(self, place: int) -> _ClipWorker:
        worker = self._workers[place]
        if worker is not None and worker.alive():
            return worker
        return self._start(place, replaces=True)
