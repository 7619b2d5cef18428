"""smart.gpu: why torch cannot use the NVIDIA card of a machine, told from planted files and facts of torch."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import smart.doctor.command
from smart import UserError, gpu
from smart.model import pick_device

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\nGCC version:  12.3.0\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 12 00:13:34 UTC 2023\nGCC version:  gcc 11.4.0\n"
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Places:
    """A machine with one card, its driver and torch for CUDA 13, which sees no card."""
    places = gpu.Places(tmp_path / "version", tmp_path / "gpus", tmp_path / "nvidiactl", "libc.so.6")
    places.version.write_text(OPEN.format("580.65.06"))
    (places.cards / "0000:01:00.0").mkdir(parents=True)
    places.control.touch()
    monkeypatch.setattr(gpu, "PLACES", places)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return places


def see(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Have torch see a card with these facts."""
    given = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "NVIDIA GeForce RTX 3090",
        "get_device_capability": lambda *_: (8, 6),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
        "mem_get_info": lambda *_: (23 * GIB, 24 * GIB),
    }
    for name, value in (given | facts).items():
        monkeypatch.setattr(torch.cuda, name, value)


def refusal() -> str:
    """What "auto" is refused with, in one line; "cuda" is as well, and "cpu" is not."""
    messages = []
    for name in ("auto", "cuda"):
        with pytest.raises(UserError) as caught:
            pick_device(name)
        messages.append(caught.value.message.replace(f"device {name!r}: ", "", 1))
    assert pick_device("cpu").type == "cpu"
    assert messages[0] == messages[1] and "\n" not in messages[0] and "run.device = 'cpu'" in messages[0]
    return messages[0]


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.104.05"), (OPEN, "570.86.15"), (CLOSED, "525.60")])
def test_an_old_driver(machine: gpu.Places, text: str, version: str) -> None:
    machine.version.write_text(text.format(version))
    said = refusal()
    for part in (
        f"driver {version} is too old",
        "PyTorch 2.13.0+cu130",
        "needs 580 or newer",
        "torch==2.13.0 ",
        "cu126",
    ):
        assert part in said, said


def test_a_driver_that_no_build_suits(machine: gpu.Places) -> None:
    machine.version.write_text(CLOSED.format("470.256.02"))
    said = refusal()
    assert "driver 470.256.02 is too old" in said and "update the driver to 580" in said and "pip" not in said


def test_a_build_for_an_older_cuda_needs_an_older_driver(machine: gpu.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    machine.version.write_text(CLOSED.format("535.104.05"))
    assert "too old" not in refusal()


@pytest.mark.parametrize("visible", ["", "-1", "1", "3,0", " "])
def test_an_environment_that_hides_the_card(machine: gpu.Places, visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"CUDA_VISIBLE_DEVICES={visible!r} hides the card" in refusal()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "hides" not in refusal()


def test_a_container_without_the_runtime(machine: gpu.Places) -> None:
    machine.control.unlink()
    assert "docker run --gpus all" in refusal()
    machine.control.touch()
    assert "docker run --gpus all" in (gpu.problem(machine._replace(library="libnone.so.1")) or ["", ""])[1]


def test_a_driver_that_only_torch_has_noticed(machine: gpu.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """On WSL the driver has no files in /proc; torch warns of what it finds."""

    def warn() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found 12020)", stacklevel=1)
        return False

    machine.version.unlink()
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    assert "on your system is too old (found 12020)" in refusal() and "580 or newer" in refusal()


def test_nothing_is_found_where_there_is_no_card_or_torch_is_for_the_cpu(
    machine: gpu.Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        patch.setattr(torch, "__version__", "2.13.0+cpu")
        assert pick_device("auto").type == "cpu"
        with pytest.raises(UserError, match=r"2\.13\.0\+cpu is built for the CPU.*driver 580\.65\.06.*whl/cu130"):
            pick_device("cuda")
        machine.version.write_text(CLOSED.format("535.104.05"))
        assert "whl/cu126" in (gpu.cpu_build() or ["", ""])[1]
    machine.version.unlink()
    machine.control.unlink()
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no CUDA GPU"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((6, 1), ["sm_75", "sm_80", "compute_120"], False),
        ((12, 1), ["sm_120"], True),
        ((13, 0), ["sm_120", "compute_120"], True),
        ((13, 0), ["sm_120"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
    ],
)
def test_kernels_for_a_card(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert gpu.has_kernels(capability, built) == runs


@pytest.mark.parametrize(("capability", "build"), [((6, 1), "cu126"), ((7, 0), "cu126"), ((13, 0), "cu130")])
def test_a_card_for_which_the_build_has_no_kernels(
    machine: gpu.Places, capability: tuple[int, int], build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, get_device_capability=lambda *_: capability, get_arch_list=lambda: ["sm_75", "sm_86", "sm_120"])
    said = refusal()
    assert f"compute capability {capability[0]}.{capability[1]}" in said and "no kernels (sm_75, sm_86, sm_120)" in said
    assert build in said


def test_a_card_whose_memory_others_hold(machine: gpu.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, mem_get_info=lambda *_: (GIB // 2, 24 * GIB))
    assert "0.5 of 24.0 GiB free" in refusal() and "nvidia-smi" in refusal()

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    see(monkeypatch, mem_get_info=fail)
    assert "RTX 3090 cannot be used (CUDA error: out of memory)" in refusal()


def test_a_card_that_can_be_used(machine: gpu.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch)
    monkeypatch.setattr("smart.cores.limit_threads", lambda *_: None)  # torch's own count stays for the other tests
    assert pick_device("auto").type == pick_device("cuda").type == "cuda" and pick_device("cpu").type == "cpu"
    see(monkeypatch, mem_get_info=lambda *_: (_ for _ in ()).throw(RuntimeError("of a kind that shows later")))
    assert pick_device("auto").type == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")  # smart.distributed refuses it
    assert pick_device("auto").type == "cuda"


@pytest.mark.parametrize(("device", "state"), [("auto", "MISSING"), ("cuda", "MISSING"), ("cpu", "note")])
def test_the_doctor_says_it_too(machine: gpu.Places, device: str, state: str) -> None:
    machine.version.write_text(CLOSED.format("535.104.05"))
    words = ["--set", f"run.device={device}", "--set", "reward.kind=none", "--set", "render.soundfont=no.sf2"]
    lines = CliRunner().invoke(smart.doctor.command.main, words).output.splitlines()
    row = next(number for number, line in enumerate(lines) if line.split()[1:2] == ["torch"])
    assert lines[row].startswith(state) and "driver 535.104.05 is too old" in lines[row]
    assert lines[row + 1].strip().startswith("-> update the driver to 580 or newer or install")
