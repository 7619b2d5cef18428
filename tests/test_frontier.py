"""The frontier report: estimators against brute force and numbers worked by hand, laws with planted coefficients."""

import itertools
import math

import numpy as np
import pytest

from smart.evaluate.frontier import (
    best_of_n,
    best_of_n_kl,
    fit_law,
    interval,
    jackknife,
    keep,
    mean,
    order_weights,
    ratio,
    resample,
)


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
    # of three rated samples the pairs are (1,2), (1,2'), (2,2'); in the last either is the best
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


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(size=15)
    found = jackknife(15, lambda rows: float(values[rows].mean()))
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(values.std(ddof=1) / math.sqrt(15))
    assert math.isnan(jackknife(1, lambda rows: 1.0).low)


@pytest.mark.parametrize("law", ["best-of-n", "rl"])
def test_the_fit_recovers_planted_coefficients(law: str) -> None:
    random = np.random.default_rng(4)
    kl = np.array([0.0, 0.3, 1.0, 2.5, 6.0, 12.0, 25.0])
    d = np.sqrt(kl)
    curve = 0.9 * d - 0.2 * d * (d if law == "best-of-n" else np.log(np.maximum(d, 1e-300)))
    exact = fit_law(law, kl, curve, np.tile(kl, (50, 1)), np.tile(curve, (50, 1)))
    assert exact.alpha is not None and exact.beta is not None
    assert (exact.alpha.value, exact.beta.value, exact.points) == pytest.approx((0.9, 0.2, 6))
    assert exact.alpha.high - exact.alpha.low == pytest.approx(0, abs=1e-9) and exact.residual < 1e-9
    assert exact(d) == pytest.approx(curve)
    noisy = curve + random.normal(0, 0.05, len(kl))
    noise = random.normal(0, 0.05, (400, len(kl)))
    found = fit_law(law, kl, noisy, np.tile(kl, (400, 1)), noisy + noise)
    assert found.alpha is not None and found.beta is not None
    assert found.alpha.low < 0.9 < found.alpha.high and found.beta.low < 0.2 < found.beta.high
    assert 0 < found.residual < 0.1


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
    assert all(math.isnan(part) for part in interval(math.nan, np.full(3, math.nan)))
