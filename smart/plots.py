"""Figures, drawn by matplotlib without a display."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smart import track


def curves(folder: Path, keys: Sequence[str], unit: str) -> Path:
    """Draw metrics ``keys`` of a run by step into ``<folder>/<first key>.png``, with "_" for "/".

    The figure's data is ``metrics.jsonl``.
    """
    from matplotlib.figure import Figure

    rows = track.read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], label=key.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if len(keys) > 1:
        axes.legend()
    path = folder / f"{keys[0].replace('/', '_')}.png"
    figure.savefig(path, dpi=120)
    return path


def timeline(trace: Path) -> Path:
    """Draw a trace that ``smart.track.Stopwatch.write`` wrote, a line for each lane, into a PNG beside it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    stages = list(dict.fromkeys(span["name"] for span in spans))
    colours = {stage: f"C{number}" for number, stage in enumerate(stages)}
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(lanes)), layout="constrained")
    axes = figure.add_subplot()
    for span in spans:
        bar = [(span["ts"] / 1e6, span["dur"] / 1e6)]
        axes.broken_barh(bar, (span["tid"] - 0.4, 0.8), color=colours[span["name"]], edgecolor="white", linewidth=0.3)
    axes.set_yticks(list(lanes), list(lanes.values()))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(
        handles=[Patch(color=colours[stage], label=stage) for stage in stages],
        ncols=len(stages), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small",
    )  # fmt: skip
    path = trace.with_suffix(".png")
    figure.savefig(path, dpi=100)
    return path


def ratings(table: Sequence[tuple[str, str, float]], systems: Sequence[str], path: Path) -> None:
    """Ratings overall and by participant (the paper's figure 5) as ``path``.png and ``path``.pdf, data in ``path``.csv.

    Args:
        table: (participant, system, rating) of each rating.
        systems: in the order in which they are drawn.
    """
    from matplotlib.figure import Figure

    people = sorted({person for person, _, _ in table})
    values = sorted({value for _, _, value in table} | set(map(float, range(1, 11))))
    colours = ["C3", "C0", "C2", "C1", "C4", "C5", "C6", "C7"]
    figure = Figure(figsize=(min(max(10.0, 4.5 + 0.42 * len(people)), 60.0), 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, min(max(1.6, 0.11 * len(people)), 14)])
    width = 0.8 / len(systems)
    lines = []
    for number, system in enumerate(systems):
        colour, offset = colours[number % len(colours)], (number - (len(systems) - 1) / 2) * width
        own = [value for _, name, value in table if name == system]
        shares = [100 * own.count(value) / len(own) for value in values]
        left.bar([value + offset for value in values], shares, width, color=colour, label=f"{system} (n = {len(own)})")
        left.axvline(sum(own) / len(own), ymax=1 / 1.2, color=colour, linestyle="--", linewidth=1)
        for place, person in enumerate(people):
            given = [value for who, name, value in table if who == person and name == system]
            lines += [f"{person},{system},{value:g},{given.count(value)}" for value in sorted(set(given))]
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
    left.set_ylim(0, 1.2 * left.get_ylim()[1])  # room for the legend
    left.legend(frameon=False, fontsize="small", ncols=2, loc="upper center")
    right.set(xlabel="participant", ylabel="rating", title="by participant (diamond: mean)", ylim=(0.5, 10.5))
    right.set_xticks(range(len(people)), people, rotation=90, fontsize="small")
    right.set_yticks(range(1, 11))
    right.grid(axis="y", alpha=0.3)
    _save(figure, path)
    data = "\n".join(["participant,system,rating,count", *lines, ""])
    path.with_suffix(".csv").write_text(data, encoding="utf-8")


def power(rows: Sequence[tuple[int, float, float, float]], effect: float, path: Path) -> None:
    """Power by number of listeners as ``path``.png and ``path``.pdf.

    Args:
        rows: (listeners, power, low, high), the ends those of a 95% interval.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    listeners, shares, low, high = zip(*rows, strict=True)
    axes.fill_between(listeners, low, high, alpha=0.25, linewidth=0)
    axes.plot(listeners, shares, marker="o", label="power, 95% interval of the simulation")
    axes.axhline(0.8, color="grey", linestyle="--", linewidth=1, label="0.8")
    axes.set(xlabel="listeners", ylabel=f"share of studies with p < 0.05 (effect {effect:g})", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """As PNG and PDF."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
