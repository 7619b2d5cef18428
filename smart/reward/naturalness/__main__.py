"""``python -m smart.reward.naturalness``."""

from smart.__main__ import start

start("naturalness")
