"""Whole runs on CUDA: workers and bank, one batch ahead, resumed, and what composes afterwards."""

import math
from pathlib import Path
from typing import Any

import pytest
from checks import PAD, counted_stages, tune
from simulated_cuda import simulated

from smart.run import StopRequest, read_metrics

pytestmark = pytest.mark.slow  # whole programs


def test_a_run(tmp_path: Path) -> None:
    with simulated() as device, counted_stages(device) as stages:
        made = tune(tmp_path)
    names = ["save", "generate", "reference", "score", "learn", "record"]
    assert [stage for stage, _ in stages] == ["start", *names * 3]
    taken = [dict(stages[1 + 6 * iteration : 7 + 6 * iteration]) for iteration in range(3)]
    assert all(counts["generate"]["replay"] for counts in taken)
    # the first iteration has no held-out measurement: what it logs costs the device nothing
    assert not taken[0]["record"]["launch"] and taken[0]["record"]["wait"] < 6, taken[0]["record"]
    assert taken[2]["learn"]["launch"] < 3000, taken[2]["learn"]  # of 2 micro-batches
    rows = read_metrics(made)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and (made / "tuned" / "model.safetensors").is_file()
    assert all(math.isfinite(row["policy/loss"]) and row["policy/dlogp_max"] < 0.1 for row in rows[1:])
    slow = {key: many for key, many in device.attention.items() if "math" in key[1]}
    assert not slow, slow


class StoppedLater(StopRequest):
    """A signal arrives after two iterations."""

    looks = 0

    @property
    def requested(self) -> int:  # type: ignore[override]
        self.looks += 1
        return 15 if self.looks > 3 else 0

    @requested.setter
    def requested(self, value: int) -> None:
        pass


@pytest.mark.parametrize("ahead", [0, 1])
def test_resumed_it_is_the_run_that_nothing_interrupted(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "grpo__rollouts_ahead": ahead, "grpo__diversity": 0.5, "grpo__inner_epochs": 2, "grpo__iterations": 4,
    }  # fmt: skip
    with simulated():
        whole = tune(tmp_path / "whole", **changes)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr("smart.run.run.StopRequest", StoppedLater)
            tune(tmp_path / "part", **changes)
        part = tmp_path / "part" / "r"
        assert 0 < len(read_metrics(part)) - 1 < 4
        tune(tmp_path / "part", resume=True, **changes)
    for one, other in zip(read_metrics(whole), read_metrics(part), strict=True):
        kept = [{key: value for key, value in row.items() if "seconds/" not in key} for row in (one, other)]
        assert kept[0] == kept[1]


def test_rendered_by_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its thread, one batch ahead."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated():
        made = tune(tmp_path, render__backend="bank", grpo__rollouts_ahead=1, prompts__kind="first_note")
    assert all(row["clips/failed"] == 0 for row in read_metrics(made)[1:])


def test_other_choices(tmp_path: Path) -> None:
    """Other prompts, filters and averages in float32; a stop on the KL budget, which loads the best checkpoint."""
    with simulated():
        made = tune(
            tmp_path / "a",
            prompts__kind="bos",
            sampling__top_k=20,
            sampling__top_p=0.9,
            sampling__temperature=0.9,
            grpo__average="constant",
            grpo__scale="none",
            sampling__dtype="float32",
            grpo__precision="float32",
        )
        assert len(read_metrics(made)) == 4
        made = tune(tmp_path / "b", grpo__kl_budget=1e-9, grpo__average="sequence")
        assert len(read_metrics(made)) < 4


def test_composing(tmp_path: Path) -> None:
    """``smart generate``, with grammar and best-of; what comparisons draw; log-probabilities of the frontier."""
    from click.testing import CliRunner

    from smart.evaluate.frontier import base_logprobs
    from smart.generate import command
    from smart.model import find_base, load_base
    from smart.reward import load_reward
    from smart.rollout import System, compose

    base = find_base("piano-small")
    with simulated():
        words = ["--out", str(tmp_path), "--device", "cuda", "-n", "2", "--tokens", "30", "--seconds", "2"]
        result = CliRunner().invoke(command.main, [*words, "--playable", "--best-of", "2"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        pieces = list(
            compose(
                [System("base", base, None, None)],
                count=2,
                samples=2,
                batch=4,
                soundfont="timgm",
                seconds=2.0,
                workers=1,
                device="cuda",
                max_new_tokens=30,
                seed=1,
                rewards=[load_reward("ce_proxy", device="cuda")],
            )
        )
        assert len(pieces) == 4 and all(math.isfinite(value) for piece in pieces for value in piece.scores.values())
        model, _ = load_base(base, device="cuda")
        for piece, likely in zip(pieces, base_logprobs(model, pieces, PAD, 1.0), strict=True):
            assert abs(likely - piece.logprobs) < 0.02 * piece.length
