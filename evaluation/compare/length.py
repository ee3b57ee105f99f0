"""The length-controlled column: an adapter between a comparison's samples and `evaluation.length_control`.

It gives that module what it asks for: of every sample and the start's sample with the same number the characters and
the share won, with the prompt as cluster; its plain variant, since nobody has gamed annotations of these judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.compare.measure import Measured
from evaluation.length_control import SHRUNK, length_controlled, standardise

Array = NDArray[np.float64]


def length_controlled_rate(
    policies: Sequence[Measured], starts: Sequence[Measured], shares: Sequence[Array]
) -> dict[str, float] | None:
    """Win rate over the start at equal lengths, with its 95 % interval over prompts.

    Args:
        policies, starts: one for each seed.
        shares: [Q, S] of each seed: what each sample won against the start's sample of the same number.

    Returns:
        `rate`, `low`, `high`, and `shrunk`: whether the penalty put many of the resamples at 1/2 exactly. None ("not
        available") where there are too few judged pairs, or no coefficient is left.
    """
    ours, theirs = (np.concatenate([_characters(one) for one in side]) for side in (policies, starts))
    prompts: list[Any] = [q for table in shares for q in range(table.shape[0]) for _ in range(table.shape[1])]
    won = np.concatenate([table.ravel() for table in shares])
    try:
        found = length_controlled(standardise(theirs, ours), won, clusters=prompts)
    except ValueError:
        return None
    if found.interval is None:  # the penalty leaves no coefficient: nothing is known of equal lengths
        return None
    limits = {"low": found.interval.low, "high": found.interval.high}
    return {"rate": found.rate, **limits, "shrunk": found.collapsed > SHRUNK}


def _characters(one: Measured) -> Array:
    return np.array([len(text) for group in one.responses for text in group], dtype=np.float64)
