"""How far to optimise: reward, a judge that was not optimised, and diversity, each against KL to the base.

``smart evaluate frontier RUN... --out FOLDER`` draws fresh samples of each checkpoint of one run or several (several
values of beta), for the same held-out prompts and from the same seeds, and puts them on the axes of Gao, Schulman and
Hilton (2023), "Scaling laws for reward model overoptimization": d = sqrt(KL). Beside them stands best-of-n: from N
samples a prompt of the base, the expected reward of the best of n, at KL = log n - (n-1)/n. Their laws

    R(d) - R(0) = d (alpha - beta d)          best-of-n
    R(d) - R(0) = d (alpha - beta log d)      reinforcement learning

are fitted to each measure where there are enough points. KL is estimated on the samples: the mean over pieces of
log pi(piece) - log base(piece), in nats a piece, and the same divided by the tokens drawn. All intervals are 95%:
percentiles of a bootstrap over prompts, which are paired over checkpoints; those of diversity, which belongs to a set
of pieces and not to one, come from a jackknife that leaves out a twentieth of the prompts at a time.

Axes: B prompts, N samples a prompt, K checkpoints (the first is the base), R resamples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

RESAMPLES = 2000
BLOCKS = 20  # of the jackknife
FEWEST = 4  # points that a law with two coefficients is fitted to


class Estimate(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


# --- Best of n ----------------------------------------------------------------------------------------------------


def order_weights(samples: int, n: int) -> Floats:
    """Weight (N,) of the i-th lowest of N samples in the expected maximum of n of them, drawn without replacement.

    C(i-1, n-1) / C(N, n): the share of the subsets of n in which the i-th lowest is the highest. The weighted sum is
    the unbiased estimator of E[max of n] with least variance. Raises ``ValueError`` unless 1 <= n <= N.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"best of n: expected 1 <= n <= {samples}, got {n}")
    return np.array([math.comb(i - 1, n - 1) / math.comb(samples, n) for i in range(1, samples + 1)])


def best_of_n(rewards: Floats, values: Floats, n: int) -> Floats:
    """Expected ``values`` of the sample with the highest of ``rewards`` among n: (B,) from (B, N) each.

    Samples of equal reward are equally likely to be the best. A sample without a reward (NaN) is not in the draw; a
    prompt with fewer than n is NaN.
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
    """KL of best-of-n to the base in nats a piece: log n - (n-1)/n, exact where no two pieces have the same reward."""
    return math.log(n) - (n - 1) / n


# --- Intervals ----------------------------------------------------------------------------------------------------


def resample(prompts: int, seed: int, count: int = RESAMPLES) -> Rows:
    """Prompts of each of R bootstrap samples: (R, B)."""
    return np.random.default_rng(seed).integers(prompts, size=(count, prompts))


def bootstrap(values: Floats, rows: Rows) -> Floats:
    """Mean over prompts of each resample, (R,), of ``values`` (B,); what is NaN is left out."""
    return ratio(values, np.ones_like(values), rows)


def ratio(above: Floats, below: Floats, rows: Rows) -> Floats:
    """Sum of ``above`` over sum of ``below``, (R,), both (B,); prompts where ``above`` is NaN are left out."""
    known = np.isfinite(above)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, above, 0.0)[rows].sum(1) / np.where(known, below, 0.0)[rows].sum(1)


def interval(value: float, resampled: Floats) -> Estimate:
    """``value`` with the 2.5th and 97.5th percentile of what was resampled."""
    known = resampled[np.isfinite(resampled)]
    if not len(known) or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def mean(values: Floats, rows: Rows) -> Estimate:
    """Mean over prompts of ``values`` (B,)."""
    known = values[np.isfinite(values)]
    return interval(float(known.mean()) if len(known) else math.nan, bootstrap(values, rows))


def jackknife(count: int, measure: Callable[[Rows], float], blocks: int = BLOCKS) -> Estimate:
    """``measure`` of all of ``count`` pieces, with an interval from leaving out one block of them after the other.

    ``measure`` gets the pieces' numbers. Fewer pieces than blocks are left out one by one.
    """
    everything = np.arange(count)
    value = measure(everything)
    parts = np.array_split(everything, min(blocks, count))
    if len(parts) < 2:
        return Estimate(value, math.nan, math.nan)
    without = np.array([measure(np.setdiff1d(everything, part)) for part in parts])
    error = math.sqrt((len(parts) - 1) * float(without.var()))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error)


# --- The laws of Gao et al. ---------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """R(d) - R(0) = d (alpha - beta d), or d (alpha - beta log d); without coefficients where ``why_not`` says why."""

    law: str  # "best-of-n" or "rl"
    points: int
    alpha: Estimate | None = None
    beta: Estimate | None = None
    residual: float = math.nan  # root mean square, on the measure's own scale
    why_not: str = ""

    def __call__(self, distance: Floats) -> Floats:
        """R(d) - R(0)."""
        assert self.alpha is not None and self.beta is not None
        return _terms(self.law, distance) @ np.array([self.alpha.value, self.beta.value])


def _terms(law: str, distance: Floats) -> Floats:
    """(K, 2): what alpha and beta are multiplied with."""
    second = distance if law == "best-of-n" else np.log(distance, where=distance > 0, out=np.zeros_like(distance))
    return np.stack([distance, -distance * second], axis=-1)


def fit_law(law: str, kl: Floats, gain: Floats, kl_resampled: Floats, gain_resampled: Floats) -> Fit:
    """Least squares of one law over K points, and again over each of R resamples for the intervals.

    ``kl`` and ``gain`` = R(d) - R(0) are (K,), the resampled ones (R, K). Points whose KL cannot be told from 0 do not
    count: their d is noise.
    """
    away = np.isfinite(gain) & (kl > 0) & (np.percentile(kl_resampled, 2.5, axis=0) > 0)
    points = int(away.sum())
    if points < FEWEST:
        reason = f"{points} of {len(kl)} points have a KL above 0; two coefficients need {FEWEST} to mean anything"
        return Fit(law, points, why_not=reason)

    def solve(kl: Floats, gain: Floats) -> Floats:
        return np.linalg.lstsq(_terms(law, np.sqrt(np.maximum(kl, 0))), gain, rcond=None)[0]

    found = solve(kl[away], gain[away])
    many = [solve(*pair) for pair in zip(kl_resampled[:, away], gain_resampled[:, away], strict=True)]
    alpha, beta = (interval(float(one), column) for one, column in zip(found, np.array(many).T, strict=True))
    fit = Fit(law, points, alpha, beta)
    return fit._replace(residual=float(np.sqrt(np.mean((fit(np.sqrt(kl[away])) - gain[away]) ** 2))))


# --- The checkpoint to keep ---------------------------------------------------------------------------------------

RULE = (
    "Of the checkpoints that have not collapsed, those that the held-out judge rates highest, or as high as can be told "
    "(the paired 95% interval of the difference reaches 0); of these the one with the highest reward. Where every "
    "checkpoint has collapsed, the base. Without a judge, by reward alone."
)


def keep(rewards: Floats, judge: Floats, collapsed: Sequence[str | None], rows: Rows) -> int:
    """Which of K checkpoints to keep by ``RULE``; 0 is the base. ``rewards`` and ``judge`` are (K, B)."""
    sound = [place for place in range(1, len(rewards)) if not collapsed[place]]
    if not sound:
        return 0
    rated, wanted = np.nanmean(rewards, axis=1), judge if np.isfinite(judge).any() else rewards
    best = max(sound, key=lambda place: float(np.nanmean(wanted[place])))
    level = [place for place in sound if not mean(wanted[place] - wanted[best], rows).high < 0]
    return max(level, key=lambda place: float(rated[place]))
