"""smart.evaluate's rate, soundfonts and hacks, on real files and a real soundfont, with scipy as the reference."""

import csv
import json
import math
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from scipy import stats
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track

from smart import UserError
from smart.corpus import SPLITS, ShardWriter
from smart.corpus.piece import Limits
from smart.evaluate import hacks, rate, ratings, soundfonts
from smart.evaluate.command import main
from smart.evaluate.sample import read_settings
from smart.files import hold, sha256, write_atomically
from smart.render import RenderError, RenderPool, find_soundfont, render_notes, score_notes
from smart.reward import Reward, load_reward, resample
from smart.run import folder
from smart.tokens import build_tokenizer, encode, merge_piano, save_tokenizer

RATE = 16000


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def music(seed: int, beats: int = 16) -> Any:
    random = np.random.default_rng(seed)
    score = Score(24)
    score.tempos.append(Tempo(0, 120))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    track = Track(program=0)
    for beat in range(beats):
        for pitch in random.choice(np.arange(40, 80), int(random.integers(1, 4)), replace=False):
            track.notes.append(Note(24 * beat, 24, int(pitch), int(random.integers(40, 110))))
    score.tracks.append(track)
    return score


def melody(seconds: float, rate_: int) -> np.ndarray:
    """Sines that change every quarter of a second, which ce_proxy rates like music."""
    time = np.arange(round(seconds * rate_)) / rate_
    step = (time * 4).astype(int)
    voices = [np.sin(2 * np.pi * 110 * 2 ** (((step * factor) % 24) / 12) * time) for factor in (5, 7, 11)]
    return (0.2 * np.sum(voices, axis=0)).astype(np.float32)


@pytest.fixture(scope="module")
def midi(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("midi")
    for seed in range(4):
        music(seed).dump_midi(folder / f"{seed}.mid")
    return sorted(folder.iterdir())


# --- rate ---------------------------------------------------------------------------------------------------------


def test_rate_takes_any_audio_and_names_what_it_cannot_read(midi: list[Path], tmp_path: Path) -> None:
    clip = melody(12, 44100)
    soundfile.write(tmp_path / "mono.wav", clip, 44100, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([clip, clip], 1), 44100, subtype="FLOAT")
    soundfile.write(tmp_path / "five.flac", np.stack([clip] * 5, 1), 44100)
    soundfile.write(tmp_path / "music.ogg", melody(3, 22050), 22050)
    soundfile.write(tmp_path / "music.mp3", melody(3, 32000), 32000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros((0, 2)), 48000)
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 8000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "broken.mid").write_bytes(midi[0].read_bytes()[:-9])
    good = ["mono.wav", "stereo.wav", "five.flac", "music.ogg", "music.mp3", "nothing.wav", "one.wav"]
    bad = ["broken.wav", "broken.mid", "absent.flac", "absent.mid"]
    files = [str(tmp_path / name) for name in (bad[0], *good, *bad[1:])]
    result = run("rate", *files, midi[0], "--out", tmp_path / "out.csv", "--seconds", 12, code=2)
    assert "4 of 12 files could not be rated" in result.output
    assert all(str(tmp_path / name) in result.output.split("could not be rated")[1] for name in bad)
    rows = {Path(row["file"]).name: row for row in read(tmp_path / "out.csv")}
    assert list(rows) == ["silence", "white noise", *good, midi[0].name]
    assert [int(rows[name]["windows"]) for name in good] == [2, 2, 2, 1, 1, 0, 1]
    mean = {name: float(row["mean"] or "nan") for name, row in rows.items()}
    assert mean["mono.wav"] == mean["stereo.wav"] == pytest.approx(mean["five.flac"], abs=1e-3)
    assert math.isnan(mean["nothing.wav"]) and math.isfinite(mean["one.wav"])
    assert mean["mono.wav"] > mean["silence"] + 0.5
    reward = load_reward("ce_proxy")
    windows = [
        reward.score(resample(torch.from_numpy(part), 44100, RATE)[None])["CE"]
        for part in (clip[:441000], clip[441000:])
    ]
    assert mean["mono.wav"] == pytest.approx(float(windows[0] * 10 + windows[1] * 2) / 12, abs=1e-5)
    audio = render_notes("timgm", score_notes(music(0)), seconds=12)
    wave = resample(torch.from_numpy(audio.mean(axis=0)), 44100, RATE)[None]
    assert rows[midi[0].name]["windows"] == "1" and mean[midi[0].name] == pytest.approx(
        float(reward.score(wave)["CE"]), abs=1e-5
    )


@pytest.fixture(scope="module")
def pedalled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of short notes under a pedal that is pressed throughout."""
    folder = tmp_path_factory.mktemp("pedalled")
    for seed in range(2):
        score = music(seed)
        for track in score.tracks:
            for note in track.notes:
                note.duration = 6
            track.controls.append(ControlChange(0, 64, 127))
        score.dump_midi(folder / f"pedalled-{seed}.mid")
    return sorted(folder.iterdir())


def test_rate_hears_the_pedal_unless_told_not_to(midi: list[Path], pedalled: list[Path], tmp_path: Path) -> None:
    found = []
    for name, words in (("held", []), ("written", ["--no-pedal"])):
        out = tmp_path / f"{name}.csv"
        run("rate", midi[0], pedalled[0], *words, "--seconds", 4, "--sample-rate", RATE, "--out", out)
        found.append({row["file"]: float(row["mean"]) for row in read(out)})
    held, written = found
    assert {file for file in held if held[file] != written[file]} == {str(pedalled[0])}


def test_soundfonts_and_hacks_hear_the_pedal_unless_told_not_to(pedalled: list[Path], tmp_path: Path) -> None:
    """They record the durations as written, so that ratings of both readings never share a folder."""
    common = ["--seconds", 2, "--sample-rate", RATE, "--workers", 1, "--out"]
    for words in (["soundfonts", "--soundfonts", "timgm", *pedalled], ["hacks", *pedalled, "--soundfont", "timgm"]):
        rated = []
        for name, more in (("held", []), ("written", ["--no-pedal"])):
            out = tmp_path / words[0] / name
            run(*words, *more, *common, out)
            rated.append(read(out / "ratings.csv")[0]["rating"])
            assert ("pedal" in json.loads((out / "settings.json").read_text())) == bool(more)
        assert rated[0] != rated[1]
        assert "other settings (pedal" in run(*words, *common, tmp_path / words[0] / "written", code=2).output
    soundfile.write(sound := tmp_path / "a.wav", melody(3, RATE), RATE)
    for words in (["soundfonts", "--corpus", tmp_path, "--soundfonts", "timgm"], ["hacks"], ["rate", sound]):
        assert "--no-pedal is for MIDI files" in run(*words, "--no-pedal", "--out", tmp_path / "no", code=2).output


def test_rate_keeps_what_is_there_and_reads_no_more_than_asked(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", melody(25, 8000), 8000)
    out = tmp_path / "out.csv"
    run("rate", tmp_path / "long.wav", "--out", out, "--seconds", 5)
    assert read(out)[-1]["seconds"] == "5.0"
    before = out.read_bytes()
    assert "--overwrite" in run("rate", "--out", out, code=2).output and out.read_bytes() == before
    run("rate", tmp_path / "long.wav", "--out", out, "--overwrite")
    assert read(out)[-1]["windows"] == "3" and read(out)[-1]["low"]


@pytest.mark.parametrize(
    ("seconds", "ratings_", "known"),
    [
        ([10.0, 10.0, 10.0], [5.0, 6.0, 7.0], True),
        ([10.0, 10.0, 5.0], [5.0, 6.0, 7.0], True),
        ([10.0, 10.0, 0.001], [5.0, 6.0, 1.0], False),  # two windows and a click
        ([10.0, 0.001], [5.0, 6.0], False),
        ([10.0, 1.0], [5.0, 6.0], False),
        ([10.0, 10.0], [1.0, 10.0], False),
        ([10.0] * 6, [5.0] * 6, False),
        ([10.0] * 3, [1.0, 10.0, 1.0], False),  # from below 1 to above 10
        ([10.0] * 4, [9.0, 10.0, 9.9, 9.5], True),
        ([10.0], [5.0], False),
    ],
)
def test_an_interval_over_windows_is_on_the_scale_or_left_out(
    seconds: list[float], ratings_: list[float], known: bool
) -> None:
    """A last window of a millisecond has no degree of freedom of its own: bounds of 1e152 on a scale to 10."""
    found = rate.summarise(np.array(ratings_), [round(each * 16000) for each in seconds])
    assert found["mean"] == pytest.approx(np.average(ratings_, weights=seconds), abs=1e-3)
    assert math.isfinite(found["low"]) == math.isfinite(found["high"]) == known
    assert not known or 1 <= found["low"] <= found["mean"] <= found["high"] <= 10


def test_a_file_without_an_interval_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short-end.wav", melody(20.01, 8000), 8000)
    output = run("rate", tmp_path / "short-end.wav").output
    assert "short-end.wav" in output.split("without an interval, since fewer than three windows")[1]


@pytest.mark.parametrize("seed", range(4))
def test_damage_to_saved_ratings_is_found_and_they_are_made_again(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any bit of ratings.csv or of its digests: the same ratings, or they are made again, and that is said."""
    draws = np.random.default_rng(seed)
    true = {f"font {unit}": {"x.CE": draws.normal(5, 1, 3), "x.PQ": draws.normal(5, 1, 3)} for unit in range(3)}
    true["font 1"]["x.CE"][1] = math.nan
    kept = ratings.Kept(tmp_path / "out", {"a": 1}, ["p", "q,r", "s"])
    for unit, columns_ in true.items():
        kept.get(unit, lambda columns_=columns_: columns_)
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in ratings.Kept.FILES}
    again = ratings.Kept(tmp_path / "out", {"a": 1}, ["p", "q,r", "s"])
    assert len(again.units) == 3 and not capsys.readouterr().err
    for name in ratings.Kept.FILES[1:]:
        for _ in range(60):
            data = bytearray(whole[name])
            data[draws.integers(len(data))] ^= 1 << int(draws.integers(8))
            (tmp_path / "out" / name).write_bytes(data)
            found = ratings.Kept(tmp_path / "out", {"a": 1}, ["p", "q,r", "s"])
            for unit, columns_ in found.units.items():
                for column, values in columns_.items():
                    np.testing.assert_array_equal(values, true[unit][column])
            missing = set(true) - set(found.units)
            if missing and name == "ratings.sha256.json":
                assert "is damaged; made again" in capsys.readouterr().err
        (tmp_path / "out" / name).write_bytes(whole[name])
    (tmp_path / "out" / "settings.json").write_bytes(b"\xff" + whole["settings.json"])
    with pytest.raises(UserError, match="other settings"):
        ratings.Kept(tmp_path / "out", {"a": 1}, ["p", "q,r", "s"])


def test_the_bank_rates_as_the_pool(midi: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words, cached = ["rate", midi[0], "--seconds", 3, "--sample-rate", RATE], []
    for backend in ("pool", "bank"):
        run(*words, "--backend", backend, "--out", tmp_path / f"{backend}.csv")
        cached.append(len(list((tmp_path / "cache").rglob("*.safetensors"))))
    assert cached[0] == 0 < cached[1]
    pool, bank = (float(read(tmp_path / f"{name}.csv")[-1]["mean"]) for name in ("pool", "bank"))
    assert bank == pytest.approx(pool, abs=1e-3)


def test_the_interval_of_equal_windows_is_students() -> None:
    values = np.array([5.0, 6.5, 5.5, 7.0])
    found = rate.summarise(values, [10] * 4)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found == pytest.approx({"mean": 6.0, "low": low, "high": high})
    assert rate.summarise(np.array([5.0, math.nan]), [10, 10]) == pytest.approx(
        {"mean": 5.0, "low": math.nan, "high": math.nan}, nan_ok=True
    )
    assert rate.summarise(np.array([4.0, 8.0]), [30, 10])["mean"] == 5.0
    assert math.isnan(rate.summarise(np.empty(0), [])["mean"])


class Published(Reward):
    """Gives silence and noise the paper's ratings, shifted."""

    axes = ("CE", "CU", "PC", "PQ")
    sample_rate = RATE
    shift, is_published = 0.0, True

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        silent = audio.abs().amax(dim=1) == 0
        paper = rate.PAPER
        return {
            axis: torch.where(silent, paper["silence"][axis], paper["white noise"][axis]) + self.shift
            for axis in self.axes
        }


@pytest.mark.parametrize(
    ("shift", "is_published", "expected"),
    [
        (0.05, True, "the scorer is right"),
        (0.05, False, "the scorer is right"),
        (0.2, False, "no verdict is possible"),
        (0.2, True, "4 of 8 ratings differ from the paper's"),
        (-1.0, True, "8 of 8 ratings differ from the paper's"),
    ],
)
def test_the_verdict_on_the_papers_silence_and_noise(
    shift: float, is_published: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Published()
    reward.name, reward.shift, reward.is_published = "audiobox", shift, is_published
    others = load_reward("ce_proxy")  # its axis is called CE too
    monkeypatch.setattr(ratings, "load_reward", lambda kind, **_: reward if kind == "audiobox" else others)
    output = run("rate", "--reward", "audiobox", "--reward", "ce_proxy").output
    assert expected in output
    assert f"{3.24 + shift:.2f} (paper 3.24)" in output and f"{4.79 + shift:.2f} (paper 4.79)" in output


def test_options_go_to_their_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(kind: str, *, device: str, **options: Any) -> str:
        seen[kind] = options
        return kind

    monkeypatch.setattr(ratings, "load_reward", load)
    ratings.load_rewards(["audiobox"], ["model=a.b/c=d", "batch_size=2"], "cpu")
    assert seen["audiobox"] == {"model": "a.b/c=d", "batch_size": 2}
    ratings.load_rewards(["audiobox", "ce_proxy"], ["audiobox.model=x", "ce_proxy.coefficients=y"], "cpu")
    assert seen == {"audiobox": {"model": "x"}, "ce_proxy": {"coefficients": "y"}}
    for kinds, options, message in (
        (["a", "b"], ["model=x"], "for which reward"),
        (["a", "a"], [], "each kind once"),
        (["a"], ["model"], "expected KEY=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            ratings.load_rewards(kinds, options, "cpu")


# --- soundfonts ---------------------------------------------------------------------------------------------------


def test_rank_statistics_are_scipys() -> None:
    random = np.random.default_rng(0)
    for raters, count in ((2, 5), (4, 9), (3, 20)):
        values = np.round(random.normal(size=(raters, count)) + random.normal(size=count), 1)  # with ties
        expected = stats.friedmanchisquare(*values.T).statistic / (raters * (count - 1))
        assert float(soundfonts.kendall_w(values)) == pytest.approx(expected, abs=1e-12)
        expected = stats.spearmanr(values[0], values[1]).statistic
        assert float(soundfonts.spearman(values[0], values[1])) == pytest.approx(expected, abs=1e-12)
    assert soundfonts.kendall_w(np.stack([np.arange(6)] * 3)) == 1
    assert math.isnan(float(soundfonts.kendall_w(np.zeros((3, 6)))))
    assert math.isnan(float(soundfonts.spearman(np.zeros(4), np.arange(4))))


def test_soundfonts_compares_the_same_pieces_and_goes_on_where_it_was(
    midi: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a soundfont under another name agrees with it in everything."""
    copy = tmp_path / "other.sf2"
    shutil.copy(find_soundfont("timgm"), copy)
    out = tmp_path / "out"
    words = ["soundfonts", "--soundfonts", "timgm", copy, *midi, "--seconds", 3, "--sample-rate", RATE, "--workers", 1]
    output = run(*words, "--out", out).output
    means, agreed = read(out / "soundfonts.csv"), read(out / "agreement.csv")
    assert [row["soundfont"] for row in means] == ["timgm", "other"] and means[0]["mean"] == means[1]["mean"]
    assert [(row["measure"], float(row["mean"])) for row in agreed] == [("spearman", 1.0), ("kendall_w", 1.0)]
    assert float(means[0]["low"]) < float(means[0]["mean"]) < float(means[0]["high"]) and means[0]["n"] == "4"
    assert float(means[1]["difference"]) == 0 and means[1]["difference_high"] == ""  # all equal: no spread is known
    assert {row["low"] for row in agreed} == {""}  # ranks of four pieces tell no interval
    assert "a number without an interval: too few pieces" in output
    assert "Kendall's W" in output and all((out / f"soundfonts{kind}").stat().st_size for kind in (".png", ".pdf"))
    clips = [render_notes("timgm", score_notes(music(seed)), sample_rate=RATE, seconds=3) for seed in range(4)]
    scored = load_reward("ce_proxy").score(torch.stack([torch.from_numpy(clip.mean(axis=0)) for clip in clips]))["CE"]
    assert float(means[0]["mean"]) == pytest.approx(float(scored.mean()), abs=1e-5)

    # as if it had stopped after the first soundfont
    table = (out / "ratings.csv").read_text().splitlines(keepends=True)
    write_atomically(out / "ratings.csv", "".join(line for line in table if not line.startswith("other")).encode())
    started = []
    opened = soundfonts.open_renderer
    monkeypatch.setattr(
        soundfonts, "open_renderer", lambda *args, **keys: started.append(args) or opened(*args, **keys)
    )
    assert run(*words, "--out", out).output == output
    assert started == [("pool", copy)] and (out / "ratings.csv").read_text().splitlines(keepends=True) == table
    assert "other settings" in run(*words, "--seed", 1, "--seconds", 2, "--out", out, code=2).output


def test_soundfonts_says_what_is_wrong(midi: list[Path], tmp_path: Path) -> None:
    fonts = ["soundfonts", "--soundfonts", "timgm", "--out", tmp_path / "out"]
    assert "either MIDI files or --corpus" in run(*fonts, code=2).output
    assert "either MIDI files or --corpus" in run(*fonts, midi[0], "--corpus", tmp_path, code=2).output
    output = run(*fonts, "nosuchfont", tmp_path / "absent.mid", code=2).output
    assert "nosuchfont" in output and "absent.mid" in output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert "something else" in run(*fonts[:-1], tmp_path / "full", midi[0], code=2).output


def test_the_papers_soundfonts_are_known_by_their_files() -> None:
    font = soundfonts.Font("sgm", Path("SGM-V2.01-XG-2.04.sf2"), "sgm")
    assert soundfonts._paper(font, "audiobox.CE") == 6.602 and soundfonts._paper(font, "audiobox.mean") == 6.123
    assert math.isnan(soundfonts._paper(font, "ce_proxy.CE"))
    assert math.isnan(soundfonts._paper(font._replace(known=None), "audiobox.CE"))
    for axes in soundfonts.PAPER.values():  # the paper's averages match its axes
        assert np.mean([axes[axis] for axis in ("CE", "CU", "PC", "PQ")]) == pytest.approx(axes["mean"], abs=0.002)
    assert soundfonts.find_fonts(["timgm"])[0].known == "timgm"


def test_pieces_of_a_corpus_are_drawn_from_the_seed(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    writers = {split: ShardWriter(tmp_path, split) for split in SPLITS}
    for seed in range(6):
        tokens = encode(tokenizer, merge_piano(music(seed)))
        writers["train"].add(np.array(tokens, "<u2").tobytes())
    digest = sha256(tmp_path / "tokenizer" / "tokenizer.json")
    manifest = {
        "format": 1,
        "tokenizer": {"sha256": digest},
        "splits": {split: {"shards": writer.close()} for split, writer in writers.items()},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    few = soundfonts.from_corpus(tmp_path, "train", 3, 0)
    assert len(few) == 3 and list(few) == list(soundfonts.from_corpus(tmp_path, "train", 3, 0))
    everything = soundfonts.from_corpus(tmp_path, "train", 100, 5)
    assert list(everything) == [f"train {row}" for row in range(6)]
    assert everything["train 2"].note_num() == music(2).note_num()
    with pytest.raises(UserError, match="has no pieces"):
        soundfonts.from_corpus(tmp_path, "test", 3, 0)


# --- hacks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def piece() -> hacks.Real:
    found = hacks.real_piece("piece", music(3, beats=40), 10.0)
    assert found is not None
    return found


def made(name: str, piece: hacks.Real) -> np.ndarray:
    notes = hacks.FROM_NOTES[name][1](piece, np.random.default_rng(0), 10.0)
    assert notes is not None
    return notes


def in_bars(notes: np.ndarray, bar: float) -> list[bytes]:
    """The notes of each bar, in order."""
    number = (notes[:, 0] // bar).astype(int)
    bars = [notes[number == place] - np.eye(6)[0] * place * bar for place in range(5)]
    return [np.round(part[np.lexsort(part.T)], 9).tobytes() for part in bars]


def test_probes_are_what_they_are_called(piece: hacks.Real) -> None:
    notes = piece.notes
    assert piece.bar == 2.0 and notes[:, 0].max() < 10 and (notes[:, 0] + notes[:, 1]).max() <= 10
    shuffled = made("bars shuffled", piece)
    assert sorted(in_bars(shuffled, 2.0)) == sorted(in_bars(notes, 2.0)) and in_bars(shuffled, 2.0) != in_bars(
        notes, 2.0
    )
    looped = made("one bar looped", piece)
    assert in_bars(looped, 2.0) == [in_bars(notes, 2.0)[0]] * 5
    drawn = made("random notes, same density", piece)
    assert len(drawn) == len(notes) and sorted(drawn[:, 3]) == sorted(notes[:, 3]) and drawn[:, 2].std() > 15
    higher = made("a fourth higher", piece)
    assert np.array_equal(higher - notes, np.eye(6)[[2] * len(notes)] * 5)
    assert set(made("all velocities 40", piece)[:, 3]) == {40.0}
    chord = made("one chord held", piece)
    assert len(set(chord[:, 2])) == 4 and np.array_equal(chord[:, 1], [10.0] * 4)
    repeated = made("one note repeated", piece)
    assert len(repeated) == 40 and set(repeated[:, 2]) == {stats.mode(notes[:, 2]).mode}
    short = hacks.real_piece("short", music(1, beats=3), 10.0)
    assert short is not None and hacks.loop(short, np.random.default_rng(0), 10) is None
    assert hacks.shuffled_bars(short, np.random.default_rng(0), 10) is None
    assert hacks.real_piece("empty", Score(24), 10.0) is None


@pytest.mark.parametrize(
    ("kind", "mean", "low", "high", "expected"),
    [
        (hacks.NONSENSE, 0.0, -1, 1, "prefers nonsense"),
        (hacks.NONSENSE, 0.5, 0.1, 1, "prefers nonsense"),
        (hacks.NONSENSE, -0.5, -1, 0.1, "hardly tells it from music"),
        (hacks.NONSENSE, -0.5, -1, -0.1, "rates it lower"),
        (hacks.NONSENSE, -0.5, math.nan, math.nan, "cannot be told"),
        (hacks.FORM, 0.5, math.nan, math.nan, "cannot be told"),
        (hacks.HARMLESS, 0.5, math.nan, math.nan, "cannot be told"),
        (hacks.HARMLESS, 0.0, math.nan, math.nan, "unmoved"),
        (hacks.FORM, -0.5, -1, 0.1, "does not hear form"),
        (hacks.FORM, -0.5, -1, -0.1, "rates it lower"),
        (hacks.HARMLESS, -0.5, -1, -0.1, "changes the rating"),
        (hacks.HARMLESS, 0.5, -1, 2, "unmoved"),
        (hacks.NONSENSE, math.nan, math.nan, math.nan, ""),
        (hacks.PIECE, 0.0, 0, 0, ""),
    ],
)
def test_the_rule_of_the_verdict(kind: str, mean: float, low: float, high: float, expected: str) -> None:
    assert hacks.verdict(kind, {"mean": mean, "low": low, "high": high}) == expected


def test_hacks_on_midi_files(midi: list[Path], tmp_path: Path) -> None:
    words = ["hacks", *midi, "--seconds", 5, "--sample-rate", RATE, "--soundfont", "timgm", "--workers", 1, "--out"]
    output = run(*words, tmp_path / "one").output
    rows = {row["probe"]: row for row in read(tmp_path / "one" / "hacks.csv")}
    assert list(rows) == [
        "the pieces", *hacks.WITHOUT_NOTES, *hacks.FROM_NOTES, *hacks.FROM_AUDIO,
    ]  # fmt: skip
    assert rows["silence"]["verdict"] == "rates it lower" and float(rows["silence"]["difference"]) < -0.3
    assert rows["20 dB softer"]["verdict"] == "unmoved"  # ce_proxy measures levels relative to the clip's own
    for row in rows.values():
        assert row["n"] == row["pairs"] == "4"
        assert float(row["difference"]) == pytest.approx(
            float(row["mean"]) - float(rows["the pieces"]["mean"]), abs=1e-6
        )
    assert "4 pieces, the first 5 s" in output and "instead of real music" not in output
    # as if it had stopped before two of the probes: they are made again, with the same results
    kept = {name: (tmp_path / "one" / name).read_text() for name in ("ratings.csv", "hacks.csv")}
    again = [line for line in kept["ratings.csv"].splitlines(keepends=True) if not line.startswith(("white", "random"))]
    (tmp_path / "one" / "ratings.csv").write_text("".join(again))
    assert run(*words, tmp_path / "one").output == output
    assert (tmp_path / "one" / "hacks.csv").read_text() == kept["hacks.csv"]
    assert sorted((tmp_path / "one" / "ratings.csv").read_text().splitlines()) == sorted(
        kept["ratings.csv"].splitlines()
    )


def test_hacks_on_pieces_of_a_model(tmp_path: Path) -> None:
    output = run(
        "hacks",
        "-n",
        2,
        "--seconds",
        2,
        "--sample-rate",
        RATE,
        "--workers",
        1,
        "--soundfont",
        "timgm",
        "--seed",
        1,
        "--out",
        tmp_path,
    ).output
    assert "2 pieces by piano instead of real music" in output
    assert {row["name"] for row in read(tmp_path / "ratings.csv")} == {"piano, prompt 0", "piano, prompt 1"}


def test_a_clip_that_failed_is_asked_for_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the error were raised, its traceback would keep the rating frame alive, with the audio of its batch."""
    lost: Future[Any] = Future()
    lost.set_exception(RenderError("twice"))
    with RenderPool("timgm", sample_rate=RATE, seconds=1.0, workers=1) as pool:
        submit = pool.submit
        monkeypatch.setattr(pool, "submit", lambda score: lost if isinstance(score, str) else submit(score))
        rated = ratings.rate_scores([music(0), "lost", None], pool, [load_reward("ce_proxy")], RATE, change=np.negative)
    assert np.isfinite(rated["ce_proxy.CE"]).tolist() == [True, False, False]
    error = lost.exception()
    assert error is not None and error.__traceback__ is None


def test_midi_files_that_would_hang_or_swell_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.mid")
    (tmp_path / "zero.mid").symlink_to("/dev/zero")
    with open(tmp_path / "large.mid", "wb") as file:
        file.truncate(1 << 30)  # sparse: takes no space on the disk
    music(0).dump_midi(tmp_path / "good.mid")
    for name, reason in (("pipe", "not a regular file"), ("zero", "not a regular file"), ("large", "too large")):
        with pytest.raises(UserError, match=rf"{name}\.mid: (cannot be read: )?{reason}"):
            ratings.read_score(tmp_path / f"{name}.mid")
    notes = ratings.read_score(tmp_path / "good.mid").note_num()
    monkeypatch.setattr("smart.corpus.score.Limits", lambda: Limits(max_notes=notes - 1))
    with pytest.raises(UserError, match=f"too many notes: {notes}, expected at most {notes - 1}"):
        ratings.read_score(tmp_path / "good.mid")


def test_two_processes_do_not_sample_into_one_table(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    words = ["sample", "piano-small", "-n", 2, "--tokens", 16, "--seconds", 1, "--sample-rate", RATE]
    words += ["--workers", 1, "--device", "cpu", "--out", out]
    run(*words)
    made, parts = out.read_bytes(), tmp_path / "out.parquet.parts"
    folder.claim_folder(parts, read_settings(out)["settings"])
    assert "nothing to do" in run(*words).output and not parts.exists()  # as left by a kill at the very end
    folder.claim_folder(parts, read_settings(out)["settings"])
    out.unlink()
    with hold(parts):
        assert "another process is working in it" in run(*words, code=2).output
    (parts / "000000.parquet").write_bytes(made[: len(made) // 2])
    assert "000000.parquet is damaged and will be sampled again" in run(*words).output
    assert out.read_bytes() == made and not parts.exists()
