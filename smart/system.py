"""What Linux offers, each with what takes its place on other systems (macOS) and where a container withholds it.

Each function tries, and falls back where the system says no; the rest of the package asks no system for its name.
"""

import contextlib
import ctypes
import os
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

WATCH = 0.5  # seconds between two looks at the parent where the system does not tell of its end


def die_with_parent(parent: int) -> None:
    """Have this process, which ``parent`` has just started, end when its parent does.

    On Linux that is when the thread ends that started it, and even native code that hangs is killed. Elsewhere a thread
    looks for the parent, and native code that holds Python's lock can delay the end.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(1)
        return
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def anonymous_file() -> int:
    """A file without a name, in memory where the system can do that; closed with its last descriptor."""
    with contextlib.suppress(AttributeError, OSError):  # some containers refuse it
        return os.memfd_create("smart-render")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def path_of(descriptor: int) -> str | None:
    """A path by which libraries can open a file without a name from its beginning; None if the system has none."""
    path = f"/proc/self/fd/{descriptor}"  # not /dev/fd: on other systems it shares the descriptor's position
    return path if os.path.exists(path) else None


def limit_memory(more: int) -> None:
    """Let this process take ``more`` bytes of address space than it has now; without effect where there is no limit."""
    try:
        in_use = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)  # which only the superuser may raise
    bound = in_use + more if most == resource.RLIM_INFINITY else min(in_use + more, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def usable_cpus() -> int:
    """The cores of this process's affinity mask, or all of them on a system without such masks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that no process uses; on a system that does not tell, all of the machine's."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
