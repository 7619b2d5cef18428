"""Evaluation: models are sampled, rated and compared. ``command`` is its command line, ``python -m smart.evaluate``."""
