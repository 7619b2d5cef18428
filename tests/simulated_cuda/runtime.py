"""What replaces ``torch.cuda``'s streams, events and graphs, and ``torch.Generator``."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from simulated_cuda.device import CPU, DEVICE, CudaTensor


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.name = f"stream {len(DEVICE.log)}"

    def wait_stream(self, other: "Stream") -> None:
        DEVICE.log.append(("wait", self, other))

    def wait_event(self, event: "Event") -> None:
        DEVICE.log.append(("wait for an event", self, event))

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        DEVICE.wait("stream")


class Event:
    mark = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        self.mark = len(DEVICE.arriving)

    def synchronize(self) -> None:
        if DEVICE.capturing:
            DEVICE.wait("event")  # refused
        DEVICE.note("event")
        DEVICE.arrive(self.mark)

    wait = query = lambda self, *_: True


class Graph:
    """A tape of operations, with the memory that they were recorded on."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tape: list[Any] = []

    def replay(self) -> None:
        DEVICE.note("replay")
        DEVICE.counts["launch by replay"] += len(self.tape)
        DEVICE.paused += 1
        try:
            for function, args, kwargs, out in self.tape:
                result = function(*args, **kwargs)
                if out is not None:
                    for old, new in zip(tree_flatten(out)[0], tree_flatten(result)[0], strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)
        finally:
            DEVICE.paused -= 1


class Capture:
    """``torch.cuda.graph``."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
        self.graph, self.stream, self.mode = graph, stream, capture_error_mode

    def __enter__(self) -> None:
        DEVICE.wait("synchronize")
        if id(self.stream) not in DEVICE.busy:
            DEVICE.log.append(("not warmed up on the stream of the capture",))
        DEVICE.log.append(("capture", self.stream, self.mode))
        DEVICE.tape, DEVICE.capturer = self.graph.tape, threading.get_ident()

    def __exit__(self, *_: Any) -> None:
        DEVICE.tape, DEVICE.capturer = None, 0


@contextlib.contextmanager
def stream_context(stream: Stream) -> Iterator[None]:
    """``torch.cuda.stream``."""
    DEVICE.streams.append(stream)
    try:
        yield
    finally:
        DEVICE.streams.pop()


DEFAULT = Stream()


def current_stream(*_: Any) -> Stream:
    return DEVICE.streams[-1] if DEVICE.streams else DEFAULT  # type: ignore[no-any-return]


class Generator(torch.Generator):
    """``torch.Generator``, on either device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        device = torch.device(device)
        self._device = DEVICE.device if device.type == DEVICE.device.type else device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device

    def set_state(self, state: torch.Tensor) -> "Generator":  # type: ignore[override]
        if isinstance(state, CudaTensor):
            raise TypeError("expected a torch.ByteTensor, but got torch.cuda.ByteTensor")
        return super().set_state(state)  # type: ignore[return-value]


class Functions(TorchFunctionMode):
    """Sees what must be known of a call before it is taken apart."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.device:
            return _with_index(function(*args, **kwargs))
        if isinstance(generator := kwargs.get("generator"), Generator):  # further down it is another object
            given = kwargs.get("device") or next((p.device for p in args if isinstance(p, torch.Tensor)), CPU)
            if torch.device(given).type != generator.device.type:
                raise RuntimeError(f"Expected a {given} device type for generator but found {generator.device}")
        return function(*map(_with_index, args), **{key: _with_index(value) for key, value in kwargs.items()})


def _with_index(value: Any) -> Any:
    """The device "cuda" is the current one, which a build without CUDA cannot find out."""
    here = DEVICE.device
    named = isinstance(value, str) and value == here.type
    return here if named or (isinstance(value, torch.device) and value.type == here.type) else value
