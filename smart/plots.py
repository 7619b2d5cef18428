"""Figures, drawn by matplotlib without a display."""

import json
from collections.abc import Sequence
from pathlib import Path

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
