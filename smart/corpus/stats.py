"""Statistics of a corpus: pieces, tokens, lengths and tempos, as text and as a figure (``smart corpus stats``)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smart import UserError
from smart.corpus.shards import SPLITS, Corpus
from smart.files import write_atomically
from smart.style import own_style
from smart.tokens import vocabulary


@dataclass
class Statistics:
    """Counts over a corpus; ``vocabulary_counts`` (V,) is how often each token occurs."""

    tokens_per_piece: npt.NDArray[np.int64]
    vocabulary_counts: npt.NDArray[np.int64]
    notes_per_bar: npt.NDArray[np.int64]  # at index n the number of bars with n notes


def measure(corpus: Corpus, splits: Sequence[str] = SPLITS) -> Statistics:
    """Count tokens and notes per bar, a few hundred pieces at a time."""
    facts = vocabulary(corpus.tokenizer)
    is_pitch = np.zeros(facts.size, dtype=bool)
    is_pitch[[*facts.pitch_ids, *facts.drum_ids]] = True
    total = Statistics(np.zeros(0, np.int64), np.zeros(facts.size, np.int64), np.zeros(1, np.int64))
    for name in splits:
        split = corpus.split(name)
        total.tokens_per_piece = np.append(total.tokens_per_piece, split.lengths())
        for start in range(0, len(split), 256):
            tokens = np.concatenate(split[start : start + 256]).astype(np.int64)
            total.vocabulary_counts += np.bincount(tokens, minlength=facts.size)
            bar = np.cumsum(tokens == facts.bar_id) - 1  # every piece begins with a bar line
            per_bar = np.bincount(np.bincount(bar[is_pitch[tokens]], minlength=bar[-1] + 1))
            longer, shorter = sorted((total.notes_per_bar, per_bar), key=len, reverse=True)
            total.notes_per_bar = longer.copy()
            total.notes_per_bar[: len(shorter)] += shorter
    return total


def _spread(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> str:
    """Minimum, quartiles and maximum of ``values``, each of which occurs ``counts`` times."""
    order = np.argsort(values)
    values, reached = values[order], np.cumsum(counts[order])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    places = [int(np.searchsorted(reached, max(share * reached[-1], 1))) for share in shares]
    return "  ".join(f"{values[place]:>8g}" for place in places)


def _by_value(corpus: Corpus, counts: npt.NDArray[np.int64], kind: str) -> dict[str, int]:
    """How often each token of ``kind`` occurs, by its value."""
    vocab: dict[str, int] = corpus.tokenizer.vocab
    return {
        token.split("_", 1)[1]: int(counts[number])
        for token, number in vocab.items()
        if token.startswith(f"{kind}_") and counts[number]
    }


def describe(corpus: Corpus, stats: Statistics) -> str:
    """Tables for a terminal."""
    manifest = corpus.manifest
    lines = ["files"]
    lines += [f"  {reason:28}{number:>12,}" for reason, number in manifest["counts"].items()]
    lines += [f"{'split':30}{'pieces':>12}{'tokens':>16}"]
    lines += [f"  {name:28}{manifest['pieces'][name]:>12,}{manifest['tokens'][name]:>16,}" for name in SPLITS]
    signatures = _by_value(corpus, stats.vocabulary_counts, "TimeSig")
    bars = sum(signatures.values())
    lines += ["time signatures, share of bars"]
    lines += [f"  {name:28}{number / bars:>12.1%}" for name, number in Counter(signatures).most_common(8)]
    lines += [f"{'':30}{'min':>8}  {'25%':>8}  {'median':>8}  {'75%':>8}  {'max':>8}"]
    ones = np.ones(len(stats.tokens_per_piece), np.int64)
    lines += [f"{'tokens per piece':30}{_spread(stats.tokens_per_piece, ones)}"]
    lines += [f"{'notes per bar':30}{_spread(np.arange(len(stats.notes_per_bar)), stats.notes_per_bar)}"]
    for title, kind in (("tempo marks, quarters/minute", "Tempo"), ("velocities", "Velocity")):
        found = _by_value(corpus, stats.vocabulary_counts, kind)
        lines += [f"{title:30}{_spread(np.array([float(value) for value in found]), np.array([*found.values()]))}"]
    return "\n".join(lines)


def check_picture(path: Path) -> None:
    """Raise ``UserError`` if no figure can be written to ``path``: before the work that it shows."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise UserError(f"the plot needs {error.name}; install it with: pip install {error.name}") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UserError(f"--plot {path}: expected a file that ends in one of .{', .'.join(sorted(known))}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {path.parent} does not exist; create it first")


@own_style
def plot(corpus: Corpus, stats: Statistics, path: Path) -> None:
    """Draw the distributions that ``describe`` prints into a picture, in the format of its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    lengths = stats.tokens_per_piece
    bins = np.geomspace(max(lengths.min(), 1), lengths.max() + 1, 40)
    axes[0].hist(lengths, bins=bins.tolist())
    axes[0].set(title="tokens per piece", xscale="log", ylabel="pieces")
    signatures = _by_value(corpus, stats.vocabulary_counts, "TimeSig")
    axes[1].bar([*signatures], [*signatures.values()])
    axes[1].set(title="time signatures", ylabel="bars")
    axes[1].tick_params(axis="x", rotation=90)
    for axis, kind, title, width in ((axes[2], "Tempo", "tempo marks", 3.0), (axes[3], "Velocity", "velocities", 3.6)):
        found = _by_value(corpus, stats.vocabulary_counts, kind)
        axis.bar([float(value) for value in found], [*found.values()], width=width)
        axis.set(title=title, ylabel="tokens")
    shown = stats.notes_per_bar[:65]
    axes[4].bar(np.arange(len(shown)), shown)
    axes[4].set(title="notes per bar (up to 64)", ylabel="bars")
    splits = corpus.manifest["tokens"]
    axes[5].bar([*splits], [*splits.values()])
    axes[5].set(title="splits", ylabel="tokens")
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=120))
