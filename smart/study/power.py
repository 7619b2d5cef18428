"""``smart study power``: how likely a study of a given size finds an effect, by simulation.

Studies are drawn from ``rating ~ system + (1 + system | participant)`` with the variances of the paper's Table 5, or
others, and analysed like ``smart study analyse`` does (REML, Satterthwaite's t). The same simulation also shows how
often the 95% interval contains the true effect and, with an effect of 0, how often a difference is found by chance.

The residual of the paper's model includes all differences between excerpts. ``excerpt_variance`` moves part of it into
an effect of the excerpt that is the same for every listener: more listeners do not make up for few excerpts then.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from scipy import stats

from smart import UserError, plots
from smart.run import progress
from smart.study.mixed import Array, Problem, Term, fit


@dataclass(frozen=True)
class Population:
    """The distribution of ratings: the paper's Table 5, as variances and a correlation (of Intercept and system)."""

    effect: float = 1.221
    intercept: float = 4.075
    intercept_variance: float = 0.830
    slope_variance: float = 0.752
    correlation: float = 0.488
    residual_variance: float = 4.194
    excerpt_variance: float = 0.0
    rounded: bool = False  # to whole numbers from 1 to 10, as participants rate


class Power(NamedTuple):
    """Shares of ``studies`` simulated studies of one size, with exact (Clopper-Pearson) 95% intervals.

    ``effect`` is the mean difference between the ratings: rounding to 1 to 10 changes it a little.
    """

    listeners: int
    prompts: int
    studies: int
    power: float
    power_low: float
    power_high: float
    coverage: float
    coverage_low: float
    coverage_high: float
    effect: float
    width: float  # mean width of the 95% interval
    singular: float  # share of studies with a singular fit


def simulate_power(
    listeners: int, prompts: int, population: Population, *, studies: int, seed: int, show: bool = True
) -> Power:
    """Power of a study in which each of ``listeners`` rates two systems' excerpts of ``prompts`` prompts.

    A study's draws depend on ``seed``, its number, ``listeners`` and ``prompts`` alone. The analysis has random
    excerpts if the population has. ``show``: show a progress bar.

    Raises ``UserError`` for sizes that are too small for the model.
    """
    if listeners < 3 or prompts < 2:
        raise UserError(f"expected at least 3 listeners and 2 prompts, got {listeners} and {prompts}")
    person = np.repeat(np.arange(listeners), 2 * prompts)
    system = np.tile(np.repeat([0.0, 1.0], prompts), listeners)
    excerpt = np.tile(np.arange(2 * prompts), listeners)
    x = np.stack([np.ones_like(system), system], axis=1)
    terms = [Term("participant", ("Intercept", "system"), person, x)]
    if population.excerpt_variance:
        terms.append(Term("excerpt", ("Intercept",), excerpt, x[:, :1]))
    problem = Problem(np.zeros(len(x)), x, terms)
    truth = _rounded_effect(population) if population.rounded else population.effect
    found = covered = singular = 0
    widths = []
    for number in progress(range(studies), desc=f"{listeners} listeners", unit="study", show=show):
        generator = np.random.default_rng([seed, listeners, prompts, number])
        y = draw(population, person, system, excerpt, generator)
        fitted = fit(y, x, terms, thorough=False, problem=problem.with_response(y))
        low, high = fitted.interval("t")[1]
        found += bool(fitted.p_values[1] < 0.05)
        covered += bool(low <= truth <= high)
        singular += bool(fitted.singular)
        widths.append(high - low)
    return Power(
        listeners, prompts, studies, found / studies, *exact(found, studies), covered / studies,
        *exact(covered, studies), truth, float(np.mean(widths)), singular / studies,
    )  # fmt: skip


def draw(
    population: Population, person: np.ndarray, system: Array, excerpt: np.ndarray, generator: np.random.Generator
) -> Array:
    """Ratings (n,), given the participant, system (0 or 1) and excerpt of each."""
    deviations = np.sqrt([population.intercept_variance, population.slope_variance])
    lower = np.array([[1.0, 0.0], [population.correlation, math.sqrt(1 - population.correlation**2)]])
    own = generator.normal(size=(person.max() + 1, 2)) @ lower.T * deviations
    piece = generator.normal(size=excerpt.max() + 1) * math.sqrt(population.excerpt_variance)
    noise = generator.normal(size=len(person)) * math.sqrt(population.residual_variance - population.excerpt_variance)
    y = population.intercept + own[person, 0] + (population.effect + own[person, 1]) * system + piece[excerpt] + noise
    return np.clip(np.round(y), 1, 10) if population.rounded else y


def exact(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval for a share."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def _rounded_effect(population: Population) -> float:
    """The difference of the mean ratings after both are rounded and clipped to 1 to 10."""
    edges = np.arange(1.5, 10)
    cross = population.correlation * math.sqrt(population.intercept_variance * population.slope_variance)
    spread = population.intercept_variance + population.residual_variance
    means = []
    for mean, variance in (
        (population.intercept, spread),
        (population.intercept + population.effect, spread + population.slope_variance + 2 * cross),
    ):
        means.append(1 + float(stats.norm.sf((edges - mean) / math.sqrt(variance)).sum()))
    return means[1] - means[0]


def grid(listeners: int) -> list[int]:
    """Numbers of listeners around a planned one, including it."""
    return sorted({max(3, round(listeners * share)) for share in (0.3, 0.5, 0.75, 1.0, 1.5, 2.0)})


def table(rows: Sequence[Power]) -> str:
    """A table for the terminal."""
    head = f"{'listeners':>9} {'prompts':>7} {'studies':>7} {'power':>6}  95% interval   {'coverage':>8}  95% interval"
    lines = [f"{head}   {'width':>6} {'singular':>8}"]
    for row in rows:
        lines.append(
            f"{row.listeners:>9} {row.prompts:>7} {row.studies:>7} {row.power:>6.3f}  {row.power_low:.3f}, "
            f"{row.power_high:.3f}   {row.coverage:>8.3f}  {row.coverage_low:.3f}, {row.coverage_high:.3f}   "
            f"{row.width:>6.2f} {row.singular:>8.3f}"
        )
    return "\n".join(lines)


def compare_sizes(
    *,
    listeners: int,
    prompts: int,
    effect: float,
    intercept: float,
    intercept_variance: float,
    slope_variance: float,
    correlation: float,
    residual_variance: float,
    excerpt_variance: float,
    rounded: bool,
    studies: int,
    seed: int,
    only: bool,
    out: Path | None,
) -> None:
    """Print a table, and draw it. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if excerpt_variance >= residual_variance:
        raise UserError(
            f"--excerpt-variance {excerpt_variance:g}: must be less than --residual-variance {residual_variance:g}"
        )
    population = Population(
        effect, intercept, intercept_variance, slope_variance, correlation, residual_variance, excerpt_variance, rounded
    )
    sizes = [listeners] if only else grid(listeners)
    rows = [simulate_power(size, prompts, population, studies=studies, seed=seed) for size in sizes]
    click.echo(table(rows))
    if rounded:
        click.echo(f"after rounding to 1 to 10, the effect of {effect:g} becomes a difference of {rows[0].effect:.3f}")
    planned = next(row for row in rows if row.listeners == listeners)
    click.echo(
        f"With {listeners} listeners and {prompts} prompts, {planned.power:.0%} of studies find an effect of "
        f"{effect:g} (95% interval {planned.power_low:.0%} to {planned.power_high:.0%}), if ratings vary as assumed."
    )
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        plots.power([row._asdict() for row in rows], effect, out / "power")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    click.echo(f"figure and table: {out / 'power.png'}, {out / 'power.csv'}")
