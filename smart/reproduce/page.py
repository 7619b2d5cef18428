"""The page that puts the paper's values next to those measured here."""

import base64
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smart.config import Config
from smart.files import parse_json, write_atomically
from smart.intervals import FEWEST, RATING, TOO_FEW, Scale, by_student, differences, without
from smart.published import AXES, BASE, ITERATIONS, LISTENING, MINUTES, TABLE_1, TABLE_2, tolerance
from smart.reproduce.book import OUT, Book, Step, _clock
from smart.reproduce.steps import PAGE, Found, variants
from smart.run import read_metrics


class Section(NamedTuple):
    """A part of the page: text, a table (its first row is the header), and figures."""

    title: str
    words: str = ""
    table: Sequence[Sequence[str]] = ()
    figures: Sequence[tuple[str, Path]] = ()  # caption and PNG


def number(value: float | None, digits: int = 2) -> str:
    """A number as the page shows it; a dash if it is missing."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_interval(estimate: dict[str, float | None], digits: int = 2) -> str:
    """``mean [low, high]`` of an estimate with keys value or mean, low, high."""
    middle = estimate.get("value", estimate.get("mean"))
    return f"{number(middle, digits)} [{number(estimate['low'], digits)}, {number(estimate['high'], digits)}]"


def read_json(path: Path) -> Any:
    """The JSON file that a step wrote."""
    return parse_json(path.read_text(encoding="utf-8"))


def duration(run: Path) -> float:
    """Total minutes of a run's iterations."""
    rows = read_metrics(run)
    return sum(row.get("seconds/iteration") or 0.0 for row in rows) / 60


def sections(out: Path, config: Config, found: Found) -> list[Section]:
    """The whole page, from the outputs of the steps."""
    real = bool(getattr(found.reward, "is_published", False))
    return [
        _training(out, config),
        _table_1(out, config.all_rewards[0].kind, real),
        _table_2(out, real),
        *_effects(out, real and config.model.base == BASE),
        _hacks(out),
        _frontier(out),
        Section(
            "Listening study (section 4.3, table 5)",
            "Not reproduced, because it needs listeners. The values are the paper's; smart study holds a new study.",
            [("", "paper"), *LISTENING.items()],
        ),
    ]


def _training(out: Path, config: Config) -> Section:
    rows: list[Sequence[str]] = [
        ("run", "iterations", "beta", "minutes", "reward of the base", "reward after", "difference")
    ]
    for name, one in variants(config, "").items():
        summary = read_json(out / name / "summary.json")
        count = min(summary[which]["n"] for which in ("base", "tuned"))
        rows.append(
            (
                name,
                str(one.grpo.iterations),
                f"{one.grpo.beta:g}",
                number(duration(out / name), 1),
                *(
                    _reward(summary[which], count, RATING if which != "difference" else differences(RATING))
                    for which in ("base", "tuned", "difference")
                ),
            )
        )
    return Section(
        "Tuning (sections 3.5, 5.2 and 5.3; figure 2)",
        f"The paper: {ITERATIONS} iterations in {MINUTES} minutes on one NVIDIA GeForce RTX 3090. Minutes "
        "measured here are from a different machine. Rewards are means of fresh samples, with 95% intervals.",
        rows,
        [
            (
                "Figure 2: mean reward by iteration, with one standard deviation",
                out / "report" / "reward-by-iteration.png",
            )
        ],
    )


def _reward(found: dict[str, float], count: int, scale: Scale) -> str:
    """A mean reward with its interval by Student's t, as with the fewer samples of the two models."""
    value, error = found["reward"], found["standard_error"]
    known = count >= FEWEST and error > 0
    estimate = by_student(value, error, count - 1, count, scale) if known else without(value, count, TOO_FEW)
    return with_interval(estimate._asdict())


def _table_1(out: Path, kind: str, real: bool) -> Section:
    ours: dict[str, dict[str, str]] = {}
    for line in _csv(out / "table-1" / "ratings.csv"):
        ours.setdefault(Path(line["file"]).stem, {})[line["rating"].rpartition(".")[2]] = line["mean"]
    rows: list[Sequence[str]] = [("audio", *(f"{axis}: paper / here" for axis in AXES), "verdict")]
    for name, published in TABLE_1.items():
        mine = [ours.get(name, {}).get(axis, "") for axis in AXES]
        cells = [
            f"{value:.2f} / {number(float(here)) if here else '-'}" for value, here in zip(published, mine, strict=True)
        ]
        rows.append((name, *cells, _close(name, mine) if real else ""))
    for name, ratings in ours.items():
        if name not in TABLE_1:
            mine = [ratings.get(axis, "") for axis in AXES]
            rows.append((name, *(f"- / {number(float(here)) if here else '-'}" for here in mine), ""))
    words = f"Here: {kind}. The package has no recordings; yours fills a row if its file has that name."
    if not real:
        words += " No verdict, because these are not the published weights of Audiobox Aesthetics."
    return Section("Table 1: ratings of recordings, silence and noise", words, rows)


def _close(row: str, here: Sequence[str]) -> str:
    if not all(here):
        return ""
    worst = max(abs(value - float(mine)) for value, mine in zip(TABLE_1[row], here, strict=True))
    return f"{'agrees' if worst <= tolerance(row) else 'differs'} (at most {worst:.2f} apart)"


def _table_2(out: Path, real: bool) -> Section:
    axes = (*AXES, "mean")
    ours: dict[str, dict[str, dict[str, str]]] = {}
    for line in _csv(out / "table-2" / "soundfonts.csv"):
        ours.setdefault(line["soundfont"], {})[line["rating"].rpartition(".")[2]] = line
    rows: list[Sequence[str]] = [("soundfont", *(f"{axis}: paper / here" for axis in axes), "verdict")]
    for name in dict.fromkeys((*TABLE_2, *ours)):
        lines = [ours.get(name, {}).get(axis) for axis in axes]
        published = [f"{value:.2f}" for value in TABLE_2[name]] if name in TABLE_2 else ["-"] * len(axes)
        cells = [
            f"{value} / {_here(line, 'mean', '') if line else '-'}"
            for value, line in zip(published, lines, strict=True)
        ]
        inside = [
            float(line["low"]) <= float(line["paper"]) <= float(line["high"])
            for line in lines
            if line and line["paper"] and line["low"]
        ]
        rows.append((name, *cells, f"{sum(inside)} of {len(inside)} agree" if real and inside else ""))
    return Section(
        "Table 2: the same pieces with several soundfonts",
        "The paper's ten pieces are not known, so these are others. A verdict says whether the paper's mean lies "
        "in the 95% interval of the mean here; it is given only for the published weights.",
        rows,
        # of one soundfont it would be a single dot
        [("Means, and rank correlation over pieces", out / "table-2" / "soundfonts.png")] if len(ours) > 1 else [],
    )


def _effects(out: Path, judged: bool) -> list[Section]:
    found = []
    for name, prompts, figures in (("procedural", "Procedural", "3, 4 and 6"), ("dataset", "Dataset", "7")):
        rows: list[Sequence[str]] = [("model", "measure", "the paper", "here: difference to the base", "verdict")]
        for line in _csv(out / "report" / f"{name}-paper.csv"):
            here = _here(line, "difference", "difference_")
            rows.append((line["after"], line["measure"], line["paper"], here, line["verdict"] if judged else ""))
        pictures = [
            (f"{what}, {name} prompts", out / "report" / f"{name}-{part}.png")
            for part, what in (("ratings", "Ratings"), ("features", "MIDI features"), ("rolls", "Average piano rolls"))
        ]
        found.append(
            Section(
                f"{prompts} prompts: effects of tuning (section 5.1; figures {figures})",
                "The paper gives no numbers for these, only directions."
                + ("" if judged else " No verdict, because the base or the reward is not the paper's."),
                rows,
                pictures,
            )
        )
    return found


def _hacks(out: Path) -> Section:
    rows: list[Sequence[str]] = [("probe", "kind", "rating", "mean", "against the pieces", "verdict")]
    for line in _csv(out / "hacks" / "hacks.csv"):
        mean, apart = _here(line, "mean", ""), _here(line, "difference", "difference_")
        rows.append((line["probe"], line["kind"], line["rating"], mean, apart, line["verdict"]))
    return Section(
        "Can the reward be fooled by non-music?",
        "Not in the paper. Each probe is made from each of the base's pieces and compared with it.",
        rows,
        [("Ratings of probes", out / "hacks" / "hacks.png")],
    )


def _csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _here(line: dict[str, str], name: str, prefix: str) -> str:
    """``name`` of a table row, with its interval from the columns ``<prefix>low`` and ``<prefix>high``."""
    middle, low, high = (number(float(line[key] or "nan"), 3) for key in (name, f"{prefix}low", f"{prefix}high"))
    return f"{middle} [{low}, {high}]"


def _frontier(out: Path) -> Section:
    summary = read_json(out / "frontier" / "summary.json")
    rows: list[Sequence[str]] = [
        ("run", "checkpoint to keep", "reward, against the base", "second score, against the base", "collapsed")
    ]
    for name, one in summary["runs"].items():
        gone = one["collapsed"]
        rows.append(
            (
                name,
                f"iteration {one['keep']}" if one["keep"] else "the base",
                with_interval(one["reward_against_base"]),
                with_interval(one["judge_against_base"]),
                f"{len(gone)}, from iteration {gone[0]['step']}: {gone[0]['why']}" if gone else "none",
            )
        )
    words = [f"Second score: {summary['judge']}. {summary['prompts']} held-out prompts. The rule: {summary['rule']}"]
    words += [
        f"{fit['series']}, {fit['measure']}: alpha {with_interval(fit['alpha'])}, beta {with_interval(fit['beta'])}."
        if fit["alpha"]
        else f"{fit['series']}, {fit['measure']}: no law is fitted ({fit['why_not']})."
        for fit in summary["fits"]
    ]
    return Section(
        "How far to optimise (section 5.2)",
        "\n".join(words),
        rows,
        [
            (
                "Reward, second score and diversity against KL; laws of Gao, Schulman and Hilton (2023)",
                out / "frontier" / "frontier.png",
            )
        ],
    )


def write_page(steps: Sequence[Step], out: Path, book: Book, config: Config, found: Found, *, smoke: bool) -> Path:
    """Write ``index.html``: one file that contains its figures and links to their data."""
    import jinja2

    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["embed"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    page.filters["relative"] = lambda path: str(path.relative_to(out))
    page.globals["siblings"] = lambda path: sorted(
        other for other in path.parent.glob(f"{path.stem}.*") if other.suffix in (".pdf", ".csv", ".parquet")
    )
    text = page.from_string(template).render(
        smoke=smoke,
        config=config,
        reward=found.reward,
        is_the_papers=bool(getattr(found.reward, "is_published", False)) and config.model.base == BASE,
        sections=sections(out, config, found),
        steps=[
            (step, _clock(book.rows[step.name]["seconds"]), " ".join(("python -m", *step.words)).replace(OUT, "OUT"))
            for step in steps
        ],
    )
    write_atomically(out / PAGE, text.encode())
    return out / PAGE
