"""Whether ratings can tell the variances of a mixed model apart, before it is fitted.

REML sees the covariance sum_k s_k V_k of the ratings only through M V_k M, where M takes the fixed effects out. If one
of these matrices is a combination of the others, two sets of variances s describe the ratings equally well, and a fit
returns an arbitrary one of them: a variance that grows with the ratings' number of decimals, or an effect of hundreds
of points. That happens if a system was heard by one participant, if each participant heard one system, or if there are
as many random effects as ratings (which lme4 refuses).
"""

from collections.abc import Sequence

import numpy as np

from smart.study.derivatives import Array
from smart.study.mixed import Term, expand

SAME = 1e-6  # smallest eigenvalue of the matrices' correlations below which one is a combination of others


def unidentified(x: Array, terms: Sequence[Term]) -> str:
    """Why the variances of ``terms`` cannot be told from ratings with fixed effects ``x`` (n, p); "" if they can."""
    n, p = x.shape
    for term in terms:
        count = term.size * term.z.shape[1]
        if count >= n:
            return f"{n} ratings cannot tell the {count} random effects by {term.name} from their residuals"
    wide = np.concatenate([expand(term) for term in terms], axis=1)
    half = np.linalg.qr(x)[0].T @ wide
    cross = wide.T @ wide - half.T @ half  # Z' M Z
    parts: list[Array] = []  # A_k Z' M Z, with V_k = Z A_k Z'
    begin = 0
    for term in terms:
        k, places = term.z.shape[1], begin + np.arange(term.size * term.z.shape[1]).reshape(term.size, -1)
        for i in range(k):
            for j in range(i + 1):
                part = np.zeros_like(cross)
                part[places[:, i]] = cross[places[:, j]]
                part[places[:, j]] = cross[places[:, i]]
                parts.append(part)
        begin += term.size * k
    gram = np.empty((len(parts) + 1, len(parts) + 1))
    for row, one in enumerate(parts):
        gram[row, -1] = gram[-1, row] = np.trace(one)
        for column, other in enumerate(parts[: row + 1]):
            gram[row, column] = gram[column, row] = (one * other.T).sum()
    gram[-1, -1] = n - p
    size = np.sqrt(np.diag(gram))
    if size.min() <= SAME * size.max():
        return "too few participants heard several systems, so that how much they differ cannot be told"
    if np.linalg.eigvalsh(gram / np.outer(size, size)).min() < SAME:
        return "the ratings cannot tell these variances apart"
    return ""
