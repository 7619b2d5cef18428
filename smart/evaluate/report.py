"""``smart evaluate report TABLE... --out FOLDER``: the paper's figures and their numbers, on one page.

For each table from ``smart evaluate sample`` it draws histograms of every rating (paper figures 3 and 7), of the eight
MIDI features (4 and 7), and of the first rating with average piano rolls (6), and computes means, comparisons of each
system with the first, diversity, and counts of failures. For each ``--run`` it draws the reward by iteration (2). Every
number has its n and a 95% interval; every figure is saved as PNG and PDF, with its data as CSV. ``index.html`` is a
single file that loads nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from smart import UserError, plots
from smart.corpus import Corpus
from smart.diversity import kernel, nearest, summary, vendi_score
from smart.evaluate.distances import distances
from smart.evaluate.figures import Picture, draw, run_picture
from smart.evaluate.heard import play
from smart.evaluate.pieces import DIVERSITY, FEATURES, KINDS, RATINGS, Sample, read, scale_of
from smart.evaluate.statistics import FEW, RESAMPLES, Paired, holm, jackknife, mean, paired
from smart.files import write_atomically
from smart.intervals import FEWEST, Estimate, Scale
from smart.run import check_names, progress
from smart.tokens import decode

# --- Numbers ------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A system against the first on one measure; p-values are corrected within ratings and within features."""

    before: str
    after: str
    measure: str
    found: Paired
    t_test: float
    wilcoxon: float


def compare(sample: Sample, *, seed: int = 1) -> list[Comparison]:
    """Compare every other system with the first, prompt by prompt, on every measure."""
    first, *others = sample.systems
    found = []
    for other in others:
        for family in (sample.axes, list(FEATURES)):
            pairs = [
                paired(sample.measures[first][m], sample.measures[other][m], seed=seed, scale=scale_of(m))
                for m in family
            ]
            # a measure that never differs is not tested; the others count for both tests
            tested = sum(math.isfinite(pair.wilcoxon) for pair in pairs)
            corrected = [holm([getattr(pair, test) for pair in pairs], tested) for test in ("t_test", "wilcoxon")]
            found += [Comparison(first, other, *parts) for parts in zip(family, pairs, *corrected, strict=True)]
    return found


def diversity(sample: Sample, system: str) -> dict[str, Estimate]:
    """Measures of how varied a system's pieces are, with jackknife intervals."""
    scores, clips = sample.scores[system], sample.columns[system]["audio_vector"]

    def measure(rows: Sequence[int]) -> dict[str, float]:
        found = summary([scores[row] for row in rows])
        heard = [clips[row] for row in rows if clips[row] is not None]
        return found | ({"vendi_audio": vendi_score(kernel(np.array(heard)))} if heard else {})

    most: Scale = (1, len(scores))
    scales = {"vendi": most, "vendi_audio": most} | dict.fromkeys(("distance", "distinct_4grams", "empty_rate"), (0, 1))
    found = jackknife(measure, len(scores), scales)
    return {name: found[name] for name in DIVERSITY if name in found}


def closeness(sample: Sample, corpus: Corpus, out: Path, *, seed: int = 1) -> dict[str, dict[str, Estimate]]:
    """How similar each system's pieces are to the corpus's train split; writes a row per piece into ``out``."""
    scores = [score for system in sample.systems for score in sample.scores[system]]
    owners = [(system, row) for system in sample.systems for row in range(len(sample.scores[system]))]
    tokenizer, pieces = corpus.tokenizer, corpus.split("train")
    read = (decode(tokenizer, pieces[row]) for row in range(len(pieces)))
    found = nearest(scores, progress(read, total=len(pieces), unit="piece", desc="training pieces"))
    table = {"nearest": found.similarity, "copied": found.copied, "longest": found.longest}
    plots.write_csv(
        out / f"{sample.name}-nearest.csv",
        [
            {
                "system": system,
                "prompt": sample.columns[system]["prompt"][row],
                "training_piece": int(found.piece[place]),
                **{name: values[place].item() for name, values in table.items()},
            }
            for place, (system, row) in enumerate(owners)
        ],
    )
    mine = {system: [place for place, (owner, _) in enumerate(owners) if owner == system] for system in sample.systems}
    scales: dict[str, Scale] = {"nearest": (0, 1), "copied": (0, 1), "longest": (0, math.inf)}
    return {
        system: {name: mean(values[places], seed=seed, scale=scales[name]) for name, values in table.items()}
        for system, places in mine.items()
    }


def verdict(sign: int, difference: Estimate) -> str:
    """Whether the difference goes the same way as in the paper (``sign``), by its interval."""
    if not math.isfinite(difference.low):
        return "cannot be told"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    return "as in the paper" if (difference.value > 0) == (sign > 0) else "the other way"


def is_judged(settings: Mapping[str, Any], comparison: Comparison) -> bool:
    """Whether both models and, for a rating, the reward are those of the paper; only then can a verdict be given."""
    models, rewards = settings["models"], settings["rewards"]
    ours = all(models[system].get("is_the_papers") is True for system in (comparison.before, comparison.after))
    measure = comparison.measure
    return ours and (measure in FEATURES or rewards[measure.rpartition(".")[0]].get("is_published") is True)


def title_of(measure: str) -> str:
    return FEATURES[measure].title if measure in FEATURES else measure


def paper_rows(
    comparisons: Sequence[Comparison], means: Mapping[str, Mapping[str, Estimate]], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The paper's findings next to those here, one row per comparison that the paper makes.

    ``settings`` are the table's. The verdict is empty where ``is_judged`` is false.
    """
    rows = []
    for c in comparisons:
        axis = c.measure.rpartition(".")[2]
        sign, words = (1, RATINGS.get(axis, "")) if c.measure not in FEATURES else FEATURES[c.measure][3:]
        if words:
            rows.append(
                {
                    "before": c.before,
                    "after": c.after,
                    "measure": title_of(c.measure),
                    "paper": words,
                    "before_mean": means[c.measure][c.before].value,
                    "after_mean": means[c.measure][c.after].value,
                    "difference": c.found.difference,
                    "verdict": verdict(sign, c.found.difference) if is_judged(settings, c) else "",
                }
            )
    return rows


# --- The page -----------------------------------------------------------------------------------------------------


def number(value: float, largest: float | None = None) -> str:
    """``value`` rounded to suit the ``largest`` number of its group; a dash if it is not finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value) if largest is None else largest
    digits = 3 if size < 10 else 2 if size < 100 else 1
    return f"{value:.{digits}f}".replace("-", "−")


def interval(estimate: Estimate) -> str:
    """The estimate as "value [low, high]", or "value (why there is no interval)"."""
    if not math.isfinite(estimate.low):
        known = math.isfinite(estimate.value) and estimate.why
        return f"{number(estimate.value)} ({estimate.why})" if known else number(estimate.value)
    largest = max(map(abs, estimate[:3]))
    value, low, high = (number(part, largest) for part in estimate[:3])
    return f"{value} [{low}, {high}]"


def in_a_cell(estimate: Estimate) -> str:
    """``interval`` for a table: on a narrow screen it breaks before the bracket only."""
    return interval(estimate).replace(", ", ",\u00a0")


def in_a_sentence(c: Comparison, before: Estimate, after: Estimate) -> str:
    """The main result in words: which system is rated higher, and by how much."""
    found = c.found.difference
    means = f"{number(after.value)} against {number(before.value)} on average"
    pairs = f"{found.n} {'pair' if found.n == 1 else 'pairs'}"
    if not math.isfinite(found.low):
        return f"{c.after} is rated {means} ({pairs}), too little to tell a difference from {c.before}."
    low, high = (number(part, max(map(abs, found[:3]))) for part in (found.low, found.high))
    if found.low <= 0 <= found.high:
        return f"{c.after} and {c.before} are rated alike: {means}, a difference between {low} and {high} ({pairs})."
    what = "higher" if found.value > 0 else "lower"
    return f"{c.after} is rated {what} than {c.before}: {means}, a difference between {low} and {high} ({pairs})."


def p_value(value: float) -> str:
    return "–" if not math.isfinite(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _flat(prefix: str, estimate: Estimate) -> dict[str, float]:
    return {prefix: estimate.value, f"{prefix}_low": estimate.low, f"{prefix}_high": estimate.high}


def section(
    sample: Sample, out: Path, *, seed: int = 1, corpus: Corpus | None = None, soundfont: str = "", listen: int = 0
) -> dict[str, Any]:
    """Everything that the page shows about a table; writes its figures and CSV files into ``out``."""
    names = [*sample.axes, *FEATURES]
    means = {
        measure: {
            system: mean(sample.measures[system][measure], seed=seed, scale=scale_of(measure))
            for system in sample.systems
        }
        for measure in names
    }
    comparisons = compare(sample, seed=seed)
    varied = {system: diversity(sample, system) for system in progress(sample.systems, unit="system", desc="diversity")}
    if corpus is not None:
        near = closeness(sample, corpus, out, seed=seed)
        varied = {system: found | near[system] for system, found in varied.items()}
    plots.write_csv(
        out / f"{sample.name}-means.csv",
        [
            {"system": system, "measure": measure, "n": e.n, **_flat("mean", e)}
            for measure, row in means.items()
            for system, e in row.items()
        ],
    )
    plots.write_csv(
        out / f"{sample.name}-comparisons.csv",
        [
            {
                "before": c.before, "after": c.after, "measure": c.measure, "pairs": c.found.difference.n,
                **_flat("difference", c.found.difference), **_flat("cohen_d", c.found.cohen),
                **_flat("cliff_delta", c.found.cliff), "t_test_p": c.found.t_test, "t_test_p_holm": c.t_test,
                "wilcoxon_p": c.found.wilcoxon, "wilcoxon_p_holm": c.wilcoxon,
            }
            for c in comparisons
        ],
    )  # fmt: skip
    plots.write_csv(
        out / f"{sample.name}-diversity.csv",
        [
            {"system": system, "measure": measure, "n": e.n, **_flat("value", e)}
            for system, row in varied.items()
            for measure, e in row.items()
        ],
    )
    far = {} if corpus is None else distances(sample, corpus)
    if far:
        plots.write_csv(
            out / f"{sample.name}-distances.csv",
            [
                {"system": system, "feature": name, "distance": value}
                for system, row in far.items()
                for name, value in row.items()
            ],
        )
    settings = sample.settings
    seen = paper_rows(comparisons, means, settings)
    flat = [row | _flat("difference", row["difference"]) for row in seen]
    plots.write_csv(out / f"{sample.name}-paper.csv", flat)
    counts = [
        {
            "system": system,
            "pieces": len(columns["prompt"]),
            **{name: sum(columns[name]) for name in ("failed", "silent", "empty")},
            "length": mean(columns["length"], seed=seed, scale=(0, math.inf)),
        }
        for system, columns in sample.columns.items()
    ]
    pairs, how_heard = play(sample, out, soundfont=soundfont, count=listen) if listen else ([], "")
    return {
        "pairs": pairs,
        "how_heard": how_heard,
        "name": sample.name,
        "title": KINDS[settings["prompts"]],
        "settings": settings,
        "systems": sample.systems,
        "axes": sample.axes,
        "features": list(FEATURES),
        "means": means,
        "counts": counts,
        "comparisons": {other: [c for c in comparisons if c.after == other] for other in sample.systems[1:]},
        "diversity": varied,
        "distances": far,
        "paper": seen,
        "pictures": draw(sample, out),
        "stand_ins": [name for name, reward in settings["rewards"].items() if reward["stand_in"]],
    }


def report(
    *,
    tables: tuple[Path, ...],
    runs: tuple[Path, ...],
    corpus: Path | None,
    out: Path,
    seed: int,
    soundfont: str,
    listen: int,
) -> None:
    """Write the page into ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if not tables and not runs:
        raise UserError("nothing to report: give a TABLE written by `smart evaluate sample`, or --run FOLDER")
    stems = [path.stem for path in tables]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two tables are called {stem!r}; rename one")
    for path in tables:
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a table written by `smart evaluate sample`")
    opened = Corpus(corpus) if corpus else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_names(stems, out, "the tables")
        picture = run_picture(runs, out) if runs else None
        more: dict[str, Any] = {"seed": seed, "corpus": opened, "soundfont": soundfont, "listen": listen}
        page = render([section(read(path), out, **more) for path in tables], picture)
        write_atomically(out / "index.html", page.encode())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error})") from None
    click.echo(f"report in {out / 'index.html'}")


def render(sections: Sequence[Mapping[str, Any]], runs: Picture | None) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": in_a_cell, "p": p_value, "title_of": title_of}
    environment.globals["in_a_sentence"] = in_a_sentence
    return environment.get_template("report.html").render(
        sections=sections, runs=runs, diversity=DIVERSITY, resamples=RESAMPLES, few=FEW, fewest=FEWEST
    )
