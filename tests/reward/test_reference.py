"""smart.reward.reference and smart.reward.real: excerpts, nearness, Frechet distance, CLAP with random weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from symusic import Note, Score, Tempo, Track

from smart import UserError
from smart.render import find_soundfont
from smart.reward import Reward, load_reward, real, reference
from smart.reward.reference import Clap, Nearness, embed_clips, frechet_distance
from smart.reward.resampling import resample

RATE = 16000


class Bands(Reward):
    """Stands in for an ear: the energy of a clip in four bands."""

    axes = ("LOUD",)
    sample_rate = RATE
    provenance = "four bands"

    def embed(self, audio: torch.Tensor) -> torch.Tensor:
        power = torch.fft.rfft(audio).abs().square()
        parts = [band.mean(dim=1) for band in power.tensor_split([50, 300, 1500], dim=1)]
        return torch.stack(parts, dim=1) / power.mean(dim=1, keepdim=True)


class Deaf(Reward):
    axes = ("X",)
    sample_rate = RATE


@pytest.fixture(autouse=True)
def ears(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    for name in ("Bands", "Deaf"):
        entry = EntryPoint(name.lower(), f"{__name__}:{name}", "smart.rewards")
        monkeypatch.setitem(load_reward.__globals__["BUILT_IN"], name.lower(), entry)


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def low(tmp_path: Path) -> Path:
    """A folder of low sounds: two WAV files and a MIDI file."""
    folder = tmp_path / "low"
    (folder / "inside").mkdir(parents=True)
    soundfile.write(folder / "a.wav", tone(60, 2.0), RATE)
    soundfile.write(folder / "inside" / "b.flac", tone(70, 1.0, 22050), 22050)
    score = Score(480)
    score.tempos.append(Tempo(0, 120.0))
    track = Track()
    track.notes.extend(Note(480 * beat, 480, 30, 90) for beat in range(4))
    score.tracks.append(track)
    score.dump_midi(folder / "c.mid")
    (folder / "notes.txt").write_text("not music")
    return folder


def test_an_ear_tells_one_kind_of_music_from_another(tmp_path: Path) -> None:
    """Slow low chords are nearer to other slow low chords than fast high runs are, and the other way round."""

    def write(folder: str, name: int, notes: list[Note]) -> None:
        score = Score(480)
        score.tempos.append(Tempo(0, 120.0))
        score.tracks.append(Track())
        score.tracks[0].notes.extend(notes)
        (tmp_path / folder).mkdir(exist_ok=True)
        score.dump_midi(tmp_path / folder / f"{name}.mid")

    scale = [0, 2, 4, 5, 7, 9, 11]
    for name in range(4):
        chords = [(36 + name + 12 * (i > 1) + scale[(i + bar) % 7], bar) for bar in range(6) for i in (0, 2, 4)]
        write("slow", name, [Note(bar * 960, 900, pitch, 60) for pitch, bar in chords])
        runs = [72 + name + scale[(3 * step // 2 + name) % 7] for step in range(96)]
        write("fast", name, [Note(120 * step, 110, pitch, 100) for step, pitch in enumerate(runs)])
    clips: dict[str, list[torch.Tensor]] = {}
    for kind in ("slow", "fast"):
        files = real.find_pieces(tmp_path / kind)
        heard = real.read_excerpts(files, [find_soundfont("timgm")], sample_rate=44100, seconds=10.0)
        clips[kind] = [resample(torch.from_numpy(audio), rate, RATE)[None] for audio, rate in heard]
    for own, other in (("slow", "fast"), ("fast", "slow")):
        (tmp_path / own / "3.mid").unlink()  # the clip whose rating counts
        reward = load_reward("reference", folder=str(tmp_path / own))
        far = [reward.score(clip)["NEAR"].item() for clip in clips[other]]
        near = reward.score(clips[own][3])["NEAR"].item()
        assert near > max(far) + 1
        noise = torch.randn(1, 10 * RATE, generator=torch.Generator().manual_seed(0))
        sine = torch.sin(2 * math.pi * 440 * torch.arange(10 * RATE) / RATE)[None]
        assert near > 1 + max(reward.score(clip)["NEAR"].item() for clip in (0.1 * noise, 0.3 * sine))
        assert reward.score(torch.zeros(1, RATE))["NEAR"].item() == 1.0


def test_clips_near_the_folder_are_rated_higher(low: Path) -> None:
    reward = load_reward("reference", folder=str(low), embedding="bands")
    assert isinstance(reward, Nearness) and reward.vectors.shape == (3, 4)
    clips = torch.stack([torch.from_numpy(tone(hertz)) for hertz in (65, 3000)])
    near, far = reward.score(clips)["NEAR"].tolist()
    assert near > 9.5 and 5 < far < 6.5
    centre = torch.nn.functional.normalize(reward.vectors, dim=1).mean(0)
    cosine = torch.nn.functional.cosine_similarity(reward.embed(clips)[0], centre, dim=0).item()
    assert near == pytest.approx(5.5 + 4.5 * cosine, abs=1e-4), "by the formula of the module"
    padded = torch.nn.functional.pad(clips[:1], (0, RATE))
    assert reward.score(padded, torch.tensor([RATE]))["NEAR"].item() == pytest.approx(near, abs=1e-5)
    assert "nearness to 3 excerpts of low" in reward.provenance and str(low) not in reward.provenance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": "nowhere"}, "nowhere is not a folder"),
        ({"folder": "EMPTY"}, "holds 0 MIDI or audio files"),
        ({"embedding": "deaf"}, 'reward "deaf" has no embedding; expected'),
        ({"embedding": "beauty"}, 'no reward "beauty"'),
        ({"embedding": "bands", "model": "x"}, "model = 'x' is for embedding = \"clap\""),
        ({"embedding": "clap", "model": "nowhere"}, "CLAP model nowhere cannot be loaded"),
        ({"soundfont": "no.sf2"}, "no.sf2"),
    ],
)
def test_a_mistake_is_named(low: Path, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (low / "empty").mkdir()
    given = {"folder": str(low), "embedding": "bands", **options}
    given["folder"] = str(low / "empty") if given["folder"] == "EMPTY" else given["folder"]
    with pytest.raises(UserError, match=message):
        load_reward("reference", **given)


def test_frechet_distance_by_hand() -> None:
    one = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + np.array([3.0, 4.0])) == pytest.approx(25), "only the means differ"
    # variances 4/3 and 3 * 4/3 in both directions: 2 (v + 9 v - 2 * 3 v) = 8 v, with 9 v from a factor of 3
    assert frechet_distance(one, 3 * (one - 1) + 1) == pytest.approx(8 * 4 / 3)
    assert math.isnan(frechet_distance(one[:1], one))
    random = np.random.default_rng(0)
    a, b = random.normal(size=(9, 40)), 2 * random.normal(size=(7, 40))  # fewer vectors than dimensions
    from scipy.linalg import sqrtm

    root = sqrtm(np.cov(a.T) @ np.cov(b.T))
    direct = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(direct, rel=1e-3)


def test_no_vector_depends_on_the_other_clips() -> None:
    clips = [(tone(60, 1.0), RATE), (tone(500, 0.5), RATE), (tone(900, 1.0, 22050), 22050)]
    together = embed_clips(Bands(), clips)
    for row, clip in enumerate(clips):
        torch.testing.assert_close(embed_clips(Bands(), [clip])[0], together[row])


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLAP model with random weights, as small as it can be, saved as on the hub."""
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    audio = ClapAudioConfig(
        window_size=8, num_mel_bins=64, spec_size=256, hidden_size=64, patch_embeds_hidden_size=8, depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1], projection_dim=16,
    )  # fmt: skip
    text = ClapTextConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        projection_dim=16,
    )
    torch.manual_seed(1)
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=16))
    folder = tmp_path_factory.mktemp("clap")
    model.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=64, max_length_s=10, truncation="rand_trunc", padding="repeatpad"
    ).save_pretrained(folder)
    return str(folder)


def test_clap_is_loaded_from_a_folder_and_batches(clap: str, low: Path) -> None:
    embedder = Clap(clap)
    assert embedder.sample_rate == 48000
    clips = [(tone(60, 2.0), RATE), (tone(3000, 2.0), RATE), (tone(440, 1.0), RATE)]
    together = embed_clips(embedder, clips)
    assert together.shape == (3, 16) and together.isfinite().all()
    for row, clip in enumerate(clips):
        torch.testing.assert_close(embed_clips(embedder, [clip])[0], together[row], rtol=1e-4, atol=1e-5)
    long = torch.from_numpy(np.concatenate([tone(60, 11.0, 48000), tone(900, 1.0, 48000)]))[None]
    assert torch.equal(embedder.embed(long), embedder.embed(long)), "a long clip is not cropped at random"
    reward = load_reward("reference", folder=str(low), embedding="clap", model=clap)
    assert reward.sample_rate == 48000 and reward.score(torch.zeros(1, 48000))["NEAR"].isfinite().all()


# Real pieces as a target ------------------------------------------------------------------------------------------


def test_an_excerpt_begins_after_a_third_of_a_long_piece() -> None:
    notes = np.array([(second, 0.5, 60, 80, 0, 0) for second in range(60)], float)
    part = real.excerpt(notes, 10.0)
    assert len(part) == 10 and part[0, 0] == 0 and part[-1, 0] == 9
    assert notes[0, 0] == 0, "the piece itself is not changed"
    short = notes[3:10]
    assert real.excerpt(short, 10.0)[:, 0].tolist() == list(range(7))
    assert real.excerpt(notes[:0], 10.0).shape == (0, 6)


def test_of_many_files_some_are_taken_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (tmp_path / f"{number}.mid").touch()
    monkeypatch.setattr(real, "MOST", 4)
    assert [path.stem for path in real.find_pieces(tmp_path)] == ["0", "2", "5", "7"]


def test_the_target_is_the_median_of_a_folder(low: Path) -> None:
    reward = load_reward("ce_proxy")
    target = real.Target(reward, {}, str(low))
    fonts = [find_soundfont("timgm")]
    found = real.measure(target, fonts, sample_rate=RATE, seconds=2.0)
    ratings = []
    for audio, rate in real.read_excerpts(real.find_pieces(low), fonts, sample_rate=RATE, seconds=2.0):
        clip = reference.resample(torch.from_numpy(audio), rate, RATE)
        ratings.append(reward.score(clip[None])["CE"].item())
    assert len(ratings) == 3 and found == pytest.approx(sorted(ratings)[1], abs=1e-5)


def test_figures_ship_for_a_single_axis_without_options() -> None:
    fonts = [find_soundfont("timgm")]
    reward = load_reward("ce_proxy")
    shipped = real.shipped_figure(real.Target(reward, {}, ""), fonts)
    assert 7 < shipped < 8
    reward.set_weights({"CE": -2.0})
    assert real.shipped_figure(real.Target(reward, {}, ""), fonts) == -shipped
    for target, where in (
        (real.Target(reward, {"coefficients": "x"}, ""), fonts),
        (real.Target(reward, {}, ""), [Path("other.sf2")]),
        (real.Target(Bands(), {}, ""), fonts),
    ):
        with pytest.raises(UserError, match="no figure ships for"):
            real.check(target, where)


@pytest.mark.parametrize("kind", ["naturalness", "naturalness_mel"])
def test_an_ear_brings_its_own_figures(kind: str) -> None:
    """The median of real excerpts through each soundfont that it was tested with, averaged over those of the run."""
    ear = load_reward(kind)
    target, medians = real.Target(ear, {}, ""), ear.real_by_soundfont
    assert set(medians) == {"fluidr3", "musescore", "timgm"}
    assert real.shipped_figure(target, [find_soundfont("timgm")]) == pytest.approx(medians["timgm"]["NA"])
    both = [find_soundfont("timgm"), Path("FluidR3_GM.sf2")]
    assert real.shipped_figure(target, both) == pytest.approx((medians["timgm"]["NA"] + medians["fluidr3"]["NA"]) / 2)
    with pytest.raises(UserError, match="no figure ships for"):
        real.check(target, [Path("other.sf2")])


def test_the_numbers_of_a_run_are_read_back(tmp_path: Path) -> None:
    assert real.read_targets(tmp_path) == {}
    (tmp_path / real.TARGETS).write_text('{"ce_proxy": 7.25}')
    assert real.read_targets(tmp_path) == {"ce_proxy": 7.25}
    (tmp_path / real.TARGETS).write_text('["ce_proxy"]')
    with pytest.raises(UserError, match=r"targets.json cannot be read"):
        real.read_targets(tmp_path)


def test_a_file_that_cannot_be_read_is_named(low: Path) -> None:
    (low / "d.mid").write_bytes(b"not a MIDI file")
    with pytest.raises(UserError, match=r"d\.mid"):
        list(real.read_excerpts(real.find_pieces(low), [], sample_rate=RATE, seconds=1.0))
