"""The state of a corpus build: an SQLite table with a row for each file, and a spool of tokens.

A build that was killed continues from there. What was read from a file has a checksum, so that damage is noticed.
"""

import contextlib
import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smart import UserError
from smart.corpus.midi import Piece
from smart.files import hold

KEPT, DUPLICATE = "kept", "duplicate"  # reasons that the build itself gives
STATE = "state-3.sqlite"  # its number changes with the table's columns: an unfinished build of other ones starts again
SPOOL = "spool.bin"
DAMAGED = "its unfinished build is damaged"
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, reason TEXT, detail,
    hash BLOB, place INTEGER, length INTEGER, notes INTEGER, bars INTEGER, seconds REAL, stretch REAL, placed TEXT,
    remarks TEXT, checksum BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stamps (path BLOB PRIMARY KEY, stamp TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_hash ON files (hash, path) WHERE hash IS NOT NULL;
"""
FIRST = "(SELECT MIN(first.path) FROM files AS first WHERE first.hash = files.hash)"
COLUMNS = "path, reason, detail, hash, place, length, notes, bars, seconds, stretch, placed, remarks"


def _checksum(path: bytes, rejected: Any, row: Sequence[Any], tokens: bytes) -> bytes:
    """Of what was read from a file: why it was rejected, or ``row`` and the tokens of a piece."""
    row = [float(value) if isinstance(value, int) else value for value in row]  # as SQLite may give it back
    return hashlib.blake2b(repr((path, rejected, row)).encode() + tokens, digest_size=16).digest()


class State:
    """A row for each file, and a spool of tokens; whenever the build is killed, both are as of the last ``commit``.

    ``reason`` is null for files that have not been read, and ``kept`` for pieces. What was read has a checksum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:  # closed again if anything below fails
            hold_work(folder, opened)
            damaged = f"--out {folder.parent}: {DAMAGED}; start again with --overwrite"
            self.table = sqlite3.connect(folder / STATE, isolation_level=None)
            self.table.text_factory = lambda text: text.decode(errors="replace")  # it may be damaged
            opened.callback(self.table.close)
            try:
                self.table.executescript(SCHEMA)
                self.table.execute("BEGIN")
                self.end = int(self.get("spool") or 0)
            except sqlite3.OperationalError:  # the disk is full or read-only
                raise
            except (sqlite3.DatabaseError, ValueError):
                raise UserError(damaged) from None
            self.spool = opened.enter_context(open(folder / SPOOL, "a+b", opener=_open_no_link))
            if not 0 <= self.end <= self.spool.seek(0, os.SEEK_END):
                raise UserError(damaged)
            self.spool.truncate(self.end)
            self._open = opened.pop_all()

    def close(self) -> None:
        self._open.close()

    def get(self, key: str) -> str:
        row = self.table.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return "" if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        self.table.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def commit(self) -> None:
        """Write everything so far to the disk: tokens first, then the rows that point to them."""
        self.spool.flush()
        os.fsync(self.spool.fileno())
        self.put("spool", str(self.end))
        self.table.execute("COMMIT")
        self.table.execute("BEGIN")

    def list_files(self, keys: Iterator[bytes]) -> None:
        """Add the files that are not listed yet, and forget those that are gone."""
        self.table.execute("CREATE TEMP TABLE present (path BLOB PRIMARY KEY) WITHOUT ROWID")
        self.table.executemany("INSERT OR IGNORE INTO present VALUES (?)", ((key,) for key in keys))
        self.table.execute("DELETE FROM files WHERE path NOT IN present")
        self.table.execute("INSERT OR IGNORE INTO files (path) SELECT path FROM present")
        self.table.execute("DROP TABLE present")
        self.commit()

    def read_again(self, find: Callable[[bytes], bytes]) -> list[bytes]:
        """Forget what was read from files that have changed since; returns their keys. ``find`` gives a key's path."""
        read = "SELECT path, stamp FROM stamps WHERE path IN (SELECT path FROM files WHERE reason IS NOT NULL)"
        changed = [key for key, stamp in self.table.execute(read) if stamp != _stamp(find(key))]
        for key in changed:
            self.table.execute("DELETE FROM files WHERE path = ?", (key,))
            self.table.execute("INSERT INTO files (path) VALUES (?)", (key,))
        return changed

    def stamp(self, key: bytes, path: bytes) -> None:
        """Note the state of a file that is about to be read."""
        self.table.execute("INSERT OR REPLACE INTO stamps VALUES (?, ?)", (key, _stamp(path)))

    def record(self, key: bytes, answer: Piece | tuple[str, str]) -> None:
        row: tuple[Any, ...]
        tokens = b""
        if isinstance(answer, Piece):
            tokens = answer.tokens
            self.spool.write(tokens)
            place = answer.digest, self.end, len(tokens)
            numbers = answer.notes, answer.bars, answer.seconds, answer.stretch
            reason, detail, row = KEPT, "", (*place, *numbers, answer.placed, answer.remarks)
            self.end += len(tokens)
        else:
            (reason, detail), row = answer, (None,) * 9
        values = (key, reason, detail, *row, _checksum(key, None if row[0] else (reason, detail), row, tokens))
        self.table.execute(f"INSERT OR REPLACE INTO files VALUES ({', '.join('?' * len(values))})", values)

    def damaged(self) -> list[bytes]:
        """Forget what was read and is not as it was written; returns the keys of these files."""
        found = []
        for path, reason, detail, *row, kept in self.table.execute(
            f"SELECT {COLUMNS}, checksum FROM files WHERE reason IS NOT NULL"
        ):
            tokens = b""
            if row[0]:  # a piece; reason and detail, which say whether it is a duplicate, are found again
                with contextlib.suppress(OSError, TypeError, ValueError, OverflowError, MemoryError):
                    self.spool.seek(row[1])
                    tokens = self.spool.read(min(row[2], self.end))
            if kept != _checksum(path, None if row[0] else (reason, detail), row, tokens):
                found.append(path)
        for key in found:
            self.table.execute("INSERT OR REPLACE INTO files (path) VALUES (?)", (key,))
        return found

    def unread(self) -> Iterator[bytes]:
        """Keys of files that have not been read, in order; a page at a time, because rows change meanwhile."""
        last = b""
        query = "SELECT path FROM files WHERE path > ? AND reason IS NULL ORDER BY path LIMIT 1000"
        while page := self.table.execute(query, (last,)).fetchall():
            for (last,) in page:
                yield last

    def mark_duplicates(self) -> None:
        """Of pieces with one hash, keep the first by path."""
        self.table.execute("UPDATE files SET reason = ?, detail = '' WHERE hash IS NOT NULL", (KEPT,))
        self.table.execute(
            f"UPDATE files SET reason = ?, detail = {FIRST} WHERE hash IS NOT NULL AND path > {FIRST}", (DUPLICATE,)
        )

    def rows(self, columns: str, where: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from self.table.execute(f"SELECT {columns} FROM files WHERE {where} ORDER BY path", values)

    def count(self, where: str, *values: Any) -> int:
        return int(self.table.execute(f"SELECT COUNT(*) FROM files WHERE {where}", values).fetchone()[0])

    def remarks(self) -> dict[str, int]:
        """How many kept pieces have a remark of each kind."""
        rows = self.table.execute("SELECT remarks FROM files WHERE reason = ? AND remarks != ''", (KEPT,))
        return dict(Counter(remark.partition(":")[0] for (text,) in rows for remark in text.split("; ")))

    def reasons(self) -> dict[str, int]:
        return dict(self.table.execute("SELECT reason, COUNT(*) FROM files GROUP BY reason ORDER BY reason"))


def _stamp(path: bytes) -> str:
    """What differs if a file has been written, replaced or moved since; a copy cannot keep it."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def hold_work(work: Path, held: contextlib.ExitStack) -> None:
    """Lock ``work`` against other builds. Raises ``UserError`` if one is using it."""
    try:
        held.enter_context(hold(work))
    except BlockingIOError:
        raise UserError(
            f"--out {work.parent}: another build is writing this folder; wait until it has finished"
        ) from None
