"""python -m smart.reward.calibrate: fitting ce_proxy to rated clips."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from smart import UserError
from smart.reward import load_reward
from smart.reward.calibrate import cross_validate, fit, order_pairs, read_clip, read_scores, spearman
from smart.reward.ce_proxy import DESCRIPTORS, SAMPLE_RATE, Coefficients, describe, predict
from smart.reward.command import main

CLIPS = 16
TRUE_WEIGHTS = (0.8, 0.5, -0.3, 0.4)  # of standardised descriptors
FORMATS = (("wav", 44100, 2), ("flac", 16000, 1), ("ogg", 48000, 2), ("mp3", 44100, 1))


def tone_clip(number: int, rate: int, channels: int) -> np.ndarray[Any, Any]:
    """Four seconds of changing harmonic tones, of a given brightness, that fill a given part of each second."""
    draw = np.random.default_rng(number)
    time = np.arange(4 * rate) / rate
    pitch = draw.choice([82.4, 110.0, 164.8, 220.0, 311.1, 440.0, 622.3], size=16)[(time / 0.25).astype(int)]
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    partials = sum(np.sin(k * phase) / k ** draw.uniform(0.5, 2) for k in range(1, int(draw.integers(2, 9))))
    gate = time % 1 < draw.uniform(0.2, 1)
    wave = partials * gate + 1e-4 * draw.standard_normal(len(time))
    wave = 0.5 * wave / np.abs(wave).max()
    return np.stack([wave * side for side in (1.0, 0.6)[:channels]], axis=1)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in four formats, three rates, mono and stereo; one in a subfolder."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "more").mkdir()
    for number in range(CLIPS):
        suffix, rate, channels = FORMATS[number % 4]
        name = f"more/{number}.{suffix}" if number == 5 else f"{number}.{suffix}"
        soundfile.write(folder / name, tone_clip(number, rate, channels), rate)
    return folder


def names_in(audio: Path) -> list[str]:
    return sorted(str(path.relative_to(audio)) for path in audio.rglob("*.*"))


@pytest.fixture(scope="module")
def descriptors(audio: Path) -> torch.Tensor:
    return torch.stack([describe(read_clip(audio / name)) for name in names_in(audio)]).double()


@pytest.fixture(scope="module")
def ratings(descriptors: torch.Tensor) -> torch.Tensor:
    z = (descriptors - descriptors.mean(0)) / descriptors.std(0, correction=0)
    return 5.5 + z @ torch.tensor(TRUE_WEIGHTS, dtype=torch.float64)


@pytest.fixture
def scores(audio: Path, ratings: torch.Tensor, tmp_path: Path) -> Path:
    return write_csv(
        tmp_path / "scores.csv",
        [
            {"clip": name, "CE": f"{rating:.9f}", "sample": str(k // 2)}
            for k, (name, rating) in enumerate(zip(names_in(audio), ratings.tolist(), strict=True))
        ],
    )


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def calibrate(audio: Path, scores: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(
        main, ["--audio", str(audio), "--scores", str(scores), "--out", str(out), "--repeats", "5", *more]
    )


# --- the whole program


def test_a_planted_linear_relation_is_recovered(
    audio: Path, scores: Path, descriptors: torch.Tensor, ratings: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "own.json"
    result = calibrate(audio, scores, out, "--ridge", "0")
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    weights = [written["descriptors"][name]["weight"] for name in DESCRIPTORS]
    assert weights == pytest.approx(TRUE_WEIGHTS, abs=1e-4)
    assert written["intercept"] == pytest.approx(5.5, abs=1e-5)
    for column, entry in enumerate(written["descriptors"].values()):
        assert entry["low"] == pytest.approx(float(descriptors[:, column].min()), abs=1e-6)
        assert entry["high"] == pytest.approx(float(descriptors[:, column].max()), abs=1e-6)
    assert written["cross_validation"]["ungrouped"]["spearman"]["mean"] > 0.85

    own = load_reward("ce_proxy", coefficients=out)
    for name, rating in zip(names_in(audio), ratings.tolist(), strict=True):
        assert float(own.score(read_clip(audio / name)[None])["CE"]) == pytest.approx(rating, abs=1e-3)
    assert f"{CLIPS} rated clips" in own.provenance


def test_the_table_shows_what_the_file_holds(audio: Path, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    result = calibrate(audio, scores, out)
    written = json.loads(out.read_text())
    lines = result.output.splitlines()
    assert lines[0].startswith(f"{CLIPS} clips, ridge 0.5, 5 x 4-fold")
    for way, label in (("ungrouped", "of clips"), ("grouped", "of groups (sample)")):
        row = next(line for line in lines if line.startswith(label))
        for figure in written["cross_validation"][way].values():
            assert f"{figure['mean']:.3f} ± {figure['std']:.3f}" in row
    for name, entry in written["descriptors"].items():
        row = next(line for line in lines if line.startswith(name)).split()
        expected = [f"{entry[key]:.3f}" for key in ("weight", "mean", "scale", "low", "high")]
        assert row[1:] == [*expected, f"{entry['univariate_spearman']:.2f}"]
    pairs = written["cross_validation"]["pairs_in_held_out_group"]
    assert pairs["pairs"] == CLIPS // 2
    assert any(line.endswith(f"right order: {pairs['ordered']} of {pairs['pairs']}") for line in lines)
    assert lines[-1] == f"wrote {out}"


def test_the_same_clips_give_the_same_file_in_any_order(audio: Path, scores: Path, tmp_path: Path) -> None:
    first, again, other_order = (tmp_path / f"{name}.json" for name in ("a", "b", "c"))
    calibrate(audio, scores, first)
    calibrate(audio, scores, again)
    assert first.read_bytes() == again.read_bytes()
    write_csv(scores, rows_of(scores)[::-1])
    calibrate(audio, scores, other_order)
    a, c = json.loads(first.read_text()), json.loads(other_order.read_text())
    for name in DESCRIPTORS:
        assert a["descriptors"][name]["weight"] == pytest.approx(c["descriptors"][name]["weight"], abs=2e-6)
    assert a["provenance"]["files_sha256"] == c["provenance"]["files_sha256"]
    assert a["provenance"]["ratings_sha256"] == c["provenance"]["ratings_sha256"]


def test_the_file_names_no_folder_of_this_machine(audio: Path, scores: Path, tmp_path: Path) -> None:
    calibrate(audio, scores, tmp_path / "own.json")
    assert str(tmp_path) not in (tmp_path / "own.json").read_text()
    assert str(audio) not in (tmp_path / "own.json").read_text()


def test_other_columns_and_no_groups(audio: Path, scores: Path, tmp_path: Path) -> None:
    rows = [{"file": row["clip"], "liking": row["CE"]} for row in rows_of(scores)]
    write_csv(scores, rows)
    out = tmp_path / "own.json"
    result = calibrate(audio, scores, out, "--clip-column", "file", "--score-column", "liking")
    assert result.exit_code == 0, result.output
    assert "grouped" not in json.loads(out.read_text())["cross_validation"]
    assert "folds of groups: not computed" in result.output


def test_content_enjoyment_is_another_name_of_ce(audio: Path, scores: Path, tmp_path: Path) -> None:
    write_csv(scores, [{"clip": row["clip"], "content_enjoyment": row["CE"]} for row in rows_of(scores)])
    assert calibrate(audio, scores, tmp_path / "own.json").exit_code == 0


def test_as_a_program_a_mistake_is_one_line_and_exit_code_2(audio: Path, scores: Path, tmp_path: Path) -> None:
    write_csv(scores, [*rows_of(scores), {"clip": "gone.wav", "CE": "5", "sample": "9"}])
    command = [sys.executable, "-m", "smart.reward.calibrate", "--audio", audio, "--scores", scores]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "gone.wav" in done.stderr
    assert not (tmp_path / "ce_proxy.json").exists()


# --- mistakes


def test_an_existing_file_is_kept_unless_told(audio: Path, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    out.write_text("precious")
    result = calibrate(audio, scores, out)
    assert result.exit_code == 2 and "--overwrite" in result.output and out.read_text() == "precious"
    write_csv(scores, rows_of(scores)[:3])
    assert calibrate(audio, scores, out, "--overwrite").exit_code == 2
    assert out.read_text() == "precious"  # a run that fails changes no file


def test_overwriting_leaves_one_whole_file(audio: Path, scores: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "own.json").write_text("old")
    assert calibrate(audio, scores, folder / "own.json", "--overwrite").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["own.json"]
    load_reward("ce_proxy", coefficients=folder / "own.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    audio: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "own.json").write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = calibrate(audio, scores, folder / "own.json", "--overwrite")
    assert result.exit_code == 1 and "No space left on device" in result.output  # the disk is to blame
    assert [path.name for path in folder.iterdir()] == ["own.json"]
    assert (folder / "own.json").read_text() == "old"


def _set(row: int, column: str, value: str) -> Callable[[list[dict[str, str]]], Any]:
    return lambda rows: rows[row].update({column: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(3, "clip", "nowhere.wav"), "nowhere.wav"),
        (_set(3, "clip", "/etc/x.wav"), 'line 5: clip "/etc/x.wav" is not inside --audio'),
        (_set(3, "clip", "../x.wav"), 'line 5: clip "../x.wav" is not inside --audio'),
        (_set(3, "clip", "x" * 300), "missing from"),
        (_set(3, "clip", ""), 'line 5: no file name in column "clip"'),
        (_set(3, "clip", "0.wav"), 'clip "0.wav" is listed twice'),
        (_set(3, "CE", "11"), 'line 5: column "CE" must lie in 1 to 10, got 11'),
        (_set(3, "CE", "0.5"), 'line 5: column "CE" must lie in 1 to 10, got 0.5'),
        (_set(3, "CE", "nan"), 'column "CE" must lie in 1 to 10, got nan'),
        (_set(3, "CE", "good"), "must be a number, 1 to 10, got 'good'"),
        (_set(3, "CE", ""), "must be a number, 1 to 10, got ''"),
        (lambda rows: rows.__delitem__(slice(7, None)), "rates 7 clips, at least 8 are needed"),
        (lambda rows: [row.update(CE="6.5") for row in rows], "gives every clip the rating 6.5"),
        (lambda rows: [row.update(clips=row.pop("clip")) for row in rows], '"clip", only CE, sample, clips'),
        (
            lambda rows: [row.pop("CE") for row in rows],
            'no column "CE", only clip, sample; choose one of them',
        ),
    ],
)
def test_a_wrong_csv_is_one_line(
    audio: Path, scores: Path, tmp_path: Path, change: Callable[[list[dict[str, str]]], Any], message: str
) -> None:
    rows = rows_of(scores)
    change(rows)
    write_csv(scores, rows)
    result = calibrate(audio, scores, tmp_path / "own.json")
    assert result.exit_code == 2 and message in result.output
    assert result.output.count("\n") == 1 and not (tmp_path / "own.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe\x00clip", "UTF-8"), (b'clip,CE\n"0.wav,5\n', "cannot be read as a CSV")],
)
def test_what_is_no_csv_is_one_line(audio: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    result = calibrate(audio, path, tmp_path / "own.json")
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1


def test_a_short_row_is_one_line(audio: Path, scores: Path, tmp_path: Path) -> None:
    scores.write_text(scores.read_text() + "0.wav2\n")
    result = calibrate(audio, scores, tmp_path / "own.json")
    assert result.exit_code == 2 and "line 18" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--folds", "17"), "--folds 17 is more than the 16 clips"),
        (("--group-column", "prompt"), 'no column "prompt"'),
        (("--ridge", "nan"), "--ridge must be a finite number"),
        (("--audio", "/nowhere/at/all"), "--audio /nowhere/at/all is not a folder"),
        (("--out", "/nowhere/at/all.json"), "does not exist"),
        (("--scores", "/nowhere.csv"), "No such file"),
    ],
)
def test_a_wrong_argument_is_one_line(
    audio: Path, scores: Path, tmp_path: Path, arguments: tuple[str, str], message: str
) -> None:
    result = calibrate(audio, scores, tmp_path / "own.json", *arguments)
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not audio at all" * 99, "cannot be read"),
        ("empty", "is empty"),
        ("nan", "not finite numbers"),
    ],
)
def test_audio_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    path = tmp_path / "clip.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        samples = np.full(0 if content == "empty" else 100, math.nan)
        soundfile.write(path, samples, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=message) as caught:
        read_clip(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_a_header_of_few_samples_a_second_and_a_clip_of_many_minutes_are_refused(tmp_path: Path) -> None:
    """After resampling the first would take four gigabytes."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.zeros(65536), 1, subtype="PCM_U8")
    with pytest.raises(UserError, match="a sample rate of 1 Hz, at least 4000"):
        read_clip(path)
    soundfile.write(path, np.zeros(601 * 4000), 4000, subtype="PCM_U8")
    with pytest.raises(UserError, match="longer than 600 s"):
        read_clip(path)
    soundfile.write(path, np.zeros(600 * 4000), 4000, subtype="PCM_U8")
    assert len(read_clip(path)) == 600 * 16000


def test_without_soundfile_the_message_says_what_to_install(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match="pip install soundfile"):
        read_clip(audio / "0.wav")


def test_clips_that_all_sound_alike_cannot_be_fitted(tmp_path: Path) -> None:
    for k in range(8):
        soundfile.write(tmp_path / f"{k}.wav", np.zeros(8000), 16000)
    scores = write_csv(tmp_path / "s.csv", [{"clip": f"{k}.wav", "CE": str(k + 1)} for k in range(8)])
    result = calibrate(tmp_path, scores, tmp_path / "own.json")
    assert result.exit_code == 2 and "same descriptors" in result.output


# --- reading


def test_a_clip_is_the_mean_of_its_channels_at_16_khz(tmp_path: Path) -> None:
    time = np.arange(48_000) / 48_000
    left = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "clip.wav", np.stack([left, np.zeros_like(left)], 1), 48_000, subtype="FLOAT")
    clip = read_clip(tmp_path / "clip.wav")
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert clip.shape == (SAMPLE_RATE,) and clip.dtype == torch.float32
    assert np.abs(clip.numpy() - expected)[200:-200].max() < 1e-3


def test_a_byte_order_mark_and_spaces_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("clip,CE,sample\n a.wav , 5 ,x\n", encoding="utf-8-sig")
    clips, column = read_scores(path, clip_column="clip", score_column="CE", group_column=None)
    assert (clips[0].name, clips[0].score, clips[0].group, column) == ("a.wav", 5.0, "x", "sample")


# --- the arithmetic


def weights_of(found: Coefficients) -> list[float]:
    return [term.weight for term in found.terms.values()]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5, 5.0]))
@settings(max_examples=40, deadline=None)
def test_fit_is_ridge_regression(seed: int, ridge: float) -> None:
    """Against least squares on data with sqrt(n ridge) I appended, the other way to write ridge."""
    draw = np.random.default_rng(seed)
    x, y = draw.uniform(0, 1, (12, 4)), draw.uniform(1, 10, 12)
    z = (x - x.mean(0)) / x.std(0)
    stacked = np.vstack([z, math.sqrt(12 * ridge) * np.eye(4)])
    expected = np.linalg.lstsq(stacked, np.concatenate([y - y.mean(), np.zeros(4)]), rcond=None)[0]
    found = fit(torch.from_numpy(x), torch.from_numpy(y), ridge)
    assert weights_of(found) == pytest.approx(expected.tolist(), abs=1e-6)
    assert found.intercept == pytest.approx(y.mean())


def test_a_constant_descriptor_gets_no_weight() -> None:
    x = torch.rand(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = 0.7
    for ridge in (0.0, 0.5):
        assert weights_of(fit(x, x[:, 0] + 3, ridge))[2] == pytest.approx(0, abs=1e-6)


def test_spearman_of_worked_examples() -> None:
    def of(a: list[float], b: list[float]) -> float:
        return spearman(torch.tensor(a), torch.tensor(b))

    assert of([1, 2, 3, 4], [10, 20, 30, 1e9]) == pytest.approx(1)
    assert of([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert of([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert of([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(0.75))  # ranks 1.5 1.5 3 against 1 2 3
    assert of([1, 1, 1], [1, 2, 3]) == 0


def test_held_out_clips_are_predicted_by_the_others_alone() -> None:
    """As many folds as clips: the mean absolute error is the leave-one-out error, computed here."""
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.rand(*shape, generator=draw, dtype=torch.float64) * 4 + 3 for shape in ((9, 4), (9,)))
    errors = []
    for k in range(9):
        rest = [i for i in range(9) if i != k]
        errors.append(abs(float(predict(x[k : k + 1], fit(x[rest], y[rest], 0.5)) - y[k])))
    found = cross_validate(
        x, y, [str(k) for k in range(9)], folds=9, repeats=3, ridge=0.5, generator=np.random.default_rng(0)
    )
    assert found["mae"]["mean"] == pytest.approx(np.mean(errors)) and found["mae"]["std"] < 1e-12


def test_clips_of_one_group_never_part() -> None:
    """Twins with the same random rating: a fold that contains the other twin would predict it."""
    draw = torch.Generator().manual_seed(2)
    x = torch.rand(6, 4, generator=draw, dtype=torch.float64).repeat_interleave(2, 0)
    y = torch.tensor([2.0, 9.0, 4.0, 7.0, 3.0, 8.0], dtype=torch.float64).repeat_interleave(2)
    groups = [str(k // 2) for k in range(12)]
    errors = []
    for k in range(6):
        rest = [i for i in range(12) if i // 2 != k]
        errors.append(abs(float(predict(x[2 * k : 2 * k + 1], fit(x[rest], y[rest], 0.1)) - y[2 * k])))
    found = cross_validate(x, y, groups, folds=6, repeats=3, ridge=0.1, generator=np.random.default_rng(0))
    assert found["mae"]["mean"] == pytest.approx(np.mean(errors))


def test_more_folds_than_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="number of groups"):
        cross_validate(
            torch.zeros(4, 4),
            torch.zeros(4),
            list("aabb"),
            folds=3,
            repeats=1,
            ridge=1.0,
            generator=np.random.default_rng(0),
        )


def test_pairs_are_ordered_by_a_fit_that_did_not_see_them() -> None:
    """Ratings follow the first descriptor, except in group c, which is reversed: only c is predicted wrongly."""
    first = torch.tensor([0.1, 0.9, 0.2, 0.7, 0.3, 0.8, 0.0, 0.5], dtype=torch.float64)
    x = torch.zeros(8, 4, dtype=torch.float64)
    x[:, 0] = first
    y = 2 + 5 * first
    y[4], y[5] = 5.0, 4.0
    assert order_pairs(x, y, list("aabbccde"), 0.1) == (2, 3)
    y[0] = y[1]  # equal ratings do not count as a pair
    assert order_pairs(x, y, list("aabbccde"), 0.1)[1] == 2
