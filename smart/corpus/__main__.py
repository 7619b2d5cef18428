"""``python -m smart.corpus``."""

from smart.__main__ import start

start("corpus")
