"""The paths of an Apple GPU, which has no float64: a simulated device refuses it. No such GPU has been tried."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import tune
from simulated_cuda import simulated

from smart import UserError
from smart.model import pick_device
from smart.render.bank import NoteBank
from smart.reward import load_reward
from smart.run import read_metrics


def test_the_simulated_device_refuses_float64() -> None:
    with simulated(kind="mps"):
        here = torch.ones(3).to("mps")
        assert here.device.type == "mps" and (here + 1).cpu().tolist() == [2, 2, 2]
        for attempt in (here.double, lambda: torch.zeros(2, dtype=torch.float64, device="mps")):
            with pytest.raises(TypeError, match="float64"):
                attempt()


def test_without_an_apple_gpu_it_is_refused_in_one_line() -> None:
    for refused in (lambda: pick_device("mps"), lambda: load_reward("ce_proxy", device="mps")):
        with pytest.raises(UserError, match="PyTorch sees no Apple GPU") as caught:
            refused()
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["ce_proxy", "naturalness"])
def test_a_reward_rates_there_as_on_the_cpu(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tone = torch.sin(torch.arange(44_100) * 0.06) * torch.rand(2, 44_100, generator=generator)
    rated = load_reward(kind).score(tone)
    with simulated(kind="mps"):
        there = load_reward(kind, device="mps").score(tone)
        for axis, values in rated.items():
            torch.testing.assert_close(there[axis].cpu(), values, atol=1e-4, rtol=0)


def test_the_bank_mixes_on_the_cpu() -> None:
    assert NoteBank("timgm", device="mps").device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"render__backend": "bank", "grpo__diversity": 0.5}])
def test_a_run(changes: dict[str, Any], tmp_path: Path) -> None:
    with simulated(kind="mps"):
        made = tune(tmp_path, run__device="mps", grpo__iterations=2, **changes)
    assert [row["step"] for row in read_metrics(made)] == [0, 1, 2]
    assert "on mps" in (made / "log.txt").read_text() and (made / "tuned" / "model.safetensors").is_file()
