"""Intervals of means and shares, and which of two to read: the bootstrap's, or Wilson's where that is too narrow.

A bootstrap resamples what is there: of few prompts its interval is too narrow, and of prompts that all came out alike
it has no width. Pure functions on numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

Array = NDArray[np.float64]

FEW_PROMPTS = 30  # under this many, and where the bootstrap has width 0, Wilson's interval is the one to read


@dataclass(frozen=True)
class Interval:
    """An estimate with the limits of its interval, in the unit of what is estimated."""

    estimate: float
    low: float
    high: float


def percentile_interval(estimate: float, draws: ArrayLike, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval: the central `level` share of the resampled estimates."""
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(draws), [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def wilson_interval(mean: float, n: float, level: float = 0.95) -> Interval:
    """Wilson's (1927) score interval of a share `mean` in n independent trials.

    For trials with values anywhere in [0, 1] it is conservative, because their variance is at most mean * (1 - mean).
    """
    z = float(ndtri(1 - (1 - level) / 2))
    shrink = 1 + z**2 / n
    centre = (mean + z**2 / (2 * n)) / shrink
    half = z / shrink * float(np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2)))
    return Interval(float(mean), max(0.0, centre - half), min(1.0, centre + half))


def too_narrow(prompts: int, interval: Sequence[float]) -> bool:
    """Whether a bootstrap interval misleads: few prompts, or all came out alike."""
    return prompts < FEW_PROMPTS or no_width(interval)


def no_width(interval: Sequence[float]) -> bool:
    """Whether the limits are equal up to rounding: all prompts came out alike."""
    low, high = interval
    return high - low <= 1e-12 * max(abs(low), abs(high))


def readable(prompts: int, interval: Sequence[float], wilson: Sequence[float]) -> tuple[float, float]:
    """Limits of the interval to read: the bootstrap's, or Wilson's where that is too narrow.

    Args:
        prompts: how many were resampled.
        interval: the bootstrap's limits.
        wilson: Wilson's, in the same unit.
    """
    low, high = wilson if too_narrow(prompts, interval) else interval
    return low, high


def effective_count(weights: ArrayLike) -> float:
    """How many equal trials a weighted mean is worth at least: (sum w)^2 / sum w^2 (Kish 1965)."""
    w = np.asarray(weights, dtype=np.float64)
    return float(w.sum() ** 2 / (w**2).sum())


def share_interval(estimate: float, draws: ArrayLike, weights: ArrayLike, level: float = 0.95) -> Interval:
    """The interval to read of a mean of values in [0, 1] over prompts: bootstrap, or Wilson's where it is too narrow.

    Args:
        estimate: the share.
        draws: [R] of the resamples.
        weights: [n] how much each prompt counts, such as its number of rows.
        level: of the interval.
    """
    found = percentile_interval(estimate, draws, level)
    if not too_narrow(len(np.asarray(weights)), (found.low, found.high)):
        return found
    return wilson_interval(estimate, effective_count(weights), level)
