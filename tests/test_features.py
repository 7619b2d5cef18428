"""The MIDI features equal MusPy's, even on odd MIDI; MusPy reads the file that symusic wrote."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from smart.features import FEATURES, SCALARS, is_empty, midi_features

Notes = list[tuple[int, int, int, int]]  # onset, duration, pitch, velocity


def build(*tracks: Notes, drums: Notes | None = None, tpq: int = 24, control: int | None = None) -> ScoreTick:
    score = Score(tpq)
    for number, notes in enumerate([*tracks, *([] if drums is None else [drums])]):
        track = Track(program=number, is_drum=drums is not None and number == len(tracks))
        for note in notes:
            track.notes.append(Note(*note))
        if control is not None:
            track.controls.append(ControlChange(control, 7, 100))
        score.tracks.append(track)
    return score


def by_muspy(score: ScoreTick, folder: Path) -> dict[str, Any]:
    """MusPy's own values for the file that ``score`` makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports raise deprecation warnings
        import muspy

    path = folder / "piece.mid"
    score.dump_midi(path)
    music = muspy.read_midi(path)
    notes = [note for track in music.tracks for note in track.notes]
    pitched = [note for track in music.tracks if not track.is_drum for note in track.notes]
    velocities = [note.velocity for note in notes]
    found = {
        "number_of_notes": len(notes),
        "pitches": sorted(note.pitch for note in pitched),
        "velocities": sorted(velocities),
        "velocity_range": max(velocities, default=0) - min(velocities, default=0),
        "pitch_range": muspy.pitch_range(music),
        "scale_consistency": muspy.scale_consistency(music),
    }
    for name in ("polyphony_rate", "empty_beat_rate"):
        found[name] = getattr(muspy, name)(music) if music.tracks else math.nan  # it takes the maximum over no tracks
    return found


def assert_alike(score: ScoreTick, folder: Path) -> None:
    expected = by_muspy(score, folder)
    for read in (score, Score(folder / "piece.mid")):
        ours = midi_features(read)
        assert list(ours) == list(FEATURES)
        for name in ("pitches", "velocities"):
            assert sorted(ours[name].tolist()) == expected[name]
        for name in SCALARS:
            assert math.isfinite(ours[name])
            if not math.isnan(expected[name]):
                assert ours[name] == pytest.approx(expected[name], abs=1e-9), name


ONE: Notes = [(0, 24, 60, 80)]
CHORD: Notes = [(12, 50, pitch, 60 + pitch // 4) for pitch in (48, 55, 64, 67)]


@pytest.mark.parametrize(
    "score",
    [
        build(),
        build([]),
        build(ONE),
        build(CHORD),
        build(CHORD[:3]),
        build(CHORD[:2]),
        build([(5, 1, 21, 1), (500, 1, 108, 127)]),
        build(drums=[(0, 12, 36, 100), (24, 12, 38, 90)]),
        build(CHORD, drums=[(400, 12, 36, 100)]),
        build(ONE, [(12, 24, 72, 20)], [(18, 2, 67, 5)]),
        build([(0, 48, 60, 80), (24, 48, 60, 70), (30, 60, 62, 70), (31, 12, 64, 70)]),
        build(ONE, control=1000),
        build(ONE, tpq=1),
        build(CHORD, tpq=7),
        build(CHORD, tpq=960),
        build([(0, 0, 60, 80), (100, 24, 62, 80)]),
        build([(0, 0, 60, 80)]),
    ],
)
def test_agrees_with_muspy(score: ScoreTick, tmp_path: Path) -> None:
    assert_alike(score, tmp_path)


def test_tempo_and_time_signature_play_no_part(tmp_path: Path) -> None:
    score = build(CHORD, [(200, 30, 59, 44)])
    plain = midi_features(score)
    for time in (0, 40, 120):
        score.tempos.append(Tempo(time, 60 + time))
        score.time_signatures.append(TimeSignature(time, 3 + time // 40, 8))
    assert_alike(score, tmp_path)
    assert all(plain[name] == midi_features(score)[name] for name in SCALARS)


# also notes of one pitch that overlap: the file does not say which note-off ends which, and no feature depends on it
TRACK = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 60), st.integers(0, 127), st.integers(1, 127)), max_size=25
)


@settings(max_examples=60, deadline=None)
@given(TRACK, TRACK, TRACK, st.integers(1, 40), st.none() | st.integers(0, 300))
@example([], [], [], 1, None)
def test_agrees_with_muspy_on_anything(
    tmp_path_factory: Any, first: Notes, second: Notes, drums: Notes, tpq: int, control: int | None
) -> None:
    score = build(first, second, drums=drums, tpq=tpq, control=control)
    assert_alike(score, tmp_path_factory.getbasetemp())


def test_what_an_empty_piece_gives() -> None:
    for score in (Score(24), build([]), build(control=5), build([], control=0)):
        ours = midi_features(score)
        assert [ours[name] for name in SCALARS] == [0, 0, 1, 0, 0, 0]
        assert ours["pitches"].shape == ours["velocities"].shape == (0,)
        assert is_empty(score)
    assert is_empty(build(drums=ONE)) and not is_empty(build([], ONE, drums=ONE))
    beats = midi_features(build([], control=49))  # a little more than two, all empty
    assert beats["empty_beat_rate"] == 1


def test_by_hand() -> None:
    """Two beats and a half: three pitches sound for 12 of 60 ticks, beats 0 and 2 are filled, beat 1 is not."""
    notes = [(0, 12, 60, 10), (0, 20, 64, 30), (0, 16, 66, 50), (50, 10, 61, 90)]
    ours = midi_features(build(notes))
    assert ours["polyphony_rate"] == 12 / 60 and ours["empty_beat_rate"] == pytest.approx(1 / 3)
    assert (ours["pitch_range"], ours["velocity_range"], ours["number_of_notes"]) == (6, 80, 4)
    assert ours["scale_consistency"] == 0.75  # C#, E and F# are in A major; C is not
    assert np.array_equal(ours["pitches"], [60, 64, 66, 61]) and np.array_equal(ours["velocities"], [10, 30, 50, 90])


def test_a_long_piece_takes_no_piano_roll() -> None:
    """40 million ticks: a piano roll would take five gigabytes."""
    ours = midi_features(build([(0, 40_000_000, pitch, 64) for pitch in (60, 64, 67)], tpq=960))
    assert ours["polyphony_rate"] == 1 and ours["empty_beat_rate"] == 0
