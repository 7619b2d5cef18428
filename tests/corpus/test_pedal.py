"""The sustain pedal: durations worked out by hand, and what must never change."""

from typing import Any

import numpy as np
import pytest
from corpora import END, GOOD, delta, midi, song
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic.core import ScoreTick

from smart.corpus import Limits, Reading
from smart.corpus.pedal import sustain
from smart.corpus.piece import PieceReader

Event = tuple[int, bytes]


def on(pitch: int, channel: int = 0) -> bytes:
    return bytes([0x90 | channel, pitch, 64])


def off(pitch: int, channel: int = 0) -> bytes:
    return bytes([0x80 | channel, pitch, 0])


def pedal(value: int, channel: int = 0) -> bytes:
    return bytes([0xB0 | channel, 64, value])


def track(*events: Event) -> bytes:
    """A track of (tick, message)."""
    out, now = b"", 0
    for tick, message in events:
        out += delta(tick - now) + message
        now = tick
    return out + END


def held(*tracks: bytes) -> list[tuple[int, int, int]]:
    """(onset, duration, pitch) of all notes after the pedal, sorted."""
    data = midi(*tracks)
    score = sustain(ScoreTick.from_midi(data), data)
    return sorted((note.time, note.duration, note.pitch) for track in score.tracks for note in track.notes)


NOTE: list[Event] = [(0, on(60)), (100, off(60))]
LATER: list[Event] = [(900, on(72)), (1000, off(72))]


@pytest.mark.parametrize(
    ("events", "duration"),
    [
        ([], 100),  # no pedal
        ([(10, pedal(127)), (400, pedal(0))], 400),  # held to the release
        ([(10, pedal(127)), (90, pedal(0))], 100),  # released before the note ends
        ([(10, pedal(127)), (100, pedal(0))], 100),  # released when the note ends
        ([(100, pedal(127)), (400, pedal(0))], 400),  # pressed when the note ends
        ([(150, pedal(127)), (400, pedal(0))], 100),  # pressed after the note has ended
        ([(10, pedal(64)), (400, pedal(63))], 400),  # half of its way is pressed
        ([(10, pedal(63))], 100),
        ([(10, pedal(70)), (200, pedal(127)), (300, pedal(80)), (400, pedal(20))], 400),  # moved while pressed
        ([(10, pedal(127)), (400, pedal(0)), (400, pedal(127)), (500, pedal(0))], 400),  # pressed anew at its release
        ([(10, pedal(127))], 1000),  # never released: to the last note-off
        ([(10, pedal(127)), (300, on(60)), (350, off(60)), (400, pedal(0))], 300),  # to the next onset of its key
        ([(10, pedal(127)), (300, on(61)), (350, off(61)), (400, pedal(0))], 400),  # other keys do not end it
        ([(10, pedal(127, 1)), (400, pedal(0, 1))], 100),  # the pedal of another channel
    ],
)
def test_duration_by_hand(events: list[Event], duration: int) -> None:
    both = sorted(NOTE + events + LATER, key=lambda event: event[0])
    assert held(track(*both))[0] == (0, duration, 60)


def test_pedals_of_several_channels_and_tracks() -> None:
    """A pedal counts for its channel in all tracks, also where its own track has no notes."""
    piano, other = track(*NOTE), track((0, on(62, 1)), (100, off(62, 1)), (900, on(40, 1)), (1000, off(40, 1)))
    pedals = track((50, pedal(100)), (50, pedal(100, 1)), (200, pedal(0)), (300, pedal(0, 1)))
    assert held(piano, pedals, other) == [(0, 200, 60), (0, 300, 62), (900, 100, 40)]
    drums = track((0, on(40, 9)), (50, pedal(127, 9)), (100, off(40, 9)), (900, on(40, 9)), (950, off(40, 9)))
    assert held(piano, drums) == [(0, 100, 40), (0, 100, 60), (900, 50, 40)]


def test_running_status_programs_and_texts_are_read_through() -> None:
    """The same music written with running status, program changes, channel pressure, SysEx and texts."""
    written = (
        b"\x00\xff\x03\x02ab" + b"\x00\xc0\x01\x00\x01" + b"\x00\xf0\x03\x7e\x7f\xf7"
        b"\x00\xd0\x10\x00\x11" + b"\x00\xb0\x07\x40\x00\x40\x7f" + b"\x00\x90\x3c\x40" + delta(100) + b"\x3c\x00"
        + delta(300) + b"\xb0\x40\x00" + delta(500) + b"\x90\x48\x40" + delta(100) + b"\x48\x00" + END
    )  # fmt: skip
    assert held(written) == [(0, 400, 60), (900, 100, 72)]


def test_files_without_a_pedal_come_back_as_they_are() -> None:
    score = ScoreTick.from_midi(GOOD)
    assert sustain(score, GOOD) is score


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(0, 127), st.integers(0, 2)), max_size=40))
def test_notes_only_get_longer_and_twice_is_once(drawn: list[tuple[int, int, int, int]]) -> None:
    """Any sequence of notes and pedals on three channels: only ends move, and never past the next onset of the key."""
    events: list[Event] = [(2000, on(50)), (2010, off(50))]
    for start, kind, value, channel in drawn:
        if kind < 3:
            pitch = 60 + 10 * channel + value % 3
            events += [(start * 20, on(pitch, channel)), (start * 20 + 10 + value, off(pitch, channel))]
        else:
            events.append((start * 20 + kind, pedal(value, channel)))
    data = midi(track(*sorted(events, key=lambda event: event[0])))
    score = ScoreTick.from_midi(data)
    once = sustain(score, data)
    again = sustain(once, data)
    for before, after, twice in zip(score.tracks, once.tracks, again.tracks, strict=True):
        old, new, newer = (part.notes.numpy() for part in (before, after, twice))
        for name in ("time", "pitch", "velocity"):
            np.testing.assert_array_equal(old[name], new[name])
        assert (new["duration"] >= old["duration"]).all()
        np.testing.assert_array_equal(new["duration"], newer["duration"])
        for pitch in set(old["pitch"].tolist()):
            mine = np.flatnonzero(new["pitch"] == pitch)
            mine = mine[np.lexsort((new["duration"][mine], new["time"][mine]))]
            time, end = new["time"][mine], (new["time"] + new["duration"])[mine]
            longer = new["duration"][mine] > old["duration"][mine]
            for place in np.flatnonzero(longer):
                later = time[time > time[place]]
                assert not len(later) or end[place] <= later.min()


def test_reader_lengthens_unless_told_not_to(tokenizer: Any) -> None:
    """The pedal changes durations, not the split that the hash decides; a file without one is read as it was."""
    score = song(1)
    data = score.dumps_midi()
    body = data.rindex(b"MTrk")
    length = int.from_bytes(data[body + 4 : body + 8], "big")
    press = b"\x00\xb0\x40\x7f"
    pedalled = data[: body + 4] + (length + 4).to_bytes(4, "big") + press + data[body + 8 :]
    wet, dry = (PieceReader(tokenizer, Limits(), Reading(pedal=pedal)) for pedal in (True, False))
    long, short, plain = wet.read(pedalled), dry.read(pedalled), wet.read(data)
    assert short.tokens == plain.tokens != long.tokens
    assert short.digest == long.digest
    assert (short.stretch, plain.stretch) == (1.0, 1.0)
    assert long.stretch > 1.5  # notes of half a beat that follow one another at every beat
