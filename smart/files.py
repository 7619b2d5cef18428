"""Write files so that a crash never leaves half of one, and read files from unknown sources. Imports no torch, for
programs that need none."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click

BYTE_ORDER_MARK = "\ufeff"
# what a file system answers that lacks an operation; some answer EPERM, for links
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomically(path: Path, write: bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` in one rename with bytes, or with what ``write(file)`` writes, flushed to the disk.

    Whenever the machine stops, the file is absent, unchanged or complete. If several processes or threads replace the
    same file, the last one's stays.
    """
    _sweep(path)
    temporary, opened = _open_temporary(path)
    with opened as file:
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


def _open_temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file next to ``path``, locked for as long as it is open, so that nobody takes it for a leftover."""
    while True:
        temporary = temporary_name(path)
        file = open_new(temporary)
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # nobody swept it before it was locked
            return temporary, file
        file.close()


def _sweep(path: Path) -> None:
    """Delete temporary files for ``path`` whose process was killed: those that nobody has locked."""
    name = re.compile(rf"\.{re.escape(path.name[:100])}(\.[0-9a-f]{{16}})?\.tmp")
    with os.scandir(path.parent) as entries:
        leftovers = [entry.path for entry in entries if name.fullmatch(entry.name)]
    for leftover in leftovers:
        with suppress(OSError):  # it is a link, it is locked or already gone, or there are no locks
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(leftover)
            finally:
                os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A hidden name next to ``path`` that nobody can guess, so that nobody can put a link there."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")


def open_new(path: Path) -> IO[bytes]:
    """Open a file that does not exist yet, to write it. Raises ``FileExistsError`` if it does, even as a link."""
    return open(path, "xb")


def replace_files(folder: Path, write: Callable[[Path], object], *, last: str) -> None:
    """Call ``write`` with a temporary folder, then move its files into ``folder``, the one named ``last`` last.

    Each file is flushed to the disk first. Whenever the machine stops, each is absent, unchanged or complete.
    """
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = temporary_name(folder)
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


def copy_mode(path: Path, like: Path) -> None:
    """Let those use ``path`` who may use ``like``: safetensors makes its files private, whatever the umask says."""
    with suppress(OSError):  # some file systems have one mode for all files
        shutil.copymode(like, path)


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
    ``OSError`` if the path cannot be opened. On a file system without locks this only warns.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks
            _warn("lock", path)
        yield descriptor
    finally:
        os.close(descriptor)


def split_name(text: str) -> tuple[str, str]:
    """NAME and PATH of ``NAME=PATH``; the name is empty if there is none, as in a path that holds a ``=``.

    A ``~`` at the beginning of the path is the home directory, also of one that does not exist.
    """
    name, separator, rest = text.partition("=")
    before_at = text.rpartition("@")[0]
    is_path = any(part and Path(os.path.expanduser(part)).exists() for part in (text, before_at))
    if not separator or not name or is_path or set(name) & set("/@~"):
        return "", os.path.expanduser(text)
    return name, os.path.expanduser(rest)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for untrusted text: ``ValueError`` for anything wrong with it, including its depth.

    A byte order mark in front counts for nothing, also in ``parse_toml``: some editors write it into any text.
    """
    try:
        return json.loads(text.removeprefix(BYTE_ORDER_MARK) if isinstance(text, str) else text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """``tomllib.loads`` for untrusted text: ``ValueError`` for anything wrong with it, including its depth."""
    try:
        return tomllib.loads(text.removeprefix(BYTE_ORDER_MARK))
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
    """Flush a file's bytes, or a folder's names, to the disk. A file system that cannot do the latter is reported."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
        _warn("flush", path)
    finally:
        os.close(descriptor)


def link(path: Path, name: str) -> bool:
    """Make ``path`` a symbolic link to ``name``, in one rename; without links in the file system warn, return False."""
    temporary = path.with_name(f".{path.name}.link")
    temporary.unlink(missing_ok=True)  # left by a killed process
    try:
        temporary.symlink_to(name)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise
        _warn("link", path.parent)
        return False
    os.replace(temporary, path)
    sync(path.parent)
    return True


LACKS = {
    "flush": "cannot flush folders to the disk: after a power cut the last files may be missing",
    "link": "has no symbolic links: they are left out, or replaced by copies",
    "lock": "has no locks: make sure that no two processes work in one folder",
    "case": "ignores upper and lower case: names have to differ in more than that",
}


def _warn(lack: str, place: Path) -> None:
    """Say once in a process what the file system of ``place`` lacks."""
    if lack not in _warned:
        _warned.add(lack)
        with suppress(OSError):  # the terminal was closed
            click.echo(f"Warning: the file system of {place} {LACKS[lack]}", err=True)


_warned: set[str] = set()


def lacks(folder: Path) -> list[str]:
    """What the file system of a folder lacks that runs use, as clauses. Raises ``OSError`` if it cannot be written."""
    found = []

    def flush(tried: Path) -> None:
        descriptor = os.open(tried, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(tried: Path) -> None:
        descriptor = os.open(tried, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)

    with tempfile.TemporaryDirectory(prefix=".smart-", dir=folder) as name:
        tried = Path(name)
        for lack, attempt in (
            ("flush", flush),
            ("link", lambda tried: os.symlink(".", tried / "link")),
            ("lock", lock),
        ):
            try:
                attempt(tried)
            except OSError:
                found.append(LACKS[lack])
    if ignores_case(folder):
        found.append(LACKS["case"])
    return found


def ignores_case(folder: Path) -> bool:
    """Whether two names that differ only in upper and lower case are one in a folder. Raises ``OSError``."""
    with tempfile.TemporaryDirectory(prefix=".smart-", dir=folder) as name:
        (Path(name) / "case").touch()
        return (Path(name) / "CASE").exists()
