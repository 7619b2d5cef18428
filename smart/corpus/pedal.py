"""The sustain pedal (MIDI controller 64): ``sustain`` lengthens notes to the release of the pedal that holds them.

The vocabulary has no pedal, so a performance would otherwise be read as staccato. symusic does not say on which channel
a note is, and drops controllers of tracks without notes; both are therefore read from the bytes of the file.
"""

import re
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from symusic.core import ScoreTick

PEDAL, DOWN = 64, 64  # the controller's number; from this value on, the pedal is pressed (half of its way)

_EVENT = re.compile(
    rb"([\x80-\xff]{0,3}[\x00-\x7f])"  # time
    rb"(?:([\x80-\xef]?)([\x00-\x7f])([\x00-\x7f]?)|(\xff[\x00-\x7f]|\xf0|\xf7))"
)

Columns = dict[str, npt.NDArray[np.int64]]


def sustain(score: "ScoreTick", data: bytes) -> "ScoreTick":
    """A copy of ``score``, read from the MIDI file ``data``, with notes that end under a pressed pedal lengthened.

    Such a note ends when its channel's pedal is released, or at the next onset of its key on that channel. A pedal that
    is never released holds notes to the last note-off of the piece. No note becomes shorter, so notes that were
    lengthened before stay as they are. Drums have no pedal.
    """
    if not re.search(rb"[\xb0-\xbf]", data):  # no controller at all
        return score
    notes, pedals = read_channels(data)
    if not any((values >= DOWN).any() for _, values in pedals.values()):
        return score
    last = max((track.end() for track in score.tracks), default=0)
    from symusic.core import NoteTickList

    held = score.copy()
    for track in held.tracks:
        if track.is_drum or not len(track.notes):
            continue
        columns = track.notes.numpy()
        track.notes = NoteTickList.from_numpy(
            columns["time"], _lengthened(columns, notes, pedals, last), columns["pitch"], columns["velocity"]
        )
    return held


def _lengthened(
    columns: Columns, notes: Columns, pedals: dict[int, tuple[npt.NDArray[np.int64], ...]], last: int
) -> npt.NDArray[np.int32]:
    """Durations of the notes in ``columns`` after the pedals of their channels, in ticks."""
    time, pitch = columns["time"].astype(np.int64), columns["pitch"].astype(np.int64)
    ends = time + columns["duration"]
    keys = (time << 14) + (pitch << 7) + columns["velocity"]
    found = np.searchsorted(notes["key"], keys).clip(max=len(notes["key"]) - 1)
    channels = np.where(notes["key"][found] == keys, notes["channel"][found], -1)
    longer = ends.copy()
    for channel, (times, values) in pedals.items():
        mine = np.flatnonzero(channels == channel)
        state = np.searchsorted(times, ends[mine], side="right") - 1  # the last pedal event at or before the note's end
        mine, state = mine[state >= 0], state[state >= 0]
        # not a note that ends as the pedal is changed: it was lengthened before, or both were lifted at once
        pressed = (values[state] >= DOWN) & ~np.isin(ends[mine], times[values < DOWN])
        mine, state = mine[pressed], state[pressed]
        lifts = np.append(np.where(values < DOWN, times, np.iinfo(np.int64).max)[::-1], np.iinfo(np.int64).max)
        release = np.minimum.accumulate(np.append(np.iinfo(np.int64).max, lifts[:-1]))[::-1][state]
        longer[mine] = np.minimum(release, last)
        # the next onset of the same key on this channel
        onsets = np.sort(((notes["pitch"] << 32) + notes["time"])[notes["channel"] == channel])
        after = np.searchsorted(onsets, (pitch[mine] << 32) + time[mine], side="right")
        following = np.append(onsets, np.iinfo(np.int64).max)[after]
        following = np.where(following >> 32 == pitch[mine], following & 0xFFFFFFFF, np.iinfo(np.int64).max)
        longer[mine] = np.minimum(longer[mine], following)
    return (np.maximum(longer, ends) - time).astype(np.int32)


def read_channels(data: bytes) -> tuple[Columns, dict[int, tuple[npt.NDArray[np.int64], ...]]]:
    """Note-ons and pedal events of a MIDI file whose structure has been checked, in all of its tracks.

    Returns columns of the note-ons, sorted by ``key``, which holds time, pitch and velocity; and for each channel with
    pedal events their times and values, sorted by time. Of several at one time the last counts.
    """
    rows: list[tuple[int, int, int, int]] = []
    pedals: dict[int, list[tuple[int, int]]] = {}
    place = 14
    while place + 8 <= len(data):
        end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "big")
        if data[place : place + 4] == b"MTrk":
            _read_track(data, place + 8, min(end, len(data)), rows, pedals)
        place = end
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    time, channel, pitch, velocity = table.T
    key = (time << 14) + (pitch << 7) + velocity
    order = np.argsort(key, kind="stable")
    notes = {"key": key[order], "time": time[order], "channel": channel[order], "pitch": pitch[order]}
    sorted_pedals = {}
    for number, events in pedals.items():
        events.sort(key=lambda event: event[0])  # stable: several at one time stay in the file's order
        sorted_pedals[number] = tuple(np.array(events, dtype=np.int64).T)
    return notes, sorted_pedals


def _read_track(
    data: bytes, place: int, end: int, rows: list[tuple[int, int, int, int]], pedals: dict[int, list[tuple[int, int]]]
) -> None:
    now = status = 0
    while event := _EVENT.match(data, place, end):
        delta, new, first, second, other = event.groups()
        now, place = now + _quantity(delta), event.end()
        if other:
            length = _QUANTITY.match(data, place, end)
            if length is None or other == b"\xff\x2f":  # the end of the track
                return
            place = length.end() + _quantity(length[0])
        else:
            status = new[0] if new else status
            kind, channel = status & 0xF0, status & 0x0F
            if kind in (0xC0, 0xD0):  # one byte of data only
                place -= len(second)
            elif kind == 0x90 and second != b"\0":
                rows.append((now, channel, first[0], second[0]))
            elif kind == 0xB0 and first[0] == PEDAL:
                pedals.setdefault(channel, []).append((now, second[0]))


_QUANTITY = re.compile(rb"[\x80-\xff]{0,3}[\x00-\x7f]")


def _quantity(data: bytes) -> int:
    """The value of a MIDI variable-length quantity."""
    value = 0
    for byte in data:
        value = value << 7 | byte & 0x7F
    return value
