"""Signals that ask a long job to stop at the next safe place."""

import signal
import threading
from typing import Any


class StopRequest:
    """While active, SIGINT, SIGTERM and SIGHUP ask for a stop instead of being obeyed at once.

    A second SIGINT is obeyed; a SIGHUP that was ignored (nohup) still is. ``requested`` is 0, or the number of the
    signal that came.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
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
        self.requested = number
