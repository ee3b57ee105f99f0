"""Statistics of win rates and paired comparisons: pure functions on arrays, no models, no files, no printing.

The unit is the *prompt*: several samples of one prompt resemble each other, so a bootstrap over samples gives an
interval that is too narrow (Miller 2024, arXiv 2411.00640). Every interval here resamples whole prompts, and both
models' samples of a prompt stay together (paired). Percentile intervals; no normal approximation, which is not to be
trusted under a few hundred prompts (Bowyer et al. 2025, arXiv 2503.01747).

Scores that are NaN mean "could not be scored": they are left out and counted, never read as 0 or as a tie.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import binom

from evaluation.intervals import (
    Interval,
    effective_count,
    percentile_interval,
    share_interval,
    too_narrow,
    wilson_interval,
)

Array = NDArray[np.float64]

_CHUNK = 1 << 22  # resampled values held at once: 32 MiB
_EXACT = 200  # coins whose chances are counted in whole numbers
_ENUMERATE_UP_TO = 1 << 14  # different sums of signed differences; hardly more than the resamples one would draw


@dataclass(frozen=True)
class WinRate:
    """How often model A beats model B on the same prompts. Rates are shares in [0, 1].

    Attributes:
        prompts: prompts that count (at least one pair of samples could be scored on both sides).
        prompts_excluded: prompts left out because no pair could be scored.
        pairs: sample pairs that count; each prompt weighs the same however many pairs it has.
        pairs_excluded: sample pairs left out because a score was NaN.
        rate: mean over prompts of (win share + tie share / 2), with its paired bootstrap interval over prompts.
        rate_ties_dropped: won / (won + lost) with the same weights and resamples, and the interval to read; None if
            every pair is a tie.
        standard_error: sd (ddof 1) of the prompt scores / sqrt(prompts); None for one prompt, and where all came out
            alike: their spread says nothing of the error.
        wilson: Wilson's score interval with `prompts` trials. Conservative here, and the one to read when there are
            few prompts or all came out alike (`intervals.readable`).
        p_value: two-sided sign-flip permutation test of "A and B are exchangeable".
        prompt_outcomes: prompts (won, tied, lost): prompt score above, at, below one half.
        pair_outcomes: sample pairs (won, tied, lost).
        level: confidence level of all intervals.
        resamples: bootstrap resamples, and random sign patterns where they are too many to enumerate.
        seed: seed of both.
    """

    prompts: int
    prompts_excluded: int
    pairs: int
    pairs_excluded: int
    rate: Interval
    rate_ties_dropped: Interval | None
    standard_error: float | None
    wilson: Interval
    p_value: float
    prompt_outcomes: tuple[int, int, int]
    pair_outcomes: tuple[int, int, int]
    level: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class MeanDifference:
    """Mean score of both sides over prompts that have a scored sample on both, and the paired difference a - b.

    `known` is False where the interval has no width, of one prompt or of prompts with equal differences: it then says
    nothing of the error.
    """

    mean_a: float
    mean_b: float
    difference: Interval
    prompts: int
    known: bool


@dataclass(frozen=True)
class PairedComparison:
    """Two systems measured on the same rows: the difference x - y of their means, over whole clusters.

    Attributes:
        mean_x: mean over the rows that both have.
        mean_y: the same of the other.
        difference: mean_x - mean_y with its bootstrap interval over clusters; of values in [0, 1] Wilson's (that of
            (1 + x - y) / 2), where the bootstrap's is too narrow.
        standard_error: of the difference, clustered (`clustered_standard_error`); NaN for one cluster.
        p_value: two-sided sign-flip permutation test, flipping whole clusters.
        rows: rows that count.
        clusters: clusters that count.
    """

    mean_x: float
    mean_y: float
    difference: Interval
    standard_error: float
    p_value: float
    rows: int
    clusters: int


def preferences(scores_a: ArrayLike, scores_b: ArrayLike) -> Array:
    """All sample pairs of one prompt: 1[a > b] + 0.5 * 1[a == b].

    Args:
        scores_a: [I] scores of model A's samples.
        scores_b: [J] scores of model B's samples.

    Returns:
        [I, J] preferences for A; NaN where either score is NaN.
    """
    a = np.asarray(scores_a, dtype=np.float64)[:, None]
    b = np.asarray(scores_b, dtype=np.float64)[None, :]
    return np.where(np.isnan(a) | np.isnan(b), np.nan, (a > b) + 0.5 * (a == b))


def bootstrap_means(columns: ArrayLike, resamples: int, rng: np.random.Generator) -> Array:
    """Means of bootstrap resamples of rows; the columns of a row stay together.

    Args:
        columns: [n, k], one row per prompt (cluster), one column per quantity.
        resamples: number of resamples, R.
        rng: source of randomness.

    Returns:
        [R, k] column means of n rows drawn with replacement.
    """
    values = np.asarray(columns, dtype=np.float64)
    n = len(values)
    out = np.empty((resamples, values.shape[1]))
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times_drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)  # [size, n]: how often each row was drawn
        out[start : start + size] = times_drawn @ values / n
    return out


def sign_flip_p_value(differences: ArrayLike, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided permutation test of a mean paired difference of 0: flip each prompt's sign at random.

    If the two models were exchangeable, swapping their names on a prompt would change nothing but this sign. All sign
    patterns are enumerated where they give at most 2^14 different sums, as those of up to 14 prompts, or of any number
    that were won, tied or lost outright; otherwise p = (1 + hits) / (1 + resamples), which is never 0.

    Args:
        differences: [n] paired differences, one per prompt.
        resamples: random sign patterns when they are not enumerated.
        rng: source of randomness; unused when enumerated.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    observed = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # a tie up to rounding counts as at least as extreme
    scale = float(np.abs(values).max(initial=0.0))
    if scale == 0:
        return 1.0
    sizes, counts = np.unique(np.round(np.abs(values) / scale, 12), return_counts=True)
    if np.prod(counts[sizes > 0] + 1.0) <= _ENUMERATE_UP_TO:
        sums, chances = np.zeros(1), np.ones(1)
        for size, count in zip(scale * sizes[sizes > 0], counts[sizes > 0], strict=True):
            turned = np.arange(count + 1)  # how many of the equal ones have the other sign
            sums = (sums[:, None] + size * (count - 2 * turned)).ravel()
            chances = (chances[:, None] * _binomial(int(count))).ravel()
        return min(1.0, float(chances[np.abs(sums) >= observed].sum()))
    hits, step = 0, max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        signs = 1 - 2 * rng.integers(0, 2, size=(min(step, resamples - start), n), dtype=np.int8)
        hits += int(np.sum(np.abs(signs @ values) >= observed))
    return (1 + hits) / (1 + resamples)


def _binomial(n: int) -> Array:
    """[n + 1] chances of 0 to n heads; exact for few coins."""
    if n <= _EXACT:
        return np.array([math.comb(n, k) / 2**n for k in range(n + 1)])
    return np.asarray(binom.pmf(np.arange(n + 1), n, 0.5))


def win_rate_of_preferences(
    matrices: Sequence[Array], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> WinRate:
    """Win rate of A from the preferences of all sample pairs of each prompt.

    Args:
        matrices: one [I, J] array per prompt with values in [0, 1] (1 = A better, 0.5 = tie) or NaN; sizes may differ.
        resamples: bootstrap resamples.
        seed: seed of the resampling, not of any model.
        level: confidence level.

    Raises:
        ValueError: no prompt has a pair that could be scored.
    """
    decided = [np.asarray(m)[~np.isnan(m)] for m in matrices]
    used = [m for m in decided if m.size]
    if not used:
        raise ValueError("no prompt has a pair of samples that could be scored")
    # Per prompt: score, and the shares won, tied, lost. [n, 4]
    rows = np.array([[m.mean(), (m > 0.5).mean(), (m == 0.5).mean(), (m < 0.5).mean()] for m in used])
    score, won, _, lost = rows.T
    n, mean = len(rows), float(score.mean())
    rng = np.random.default_rng(seed)
    draws = bootstrap_means(rows, resamples, rng)
    pairs = np.concatenate(used)
    return WinRate(
        prompts=n,
        prompts_excluded=len(matrices) - n,
        pairs=len(pairs),
        pairs_excluded=sum(np.asarray(m).size for m in matrices) - len(pairs),
        rate=percentile_interval(mean, draws[:, 0], level),
        rate_ties_dropped=without_ties(won, lost, draws[:, 1], draws[:, 3], level),
        standard_error=standard_error(score),
        wilson=wilson_interval(mean, n, level),
        p_value=sign_flip_p_value(score - 0.5, resamples, rng),
        prompt_outcomes=_outcomes(score),
        pair_outcomes=_outcomes(pairs),
        level=level,
        resamples=resamples,
        seed=seed,
    )


def standard_error(values: Array) -> float | None:
    """sd (ddof 1) / sqrt(n); None of one value, and of values that are all alike up to rounding."""
    if len(values) < 2 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def without_ties(won: Array, lost: Array, drawn_won: Array, drawn_lost: Array, level: float) -> Interval | None:
    """won / (won + lost) with the interval to read; None where every pair is a tie.

    Args:
        won, lost: [n] sums of each prompt (cluster).
        drawn_won, drawn_lost: [R] of resamples; one of tied prompts alone says nothing and is left out.
        level: of the interval.
    """
    total = won + lost
    if not total.any():
        return None
    decided = drawn_won + drawn_lost
    kept = decided > 0
    share = float(won.sum() / total.sum())
    return share_interval(share, drawn_won[kept] / decided[kept], total[total > 0], level)


def _outcomes(values: Array) -> tuple[int, int, int]:
    return int((values > 0.5).sum()), int((values == 0.5).sum()), int((values < 0.5).sum())


def win_rate(
    scores_a: Sequence[ArrayLike],
    scores_b: Sequence[ArrayLike],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> WinRate:
    """Win rate of A over B from scalar scores; every sample of A meets every sample of B of the same prompt.

    Args:
        scores_a: per prompt, the scores [I] of A's samples.
        scores_b: per prompt, the scores [J] of B's samples.
        resamples: as in `win_rate_of_preferences`.
        seed: as there.
        level: as there.
    """
    matrices = [preferences(a, b) for a, b in zip(scores_a, scores_b, strict=True)]
    return win_rate_of_preferences(matrices, resamples=resamples, seed=seed, level=level)


def mean_difference(
    scores_a: Sequence[ArrayLike],
    scores_b: Sequence[ArrayLike],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> MeanDifference:
    """Mean score of each side, and their paired difference with a bootstrap interval over prompts.

    A prompt's score is the mean of its samples that could be scored; prompts without one on either side are left out.

    Raises:
        ValueError: no prompt is left.
    """
    rows = []
    for a, b in zip(scores_a, scores_b, strict=True):
        scored = [side[~np.isnan(side)] for side in (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))]
        if all(side.size for side in scored):
            rows.append([side.mean() for side in scored])
    if not rows:
        raise ValueError("no prompt has a scored sample on both sides")
    values = np.array(rows)  # [n, 2]
    mean_a, mean_b = values.mean(axis=0)
    draws = bootstrap_means(values, resamples, np.random.default_rng(seed))
    difference = percentile_interval(mean_a - mean_b, draws[:, 0] - draws[:, 1], level)
    known = standard_error(values[:, 0] - values[:, 1]) is not None
    return MeanDifference(float(mean_a), float(mean_b), difference, len(values), known)


def cluster_codes(labels: Iterable[Hashable]) -> tuple[NDArray[np.intp], int]:
    """The number of each row's cluster, in order of first appearance, and how many clusters there are."""
    places: dict[Hashable, int] = {}
    codes = np.array([places.setdefault(label, len(places)) for label in labels], dtype=np.intp)
    return codes, len(places)


def cluster_sums(columns: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Array:
    """Sums of rows by cluster, with the number of rows in the last column.

    Args:
        columns: [n, k] values of rows.
        clusters: n labels, such as the rows' prompts; None: every row is its own cluster.

    Returns:
        [C, k + 1], clusters in order of first appearance.

    Raises:
        ValueError: not one label per row.
    """
    values = np.asarray(columns, dtype=np.float64)
    counted = np.column_stack([values, np.ones(len(values))])
    if clusters is None:
        return counted
    codes, count = cluster_codes(clusters)
    if len(codes) != len(values):
        raise ValueError(f"{len(values)} rows but {len(codes)} cluster labels")
    sums = np.zeros((count, counted.shape[1]))
    np.add.at(sums, codes, counted)
    return sums


def cluster_bootstrap(
    columns: ArrayLike, clusters: Sequence[Hashable] | None, resamples: int, rng: np.random.Generator
) -> Array:
    """Means over rows in bootstrap resamples of whole clusters: sums / numbers of rows drawn.

    Args:
        columns: [n, k] values of rows.
        clusters: n labels; None: every row is its own cluster.
        resamples: number of resamples, R.
        rng: source of randomness.

    Returns:
        [R, k] means. With one row per cluster these are `bootstrap_means`.
    """
    draws = bootstrap_means(cluster_sums(columns, clusters), resamples, rng)
    return draws[:, :-1] / draws[:, -1:]


def clustered_standard_error(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Standard error of the mean of rows that are correlated within clusters.

    sqrt(C/(C-1) sum_c (sum_{i in c} (x_i - mean))^2) / n (Miller 2024, arXiv:2411.00640, with the small-sample factor
    C/(C-1)). With one row per cluster it is sd (ddof 1) / sqrt(n). NaN for a single cluster.
    """
    sums = cluster_sums(np.asarray(values, dtype=np.float64)[:, None], clusters)
    count, rows = len(sums), float(sums[:, 1].sum())
    if count < 2:
        return float("nan")
    residuals = sums[:, 0] - sums[:, 1] * sums[:, 0].sum() / rows
    return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / rows)


def compare_paired(
    x: ArrayLike,
    y: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedComparison:
    """Is the mean of x different from the mean of y, measured on the same rows?

    Rows where either is NaN are left out. The test flips the sign of whole clusters, since swapping the two systems'
    names on a prompt swaps them in all its rows.

    Args:
        x: [n] one system's values, such as its win share on each prompt against a baseline.
        y: [n] the other's, in the same order.
        clusters: n labels, such as prompts where rows repeat them; None: every row is its own.
        resamples: bootstrap resamples, and random sign patterns where they are too many to enumerate.
        seed: seed of both.
        level: confidence level of the interval.

    Raises:
        ValueError: different lengths, or no row where both are known.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two rows of numbers of one length are needed, got shapes {a.shape} and {b.shape}")
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        raise ValueError("no row on which both systems were measured")
    kept = None if clusters is None else [label for label, known in zip(clusters, both, strict=True) if known]
    difference = (a - b)[both]
    rng = np.random.default_rng(seed)
    draws = cluster_bootstrap(difference[:, None], kept, resamples, rng)[:, 0]
    sums = cluster_sums(difference[:, None], kept)
    interval = percentile_interval(float(difference.mean()), draws, level)
    shares = all(side[both].min() >= 0 and side[both].max() <= 1 for side in (a, b))
    if shares and too_narrow(len(sums), (interval.low, interval.high)):
        wilson = wilson_interval((1 + interval.estimate) / 2, effective_count(sums[:, 1]), level)
        interval = Interval(interval.estimate, 2 * wilson.low - 1, 2 * wilson.high - 1)
    return PairedComparison(
        mean_x=float(a[both].mean()),
        mean_y=float(b[both].mean()),
        difference=interval,
        standard_error=clustered_standard_error(difference, kept),
        p_value=sign_flip_p_value(sums[:, 0], resamples, rng),
        rows=len(difference),
        clusters=len(sums),
    )


def holm(p_values: ArrayLike) -> Array:
    """Holm's (1979) step-down adjusted p-values, in the order given.

    Rejecting where the adjusted value is at most alpha keeps the chance of any false rejection among all m at alpha,
    however the tests depend on each other. With p(1) <= ... <= p(m): max over j <= i of min(1, (m - j + 1) p(j)).

    Args:
        p_values: [m] in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def minimal_detectable_difference(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided test at `alpha` finds with probability `power`, in the error's unit.

    (z_{1-alpha/2} + z_power) * standard_error: 2.8 standard errors at 5 % and 80 %. Normal approximation; it neglects
    rejections in the wrong direction.
    """
    return float((ndtri(1 - alpha / 2) + ndtri(power)) * standard_error)
