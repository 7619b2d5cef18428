"""Notes to audio: timing, purity, and a pool whose workers are really killed, stopped and starved."""

import gc
import hashlib
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import symusic
from hypothesis import given, settings
from hypothesis import strategies as st

from smart import Failure, UserError
from smart.render import (
    NOTE_COLUMNS,
    RenderError,
    RenderPool,
    check_notes,
    load_soundfont,
    render_notes,
    score_notes,
    soundfonts,
)
from smart.render import pool as pool_file

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


@pytest.fixture(scope="module")
def piano() -> Any:
    return load_soundfont("timgm")


@pytest.fixture(scope="module")
def sine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soundfonts") / "sine.sf2"
    path.write_bytes(tiny_soundfont())
    return path


@pytest.fixture(scope="module")
def sine(sine_file: Path) -> Any:
    return load_soundfont(sine_file)


@pytest.fixture(scope="module")
def pool() -> Iterator[RenderPool]:
    with RenderPool("timgm", workers=2) as shared:
        yield shared


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie (nobody may be there to reap an orphan)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def busy(pid: int) -> bool:
    """Whether a process is on a processor, or wants to be."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"


# One clip ---------------------------------------------------------------------------------------------------


def test_an_empty_clip_is_one_second_of_silence(piano: Any) -> None:
    for empty in (np.empty((0, 6)), np.empty(0), notes((0, 1, 60, 0))):
        audio = render_notes(piano, empty)
        assert audio.shape == (2, RATE) and audio.dtype == np.float32 and not audio.any()
    assert render_notes(piano, np.empty((0, 6)), seconds=0.25).shape == (2, RATE // 4)


def test_a_clip_ends_with_its_last_note_or_at_the_cut(piano: Any) -> None:
    assert render_notes(piano, notes((0, 1.5, 60), (0.5, 0.25, 72))).shape == (2, RATE * 3 // 2)
    assert render_notes(piano, notes((0, 30, 60))).shape == (2, 10 * RATE)
    assert render_notes(piano, notes((0, 30, 60)), sample_rate=16000, seconds=2.5).shape == (2, 40000)
    # what lies behind the cut still makes the clip longer than what is heard
    late = render_notes(piano, notes((0, 1, 60), (12, 1, 60)))
    assert late.shape == (2, 10 * RATE) and late[:, :RATE].any()
    assert not render_notes(piano, notes((12, 1, 60))).any()
    assert render_notes(piano, notes((12, 1, 60))).shape == (2, 10 * RATE)


def test_the_cut_changes_nothing_before_it_but_the_scale(piano: Any) -> None:
    whole, cut = (render_notes(piano, random_notes(1, length=4.0), seconds=s) for s in (10.0, 2.0))
    assert cut.shape == (2, 2 * RATE)
    scale = np.abs(whole[:, : 2 * RATE]).max()
    np.testing.assert_allclose(cut * scale, whole[:, : 2 * RATE], atol=2e-5)  # the 1e-6 beside the peak


def test_peak_is_one_over_both_channels(piano: Any) -> None:
    for velocity in (1, 20, 127):
        audio = render_notes(piano, notes((0, 1, 40, velocity)))
        assert 0.98 < np.abs(audio).max() <= 1.0
    audio = render_notes(piano, notes((0, 1, 30), (0, 1, 40)))
    left, right = np.abs(audio).max(axis=1)
    assert left != right  # one factor for both, or the stereo image would move


def test_an_onset_is_exact_to_the_sample(piano: Any) -> None:
    first = render_notes(piano, notes((0, 0.5, 60)))
    for offset in (1, 63, 64, 1000, 44100):
        audio = render_notes(piano, notes((offset / RATE, 0.5, 60)))
        assert not audio[:, :offset].any()
        np.testing.assert_array_equal(audio[:, offset:], first)


def test_the_end_of_a_note_is_exact_to_the_sample(piano: Any) -> None:
    short, long = (render_notes(piano, notes((0, d, 60), (0, 2, 90, 1))) for d in (0.5, 1.0))
    off = RATE // 2
    scale = np.abs(long[:, :off]).max() / np.abs(short[:, :off]).max()
    np.testing.assert_allclose(short[:, :off] * scale, long[:, :off], atol=1e-6)
    after = slice(off + 2000, off + 4000)
    assert np.abs(short[:, after]).max() < 0.9 * np.abs(long[:, after]).max()


def test_frequency_and_loudness_follow_pitch_and_velocity(sine: Any) -> None:
    for rate, pitch, hertz in (
        (44100, 69, 441.0),
        (44100, 81, 882.0),
        (22050, 57, 220.5),
        (48000, 76, 660.75),
    ):
        audio = render_notes(sine, notes((0, 2, pitch)), sample_rate=rate)[0]
        spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
        assert np.argmax(spectrum) / 2 == pytest.approx(hertz, abs=0.5)
    audio = render_notes(sine, notes((0, 0.5, 69, 127), (1, 0.5, 69, 32)))[0]
    loud, soft = np.abs(audio[2000:20000]).max(), np.abs(audio[RATE + 2000 : RATE + 20000]).max()
    assert soft / loud == pytest.approx(32 / 127, rel=1e-3)


def test_notes_add_up(sine: Any) -> None:
    both, low, high = (
        render_notes(sine, rows) for rows in (notes((0, 1, 60), (0, 1, 67)), notes((0, 1, 60)), notes((0, 1, 67)))
    )
    parts = np.stack([low.ravel(), high.ravel()], axis=1).astype(np.float64)
    weights, *_ = np.linalg.lstsq(parts, both.ravel(), rcond=None)
    np.testing.assert_allclose(parts @ weights, both.ravel(), atol=1e-5)
    assert weights == pytest.approx([weights.mean()] * 2, rel=1e-3)


def test_a_pitch_that_begins_again_is_not_silenced_by_the_end_of_the_earlier_note(piano: Any) -> None:
    overlapping = render_notes(piano, notes((0, 2, 60), (1, 2, 60)))
    np.testing.assert_array_equal(overlapping, render_notes(piano, notes((0, 1, 60), (1, 2, 60))))
    stopped = render_notes(piano, notes((0, 1, 60), (1, 1, 60), (0, 3, 108, 1)))
    tail = slice(int(2.5 * RATE), 3 * RATE)
    assert np.abs(overlapping[:, tail]).max() > 10 * np.abs(stopped[:, tail]).max()
    # inside a longer note: the clip ends with the last end that is played
    assert render_notes(piano, notes((0, 5, 60), (1, 0.5, 60))).shape == (2, int(1.5 * RATE))
    # another instrument is another channel
    other = render_notes(piano, notes((0, 2, 60), (1, 2, 60, 100, 24)))
    assert not np.array_equal(other, render_notes(piano, notes((0, 1, 60), (1, 2, 60, 100, 24))))


def test_equal_notes_that_begin_together_are_one(piano: Any) -> None:
    merged = render_notes(piano, notes((0, 2, 60, 90)))
    np.testing.assert_array_equal(render_notes(piano, notes((0, 2, 60, 40), (0, 1, 60, 90))), merged)


def test_a_note_that_follows_at_once_is_heard(piano: Any) -> None:
    audio = render_notes(piano, notes((0, 0.5, 60), (0.5, 0.5, 60)))
    before, after = audio[:, RATE // 2 - 1000 : RATE // 2], audio[:, RATE // 2 + 1000 : RATE // 2 + 3000]
    assert np.abs(after).max() > 1.5 * np.abs(before).max()


def test_the_shortest_note_is_one_sample(piano: Any) -> None:
    assert render_notes(piano, notes((0, 0, 60))).shape == (2, 1)
    assert render_notes(piano, notes((0, 0, 60), (1, 0, 62))).shape == (2, RATE + 1)


def test_programs_and_drums_are_audible_and_different(piano: Any) -> None:
    sounds = [
        render_notes(piano, notes((0, 0.5, 60, 100, program, drum)))
        for program, drum in ((0, 0), (4, 0), (24, 0), (48, 0), (73, 0), (0, 1))
    ]
    for index, sound in enumerate(sounds):
        assert np.abs(sound[:, 2000:]).max() > 0.01
        assert all(np.abs(sound - other).max() > 0.1 for other in sounds[:index])
    mixed = render_notes(piano, notes((0, 0.5, 60, 100, 0), (0, 0.5, 60, 100, 73), (0, 0.5, 60, 100, 0, 1)))
    assert not any(np.allclose(mixed, sound, atol=1e-3) for sound in sounds)
    all_programs = notes(*((p * 0.01, 0.1, 60, 100, p, d) for p in range(128) for d in (0, 1)))
    assert np.abs(render_notes(piano, all_programs)).max() > 0.98


def test_what_a_soundfont_lacks(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    rows = notes((0, 0.5, 60))
    program, drums = notes((0, 0.5, 60, 100, 5)), notes((0, 0.5, 60, 100, 5, 1))
    path.write_bytes(tiny_soundfont(((0, 0), (0, 7))))
    np.testing.assert_array_equal(render_notes(path, program), render_notes(path, rows))
    assert not render_notes(path, drums).any() and render_notes(path, drums).shape == (2, RATE // 2)
    path.write_bytes(tiny_soundfont(((128, 0), (0, 9))))
    assert render_notes(path, drums).any()  # kit 0 stands in for kit 5
    assert render_notes(path, program).any()  # no program 0: the first preset


ROW = st.tuples(
    st.floats(0, 1.0),
    st.floats(0, 1.0),
    st.integers(0, 127),
    st.integers(0, 127),
    st.sampled_from([0, 5, 127]),
    st.integers(0, 1),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, max_size=30), seed=st.integers(0, 2**32 - 1))
def test_any_notes_give_finite_audio_whatever_their_order(sine: Any, rows: list[Any], seed: int) -> None:
    array = np.array(rows, np.float64).reshape(-1, 6)
    audio = render_notes(sine, array, sample_rate=8000, seconds=0.5)
    assert audio.shape[0] == 2 and 1 <= audio.shape[1] <= (8000 if not len(rows) else 4000)
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1.0
    shuffled = np.random.default_rng(seed).permutation(array)
    np.testing.assert_array_equal(render_notes(sine, shuffled, sample_rate=8000, seconds=0.5), audio)


def test_structured_notes(sine: Any) -> None:
    kinds = [(name, np.float32 if index < 2 else np.int16) for index, name in enumerate(NOTE_COLUMNS)]
    array = np.array([(0, 0.5, 60, 100, 0, 0)], dtype=kinds)
    np.testing.assert_array_equal(render_notes(sine, array), render_notes(sine, notes((0, 0.5, 60))))
    with pytest.raises(ValueError, match="velocity"):
        render_notes(sine, array[["onset", "duration", "pitch"]])


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e9, 0.5])
def test_impossible_notes_name_their_column(column: int, value: float) -> None:
    if value == 0.5 and column < 2:
        return  # half a second is a time like any other
    rows = notes((0, 1, 60), (0, 1, 60))
    rows[1, column] = value
    with pytest.raises(ValueError, match=f"{NOTE_COLUMNS[column]} of note 1"):
        check_notes(rows)


def test_programming_errors(piano: Any) -> None:
    with pytest.raises(ValueError, match=r"\(n, 6\).*\(3, 5\)"):
        render_notes(piano, np.zeros((3, 5)))
    with pytest.raises(ValueError, match="sample_rate"):
        render_notes(piano, np.zeros((0, 6)), sample_rate=0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            render_notes(piano, np.zeros((0, 6)), seconds=seconds)


# Scores -----------------------------------------------------------------------------------------------------


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


def test_seconds_follow_the_tempo_map() -> None:
    rows = [(480, 960, 60, 100), (1440, 960, 64, 90), (0, 240, 67, 80)]
    # 120 a minute for two beats, then 60: beat 1 is at 0.5 s, beat 2 at 1 s, beat 3 at 2 s, beat 5 at 4 s
    got = score_notes(make_score(rows, [(0, 120.0), (960, 60.0)]))
    expected = notes((0, 0.25, 67, 80), (0.5, 1.5, 60, 100), (2, 2, 64, 90))
    np.testing.assert_allclose(got, expected, atol=1e-9)
    # no tempo: 120 a minute; a first tempo that comes late; the later of two at one time
    np.testing.assert_allclose(score_notes(make_score(rows))[:, 0], [0, 0.5, 1.5], atol=1e-9)
    np.testing.assert_allclose(score_notes(make_score(rows, [(960, 60.0)]))[:, 0], [0, 0.5, 2], atol=1e-9)
    twice = make_score(rows, [(0, 240.0), (0, 60.0)])
    np.testing.assert_allclose(score_notes(twice)[:, 0], [0, 1, 3], atol=1e-9)


def test_a_score_is_cut_at_a_hundred_beats() -> None:
    beat = 480
    rows = [(0, beat, 60, 100), (99 * beat, 4 * beat, 61, 100), (100 * beat, beat, 62, 100)]
    score = make_score(rows, [(0, 120.0)])
    for unit in ("tick", "quarter", "second"):
        got = score_notes(score.to(unit))
        np.testing.assert_allclose(got[:, 0], [0, 49.5], atol=1e-5)
        np.testing.assert_allclose(got[:, 1], [0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(score_notes(score, max_beats=2)[:, 0], [0])
    assert len(score_notes(score, max_beats=1000)) == 3


def test_tracks_keep_their_program_and_drums_and_not_their_order() -> None:
    score = make_score([(0, 480, 60, 100)])
    for program, drum in ((24, False), (8, True)):
        track = symusic.Track("other", program, drum)
        track.notes.append(symusic.Note(0, 480, 40, 70))
        score.tracks.append(track)
    expected = notes((0, 0.5, 60, 100, 0, 0), (0, 0.5, 40, 70, 24, 0), (0, 0.5, 40, 70, 8, 1))
    np.testing.assert_allclose(score_notes(score), expected)
    backwards = score.copy()
    backwards.tracks = symusic.Score(480).tracks
    for track in reversed(list(score.tracks)):
        backwards.tracks.append(track)
    np.testing.assert_array_equal(score_notes(backwards), score_notes(score))
    assert score_notes(symusic.Score(480)).shape == (0, 6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 127), st.integers(1, 127)),
        max_size=8,
    ),
    tempos=st.lists(st.tuples(st.integers(0, 4000), st.integers(20, 400)), max_size=4, unique_by=lambda t: t[0]),
)
def test_times_equal_a_walk_from_tick_to_tick(rows: list[Any], tempos: list[Any]) -> None:
    tpq = 12
    score = make_score(rows, tempos, tpq)
    pace = {tempo.time: tempo.mspq / 1e6 for tempo in score.tempos}
    clock, now, current = [], 0.0, 0.5
    for tick in range(8001):
        current = pace.get(tick, current)
        clock.append(now)
        now += current / tpq
    stop = 100 * tpq
    expected = sorted(
        (clock[start], clock[min(start + length, stop)] - clock[start], pitch, velocity)
        for start, length, pitch, velocity in rows
        if start < stop
    )
    got = score_notes(score)
    assert len(got) == len(expected)
    np.testing.assert_allclose(sorted(got[:, 0]), [row[0] for row in expected], atol=1e-6)
    np.testing.assert_allclose(sorted(got[:, 1]), sorted(row[1] for row in expected), atol=1e-6)
    assert sorted(got[:, 2]) == sorted(row[2] for row in expected)


def test_what_is_no_score() -> None:
    with pytest.raises(TypeError, match="dict"):
        score_notes({"notes": []})
    with pytest.raises(ValueError, match="onset"):
        score_notes(make_score([(-5, 480, 60, 100)]))
    with pytest.raises(ValueError, match="pitch"):
        score_notes(make_score([(0, 480, -3, 100)]))


# Soundfonts -------------------------------------------------------------------------------------------------


def refuse(path: Path | str) -> str:
    """The message with which a soundfont is refused: one line that names it."""
    with pytest.raises(UserError) as error:
        soundfonts.check_soundfont(path)
    message = error.value.message
    assert str(path) in message and "\n" not in message
    with pytest.raises(UserError):  # before any process is started
        RenderPool(str(path), workers=1)
    return message


def test_bad_soundfonts_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    good = tiny_soundfont()
    assert "does not exist" in refuse(path)
    assert "is a folder" in refuse(tmp_path)
    cases = [
        (b"", "is empty"),
        (np.random.default_rng(0).bytes(5000), "not a soundfont"),
        (b"PK\x03\x04" + bytes(100), "not a soundfont"),
        (chunk(b"RIFF", b"WAVE" + chunk(b"data", bytes(8))), "not a soundfont"),
        (good[:-100], "cut short"),
        (chunk(b"RIFF", b"sfbk"), "no samples"),
        (tiny_soundfont(pmod=bytes(7)), "pmod"),
        (tiny_soundfont(phdr=bytes(38)), "no presets"),
        (tiny_soundfont(shdr=bytes(46)), "no samples"),
        (good.replace(b"igen", b"what"), "igen"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        assert message in refuse(path)
    path.write_bytes(good + b"trailing")
    soundfonts.check_soundfont(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_soundfont_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    path.write_bytes(tiny_soundfont())
    path.chmod(0)
    assert "cannot be read" in refuse(path)


def test_every_beginning_of_a_soundfont_is_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "font.sf2", tiny_soundfont()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(UserError):
            soundfonts.check_soundfont(path)
    real = soundfonts.find_soundfont("timgm").read_bytes()
    for length in (13, 5000, len(real) // 2, len(real) - 1):
        path.write_bytes(real[:length])
        assert "cut short" in refuse(path)


@settings(max_examples=200, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_damage_is_refused_or_passes_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, edits: list[Any]
) -> None:
    path, data = tmp_path_factory.getbasetemp() / "damaged.sf2", bytearray(tiny_soundfont())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        soundfonts.check_soundfont(path)
    except UserError as error:
        assert "\n" not in error.message


@pytest.mark.parametrize("seed", range(8))
def test_damage_never_hurts_the_parent(tmp_path: Path, seed: int) -> None:
    path, data = tmp_path / "damaged.sf2", bytearray(tiny_soundfont())
    rng = np.random.default_rng(seed)
    for name in rng.permutation([b"phdr", b"pbag", b"pgen", b"inst", b"ibag", b"igen", b"shdr"])[:2]:
        body = data.index(name) + 8  # indices and offsets that the synthesiser follows blindly
        data[body + rng.integers(int.from_bytes(data[body - 4 : body], "little"))] = rng.integers(1, 256)
    path.write_bytes(data)
    try:
        with RenderPool(path, workers=1, deadline=5.0, load_deadline=5.0) as pool:
            audio = pool.submit(notes((0, 0.5, 60))).result()
            assert np.isfinite(audio).all() and np.abs(audio).max() <= 1
    except (UserError, RenderError):
        pass  # either is an honest answer


def test_a_soundfont_that_crashes_the_synthesiser(tmp_path: Path) -> None:
    path = tmp_path / "crash.sf2"
    path.write_bytes(tiny_soundfont(first_bag=60000))  # the synthesiser follows this index out of its memory
    soundfonts.check_soundfont(path)
    with pytest.raises(UserError, match=r"crash\.sf2 cannot be loaded.*died of signal 11"):
        RenderPool(path, workers=2)


def test_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert soundfonts.find_soundfont("timgm").name == "TimGM6mb.sf2"
    assert soundfonts.find_soundfont("some/where.sf2") == Path("some/where.sf2")
    with pytest.raises(UserError, match="yamaha"):
        soundfonts.find_soundfont("steinway")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SMART_SOUNDFONTS", f"{tmp_path}/nowhere{os.pathsep}{tmp_path}")
    names = {
        "musescore": "MuseScore_General_Full.sf3",
        "fluidr3": "FluidR3_GM.sf2",
        "grandeur": "The Grandeur D.sf2",
        "sgm": "SGM-v2.01.SF2",
        "yamaha": "Yamaha-C5-Salamander-JNv5.1.sf2",
    }
    for short, name in names.items():
        (tmp_path / name).write_bytes(tiny_soundfont())
        assert soundfonts.find_soundfont(short) == tmp_path / name
    (tmp_path / "MuseScore_General.sf2").write_bytes(tiny_soundfont())  # plain samples before compressed ones
    assert soundfonts.find_soundfont("MuseScore").name == "MuseScore_General.sf2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timgm").write_bytes(b"a file of that very name")
    assert soundfonts.find_soundfont("timgm") == Path("timgm")


def test_an_absent_soundfont_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfonts, "_folders", lambda: [tmp_path])
    for short, place, package in (
        ("musescore", "musescore.org", "musescore-general-soundfont"),
        ("fluidr3", "musescore.org", "fluid-soundfont-gm"),
        ("grandeur", "musical-artifacts.com/artifacts/2992", ""),
        ("sgm", "archive.org/details/SGM-V2.01", ""),
        ("yamaha", "sites.google.com/site/soundfonts4u", ""),
    ):
        with pytest.raises(UserError) as error:
            RenderPool(short, workers=1)
        assert place in error.value.message and package in error.value.message
        assert "SMART_SOUNDFONTS" in error.value.message and "\n" not in error.value.message


# The pool: the same audio, always ---------------------------------------------------------------------------


def digest(audio: Array) -> str:
    return hashlib.sha256(audio.tobytes()).hexdigest()


def test_audio_depends_on_the_notes_alone(piano: Any, pool: RenderPool) -> None:
    clips = [random_notes(seed) for seed in range(6)]
    loud = notes(*((0, 10, pitch, 127) for pitch in range(30, 90)))
    expected = [render_notes(piano, clip) for clip in clips]
    for clip, audio in zip(clips, expected, strict=True):
        render_notes(piano, loud)
        np.testing.assert_array_equal(render_notes(piano, clip), audio)
    for workers in (1, 2):
        with RenderPool("timgm", workers=workers) as fresh:
            order = np.random.default_rng(workers).permutation(len(clips))
            futures = {}
            for index in order:
                fresh.submit(loud[:3])
                futures[index] = fresh.submit(clips[index])
            for index, future in futures.items():
                np.testing.assert_array_equal(future.result(), expected[index])
    for audio, want in zip(pool.map(clips), expected, strict=True):
        assert audio.dtype == np.float32 and audio.flags.c_contiguous and audio.flags.writeable
        np.testing.assert_array_equal(audio, want)
    np.testing.assert_array_equal(render_notes("timgm", clips[0]), expected[0])  # a synthesiser loaded anew


def test_another_process_renders_the_same(piano: Any) -> None:
    code = f"""
        import hashlib, numpy as np
        from smart.render import render_notes
        notes = np.array({random_notes(3, 20).tolist()!r})
        print(hashlib.sha256(render_notes("timgm", notes).tobytes()).hexdigest())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == digest(render_notes(piano, random_notes(3, 20)))


def test_no_clip_leaves_a_tail(piano: Any) -> None:
    loud = notes(*((0, 10, pitch, 127, 48) for pitch in range(40, 80)))
    silent, quiet = notes((0, 1, 60, 0)), notes((0.5, 0.5, 72, 1))
    with RenderPool("timgm", workers=1) as one:
        _, after_loud, _, soft, after_soft = one.map([loud, silent, loud, quiet, silent])
    assert not after_loud.any() and not after_soft.any()
    np.testing.assert_array_equal(soft, render_notes(piano, quiet))


def test_scores_and_their_notes_give_the_same(pool: RenderPool) -> None:
    score = make_score([(0, 480, 60, 100), (480, 960, 64, 90)], [(0, 90.0)])
    for unit in ("tick", "quarter"):
        audio = pool.submit(score.to(unit)).result()
        np.testing.assert_array_equal(audio, pool.submit(score_notes(score)).result())
    assert pool.submit(symusic.Score(480)).result().shape == (2, RATE)
    with pytest.raises(ValueError, match="pitch"):
        pool.submit(notes((0, 1, 200)))
    with pytest.raises(TypeError):
        pool.submit("a score")


def test_map_is_in_order_and_takes_an_iterator_as_it_goes(pool: RenderPool) -> None:
    taken = 0

    def endless() -> Iterator[Array]:
        nonlocal taken
        while True:
            taken += 1
            yield notes((0, taken / 100, 60))

    lengths = [audio.shape[1] for audio, _ in zip(pool.map(endless()), range(20), strict=False)]
    assert lengths == [RATE * (index + 1) // 100 for index in range(20)]
    assert taken < 60


# The pool: what goes wrong ----------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_its_clip_rendered_again(piano: Any) -> None:
    heavy, light = heavy_notes(), random_notes(5)
    with RenderPool("timgm", workers=1, seconds=1.5) as one:
        (pid,) = one.pids
        future, behind = one.submit(heavy), one.submit(light)
        wait_until(lambda: busy(pid))
        time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(future.result(60), render_notes(piano, heavy, seconds=1.5))
        np.testing.assert_array_equal(behind.result(60), render_notes(piano, light, seconds=1.5))
        assert (one.retries, one.failures, one.restarts) == (1, 0, 1)
        assert one.pids != [pid] and not running(pid)
        # killed while it had nothing to do: no clip is lost over it
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        assert one.submit(light).result(60).any()
        assert (one.retries, one.failures, one.restarts) == (1, 0, 2)


def test_a_stopped_worker_is_replaced_after_the_deadline(sine_file: Path, sine: Any) -> None:
    with RenderPool(sine_file, workers=1, deadline=1.0) as one:
        os.kill(one.pids[0], signal.SIGSTOP)
        started = time.monotonic()
        audio = one.submit(notes((0, 1, 60))).result(30)
        assert 0.9 < time.monotonic() - started < 15
        np.testing.assert_array_equal(audio, render_notes(sine, notes((0, 1, 60))))
        assert (one.retries, one.failures, one.restarts) == (1, 0, 1)
        # a message larger than the socket holds, to one who does not read
        many = np.repeat(notes((0, 0.01, 60)), 40_000, axis=0)
        os.kill(one.pids[0], signal.SIGSTOP)
        assert one.submit(many).result(30).any()
        assert (one.retries, one.failures, one.restarts) == (2, 0, 2)


POISON = (
    """
import time
from smart.render import pool
clean = pool.render_notes
def poisoned(soundfont, notes, **settings):
    if len(notes) and notes[0, 2] == 13:
        {effect}
    return clean(soundfont, notes, **settings)
pool.render_notes = poisoned
"""
    + pool_file.PROGRAM
)


@pytest.mark.parametrize(
    ("effect", "reason", "restarts"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died of signal 11", 2),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "no answer within 1 s", 2),
        ("time.sleep(60)", "no answer within 1 s", 2),
        ("os._exit(7)", "exit status 7", 2),
        ("raise MemoryError('full')", "MemoryError: full", 2),
    ],
)
def test_a_clip_that_fails_twice_fails_alone(
    sine_file: Path, sine: Any, monkeypatch: pytest.MonkeyPatch, effect: str, reason: str, restarts: int
) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", POISON.format(effect=effect))
    poison, good = notes((0, 1, 13)), notes((0, 1, 60))
    with RenderPool(sine_file, workers=1, deadline=1.0) as one:
        futures = [one.submit(rows) for rows in (good, poison, good)]
        with pytest.raises(RenderError, match=f"{reason}.*; again: .*{reason}"):
            futures[1].result(30)
        for future in (futures[0], futures[2]):
            np.testing.assert_array_equal(future.result(30), render_notes(sine, good))
        assert (one.retries, one.failures, one.restarts) == (1, 1, restarts)


def test_a_worker_that_dies_while_it_starts_costs_no_clip(
    sine_file: Path, sine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with RenderPool(sine_file, workers=1) as one:
        mark = tmp_path / "died"
        dies_once = f"import os; os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w').close(), os._exit(9))\n"
        monkeypatch.setattr(pool_file, "PROGRAM", dies_once + pool_file.PROGRAM)
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        rows = notes((0, 1, 60))
        np.testing.assert_array_equal(one.submit(rows).result(60), render_notes(sine, rows))
        assert mark.exists() and (one.retries, one.failures, one.restarts) == (0, 0, 2)


@contextmanager
def files_at_most(count: int) -> Iterator[None]:
    """As many files may be opened in this process, and no more."""
    numbers = [os.dup(0) for _ in range(count + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in numbers:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (numbers[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("free", [0, 1, 3])
def test_a_short_outage_of_the_system_costs_no_clip(sine_file: Path, free: int) -> None:
    """For a while there is no file for the audio, none for the connection, none for the pipe of a new process."""
    with RenderPool(sine_file, workers=1) as one:
        inside = open_files()
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        with files_at_most(free):
            futures = [one.submit(notes((0, 1, 60))) for _ in range(20)]
            time.sleep(0.5)
        assert not any(future.done() for future in futures)
        assert all(future.result(30).any() for future in futures)
        assert (one.retries, one.failures, one.restarts) == (0, 0, 1) and open_files() == inside


def test_a_system_that_starts_no_process_is_named(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PAUSES", (0.01,))
    monkeypatch.setattr(pool_file, "GIVE_UP", 1)
    with RenderPool(sine_file, workers=1) as one:
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        with files_at_most(0):
            lost, hopeless = (one.submit(notes((0, 1, 60))) for _ in range(2))
            with pytest.raises(RenderError, match=r"no worker process can be started: .*Too many open files"):
                lost.result(30)
            with pytest.raises(Failure, match=r"no worker process can be started: .*open files.*\)$"):
                hopeless.result(30)
    with files_at_most(1), pytest.raises(Failure, match=r"do not start: no worker process .*Too many open files"):
        RenderPool(sine_file, workers=1)


def test_closing_does_not_wait_for_the_system(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=1) as one:
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        with files_at_most(0):
            future = one.submit(notes((0, 1, 60)))
            time.sleep(0.4)
            started = time.monotonic()
            one.close()
        assert time.monotonic() - started < 1
        with pytest.raises(RenderError, match="closed"):
            future.result(0)


# the first to make the folder dies, and no other
DIES = """
import os
try:
    os.mkdir({mark!r})
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), {signal})
"""


def test_the_loss_of_a_worker_that_starts_is_survived(
    sine_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boot, mark = pool_file.PROGRAM, tmp_path / "died"
    monkeypatch.setattr(pool_file, "PROGRAM", DIES.format(mark=str(mark), signal=9) + boot)
    with RenderPool(sine_file, workers=2) as two:
        assert mark.exists() and two.submit(notes((0, 1, 60))).result(30).any()
        assert (two.retries, two.failures, two.restarts) == (0, 0, 1)
    monkeypatch.setattr(pool_file, "PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(Failure, match="the render workers do not start: it died of signal 9"):
        RenderPool(sine_file, workers=1)
    mark.rmdir()  # but a synthesiser that crashes would do so again
    monkeypatch.setattr(pool_file, "PROGRAM", DIES.format(mark=str(mark), signal=11) + boot)
    with pytest.raises(UserError, match=r"sine\.sf2 cannot be loaded.*died of signal 11"):
        RenderPool(sine_file, workers=1)


def test_a_soundfont_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    path.write_bytes(tiny_soundfont())
    with RenderPool(path, workers=1) as one:
        assert one.submit(notes((0, 1, 60))).result(30).any()
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        (tmp_path / "other.sf2").write_bytes(tiny_soundfont(((0, 0), (0, 1))))
        (tmp_path / "other.sf2").replace(path)
        for _ in range(2):  # not even by the worker that has loaded it
            with pytest.raises(Failure, match=r"font\.sf2 was changed while it was in use"):
                one.submit(notes((0, 1, 60))).result(30)


TWICE = """
from smart import workers
send = workers._send
def twice(connection, number, fields, data=b""):
    for _ in range(1 + ("samples" in fields)):
        send(connection, number, fields, data)
workers._send = twice
"""


def test_an_answer_too_many_is_not_the_next_clip(sine_file: Path, sine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", TWICE + pool_file.PROGRAM)
    with RenderPool(sine_file, workers=1) as one:
        for pitch in (60, 64, 67):
            rows = notes((0, 1, pitch))
            np.testing.assert_array_equal(one.submit(rows).result(30), render_notes(sine, rows))
        assert (one.retries, one.failures, one.restarts) == (2, 0, 2)


def test_a_clip_that_failed_is_freed_without_a_collection(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", POISON.format(effect="raise MemoryError('full')"))
    with RenderPool(sine_file, workers=1) as one:
        gc.collect()
        gc.disable()
        try:
            future = one.submit(notes((0, 1, 13)))
            assert isinstance(future.exception(30), RenderError)
            freed = weakref.ref(future)
            del future
            wait_until(lambda: freed() is None)
        finally:
            gc.enable()


def test_a_worker_out_of_memory_is_replaced(sine_file: Path, sine: Any) -> None:
    """It may have no more than it has: the clip is rendered by another, which may."""
    long = np.concatenate([notes((second, second + 1, 60)) for second in range(59)])
    with RenderPool(sine_file, workers=1, seconds=60.0) as one:
        (pid,) = one.pids
        most = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
        np.testing.assert_array_equal(one.submit(long).result(60), render_notes(sine, long, seconds=60.0))
        assert (one.retries, one.failures, one.restarts) == (1, 0, 1) and not running(pid)


def test_a_pool_whose_every_clip_fails_stops_trying(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", POISON.format(effect="os.kill(os.getpid(), signal.SIGSEGV)"))
    monkeypatch.setattr(pool_file, "GIVE_UP", 3)
    poison, good = notes((0, 1, 13)), notes((0, 1, 60))
    with RenderPool(sine_file, workers=1) as one:
        futures = [one.submit(rows) for rows in (poison, poison, good, poison, poison, poison, good, poison)]
        for future, fails in zip(futures[:6], (True, True, False, True, True, True), strict=True):
            if fails:
                with pytest.raises(RenderError, match="died of signal 11"):
                    future.result(60)
            else:
                assert future.result(60).any()  # which starts the count anew
        for future in futures[6:]:
            with pytest.raises(Failure, match=r"last 3 clips could all not.*sine\.sf2.*signal 11.*choose another"):
                future.result(60)
        assert (one.failures, one.restarts) == (5, 9)  # nothing was tried in vain after that


IMPOSTOR = """
import json, pickle, socket, struct, time
connection = socket.socket(fileno=int(sys.argv[1]))
def receive():
    number, length, size = struct.unpack("<QIQ", connection.recv(20, socket.MSG_WAITALL))
    return json.loads(connection.recv(length, socket.MSG_WAITALL)), connection.recv(size, socket.MSG_WAITALL)
def message(fields, data=b"", number=2):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    connection.sendall(struct.pack("<QIQ", number, len(text), len(data)) + text + data)
memory = receive()[0]["audio_fd"]
message({{}}, number=1)
receive()
{answer}
time.sleep(60)
"""


@pytest.mark.parametrize(
    "answer",
    [
        "connection.sendall(b'nonsense' * 100)",
        "message({'samples': 10**15})",
        "message({'samples': 0})",
        "message({'samples': 1000})",  # without having written them
        "message({'samples': '1'})",
        "message({'samples': 1}, bytes(1))",  # more than was agreed
        "message(b'?')",
        "message(b'[1]')",
        "message(b'[' * 60_000)",
        "message({'text': 'x' * 2**16})",
        "os.pwrite(memory, bytes(8), 0); message({'samples': 1}, number=3)",  # to no request
        "os.pwrite(memory, bytes(8), 0); message({'samples': 1}, number=1)",
    ],
)
def test_nonsense_from_a_worker_fails_the_clip(sine_file: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", IMPOSTOR.format(answer=answer))
    with RenderPool(sine_file, workers=1, deadline=10.0) as one:
        first = one.pids[0]
        with pytest.raises(RenderError, match=r"a garbled answer \(.*\); again: a garbled answer \("):
            one.submit(notes((0, 1, 60))).result(30)
        assert (one.retries, one.failures, one.restarts) == (1, 1, 1)
        assert not running(first)


@pytest.mark.parametrize(
    ("answer", "reason"), [("connection.close()", "it closed its connection"), ("sys.exit(3)", "exit status 3")]
)
def test_a_worker_that_leaves_fails_the_clip(
    sine_file: Path, monkeypatch: pytest.MonkeyPatch, answer: str, reason: str
) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", IMPOSTOR.format(answer=answer))
    with RenderPool(sine_file, workers=1, deadline=10.0) as one, pytest.raises(RenderError, match=f"{reason}; again"):
        one.submit(notes((0, 1, 60))).result(30)


def test_a_soundfont_that_takes_too_long(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(UserError, match=r"sine\.sf2 cannot be loaded.*no answer within 0\.3 s"):
        RenderPool(sine_file, workers=2, load_deadline=0.3)


def test_closing(sine_file: Path) -> None:
    one = RenderPool(sine_file, workers=1, seconds=60.0)
    (pid,) = one.pids
    working, waiting = one.submit(heavy_notes()), one.submit(notes((0, 1, 60)))
    wait_until(lambda: working.running() and busy(pid))
    started = time.monotonic()
    one.close()
    assert time.monotonic() - started < 5
    with pytest.raises(RenderError, match="closed"):
        working.result(0)
    with pytest.raises(CancelledError):
        waiting.result(0)
    assert not running(pid) and one.pids == []
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.submit(notes((0, 1, 60)))
    assert (one.retries, one.failures, one.restarts) == (0, 0, 0)


def test_closing_does_not_wait_for_a_stopped_worker(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=2) as two:
        for pid in two.pids:
            os.kill(pid, signal.SIGSTOP)
        futures = [two.submit(notes((0, 1, 60))) for _ in range(5)]
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert all(future.done() for future in futures)


def test_a_cancelled_clip_is_not_rendered(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=1, seconds=2.0) as one:
        first, second, third = (one.submit(rows) for rows in (heavy_notes(), notes((0, 1, 60)), notes((0, 2, 60))))
        assert second.cancel()
        assert third.result(30).shape == (2, 2 * RATE) and first.done()


def test_wrong_settings(sine_file: Path) -> None:
    for setting in (
        {"workers": 0},
        {"workers": 1.5},
        {"deadline": 0.0},
        {"seconds": -1.0},
        {"sample_rate": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(setting))):
            RenderPool(sine_file, **setting)  # type: ignore[arg-type]


# The pool: what it takes and what it leaves -----------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_after_many_pools_and_clips(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=1) as one:
        one.submit(notes((0, 1, 60))).result()
    files, threads = open_files(), threading.active_count()
    pids: set[int] = set()
    for cycle in range(12):
        with RenderPool(sine_file, workers=2) as two:
            pids.update(two.pids)
            if cycle % 3 == 0:
                os.kill(two.pids[0], signal.SIGKILL)
            futures: list[Future[Array]] = [two.submit(notes((0, 1, 60))) for _ in range(4)]
            inside = open_files()
            if cycle % 2:
                assert all(future.result().any() for future in futures)
                assert open_files() <= inside + 2
    assert open_files() == files and threading.active_count() == threads
    assert not any(running(pid) for pid in pids)
    with RenderPool(sine_file, workers=1) as one:
        inside = open_files()
        for _ in one.map([notes((0, 0.1, 60))] * 200):
            pass
        assert open_files() == inside


def test_a_worker_stays_small(pool: RenderPool) -> None:
    for _ in pool.map([random_notes(seed, 200, 9.0) for seed in range(6)]):
        pass
    allowed = 100 * 2**20 + pool.soundfont.stat().st_size
    for pid in pool.pids:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["VmHWM"].split()[0]) * 1024 < allowed
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" in loaded and "torch" not in loaded and "symusic" not in loaded
        for file in Path(f"/proc/{pid}/fd").iterdir():  # no named memory that somebody would have to remove
            assert int(file.name) <= 2 or not os.readlink(file).startswith(("/dev/shm", "/tmp"))


SCRIPT = """
import os, sys, time
import numpy as np
from smart.render import RenderPool

print("main program", flush=True)
pool = RenderPool({path!r}, workers=2, seconds=60.0)
heavy = np.array([(0.0, 60.0, pitch, 100, program, 0) for pitch in range(20, 100) for program in range(9)])
futures = [pool.submit(heavy) for _ in range(3)]
print("workers", *pool.pids, flush=True)
{rest}
"""


def start_script(folder: Path, soundfont: Path, rest: str, **options: Any) -> tuple["subprocess.Popen[str]", list[int]]:
    """Run SCRIPT, which has no __main__ guard, in a folder full of traps; returns it and its workers' ids."""
    script, traps = folder / "programs" / "main.py", folder / "traps"
    script.parent.mkdir()
    traps.mkdir()
    for name in ("numpy", "json", "socket", "tinysoundfont", "click", "smart"):
        (traps / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    script.write_text(SCRIPT.format(path=str(soundfont), rest=rest))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=traps,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(2)]
    assert lines[0] == ["main", "program"] and lines[1][:1] == ["workers"], process.communicate()
    return process, [int(pid) for pid in lines[1][1:]]


def finish(process: "subprocess.Popen[str]", workers: list[int]) -> tuple[str, str]:
    """Wait for a program and its workers; returns what it still wrote."""
    process.wait(20)
    wait_until(lambda: not any(running(pid) for pid in workers), 5)
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.read(), process.stderr.read()


def test_workers_die_with_a_killed_parent(tmp_path: Path, sine_file: Path) -> None:
    process, pids = start_script(tmp_path, sine_file, "time.sleep(60)")
    with process:
        assert len(pids) == 2
        wait_until(lambda: all(busy(pid) for pid in pids))  # at work, so that no end of file is noticed
        os.kill(pids[0], signal.SIGSTOP)
        process.kill()
        assert finish(process, pids) == ("", "")


def test_a_worker_that_stands_still_in_its_imports_dies_with_its_parent(tmp_path: Path, sine_file: Path) -> None:
    code = f"""
import os, threading, time
from smart.render import pool
pool.PROGRAM = "os.kill(os.getpid(), signal.SIGSTOP)"
threading.Thread(target=pool.RenderPool, args=({str(sine_file)!r},), kwargs=dict(workers=1), daemon=True).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        children = Path(f"/proc/{process.pid}/task")
        found: list[int] = []

        def stopped() -> bool:
            try:
                found[:] = [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
                return any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" for pid in found)
            except OSError:  # a thread that has ended meanwhile
                return False

        wait_until(stopped)
        process.kill()
        wait_until(lambda: not any(running(pid) for pid in found))


def test_ctrl_c_while_waiting_ends_everything(tmp_path: Path, sine_file: Path) -> None:
    process, pids = start_script(tmp_path, sine_file, "with pool:\n    futures[0].result()")
    with process:
        wait_until(lambda: all(busy(pid) for pid in pids))
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
        out, err = finish(process, pids)
    assert process.returncode == -signal.SIGINT and out == ""
    assert err.count("Traceback") == 1 and err.strip().endswith("KeyboardInterrupt")


def test_a_program_that_forgets_its_pool_ends_quietly(tmp_path: Path, sine_file: Path) -> None:
    process, pids = start_script(tmp_path, sine_file, "print('end')")
    with process:
        out, err = finish(process, pids)
    assert (out, err, process.returncode) == ("end\n", "", 0)
