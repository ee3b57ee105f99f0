"""Pairs from samples: every assignment of small scores, against a definition written out here."""

from __future__ import annotations

import itertools
import math

import pytest

from alignment.data.preferences import canonical
from alignment.data.sampled import best_against_worst
from alignment.errors import UserError
from alignment.models.sampling import Sample


def drawn(texts) -> list[Sample]:
    """One sample per text; different texts have different ids."""
    return [Sample([ord(c) for c in text], text, True) for text in texts]


def by_text(scores: dict[str, float]):
    return lambda prompts, responses: [scores[r] for r in responses]


def pairs(texts, scores, **settings):
    rows, counts = best_against_worst(["p"], [[1, 2]], [drawn(texts)], by_text(scores), **settings)
    return [(row["chosen"], row["rejected"], row["reward_chosen"], row["reward_rejected"]) for row in rows], counts


@pytest.mark.parametrize("at_most", [1, 2])
def test_every_order_of_four_scores(at_most):
    """All 3^4 score assignments: chosen and rejected have the k-th highest and k-th lowest score; ties are dropped."""
    texts = "abcd"
    for values in itertools.product((0.0, 1.0, 2.0), repeat=4):
        scores = dict(zip(texts, values, strict=True))
        ranked = sorted(values)
        wanted = [(ranked[3 - k], ranked[k]) for k in range(at_most) if ranked[3 - k] > ranked[k]]
        if not wanted:
            with pytest.raises(UserError, match="no pair is left"):
                pairs(texts, scores, pairs_per_prompt=at_most)
            continue
        found, counts = pairs(texts, scores, pairs_per_prompt=at_most)
        assert [pair[2:] for pair in found] == wanted
        for chosen, rejected, high, low in found:
            assert (scores[chosen], scores[rejected]) == (high, low)
        used = [text for pair in found for text in pair[:2]]
        assert len(set(used)) == len(used)  # no sample is in two pairs
        assert counts == {"samples": 4, "unscored": 0, "ties": at_most - len(wanted), "pairs": len(wanted)}


@pytest.mark.parametrize(("gap", "kept"), [(0.0, 1), (0.9, 1), (1.0, 0), (1.5, 0)])
def test_a_gap_must_exceed_the_least(gap, kept):
    """Two prompts, so that something is always left."""
    texts = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 9.0}
    samples = [drawn("ab"), drawn("cd")]
    rows, counts = best_against_worst(["p", "q"], [[1], [2]], samples, by_text(texts), min_gap=gap)
    assert [row["prompt"] for row in rows] == ["p", "q"][1 - kept :]
    assert counts["ties"] == 1 - kept


def test_scores_that_are_not_numbers_are_left_out_and_counted():
    """NaN is neither best nor worst; a prompt with one scored sample gives no pair."""
    nan = math.nan
    found, counts = pairs("abcd", {"a": nan, "b": 1.0, "c": nan, "d": 3.0}, pairs_per_prompt=2)
    assert found == [("d", "b", 3.0, 1.0)]
    assert counts == {"samples": 4, "unscored": 2, "ties": 0, "pairs": 1}
    with pytest.raises(UserError, match="no pair is left"):
        pairs("abcd", {"a": nan, "b": 1.0, "c": nan, "d": nan})


def test_the_same_tokens_are_no_pair_even_if_a_judge_scores_them_apart():
    scores = iter([1.0, 0.0, 1.0, 0.0])
    samples = [drawn("aa"), drawn("ab")]
    rows, counts = best_against_worst(["p", "q"], [[1], [2]], samples, lambda p, r: [next(scores) for _ in r])
    assert [row["prompt"] for row in rows] == ["q"] and counts["ties"] == 1


def test_rows_keep_ids_scores_and_a_calibration_that_is_blind_to_scores():
    """The calibration is the first draw, whichever pair it is in: choosing it by score would bias it."""
    for order in itertools.permutations("abc"):
        scores = {"a": 0.0, "b": 1.0, "c": 2.0}
        samples = drawn(order)
        rows, _ = best_against_worst(["p"], [[7, 8]], [samples], by_text(scores))
        assert rows == [
            {
                "prompt": "p",
                "chosen": "c",
                "rejected": "a",
                "calibration": order[0],
                "prompt_ids": [7, 8],
                "chosen_ids": [ord("c")],
                "rejected_ids": [ord("a")],
                "calibration_ids": [ord(order[0])],
                "reward_chosen": 2.0,
                "reward_rejected": 0.0,
            }
        ]
        assert canonical(rows[0]) == rows[0]


def test_the_judge_sees_each_prompt_with_its_own_responses():
    seen = []

    def score(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(seen)) - i for i in range(len(responses))]

    rows, _ = best_against_worst(["p", "q"], [[1], [2]], [drawn("ab"), drawn("cd")], score)
    assert seen == [("p", "a"), ("p", "b"), ("q", "c"), ("q", "d")]
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [("p", "a", "b"), ("q", "c", "d")]
