"""The device: tensors that say that they lie on it, and what runs, counts and refuses operations on them."""

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import smart

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = Path(smart.__file__).parent

# the host waits for the device, to learn a number or a shape
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "is_nonzero", "equal",
}  # fmt: skip
LIKE = {
    "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full",
    "new_empty_strided",
}  # fmt: skip
NO_KERNEL = {
    "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "as_strided", "set_",
}  # fmt: skip
# operations that a GPU may round to TF32, and torch's name for the setting
PRODUCTS = dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), "matmul") | {"convolution": "conv"}
GARBAGE = {torch.bool: True, torch.uint8: 255}


class Forbidden(RuntimeError):
    """Raised for what a graph that is being captured does not allow; CUDA raises a RuntimeError, too."""


@functools.cache
def _is_taken_apart(function: Any) -> bool:
    """Whether an operation consists of others on CUDA."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"))


@functools.cache
def _in_package(filename: str) -> str | None:
    """The path of a source file, from the package's name on; None outside the package."""
    path = Path(filename)
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE) else None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """All tensors among an operation's arguments (torch's own functions for this take most of the time)."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``change`` applied to all that is in its lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)([_map(change, part) for part in value])
    return change(value)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, CudaTensor) else value


class CudaTensor(torch.Tensor):
    """Says that it lies on cuda:0; ``held`` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "CudaTensor":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE.device,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        if DEVICE.device.type == "mps" and held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {held.dtype}, at {DEVICE.place()}")
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.run(function, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        DEVICE.wait("tolist")
        return self.held.tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE.device)

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaTensor":
        if id(self) not in memo:
            made = CudaTensor(self.held.clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                made._is_param = True
            memo[id(self)] = made
        return memo[id(self)]  # type: ignore[no-any-return]

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held!r})"


class Device:
    """Runs operations, and counts launches, waits of the host and transfers, in total and by place in the package.

    ``counts`` has the keys "launch" (kernels that the host launched, those of a capture included), "replay" (graphs),
    "launch by replay" (their kernels), "wait" (the host waited for everything), "event" (for a part of it), "upload",
    "upload from pageable memory", "download", "host in parallel" (large operations of the main thread on the CPU) and
    "float32 in TF32" (matrix products and convolutions that a GPU would round).
    """

    def __init__(self, device: torch.device = CUDA) -> None:
        self.device = device
        self.counts: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()  # of (key of counts, file:line)
        self.attention: Counter[tuple[str, str]] = Counter()  # of (file:line, kernel)
        self.tape: list[Any] | None = None  # of the graph that is being captured,
        self.capturer = 0  # by this thread
        self.arriving: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []  # copies to pinned memory
        self.pinned: set[int] = set()  # addresses
        self._of_thread = threading.local()
        self.busy: set[int] = set()  # those that have been given work
        self.log: list[Any] = []  # of streams and captures
        self.paused = 0
        self.by_name = False  # whether ``places`` also has the operations' names

    @property
    def streams(self) -> list[Any]:
        """The streams that are current in this thread, innermost last."""
        streams: list[Any] = self._of_thread.__dict__.setdefault("streams", [])
        return streams

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """A counter that holds, after the block, what happened in it."""
        before, taken = self.counts.copy(), Counter[str]()
        yield taken
        taken.update(self.counts - before)

    @property
    def launches_per_replay(self) -> float:
        """Kernels of a captured graph, as a mean over all replays."""
        return self.counts["launch by replay"] / self.counts["replay"]

    def place(self) -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            if file := _in_package(frame.f_code.co_filename):
                return f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"

    def note(self, kind: str, what: str = "") -> None:
        if self.paused:
            return
        self.counts[kind] += 1
        if kind == "launch" and self.streams:
            self.busy.add(id(self.streams[-1]))
        self.places[kind, self.place() + (f" {what}" if what else "")] += 1

    def wait(self, what: str) -> None:
        """The host waits until the device has done everything that it was asked for."""
        if self.capturing:
            raise Forbidden(f"operation not permitted when stream is capturing: {what} at {self.place()}")
        self.note("wait", what)
        self.arrive(len(self.arriving))

    def arrive(self, many: int) -> None:
        """Let the first ``many`` copies to pinned memory arrive."""
        for host, snapshot in self.arriving[:many]:
            if host is not None and snapshot is not None:
                host.copy_(snapshot)
        self.arriving[:many] = [(None, None)] * many  # so that marks of events stay valid

    @property
    def capturing(self) -> bool:
        return self.tape is not None and self.capturer == threading.get_ident()

    def record(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Put an operation onto the tape of the graph that is being captured."""
        assert self.tape is not None
        self.tape.append((function, args, kwargs, out))

    def run(self, function: Any, args: Any, kwargs: Any) -> Any:
        if _is_taken_apart(function):  # it comes whole in inference mode
            with Mode():
                return function.decompose(*args, **kwargs)
        parts = [*_tensors(args), *_tensors(kwargs.values())]
        here = [part for part in parts if isinstance(part, CudaTensor)]
        there = [part for part in parts if not isinstance(part, CudaTensor)]
        named = kwargs.get("device")
        target = torch.device(named) if named is not None else (self.device if here else CPU)
        name = function._schema.name.partition("::")[2]
        if target.type not in ("cpu", self.device.type):
            return function(*args, **kwargs)
        if not here and target.type == "cpu":
            return self._on_host(function, args, kwargs)
        if name == "_to_copy" and isinstance(args[0], CudaTensor) != (target.type != "cpu"):
            return self._move(function, args, kwargs, target)
        if name == "copy_" and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
            return self._copy(*args, **kwargs)
        if name in LIKE and target.type == "cpu":
            return self._on_host(function, _map(_held, args), kwargs)
        self.refuse_two_devices(name, args, here, there)
        self._wait_if_it_must(name, args, kwargs)
        self._note_rounding(name, args)

        known = {id(part.held): part for part in here}
        inner, inner_kwargs = _map(_held, args), {key: _map(_held, value) for key, value in kwargs.items()}
        if named is not None:
            inner_kwargs = {key: value for key, value in inner_kwargs.items() if key != "pin_memory"} | {"device": CPU}
        view = function.is_view or name in NO_KERNEL
        if not view:
            self.note("launch", name if self.by_name else "")
        if self.capturing and function._schema.is_mutable:  # recorded, and nothing happens
            self.record(function, inner, inner_kwargs, None)
            return kwargs.get("out", args[0]) if function._schema.returns else None
        out = function(*inner, **inner_kwargs)
        if self.capturing and not view:
            self.record(function, inner, inner_kwargs, out)

        def wrap(part: Any) -> Any:
            if not isinstance(part, torch.Tensor):
                return part
            return known[id(part)] if id(part) in known else CudaTensor(part)

        return _map(wrap, out)

    def _on_host(self, function: Any, args: Any, kwargs: Any) -> Any:
        pin = kwargs.get("pin_memory")
        if pin and self.device.type != "cuda":
            raise RuntimeError(f"pinned memory is CUDA's, at {self.place()}")
        made = function(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        large = isinstance(made, torch.Tensor) and made.numel() > 32_768  # shared out to the threads of torch
        if large and not function.is_view and threading.current_thread() is threading.main_thread():
            self.note("host in parallel", function._schema.name.partition("::")[2])
        if pin:
            self.pinned.add(made.data_ptr())
        return made

    def _move(self, function: Any, args: Any, kwargs: Any, target: torch.device) -> Any:
        if target.type == "cpu":
            self.wait("copy to the host")
            return function(args[0].held, **(kwargs | {"device": CPU}))
        self._upload(args[0], kwargs.get("non_blocking", False))
        return CudaTensor(function(args[0], **(kwargs | {"device": CPU})))

    def _upload(self, source: torch.Tensor, non_blocking: bool) -> None:
        if self.capturing:
            raise Forbidden(f"copy from pageable memory while a stream is capturing, at {self.place()}")
        self.note("upload" if non_blocking and source.data_ptr() in self.pinned else "upload from pageable memory")

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(to, CudaTensor):
            self._upload(source, non_blocking)
            to.held.copy_(source)
            return to
        assert isinstance(source, CudaTensor)
        if non_blocking and to.data_ptr() in self.pinned:
            if self.capturing:
                raise Forbidden("a copy to the host in a graph")
            self.note("download")
            self.arriving.append((to, source.held.clone()))
            to.fill_(GARBAGE.get(to.dtype, -1))  # a reader that does not wait gets nonsense
        else:
            self.wait("copy to the host")
            to.copy_(source.held)
        return to

    def refuse_two_devices(self, name: str, args: Any, here: list[Any], there: list[Any]) -> None:
        large = [part for part in there if part.dim() > 0]
        if not here or not large:
            return
        if name in ("index", "index_put", "index_put_") and isinstance(args[0], CudaTensor):
            indices = [part for part in args[1] if part is not None]
            if all(any(part is index for index in indices) for part in large):
                self._upload(large[0], False)  # allowed, at the price of a copy
                return
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name} at {self.place()})"
        )

    def _wait_if_it_must(self, name: str, args: Any, kwargs: Any) -> None:
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        elif name in ("index", "index_put", "index_put_"):
            masks = [part for part in args[1] if part is not None and part.dtype in (torch.bool, torch.uint8)]
            fills = name != "index" and args[2].numel() == 1 and not isinstance(args[2], CudaTensor)
            if masks and not fills:
                self.wait(f"{name} by a mask")

    def _note_rounding(self, name: str, args: Any) -> None:
        kind = PRODUCTS.get(name)
        if kind is None or args[-1 if name in ("addmm", "baddbmm") else 0].dtype != torch.float32:
            return
        if torch._C._get_fp32_precision_getter("cuda", kind) == "tf32":  # type: ignore[attr-defined]
            self.note("float32 in TF32", name)


DEVICE = Device()


class Mode(TorchDispatchMode):
    """Sees the operations without a tensor of ours: those that make one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.run(function, args, kwargs or {})
