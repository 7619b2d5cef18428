"""Batches of completions: sampled, rendered meanwhile, rated, gathered from all processes; comparisons of systems."""

from smart.rollout.batch import Batch, Batches, Drawn
from smart.rollout.compare import BLOCK, Piece, compose, seed_of
from smart.rollout.horizon import Horizon
from smart.rollout.scorer import SILENT, Audio, Clips, Rated, Scorer, completion_metrics
from smart.rollout.systems import System, find_system, find_systems

__all__ = [
    "BLOCK",
    "SILENT",
    "Audio",
    "Batch",
    "Batches",
    "Clips",
    "Drawn",
    "Horizon",
    "Piece",
    "Rated",
    "Scorer",
    "System",
    "completion_metrics",
    "compose",
    "find_system",
    "find_systems",
    "seed_of",
]
