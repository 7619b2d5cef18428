"""Bars that are found: a performance gets its beat back, a displaced grid is moved, music that follows a beat stays."""

from typing import Any

import numpy as np
import pytest
from corpora import song
from symusic.core import NoteTick, ScoreTick, TempoTick, TrackTick

from smart.corpus import Limits, Reading
from smart.corpus.beats import find_bars, track
from smart.corpus.piece import PieceReader


def performance(seed: int, beats: int = 120) -> tuple[ScoreTick, np.ndarray[Any, Any]]:
    """Music in eighths whose tempo drifts from 86 to 120 beats per minute, written at 120; and its beats in seconds."""
    random = np.random.default_rng(seed)
    lengths = 0.6 + 0.1 * np.sin(np.arange(beats) / 9 + seed)
    times = 1.0 + np.append(0, np.cumsum(lengths))
    score, played = ScoreTick(480), TrackTick("", 0)
    score.tempos.append(TempoTick(0, 120.0))
    for beat in range(beats):
        for half in range(2):
            onset = times[beat] + half * lengths[beat] / 2 + random.normal(0, 0.008)
            for pitch in ([36 + int(random.integers(12))] if half == 0 else []) + [60 + int(random.integers(24))]:
                played.notes.append(NoteTick(round(onset * 960), 200, pitch, int(random.integers(50, 90))))
    score.tracks.append(played)
    return score, times[:-1]


@pytest.mark.parametrize("seed", range(4))
def test_drifting_beat_is_tracked(seed: int) -> None:
    score, times = performance(seed)
    onsets = np.array(sorted(note.time for note in score.tracks[0].notes)) / 960
    found = track(onsets, np.ones(len(onsets)))
    nearest = np.abs(times[:, None] - found[None]).min(1)
    assert (nearest < 0.05).mean() > 0.95
    assert len(found) == pytest.approx(len(times), abs=6)


@pytest.mark.parametrize("seed", range(4))
def test_tracked_bars_keep_the_music_and_its_seconds(seed: int) -> None:
    """Onsets come to lie on the grid; pitches, velocities and the time between onsets stay."""
    score, _ = performance(seed)
    found, how = find_bars(score)
    assert how == "tracked"
    before, after = score.to("second").tracks[0].notes.numpy(), found.to("second").tracks[0].notes.numpy()
    for name in ("pitch", "velocity"):
        np.testing.assert_array_equal(before[name], after[name])
    np.testing.assert_allclose(np.diff(before["time"]), np.diff(after["time"]), atol=0.01)
    place = found.tracks[0].notes.numpy()["time"] / found.ticks_per_quarter * 2
    assert (np.abs(place - np.rint(place)) < 0.12).mean() > 0.9


@pytest.mark.parametrize("displaced", [0, 60, 240, 400, 1000])
def test_displaced_grid_is_moved_by_less_than_a_bar(displaced: int) -> None:
    """However far a song in 4/4 was moved, it comes back the same, with its bass on the first beats."""
    score, played = ScoreTick(480), TrackTick("", 0)
    score.tempos.append(TempoTick(0, 90.0))
    for beat in range(64):
        played.notes.append(NoteTick(480 * beat + displaced, 400, 40 if beat % 4 == 0 else 70 + beat % 5, 64))
    score.tracks.append(played)
    found, how = find_bars(score)
    assert how == ("as written" if displaced % 120 == 0 else "shifted")
    times = found.tracks[0].notes.numpy()["time"]
    np.testing.assert_array_equal(np.diff(times), 480)
    assert found.tempos[0].time == 0
    if how == "shifted":
        assert times[0] % 1920 == 0


def test_reader_finds_bars_when_asked(tokenizer: Any) -> None:
    """A performance gets other tokens and keeps its hash; music that follows a beat is not touched."""
    written, found = (PieceReader(tokenizer, Limits(), Reading(bars=bars)) for bars in ("written", "found"))
    score, _ = performance(1)
    one, other = written.read(score.dumps_midi()), found.read(score.dumps_midi())
    assert (one.placed, other.placed) == ("as written", "tracked")
    assert one.digest == other.digest
    assert one.tokens != other.tokens
    steady = song(3).dumps_midi()
    assert found.read(steady).tokens == written.read(steady).tokens
    assert found.read(steady).placed == "as written"
