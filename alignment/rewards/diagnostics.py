"""How far an ensemble's members agree, and whether their probabilities can be trusted: pure functions on arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def disagreement(scores: ArrayLike) -> Array:
    """`[k, B]` scores, standardised → `[B]` population standard deviation over members; NaN members are left out."""
    return np.asarray(np.nanstd(np.asarray(scores, dtype=np.float64), axis=0), dtype=np.float64)


def agreement_matrix(margins: ArrayLike) -> Array:
    """`[k, n]` margins of n pairs → `[k, k]`: share of pairs that two members order alike.

    A tie of either counts one half; pairs that either could not score (NaN) are left out.
    """
    signs = np.sign(np.asarray(margins, dtype=np.float64))
    alike = 0.5 + 0.5 * signs[:, None, :] * signs[None, :, :]
    return np.asarray(np.nanmean(alike, axis=2), dtype=np.float64)


def reliability(probability: ArrayLike, outcome: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Per bin of equal width that holds pairs: their number, mean probability, and mean outcome.

    Args:
        probability: `[n]` in [0, 1] of "the first wins".
        outcome: `[n]` 1 where it did, 0 where not, 0.5 a tie.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    place = np.minimum((p * bins).astype(int), bins - 1)
    return [
        {
            "pairs": float((place == b).sum()),
            "probability": float(p[place == b].mean()),
            "won": float(y[place == b].mean()),
        }
        for b in range(bins)
        if (place == b).any()
    ]


def expected_calibration_error(probability: ArrayLike, outcome: ArrayLike, bins: int = 10) -> float:
    """ECE (Naeini et al. 2015; Guo et al. 2017, eq. 3): mean over pairs of |mean outcome - mean probability| of the
    pair's bin.

    Both directions of every pair are counted, so that it does not depend on which response is called first.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    rows = reliability(np.concatenate([p, 1 - p]), np.concatenate([y, 1 - y]), bins)
    return sum(row["pairs"] * abs(row["won"] - row["probability"]) for row in rows) / (2 * len(p))
