"""The note bank on CUDA."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulated_cuda import CUDA, simulated

from smart.render.bank import NoteBank


def test_the_audio_is_that_of_a_cpu(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    clips = []
    for notes in (1, 12, 30):
        start = rng.uniform(0, 2, notes)
        columns = [start, rng.uniform(0.05, 1, notes), rng.integers(30, 90, notes), rng.integers(1, 128, notes)]
        clips.append(np.stack([*columns, np.zeros(notes), np.zeros(notes)], axis=1))
    options: dict[str, Any] = {"sample_rate": 22_050, "seconds": 3.0, "cache": tmp_path}
    expected = NoteBank("timgm", **options).try_render(clips)
    with simulated() as device:
        bank = NoteBank("timgm", device="cuda", **options)
        bank.try_render(clips)
        with device.counted() as counts:
            found = bank.try_render(clips)
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.device == CUDA
            torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)
    assert counts["launch"] < 1800 and counts["wait"] < 60, counts  # of a batch whose notes are stored
