"""What every worker process does first of all: it makes sure that it cannot outlive the process it works for."""

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
