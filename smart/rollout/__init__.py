"""Sample, render and rate batches of completions, and compare models on the same prompts."""

from smart.rollout.agreement import Agreement, device_names
from smart.rollout.batch import Batch, Batches, Drawn
from smart.rollout.compare import BLOCK, Piece, compose, seed_of
from smart.rollout.scorer import SILENT, Clips, Fonts, Rated, Scorer, completion_metrics
from smart.rollout.systems import System, find_system, find_systems, is_the_papers

__all__ = [
    "BLOCK",
    "SILENT",
    "Agreement",
    "Batch",
    "Batches",
    "Clips",
    "Drawn",
    "Fonts",
    "Piece",
    "Rated",
    "Scorer",
    "System",
    "completion_metrics",
    "compose",
    "device_names",
    "find_system",
    "find_systems",
    "is_the_papers",
    "seed_of",
]
