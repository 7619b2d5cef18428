"""Notes -> audio with a soundfont: the public names of this package.

``open_renderer`` opens the renderer of a program: worker processes (``RenderPool``), or stored notes on a device
(``smart.render.bank_pool.BankPool``). Only the bank imports torch, so that workers start fast and stay small.
"""

import os
from typing import TYPE_CHECKING

from smart.render.audio import load_soundfile, read_audio, with_pad_bytes, write_midi, write_wav
from smart.render.notes import MAX_BEATS, NOTE_COLUMNS, Notes, check_notes, played_notes, score_notes
from smart.render.pool import Renderer, RenderPool
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
    "Audio",
    "Notes",
    "RenderError",
    "RenderPool",
    "Renderer",
    "available_soundfonts",
    "check_notes",
    "check_soundfont",
    "checked_soundfont",
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
) -> "RenderPool | BankPool":
    """A renderer: worker processes (``backend`` "pool"), or notes stored on ``device`` and in a cache ("bank").

    The bank stores at most ``bank_megabytes`` MiB on the device.
    """
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
