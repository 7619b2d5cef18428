"""smart.reward.ce_proxy: what it reacts to, what it ignores, and the files it accepts."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smart import UserError
from smart.render import load_soundfont, render_notes
from smart.reward import load_reward, resample
from smart.reward.ce_proxy import (
    DESCRIPTORS,
    SAMPLE_RATE,
    SHIPPED,
    CEProxy,
    Coefficients,
    describe,
    load_coefficients,
    predict,
)

Note = tuple[float, float, int, int]  # onset and duration in seconds, pitch, velocity
Player = Callable[..., torch.Tensor]
CHORDS = ((48, 52, 55), (45, 48, 52), (41, 45, 48), (43, 47, 50))  # C, A minor, F, G


@pytest.fixture(scope="module")
def reward() -> CEProxy:
    found = load_reward("ce_proxy")
    assert isinstance(found, CEProxy)
    return found


@pytest.fixture(scope="module")
def play() -> Player:
    """Notes -> mono (S,) at 16 kHz, rendered with TimGM6mb."""
    soundfont = load_soundfont("timgm")

    def render(notes: list[Note], rate: int = 44100) -> torch.Tensor:
        rows = np.array([(*note, 0, 0) for note in notes], dtype=np.float64)
        audio = torch.from_numpy(render_notes(soundfont, rows, sample_rate=rate)).mean(dim=0)
        return resample(audio, rate, SAMPLE_RATE)

    return render


def piano_piece(seed: int = 0) -> list[Note]:
    """Ten seconds of a left hand in chords over a bass and a right hand in eighth notes."""
    draw = np.random.default_rng(seed)
    notes: list[Note] = []
    for beat in range(20):
        chord = CHORDS[(beat // 2 + seed) % 4]
        notes.append((beat * 0.5, 0.5, chord[0] - 12, int(draw.integers(70, 90))))
        notes += [(beat * 0.5, 0.45, pitch, int(draw.integers(45, 70))) for pitch in chord]
        for half in (0.0, 0.25):
            pitch = chord[int(draw.integers(3))] + 24
            notes.append((beat * 0.5 + half, 0.25, pitch, int(draw.integers(60, 100))))
    return notes


def with_pauses(notes: list[Note], share: float) -> list[Note]:
    """The same without the last part of every 2.5 seconds; the last note stays, so that the length is the same."""
    return [n for n in notes if n[0] % 2.5 < 2.5 * (1 - share)] + [max(notes)]


def tones(seconds: float, *hertz: float, each: float = 0.512) -> torch.Tensor:
    """Sines that take turns, ``each`` seconds long."""
    time = torch.arange(round(seconds * SAMPLE_RATE), dtype=torch.float64) / SAMPLE_RATE
    pitch = torch.tensor(hertz, dtype=torch.float64)[(time / each).long() % len(hertz)]
    return torch.sin(2 * math.pi * pitch * time).float()


def noise(samples: int = 160_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def score(reward: CEProxy, clip: torch.Tensor) -> float:
    return float(reward.score(clip[None])["CE"])


def bottom(coefficients: Coefficients) -> float:
    """The lowest score that the clamps allow."""
    low = [min(t.weight * (edge - t.mean) / t.scale for edge in (t.low, t.high)) for t in coefficients.terms.values()]
    return coefficients.intercept + sum(low)


def named(clip: torch.Tensor) -> dict[str, float]:
    return dict(zip(DESCRIPTORS, describe(clip).tolist(), strict=True))


# --- what ships


def test_it_says_that_it_is_a_stand_in(reward: CEProxy) -> None:
    assert reward.axes == ("CE",) and reward.is_stand_in
    assert "not that model" in reward.provenance and "\n" not in reward.provenance
    assert f"{reward.coefficients.clips} rated clips" in reward.provenance


def test_shipped_coefficients_say_where_they_come_from() -> None:
    shipped = json.loads(SHIPPED.read_text())
    assert {name: entry["definition"] for name, entry in shipped["descriptors"].items()} == DESCRIPTORS
    assert shipped["clips"] == 30 and shipped["ridge"] > 0
    for way in ("ungrouped", "grouped"):
        assert shipped["cross_validation"][way]["spearman"]["mean"] >= 0.75
    provenance = shipped["provenance"]
    assert "SMART-demo" in provenance["source"] and len(provenance["files_sha256"]) == 64
    assert "smart.reward.calibrate" in provenance["command"] and provenance["date"].startswith("2026-")


def test_every_shipped_weight_is_positive(reward: CEProxy) -> None:
    """More music, movement, fullness and bass can only help, so the reward has no local dip."""
    assert all(term.weight > 0 for term in reward.coefficients.terms.values())
    assert all(term.high - term.low > 2 * term.scale for term in reward.coefficients.terms.values())


# --- what it reacts to


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dense_music_beats_the_same_with_pauses(reward: CEProxy, play: Player, seed: int) -> None:
    notes = piano_piece(seed)
    scores = [score(reward, play(with_pauses(notes, share))) for share in (0.0, 0.25, 0.5, 0.75)]
    assert all(more > less + 0.1 for more, less in itertools.pairwise(scores)), scores
    assert scores[0] > 7


@pytest.mark.parametrize("seed", [3, 4])
def test_two_hands_beat_one(reward: CEProxy, play: Player, seed: int) -> None:
    notes = piano_piece(seed)
    treble = [note for note in notes if note[2] >= 60]
    assert score(reward, play(notes)) > score(reward, play(treble)) + 0.2


@pytest.mark.parametrize("seed", [5, 6])
def test_music_of_the_default_soundfont_lies_inside_the_calibrated_ranges(
    reward: CEProxy, play: Player, seed: int
) -> None:
    notes = [n for n in piano_piece(seed) if n[0] % 0.5 == 0 and not 48 <= n[2] < 60]  # four notes per second
    for share in (0.2, 0.4):  # without pauses fullness is at its clamp, as it should be
        found = named(play(with_pauses(notes, share)))
        for name, term in reward.coefficients.terms.items():
            assert term.low < found[name] < term.high, (name, share)


STATIC: dict[str, list[Note]] = {
    "one note repeated": [(k * 0.25, 0.2, 60, 90) for k in range(40)],
    "one low note repeated": [(k * 1.0, 1.0, 33, 100) for k in range(10)],
    "one chord held": [(0.0, 10.0, pitch, 90) for pitch in (48, 55, 60, 64)],
    "one chord repeated": [(k * 0.5, 0.5, pitch, 90) for k in range(20) for pitch in (48, 55, 60, 64)],
    "one cluster repeated": [(k * 0.25, 0.25, pitch, 100) for k in range(40) for pitch in range(48, 60)],
    "the whole keyboard": [(k * 0.2, 0.2, pitch, 100) for k in range(50) for pitch in range(21, 108, 2)],
}
UNMUSICAL: dict[str, Callable[[], torch.Tensor]] = {
    "silence": lambda: torch.zeros(160_000),
    "one second of silence": lambda: torch.zeros(16_000),
    "white noise": noise,
    "quiet white noise": lambda: noise() * 1e-4,
    "noise in bursts": lambda: noise() * (torch.arange(160_000) // 8000 % 2),
    "low-passed noise": lambda: torch.nn.functional.avg_pool1d(noise(160_031)[None], 32, 1)[0],
    "a sine": lambda: tones(10, 440.0),
    "clicks": lambda: (torch.arange(160_000) % 4000 == 0).float(),
    "a constant": lambda: torch.full((160_000,), 0.3),
    "one sample": lambda: torch.ones(1),
}


@pytest.mark.parametrize("what", [*STATIC, *UNMUSICAL])
def test_what_is_not_music_scores_at_the_bottom(reward: CEProxy, play: Player, what: str) -> None:
    clip = play(STATIC[what]) if what in STATIC else UNMUSICAL[what]()
    floor = bottom(reward.coefficients)
    assert score(reward, clip) == pytest.approx(floor, abs=0.05)
    assert floor < score(reward, play(with_pauses(piano_piece(), 0.75))) - 0.1  # even sparse music scores higher


def test_descriptors_of_tones_are_those_worked_out_by_hand() -> None:
    """A and E flat in turn: the chroma has moved by sqrt(2), if both frames are inside a tone."""
    low, high = named(tones(10, 110.0, 155.563)), named(tones(10, 880.0, 1244.51))
    assert low["active"] == pytest.approx(1, abs=0.03) and high["active"] == pytest.approx(1, abs=0.03)
    assert low["bass"] == pytest.approx(low["active"], abs=1e-3) and high["bass"] < 0.03
    assert high["movement"] == pytest.approx(math.sqrt(2), abs=0.15)
    assert low["fullness"] < 0.25 and high["fullness"] < 0.25  # one partial each

    half = named(torch.cat([tones(5, 880.0, 1244.51), torch.zeros(5 * SAMPLE_RATE)]))
    assert half["active"] == pytest.approx(0.5, abs=0.03)
    assert half["movement"] == pytest.approx(high["movement"] / 2, abs=0.08)


def test_harmony_must_move_within_reach() -> None:
    """A tone that changes once is music only around the change: 1.5 s before, 2 s after (0.5 s of lag)."""
    once = named(torch.cat([tones(6, 440.0), tones(6, 622.25)]))
    assert once["active"] == pytest.approx(3.5 / 12, abs=0.03)


# --- what it ignores


@given(gain=st.floats(1e-6, 1e6), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_gain_does_not_matter(reward: CEProxy, play: Player, gain: float, seed: int) -> None:
    clip = _cached(play, seed)
    assert score(reward, clip * gain) == pytest.approx(score(reward, clip), abs=1e-5)


_clips: dict[int, torch.Tensor] = {}


def _cached(play: Player, seed: int) -> torch.Tensor:
    if seed not in _clips:
        _clips[seed] = play(with_pauses(piano_piece(seed), 0.1 * seed))
    return _clips[seed]


def test_polarity_and_the_rate_of_rendering_do_not_matter(reward: CEProxy, play: Player) -> None:
    notes = with_pauses(piano_piece(7), 0.3)
    expected = score(reward, play(notes))
    assert score(reward, -play(notes)) == pytest.approx(expected, abs=1e-6)
    for rate in (16000, 22050, 48000):
        assert score(reward, play(notes, rate)) == pytest.approx(expected, abs=0.05), rate


def test_a_little_silence_at_the_edges_matters_little(reward: CEProxy, play: Player) -> None:
    clip = play(piano_piece(8))
    shifted = torch.cat([torch.zeros(1600), clip, torch.zeros(1600)])  # 0.1 s, as an mp3 adds
    assert score(reward, shifted) == pytest.approx(score(reward, clip), abs=0.1)


@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=5),
    st.sampled_from([0.0, 7.0, math.nan]),
    st.integers(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_neither_padding_nor_neighbours_nor_order_matter(
    reward: CEProxy, play: Player, lengths: list[int], garbage: float, start: int
) -> None:
    whole = torch.stack([_cached(play, (start + k) % 5)[8000 * k :][:40_000] for k, _ in enumerate(lengths)])
    alone = [score(reward, clip[:length]) for clip, length in zip(whole, lengths, strict=True)]
    padded = torch.full((len(lengths), 40_500), garbage)
    for row, (clip, length) in enumerate(zip(whole, lengths, strict=True)):
        padded[row, :length] = clip[:length]
    together = reward.score(padded, torch.tensor(lengths))["CE"]
    backwards = reward.score(padded.flip(0), torch.tensor(lengths).flip(0))["CE"].flip(0)
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert torch.equal(together, backwards)


def test_an_empty_clip_is_nan_and_silence_is_not(reward: CEProxy) -> None:
    rated = reward.score(torch.zeros(2, 500), torch.tensor([0, 500]))["CE"]
    assert rated[0].isnan() and rated[1] == pytest.approx(bottom(reward.coefficients), abs=1e-5)


# --- bounds


@given(
    st.integers(1, 9000),
    st.sampled_from(["noise", "steps", "spikes", "tiny", "huge", "tones"]),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_any_finite_audio_gets_a_score_within_the_attainable_range(
    reward: CEProxy, samples: int, kind: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, generator=g)
    clip = {
        "noise": x,
        "steps": x.sign() * (torch.arange(samples) // 700 % 3),
        "spikes": x * (torch.rand(samples, generator=g) < 0.002),
        "tiny": x * 1e-44,
        "huge": (x * 1e38).clamp(-3.4e38, 3.4e38),
        "tones": tones(samples / SAMPLE_RATE, 220.0, 311.1, each=0.1)[:samples],
    }[kind]
    assert clip.isfinite().all()
    rated = score(reward, clip)
    assert bottom(reward.coefficients) - 1e-5 <= rated <= 10


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4), st.integers(0, 3), st.floats(0, 1e6))
@settings(max_examples=100, deadline=None)
def test_beyond_the_calibrated_range_the_score_stands_still(
    reward: CEProxy, values: list[float], which: int, beyond: float
) -> None:
    terms = list(reward.coefficients.terms.values())
    at_edge, further = torch.tensor([values, values], dtype=torch.float64)
    at_edge[which], further[which] = terms[which].high, terms[which].high + beyond
    both = predict(torch.stack([at_edge, further]), reward.coefficients)
    assert both[0] == both[1]
    at_edge[which], further[which] = terms[which].low, terms[which].low - beyond
    both = predict(torch.stack([at_edge, further]), reward.coefficients)
    assert both[0] == both[1]


def test_inside_the_range_the_score_is_the_documented_sum(reward: CEProxy) -> None:
    terms = reward.coefficients.terms
    x = [0.3 * t.low + 0.7 * t.high for t in terms.values()]
    parts = [t.weight * (v - t.mean) / t.scale for t, v in zip(terms.values(), x, strict=True)]
    expected = reward.coefficients.intercept + sum(parts)
    assert float(predict(torch.tensor([x]), reward.coefficients)) == pytest.approx(expected, abs=1e-6)


def test_describe_refuses_other_shapes() -> None:
    for wrong in (torch.zeros(0), torch.zeros(2, 3), torch.zeros(5, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"float32 of shape \(S,\)"):
            describe(wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_score(reward: CEProxy, play: Player) -> None:
    clip = play(piano_piece(9))
    on_gpu = load_reward("ce_proxy", device="cuda")
    assert float(on_gpu.score(clip[None].cuda())["CE"]) == pytest.approx(score(reward, clip), abs=1e-3)


# --- coefficient files


def write(folder: Path, change: Callable[[Any], None] = lambda _: None) -> Path:
    """The shipped file, changed."""
    data = json.loads(SHIPPED.read_text())
    change(data)
    path = folder / "own.json"
    path.write_text(json.dumps(data))
    return path


def test_own_coefficients_are_used_and_named(reward: CEProxy, play: Player, tmp_path: Path) -> None:
    path = write(tmp_path, lambda d: d.update(intercept=d["intercept"] - 0.5))
    own = load_reward("ce_proxy", coefficients=str(path))
    clip = play(piano_piece())
    assert float(own.score(clip[None])["CE"]) == pytest.approx(score(reward, clip) - 0.5, abs=1e-5)
    assert str(path) in own.provenance


def test_only_what_the_score_needs_must_be_in_the_file(tmp_path: Path) -> None:
    def strip(data: Any) -> None:
        for key in ("clips", "cross_validation", "provenance", "ridge"):
            del data[key]

    found = load_coefficients(write(tmp_path, strip))
    assert found.terms == load_coefficients(SHIPPED).terms and found.spearman is None


def test_scores_stay_on_the_scale(play: Player, tmp_path: Path) -> None:
    for intercept, expected in ((900.0, 10.0), (-900.0, 1.0)):
        own = load_reward("ce_proxy", coefficients=write(tmp_path, lambda d, b=intercept: d.update(intercept=b)))
        assert float(own.score(play(piano_piece())[None])["CE"]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2, expected 1"),
        (lambda d: d.update(version=True), "version True"),
        (lambda d: d.pop("format"), "smart.ce_proxy"),
        (lambda d: d.update(sample_rate=44100), "sample_rate"),
        (lambda d: d.update(axis="PQ"), '"axis": "CE"'),
        (lambda d: d.update(intercept=math.nan), "intercept must be a finite number"),
        (lambda d: d.update(intercept="7"), "intercept must be a finite number, got '7'"),
        (lambda d: d.update(intercept=True), "intercept must be a finite number"),
        (lambda d: d.update(intercept=10**400), "intercept must be a finite number"),
        (lambda d: d.pop("intercept"), "intercept must be a finite number, got None"),
        (lambda d: d.update(descriptors=[]), '"descriptors" must be an object'),
        (lambda d: d["descriptors"].update(loudness={}), 'unknown descriptor "loudness"; known are active'),
        (lambda d: d["descriptors"].pop("bass"), 'descriptor "bass" is missing'),
        (lambda d: d["descriptors"].update(bass=3), 'descriptor "bass" is missing or not an object'),
        (lambda d: d["descriptors"]["bass"].pop("low"), "bass.low must be a finite number, got None"),
        (lambda d: d["descriptors"]["bass"].update(weight=-math.inf), "bass.weight must be a finite number"),
        (lambda d: d["descriptors"]["bass"].update(scale=0), "bass.scale must be above 0"),
        (lambda d: d["descriptors"]["bass"].update(low=9), "bass.low 9.0 is above bass.high"),
        (lambda d: d.update(clips=0), '"clips" must be a positive whole number'),
        (lambda d: d.update(cross_validation=[]), "lacks ungrouped.spearman"),
        (lambda d: d["cross_validation"]["ungrouped"].update(spearman=1), "must be an object"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_entry(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    path = write(tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_reward("ce_proxy", coefficients=path)
    assert message in caught.value.message and str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"1" * 5000, b"[" * 100_000])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.json"):
        load_coefficients(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"python -m smart\.reward\.calibrate"):
            load_coefficients(path)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), lambda inner: st.lists(
    inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4),
    st.sampled_from(["version", "intercept", "descriptors", "clips", "cross_validation", "bass", "weight"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_value_anywhere_gives_a_traceback(tmp_path_factory: Any, value: Any, where: str) -> None:
    def change(data: Any) -> None:
        target = data["descriptors"] if where == "bass" else data
        target = data["descriptors"]["bass"] if where == "weight" else target
        assume(target[where] != value)
        target[where] = value

    path = write(tmp_path_factory.mktemp("any"), change)
    try:
        found = load_coefficients(path)
    except UserError:
        return
    assert math.isfinite(found.intercept) and all(math.isfinite(t.weight) for t in found.terms.values())
