"""The rewards on CUDA rate as on a CPU."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from audiobox_weights import random_network, thin_architecture
from checks import mutated
from simulated_cuda import CUDA, simulated

from smart.reward import Reward, audiobox, load_reward, resample


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    """Notes, a shorter clip, an empty one, one with a NaN."""
    t = torch.arange(160_000) / 16_000
    notes = torch.stack([torch.sin(2 * math.pi * hz * t) * torch.exp(-3 * (t % 0.5)) for hz in (220.0, 330, 440, 550)])
    notes *= 1 + 0.3 * torch.sin(2 * math.pi * torch.tensor([[0.3], [0.7], [1.1], [0.2]]) * t)
    notes[3, 5] = math.nan
    return notes, torch.tensor([160_000, 70_000, 0, 160_000])


def check_ratings(load: Callable[[str], Reward], tolerance: float) -> None:
    """The ratings of a CPU, and no convolution that rounds float32 to TF32."""
    audio, lengths = clips()
    expected = load("cpu").score(audio, lengths)
    with simulated() as device:
        rated = load("cuda").score(audio.to("cuda"), lengths)
        for axis, values in expected.items():
            assert rated[axis].device == CUDA
            torch.testing.assert_close(rated[axis].cpu(), values, atol=tolerance, rtol=0, equal_nan=True)
        assert not device.counts["convolution in TF32"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("weights")
    with thin_architecture():
        random_network(0).save_pretrained(folder)
        yield folder


def test_ce_proxy() -> None:
    check_ratings(lambda device: load_reward("ce_proxy", device=device), 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_audiobox(weights: Path, dtype: str, tolerance: float) -> None:
    check_ratings(lambda device: load_reward("audiobox", model=str(weights), device=device, dtype=dtype), tolerance)


def test_a_convolution_in_tf32_is_found(weights: Path) -> None:
    with (
        mutated(audiobox.Audiobox, "rate", "@exact_float32()", ""),
        pytest.raises(AssertionError),
    ):
        check_ratings(lambda device: load_reward("audiobox", model=str(weights), device=device), 1e-4)


@pytest.mark.parametrize("rate", [44_100, 48_000, 16_000])
def test_resampling(rate: int) -> None:
    audio = torch.randn(2, 30_000, generator=torch.Generator().manual_seed(1))
    expected = resample(audio, rate, 16_000)
    with simulated() as device:
        found = resample(audio.to("cuda"), rate, 16_000)
        assert found.dtype == torch.float32 and not device.counts["convolution in TF32"]
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)
