"""The frontier report: estimators against brute force and hand-worked numbers, laws with known coefficients."""

import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from smart import UserError
from smart.config import dumps, load
from smart.evaluate import laws, points
from smart.evaluate.frontier import (
    RULE,
    best_of_n,
    best_of_n_kl,
    evenly,
    fit_law,
    interval,
    keep,
    mean,
    numbers,
    order_weights,
    ratio,
    report,
    resample,
)
from smart.evaluate.points import not_negative
from smart.files import hold
from smart.grpo import token_logprobs
from smart.intervals import Estimate
from smart.model import SHIPPED, load_base, save_base
from smart.run.checkpoint import save

pytestmark = pytest.mark.slow  # whole programs


def test_the_weights_of_order_statistics_worked_by_hand() -> None:
    # of the six pairs of 1, 2, 3, 4 the maximum is 2 once, 3 twice, 4 three times
    assert order_weights(4, 2) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert order_weights(3, 1) == pytest.approx([1 / 3] * 3)
    assert order_weights(3, 3) == pytest.approx([0, 0, 1])
    with pytest.raises(ValueError, match="expected 1 <= n <= 3, got 4"):
        order_weights(3, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    random = np.random.default_rng(n)
    rewards, judge = random.normal(size=(4, 7)), random.normal(size=(4, 7))
    for values in (rewards, judge):
        expected = []
        for row in range(4):
            subsets = list(itertools.combinations(range(7), n))
            best = [max(subset, key=lambda place: rewards[row, place]) for subset in subsets]
            expected.append(np.mean([values[row, place] for place in best]))
        assert best_of_n(rewards, values, n) == pytest.approx(expected)
    order = random.permutation(7)
    assert best_of_n(rewards[:, order], judge[:, order], n) == pytest.approx(best_of_n(rewards, judge, n))


def test_best_of_n_with_ties_and_with_clips_that_failed() -> None:
    rewards = np.array([[1.0, 2.0, 2.0, math.nan], [1.0, math.nan, math.nan, math.nan]])
    judge = np.array([[0.0, 3.0, 5.0, 100.0], [7.0, 0.0, 0.0, 0.0]])
    # the pairs of three rated samples are (1,2), (1,2'), (2,2'); in the last one either may be the best
    assert best_of_n(rewards, judge, 2) == pytest.approx([(3 + 5 + 4) / 3, math.nan], nan_ok=True)
    assert best_of_n(rewards, rewards, 1) == pytest.approx([5 / 3, 1])


def test_best_of_n_is_unbiased_and_its_kl_is_that_of_the_maximum() -> None:
    random = np.random.default_rng(0)
    rewards = random.uniform(size=(4000, 6))  # E[max of n] of uniform numbers is n / (n + 1)
    for n in (1, 2, 4, 6):
        found = best_of_n(rewards, rewards, n)
        assert abs(found.mean() - n / (n + 1)) < 4 * found.std() / math.sqrt(len(found))
    # the density of the maximum of n over that of one is n u^(n-1)
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (1, 2, 16):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-5)


def test_intervals_cover_the_standard_error_and_leave_out_what_failed() -> None:
    random = np.random.default_rng(2)
    values = random.normal(3, 2, size=400)
    rows = resample(400, seed=1)
    found = mean(values, rows)
    error = values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.05)
    assert mean(np.append(values[:100], [math.nan] * 300), rows).value == pytest.approx(values[:100].mean())
    assert ratio(np.array([2.0, math.nan, 4.0]), np.array([1.0, 50.0, 2.0]), np.array([[0, 1, 2], [0, 0, 0]])) == (
        pytest.approx([2.0, 2.0])
    )
    assert math.isnan(mean(np.full(3, math.nan), resample(3, 1)).value)


@pytest.mark.parametrize("law", ["best-of-n", "rl"])
def test_the_fit_recovers_planted_coefficients(law: str) -> None:
    random = np.random.default_rng(4)
    kl = np.array([0.0, 0.3, 1.0, 2.5, 6.0, 12.0, 25.0])
    d = np.sqrt(kl)
    curve = 0.9 * d - 0.2 * d * (d if law == "best-of-n" else np.log(np.maximum(d, 1e-300)))
    exact = fit_law(law, kl, curve, np.tile(kl, (50, 1)), np.tile(curve, (50, 1)))
    assert exact.alpha is not None and exact.beta is not None
    assert (exact.alpha.value, exact.beta.value, exact.points) == pytest.approx((0.9, 0.2, 6))
    assert math.isnan(exact.alpha.low) and exact.alpha.why == "all equal" and exact.residual < 1e-9
    assert exact.curve(d) == pytest.approx(curve)
    noisy = curve + random.normal(0, 0.05, len(kl))
    noise = random.normal(0, 0.05, (400, len(kl)))
    found = fit_law(law, kl, noisy, np.tile(kl, (400, 1)), noisy + noise)
    assert found.alpha is not None and found.beta is not None
    assert found.alpha.low < 0.9 < found.alpha.high and found.beta.low < 0.2 < found.beta.high
    assert 0 < found.residual < 0.1


def test_few_prompts_tell_wide_intervals_or_none() -> None:
    random = np.random.default_rng(6)
    values, tokens = random.normal(3, 2, size=6), random.uniform(20, 40, size=6)
    found, rows = mean(values, resample(6, 1)), resample(6, 1)
    low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert mean(values[:2], resample(2, 1)).why == "too few" and mean(np.ones(50), resample(50, 1)).why == "all equal"
    part = laws.ratio_of(values, tokens, rows)
    assert part.value == pytest.approx(values.sum() / tokens.sum()) and part.low < part.value < part.high
    assert laws.ratio_of(2 * tokens, tokens, rows).why == "all equal"
    assert not_negative(Estimate(-0.1, -0.3, 0.1, 6)) == Estimate(0.0, 0.0, 0.1, 6)  # KL is never negative
    kl = np.array([0.0, 0.3, 1.0, 2.5, 6.0])
    many = np.maximum(kl + random.normal(0, 0.01, (100, 5)), 1e-6)
    few = fit_law("rl", kl, np.sqrt(kl), many, np.sqrt(many), prompts=6)
    assert few.alpha is not None and math.isfinite(few.alpha.value) and few.alpha.why == "too few"
    assert json.loads(json.dumps(numbers(few.alpha), allow_nan=False))["low"] is None


def test_too_few_points_are_said_to_mean_nothing() -> None:
    kl = np.array([0.0, 0.1, 0.2, 1.0, 2.0])
    many = np.tile(kl, (100, 1))
    many[:, 1] += np.linspace(-0.2, 0.2, 100)  # cannot be told from 0
    found = fit_law("rl", kl, kl, many, many)
    assert found.points == 3 and found.alpha is None
    assert "3 of 5 points have a KL above 0" in found.why_not


def test_the_rule_for_the_checkpoint_to_keep() -> None:
    prompts, rows = 200, resample(200, seed=1)
    noise = np.random.default_rng(5).normal(0, 0.1, (2, 5, prompts))

    def chosen(rewards: list[float], judge: list[float], collapsed: dict[int, str] | None = None) -> int:
        reasons = [(collapsed or {}).get(place) for place in range(5)]
        return keep(noise[0] + np.array(rewards)[:, None], noise[1] + np.array(judge)[:, None], reasons, rows)

    rising = [5, 6, 7, 8, 9]
    assert chosen(rising, [5, 6, 7, 6, 4]) == 2, "the judge's best, not the reward's"
    assert chosen(rising, [5, 6, 7, 7, 4]) == 3, "of equals for the judge the higher reward"
    assert chosen(rising, [5, 6, 7, 7, 4], {3: "all alike"}) == 2, "a collapsed one does not count"
    assert chosen(rising, [9, 4, 3, 3, 3]) == 1, "the base is kept only where nothing else is left"
    assert chosen(rising, rising, dict.fromkeys(range(1, 5), "all alike")) == 0
    assert chosen(rising, [math.nan] * 5) == 4, "without a judge, by reward alone"


def test_the_interval_of_what_could_not_be_measured_is_unknown() -> None:
    assert all(math.isnan(part) for part in interval(math.nan, np.full(3, math.nan), 3)[:3])


# --- The report, on real checkpoints ------------------------------------------------------------------------------

SHARPER = {2: 1.3, 4: 1.8, 6: 1e3}  # checkpoint -> factor on the base's logits; the last one is greedy
OPTIONS: dict[str, Any] = {"prompts": 6, "samples": 2, "checkpoints": 9, "best_of": 4, "judge": None, "seed": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuning run's folder, with checkpoints that move ever further from the base."""
    folder = tmp_path_factory.mktemp("runs") / "sharp"
    settings = ("sampling.max_new_tokens=40", "render.seconds=2.0", "render.workers=1", "grpo.beta=0.5")
    settings += ("rewards=[]", "reward.target=none", "guard.judge.kind=plausibility")
    folder.mkdir()
    base = shutil.copytree(SHIPPED / "piano-small", folder.parent / "base")
    (folder / "config.toml").write_text(dumps(load("quickstart.toml", (*settings, f"model.base={base}"))))
    for step, factor in SHARPER.items():
        model, tokenizer = load_base("piano-small")
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        save(folder / "checkpoints", step, partial(save_base, model, tokenizer))
    return folder


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "frontier"
    report(runs=[run], out=out, device="cpu", **OPTIONS)
    return out


def table_of(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["series"], row["step"]): row for row in pq.read_table(out / "frontier.parquet").to_pylist()}


@pytest.mark.slow
def test_each_point_is_what_the_pieces_say(run: Path, made: Path) -> None:
    """KL against the learner's own log-probabilities, ratings against the stored ones, best-of-n by hand."""
    rows = table_of(made)
    name = "sharp (beta 0.5)"
    assert list(rows) == [*((name, step) for step in (0, 2, 4, 6)), *(("best of n", n) for n in (1, 2, 4))]
    assert rows[name, 0]["kl"] == 0 and rows[name, 0]["kl_high"] == 0 and rows[name, 0]["pieces"] == 12
    pieces = pq.read_table(made / "pieces" / "sharp@2" / "00000.parquet").to_pylist()
    base, tuned = load_base("piano-small")[0], load_base(run / "checkpoints" / "00000002")[0]
    assert [(piece["prompt"], piece["sample"]) for piece in pieces] == [(i, s) for i in range(6) for s in range(2)]
    log_ratio, plausible = [], []
    with torch.no_grad():
        for piece in pieces:
            tokens = torch.tensor([piece["tokens"]])
            own, under_base = (token_logprobs(model, tokens, 4).sum().item() for model in (tuned, base))
            log_ratio.append(own - under_base)
            plausible.append(under_base / piece["length"])
    row = rows[name, 2]
    assert row["kl"] == pytest.approx(np.mean(log_ratio), abs=1e-3)
    assert row["kl_token"] == pytest.approx(np.sum(log_ratio) / sum(piece["length"] for piece in pieces), abs=1e-4)
    assert row["judge"] == pytest.approx(np.mean(plausible), abs=1e-4)
    assert row["reward"] == pytest.approx(np.mean([piece["ce_proxy.CE"] for piece in pieces]), abs=1e-5)
    assert 0 < row["kl"] < rows[name, 4]["kl"] < rows[name, 6]["kl"]
    text = (made / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    for what in ("reward", "judge", "kl", "vendi"):
        assert row[f"{what}_low"] <= row[what] <= row[f"{what}_high"]

    drawn = pq.read_table(made / "pieces" / "base" / "00000.parquet").to_pylist()
    rewards = np.array([piece["ce_proxy.CE"] for piece in drawn]).reshape(6, 4)
    assert rows["best of n", 4]["reward"] == pytest.approx(rewards.max(axis=1).mean(), abs=1e-5)
    assert rows["best of n", 1]["reward"] == pytest.approx(rewards.mean(), abs=1e-5)
    assert rows["best of n", 2]["kl"] == pytest.approx(math.log(2) - 1 / 2)
    # prompts and seeds are the same for every model
    assert [piece["seed"] for piece in drawn[::4]] == [piece["seed"] for piece in pieces[::2]]
    assert [piece["tokens"][:4] for piece in drawn[::4]] == [piece["tokens"][:4] for piece in pieces[::2]]


def test_a_collapsed_checkpoint_is_flagged_and_not_kept(made: Path) -> None:
    rows, summary = table_of(made), json.loads((made / "summary.json").read_text())
    last, chosen = rows["sharp (beta 0.5)", 6], summary["runs"]["sharp (beta 0.5)"]
    assert "of the base's" in last["collapsed"] and last["vendi_within"] == pytest.approx(1)
    assert chosen["collapsed"][-1]["step"] == 6 and chosen["keep"] in (2, 4)
    assert [row["step"] for row in rows.values() if row["keep"]] == [chosen["keep"]]
    assert summary["judge"].startswith("plausibility") and summary["stand_in"] and summary["rule"] == RULE
    assert {fit["why_not"] != "" for fit in summary["fits"] if fit["law"] == "rl"} == {True}, "three points are too few"
    for name in ("frontier.png", "frontier.pdf", "frontier.csv"):
        assert (made / name).stat().st_size > 500, name


def test_a_report_that_was_cut_short_goes_on(run: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir() if path.suffix in (".csv", ".json")}
    for path in (made / "frontier.csv", made / "summary.json"):
        path.unlink()
    (block,) = (made / "pieces" / "sharp@4").iterdir()
    block.write_bytes(block.read_bytes()[:100])
    drawn = []
    compose = points.compose
    monkeypatch.setattr(
        points, "compose", lambda systems, **more: drawn.append(systems[0].name) or compose(systems, **more)
    )
    with hold(made), pytest.raises(UserError, match="another process is working in it"):
        report(runs=[run], out=made, device="cpu", **OPTIONS)
    report(runs=[run], out=made, device="cpu", **OPTIONS)
    assert drawn == ["sharp@4"]
    assert {path.name: path.read_bytes() for path in made.iterdir() if path.suffix in (".csv", ".json")} == before
    with pytest.raises(UserError, match="n was 6 and is 5"):
        report(runs=[run], out=made, device="cpu", **OPTIONS | {"prompts": 5})


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_base_that_was_exchanged_is_named_and_accepted(run: Path, made: Path, tmp_path: Path, file: str) -> None:
    out, base = shutil.copytree(made, tmp_path / "out"), run.parent / "base" / file
    before = base.read_bytes()
    base.write_bytes(before + b"\n")
    try:
        with pytest.raises(UserError, match=rf"sharp@base\.{file[:-5]}_sha256 was .* continue with --accept-changes"):
            report(runs=[run], out=out, device="cpu", **OPTIONS)
        report(runs=[run], out=out, device="cpu", accept_changes=True, **OPTIONS)
    finally:
        base.write_bytes(before)
    ((accepted,),) = json.loads((out / "summary.json").read_text())["accepted"]
    assert accepted.startswith(f"models.sharp@base.{file[:-5]}_sha256 was")


def test_what_cannot_be_compared_is_named(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.toml").write_text((run / "config.toml").read_text().replace('"timgm"', '"fluidr3"'))
    with pytest.raises(UserError, match=r"cannot be compared .* render\.soundfont was 'timgm' and is 'fluidr3'"):
        report(runs=[run, other], out=tmp_path / "out", device="cpu", **OPTIONS)
    with pytest.raises(UserError, match="the runs optimise this reward"):
        report(runs=[run], out=tmp_path / "out", device="cpu", **OPTIONS | {"judge": "ce_proxy"})
    with pytest.raises(UserError, match="expected the folder of a tuning run"):
        report(runs=[tmp_path], out=tmp_path / "out", device="cpu", **OPTIONS)
    shutil.rmtree(other / "checkpoints")
    (other / "config.toml").write_text((run / "config.toml").read_text())
    with pytest.raises(UserError, match="has no checkpoints yet"):
        report(runs=[other], out=tmp_path / "out", device="cpu", **OPTIONS)


def test_checkpoints_are_evenly_spaced_and_the_last_is_among_them() -> None:
    assert evenly([2, 4, 6], 9) == [2, 4, 6]
    assert evenly(list(range(20, 1001, 20)), 10) == list(range(100, 1001, 100))
    assert evenly([5, 10, 15], 1) == [15]
