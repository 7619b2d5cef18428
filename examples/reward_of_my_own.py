"""Tune `piano` with a reward written here: bright music, with much of its energy above 1 kHz.

python examples/reward_of_my_own.py                          the whole run: minutes on two cores
python examples/reward_of_my_own.py grpo.iterations=2        any key of the configuration can be set
"""

import sys

import torch

from smart.config import load
from smart.grpo import train
from smart.reward import Reward


class Brightness(Reward):
    """Share of a clip's energy above 1 kHz, from 1 (none) to 10 (all)."""

    axes = ("brightness",)
    sample_rate = 16_000  # Hz; clips come resampled to this rate, in mono

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """audio (N, S), silent past each clip's length -> {"brightness": (N,)}; NaN for silence: no rating."""
        energy = torch.fft.rfft(audio).abs().square()  # (N, F)
        hertz = torch.fft.rfftfreq(audio.shape[1], 1 / self.sample_rate)
        share = energy[:, hertz > 1000].sum(dim=1) / energy.sum(dim=1)
        return {"brightness": 1 + 9 * share}


if __name__ == "__main__":
    folder = train(load("quickstart.toml", ["run.name=brightness", *sys.argv[1:]]), reward=Brightness())
    print(f"listen to {folder / 'final'}; the tuned model is {folder / 'tuned'}")
