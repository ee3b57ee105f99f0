"""Statistics of a comparison: pure functions on shares won, by seed and prompt. No models, no files.

The unit is the prompt, as in `evaluation.statistics`: seeds are averaged within it. An interval over prompts holds
what other prompts would change, for these very models; what another seed of training would change is the spread over
seeds, and a claim needs both (`Cell.claim_p`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.comparison import NO_DIFFERENCE
from evaluation.experiments import over_seeds
from evaluation.statistics import compare_paired, holm, minimal_detectable_difference

Array = NDArray[np.float64]

LEVEL = 0.05
IN_THIS_RUN = " in this run"  # of a difference that one seed shows


@dataclass(frozen=True)
class Cell:
    """How often one system beats another. Shares in [0, 1].

    Attributes:
        rate: mean over prompts of the mean over seeds.
        low, high: 95 % bootstrap interval over prompts.
        standard_error: clustered by prompt.
        p_value: sign-flip permutation over prompts of "rate = 1/2".
        by_seed: the rate of each seed.
        seeds_low, seeds_high: 95 % t interval over seeds; None with one seed.
        seeds_p: two-sided t test over seeds of "rate = 1/2"; None with one seed.
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

    @property
    def claim_p(self) -> float:
        """P-value of "the objectives are the same": small only if neither other prompts nor other seeds explain it.

        The larger of the two is a valid p-value of a difference that shows over prompts *and* over seeds. With one
        seed it is that over prompts, and speaks of these models only.
        """
        return self.p_value if self.seeds_p is None else max(self.p_value, self.seeds_p)

    @property
    def swapped(self) -> Cell:
        """The other system's cell."""
        low, high = self.seeds_low, self.seeds_high
        return Cell(
            1 - self.rate, 1 - self.high, 1 - self.low, self.standard_error, self.p_value,
            tuple(1 - rate for rate in self.by_seed),
            None if high is None else 1 - high, None if low is None else 1 - low, self.seeds_p,
        )  # fmt: skip


def cell(shares: Array, resamples: int = 10_000, seed: int = 0) -> Cell:
    """A cell from [seeds, Q] shares won; NaN (could not be judged) is left out of a prompt's mean.

    Raises:
        ValueError: no prompt was judged.
    """
    known = ~np.isnan(shares)
    counts = known.sum(0)
    means = np.where(counts > 0, np.where(known, shares, 0).sum(0) / np.maximum(counts, 1), np.nan)
    found = compare_paired(means, np.full(len(means), 0.5), resamples=resamples, seed=seed)
    by_seed = tuple(float(np.nanmean(row)) for row in shares)
    spread = over_seeds(by_seed)
    return Cell(
        rate=found.mean_x,
        low=0.5 + found.difference.low,
        high=0.5 + found.difference.high,
        standard_error=found.standard_error,
        p_value=found.p_value,
        by_seed=by_seed,
        seeds_low=spread["low"],
        seeds_high=spread["high"],
        seeds_p=_seeds_p(by_seed),
    )


def _seeds_p(rates: Sequence[float]) -> float | None:
    """Two-sided p of a mean of 1/2 in a t test over seeds; 0 or 1 where all seeds are alike."""
    from scipy.stats import ttest_1samp

    kept = [rate for rate in rates if not math.isnan(rate)]
    if len(kept) < 2:
        return None
    if max(kept) == min(kept):
        return float(kept[0] == 0.5)
    return float(ttest_1samp(kept, 0.5).pvalue)


def adjusted(cells: Sequence[Cell]) -> list[float]:
    """Holm's p-values of the cells' claims as one family."""
    return [float(p) for p in holm([one.claim_p for one in cells])] if cells else []


def verdict(one: Cell, p_adjusted: float) -> str:
    """`better`, `worse`, or `no significant difference`; with one seed `better in this run`, `worse in this run`.

    Args:
        one: the cell.
        p_adjusted: its `claim_p` after Holm. A claim needs at most 5 %, so that at most one comparison in twenty, with
            all its rows, makes a false one.
    """
    if p_adjusted > LEVEL or one.rate == 0.5:
        return NO_DIFFERENCE
    said = "better" if one.rate > 0.5 else "worse"
    return said if one.seeds_p is not None else f"{said}{IN_THIS_RUN}"


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


def detectable(cells: Sequence[Cell]) -> float | None:
    """The difference from one half that a single test over prompts finds four times in five: the cells' median."""
    errors = [minimal_detectable_difference(one.standard_error) for one in cells]
    errors = [error for error in errors if not math.isnan(error)]
    return float(np.median(errors)) if errors else None
