"""Takes from a Python process, and from those that it starts, what Linux has and macOS lacks.

Python imports a module of this name when it starts, wherever PYTHONPATH leads to it.
"""

import builtins
import ctypes
import io
import os
from typing import Any

for name in ("memfd_create", "sched_getaffinity", "sched_setaffinity", "preadv", "pwritev", "copy_file_range"):
    if hasattr(os, name):
        delattr(os, name)
if hasattr(os, "O_TMPFILE"):
    del os.O_TMPFILE


def without_proc(function: Any) -> Any:
    def tried(path: Any, *args: Any, **options: Any) -> Any:
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(("/proc", "/dev/shm")):
            raise FileNotFoundError(2, "No such file or directory", path)
        return function(path, *args, **options)

    return tried


for module, names in ((builtins, ["open"]), (io, ["open"]), (os, ["stat", "lstat", "open", "listdir", "scandir"])):
    for name in names:
        setattr(module, name, without_proc(getattr(module, name)))


class Library(ctypes.CDLL):
    def __getattr__(self, name: str) -> Any:
        if name == "prctl":
            raise AttributeError(f"dlsym(0x0, {name}): symbol not found")
        return super().__getattr__(name)


ctypes.CDLL = Library  # type: ignore[misc]
