"""The rewards on CUDA rate as on a CPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from audiobox_weights import random_network, thin_architecture
from checks import mutated
from simulated_cuda import CUDA, simulated

from smart.reward import Reward, audiobox, ear, load_reward, resample


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    """Notes, a shorter clip, an empty one, one with a NaN."""
    t = torch.arange(160_000) / 16_000
    notes = torch.stack([torch.sin(2 * math.pi * hz * t) * torch.exp(-3 * (t % 0.5)) for hz in (220.0, 330, 440, 550)])
    notes *= 1 + 0.3 * torch.sin(2 * math.pi * torch.tensor([[0.3], [0.7], [1.1], [0.2]]) * t)
    notes[3, 5] = math.nan
    return notes, torch.tensor([160_000, 70_000, 0, 160_000])


def check_ratings(load: Callable[[str], Reward], tolerance: float) -> None:
    """The ratings of a CPU, and nothing rounds float32 to TF32, although something outside asks for it."""
    audio, lengths = clips()
    expected = load("cpu").score(audio, lengths)
    with simulated() as device, tf32_outside():
        rated = load("cuda").score(audio.to("cuda"), lengths)
        for axis, values in expected.items():
            assert rated[axis].device == CUDA
            torch.testing.assert_close(rated[axis].cpu(), values, atol=tolerance, rtol=0, equal_nan=True)
        assert not (rounded := [place for place in device.places if "TF32" in place[0]]), rounded


@contextmanager
def tf32_outside() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("weights")
    with thin_architecture():
        random_network(0).save_pretrained(folder)
        yield folder


@pytest.mark.parametrize("kind", ["ce_proxy", "naturalness", "naturalness_mel"])
def test_a_shipped_reward(kind: str) -> None:
    check_ratings(lambda device: load_reward(kind, device=device), 1e-4)


def test_embeddings_of_an_ear() -> None:
    audio, _ = clips()
    expected = load_reward("naturalness").embed(audio)  # type: ignore[attr-defined]
    with simulated() as device, tf32_outside():
        found = load_reward("naturalness", device="cuda").embed(audio.to("cuda"))  # type: ignore[attr-defined]
        assert not device.counts["float32 in TF32"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_audiobox(weights: Path, dtype: str, tolerance: float) -> None:
    check_ratings(lambda device: load_reward("audiobox", model=str(weights), device=device, dtype=dtype), tolerance)


def test_rounding_to_tf32_is_found(weights: Path) -> None:
    for owner, name, kind, options in (
        (audiobox.Audiobox, "rate", "audiobox", {"model": str(weights)}),
        (ear.Ear, "answers", "naturalness", {}),
    ):
        with mutated(owner, name, "@exact_float32()", ""), pytest.raises(AssertionError, match="TF32"):
            check_ratings(lambda device: load_reward(kind, device=device, **options), 1e-4)  # noqa: B023


@pytest.mark.parametrize("rate", [44_100, 48_000, 16_000])
def test_resampling(rate: int) -> None:
    audio = torch.randn(2, 30_000, generator=torch.Generator().manual_seed(1))
    expected = resample(audio, rate, 16_000)
    with simulated() as device:
        found = resample(audio.to("cuda"), rate, 16_000)
        assert found.dtype == torch.float32 and not device.counts["float32 in TF32"]
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)
