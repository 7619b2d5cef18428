"""The packages that ``smart`` requires, for a message when they were not installed with it. Imports none of them."""

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires, version


def lacking() -> str:
    """The command that installs the required packages that are missing, or where to read what is required."""
    try:
        wanted = [line for line in requires("smart") or () if "extra ==" not in line]
    except PackageNotFoundError:  # not installed itself: a checkout on PYTHONPATH
        wanted = []
    missing = [line for line in wanted if not _installed(re.match(r"[\w.-]+", line))]
    return shlex.join([sys.executable, "-m", "pip", "install", *missing]) if missing else "see docs/install.md"


def _installed(name: re.Match[str] | None) -> bool:
    try:
        return name is None or bool(version(name[0]))
    except PackageNotFoundError:
        return False
