"""Worker processes that read MIDI files from strangers: each file may crash, hang or swell a native parser.

``ReaderPool`` gives files to a few processes, with a limit on time and memory for each file. A worker that dies is
replaced, and costs only the file that it was reading. This is no sandbox: code that a file manages to run has all the
rights of the user.
"""

import errno
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart import Failure
from smart.corpus.midi import Limits, Piece, Reading, Reject, read_bytes
from smart.system import limit_memory
from smart.workers import STARTS, Answer, GarbledAnswer, NoAnswer, Worker, WorkerFailure, answering

if TYPE_CHECKING:
    from smart.corpus.piece import PieceReader

AHEAD = 8  # files that a worker is given before it has answered, so that it never waits for the next
SERVES = 2000  # files after which a worker is replaced: parsers leak, and memory is limited
GRACE = 10.0  # seconds past the limit on a file after which a worker that did not end itself is killed
START = 120.0  # seconds from its start after which a worker that is not ready is killed
CRASHED_BY_MEMORY = 77  # exit status of a worker that ran out of memory

# MidiTok imports torch, for data loaders that we do not use, wherever it is installed; a worker that hides it starts
# three times as fast and takes a quarter of the memory
PROGRAM = """
sys.modules["torch"] = None
from smart.corpus.readers import prepare
from smart.workers import serve
serve(int(sys.argv[1]), prepare)
"""


# The process ------------------------------------------------------------------------------------------------


def prepare(tokenizer_file: str, limits: dict[str, Any], reading: dict[str, Any]) -> Callable[[bytes], Answer]:
    """What a worker process does with a path; limits the memory of this process."""
    from smart.corpus.piece import PieceReader
    from smart.tokens import load_tokenizer

    reader = PieceReader(load_tokenizer(tokenizer_file), Limits(**limits), Reading(**reading))
    limit_memory(reader.limits.megabytes << 20)
    return partial(_answer, reader)


def _answer(reader: "PieceReader", path: bytes) -> Answer:
    # the default action of SIGALRM ends the process even inside native code that never returns
    signal.setitimer(signal.ITIMER_REAL, reader.limits.seconds)
    try:
        piece = reader.read(read_bytes(path, reader.limits))
        facts = {name: getattr(piece, name) for name in ("notes", "bars", "seconds", "stretch", "placed", "remarks")}
        return {"digest": piece.digest.hex(), **facts}, piece.tokens
    except Reject as reject:
        reason, detail = reject.reason, reject.detail
    except MemoryError:
        os._exit(CRASHED_BY_MEMORY)  # its heap may be fragmented: let a fresh process decide
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):  # not the file's fault
            os._exit(CRASHED_BY_MEMORY)
        reason, detail = "cannot be read", str(error.strerror)
    except Exception as error:  # a parser's or tokenizer's bug on this file: a reject with its text, never silence
        reason, detail = "cannot be tokenised", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"reason": reason, "detail": detail}, b""


# The caller -------------------------------------------------------------------------------------------------


def _understand(fields: dict[str, Any], tokens: bytes) -> Piece | tuple[str, str]:
    """The answer that a worker sent for a file. Raises ``GarbledAnswer`` if it makes no sense."""
    try:
        match fields:
            case {"reason": str(reason), "detail": str(detail)} if (reason + detail).encode():
                return reason, detail
            case {
                "digest": str(digest),
                "notes": int(notes),
                "bars": int(bars),
                "seconds": float(seconds),
                "stretch": float(stretch),
                "placed": str(placed),
                "remarks": str(remarks),
            } if (
                (placed + remarks).encode() is not None
                and len(digest) == 32
                and 0 <= notes < 2**31
                and 0 <= bars < 2**31
                and math.isfinite(seconds + stretch)
            ):
                return Piece(bytes.fromhex(digest), tokens, notes, bars, seconds, stretch, placed, remarks)
    except ValueError:  # a digest that is not hexadecimal, or text that cannot be encoded
        pass
    raise GarbledAnswer(fields)


class _FileWorker(Worker):
    """A worker that reads files one after another; ``pending`` are those that it has not answered yet."""

    def __init__(self, tokenizer_file: Path, limits: Limits, reading: Reading) -> None:
        settings = {"tokenizer_file": str(tokenizer_file), "limits": asdict(limits), "reading": asdict(reading)}
        # no piece is longer: two bytes per token, six tokens per note, two per tempo (seven bytes of the file), and two
        # per bar (at most 16 bars per quarter note)
        longest = 12 * limits.max_notes + limits.max_bytes + 64 * limits.max_quarters
        super().__init__(PROGRAM, settings, longest=longest)
        self.limits = limits
        self.pending: deque[tuple[bytes, bytes]] = deque()  # (key, path)
        self.since = time.monotonic()  # when the first of ``pending`` was begun
        self.served = 0

    def give(self, key: bytes, path: bytes) -> None:
        if not self.pending:
            self.since = time.monotonic()
        self.pending.append((key, path))
        self.served += 1
        self.send(path)

    def overdue(self) -> bool:
        """Whether it has neither answered nor ended itself in time. An answer that waits to be read counts."""
        limit = self.limits.seconds + GRACE if self.ready else START
        return bool(self.pending) and time.monotonic() - self.since > limit and not answering([self], 0)


class ReaderPool:
    """``count`` workers; ``answers`` runs tasks through them and replaces those that die.

    The file that a worker was reading when it died, ran out of time or answered nonsense is read once more by another,
    because the file may not be to blame: the machine slept, the worker was killed, a parser leaked. The second
    failure rejects the file. A worker dies with the thread that started it, so one thread must make the pool and ask
    for answers.
    """

    def __init__(self, tokenizer_file: Path, limits: Limits, count: int, reading: Reading | None = None) -> None:
        self.tokenizer_file, self.limits, self.reading = tokenizer_file, limits, reading or Reading()
        self.again: deque[tuple[bytes, bytes]] = deque()
        self.died_on: set[bytes] = set()
        self.failed_starts = 0
        self.workers = [self._start() for _ in range(count)]

    def __enter__(self) -> "ReaderPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.close()

    def answers(self, tasks: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, Piece | tuple[str, str]]]:
        """(key, answer) for every (key, path) of ``tasks``, in the order in which they finish.

        An answer is a piece, or the reason and the detail of a rejected file.
        """
        while True:
            for worker in [worker for worker in self.workers if worker.overdue()]:
                yield from self._bury(worker, NoAnswer())
            for place, worker in enumerate(self.workers):
                if worker.served >= SERVES and not worker.pending:
                    worker.close(patience=1.0)  # it ends by itself when its connection does
                    self.workers[place] = worker = self._start()
                while len(worker.pending) < AHEAD and worker.served < SERVES:
                    task = self.again.popleft() if self.again else next(tasks, None)
                    if task is None:
                        break
                    worker.give(*task)
            if not any(worker.pending for worker in self.workers):
                return
            for worker in answering(self.workers, 1.0):
                yield from self._read(worker)

    def _start(self) -> _FileWorker:
        return _FileWorker(self.tokenizer_file, self.limits, self.reading)

    def _read(self, worker: _FileWorker) -> Iterator[tuple[bytes, Piece | tuple[str, str]]]:
        was_ready = worker.ready
        try:
            fields, tokens = worker.receive(GRACE)  # not for ever, if it hangs within an answer
            answer = _understand(fields, tokens) if was_ready else None
        except WorkerFailure as failure:
            yield from self._bury(worker, failure)
            return
        worker.since = time.monotonic()
        if answer is None:
            self.failed_starts = 0
        else:
            yield worker.pending.popleft()[0], answer

    def _bury(self, worker: _FileWorker, failure: WorkerFailure) -> Iterator[tuple[bytes, tuple[str, str]]]:
        """Account for a worker that failed, and put another in its place."""
        status = worker.close()
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                raise Failure(f"the MIDI workers do not start: {failure}")
        elif worker.pending:
            key, path = worker.pending.popleft()
            if key not in self.died_on:
                self.died_on.add(key)
                self.again.append((key, path))
            else:
                self.died_on.remove(key)
                if isinstance(failure, NoAnswer) or status == -signal.SIGALRM:
                    yield key, ("time limit", f"over {self.limits.seconds:g} s")
                elif status == CRASHED_BY_MEMORY:
                    yield key, ("memory limit", f"over {self.limits.megabytes} MB")
                else:
                    yield key, ("crash", f"its worker failed twice: {failure}")
        self.again.extend(worker.pending)
        worker.pending.clear()
        self.workers[self.workers.index(worker)] = self._start()
