"""smart.reward.symbolic: each measure by hand, and how a rule rates it."""

from typing import Any

import numpy as np
import pytest
import torch
from symusic import Note, Score, Tempo, Track

from smart import UserError
from smart.features import midi_features
from smart.reward import NoteReward, load_reward
from smart.reward.symbolic import MEASURES, dissonance, grade, key, measure, note_density, playability

BEAT = 480  # ticks; half a second


def piece(*notes: tuple[float, float, int], drums: bool = False) -> Any:
    """Notes (onset, duration, pitch) in beats."""
    score = Score(BEAT)
    score.tempos.append(Tempo(0, 120.0))
    track = Track(is_drum=drums)
    track.notes.extend(Note(int(onset * BEAT), int(length * BEAT), pitch, 80) for onset, length, pitch in notes)
    score.tracks.append(track)
    return score


def notes(*rows: tuple[float, float, int]) -> Any:
    return np.array([(onset, length, pitch, 80, 0, 0) for onset, length, pitch in rows], float)


def test_dissonance_by_hand() -> None:
    assert dissonance(notes((0, 1, 60), (0, 1, 61))) == 1
    assert dissonance(notes((0, 1, 60), (0, 1, 73))) == 1, "a ninth is a second"
    assert dissonance(notes((0, 1, 60), (0, 1, 67))) == dissonance(notes((0, 1, 60), (1, 1, 61))) == 0
    assert dissonance(notes((0, 1, 60), (0, 1, 60))) == 0, "a note against itself is no pair"
    # C and E for two seconds; a tritone over the C for the second one (and a tone over the E): 2 of 4 pair seconds
    assert dissonance(notes((0, 2, 60), (0, 2, 64), (1, 1, 66))) == pytest.approx(0.5)


def test_playability_by_hand() -> None:
    assert playability(notes(*((0, 1, pitch) for pitch in (36, 40, 43, 72, 76, 79)))) == 1
    assert playability(notes(*((0, 1, pitch) for pitch in (30, 60, 90)))) == 0, "three hands"
    assert playability(notes(*((0, 1, pitch) for pitch in range(60, 71)))) == 0, "eleven fingers"
    assert playability(notes((0, 1, 30), (0, 1, 60), (0, 1, 90), (1, 1, 60))) == 0.5


def test_key_and_density_by_hand() -> None:
    scale = notes(*((beat, 1, 60 + step) for beat, step in enumerate((0, 2, 4, 5, 7, 9, 11, 0, 4, 7))))
    clusters = notes(*((beat, 1, 60 + beat) for beat in range(12)))
    assert key(scale) > 0.85 and key(clusters) == 0
    moved = scale.copy()
    moved[:, 2] += 5
    assert key(moved) == pytest.approx(key(scale)), "any key is as good"
    assert note_density(notes((3, 1, 60), (4, 1, 60), (5, 3, 62))) == pytest.approx(3 / 5)


def test_the_papers_features_are_measured_as_they_are() -> None:
    score = piece((0, 1, 60), (0, 1, 64), (0, 1, 67), (3, 1, 72))
    features, found = midi_features(score), measure(score, list(MEASURES))
    for name in ("number_of_notes", "polyphony_rate", "empty_beat_rate", "pitch_range", "scale_consistency"):
        assert found[name] == features[name]
    assert found["mean_pitch"] == pytest.approx(65.75) and found["mean_velocity"] == 80
    assert found["note_density"] == pytest.approx(4 / 2)


def test_a_rule_rates_from_1_to_10() -> None:
    assert [grade(x, "high", 0, 20) for x in (-5, 0, 10, 20, 99)] == [1, 1, 5.5, 10, 10]
    assert [grade(x, "low", 0, 20) for x in (-5, 0, 10, 20, 99)] == [10, 10, 5.5, 1, 1]
    assert [grade(x, 6.0, 0, 20) for x in (6, 1, 11, 16, 99)] == [10, 5.5, 5.5, 1, 1]


def test_rules_are_axes_that_count_alike() -> None:
    reward = load_reward("symbolic", dissonance="low", note_density=2.0)
    assert isinstance(reward, NoteReward) and reward.axes == ("dissonance", "note_density")
    scores = reward.score_notes([piece((0, 1, 60), (0, 1, 64), (1, 2, 67)), piece((0, 1, 60), (0, 1, 61)), piece()])
    assert scores["dissonance"].tolist() == [10, 1, 1], "without notes: the lowest"
    assert scores["note_density"][0] == pytest.approx(10), scores
    torch.testing.assert_close(reward.combine(scores), (scores["dissonance"] + scores["note_density"]) / 2)
    weighted = load_reward("symbolic", weights={"dissonance": 1.0}, dissonance="low", key="high")
    assert weighted.weights == {"dissonance": 1.0}
    assert reward.score_notes([piece((0, 1, 36), drums=True)])["dissonance"].tolist() == [1]
    assert reward.score_notes([])["dissonance"].shape == (0,)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "needs a rule"),
        ({"harmony": "high"}, 'no rule "harmony"; its rules are: number_of_notes, polyphony_rate'),
        (
            {"dissonance": "lower"},
            r"symbolic.dissonance = 'lower': expected \"high\", \"low\", or a number from 0 to 1",
        ),
        ({"dissonance": 2}, "a number from 0 to 1"),
        ({"note_density": True}, "a number from 0 to 20"),
        ({"note_density": float("nan")}, "a number from 0 to 20"),
        ({"note_density": [1]}, "a number from 0 to 20"),
    ],
)
def test_a_mistake_is_named(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("symbolic", **rules)


def test_it_rates_no_audio() -> None:
    with pytest.raises(UserError, match="rates notes, so it cannot rate audio"):
        load_reward("symbolic", key="high").score(torch.zeros(1, 16000))
