"""Numerical derivatives of a criterion."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Value = Callable[[Array], float]


def gradient(value: Value, theta: Array, step: float = 1e-5) -> Array:
    """First derivatives by central differences."""
    moves = step * np.eye(len(theta))
    return np.array([(value(theta + move) - value(theta - move)) / (2 * step) for move in moves])


def hessian(value: Value, theta: Array, steps: Array) -> Array:
    """Second derivatives by central differences, with Richardson's extrapolation over halved steps."""

    def plain(steps: Array) -> Array:
        d = len(theta)
        moves, centre, found = np.diag(steps), value(theta), np.empty((d, d))
        for i in range(d):
            up, down = value(theta + moves[i]), value(theta - moves[i])
            found[i, i] = (up - 2 * centre + down) / steps[i] ** 2
            for j in range(i):
                both = value(theta + moves[i] + moves[j]) + value(theta - moves[i] - moves[j])
                mixed = value(theta + moves[i] - moves[j]) + value(theta - moves[i] + moves[j])
                found[i, j] = found[j, i] = (both - mixed) / (4 * steps[i] * steps[j])
        return found

    return (4 * plain(steps / 2) - plain(steps)) / 3


def steps_of(theta: Array) -> Array:
    """Steps for ``hessian`` that suit the size of each coordinate."""
    return 0.02 * np.maximum(np.abs(theta), 0.1)
