"""Fit ``ce_proxy`` to choices between pairs of clips, "A is better than B", instead of ratings.

    python -m smart.reward.calibrate --audio DIR --pairs FILE

A Bradley-Terry model whose strengths are linear in the descriptors: with z_A and z_B the standardised descriptors of
two clips, P(A is better than B) = 1 / (1 + exp(-w (z_A - z_B))), and the weights w minimise the mean of -log P over the
choices plus ridge |w|^2. Choices tell differences only: the mean clip is rated 5.5, and one point is one unit of the
logit, so that of two clips a point apart the better one wins 73% of choices.

Three kinds of file are read: a table with the columns ``better`` and ``worse`` (file names), the choices that the
demo's blind mode saves (CSV or JSON), and the ratings that ``smart study export`` writes, of which every two of one
participant for the same prompt are compared.
"""

import itertools
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from smart import UserError
from smart.files import parse_json
from smart.reward.ce_proxy import DESCRIPTORS, Coefficients, Term

MIDDLE = 5.5  # the rating of the mean clip
LEAST = 8  # pairs
CONSTANT = 1e-4  # a descriptor with a smaller standard deviation counts as constant and is not scaled
STEPS = 50  # of Newton's method, which needs about five

Rows = Sequence[Mapping[str, Any]]


class Pair(NamedTuple):
    """One choice: the better clip's file, the other's, and what is held out together, such as a prompt."""

    better: str
    worse: str
    group: str


def read_pairs(path: Path, columns: Sequence[str], rows: Rows, audio: Path) -> list[Pair]:
    """The choices of a table, by its columns; ties and checks are left out.

    Raises ``UserError`` for other columns, a file name outside ``audio``, and fewer than ``LEAST`` choices.
    """
    if {"better", "worse"} <= set(columns):
        found = [
            Pair(str(row["better"]).strip(), str(row["worse"]).strip(), str(row.get("group") or f"pair {number}"))
            for number, row in enumerate(rows)
        ]
    elif {"prompt", "a", "b", "choice"} <= set(columns):
        found = _of_demo(rows, audio)
    elif {"participant", "excerpt", "prompt", "rating"} <= set(columns):
        found = _of_study(path, rows)
    else:
        raise UserError(
            f"{path}: expected the columns better and worse, the choices of a demo page (prompt, a, b, choice), or the "
            f"export of a study (participant, excerpt, prompt, rating); it has {', '.join(columns)}"
        )
    for pair in found:
        for name in pair[:2]:
            if not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(f'{path}: clip "{name:.60}" is not inside --audio; give its path from there')
    found = [pair for pair in found if pair.better != pair.worse]
    if len(found) < LEAST:
        raise UserError(f"{path} holds {len(found)} choices between two clips, at least {LEAST} are needed")
    return found


def parse_choices(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a demo page's JSON. Raises ``UserError`` if it is none."""
    try:
        choices = parse_json(path.read_text(encoding="utf-8"))["choices"]
        rows = [dict(row) for row in choices]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the choices that a demo page saves as JSON ({error})") from None
    return sorted({name for row in rows for name in row}), rows


def _of_demo(rows: Rows, audio: Path) -> list[Pair]:
    found = []
    for row in rows:
        side = str(row["choice"]).strip().upper()
        if side in ("A", "B"):
            a, b = (_file_of(row, str(row[name]), audio) for name in ("a", "b"))
            better, worse = (a, b) if side == "A" else (b, a)
            found.append(Pair(better, worse, f"{row.get('section', '')} {row['prompt']}"))
    return found


def _file_of(row: Mapping[str, Any], system: str, audio: Path) -> str:
    """The file of a system's piece: as the page saves it, or as `smart evaluate sample --audio` names it."""
    try:
        prompt = int(row["prompt"])
    except ValueError:
        raise UserError(f"prompt {row['prompt']!r}: expected a number") from None
    label = f"{row.get('section', '')} prompt {prompt:02d} {system}"
    saved = re.sub(r"[^A-Za-z0-9]+", "-", unicodedata.normalize("NFKD", label)).strip("-").lower()
    names = (f"{prompt:04d}-{system}.wav", f"{saved}.wav", f"{saved}.flac")
    return next((name for name in names if os.path.isfile(audio / name)), names[0])


def _of_study(path: Path, rows: Rows) -> list[Pair]:
    heard: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for number, row in enumerate(rows):
        if row.get("check") or str(row.get("repeat") or 0) not in ("0", "0.0", "False"):
            continue
        try:
            rating = float(row["rating"])
        except ValueError:
            raise UserError(f"{path}, row {number + 1}: rating {row['rating']!r:.40}: expected a number") from None
        heard[str(row["participant"]), str(row["prompt"])][str(row["excerpt"])] = rating
    found = []
    for (_, prompt), ratings in heard.items():
        for (a, one), (b, other) in itertools.combinations(ratings.items(), 2):
            if one != other:
                better, worse = (a, b) if one > other else (b, a)
                found.append(Pair(f"{better}.wav", f"{worse}.wav", f"prompt {prompt}"))
    return found


# Fit --------------------------------------------------------------------------------------------------------------


def fit(descriptors: torch.Tensor, better: torch.Tensor, worse: torch.Tensor, ridge: float) -> Coefficients:
    """The Bradley-Terry fit of the module.

    Args:
        descriptors: (n, 4) float64 of all clips, in the order of ``DESCRIPTORS``.
        better, worse: (p,) int64, the rows of each pair.
        ridge: strength of the penalty, above 0: without it, choices that can all be explained have no best fit.
    """
    heard = descriptors[torch.cat([better, worse]).unique()]
    low, high = heard.min(dim=0).values, heard.max(dim=0).values
    mean, scale = heard.mean(dim=0), heard.std(dim=0, correction=0)
    scale = torch.where(scale > CONSTANT, scale, torch.ones_like(scale))
    z = (descriptors - mean) / scale
    gap = z[better] - z[worse]  # (p, 4)
    weights = torch.zeros(gap.shape[1], dtype=gap.dtype)
    penalty = 2 * max(ridge, 1e-9) * torch.eye(len(weights), dtype=gap.dtype)
    for _ in range(STEPS):  # Newton's method; the objective is convex
        lost = torch.sigmoid(-gap @ weights)
        gradient = -(lost[:, None] * gap).mean(dim=0) + penalty @ weights
        curvature = (gap * (lost * (1 - lost))[:, None]).T @ gap / len(gap) + penalty
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if step.abs().max() < 1e-10:
            break
    columns = zip(*(v.tolist() for v in (weights, mean, scale, low, high)), strict=True)
    terms = {name: Term(*column) for name, column in zip(DESCRIPTORS, columns, strict=True)}
    return Coefficients(intercept=MIDDLE, terms=terms)


def strengths(descriptors: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """(n,) ratings without the clamp to 1 to 10, on the scale of the logit."""
    total = torch.full((len(descriptors),), coefficients.intercept, dtype=torch.float64)
    for column, name in enumerate(DESCRIPTORS):
        term = coefficients.terms[name]
        total += term.weight * (descriptors[:, column].clamp(term.low, term.high) - term.mean) / term.scale
    return total


def cross_validate(
    descriptors: torch.Tensor,
    better: torch.Tensor,
    worse: torch.Tensor,
    groups: Sequence[str],
    *,
    folds: int,
    repeats: int,
    ridge: float,
    generator: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """Share of held-out choices that the fit to the other groups predicts, and mean -log P; mean and std over repeats.

    Guessing gives 0.5 and log 2 = 0.693. Choices of one group share a fold.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    figures: dict[str, list[float]] = {"right": [], "log_loss": []}
    for _ in range(repeats):
        fold = torch.from_numpy((generator.permutation(len(names)) % min(folds, len(names)))[member])
        logit = torch.zeros(len(better), dtype=torch.float64)
        for k in fold.unique():
            out = fold == k
            found = strengths(descriptors, fit(descriptors, better[~out], worse[~out], ridge))
            logit[out] = found[better[out]] - found[worse[out]]
        figures["right"].append(float((logit > 0).double().mean() + 0.5 * (logit == 0).double().mean()))
        figures["log_loss"].append(float(torch.nn.functional.softplus(-logit).mean()))
    return {name: {"mean": float(np.mean(values)), "std": float(np.std(values))} for name, values in figures.items()}


def check_groups(path: Path, pairs: Sequence[Pair]) -> None:
    """Raise ``UserError`` if all choices are of one group, so that nothing can be held out."""
    if len({pair.group for pair in pairs}) < 2:
        raise UserError(f"{path}: all choices are of one group; at least 2 groups (prompts) are needed")


def table(report: Mapping[str, Any]) -> str:
    """The report as text for the terminal."""
    held = report["pairs_validation"]
    right, loss = held["right"], held["log_loss"]
    lines = [
        f"{report['pairs']} choices between {report['clips']} clips in {held['groups']} groups, "
        f"ridge {report['ridge']:g}",
        f"held-out choices predicted: {100 * right['mean']:.0f}% ± {100 * right['std']:.0f}% (guessing: 50%), "
        f"log loss {loss['mean']:.3f} (guessing: {math.log(2):.3f})",
        f"{'descriptor':<12}{'weight':>9}{'mean':>9}{'scale':>9}{'low':>9}{'high':>9}",
    ]
    for name, term in report["descriptors"].items():
        numbers = "".join(f"{term[key]:>9.3f}" for key in ("weight", "mean", "scale", "low", "high"))
        lines.append(f"{name:<12}{numbers}")
    return "\n".join(lines)
