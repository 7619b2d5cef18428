"""``smart study power``: how likely a study of a given size finds an effect, by simulation.

Studies are drawn from ``rating ~ system + (1 + system | participant)`` with the variances of the paper's Table 5, or
others, analysed as ``smart study analyse`` does (REML, Satterthwaite's t), and counted. So the same run also says how
often the 95% interval holds the planted effect and, with an effect of 0, how often a difference is found where none is.

The residual of the paper's model holds all that excerpts differ in. ``excerpt_variance`` takes a part out, as what
an excerpt is to every listener: more listeners do not make up for few excerpts then.
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
    """What ratings are drawn from: the paper's Table 5, as variances and a correlation (of Intercept and system)."""

    effect: float = 1.221
    intercept: float = 4.075
    intercept_variance: float = 0.830
    slope_variance: float = 0.752
    correlation: float = 0.488
    residual_variance: float = 4.194
    excerpt_variance: float = 0.0
    rounded: bool = False  # to whole numbers from 1 to 10, as participants rate


class Power(NamedTuple):
    """Of ``studies`` simulated studies of one size; shares, with exact (Clopper-Pearson) 95% intervals.

    ``effect`` is what the ratings differ by on average: rounding to 1 to 10 takes a little from what was planted.
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
    excerpts where the population has. ``show``: with a progress bar.

    Raises ``UserError`` for sizes that no such model can be fitted to.
    """
    if listeners < 3 or prompts < 2:
        raise UserError(f"{listeners} listeners and {prompts} prompts: at least 3 and 2 are needed")
    person = np.repeat(np.arange(listeners), 2 * prompts)
    system = np.tile(np.repeat([0.0, 1.0], prompts), listeners)
    excerpt = np.tile(np.arange(2 * prompts), listeners)
    x = np.stack([np.ones_like(system), system], axis=1)
    terms = [Term("participant", ("Intercept", "system"), person, x)]
    if population.excerpt_variance:
        terms.append(Term("excerpt", ("Intercept",), excerpt, x[:, :1]))
    problem = Problem(np.zeros(len(x)), x, terms)
    truth = _rounded_effect(population) if population.rounded else population.effect
    found = held = singular = 0
    widths = []
    for number in progress(range(studies), desc=f"{listeners} listeners", unit="study", show=show):
        generator = np.random.default_rng([seed, listeners, prompts, number])
        y = draw(population, person, system, excerpt, generator)
        fitted = fit(y, x, terms, thorough=False, problem=problem.with_response(y))
        low, high = fitted.interval("t")[1]
        found += bool(fitted.p_values[1] < 0.05)
        held += bool(low <= truth <= high)
        singular += bool(fitted.singular)
        widths.append(high - low)
    return Power(
        listeners, prompts, studies, found / studies, *exact(found, studies), held / studies, *exact(held, studies),
        truth, float(np.mean(widths)), singular / studies,
    )  # fmt: skip


def draw(
    population: Population, person: np.ndarray, system: Array, excerpt: np.ndarray, generator: np.random.Generator
) -> Array:
    """Ratings (n,) for the participant, system (0 or 1) and excerpt of each."""
    deviations = np.sqrt([population.intercept_variance, population.slope_variance])
    lower = np.array([[1.0, 0.0], [population.correlation, math.sqrt(1 - population.correlation**2)]])
    own = generator.normal(size=(person.max() + 1, 2)) @ lower.T * deviations
    piece = generator.normal(size=excerpt.max() + 1) * math.sqrt(population.excerpt_variance)
    noise = generator.normal(size=len(person)) * math.sqrt(population.residual_variance - population.excerpt_variance)
    y = population.intercept + own[person, 0] + (population.effect + own[person, 1]) * system + piece[excerpt] + noise
    return np.clip(np.round(y), 1, 10) if population.rounded else y


def exact(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def _rounded_effect(population: Population) -> float:
    """The difference of the mean ratings once both are rounded and cut to 1 to 10."""
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
    """Numbers of listeners around a planned one, it among them."""
    return sorted({max(3, round(listeners * share)) for share in (0.3, 0.5, 0.75, 1.0, 1.5, 2.0)})


def table(rows: Sequence[Power]) -> str:
    """For people."""
    head = f"{'listeners':>9} {'prompts':>7} {'studies':>7} {'power':>6}  95% interval   {'coverage':>8}  95% interval"
    lines = [f"{head}   {'width':>6} {'singular':>8}"]
    for row in rows:
        lines.append(
            f"{row.listeners:>9} {row.prompts:>7} {row.studies:>7} {row.power:>6.3f}  {row.power_low:.3f}, "
            f"{row.power_high:.3f}   {row.coverage:>8.3f}  {row.coverage_low:.3f}, {row.coverage_high:.3f}   "
            f"{row.width:>6.2f} {row.singular:>8.3f}"
        )
    return "\n".join(lines)


@click.command("power", context_settings={"show_default": True})
@click.option("--listeners", default=14, type=click.IntRange(3), help="Planned number; others around it are shown too.")
@click.option(
    "--prompts", default=15, type=click.IntRange(2), help="Prompts; each listener rates two excerpts of each."
)
@click.option("--effect", default=1.221, help="Difference of the systems' mean ratings.")
@click.option("--intercept", default=4.075, help="Mean rating of the reference (matters with --rounded).")
@click.option("--intercept-variance", default=0.830, type=click.FloatRange(0), help="Of participants' mean ratings.")
@click.option("--slope-variance", default=0.752, type=click.FloatRange(0), help="Of the effect, between participants.")
@click.option("--correlation", default=0.488, type=click.FloatRange(-1, 1), help="Of these two.")
@click.option("--residual-variance", default=4.194, type=click.FloatRange(0, min_open=True), help="Of single ratings.")
@click.option("--excerpt-variance", default=0.0, type=click.FloatRange(0), help="Part of it that belongs to excerpts.")
@click.option("--rounded", is_flag=True, help="Round and cut the ratings to 1, 2, ... 10.")
@click.option("--studies", default=200, type=click.IntRange(20), help="Simulated studies of each size.")
@click.option("--seed", default=1, type=click.IntRange(0), help="Seed of the simulation.")
@click.option("--only", is_flag=True, help="Only the planned number of listeners.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for power.csv and the figure.")
def main(
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
    """Simulate studies; the variances are those of the paper's Table 5 unless others are given."""
    if excerpt_variance >= residual_variance:
        raise UserError(
            f"--excerpt-variance {excerpt_variance:g}: is a part of --residual-variance {residual_variance:g}"
        )
    population = Population(
        effect, intercept, intercept_variance, slope_variance, correlation, residual_variance, excerpt_variance, rounded
    )
    sizes = [listeners] if only else grid(listeners)
    rows = [simulate_power(size, prompts, population, studies=studies, seed=seed) for size in sizes]
    click.echo(table(rows))
    if rounded:
        click.echo(f"rounded to 1 to 10, the planted {effect:g} is a difference of {rows[0].effect:.3f}")
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
