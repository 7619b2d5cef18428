"""``python -m smart.reproduce``."""

from smart.__main__ import start

start("reproduce")
