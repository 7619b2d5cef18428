"""Means, paired differences and tests over pieces that share prompts, with 95% intervals.

Intervals of means and effects are percentiles of a seeded bootstrap over prompts. Below ``FEW`` prompts percentiles are
too narrow (they cover the mean of 2 prompts in 51% of cases, of 5 in 82%, of 10 in 91%), so Student's t and exact
intervals take their place; where no interval can be known, it is left out (``smart.intervals``). Measures of a whole
set of pieces, such as diversity, use a jackknife instead, since a bootstrap resample contains copies. Values that are
not finite (a clip that failed) are left out, and with them their partners in pairs.

Axes: N pieces of a system or pairs of pieces, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

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
    differences,
    mean_of,
    within,
    without,
)

RESAMPLES = 2000
GROUPS = 10  # groups of the jackknife
FEW = 30  # values below which percentiles of a bootstrap are too narrow
FEWEST_RESAMPLED = 10  # values below which a bootstrap says nothing of a measure that is no mean


class Paired(NamedTuple):
    """How ``after`` differs from ``before``, prompt by prompt."""

    difference: Estimate  # mean of after - before
    cohen: Estimate  # Cohen's d of the differences: their mean over their standard deviation
    cliff: Estimate  # Cliff's delta of the pairs: share that rises minus share that falls
    t_test: float  # p of the paired t-test; NaN for fewer than two pairs, or if all differences are equal
    wilcoxon: float  # p of Wilcoxon's signed-rank test; NaN if nothing differs


@lru_cache(maxsize=8)
def _resamples(count: int, seed: int) -> npt.NDArray[np.int32]:
    """Indices (R, N) of the pieces in each resample."""
    return np.random.default_rng([seed, count]).integers(count, size=(RESAMPLES, count), dtype=np.int32)


def by_resamples(value: float, resampled: Floats, count: int, scale: Scale = ANY) -> Estimate:
    """``value``, a measure of ``count`` values, with the interval that its values (R,) in resamples give."""
    known = resampled[np.isfinite(resampled)]  # a resample of few values may have no spread
    if count < FEWEST_RESAMPLED or len(known) < len(resampled) / 2 or not math.isfinite(value):
        return without(value, count, TOO_FEW)
    if all_equal(known):
        return without(value, count, EQUAL)
    if count < FEW:
        return by_student(value, float(known.std()) * math.sqrt(count / (count - 1)), count - 1, count, scale)
    low, high = np.percentile(known, [2.5, 97.5])
    return within(Estimate(float(value), float(low), float(high), count), scale)


def bootstrap(values: Floats, measure: Callable[[Floats], Floats], seed: int, scale: Scale = ANY) -> Estimate:
    """``measure`` of ``values`` (N,) with its bootstrap interval; it maps (..., N) to (...)."""
    count = len(values)
    if not count:
        return without(math.nan, 0, TOO_FEW)
    value = float(measure(values))
    if count < FEWEST_RESAMPLED:
        return without(value, count, TOO_FEW)
    return by_resamples(value, measure(values[_resamples(count, seed)]), count, scale)


def _mean(values: Floats) -> Floats:
    return np.asarray(values.mean(axis=-1))


def _cohen(values: Floats) -> Floats:
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], math.nan)
    mean, spread = values.mean(axis=-1), values.std(axis=-1, ddof=1)
    none = spread <= 1e-12 * np.abs(values).max(axis=-1)  # equal differences, to rounding
    return np.where(none, math.nan, mean / np.where(none, 1, spread))


def mean(values: npt.ArrayLike, *, seed: int = 1, scale: Scale = ANY) -> Estimate:
    """Mean of the finite ``values`` of (N,), with its interval, which ends where ``scale`` ends."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    if len(array) < FEW or all_equal(array):
        return mean_of(array, scale)
    return bootstrap(array, _mean, seed, scale)


def cohen(difference: Floats, *, seed: int = 1) -> Estimate:
    """Cohen's d of differences (N,); below ``FEW`` pairs its interval is exact for normal differences.

    d sqrt(N) follows Student's t with the noncentrality delta sqrt(N), so the ends are the delta for which the d that
    was found is the 97.5th and the 2.5th percentile.
    """
    count = len(difference)
    value = float(_cohen(difference)) if count else math.nan
    if count < FEWEST or not math.isfinite(value):
        return without(value, count, TOO_FEW if count < FEWEST else EQUAL)
    if count >= FEW:
        return bootstrap(difference, _cohen, seed)
    statistic = abs(value) * math.sqrt(count)

    def end(tail: float, step: float) -> float:
        """The noncentrality with ``tail`` of its distribution below the statistic; NaN if it cannot be computed."""

        def above(noncentrality: float) -> float:
            return float(stats.nct.cdf(statistic, count - 1, noncentrality)) - tail

        far = statistic + step
        while above(far) * step > 0 and abs(step) < 1e3:
            step *= 1.5
            far = statistic + step
        return float(optimize.brentq(above, statistic, far)) if above(far) * step <= 0 else math.nan

    low, high = (side / math.sqrt(count) for side in (end(0.975, -1.0), end(0.025, 1.0)))
    if not low <= abs(value) <= high:  # also if an end is NaN
        return without(value, count, TOO_FEW)
    return Estimate(value, *((low, high) if value >= 0 else (-high, -low)), count)


def cliff(difference: Floats) -> Estimate:
    """Cliff's delta of pairs, from their differences (N,): the share that rises minus the share that falls.

    Its interval is that of Bonett and Price (2012, J. Educ. Behav. Stat. 37(4)) for a difference of paired shares,
    which also holds for few pairs, and for pairs that all rise.
    """
    count = len(difference)
    value = float(np.sign(difference).mean()) if count else math.nan
    if count < FEWEST:
        return without(value, count, TOO_FEW)
    if not difference.any():
        return without(value, count, EQUAL)
    rise, fall = (int((difference * sign > 0).sum()) + 1 for sign in (1, -1))
    centre, both = (rise - fall) / (count + 2), (rise + fall) / (count + 2)
    reach = 1.959964 * math.sqrt((both - centre**2) / (count + 2))
    return within(Estimate(value, min(centre - reach, value), max(centre + reach, value), count), (-1, 1))


def paired(before: npt.ArrayLike, after: npt.ArrayLike, *, seed: int = 1, scale: Scale = ANY) -> Paired:
    """Compare two systems on one measure on ``scale``, (N,) each, the same prompts in the same order."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    difference = difference[np.isfinite(difference)]
    testable = len(difference) > 1 and not all_equal(difference)
    return Paired(
        difference=mean(difference, seed=seed, scale=differences(scale)),
        cohen=cohen(difference, seed=seed),
        cliff=cliff(difference),
        t_test=float(stats.ttest_1samp(difference, 0).pvalue) if testable else math.nan,
        wilcoxon=float(stats.wilcoxon(difference).pvalue) if difference.any() else math.nan,
    )


def holm(p: npt.ArrayLike, family: int | None = None) -> Floats:
    """p-values (M,) of one family, corrected by Holm (1979); NaN stays NaN.

    ``family``: the number of comparisons in it, some of which this test may not be able to make (None: those that have
    a p-value). So two tests of the same comparisons are corrected for the same number.
    """
    given = np.asarray(p, np.float64)
    out, known = given.copy(), np.flatnonzero(np.isfinite(given))
    order = known[np.argsort(given[known], kind="stable")]
    count = len(order) if family is None else family
    factors = np.arange(count, count - len(order), -1)
    out[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1)
    return out


def jackknife(
    measure: Callable[[Sequence[int]], Mapping[str, float]], count: int, scales: Mapping[str, Scale] | None = None
) -> dict[str, Estimate]:
    """``measure(rows)`` of pieces 0 .. count-1, with intervals from leaving out a tenth of them at a time.

    The spread of ten values is known with nine degrees of freedom, so these are intervals of Student's t. ``scales``:
    where each measure ends.
    """
    whole = measure(range(count))
    groups = min(GROUPS, count)
    if groups < FEWEST:
        return {name: without(value, count, TOO_FEW) for name, value in whole.items()}
    left: list[Mapping[str, Any]] = [
        measure([row for row in range(count) if row % groups != group]) for group in range(groups)
    ]
    found = {}
    for name, value in whole.items():
        values = np.array([part.get(name, math.nan) for part in left])
        if np.isfinite(values).all() and all_equal(values):
            found[name] = without(value, count, EQUAL)
            continue
        error = math.sqrt((groups - 1) / groups * float(((values - values.mean()) ** 2).sum()))
        found[name] = by_student(value, error, groups - 1, count, (scales or {}).get(name, ANY))
    return found
