"""``python -m smart.config``."""

from smart.__main__ import start

start("config")
