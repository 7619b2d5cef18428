"""Write files so that a crash never leaves half of one, and read files from unknown sources. Imports no torch, for
programs that need none."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` in one rename with bytes, or with what ``write(file)`` writes, flushed to the disk.

    Whenever the machine stops, the file is absent, unchanged or complete. Processes and threads that replace the same
    file wait for each other.
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
    """Open a file to write it from scratch, once no other process or thread is writing it."""
    while True:
        file = open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # its last writer has renamed it
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()  # leftovers of a killed process
                return file
        file.close()


def replace_files(folder: Path, write: Callable[[Path], object], *, last: str) -> None:
    """Call ``write`` with a temporary folder, then move its files into ``folder``, the one named ``last`` last.

    Each file is flushed to the disk first. Whenever the machine stops, each is absent, unchanged or complete.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # leftovers of a killed process
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
    """Whether a file is a temporary one of ``write_atomically`` whose process was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp") and path.is_file()


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty, apart from such leftovers."""
    return all(is_leftover(path) for path in folder.iterdir())


@contextmanager
def hold(path: Path) -> Iterator[int]:
    """Lock a file or folder against other processes; yields the descriptor that holds the lock.

    The lock ends with the process, however that ends. Raises ``BlockingIOError`` if another process holds it, and
    ``OSError`` if the path cannot be opened. On a file system without locks this does nothing.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for untrusted text: ``ValueError`` for anything wrong with it, including its depth."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """``tomllib.loads`` for untrusted text: ``ValueError`` for anything wrong with it, including its depth."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def placeholders(text: str) -> list[str]:
    """The parts in square brackets, which a draft leaves for its user to fill in."""
    return [" ".join(part.split()) for part in re.findall(r"\[[^\[\]]+\]", text)]


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
