"""One MIDI file: kept as MidiTok would have it, or rejected with its reason."""

import struct
from typing import Any

import numpy as np
import pytest
from corpora import END, GOOD, MALFORMED, MELODY, delta, midi, notes, song, tempo
from symusic.core import NoteTick, ScoreTick, TempoTick, TrackTick

from smart.corpus import Limits, Reading, Reject
from smart.corpus.notes import seconds_at
from smart.corpus.piece import PieceReader, content_hash
from smart.tokens import decode, encode, merge_piano


def reader(tokenizer: Any, **limits: Any) -> PieceReader:
    return PieceReader(tokenizer, Limits(**limits), Reading())


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_rejected_with_their_reason(tokenizer: Any, name: str) -> None:
    data, reason = MALFORMED[name]
    with pytest.raises(Reject) as raised:
        reader(tokenizer).read(data)
    assert raised.value.reason == reason, raised.value.detail


def test_good_file_is_tokenised_as_miditok_does(tokenizer: Any) -> None:
    for seed in range(5):
        score = song(seed)
        piece = reader(tokenizer).read(score.dumps_midi())
        tokens = np.frombuffer(piece.tokens, "<u2")
        assert tokens.tolist() == encode(tokenizer, merge_piano(score))
        assert piece.notes == len(score.tracks[0].notes)
        assert piece.bars == 6
        assert piece.seconds == pytest.approx(score.to("second").end(), abs=1e-3)
        assert encode(tokenizer, decode(tokenizer, tokens)) == tokens.tolist()


@pytest.mark.parametrize(
    "data",
    [
        GOOD + b"trailing garbage",
        midi(notes(*MELODY), notes(*MELODY), kind=0),  # the same melody twice
        GOOD[:14] + b"XYZW" + struct.pack(">I", 3) + b"abc" + GOOD[14:],  # a chunk of another kind
        midi(notes(*MELODY) + b"\x00\x90\x3c\x40" + END),  # events after the end of the track
        midi(notes(*MELODY, head=b"\x00\xf0\x05\x7e\x7f\x09\x01\xf7\x00\xc0\x03\x00\x05\x00\xb0\x40\x00\x00\x07\x60")),
        midi(notes(*MELODY)[:-4] + delta(600 * 960) + END[1:]),  # ten minutes of silence at the end, cut off
        midi(notes(*MELODY), kind=0),
        midi(notes(*MELODY, head=b"\x00\xff\x03\x04\xff\xfe\xe9\x80")),  # a name that is no UTF-8
        midi(notes(*MELODY, head=b"\x00\xff\x58\x04\x00\x02\x18\x08")),  # a time signature of 0/4
        midi(notes(*MELODY, head=b"\x00\xff\x58\x04\x04\xff\x18\x08")),  # and one of 4/2^255
        midi(notes(*MELODY), notes(*MELODY, channel=9), notes(*MELODY, channel=3, head=b"\x00\xc3\x28")),
    ],
)
def test_oddities_that_are_no_fault_of_the_music(tokenizer: Any, data: bytes) -> None:
    assert reader(tokenizer).read(data).tokens == reader(tokenizer).read(GOOD).tokens


def test_no_part_of_a_file_is_taken_for_the_whole(tokenizer: Any) -> None:
    """Cut at any byte, a file of one track or of several is rejected."""
    whole_or_not = reader(tokenizer)
    several = midi(tempo(400_000) + END, notes(*MELODY), notes(*MELODY, channel=3), notes((0, 60), (0, 62)))
    for whole in (GOOD, midi(notes(*MELODY), kind=0), several, bytes(song(1).dumps_midi())):
        whole_or_not.read(whole)
        for size in range(len(whole)):
            with pytest.raises(Reject):
                whole_or_not.read(whole[:size])


def test_thresholds_of_the_paper(tokenizer: Any) -> None:
    """300 notes in a bar pass and 301 do not; 20% of empty bars pass and more do not."""

    def crowded(count: int) -> bytes:
        """``count`` notes in the first of two bars, 40 at each place of a grid of sixteenths, and one in the second."""
        score = song(0, bars=0)
        track = TrackTick()
        for number in range(count):
            track.notes.append(NoteTick(120 * (number // 40), 60, 30 + number % 40, 64))
        track.notes.append(NoteTick(1920, 60, 60, 64))
        score.tracks[0] = track
        return bytes(score.dumps_midi())

    def sparse(empty: int) -> bytes:
        """10 bars of 4/4, ``empty`` of them without notes."""
        bars = [0, *range(1 + empty, 10)]
        rests = np.diff([0, *bars], prepend=0)[1:]
        events = [(int(bar) * 1920 - (240 if place else 0), 60) for place, bar in enumerate(rests)]
        return midi(notes(*events))

    everything = reader(tokenizer, max_bar_notes=10**6)
    for count, kept in ((300, True), (301, False)):
        tokens = np.frombuffer(everything.read(crowded(count)).tokens, "<u2")
        bar = np.cumsum(tokens == everything.facts.bar_id)
        assert np.bincount(bar[np.isin(tokens, everything.facts.pitch_ids)]).max() == count
        assert _kept(tokenizer, crowded(count)) is kept
    for empty, kept in ((2, True), (3, False)):
        assert _kept(tokenizer, sparse(empty)) is kept


def _kept(tokenizer: Any, data: bytes) -> bool:
    try:
        reader(tokenizer).read(data)
    except Reject:
        return False
    return True


def test_content_hash_sees_onsets_and_pitches_alone() -> None:
    def hashed(score: ScoreTick) -> bytes:
        return content_hash(merge_piano(score))

    base = song(3)
    same = [song(3, velocity=5), song(3, division=960), song(3, division=96), song(3, program=7)]
    longer = song(3)
    for note in longer.tracks[0].notes:
        note.duration += 30
    doubled = song(3)
    doubled.tracks.append(doubled.tracks[0].copy())
    other_tempo = song(3)
    other_tempo.tempos = song(8).tempos
    for score in (*same, longer, doubled, other_tempo):
        assert hashed(score) == hashed(base)
    moved, transposed, shorter = song(3), song(3), song(3)
    moved.tracks[0].notes[5].time += 60
    transposed.tracks[0].notes[5].pitch += 1
    del shorter.tracks[0].notes[5]
    for score in (moved, transposed, shorter, song(4)):
        assert hashed(score) != hashed(base)


def test_seconds_follow_the_tempo_map() -> None:
    score = song(1)
    score.tempos.append(TempoTick(700, 33.0))
    score.tempos.append(TempoTick(2000, 200.0))
    ticks = score.tracks[0].notes.numpy()["time"].astype(np.int64)
    expected = score.to("second").tracks[0].notes.numpy()["time"]
    found = seconds_at(ticks, score.tempos.numpy(), score.ticks_per_quarter)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
