"""``smart study analyse``: the ratings of a listening study as tables, an HTML page and the paper's figure 5.

The paper's model is ``rating ~ system + (1 + system | participant)`` (Table 5). The report adds the same model with
prompts and excerpts as crossed random effects, which the paper leaves out; cumulative link models, since ratings are
ordered categories; and the t-test on participants' means. All analyses are run on all ratings and again without the
excluded ones; every exclusion is counted.
"""

import base64
import csv
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from scipy import stats

from smart import UserError, plots
from smart.files import write_atomically
from smart.run import progress
from smart.study.mixed import Array, Fit, Term, fit, minimise, profile_interval, simulate
from smart.study.ordinal import OrdinalFit, fit_ordinal
from smart.study.ratings import HIGH, LOW, Excluded, Rating, Rules, exclude, read_ratings, read_study

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
body{color:#111;background:#fff}table{border-collapse:collapse;margin:.5rem 0 1rem}
th,td{padding:.2rem .7rem;border-bottom:1px solid #ccc;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}caption{text-align:left;font-weight:600;padding:.3rem 0}
.wide{overflow-x:auto}.note{color:#444}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#111;color:#eee}.note{color:#bbb}img{background:#fff}}"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{{ title }}</title>
<style>{{ style }}</style></head><body><h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>{% endfor %}
<figure><img src="data:image/png;base64,{{ picture }}" alt="{{ alt }}"><figcaption>{{ alt }}</figcaption></figure>
{% for section, tables in sections %}<h2>{{ section }}</h2>{% for table in tables %}
<div class="wide"><table><caption>{{ table.title }}</caption>
<thead><tr>{% for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.text() %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>{% for note in table.notes %}<p class="note">{{ note }}</p>{% endfor %}{% endfor %}{% endfor %}
</body></html>"""


class Table(NamedTuple):
    """A table of the report: cells are text, whole numbers, or floats, which are shown with three decimals."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: tuple[str, ...] = ()

    def text(self) -> list[list[str]]:
        """The cells as text."""
        return [[_cell(value, name) for value, name in zip(row, self.columns, strict=True)] for row in self.rows]

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


# --- Models -------------------------------------------------------------------------------------------------------


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
        found.append(_deviations(sigma2 * factor @ factor.T, sigma2))
    return np.array(found)


def _deviations(covariance: Array, sigma2: float) -> Array:
    """One row of what ``bootstrap`` returns. A correlation with a constant is NaN."""
    deviations = np.sqrt(np.diag(covariance))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = covariance / np.outer(deviations, deviations)
    lower = np.tril_indices(len(deviations), -1)
    return np.concatenate([deviations, [math.sqrt(sigma2)], correlations[lower]])


def analyse(
    ratings: Sequence[Rating], systems: Sequence[str], *, replicates: int, seed: int
) -> tuple[list[Table], list[str]]:
    """The tables for one set of ratings, and a summary in sentences.

    Raises ``UserError`` if there are too few ratings to fit the paper's model.
    """
    present = {each.system for each in ratings}
    absent = [name for name in systems if name not in present]
    if absent:
        raise UserError(f"no ratings of {', '.join(absent)} are left")
    if len({each.participant for each in ratings}) < 3:
        raise UserError("a model with participants as random effects needs at least three participants")
    data = design(ratings, systems)
    size = f"n = {len(data.y)} ratings by {len(data.people)} participants"
    crossed, left = crossed_terms(ratings)
    models: list[tuple[str, Fit]] = []
    for name, terms in progress([("", []), *crossed], desc="models", unit="model"):
        fitted = fit(data.y, data.x, [data.by_participant, *terms])
        models.append((f"rating ~ system + (1 + system | participant) {name}".strip(), fitted))
    main = models[0][1]
    tables = [_means(data, size), _fixed(data, main, size), _components(main, replicates, seed, size)]
    tables.append(_fits(models, size))
    if crossed:
        tables.append(_crossed(data, models, size))
    ordinal, why = _ordinal(data, size)
    if ordinal is not None:
        tables.append(ordinal)
    tables.append(_paired(data, size))
    words = _summary(data, models, ratings)
    words += [f"Not fitted: {reason}." for reason in left] + ([f"No ordinal model: {why}."] if why else [])
    return tables, words


def _means(data: Design, size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    for number, system in enumerate(data.systems):
        own = data.x[:, number] == 1 if number else data.x[:, 1:].sum(axis=1) == 0
        each = np.array([data.y[own & (data.participant == p)].mean() for p in np.unique(data.participant[own])])
        reach = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else np.nan
        rows.append((
            system, int(own.sum()), len(each), float(data.y[own].mean()), float(data.y[own].std(ddof=1)),
            float(each.mean()), float(each.mean() - reach), float(each.mean() + reach),
        ))  # fmt: skip
    columns = ("system", "n", "participants", "mean", "SD", "mean of participants' means", "2.5%", "97.5%")
    note = "The interval is Student's t interval over the participants' means."
    return Table(f"Ratings by system ({size})", columns, rows, (note,))


def _fixed(data: Design, fitted: Fit, size: str) -> Table:
    t, wald = fitted.interval("t"), fitted.interval("normal")
    rows = []
    for number, name in enumerate(data.names):
        low, high = profile_interval(fitted, number)
        rows.append((
            name, float(fitted.beta[number]), float(fitted.errors[number]), float(fitted.df[number]),
            float(fitted.beta[number] / fitted.errors[number]), float(fitted.p_values[number]),
            float(t[number, 0]), float(t[number, 1]), float(wald[number, 0]), float(wald[number, 1]), low, high,
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
    return Table(
        f"Fixed effects of rating ~ system + (1 + system | participant), by REML ({size})", columns, rows, notes
    )


def _components(fitted: Fit, replicates: int, seed: int, size: str) -> Table:
    covariance, names = fitted.variances[0], fitted.terms[0].columns
    estimate = _deviations(covariance, fitted.sigma2)
    k = len(names)
    ends = np.full((2, len(estimate)), np.nan)
    if replicates:
        drawn = bootstrap(fitted, replicates, seed)
        ends = np.array(
            [[np.nanquantile(c, q) if np.isfinite(c).any() else np.nan for c in drawn.T] for q in (0.025, 0.975)]
        )
    rows: list[tuple[Any, ...]] = []
    labels = [*(f"{name} by participant" for name in names), "Residual"]
    for number, label in enumerate(labels):
        value = float(estimate[number])
        rows.append((label, value**2, value, float(ends[0, number]), float(ends[1, number])))
    for number, (i, j) in enumerate(zip(*np.tril_indices(k, -1), strict=True), start=k + 1):
        label = f"correlation of {names[j]} and {names[i]}"
        rows.append((label, math.nan, float(estimate[number]), float(ends[0, number]), float(ends[1, number])))
    drawn_from = f"from {replicates} studies drawn from the fitted model and fitted again (seed {seed})"
    notes = [f"Intervals: {drawn_from if replicates else 'not computed (--bootstrap 0)'}."]
    notes += [
        f"SINGULAR: {what}; the data do not support such a complex model, or the value is small."
        for what in fitted.singular
    ]
    return Table(
        f"Random effects ({size})", ("component", "variance", "SD or correlation", "2.5%", "97.5%"), rows, tuple(notes)
    )


def _fits(models: Sequence[tuple[str, Fit]], size: str) -> Table:
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


def _crossed(data: Design, models: Sequence[tuple[str, Fit]], size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    for name, fitted in models:
        t = fitted.interval("t")
        others = {term.name: float(v[0, 0]) for term, v in zip(fitted.terms[1:], fitted.variances[1:], strict=True)}
        for number, term in enumerate(data.names[1:], start=1):
            rows.append((
                name, term, float(fitted.beta[number]), float(fitted.errors[number]), float(fitted.df[number]),
                float(fitted.p_values[number]), float(t[number, 0]), float(t[number, 1]),
                others.get("prompt", math.nan), others.get("excerpt", math.nan), fitted.sigma2,
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


def _ordinal(data: Design, size: str) -> tuple[Table | None, str]:
    """Cumulative link models with random intercepts, and with random effects of the system as well."""
    if len(np.unique(data.y)) > 20:
        return None, "the ratings have more than twenty different values, so they are not categories"
    rows: list[tuple[Any, ...]] = []
    notes: list[str] = []
    used: Sequence[float] = np.unique(data.y).tolist()
    unused = [value for value in range(int(LOW), int(HIGH) + 1) if value not in used]
    kinds = [("(1 | participant)", 1, 9)]
    if len(data.systems) == 2:
        kinds.append(("(1 + system | participant)", 2, 5))
    for name, k, nodes in progress(kinds, desc="ordinal models", unit="model"):
        term = Term("participant", data.names[:k], data.participant, data.x[:, :k])
        try:
            fitted: OrdinalFit = fit_ordinal(data.y, data.x[:, 1:], term, nodes=nodes)
        except UserError as error:
            return None, error.message
        ends = fitted.interval()
        for number, system in enumerate(data.names[1:]):
            beta = float(fitted.beta[number])
            rows.append((
                name, system, beta, float(fitted.errors[number]), float(fitted.p_values[number]),
                float(ends[number, 0]), float(ends[number, 1]), math.exp(beta), float(np.sqrt(fitted.variance[0, 0])),
                fitted.log_likelihood, fitted.aic,
            ))  # fmt: skip
        notes += [f"{name}: SINGULAR, {what}." for what in fitted.singular]
        notes += [
            f"{name}: {run.optimiser}, starting from {run.start}, stopped elsewhere." for run in fitted.disagreeing
        ]
    if unused:
        notes.append(f"Categories without a rating, merged with their neighbours: {', '.join(map(str, unused))}.")
    notes.append(
        "On the logit scale: the odds of a rating above any threshold are multiplied by the odds ratio. Adaptive "
        f"Gauss-Hermite quadrature; Wald intervals. {kinds[0][0]} assumes the same difference for every participant; "
        "its intervals are too narrow if the differences vary."
    )
    columns = (
        "random effects", "term", "estimate", "SE", "p", "2.5%", "97.5%", "odds ratio", "SD intercept",
        "log-likelihood", "AIC",
    )  # fmt: skip
    return Table(f"Cumulative link (logit) mixed models ({size})", columns, rows, tuple(notes)), ""


def _paired(data: Design, size: str) -> Table:
    rows: list[tuple[Any, ...]] = []
    for number, system in enumerate(data.systems[1:], start=1):
        base = data.x[:, 1:].sum(axis=1) == 0
        pairs = []
        for person in range(len(data.people)):
            mine = data.participant == person
            if (mine & base).any() and (mine & (data.x[:, number] == 1)).any():
                pairs.append(data.y[mine & (data.x[:, number] == 1)].mean() - data.y[mine & base].mean())
        if len(pairs) < 2 or np.std(pairs) == 0:
            rows.append((system, len(pairs), *[math.nan] * 6))
            continue
        mean, error = float(np.mean(pairs)), float(np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
        reach, t = float(stats.t.ppf(0.975, len(pairs) - 1)) * error, mean / error
        p = float(2 * stats.t.sf(abs(t), len(pairs) - 1))
        rows.append((system, len(pairs), mean, error, t, p, mean - reach, mean + reach))
    columns = ("system", "participants", "difference", "SE", "t", "p", "2.5%", "97.5%")
    notes = ("If every participant rated equally many excerpts of each system, the model above gives the same test.",)
    return Table(f"Paired t-test on participants' means ({size})", columns, rows, notes)


def _summary(data: Design, models: Sequence[tuple[str, Fit]], ratings: Sequence[Rating]) -> list[str]:
    """What the models show, and for which listeners and excerpts."""
    main = models[0][1]
    last = models[-1][1]
    words = []
    pieces = len({each.excerpt for each in ratings}) if all(each.excerpt for each in ratings) else 0
    for number, system in enumerate(data.names[1:], start=1):
        low, high = main.interval("t")[number]
        verdict = "differ" if low > 0 or high < 0 else "may be the same"
        words.append(
            f"{system} was rated {main.beta[number]:+.2f} points relative to {data.systems[0]} on average (95% "
            f"interval {low:+.2f} to {high:+.2f}, p {_p(main.p_values[number])}; {len(data.y)} ratings, "
            f"{len(data.people)} participants): for such listeners and these excerpts, the mean ratings {verdict}."
        )
        if len(last.terms) > 1 and last.terms[-1].name == "excerpt":
            low, high = last.interval("t")[number]
            words.append(
                f"For other excerpts of the same systems ({pieces} were heard) the interval is {low:+.2f} to "
                f"{high:+.2f} (p {_p(last.p_values[number])})."
            )
    for name, fitted in models:
        if fitted.singular:
            words.append(f"Singular fit ({name}): {'; '.join(fitted.singular)}.")
    return words


# --- The report ---------------------------------------------------------------------------------------------------


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _cell(value: Any, column: str) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        if column == "p":
            return "<0.001" if value < 0.001 else f"{value:.3f}"
        return f"{value:.1f}" if column == "df" else f"{value:.3f}"
    return str(value)


def write_report(
    out: Path, title: str, summary: Sequence[str], sections: Sequence[tuple[str, Sequence[Table]]], alt: str
) -> None:
    """``report.html``, one file that includes ``figure5.png``, and ``tables.csv``: one row per value, unrounded."""
    from jinja2 import Environment

    picture = base64.b64encode((out / "figure5.png").read_bytes()).decode()
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(title=title, summary=summary, sections=sections, picture=picture, style=STYLE, alt=alt)
    write_atomically(out / "report.html", html.encode())

    def write(file: Any) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["ratings", "table", "row", "label", "column", "value"])
        for section, tables in sections:
            for each in tables:
                for number, row in enumerate(each.rows):
                    for column, value in zip(each.columns, row, strict=True):
                        table.writerow(map(plots.plain, (section, each.title, number, row[0], column, value)))
        text.flush()
        text.detach()

    write_atomically(out / "tables.csv", write)


def pick_systems(ratings: Sequence[Rating], reference: str | None) -> tuple[list[str], str]:
    """The reference, then the others by name; and why it is the reference. ``UserError`` for fewer than two systems."""
    names = sorted({each.system for each in ratings if not each.check})
    if len(names) < 2:
        raise UserError(f"the ratings are of {names[0] if names else 'no system'} only; there is nothing to compare")
    if reference is not None and reference not in names:
        raise UserError(f"--reference {reference}: no such system; the ratings are of {', '.join(names)}")
    why = (
        "as given by --reference"
        if reference
        else 'the system named "base"'
        if "base" in names
        else "the first by name; use --reference to choose another"
    )
    chosen = reference or ("base" if "base" in names else names[0])
    return [chosen, *(name for name in names if name != chosen)], f"The reference is {chosen} ({why})."


def report(
    *,
    ratings: Path,
    out: Path,
    folder: Path | None,
    reference: str | None,
    silence_max: float,
    repeat_max: float,
    listened_min: float,
    seconds: float,
    silent: tuple[str, ...],
    replicates: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Write the report into ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if (out / "report.html").exists() and not overwrite:
        raise UserError(f"--out {out}: already holds a report; use --overwrite to replace it")
    rows, missing = read_ratings(ratings)
    known, length = read_study(folder) if folder is not None else (frozenset[str](), seconds)
    unknown = sorted(set(silent) - {each.excerpt for each in rows})
    if unknown:
        raise UserError(f"--silent {unknown[0]}: no such excerpt in {ratings}")
    systems, why = pick_systems(rows, reference)
    rules = Rules(silence_max, repeat_max, listened_min * length, known | frozenset(silent))
    every, kept, found = exclude(rows, rules)
    summary = [why]
    if missing:
        summary.append(f"Columns missing from {ratings.name}: {', '.join(missing)}.")
    exclusions = exclusion_table(rows, every, len(kept), found)
    sections: list[tuple[str, list[Table]]] = [("Exclusions", [exclusions])]
    sets = [("All ratings", every)]
    if len(kept) < len(every):
        sets.append(("After exclusions", kept))
    else:
        summary.append("No rule excludes a rating, so the results are the same with and without exclusions.")
    for name, chosen in sets:
        try:
            tables, words = analyse(chosen, systems, replicates=replicates, seed=seed)
        except UserError as error:
            if len(sets) == 1:
                raise UserError(f"ratings {ratings}: {error.message}") from None
            summary.append(f"{name}: not analysed, since {error.message}.")
            continue
        sections.append((name, tables))
        summary += [f"{name}. {words[0]}", *words[1:]]
    summary.append(
        "These results do not cover other kinds of listeners, other soundfonts or lengths, or the reasons for a "
        "difference. p is how often so large a difference would occur if there were none, not the probability of none."
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = [(each.participant, each.system, each.rating) for each in every]
        plots.ratings(drawn, systems, out / "figure5")
        alt = f"Ratings overall and by participant, all {len(every)} ratings of {', '.join(systems)}."
        write_report(out, f"Ratings of {', '.join(systems)}", summary, sections, alt)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    for name, tables in sections:
        click.echo(f"\n== {name} ==")
        click.echo("\n\n".join(table.plain() for table in tables))
    click.echo("\n" + "\n".join(summary))
    click.echo(f"report: {out / 'report.html'}; every number: {out / 'tables.csv'}; figure: {out / 'figure5.png'}")
