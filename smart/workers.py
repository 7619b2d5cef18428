"""Supervised worker processes: they answer one request after another, and may crash, hang or answer nonsense.

``Worker`` is the caller's side, ``serve`` the process's. A worker is a fresh Python interpreter: neither the caller's
main program nor its threads come along. It dies with the *thread* that started it, however that ends (on Linux;
elsewhere with the process, within a second), and Ctrl-C does not reach it.

A message is a frame: a header, a few fields as JSON, and raw bytes. Nothing that a worker sends is unpickled, and its
answers have a maximum length, because it may have read a hostile file in native code. Requests and answers are
numbered, so that a surplus answer is not taken for the answer to the next request.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from smart.files import parse_json

STARTS = 3  # workers that may die one after another before they are ready; then their pool gives up

Answer = tuple[dict[str, Any], bytes]  # fields, and raw bytes
_HEADER = struct.Struct("<QIQ")  # number of the request, length of the fields, length of the raw bytes
_LONGEST_FIELDS = 1 << 16

# A worker asks to die with its parent before it imports anything large, so that none is left behind that hangs in its
# imports. It gets its parent's sys.path, so that it finds this package in the same place.
_BOOT = """
import os, signal, sys
sys.path[:] = sys.argv[2:]
from smart.system import die_with_parent
die_with_parent({parent})
"""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


# The frames -------------------------------------------------------------------------------------------------


def _send(connection: socket.socket, number: int, fields: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(fields).encode()
    connection.sendall(_HEADER.pack(number, len(text), len(data)) + text + data)


def _receive(
    connection: socket.socket, numbers: range | None = None, longest: int = 0, until: float | None = None
) -> tuple[int, dict[str, Any], bytes]:
    """Number, fields and raw bytes of the next message.

    Raises ``EOFError`` when the other side is gone, ``TimeoutError`` after ``until`` (monotonic), and, if ``numbers``
    are given, ``ValueError`` for a message with another number or more than ``longest`` raw bytes.
    """
    number, length, size = _HEADER.unpack(_read(connection, _HEADER.size, until))
    if numbers is not None:
        if number not in numbers:
            raise ValueError(f"it answers request {number}, which is not due")
        if length > _LONGEST_FIELDS or size > longest:
            raise ValueError(f"it has {length} + {size} bytes, expected at most {_LONGEST_FIELDS} + {longest}")
    fields = parse_json(_read(connection, length, until))
    if not isinstance(fields, dict):
        raise ValueError("its fields are not a JSON object")
    return number, fields, _read(connection, size, until)


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


# The process ------------------------------------------------------------------------------------------------


def serve(descriptor: int, prepare: Callable[..., Callable[[bytes], Answer]]) -> None:
    """The life of a worker process: call ``prepare(**settings)``, then the function that it returns for each request.

    An exception is answered with its text; if ``prepare`` raises it, the process ends.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected and handled: no core file
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        number, settings, _ = _receive(connection)
        try:
            answer = prepare(**settings)
        except Exception as error:
            _send(connection, number, _error(error))
            return
        _send(connection, number, {})
        while True:
            number, _, data = _receive(connection)
            try:
                fields, data = answer(data)
            except Exception as error:  # whatever it is, the caller is told
                fields, data = _error(error), b""
            _send(connection, number, fields, data)


def _error(error: Exception) -> dict[str, Any]:
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}


# The caller -------------------------------------------------------------------------------------------------


class WorkerFailure(Exception):
    """Why a worker gave no usable answer: one of the classes below."""


class NoAnswer(WorkerFailure):
    """It did not answer in time."""


class GarbledAnswer(WorkerFailure):
    """Its answer is nonsense."""

    def __init__(self, what: object) -> None:
        super().__init__(f"a garbled answer ({str(what)[:200]})")


class Refused(WorkerFailure):
    """It answered with an error."""


class Died(WorkerFailure):
    """It ended, with exit status ``status`` (negative for a signal), or closed its connection (None)."""

    def __init__(self, status: int | None) -> None:
        self.status = status
        if status is None:
            super().__init__("it closed its connection")
        elif status < 0:
            super().__init__(f"it died of signal {-status}, {signal.strsignal(-status)}")
        else:
            super().__init__(f"it ended with exit status {status}")


class Worker:
    """A worker process. Only the thread that started it may use it, but any thread may ``kill`` it.

    ``program`` is Python source that ends with ``serve(int(sys.argv[1]), prepare)``. ``settings`` are the first
    request, and its answer says that the worker is ready. ``longest`` is the most raw bytes that an answer may have,
    ``files`` are descriptors that the process inherits. Raises ``OSError`` if the system cannot start a process.
    """

    def __init__(self, program: str, settings: dict[str, Any], *, longest: int = 0, files: Sequence[int] = ()) -> None:
        self.longest = longest
        self.asked = self.answered = 0
        path = [os.path.abspath(place) for place in sys.path]
        with contextlib.ExitStack() as opened:
            self.connection, theirs = socket.socketpair()
            opened.callback(self.connection.close)
            with theirs:
                boot = _BOOT.format(parent=os.getpid()) + program
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", boot, str(theirs.fileno()), *path],
                    pass_fds=(theirs.fileno(), *files),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | _ONE_THREAD,
                    start_new_session=True,  # Ctrl-C is for the caller, who then ends its workers
                )
            opened.pop_all()
        self.send(fields=settings)

    @property
    def ready(self) -> bool:
        return self.answered > 0

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, data: bytes = b"", *, fields: dict[str, Any] | None = None, seconds: float = 10.0) -> None:
        """Send a request. If that fails, ``receive`` says why."""
        self.asked += 1
        self.connection.settimeout(seconds)
        with contextlib.suppress(TimeoutError, ConnectionError):
            _send(self.connection, self.asked, fields or {}, data)

    def receive(self, seconds: float, *, since: float | None = None) -> Answer:
        """The next answer, within ``seconds`` from now or from ``since`` (monotonic). Raises ``WorkerFailure``."""
        until = (time.monotonic() if since is None else since) + seconds
        try:
            due = range(self.answered + 1, self.asked + 1)[:1]
            _, fields, data = _receive(self.connection, due, self.longest, until)
        except TimeoutError:
            raise NoAnswer(f"no answer within {seconds:g} s") from None
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            raise Died(self.process.returncode) from None
        except ValueError as error:
            raise GarbledAnswer(error) from None
        self.answered += 1
        if "error" in fields:
            raise Refused(str(fields["error"]))
        return fields, data

    def ask(self, data: bytes, seconds: float) -> Answer:
        """``send`` and ``receive``, within ``seconds`` for both."""
        since = time.monotonic()
        self.send(data, seconds=seconds)
        return self.receive(seconds, since=since)

    def kill(self) -> None:
        self.process.kill()

    def close(self, patience: float = 0.0) -> int:
        """End and reap the process, which has ``patience`` seconds to end by itself; returns its exit status."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience)
        self.kill()
        return self.process.wait()


AnyWorker = TypeVar("AnyWorker", bound=Worker)


def answering(workers: Iterable[AnyWorker], seconds: float) -> list[AnyWorker]:
    """The ``workers`` that have sent something or ended; waits at most ``seconds`` for the first."""
    with selectors.PollSelector() as selector:
        for worker in workers:
            selector.register(worker.connection, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(seconds)]
