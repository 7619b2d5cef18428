"""How well an ear tells real excerpts from corruptions: the area under the ROC curve (AUC), by kind and soundfont."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from smart.reward.naturalness.corruptions import HELD_OUT, KINDS, MEASURED
from smart.reward.naturalness.excerpts import REAL

EVERY = (REAL, *MEASURED, *KINDS, *HELD_OUT)


def auc(real: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """The share of pairs in which the real excerpt is rated higher; a tie counts half. NaN for no pairs."""
    a, b = np.asarray(real, np.float64), np.sort(np.asarray(other, np.float64))
    if not len(a) or not len(b):
        return float("nan")
    return float((np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")).mean() / 2 / len(b))


def table(ratings: Mapping[str, npt.NDArray[np.float32]], fonts: Sequence[int], names: Sequence[str]) -> str:
    """Lines of text: AUC and median of each kind, over all excerpts and for each soundfont.

    Args:
        ratings: kind -> ratings (E,) of the same excerpts, "real" among them.
        fonts: the number of the soundfont of each excerpt.
        names: the soundfonts.
    """
    font = np.asarray(fonts)
    lines = [f"{'kind':<34}{'median':>8}{'AUC':>8}" + "".join(f"{name[:12]:>14}" for name in names)]
    for kind, values in ratings.items():
        cells = [auc(ratings[REAL][font == k], values[font == k]) for k in range(len(names))]
        numbers = f"{np.median(values):>8.2f}" + (" " * 8 if kind == REAL else f"{auc(ratings[REAL], values):>8.3f}")
        shown = "".join(
            f"{np.median(values[font == k]):>14.2f}" if kind == REAL else f"{cell:>14.3f}"
            for k, cell in enumerate(cells)
        )
        heard = "  (never heard in training)" if kind in HELD_OUT else ""
        lines.append(f"{kind:<34}{numbers}{shown}{heard}")
    return "\n".join(lines)


def report(
    ratings: Mapping[str, npt.NDArray[np.float32]], fonts: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """kind -> "auc", "median" and the AUC by soundfont, rounded; of the real excerpts the medians alone."""
    font = np.asarray(fonts)
    found = {}
    for kind, values in ratings.items():
        entry = {"median": float(np.median(values))}
        if kind != REAL:
            entry["auc"] = auc(ratings[REAL], values)
            entry |= {name: auc(ratings[REAL][font == k], values[font == k]) for k, name in enumerate(names)}
        found[kind] = {key: round(value, 4) for key, value in entry.items() if np.isfinite(value)}
    return found
