"""Batches of completions: rendered while they are written, rated, gathered over processes; comparisons of systems."""

from smart.rollout.compare import BLOCK, Piece, compose, seed_of
from smart.rollout.gather import gather_rollout, together
from smart.rollout.horizon import Horizon
from smart.rollout.scorer import SILENT, Clips, Rated, Scorer, completion_metrics
from smart.rollout.systems import System, find_system, find_systems

__all__ = [
    "BLOCK",
    "SILENT",
    "Clips",
    "Horizon",
    "Piece",
    "Rated",
    "Scorer",
    "System",
    "completion_metrics",
    "compose",
    "find_system",
    "find_systems",
    "gather_rollout",
    "seed_of",
    "together",
]
