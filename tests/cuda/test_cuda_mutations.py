"""The checks can fail: each mutation of the package is one that some GPU run would suffer from, and is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import (
    check_captured_step,
    check_graph_used_again,
    check_other_options,
    check_rows_that_end,
    check_steps_one_by_one,
    check_watched_rows,
    mutated,
)
from test_cuda_learner import check_optimiser_is_restored

from smart.run import checkpoint
from smart.sampler import graph, sample


def captured_step() -> None:
    check_captured_step([2, 6], torch.float32)


def used_again() -> None:
    check_graph_used_again(None)


def used_again_in_bfloat16() -> None:
    check_graph_used_again(torch.bfloat16)


MUTATIONS: dict[str, tuple[Any, str, str, str, Callable[[], None]]] = {
    "stale weights": (graph, "_fill", "held.copy_(now)", "pass", used_again_in_bfloat16),
    "weights that were replaced": (sample.Sampler, "_graph", ", *weights)", ")", used_again),
    "a length that is baked in": (graph, "_step", "slots.cache, column)", "slots.cache, column * 0 + 5)", used_again),
    "a place that is not reset": (graph, "_fill", "slots.next[-1] = length", "pass", used_again),
    "places that the last batch saw": (graph, "_fill", "slots.seen.fill_(-math.inf)", "pass", used_again),
    "options that are baked in": (sample.Sampler, "_graph", "choice._replace(grammar=None), ", "", check_other_options),
    "a grammar that is baked in": (sample.Sampler, "_graph", "id(choice.grammar), ", "", check_other_options),
    "the grammar's old state": (
        graph, "_fill", "_write(slots.state, choice.read_state(slots.tokens[:, :length]))", "pass", check_other_options,
    ),
    "rollouts that share a graph's memory": (
        sample.Sampler, "sample", "part.clone(memory_format=torch.contiguous_format)", "part", check_other_options,
    ),
    "the mask of the last batch": (graph, "_fill", "slots.mask.zero_()", "pass", check_rows_that_end),
    "rows that do not end": (graph, "_step", "slots.alive.copy_(alive)", "pass", check_rows_that_end),
    "a number read in the step": (graph, "_step", "slots.next.add_(1)", "slots.next.add_(1)[0].item()", captured_step),
    "a number brought into the step": (
        graph, "_step", "slots.next.add_(1)", "slots.next.add_(torch.tensor([1]).to('cuda'))", captured_step,
    ),
    "no wait for a copy": (graph.Graph, "run", "copied.synchronize()", "pass", check_watched_rows),
    "a copy that the host waits for": (
        graph.Graph, "run", "non_blocking=True", "non_blocking=False", check_watched_rows,
    ),
    "no wait for the stream of the capture": (
        graph, "_capture", "torch.cuda.current_stream().wait_stream(stream)", "pass", captured_step,
    ),
    "no warm-up": (graph, "_capture", "restore the stream\n        step()", "restore the stream", captured_step),
    "a capture that forbids other threads": (graph, "_capture", "thread_local", "global", captured_step),
    "a look at every step": (sample, "decode_eagerly", "% look == 0", "% 1 == 0", check_steps_one_by_one),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_it_is_found(name: str) -> None:
    owner, function, old, new, check = MUTATIONS[name]
    with mutated(owner, function, old, new), pytest.raises((AssertionError, RuntimeError, TypeError)):
        check()


def test_step_counters_on_the_host_are_found(tmp_path: Path) -> None:
    with (
        mutated(checkpoint, "read_state", 'if key != "step" or fused', 'if key != "step"'),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises((AssertionError, RuntimeError)),
    ):
        patch.setattr("test_cuda_learner.read_state", checkpoint.read_state)
        check_optimiser_is_restored(tmp_path)
