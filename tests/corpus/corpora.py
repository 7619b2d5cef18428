"""MIDI files, good and malformed, for the tests of the corpus, and ways to look at what was built."""

import csv
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from symusic.core import NoteTick, ScoreTick, TempoTick, TimeSignatureTick, TrackTick

from smart.corpus.build import build
from smart.corpus.command import main
from smart.corpus.readers import PROGRAM


def song(seed: int, *, bars: int = 6, division: int = 480, program: int = 0, velocity: int = 0) -> ScoreTick:
    """Music that every rule keeps: ``bars`` of 3/4 or 4/4 with a few notes each, its notes drawn by ``seed``."""
    random = np.random.default_rng(seed)
    score = ScoreTick(division)
    beats = int(random.integers(3, 5))
    score.time_signatures.append(TimeSignatureTick(0, beats, 4))
    score.tempos.append(TempoTick(0, float(random.integers(60, 160))))
    track = TrackTick("", program)
    for bar in range(bars):
        for beat in range(beats):
            pitch, loud = int(random.integers(40, 90)), int(random.integers(20, 120))
            track.notes.append(NoteTick((bar * beats + beat) * division, division // 2, pitch, velocity or loud))
    score.tracks.append(track)
    return score


def midi(*tracks: bytes, kind: int = 1, division: int = 480, count: int | None = None) -> bytes:
    """A MIDI file of raw tracks; ``count`` is what its header says about their number."""
    body = b"".join(b"MTrk" + struct.pack(">I", len(track)) + track for track in tracks)
    return b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks) if count is None else count, division) + body


def delta(ticks: int) -> bytes:
    """A MIDI variable-length quantity."""
    out = [ticks & 0x7F]
    while ticks := ticks >> 7:
        out.append(0x80 | ticks & 0x7F)
    return bytes(reversed(out))


def notes(*events: tuple[int, int], length: int = 240, head: bytes = b"", channel: int = 0) -> bytes:
    """A track of (ticks since the last note's end, pitch), each ``length`` ticks long."""
    out = head
    for rest, pitch in events:
        out += delta(rest) + bytes([0x90 | channel, pitch, 64]) + delta(length) + bytes([0x80 | channel, pitch, 0])
    return out + b"\x00\xff\x2f\x00"


def tempo(microseconds: int) -> bytes:
    return b"\x00\xff\x51\x03" + microseconds.to_bytes(3, "big")


END = b"\x00\xff\x2f\x00"
MELODY = [(240, 60 + step % 12) for step in range(24)]
GOOD = midi(notes(*MELODY))
# 100,000 notes in the first bar: at each of 1,000 ticks 100 keys pressed, and lifted at the next
CLUSTERS = b"\x00\xc0\x00" + b"".join(
    b"".join(bytes([0, 0x90, key, 64]) for key in range(10, 110)) + b"\x01"
    + b"\x00".join(bytes([0x80, key, 0]) for key in range(10, 110)) for _ in range(1000)
) + b"\x00\xff\x2f\x00"  # fmt: skip
# every kind of file that must be left out, with the reason that it must be given
MALFORMED: dict[str, tuple[bytes, str]] = {
    "zero-length": (b"", "empty file"),
    "random-bytes": (np.random.default_rng(1).bytes(4000), "not a MIDI file"),
    "text": (b"This is not music, but a page that says 404." * 20, "not a MIDI file"),
    "header-cut": (GOOD[:10], "not a MIDI file"),
    "header-only": (GOOD[:14], "truncated"),
    "chunk-cut": (GOOD[:20], "truncated"),
    "cut-in-the-middle": (GOOD[: len(GOOD) // 2], "truncated"),
    "last-byte-missing": (GOOD[:-1], "truncated"),
    "whole-track-missing": (midi(notes(*MELODY), count=2), "truncated"),
    "random-after-header": (GOOD[:14] + np.random.default_rng(2).bytes(2000), "truncated"),
    "format-2": (midi(notes(*MELODY), kind=2), "MIDI format"),
    "format-9": (midi(notes(*MELODY), kind=9), "MIDI format"),
    "division-0": (midi(notes(*MELODY), division=0), "absurd division"),
    "division-1": (midi(notes(*MELODY), division=1), "absurd division"),
    "division-32767": (midi(notes(*MELODY), division=32767), "absurd division"),
    "division-smpte": (midi(notes(*MELODY), division=0xE728), "absurd division"),
    "tempo-0": (midi(notes(*MELODY, head=tempo(0))), "absurd tempo"),
    "tempo-1": (midi(notes(*MELODY, head=tempo(1))), "absurd tempo"),
    "tempo-slowest": (midi(notes(*MELODY, head=tempo(0xFFFFFF))), "absurd tempo"),
    "drums-only": (midi(notes(*MELODY, channel=9)), "no piano notes"),
    "violin-only": (midi(notes(*MELODY, head=b"\x00\xc0\x28")), "no piano notes"),
    "no-notes": (midi(b"\x00\xff\x2f\x00"), "no piano notes"),
    "no-tracks": (midi(), "no piano notes"),
    "out-of-range-pitches": (midi(notes(*[(240, 5)] * 24)), "no piano notes"),
    "one-note": (midi(notes((0, 60))), "too short"),
    "one-bar": (midi(notes((0, 60), (240, 62), (240, 64))), "too short"),
    "gap-of-a-million-beats": (midi(notes((0, 60), (240_000_000, 60), (240_000_000, 60))), "too long"),
    "wrapping-deltas": (midi(notes((0, 60), *[(0x0FFFFFFF, 60)] * 9)), "absurd times"),
    "hour-of-silence": (midi(notes(*MELODY, (3600 * 960, 60), *MELODY)), "long silence"),
    "hour-of-silence-first": (midi(notes((3600 * 960, 60), *MELODY)), "long silence"),
    "crowded-bar": (midi(notes(*[(0, 30 + step % 60) for step in range(500)], length=1)), "too many notes in a bar"),
    "100,000-in-a-bar": (midi(notes(*MELODY, *[(0, 60)] * 4), CLUSTERS), "too many notes in a bar"),
    "half-a-million-in-a-bar": (midi(notes(*MELODY), *[CLUSTERS] * 5), "too many notes"),
    "mostly-empty-bars": (midi(notes(*[(12 * 480, 60)] * 12)), "too many empty bars"),
    "garbage-events": (midi(b"\x00\xf5" + bytes(range(0x80, 0xFF)) * 4 + END), "malformed event"),
    "silence-at-the-end": (midi(notes(*MELODY)[:-4] + delta(3600 * 960) + END[1:]), "long silence"),
    "header-length-0": (GOOD[:7] + b"\x00" + GOOD[8:], "wrong header"),
    "header-length-8": (GOOD[:7] + b"\x08" + GOOD[8:14] + b"\x00\x00" + GOOD[14:], "wrong header"),
    "header-length-huge": (GOOD[:4] + b"\xff" * 4 + GOOD[8:], "wrong header"),
    "more-tracks-than-the-header-says": (midi(notes(*MELODY), notes(*MELODY), count=1), "wrong header"),
    "no-track-says-the-header": (midi(notes(*MELODY), count=0), "wrong header"),
    "track-length-short": (GOOD[:21] + b"\x32" + GOOD[22:], "truncated"),
    "track-length-0": (GOOD[:21] + b"\x00" + GOOD[22:], "truncated"),
    "track-length-long": (GOOD[:21] + bytes([GOOD[21] + 4]) + GOOD[22:] + b"abcd", "truncated"),
    "track-without-end": (midi(notes(*MELODY)[:-4]), "truncated"),
    "running-status-of-nothing": (midi(b"\x00\x3c\x40" + notes(*MELODY)), "malformed event"),
    "running-status-after-text": (midi(b"\x00\x90\x3c\x40\x00\xff\x01\x00\x00\x3c\x00" + END), "malformed event"),
    "running-status-after-sysex": (midi(b"\x00\x90\x3c\x40\x00\xf0\x01\xf7\x10\x3c\x00" + END), "malformed event"),
    "data-byte-of-8-bits": (midi(b"\x00\x90\x3c\xc0" + notes(*MELODY)), "malformed event"),
    "delta-of-five-bytes": (midi(b"\x81\x80\x80\x80" + notes(*MELODY)), "malformed event"),
    "delta-of-six-bytes": (midi(notes(*MELODY)[:-4] + b"\xff" * 5 + b"\x7f" + END[1:]), "malformed event"),
    "delta-greatest": (midi(notes(*MELODY)[:-4] + b"\xff\xff\xff\x7f" + notes((0, 60), (0, 62))[1:]), "too long"),
    "sysex-without-end": (midi(b"\x00\xf0\x10\x01\x02\x03" + notes(*MELODY)), "malformed event"),
    "sysex-beyond-the-track": (midi(notes(*MELODY), b"\x00\xf0\x20\x01\x02" + END, notes(*MELODY)), "malformed event"),
    "sysex-of-256-megabytes": (midi(b"\x00\xf0\xff\xff\xff\x7f\x01" + notes(*MELODY)), "malformed event"),
    "text-beyond-the-track": (midi(notes(*MELODY)[:-4] + b"\x00\xff\x01\x7fabc" + END), "malformed event"),
    "text-over-the-end": (midi(notes(*MELODY)[:-4] + b"\x00\xff\x01\x04" + END), "malformed event"),
    "tempo-of-two-bytes": (midi(notes(*MELODY, head=b"\x00\xff\x51\x02\x07\xa1")), "malformed event"),
    "time-signature-of-a-byte": (midi(notes(*MELODY, head=b"\x00\xff\x58\x01\x04")), "malformed event"),
    "real-time-byte": (midi(b"\x00\xf8" + notes(*MELODY)), "malformed event"),
    "program-of-8-bits": (midi(b"\x00\xc0\xc8" + notes(*MELODY)), "malformed event"),
}  # fmt: skip


def write_songs(folder: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        path = folder / f"{seed % 3}" / f"song {seed:03d}.mid"
        path.parent.mkdir(parents=True, exist_ok=True)
        song(seed).dump_midi(path)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 10
    while alive := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < end, f"workers {alive} outlive their build"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def build_small(folder: Path) -> Path:
    """A corpus of 12 pieces and one reject, ``folder / "out"``, made of ``folder / "midi"``."""
    write_songs(folder / "midi", range(12))
    (folder / "midi" / "bad.mid").write_bytes(b"")
    build([folder / "midi"], folder / "out")
    return folder / "out"


HOOK = """
import time
sys.modules["torch"] = None
from smart.corpus import piece
read = piece.PieceReader.read
def hooked(self, data):
    {body}
    return read(self, data)
piece.PieceReader.read = hooked
"""


def hooked(body: str) -> str:
    """The program of a worker that runs ``body`` before it reads a file: faults that no known file provokes."""
    return HOOK.format(body=body) + PROGRAM
