"""The figures of ``smart evaluate report``."""

import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smart import UserError, plots
from smart.diversity import BEATS, PER_BEAT, piano_roll
from smart.evaluate.pieces import FEATURES, Sample
from smart.intervals import Floats
from smart.run import read_metrics

LARGEST = 1e9  # number of an iteration


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


def run_picture(runs: Sequence[Path], out: Path) -> Picture:
    """Draw the paper's figure 2 for one or more runs."""
    metrics = {run.resolve().name: read_metrics(run) for run in runs}
    if len(metrics) < len(runs):
        raise UserError("--run: two runs have the same name; rename one of the folders")
    for name, rows in metrics.items():
        if not any(row.get("reward/mean") is not None for row in rows):
            raise UserError(f"--run {name}: its metrics have no reward; expected a tuning run, made by smart.grpo")
        for row in rows:
            for key in ("step", "reward/mean", "reward/std"):
                value = row.get(key)
                if value is not None and not (type(value) in (int, float) and not abs(value) > LARGEST):
                    raise UserError(f"--run {name}: its metrics are damaged: {key} is {value!r:.40}")
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
