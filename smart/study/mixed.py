"""Linear mixed models by restricted maximum likelihood, and Satterthwaite's degrees of freedom.

    y = X beta + sum_t Z_t b_t + e,   b_t ~ N(0, sigma^2 T_t T_t') for each group of term t,   e ~ N(0, sigma^2)

``theta`` holds the lower triangles of the relative covariance factors T_t, as in lme4 (Bates, Maechler, Bolker and
Walker 2015, "Fitting linear mixed-effects models using lme4", J. Stat. Softw. 67(1), section 3). Given ``theta``, beta
and sigma follow from one Cholesky factor, so the search is over ``theta`` alone. The first term's groups share no
observations: they are eliminated as J small blocks at once, and only the columns crossed with them are factored whole.

One optimiser from one start can silently stop at a wrong point: the criterion does not depend on the sign of a diagonal
entry of T, so the slope along an entry of 0 is 0 too, at an optimum or not. ``fit`` runs three optimisers from several
starts, keeps the best result, and reports all of them.

Degrees of freedom as in lmerTest (Kuznetsova, Brockhoff and Christensen 2017, J. Stat. Softw. 82(13), section 2), with
numerical derivatives.

Axes: n observations, p fixed effects, J groups of the first term with k columns, m columns of everything else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from smart import UserError
from smart.study.derivatives import Array, Value, gradient, hessian, steps_of

DISAGREE = 0.01  # in the criterion: an optimiser that ends this far above the best one has stopped elsewhere
SINGULAR = 1e-4  # relative standard deviation below which a direction of random effects counts as absent (as lme4)


class Term(NamedTuple):
    """Random effects of the columns ``z`` (n, k) for each group; ``groups`` (n,) are numbers from 0, without gaps."""

    name: str
    columns: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    z: Array

    @property
    def size(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1


class Run(NamedTuple):
    """What one optimiser found from one start."""

    optimiser: str
    start: str
    criterion: float
    evaluations: int


class Solution(NamedTuple):
    """The solution for one ``theta``; ``unscaled`` (p, p) is the covariance of beta divided by sigma^2."""

    log_det: float
    log_det_x: float
    residual: float  # penalised residual sum of squares
    beta: Array
    unscaled: Array


class Problem:
    """Cross products of one data set, so that the cost of the criterion does not grow with n.

    Raises ``UserError`` if the fixed effects are collinear, or if nothing is left to estimate a variance from.
    """

    def __init__(self, y: Array, x: Array, terms: Sequence[Term]) -> None:
        self.n, self.p = x.shape
        if np.linalg.matrix_rank(x) < self.p:
            raise UserError("the fixed effects are collinear: a column is a combination of others")
        # the term with the most columns in total is the one whose blocks are eliminated one by one
        self.order = sorted(range(len(terms)), key=lambda t: -terms[t].size * terms[t].z.shape[1])
        self.terms = [terms[t] for t in self.order]
        self.shapes = [term.z.shape[1] for term in self.terms]
        first = self.terms[0]
        if self.n <= self.p + 1:
            raise UserError(f"{self.n} ratings are too few for a mixed model with {self.p} fixed effects")
        crossed = [expand(term) for term in self.terms[1:]]
        self._w = np.concatenate([*crossed, x, y[:, None]], axis=1)
        self._first = first
        self._g = np.zeros((first.size, self.shapes[0], self.shapes[0]))
        np.add.at(self._g, first.groups, first.z[:, :, None] * first.z[:, None, :])
        self._zw = np.zeros((first.size, self.shapes[0], self._w.shape[1]))
        np.add.at(self._zw, first.groups, first.z[:, :, None] * self._w[:, None, :])
        self._ww = self._w.T @ self._w

    def with_response(self, y: Array) -> "Problem":
        """The same design with another response, as simulations need it many times."""
        other = object.__new__(Problem)
        other.__dict__ |= self.__dict__
        other._w = np.concatenate([self._w[:, :-1], y[:, None]], axis=1)
        other._zw, other._ww = self._zw.copy(), self._ww.copy()
        other._zw[:, :, -1] = 0
        np.add.at(other._zw[:, :, -1], self._first.groups, self._first.z * y[:, None])
        other._ww[:, -1] = other._ww[-1, :] = other._w.T @ y
        return other

    def without(self, column: int, value: float) -> "Problem":
        """The same problem with the fixed effect ``column`` held at ``value``."""
        x = self._w[:, -1 - self.p : -1]
        y = self._w[:, -1] - value * x[:, column]
        return Problem(y, np.delete(x, column, axis=1), self.terms)

    @property
    def parameters(self) -> int:
        """Length of ``theta``."""
        return sum(k * (k + 1) // 2 for k in self.shapes)

    @property
    def diagonal(self) -> npt.NDArray[np.bool_]:
        """Which entries of ``theta`` are on a diagonal, and so are at least 0."""
        return np.concatenate([np.equal(*np.tril_indices(k)) for k in self.shapes])

    def factors(self, theta: Array) -> list[Array]:
        """The lower triangular T of each term, in the order of ``self.terms``."""
        found, at = [], 0
        for k in self.shapes:
            factor = np.zeros((k, k))
            factor[np.tril_indices(k)] = theta[at : at + k * (k + 1) // 2]
            found.append(factor)
            at += k * (k + 1) // 2
        return found

    def solve(self, theta: Array) -> Solution:
        """Beta and the parts of the criterion at ``theta``."""
        first, *others = self.factors(theta)
        ww, zw, q = self._ww, self._zw, self._ww.shape[0] - self.p - 1
        if others:
            scale = np.eye(len(ww))
            at = 0
            for term, factor in zip(self.terms[1:], others, strict=True):
                width = term.size * len(factor)
                scale[at : at + width, at : at + width] = np.kron(np.eye(term.size), factor)
                at += width
            ww, zw = scale.T @ ww @ scale, zw @ scale
            ww[range(q), range(q)] += 1
        lower = np.linalg.cholesky(first.T @ self._g @ first + np.eye(len(first)))
        half = np.linalg.solve(lower, first.T @ zw).reshape(-1, len(ww))
        rest = np.linalg.cholesky(ww - half.T @ half)
        diagonal = np.diag(rest)
        log_det = 2 * float(np.log(np.diagonal(lower, axis1=1, axis2=2)).sum() + np.log(diagonal[:q]).sum())
        inverse = np.linalg.inv(rest[q:-1, q:-1])
        return Solution(
            log_det,
            2 * float(np.log(diagonal[q:-1]).sum()),
            float(diagonal[-1] ** 2),
            inverse.T @ rest[-1, q:-1],
            inverse.T @ inverse,
        )

    def criterion(self, theta: Array, *, reml: bool = True) -> float:
        """-2 times the profiled (restricted) log-likelihood; infinite if it cannot be computed."""
        try:
            found = self.solve(theta)
        except np.linalg.LinAlgError:
            return math.inf
        if found.residual <= 0:
            return math.inf
        free = self.n - self.p if reml else self.n
        value = found.log_det + free * (1 + math.log(2 * math.pi * found.residual / free))
        return value + found.log_det_x if reml else value

    def starts(self) -> dict[str, Array]:
        """Starting points: lme4's own start, a small and a large one, and one from separate fits of the groups."""
        unit = self.diagonal.astype(float)
        found = {"unit": unit, "small": 0.1 * unit, "large": 3.0 * unit}
        moments = self._moments()
        return found if moments is None else {"moments": moments, **found}

    def _moments(self) -> Array | None:
        """``theta`` from the spread of least-squares fits of each group; exact for balanced data.

        None if some group cannot be fitted alone.
        """
        k = self.shapes[0]
        if self._first.size <= k or np.linalg.cond(self._g).max() > 1e8:
            return None
        inverse = np.linalg.inv(self._g)
        own = (inverse @ self._zw[:, :, -1:])[:, :, 0]  # (J, k)
        y = self._w[:, -1]
        residuals = y - (self._first.z * own[self._first.groups]).sum(axis=1)
        free = self.n - self._first.size * k
        variance = float(residuals @ residuals) / free if free > 0 else 0.0
        if variance <= 0:
            return None
        values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(own.T)) / variance - inverse.mean(axis=0))
        relative = (vectors * np.maximum(values, 1e-6)) @ vectors.T
        rest = [0.5 * np.eye(other)[np.tril_indices(other)] for other in self.shapes[1:]]
        return np.concatenate([np.linalg.cholesky(relative)[np.tril_indices(k)], *rest])


@dataclass(frozen=True)
class Fit:
    """A fitted model. Fixed effects are in the order of the columns of ``x``, terms in the given order.

    ``singular`` describes what is degenerate; empty if nothing is. ``df`` (p,) are Satterthwaite's.
    """

    problem: Problem
    theta: Array
    reml: bool
    criterion: float
    beta: Array
    covariance: Array
    sigma2: float
    df: Array
    terms: tuple[Term, ...]
    variances: tuple[Array, ...]
    runs: tuple[Run, ...]
    singular: tuple[str, ...]

    @property
    def log_likelihood(self) -> float:
        """The restricted one if the model was fitted by REML; as lme4's ``logLik``."""
        return -self.criterion / 2

    @property
    def parameters(self) -> int:
        """Fixed effects, entries of ``theta``, and the residual variance, as AIC counts them."""
        return self.problem.p + len(self.theta) + 1

    @property
    def aic(self) -> float:
        """-2 log-likelihood + 2 parameters."""
        return self.criterion + 2 * self.parameters

    @property
    def errors(self) -> Array:
        """Standard errors (p,)."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def p_values(self) -> Array:
        """Two-sided, from Student's t with ``df`` degrees of freedom."""
        return 2 * stats.t.sf(np.abs(self.beta / self.errors), self.df)

    def interval(self, kind: str = "t", level: float = 0.95) -> Array:
        """(p, 2): "t" with Satterthwaite's degrees of freedom, "normal" with the normal quantile (Wald)."""
        tail = (1 + level) / 2
        quantile = stats.t.ppf(tail, self.df) if kind == "t" else stats.norm.ppf(tail)
        return np.stack([self.beta - quantile * self.errors, self.beta + quantile * self.errors], axis=1)

    @property
    def disagreeing(self) -> list[Run]:
        """Runs that ended more than ``DISAGREE`` above the best criterion."""
        return [run for run in self.runs if run.criterion > self.criterion + DISAGREE]


def fit(
    y: Array,
    x: Array,
    terms: Sequence[Term],
    *,
    reml: bool = True,
    thorough: bool = True,
    problem: Problem | None = None,
) -> Fit:
    """Fit ``y`` (n,) on ``x`` (n, p) and random ``terms``.

    Args:
        thorough: run three optimisers from each start; otherwise one from two starts, for simulations, where the
            design is always the same.
        problem: ``Problem(y, x, terms)``, if it has been built already.

    Raises ``UserError`` for data to which such a model cannot be fitted.
    """
    if np.ptp(y) == 0:
        raise UserError(f"every rating is {y[0]:g}: there is nothing to fit")
    problem = problem or Problem(y, x, terms)
    theta, runs = minimise(problem, reml=reml, thorough=thorough)
    solution = problem.solve(theta)
    free = problem.n - problem.p if reml else problem.n
    sigma2 = solution.residual / free
    if sigma2 <= 1e-12 * float(np.var(y)) or not math.isfinite(problem.criterion(theta, reml=reml)):
        raise UserError("nothing is left for the residual variance: the model fits every rating exactly")
    covariances = dict(zip(problem.order, [sigma2 * t @ t.T for t in problem.factors(theta)], strict=True))
    return Fit(
        problem=problem,
        theta=theta,
        reml=reml,
        criterion=problem.criterion(theta, reml=reml),
        beta=solution.beta,
        covariance=sigma2 * solution.unscaled,
        sigma2=sigma2,
        df=_satterthwaite(problem, theta, sigma2, reml=reml),
        terms=tuple(terms),
        variances=tuple(covariances[t] for t in range(len(terms))),
        runs=tuple(runs),
        singular=tuple(_singular(problem, theta)),
    )


def minimise(
    problem: Problem, *, reml: bool = True, thorough: bool = True, near: Array | None = None
) -> tuple[Array, list[Run]]:
    """The ``theta`` with the lowest criterion that any optimiser found, polished; and every run.

    ``near``: another starting point, known to be close; the result is not polished then.
    """
    diagonal = problem.diagonal
    bounds = [(0.0, None) if on else (None, None) for on in diagonal]

    def value(theta: Array) -> float:
        return min(problem.criterion(np.asarray(theta, float), reml=reml), 1e12)  # optimisers cannot use infinity

    def slope(theta: Array) -> Array:
        return gradient(value, np.asarray(theta, float))

    starts = problem.starts()
    if not thorough:
        starts = dict(list(starts.items())[:2] if near is None else [next(iter(starts.items())), ("near", near)])
    runs, found = [], []
    for name, start in starts.items():
        for optimiser in ("L-BFGS-B", "Nelder-Mead", "Powell") if thorough else ("L-BFGS-B",):
            if optimiser == "L-BFGS-B":
                options: dict[str, Any] = {"ftol": 1e-13, "gtol": 1e-6, "maxiter": 500}
                done = optimize.minimize(value, start, jac=slope, method=optimiser, bounds=bounds, options=options)
            elif optimiser == "Nelder-Mead":
                simplex = np.vstack([start, start + np.diag(np.where(diagonal, 0.2 * start + 0.05, 0.1))])
                options = {"initial_simplex": simplex, "xatol": 1e-6, "fatol": 1e-9, "maxfev": 400 * len(start)}
                done = optimize.minimize(value, start, method=optimiser, bounds=bounds, options=options)
            else:  # Powell needs both bounds; no ratings have a relative standard deviation of a thousand
                ends = [(0.0 if on else -1e3, 1e3) for on in diagonal]
                options = {"xtol": 1e-6, "ftol": 1e-12, "maxfev": 400 * len(start)}
                done = optimize.minimize(value, start, method=optimiser, bounds=ends, options=options)
            runs.append(Run(optimiser, name, float(done.fun), int(done.nfev)))
            found.append(np.asarray(done.x, float))
    best = found[int(np.argmin([run.criterion for run in runs]))]
    return (_polish(value, best, diagonal) if near is None else best), runs


def profile_interval(fitted: Fit, column: int, level: float = 0.95) -> tuple[float, float]:
    """Where the likelihood (the restricted one cannot compare fixed effects) falls by the quantile of chi^2.

    Both ends are found by bracketing; NaN for an end that is more than 20 standard errors away.
    """
    problem, value = fitted.problem, float(fitted.beta[column])
    free = minimise(problem, reml=False, thorough=False)[0]
    centre = float(problem.solve(free).beta[column])
    limit = problem.criterion(free, reml=False) + stats.chi2.ppf(level, 1)
    last = free

    def above(at: float) -> float:
        nonlocal last
        held = problem.without(column, at)
        last = minimise(held, reml=False, thorough=False, near=last)[0]
        return held.criterion(last, reml=False) - limit

    error = float(fitted.errors[column])
    ends = []
    for sign in (-1, 1):
        last, reach = free, 2.0
        while reach <= 20 and above(value + sign * reach * error) < 0:
            reach *= 1.5
        found = reach <= 20
        ends.append(optimize.brentq(above, centre, value + sign * reach * error, xtol=1e-7) if found else math.nan)
    return ends[0], ends[1]


def simulate(fitted: Fit, generator: np.random.Generator) -> Array:
    """A response (n,) drawn from the fitted model."""
    x = fitted.problem._w[:, -1 - fitted.problem.p : -1]
    y = x @ fitted.beta + generator.normal(size=len(x)) * math.sqrt(fitted.sigma2)
    for term, covariance in zip(fitted.terms, fitted.variances, strict=True):
        values, vectors = np.linalg.eigh(covariance)
        effects = generator.normal(size=(term.size, len(values))) * np.sqrt(np.maximum(values, 0)) @ vectors.T
        y += (term.z * effects[term.groups]).sum(axis=1)
    return y


def expand(term: Term) -> Array:
    """The term's columns, repeated for each group: (n, groups * k)."""
    k = term.z.shape[1]
    wide = np.zeros((len(term.groups), term.size * k))
    rows = np.arange(len(term.groups))
    for column in range(k):
        wide[rows, term.groups * k + column] = term.z[:, column]
    return wide


def _polish(value: Value, theta: Array, diagonal: npt.NDArray[np.bool_]) -> Array:
    """Newton steps from an optimum, and exact zeros where they are as good; the criterion never rises."""
    best = value(theta)
    for index in np.flatnonzero(diagonal & (np.abs(theta) < 10 * SINGULAR)):
        edge = theta.copy()
        edge[index] = 0
        if value(edge) <= best + 1e-9:
            theta, best = edge, value(edge)
    for _ in range(3):
        inside = ~(diagonal & (theta <= SINGULAR))
        if not inside.any():
            break

        def part(values: Array, theta: Array = theta, inside: npt.NDArray[np.bool_] = inside) -> float:
            moved = theta.copy()
            moved[inside] = values
            return value(moved)

        curvature = hessian(part, theta[inside], steps_of(theta[inside]))
        values, vectors = np.linalg.eigh(curvature) if np.isfinite(curvature).all() else (np.zeros(1), np.eye(1))
        if values.min() <= 1e-6 * values.max():
            break
        moved = theta.copy()
        moved[inside] -= vectors @ ((vectors.T @ gradient(part, theta[inside])) / values)
        if (moved[diagonal] < 0).any() or value(moved) > best:
            break
        change, theta, best = float(np.abs(moved - theta).max()), moved, value(moved)
        if change < 1e-6:
            break
    return theta


def _satterthwaite(problem: Problem, theta: Array, sigma2: float, *, reml: bool) -> Array:
    """2 Var^2 / (g' A g) for each fixed effect; A is the covariance of (theta, log sigma), g the gradient of Var.

    Directions in which the deviance does not rise (those of a singular fit) carry no uncertainty, as in lmerTest.
    """
    point = np.append(theta, 0.5 * math.log(sigma2))

    def deviance(at: Array) -> float:
        found = problem.solve(at[:-1])
        free = problem.n - problem.p if reml else problem.n
        value = found.log_det + found.residual / math.exp(2 * at[-1]) + free * (math.log(2 * math.pi) + 2 * at[-1])
        return value + found.log_det_x if reml else value

    def variances(at: Array) -> Array:
        variance: Array = math.exp(2 * at[-1]) * np.diag(problem.solve(at[:-1]).unscaled)
        return variance

    steps = steps_of(point)
    values, vectors = np.linalg.eigh(hessian(deviance, point, steps))
    kept = values > 1e-6 * values.max()
    covariance = 2 * (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    moves = np.diag(steps)

    def slope(scale: float) -> Array:
        return np.array(
            [
                (variances(point + scale * move) - variances(point - scale * move)) / (2 * scale * step)
                for move, step in zip(moves, steps, strict=True)
            ]
        )

    change = (4 * slope(0.5) - slope(1.0)) / 3  # (parameters, p)
    spread = np.einsum("ip,ij,jp->p", change, covariance, change)
    result: Array = 2 * variances(point) ** 2 / np.maximum(spread, 1e-300)
    return result


def _singular(problem: Problem, theta: Array) -> list[str]:
    """Descriptions of what is degenerate."""
    found = []
    for term, factor in zip(problem.terms, problem.factors(theta), strict=True):
        deviations = np.sqrt((factor**2).sum(axis=1))
        for column in np.flatnonzero(deviations < SINGULAR):
            found.append(f"the variance of {term.columns[column]} by {term.name} is estimated as 0")
        nonzero = np.flatnonzero(deviations >= SINGULAR)
        if len(nonzero) > 1:
            unit = factor[nonzero] / deviations[nonzero, None]
            if np.linalg.svd(unit, compute_uv=False).min() < SINGULAR:
                if len(nonzero) == 2:
                    sign = "+1" if unit[0] @ unit[1] > 0 else "-1"
                    pair = " and ".join(term.columns[column] for column in nonzero)
                    found.append(f"the correlation of {pair} by {term.name} is estimated as {sign}")
                else:
                    found.append(f"the correlations by {term.name} are at their limit")
    return found
