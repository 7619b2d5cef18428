"""The tables of ``smart study analyse``. A number that cannot be known is a dash, and a note says why."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from smart import UserError
from smart.intervals import RATING, WHOLE, Estimate, Scale, differences, mean_of, within, without
from smart.run import progress
from smart.study.mixed import Fit, Term, profile_interval
from smart.study.models import Design, bootstrap, deviations
from smart.study.ordinal import FARTHEST, OrdinalFit, fit_ordinal
from smart.study.ratings import HIGH, LOW, Excluded, Rating

DIFFERENCE = differences(RATING)
LARGEST = RATING[1] - RATING[0]  # difference of two ratings
FEWEST_PEOPLE = 10  # of fewer, the bootstrap's intervals of variances are too narrow: 84% instead of 95% for five


class Table(NamedTuple):
    """A table of the report: cells are text, whole numbers, or floats, which are shown with three decimals."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: tuple[str, ...] = ()

    def text(self) -> list[list[str]]:
        """The cells as text."""
        return [[cell(value, name) for value, name in zip(row, self.columns, strict=True)] for row in self.rows]

    def plain(self) -> str:
        """The table as text for a terminal."""
        lines = [list(self.columns), *self.text()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        shown = []
        for line in lines:
            cells = [
                f"{cell:<{width}}" if isinstance(first, str) else f"{cell:>{width}}"
                for cell, width, first in zip(line, widths, self.rows[0], strict=True)
            ]
            shown.append("  " + "  ".join(cells).rstrip())
        notes = [textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="  ") for note in self.notes]
        return "\n".join([self.title, *shown, *notes])


def exclusion_table(ratings: Sequence[Rating], main: Sequence[Rating], kept: int, found: Sequence[Excluded]) -> Table:
    """How many ratings and participants each rule flagged; a rating may be flagged by several."""
    checks = sum(bool(each.check) for each in ratings)
    rows: list[tuple[Any, ...]] = [
        ("rows of the file", "", len(ratings), len({each.participant for each in ratings}), ""),
        ("set aside: silent checks", "", checks, len({each.participant for each in ratings if each.check}), ""),
        (
            "set aside: second hearings", "", len(ratings) - checks - len(main),
            len({each.participant for each in ratings if each.repeat and not each.check}), "",
        ),
        ("all ratings", "", len(main), len({each.participant for each in main}), ""),
    ]  # fmt: skip
    for each in found:
        named = ", ".join(each.participants[:8]) + (" ..." if len(each.participants) > 8 else "")
        rows.append((f"flagged: {each.rule}", each.judged, len(each.lines), len(each.participants), named))
    gone = frozenset().union(*(each.lines for each in found))
    people = {each.participant for each in main} - {each.participant for each in main if each.line not in gone}
    rows.append(
        ("excluded by at least one rule", "", len(gone), len(people), "participants: those left with no rating")
    )
    rows.append(("after exclusions", "", kept, len({e.participant for e in main if e.line not in gone}), ""))
    return Table("Exclusions", ("rule", "judged", "ratings", "participants", "who"), rows)


def means_table(data: Design, size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    notes = ["The interval is Student's t interval over the participants' means."]
    for number, system in enumerate(data.systems):
        own = data.x[:, number] == 1 if number else data.x[:, 1:].sum(axis=1) == 0
        each = np.array([data.y[own & (data.participant == p)].mean() for p in np.unique(data.participant[own])])
        spread = float(data.y[own].std(ddof=1)) if own.sum() > 1 else math.nan
        found = mean_of(each, RATING)
        notes += [f"{system} without an interval: {found.why}."] if found.why else []
        rows.append((
            system, int(own.sum()), len(each), float(data.y[own].mean()), spread, found.value, found.low, found.high,
        ))  # fmt: skip
    columns = ("system", "n", "participants", "mean", "SD", "mean of participants' means", "2.5%", "97.5%")
    return Table(f"Ratings by system ({size})", columns, rows, tuple(notes))


def fixed_table(data: Design, fitted: Fit, formula: str, size: str) -> Table:
    """The fixed effects of a model, with three kinds of intervals."""
    rows, left = [], []
    for number, name in enumerate(data.names):
        t, wald = effect(fitted, number), effect(fitted, number, "normal")
        left += [f"{name} without an interval: {t.why}."] if t.why else []
        if not math.isfinite(t.value):
            rows.append((name, *[math.nan] * 11))
            continue
        known, error = math.isfinite(t.low), float(fitted.errors[number])
        low, high = profile_interval(fitted, number)
        profile = without(t.value, t.n, "an end is too far away")
        if math.isfinite(high - low):
            profile = within(Estimate(t.value, min(low, t.value), max(high, t.value), t.n), scale_of(number))
        rows.append((
            name, t.value, error, float(fitted.df[number]), t.value / error,
            float(fitted.p_values[number]) if known or t.why == WHOLE else math.nan, t.low, t.high, wald.low, wald.high,
            profile.low, profile.high,
        ))  # fmt: skip
    columns = (
        "term", "estimate", "SE", "df", "t", "p", "t 2.5%", "t 97.5%", "Wald 2.5%", "Wald 97.5%", "profile 2.5%",
        "profile 97.5%",
    )  # fmt: skip
    notes: tuple[str, ...] = (
        f"Intercept: the mean rating of {data.systems[0]}. The other rows: each system's difference from it.",
        "t: with Satterthwaite's degrees of freedom; this interval matches p. Wald: with the normal quantile, too "
        "narrow for few participants; the paper prints these. Profile: from the likelihood (ML), as lme4's confint.",
    )
    if len(data.systems) > 2:
        notes += ("Several systems are compared with the reference; p is not corrected for multiple comparisons.",)
    return Table(f"Fixed effects of {formula}, by REML ({size})", columns, rows, (*left, *notes))


def components_table(fitted: Fit, replicates: int, seed: int, size: str) -> Table:
    covariance, names = fitted.variances[0], fitted.terms[0].columns
    estimate = deviations(covariance, fitted.sigma2)
    k = len(names)
    ends = np.full((2, len(estimate)), np.nan)
    people = fitted.terms[0].size
    if replicates and people >= FEWEST_PEOPLE:
        drawn = bootstrap(fitted, replicates, seed)
        ends = np.array(
            [[np.nanquantile(c, q) if np.isfinite(c).any() else np.nan for c in drawn.T] for q in (0.025, 0.975)]
        )
    rows: list[tuple[Any, ...]] = []
    labels = [*(f"{name} by participant" for name in names), "Residual"]
    # a mean of ratings from 1 to 10 spreads by half of 9 at most, a difference by 9
    most = [LARGEST / 2, *[LARGEST] * (k - 1), LARGEST / 2]
    labels += [f"correlation of {names[j]} and {names[i]}" for i, j in zip(*np.tril_indices(k, -1), strict=True)]
    scales: list[Scale] = [*((0.0, each) for each in most), *[(-1.0, 1.0)] * (len(labels) - len(most))]
    for number, (label, scale) in enumerate(zip(labels, scales, strict=True)):
        found = Estimate(float(estimate[number]), float(ends[0, number]), float(ends[1, number]), people)
        if not scale[0] - 1e-9 <= found.value <= scale[1] + 1e-9:
            found = without(math.nan, people, "outside of its scale")
        elif math.isfinite(found.high - found.low):
            found = found._replace(low=max(found.low, scale[0]), high=min(found.high, scale[1]))
            if found.low <= scale[0] and found.high >= scale[1]:
                found = without(found.value, people, WHOLE)
        variance = found.value**2 if number <= k else math.nan
        rows.append((label, variance, found.value, found.low, found.high))
    drawn_from = f"from {replicates} studies drawn from the fitted model and fitted again (seed {seed})"
    if people < FEWEST_PEOPLE:
        drawn_from = f"left out, since {people} participants cannot tell them (at least {FEWEST_PEOPLE} can)"
    notes = [f"Intervals: {drawn_from if replicates or people < FEWEST_PEOPLE else 'not computed (--bootstrap 0)'}."]
    notes.append("A dash: undefined, outside of its scale, or an interval as wide as the scale.")
    notes += [
        f"SINGULAR: {what}; the data do not support such a complex model, or the value is small."
        for what in fitted.singular
    ]
    return Table(
        f"Random effects ({size})", ("component", "variance", "SD or correlation", "2.5%", "97.5%"), rows, tuple(notes)
    )


def fits_table(models: Sequence[tuple[str, Fit]], size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    notes = []
    for name, fitted in models:
        disagreeing = fitted.disagreeing
        rows.append((
            name, len(fitted.problem._w), fitted.parameters, fitted.log_likelihood, fitted.aic, len(fitted.runs),
            len(disagreeing), "yes" if fitted.singular else "no",
        ))  # fmt: skip
        notes += [
            f"{name}: {run.optimiser}, starting from '{run.start}', stopped {run.criterion - fitted.criterion:.3f} "
            "above the best criterion."
            for run in disagreeing
        ]
        notes += [f"{name}: SINGULAR, {what}." for what in fitted.singular]
    columns = (
        "model",
        "n",
        "parameters",
        "REML log-likelihood",
        "AIC",
        "optimiser runs",
        "stopped elsewhere",
        "singular",
    )
    notes.append("Each model is fitted by L-BFGS-B, Nelder-Mead and Powell from several starts; the best fit is kept.")
    return Table(f"Fits ({size})", columns, rows, tuple(notes))


def crossed_table(data: Design, models: Sequence[tuple[str, Fit]], size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    for name, fitted in models:
        others = {term.name: float(v[0, 0]) for term, v in zip(fitted.terms[1:], fitted.variances[1:], strict=True)}
        variances = (others.get("prompt", math.nan), others.get("excerpt", math.nan), fitted.sigma2)
        for number, term in enumerate(data.names[1:], start=1):
            found = effect(fitted, number)
            known = math.isfinite(found.value) and fitted.df[number] >= 1
            rows.append((
                name, term, found.value, float(fitted.errors[number]), float(fitted.df[number]),
                float(fitted.p_values[number]) if known else math.nan, found.low, found.high,
                *(each if each <= (LARGEST / 2) ** 2 else math.nan for each in variances),
            ))  # fmt: skip
    columns = (
        "model",
        "term",
        "estimate",
        "SE",
        "df",
        "p",
        "t 2.5%",
        "t 97.5%",
        "var prompt",
        "var excerpt",
        "var residual",
    )
    notes = (
        "The systems share the prompts, so their variance cancels from the difference. Each excerpt belongs to one "
        "system: with (1 | excerpt) the interval applies to other pieces of these systems, without it to these only.",
    )
    return Table(f"Prompts and excerpts as crossed random effects ({size})", columns, rows, notes)


def ordinal_table(data: Design, terms: Sequence[tuple[str, Term, int]], size: str) -> tuple[Table | None, list[str]]:
    """Cumulative link models with each of ``terms`` (name, term, nodes), and why some have no estimate."""
    if len(np.unique(data.y)) > 20:
        return None, ["was not fitted: the ratings have more than twenty different values, so they are not categories"]
    rows: list[tuple[Any, ...]] = []
    notes: list[str] = []
    left: list[str] = []
    used: Sequence[float] = np.unique(data.y).tolist()
    unused = [value for value in range(int(LOW), int(HIGH) + 1) if value not in used]
    for name, term, nodes in progress(terms, desc="ordinal models", unit="model"):
        try:
            fitted: OrdinalFit = fit_ordinal(data.y, data.x[:, 1:], term, nodes=nodes)
        except UserError as error:
            left.append(f"{name} {error.message}")
            continue
        ends = fitted.interval()
        for number, system in enumerate(data.names[1:]):
            beta = float(fitted.beta[number])
            if not math.isfinite(fitted.errors[number]):
                left.append(f"{name} has no odds ratio of {system}: {fitted.why[number]}")
                continue
            spread = float(np.sqrt(fitted.variance[0, 0]))
            rows.append((
                name, system, beta, float(fitted.errors[number]), float(fitted.p_values[number]),
                float(ends[number, 0]), float(ends[number, 1]), math.exp(beta),
                spread if spread <= FARTHEST else math.nan,
                fitted.log_likelihood, fitted.aic,
            ))  # fmt: skip
        notes += [f"{name}: SINGULAR, {what}." for what in fitted.singular]
        notes += [
            f"{name}: {run.optimiser}, starting from {run.start}, stopped elsewhere." for run in fitted.disagreeing
        ]
    if not rows:
        return None, left
    if unused:
        notes.append(f"Categories without a rating, merged with their neighbours: {', '.join(map(str, unused))}.")
    notes.append(
        "On the logit scale: the odds of a rating above any threshold are multiplied by the odds ratio. Adaptive "
        f"Gauss-Hermite quadrature; Wald intervals. {terms[0][0]} assumes the same difference for every participant; "
        "its intervals are too narrow if the differences vary."
    )
    columns = (
        "random effects", "term", "estimate", "SE", "p", "2.5%", "97.5%", "odds ratio", "SD intercept",
        "log-likelihood", "AIC",
    )  # fmt: skip
    return Table(f"Cumulative link (logit) mixed models ({size})", columns, rows, tuple(notes)), left


def paired_table(data: Design, size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    left: list[str] = []
    for number, system in enumerate(data.systems[1:], start=1):
        base = data.x[:, 1:].sum(axis=1) == 0
        pairs = []
        for person in range(len(data.people)):
            mine = data.participant == person
            if (mine & base).any() and (mine & (data.x[:, number] == 1)).any():
                pairs.append(data.y[mine & (data.x[:, number] == 1)].mean() - data.y[mine & base].mean())
        found = mean_of(pairs, DIFFERENCE)
        if found.why and found.why != WHOLE:
            left.append(f"{system}: no test, since the participants' differences are {found.why}.")
            rows.append((system, len(pairs), found.value, *[math.nan] * 5))
            continue
        error = float(np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
        t = found.value / error
        p = float(2 * stats.t.sf(abs(t), len(pairs) - 1))
        rows.append((system, len(pairs), found.value, error, t, p, found.low, found.high))
    columns = ("system", "participants", "difference", "SE", "t", "p", "2.5%", "97.5%")
    left.append("If every participant rated equally many excerpts of each system, the model above gives the same test.")
    return Table(f"Paired t-test on participants' means ({size})", columns, rows, tuple(left))


def p_text(value: float) -> str:
    """A p-value after the word p."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def scale_of(number: int) -> Scale:
    """Between which numbers fixed effect ``number`` lies: 0 is a mean rating, the others are differences of ratings."""
    return DIFFERENCE if number else RATING


def effect(fitted: Fit, number: int, kind: str = "t") -> Estimate:
    """A fixed effect with its interval, as far as it lies on its scale; without one, or NaN, if it cannot be known."""
    value, (low, high), count = float(fitted.beta[number]), fitted.interval(kind)[number], fitted.problem.n
    scale = scale_of(number)
    if not scale[0] <= value <= scale[1]:
        return without(math.nan, count, "the model's estimate lies outside of the scale")
    if kind == "t" and fitted.df[number] < 1:
        return without(value, count, "less than one degree of freedom")
    if not math.isfinite(high - low):
        return without(value, count, "its standard error cannot be computed")
    return within(Estimate(value, float(low), float(high), count), scale)


def cell(value: Any, column: str) -> str:
    """A cell as text."""
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        if column == "p":
            return "<0.001" if value < 0.001 else f"{value:.3f}"
        return f"{value:.1f}" if column == "df" else f"{value:.3f}"
    return str(value)
