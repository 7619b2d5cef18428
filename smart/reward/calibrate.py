"""Fit the coefficients of ``ce_proxy`` to clips that were rated for Content Enjoyment.

    python -m smart.reward.calibrate --audio DIR --scores CSV
    python -m smart.reward.calibrate --audio DIR --pairs FILE      choices between two clips (smart.reward.pairs)

Ridge regression on standardised descriptors: with z the descriptors of n clips, centred and divided by their
standard deviation, and y the ratings, the weights w minimise mean((y - mean(y) - z w)^2) + ridge |w|^2. The
range of each descriptor over the n clips is stored too, because ``ce_proxy`` clamps to it.

The reported figures come from repeated K-fold cross-validation: fitting, standardisation and clamping see only
the other folds. Clips of one group (one prompt, for example) are more alike than clips of different groups.
So if the CSV has groups, cross-validation is repeated with whole groups per fold, and each pair of clips within a
group is ordered by a fit to the other groups.
"""

if __name__ == "__main__":  # before torch is imported: --help is answered at once
    from smart.__main__ import start

    start("calibrate")

import csv
import datetime
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import click
import numpy as np
import torch

from smart import UserError, __version__
from smart.files import write_atomically
from smart.render import load_soundfile, read_audio
from smart.reward import pairs as choices
from smart.reward import resample
from smart.reward.ce_proxy import (
    AXIS,
    DESCRIPTORS,
    FORMAT,
    HIGHEST,
    LOWEST,
    SAMPLE_RATE,
    VERSION,
    Coefficients,
    Term,
    describe,
    predict,
)
from smart.run import progress

__all__ = ["Clip", "calibrate", "cross_validate", "fit", "order_pairs", "read_clip", "read_scores", "spearman"]

HEAD = {"format": FORMAT, "version": VERSION, "axis": AXIS, "sample_rate": SAMPLE_RATE}
MIN_CLIPS = 8
LOWEST_RATE = 4000  # Hz; resampling from 1 Hz, as a damaged header may say, would turn each byte into 64 KB
LONGEST = 600  # seconds per clip
DIGITS = 6  # decimals in the file; further ones differ between machines
CONSTANT = 1e-4  # a descriptor (0 to 1.4) with a smaller standard deviation counts as constant and is not scaled
DEFAULT_GROUP = "sample"
RIDGE, PAIRS_RIDGE = 0.5, 0.01  # without --ridge
SCORE_ALIASES = {"CE": "content_enjoyment"}  # the axis's full name, also accepted as column


@dataclass(frozen=True)
class Clip:
    """One row of the CSV: the audio file's name, its rating, and its group ("" if it has none)."""

    name: str
    score: float
    group: str


def fit(descriptors: torch.Tensor, scores: torch.Tensor, ridge: float) -> Coefficients:
    """Ridge regression with standardised descriptors (see the module).

    Args:
        descriptors: (n, 4) float64, in the order of ``DESCRIPTORS``.
        scores: (n,) float64.
        ridge: strength of the penalty, at least 0, on weights of descriptors with variance 1.
    """
    low, high = descriptors.min(dim=0).values, descriptors.max(dim=0).values
    mean, scale = descriptors.mean(dim=0), descriptors.std(dim=0, correction=0)
    scale = torch.where(scale > CONSTANT, scale, torch.ones_like(scale))
    z = (descriptors - mean) / scale
    n, count = z.shape
    # even for ridge 0 a tiny penalty keeps the system solvable if a descriptor is constant
    gram = z.T @ z / n + max(ridge, 1e-9) * torch.eye(count, dtype=z.dtype)
    weights = torch.linalg.solve(gram, z.T @ (scores - scores.mean()) / n)
    columns = zip(*(v.tolist() for v in (weights, mean, scale, low, high)), strict=True)
    terms = {name: Term(*column) for name, column in zip(DESCRIPTORS, columns, strict=True)}
    return Coefficients(intercept=float(scores.mean()), terms=terms)


def cross_validate(
    descriptors: torch.Tensor,
    scores: torch.Tensor,
    groups: Sequence[str],
    *,
    folds: int,
    repeats: int,
    ridge: float,
    generator: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """Spearman, Pearson and mean absolute error over all n held-out predictions, mean and std over repeats.

    Args:
        descriptors: (n, 4) float64.
        scores: (n,) float64.
        groups: n names; clips of one group share a fold. If all names differ, this is ordinary K-fold.
        folds: at least 2 and at most the number of groups.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if not 2 <= folds <= len(names):
        raise ValueError(f"folds must be 2..{len(names)}, the number of groups, got {folds}")
    figures: dict[str, list[float]] = {"spearman": [], "pearson": [], "mae": []}
    for _ in range(repeats):
        fold = torch.from_numpy((generator.permutation(len(names)) % folds)[member])
        predicted = torch.zeros_like(scores)
        for k in range(folds):
            seen = fold != k
            predicted[~seen] = predict(descriptors[~seen], fit(descriptors[seen], scores[seen], ridge))
        figures["spearman"].append(spearman(predicted, scores))
        figures["pearson"].append(_pearson(predicted, scores))
        figures["mae"].append(float((predicted - scores).abs().mean()))
    return {name: {"mean": float(np.mean(values)), "std": float(np.std(values))} for name, values in figures.items()}


def order_pairs(
    descriptors: torch.Tensor, scores: torch.Tensor, groups: Sequence[str], ridge: float
) -> tuple[int, int]:
    """(pairs in the right order, pairs): clips of one group with unequal ratings, ordered by a fit to the others."""
    member = np.asarray(groups)
    right = total = 0
    for group in np.unique(member):
        inside = np.flatnonzero(member == group)
        if len(inside) < 2 or len(member) - len(inside) < 2:
            continue
        outside = torch.from_numpy(member != group)
        predicted = predict(descriptors[inside], fit(descriptors[outside], scores[outside], ridge))
        rated = scores[inside]
        for a, b in itertools.combinations(range(len(inside)), 2):
            if rated[a] != rated[b]:
                total += 1
                right += bool((predicted[a] - predicted[b]) * (rated[a] - rated[b]) > 0)
    return right, total


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two (n,) tensors, ties at their mean rank; 0 if one of them is constant."""
    return _pearson(_ranks(a), _ranks(b))


def read_scores(
    path: Path, *, clip_column: str, score_column: str, group_column: str | None
) -> tuple[list[Clip], str | None]:
    """The rated clips of a CSV and the column that holds their groups.

    Args:
        path: CSV in UTF-8 with a header.
        clip_column: column with the audio file's name, relative to the audio folder.
        score_column: column with the rating, 1 to 10; for "CE", "content_enjoyment" is accepted, too.
        group_column: column with the group; None: "sample" if there is such a column, else no groups.

    Raises:
        UserError: the file or a column is missing, or a row lacks a file name, repeats one, names a file outside
            the audio folder, or has no rating from 1 to 10.
    """
    columns, rows = _read_csv(path)
    alias = SCORE_ALIASES.get(score_column, score_column)
    score_column = alias if score_column not in columns and alias in columns else score_column
    if group_column is None and DEFAULT_GROUP in columns:
        group_column = DEFAULT_GROUP
    wanted = [("--clip-column", clip_column), ("--score-column", score_column)]
    if group_column is not None:
        wanted.append(("--group-column", group_column))
    for option, column in wanted:
        if column not in columns:
            raise UserError(
                f'{path} has no column "{column}", only {", ".join(columns)}; choose one of them with {option}'
            )
    clips: list[Clip] = []
    names: set[str] = set()
    for line, row in rows:
        name = (row[clip_column] or "").strip()
        if not name:
            raise UserError(f'{path}, line {line}: no file name in column "{clip_column}"')
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f'{path}, line {line}: clip "{name:.60}" is not inside --audio; give its path from there')
        if name in names:
            raise UserError(f'{path}, line {line}: clip "{name}" is listed twice; keep one rating per clip')
        names.add(name)
        group = (row[group_column] or "").strip() if group_column is not None else ""
        clips.append(Clip(name, _rating(row[score_column], score_column, f"{path}, line {line}"), group))
    return clips, group_column


def read_clip(path: Path) -> torch.Tensor:
    """Mono audio (S,) float32 at ``SAMPLE_RATE``: the mean of the channels of a wav, flac, mp3 or ogg file.

    Raises:
        UserError: the file is missing, unreadable, empty, not finite, has a sample rate below ``LOWEST_RATE`` or is
            longer than ``LONGEST``, or the soundfile package is missing.
    """
    if not path.is_file():
        raise UserError(f"audio file {path} is missing; it is listed in the scores")
    audio, rate = read_audio(path, LONGEST + 1)
    if rate < LOWEST_RATE:
        raise UserError(f"audio file {path} has a sample rate of {rate} Hz, at least {LOWEST_RATE} are needed")
    if len(audio) > LONGEST * rate:
        raise UserError(f"audio file {path} is longer than {LONGEST} s; cut it, or remove it from the scores")
    mono = torch.from_numpy(audio)
    if len(mono) == 0:
        raise UserError(f"audio file {path} is empty; remove it from the scores")
    try:
        return resample(mono, rate, SAMPLE_RATE)
    except UserError as error:
        raise UserError(f"audio file {path}: {error.message}") from None


def calibrate(
    *,
    audio: Path,
    scores: Path | None,
    out: Path,
    overwrite: bool,
    clip_column: str,
    score_column: str,
    group_column: str | None,
    ridge: float | None,
    folds: int,
    repeats: int,
    seed: int,
    source: str,
    pairs: Path | None = None,
) -> None:
    """Write the file ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if (scores is None) == (pairs is None):
        raise UserError("give the ratings as --scores CSV, or the choices between two clips as --pairs FILE")
    if ridge is None:
        ridge = RIDGE if pairs is None else PAIRS_RIDGE
    if not math.isfinite(ridge):
        raise UserError(f"--ridge must be a finite number, got {ridge}")
    if out.exists() and not overwrite:
        raise UserError(f"{out} already exists; choose another --out or add --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} of --out does not exist; create it first")
    if not audio.is_dir():
        raise UserError(f"--audio {audio} is not a folder")
    if scores is None:
        assert pairs is not None
        settings = {"folds": folds, "repeats": repeats, "seed": seed}
        report, text = _fit_pairs(pairs, audio, ridge, settings, source)
        _write(out, json.dumps(_rounded(report), indent=2, allow_nan=False) + "\n")
        click.echo(text)
        click.echo(f"wrote {out}")
        return
    clips, group_column = read_scores(
        scores, clip_column=clip_column, score_column=score_column, group_column=group_column
    )
    _check_ratings(clips, scores, folds)
    _check_files(clips, audio)
    x = _describe_all(clips, audio)
    y = torch.tensor([clip.score for clip in clips], dtype=torch.float64)
    coefficients = fit(x, y, ridge)
    validation = _validate(x, y, clips, folds=folds, repeats=repeats, ridge=ridge, seed=seed)
    univariate = {name: spearman(x[:, column], y) for column, name in enumerate(DESCRIPTORS)}
    report = _rounded(
        {
            **HEAD,
            "clips": len(clips),
            "intercept": coefficients.intercept,
            "descriptors": {
                name: {
                    **asdict(term),
                    "definition": DESCRIPTORS[name],
                    "univariate_spearman": univariate[name],
                }
                for name, term in coefficients.terms.items()
            },
            "ridge": ridge,
            "cross_validation": validation,
            "provenance": _provenance(clips, audio, source, group_column),
        }
    )
    _write(out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    click.echo(_table(report, group_column))
    click.echo(f"wrote {out}")


def _describe_all(clips: Sequence[Clip], audio: Path) -> torch.Tensor:
    """(n, 4) float64 descriptors. Raises ``UserError`` if the clips do not differ."""
    described = [describe(read_clip(audio / clip.name)) for clip in progress(clips, desc="describing", unit="clip")]
    x = torch.stack(described).double()
    if float(x.std(dim=0, correction=0).max()) <= CONSTANT:
        raise UserError(f"all {len(clips)} clips have the same descriptors (silent, or copies?); use clips that differ")
    return x


def _fit_pairs(
    path: Path, audio: Path, ridge: float, settings: dict[str, int], source: str
) -> tuple[dict[str, Any], str]:
    """The report of a fit to choices (``smart.reward.pairs``), for the file and for the terminal."""
    if path.suffix.lower() == ".json":
        columns, rows = choices.parse_choices(path)
    else:
        columns, numbered = _read_csv(path, "pairs")
        rows = [row for _, row in numbered]
    made = choices.read_pairs(path, columns, rows, audio)
    choices.check_groups(path, made)
    # the rating only identifies the choices in the provenance: how often a clip was the better one
    wins = Counter(pair.better for pair in made)
    clips = [Clip(name, float(wins[name]), "") for name in sorted({name for pair in made for name in pair[:2]})]
    _check_files(clips, audio, path)
    x = _describe_all(clips, audio)
    row_of = {clip.name: row for row, clip in enumerate(clips)}
    better, worse = (torch.tensor([row_of[name] for name in names]) for names in list(zip(*made, strict=True))[:2])
    groups = [pair.group for pair in made]
    coefficients = choices.fit(x, better, worse, ridge)
    held_out = choices.cross_validate(
        x, better, worse, groups, ridge=ridge, folds=settings["folds"], repeats=settings["repeats"],
        generator=np.random.default_rng(settings["seed"]),
    )  # fmt: skip
    report = {
        **HEAD,
        "clips": len(clips),
        "pairs": len(made),
        "intercept": coefficients.intercept,
        "descriptors": {
            name: {**asdict(term), "definition": DESCRIPTORS[name]} for name, term in coefficients.terms.items()
        },
        "ridge": ridge,
        "pairs_validation": {**settings, "groups": len(set(groups)), **held_out},
        "provenance": {
            **_provenance(clips, audio, source, None),
            "command": "python -m smart.reward.calibrate --audio DIR --pairs FILE",
        },
    }
    return report, choices.table(report)


def _validate(
    x: torch.Tensor,
    y: torch.Tensor,
    clips: Sequence[Clip],
    *,
    folds: int,
    repeats: int,
    ridge: float,
    seed: int,
) -> dict[str, Any]:
    """The cross-validated figures of the report; "grouped" and "pairs" only if the groups allow them."""
    result: dict[str, Any] = {"folds": folds, "repeats": repeats, "seed": seed}
    ways = {"ungrouped": [clip.name for clip in clips]}
    # a clip without a group is a group by itself
    groups = [f"group {clip.group}" if clip.group else f"clip {clip.name}" for clip in clips]
    if folds <= len(set(groups)) < len(clips):
        ways["grouped"] = groups
    for way, names in ways.items():
        generator = np.random.default_rng(seed)
        result[way] = cross_validate(x, y, names, folds=folds, repeats=repeats, ridge=ridge, generator=generator)
    right, pairs = order_pairs(x, y, groups, ridge)
    if pairs:
        result["pairs_in_held_out_group"] = {"ordered": right, "pairs": pairs}
    return result


def _table(report: dict[str, Any], group_column: str | None) -> str:
    """The report as text for the terminal."""
    validation = report["cross_validation"]
    lines = [
        f"{report['clips']} clips, ridge {report['ridge']:g}, {validation['repeats']} x "
        f"{validation['folds']}-fold cross-validation (seed {validation['seed']}), mean ± std over repeats",
        f"{'folds':<22}{'Spearman':>16}{'Pearson':>16}{'MAE':>16}",
    ]
    for way, label in {"ungrouped": "of clips", "grouped": f"of groups ({group_column})"}.items():
        if way in validation:
            cells = [f"{v['mean']:.3f} ± {v['std']:.3f}" for v in validation[way].values()]
            lines.append(f"{label:<22}" + "".join(f"{cell:>16}" for cell in cells))
    if "grouped" not in validation:
        lines.append("folds of groups: not computed (no groups of several clips, or fewer groups than folds)")
    if "pairs_in_held_out_group" in validation:
        pairs = validation["pairs_in_held_out_group"]
        lines.append(f"pairs within a held-out group in the right order: {pairs['ordered']} of {pairs['pairs']}")
    lines.append(f"{'descriptor':<12}{'weight':>9}{'mean':>9}{'scale':>9}{'low':>9}{'high':>9}{'Spearman':>10}")
    for name, term in report["descriptors"].items():
        numbers = "".join(f"{term[key]:>9.3f}" for key in ("weight", "mean", "scale", "low", "high"))
        lines.append(f"{name:<12}{numbers}{term['univariate_spearman']:>10.2f}")
    lines.append(f"{'intercept':<12}{report['intercept']:>9.3f}")
    return "\n".join(lines)


def _provenance(clips: Sequence[Clip], audio: Path, source: str, group_column: str | None) -> dict[str, Any]:
    """Where the coefficients come from, without paths of this machine."""
    files, ratings = hashlib.sha256(), hashlib.sha256()
    for clip in sorted(clips, key=lambda clip: clip.name):
        content = hashlib.sha256((audio / clip.name).read_bytes()).hexdigest()
        files.update(f"{content}  {clip.name}\n".encode())
        ratings.update(f"{clip.name},{clip.score!r}\n".encode())
    return {
        "source": source,
        "clips": len(clips),
        "group_column": group_column,
        "files_sha256": files.hexdigest(),
        "files_sha256_of": 'lines "SHA-256  NAME" of the audio files, sorted by name',
        "ratings_sha256": ratings.hexdigest(),
        "program": f"smart {__version__}, torch {torch.__version__}, "
        f"libsndfile {load_soundfile().__libsndfile_version__}",
        "command": "python -m smart.reward.calibrate --audio DIR --scores CSV",
        "date": datetime.date.today().isoformat(),
    }


def _read_csv(path: Path, what: str = "scores") -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """The columns of a CSV, and its rows with the line number on which each ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} {path} cannot be read as a CSV in UTF-8 ({reason})") from error
    if not columns:
        raise UserError(f"{what} {path} is empty; expected a header and one rated clip per line")
    return columns, rows


def _rating(text: str | None, column: str, where: str) -> float:
    """One rating; a ``UserError`` says which line is wrong."""
    try:
        score = float(text or "")
    except ValueError:
        raise UserError(
            f'{where}: column "{column}" must be a number, {LOWEST:g} to {HIGHEST:g}, got {text!r:.40}'
        ) from None
    if not LOWEST <= score <= HIGHEST:  # NaN as well
        raise UserError(f'{where}: column "{column}" must lie in {LOWEST:g} to {HIGHEST:g}, got {score:g}')
    return score


def _check_ratings(clips: Sequence[Clip], path: Path, folds: int) -> None:
    if len(clips) < MIN_CLIPS:
        raise UserError(f"{path} rates {len(clips)} clips, at least {MIN_CLIPS} are needed; rate more clips")
    if len({clip.score for clip in clips}) == 1:
        raise UserError(f"{path} gives every clip the rating {clips[0].score:g}; ratings must differ")
    if folds > len(clips):
        raise UserError(f"--folds {folds} is more than the {len(clips)} clips in {path}; use fewer folds")


def _check_files(clips: Sequence[Clip], audio: Path, listed_in: str | Path = "the scores") -> None:
    """Name missing files before anything is computed."""
    # unlike pathlib's, this isfile returns False for a name that is too long
    absent = [clip.name for clip in clips if not os.path.isfile(audio / clip.name)]
    if absent:
        shown = ", ".join(f"{name:.80}" for name in absent[:3]) + (
            f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        )
        raise UserError(f"missing from {audio}, but listed in {listed_in}: {shown}")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks (n,) float64; equal values share their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def _pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two (n,) tensors; 0 if one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else 0.0


def _rounded(value: Any) -> Any:
    """The same structure with floats rounded to ``DIGITS`` decimals."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return value


def _write(path: Path, text: str) -> None:
    """Write the whole file, or nothing."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
