"""MIDI files as bytes: what one may hold (``Limits``), what its structure must be, and what becomes of it.

A file becomes a ``Piece`` or a ``Reject``. Nothing here parses music, so that all may import it.
"""

import re
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a file may hold, and what reading it may cost."""

    max_bar_notes: int = 300  # paper section 3.1
    max_empty_bars: float = 0.2  # share of all bars; paper section 3.1
    min_bars: int = 2  # with notes: one for a prompt, one for what follows it
    max_bytes: int = 16 << 20
    max_notes: int = 200_000  # the longest real piece seen has 33,000
    max_quarters: int = 50_000  # quarter notes; seven hours at 120
    max_silence: float = 120.0  # seconds before and between notes
    max_tail: float = (
        1800.0  # seconds from the last event to the end, which is cut off; the longest real one seen: 1,461
    )
    min_division: int = 12  # ticks a quarter: fewer cannot tell a beat's twelfths apart
    max_division: int = 30_720
    min_tempo: float = 4.0  # quarters a minute; the slowest real one seen is 4.5
    max_tempo: float = 10_000.0  # the fastest real one seen is 7,300
    seconds: float = 20.0  # wall-clock time for one file
    megabytes: int = 1024  # memory for one file, beyond what a worker needs at rest


class Reject(Exception):
    """A file is left out: ``reason``, one of a few, by which rejects are counted; ``detail`` about this file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Piece:
    """A tokenised file."""

    digest: bytes  # 16 bytes, of its onsets and pitches
    tokens: bytes  # (L,) little-endian uint16, without BOS and EOS
    notes: int
    bars: int
    seconds: float


def check_structure(data: bytes, limits: Limits) -> int:
    """Walk the chunks and events of a MIDI file. Raises ``Reject`` where they are not what they say they are.

    The parser would take some truncated files for short ones, follow a header that lies, and skip what it does
    not know. Bytes after the last track, and after the end of a track within its chunk, are no fault: real
    files have them. Returns the ticks from a track's last note or controller to its end, of all tracks the most.
    """
    if not data:
        raise Reject("empty file")
    if len(data) < 14 or data[:4] != b"MThd":
        raise Reject("not a MIDI file", f"starts with {data[:4]!r}")
    header, kind, tracks, division = struct.unpack(">IHHH", data[4:14])
    if header != 6:
        raise Reject("wrong header", f"it gives its length as {header}, expected 6")
    if kind not in (0, 1):
        raise Reject("MIDI format", f"format {kind}, expected 0 or 1")
    if not limits.min_division <= division <= limits.max_division:
        wanted = f"expected {limits.min_division} to {limits.max_division} ticks a quarter"
        raise Reject("absurd division", f"{division:#06x}, {wanted}")
    place, found, silence = 14, 0, 0
    while place + 8 <= len(data):
        name, length = struct.unpack(">4sI", data[place : place + 8])
        place += 8 + length
        if name == b"MTrk":
            found += 1
            if place > len(data):
                raise Reject("truncated", f"track {found} should go on for {place - len(data)} bytes")
            silence = max(silence, _check_track(data, place - length, place, f"track {found}"))
    if found < tracks:
        raise Reject("truncated", f"{found} tracks, the header says {tracks}")
    if found > tracks:  # format 0 with several tracks is heard of, and read as what it is
        raise Reject("wrong header", f"it says {tracks} tracks, there are {found}")
    return silence


_DELTA, _DATA = rb"[\x80-\xff]{0,3}+[\x00-\x7f]", rb"[\x00-\x7f]"
# as many messages to channels as follow each other, those with running status too
_MESSAGES = re.compile(
    b"(?:%(t)b(?:[\x80-\xbf\xe0-\xef]%(d)b{2}(?:%(t)b%(d)b{2})*+|[\xc0-\xdf]%(d)b(?:%(t)b%(d)b)*+))*+"
    % {b"t": _DELTA, b"d": _DATA}
)
_META_OR_SYSEX = re.compile(b"(%b)(\xff%b|\xf0)(%b)" % (_DELTA, _DATA, _DELTA))  # time, what it is, its length
_META_LENGTHS = {b"\xff\x2f": 0, b"\xff\x51": 3, b"\xff\x58": 4}  # end of track, tempo, time signature


def _check_track(data: bytes, start: int, end: int, name: str) -> int:
    """Walk one track, regular expressions over its messages. Returns the ticks after the last, 0 if it has none."""
    if data[end - 3 : end] != b"\xff\x2f\x00":
        raise Reject("truncated", f"{name} has no end")
    place, rest, has_messages = start, 0, False
    while True:
        messages = _MESSAGES.match(data, place, end)
        assert messages  # it matches the empty string
        if messages.end() > place:
            place, rest, has_messages = messages.end(), 0, True
        event = _META_OR_SYSEX.match(data, place, end)
        if event is None:
            raise Reject(
                "malformed event", f"{name}, byte {place - start}: {data[place : min(place + 8, end)].hex(' ')}"
            )
        delta, kind, length = event[1], event[2], _quantity(event[3])
        place, rest = event.end() + length, rest + _quantity(delta)
        cut = kind == b"\xf0" and not data[event.end() : place].endswith(b"\xf7")
        if cut or place > end or length != _META_LENGTHS.get(kind, length):
            raise Reject("malformed event", f"{name}, byte {event.start() - start}: {event[0].hex(' ')}")
        if kind == b"\xff\x2f":
            return rest if has_messages else 0


def _quantity(data: bytes) -> int:
    """A variable-length quantity."""
    value = 0
    for byte in data:
        value = value << 7 | byte & 0x7F
    return value
