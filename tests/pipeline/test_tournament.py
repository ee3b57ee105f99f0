"""The tournament alone: who meets whom, how often, and what a tie does."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from alignment.pipeline.judging import bracket, tournaments


def played(entrants, probability):
    """(winner, loser, comparisons) of one bracket under P(i > j)."""
    games, asked = bracket(entrants), []
    pairs = next(games)
    while True:
        asked += pairs
        try:
            pairs = games.send([probability(i, j) for i, j in pairs])
        except StopIteration as ended:
            return *ended.value, asked


def test_a_transitive_oracle_finds_the_best_and_the_worst_of_every_order():
    def higher(i, j):
        return float(i > j)

    for order in itertools.permutations(range(8)):
        winner, loser, asked = played(order, higher)
        assert (winner, loser) == (7, 0)
        assert len(asked) == 11 and asked[-1] == (7, 0)


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_so_many_comparisons_and_nobody_meets_twice_before_the_end(k):
    strength = random.Random(k).sample(range(1000), k)
    winner, loser, asked = played(range(k), lambda i, j: 1 / (1 + math.exp((strength[j] - strength[i]) / 100)))
    assert len(asked) == 3 * k // 2 - 1
    assert (strength[winner], strength[loser]) == (max(strength), min(strength))
    assert len({frozenset(pair) for pair in asked[:-1]}) == len(asked) - 1


def test_a_tie_keeps_the_first():
    winner, loser, asked = played([5, 2, 7, 1], lambda i, j: 0.5)
    assert winner == 5  # the first of all on the winners' side
    assert loser == 2  # and the first of the losers: 2 against 1
    assert asked == [(5, 2), (7, 1), (5, 7), (2, 1), (5, 2)]


def test_a_cycle_can_be_upset_in_the_final():
    """0 beats 1, 2 beats 3, 0 beats 2, and 3, who lost to both of its own, beats 0: the final says so."""
    beats = {(0, 1), (2, 3), (0, 2), (1, 3), (3, 0)}
    winner, loser, _ = played([0, 1, 2, 3], lambda i, j: float((i, j) in beats))
    assert (winner, loser) == (0, 3) and (0, 3) not in beats


def test_prompts_play_together_and_short_or_unjudged_ones_have_no_finalists():
    calls = []

    def ask(pairs):
        calls.append(len(pairs))
        return [math.nan if p == 2 and (i, j) == (2, 3) else float(i > j) for p, i, j in pairs]

    found = tournaments([[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]], 4, ask)
    assert [row["finalists"] for row in found] == [[3, 0], None, None]
    assert calls == [4, 2, 1]  # two brackets' first round; one bracket's second and third
    assert [len(row["comparisons"]) for row in found] == [5, 0, 2]
    assert tournaments([], 4, ask) == []
