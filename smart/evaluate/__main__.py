"""``python -m smart.evaluate``."""

from smart.__main__ import start

start("evaluate")
