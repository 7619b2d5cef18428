"""``python -m smart.study``."""

from smart.__main__ import start

start("study")
