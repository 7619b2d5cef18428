"""Scores and note arrays: seconds follow the tempo map, and wrong values are named."""

from typing import Any

import numpy as np
import pytest
import symusic
from clips import make_score, notes
from hypothesis import given, settings
from hypothesis import strategies as st

from smart.render import NOTE_COLUMNS, check_notes, score_notes


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e9, 0.5])
def test_impossible_notes_name_their_column(column: int, value: float) -> None:
    if value == 0.5 and column < 2:
        return  # half a second is a time like any other
    rows = notes((0, 1, 60), (0, 1, 60))
    rows[1, column] = value
    with pytest.raises(ValueError, match=f"{NOTE_COLUMNS[column]} of note 1"):
        check_notes(rows)


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


def test_a_score_from_one_of_its_beats_on() -> None:
    """What ended before is gone, what sounds begins there, and the tempos stay where they are."""
    score = symusic.Score(480)
    score.tempos.extend([symusic.Tempo(0, 120), symusic.Tempo(960, 60)])
    score.tracks.append(symusic.Track())
    for time, duration in ((0, 480), (0, 960), (480, 960), (1440, 480)):
        score.tracks[0].notes.append(symusic.Note(time, duration, 60 + len(score.tracks[0].notes), 64))
    for unit in ("tick", "quarter", "second"):
        got = score_notes(score.to(unit), from_beat=2)
        np.testing.assert_allclose(got[:, :3], [[0, 1, 62], [1, 1, 63]], atol=1e-6)
        np.testing.assert_allclose(score_notes(score.to(unit), from_beat=1)[:, 0], [0, 0, 1.5], atol=1e-6)


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
