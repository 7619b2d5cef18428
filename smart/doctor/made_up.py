"""Material for checks and benchmarks that needs no download: random weights of the full architecture, made-up notes.

Random weights are as fast as real ones, and take as much memory.
"""

import math
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smart.render import Audio, Notes, Renderer

RATE = 16_000  # Hz of the made-up audio: that of both rewards


def random_audiobox(folder: Path, seed: int = 0) -> Path:
    """Write Audiobox Aesthetics with random weights; returns ``folder``.

    Some weights are scaled up, so that clips get different ratings. Raises ``ImportError`` without its package.
    """
    from audiobox_aesthetics.model.aes import AesMultiOutput

    transform = {"CE": (5.1, 1.5), "CU": (5.7, 1.8), "PC": (3.2, 1.3), "PQ": (6.4, 1.6)}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about the package's weight_norm
        torch.manual_seed(seed)
        network = AesMultiOutput(target_transform={axis: {"mean": m, "std": s} for axis, (m, s) in transform.items()})
        for axis in transform:
            network.proj_layer[axis][-1].weight.mul_(20)
            network.layer_weights[axis].normal_()
    network.save_pretrained(folder)
    return folder


def random_clip(rng: np.random.Generator, *, count: int = 70, seconds: float = 10.0) -> Notes:
    """(count, 6) piano notes, spread over ``seconds``: as many as a completion of the paper has."""
    columns = (
        rng.uniform(0, seconds, count),
        rng.uniform(0.1, 1.5, count),
        rng.integers(30, 91, count),
        rng.integers(20, 128, count),
        np.zeros(count),
        np.zeros(count),
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def waves(seconds: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (4, S) of decaying tones at ``RATE``, and their lengths (4,): a short one is among them."""
    t = torch.arange(round(seconds * RATE)) / RATE
    rows = []
    for row, root in enumerate((110.0, 147.0, 220.0, 330.0)):
        pulse = 0.25 + 0.1 * row  # seconds from tone to tone
        pitch = root * 2 ** ((t // pulse * (3 + row)) % 24 / 12)
        rows.append(torch.sin(2 * math.pi * pitch * t) * torch.exp(-3 * (t % pulse)))
    lengths = torch.full((4,), len(t))
    lengths[1] = int(0.4 * len(t))
    return torch.stack(rows), lengths


class MusicInstead:
    """Renders clips of 70 notes instead of those submitted: random weights write few notes."""

    def __init__(self, renderer: Renderer, seconds: float, many: int = 16) -> None:
        rng = np.random.default_rng(0)
        self.renderer = renderer
        self.clips = [random_clip(rng, seconds=seconds) for _ in range(many)]
        self.submitted = 0

    def submit(self, score: Any) -> Future[Audio]:
        self.submitted += 1
        return self.renderer.submit(self.clips[self.submitted % len(self.clips)])

    def fallback_fraction(self, clips: Any) -> float | None:
        return self.renderer.fallback_fraction(clips)

    def fallback_kinds(self, clips: Any) -> dict[str, float]:
        return self.renderer.fallback_kinds(clips)
