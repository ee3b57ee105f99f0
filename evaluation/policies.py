"""What experiments measure of a trained policy besides its text: log-probabilities, and a judge's shares.

No sampling and no files: `alignment.models.sampling` draws, and `replication` and `compare` keep what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.models.card import CARD

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


def stamps_of_files(load: Mapping[str, Any]) -> list[list[Any]]:
    """Name, size and time of a local model's files: other ones hold another model. Empty of a hub id.

    Its card is left out: a win rate rewrites that, and its samples are still the model's.

    Args:
        load: arguments of `load_model`; name_or_path and adapter are looked at.
    """
    places = [Path(load[key]) for key in ("name_or_path", "adapter") if load.get(key)]
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.is_file() and file.name != CARD
    ]


def tables_won(
    oracle: Any, prompts: Sequence[Any], ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]
) -> list[Array]:
    """Q tables `[I, J]`: the probability that each response of ours beats each of theirs; NaN: not judged.

    Args:
        oracle: `alignment.rewards.PreferenceOracle`; asked in one call.
        prompts: Q prompts.
        ours, theirs: Q lists of responses.
    """
    triples = [(p, a, b) for p, us, them in zip(prompts, ours, theirs, strict=True) for a in us for b in them]
    answers = np.array(oracle.probability(*(list(column) for column in zip(*triples, strict=True))), dtype=np.float64)
    sizes = [(len(us), len(them)) for us, them in zip(ours, theirs, strict=True)]
    parts = np.split(answers, np.cumsum([i * j for i, j in sizes])[:-1])
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


def means_of(tables: Sequence[Array]) -> Array:
    """`[Q]` mean of what was judged in each table; NaN where nothing was."""
    return np.array([np.nan if np.isnan(table).all() else np.nanmean(table) for table in tables])
