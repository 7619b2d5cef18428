"""A real ``smart watch`` process, shared by two test files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import programs


class Server:
    """``smart watch`` on a free port; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Server":
        words = [sys.executable, "-m", "smart.watch", str(self.folder), "--port", "0"]
        self.process = programs.start(words, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("watch: http://127.0.0.1:"), line
        self.url = line.split()[1].rstrip("/")
        self.port = int(self.url.rpartition(":")[2])
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
