"""``smart evaluate report TABLE... --out FOLDER``: the paper's figures and their numbers, on one page.

For each table from ``smart evaluate sample`` it draws histograms of every rating (paper figures 3 and 7), of the eight
MIDI features (4 and 7), and of the first rating with average piano rolls (6), and computes means, comparisons of each
system with the first, diversity, and counts of failures. For each ``--run`` it draws the reward by iteration (2). Every
number has its n and a 95% interval; every figure is saved as PNG and PDF, with its data as CSV. ``index.html`` is a
single file that loads nothing else.
"""

import base64
import math
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from smart import UserError, plots
from smart.corpus import Corpus
from smart.diversity import BEATS, PER_BEAT, kernel, nearest, piano_roll, summary, vendi_score
from smart.evaluate.sample import read_settings
from smart.evaluate.statistics import RESAMPLES, Estimate, Paired, holm, jackknife, mean, paired
from smart.files import write_atomically
from smart.run import progress, read_metrics
from smart.tokens import FILE_NAME, decode, load_tokenizer

Floats = npt.NDArray[np.float64]


class Measure(NamedTuple):
    """One number per piece: its name in tables and figures, and its change in the paper (+1, -1, 0: not mentioned)."""

    title: str
    unit: str
    paper: int = 0
    words: str = ""  # the paper's words for it


FEATURES = {
    "number_of_notes": Measure("Number of notes", "notes", 1, "more, concentrated around 70"),
    "polyphony_rate": Measure("Polyphony rate", "share of time with more than two pitches", 1, "more polyphony"),
    "empty_beat_rate": Measure("Empty-beat rate", "share of quarter notes without a note", -1, "falls to zero"),
    "mean_pitch": Measure("Mean pitch", "MIDI pitch", -1, "more pitches in the lower octaves"),
    "pitch_range": Measure("Pitch range", "semitones", 1, "a larger range"),
    "scale_consistency": Measure("Scale consistency", "share of notes in the best scale", -1, "heavier lower tail"),
    "mean_velocity": Measure("Mean velocity", "MIDI velocity", -1, "lower velocities"),
    "velocity_range": Measure("Velocity range", "MIDI velocity", 1, "a larger range"),
}
# undefined for a piece without notes
SOUNDING = ("polyphony_rate", "pitch_range", "scale_consistency", "velocity_range")
RATINGS = {
    "CE": "raised; published clips 4.5 to 7.5, tuned 7.1 to 7.9",
    "CU": "raised, though not optimised",
    "PC": "raised, though not optimised",
    "PQ": "raised, though not optimised",
}
DIVERSITY = {
    "vendi": "Vendi score of the notes (effective number of different pieces)",
    "vendi_audio": "Vendi score of the audio",
    "distance": "Mean distance between two piano rolls (0 to 1)",
    "distinct_4grams": "Share of note 4-grams that are distinct",
    "empty_rate": "Share of pieces without notes",
    "nearest": "Similarity of the opening to the nearest training piece (0 to 1, in the best transposition)",
    "copied": "Share of nine-note passages that also occur in a training piece",
    "longest": "Length in notes of the longest passage that also occurs in one training piece",
}
KINDS = {
    "procedural": "Procedural prompts",
    "first_note": "Procedural prompts with a first note",
    "bos": "No prompt",
    "dataset": "Prompts from the dataset",
}


class Sample(NamedTuple):
    """One table, split by system; every list is in the order of the prompts."""

    path: Path
    provenance: dict[str, Any]
    systems: list[str]
    axes: list[str]  # "reward.axis"
    measures: dict[str, dict[str, Floats]]  # system -> measure -> (N,), NaN where undefined
    columns: dict[str, dict[str, list[Any]]]  # system -> column -> N values
    scores: dict[str, list[Any]]  # system -> N symusic.Score

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.provenance["settings"]
        return found

    @property
    def name(self) -> str:
        return self.path.stem


def read(path: Path) -> Sample:
    """Read and decode a table. Raises ``UserError`` if it is not one, or if a system lacks some of the prompts."""
    provenance = read_settings(path)
    table = pq.read_table(path)
    settings = provenance["settings"]
    axes = [f"{name}.{axis}" for name, reward in settings["rewards"].items() for axis in reward["axes"]]
    systems: list[str] = settings["systems"]
    names = np.array(table["system"].to_pylist())
    columns, measures = {}, {}
    scores: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder, progress(total=table.num_rows, unit="piece") as bar:
        for system in systems:
            mine = table.filter(names == system)
            columns[system] = {name: mine[name].to_pylist() for name in mine.column_names}
            if columns[system]["prompt"] != list(range(settings["count"])):
                raise UserError(
                    f"{path}: {system} does not have the prompts 0 to {settings['count'] - 1}; sample it again"
                )
            Path(folder, FILE_NAME).write_text(provenance["tokenizers"][system], encoding="utf-8")
            tokenizer = load_tokenizer(folder)
            scores[system] = []
            for tokens in columns[system]["tokens"]:
                scores[system].append(decode(tokenizer, tokens))
                bar.update()
            measures[system] = _measures(columns[system], axes)
    return Sample(path, provenance, systems, axes, measures, columns, scores)


def _measures(columns: Mapping[str, list[Any]], axes: Sequence[str]) -> dict[str, Floats]:
    def column(name: str) -> Floats:
        return np.array(columns[name], np.float64)

    def of_each(name: str) -> Floats:
        return np.array([np.mean(part) if part else math.nan for part in columns[name]])

    found = {axis: column(axis) for axis in axes}
    for name in FEATURES:
        if name.startswith("mean_"):
            found[name] = of_each({"mean_pitch": "pitches", "mean_velocity": "velocities"}[name])
        else:
            found[name] = column(name)
            if name in SOUNDING:
                found[name] = np.where(columns["empty"], math.nan, found[name])
    return found


# --- Figures ------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A figure on the page."""

    title: str
    path: Path  # the PNG
    alt: str
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()

    @property
    def width(self) -> float:
        """Width of the figure as drawn, in rem (16 pixels), from the PNG's header."""
        (pixels,) = struct.unpack(">I", self.path.read_bytes()[16:20])
        return round(pixels / plots.DPI * 6, 2)


def _means(sample: Sample, measure: str) -> str:
    parts = [f"{name} {np.nanmean(values):.3g}" for name, values in _by_system(sample, measure).items()
             if np.isfinite(values).any()]  # fmt: skip
    return "means: " + ", ".join(parts) if parts else "no values"


def _by_system(sample: Sample, measure: str) -> dict[str, Floats]:
    return {name: sample.measures[name][measure] for name in sample.systems}


def _rating_panel(sample: Sample, axis: str) -> plots.Panel:
    values = _by_system(sample, axis)
    return plots.Panel(axis, "rating (1 to 10)", "share of pieces", values, plots.edges_of(values.values()))


def _feature_panels(sample: Sample) -> list[plots.Panel]:
    """The paper's eight features in its order; for pitch and velocity the distribution over all notes."""
    panels = []
    for name, measure in FEATURES.items():
        if name.startswith("mean_"):
            kind = {"mean_pitch": "pitches", "mean_velocity": "velocities"}[name]
            values = {
                system: np.array([v for part in sample.columns[system][kind] for v in part], np.float64)
                for system in sample.systems
            }
            edges = np.arange(20.5, 109, 2.0) if kind == "pitches" else np.arange(0.0, 129, 4.0)
            title = {"pitches": "Pitch distribution", "velocities": "Velocity distribution"}[kind]
            panels.append(plots.Panel(title, measure.unit, "share of notes", values, edges))
        else:
            values = _by_system(sample, name)
            # the vocabulary's velocities are 4 apart, and so are their differences
            edges = np.arange(-2.0, 131, 4.0) if name == "velocity_range" else plots.edges_of(values.values())
            panels.append(plots.Panel(measure.title, measure.unit, "share of pieces", values, edges))
    return panels


def draw(sample: Sample, out: Path) -> dict[str, Picture]:
    """Draw the three figures of a table."""
    dataset = sample.settings["prompts"] == "dataset"
    count = sample.settings["count"]
    pictures = {}
    if sample.axes:
        panels = [_rating_panel(sample, axis) for axis in sample.axes]
        path = plots.histograms(panels, out / f"{sample.name}-ratings")[0]
        alt = "; ".join(f"histogram of {axis}, {_means(sample, axis)}" for axis in sample.axes)
        pictures["ratings"] = Picture(
            "Ratings", path, alt, f"Ratings of {count} pieces per system (the paper's figure {7 if dataset else 3})."
        )
    path = plots.histograms(_feature_panels(sample), out / f"{sample.name}-features")[0]
    alt = "; ".join(f"{measure.title}, {_means(sample, name)}" for name, measure in FEATURES.items())
    pictures["features"] = Picture(
        "MIDI features", path, f"eight histograms: {alt}",
        f"The eight MIDI features of {count} pieces per system (the paper's figure {7 if dataset else 4}).",
    )  # fmt: skip
    if sample.axes:
        rolls = {name: np.mean([piano_roll(score) for score in sample.scores[name]], axis=0) for name in sample.systems}
        path = plots.rewards_and_rolls(
            _rating_panel(sample, sample.axes[0]), rolls, out / f"{sample.name}-rolls", per_beat=PER_BEAT
        )[0]
        alt = f"histograms of {sample.axes[0]}, {_means(sample, sample.axes[0])}; below them average piano rolls: " + (
            "; ".join(
                f"in {name} at most {100 * roll.max():.0f}% of pieces share a pitch at one time"
                for name, roll in rolls.items()
            )
        )
        pictures["rolls"] = Picture(
            "Rating and average piano roll", path, alt,
            f"Top: {sample.axes[0]}. Bottom: the share of pieces in which a pitch sounds, in the first {BEATS} "
            "quarter notes (the paper's figure 6). A sharper pattern means that the pieces are more alike.",
        )  # fmt: skip
    return pictures


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
            pairs = [paired(sample.measures[first][m], sample.measures[other][m], seed=seed) for m in family]
            corrected = [holm([pair.t_test for pair in pairs]), holm([pair.wilcoxon for pair in pairs])]
            found += [Comparison(first, other, *parts) for parts in zip(family, pairs, *corrected, strict=True)]
    return found


def diversity(sample: Sample, system: str) -> dict[str, Estimate]:
    """Measures of how varied a system's pieces are, with jackknife intervals."""
    scores, clips = sample.scores[system], sample.columns[system]["audio_vector"]

    def measure(rows: Sequence[int]) -> dict[str, float]:
        found = summary([scores[row] for row in rows])
        heard = [clips[row] for row in rows if clips[row] is not None]
        return found | ({"vendi_audio": vendi_score(kernel(np.array(heard)))} if heard else {})

    found = jackknife(measure, len(scores))
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
    return {
        system: {name: mean(values[places], seed=seed) for name, values in table.items()}
        for system, places in mine.items()
    }


def verdict(sign: int, difference: Estimate) -> str:
    """Whether the difference goes the same way as in the paper (``sign``), by its interval."""
    if not math.isfinite(difference.low):
        return "cannot be told"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    return "as in the paper" if (difference.value > 0) == (sign > 0) else "the other way"


def title_of(measure: str) -> str:
    return FEATURES[measure].title if measure in FEATURES else measure


def paper_rows(comparisons: Sequence[Comparison], means: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """The paper's findings next to those here, one row per comparison that the paper makes."""
    rows = []
    for c in comparisons:
        axis = c.measure.rpartition(".")[2]
        sign, words = (1, RATINGS.get(axis, "")) if c.measure not in FEATURES else FEATURES[c.measure][2:]
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
                    "verdict": verdict(sign, c.found.difference),
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
    """The estimate as "value [low, high]"."""
    if not math.isfinite(estimate.low):
        return number(estimate.value)
    largest = max(map(abs, estimate[:3]))
    value, low, high = (number(part, largest) for part in estimate[:3])
    return f"{value} [{low}, {high}]"


def p_value(value: float) -> str:
    return "–" if not math.isfinite(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _flat(prefix: str, estimate: Estimate) -> dict[str, float]:
    return {prefix: estimate.value, f"{prefix}_low": estimate.low, f"{prefix}_high": estimate.high}


def section(sample: Sample, out: Path, *, seed: int = 1, corpus: Corpus | None = None) -> dict[str, Any]:
    """Everything that the page shows about a table; writes its figures and CSV files into ``out``."""
    names = [*sample.axes, *FEATURES]
    means = {
        measure: {system: mean(sample.measures[system][measure], seed=seed) for system in sample.systems}
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
    seen = paper_rows(comparisons, means)
    flat = [row | _flat("difference", row["difference"]) for row in seen]
    plots.write_csv(out / f"{sample.name}-paper.csv", flat)
    counts = [
        {
            "system": system,
            "pieces": len(columns["prompt"]),
            **{name: sum(columns[name]) for name in ("failed", "silent", "empty")},
            "length": mean(columns["length"], seed=seed),
        }
        for system, columns in sample.columns.items()
    ]
    settings = sample.settings
    return {
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
        "paper": seen,
        "pictures": draw(sample, out),
        "stand_ins": [name for name, reward in settings["rewards"].items() if reward["stand_in"]],
    }


def run_picture(runs: Sequence[Path], out: Path) -> Picture:
    """Draw the paper's figure 2 for one or more runs."""
    metrics = {run.resolve().name: read_metrics(run) for run in runs}
    if len(metrics) < len(runs):
        raise UserError("--run: two runs have the same name; rename one of the folders")
    for name, rows in metrics.items():
        if not any(row.get("reward/mean") is not None for row in rows):
            raise UserError(f"--run {name}: its metrics have no reward; expected a tuning run, made by smart.grpo")
    path = plots.rewards_by_iteration(metrics, out / "reward-by-iteration", "reward (1 to 10)")[0]
    parts = []
    for name, rows in metrics.items():
        values = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
        parts.append(f"{name} from {np.mean(values[:5]):.2f} to {np.mean(values[-5:]):.2f} in {len(values)} iterations")
    return Picture(
        "Reward by iteration",
        path,
        f"curves of the mean reward by iteration (means of the first and last five): {'; '.join(parts)}",
        "Mean reward of each iteration's completions, plus and minus one standard deviation (the paper's figure 2).",
    )


def report(
    *,
    tables: tuple[Path, ...],
    runs: tuple[Path, ...],
    corpus: Path | None,
    out: Path,
    seed: int,
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
        picture = run_picture(runs, out) if runs else None
        page = render([section(read(path), out, seed=seed, corpus=opened) for path in tables], picture)
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
    environment.filters |= {"number": number, "interval": interval, "p": p_value, "title_of": title_of}
    return environment.get_template("report.html").render(
        sections=sections, runs=runs, diversity=DIVERSITY, resamples=RESAMPLES
    )
