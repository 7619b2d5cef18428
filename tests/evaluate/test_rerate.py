"""smart.evaluate.rerate: the stored completions of a run rated again, by any reward, and continued."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from smart.evaluate.command import main
from smart.evaluate.rerate import read_completions


def call(*words: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["rerate", *map(str, words), "--device", "cpu"])
    return result.exit_code, result.output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "r", symlinks=True)
    return tmp_path / "r"


def test_the_runs_own_reward_gives_the_stored_ratings(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    rules = ("--reward-option", "symbolic.dissonance=low", "--reward-option", "symbolic.note_density=6.0")
    words = (run, "--reward", "ce_proxy", "--reward", "symbolic", *rules, "--out", out, "--workers", 1)
    code, output = call(*words, "--iterations", 3)
    assert code == 0 and "ce_proxy.CE" in output, output
    stored = pq.read_table(run / "completions").to_pylist()
    with (out / "ratings.csv").open() as file:
        rated = list(csv.DictReader(file))
    of_step = {
        step: [float(row["rating"] or "nan") for row in rated if (row["unit"], row["column"]) == (step, "ce_proxy.CE")]
        for step in dict.fromkeys(row["unit"] for row in rated)
    }
    assert list(of_step) == ["timgm@2", "timgm@4", "timgm@6"]
    for step, ratings in of_step.items():
        own = [row["reward"] for row in stored if f"timgm@{row['step']}" == step]
        np.testing.assert_allclose(ratings, own, atol=1e-5)
    table = json.loads((out / "summary.json").read_text())["table"]
    mine = [row for row in table if row["rating"] == "ce_proxy.CE"]
    assert [row["step"] for row in mine] == [2, 4, 6]
    for row in mine:
        assert row["mean"] == pytest.approx(row["run_reward"], abs=1e-5)
        assert row["correlation"] is None or row["correlation"] == pytest.approx(1, abs=1e-3)
    assert {row["rating"] for row in table} == {
        "ce_proxy.CE", "symbolic.dissonance", "symbolic.note_density", "symbolic.mean",
    }  # fmt: skip
    # cut short after the first iteration, the same command writes the same files
    before = {name: (out / name).read_bytes() for name in ("rerate.csv", "ratings.csv", "summary.json")}
    lines = before["ratings.csv"].decode().splitlines(keepends=True)
    (out / "ratings.csv").write_text("".join(line for line in lines if not line.startswith(("timgm@4", "timgm@6"))))
    assert call(*words, "--iterations", 3)[0] == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    code, output = call(*words, "--iterations", 3, "--samples", 2)
    assert code == 2 and "made with other settings" in output


def test_some_of_the_completions(run: Path) -> None:
    everything = read_completions(run, 99, 0)
    assert [one.step for one in everything] == [1, 2, 3, 4, 5, 6]
    assert all(len(one.tokens) == len(one.rewards) == 6 for one in everything)
    some = read_completions(run, 2, 4)
    assert [one.step for one in some] == [3, 6]
    assert [one.tokens for one in some] == [one.tokens[:4] for one in everything if one.step in (3, 6)]


def test_mistakes(run: Path, tmp_path: Path) -> None:
    for words, message in (
        ((tmp_path / "nothing",), "is not a run"),
        ((run, "--reward", "beauty"), 'no reward "beauty"'),
        ((run, "--soundfont", "no.sf2"), "no.sf2"),
    ):
        code, output = call(*words, "--out", tmp_path / "out")
        assert code == 2 and message in output, output
    shutil.rmtree(run / "completions")
    code, output = call(run, "--out", tmp_path / "out")
    assert code == 2 and "has no stored completions" in output
