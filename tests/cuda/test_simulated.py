"""The simulated device itself: it refuses what a GPU refuses, and counts."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from simulated_cuda import CUDA, Forbidden, Graph, simulated
from torch.nn import functional as F


def capture(step: Callable[[], Any]) -> Graph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        step()
    return graph  # type: ignore[return-value]


def test_two_devices_are_told_apart() -> None:
    with simulated() as device:
        x, y = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        for wrong in (lambda: x + y, lambda: torch.cat([x, y])):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        for wrong in (lambda: np.asarray(x), lambda: x.numpy()):
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                wrong()
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        assert (x + torch.tensor(1.0)).device == CUDA and x.sum().item() == 16 and device.counts["wait"] == 1
        with torch.autocast("cuda", torch.bfloat16):
            assert F.linear(x, x).dtype == torch.bfloat16
        leaf = torch.ones(3, device="cuda", requires_grad=True)
        (leaf * leaf).sum().backward()
        assert leaf.grad is not None and leaf.grad.device == CUDA
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(torch.zeros(2, device="cuda").device))
        thread.start()
        thread.join()
        assert found == [CUDA]
    assert not torch.cuda.is_available()


def test_a_copy_arrives_when_its_event_is_waited_for() -> None:
    with simulated():
        x, host = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
        host.copy_(x, non_blocking=True)
        x.zero_()
        event = torch.cuda.Event()
        event.record()
        assert host.tolist() != [1] * 4
        event.synchronize()
        assert host.tolist() == [1] * 4


def test_a_graph_is_a_tape() -> None:
    with simulated() as device:
        x, y = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        for wrong in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x + y.to("cuda"), lambda: y.copy_(x)):
            with pytest.raises(Forbidden):
                capture(wrong)
        weight, total, out = (torch.ones(4, device="cuda") for _ in range(3))
        total.zero_()

        def step() -> None:
            torch.mul(weight, 2, out=out)
            total.add_(out)

        graph = capture(step)
        assert total.cpu().tolist() == [0] * 4  # nothing has happened yet
        weight.fill_(3)
        with device.counted() as counts:
            graph.replay()
            graph.replay()
        assert counts == {"replay": 2, "launch by replay": 4} and device.launches_per_replay == 2
        assert total.cpu().tolist() == [12] * 4  # it read the weight where it lies
        weight = torch.ones(4, device="cuda")
        graph.replay()
        assert total.cpu().tolist() == [18] * 4  # and still does


def test_launches_are_counted() -> None:
    with simulated() as device:
        x = torch.ones(4, 4, device="cuda")
        weight = torch.ones(4, device="cuda")
        for operation, launches in (
            (lambda: x * 2 + 1, 2),
            (lambda: x.view(16)[3:].t(), 0),
            (lambda: F.rms_norm(x, (4,), weight), 1),
            (lambda: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), 1),
        ):
            with device.counted() as counts:
                operation()
            assert counts["launch"] == launches
