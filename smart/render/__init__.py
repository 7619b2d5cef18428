"""Notes -> audio with a soundfont: the public names of this package.

``open_renderer`` opens the renderer of a program: worker processes (``RenderPool``), or stored notes on a device
(``smart.render.bank_pool.BankPool``). Only the bank imports torch, so that workers start fast and stay small.
"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from smart.render.audio import SILENT, load_soundfile, read_audio, with_pad_bytes, write_midi, write_wav
from smart.render.notes import MAX_BEATS, NOTE_COLUMNS, Notes, check_notes, played_notes, score_notes
from smart.render.pool import Renderer, RenderPool
from smart.render.several import SeveralRenderers, draw_fonts
from smart.render.soundfonts import (
    available_soundfonts,
    check_soundfont,
    checked_soundfont,
    find_soundfont,
    package_of,
    short_name,
)
from smart.render.synth import Audio, RenderError, load_soundfont, render_notes

if TYPE_CHECKING:
    import torch

    from smart.render.bank_pool import BankPool

__all__ = [
    "MAX_BEATS",
    "NOTE_COLUMNS",
    "SILENT",
    "Audio",
    "Notes",
    "RenderError",
    "RenderPool",
    "Renderer",
    "SeveralRenderers",
    "available_soundfonts",
    "check_notes",
    "check_soundfont",
    "checked_soundfont",
    "draw_fonts",
    "find_soundfont",
    "load_soundfile",
    "load_soundfont",
    "open_renderer",
    "package_of",
    "played_notes",
    "read_audio",
    "render_notes",
    "score_notes",
    "short_name",
    "with_pad_bytes",
    "write_midi",
    "write_wav",
]


@overload
def open_renderer(
    backend: str,
    soundfont: str | os.PathLike[str],
    *,
    sample_rate: int,
    seconds: float,
    workers: int | None = None,
    deadline: float = 30.0,
    device: "str | torch.device" = "cpu",
    bank_megabytes: int = 2048,
) -> "RenderPool | BankPool": ...


@overload
def open_renderer(
    backend: str,
    soundfont: list[Path],
    *,
    sample_rate: int,
    seconds: float,
    workers: int | None = None,
    deadline: float = 30.0,
    device: "str | torch.device" = "cpu",
    bank_megabytes: int = 2048,
) -> "RenderPool | BankPool | SeveralRenderers": ...


def open_renderer(
    backend: str,
    soundfont: str | os.PathLike[str] | list[Path],
    *,
    sample_rate: int,
    seconds: float,
    workers: int | None = None,
    deadline: float = 30.0,
    device: "str | torch.device" = "cpu",
    bank_megabytes: int = 2048,
) -> "RenderPool | BankPool | SeveralRenderers":
    """A renderer: worker processes (``backend`` "pool"), or notes stored on ``device`` and in a cache ("bank").

    The bank stores at most ``bank_megabytes`` MiB on the device. A list of several soundfonts gives
    ``SeveralRenderers``, which share ``workers`` and that memory.
    """
    if isinstance(soundfont, list):
        many = len(soundfont)
        share = None if workers is None else max(workers // many, 1)
        options: dict[str, Any] = {"sample_rate": sample_rate, "seconds": seconds, "deadline": deadline}
        options |= {"workers": share, "device": device, "bank_megabytes": max(bank_megabytes // many, 1)}
        openers = [partial(open_renderer, backend, one, **options) for one in soundfont]
        return openers[0]() if many == 1 else SeveralRenderers(openers)
    if backend == "pool":
        return RenderPool(soundfont, sample_rate=sample_rate, seconds=seconds, workers=workers, deadline=deadline)
    if backend != "bank":
        raise ValueError(f"backend: expected 'pool' or 'bank', got {backend!r}")
    from smart.render.bank_pool import BankPool, cache_folder  # it imports torch

    return BankPool(
        soundfont,
        sample_rate=sample_rate,
        seconds=seconds,
        workers=workers,
        deadline=deadline,
        device=device,
        max_bytes=bank_megabytes << 20,
        cache=cache_folder(),
    )
