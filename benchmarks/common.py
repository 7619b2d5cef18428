"""Shared by the benchmarks: options, alternating timing of variants, the machine and its rates, the report."""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import smart  # noqa: F401 -- before torch, so that its threads wait as in a run

# isort: split
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Way = TypeVar("Way")  # the name of a variant: a word, or a tuple of its parts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("torch", "transformers", "trl", "audiobox_aesthetics", "tinysoundfont")


def parser(doc: str | None, *, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; ``device`` adds those for computing with torch."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="also write the JSON to this file")
    if device:
        made.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)"
        )
        made.add_argument("--threads", type=int, default=0, help="CPU threads of torch (default: 0, torch decides)")
        made.add_argument("--profile", type=Path, help="also write a Chrome trace of one extra run to this file")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options, set the number of threads and check the device."""
    options = made.parse_args()
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda, but PyTorch sees no CUDA GPU")
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    return options


def whole(text: str) -> int:
    """A whole number of at least 1, as ``type=`` of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one call, including the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(
    ways: Mapping[Way, Callable[[], Any]], rounds: int, device: str = "cpu", *, warm: bool = False
) -> dict[Way, list[float]]:
    """Seconds per variant and round; the order alternates, so that a slow moment of the machine affects all.

    Unless ``warm``, an extra first round is not counted: in it memory is mapped and kernels are chosen.
    """
    times: dict[Way, list[float]] = {name: [] for name in ways}
    for index in range(1 if warm else 0, rounds + 1):
        for name in list(ways) if index % 2 else list(ways)[::-1]:
            took = seconds(ways[name], device)
            if index:
                times[name].append(took)
    return times


def ratio(slower: list[float], faster: list[float]) -> float:
    """The median over rounds of the ratio within each round."""
    return statistics.median(slow / fast for slow, fast in zip(slower, faster, strict=True))


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Operations per second in a large matrix product, best of 8."""
    n = 8192 if device == "cuda" else 2048  # on a GPU a small product is too short to time
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def memory_rate(device: str) -> float:
    """Bytes per second in a sum over more memory than any cache (256 MiB; 2 GiB on a GPU), best of 8."""
    memory = torch.ones((512 if device == "cuda" else 64) * 2**20, device=device)
    return memory.numel() * 4 / min(seconds(memory.sum, device) for _ in range(8))


def flops(function: Callable[[], Any]) -> float:
    """Operations of the matrix products, convolutions and attention in one call."""
    aten = torch.ops.aten
    on_cpu = {  # torch's table has these two for CUDA only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        function()
    return float(counter.get_total_flops())


def peak_memory(function: Callable[[], Any], device: str) -> float:
    """Peak memory in GB while ``function`` runs: allocated on a GPU, or this process's resident memory on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def trace(path: Path | None, function: Callable[[], Any]) -> None:
    """Run ``function`` once under torch's profiler and write a Chrome trace; nothing if ``path`` is None."""
    if path is not None:
        with torch.profiler.profile() as profiler:
            function()
        profiler.export_chrome_trace(str(path))


def official_audiobox(folder: Path, device: str) -> Any:
    """The network, loaded as by the official predictor from a folder in the hub's format."""
    from audiobox_aesthetics.model.aes import AesMultiOutput

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
        warnings.simplefilter("ignore", FutureWarning)  # as above
        return AesMultiOutput.from_pretrained(folder).to(device).eval()


@torch.inference_mode()
def official_rating(network: Any, wave: torch.Tensor) -> dict[str, float]:
    """The official predictor's ratings of one clip (S,) of at most ten seconds at 16 kHz, axis -> rating.

    It computes in float32, pads the clip to ten seconds and masks the padding. (Its module,
    ``audiobox_aesthetics.infer``, cannot be imported without torchaudio.)
    """
    samples = 160_000
    device = next(network.parameters()).device
    mask = torch.arange(samples) < len(wave)
    padded = torch.nn.functional.pad(wave, (0, samples - len(wave)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        predicted = network({"wav": padded[None, None].to(device), "mask": mask[None, None].to(device)})
    transform = network.target_transform
    return {axis: (v * transform[axis]["std"] + transform[axis]["mean"]).item() for axis, v in predicted.items()}


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the package versions of a measurement."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "python": platform.python_version(),
        **found,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(benchmark: str, options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Print a benchmark's result as one line of JSON, and write it to the file of ``--json``."""
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    shown.pop("json")
    shown.pop("profile", None)
    body = {"benchmark": benchmark, "options": shown, **machine(shown.get("device", "cpu")), **results}
    text = json.dumps(body)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)
