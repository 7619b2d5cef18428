"""Means, paired differences and tests over pieces that share prompts, with 95% intervals.

Intervals of means and effects are percentiles of a seeded bootstrap over prompts. Measures of a whole set of pieces,
such as diversity, use a jackknife instead, since a bootstrap resample contains copies. Values that are not finite (a
clip that failed) are left out, and with them their partners in pairs.

Axes: N pieces of a system or pairs of pieces, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
GROUPS = 10  # groups of the jackknife


class Estimate(NamedTuple):
    """A number, its 95% interval (NaN if undefined), and how many pieces or pairs it is based on."""

    value: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """How ``after`` differs from ``before``, prompt by prompt."""

    difference: Estimate  # mean of after - before
    cohen: Estimate  # Cohen's d of the differences: their mean over their standard deviation
    cliff: Estimate  # Cliff's delta of the pairs: share that rises minus share that falls
    t_test: float  # p of the paired t-test; NaN for fewer than two pairs, or if all differences are equal
    wilcoxon: float  # p of Wilcoxon's signed-rank test; 1 if nothing differs


@lru_cache(maxsize=8)
def _resamples(count: int, seed: int) -> npt.NDArray[np.int32]:
    """Indices (R, N) of the pieces in each resample."""
    return np.random.default_rng([seed, count]).integers(count, size=(RESAMPLES, count), dtype=np.int32)


def bootstrap(values: Floats, measure: Callable[[Floats], Floats], seed: int) -> Estimate:
    """``measure`` of ``values`` (N,) with its bootstrap interval; it maps (..., N) to (...)."""
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(measure(values))
    if count == 1 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, count)
    found = measure(values[_resamples(count, seed)])
    found = found[np.isfinite(found)]  # a resample of few pairs may have no spread
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), count)


def _mean(values: Floats) -> Floats:
    return np.asarray(values.mean(axis=-1))


def _cohen(values: Floats) -> Floats:
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], math.nan)
    mean, spread = values.mean(axis=-1), values.std(axis=-1, ddof=1)
    none = spread <= 1e-12 * np.abs(values).max(axis=-1)  # equal differences, to rounding
    return np.where(none, math.nan, mean / np.where(none, 1, spread))


def _cliff(values: Floats) -> Floats:
    return np.asarray(np.sign(values).mean(axis=-1))


def mean(values: npt.ArrayLike, *, seed: int = 1) -> Estimate:
    """Mean of the finite ``values`` of (N,), with its interval."""
    array = np.asarray(values, np.float64)
    return bootstrap(array[np.isfinite(array)], _mean, seed)


def paired(before: npt.ArrayLike, after: npt.ArrayLike, *, seed: int = 1) -> Paired:
    """Compare two systems on one measure, (N,) each, the same prompts in the same order."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    difference = difference[np.isfinite(difference)]
    cohen = bootstrap(difference, _cohen, seed)
    return Paired(
        difference=bootstrap(difference, _mean, seed),
        cohen=cohen,
        cliff=bootstrap(difference, _cliff, seed),
        t_test=float(stats.ttest_1samp(difference, 0).pvalue) if math.isfinite(cohen.value) else math.nan,
        wilcoxon=_wilcoxon(difference),
    )


def _wilcoxon(difference: Floats) -> float:
    if not len(difference):
        return math.nan
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def holm(p: npt.ArrayLike) -> Floats:
    """p-values (M,) of one family, corrected by Holm (1979); NaN stays NaN and is not counted."""
    given = np.asarray(p, np.float64)
    out, known = given.copy(), np.flatnonzero(np.isfinite(given))
    order = known[np.argsort(given[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1)
    return out


def jackknife(measure: Callable[[Sequence[int]], Mapping[str, float]], count: int) -> dict[str, Estimate]:
    """``measure(rows)`` of pieces 0 .. count-1, with normal intervals from leaving out a tenth of them at a time."""
    whole = measure(range(count))
    groups = min(GROUPS, count)
    if groups < 2:
        return {name: Estimate(value, math.nan, math.nan, count) for name, value in whole.items()}
    left: list[Mapping[str, Any]] = [
        measure([row for row in range(count) if row % groups != group]) for group in range(groups)
    ]
    found = {}
    for name, value in whole.items():
        values = np.array([part.get(name, math.nan) for part in left])
        error = 1.959964 * math.sqrt((groups - 1) / groups * float(((values - values.mean()) ** 2).sum()))
        found[name] = Estimate(value, value - error, value + error, count)
    return found
