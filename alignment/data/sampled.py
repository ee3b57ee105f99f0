"""Preferences that the starting model provides itself: several samples per prompt, judged, best against worst.

The controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6), small. Each row keeps the token
ids as they were drawn, both scores where a reward judged, both strengths where an oracle did, and one more draw as
`calibration`: the first of the prompt's samples, picked without looking at how it was judged, hence a plain sample of
the starting model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.preferences import TOGETHER
from alignment.errors import UserError
from alignment.models.sampling import Sample
from alignment.rewards.oracles import Probability, flip_labels

Score = Callable[[list[Any], list[str]], list[float]]
LOG_ODDS = ("log_odds_chosen", "log_odds_rejected")


def best_against_worst(
    prompts: Sequence[Any],
    encoded: Sequence[list[int]],
    samples: Sequence[Sequence[Sample]],
    score: Score | None = None,
    *,
    probability: Probability | None = None,
    pairs_per_prompt: int = 1,
    min_gap: float = 0.0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Pairs from judged samples: the best with the worst, then the next best with the next worst …

    Give either `score` or `probability`. A reward's rows keep `reward_chosen` and `reward_rejected`. An oracle ranks a
    prompt's samples by `Strength.win`, and its rows keep `preference_*` and, unless some log-odds among the rows are
    infinite, `log_odds_*` (a column is in all rows or in none).

    Args:
        prompts: n texts, or n lists of chat messages; responses are then messages as well.
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
    oracle: list[list[Strength]] = []
    if score is not None and probability is None:
        values = _scores(prompts, texts, score)
    elif probability is not None and score is None:
        oracle = compared(prompts, texts, probability)
        values = [[strength.win for strength in group] for group in oracle]
    else:
        raise ValueError("give either score or probability")
    counts = {"samples": sum(map(len, samples)), "unscored": 0, "ties": 0, "pairs": 0}
    rows = []
    for i, (group, judged) in enumerate(zip(samples, values, strict=True)):
        scored = [j for j, value in enumerate(judged) if not math.isnan(value)]
        counts["unscored"] += len(group) - len(scored)
        ranked = sorted(scored, key=judged.__getitem__, reverse=True)
        for k in range(min(pairs_per_prompt, len(ranked) // 2)):
            high, low = ranked[k], ranked[-1 - k]
            best, worst = group[high], group[low]
            if judged[high] - judged[low] <= min_gap or best.ids == worst.ids:
                counts["ties"] += 1
                continue
            if oracle:
                columns = oracle[i][high].columns("chosen") | oracle[i][low].columns("rejected")
            else:
                columns = {"reward_chosen": judged[high], "reward_rejected": judged[low]}
            rows.append(
                {
                    "prompt": prompts[i],
                    "chosen": in_form_of(prompts[i], best.text),
                    "rejected": in_form_of(prompts[i], worst.text),
                    "calibration": in_form_of(prompts[i], group[0].text),
                    "prompt_ids": encoded[i],
                    "chosen_ids": best.ids,
                    "rejected_ids": worst.ids,
                    "calibration_ids": group[0].ids,
                    **columns,
                }
            )
    rows = log_odds_in_all_or_none(rows)
    counts["pairs"] = len(rows)
    if not rows:
        raise UserError("data.sample: no pair is left: every prompt's samples score alike; raise samples_per_prompt")
    return rows, counts


def in_form_of(prompt: Any, text: str) -> Any:
    """A response in its prompt's form."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _scores(prompts: Sequence[Any], texts: Sequence[Sequence[str]], score: Score) -> list[list[float]]:
    """One score per text, by prompt; one call of the reward."""
    flat = [prompt for prompt, group in zip(prompts, texts, strict=True) for _ in group]
    values = iter(score(flat, [text for group in texts for text in group]))
    return [[float(next(values)) for _ in group] for group in texts]


@dataclass(frozen=True)
class Strength:
    """How one of a prompt's samples does against all of them, who stand for the policy that drew them.

    Attributes:
        win: mean of P(it > other) over the other samples that it could be compared with, for ranking; NaN where there
            is none, or none but its own repetitions among texts that could not be compared.
        preference: estimate of P(it > the policy): as `win`, with the sample itself, which counts 1/2.
        log_odds: mean log-odds of winning, with the sample itself, which counts 0; None where some are infinite.
    """

    win: float
    preference: float
    log_odds: float | None

    def columns(self, response: str) -> dict[str, float | None]:
        """The columns of a row in which this sample is `response`, chosen or rejected."""
        return {f"preference_{response}": self.preference, f"log_odds_{response}": self.log_odds}


def log_odds_in_all_or_none(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, all without `log_odds_*` if any lacks one: readers drop rows without what others have."""
    if all(row.get(column) is not None for row in rows for column in LOG_ODDS):
        return rows
    return [{name: value for name, value in row.items() if name not in LOG_ODDS} for row in rows]


def strengths(texts: Sequence[str], comparisons: Sequence[tuple[int, int, float]]) -> list[Strength]:
    """The strength of each of one prompt's samples.

    Args:
        texts: K samples.
        comparisons: (i, j, P(i > j)), each unordered pair at most once; NaN: it could not be judged, and is left out.
    """
    found: list[list[tuple[str, float]]] = [[] for _ in texts]
    for i, j, p in comparisons:
        found[i].append((texts[j], p))
        found[j].append((texts[i], 1.0 - p))
    return [_strength(text, against) for text, against in zip(texts, found, strict=True)]


def _strength(text: str, found: Sequence[tuple[str, float]]) -> Strength:
    """From (other text, P(text > other)) of every comparison."""
    judged = [p for _, p in found if not math.isnan(p)]
    others = [p for other, p in found if other != text]
    if not judged or (others and all(map(math.isnan, others))):
        return Strength(math.nan, math.nan, None)
    log_odds = None
    if all(0 < p < 1 for p in judged):
        log_odds = math.fsum(math.log(p) - math.log1p(-p) for p in judged) / (len(judged) + 1)
    # Rounded, so that what is equal in exact arithmetic (0.7 + 0.3 and 0.5 + 0.5) is a tie here, too.
    won = math.fsum(judged)
    return Strength(round(won / len(judged), 12), round((won + 0.5) / (len(judged) + 1), 12), log_odds)


def compared(prompts: Sequence[Any], texts: Sequence[Sequence[str]], probability: Probability) -> list[list[Strength]]:
    """Strengths by prompt; one call of the oracle with each unordered pair once, since P(b, a) = 1 - P(a, b).

    Args:
        prompts: n texts, or n lists of chat messages; responses are then messages as well.
        texts: n groups of responses.
        probability: an oracle's `(prompts, first, second) -> P(first > second)`.
    """
    pairs = [(i, a, b) for i, group in enumerate(texts) for a, b in itertools.combinations(range(len(group)), 2)]
    answers = probability(
        [prompts[i] for i, _, _ in pairs], [texts[i][a] for i, a, _ in pairs], [texts[i][b] for i, _, b in pairs]
    )
    table: list[list[tuple[int, int, float]]] = [[] for _ in texts]
    for (i, a, b), p in zip(pairs, answers, strict=True):
        table[i].append((a, b, p))
    return [strengths(group, asked) for group, asked in zip(texts, table, strict=True)]


def with_label_noise(
    rows: Sequence[dict[str, Any]], probability: float, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows of which each has chosen and rejected exchanged with `probability`, and how many have.

    Token ids and numbers travel with their responses, so a flipped row's `reward_chosen` is the lower one. Which rows
    are flipped depends on their numbers and `seed` alone (`alignment.rewards.oracles.flip_labels`).
    """
    flips = flip_labels(range(len(rows)), probability, seed)
    return [_flipped(row) if flip else row for row, flip in zip(rows, flips, strict=True)], sum(flips)


_SWAPPED = (
    *(("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("sample_chosen", "sample_rejected")),
    *TOGETHER,
)


def _flipped(row: dict[str, Any]) -> dict[str, Any]:
    pairs = [(one, other) for one, other in _SWAPPED if one in row]
    return row | {one: row[other] for one, other in pairs} | {other: row[one] for one, other in pairs}
