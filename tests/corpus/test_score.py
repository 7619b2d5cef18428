"""Reading MIDI files: notes without an end, SysEx in packets, bars in time signatures that a vocabulary lacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import END, MELODY, delta, midi, notes
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic.core import ScoreTick, TimeSignatureTick

from smart import UserError
from smart.corpus import Limits, Reading, Reject, fit_bars, open_score, read_score, signatures_of
from smart.corpus.events import Event, read_file
from smart.corpus.piece import PieceReader
from smart.tokens import build_tokenizer, decode

KNOWN = signatures_of(build_tokenizer().vocab)


def track(*events: tuple[int, bytes], end: int = 0) -> bytes:
    """A track of (tick, message), and its end ``end`` ticks after the last."""
    out, now = b"", 0
    for tick, data in sorted(events, key=lambda event: event[0]):
        out, now = out + delta(tick - now) + data, tick
    return out + delta(end) + END[1:]


def on(tick: int, pitch: int, channel: int = 0) -> tuple[int, bytes]:
    return tick, bytes([0x90 | channel, pitch, 80])


def off(tick: int, pitch: int, channel: int = 0) -> tuple[int, bytes]:
    return tick, bytes([0x80 | channel, pitch, 0])


def heard(*tracks: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """How many notes hang, and (onset, end, pitch) of all notes."""
    found = read_score(midi(*tracks), Limits())
    return found.hanging, sorted((n.time, n.end, n.pitch) for part in found.score.tracks for n in part.notes)


def test_a_note_without_an_end_ends_with_its_track() -> None:
    assert heard(track(on(0, 60), on(480, 64), off(700, 64), end=260)) == (1, [(0, 960, 60), (480, 700, 64)])
    assert heard(track(on(0, 60), on(480, 64))) == (2, [(0, 480, 60), (480, 960, 64)])  # the track ends with its onset
    assert heard(track(on(0, 60), on(240, 60), end=240)) == (2, [(0, 480, 60), (240, 480, 60)])
    # notes with running status, velocity 0 as a release, and other messages between them
    running = (
        b"\x00\x90\x3c\x40\x10\x3c\x00\x10\x40\x40\x00\xc0\x00\x05\xff\x01\x01x\x10\x90\x43\x40\x10\x43\x00\x10"
        + END[1:]
    )
    assert heard(running) == (1, [(0, 16, 60), (32, 85, 64), (53, 69, 67)])


def test_a_note_ends_with_the_next_release_of_its_key_in_any_track() -> None:
    assert heard(track(on(0, 60), end=960), track(off(200, 60))) == (1, [(0, 200, 60)])
    assert heard(track(on(0, 60), end=960), track(off(200, 60, 1), off(300, 61))) == (1, [(0, 960, 60)])
    assert heard(track(on(0, 60), on(0, 60), off(200, 60), end=760)) == (1, [(0, 200, 60), (0, 200, 60)])
    assert heard(track(on(0, 60), on(100, 60), off(200, 60), end=760)) == (1, [(0, 200, 60), (100, 200, 60)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2), st.booleans(), st.integers(0, 1)), max_size=40))
def test_every_note_that_begins_is_read(events: list[tuple[int, int, bool, int]]) -> None:
    messages = [(on if press else off)(tick, 60 + pitch, channel) for tick, pitch, press, channel in events]
    found = read_score(midi(track(*messages, end=8)), Limits())
    assert found.score.note_num() == sum(press for *_, press, _ in events)
    assert all(n.end <= 48 + 480 and n.duration >= 0 for part in found.score.tracks for n in part.notes)


def test_sysex_in_packets_and_escapes_shift_nothing() -> None:
    plain = read_score(midi(notes(*MELODY)), Limits()).score
    packets = b"\x00\xf0\x03\x43\x12\x00\x0a\xf7\x02\x43\x12\x00\xf7\x02\x00\xf7"  # the second after 10 ticks
    for head in (packets, b"\x00\xf7\x02\xf3\x01", b"\x00\xf0\x02\x43\xf7\x00\xf7\x03\xf2\x01\x02"):
        data = midi(notes(*MELODY, head=head))
        found = read_score(data, Limits()).score
        shift = 10 if head is packets else 0
        assert [(n.time - shift, n.end - shift) for n in found.tracks[0].notes] == [
            (n.time, n.end) for n in plain.tracks[0].notes
        ]
    for never in (b"\x00\xf0\x03\x43\x12\x00", b"\x00\xf0\x03\x43\x12\x00\x00\xf7\x01\x05"):
        with pytest.raises(Reject, match="malformed event"):
            read_score(midi(notes(*MELODY, head=never)), Limits())


def test_a_file_written_again_has_the_same_events() -> None:
    name = bytes([0xFF, 0x03, 8]) + "ピアノ".encode("shift_jis")[:6] + b"\xff\xfe"
    data = midi(track((0, name), (5, b"\xf0\x03\x43\x12\x00"), (9, b"\xf7\x01\xf7"), on(10, 60), off(20, 60), end=7))
    assert read_file(data).dumps() == data
    assert read_file(data).tracks[0][0] == Event(0, name)


def bars(*signatures: tuple[int, int, int], end: int) -> tuple[list[int], list[tuple[int, int, int]], str]:
    score = ScoreTick(480)
    for each in signatures:
        score.time_signatures.append(TimeSignatureTick(*each))
    found = fit_bars(score.time_signatures, 480, end, KNOWN)
    return found.lines.tolist(), [(s.time, s.numerator, s.denominator) for s in found.signatures], found.remark


@pytest.mark.parametrize(
    ("signatures", "end", "lines", "read"),
    [
        ([], 3840, [0, 1920, 3840], [(0, 4, 4)]),
        ([(0, 7, 4)], 6720, [0, 3360, 6720], [(0, 4, 4), (1920, 3, 4), (3360, 4, 4), (5280, 3, 4)]),
        ([(0, 5, 2)], 4800, [0, 4800], [(0, 3, 2), (2880, 2, 2)]),
        ([(0, 4, 8)], 1920, [0, 960, 1920], [(0, 2, 4)]),
        ([(0, 15, 8)], 3600, [0, 3600], [(0, 9, 8), (2160, 6, 8)]),
        ([(0, 7, 16)], 2520, [0, 840, 1680, 2520], [(0, 7, 8)]),  # two bars are one, also where the last is alone
        ([(0, 4, 4), (960, 3, 4)], 3840, [0, 960, 2400, 3840], [(0, 2, 4), (960, 3, 4)]),  # a bar cut short
        ([(0, 4, 4), (2400, 3, 4)], 3840, [0, 1920, 2400, 3840], [(0, 5, 4), (2400, 3, 4)]),  # its rest is too short
        ([(0, 1, 4), (480, 4, 4)], 4320, [0, 480, 2400, 4320], [(0, 5, 4), (2400, 4, 4)]),  # a pickup
        ([(0, 4, 4), (1925, 3, 4)], 3365, [0, 1920, 3360], [(0, 4, 4), (1920, 3, 4)]),  # a few ticks beside the line
        ([(0, 4, 4), (1000, 4, 4), (1920, 0, 4)], 1920, [0, 1920], [(0, 4, 4)]),  # repeated, impossible
    ],
)
def test_bar_lines_stay_where_the_song_has_them(
    signatures: list[tuple[int, int, int]], end: int, lines: list[int], read: list[tuple[int, int, int]]
) -> None:
    found, fitted, remark = bars(*signatures, end=end)
    assert (found, fitted) == (lines, read)
    changed = {(n, d) for _, n, d in signatures if n} != {(n, d) for _, n, d in read} and bool(signatures)
    assert bool(remark) == changed


def test_a_bar_that_no_signature_expresses_is_refused_by_name() -> None:
    for signatures in ([(0, 4, 4), (2000, 3, 4)], [(0, 2, 4), (960, 9, 16), (960 + 1080, 2, 4)]):
        with pytest.raises(Reject, match="irregular bars"):
            bars(*signatures, end=9600)


@pytest.mark.parametrize("head", [b"\x07\x02", b"\x05\x01", b"\x0b\x02", b"\x0f\x03"])
def test_notes_keep_their_times_in_other_signatures(head: bytes) -> None:
    """What the tokens of 7/4, 5/2, 11/4 and 15/8 decode to has every onset where the file has it."""
    tokenizer: Any = build_tokenizer()
    data = midi(notes(*MELODY, *MELODY, head=b"\x00\xff\x58\x04" + head + b"\x18\x08"))
    piece = PieceReader(tokenizer, Limits(), Reading()).read(data)
    again = decode(tokenizer, np.frombuffer(piece.tokens, "<u2"))
    onsets = [n.time / again.ticks_per_quarter for n in again.tracks[0].notes]
    assert onsets == [n.time / 480 for n in read_score(data, Limits()).score.tracks[0].notes]
    assert piece.remarks.startswith("bars read in other time signatures: ")


def test_what_is_not_heard_is_said(tmp_path: Path) -> None:
    def said(name: str, data: bytes) -> list[str]:
        (tmp_path / name).write_bytes(data)
        return open_score(tmp_path / name)[1]

    neutral = b"\x00\xb0\x07\x64\x00\xb0\x0a\x40\x00\xe0\x00\x40"
    assert said("plain.mid", midi(notes(*MELODY, head=neutral))) == []
    changed = b"\x00\xb0\x07\x00\x00\xb0\x0b\x10\x00\xb0\x0a\x00\x00\xe0\x7f\x7f\x00\xe0\x00\x20"
    (line,) = said("changed.mid", midi(notes(*MELODY, head=changed)))
    assert line.startswith("volume (CC7), pan (CC10), expression (CC11), pitch bends cannot be heard")
    (line,) = said("hanging.mid", midi(notes(*MELODY)[:-4] + b"\x00\x90\x30\x40" + END))
    assert line.startswith("1 note is never released; such a note ends with")
    assert said("silent.mid", midi(END)) == ["it has no notes, so that it is silent"]


def test_a_score_is_opened_with_or_without_the_pedal(tmp_path: Path) -> None:
    def durations(head: bytes, *, pedal: bool) -> list[int]:
        (tmp_path / "song.mid").write_bytes(midi(notes((0, 60), (240, 62), (240, 64), head=head)))
        return [note.duration for note in open_score(tmp_path / "song.mid", pedal=pedal)[0].tracks[0].notes]

    press = b"\x00\xb0\x40\x7f"
    assert durations(press, pedal=True) == [1200, 720, 240] and durations(press, pedal=False) == [240] * 3
    assert durations(b"", pedal=True) == durations(b"", pedal=False) == [240] * 3
    (tmp_path / "song.mid").write_bytes(midi(notes(*MELODY, head=press + b"\x00\xb0\x07\x00")))
    for pedal, played in ((True, "only notes, the pedal, velocities,"), (False, "only notes, velocities,")):
        (line,) = open_score(tmp_path / "song.mid", pedal=pedal)[1]
        assert played in line


def test_a_note_a_day_later_in_any_track_is_refused(tmp_path: Path) -> None:
    late = track(*(on(100_000_000, 38, 9), off(100_000_240, 38, 9)))
    held = track(on(0, 50, 1), off(190_000_000, 50, 1))
    for number, more in enumerate((late, held)):
        path = tmp_path / f"{number}.mid"
        path.write_bytes(midi(notes(*MELODY), more))
        with pytest.raises(UserError, match=r"\.mid: too long"):
            open_score(path)
