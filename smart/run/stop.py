"""Signals that ask a long job to stop at the next safe place."""

import os
import signal
import threading
from contextlib import suppress
from typing import Any


class StopRequest:
    """A context manager in which SIGINT, SIGTERM and SIGHUP request a stop instead of ending the process at once.

    ``requested`` is the number of the signal that came last, 0 if none did. A second SIGINT raises
    ``KeyboardInterrupt``. A SIGHUP that is ignored (nohup) stays ignored. ``answer`` is printed at the first signal.
    """

    def __init__(self, answer: str = "") -> None:
        self.requested = 0
        self._answer = answer
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._answer and not self.requested:
            with suppress(OSError):  # the terminal was closed; a print could wait for a lock that this thread holds
                os.write(2, f"\n{self._answer}\n".encode())
        self.requested = number
