"""Preferences that the starting model provides itself: several samples per prompt, scored, best against worst.

The controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6), small. Each row keeps the token
ids as they were drawn, both scores, and one more draw as `calibration`: the first of the prompt's samples, picked
without looking at its score, hence a plain sample of the starting model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from alignment.errors import UserError
from alignment.models.sampling import Sample

Score = Callable[[list[str], list[str]], list[float]]


def best_against_worst(
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    samples: Sequence[Sequence[Sample]],
    score: Score,
    *,
    pairs_per_prompt: int = 1,
    min_gap: float = 0.0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Pairs from scored samples: the best with the worst, then the next best with the next worst …

    Args:
        prompts: n texts.
        encoded: their n lists of token ids.
        samples: n lists of continuations.
        score: `(prompts, responses) -> scores`; NaN means that a response could not be scored.
        pairs_per_prompt: at most this many disjoint pairs of one prompt.
        min_gap: pairs whose scores differ by this or less are dropped (0 drops ties).

    Returns:
        Rows for `prepare_rows`, and counts: samples, unscored, ties (pairs dropped for their gap), pairs.

    Raises:
        UserError: no pair is left.
    """
    flat = [(i, s) for i, group in enumerate(samples) for s in group]
    values = score([prompts[i] for i, _ in flat], [s.text for _, s in flat])
    scored: list[list[tuple[float, Sample]]] = [[] for _ in prompts]
    counts = {"samples": len(flat), "unscored": 0, "ties": 0, "pairs": 0}
    for (i, drawn), value in zip(flat, values, strict=True):
        if math.isnan(value):
            counts["unscored"] += 1
        else:
            scored[i].append((float(value), drawn))
    rows = []
    for i, group in enumerate(scored):
        ranked = sorted(group, key=lambda pair: pair[0], reverse=True)
        for k in range(min(pairs_per_prompt, len(ranked) // 2)):
            (high, best), (low, worst) = ranked[k], ranked[-1 - k]
            if high - low <= min_gap or best.ids == worst.ids:
                counts["ties"] += 1
                continue
            rows.append(
                {
                    "prompt": prompts[i],
                    "chosen": best.text,
                    "rejected": worst.text,
                    "calibration": samples[i][0].text,
                    "prompt_ids": encoded[i],
                    "chosen_ids": best.ids,
                    "rejected_ids": worst.ids,
                    "calibration_ids": samples[i][0].ids,
                    "reward_chosen": high,
                    "reward_rejected": low,
                }
            )
    counts["pairs"] = len(rows)
    if not rows:
        raise UserError("data.sample: no pair is left: every prompt's samples score alike; raise samples_per_prompt")
    return rows, counts
