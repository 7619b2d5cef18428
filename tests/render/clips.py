"""Notes, scores and soundfonts for the tests of rendering."""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import symusic

RATE = 44100
Array = npt.NDArray[Any]


def notes(*rows: tuple[float, ...]) -> Array:
    """(onset, duration, pitch[, velocity[, program[, drum]]]) -> (n, 6)."""
    full = [(*row, *(100, 0, 0)[len(row) - 3 :]) for row in rows]
    return np.array(full, dtype=np.float64).reshape(-1, 6)


def random_notes(seed: int, count: int = 60, length: float = 4.0) -> Array:
    rng = np.random.default_rng(seed)
    columns = (
        rng.uniform(0, length, count),
        rng.uniform(0.05, 1.0, count),
        rng.integers(21, 109, count),
        rng.integers(1, 128, count),
        np.zeros(count),
        np.zeros(count),
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def heavy_notes() -> Array:
    """A clip that takes a worker a second or more: long notes on every pitch of many programs."""
    return notes(*((0.0, 10.0, pitch, 100, program) for pitch in range(20, 100) for program in range(40, 52)))


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body


def tiny_soundfont(presets: tuple[tuple[int, int], ...] = ((0, 0),), *, first_bag: int = 0, **replaced: bytes) -> bytes:
    """A soundfont of one looped sine, 441 Hz at key 69, under each of ``presets`` (bank, program)."""
    wave = (np.sin(2 * np.pi * np.arange(1000) / 100) * 20000).astype("<i2").tobytes() + bytes(92)
    phdr = b"".join(
        struct.pack("<20sHHHIII", b"sine", program, bank, first_bag + bag, 0, 0, 0)
        for bag, (bank, program) in enumerate(presets)
    )
    phdr += struct.pack("<20sHHHIII", b"EOP", 0, 0, len(presets), 0, 0, 0)
    records = {
        "phdr": phdr,
        "pbag": b"".join(struct.pack("<HH", bag, 0) for bag in range(len(presets) + 1)),
        "pmod": bytes(10),
        "pgen": struct.pack("<HH", 41, 0) * len(presets) + bytes(4),
        "inst": struct.pack("<20sH", b"sine", 0) + struct.pack("<20sH", b"EOI", 1),
        "ibag": struct.pack("<HHHH", 0, 0, 2, 0),
        "imod": bytes(10),
        "igen": struct.pack("<HHHH", 54, 1, 53, 0) + bytes(4),
        "shdr": struct.pack("<20sIIIIIBbHH", b"sine", 0, 1000, 100, 900, RATE, 69, 0, 0, 1)
        + struct.pack("<20sIIIIIBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0),
    } | replaced
    pdta = b"pdta" + b"".join(chunk(name.encode(), body) for name, body in records.items())
    sdta = b"sdta" + chunk(b"smpl", wave)
    info = b"INFO" + chunk(b"ifil", struct.pack("<HH", 2, 1))
    return chunk(b"RIFF", b"sfbk" + b"".join(chunk(b"LIST", part) for part in (info, sdta, pdta)))


def make_score(
    rows: list[tuple[int, int, int, int]], tempos: list[tuple[int, float]] = (), tpq: int = 480
) -> symusic.Score:
    score = symusic.Score(tpq)
    track = symusic.Track("piano", 0, False)
    for row in rows:
        track.notes.append(symusic.Note(*row))
    score.tracks.append(track)
    for time_, qpm in tempos:
        score.tempos.append(symusic.Tempo(time_, qpm))
    return score
