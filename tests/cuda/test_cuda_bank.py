"""The note bank on CUDA: the audio of a CPU, on a stream of its own, and nothing that makes the host wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import mutated
from simulated_cuda import CUDA, DEFAULT, Device, simulated

from smart.render import bank as bank_module
from smart.render import mixing
from smart.render.bank import NoteBank
from smart.render.bank_pool import BankPool

OPTIONS: dict[str, Any] = {"sample_rate": 22_050, "seconds": 3.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def clips() -> list[Any]:
    rng = np.random.default_rng(1)
    made = [np.empty((0, 6))]
    for notes in (1, 12, 30):
        start = rng.uniform(0, 2, notes)
        columns = [start, rng.uniform(0.05, 1, notes), rng.integers(30, 90, notes), rng.integers(1, 128, notes)]
        made.append(np.stack([*columns, np.zeros(notes), np.zeros(notes)], axis=1))
    return made


def on_cpu(cache: Path) -> list[Any]:
    return [audio.numpy() for audio in NoteBank("timgm", **OPTIONS, cache=cache).render(clips())]


@contextmanager
def launches_elsewhere(device: Device) -> Iterator[list[str]]:
    """Where the package launched something on the default stream."""
    places: list[str] = []
    note = device.note

    def watched(kind: str, what: str = "") -> None:
        if kind == "launch" and not device.streams:
            places.append(device.place())
        note(kind, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "note", watched)
        yield places


def check_on_device(cache: Path) -> None:
    expected = on_cpu(cache)
    with simulated() as device:
        bank = NoteBank("timgm", device="cuda", **OPTIONS, cache=cache)
        bank.render(clips())
        device.log.clear()
        with device.counted() as counts, launches_elsewhere(device) as elsewhere:
            found = bank.render(clips())
        for one, other in zip(found, expected, strict=True):
            assert one.device == CUDA
            np.testing.assert_allclose(one.cpu().numpy(), other, atol=1e-4)
        assert not elsewhere
        assert device.log == [
            ("wait", bank._stream, DEFAULT), ("wait", DEFAULT, bank._stream)
        ]  # fmt: skip
    # of a batch whose notes are stored
    assert counts["launch"] < 90 and counts["upload"] < 5, counts
    assert not counts["wait"] and not counts["event"] and not counts["upload from pageable memory"], counts


def check_on_host(cache: Path) -> None:
    expected = on_cpu(cache)
    with simulated() as device, launches_elsewhere(device) as elsewhere:
        bank = NoteBank("timgm", device="cuda", **OPTIONS, cache=cache)
        for _ in range(2):  # with new notes and without
            with device.counted() as counts:
                found = bank.render_on_host(clips())
            for one, other in zip(found, expected, strict=True):
                assert isinstance(one, np.ndarray)
                np.testing.assert_allclose(one, other, atol=1e-4)
            assert (counts["wait"], counts["event"], counts["upload from pageable memory"]) == (0, 1, 0), counts
        assert not elsewhere and not device.log, "it waits for another stream"


def test_on_the_device(cache: Path) -> None:
    check_on_device(cache)


def test_on_the_host(cache: Path) -> None:
    check_on_host(cache)


def test_in_pieces_that_fit_the_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows at a time, and however small the store, the audio is the same."""
    expected = on_cpu(cache)
    monkeypatch.setattr(mixing, "ROWS_CUDA", 700)
    with simulated() as device:
        bank = NoteBank("timgm", device="cuda", max_bytes=24 << 20, **OPTIONS, cache=cache)
        for one, other in zip(bank.render_on_host(clips()), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        assert not device.counts["wait"]


def test_the_pool_s_thread_waits_for_the_bank_alone(cache: Path) -> None:
    expected = on_cpu(cache)
    with simulated() as device:
        with BankPool("timgm", device="cuda", workers=1, **OPTIONS, cache=cache) as pool:
            for future, other in [(pool.submit(clip), other) for clip, other in zip(clips(), expected, strict=True)]:
                np.testing.assert_allclose(future.result(120), other, atol=1e-4)
        assert not device.counts["wait"] and not device.log


MUTATIONS: dict[str, tuple[Any, str, str, str, Callable[[Path], None]]] = {
    "no wait for the copy": (bank_module, "download", "done.synchronize()", "pass", check_on_host),
    "a wait for every stream": (
        bank_module, "download", "done.synchronize()", "torch.cuda.synchronize()", check_on_host,
    ),
    "no wait of the caller": (NoteBank, "try_render", "current.wait_stream(self._stream)", "pass", check_on_device),
    "no wait for the caller": (NoteBank, "try_render", "self._stream.wait_stream(current)", "pass", check_on_device),
    "the caller's stream": (NoteBank, "_on_stream", "torch.cuda.stream(self._stream)", "nullcontext()", check_on_host),
    "a size that is read back": (mixing, "_repeat", "output_size=total", "", check_on_device),
    "a copy that the host waits for": (mixing, "upload", "non_blocking=True", "", check_on_device),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_found(name: str, cache: Path) -> None:
    owner, function, old, new, check = MUTATIONS[name]
    with mutated(owner, function, old, new), pytest.raises((AssertionError, RuntimeError)):
        check(cache)


def test_notes_that_are_new_reach_the_device_in_one_copy(cache: Path) -> None:
    on_cpu(cache)
    with simulated() as device:
        bank = NoteBank("timgm", device="cuda", **OPTIONS, cache=cache)
        with device.counted() as counts:
            bank.render(clips())
        assert counts["upload"] < 6 and not counts["upload from pageable memory"], counts
        assert isinstance(bank._store, torch.Tensor) and bank._store.device == CUDA
