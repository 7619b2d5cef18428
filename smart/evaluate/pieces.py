"""The tables that ``smart evaluate sample`` writes, read back for the report: checked, decoded, split by system."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from smart import UserError
from smart.evaluate import sealed
from smart.evaluate.sample import read_settings, schema
from smart.intervals import RATING, Floats, Scale
from smart.run import progress
from smart.tokens import FILE_NAME, decode, load_tokenizer

MOST_VALUES = 10_000  # in a row of a table, on average: a piece has a few hundred tokens and 1,280 numbers of its sound


class Measure(NamedTuple):
    """One number per piece: its name in tables and figures, its scale, and its change in the paper (+1 or -1)."""

    title: str
    unit: str
    scale: Scale
    paper: int
    words: str  # the paper's words for it


FEATURES = {
    "number_of_notes": Measure("Number of notes", "notes", (0, math.inf), 1, "more, concentrated around 70"),
    "polyphony_rate": Measure(
        "Polyphony rate", "share of time with more than two pitches", (0, 1), 1, "more polyphony"
    ),
    "empty_beat_rate": Measure("Empty-beat rate", "share of quarter notes without a note", (0, 1), -1, "falls to zero"),
    "mean_pitch": Measure("Mean pitch", "MIDI pitch", (0, 127), -1, "more pitches in the lower octaves"),
    "pitch_range": Measure("Pitch range", "semitones", (0, 127), 1, "a larger range"),
    "scale_consistency": Measure(
        "Scale consistency", "share of notes in the best scale", (0, 1), -1, "heavier lower tail"
    ),
    "mean_velocity": Measure("Mean velocity", "MIDI velocity", (0, 127), -1, "lower velocities"),
    "velocity_range": Measure("Velocity range", "MIDI velocity", (0, 127), 1, "a larger range"),
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


def scale_of(measure: str) -> Scale:
    """Between which numbers a measure of a piece lies; a rating is not a feature."""
    return FEATURES[measure].scale if measure in FEATURES else RATING


def read(path: Path) -> Sample:
    """Read and decode a table. Raises ``UserError`` if it is not one, or damaged, or if a system lacks some prompts."""
    provenance = read_settings(path)
    settings = provenance["settings"]
    _check_settings(path, provenance)
    axes = [f"{name}.{axis}" for name, reward in settings["rewards"].items() for axis in reward["axes"]]
    systems: list[str] = settings["systems"]
    _check_size(path, settings["count"] * len(systems))
    try:
        table = sealed.read_table(path, sealed=False)
    except sealed.Damaged as damage:
        raise _damaged(path, str(damage)) from None
    _check_values(path, table, axes)
    names = np.array(table["system"].to_pylist())
    columns, measures = {}, {}
    scores: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder, progress(total=table.num_rows, unit="piece") as bar:
        for system in systems:
            mine = table.filter(names == system)
            columns[system] = {name: mine[name].to_pylist() for name in mine.column_names}
            if len(mine) != settings["count"] or columns[system]["prompt"] != list(range(settings["count"])):
                raise UserError(
                    f"{path}: {system} does not have the prompts 0 to {settings['count'] - 1}; sample it again"
                )
            Path(folder, FILE_NAME).write_text(provenance["tokenizers"][system], encoding="utf-8")
            tokenizer = load_tokenizer(folder)
            scores[system] = []
            for tokens in columns[system]["tokens"]:
                try:
                    scores[system].append(decode(tokenizer, tokens))
                except ValueError as error:
                    raise _damaged(path, f"its tokens are not of the vocabulary of {system} ({error})") from None
                bar.update()
            measures[system] = _measures(columns[system], axes)
    return Sample(path, provenance, systems, axes, measures, columns, scores)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged, or was not written by `smart evaluate sample`: {what}; sample it again")


def _check_settings(path: Path, provenance: dict[str, Any]) -> None:
    """Raise ``UserError`` if the settings in a table's metadata are not of the form that the report needs."""
    settings = provenance["settings"]

    def named(value: Any, names: Sequence[str], kind: type) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name in names)

    systems, count, rewards = (settings.get(name) for name in ("systems", "count", "rewards"))
    checks: dict[str, Any] = {
        "systems": isinstance(systems, list)
        and systems
        and all(isinstance(name, str) for name in systems)
        and len(set(systems)) == len(systems),
        "count": type(count) is int and count >= 1,
        "prompts": settings.get("prompts") in tuple(KINDS),
        "soundfont_sha256": isinstance(settings.get("soundfont_sha256"), str),
        "rewards": named(rewards, list(rewards) if isinstance(rewards, dict) else [""], dict)
        and all(
            isinstance(each.get("axes"), list)
            and all(isinstance(axis, str) for axis in each["axes"])
            and isinstance(each.get("provenance"), str)
            and isinstance(each.get("stand_in"), bool)
            for each in rewards.values()
        ),
    }
    if checks["systems"]:
        models = settings["models"]
        checks["models"] = named(models, systems, dict) and all(
            set(model) >= {"step", "sha256"} for model in models.values()
        )
        checks["tokenizers"] = named(provenance.get("tokenizers"), systems, str)
    for name, passed in checks.items():
        if not passed:
            raise _damaged(path, f"its setting {name} is {settings.get(name)!r:.60}")


def _check_size(path: Path, rows: int) -> None:
    """Raise ``UserError`` if a table is not of the size that its settings state, before anything of it is read."""
    try:
        stated = pq.read_metadata(path)
        groups = [stated.row_group(number) for number in range(stated.num_row_groups)]
        values = [group.column(column).num_values for group in groups for column in range(group.num_columns)]
    except (OSError, pa.ArrowException, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise _damaged(path, f"it cannot be read ({str(error)[:100]})") from None
    if stated.num_rows != rows:
        raise _damaged(path, f"it has {stated.num_rows} rows, but its settings say {rows}")
    # identical values take no space in a file; a piece has a seed of its own, so that its row takes some
    if rows > path.stat().st_size or max(values, default=0) > MOST_VALUES * rows:
        raise _damaged(path, "it states more values than a file of its size can hold")


def _check_values(path: Path, table: pa.Table, axes: Sequence[str]) -> None:
    """Raise ``UserError`` for columns that are missing or of another type, and for values that no piece has."""

    def kind(field: pa.Field) -> str:
        return f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type)

    expected = {field.name: kind(field) for field in schema(axes)}
    found = {field.name: kind(field) for field in table.schema}
    if found != expected or len(table.schema) != len(expected):
        wrong = next((name for name in (*expected, *found) if found.get(name) != expected.get(name)), "")
        raise _damaged(path, f"its column {wrong!r} is {found.get(wrong)}, expected {expected.get(wrong)}")
    bounds: dict[str, Scale] = {"tokens": (0, 2**31), "length": (0, 10**6), "pitches": (0, 127), "velocities": (0, 127)}
    bounds |= {name: (0, 10**6) if name == "number_of_notes" else scale_of(name) for name in FEATURES if name in found}
    bounds |= dict.fromkeys(axes, (-1000, 1000)) | {"audio_vector": (0, 1.001)}  # a rating may leave its scale a little
    for name in expected:
        if table[name].null_count and name != "audio_vector":
            raise _damaged(path, f"its column {name!r} lacks values")
        if name not in bounds:
            continue
        column = table[name].combine_chunks()
        values = (column.flatten() if pa.types.is_list(column.type) else column).to_numpy(zero_copy_only=False)
        known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        low, high = bounds[name]
        if len(known) and not (low <= known.min() and known.max() <= high):
            raise _damaged(path, f"its column {name!r} has values from {known.min():g} to {known.max():g}")
    sounds = pa.compute.list_value_length(table["audio_vector"]).drop_null().unique()
    if len(sounds) > 1:
        raise _damaged(path, "its column 'audio_vector' has rows of several lengths")


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
