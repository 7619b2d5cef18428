"""A note bank's stored sounds on disk, kept between runs (``Cache``)."""

import hashlib
import importlib.metadata
import zlib
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from smart import UserError
from smart.files import write_atomically

_FORMAT = 1  # version of the files
SoundKey = tuple[Any, ...]  # pitch, drop, rows, and the generators that shape the sound


class Cache:
    """Files under ``folder`` for one soundfont, sample rate and length in samples."""

    def __init__(self, folder: Path, soundfont: Path, sample_rate: int, limit: int) -> None:
        with soundfont.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        version = importlib.metadata.version("tinysoundfont")
        self.folder = folder.expanduser() / digest / f"v{_FORMAT}-tinysoundfont-{version}-{sample_rate}Hz-{limit}"

    def write(self, key: SoundKey, audio: torch.Tensor, signal: float, noise: float) -> None:
        """Store a sound (rows, length) and its energies; raises ``UserError`` if the folder cannot be written."""
        crc32 = zlib.crc32(audio.numpy().tobytes())
        metadata = {"signal": repr(signal), "noise": repr(noise), "crc32": str(crc32)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(key), save({"audio": audio}, metadata))
        except OSError as error:
            raise UserError(f"the cache of notes in {self.folder} cannot be written: {error}") from None

    def read(self, key: SoundKey) -> tuple[torch.Tensor, float, float] | None:
        """What was stored under ``key``; None if there is no such file, or it is damaged."""
        try:
            with safetensors.safe_open(self._file(key), "pt") as file:
                audio, metadata = file.get_tensor("audio"), file.metadata()
            whole = audio.dtype == torch.float32 and audio.ndim == 2 and len(audio) == key[2]
            if not whole or int(metadata["crc32"]) != zlib.crc32(audio.numpy().tobytes()):
                return None
            return audio, float(metadata["signal"]), float(metadata["noise"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _file(self, key: SoundKey) -> Path:
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"
