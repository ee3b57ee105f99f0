"""Statistics of a comparison: pure functions on shares won, by seed and prompt. No models, no files.

The unit is the prompt, as in `evaluation.estimates`: seeds are averaged within it. An interval over prompts holds
what other prompts would change, for these very models; what another seed of training would change is the spread over
seeds, and a claim needs both (`Cell.claim_p`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluation import verdicts
from evaluation.estimates import bootstrap_means, clustered_standard_error, holm, sign_flip_p_value
from evaluation.experiments import over_seeds
from evaluation.intervals import share_interval
from evaluation.verdicts import NO_DIFFERENCE as NO_DIFFERENCE

Array = NDArray[np.float64]

LEVEL = 0.05
IN_THIS_RUN = " in this run"  # of a difference that one seed shows


@dataclass(frozen=True)
class Cell:
    """How often one system beats another. Shares in [0, 1].

    Attributes:
        rate: mean over prompts of the mean over seeds.
        low, high: 95 % bootstrap interval over prompts; Wilson's where that is too narrow.
        standard_error: clustered by prompt.
        p_value: sign-flip permutation over prompts of "rate = 1/2".
        by_seed: the rate of each seed.
        seeds_low, seeds_high: 95 % t interval over seeds; None with one seed.
        seeds_p: two-sided t test over seeds of "rate = 1/2"; None with one seed.
        both_p: the same with the variance over prompts added to that over seeds (Welch and Satterthwaite's degrees of
            freedom): a rate that is 1/2 on average over other prompts *and* other seeds has both errors at once.
        tests: error and degrees of freedom of every t test that a claim must pass; without seeds that over prompts.
        prompts: that were judged.
        least_p: the smallest p-value that the permutation can give: 2 of 2^Q patterns, or 1 of all that are drawn.
    """

    rate: float
    low: float
    high: float
    standard_error: float
    p_value: float
    by_seed: tuple[float, ...]
    seeds_low: float | None
    seeds_high: float | None
    seeds_p: float | None
    both_p: float | None
    tests: tuple[tuple[float, float], ...]
    least_p: float
    prompts: int

    @property
    def claim_p(self) -> float:
        """P-value of "no difference over other prompts and other seeds": the largest of prompts', seeds' and both's.

        That of both is a little liberal with two or three seeds, and that of seeds covers it there; alone, the larger
        of prompts' and seeds' would find a difference in twice as many cases as it says. With one seed it is that over
        prompts, and speaks of these models only.
        """
        if self.seeds_p is None or self.both_p is None:
            return self.p_value
        return max(self.p_value, self.seeds_p, self.both_p)

    @property
    def swapped(self) -> Cell:
        """The other system's cell."""
        low, high = self.seeds_low, self.seeds_high
        return replace(
            self,
            rate=1 - self.rate,
            low=1 - self.high,
            high=1 - self.low,
            by_seed=tuple(1 - rate for rate in self.by_seed),
            seeds_low=None if high is None else 1 - high,
            seeds_high=None if low is None else 1 - low,
        )


def cell(shares: Array, resamples: int = 10_000, seed: int = 0) -> Cell:
    """A cell from [seeds, Q] shares won; NaN (could not be judged) is left out of a prompt's mean.

    Raises:
        ValueError: no prompt was judged.
    """
    known = ~np.isnan(shares)
    counts = known.sum(0)
    means = np.where(counts > 0, np.where(known, shares, 0).sum(0) / np.maximum(counts, 1), np.nan)
    judged = means[counts > 0]
    if not judged.size:
        raise ValueError("no prompt was judged")
    prompts, rng = len(judged), np.random.default_rng(seed)
    draws = bootstrap_means(judged[:, None], resamples, rng)[:, 0]
    interval = share_interval(float(judged.mean()), draws, np.ones(prompts))
    error = clustered_standard_error(judged)
    by_seed = tuple(float(np.nanmean(row)) for row in shares)
    spread = over_seeds(by_seed)
    tests = _errors([rate for rate in by_seed if not math.isnan(rate)], error, prompts)
    return Cell(
        rate=interval.estimate,
        low=interval.low,
        high=interval.high,
        standard_error=error,
        p_value=sign_flip_p_value(judged - 0.5, resamples, rng),
        by_seed=by_seed,
        seeds_low=spread["low"],
        seeds_high=spread["high"],
        seeds_p=_t_p(float(np.nanmean(by_seed)), *tests[0]) if len(tests) > 1 else None,
        both_p=_t_p(interval.estimate, *tests[1]) if len(tests) > 1 else None,
        tests=tests,
        least_p=max(0.5 ** (prompts - 1), 1 / (1 + resamples)),
        prompts=prompts,
    )


def _errors(rates: Sequence[float], over_prompts: float, prompts: int) -> tuple[tuple[float, float], ...]:
    """(error, degrees of freedom) over seeds and over both; with one seed over prompts alone.

    Args:
        rates: of the seeds.
        over_prompts: standard error over prompts; NaN of one prompt.
        prompts: how many.
    """
    if len(rates) < 2:
        return ((over_prompts, prompts - 1.0),)
    over_seeds = statistics.stdev(rates) / math.sqrt(len(rates))
    s, p = over_seeds**2, over_prompts**2
    if not s + p > 0:  # all alike, or one prompt
        return (over_seeds, len(rates) - 1.0), (over_prompts, prompts - 1.0)
    freedom = (s + p) ** 2 / (s**2 / (len(rates) - 1) + p**2 / (prompts - 1))
    return (over_seeds, len(rates) - 1.0), (math.sqrt(s + p), freedom)


def _t_p(rate: float, error: float, freedom: float) -> float:
    """Two-sided p of a rate of 1/2; 0 or 1 where nothing varies, 1 where the error is not known."""
    from scipy.stats import t

    if math.isnan(error):
        return 1.0
    if error == 0:
        return float(rate == 0.5)
    return float(2 * t.sf(abs(rate - 0.5) / error, freedom))


def adjusted(cells: Sequence[Cell]) -> list[float]:
    """Holm's p-values of the cells' claims as one family."""
    return [float(p) for p in holm([one.claim_p for one in cells])] if cells else []


def verdict(one: Cell, p_adjusted: float) -> str:
    """What `verdicts.verdict` says; with one seed `better in this run`, `worse in this run`.

    Args:
        one: the cell.
        p_adjusted: its `claim_p` after Holm. A claim needs at most 5 %, so that about one comparison in twenty at
            most, with all its rows, makes a false one.
    """
    said = verdicts.verdict(one.prompts, one.low, one.high, p_adjusted)
    return f"{said}{IN_THIS_RUN}" if one.seeds_p is None and said in (verdicts.BETTER, verdicts.WORSE) else said


def cyclic_triples(cells: Sequence[Sequence[Cell | None]], sure: bool = False) -> int:
    """How many triples beat each other in a circle: a beats b, b beats c, c beats a.

    Args:
        cells: [n][n], row against column; the diagonal is not read.
        sure: count only triples all of whose three intervals over prompts leave one half out.
    """

    def beats(i: int, j: int) -> bool:
        one = cells[i][j]
        assert one is not None
        return one.low > 0.5 if sure else one.rate > 0.5

    def circle(i: int, j: int, k: int) -> bool:
        return beats(i, j) and beats(j, k) and beats(k, i)

    return sum(circle(i, j, k) or circle(k, j, i) for i, j, k in itertools.combinations(range(len(cells)), 3))


def detectable(cells: Sequence[Cell], alpha: float = LEVEL, power: float = 0.8) -> float | None:
    """The true difference from one half that is claimed with probability `power`; None where none can be.

    Args:
        cells: rows as uncertain as those that it is asked of; their variances are averaged.
        alpha: level of the test: LEVEL for one row, LEVEL / m for the first of m in Holm's order.
        power: of all the t tests that a claim must pass the one that asks for most; noncentral t. (With a handful of
            prompts the permutation asks for more than they.)
    """
    if not cells or any(one.least_p > alpha or math.isnan(one.standard_error) for one in cells):
        return None
    found = [max(_shift(freedom, alpha, power) * error for error, freedom in one.tests) for one in cells]
    shift = math.sqrt(statistics.fmean(shift**2 for shift in found))
    return shift if shift < 0.5 else None


def _shift(freedom: float, alpha: float, power: float) -> float:
    """Standard errors between one half and a rate that a two-sided t test at `alpha` finds with that power."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    limit = float(t.ppf(1 - alpha / 2, freedom))
    return float(brentq(lambda shift: nct.sf(limit, freedom, shift) - power, 0, 10 * limit))
