"""The process that a program runs in: its standard streams, Ctrl-C while it imports, and limits that it ran into."""

import errno
import os
import resource
import signal
import sys
import threading
from typing import Any


def open_streams() -> None:
    """Open standard streams that are closed (``<&-``, some daemons) on /dev/null.

    Otherwise the next file or socket would become one of them.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115  # for the whole process
            setattr(sys, name, stream)


def end_imports_at_interrupt() -> None:
    """Let Ctrl-C end a program of this package in one line while it imports modules.

    Some modules swallow ``KeyboardInterrupt`` there; nothing is lost, since no work has begun.
    """
    name = sys.argv[0] if sys.argv else ""
    ours = name == "-m" or os.path.basename(name) == "smart"  # the former while Python looks for the module to run
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours and default and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: Any) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"Error: interrupted while it was starting\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


def exhausted(error: BaseException | None) -> str | None:
    """The limit of the system that an error, or one that it followed from, is about; None if it is about none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return _limit(errno.ENOMEM)
        if isinstance(error, OSError) and error.errno in _NAMES:
            return _limit(error.errno)
        if not isinstance(error, OSError):
            for number in _NAMES:  # libraries in Rust, C++ and C
                if f"(os error {number})" in str(error) or os.strerror(number) in str(error):
                    return _limit(number)
        error = error.__cause__ or error.__context__
    return None


_NAMES = {
    errno.EMFILE: "too many open files in this process (ulimit -n is {files})",
    errno.ENFILE: "too many open files on this machine (sysctl fs.file-max)",
    errno.ENOMEM: "not enough memory{memory}",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
}


def _limit(number: int) -> str:
    files, memory = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS))
    allowed = "" if memory == resource.RLIM_INFINITY else f" (ulimit -v is {memory >> 10} KiB)"
    return _NAMES[number].format(files=files, memory=allowed)
