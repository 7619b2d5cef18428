"""``python -m smart.watch``."""

from smart.__main__ import start

start("watch")
