"""smart.reward.pairs: the fit to choices against data from a known model, the kinds of file, and the whole command."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from smart import UserError
from smart.reward import load_reward
from smart.reward.command import main
from smart.reward.pairs import Pair, cross_validate, fit, parse_choices, read_pairs, strengths

TRUE = torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Descriptors of 60 clips, and choices drawn from the model with the weights ``TRUE``."""
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(size=(60, 4)) * [1, 2, 3, 4] + 5)
    a = torch.from_numpy(random.integers(60, size=count))
    b = torch.from_numpy((a.numpy() + random.integers(1, 60, size=count)) % 60)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    wins = torch.from_numpy(random.random(count)) < torch.sigmoid((z[a] - z[b]) @ TRUE)
    return x, torch.where(wins, a, b), torch.where(wins, b, a)


def test_the_weights_of_a_known_model_are_found() -> None:
    x, better, worse = drawn(20_000, 1)
    found = fit(x, better, worse, 1e-6)
    assert [term.weight for term in found.terms.values()] == pytest.approx(TRUE.tolist(), abs=0.06)
    assert found.intercept == 5.5
    rated = strengths(x, found)
    assert rated.mean().item() == pytest.approx(5.5)
    # one point is one unit of the logit
    gap = rated[better] - rated[worse]
    near = (gap.abs() - 1).abs() < 0.1
    assert (gap[near] > 0).double().mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.05)


def test_two_clips_by_hand() -> None:
    """A wins three of four: without a penalty the logit of its difference is log 3."""
    x = torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]], dtype=torch.float64)
    better, worse = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 1, 0])
    found = fit(x, better, worse, 0.0)
    rated = strengths(x, found)
    assert (rated[0] - rated[1]).item() == pytest.approx(math.log(3), abs=1e-4)
    shrunk = strengths(x, fit(x, better, worse, 0.5))
    assert 0 < (shrunk[0] - shrunk[1]).item() < 0.6


def test_choices_that_contradict_nothing_have_a_finite_fit() -> None:
    x = torch.arange(40, dtype=torch.float64).reshape(10, 4)
    better, worse = torch.arange(1, 10), torch.arange(9)
    found = fit(x, better, worse, 0.01)
    assert all(math.isfinite(term.weight) for term in found.terms.values())
    assert (strengths(x, found).diff() > 0).all()


def test_held_out_choices() -> None:
    x, better, worse = drawn(600, 2)
    groups = [f"prompt {number % 20}" for number in range(600)]
    options: dict[str, Any] = {"folds": 4, "repeats": 2, "ridge": 0.01}
    good = cross_validate(x, better, worse, groups, generator=np.random.default_rng(0), **options)
    assert good["right"]["mean"] > 0.75 and good["log_loss"]["mean"] < 0.55
    coin = torch.from_numpy(np.random.default_rng(3).random(600)) < 0.5
    mixed = torch.where(coin, better, worse), torch.where(coin, worse, better)
    bad = cross_validate(x, *mixed, groups, generator=np.random.default_rng(0), **options)
    assert bad["right"]["mean"] == pytest.approx(0.5, abs=0.08)


def test_the_demos_choices(tmp_path: Path) -> None:
    """Both names of a piece's file: that of ``evaluate sample --audio``, and that of the page."""
    (tmp_path / "0001-tuned.wav").touch()
    (tmp_path / "a-bc-prompt-02-base.wav").touch()
    row = {"section": "A) Bc", "seed": 1, "a": "base", "b": "tuned"}
    rows = [{**row, "prompt": number, "choice": "AB"[number % 2]} for number in range(9)]
    rows += [{**row, "prompt": 9, "choice": "none"}]
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"page": "x", "choices": rows}))
    pairs = read_pairs(path, *parse_choices(path), tmp_path)
    assert len(pairs) == 9, "no preference is no choice"
    assert pairs[1] == Pair("0001-tuned.wav", "0001-base.wav", "A) Bc 1")
    assert pairs[2] == Pair("a-bc-prompt-02-base.wav", "0002-tuned.wav", "A) Bc 2")


def test_the_ratings_of_a_study(tmp_path: Path) -> None:
    columns = ["participant", "excerpt", "system", "prompt", "rating", "repeat", "check"]
    rows = [
        {"participant": person, "excerpt": f"{prompt}{system}", "system": system, "prompt": str(prompt),
         "rating": {"a": 3, "b": 7, "c": 7}[system], "repeat": "0", "check": ""}
        for person in ("p1", "p2") for prompt in (0, 1) for system in "abc"
    ]  # fmt: skip
    rows += [{**rows[0], "repeat": "1", "rating": 9}, {**rows[0], "check": "silence", "rating": 9}]
    pairs = read_pairs(tmp_path / "x.csv", columns, rows, tmp_path)
    assert len(pairs) == 8 and set(pairs) == {
        Pair(f"{prompt}{better}.wav", f"{prompt}a.wav", f"prompt {prompt}") for prompt in (0, 1) for better in "bc"
    }
    with pytest.raises(UserError, match="row 1: rating 'good': expected a number"):
        read_pairs(tmp_path / "x.csv", columns, [{**rows[0], "rating": "good"}], tmp_path)


def clips(folder: Path) -> None:
    """Ten clips, each with more notes than the one before."""
    random = np.random.default_rng(0)
    time = np.arange(5 * 16000) / 16000
    for clip in range(10):
        pitches = 220 * 2 ** (random.integers(0, 24, 2 + clip) / 12)
        notes = [np.sin(2 * np.pi * pitch * time) * ((time * 4 + index) % 3 < 1) for index, pitch in enumerate(pitches)]
        soundfile.write(folder / f"{clip}.wav", 0.1 * np.sum(notes, axis=0), 16000)


def call(*words: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, words)))
    return result.exit_code, result.output


def test_the_coefficients_are_those_of_a_reward(tmp_path: Path) -> None:
    clips(tmp_path)
    pairs, out = tmp_path / "pairs.csv", tmp_path / "mine.json"
    with pairs.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["better", "worse"])
        table.writerows([f"{high}.wav", f"{low}.wav"] for high in range(10) for low in range(high))
    code, output = call("--audio", tmp_path, "--pairs", pairs, "--out", out, "--repeats", 2)
    assert code == 0 and "45 choices between 10 clips in 45 groups" in output, output
    assert "guessing: 50%" in output and "guessing: 0.693" in output
    report = json.loads(out.read_text())
    assert report["pairs_validation"]["right"]["mean"] > 0.7 and report["ridge"] == 0.01
    assert str(tmp_path) not in out.read_text()
    reward = load_reward("ce_proxy", coefficients=str(out))
    first, last = (torch.from_numpy(soundfile.read(tmp_path / f"{clip}.wav", dtype="float32")[0]) for clip in (0, 9))
    assert reward.score(last[None])["CE"] > reward.score(first[None])["CE"] + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("better,worse\n0.wav,1.wav\n", "holds 1 choices between two clips, at least 8 are needed"),
        ("clip,CE\n0.wav,5\n", "expected the columns better and worse"),
        ("better,worse\n" + "../0.wav,1.wav\n" * 9, "is not inside --audio"),
        ("better,worse\n" + "x.wav,1.wav\n" * 9, "missing from"),
        ("better,worse,group\n" + "0.wav,1.wav,g\n" * 9, "all choices are of one group"),
        ("", "is empty"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    clips(tmp_path)
    (tmp_path / "pairs.csv").write_text(text)
    code, output = call("--audio", tmp_path, "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "out.json")
    assert code == 2 and message in output.replace("\n", " ")


def test_ratings_or_choices(tmp_path: Path) -> None:
    for words in ((), ("--pairs", "a.csv", "--scores", "b.csv")):
        code, output = call("--audio", tmp_path, *words)
        assert code == 2 and "give the ratings as --scores CSV, or the choices" in output
