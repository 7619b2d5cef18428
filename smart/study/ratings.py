"""The ratings of a listening study, as ``smart study export`` writes them, and the rules that exclude some of them."""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smart import UserError
from smart.files import parse_json

NEEDED = ("participant", "system", "rating")
OPTIONAL = (
    "session", "position", "excerpt", "prompt", "seed", "play_count", "listened_s", "response_ms", "repeat", "check",
    "user_agent", "utc", "version",
)  # fmt: skip
LOW, HIGH = 1.0, 10.0
SHOWN = 10  # wrong lines that an error lists


class Rating(NamedTuple):
    """A row of the table. Values of missing columns are empty or NaN; ``line`` is the line in the file."""

    line: int
    participant: str
    system: str
    rating: float
    excerpt: str = ""
    prompt: str = ""
    listened: float = math.nan
    repeat: bool = False
    check: str = ""


class Rules(NamedTuple):
    """The limits beyond which ratings are excluded; they are written into the report."""

    silence_max: float  # a higher rating of the silent check excludes the participant
    repeat_max: float  # a larger mean difference between two hearings of one excerpt excludes the participant
    listened_min: float  # seconds; less listening excludes the rating
    silent: frozenset[str]  # excerpts without sound


class Excluded(NamedTuple):
    """One rule and the ``lines`` of the file that it excludes."""

    rule: str
    judged: str
    participants: tuple[str, ...]
    lines: frozenset[int]


def read_ratings(path: Path) -> tuple[list[Rating], list[str]]:
    """The rows of a CSV as ``smart study export`` writes it, and the names of optional columns that it lacks.

    Raises ``UserError`` that names the wrong lines (the first ten) or the missing columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"ratings {path} cannot be read as a CSV in UTF-8 ({reason})") from None
    absent = [name for name in NEEDED if name not in columns]
    if absent:
        raise UserError(
            f"ratings {path}: no column {' or '.join(absent)}; expected at least {', '.join(NEEDED)}, "
            f"found {', '.join(columns) or 'none'}"
        )
    doubled = [name for name, count in Counter(columns).items() if count > 1]
    if doubled:
        raise UserError(f"ratings {path}: column {doubled[0]} occurs twice; keep one")
    found: list[Rating] = []
    wrong: list[str] = []
    heard: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        try:
            rating = _rating(line, row, columns)
            for key in _keys(rating, row, columns):
                if key in heard:
                    raise ValueError(f"duplicates line {heard[key]} ({', '.join(key[1:])})")
                heard[key] = line
        except ValueError as error:
            wrong.append(f"line {line}: {error}")
        else:
            found.append(rating)
    if wrong:
        more = f"\n... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"ratings {path}: {len(wrong)} of {len(rows)} rows are wrong; correct or remove them:\n"
            + "\n".join(wrong[:SHOWN])
            + more
        )
    if not found:
        raise UserError(f"ratings {path}: has no rows")
    return found, [name for name in OPTIONAL if name not in columns]


def _rating(line: int, row: dict[str | None, Any], columns: Sequence[str]) -> Rating:
    """One row; ``ValueError`` says what is wrong with it."""
    if None in row or None in row.values():
        raise ValueError(f"expected {len(columns)} cells")
    cells = {name: str(value).strip() for name, value in row.items()}
    check = cells.get("check", "")
    check = "" if check.lower() in ("", "0", "false", "no", "none") else check
    for name in ("participant", "rating", *(() if check else ("system",))):
        if not cells[name]:
            raise ValueError(f"{name} is empty")
    rating = _number(cells, "rating")
    if not LOW <= rating <= HIGH:
        raise ValueError(f"rating must lie in {LOW:g} to {HIGH:g}, got {cells['rating']}")
    if not check:
        for name in ("prompt", "excerpt"):
            if name in columns and not cells[name]:
                raise ValueError(f"{name} is empty")
    repeat = cells.get("repeat", "").lower()
    if repeat not in ("", "0", "1", "false", "true", "no", "yes"):
        raise ValueError(f"repeat must be 0 or 1, got {cells['repeat'][:20]}")
    listened = _number(cells, "listened_s") if cells.get("listened_s") else math.nan
    if "seed" in columns and "prompt" in columns and "excerpt" not in columns:
        cells["excerpt"] = "/".join((cells["system"], cells["prompt"], cells["seed"]))
    return Rating(
        line, cells["participant"], cells["system"], rating, cells.get("excerpt", ""), cells.get("prompt", ""),
        listened, repeat in ("1", "true", "yes"), check,
    )  # fmt: skip


def _number(cells: dict[Any, str], name: str) -> float:
    try:
        value = float(cells[name])
    except ValueError:
        raise ValueError(f"{name} must be a number, got {cells[name][:20]!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {cells[name]}")
    return value


def _keys(rating: Rating, row: dict[str | None, Any], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """What may occur only once: a participant's position in a session, and an excerpt that is not a repeat."""
    keys: list[tuple[str, ...]] = []
    if "position" in columns and row["position"]:
        session = str(row.get("session") or "")
        keys.append(
            ("position", f"participant {rating.participant}", f"session {session}", f"position {row['position']}")
        )
    if rating.excerpt and not rating.repeat and not rating.check:
        keys.append(("excerpt", f"participant {rating.participant}", f"excerpt {rating.excerpt}"))
    return keys


def read_study(folder: Path) -> tuple[frozenset[str], float]:
    """Names of a study's silent excerpts, and the length of an excerpt in seconds."""
    try:
        with (folder / "key.csv").open(encoding="utf-8-sig", newline="") as file:
            silent = frozenset(row["excerpt"] for row in csv.DictReader(file) if int(row["silent"] or 0))
        seconds = float(parse_json((folder / "study.json").read_text(encoding="utf-8"))["seconds"])
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds = {seconds:g}")
    except (OSError, KeyError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"--study {folder}: its key.csv and study.json cannot be read ({error})") from None
    return silent, seconds


def exclude(ratings: Sequence[Rating], rules: Rules) -> tuple[list[Rating], list[Rating], list[Excluded]]:
    """All ratings of excerpts at their first hearing; those that no rule excludes; and what each rule excludes.

    The silent check and second hearings are not ratings of a system: they test the participant, and are set aside.
    """
    main = [each for each in ratings if not each.check and not each.repeat]
    checks = [each for each in ratings if each.check]
    repeats = [each for each in ratings if each.repeat and not each.check]
    first = {(each.participant, each.excerpt): each for each in main}
    lines: dict[str, set[int]] = {}
    for each in main:
        lines.setdefault(each.participant, set()).add(each.line)

    def lines_of(people: Sequence[str]) -> frozenset[int]:
        return frozenset().union(*(lines.get(person, set()) for person in people)) if people else frozenset()

    failed = sorted({each.participant for each in checks if each.rating > rules.silence_max})
    differences: dict[str, list[float]] = {}
    for each in repeats:
        if (each.participant, each.excerpt) in first:
            differences.setdefault(each.participant, []).append(
                abs(each.rating - first[each.participant, each.excerpt].rating)
            )
    repeated = {person: values for person, values in differences.items() if len(values) > 1}
    inconsistent = sorted(person for person, values in repeated.items() if np.mean(values) > rules.repeat_max)
    given: dict[str, list[float]] = {}
    for each in main:
        given.setdefault(each.participant, []).append(each.rating)
    constant = sorted(person for person, values in given.items() if len(values) > 5 and len(set(values)) == 1)
    timed = [each for each in main if not math.isnan(each.listened)]
    short = [each for each in timed if each.listened < rules.listened_min]
    silent = [each for each in main if each.excerpt in rules.silent]

    def people(rows: Sequence[Rating]) -> tuple[str, ...]:
        return tuple(sorted({each.participant for each in rows}))

    found = [
        Excluded(
            f"silence rated above {rules.silence_max:g} (excludes the participant)",
            f"{len(people(checks))} participants with a silent check", tuple(failed), lines_of(failed),
        ),
        Excluded(
            f"second hearings differ by more than {rules.repeat_max:g} on average (excludes the participant)",
            f"{len(repeated)} participants with two or more repeats", tuple(inconsistent), lines_of(inconsistent),
        ),
        Excluded(
            "more than five ratings, all the same (excludes the participant)", f"{len(given)} participants",
            tuple(constant), lines_of(constant),
        ),
        Excluded(
            f"listened for less than {rules.listened_min:g} s (excludes the rating)",
            f"{len(timed)} ratings with listened_s", people(short), frozenset(each.line for each in short),
        ),
        Excluded(
            "the excerpt is silent (excludes the rating)", f"{len(rules.silent)} silent excerpts",
            people(silent), frozenset(each.line for each in silent),
        ),
    ]  # fmt: skip
    gone = frozenset().union(*(each.lines for each in found))
    return main, [each for each in main if each.line not in gone], found
