"""A page of this machine that shows runs while they write: curves, pieces to listen to, completions, configuration.

smart watch runs
"""

from smart.watch.command import main

__all__ = ["main"]
