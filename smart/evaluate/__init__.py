"""Evaluation: models are sampled, rated and compared. ``command`` is its command line, ``python -m smart.evaluate``."""

from smart.evaluate.command import main

__all__ = ["main"]
