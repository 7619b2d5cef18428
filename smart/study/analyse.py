"""``smart study analyse``: the ratings of a listening study as a page, tables and the paper's figure 5.

The paper's model is ``rating ~ system + (1 + system | participant)`` (Table 5). The report adds the same model with
prompts and excerpts as crossed random effects, which the paper leaves out; cumulative link models, since ratings are
ordered categories; and the t-test on participants' means. A model whose variances the ratings cannot tell is left out,
and so is an estimate or interval that leaves its scale, with the reason. All analyses are run on all ratings and again
without the excluded ones; every exclusion is counted.
"""

import base64
import csv
import io
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from smart import UserError, plots
from smart.files import write_atomically
from smart.intervals import FEWEST, RATING, TOO_FEW, Estimate, mean_of, without
from smart.run import progress
from smart.study.identify import unidentified
from smart.study.mixed import Fit, Term, fit
from smart.study.models import Design, crossed_terms, design
from smart.study.ratings import Excluded, Rating, Rules, exclude, read_ratings, read_study
from smart.study.summary import Outcome, result_table, sentences
from smart.study.tables import (
    Table,
    components_table,
    crossed_table,
    effect,
    exclusion_table,
    fits_table,
    fixed_table,
    means_table,
    ordinal_table,
    p_text,
    paired_table,
)


class Analysis(NamedTuple):
    """What one set of ratings says: its tables, how each system compares, what was left out and why, and notes."""

    tables: list[Table]
    outcomes: list[Outcome]
    left: list[str]
    notes: list[str]


def analyse(ratings: Sequence[Rating], systems: Sequence[str], *, replicates: int, seed: int) -> Analysis:
    """Analyse one set of ratings; ``systems[0]`` is the reference.

    Raises ``UserError`` if there are too few ratings to compare any system with the reference.
    """
    present = {each.system for each in ratings}
    absent = [name for name in systems if name not in present]
    if absent:
        raise UserError(f"no ratings of {', '.join(absent)} are left")
    if len({each.participant for each in ratings}) < FEWEST:
        raise UserError("a model with participants as random effects needs at least three participants")
    listeners = {name: len({each.participant for each in ratings if each.system == name}) for name in systems}
    few = {
        name: f"heard by {count} participant{'s' * (count > 1)}, too few to compare it"
        for name, count in listeners.items()
        if count < FEWEST
    }
    if systems[0] in few:
        raise UserError(f"the reference {systems[0]} was {few[systems[0]]}")
    compared = [name for name in systems if name not in few]
    if len(compared) < 2:
        raise UserError("; ".join(f"{name} was {why}" for name, why in few.items()))
    chosen = [each for each in ratings if each.system in compared]
    data = design(chosen, compared)
    size = f"n = {len(data.y)} ratings by {len(data.people)} participants"
    main, formula, left = _main_term(data)
    crossed, unfit = crossed_terms(chosen)
    models: list[tuple[str, Fit]] = []
    for name, terms in progress([("", []), *crossed], desc="models", unit="model"):
        why = unidentified(data.x, [main, *terms]) if terms else ""
        try:
            if why:
                raise UserError(why)
            models.append((f"{formula} {name}".strip(), fit(data.y, data.x, [main, *terms])))
        except UserError as error:
            if not terms:
                raise
            unfit.append(f"{name.removeprefix('+ ')}: {error.message}")
    fitted = models[0][1]
    tables = [means_table(design(ratings, systems), _size(ratings)), fixed_table(data, fitted, formula, size)]
    tables += [components_table(fitted, replicates, seed, size), fits_table(models, size)]
    if len(models) > 1:
        tables.append(crossed_table(data, models, size))
    ordinal, unknown = ordinal_table(data, _ordinal_terms(data, main, left), size)
    if ordinal is not None:
        tables.append(ordinal)
    tables.append(paired_table(data, size))
    left += [f"Left out: {name}, {why}." for name, why in few.items()]
    left += [f"Left out: {reason}." for reason in unfit]
    left += [f"Left out: the ordinal model {reason}." for reason in unknown]
    notes = _tests(data, fitted)
    for name, one in models:
        notes += [f"Singular fit ({name}): {'; '.join(one.singular)}."] if one.singular else []
    return Analysis(tables, _outcomes(ratings, systems, data, models, few), left, notes)


def _size(ratings: Sequence[Rating]) -> str:
    return f"n = {len(ratings)} ratings by {len({each.participant for each in ratings})} participants"


def _main_term(data: Design) -> tuple[Term, str, list[str]]:
    """The random effects of participants that the ratings can tell, the formula, and why others are left out."""
    full = data.by_participant
    why = unidentified(data.x, [full])
    if not why:
        return full, "rating ~ system + (1 + system | participant)", []
    level = full._replace(columns=full.columns[:1], z=full.z[:, :1])
    other = unidentified(data.x, [level])
    if other:
        raise UserError(f"the ratings cannot be told from their participants: {other}")
    note = f"Left out: the effect of the system by participant, (1 + system | participant), since {why}."
    return level, "rating ~ system + (1 | participant)", [note]


def _ordinal_terms(data: Design, main: Term, left: list[str]) -> list[tuple[str, Term, int]]:
    """Random effects of the ordinal models, each with its nodes; a note says which are left out."""
    term = data.by_participant
    found = [("(1 | participant)", term._replace(columns=term.columns[:1], z=term.z[:, :1]), 9)]
    if len(data.systems) == 2 and len(main.columns) == 2:
        found.append(("(1 + system | participant)", term, 5))
    elif len(data.systems) > 2:
        left.append(
            "Left out: the ordinal model with (1 + system | participant), which is fitted for two systems only, since "
            "its integrals take 5 nodes for each of them and participant."
        )
    return found


def _outcomes(
    ratings: Sequence[Rating],
    systems: Sequence[str],
    data: Design,
    models: Sequence[tuple[str, Fit]],
    few: dict[str, str],
) -> list[Outcome]:
    fitted, last = models[0][1], models[-1][1]
    found = []
    for name in systems:
        own = [each for each in ratings if each.system == name]
        people: dict[str, list[float]] = {}
        for each in own:
            people.setdefault(each.participant, []).append(each.rating)
        mean = mean_of([float(np.mean(values)) for values in people.values()], RATING)
        if mean.why == TOO_FEW:
            mean = without(mean.value, mean.n, few.get(name, mean.why))
        if name == systems[0]:
            found.append(Outcome(name, len(own), len(people), mean, without(math.nan, len(own), "the reference")))
        elif name in few:
            found.append(Outcome(name, len(own), len(people), mean, without(math.nan, len(own), few[name])))
        else:
            number = data.systems.index(name)
            other = effect(last, number) if last.terms[-1].name == "excerpt" else None
            found.append(Outcome(name, len(own), len(people), mean, effect(fitted, number), other))
    return found


def _tests(data: Design, fitted: Fit) -> list[str]:
    """A p-value for each comparison that has an interval."""
    words = []
    for number, system in enumerate(data.names[1:], start=1):
        found: Estimate = effect(fitted, number)
        if math.isfinite(found.low):
            words.append(
                f"{system} compared with {data.systems[0]}: {found.value:+.2f} points, 95% interval {found.low:+.2f} "
                f"to {found.high:+.2f}, p {p_text(float(fitted.p_values[number]))}."
            )
    return words


# --- The report ---------------------------------------------------------------------------------------------------


def write_report(
    out: Path,
    title: str,
    words: Sequence[str],
    result: Table,
    sections: Sequence[tuple[str, Sequence[Table]]],
    notes: Sequence[str],
    alt: str,
) -> None:
    """``report.html``, one file that includes ``figure5.png``, and ``tables.csv``: one row per value, unrounded."""
    from jinja2 import Environment

    picture = base64.b64encode((out / "figure5.png").read_bytes()).decode()
    template = (files("smart.study") / "pages" / "analysis.html").read_text(encoding="utf-8")
    html = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=title, sentences=words, result=result, sections=sections, notes=notes, picture=picture, alt=alt,
        )
    )  # fmt: skip
    write_atomically(out / "report.html", html.encode())

    def write(file: Any) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["ratings", "table", "row", "label", "column", "value"])
        for section, tables in [("Result", [result]), *sections]:
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
    notes = [why]
    if missing:
        notes.append(f"Columns missing from {ratings.name}: {', '.join(missing)}.")
    sets = [("All ratings", every)]
    if len(kept) < len(every):
        sets.append(("After exclusions", kept))
    else:
        notes.append("No rule excludes a rating, so the results are the same with and without exclusions.")
    sections: list[tuple[str, list[Table]]] = []
    outcomes: dict[str, list[Outcome]] = {}
    left: list[str] = []
    for name, chosen in sets:
        try:
            done = analyse(chosen, systems, replicates=replicates, seed=seed)
        except UserError as error:
            if len(sets) == 1:
                raise UserError(f"ratings {ratings}: {error.message}") from None
            left.append(f"{name}: not analysed, since {error.message}.")
            continue
        sections.append((name, done.tables))
        outcomes[name] = done.outcomes
        left += [f"{name}. {line}" for line in done.left]
        notes += [f"{name}. {line}" for line in done.notes]
    if not outcomes:
        raise UserError(f"ratings {ratings}: {' '.join(left)}")
    sections.append(("Exclusions", [exclusion_table(rows, every, len(kept), found)]))
    notes.append(
        "These results do not cover other kinds of listeners, other soundfonts or lengths, or the reasons for a "
        "difference. p is how often so large a difference would occur if there were none, not the probability of none."
    )
    first = outcomes.get("All ratings", outcomes.get("After exclusions", []))
    after = outcomes.get("After exclusions", []) if "All ratings" in outcomes else []
    people = len({each.participant for each in every})
    words = sentences(first, after, systems[0], people, len(every) - len(kept))
    result = result_table(first, after, systems[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = [(each.participant, each.system, each.rating) for each in every]
        plots.ratings(drawn, systems, out / "figure5")
        alt = f"Ratings overall and by participant, all {len(every)} ratings of {', '.join(systems)}."
        title = f"Ratings of {', '.join(systems)}"
        write_report(out, title, words, result, sections, [*left, *notes], alt)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    click.echo(" ".join(words))
    click.echo(f"\n{result.plain()}\n")
    for line in [*_flagged(found), *left]:
        click.echo(line)
    click.echo(
        f"report, with all models, fits and exclusions: {out / 'report.html'}; every number: {out / 'tables.csv'}; "
        f"figure: {out / 'figure5.png'}"
    )


def _flagged(found: Sequence[Excluded]) -> list[str]:
    """A line for each rule that excludes a rating."""
    return [f"excluded: {each.rule}: {len(each.lines)} ratings" for each in found if each.lines]
