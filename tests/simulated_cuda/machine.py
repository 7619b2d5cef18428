"""Turning the simulated device on."""

import contextlib
import ctypes
import functools
import mmap
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from simulated_cuda.device import DEVICE, Device, Mode
from simulated_cuda.kernels import attention, rms_norm
from simulated_cuda.runtime import Capture, Event, Functions, Generator, Graph, Stream, current_stream, stream_context
from smart.sampler import Sampler

# "return 0" in machine code
RETURN_0 = {"x86_64": b"\x31\xc0\xc3", "aarch64": b"\x00\x00\x80\x52\xc0\x03\x5f\xd6"}


@functools.cache
def reason_not_to_run() -> str:
    """Why no device can be simulated in this process; "" if one can."""
    if sys.platform != "linux" or platform.machine() not in RETURN_0:
        return "the simulated CUDA device needs Linux on x86_64 or aarch64"
    if torch.cuda.is_available():
        return "a CUDA device is there, so none is simulated"
    try:
        _guard_device()
    except (AttributeError, OSError, ValueError) as error:  # a build of torch without these symbols
        return f"no CUDA device can be simulated with this torch: {error}"
    return ""


def _guard_device() -> None:
    """Have autograd find a device guard for CUDA, one that does nothing: that of the device "meta"."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # in a build for CUDA, without a GPU
    cuda, mps, meta = 1, 13, 14  # c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[cuda]:
        return
    # a build without CUDA: the engine must not ask for the streams of an accelerator, so no device is one
    code = RETURN_0[platform.machine()]
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    function = ctypes.cast(library._ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE, ctypes.c_void_p).value or 0
    page, size = function & -mmap.PAGESIZE, 2 * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    for rights in (mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, mmap.PROT_READ | mmap.PROT_EXEC):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(size), rights):
            raise OSError(ctypes.get_errno(), "this system does not let a program change its own code")
        if rights & mmap.PROT_WRITE:
            ctypes.memmove(function, code, len(code))
    guards[cuda] = guards[mps] = guards[meta]


@contextlib.contextmanager
def simulated(*, devices: int = 1, name: str = "simulated", kind: str = "cuda") -> Iterator[Device]:
    """Within the block there is a CUDA device, of which torch says that there are ``devices``; it counts from zero.

    ``kind`` "mps": an Apple GPU instead, which has neither float64 nor pinned memory. Skips the test where no device
    can be simulated.
    """
    if reason := reason_not_to_run():
        pytest.skip(reason)
    if kind != "cuda" and torch.version.cuda:
        pytest.skip("a build of torch for CUDA asks other devices for their streams")
    on_cuda = kind == "cuda"
    DEVICE.__init__(torch.device(kind, 0))  # type: ignore[misc]
    plain_run = threading.Thread.run

    def run(thread: threading.Thread) -> None:  # modes are a thread's
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        with Mode(), Functions(), torch.autograd.set_multithreading_enabled(False):
            plain_run(thread)

    lifted = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # or module.to() loses the subclass
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: on_cuda,
        "device_count": lambda: devices * on_cuda,
        "current_device": lambda: 0, "set_device": lambda device: None, "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (8, 6), "get_device_name": lambda *_: name, "Stream": Stream,
        "Event": Event, "CUDAGraph": Graph, "graph": Capture, "stream": stream_context,
        "current_stream": current_stream, "synchronize": lambda *_: DEVICE.wait("synchronize"),
        "empty_cache": lambda: None, "is_current_stream_capturing": lambda: DEVICE.capturing,
    }  # fmt: skip

    def enter(mode: Any) -> None:  # inference tensors and wrappers do not go together
        mode.instead = torch.set_grad_enabled(False) if mode.mode else contextlib.nullcontext()
        mode.instead.__enter__()

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", enter))
        leave = lambda mode, *error: mode.instead.__exit__(*error)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.inference_mode, "__exit__", leave))
        for key, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, key, value))
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: not on_cuda))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(torch.nn.functional, "rms_norm", rms_norm))
        stack.enter_context(mock.patch.object(Sampler, "_captures", True))  # a failure is remembered for the process
        stack.enter_context(Functions())
        stack.enter_context(Mode())
        try:
            yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)  # type: ignore[attr-defined]
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
