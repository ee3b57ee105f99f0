"""Best-of-n from a pool of N samples per prompt: gold and proxy against KL (Coste et al. 2024, arXiv:2310.02743).

    python evaluation/best_of_n.py sample MODEL --prompts prompts.txt --n 512 --pool pools/sft
    python evaluation/best_of_n.py curves --pool pools/sft --gold regex --gold-key pattern=good --proxy runs/ensemble

The first half is the estimator, pure functions on arrays; the second is the program. Samples and scores on disk are
`evaluation.pools`; the ensemble's aggregate is `alignment.rewards.aggregate`. docs/best_of_n.md explains the numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as `python evaluation/best_of_n.py`: this folder must not shadow the standard
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # library's `statistics`

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from evaluation.statistics import bootstrap_means, percentile_interval

Array = NDArray[np.float64]
Curve = list[dict[str, Any]]

RESAMPLES = 10_000
METHODS = ("single", "mean", "wco", "uwo")
_CHUNK = 1 << 22  # scores sorted at once: 32 MiB, and about five times that while sorting


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n policy || policy) in nats: ln n - (n-1)/n (eq. 1).

    Exact for a continuous score without ties; an upper bound for a discrete policy.
    """
    return math.log(n) - (n - 1) / n


def rank_weights(pool: int, ns: Sequence[int]) -> Array:
    """`[len(ns), pool]`: P(the best of n distinct samples of the pool is its i-th worst), i = 1 … pool (appendix B).

    C(i-1, n-1) / C(N, n), in logarithms: the binomials themselves overflow. What underflows is below 1e-300.
    """
    log_factorial = gammaln(np.arange(pool + 1, dtype=np.float64) + 1)
    weights = np.zeros((len(ns), pool))
    for row, n in zip(weights, ns, strict=True):
        i = np.arange(n, pool + 1)
        log_choose = log_factorial[i - 1] - log_factorial[n - 1] - log_factorial[i - n]  # ln C(i-1, n-1)
        log_all = log_factorial[pool] - log_factorial[n] - log_factorial[pool - n]  # ln C(N, n)
        row[n - 1 :] = np.exp(log_choose - log_all)
    return weights


def _sorted_together(proxy: Array, gold: Array) -> tuple[Array, Array]:
    """Both `[Q, N]` in the order of the proxy, ascending, NaN last; gold averaged over samples of equal proxy.

    The average is the exact expectation over random tie-breaks. Any order within a tie that looks at gold would leak
    it, and the order of drawing is one tie-break out of many.
    """
    order = np.argsort(proxy, axis=1, kind="stable")  # one permutation for both
    proxy, gold = np.take_along_axis(proxy, order, axis=1), np.take_along_axis(gold, order, axis=1)
    first = np.ones(proxy.shape, dtype=bool)  # of its tie; NaN is equal to nothing, and every row starts anew
    first[:, 1:] = proxy[:, 1:] != proxy[:, :-1]
    if first.all():
        return proxy, gold
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, proxy.size))
    means = np.add.reduceat(gold.ravel(), starts) / sizes
    return proxy, np.repeat(means, sizes).reshape(gold.shape)


def _expected_best(proxy: Array, gold: Array, ns: Sequence[int]) -> Array:
    """`[Q, 2, len(ns)]`: proxy and gold of the best of n by proxy, per prompt; NaN rows for prompts without a score.

    Raises:
        ValueError: a prompt has scores, but fewer than the largest n.
    """
    missing = np.isnan(proxy) | np.isnan(gold)
    sizes = proxy.shape[1] - missing.sum(axis=1)
    short = np.flatnonzero((sizes > 0) & (sizes < max(ns)))
    if len(short):
        raise ValueError(
            f"n = {max(ns)} is more than the {sizes[short[0]]} samples with both scores of prompt {short[0]} "
            f"(of {proxy.shape[1]} drawn; {len(short)} such prompt{'' if len(short) == 1 else 's'}): use smaller n"
        )
    found = np.full((len(proxy), 2, len(ns)), np.nan)
    for size in np.unique(sizes[sizes > 0]):
        weights = rank_weights(int(size), ns)
        numbers = np.flatnonzero(sizes == size)
        step = max(1, _CHUNK // proxy.shape[1])
        for chunk in (numbers[start : start + step] for start in range(0, len(numbers), step)):
            ordered = _sorted_together(np.where(missing[chunk], np.nan, proxy[chunk]), gold[chunk])
            for side, values in enumerate(ordered):
                found[chunk, side] = values[:, :size] @ weights.T
    return found


def _check(proxy: Array, gold: Array, ns: Sequence[int]) -> None:
    if proxy.ndim != 2 or proxy.shape != gold.shape or not proxy.size:
        raise ValueError(f"proxy and gold: expected one shape [prompts, samples], got {proxy.shape} and {gold.shape}")
    if np.isinf(proxy).any() or np.isinf(gold).any():
        raise ValueError("proxy and gold: infinite scores have no mean; use NaN for what could not be scored")
    if not len(ns):
        raise ValueError("ns: at least one n is needed")
    for n in ns:
        if isinstance(n, bool) or int(n) != n or n < 1:
            raise ValueError(f"ns: whole numbers from 1 on are needed, got {n!r}")
        if n > proxy.shape[1]:
            raise ValueError(f"n = {n} is more than the pool's {proxy.shape[1]} samples per prompt: use smaller n")


def _rows(per_prompt: Array, ns: Sequence[int], left_out: int, resamples: int, seed: int) -> Curve:
    """The curve of per-prompt expectations `[Q, 2, len(ns)]`."""
    kept = per_prompt[~np.isnan(per_prompt).any(axis=(1, 2))]
    if not len(kept):
        raise ValueError("no prompt has a sample with both scores")
    means = kept.mean(axis=0)  # [2, len(ns)]
    best = int(means[1].argmax())
    columns = np.concatenate([kept[:, 0], kept[:, 1], kept[:, 1] - kept[:, 1, best : best + 1]], axis=1)
    estimates = columns.mean(axis=0)
    draws = bootstrap_means(columns, resamples, np.random.default_rng(seed)) if len(kept) > 1 else None
    rows = []
    for place, n in enumerate(ns):
        row: dict[str, Any] = {"n": int(n), "kl": best_of_n_kl(int(n))}
        for number, name in enumerate(("proxy", "gold", "gold_from_best")):
            column = number * len(ns) + place
            row[name] = float(estimates[column])
            row[f"{name}_low"] = row[f"{name}_high"] = None
            if draws is not None:
                interval = percentile_interval(row[name], draws[:, column])
                row[f"{name}_low"], row[f"{name}_high"] = interval.low, interval.high
        counts = {"prompts": len(kept), "prompts_left_out": len(per_prompt) - len(kept), "samples_left_out": left_out}
        rows.append(row | counts)
    return rows


def best_of_n_curve(
    proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> Curve:
    """Expected proxy and gold score of the best of n samples by proxy, unbiased, for each n (appendix B).

    Every subset of n of the pool's N samples counts alike: R_n = sum_i C(i-1, n-1) / C(N, n) * gold of the i-th worst
    by proxy, and the mean over prompts. Equal proxies: see `_sorted_together`. A sample without a proxy (NaN) cannot
    be chosen and one without a gold score cannot be counted: both are left out, which leaves that prompt a smaller
    pool. A prompt with none left is left out whole.

    Args:
        proxy, gold: `[Q, N]` scores, higher is better; `gold[q, i]` is of the same response as `proxy[q, i]`.
        ns: each from 1 to N.
        resamples: bootstrap resamples of prompts; the same for every n.
        seed: of the bootstrap.

    Returns:
        A row for each n, in order: `n`; `kl` in nats; `proxy`, `gold` and `gold_from_best` (gold minus the gold at the
        n where this curve's gold is highest, prompt by prompt), each with its 95 % interval over prompts `…_low` and
        `…_high` (None for a single prompt); `prompts`, `prompts_left_out` and `samples_left_out`, counts.

    Raises:
        ValueError: shapes, infinite scores, an n that is not within 1 to N, or within 1 to what a prompt has left.
    """
    proxy, gold = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    _check(proxy, gold, ns)
    left_out = int((np.isnan(proxy) | np.isnan(gold)).sum())
    return _rows(_expected_best(proxy, gold, ns), ns, left_out, resamples, seed)


def overoptimization_curves(
    members: ArrayLike,
    gold: ArrayLike,
    ns: Sequence[int],
    *,
    lam: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalise: str = "member",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Curve]:
    """Curves of the single reward model and of the ensemble's mean, worst case and uncertainty-weighted score.

    All four choose from the same pool: a sample that one member could not score is left out of all. The bootstrap
    resamples of prompts are the same, too.

    Args:
        members: `[k, Q, N]` scores of k members.
        gold: `[Q, N]`.
        ns, resamples, seed: as of `best_of_n_curve`.
        lam, normalise: as of `alignment.rewards.aggregate`; the paper has lam 0.5 here.
        mean, std: `[k]` stored constants, needed with normalise="member".

    Returns:
        `single` (mean over members of each member's own curve, prompt by prompt; intervals are over prompts, not over
        members), `mean`, `wco`, `uwo`: rows of `best_of_n_curve`.

    Raises:
        ValueError: as of `best_of_n_curve` and `aggregate`.
    """
    from alignment.rewards.aggregate import aggregate

    scores, gold = np.array(members, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if scores.ndim != 3 or scores.shape[1:] != gold.shape:
        raise ValueError(f"members: expected [k, prompts, samples] over gold's {gold.shape}, got {scores.shape}")
    missing = np.isnan(scores).any(axis=0) | np.isnan(gold)
    scores[:, missing] = np.nan
    flat, left_out = scores.reshape(len(scores), -1), int(missing.sum())

    def combined(how: str, chosen: slice) -> Array:
        """Proxy and gold per prompt, `[Q, 2, len(ns)]`, where the chosen members' aggregate picks."""
        constants = {"mean": None if mean is None else mean[chosen], "std": None if std is None else std[chosen]}
        proxy = aggregate(flat[chosen], how=how, lam=lam, normalise=normalise, **constants).reshape(gold.shape)
        _check(proxy, gold, ns)
        return _expected_best(proxy, gold, ns)

    whole = slice(None)
    # The first call sees all constants, so that a wrong number of them is refused before members are taken apart.
    per_prompt = {how: combined(how, whole) for how in ("mean", "wco", "uwo")}
    per_prompt["single"] = np.mean([combined("mean", slice(i, i + 1)) for i in range(len(flat))], axis=0)
    return {name: _rows(per_prompt[name], ns, left_out, resamples, seed) for name in METHODS}
