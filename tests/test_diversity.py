"""Diversity: constructed sets with known values, and changes that must not affect them."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Track
from symusic.core import ScoreTick

from smart.diversity import (
    audio_vector,
    distinct_ngrams,
    kernel,
    mean_pairwise_distance,
    nearest,
    piano_roll,
    summary,
    symbolic_vector,
    vendi_score,
)

TPQ = 24


def piece(notes: Iterable[tuple[int, int, int]], is_drum: bool = False) -> ScoreTick:
    """A score of (onset, duration, pitch), in ticks of a 24th of a quarter note."""
    score = Score(TPQ)
    track = Track(is_drum=is_drum)
    for onset, duration, pitch in notes:
        track.notes.append(Note(onset, duration, pitch, 80))
    score.tracks.append(track)
    return score


def line(seed: int, count: int = 40, lowest: int = 40) -> list[tuple[int, int, int]]:
    random = np.random.default_rng(seed)
    pitches = random.integers(lowest, lowest + 40, count)
    onsets = np.cumsum(random.integers(1, 12, count))
    return [(int(time), int(random.integers(2, 30)), int(pitch)) for time, pitch in zip(onsets, pitches, strict=True)]


def disjoint(number: int) -> ScoreTick:
    """Pieces no two of which share a sixteenth."""
    return piece([(6 * (2 * number + beat), 6, 60 + number) for beat in range(2)])


def shifted(notes: list[tuple[int, int, int]], ticks: int = 0, semitones: int = 0) -> list[tuple[int, int, int]]:
    return [(time + ticks, duration, pitch + semitones) for time, duration, pitch in notes]


def vendi(pieces: list[ScoreTick]) -> float:
    return vendi_score(kernel(np.stack([symbolic_vector(score) for score in pieces])))


@pytest.mark.parametrize("different, copies", [(1, 1), (1, 9), (5, 1), (7, 8), (20, 3)])
def test_vendi_counts_the_different_pieces(different: int, copies: int) -> None:
    pieces = [disjoint(number) for number in range(different)] * copies
    assert vendi(pieces) == pytest.approx(different, abs=1e-6)
    assert summary(pieces)["vendi"] == pytest.approx(different, abs=1e-6)


def test_vendi_of_unequal_copies_is_the_exponential_of_the_entropy() -> None:
    shares = np.array([1, 2, 5]) / 8
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert vendi([disjoint(0)] + [disjoint(1)] * 2 + [disjoint(2)] * 5) == pytest.approx(expected, abs=1e-6)


def test_vendi_of_a_two_by_two_kernel() -> None:
    """By hand: the eigenvalues of [[1, c], [c, 1]] / 2 are (1 + c) / 2 and (1 - c) / 2."""
    for cosine in (0.0, 0.3, 0.99):
        shares = np.array([1 + cosine, 1 - cosine]) / 2
        expected = math.exp(-(shares * np.log(shares)).sum())
        assert vendi_score(np.array([[1, cosine], [cosine, 1]])) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_vendi_invariances(seed: int, count: int) -> None:
    pieces = [piece(line(seed + number)) for number in range(count)]
    score = vendi(pieces)
    assert 1 <= score <= count
    order = np.random.default_rng(seed).permutation(count)
    assert vendi([pieces[index] for index in order]) == pytest.approx(score, abs=1e-6)
    assert vendi(pieces * 3) == pytest.approx(score, abs=1e-6)
    # a new piece that shares nothing with any other (it begins after all of them, in other sixteenths)
    early = [piece([note for note in line(seed + number) if note[0] < 100] or [(0, 6, 60)]) for number in range(count)]
    late = piece(shifted(line(seed, 4), 150))
    assert vendi([*early, late]) > vendi(early) + 0.1


def test_vendi_refuses_what_is_no_kernel() -> None:
    for wrong in (np.ones((0, 0)), np.ones((2, 3))):
        with pytest.raises(ValueError, match="expected"):
            vendi_score(wrong)
    with pytest.raises(ValueError, match="at least one piece"):
        summary([])


def test_piano_roll_against_a_plain_loop() -> None:
    for seed in range(4):
        notes = [*line(seed, 200), (0, 0, 21), (10_000, 5, 22)]
        expected = np.zeros((64, 128), np.float32)
        for time, duration, pitch in notes:
            for cell in range(64):
                begin, end = cell * TPQ / 4, (cell + 1) * TPQ / 4
                if begin <= time < end or (time < end and time + duration > begin):
                    expected[cell, pitch] = 1
        assert np.array_equal(piano_roll(piece(notes)), expected)
    assert piano_roll(piece(line(1)), beats=2, per_beat=3).shape == (6, 128)


def test_vectors_depend_on_music_and_not_on_the_division() -> None:
    score = piece(line(3))
    finer = piece(line(3)).resample(TPQ * 5)
    assert np.array_equal(symbolic_vector(score), symbolic_vector(finer))
    assert np.array_equal(piano_roll(score), piano_roll(finer))
    assert np.linalg.norm(symbolic_vector(score)) == pytest.approx(1, abs=1e-6)
    octave = symbolic_vector(piece(shifted(line(3), semitones=12)))
    assert np.array_equal(symbolic_vector(score), octave)
    assert symbolic_vector(score) @ symbolic_vector(piece(shifted(line(3), semitones=1))) < 0.5


def test_distance_of_copies_disjoint_and_half_equal_pieces() -> None:
    def rolls(*notes: list[tuple[int, int, int]]) -> np.ndarray:
        return np.stack([piano_roll(piece(part)) for part in notes])

    a, b = [(0, 24, 60)], [(0, 24, 62)]
    assert mean_pairwise_distance(rolls(a, a, a)) == 0
    assert mean_pairwise_distance(rolls(a, b)) == 1
    assert mean_pairwise_distance(rolls(a, a + b)) == pytest.approx(0.5)
    assert mean_pairwise_distance(rolls(a, a, b)) == pytest.approx(2 / 3)
    assert mean_pairwise_distance(rolls([], [])) == 0 and mean_pairwise_distance(rolls(a, [])) == 1
    assert mean_pairwise_distance(rolls(a)) == 0


def test_distinct_ngrams() -> None:
    scale = [(12 * step, 12, 60 + step) for step in range(9)]  # eight equal transitions: five 4-grams, all the same
    assert distinct_ngrams([piece(scale)]) == pytest.approx(1 / 5)
    one = piece(line(1))
    assert distinct_ngrams([one]) == 1.0
    assert distinct_ngrams([one, piece(shifted(line(1), ticks=96, semitones=5))]) == pytest.approx(0.5)
    assert distinct_ngrams([one, piece(line(2))]) == 1.0
    slower = piece([(time * 2, duration, pitch) for time, duration, pitch in line(1)])
    assert distinct_ngrams([one, slower]) == 1.0
    assert distinct_ngrams([piece([])]) == 0 and distinct_ngrams([piece(scale[:4])]) == 0
    assert distinct_ngrams([piece(scale[:5])]) == 1


def test_nearest_finds_the_copy_in_any_key() -> None:
    corpus = [piece(line(seed)) for seed in range(20)]
    queries = [piece(line(7)), piece(shifted(line(11), semitones=-5)), piece(line(99)), piece([])]

    def read_once() -> Iterator[ScoreTick]:
        yield from corpus

    for chunk in (3, 2048):
        found = nearest(queries, read_once(), chunk=chunk)
        assert found.piece[:2].tolist() == [7, 11]
        assert found.similarity[:2] == pytest.approx([1, 1], abs=1e-6) and found.similarity[2] < 0.7
        assert found.copied.tolist() == [1, 1, 0, 0] and found.longest.tolist() == [40, 40, 0, 0]
        assert found.similarity[3] == 0
    alone = nearest(queries, [])
    assert alone.piece.tolist() == [-1] * 4 and not alone.similarity.any()
    assert len(nearest([], corpus).piece) == 0


def test_nearest_finds_a_passage_from_the_middle_of_a_piece() -> None:
    """15 notes of a corpus piece, late in it, in another key, after ten new notes."""
    theirs = line(5, 300)
    stolen = shifted(theirs[200:215], ticks=-theirs[200][0] + 150, semitones=3)
    query = piece(line(50, 10) + stolen)
    found = nearest([piece(line(51)), query], [piece(line(4, 300)), piece(theirs)])
    assert found.longest.tolist() == [0, 15]
    assert found.copied[1] == pytest.approx((15 - 8) / (25 - 8))


def test_empty_pieces_are_copies_of_each_other() -> None:
    empty, drums = piece([]), piece(line(1), is_drum=True)
    assert vendi([empty, drums, Score(TPQ)]) == pytest.approx(1)
    assert vendi([empty, empty, disjoint(0), disjoint(1)]) == pytest.approx(math.exp(1.5 * math.log(2)))
    assert nearest([empty], [disjoint(0), drums]).similarity.tolist() == [1.0]
    found = summary([empty, disjoint(0)])
    assert found == {"vendi": pytest.approx(2), "distance": 1.0, "distinct_4grams": 0.0, "empty_rate": 0.5}
    assert summary([piece([(TPQ * 20, 6, 60)])])["empty_rate"] == 0  # it starts after the compared beats


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def test_audio_vector() -> None:
    rate = 16000
    low, high = tone(220, 1, rate), tone(3000, 1, rate)
    vectors = np.stack([audio_vector(clip, rate) for clip in (low, 0.01 * low, np.stack([low, low]), high)])
    assert np.allclose(vectors[0], vectors[1], atol=1e-4) and np.allclose(vectors[0], vectors[2], atol=1e-6)
    assert vectors[0] @ vectors[3] < 0.1
    assert np.allclose(audio_vector(tone(220, 1, 44100), 44100) @ vectors[0], 1, atol=0.02)
    for nothing in (np.zeros(0), np.zeros(5), np.zeros((2, 40000))):
        assert not audio_vector(nothing, rate).any()
    assert np.isfinite(audio_vector(np.ones(1), rate)).all()
    assert vendi_score(kernel(np.stack([vectors[0], vectors[3]] * 4))) == pytest.approx(2, abs=0.05)
    # time matters as well as content; audio after the rated seconds does not
    late = audio_vector(np.concatenate([np.zeros(2 * rate), low]), rate)
    assert late @ vectors[0] < 0.1
    ten = np.concatenate([low] * 10)
    assert np.array_equal(audio_vector(np.concatenate([ten, high]), rate), audio_vector(ten, rate))


def test_summary_within_groups() -> None:
    pieces = [disjoint(0), disjoint(0), disjoint(1), disjoint(2)]
    rate = 8000
    clips = [tone(220, 0.5, rate), None, tone(3000, 0.5, rate), None]
    found = summary(pieces, clips, rate, groups=["a", "a", "b", "b"])
    assert found["vendi_within"] == pytest.approx(1.5, abs=1e-6)
    assert found["distance_within"] == pytest.approx(0.5)
    assert found["vendi_audio"] == pytest.approx(2, abs=0.05) and found["vendi_audio_within"] == pytest.approx(1)
    assert found["vendi"] == pytest.approx(math.exp(1.5 * math.log(2)), abs=1e-6)
    assert "vendi_audio" not in summary(pieces, [None] * 4, rate)
    with pytest.raises(ValueError, match="one clip and label per piece"):
        summary(pieces, groups=["a"])
    with pytest.raises(ValueError, match="sample_rate"):
        summary(pieces, clips)
