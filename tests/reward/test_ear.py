"""smart.reward.ear: the ears that ship, what they ignore, what they rate low, and the files they accept."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from smart import UserError
from smart.render import load_soundfont, render_notes
from smart.reward import load_reward, resample
from smart.reward.ear import LAYOUTS, SHIPPED, Ear, MelEar, Network, Scale, save_ear
from smart.reward.spectra import KINDS, SAMPLE_RATE, WINDOW, hear

NAMES = ("naturalness", "naturalness_mel")
CHORDS = ((48, 52, 55), (45, 48, 52), (41, 45, 48), (43, 47, 50))  # C, A minor, F, G
TUNE = (64, 67, 72, 71, 69, 72, 64, 60, 65, 69, 72, 74, 71, 67, 62, 65)


def piece() -> np.ndarray:
    """Ten seconds: broken chords under a tune, twice, the second time higher."""
    rows = []
    for beat in range(20):
        chord = CHORDS[beat // 2 % 4]
        rows.append((beat * 0.5, 0.9, chord[0] - 12, 70))
        rows += [(beat * 0.5 + 0.125 * k, 0.4, chord[k % 3], 55 + 4 * k) for k in range(4)]
        rows.append((beat * 0.5, 0.48, TUNE[beat % 16] + 12 * (beat >= 16), 84 + beat % 3))
    return np.array([(*row, 0, 0) for row in rows], np.float64)


def random_notes(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    on = np.sort(draw.integers(0, 80, 100)) * 0.125
    rows = [on, np.full(100, 0.25), draw.integers(30, 100, 100), draw.integers(50, 100, 100)]
    return np.stack([*rows, 0 * on, 0 * on], axis=1)


@pytest.fixture(scope="module")
def soundfont() -> object:
    return load_soundfont("timgm")


def play(soundfont: object, notes: np.ndarray, rate: int = SAMPLE_RATE) -> torch.Tensor:
    audio = torch.from_numpy(render_notes(soundfont, notes, sample_rate=rate)).mean(dim=0)
    return resample(audio, rate, SAMPLE_RATE)


@pytest.fixture(scope="module", params=NAMES)
def ear(request: pytest.FixtureRequest) -> Ear:
    found = load_reward(request.param)
    assert isinstance(found, Ear)
    return found


@pytest.fixture(scope="module")
def music(soundfont: object) -> torch.Tensor:
    return play(soundfont, piece())


def rating(ear: Ear, clip: torch.Tensor) -> float:
    return float(ear.score(clip[None])["NA"])


# --- what ships


def test_what_ships_is_small_and_says_what_it_is(ear: Ear) -> None:
    assert ear.axes == ("NA",) and ear.sample_rate == 16_000 and not ear.is_stand_in
    assert "pieces" in ear.provenance and "shipped weights" in ear.provenance and "\n" not in ear.provenance
    assert (SHIPPED / f"{ear.name}.safetensors").stat().st_size <= 2_000_000
    assert 6 < ear.real["NA"] < 8
    assert {"timgm", "fluidr3"} <= set(ear.real_by_soundfont)
    assert all(5.5 < axes["NA"] < 8.5 for axes in ear.real_by_soundfont.values())


def test_the_two_ears_hear_differently_and_were_taught_by_different_pieces() -> None:
    one, other = (load_reward(name) for name in NAMES)
    assert isinstance(one, Ear) and isinstance(other, MelEar)
    assert one.spectra != other.spectra
    settings = [ear.facts["settings"] for ear in (one, other)]
    assert [entry["part"] for entry in settings] == [[1, 2], [2, 2]]
    assert settings[0]["seed"] != settings[1]["seed"] and settings[0]["pieces"] != settings[1]["pieces"]


def test_kinds_that_were_held_out_were_never_heard(ear: Ear) -> None:
    assert not set(ear.facts["heard"]) & set(ear.facts["never"])
    assert set(ear.facts["never"]) <= set(ear.facts["kinds"])


# --- what it rates low


def test_music_is_rated_above_what_is_none(ear: Ear, soundfont: object, music: torch.Tensor) -> None:
    held = np.array([(0, 10, pitch, 90, 0, 0) for pitch in (48, 55, 60, 64)], np.float64)
    one_note = np.array([(k * 0.25, 0.2, 60, 90, 0, 0) for k in range(40)], np.float64)
    noise = torch.randn(WINDOW, generator=torch.Generator().manual_seed(1)) * 0.1
    lows = {
        "held chord": rating(ear, play(soundfont, held)),
        "one note repeated": rating(ear, play(soundfont, one_note)),
        "white noise": rating(ear, noise),
        "random notes": float(np.mean([rating(ear, play(soundfont, random_notes(seed))) for seed in range(4)])),
    }
    assert rating(ear, torch.zeros(WINDOW)) == 1.0
    assert all(value < 4 for value in lows.values()), lows
    assert rating(ear, music) > max(lows.values()) + 1, lows


# --- what it ignores


def test_neither_batch_nor_padding_nor_order_changes_a_bit(ear: Ear, soundfont: object, music: torch.Tensor) -> None:
    other = play(soundfont, random_notes(9))
    clips = [music[:120_000], other[:50_000], music[30_000:90_001], other[:1]]
    alone = torch.stack([ear.score(clip[None])["NA"][0] for clip in clips])
    padded = torch.full((4, 130_000), math.nan)
    for row, clip in enumerate(clips):
        padded[row, : len(clip)] = clip
    lengths = torch.tensor([len(clip) for clip in clips])
    assert torch.equal(ear.score(padded, lengths)["NA"], alone)
    assert torch.equal(ear.score(padded.flip(0), lengths.flip(0))["NA"].flip(0), alone)
    silence = torch.nn.functional.pad(clips[0], (0, WINDOW - 120_000))
    assert torch.equal(ear.score(silence[None])["NA"], alone[:1])
    assert ear.together == 1  # so a run need not wait for a clip's neighbours


@pytest.mark.parametrize("gain", [1e-3, 0.3, 40.0])
def test_gain_matters_little(ear: Ear, music: torch.Tensor, gain: float) -> None:
    assert rating(ear, music * gain) == pytest.approx(rating(ear, music), abs=0.02)


def test_the_rate_of_rendering_matters_little(ear: Ear, soundfont: object, music: torch.Tensor) -> None:
    assert rating(ear, play(soundfont, piece(), 44_100)) == pytest.approx(rating(ear, music), abs=0.6)


def test_a_longer_clip_is_the_mean_of_its_windows(ear: Ear, music: torch.Tensor) -> None:
    music = torch.nn.functional.pad(music, (0, max(0, WINDOW - len(music))))[:WINDOW]
    both = torch.cat([music, music[: WINDOW // 2]])
    expected = (2 * rating(ear, music) + rating(ear, music[: WINDOW // 2])) / 3
    assert rating(ear, both) == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(ear.embed(torch.cat([music, music])[None]), ear.embed(music[None]), atol=1e-6)


def test_embeddings_belong_to_their_clips(ear: Ear, music: torch.Tensor) -> None:
    clips = torch.stack([music[:80_000], music[40_000:120_000], torch.full((80_000,), math.nan)])
    found = ear.embed(clips, torch.tensor([80_000, 60_000, 80_000]))
    assert found.shape[0] == 3 and found.shape[1] % 96 == 0
    assert found.dtype == torch.float32 and found[2].isnan().all()
    assert torch.equal(found[1], ear.embed(music[None, 40_000:100_000])[0])
    assert not torch.equal(found[0], found[1])


# --- spectra


@pytest.mark.parametrize("kind", list(KINDS))
def test_spectra_have_their_shape_and_do_not_depend_on_padding(kind: str) -> None:
    clip = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    spectra = hear(clip, kind)
    assert spectra.shape == KINDS[kind] and spectra.dtype == torch.uint8 and int(spectra.max()) == 255
    assert torch.equal(hear(torch.nn.functional.pad(clip, (0, 500)), kind), spectra)
    assert not hear(torch.zeros(100), kind).any()
    with pytest.raises(ValueError, match="shape"):
        hear(torch.zeros(WINDOW + 1), kind)


def test_a_tone_is_heard_at_its_semitone() -> None:
    time = torch.arange(WINDOW) / SAMPLE_RATE
    for pitch in (45, 60, 69, 88, 100):
        tone = torch.sin(2 * math.pi * 440 * 2 ** ((pitch - 69) / 12) * time)
        spectra = hear(tone, "log")[:, :, 100]
        assert int(spectra[1].argmax()) == pitch - 21  # the middle one of the three bands of its semitone
        assert int(spectra[3].argmax()) == pitch - 21
        if pitch >= 60:  # lower, a semitone is narrower than the window resolves
            assert int(spectra[1, pitch - 20]) < 255 * (1 - 15 / 80)


# --- files


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    scale = Scale((0.1, 0.2), (1.0, 2.0), 1.5, 0.5)
    members = [Network(LAYOUTS["mel"]) for _ in range(2)]
    save_ear(tmp_path / "ear.safetensors", members, scale, {"median": 7.0, "real": {"timgm": 6.9}, "pieces": 3})
    return tmp_path / "ear.safetensors"


def test_the_least_member_counts(small: Path) -> None:
    ear = load_reward("naturalness", model=small)
    assert isinstance(ear, Ear) and ear.spectra == "mel" and ear.real_by_soundfont == {"timgm": {"NA": 6.9}}
    assert "weights" in ear.provenance and "2 networks" in ear.provenance
    clip = torch.randn(WINDOW, generator=torch.Generator().manual_seed(3))
    first, second = ear.answers(hear(clip, "mel")[None])[0].tolist()
    least = min((first - 0.1) / 1.0, (second - 0.2) / 2.0)
    assert rating(ear, clip) == pytest.approx(1 + 9 / (1 + math.exp(-(1.5 * least + 0.5))), abs=1e-4)
    assert ear.embed(clip[None]).shape == (1, 2 * 3 * 96)


def test_a_fused_network_answers_the_same() -> None:
    torch.manual_seed(1)
    network = Network(LAYOUTS["log"])
    clips = torch.randint(0, 256, (3, *KINDS["log"]), dtype=torch.uint8)
    network.train()(clips)  # moves the running statistics
    with torch.no_grad():
        assert torch.allclose(network.eval()(clips), network.fused()(clips), atol=1e-4)


def damage(path: Path, **changes: object) -> None:
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    if "drop" in changes:
        tensors.pop(next(iter(tensors)))
    about |= {key: value for key, value in changes.items() if key in about}
    metadata = {key: str(changes.get(key, value)) for key, value in (metadata | {"about": json.dumps(about)}).items()}
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "expected a safetensors file of the format"),
        ({"version": "1"}, "expected a safetensors file of the format"),
        ({"layout": {}}, "damaged"),
        ({"layout": {"spectra": "lag"}}, "damaged"),
        ({"scale": {"mean": ["x"]}}, "damaged"),
        ({"members": 3}, "damaged"),
        ({"members": "many"}, "damaged"),
        ({"drop": True}, "damaged"),
    ],
)
def test_a_damaged_file_is_one_clear_line(small: Path, changes: dict[str, object], said: str) -> None:
    damage(small, **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_reward("naturalness", model=small)
    assert str(small) in caught.value.message and "\n" not in caught.value.message
    assert "python -m smart.reward.naturalness train" in caught.value.message


def test_a_missing_file_and_another_file_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_reward("naturalness", model=tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_reward("naturalness", model=tmp_path / "text")
