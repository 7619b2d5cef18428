"""Why PyTorch cannot use this machine's NVIDIA card, and what to do about it.

Without this a run with an old driver would silently train on the CPU for days. Nothing is found where torch is a build
for the CPU, where the machine has no card, and where everything is in order.
"""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# the oldest driver for PyTorch builds of each major version of CUDA
DRIVERS = {11: 450, 12: 525, 13: 580}
# of the builds for torch 2.13: CUDA 12.6 has kernels for compute capability 5.0 to 9.0, CUDA 13.0 for 7.5 to 12.0
OLDER_BUILD, NEWER_BUILD = 126, 130
TURING = (7, 5)
_OTHER_CARD = ", or choose another card with CUDA_VISIBLE_DEVICES"
FEWEST_BYTES = 1 << 30  # free on the card: less does not hold any run


class Places(NamedTuple):
    """Where the driver shows itself."""

    version: Path = Path("/proc/driver/nvidia/version")  # of the kernel module, also in a container
    cards: Path = Path("/proc/driver/nvidia/gpus")  # a folder for each card
    control: Path = Path("/dev/nvidiactl")  # in a container only if it was given the card
    library: str = "libcuda.so.1"


PLACES = Places()


def exact(device: torch.device) -> torch.dtype:
    """The most exact type of floating-point numbers on a device: float64, which Apple's GPUs (mps) lack."""
    import torch

    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


class Problem(NamedTuple):
    """What is wrong, and what would correct it."""

    found: str
    remedy: str


def problem(places: Places | None = None) -> Problem | None:
    """Why CUDA cannot be used although the machine has an NVIDIA card; None if it can be used, or there is no card.

    None also for a build of torch for the CPU, which was somebody's choice (``cpu_build``).
    """
    import torch

    places = places or PLACES
    with warnings.catch_warnings(record=True) as caught:  # torch warns if there is a driver that it cannot use
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if torch.version.cuda is None:
        return None
    if available:
        return _unusable_card()
    said = next((str(warning.message) for warning in caught if "CUDA" in str(warning.message)), "")
    if not (said or _has_card(places)):
        return None
    return _unusable_driver(places, said)


def cpu_build(places: Places | None = None) -> Problem | None:
    """A build of torch for the CPU on a machine with an NVIDIA card; None if it is not so."""
    import torch

    places = places or PLACES
    if torch.version.cuda is not None or torch.version.hip is not None or not _has_card(places):
        return None
    version = driver_version(places)
    older = bool(version) and int(version.partition(".")[0]) < DRIVERS[NEWER_BUILD // 10]
    return Problem(
        f"PyTorch {torch.__version__} is built for the CPU, but the machine has an NVIDIA card (driver "
        f"{version or 'of unknown version'})",
        _install(OLDER_BUILD if older else NEWER_BUILD),
    )


def _has_card(places: Places) -> bool:
    return places.version.exists() or places.control.exists()


def driver_version(places: Places | None = None) -> str:
    """The version of the NVIDIA driver, such as 580.65.06; empty if it is unknown."""
    places = places or PLACES
    try:
        text = places.version.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    first = next((line for line in text.splitlines() if line.startswith("NVRM")), text)
    found = re.search(r"\b\d{3,4}(?:\.\d+)+\b", first)
    return found.group() if found else ""


def _unusable_driver(places: Places, said: str) -> Problem:
    """Why torch sees no device; ``said`` is torch's own warning."""
    import torch

    build, version = f"PyTorch {torch.__version__}", driver_version(places)
    driver = f"NVIDIA driver {version or '(version unknown)'}"
    cuda = str(torch.version.cuda)
    needed = DRIVERS.get(int(cuda.partition(".")[0]), max(DRIVERS.values()))
    major = int(version.partition(".")[0] or 0)
    if version and major < needed:
        suits = [_install(OLDER_BUILD)] if DRIVERS[12] <= major else []
        remedy = " or ".join([f"update the driver to {needed} or newer", *suits])
        return Problem(f"{driver} is too old for {build}, built for CUDA {cuda}, which needs {needed} or newer", remedy)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and _hides_all(visible, places):
        return Problem(f"CUDA_VISIBLE_DEVICES={visible!r} hides the card ({driver})", "unset CUDA_VISIBLE_DEVICES")
    with_access = "in a container, start it with access to the card (docker run --gpus all, with NVIDIA's toolkit)"
    if not places.control.exists():
        return Problem(f"{driver} is loaded, but {places.control} is missing", with_access)
    if not os.access(places.control, os.R_OK | os.W_OK):
        return Problem(
            f"{driver} is loaded, but {places.control} may not be opened", "join its group, or ask for access"
        )
    if not _loads(places.library):
        return Problem(f"{driver} is loaded, but its library {places.library} is not found", with_access)
    reason = " ".join(said.split())[:200] or "PyTorch does not say why"
    return Problem(
        f"{driver} is loaded, but {build}, built for CUDA {cuda} (driver {needed} or newer), sees no GPU: {reason}",
        "check nvidia-smi, and restart the machine after an update of the driver",
    )


def _hides_all(visible: str, places: Places) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES leaves no card: those from the first invalid number on are hidden."""
    first = visible.partition(",")[0].strip()
    if not first or first.startswith("-"):
        return True
    try:
        count = len(list(places.cards.iterdir()))
    except OSError:
        return False
    return first.isdecimal() and int(first) >= count > 0


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _unusable_card() -> Problem | None:
    """Why the card of this process cannot run anything, although torch sees it."""
    import torch

    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():  # ``smart.distributed.join`` refuses it
        return None
    return _without_kernels(index) or _without_memory(index)


def _without_kernels(index: int) -> Problem | None:
    import torch

    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not built or has_kernels(capability, built):
        return None
    return Problem(
        f"{torch.cuda.get_device_name(index)} has compute capability {'.'.join(map(str, capability))}, for which "
        f"PyTorch {torch.__version__} has no kernels ({', '.join(built)})",
        _install(OLDER_BUILD if capability < TURING else NEWER_BUILD),
    )


def _without_memory(index: int) -> Problem | None:
    """Asks the driver, which prepares the card for this process; a failure that is not about memory shows later."""
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if not any(words in reason for words in ("out of memory", "busy or unavailable")):
            return None
        return Problem(f"{name} cannot be used ({reason})", f"end what holds it (nvidia-smi lists it){_OTHER_CARD}")
    if free >= FEWEST_BYTES:
        return None
    found = f"{name} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, since other programs hold the rest"
    return Problem(found, f"end them (nvidia-smi lists them){_OTHER_CARD}")


def has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a card of this compute capability can run a build for the architectures ``built`` (sm_86, sm_90a, ...).

    Machine code (sm) runs on the same major version and a minor version at least as high, code with the suffix "a" on
    exactly its own; intermediate code (compute) is compiled for any later card.
    """
    for kind, major, minor, suffix in re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", " ".join(built)):
        version = (int(major), int(minor))
        if version == capability or (
            suffix != "a"
            and version < capability
            and (version[0] == capability[0] or (kind, suffix) == ("compute", ""))
        ):
            return True
    return False


def _install(build: int) -> str:
    """The command that installs this version of torch for another version of CUDA."""
    import torch

    release = torch.__version__.partition("+")[0]
    return (
        f"install the build for CUDA {build // 10}.{build % 10}: "
        f"pip install torch=={release} --index-url https://download.pytorch.org/whl/cu{build}"
    )
