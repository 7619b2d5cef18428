"""Emptying the log that SQLite keeps next to its file, so that nothing of a participant who withdrew stays on the disk.

What a participant leaves is deleted from the database at once, but copies of it stay in the write-ahead log for as long
as anybody reads the database (a backup, an analysis). ``Eraser`` tries to empty the log without ever waiting for such a
reader, since a rating would have to wait with it, and tries again in the background until it succeeds.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable

from smart.study.tell import tell

PAUSE = 1.0  # seconds between two attempts


class Eraser:
    """Empties the log of the database file ``path`` for as long as a withdrawal is pending.

    ``pending()`` is the withdrawal that may still be in the log, or ""; ``done(withdrawal)`` is called once it is not.
    Both are called in any thread.
    """

    def __init__(self, path: str, pending: Callable[[], str], done: Callable[[str], None]) -> None:
        self.path, self.pending, self.done = path, pending, done
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Empty the log now, or else in the background; returns whether it is empty now."""
        why = self._attempt()
        if not why:
            return True
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                tell(
                    f"a participant withdrew and is deleted, but copies of their data are still in {self.path}-wal "
                    f"({why}); trying again in the background until it is empty: end programs that read the database, "
                    "such as a backup or an analysis"
                )
                self._thread = threading.Thread(target=self._repeat, name="eraser", daemon=True)
                self._thread.start()
        return False

    def close(self) -> None:
        """End the background attempts; what is left to do is done when the database is opened again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _repeat(self) -> None:
        while not self._stop.wait(PAUSE):
            if not self._attempt():
                tell(f"{self.path}-wal is empty now: nothing of the participant who withdrew is left in it")
                return

    def _attempt(self) -> str:
        """Why the log could not be emptied; "" if it is empty now."""
        try:
            withdrawal = self.pending()
            if not withdrawal:
                return ""
            # a separate connection, which waits for no lock
            with contextlib.closing(sqlite3.connect(self.path, timeout=0, isolation_level=None)) as own:
                if why := _truncate(own):
                    return why
                self.done(withdrawal)  # it writes once more, but nothing about a participant
                _truncate(own)
            return "another participant withdrew" if self.pending() else ""
        except Exception as error:  # a disk that fails, or a database that is locked or gone: tried again as well
            return str(error) or type(error).__name__


def _truncate(own: sqlite3.Connection) -> str:
    busy, pages, copied = own.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return "another program is reading the database" if busy or pages != copied else ""
