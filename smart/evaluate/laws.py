"""The frontier's numbers: best-of-n without training, bootstrap intervals, and the laws of Gao, Schulman and Hilton.

Axes: B prompts, N samples per prompt, K checkpoints (the first is the base), R resamples.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smart.evaluate.statistics import FEW, RESAMPLES
from smart.evaluate.statistics import by_resamples as interval
from smart.intervals import (
    ANY,
    EQUAL,
    FEWEST,
    TOO_FEW,
    Estimate,
    Floats,
    Scale,
    all_equal,
    by_student,
    mean_of,
    without,
)

Rows = npt.NDArray[np.int64]

FEWEST_POINTS = 4  # points that a law with two coefficients is fitted to


# --- Best of n ----------------------------------------------------------------------------------------------------


def order_weights(samples: int, n: int) -> Floats:
    """Weights (N,) of N sorted samples, lowest first, in the expected maximum of n of them drawn without replacement.

    The i-th is C(i-1, n-1) / C(N, n): the share of subsets of n in which sample i is the largest. The weighted sum is
    the unbiased estimator of E[max of n] with the least variance. Raises ``ValueError`` unless 1 <= n <= N.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"best of n: expected 1 <= n <= {samples}, got {n}")
    return np.array([math.comb(i - 1, n - 1) / math.comb(samples, n) for i in range(1, samples + 1)])


def best_of_n(rewards: Floats, values: Floats, n: int) -> Floats:
    """Expected ``values`` of the sample with the highest of ``rewards`` among n: (B,) from (B, N) each.

    Samples of equal reward are equally likely to be the best. A sample without a reward (NaN) is left out; a prompt
    with fewer than n rewards gives NaN.
    """
    expected = np.full(len(rewards), math.nan)
    for row, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        rated = np.isfinite(reward)
        if rated.sum() < n:
            continue
        _, rank, count = np.unique(reward[rated], return_inverse=True, return_counts=True)
        ends = np.cumsum(count)
        share = np.diff(np.append(0.0, np.cumsum(order_weights(int(rated.sum()), n))[ends - 1])) / count
        expected[row] = (share[rank] * value[rated]).sum()
    return expected


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the base in nats per piece: log n - (n-1)/n, exact if no two pieces have the same reward."""
    return math.log(n) - (n - 1) / n


# --- Intervals ----------------------------------------------------------------------------------------------------


def resample(prompts: int, seed: int) -> Rows:
    """Indices of the prompts in each bootstrap resample: (R, B)."""
    return np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))


def bootstrap(values: Floats, rows: Rows) -> Floats:
    """Mean of ``values`` (B,) in each resample: (R,). NaN values are left out."""
    return ratio(values, np.ones_like(values), rows)


def ratio(above: Floats, below: Floats, rows: Rows) -> Floats:
    """Sum of ``above`` (B,) over sum of ``below`` (B,) per resample: (R,). Prompts with NaN ``above`` are left out."""
    known = np.isfinite(above)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, above, 0.0)[rows].sum(1) / np.where(known, below, 0.0)[rows].sum(1)


def mean(values: Floats, rows: Rows, scale: Scale = ANY) -> Estimate:
    """Mean of ``values`` (B,) over prompts, with its interval. NaN values are left out."""
    known = values[np.isfinite(values)]
    if len(known) < FEW or all_equal(known):
        return mean_of(known, scale)
    return interval(float(known.mean()), bootstrap(values, rows), len(known), scale)


def ratio_of(above: Floats, below: Floats, rows: Rows) -> Estimate:
    """Sum of ``above`` (B,) over sum of ``below`` (B,), with its interval: Student's t for few prompts."""
    count, value = len(above), float(above.sum() / below.sum())
    rest = above - value * below  # of a ratio that is the same for every prompt nothing is left
    if count < FEWEST:
        return without(value, count, TOO_FEW)
    if np.abs(rest).max() <= 1e-12 * np.abs(above).max():
        return without(value, count, EQUAL)
    if count < FEW:
        error = math.sqrt(count / (count - 1) * float(rest @ rest)) / float(below.sum())
        return by_student(value, error, count - 1, count)
    return interval(value, ratio(above, below, rows), count)


# --- The laws of Gao et al. ---------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """R(d) - R(0) = d (alpha - beta d), or d (alpha - beta log d). If nothing was fitted, ``why_not`` says why."""

    law: str  # "best-of-n" or "rl"
    points: int
    alpha: Estimate | None = None
    beta: Estimate | None = None
    residual: float = math.nan  # root mean square, on the measure's own scale
    why_not: str = ""

    def curve(self, distance: Floats, start: float = 0.0) -> Floats:
        """R(d), given R(0) = ``start``."""
        assert self.alpha is not None and self.beta is not None
        return start + _terms(self.law, distance) @ np.array([self.alpha.value, self.beta.value])


def _terms(law: str, distance: Floats) -> Floats:
    """The factors (K, 2) of alpha and beta."""
    second = distance if law == "best-of-n" else np.log(distance, where=distance > 0, out=np.zeros_like(distance))
    return np.stack([distance, -distance * second], axis=-1)


def fit_law(
    law: str, kl: Floats, gain: Floats, kl_resampled: Floats, gain_resampled: Floats, prompts: int = FEW
) -> Fit:
    """Fit one law to K points by least squares, and to each of R resamples for the intervals.

    ``kl`` and ``gain`` = R(d) - R(0) are (K,), the resampled ones (R, K). Points whose KL cannot be told from 0 are
    left out: their d is noise. Of few ``prompts`` (the values in a resample) resamples say little, and intervals are
    left out or widened.
    """
    away = np.isfinite(gain) & (kl > 0) & (np.percentile(kl_resampled, 2.5, axis=0) > 0)
    points = int(away.sum())
    if points < FEWEST_POINTS:
        reason = (
            f"{points} of {len(kl)} points have a KL above 0; fitting two coefficients takes at least {FEWEST_POINTS}"
        )
        return Fit(law, points, why_not=reason)

    def solve(kl: Floats, gain: Floats) -> Floats:
        return np.asarray(np.linalg.lstsq(_terms(law, np.sqrt(np.maximum(kl, 0))), gain, rcond=None)[0], np.float64)

    found = solve(kl[away], gain[away])
    many = [solve(*pair) for pair in zip(kl_resampled[:, away], gain_resampled[:, away], strict=True)]
    alpha, beta = (
        interval(one, column, prompts)._replace(n=points) for one, column in zip(found, np.array(many).T, strict=True)
    )
    fit = Fit(law, points, alpha, beta)
    return fit._replace(residual=float(np.sqrt(np.mean((fit.curve(np.sqrt(kl[away])) - gain[away]) ** 2))))
