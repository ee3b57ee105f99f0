"""Which judged samples become pairs: small cases worked out by hand, one prompt at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from alignment.pipeline.pairing import choices
from alignment.recipes.iterate import IterateSection


def a_row(*responses, finished=None, lengths=None):
    lengths = lengths or [3] * len(responses)
    ids = [[ord(text[0]) + n for n in range(length)] for text, length in zip(responses, lengths, strict=True)]
    return {"ids": ids, "responses": list(responses), "finished": finished or [True] * len(responses)}


def chosen(row, judged, draw=(0.5,) * 8, **settings):
    """([(chosen, rejected)], counts) as texts."""
    section = IterateSection(**{"samples": len(row["ids"]), "pairing": "best_worst", **settings})
    counts = Counter()
    judged = {"considered": list(range(len(row["ids"]))), **judged}
    found = [(row["responses"][a], row["responses"][b]) for a, b, *_ in choices(section, row, judged, draw, counts)]
    return found, dict(counts)


def test_best_against_worst_whatever_the_order_of_the_samples():
    rewards = {"a": 0.3, "b": -1.0, "c": 2.0, "d": 0.9}
    for order in itertools.permutations("abcd"):
        found, counts = chosen(a_row(*order), {"rewards": [rewards[text] for text in order]})
        assert found == [("c", "b")] and counts == {}


def test_of_equals_the_first_is_the_best_and_the_last_the_worst():
    assert chosen(a_row(*"abcd"), {"rewards": [0.0, 1.0, 1.0, 0.0]})[0] == [("b", "d")]


def test_equal_rewards_are_no_pair():
    assert chosen(a_row(*"abcd"), {"rewards": [1.0] * 4}) == ([], {"ties": 1})
    assert chosen(a_row(*"ab"), {"rewards": [1.0, 1.2]}, min_gap=0.2000001) == ([], {"ties": 1})
    assert chosen(a_row(*"ab"), {"rewards": [1.0, 1.2]}, min_gap=0.19)[0] == [("b", "a")]


def test_identical_texts_are_no_pair():
    assert chosen(a_row("a", "a"), {"rewards": [1.0, 0.0]}) == ([], {"identical": 1})


def test_a_length_penalty_is_taken_for_each_token():
    row = a_row(*"abc", lengths=[2, 10, 4])
    judged = {"rewards": [0.5, 1.0, 0.0]}
    assert chosen(row, judged)[0] == [("b", "c")]
    assert chosen(row, judged, length_penalty=0.1)[0] == [("a", "c")]  # 0.3, 0.0, -0.4
    section = IterateSection(samples=3, length_penalty=0.1)
    counts: Counter[str] = Counter()
    (_, _, better, worse) = next(iter(choices(section, row, {"considered": [0, 1, 2], **judged}, (), counts)))
    assert better["reward"] == pytest.approx(0.3) and worse["reward"] == pytest.approx(-0.4)


def test_what_could_not_be_scored_is_neither_best_nor_worst():
    assert chosen(a_row(*"abc"), {"rewards": [None, 1.0, 0.0]})[0] == [("b", "c")]
    assert chosen(a_row(*"abc"), {"rewards": [None, 1.0, None]}) == ([], {"unjudged": 1})


def test_unfinished_samples_take_no_part_where_they_are_not_considered():
    judged = {"considered": [1, 2], "rewards": [9.0, 1.0, 0.0]}
    assert chosen(a_row(*"abc"), judged)[0] == [("b", "c")]
    assert chosen(a_row(*"abc"), {"considered": [1], "rewards": [9.0, 1.0, 0.0]}) == ([], {"short": 1})


def test_an_oracle_ranks_by_mean_probability_of_winning():
    comparisons = [[0, 1, 0.9], [0, 2, 0.6], [1, 2, 0.2]]  # means: 0.75, 0.15, 0.6
    row = a_row(*"abc")
    assert chosen(row, {"comparisons": comparisons})[0] == [("a", "b")]
    section = IterateSection(samples=3)
    judged = {"considered": [0, 1, 2], "comparisons": comparisons}
    _, _, better, worse = next(iter(choices(section, row, judged, (), Counter())))
    assert better["preference"] == pytest.approx((0.9 + 0.6 + 0.5) / 3)  # itself included, as pi_t draws it, too
    assert worse["preference"] == pytest.approx((0.1 + 0.2 + 0.5) / 3)
    assert better["log_odds"] == pytest.approx((math.log(9) + math.log(1.5)) / 3)


def test_finalists_are_a_pair_if_the_winner_wins():
    def final(p):
        return {"finalists": [2, 1], "comparisons": [[0, 1, 0.9], [2, 3, 0.9], [2, 1, p]]}

    row = a_row(*"abcd")
    assert chosen(row, final(0.7), pairing="tournament") == ([("c", "b")], {})
    assert chosen(row, final(0.5), pairing="tournament") == ([], {"ties": 1})
    assert chosen(row, final(0.2), pairing="tournament") == ([], {"upset": 1})
    assert chosen(row, {"finalists": None, "comparisons": []}, pairing="tournament") == ([], {"short": 1})
    assert chosen(row, {"finalists": None, "comparisons": [[0, 1, None]]}, pairing="tournament")[1] == {"unjudged": 1}


def test_independent_pairs_are_neighbours_labelled_by_the_likelier_winner():
    judged = {"comparisons": [[0, 1, 0.3], [2, 3, 0.5], [4, 5, 0.9]]}
    found, counts = chosen(a_row(*"abcdef"), judged, pairing="iid")
    assert found == [("b", "a"), ("e", "f")] and counts == {"ties": 1}


def test_a_drawn_label_follows_the_probability():
    """Chosen exactly where the uniform number is below P: over an even grid of them, with frequency P."""
    row, judged = a_row(*"ab"), {"comparisons": [[0, 1, 0.3]]}
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    first = sum(chosen(row, judged, (u,), pairing="iid", labels="drawn")[0] == [("a", "b")] for u in grid)
    assert first == 300
    tied = {"comparisons": [[0, 1, 0.5]]}  # a tie is a fair coin there, not a dropped pair
    assert chosen(row, tied, (0.4,), pairing="iid", labels="drawn")[0] == [("a", "b")]
