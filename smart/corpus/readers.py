"""Worker processes that read MIDI files which nobody trusts: each may crash, hang or swell a native parser.

``Pool`` gives files to a few processes (``smart.corpus.piece.serve``) with a limit on time and memory for each file. A
worker that dies is replaced, and costs the file that it was working on and no other.
"""

import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path

from smart import Failure
from smart.corpus.piece import CRASHED_BY_MEMORY, Limits, Piece
from smart.workers import die_with_parent


class Worker:
    """A process that reads files one after another; ``pending`` are those that it has not answered yet."""

    GRACE = 10.0  # seconds past the limit on a file after which a worker that did not end itself is killed
    START = 120.0  # seconds from its start after which a worker that is not ready is killed
    SERVES = 2000  # files, after which a worker is replaced: parsers leak, and memory is limited

    def __init__(self, tokenizer_file: Path, limits: Limits) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    die_with_parent() + f"from smart.corpus.piece import serve; serve({theirs.fileno()})",
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": "1",
                    "SMART_MIDI_WORKER": "1",
                },
                start_new_session=True,  # Ctrl-C is for the build, which then ends its workers
            )
        # one who stands still within an answer would be waited for for ever: reading it fails after so long
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", math.ceil(self.GRACE), 0))
        self.connection = Connection(ours.detach())
        self.limits = limits
        self.pending: deque[tuple[bytes, bytes]] = deque()  # (key, path)
        self.ready = False
        self.started = self.since = time.monotonic()  # since: when the first of ``pending`` was begun
        self.served = 0
        self.timed_out = self.of_no_use = False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # noticed as its end when it is read
            self.connection.send((str(tokenizer_file), asdict(limits)))

    def give(self, key: bytes, path: bytes) -> None:
        if not self.pending:
            self.since = time.monotonic()
        self.pending.append((key, path))
        self.served += 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(path)

    def end_if_overdue(self) -> None:
        """Kill the process if it neither answers nor ends itself. An answer that nobody has read yet is one."""
        now = time.monotonic()
        if self.ready:
            overdue = bool(self.pending) and now - self.since > self.limits.seconds + self.GRACE
        else:
            overdue = now - self.started > self.START
        if overdue and not self.connection.poll():
            self.timed_out = True
            self.process.kill()

    def close(self) -> int:
        """End the process, if it has not; its exit code, negative for a signal."""
        self.connection.close()
        if self.process.poll() is None and not self.pending:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it ends by itself when the connection does
                return self.process.wait(timeout=1)
        self.process.kill()
        return self.process.wait()


class Pool:
    """``count`` workers; ``answers`` runs tasks through them and replaces those that die.

    The file that a worker was reading when it died, or ran out of time, or answered nonsense, is read once more by
    another, in case it was no fault of the file: a machine that slept, an administrator, a leak. The second time
    rejects the file. A worker dies with the thread that started it, so one thread makes a pool and asks for answers.
    """

    AHEAD = 8  # tasks a worker is given before it has answered: it never waits for the next
    STARTS = 3  # how many workers may die in a row before they are ready

    def __init__(self, tokenizer_file: Path, limits: Limits, count: int) -> None:
        self.tokenizer_file, self.limits = tokenizer_file, limits
        self.again: deque[tuple[bytes, bytes]] = deque()
        self.died_on: set[bytes] = set()
        self.failed_starts = 0
        self.workers = [self._start() for _ in range(count)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.close()

    def answers(self, tasks: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, Piece | tuple[str, str]]]:
        """(key, answer) for every (key, path) of ``tasks``, in the order in which they are done."""
        while True:
            for place, worker in enumerate(self.workers):
                if worker.served >= worker.SERVES and not worker.pending:
                    worker.close()
                    self.workers[place] = worker = self._start()
                while len(worker.pending) < self.AHEAD and worker.served < worker.SERVES:
                    task = self.again.popleft() if self.again else next(tasks, None)
                    if task is None:
                        break
                    worker.give(*task)
                worker.end_if_overdue()
            if not any(worker.pending for worker in self.workers):
                return
            by_connection = {worker.connection: worker for worker in self.workers}
            for connection in wait(by_connection, timeout=1.0):
                yield from self._read(by_connection[connection])  # type: ignore[index]  # one of those given

    def _start(self) -> Worker:
        return Worker(self.tokenizer_file, self.limits)

    def _read(self, worker: Worker) -> Iterator[tuple[bytes, Piece | tuple[str, str]]]:
        try:
            answer = worker.connection.recv()
        except BlockingIOError:  # it stands still within its answer
            worker.timed_out = True
            answer = None
        except (EOFError, OSError):  # ConnectionResetError, or an answer of which only a part was sent
            yield from self._bury(worker)
            return
        except Exception:  # whatever unpickling raises
            answer = None
        worker.since = time.monotonic()
        if answer == "ready":
            worker.ready, self.failed_starts = True, 0
            return
        path, what = answer if isinstance(answer, tuple) and len(answer) == 2 else (None, None)
        if worker.pending and path == worker.pending[0][1] and isinstance(what, Piece | tuple):
            yield worker.pending.popleft()[0], what
        else:  # nonsense, or an answer too many: nothing is taken from this one any more
            worker.of_no_use = True
            worker.process.kill()
            yield from self._bury(worker)

    def _bury(self, worker: Worker) -> Iterator[tuple[bytes, tuple[str, str]]]:
        """Account for a worker that died, or is of no more use, and put another in its place."""
        worker.connection.close()
        try:
            code = worker.process.wait(timeout=1)  # one that is ending has a reason to give
        except subprocess.TimeoutExpired:
            worker.process.kill()
            code = worker.process.wait()
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= self.STARTS:
                raise Failure(f"worker processes end with exit code {code} before they are ready")
        elif worker.pending:
            key, path = worker.pending.popleft()
            if key not in self.died_on:
                self.died_on.add(key)
                self.again.append((key, path))
            else:
                self.died_on.remove(key)
                if worker.timed_out or code == -signal.SIGALRM:
                    yield key, ("time limit", f"over {self.limits.seconds:g} s")
                elif code == CRASHED_BY_MEMORY:
                    yield key, ("memory limit", f"over {self.limits.megabytes} MB")
                elif worker.of_no_use:
                    yield key, ("crash", "its worker twice gave a garbled answer")
                else:
                    what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    yield key, ("crash", f"its worker died twice, by {what}")
        self.again.extend(worker.pending)
        worker.pending.clear()
        self.workers[self.workers.index(worker)] = self._start()
