"""The corpus: real MIDI files, good and malformed, real worker processes, real kills."""

import csv
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic.core import NoteTick, ScoreTick, TempoTick, TimeSignatureTick, TrackTick

from smart import UserError
from smart.corpus import Corpus, Limits, Piece, ReaderPool, Reject, ShardWriter, Split, readers, shards
from smart.corpus.build import State, build, find_files, split_of
from smart.corpus.command import main
from smart.corpus.piece import PieceReader, content_hash, seconds_at
from smart.corpus.stats import measure
from smart.files import sha256
from smart.tokens import FILE_NAME, decode, encode, merge_piano, save_tokenizer, vocabulary

# --- Files --------------------------------------------------------------------------------------------------------


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


def reader(tokenizer: Any, **limits: Any) -> PieceReader:
    return PieceReader(tokenizer, Limits(**limits))


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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 12 pieces and one reject; copy it before changing it."""
    folder = tmp_path_factory.mktemp("small")
    write_songs(folder / "midi", range(12))
    (folder / "midi" / "bad.mid").write_bytes(b"")
    build([folder / "midi"], folder / "out")
    return folder / "out"


# --- One file -----------------------------------------------------------------------------------------------------


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


def test_all_instruments(tokenizer: Any, tmp_path: Path) -> None:
    """With programs in the vocabulary, bass and drums stay what they are, and count in the hash."""
    band = song(7)
    for program, is_drum in ((33, False), (0, True)):
        track = song(8 + program).tracks[0]
        track.program, track.is_drum = program, is_drum
        band.tracks.append(track)
    (tmp_path / "midi").mkdir()
    band.dump_midi(tmp_path / "midi" / "band.mid")
    song(7).dump_midi(tmp_path / "midi" / "piano.mid")
    for track in band.tracks[1:]:
        track.program += 1
    band.dump_midi(tmp_path / "midi" / "other band.mid")
    done = run("build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--instruments", "all")
    assert done.exit_code == 0, done.output
    corpus = Corpus(tmp_path / "out", verify=True)
    rows = {row["path"]: row for row in table(tmp_path / "out" / "pieces.csv")}
    assert rows.keys() == {"midi/band.mid", "midi/piano.mid", "midi/other band.mid"}
    for name, voices in (("band", [(0, False), (0, True), (33, False)]), ("piano", [(0, False)])):
        row = rows[f"midi/{name}.mid"]
        tokens = corpus.split(row["split"])[int(row["index"])]
        music = decode(corpus.tokenizer, tokens)
        assert sorted((track.program, track.is_drum) for track in music.tracks) == voices
        assert encode(corpus.tokenizer, music) == tokens.tolist()
        assert sum(len(track.notes) for track in music.tracks) == int(row["notes"])
    assert build([tmp_path / "midi"], tmp_path / "piano").counts == {"duplicate": 2, "kept": 1}


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


def test_split_shares() -> None:
    digests = np.random.default_rng(5).bytes(16 * 20_000)
    counts = Counter(split_of(digests[place : place + 16]) for place in range(0, len(digests), 16))
    assert counts["test"] / 20_000 == pytest.approx(0.10, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.09, abs=0.01)
    assert counts["train"] / 20_000 == pytest.approx(0.81, abs=0.01)


# --- A whole build --------------------------------------------------------------------------------------------------


def test_good_and_malformed_together(tokenizer: Any, tmp_path: Path) -> None:
    """All good files in, every bad one in the rejects with its reason, and every round trip exact."""
    folder, out = tmp_path / "midi", tmp_path / "out"
    write_songs(folder, range(30))
    for name, (data, _) in MALFORMED.items():
        (folder / f"{name}.mid").write_bytes(data)
    song(3, velocity=99).dump_midi(folder / "0" / "a twin.MIDI")  # of song 3, and before it by name
    (folder / "0" / "ignored.txt").write_bytes(GOOD)
    (folder / "broken link.mid").symlink_to(folder / "nowhere.mid")
    (folder / "loop.mid").symlink_to(folder / "loop.mid")
    (folder / "a folder.mid").mkdir()
    (folder / "a folder.mid" / "inside.mid").write_bytes(song(101).dumps_midi())
    (folder / 'new\nline, "and" more.mid').write_bytes(song(102).dumps_midi())
    os.mkfifo(folder / "pipe.mid")
    (folder / os.fsdecode(b"caf\xe9.mid")).write_bytes(song(100).dumps_midi())  # a name that is no UTF-8

    summary = build([folder], out, workers=2)

    rejects = {row["path"]: row["reason"] for row in table(out / "rejects.csv")}
    expected = {f"midi/{name}.mid": reason for name, (_, reason) in MALFORMED.items()}
    expected |= {"midi/0/song 003.mid": "duplicate"}
    unreadable = ("broken link", "loop", "pipe", "a folder")
    expected |= {f"midi/{name}.mid": "cannot be read" for name in unreadable}
    assert rejects == expected
    assert summary.counts == dict(Counter([*expected.values(), *["kept"] * 33]))
    twin = next(row for row in table(out / "rejects.csv") if row["reason"] == "duplicate")
    assert twin["detail"] == "of midi/0/a twin.MIDI"

    corpus = Corpus(out, verify=True)
    pieces = table(out / "pieces.csv")
    odd = {"midi/caf\\xe9.mid", "midi/a folder.mid/inside.mid", 'midi/new\nline, "and" more.mid'}
    assert len(pieces) == 33 and odd < {row["path"] for row in pieces}
    assert sum(len(corpus.split(name)) for name in shards.SPLITS) == 33
    assert not (out / ".work").exists()
    for row in pieces:
        assert row["split"] == split_of(bytes.fromhex(row["hash"]))
        assert row["shard"] == "0"  # so that the index in the shard is the index in the split
        tokens = corpus.split(row["split"])[int(row["index"])]
        assert len(tokens) == int(row["tokens"])
        assert encode(corpus.tokenizer, decode(corpus.tokenizer, tokens)) == tokens.tolist()


def test_result_does_not_depend_on_workers_or_earlier_runs(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(12))
    for name, workers in (("one", 1), ("two", 2)):
        build([tmp_path / "midi"], tmp_path / name, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    build([tmp_path / "midi"], tmp_path / "one", overwrite=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_splits_are_stable_when_files_are_added(tmp_path: Path) -> None:
    def splits(out: Path) -> dict[str, str]:
        return {row["hash"]: row["split"] for row in table(out / "pieces.csv")}

    write_songs(tmp_path / "midi", range(25))
    build([tmp_path / "midi"], tmp_path / "before")
    write_songs(tmp_path / "midi", range(25, 60))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"")
    build([tmp_path / "midi"], tmp_path / "after")
    before, after = splits(tmp_path / "before"), splits(tmp_path / "after")
    assert len(before) == 25 and len(after) == 60
    assert before.items() <= after.items()
    assert len(set(after.values())) == 3


def test_no_piece_is_in_two_splits_whatever_its_file(tmp_path: Path) -> None:
    """The same music under many names, divisions, programs and velocities is one piece."""
    folder = tmp_path / "midi"
    folder.mkdir()
    for seed in range(6):
        for number, division in enumerate((96, 480, 960)):
            twin = song(seed, division=division, program=number, velocity=10 + number)
            twin.dump_midi(folder / f"{number}-{seed}.mid")
    summary = build([folder], tmp_path / "out", workers=2)
    assert summary.counts == {"duplicate": 12, "kept": 6}
    assert {row["path"] for row in table(tmp_path / "out" / "pieces.csv")} == {f"midi/0-{n}.mid" for n in range(6)}


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


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Python code to run in every worker before it reads a file: faults that no known file provokes any more."""

    def install(body: str) -> None:
        monkeypatch.setattr(readers, "PROGRAM", HOOK.format(body=body) + program)

    program = readers.PROGRAM
    return install


def test_killed_and_continued_is_bit_identical(tmp_path: Path, hook: Any) -> None:
    """SIGKILL in the middle, then Ctrl-C; workers die with the build; the result is that of one go."""
    write_songs(tmp_path / "midi", range(40))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"")
    build([tmp_path / "midi"], tmp_path / "whole")
    hook("time.sleep(0.03)")
    code = "from smart.corpus import build, command, readers; build.COMMIT_SECONDS = 0.1; "
    command = [sys.executable, "-c", code + f"readers.PROGRAM = {readers.PROGRAM!r}; command.main()"]
    command += ["build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--workers", "2"]
    reached = [0]
    for blow in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        spool = tmp_path / "out" / ".work" / "spool.bin"
        while process.poll() is None and not (spool.exists() and spool.stat().st_size > reached[-1] + 1000):
            time.sleep(0.02)
        children = _children(process.pid)
        process.send_signal(blow)
        _, said = process.communicate()
        assert process.returncode == (1 if blow == signal.SIGINT else -signal.SIGKILL), "it was done too soon"
        assert (b"interrupted; the same command goes on" in said) == (blow == signal.SIGINT)
        assert children
        _wait_until_gone(children)
        with pytest.raises(UserError, match="unfinished"):
            Corpus(tmp_path / "out")
        reached.append(spool.stat().st_size)
    assert reached[1] < reached[2]
    hook("pass")
    summary = build([tmp_path / "midi"], tmp_path / "out", workers=2)
    assert 0 < summary.read < 41, "it began from the start"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 10
    while alive := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < end, f"workers {alive} outlive their build"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("while True: pass", "time limit", "over 2 s"),
        ("import ctypes; ctypes.string_at(0)", "crash", "died of signal 11"),
        ("os._exit(3)", "crash", "ended with exit status 3"),
        ("hold = [bytes(1 << 20) for _ in range(200)]", "memory limit", "over 100 MB"),
        ("raise SystemError('a bug')", "cannot be tokenised", "SystemError: a bug"),
    ],
)
def test_a_worker_that_dies_costs_one_file(tmp_path: Path, hook: Any, fault: str, reason: str, detail: str) -> None:
    write_songs(tmp_path / "midi", range(10))
    victim = song(4).dumps_midi()
    hook(f"""
    if data == {bytes(victim)!r}:
        {fault}""")
    summary = build([tmp_path / "midi"], tmp_path / "out", limits=Limits(seconds=2.0, megabytes=100))
    assert summary.counts == {"kept": 9, reason: 1}
    (row,) = table(tmp_path / "out" / "rejects.csv")
    assert row["path"] == "midi/1/song 004.mid" and detail in row["detail"]


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """A file with bytes changed, removed, repeated or put in, or nothing but a header and noise."""
    out, at = bytearray(data), int(random.integers(len(data)))
    noise = random.integers(0, 256, random.integers(1, 60), np.uint8).tobytes()
    match random.integers(6):
        case 0:
            for place in random.integers(0, len(data), random.integers(1, 8)):
                out[place] ^= 1 << random.integers(8)
        case 1:
            out[at : at + len(noise)] = noise
        case 2:
            del out[at : at + len(noise)]
        case 3:
            out[at:at] = out[at : at + 100] * 3
        case 4:
            out[at : at + 4] = b"\xff\xff\xff\x7f"  # the longest time, or length
        case 5:
            return data[:14] + noise
    return bytes(out)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_file_is_read_or_rejected_for_what_it_is(tokenizer: Any, tmp_path_factory: Any, seed: int) -> None:
    """No damage crashes, hangs or swells a worker, or gets as far as a bug."""
    random, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("damaged")
    save_tokenizer(tokenizer, folder)
    good, bad = [bytes(song(number).dumps_midi()) for number in range(5)], [data for data, _ in MALFORMED.values()]
    tasks = []
    for number in range(200):
        path = folder / f"{number}.mid"
        sources = bad if number % 2 else good
        path.write_bytes(damaged(sources[random.integers(len(sources))] or GOOD, random))
        tasks.append((str(number).encode(), str(path).encode()))
    with ReaderPool(folder / FILE_NAME, Limits(), 1) as pool:
        answers = dict(pool.answers(iter(tasks)))
    assert len(answers) == len(tasks)
    reasons = Counter("kept" if isinstance(answer, Piece) else answer[0] for answer in answers.values())
    assert reasons["kept"] and len(reasons) > 3
    assert not reasons.keys() & {"crash", "time limit", "memory limit", "cannot be tokenised"}, reasons


def test_a_worker_killed_from_outside_costs_nothing(tmp_path: Path, hook: Any) -> None:
    """The first worker to read a certain file is killed there; the file is read again by another."""
    write_songs(tmp_path / "midi", range(10))
    mark = tmp_path / "mark"
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        os.kill(os.getpid(), 9)""")
    assert build([tmp_path / "midi"], tmp_path / "out").counts == {"kept": 10}
    assert mark.exists()


@pytest.mark.parametrize("seeds", [range(10), [4]])
def test_a_worker_killed_within_an_answer_costs_nothing(tmp_path: Path, hook: Any, seeds: Sequence[int]) -> None:
    """Its answer ends half way; the file is read again, and those that waited behind it, if any."""
    write_songs(tmp_path / "midi", seeds)
    mark = tmp_path / "mark"
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        from smart import workers
        def half(connection, *rest):
            connection.sendall(bytes(10))
            os.kill(os.getpid(), 9)
        workers._send = half""")
    assert build([tmp_path / "midi"], tmp_path / "out").counts == {"kept": len(seeds)}
    assert mark.exists()


def test_a_pause_costs_no_file(tmp_path: Path, hook: Any) -> None:
    """A worker stands still, once, for longer than the limit on a file."""
    write_songs(tmp_path / "midi", range(10))
    mark = tmp_path / "mark"
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        import subprocess
        subprocess.Popen(["sh", "-c", f"kill -STOP {{os.getpid()}}; sleep 1.5; kill -CONT {{os.getpid()}}"])
        time.sleep(0.2)""")
    assert build([tmp_path / "midi"], tmp_path / "out", limits=Limits(seconds=1.0)).counts == {"kept": 10}
    assert mark.exists()


def test_workers_that_cannot_start_stop_the_build(tmp_path: Path, monkeypatch: Any) -> None:
    write_songs(tmp_path / "midi", range(2))
    monkeypatch.setattr(readers, "PROGRAM", "os._exit(5)")
    with pytest.raises(RuntimeError, match="MIDI workers do not start: it ended with exit status 5"):
        build([tmp_path / "midi"], tmp_path / "out")


def test_workers_are_replaced_after_a_while(tmp_path: Path, monkeypatch: Any) -> None:
    write_songs(tmp_path / "midi", range(10))
    monkeypatch.setattr(readers, "SERVES", 4)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=2).counts == {"kept": 10}


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The build's own peak for 30 pieces and for 400 differ by little, and so does the reader's."""
    peaks = {}
    for count in (30, 400):
        folder = tmp_path / f"midi{count}"
        folder.mkdir()
        for seed in range(count):
            song(seed, bars=20).dump_midi(folder / f"{seed}.mid")
        code = (
            "import resource, sys; from pathlib import Path; from smart.corpus.build import build\n"
            "build([Path(sys.argv[1])], Path(sys.argv[2]))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "
            "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / f"out{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = [int(value) / 1024 for value in done.stdout.split()]
    for few, many in zip(peaks[30], peaks[400], strict=True):
        assert many < few + 15, f"MiB at 30 and 400 pieces: {peaks}"


# --- Mistakes -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_commands(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(20))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"")
    done = run("build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--workers", "1")
    assert done.exit_code == 0, done.output
    assert "kept" in done.output and "empty file" in done.output and "files/s" in done.output
    done = run("stats", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 0, done.output
    assert "tokens a piece" in done.output and "3/4" in done.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_count_what_is_there(small: Path, tokenizer: Any) -> None:
    corpus = Corpus(small)
    pieces = [corpus.split(name)[index] for name in shards.SPLITS for index in range(len(corpus.split(name)))]
    stats = measure(corpus)
    assert stats.tokens_per_piece.tolist() == [len(piece) for piece in pieces]
    np.testing.assert_array_equal(stats.vocabulary_counts, np.bincount(np.concatenate(pieces), minlength=413))
    per_bar: Counter[int] = Counter()
    facts = vocabulary(tokenizer)
    for piece in pieces:
        for line in np.split(piece, np.flatnonzero(piece == facts.bar_id))[1:]:
            per_bar[int(np.isin(line, facts.pitch_ids).sum())] += 1
    assert {number: count for number, count in enumerate(stats.notes_per_bar.tolist()) if count} == dict(per_bar)


def test_include_and_list(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    write_songs(folder, range(9))

    def found(*include: str, listed: set[str] | None = None) -> list[str]:
        keys = find_files([folder], include, None if listed is None else frozenset(listed))
        return sorted(os.fsdecode(key).removeprefix("midi/") for key in keys)

    zeros, two = ["0/song 000.mid", "0/song 003.mid", "0/song 006.mid"], {"midi/0/song 000.mid", "midi/1/song 001.mid"}
    assert len(found()) == 9
    assert found("midi/0/*") == zeros
    assert found("midi/0/*", "*song 004*") == [*zeros, "1/song 004.mid"]
    assert found(listed={*two, "midi/none.mid"}) == ["0/song 000.mid", "1/song 001.mid"]
    assert found("midi/1/*", listed=two) == ["1/song 001.mid"]


def test_options_reach_the_build(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(6))
    (tmp_path / "list.txt").write_text("midi/0/song 000.mid\nmidi/1/song 001.mid\nmidi/2/song 002.mid\n")
    arguments = ["--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--max-bar-notes", "3"]
    done = run("build", *arguments, "--list", str(tmp_path / "list.txt"), "--include", "*.mid", "--workers", "1")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    in_three = sum(song(seed).time_signatures[0].numerator == 3 for seed in range(3))
    assert manifest["counts"] == {"kept": in_three, "too many notes in a bar": 3 - in_three}
    assert manifest["settings"]["limits"]["max_bar_notes"] == 3


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    midi_folder, out = tmp_path / "midi", tmp_path / "out"
    write_songs(midi_folder, range(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.mid").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not lose this")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "training.txt").write_text("nor this")
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "midi").mkdir(parents=True)
    build([midi_folder], tmp_path / "done")
    good = ["--midi", str(midi_folder)]
    cases = [
        (["--midi", str(tmp_path / "none"), "--out", str(out)], "no such folder"),
        (["--midi", str(tmp_path / "empty"), "--out", str(out)], "no .mid or .midi file"),
        (["--midi", str(tmp_path / "bad"), "--out", str(out), "--overwrite"], "no file can be kept (1 empty file)"),
        ([*good, "--midi", str(tmp_path / "other" / "midi"), "--out", str(out)], "same name"),
        ([*good, "--out", str(tmp_path / "done")], "finished corpus"),
        ([*good, "--out", str(tmp_path / "mine")], "'thesis.tex', which no build wrote"),
        ([*good, "--out", str(tmp_path / "mine"), "--overwrite"], "'thesis.tex', which no build wrote"),
        ([*good, "--out", str(tmp_path / "diary"), "--overwrite"], "'training.txt', which no build wrote"),
        ([*good, "--out", str(tmp_path / "file")], "is not a folder"),
        ([*good, "--out", str(out), "--tokenizer", str(tmp_path / "file")], "cannot be read"),
        ([*good, "--out", str(out), "--list", str(tmp_path / "none")], "cannot be read"),
        ([*good, "--out", str(out), "--workers", "0"], "0 is not in the range"),
    ]
    for arguments, message in cases:
        done = run("build", *arguments)
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        lines = [line for line in done.output.splitlines() if line.startswith("Error")]
        assert len(lines) == 1 and message in lines[0], (arguments, done.output)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "do not lose this"


def test_other_settings_do_not_continue_a_build(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(3))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.mid").write_bytes(b"")
    with pytest.raises(UserError, match="no file can be kept"):
        build([tmp_path / "bad"], tmp_path / "out")
    with pytest.raises(UserError, match="begun with other settings"):
        build([tmp_path / "midi"], tmp_path / "out")
    assert build([tmp_path / "midi"], tmp_path / "out", overwrite=True).counts == {"kept": 3}


@pytest.mark.parametrize("limit", [0, 3000, 9000])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file, below that of the table of what has been read, or of the tokenizer."""
    write_songs(tmp_path / "midi", range(12))
    words = [sys.executable, "-m", "smart.corpus", "build", "--midi", tmp_path / "midi", "--out", tmp_path / "out"]
    done = subprocess.run(
        words,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("; the same command goes on from here\n")
    assert not (tmp_path / "out" / "manifest.json").exists()
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert len(Corpus(tmp_path / "out").split("train")) > 0


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(3))
    state = State(tmp_path / "out" / ".work")
    with pytest.raises(UserError, match="another build is writing it"):
        build([tmp_path / "midi"], tmp_path / "out")
    (tmp_path / "out" / "train-00000.bin.tmp").write_bytes(b"its")
    with pytest.raises(UserError, match="another build is writing it"):
        build([tmp_path / "midi"], tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == [
        ".work", "spool.bin", "state.sqlite", "train-00000.bin.tmp"
    ]  # fmt: skip
    state.close()
    assert build([tmp_path / "midi"], tmp_path / "out", overwrite=True).counts == {"kept": 3}


@pytest.mark.parametrize("name", ["state.sqlite", "spool.bin"])
def test_damaged_state_says_so(tmp_path: Path, name: str) -> None:
    write_songs(tmp_path / "midi", range(3))
    state = State(tmp_path / "out" / ".work")
    state.spool.write(bytes(1000))
    state.end = 1000
    state.commit()
    state.close()
    (tmp_path / "out" / ".work" / name).write_bytes(b"x" * 500)
    with pytest.raises(UserError, match="damaged; start again with --overwrite"):
        build([tmp_path / "midi"], tmp_path / "out")


def test_damage_within_the_state_is_one_line(tmp_path: Path) -> None:
    """All but its first page, which says what it is."""
    write_songs(tmp_path / "midi", range(3))
    for number in range(2000):
        (tmp_path / "midi" / f"{number}.mid").touch()
    state = State(tmp_path / "out" / ".work")
    state.list_files(find_files([tmp_path / "midi"]))
    state.close()
    path = tmp_path / "out" / ".work" / "state.sqlite"
    data = path.read_bytes()
    assert len(data) > 10 * 4096
    path.write_bytes(data[:4096] + b"x" * (len(data) - 4096))
    done = run("build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--workers", "1")
    assert done.exit_code == 2 and done.output.count("\n") == 1, (done.output, done.exception)
    assert "is damaged" in done.output and "start again with --overwrite" in done.output


def test_killed_after_the_manifest_or_with_old_shards_about(tmp_path: Path, small: Path, monkeypatch: Any) -> None:
    """What a kill leaves at the very end, and shards of files that have gone since, disturb no later run."""
    folder = small.parent / "midi"
    shutil.copytree(small, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([folder], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "manifest.json").exists() and (tmp_path / "out" / ".work").exists()
    for name in ("train-00007.bin", "train-00007.idx.npy", "test-00003.bin.tmp"):
        (tmp_path / "out" / name).write_bytes(b"old")
    assert build([folder], tmp_path / "out").read == 0
    assert contents(tmp_path / "out") == contents(small)


def test_killed_at_the_very_end_the_rest_is_cleared_away(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path / "out")
    (tmp_path / "out" / ".work.tmp").mkdir()
    (tmp_path / "out" / ".work.tmp" / "spool.bin").touch()
    with pytest.raises(UserError, match="holds a finished corpus"):
        build([small.parent / "midi"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small) and not (tmp_path / "out" / ".work.tmp").exists()


def test_files_that_are_gone_are_forgotten(tmp_path: Path, hook: Any) -> None:
    """A build that goes on after files were removed and added is that of the files that are there."""
    write_songs(tmp_path / "midi", range(6))
    state = State(tmp_path / "out" / ".work")
    state.list_files(find_files([tmp_path / "midi"]))
    state.record(b"midi/0/song 000.mid", ("crash", "of an earlier run"))
    state.commit()
    state.close()
    (tmp_path / "midi" / "0" / "song 000.mid").unlink()
    write_songs(tmp_path / "midi", [6])
    assert build([tmp_path / "midi"], tmp_path / "out").counts == {"kept": 6}


# --- Shards -------------------------------------------------------------------------------------------------------


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pieces = [random.integers(0, 413, random.integers(1, 50)).astype("<u2") for _ in range(100)]
    writer = ShardWriter(tmp_path, "train", shard_tokens=200)
    places = [writer.add(piece.tobytes()) for piece in pieces]
    listed = writer.close()
    assert len(listed) > 5 and places[0] == (0, 0) and places[-1][0] == len(listed) - 1
    assert all(shard["tokens"] <= 200 for shard in listed)
    split = Split(tmp_path, listed)
    assert len(split) == 100 and split.tokens == sum(map(len, pieces))
    assert split.lengths().tolist() == [len(piece) for piece in pieces]
    for index in (*range(100), -1, -100):
        np.testing.assert_array_equal(split[index], pieces[index])
    assert [len(piece) for piece in split[10:13]] == [len(piece) for piece in pieces[10:13]]
    for index in (100, -101):
        with pytest.raises(IndexError):
            split[index]
    assert split[0].dtype == np.uint16 and not split[0].flags.writeable and not split[0].flags.owndata
    assert not list(tmp_path.glob("*.tmp"))


def test_a_piece_longer_than_a_shard_has_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "test", shard_tokens=10)
    for size in (4, 30, 4):
        writer.add(bytes(2 * size))
    assert [shard["tokens"] for shard in writer.close()] == [4, 30, 4]


def test_empty_splits_are_empty(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    folder.mkdir()
    song(0).dump_midi(folder / "only.mid")
    build([folder], tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    sizes = {name: len(corpus.split(name)) for name in shards.SPLITS}
    assert sorted(sizes.values()) == [0, 0, 1]
    empty = corpus.split(min(sizes, key=lambda name: sizes[name]))
    assert empty.tokens == 0 and empty.lengths().tolist() == [] and list(empty) == []
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        corpus.split("training")


def _spoil(name: str, change: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = next(folder.glob(name))
        data = bytearray(path.read_bytes())
        path.write_bytes(change(data))

    return spoil


def _flip(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 1
    return data


def _forge(change: Any) -> Any:
    """Change a shard's entry in the manifest, or its index, and have the manifest's hash agree."""

    def forge(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        shard = manifest["splits"]["train"]["shards"][0]
        index = folder / f"{shard['name']}.idx.npy"
        change(shard, index)
        shard["index_sha256"] = sha256(index)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return forge


def _flood(tokens: Path, shard: dict[str, Any]) -> None:
    tokens.write_bytes(b"\xff" * tokens.stat().st_size)
    shard["sha256"] = sha256(tokens)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "unfinished or no corpus"),
        (_spoil("manifest.json", lambda data: data[:100]), "cannot be read"),
        (_spoil("manifest.json", lambda data: b"[]"), "cannot be read"),
        (_spoil("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 99')), "of format 99"),
        (lambda folder: next(folder.glob("train*.bin")).unlink(), "is missing"),
        (_spoil("train*.bin", lambda data: data[:-2]), "bytes, expected"),
        (_spoil("train*.bin", _flip), "not what was written"),
        (_spoil("train*.npy", _flip), "not what was written"),
        (_spoil("tokenizer/tokenizer.json", _flip), "not the one that wrote the tokens"),
        (_forge(lambda shard, file: shard.update(name="/elsewhere/train-00000")), "is no name of a shard"),
        (_forge(lambda shard, file: shard.update(name="../out/train-00000")), "is no name of a shard"),
        (_forge(lambda shard, file: shard.update(pieces=shard["pieces"] + 1)), "does not divide"),
        (_forge(lambda shard, file: shard.update(pieces=0)), "train-00000 is empty"),
        (_forge(lambda shard, file: file.write_bytes(b"junk" * 100)), "train-00000.idx.npy cannot be read"),
        (_forge(lambda shard, file: file.write_bytes(b"")), "train-00000.idx.npy cannot be read"),
        (_forge(lambda shard, file: file.write_bytes(pickle.dumps([1]))), "train-00000.idx.npy cannot be read"),
        (_forge(lambda shard, file: np.save(file, np.load(file)[::-1].copy())), "does not divide"),
        (_forge(lambda shard, file: np.save(file, np.load(file).astype(float))), "does not divide"),
        (_forge(lambda shard, file: file.rename(file.parents[1] / "x") and file.symlink_to("../x")), "leaves the fol"),
        (_forge(lambda shard, file: _flood(file.parent / "train-00000.bin", shard)), "holds token 65535"),
    ],
)
def test_damaged_corpora_are_refused(small: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    shutil.copytree(small, tmp_path / "out")
    Corpus(tmp_path / "out", verify=True)
    spoil(tmp_path / "out")
    with pytest.raises(UserError, match=message) as raised:
        Corpus(tmp_path / "out", verify=True)
    assert "\n" not in str(raised.value) and "smart corpus build" in str(raised.value)


def test_no_corpus_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Corpus(tmp_path / "none")
    with pytest.raises(UserError, match="unfinished or no corpus"):
        Corpus(tmp_path)


# --- Workers that stand still or answer nonsense ------------------------------------------------------------------


def test_a_worker_that_never_gets_ready_is_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    write_songs(tmp_path / "midi", range(4))
    mark = tmp_path / "mark"
    hang = f"os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w').close(), os.kill(os.getpid(), signal.SIGSTOP))"
    monkeypatch.setattr(readers, "PROGRAM", hang + readers.PROGRAM)
    monkeypatch.setattr(readers, "START", 3.0)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 4}
    assert mark.exists()


@pytest.mark.parametrize(
    "answer",
    [
        "connection.sendall(header(number, 2, 0)), os.kill(os.getpid(), signal.SIGSTOP)",
        "send(connection, number, *rest), send(connection, number, *rest)",
        "connection.sendall(b'nonsense' * 10)",
        "connection.sendall(header(number, 2, 0) + b'[]')",
        "connection.sendall(header(number, 2, 2**40) + b'{}')",  # more than any piece has
        "connection.sendall(header(number, 2**30, 0))",
        "send(connection, number + 1, *rest)",
        "send(connection, number, {})",
        "send(connection, number, {'reason': 5, 'detail': ''})",
        "send(connection, number, {'reason': chr(0xd800), 'detail': ''})",
        "send(connection, number, {**rest[0], 'digest': 'x' * 32}, rest[1])",
        "send(connection, number, {**rest[0], 'notes': 10**30}, rest[1])",
        "send(connection, number, {**rest[0], 'seconds': float('nan')}, rest[1])",
        "send(connection, number, {'error': 'a bug'})",
    ],
)
def test_a_worker_that_answers_nonsense_costs_nothing(tmp_path: Path, hook: Any, monkeypatch: Any, answer: str) -> None:
    """Once, at a certain file: it stops within its answer, answers twice, or something else."""
    write_songs(tmp_path / "midi", range(10))
    build([tmp_path / "midi"], tmp_path / "whole")
    mark = tmp_path / "mark"
    answer_once(hook, mark, answer)
    monkeypatch.setattr(readers, "GRACE", 1.0)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 10}
    assert mark.exists() and contents(tmp_path / "out") == contents(tmp_path / "whole")


def answer_once(hook: Any, mark: Path, answer: str) -> None:
    """Have the first worker that reads song 4 make the file ``mark`` and do ``answer`` in place of its own answer."""
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        from smart import workers
        header, send = workers._HEADER.pack, workers._send
        def wrong(connection, number, *rest):
            workers._send = send
            {answer}
        workers._send = wrong""")


class Opener:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "answer",
    [
        "connection.sendall({crafted!r})",
        "connection.sendall(len({crafted!r}).to_bytes(4, 'big') + {crafted!r})",  # as multiprocessing frames it
        "connection.sendall(header(number, len({crafted!r}), 0) + {crafted!r})",
        "connection.sendall(header(number, 2, len({crafted!r})) + b'{{}}' + {crafted!r})",
        "send(connection, number, {{'reason': {crafted!r}.decode('latin-1'), 'detail': 7}})",
    ],
)
def test_nothing_that_a_worker_answers_is_unpickled(tmp_path: Path, hook: Any, monkeypatch: Any, answer: str) -> None:
    crafted, made, mark = pickle.dumps(Opener(tmp_path / "made"), 0), tmp_path / "made", tmp_path / "mark"
    pickle.loads(crafted).close()
    made.unlink()
    write_songs(tmp_path / "midi", range(6))
    answer_once(hook, mark, answer.format(crafted=crafted))
    monkeypatch.setattr(readers, "GRACE", 1.0)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 6}
    assert mark.exists() and not made.exists()


def test_a_worker_that_twice_answers_nonsense_costs_its_file(tmp_path: Path, hook: Any) -> None:
    write_songs(tmp_path / "midi", range(6))
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r}:
        from smart import workers
        workers._send = lambda connection, *_: connection.sendall(b'nonsense' * 10)""")
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 5, "crash": 1}
    (row,) = table(tmp_path / "out" / "rejects.csv")
    assert row["path"] == "midi/1/song 004.mid" and "a garbled answer" in row["detail"]


def test_a_stopped_worker_dies_with_its_parent(tmp_path: Path, tokenizer: Any) -> None:
    save_tokenizer(tokenizer, tmp_path)
    code = f"""
import os, signal, time
from pathlib import Path
from smart.corpus import Limits, ReaderPool
pool = ReaderPool(Path({str(tmp_path / FILE_NAME)!r}), Limits(), 1)
(worker,) = pool.workers
worker.receive(60)
os.kill(worker.process.pid, signal.SIGSTOP)
print(worker.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        _wait_until_gone([pid])
