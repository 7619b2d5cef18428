"""Figures, drawn with matplotlib without a display."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smart.files import parse_json, write_atomically
from smart.render import score_notes
from smart.run import read_metrics
from smart.style import own_style


@own_style
def curves(folder: Path, keys: Sequence[str], unit: str, *, step: str) -> Path:
    """Plot the metrics ``keys`` of a run by step into ``<folder>/<first key>.png``, with "_" for "/".

    ``unit`` and ``step`` are the labels of the axes: of the values, and of what the run counts. The data is in
    ``metrics.jsonl``.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(folder, keys)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], label=key.replace("_", " "))
    axes.set_xlabel(step)
    axes.locator_params("x", integer=True)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if len(keys) > 1:
        axes.legend()
    path = folder / f"{keys[0].replace('/', '_')}.png"
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


@own_style
def timeline(trace: Path) -> Path:
    """Draw a trace written by ``smart.run.Stopwatch.write``, one row per lane, into a PNG next to it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    events = parse_json(trace.read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    stages = list(dict.fromkeys(span["name"] for span in spans))
    colours = {stage: f"C{number}" for number, stage in enumerate(stages)}
    figure = Figure(figsize=(8, 1.1 + 0.4 * len(lanes)), layout="constrained")
    axes = figure.add_subplot()
    for span in spans:
        bar = [(span["ts"] / 1e6, span["dur"] / 1e6)]
        axes.broken_barh(bar, (span["tid"] - 0.4, 0.8), color=colours[span["name"]], edgecolor="white", linewidth=0.3)
    axes.set_yticks(list(lanes), list(lanes.values()))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    figure.legend(
        handles=[Patch(color=colours[stage], label=stage) for stage in stages],
        ncols=5, loc="outside upper center", frameon=False, fontsize="small",
    )  # fmt: skip
    path = trace.with_suffix(".png")
    figure.savefig(path, dpi=100)
    return path


@own_style
def piano_rolls(pieces: Mapping[str, Any], path: Path, *, seconds: float = 10.0) -> Path:
    """Draw the first ``seconds`` of scores (``symusic.Score``) side by side into a PNG, each under its name.

    They share their axes; louder notes are darker.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(pieces), 3), layout="constrained")
    grid = figure.subplots(1, len(pieces), squeeze=False, sharex=True, sharey=True)[0]
    notes = {name: score_notes(score) for name, score in pieces.items()}
    heard = np.concatenate([each[each[:, 0] < seconds] for each in notes.values()])
    lowest, highest = (heard[:, 2].min(), heard[:, 2].max()) if len(heard) else (60, 60)
    end = min(seconds, (heard[:, 0] + heard[:, 1]).max(initial=1.0))
    octaves = range(int(lowest) // 12 * 12, int(highest) + 13, 12)
    for number, (axes, (name, played)) in enumerate(zip(grid, notes.items(), strict=True)):
        onset, duration, pitch, velocity = played[:, :4].T
        shades = [(*to_rgb(COLOURS[number % len(COLOURS)]), 0.3 + 0.7 * loud / 127) for loud in velocity]
        axes.barh(pitch, duration, left=onset, height=0.9, color=shades)
        axes.set(title=name, xlabel="seconds", xlim=(0, end), ylim=(octaves[0] - 0.5, octaves[-1] + 0.5))
        axes.set_yticks(octaves, [f"C{octave // 12 - 1}" for octave in octaves])
        axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
    return path


# --- Figures of an evaluation -------------------------------------------------------------------------------------

# colours that can be told apart with any kind of colour blindness (Okabe and Ito), each with a line style
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 150
DASHES = ("-", "--", "-.", ":")


class Panel(NamedTuple):
    """One set of histograms: the values of one measure for several systems."""

    title: str
    xlabel: str
    ylabel: str
    values: Mapping[str, npt.NDArray[Any]]  # by system; values that are not finite are left out
    edges: npt.NDArray[np.float64]


def edges_of(values: Iterable[npt.NDArray[Any]], bins: int = 30) -> npt.NDArray[np.float64]:
    """Equal bins from the least to the greatest finite value of several arrays; integer widths for integers."""
    together = np.concatenate([np.asarray(part, np.float64) for part in values])
    together = together[np.isfinite(together)]
    low, high = (together.min(), together.max()) if len(together) else (0.0, 1.0)
    if len(together) and not (together % 1).any():  # otherwise some bins would contain more integers than others
        width = (high - low) // bins + 1
        return np.arange(low - 0.5, high + width, width)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


@own_style
def histograms(panels: Sequence[Panel], stem: Path, *, columns: int = 2) -> list[Path]:
    """Draw panels side by side into ``<stem>.png`` and ``.pdf``; the data goes into ``<stem>.csv``."""
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    width = max(4.0 * columns, 1.9 * min(len(panels[0].values), 4))  # of the legend
    figure = Figure(figsize=(width, 2.5 * lines + 0.5), layout="constrained")
    cells = figure.subplots(lines, columns, squeeze=False).flatten()
    table = []
    for panel, axes in zip(panels, cells, strict=False):
        table += [{"panel": panel.title, **row} for row in _histogram(axes, panel)]
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, list(panels[0].values))
    return save(figure, stem, table)


@own_style
def rewards_and_rolls(
    panel: Panel, rolls: Mapping[str, npt.NDArray[np.float32]], stem: Path, *, per_beat: int
) -> list[Path]:
    """Per system a histogram of a rating, and below it the mean of its piano rolls (T, 128), like the paper's figure 6.

    All rolls share one colour scale. Writes ``<stem>.png``, ``.pdf``, and the data of both as ``<stem>.csv``.
    """
    from matplotlib.figure import Figure

    names = list(panel.values)
    figure = Figure(figsize=(max(2.6 * len(names) + 1.0, 4.5), 5.2), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
    highest = max([0.0, *(float(roll.max()) for roll in rolls.values())]) or 1.0
    table = []
    for number, name in enumerate(names):
        axes = grid[0][number]
        one = panel._replace(title=name, values={name: panel.values[name]}, ylabel=panel.ylabel if not number else "")
        table += [{"part": "rating", **row} for row in _histogram(axes, one, number)]
        axes, roll = grid[1][number], rolls[name]
        image = axes.imshow(
            roll.T, origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=highest, interpolation="nearest",
            extent=(0, len(roll) / per_beat, -0.5, 127.5),
        )  # fmt: skip
        axes.set(xlabel="beat", ylim=(20.5, 108.5), xticks=range(0, len(roll) // per_beat + 1, 4))
        if not number:
            axes.set_ylabel("MIDI pitch")
        table += [
            {"part": "roll", "system": name, "low": cell / per_beat, "high": (cell + 1) / per_beat, "pitch": pitch,
             "share": float(roll[cell, pitch])}
            for cell, pitch in np.argwhere(roll > 0).tolist()
        ]  # fmt: skip
    bar = figure.colorbar(image, ax=list(grid[1]), pad=0.01)
    bar.set_label("share of pieces")
    return save(figure, stem, table)


@own_style
def rewards_by_iteration(runs: Mapping[str, Sequence[Mapping[str, Any]]], stem: Path, ylabel: str) -> list[Path]:
    """Mean reward of each run by iteration, with a band of one standard deviation, like the paper's figure 2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    table = []
    for number, (name, metrics) in enumerate(runs.items()):
        rows = [
            {"run": name, "iteration": row["step"], "mean": row["reward/mean"], "std": row.get("reward/std")}
            for row in metrics
            if row.get("reward/mean") is not None
        ]
        table += rows
        step, mean = (np.array([row[key] for row in rows], float) for key in ("iteration", "mean"))
        spread = np.array([row["std"] or 0.0 for row in rows])
        colour, dash = _style(number)
        axes.fill_between(step, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step, mean, color=colour, linestyle=dash)
    axes.set(xlabel="iteration", ylabel=ylabel)
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)
    _legend(figure, list(runs))
    return save(figure, stem, table)


@own_style
def frontier(
    rows: Sequence[Mapping[str, Any]],
    measures: Mapping[str, str],
    laws: Mapping[tuple[str, str], Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]],
    stem: Path,
) -> list[Path]:
    """Plot each of ``measures`` (column -> label) over the square root of KL: ``<stem>.png``, ``.pdf`` and ``.csv``.

    A row is one checkpoint (or one n of best-of-n): ``series``, ``kl``, each measure with ``_low`` and ``_high``, and
    ``collapsed`` (a reason or None) and ``keep``. ``laws`` maps (series, measure) to a function of the distance.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    series = list(dict.fromkeys(row["series"] for row in rows))
    figure = Figure(figsize=(4.2 * len(measures), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for number, name in enumerate(series):
            points = sorted((row for row in rows if row["series"] == name), key=lambda row: row["kl"])
            points = [row for row in points if row[measure] is not None and np.isfinite(row[measure])]
            x = np.sqrt([max(row["kl"], 0.0) for row in points])
            # an interval that is not known is None
            y, low, high = (np.array([row[measure + end] for row in points], float) for end in ("", "_low", "_high"))
            colour, _ = _style(number)
            error = np.nan_to_num(np.stack([y - low, high - y])).clip(min=0)
            axes.errorbar(x, y, yerr=error, color=colour, marker=".", linewidth=1, elinewidth=0.8)
            for place, row in enumerate(points):
                if row["collapsed"]:
                    axes.plot(x[place], y[place], marker="x", color="black", markersize=9, zorder=3)
                if row["keep"]:
                    axes.plot(
                        x[place], y[place], marker="*", color=colour, markersize=14, markeredgecolor="black", zorder=4
                    )
            if (name, measure) in laws and len(x):
                fine = np.linspace(0, x.max(), 200)
                axes.plot(fine, laws[name, measure](fine), color=colour, linestyle="--", linewidth=1)
        axes.set(xlabel="square root of KL to the base (nats per piece)", ylabel=label)
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=_style(number)[0], marker=".", label=name) for number, name in enumerate(series)]
    handles += [
        Line2D([], [], color="grey", linestyle="", marker="*", markersize=12, markeredgecolor="black", label="to keep"),
        Line2D([], [], color="black", linestyle="", marker="x", label="collapsed"),
    ]
    handles += [Line2D([], [], color="grey", linestyle="--", linewidth=1, label="law of Gao et al.")] if laws else []
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return save(figure, stem, rows)


def _style(number: int) -> tuple[str, Any]:
    return COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]


def _histogram(axes: Any, panel: Panel, first: int = 0) -> list[dict[str, Any]]:
    """Draw the shares of each system's values as steps; returns the data."""
    rows = []
    for number, (name, values) in enumerate(panel.values.items(), first):
        finite = np.asarray(values, np.float64)
        finite = finite[np.isfinite(finite)]
        counts = np.histogram(finite, panel.edges)[0]
        shares = counts / max(len(finite), 1)
        colour, dash = _style(number)
        axes.stairs(shares, panel.edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(shares, panel.edges, color=colour, linestyle=dash, linewidth=1.5)
        rows += [
            {"system": name, "low": low, "high": high, "count": count, "share": share}
            for low, high, count, share in zip(
                panel.edges[:-1].tolist(), panel.edges[1:].tolist(), counts.tolist(), shares.tolist(), strict=True
            )
        ]
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(alpha=0.3)
    return rows


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = []
    for number in range(len(names)):
        colour, dash = _style(number)
        lines.append(Line2D([], [], color=colour, linestyle=dash, linewidth=2))
    figure.legend(lines, names, loc="outside upper center", ncols=min(len(names), 4), frameon=False, handlelength=3)


def save(figure: Any, stem: Path, table: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write a figure as PNG and PDF, the same bytes for the same data, and its data as CSV."""
    import matplotlib
    from matplotlib.text import Text

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf", "csv")]
    # a system may be called "$\\foo$": no text is mathematics, not even text made while the figure is drawn
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with matplotlib.rc_context({"text.parse_math": False}):
        write_atomically(paths[0], lambda file: figure.savefig(file, format="png", dpi=DPI))
        figure.set_layout_engine("none")  # keep the layout of the PNG
        write_atomically(paths[1], lambda file: figure.savefig(file, format="pdf", metadata={"CreationDate": None}))
    write_csv(paths[2], table)
    return paths


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, with all their columns in order of appearance; values that are not finite are left empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        undefined = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        writer.writerow({key: "" if key in undefined else plain(value) for key, value in row.items()})
    write_atomically(path, text.getvalue().encode())


def plain(cell: Any) -> Any:
    """A cell of a CSV; text that a spreadsheet could take for a formula gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


@own_style
def ratings(table: Sequence[tuple[str, str, float]], systems: Sequence[str], path: Path) -> None:
    """Ratings overall and by participant (the paper's figure 5) as ``path``.png and ``path``.pdf, data in ``path``.csv.

    Args:
        table: (participant, system, rating) for each rating.
        systems: names of the systems, in drawing order.
    """
    from matplotlib.figure import Figure

    people = sorted({person for person, _, _ in table})
    values = sorted({value for _, _, value in table} | set(map(float, range(1, 11))))
    figure = Figure(figsize=(min(max(10.0, 4.5 + 0.42 * len(people)), 60.0), 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, min(max(1.6, 0.11 * len(people)), 14)])
    width = 0.8 / len(systems)
    lines, bars = [], {}
    for number, system in enumerate(systems):
        colour, offset = COLOURS[number % len(COLOURS)], (number - (len(systems) - 1) / 2) * width
        own = [value for _, name, value in table if name == system]
        shares = [100 * own.count(value) / len(own) for value in values]
        bar = left.bar([value + offset for value in values], shares, width, color=colour)
        bars[f"{system} (n = {len(own)})"] = bar
        left.axvline(sum(own) / len(own), ymax=1 / 1.2, color=colour, linestyle="--", linewidth=1)
        for place, person in enumerate(people):
            given = [value for who, name, value in table if who == person and name == system]
            lines += [
                {"participant": person, "system": system, "rating": f"{value:g}", "count": given.count(value)}
                for value in sorted(set(given))
            ]
            if given:
                box = right.boxplot(
                    [given], positions=[place + offset], widths=0.85 * width, patch_artist=True, showmeans=True,
                    manage_ticks=False, boxprops={"facecolor": colour, "alpha": 0.6}, medianprops={"color": "black"},
                    meanprops={"marker": "D", "markersize": 3, "markerfacecolor": "white", "markeredgecolor": "black"},
                    flierprops={"marker": ".", "markersize": 3, "markeredgecolor": colour},
                )  # fmt: skip
                for name in ("whiskers", "caps"):
                    for line in box[name]:
                        line.set_color(colour)
    left.set(xlabel="rating", ylabel="share of the system's ratings (%)", title="overall (dashed: means)")
    left.set_xticks(range(1, 11))
    left.set_ylim(0, 1.2 * left.get_ylim()[1])  # space for the legend
    # handles are passed, because matplotlib skips labels that begin with "_"
    left.legend(list(bars.values()), list(bars), frameon=False, fontsize="small", ncols=2, loc="upper center")
    right.set(xlabel="participant", ylabel="rating", title="by participant (diamond: mean)", ylim=(0.5, 10.5))
    right.set_xticks(range(len(people)), people, rotation=90, fontsize="small")
    right.set_yticks(range(1, 11))
    right.grid(axis="y", alpha=0.3)
    save(figure, path, lines)


@own_style
def power(rows: Sequence[Mapping[str, float]], effect: float, path: Path) -> None:
    """Power by number of listeners as ``path``.png and ``path``.pdf, data in ``path``.csv.

    Args:
        rows: ``listeners``, ``power``, and ``power_low`` and ``power_high``, the ends of its 95% interval.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    names = ("listeners", "power", "power_low", "power_high")
    listeners, shares, low, high = ([row[name] for row in rows] for name in names)
    axes.fill_between(listeners, low, high, alpha=0.25, linewidth=0)
    axes.plot(listeners, shares, marker="o", label="power, 95% interval of the simulation")
    axes.axhline(0.8, color="grey", linestyle="--", linewidth=1, label="0.8")
    axes.set(xlabel="listeners", ylabel=f"share of studies with p < 0.05 (effect {effect:g})", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    save(figure, path, rows)
