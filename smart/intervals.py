"""95% intervals of means by Student's t, and the cases in which the data cannot tell one.

An interval is left out, with the reason, if there are fewer than ``FEWEST`` values or if all are equal: their spread
is unknown then, and no interval would cover the truth as often as it claims. An interval ends where its scale ends,
and one that covers its whole scale says nothing and is left out too.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scale = tuple[float, float]

FEWEST = 3  # values; of two, Student's t reaches 13 standard errors, so nearly every interval would leave its scale
ANY: Scale = (-math.inf, math.inf)
RATING: Scale = (1.0, 10.0)
TOO_FEW, EQUAL, WHOLE = "too few", "all equal", "as wide as the scale"


class Estimate(NamedTuple):
    """A number, its 95% interval, and how many pieces or pairs it is based on; ``why`` says why an interval is NaN."""

    value: float
    low: float
    high: float
    n: int
    why: str = ""


def differences(scale: Scale) -> Scale:
    """The scale of differences of two values on ``scale``."""
    return scale[0] - scale[1], scale[1] - scale[0]


def without(value: float, n: int, why: str) -> Estimate:
    """An estimate whose interval is left out."""
    return Estimate(float(value), math.nan, math.nan, n, why)


def within(found: Estimate, scale: Scale) -> Estimate:
    """The part of the interval that lies on ``scale``; without one if that is the whole scale."""
    low, high = max(found.low, min(scale[0], found.value)), min(found.high, max(scale[1], found.value))
    if math.isfinite(scale[1] - scale[0]) and low <= scale[0] and high >= scale[1]:
        return without(found.value, found.n, WHOLE)
    return found._replace(low=low, high=high)


def by_student(value: float, error: float, df: float, n: int, scale: Scale = ANY) -> Estimate:
    """``value`` with its interval from a standard error with ``df`` degrees of freedom."""
    from scipy import stats  # imported late: it is slow, and programs show their help without it

    if not (math.isfinite(error) and df >= 1):
        return without(value, n, TOO_FEW)
    reach = float(stats.t.ppf(0.975, df)) * error
    return within(Estimate(float(value), float(value - reach), float(value + reach), n), scale)


def all_equal(values: Floats) -> bool:
    """Whether the finite ``values`` (N,) are the same number, up to rounding."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max()) if len(values) else True


def mean_of(values: npt.ArrayLike, scale: Scale = ANY) -> Estimate:
    """Mean of the finite ``values`` of (N,), with its interval."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    count = len(array)
    value = float(array.mean()) if count else math.nan
    if count < FEWEST:
        return without(value, count, TOO_FEW)
    if all_equal(array):
        return without(value, count, EQUAL)
    return by_student(value, float(array.std(ddof=1)) / math.sqrt(count), count - 1, count, scale)
