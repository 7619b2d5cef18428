"""Files that are whole whenever the machine stops, and that others may have made. Without torch, for programs that
need none."""

import fcntl
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` in one rename by bytes, or by what ``write(file)`` writes, flushed to the disk.

    Whenever the machine stops, the file is absent, as before, or whole. Of several processes or threads that replace
    one file, each waits for the one before it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _open_alone(temporary) as file:
        try:
            if isinstance(write, bytes):
                file.write(write)
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def _open_alone(path: Path) -> IO[bytes]:
    """Open a file to write it anew, once no other process or thread is writing it."""
    while True:
        file = open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # whoever held it has moved it to its place
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()  # what a process that was killed had written
                return file
        file.close()


def replace_files(folder: Path, write: Callable[[Path], object], *, last: str) -> None:
    """Put what ``write(other)`` writes into ``folder``, file by file, each on the disk before; ``last`` comes last.

    Whenever the machine stops, each file is absent, as before, or whole.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        paths = sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name))
        for path in paths:
            sync(path)
        folder.mkdir(exist_ok=True)
        for path in paths:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder)
    sync(folder.parent)


def is_leftover(path: Path) -> bool:
    """Whether a file is what ``write_atomically`` had written when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp") and path.is_file()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only such leftovers."""
    return all(is_leftover(path) for path in folder.iterdir())


@contextmanager
def hold(path: Path) -> Iterator[int]:
    """Hold a file or folder, so that no other process can; yields the descriptor that does.

    However the process ends, it lets go. Raises ``BlockingIOError`` where another process holds it, and ``OSError``
    where it cannot be opened. Where a file system has no locks, nothing is held.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for text from others: ``ValueError`` for whatever is wrong with it, its depth included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """``tomllib.loads`` for text from others: ``ValueError`` for whatever is wrong with it, its depth included."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
