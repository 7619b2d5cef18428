"""Worker processes that render clips (``RenderPool``).

A worker imports neither torch nor symusic, so it starts fast and stays small: about 50 MiB, plus the samples,
which the synthesiser keeps as 32-bit floats (twice the size of an sf2, 12 to 15 times that of an sf3).
"""

import contextlib
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tinysoundfont import _tinysoundfont as tsf

from smart import Failure, UserError
from smart.render.notes import NOTE_COLUMNS, Notes, most_samples, to_notes
from smart.render.soundfonts import check_soundfont, check_unchanged, file_state, find_soundfont
from smart.render.synth import Audio, RenderError, render_notes
from smart.workers import die_with_parent, usable_cores

GIVE_UP = 16  # clips that fail in a row, each of them twice, before a pool stops trying
STARTS = 3  # workers that may die while they load, one after the other, before that counts as a failure
# seconds between attempts to start a worker: what the system lacks may come back
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class Renderer(Protocol):
    """What takes scores and gives their audio some time later: ``RenderPool``, ``smart.render.bank_pool.BankPool``."""

    def submit(self, score: Any) -> Future[Audio]:
        """Start rendering a ``symusic.Score`` or a note array; the future's result is float32 audio (2, S)."""
        ...


# A message is a header, its kind and length, and a body. The audio itself comes back through a file in memory
# that both sides hold open: it has no name, so nothing is left behind however either side dies. The header of a request
# holds its number, too, and its answer has the same: an answer too many is not taken for that to the next request.
_HEADER = struct.Struct("<cQQ")  # kind, number, length
_LOADED, _CANNOT_LOAD, _NOTES, _AUDIO, _ERROR = b"L", b"X", b"N", b"A", b"E"
_LONGEST_ANSWER = 1 << 16


def _send(connection: socket.socket, kind: bytes, number: int, body: bytes = b"") -> None:
    connection.sendall(_HEADER.pack(kind, number, len(body)) + body)


def _receive(
    connection: socket.socket, *, longest: int | None = None, until: float | None = None
) -> tuple[bytes, int, bytes]:
    """Kind, number, body; ``EOFError`` when the other side is gone, ``TimeoutError`` past ``until`` (monotonic)."""
    kind, number, length = _HEADER.unpack(_read(connection, _HEADER.size, until))
    if longest is not None and length > longest:
        raise ValueError(f"a message of {length} bytes, at most {longest} expected")
    return kind, number, _read(connection, length, until)


def _read(connection: socket.socket, length: int, until: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _work(connection_fd: str, audio_fd: str, soundfont: str, sample_rate: str, seconds: str) -> None:
    """What a worker process runs: load the soundfont, then render clips until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected and handled: no core file
    try:
        with socket.socket(fileno=int(connection_fd)) as connection:
            _serve(connection, int(audio_fd), soundfont, int(sample_rate), float(seconds))
    except (EOFError, ConnectionError):
        return  # the pool is closed, or its process is dead


def _serve(connection: socket.socket, audio_fd: int, path: str, sample_rate: int, seconds: float) -> None:
    try:
        soundfont = tsf.SoundFont(path)
    except (RuntimeError, MemoryError, UnicodeError) as error:
        _send(connection, _CANNOT_LOAD, 0, _one_line(error))
        return
    _send(connection, _LOADED, 0)
    while True:
        _, number, body = _receive(connection)
        try:
            notes = np.frombuffer(body, np.float64).reshape(-1, len(NOTE_COLUMNS))
            audio = render_notes(soundfont, notes, sample_rate=sample_rate, seconds=seconds)
            _write_all(audio_fd, audio)
        except Exception as error:  # whatever it is, the parent tells the caller
            _send(connection, _ERROR, number, _one_line(error))
        else:
            _send(connection, _AUDIO, number, struct.pack("<Q", audio.shape[1]))


def _one_line(error: BaseException) -> bytes:
    return " ".join(f"{type(error).__name__}: {error}".split()).encode(errors="replace")[:1000]


def _write_all(file: int, audio: Audio) -> None:
    data, done = audio.reshape(-1).view(np.uint8).data, 0
    while done < len(data):
        done += os.pwrite(file, data[done:], done)


def _read_audio(file: int, samples: int) -> Audio:
    audio = np.empty((2, samples), np.float32)
    data, done = audio.reshape(-1).view(np.uint8).data, 0
    while done < len(data):
        many = os.preadv(file, [data[done:]], done)
        if not many:
            raise ValueError(f"{done} bytes of audio, {len(data)} announced")
        done += many
    return audio


def _anonymous_file() -> int:
    """A file without a name, in memory where the system can do that; closed with its last descriptor."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # some containers refuse it
            return os.memfd_create("smart-render")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# sys.path is handed over, so that a worker finds this package just as its parent did
_BOOT = "import sys; sys.path[:] = sys.argv[6:]; from smart.render.pool import _work; _work(*sys.argv[1:6])"
# what a synthesiser does to itself that follows a damaged soundfont
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class _WorkerFailure(Exception):
    """Why a worker did not render a clip; whatever it was, the worker may be of no more use."""


class _NotStarted(_WorkerFailure):
    """The system gives no process, or not what one needs."""


class _CannotLoad(_WorkerFailure):
    """A worker that did not load the soundfont, and no other is likely to."""


class _Worker:
    """A worker process as seen by the one thread that feeds it; any thread may ``kill`` it."""

    def __init__(self, soundfont: Path, sample_rate: int, seconds: float) -> None:
        self.limit = most_samples(sample_rate, seconds)
        self.number = 0  # of the last request
        with contextlib.ExitStack() as files:
            self.audio_fd = _anonymous_file()
            files.callback(os.close, self.audio_fd)
            self.connection, theirs = socket.socketpair()
            files.callback(self.connection.close)
            with theirs:
                fds = (theirs.fileno(), self.audio_fd)
                settings = (*fds, soundfont, sample_rate, float(seconds))
                path = [os.path.abspath(place) for place in sys.path]
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", die_with_parent() + _BOOT, *map(str, settings), *path],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | _ONE_THREAD,
                )
            self._files = files.pop_all()

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        """Kill and reap the process, and close what belongs to it."""
        self.kill()
        self.process.wait()
        self._files.close()

    def alive(self) -> bool:
        return self.process.poll() is None

    def answer(self, seconds: float, kind: bytes = b"", body: bytes = b"") -> tuple[bytes, bytes]:
        """Send a request, if any, and wait for its answer, ``seconds`` at most; else ``_WorkerFailure``."""
        until = time.monotonic() + seconds
        try:
            if kind:
                self.connection.settimeout(seconds)
                self.number += 1
                _send(self.connection, kind, self.number, body)
            kind, number, body = _receive(self.connection, longest=_LONGEST_ANSWER, until=until)
            if number != self.number:
                raise ValueError(f"it is to request {number}, not to {self.number}")
            return kind, body
        except TimeoutError:
            raise _WorkerFailure(f"no answer within {seconds:g} s") from None
        except (EOFError, ConnectionError):
            raise _WorkerFailure(self._how_it_died()) from None
        except ValueError as error:
            raise _WorkerFailure(f"a garbled answer ({error})") from None

    def _how_it_died(self) -> str:
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if status < 0:
            return f"it died of signal {-status}, {signal.strsignal(-status)}"
        return f"it ended with exit status {status}"

    def render(self, notes: Notes, deadline: float) -> Audio:
        kind, body = self.answer(deadline, _NOTES, notes.tobytes())
        if kind == _ERROR:
            raise _WorkerFailure(body.decode(errors="replace"))
        try:
            (samples,) = struct.unpack("<Q", body)
            if kind != _AUDIO or not 1 <= samples <= self.limit:
                raise ValueError(f"kind {kind!r}, {samples} samples")
            return _read_audio(self.audio_fd, samples)
        except (struct.error, ValueError) as error:
            raise _WorkerFailure(f"a garbled answer ({error})") from None


class RenderPool:
    """Worker processes that hold a loaded soundfont each, and render clips; use it as a context manager.

    ``soundfont`` is a path or a short name (``find_soundfont``), ``workers`` the number of processes, by
    default one for each usable core. Starting waits until all have loaded the soundfont: ``UserError`` if
    that fails, ``Failure`` if the system starts no workers, or kills them. The file must stay as it is: a worker that
    starts later and finds another gives ``Failure``.

    A worker is a fresh Python interpreter that imports this module alone, not the caller's main program: no
    ``if __name__ == "__main__"`` is needed, and neither torch nor the caller's threads come along.

    When ``GIVE_UP`` clips fail with none rendered in between, the soundfont or the machine is to blame: then every clip
    gets ``Failure``, which says so, instead of being tried.

    A worker that dies, gives no answer within ``deadline`` seconds (also because it was stopped), answers nonsense or
    fails (its memory may be full) is killed and replaced, and its clip rendered once more; if that fails too, the
    clip's future gets ``RenderError``. ``retries`` counts clips that were tried again, ``failures`` clips that failed,
    ``restarts`` workers that were replaced. Workers die with the process that owns the pool, however it ends,
    and ignore Ctrl-C. This protects from a synthesiser that crashes or hangs; it is no sandbox against a
    hostile soundfont.
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
            workers = usable_cores()
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
        self._lock = threading.Lock()  # of the counters, _closed and _workers
        self._closed = False
        self._ending = threading.Event()  # wakes up who waits to start a worker
        self._workers: list[_Worker | None] = [None] * workers
        self._jobs: queue.SimpleQueue[tuple[Future[Audio], Notes] | None] = queue.SimpleQueue()
        ready: list[Future[None]] = [Future() for _ in range(workers)]
        # Linux kills a worker when the *thread* that started it ends: each worker has a thread of its own,
        # which starts it, feeds it and reaps it
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

        ``RuntimeError`` if the pool is closed, ``ValueError`` and ``TypeError`` as from ``score_notes``.
        """
        notes = to_notes(score)
        future: Future[Audio] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this RenderPool is closed")
            self._jobs.put((future, notes))
        return future

    def map(self, scores: Iterable[Any]) -> Iterator[Audio]:
        """Audio of each score, in order; submits a few ahead of the one waited for, so that memory is
        bounded.

        Raises ``RenderError`` at a clip that failed, which ends the iteration: to go on, use ``submit``.
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
        """End the workers; cancel clips that wait; those in work get ``RenderError``. May be repeated."""
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
        # a worker inherits the mask: Ctrl-C cannot hit it before it has learnt to ignore it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
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
                # without its traceback, which holds this frame, and so the future that holds the error: a circle
                future.set_exception(error.with_traceback(None))
            else:
                future.set_result(audio)

    def _start(self, place: int, *, replaces: bool) -> _Worker:
        """Start the worker at ``place`` and wait until it has loaded the soundfont; several attempts, with pauses.

        That the system has no room for a process, or kills one that loads, is no fault of the clip's that waits for it,
        and may pass.
        """
        deaths, failure = 0, _WorkerFailure()
        for pause in (*PAUSES, 0.0):
            self._discard(place)
            try:
                return self._try_to_start(place, replaces or deaths > 0)
            except _WorkerFailure as error:
                failure, deaths = error, deaths + 1
                if deaths == STARTS or (isinstance(error, _CannotLoad) and not replaces):
                    break
            except OSError as error:
                failure = _NotStarted(f"no worker process can be started: {error}")
            if self._ending.wait(pause):
                break
        raise failure

    def _try_to_start(self, place: int, again: bool) -> _Worker:
        worker = _Worker(self.soundfont, self.sample_rate, self.seconds)
        with self._lock:
            self._workers[place] = worker
            self.restarts += again
            if self._closed:
                worker.kill()
        try:
            kind, body = worker.answer(self.load_deadline)
            if kind != _LOADED:
                raise _CannotLoad(f"the synthesiser refused it ({body.decode(errors='replace')})")
        except _WorkerFailure as error:
            check_unchanged(self.soundfont, self._state)
            died_of = -(worker.process.poll() or 0)
            if worker.alive() or died_of in _CRASHES:  # alive: after all that time, or with a garbled answer
                raise _CannotLoad(str(error)) from None
            raise
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
        return Failure(f"the render workers do not start: {error}") if isinstance(error, _WorkerFailure) else error

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
            except (_WorkerFailure, OSError) as error:  # OSError: its audio cannot be read
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
                        f"the last {self._failed_in_a_row} clips could all not be rendered with soundfont "
                        f"{self.soundfont} (the last one: {'; again: '.join(reasons)}){advice}"
                    )
        raise RenderError(f"this clip could not be rendered: {reasons[0]}; again: {reasons[1]}")

    def _living_worker(self, place: int) -> _Worker:
        worker = self._workers[place]
        if worker is not None and worker.alive():
            return worker
        return self._start(place, replaces=True)
