"""A CUDA graph that cannot be captured: who tries again, and what torch's allocator is told."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smart.sampler import Sampler
from smart.sampler.graph import _capture


def test_where_a_graph_lacks_memory_other_samplers_still_try(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []

    def refuse(step: Any) -> Any:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("smart.sampler.sample.GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr("smart.sampler.graph._capture", refuse)
    for _ in range(2):
        sampler = Sampler(tiny_model, pad_id=0, eos_id=2)
        for _ in range(2):
            sampler.sample(torch.tensor([[1, 4]]), max_new_tokens=4)
    assert len(tries) == 4  # each once more, without the graphs that it kept
    assert [line.endswith(": CUDA out of memory") for line in capsys.readouterr().err.splitlines()] == [True, True]


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


class Graph:
    pass


@pytest.mark.parametrize("ended", [False, True], ids=["before the allocator heard of its end", "afterwards"])
def test_a_failed_capture_is_taken_back_from_the_allocator(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13 does it: the end of a capture that has failed raises before it tells the allocator."""
    told: list[Any] = []
    kept: list[Any] = []

    @contextlib.contextmanager
    def capture(graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        told.append(("begin", 0, pool))
        yield
        if ended:
            told.append(("end", 0, pool))
        raise RuntimeError("the capture was invalidated")

    def end(device: int, pool: Any) -> None:
        if ended:
            raise RuntimeError("not currently recording to mempool_id")
        told.append(("end", device, pool))

    facts = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 7),
        "current_device": lambda: 0,
    }
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("torch._C._cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr("torch._C._cuda_releasePool", lambda *given: told.append(("release", *given)), raising=False)
    monkeypatch.setattr("smart.sampler.graph._ABANDONED", kept)
    with pytest.raises(RuntimeError, match="invalidated"):
        _capture(lambda: None)
    assert told == [("begin", 0, (0, 7)), ("end", 0, (0, 7)), *([] if ended else [("release", 0, (0, 7))])]
    assert [type(graph) for graph in kept] == [Graph]  # the allocator of pinned memory still asks it
