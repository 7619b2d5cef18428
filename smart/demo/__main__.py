"""``python -m smart.demo``."""

from smart.__main__ import start

start("demo")
