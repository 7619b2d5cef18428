"""Audio and MIDI files."""

import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smart import UserError
from smart.files import write_atomically

SILENT = 1e-3  # of full scale: a clip that never exceeds it counts as silent (clips are peak-normalised)


def write_midi(path: Path, score: Any) -> None:
    """Write a ``symusic.Score`` as a MIDI file. Raises ``OSError`` if that fails."""
    write_atomically(path, score.dumps_midi())


def write_wav(path: Path, audio: npt.NDArray[np.float32], sample_rate: int) -> None:
    """Write (C, S) float32 in [-1, 1] as 16-bit PCM. Raises ``OSError`` if that fails."""
    import soundfile

    encoded = io.BytesIO()
    # to memory first: libsndfile does not say why a file cannot be written
    soundfile.write(encoded, audio.T, sample_rate, subtype="PCM_16", format="WAV")
    write_atomically(path, encoded.getvalue())


def read_audio(path: Path, seconds: float = math.inf) -> tuple[npt.NDArray[np.float32], int]:
    """Mono audio (S,) float32, S >= 0, and its sample rate: the mean of the channels of a wav, flac, mp3 or ogg file.

    Only the first ``seconds`` are read. Raises ``UserError`` if the file or the package soundfile is missing or cannot
    be read.
    """
    soundfile = load_soundfile()
    if not path.is_file():
        raise UserError(f"audio file {path}: no such file")
    try:
        with soundfile.SoundFile(with_pad_bytes(path)) as file:
            rate = int(file.samplerate)
            most = -1 if math.isinf(seconds) else round(seconds * rate)
            # block by block: an hour of many channels would not fit into memory
            blocks = file.blocks(10 * rate, dtype="float32", always_2d=True, frames=most) if file.frames else ()
            audio = np.concatenate([np.empty(0, np.float32), *(block.mean(axis=1) for block in blocks)])
    except (RuntimeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
        reason = " ".join(str(getattr(error, "error_string", error)).split())
        raise UserError(f"audio file {path} cannot be read as wav, flac, mp3 or ogg ({reason})") from error
    if not np.isfinite(audio).all():
        raise UserError(f"audio file {path} holds samples that are not finite numbers")
    return audio, rate


def with_pad_bytes(path: Path) -> Path | io.BytesIO:
    """The file itself, or its bytes in memory if it is a WAV file in which a chunk of odd length lacks its pad byte.

    libsndfile then finds no chunk after that one. Raises ``OSError`` if the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return path
        missing, place, size = [], 12, path.stat().st_size
        while place + 8 <= size:
            file.seek(place)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":  # nothing after it is needed
                break
            place += 8 + length
            file.seek(place)
            following = file.read(4)
            if length % 2:
                if len(following) == 4 and following.isascii() and following.decode("ascii").isprintable():
                    missing.append(place)
                else:
                    place += 1
        if not missing:
            return path
        file.seek(0)
        data = file.read()
    for place in reversed(missing):
        data = data[:place] + b"\0" + data[place:]
    return io.BytesIO(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])


def load_soundfile() -> Any:
    """The package soundfile. Raises ``UserError`` if it or its library is not installed."""
    try:
        import soundfile
    except ImportError as error:
        raise UserError(
            "reading audio files needs the package soundfile, which is missing; do: pip install soundfile"
        ) from error
    except OSError as error:  # the package is installed, the library that it wraps is not
        raise UserError(
            f"the package soundfile cannot load libsndfile ({error}); do: pip install --force-reinstall soundfile"
        ) from error
    return soundfile
