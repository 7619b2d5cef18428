"""Train the members of an ear: higher for real excerpts than for corruptions, pair by pair."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn.functional import softplus

from smart.reward.ear import Layout, Network, channels_last
from smart.reward.naturalness.excerpts import Stored, not_music

NOT_MUSIC = 36  # clips of noise and the like; each batch has some in place of corruptions
APART = 0.15  # least difference of harm of two corruptions that are compared


@dataclass(frozen=True)
class Recipe:
    """How a member is trained."""

    steps: int = 1500
    excerpts: int = 24  # of a batch
    kept: int = 2  # corruptions of each
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 50
    bfloat16: bool = True


def digest_of(state: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of a member's state, by name."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def pair_loss(answers: torch.Tensor, harm: torch.Tensor, groups: int) -> torch.Tensor:
    """Bradley-Terry over all pairs of a batch of which one is further from music than the other.

    Args:
        answers: (groups * R,), excerpt after excerpt.
        harm: (groups * R,), 0 for real ones.
        groups: how many excerpts; pairs within one weigh as much as all others together.

    Returns:
        the mean of log(1 + exp(worse - better)); pairs of two corruptions count a quarter.
    """
    better = harm[:, None] < torch.where(harm[:, None] > 0, harm[None] - APART, harm[None])
    real = harm[:, None] == 0
    group = torch.arange(len(harm)) // (len(harm) // groups)
    within = group[:, None] == group[None]
    weight = better * torch.where(real, 1.0, 0.25)
    losses = softplus(answers[None] - answers[:, None])
    parts = [(losses * weight * kind).sum() / (weight * kind).sum().clamp(min=1) for kind in (within, ~within)]
    return (parts[0] + parts[1]) / 2


def augment(spectra: torch.Tensor, draw: torch.Generator, shift: int) -> torch.Tensor:
    """Other keys and timbres: spectra (N, C, B, T) uint8 -> the same shape.

    Each clip is moved by up to ``shift`` bands, made brighter or darker by a smooth curve of up to some 10 dB, and
    louder or softer by up to 4 dB.
    """
    many, _, bands, _ = spectra.shape
    at = torch.linspace(0, math.pi, bands)
    waves = torch.stack([torch.cos(k * at) for k in range(4)])  # (4, B)
    size = torch.tensor([4.0, 6.0, 3.0, 2.0]) * 255 / 80
    curve = (torch.randn(many, 4, generator=draw) * size * 0.6) @ waves
    moved = torch.empty_like(spectra)
    steps = torch.randint(-shift, shift + 1, (many,), generator=draw).tolist() if shift else [0] * many
    for row, step in enumerate(steps):
        low, high = max(step, 0), bands + min(step, 0)
        moved[row] = 0
        moved[row, :, low:high] = spectra[row, :, low - step : high - step]
    louder = (moved.float() + curve[:, None, :, None]).clamp(0, 255)
    # what was silent stays silent
    return torch.where(moved > 0, louder, 0.0)


class Trainer:
    """One member in training; its state can be saved and continued."""

    def __init__(self, layout: Layout, recipe: Recipe, stored: Stored, seed: int) -> None:
        self.recipe, self.stored, self.seed = recipe, stored, seed
        self.shift = 4 if layout.spectra == "log" else 1
        torch.manual_seed(seed)
        self.network = channels_last(Network(layout))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        self.noise = not_music(layout.spectra, NOT_MUSIC, seed)
        self.step = 0

    def rate(self, step: int) -> float:
        """Warm-up, then half a cosine."""
        if step <= self.recipe.warmup:
            return self.recipe.learning_rate * step / max(1, self.recipe.warmup)
        done = (step - self.recipe.warmup) / max(1, self.recipe.steps - self.recipe.warmup)
        return self.recipe.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * min(done, 1))) / 2)

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end; yields the figures of each step. Its batch depends on the seed and the step alone."""
        self.network.train()
        many = len(self.stored.places)
        while self.step < self.recipe.steps:
            self.step += 1
            draw = np.random.default_rng((self.seed, self.step))
            generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
            torch.manual_seed(int(draw.integers(2**62)))  # of the dropout
            groups = draw.choice(many, min(self.recipe.excerpts, many), replace=False)
            spectra, harm = self.stored.batch(sorted(groups.tolist()), self.recipe.kept, draw)
            rows = draw.choice(len(groups), max(1, len(groups) // 12), replace=False)
            rows = rows * (len(harm) // len(groups)) + 1  # the first corruption of these excerpts
            spectra[rows] = self.noise[draw.integers(len(self.noise), size=len(rows))]
            harm[rows] = 1.0
            clips = augment(spectra, generator, self.shift).contiguous(memory_format=torch.channels_last)
            for setting in self.optimizer.param_groups:
                setting["lr"] = self.rate(self.step)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
                answers = self.network(clips)
            loss = pair_loss(answers.float(), harm, len(groups))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                rows = answers.float().reshape(len(groups), -1)
                right = (rows[:, :1] > rows[:, 1:]).float().mean()
            yield {"step": self.step, "loss": float(loss.detach()), "right": float(right)}

    def state(self, curve: list[list[float]]) -> dict[str, torch.Tensor]:
        """Everything that ``restore`` needs, as tensors."""
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for number, each in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in each.items()}
        text = json.dumps({"step": self.step, "curve": curve, "recipe": asdict(self.recipe)})
        found["about"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return {name: value.clone(memory_format=torch.contiguous_format) for name, value in found.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> list[list[float]]:
        """Continue from ``state``; returns the curve. Raises ``ValueError`` if another recipe made it."""
        about = json.loads(bytes(state["about"].tolist()))
        if about["recipe"] != asdict(self.recipe):
            raise ValueError("it was trained with other settings")
        self.network.load_state_dict(
            {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        )
        each: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                each.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": each, "param_groups": groups})
        self.step = int(about["step"])
        return [[int(step), *map(float, figures)] for step, *figures in about["curve"]]
