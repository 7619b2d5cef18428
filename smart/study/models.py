"""The models of ``smart study analyse``: ratings as arrays, random effects that they can tell, and a bootstrap."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smart.run import progress
from smart.study.derivatives import Array
from smart.study.mixed import Fit, Term, minimise, simulate
from smart.study.ratings import Rating


class Design(NamedTuple):
    """Ratings as arrays: ``x`` (n, systems) has a column of ones, then an indicator for each other system."""

    y: Array
    x: Array
    names: tuple[str, ...]
    participant: np.ndarray
    people: list[str]
    systems: list[str]

    @property
    def by_participant(self) -> Term:
        """``(1 + system | participant)``."""
        return Term("participant", self.names, self.participant, self.x)


def design(ratings: Sequence[Rating], systems: Sequence[str]) -> Design:
    """``systems[0]`` is the reference."""
    people = sorted({each.participant for each in ratings})
    x = np.array([[1.0, *(float(each.system == name) for name in systems[1:])] for each in ratings])
    codes = np.array([people.index(each.participant) for each in ratings])
    y = np.array([each.rating for each in ratings])
    return Design(y, x, ("Intercept", *systems[1:]), codes, people, list(systems))


def codes(values: Sequence[str], name: str) -> Term:
    """``(1 | name)``."""
    known = sorted(set(values))
    place = {value: number for number, value in enumerate(known)}
    return Term(name, ("Intercept",), np.array([place[value] for value in values]), np.ones((len(values), 1)))


def crossed_terms(ratings: Sequence[Rating]) -> tuple[list[tuple[str, list[Term]]], list[str]]:
    """Random effects of prompts and excerpts that the data can separate, and the reasons for those left out.

    The systems share each prompt: its effect cancels from their difference, so ``(1 | prompt)`` only takes its share
    out of the residual. An excerpt belongs to one system: only with ``(1 | excerpt)`` does the interval apply to other
    pieces of these systems, and not to these pieces alone.
    """
    found: list[tuple[str, list[Term]]] = []
    left: list[str] = []
    prompts, excerpts = [each.prompt for each in ratings], [each.excerpt for each in ratings]
    systems: dict[str, set[str]] = {}
    for each in ratings:
        systems.setdefault(each.excerpt, set()).add(each.system)
    shared = len(set(prompts)) < len(set(zip(prompts, (each.system for each in ratings), strict=True)))
    with_prompt = all(prompts) and 1 < len(set(prompts)) < len(ratings) / 1.5 and shared
    if with_prompt:
        found.append(("+ (1 | prompt)", [codes(prompts, "prompt")]))
    else:
        left.append("(1 | prompt): needs a column prompt, with several prompts that the systems share")
    if not all(excerpts):
        left.append("(1 | excerpt): needs a column excerpt (or prompt and seed)")
    elif any(len(names) > 1 for names in systems.values()):
        left.append("(1 | excerpt): an excerpt belongs to more than one system; each must be a piece of one system")
    elif not len({each.system for each in ratings}) * 2 <= len(set(excerpts)) < len(ratings) / 1.5:
        left.append("(1 | excerpt): needs several excerpts of each system, each rated by several participants")
    else:
        own = [codes(prompts, "prompt")] if with_prompt else []
        name = "+ (1 | prompt) + (1 | excerpt)" if own else "+ (1 | excerpt)"
        found.append((name, [*own, codes(excerpts, "excerpt")]))
    return found, left


def bootstrap(fitted: Fit, replicates: int, seed: int) -> Array:
    """Estimates (replicates, k + 1 + correlations) from data drawn from the fitted model: standard deviations of the
    first term, that of the residual, then the correlations in the order of the lower triangle."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in progress(range(replicates), desc="bootstrap", unit="fit"):
        problem = fitted.problem.with_response(simulate(fitted, generator))
        theta = minimise(problem, thorough=False, near=fitted.theta)[0]
        sigma2 = problem.solve(theta).residual / (problem.n - problem.p)
        factor = problem.factors(theta)[problem.order.index(0)]
        found.append(deviations(sigma2 * factor @ factor.T, sigma2))
    return np.array(found)


def deviations(covariance: Array, sigma2: float) -> Array:
    """One row of what ``bootstrap`` returns. A correlation with a constant is NaN."""
    spread = np.sqrt(np.diag(covariance))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = covariance / np.outer(spread, spread)
    lower = np.tril_indices(len(spread), -1)
    return np.concatenate([spread, [math.sqrt(sigma2)], correlations[lower]])
