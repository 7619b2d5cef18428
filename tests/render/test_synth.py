"""One clip: timing, loudness, and that the audio depends on the notes alone."""

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import RATE, Array, notes, random_notes, tiny_soundfont
from hypothesis import given, settings
from hypothesis import strategies as st

from smart.render import NOTE_COLUMNS, load_soundfont, render_notes


@pytest.fixture(scope="module")
def piano() -> Any:
    return load_soundfont("timgm")


@pytest.fixture(scope="module")
def sine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("soundfonts") / "sine.sf2"
    path.write_bytes(tiny_soundfont())
    return load_soundfont(path)


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
    np.testing.assert_allclose(cut * scale, whole[:, : 2 * RATE], atol=2e-5)  # the 1e-6 that is added to the peak


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


def test_programming_errors(piano: Any) -> None:
    with pytest.raises(ValueError, match=r"\(n, 6\).*\(3, 5\)"):
        render_notes(piano, np.zeros((3, 5)))
    with pytest.raises(ValueError, match="sample_rate"):
        render_notes(piano, np.zeros((0, 6)), sample_rate=0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            render_notes(piano, np.zeros((0, 6)), seconds=seconds)


def digest(audio: Array) -> str:
    return hashlib.sha256(audio.tobytes()).hexdigest()


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
