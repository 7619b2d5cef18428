"""The learner on CUDA: updates in bfloat16, the fused optimiser, and its checkpoint."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import tiny
from simulated_cuda import CPU, CUDA, simulated

from smart.config import Grpo
from smart.grpo import group_advantages, token_logprobs, update
from smart.model import load_base, pick_device, pick_precision
from smart.run.checkpoint import read_state, write_state
from smart.sampler import Rollout


def made_up_rollout(rows: int = 6, length: int = 12) -> Rollout:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 413, (rows, 4 + length), generator=generator)
    mask = torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=generator)
    return Rollout(tokens, mask, torch.full((rows, length), -3.0) * mask)


def learn(device: torch.device, precision: torch.dtype, *, stale: bool = False, **changes: Any) -> dict[str, float]:
    model, rollout = tiny().to(device), made_up_rollout().to(device)
    reference = copy.deepcopy(model).requires_grad_(False)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with torch.no_grad(), autocast:
        ref_logp = token_logprobs(reference, rollout.tokens, 4, micro_batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=device.type == "cuda")
    settings = replace(Grpo(), micro_batch=4, **changes)
    advantages = group_advantages(torch.tensor([1.0, 2, 3, math.nan, 5, 7]), 3).to(device)
    stats = update(model, optimizer, rollout, ref_logp, advantages, settings, autocast=autocast, stale=stale)
    assert {part.dtype for part in model.parameters()} == {torch.float32}
    return stats


@pytest.mark.parametrize(
    "changes",
    [{}, {"average": "sequence"}, {"average": "constant", "inner_epochs": 2}, {"inner_epochs": 2, "stale": True}],
    ids=str,
)
def test_an_update_in_bfloat16_is_near_that_of_a_cpu_in_float32(changes: dict[str, Any]) -> None:
    expected = learn(CPU, torch.float32, **changes)
    with simulated() as device:
        found = learn(CUDA, torch.bfloat16, **changes)
    assert any(kernel == "flash" for _, kernel in device.attention), device.attention
    for key, value in expected.items():
        assert abs(found[key] - value) < 0.05 + 0.05 * abs(value), (key, found[key], value)


def check_optimiser_is_restored(folder: Path) -> None:
    """The fused optimiser continues from a checkpoint, with its step counters on the device."""

    def steps(model: Any, optimizer: Any, many: int) -> None:
        for _ in range(many):
            for parameter in model.parameters():
                parameter.grad = parameter.detach() * 0.1
            optimizer.step()

    with simulated():
        model, generator = tiny().to("cuda"), torch.Generator("cuda").manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        steps(model, optimizer, 3)
        write_state(folder, model, optimizer, sampler=generator)
        drawn = torch.rand(3, generator=generator, device="cuda")
        again = copy.deepcopy(model)
        steps(model, optimizer, 2)
        restored = torch.optim.AdamW(again.parameters(), lr=1e-2, fused=True)
        other = torch.Generator("cuda").manual_seed(9)
        read_state(folder, again, restored, sampler=other)
        for state in restored.state.values():
            assert {value.device for value in state.values()} == {CUDA}
            assert state["step"].dtype == torch.float32 and state["step"].item() == 3
        steps(again, restored, 2)
        for one, two in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one.cpu(), two.cpu())
        assert torch.equal(torch.rand(3, generator=other, device="cuda").cpu(), drawn.cpu())


def test_the_fused_optimiser_is_restored(tmp_path: Path) -> None:
    check_optimiser_is_restored(tmp_path)


def test_the_device_is_chosen() -> None:
    with simulated():
        assert all(pick_device(name).type == "cuda" for name in ("auto", "cuda")) and pick_device("cpu").type == "cpu"
        assert pick_precision("auto", CUDA) == torch.bfloat16
        model, _ = load_base("piano-small", device=pick_device("auto"))
        assert {part.device for part in (*model.parameters(), *model.buffers())} == {CUDA}
        assert {part.dtype for part in model.parameters()} == {torch.float32}
