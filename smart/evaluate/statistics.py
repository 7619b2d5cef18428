"""Numbers with their uncertainty: means, paired differences and their tests, over pieces that share prompts.

Every interval is 95%. Those of means and effects are percentiles of a bootstrap over prompts; those of measures that
belong to a set of pieces, such as diversity, come from a jackknife, since a resample would hold copies. A value that is
not finite (a clip that failed) is left out; of a pair, both are. The draws come from a seeded generator.

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
GROUPS = 10  # of the jackknife


class Estimate(NamedTuple):
    """A number, its 95% interval (NaN where there is none), and of how many pieces or pairs it is."""

    value: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """How ``after`` differs from ``before``, prompt by prompt."""

    difference: Estimate  # mean of after - before
    cohen: Estimate  # Cohen's d of the differences: their mean in their standard deviations
    cliff: Estimate  # Cliff's delta of the pairs: share that rises minus share that falls
    t_test: float  # p of the paired t-test; NaN below two pairs, or where all differences are equal
    wilcoxon: float  # p of Wilcoxon's signed-rank test; 1 where nothing differs


@lru_cache(maxsize=8)
def _resamples(count: int, seed: int) -> npt.NDArray[np.int32]:
    """(R, N) which pieces each resample holds."""
    return np.random.default_rng([seed, count]).integers(count, size=(RESAMPLES, count), dtype=np.int32)


def bootstrap(values: Floats, measure: Callable[[Floats], Floats], seed: int) -> Estimate:
    """Of ``values`` (N,), resampled; ``measure`` maps (..., N) to (...)."""
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
    """Of the finite ones of ``values`` (N,)."""
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
    """p-values (M,) of one family, corrected by Holm (1979); NaN stays and does not count."""
    given = np.asarray(p, np.float64)
    out, known = given.copy(), np.flatnonzero(np.isfinite(given))
    order = known[np.argsort(given[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1)
    return out


def jackknife(measure: Callable[[Sequence[int]], Mapping[str, float]], count: int) -> dict[str, Estimate]:
    """What ``measure(rows)`` finds in pieces 0 .. count-1, with normal intervals from leaving out a tenth at a time."""
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
