"""What an analysis says first: three sentences and one table, for readers who know no statistics."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from smart.intervals import Estimate
from smart.study.tables import Table


class Outcome(NamedTuple):
    """How a system was rated, and how it compares with the reference; what is unknown is NaN and has a reason."""

    system: str
    ratings: int
    listeners: int
    mean: Estimate
    difference: Estimate
    elsewhere: Estimate | None = None  # the difference for other excerpts of the same systems, if that is known


def result_table(every: Sequence[Outcome], kept: Sequence[Outcome], reference: str) -> Table:
    """One row per system; ``kept``: the same without the excluded ratings (empty: there are none)."""
    without = {each.system: each for each in kept}
    rows = []
    for each in every:
        last = each.system == reference
        row = [each.system, each.ratings, each.listeners, _text(each.mean), "" if last else _text(each.difference, "+")]
        if kept:
            found = without.get(each.system)
            row.append("" if last or found is None else _text(found.difference, "+"))
        rows.append(tuple(row))
    columns = ("system", "ratings", "listeners", "mean rating [95% interval]", f"compared with {reference}")
    more = ("without excluded ratings",) if kept else ()
    reasons = {
        f"{each.system}: {found.why}."
        for each in (*every, *kept)
        for found in (each.mean, each.difference)
        if found.why and not (each.system == reference and found is each.difference)
    }
    return Table("Result (ratings from 1 to 10)", (*columns, *more), rows, tuple(sorted(reasons)))


def sentences(
    every: Sequence[Outcome], kept: Sequence[Outcome], reference: str, people: int, excluded: int
) -> tuple[str, str, str]:
    """Who rated what; how the systems compare; and for what that holds."""
    names = [each.system for each in every]
    count = sum(each.ratings for each in every)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    first = f"{people} people gave {count} ratings from 1 to 10 to music by {listed}"
    if excluded:
        verb = "is" if excluded == 1 else "are"
        first += f"; {excluded} of these {verb} excluded by the rules of the study, and the table shows both results"
    second = "; ".join(_compared(each, reference) for each in every if each.system != reference)
    return f"{first}.", f"{second}.", _scope(every, reference)


def _compared(outcome: Outcome, reference: str) -> str:
    found = outcome.difference
    if not math.isfinite(found.value):
        return f"{outcome.system} cannot be compared with {reference} ({found.why})"
    size = f"{abs(found.value):.2f} points {'higher' if found.value >= 0 else 'lower'} than {reference} on average"
    text = f"{outcome.system} was rated {size}"
    if not math.isfinite(found.low):
        return f"{text}, but these ratings cannot tell how much of that is chance ({found.why})"
    chance = "" if found.low > 0 or found.high < 0 else ", which may be chance"
    return f"{text}{chance} (95% interval: {_points(found)})"


def _points(found: Estimate) -> str:
    if found.low >= 0:
        return f"{found.low:.2f} to {found.high:.2f} higher"
    if found.high <= 0:
        return f"{-found.high:.2f} to {-found.low:.2f} lower"
    return f"{-found.low:.2f} lower to {found.high:.2f} higher"


def _scope(every: Sequence[Outcome], reference: str) -> str:
    others = [each for each in every if each.system != reference and each.elsewhere is not None]
    holds = "This holds for listeners like these and for these excerpts"
    known = [each for each in others if each.elsewhere is not None and math.isfinite(each.elsewhere.low)]
    if not known:
        return f"{holds}; whether it holds for other excerpts of the same systems cannot be told from these ratings."
    parts = []
    for each in known:
        assert each.elsewhere is not None
        name = f"of {each.system} " if len(others) > 1 else ""
        parts.append(f"{name}{_points(each.elsewhere)}")
    return f"{holds}; for other excerpts of the same systems the 95% interval is {', '.join(parts)}."


def _text(found: Estimate, sign: str = "") -> str:
    if not math.isfinite(found.value):
        return "unknown"
    if not math.isfinite(found.low):
        return f"{found.value:{sign}.2f} [unknown]"
    return f"{found.value:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]"
