"""MIDI files as events: every message with its tick and its own bytes, so that a file can be changed and nothing else.

The parser that makes scores pairs notes, drops what it does not know, and decodes texts. Whatever must stay as it is,
byte for byte, goes through here instead.
"""

import struct
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

END_OF_TRACK = b"\xff\x2f\x00"
TEMPO, TIME_SIGNATURE, KEY_SIGNATURE = (b"\xff\x51", b"\xff\x58", b"\xff\x59")  # how these events begin
DRUM_CHANNEL = 9


class Event(NamedTuple):
    """A message: its time in ticks, and its bytes, with a status byte of its own."""

    tick: int
    data: bytes


class MidiFile(NamedTuple):
    """The tracks of a file, each a list of events in order that ends with the end of the track."""

    division: int
    tracks: list[list[Event]]

    def dumps(self) -> bytes:
        """The bytes of a file of format 1."""
        parts = [b"MThd" + struct.pack(">IHHH", 6, 1, len(self.tracks), self.division)]
        for track in self.tracks:
            body, now = bytearray(), 0
            for tick, data in track:
                body += to_quantity(tick - now) + data
                now = tick
            parts.append(b"MTrk" + struct.pack(">I", len(body)) + body)
        return b"".join(parts)

    def mapped(self, change: Callable[[list[Event]], Iterable[Event]]) -> "MidiFile":
        """A file of the tracks that ``change`` makes of the tracks."""
        return MidiFile(self.division, [list(change(track)) for track in self.tracks])


def read_file(data: bytes) -> MidiFile:
    """The events of a file whose structure ``smart.corpus.check_structure`` has found intact."""
    (division,) = struct.unpack(">H", data[12:14])
    place, tracks = 14, []
    while place + 8 <= len(data):
        name, length = struct.unpack(">4sI", data[place : place + 8])
        place += 8 + length
        if name == b"MTrk":
            tracks.append(list(_read_track(data[place - length : place])))
    return MidiFile(division, tracks)


def _read_track(data: bytes) -> Iterator[Event]:
    place, tick, status = 0, 0, b""
    while place < len(data):
        delta, place = from_quantity(data, place)
        tick += delta
        first = data[place]
        if first >= 0xF0:  # a meta event or a SysEx: its bytes say how long it is
            head = place + 1 + (first == 0xFF)
            length, start = from_quantity(data, head)
            yield Event(tick, data[place : start + length])
            if data[place : place + 2] == END_OF_TRACK[:2]:
                return
            place = start + length
            continue
        if first >= 0x80:
            status, place = data[place : place + 1], place + 1
        size = 1 if 0xC0 <= status[0] < 0xE0 else 2
        yield Event(tick, status + data[place : place + size])
        place += size


def from_quantity(data: bytes, place: int) -> tuple[int, int]:
    """The value of the variable-length quantity at ``place``, and where it ends."""
    value = 0
    while True:
        byte = data[place]
        value, place = value << 7 | byte & 0x7F, place + 1
        if byte < 0x80:
            return value, place


def to_quantity(value: int) -> bytes:
    """A variable-length quantity."""
    out = [value & 0x7F]
    while value := value >> 7:
        out.append(0x80 | value & 0x7F)
    return bytes(reversed(out))


Key = tuple[int, int]  # channel, pitch


class Press(NamedTuple):
    """A pressed key: the places of its two events in their track; ``off`` is None if it is never released there."""

    on: int
    off: int | None


def pair_notes(track: list[Event]) -> dict[Key, list[Press]]:
    """The notes of a track by key, in order. A release ends the oldest note of its key, as in the parser of scores."""
    open_notes: dict[Key, deque[int]] = defaultdict(deque)
    presses: dict[Key, dict[int, int | None]] = defaultdict(dict)
    for place, (_, data) in enumerate(track):
        kind = data[0] & 0xF0
        if kind not in (0x80, 0x90):
            continue
        key = data[0] & 0x0F, data[1]
        if kind == 0x90 and data[2]:
            open_notes[key].append(place)
            presses[key][place] = None
        elif open_notes[key]:
            presses[key][open_notes[key].popleft()] = place
    return {key: [Press(*each) for each in pressed.items()] for key, pressed in presses.items()}


def without_sysex(midi: MidiFile) -> MidiFile:
    """The file without system exclusive messages and escapes, some forms of which the parser of scores misreads."""
    return midi.mapped(lambda track: (event for event in track if event.data[0] not in (0xF0, 0xF7)))


def end_hanging_notes(midi: MidiFile) -> tuple[MidiFile, int]:
    """The file with a release for each note that has none in its track, and how many these are.

    Such a note ends with the next release of its key on its channel, in any track, or else with its track; if its
    track ends with its onset, after a quarter note.
    """
    releases: dict[Key, list[int]] = defaultdict(list)
    for track in midi.tracks:
        for tick, data in track:
            if data[0] & 0xF0 == 0x80 or (data[0] & 0xF0 == 0x90 and not data[2]):
                releases[data[0] & 0x0F, data[1]].append(tick)
    for ticks in releases.values():
        ticks.sort()
    tracks, hanging = [], 0
    for track in midi.tracks:
        ends: list[tuple[Key, int]] = []
        for key, pressed in pair_notes(track).items():
            for press in pressed:
                if press.off is None:
                    onset = track[press.on].tick
                    later = bisect_left(releases[key], onset + 1)
                    last = track[-1].tick if track[-1].tick > onset else onset + midi.division
                    ends.append((key, releases[key][later] if later < len(releases[key]) else last))
        hanging += len(ends)
        tracks.append(insert(track, [Event(tick, bytes([0x80 | key[0], key[1], 64])) for key, tick in ends]))
    return MidiFile(midi.division, tracks), hanging


def insert(track: list[Event], events: Iterable[Event]) -> list[Event]:
    """A track with more events, before those that it has at the same tick; it ends later if it must."""
    new = sorted(events, key=lambda event: event.tick)
    if not new:
        return track
    merged = sorted([*new, *track[:-1]], key=lambda event: event.tick)  # stable: the new ones come first
    return [*merged, Event(max(track[-1].tick, merged[-1].tick), END_OF_TRACK)]
