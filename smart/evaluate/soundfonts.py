"""How ratings depend on the soundfont (paper table 2): the same pieces are rendered with each soundfont and rated.

    python -m smart.evaluate soundfonts --out fonts --soundfonts timgm fluidr3 my-midi/*.mid

It answers two questions: how much the mean ratings differ between soundfonts, and whether soundfonts agree on the
ranking of the pieces, which is all that a reward normalised within a group can use. Agreement is Spearman's rank
correlation of the ratings for each pair of soundfonts, and Kendall's W over all of them. Intervals are 95%, by a
bootstrap over pieces, or by Student's t for few pieces; those of ranks take at least ten pieces. Differences to the
first soundfont are taken piece by piece.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
from scipy import stats

from smart import UserError, plots, require
from smart.corpus import MANIFEST, Corpus
from smart.evaluate import statistics
from smart.evaluate.ratings import (
    DIFFERENCE,
    MEAN,
    MIDI,
    UNKNOWN,
    Kept,
    Row,
    announce,
    columns,
    estimate,
    load_rewards,
    rate_scores,
    read_score,
    table,
    with_interval,
    writing,
)
from smart.files import sha256
from smart.intervals import FEWEST
from smart.model import pick_device
from smart.published import AXES, TABLE_2
from smart.render import checked_soundfont, open_renderer, short_name
from smart.reward import read_options
from smart.run import check_packages, digests, files_in
from smart.style import own_style
from smart.tokens import decode

Ratings = npt.NDArray[np.float64]

PAPER = {name: dict(zip((*AXES, MEAN), means, strict=True)) for name, means in TABLE_2.items()}


class Font(NamedTuple):
    """A soundfont, the name that tables show, and its short name if it has one."""

    name: str
    file: Path
    known: str | None


def find_fonts(names: Sequence[str]) -> list[Font]:
    """Find the soundfonts of ``names`` and give each a unique name. Raises ``UserError`` for a missing one."""
    fonts = []
    for text in names:
        file = checked_soundfont(text)
        fonts.append(Font(short_name(file) or file.stem, file, short_name(file)))
    shown = [font.name for font in fonts]
    return [
        font._replace(name=str(font.file)) if shown.count(font.name) > 1 else font for font in fonts
    ]  # soundfonts with the same name are shown by path


def from_corpus(folder: Path, split: str, count: int, seed: int) -> dict[str, Any]:
    """``count`` different pieces of a corpus, chosen at random by ``seed``, by name; all if it has fewer."""
    corpus = Corpus(folder)
    pieces, tokenizer = corpus.split(split), corpus.tokenizer
    if not len(pieces):
        raise UserError(f"corpus {folder}: its split {split!r} has no pieces; choose another --split")
    chosen = np.random.default_rng(seed).permutation(len(pieces))[:count]
    return {f"{split} {row}": decode(tokenizer, pieces[row]) for row in sorted(chosen.tolist())}


def spearman(a: Ratings, b: Ratings) -> Ratings:
    """Rank correlation along the last axis of (..., n) arrays; NaN if one is constant."""
    a, b = (stats.rankdata(values, axis=-1) for values in (a, b))
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    size = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), size, out=np.full(size.shape, math.nan), where=size > 0)


def _spearman_of(ratings: Ratings, one: int, two: int) -> Ratings:
    return spearman(ratings[..., one, :], ratings[..., two, :])


def kendall_w(ratings: Ratings) -> Ratings:
    """Kendall's coefficient of concordance of m raters over n pieces (..., m, n), 0 to 1, corrected for ties.

    NaN if every rater gives all pieces the same rating. W = 12 S / (m^2 (n^3 - n) - m sum(t^3 - t)).
    """
    raters, count = ratings.shape[-2:]
    ranks = stats.rankdata(ratings, axis=-1)
    spread = ((ranks.sum(axis=-2) - raters * (count + 1) / 2) ** 2).sum(axis=-1)
    # t: how many pieces tie with a piece, itself included; t^2 - 1 over pieces sums to t^3 - t over groups of ties
    tied = (ratings[..., :, None] == ratings[..., None, :]).sum(axis=-1).astype(float)
    whole = raters**2 * (count**3 - count) - raters * (tied**2 - 1).sum(axis=(-2, -1))
    return np.divide(12 * spread, whole, out=np.full(np.shape(whole), math.nan), where=whole > 0)


def agreement(fonts: Sequence[Font], column: str, ratings: Ratings) -> list[Row]:
    """Spearman's correlation of each pair of soundfonts, and Kendall's W of all; ``ratings`` is (fonts, pieces)."""
    known = ratings[:, np.isfinite(ratings).all(axis=0)]  # (fonts, n): the pieces rated with every soundfont
    rows = []

    def add(what: str, a: str, b: str, measure: Callable[[Ratings], Ratings]) -> None:
        """``measure`` maps ratings (..., fonts, n) to (...)."""

        def of_pieces(numbers: Ratings) -> Ratings:
            return measure(np.moveaxis(known[:, numbers.astype(int)], 0, -2))

        scale = (-1.0, 1.0) if what == "spearman" else (0.0, 1.0)
        found = statistics.bootstrap(np.arange(known.shape[1], dtype=float), of_pieces, seed=1, scale=scale)
        if found.n < FEWEST:  # two pieces have the same ranking or the opposite one
            found = found._replace(value=math.nan)
        rows.append(
            {"rating": column, "measure": what, "a": a, "b": b, "n": found.n, "mean": found.value, "low": found.low}
            | {"high": found.high}
        )

    for one in range(len(fonts)):
        for two in range(one + 1, len(fonts)):
            pair = partial(_spearman_of, one=one, two=two)
            add("spearman", fonts[one].name, fonts[two].name, pair)
    if len(fonts) > 1:
        add("kendall_w", "all", "", kendall_w)
    return rows


def compare_soundfonts(
    *,
    files: tuple[str, ...],
    given: tuple[str, ...],
    corpus: Path | None,
    split: str,
    count: int,
    seed: int,
    kinds: tuple[str, ...],
    options: tuple[str, ...],
    device: str,
    seconds: float,
    sample_rate: int,
    pedal: bool,
    backend: str,
    workers: int,
    out: Path,
) -> None:
    """Write tables and figure into ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes."""
    midi = [Path(text) for text in files if text.lower().endswith(MIDI)]
    names = [*given, *(text for text in files if not text.lower().endswith(MIDI))]
    if bool(midi) == (corpus is not None):
        raise UserError("give either MIDI files or --corpus, not both")
    if corpus is not None and not pedal:
        raise UserError("--no-pedal is for MIDI files: how a corpus reads the pedal is decided when it is built")

    def pieces() -> dict[str, Any]:
        if corpus is not None:
            return from_corpus(corpus, split, count, seed)
        return {str(path): read_score(path, pedal=pedal) for path in midi}

    fonts, rewards, scores, _ = require(
        lambda: find_fonts(names), lambda: load_rewards(kinds, options, device), pieces, check_packages
    )
    announce(rewards)
    settings = {
        "soundfonts": {font.name: sha256(font.file) for font in fonts},
        "rewards": {reward.name: reward.provenance for reward in rewards},
        **({"reward_files": reward_files} if (reward_files := digests(files_in(read_options(options)))) else {}),
        "pieces": {str(path): sha256(path) for path in midi}
        or [str(corpus), split, count, seed, sha256(Path(str(corpus)) / MANIFEST)],
        "seconds": seconds,
        "sample_rate": sample_rate,
        "backend": backend,
        **({} if pedal else {"pedal": False}),
    }
    kept = Kept(out, settings, list(scores))
    ratings: dict[str, dict[str, Ratings]] = {}
    for font in fonts:

        def work(font: Font = font) -> dict[str, Ratings]:
            with open_renderer(
                backend,
                font.file,
                sample_rate=sample_rate,
                seconds=seconds,
                workers=workers or None,
                deadline=60 + seconds,
                device=pick_device(device),
            ) as pool:
                return rate_scores(list(scores.values()), pool, rewards, sample_rate, label=font.name)

        ratings[font.name] = kept.get(font.name, work)
    means = []
    for column in columns(rewards):
        for font in fonts:
            found = ratings[font.name][column]
            difference = estimate(found - ratings[fonts[0].name][column], DIFFERENCE)
            means.append(
                {
                    "soundfont": font.name,
                    "rating": column,
                    **estimate(found),
                    "difference": difference["mean"],
                    "difference_low": difference["low"],
                    "difference_high": difference["high"],
                    "paper": _paper(font, column),
                }
            )
    agreed = [
        row
        for column in columns(rewards)
        for row in agreement(fonts, column, np.stack([ratings[font.name][column] for font in fonts]))
    ]
    with writing(out):
        plots.write_csv(out / "agreement.csv", agreed)
        _draw(out / "soundfonts", fonts, columns(rewards), means, agreed)
    click.echo(f"{len(scores)} pieces, the first {seconds:g} s; 95% intervals over pieces")
    click.echo(f"means, and mean differences to {fonts[0].name} piece by piece:")
    click.echo(_means_shown(means))
    if len(fonts) > 1:
        click.echo("agreement on the ranking of the pieces:")
        click.echo(_agreement_shown(agreed))
    if not all(math.isfinite(row["low"]) for row in [*means, *agreed]):
        click.echo(UNKNOWN)
    click.echo(f"wrote soundfonts.csv, agreement.csv, ratings.csv, soundfonts.png and soundfonts.pdf to {out}")


def _paper(font: Font, column: str) -> float:
    """The mean in the paper's table 2; NaN if it has none."""
    kind, _, axis = column.partition(".")
    return PAPER.get(font.known or "", {}).get(axis, math.nan) if kind == "audiobox" else math.nan


def _means_shown(rows: Sequence[Row]) -> str:
    """One line per soundfont, one column per rating."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["soundfont"], {"soundfont": row["soundfont"]})
        paper = f" (paper {row['paper']:.2f})" if math.isfinite(row["paper"]) else ""
        line[row["rating"]] = with_interval(row) + paper
        if row["soundfont"] != rows[0]["soundfont"]:
            difference = {"mean": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
            line[row["rating"]] += f", {with_interval(difference, sign=True)}"
    return table(list(lines.values()))


def _agreement_shown(rows: Sequence[Row]) -> str:
    names = {"spearman": "Spearman", "kendall_w": "Kendall's W"}
    return table(
        [
            {
                "rating": row["rating"],
                "measure": names[row["measure"]],
                "soundfonts": f"{row['a']}, {row['b']}" if row["b"] else row["a"],
                "value": with_interval(row),
                "n": row["n"],
            }
            for row in rows
        ]
    )


@own_style
def _draw(stem: Path, fonts: Sequence[Font], names: Sequence[str], means: list[Row], agreed: list[Row]) -> None:
    """Draw each rating's mean by soundfont (top) and its matrix of Spearman correlations (bottom)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.2 * len(names), 5), 6.5), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    labels = [font.name for font in fonts]
    for place, column in enumerate(names):
        top, bottom = grid[:, place]
        rows = [row for row in means if row["rating"] == column]
        for at, row in enumerate(rows):
            top.plot(at, row["mean"], "o", color="C0")
            top.plot([at, at], [row["low"], row["high"]], color="C0")
            if math.isfinite(row["paper"]):
                top.plot(at, row["paper"], "x", color="C1", label="paper" if at == 0 else None)
        top.set_xticks(range(len(rows)), labels, rotation=45, ha="right")
        top.set_title(f"{column}, n = {max(row['n'] for row in rows)}")
        top.grid(alpha=0.3)
        matrix = np.eye(len(fonts))
        for row in agreed:
            if row["rating"] == column and row["measure"] == "spearman":
                one, two = labels.index(row["a"]), labels.index(row["b"])
                matrix[one, two] = matrix[two, one] = row["mean"]
        bottom.imshow(matrix, vmin=-1, vmax=1, cmap="coolwarm_r")
        for one in range(len(fonts)):
            for two in range(len(fonts)):
                bottom.text(
                    two, one, f"{matrix[one, two]:.2f}", ha="center", va="center", fontsize="small", color="white"
                )
        bottom.set_xticks(range(len(fonts)), labels, rotation=45, ha="right")
        bottom.set_yticks(range(len(fonts)), labels)
        bottom.set_title("Spearman over pieces", fontsize="small")
    plots.save(figure, stem, means)
