"""MIDI files as bytes: what a file may hold (``Limits``), and a check of its structure (``check_structure``).

A file becomes a ``Piece`` or is left out with a ``Reject``. This module imports no parser and no tokenizer.
"""

import os
import re
import stat
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


def _limit(default: float, text: str) -> Any:
    """A field of ``Limits``; ``text`` is the help of its option."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """What a file may hold, and what reading it may cost."""

    max_bar_notes: int = _limit(300, "Most notes that one bar may have (300 in the paper).")
    max_empty_bars: float = _limit(0.2, "Largest share of bars without notes, from 0 to 1 (0.2 in the paper).")
    # one for a prompt, one for what follows it
    min_bars: int = _limit(2, "Fewest bars with notes that a piece may have.")
    max_bytes: int = _limit(16 << 20, "Largest size of a file, in bytes.")
    # the longest real piece seen has 33,000
    max_notes: int = _limit(200_000, "Most notes that a file may have in all its tracks together.")
    # seven hours at 120 quarter notes per minute
    max_quarters: int = _limit(50_000, "Latest onset of a note, in quarter notes from the start.")
    max_silence: float = _limit(120.0, "Longest silence before the first note or between notes, in seconds.")
    # the longest real one seen: 1,461
    max_tail: float = _limit(1800.0, "Longest silence after the last note or controller, in seconds (it is cut off).")
    # fewer cannot tell a beat's twelfths apart
    min_division: int = _limit(12, "Fewest ticks per quarter note in the file's header.")
    max_division: int = _limit(30_720, "Most ticks per quarter note in the file's header.")
    # the slowest real one seen is 4.5, the fastest 7,300
    min_tempo: float = _limit(4.0, "Slowest tempo, in quarter notes per minute.")
    max_tempo: float = _limit(10_000.0, "Fastest tempo, in quarter notes per minute.")
    seconds: float = _limit(20.0, "Longest time that reading a file may take, in seconds.")
    megabytes: int = _limit(1024, "Most memory that reading a file may take, in MiB, beyond that of an idle worker.")


BARS = ("written", "found")


@dataclass(frozen=True)
class Reading:
    """How a file is read. The paper's form: no pedal, and bars as they are written."""

    pedal: bool = True  # whether notes that end under the pressed sustain pedal are lengthened to its release
    bars: str = "written"  # "found": bar lines that are displaced or missing are put where the beat is


class Reject(Exception):
    """A file is left out: ``reason`` is one of a few, by which rejects are counted; ``detail`` is about this file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Piece:
    """A tokenised file."""

    digest: bytes  # 16 bytes, the hash of its onsets and pitches
    tokens: bytes  # (L,) little-endian uint16, without BOS and EOS
    notes: int
    bars: int
    seconds: float
    stretch: float  # how many times as long its notes are, on average, because of the pedal
    placed: str  # where its bar lines are: "as written", "shifted" or "tracked"
    remarks: str = ""  # what was read otherwise than the file has it: "KIND: what; KIND: what"


def read_bytes(path: str | bytes | os.PathLike[str], limits: Limits) -> bytes:
    """The bytes of a file. Raises ``Reject`` if it is too large, or is neither a file nor a folder; and ``OSError``."""
    if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise Reject("cannot be read", "not a regular file")  # opening a pipe would wait for its other end
    with open(path, "rb") as file:  # a folder gives an error: it is one, or it may not be listed
        data = file.read(limits.max_bytes + 1)
    if len(data) > limits.max_bytes:
        raise Reject("too large", f"over {limits.max_bytes} bytes")
    return data


class Structure(NamedTuple):
    """What the walk through a file finds that its parser does not tell."""

    tail: int  # ticks from a track's last note or controller to its end: the most of all tracks
    note_ons: int
    has_packets: bool  # SysEx in several packets or F7 escapes, which the parser misreads


def check_structure(data: bytes, limits: Limits) -> Structure:
    """Walk the chunks and events of a MIDI file. Raises ``Reject`` where one contradicts its own header or length.

    The parser would take some truncated files for short ones, believe a wrong header, and skip what it does not know.
    Bytes after the last track, and after the end of a track within its chunk, are tolerated: real files have them.
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
        wanted = f"expected {limits.min_division} to {limits.max_division} ticks per quarter note"
        raise Reject("absurd division", f"{division:#06x}, {wanted}")
    place, found, walked = 14, 0, [Structure(0, 0, False)]
    while place + 8 <= len(data):
        name, length = struct.unpack(">4sI", data[place : place + 8])
        place += 8 + length
        if name == b"MTrk":
            found += 1
            if place > len(data):
                raise Reject("truncated", f"track {found} lacks its last {place - len(data)} bytes")
            walked.append(_check_track(data, place - length, place, f"track {found}"))
    if found < tracks:
        raise Reject("truncated", f"{found} tracks, the header says {tracks}")
    if found > tracks:  # some files of format 0 have several tracks; they are read as they are
        raise Reject("wrong header", f"it says {tracks} tracks, there are {found}")
    tails, note_ons, packets = zip(*walked, strict=True)
    return Structure(max(tails), sum(note_ons), any(packets))


_DELTA, _DATA = rb"[\x80-\xff]{0,3}+[\x00-\x7f]", rb"[\x00-\x7f]"
# channel messages, as many as follow one another, including those with running status: those with two bytes of data,
# then those with one
_MESSAGES = re.compile(
    b"((?:%(t)b[\x80-\xbf\xe0-\xef]%(d)b{2}(?:%(t)b%(d)b{2})*+)*+)(?:%(t)b[\xc0-\xdf]%(d)b(?:%(t)b%(d)b)*+)*+"
    % {b"t": _DELTA, b"d": _DATA}
)
_META_OR_SYSEX = re.compile(b"(%b)(\xff%b|\xf0|\xf7)(%b)" % (_DELTA, _DATA, _DELTA))  # time, what it is, its length
_META_LENGTHS = {b"\xff\x2f": 0, b"\xff\x51": 3, b"\xff\x58": 4}  # end of track, tempo, time signature


def _check_track(data: bytes, start: int, end: int, name: str) -> Structure:
    """Walk one track with regular expressions."""
    if data[end - 3 : end] != b"\xff\x2f\x00":
        raise Reject("truncated", f"{name} has no end")
    place, rest, has_messages = start, 0, False
    messages_of_two: list[bytes] = []
    has_packets, cut = False, b""  # the bytes of a SysEx whose last packet has not come yet
    while True:
        messages = _MESSAGES.match(data, place, end)
        assert messages  # it matches the empty string
        if messages.end() > place:
            place, rest, has_messages = messages.end(), 0, True
            messages_of_two.append(messages[1])
            continue
        event = _META_OR_SYSEX.match(data, place, end)
        if event is None:
            raise Reject(
                "malformed event", f"{name}, byte {place - start}: {data[place : min(place + 8, end)].hex(' ')}"
            )
        delta, kind, length = event[1], event[2], _quantity(event[3])
        place, rest = event.end() + length, rest + _quantity(delta)
        if kind in (b"\xf0", b"\xf7"):
            complete = data[event.end() : place].endswith(b"\xf7")
            has_packets |= kind == b"\xf7" or not complete
            if kind == b"\xf0" or cut:  # an F7 that continues nothing is an escape, which holds any bytes
                cut = b"" if complete else event[0]
        if place > end or length != _META_LENGTHS.get(kind, length) or (cut and kind == b"\xff\x2f"):
            raise Reject("malformed event", f"{name}, byte {event.start() - start}: {(cut or event[0]).hex(' ')}")
        if kind == b"\xff\x2f":
            return Structure(rest if has_messages else 0, _count_note_ons(b"".join(messages_of_two)), has_packets)


def _count_note_ons(data: bytes) -> int:
    """How many of channel messages with two bytes of data, and maybe running status, begin a note."""
    array = np.frombuffer(data, np.uint8)
    # three bytes of each message are below 128: the last of its time, and its data; a status byte follows the former
    time, first, second = np.flatnonzero(array < 0x80).reshape(-1, 3).T
    has_status = first - time == 2
    latest = np.maximum.accumulate(np.where(has_status, np.arange(len(time)), 0))
    return int(((array[time[latest] + 1] >> 4 == 9) & (array[second] > 0)).sum())


def _quantity(data: bytes) -> int:
    """The value of a MIDI variable-length quantity."""
    value = 0
    for byte in data:
        value = value << 7 | byte & 0x7F
    return value
