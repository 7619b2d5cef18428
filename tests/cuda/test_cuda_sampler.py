"""The sampler on CUDA: by graph and step by step."""

from typing import Any

import pytest
import torch
from checks import (
    EOS,
    PAD,
    assert_same_rollout,
    check_captured_step,
    check_graph_used_again,
    check_other_options,
    check_rows_that_end,
    check_steps_one_by_one,
    check_watched_rows,
    sampled,
    some_prompts,
    tiny,
)
from simulated_cuda import simulated

from smart.model import build_model
from smart.sampler import Sampler
from smart.tokens import build_grammar, build_tokenizer

GRAMMAR = build_grammar(build_tokenizer())


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_step_by_step_it_draws_what_a_cpu_draws(filters: dict[str, Any]) -> None:
    check_steps_one_by_one(**filters)


def test_bfloat16_has_float32_logprobs() -> None:
    with simulated():
        prompts = some_prompts([4, 2]).to("cuda")
        rollout = sampled(tiny().to("cuda"), prompts, captured=False, dtype=torch.bfloat16, max_new_tokens=20)
        assert rollout.logprobs.dtype == torch.float32 and bool(rollout.logprobs.isfinite().all())


@pytest.mark.parametrize(
    ("lengths", "filters"),
    [
        ([4, 4], {}),
        ([2, 6, 1], {"temperature": 0.8, "top_k": 9, "top_p": 0.9}),
        ([1, 1], {"grammar": GRAMMAR}),
        ([3, 4], {"eos_id": None, "grammar": GRAMMAR, "top_k": 5}),
    ],
    ids=["equal", "left-padded, filtered", "grammar", "no end"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_gives_what_the_steps_give(dtype: torch.dtype, lengths: list[int], filters: dict[str, Any]) -> None:
    check_captured_step(lengths, dtype, **filters)


def test_a_step_has_at_most_a_hundred_kernels() -> None:
    """At the paper's depth, without filters."""
    with simulated() as device:
        model = build_model(build_tokenizer(), layers=4, hidden=32, heads=4, intermediate=64).to("cuda")
        sampled(model, some_prompts([4, 4]).to("cuda"), captured=True, dtype=torch.bfloat16, max_new_tokens=4)
        assert device.launches_per_replay <= 100


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_graph_is_used_again(dtype: torch.dtype | None) -> None:
    check_graph_used_again(dtype)


def test_options_change_from_batch_to_batch() -> None:
    check_other_options()


def test_rows_that_end() -> None:
    check_rows_that_end()


def test_watch_sees_rows_as_they_were() -> None:
    check_watched_rows()


def test_a_refused_capture_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is tried once in a process, by whichever sampler comes first, and the same tokens are drawn step by step."""
    tried = []

    def refuse(*_: Any, **__: Any) -> None:
        tried.append("captured")
        raise RuntimeError("operation not permitted")

    prompts = some_prompts([4])
    expected = sampled(tiny(), prompts, captured=False, max_new_tokens=20)
    with simulated():
        model = tiny().to("cuda")
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        for _ in range(2):
            sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
            for _ in range(2):
                random = torch.Generator().manual_seed(5)
                found = sampler.sample(prompts.to("cuda"), generator=random, max_new_tokens=20)
                assert_same_rollout(expected, found)
            assert not sampler._graphs
    assert tried == ["captured"] and len(capsys.readouterr().err.splitlines()) == 1
