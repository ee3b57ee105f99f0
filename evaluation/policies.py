"""What experiments measure of a trained policy besides its text: log-probabilities, and a judge's shares.

No sampling and no files: `alignment.models.sampling` draws, and `replication` and `compare` keep what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

AT_ONCE = 128  # rows of a forward pass


def log_probs(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Array:
    """`[n]` log-probabilities, in nats, of responses after their prompts.

    Args:
        model: a causal language model in eval mode.
        rows: n pairs of prompt ids and response ids.
    """
    from alignment.rewards.implicit import token_logps

    given = [list(row) for row in rows]
    parts = [
        token_logps(model, [(p, r) for p, r in given[i : i + AT_ONCE]]).double().sum(1).numpy()
        for i in range(0, len(given), AT_ONCE)
    ]
    return np.concatenate(parts)


def shares_won(
    oracle: Any, prompts: Sequence[Any], ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]
) -> Array:
    """`[Q]` mean probability, over all pairs of samples of a prompt, that ours beats theirs; NaN: none was judged.

    Args:
        oracle: `alignment.rewards.PreferenceOracle`.
        prompts: Q prompts.
        ours, theirs: Q lists of responses.
    """
    triples = [(p, a, b) for p, us, them in zip(prompts, ours, theirs, strict=True) for a in us for b in them]
    answers = iter(oracle.probability(*(list(column) for column in zip(*triples, strict=True))))
    shares = []
    for us, them in zip(ours, theirs, strict=True):
        judged = np.array([float(next(answers)) for _ in range(len(us) * len(them))])
        known = judged[~np.isnan(judged)]
        shares.append(float(known.mean()) if known.size else np.nan)
    return np.array(shares)
