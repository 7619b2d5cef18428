"""Cumulative link (logit) mixed models: ratings as ordered categories, with no distances assumed.

    logit P(y <= c) = alpha_c - x' beta - z' T u,   u ~ N(0, I) for each group

The integral over u is computed by adaptive Gauss-Hermite quadrature around each group's mode (Pinheiro and Bates 1995,
J. Comput. Graph. Stat. 4(1)); one node is the Laplace approximation, as R's ``ordinal::clmm`` uses by default.

Axes: n observations, p effects (the thresholds are the intercept), C categories, J groups, k random effects, Q nodes.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from smart import UserError
from smart.study.derivatives import Array, hessian
from smart.study.mixed import DISAGREE, SINGULAR, Run, Term

FARTHEST = 10.0  # logits: odds of 22,000; an effect or a standard error beyond it is that of a flat likelihood
SEPARATED = "no rating of one system is lower than any of another (but for ties), so its odds ratio has no limit"


@dataclass(frozen=True)
class OrdinalFit:
    """``levels`` are the categories that were used, in order; ``alpha`` (C - 1,) the thresholds between them.

    ``covariance`` is that of (alpha, beta), from the curvature of the log-likelihood; ``variance`` (k, k) the groups'.
    """

    levels: Array
    alpha: Array
    beta: Array
    covariance: Array
    variance: Array
    log_likelihood: float
    parameters: int
    n: int
    groups: int
    nodes: int
    runs: tuple[Run, ...]
    singular: tuple[str, ...]
    why: tuple[str, ...] = ()  # for each effect, why it has no estimate; "" if it has one

    @property
    def aic(self) -> float:
        """-2 log-likelihood + 2 parameters."""
        return 2 * self.parameters - 2 * self.log_likelihood

    @property
    def errors(self) -> Array:
        """Standard errors of beta (p,); NaN for an effect without an estimate."""
        return np.sqrt(np.diag(self.covariance))[len(self.alpha) :]

    @property
    def p_values(self) -> Array:
        """Two-sided, from the normal distribution (Wald)."""
        return 2 * stats.norm.sf(np.abs(self.beta / self.errors))

    def interval(self, level: float = 0.95) -> Array:
        """(p, 2), Wald."""
        reach = stats.norm.ppf((1 + level) / 2) * self.errors
        return np.stack([self.beta - reach, self.beta + reach], axis=1)

    @property
    def disagreeing(self) -> list[Run]:
        """Runs that ended more than ``DISAGREE`` above the best."""
        return [run for run in self.runs if run.criterion > -2 * self.log_likelihood + DISAGREE]


class Likelihood:
    """The marginal log-likelihood of one data set. It keeps the groups' modes as the next call's starting point."""

    def __init__(self, category: npt.NDArray[np.int64], categories: int, x: Array, term: Term, nodes: int) -> None:
        order = np.argsort(term.groups, kind="stable")  # sums over groups are then sums over slices
        term = term._replace(groups=term.groups[order], z=term.z[order])
        self.category, self.categories, self.x, self.term = category[order], categories, x[order], term
        self.starts = np.searchsorted(term.groups, np.arange(term.size))
        k = term.z.shape[1]
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        self.points = np.array(list(itertools.product(points, repeat=k)))  # (Q^k, k)
        self.log_weights = np.log(np.array(list(itertools.product(weights, repeat=k)))).sum(axis=1)
        self.modes = np.zeros((term.size, k))

    def __call__(self, alpha: Array, beta: Array, factor: Array) -> float:
        """-2 times the marginal log-likelihood for thresholds (C - 1,), effects (p,) and T (k, k)."""
        edges = np.concatenate([[-np.inf], alpha, [np.inf]])
        if not (np.diff(edges) > 0).all():
            return math.inf
        eta = self.x @ beta
        low, high = edges[self.category] - eta, edges[self.category + 1] - eta
        z, groups = self.term.z @ factor, self.term.groups
        with np.errstate(divide="ignore"):
            width = np.log(-np.expm1(low - high))

        def parts(u: Array) -> tuple[Array, Array, Array]:
            """(J,) log of the integrand, its gradient (J, k) and minus its second derivative (J, k, k)."""
            shift = (z * u[groups]).sum(axis=1)
            below, above = special.expit(low - shift), special.expit(high - shift)
            joint = self._by_group(special.log_expit(high - shift) + special.log_expit(shift - low) + width)
            slope = self._by_group(z * (below + above - 1)[:, None]) - u
            bend = (below * (1 - below) + above * (1 - above))[:, None, None] * z[:, :, None] * z[:, None, :]
            return joint - 0.5 * (u**2).sum(axis=1), slope, self._by_group(bend) + np.eye(u.shape[1])

        u = self.modes
        value, slope, bend = parts(u)
        for _ in range(50):  # Newton; the integrand is log-concave
            step = np.linalg.solve(bend, slope[:, :, None])[:, :, 0]
            scale = np.ones(len(u))
            for _ in range(20):
                moved = parts(u + scale[:, None] * step)
                worse = moved[0] < value - 1e-12 * np.abs(value)
                if not worse.any():
                    break
                scale[worse] /= 2
            u = u + scale[:, None] * step
            value, slope, bend = moved
            if np.abs(step).max() < 1e-9:
                break
        self.modes = u
        spread = np.linalg.inv(np.linalg.cholesky(bend)).transpose(0, 2, 1)  # (J, k, k): spread spread' = bend^-1
        if len(self.points) == 1:
            logs = value
        else:
            at = u[:, None] + self.points @ spread.transpose(0, 2, 1)  # (J, Q, k)
            shift = np.einsum("nk,nqk->nq", z, at[groups])
            each = special.log_expit(high[:, None] - shift) + special.log_expit(shift - low[:, None]) + width[:, None]
            joint = self._by_group(each) - 0.5 * (at**2).sum(axis=2) + 0.5 * (self.points**2).sum(axis=1)
            logs = special.logsumexp(joint + self.log_weights, axis=1) - 0.5 * u.shape[1] * math.log(2 * math.pi)
        return -2 * float((logs + np.log(np.abs(np.linalg.det(spread)))).sum())

    def _by_group(self, values: Array) -> Array:
        return np.add.reduceat(values, self.starts, axis=0)


def separated(category: npt.NDArray[np.int64], x: Array) -> npt.NDArray[np.bool_]:
    """Which effects (p,) have no finite estimate, since the categories separate the ratings, but for ties.

    So it is if thresholds and effects can move in a direction in which no rating becomes less likely: then the
    likelihood has no maximum. Whether an effect is part of such a direction is a linear program.
    """
    p = x.shape[1]
    top = int(category.max())
    rows = np.unique(np.concatenate([category[:, None], x], axis=1), axis=0)
    limits = []
    for row in rows:
        own, effects = int(row[0]), row[1:]
        for threshold, sign in ((own, -1.0), (own - 1, 1.0)):  # the threshold above and the one below a rating
            if 0 <= threshold < top:
                limits.append(np.concatenate([sign * np.eye(top)[threshold], -sign * effects]))
    limits += [np.concatenate([np.eye(top)[i] - np.eye(top)[i + 1], np.zeros(p)]) for i in range(top - 1)]
    found = np.zeros(p, bool)
    for effect in range(p):
        for sign in (-1, 1):
            goal = np.zeros(top + p)
            goal[top + effect] = sign
            done = optimize.linprog(goal, np.array(limits), np.zeros(len(limits)), bounds=[(-1, 1)] * (top + p))
            found[effect] |= done.status == 0 and done.fun < -1e-6
    return found


def fit_ordinal(ratings: Array, x: Array, term: Term, *, nodes: int = 9) -> OrdinalFit:
    """Fit ``ratings`` (n,), where each distinct value is a category, on ``x`` (n, p) with random effects ``term``.

    BFGS runs from three starts and L-BFGS-B from one; the best is kept.

    An effect that has no estimate has a standard error of NaN, and a reason in ``why``: the ratings are separated, or
    the likelihood is flat in a direction that changes it. Raises ``UserError`` for fewer than two categories, and if no
    effect has an estimate.
    """
    levels, category = np.unique(ratings, return_inverse=True)
    if len(levels) < 2:
        raise UserError("an ordinal model needs ratings of at least two different values")
    p, k, thresholds = x.shape[1], term.z.shape[1], len(levels) - 1
    apart = separated(category, x)
    if apart.all():
        raise UserError(f"has no estimate: {SEPARATED}")
    lower = np.tril_indices(k)
    likelihood = Likelihood(category, len(levels), x, term, nodes)

    def unpack(values: Array) -> tuple[Array, Array, Array]:
        factor = np.zeros((k, k))
        factor[lower] = values[thresholds + p :]
        return values[:thresholds], values[thresholds : thresholds + p], factor

    def value(values: Array) -> float:
        """The criterion, given the first threshold and the logs of the steps between thresholds: no bounds needed."""
        natural = values.copy()
        natural[1:thresholds] = np.exp(np.clip(values[1:thresholds], -30, 30))
        natural[:thresholds] = np.cumsum(natural[:thresholds])
        found = likelihood(*unpack(natural))
        return found if math.isfinite(found) else 1e12

    counts = np.cumsum(np.bincount(category))[:-1] / len(category)
    alpha = special.logit(counts)
    runs, found = [], []
    for size in (0.3, 1.0, 3.0):
        start = np.concatenate([alpha[:1], np.log(np.diff(alpha)), np.zeros(p), (size * np.eye(k))[lower]])
        for optimiser in ("BFGS", "L-BFGS-B") if size == 1 else ("BFGS",):
            likelihood.modes = np.zeros_like(likelihood.modes)
            done = optimize.minimize(value, start, method=optimiser, options={"maxiter": 500})
            runs.append(Run(optimiser, f"deviation {size:g}", float(done.fun), int(done.nfev)))
            found.append(np.asarray(done.x, float))
    best = found[int(np.argmin([run.criterion for run in runs]))]
    natural = best.copy()
    natural[1:thresholds] = np.exp(best[1:thresholds])
    natural[:thresholds] = np.cumsum(natural[:thresholds])
    alpha, beta, factor = unpack(natural)
    deviations = np.sqrt((factor**2).sum(axis=1))
    singular = [
        f"the variance of {term.columns[column]} by {term.name} is estimated as 0"
        for column in np.flatnonzero(deviations < 100 * SINGULAR)
    ]
    if not singular and k == 2 and abs(factor[0] @ factor[1]) > (1 - 1e-5) * deviations.prod():
        sign = "+1" if factor[0] @ factor[1] > 0 else "-1"
        singular.append(f"the correlation of {' and '.join(term.columns)} by {term.name} is estimated as {sign}")
    # a degenerate direction has no curvature and does not affect the others
    steps = 0.02 * np.maximum(np.abs(natural), 0.1)
    steps[1:thresholds] = np.minimum(steps[1:thresholds], 0.2 * np.diff(alpha))
    steps[: thresholds - 1] = np.minimum(steps[: thresholds - 1], 0.2 * np.diff(alpha))
    values, vectors = np.linalg.eigh(hessian(lambda at: likelihood(*unpack(at)), natural, steps))
    kept = values > 1e-7 * values.max()
    covariance = 2 * (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    effects = slice(thresholds, thresholds + p)
    if not np.isfinite(covariance).all():
        raise UserError("has no estimate: its likelihood has no curvature")
    moved = (np.abs(vectors[effects][:, ~kept]) > 1e-3).any(axis=1)  # by a direction in which the likelihood is flat
    wide = (np.diag(covariance)[effects] > FARTHEST**2) | (np.abs(beta) > FARTHEST)
    why = tuple(
        SEPARATED if one else "the likelihood is flat in its direction" if other else ""
        for one, other in zip(apart, moved | wide, strict=True)
    )
    if all(why):
        raise UserError(f"has no estimate: {why[0]}")
    lost = thresholds + np.flatnonzero([bool(each) for each in why])
    covariance[lost] = covariance[:, lost] = math.nan
    return OrdinalFit(
        levels=levels,
        alpha=alpha,
        beta=beta,
        covariance=covariance[: thresholds + p, : thresholds + p],
        variance=factor @ factor.T,
        log_likelihood=-0.5 * min(run.criterion for run in runs),
        parameters=len(best),
        n=len(ratings),
        groups=term.size,
        nodes=nodes,
        runs=tuple(runs),
        singular=tuple(singular),
        why=why,
    )
