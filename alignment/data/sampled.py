"""Preferences that the starting model provides itself: several samples per prompt, judged, best against worst.

The controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6), small. Each row keeps the token
ids as they were drawn, both scores where a reward judged, and one more draw as `calibration`: the first of the
prompt's samples, picked without looking at how it was judged, hence a plain sample of the starting model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from alignment.errors import UserError
from alignment.models.sampling import Sample
from alignment.rewards.oracles import Probability, flip_labels

Score = Callable[[list[str], list[str]], list[float]]


def best_against_worst(
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    samples: Sequence[Sequence[Sample]],
    score: Score | None = None,
    *,
    probability: Probability | None = None,
    pairs_per_prompt: int = 1,
    min_gap: float = 0.0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Pairs from judged samples: the best with the worst, then the next best with the next worst …

    Give either `score` or `probability`. An oracle ranks a prompt's samples by `win_probabilities`, and its rows have
    no `reward_chosen` and `reward_rejected`: there are none.

    Args:
        prompts: n texts.
        encoded: their n lists of token ids.
        samples: n lists of continuations.
        score: a reward's `(prompts, responses) -> scores`; NaN means that a response could not be scored.
        probability: an oracle's `(prompts, first, second) -> P(first > second)`.
        pairs_per_prompt: at most this many disjoint pairs of one prompt.
        min_gap: pairs whose scores (or win probabilities) differ by this or less are dropped (0 drops ties).

    Returns:
        Rows for `prepare_rows`, and counts: samples, unscored, ties (pairs dropped for their gap), pairs.

    Raises:
        UserError: no pair is left.
    """
    texts = [[drawn.text for drawn in group] for group in samples]
    if score is not None and probability is None:
        values = _scores(prompts, texts, score)
    elif probability is not None and score is None:
        values = win_probabilities(prompts, texts, probability)
    else:
        raise ValueError("give either score or probability")
    counts = {"samples": sum(map(len, samples)), "unscored": 0, "ties": 0, "pairs": 0}
    rows = []
    for i, (group, judged) in enumerate(zip(samples, values, strict=True)):
        scored = [(value, drawn) for value, drawn in zip(judged, group, strict=True) if not math.isnan(value)]
        counts["unscored"] += len(group) - len(scored)
        ranked = sorted(scored, key=lambda pair: pair[0], reverse=True)
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
                    "calibration": group[0].text,
                    "prompt_ids": encoded[i],
                    "chosen_ids": best.ids,
                    "rejected_ids": worst.ids,
                    "calibration_ids": group[0].ids,
                    **({"reward_chosen": high, "reward_rejected": low} if score else {}),
                }
            )
    counts["pairs"] = len(rows)
    if not rows:
        raise UserError("data.sample: no pair is left: every prompt's samples score alike; raise samples_per_prompt")
    return rows, counts


def _scores(prompts: Sequence[str], texts: Sequence[Sequence[str]], score: Score) -> list[list[float]]:
    """One score per text, by prompt; one call of the reward."""
    flat = [prompt for prompt, group in zip(prompts, texts, strict=True) for _ in group]
    values = iter(score(flat, [text for group in texts for text in group]))
    return [[float(next(values)) for _ in group] for group in texts]


def win_probabilities(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], probability: Probability
) -> list[list[float]]:
    """Of each text, the mean of P(it > other) over the prompt's other texts that it could be compared with.

    One call of the oracle with each unordered pair once, since P(b, a) = 1 - P(a, b). NaN for a text without any
    comparison, as of a single one, or with none but those with its own repetitions, which are 1/2 unasked.

    Args:
        prompts: n texts.
        texts: n groups of responses.
        probability: an oracle's `(prompts, first, second) -> P(first > second)`.
    """
    pairs = [(i, a, b) for i, group in enumerate(texts) for a, b in itertools.combinations(range(len(group)), 2)]
    answers = probability(
        [prompts[i] for i, _, _ in pairs], [texts[i][a] for i, a, _ in pairs], [texts[i][b] for i, _, b in pairs]
    )
    won: list[list[list[tuple[str, float]]]] = [[[] for _ in group] for group in texts]
    for (i, a, b), p in zip(pairs, answers, strict=True):
        won[i][a].append((texts[i][b], p))
        won[i][b].append((texts[i][a], 1.0 - p))
    return [
        [_mean_win(text, found) for text, found in zip(group, founds, strict=True)]
        for group, founds in zip(texts, won, strict=True)
    ]


def _mean_win(text: str, found: Sequence[tuple[str, float]]) -> float:
    """Mean of the probabilities in (other text, P(text > other)) that are numbers."""
    judged = [p for _, p in found if not math.isnan(p)]
    others = [p for other, p in found if other != text]
    if not judged or (others and all(map(math.isnan, others))):
        return math.nan
    # Rounded, so that what is equal in exact arithmetic (0.7 + 0.3 and 0.5 + 0.5) is a tie here, too.
    return round(math.fsum(judged) / len(judged), 12)


def with_label_noise(
    rows: Sequence[dict[str, Any]], probability: float, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows of which each has chosen and rejected exchanged with `probability`, and how many have.

    Token ids and rewards travel with their responses, so a flipped row's `reward_chosen` is the lower one. Which rows
    are flipped depends on their numbers and `seed` alone (`alignment.rewards.oracles.flip_labels`).
    """
    flips = flip_labels(range(len(rows)), probability, seed)
    return [_flipped(row) if flip else row for row, flip in zip(rows, flips, strict=True)], sum(flips)


_SWAPPED = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("reward_chosen", "reward_rejected"))


def _flipped(row: dict[str, Any]) -> dict[str, Any]:
    pairs = [(one, other) for one, other in _SWAPPED if one in row]
    return row | {one: row[other] for one, other in pairs} | {other: row[one] for one, other in pairs}
