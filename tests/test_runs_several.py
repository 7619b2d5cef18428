"""Whole runs with several rewards, targets, soundfonts and a judge that hears through another one."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import ALONE, arguments, assert_same_run, metrics, run

from smart.render import find_soundfont

HEAD = """
[model]
base = "piano-small"

[[rewards]]
kind = "ce_proxy"
target = "real"

[[rewards]]
kind = "symbolic"
name = "rules"
weight = 0.5
options = { dissonance = "low", note_density = 6.0 }
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Several rewards, and two soundfonts that are copies of one: what is drawn shows, what is heard does not."""
    for name in ("one.sf2", "two.sf2"):
        (tmp_path / name).symlink_to(find_soundfont("timgm"))
    fonts = [str(tmp_path / name) for name in ("one.sf2", "two.sf2")]
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    from symusic import Note, Score, Tempo, Track

    for number in range(3):
        score = Score(480)
        score.tempos.append(Tempo(0, 120.0))
        track = Track()
        track.notes.extend(Note(240 * step, 480, 50 + (7 * step * (number + 1)) % 36, 80) for step in range(40))
        score.tracks.append(track)
        score.dump_midi(pieces / f"{number}.mid")
    file = tmp_path / "several.toml"
    head = HEAD.replace('target = "real"', f'target = "real"\nreal = {json.dumps(str(pieces))}')
    file.write_text(f"{head}\n[render]\nsoundfonts = {json.dumps(fonts)}\n")
    return file


def tune(config: Path, base: Path, *words: str, **changes: Any) -> str:
    small = {"track.trace_every": 0, "grpo.iterations": 4, **dict.fromkeys(ALONE), **changes}
    status, output = run("grpo", "--config", str(config), *arguments(base, config.parent, **small), *words)
    assert status == 0, output
    return output


def test_several_rewards_and_soundfonts(config: Path, base: Path) -> None:
    """Logged, weighted, limited by the target of the user's pieces; resumed in the middle it is the same run."""
    import pyarrow.parquet as pq

    tune(config, base, **{"grpo.rollouts_ahead": 1, "guard.soundfont": "timgm", "grpo.target_of": "group"})
    folder = config.parent / "r"
    target = json.loads((folder / "targets.json").read_text())
    assert 1 < target["ce_proxy"] < 10 and list(target) == ["ce_proxy"]
    log = (folder / "log.txt").read_text()
    assert f"ce_proxy (weight 1, target {target['ce_proxy']:.4g})" in log and "rules (weight 0.5)" in log
    assert "soundfonts (draw): " in log and "through timgm" in log and "Warning" not in log
    rows = metrics(folder)
    for name in ("mean", "std", "group_std", "unrated", "at_target"):
        assert math.isfinite(rows[1][f"reward/ce_proxy/{name}"])
    assert "reward/rules/at_target" not in rows[1] and "reward/correlation/ce_proxy/rules" in rows[1]
    table = pq.read_table(folder / "completions").to_pylist()
    for row in table:
        capped = min(row["ce_proxy.CE"], target["ce_proxy"])
        rules = (row["rules.dissonance"] + row["rules.note_density"]) / 2
        assert row["reward"] == pytest.approx((capped + 0.5 * rules) / 1.5, abs=1e-5, nan_ok=True)
    # killed after iteration 2, the copy ends as the whole run did
    again = config.parent / "again"
    shutil.copytree(folder, again / "r", symlinks=True)
    for name in ("00000004", "best"):
        path = again / "r" / "checkpoints" / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(again / "r" / "tuned")
    words = ("--config", str(again / "r" / "config.toml"), "--set", f"run.folder={again}", "--resume")
    status, output = run("grpo", *words)
    assert status == 0 and "2 of 4 iterations done" in output, output
    assert_same_run(again / "r", folder)


def test_each_reward_is_normalised_in_its_group(config: Path, base: Path) -> None:
    """With soundfonts averaged: copies of one soundfont give the ratings of that one."""
    import pyarrow.parquet as pq

    changes = {"grpo.iterations": 1, "grpo.combine": "normalised_sum", "render.soundfont_use": "average"}
    tune(config, base, **changes, **{"track.held_out_every": 0})
    tune(config, base, **changes, **{"track.held_out_every": 0, "run.name": "single", "render.soundfonts": "[]"})
    both, single = (pq.read_table(config.parent / name / "completions").to_pylist() for name in ("r", "single"))
    assert [row["tokens"] for row in both] == [row["tokens"] for row in single]
    np.testing.assert_allclose([row["reward"] for row in both], [row["reward"] for row in single], rtol=1e-6)
    advantages = np.array([row["advantage"] for row in both])
    assert advantages.std(ddof=1) == pytest.approx(1, abs=1e-2) and abs(advantages.mean()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards.0.real": ""}, "no figure ships for reward ce_proxy"),
        ({"rewards.0.real": "nowhere"}, "nowhere is not a folder"),
        ({"rewards.rules.target": "real"}, "symbolic rates notes; set target to a number"),
        ({"grpo.combine": "normalised_sum", "grpo.scale": "none"}, 'needs grpo.scale = "group"'),
        ({"rewards": "[]", "reward.kind": "none"}, 'there is no reward "none"'),
        ({"rewards.rules.name": "ce_proxy"}, 'two rewards are called "ce_proxy"'),
        ({"rewards.rules.weight": 0, "rewards.0.weight": 0}, "every reward has weight 0"),
        ({"guard.soundfont": "no.sf2"}, "no.sf2"),
        ({"guard.judge.kind": "taste", "rewards.0.kind": "beauty"}, "2 things are missing"),
    ],
)
def test_a_mistake_is_one_line(config: Path, base: Path, changes: dict[str, str], message: str) -> None:
    settings = dict.fromkeys(ALONE) | changes
    status, output = run("grpo", "--config", str(config), *arguments(base, config.parent, **settings))
    assert status == 2 and message in output and "Traceback" not in output, output
    assert not (config.parent / "r").exists()


def test_a_judge_that_is_optimised_is_warned_of(config: Path, base: Path) -> None:
    small = {"grpo.iterations": 1, "guard.judge.kind": "ce_proxy"}
    assert "no second opinion: training optimises ce_proxy.CE; name another guard.judge" in tune(config, base, **small)


def test_a_run_of_an_older_version_is_continued(finished: Path, base: Path, tmp_path: Path) -> None:
    """Its configuration lacks the keys that came later."""
    folder = tmp_path / "r"
    shutil.copytree(finished, folder, symlinks=True)
    old = [
        line
        for line in (folder / "config.toml").read_text().splitlines()
        if not line.startswith(("rewards =", "soundfonts =", "soundfont_use", "combine", "target", 'name = ""', "real"))
        and not line.startswith("weight = ")
    ]
    (folder / "config.toml").write_text("\n".join(old) + "\n")
    status, output = run("grpo", "--config", str(folder / "config.toml"), "--set", f"run.folder={tmp_path}", "--resume")
    assert status == 0, output
    assert_same_run(folder, finished)
    status, output = run(
        "grpo", "--config", str(folder / "config.toml"), "--set", f"run.folder={tmp_path}", "--resume",
        "--set", "reward.target=7",
    )  # fmt: skip
    assert status == 2 and "reward.target was 'none' and is 7.0" in output
