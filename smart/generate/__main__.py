"""``python -m smart.generate``."""

from smart.__main__ import start

start("generate")
