"""``python -m smart.doctor``."""

from smart.__main__ import start

start("doctor")
