"""Worker processes: how many, and what each does first, so that it cannot outlive the process it works for."""

import os

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != {parent}:  # it died before we could ask
    os._exit(1)
"""


def die_with_parent() -> str:
    """Source for the head of a worker's program: Linux then kills the worker when the *thread* that started it ends.

    It imports nothing but the standard library's smallest, so that there is hardly a moment in which a worker that
    stands still, deep in its imports, say, would stay behind.
    """
    return _DIE_WITH_PARENT.format(parent=os.getpid())


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
