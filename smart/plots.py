"""Figures, drawn by matplotlib without a display."""

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
