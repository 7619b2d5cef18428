"""Figures, drawn by matplotlib without a display."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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


def frontier(
    rows: Sequence[Mapping[str, Any]],
    measures: Mapping[str, str],
    laws: Mapping[tuple[str, str], Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]],
    stem: Path,
) -> list[Path]:
    """Draw each of ``measures`` (column -> label) against the square root of KL into ``<stem>.png`` and ``.pdf``.

    A row is one checkpoint (or one n of best-of-n): ``series``, ``kl``, each measure with ``_low`` and ``_high``, and
    ``collapsed`` (a reason or None) and ``keep``. ``laws``, by series and measure, map distances to fitted values.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    series = list(dict.fromkeys(row["series"] for row in rows))
    figure = Figure(figsize=(4.2 * len(measures), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for number, name in enumerate(series):
            points = sorted((row for row in rows if row["series"] == name), key=lambda row: row["kl"])
            points = [row for row in points if np.isfinite(row[measure])]
            x = np.sqrt([max(row["kl"], 0.0) for row in points])
            y, low, high = (np.array([row[measure + end] for row in points]) for end in ("", "_low", "_high"))
            colour = f"C{number}"
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
        axes.set(xlabel="square root of KL to the base (nats a piece)", ylabel=label)
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=f"C{number}", marker=".", label=name) for number, name in enumerate(series)]
    handles += [
        Line2D([], [], color="grey", linestyle="", marker="*", markersize=12, markeredgecolor="black", label="to keep"),
        Line2D([], [], color="black", linestyle="", marker="x", label="collapsed"),
    ]
    handles += [Line2D([], [], color="grey", linestyle="--", linewidth=1, label="law of Gao et al.")] if laws else []
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths
