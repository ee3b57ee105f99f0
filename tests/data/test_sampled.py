"""Pairs from samples: every assignment of small scores, oracles worked out by hand, label noise."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from scipy.stats import binomtest

from alignment.data.preferences import canonical
from alignment.data.sampled import (
    Strength,
    best_against_worst,
    log_odds_in_all_or_none,
    strengths,
    with_label_noise,
)
from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.models.sampling import Sample
from alignment.recipes import load_recipe
from alignment.runs.preferences import sampled_preferences
from tests import tiny_lm


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


# Samples that an oracle judges


def by_table(table: dict[tuple[str, str], float]):
    """P(a > b) of the table; whichever order is absent is 1 - the other."""

    def probability(prompts, first, second):
        return [
            0.5 if a == b else table[a, b] if (a, b) in table else 1 - table[b, a]
            for a, b in zip(first, second, strict=True)
        ]

    return probability


def judged(texts, table, **settings):
    settings |= {"probability": by_table(table)}
    rows, counts = best_against_worst(["p"], [[1, 2]], [drawn(texts)], **settings)
    return [(row["chosen"], row["rejected"]) for row in rows], counts


def test_an_oracle_ranks_by_mean_probability_of_winning():
    """Means by hand: a (.9 + .4) / 2 = .65, b (.1 + .7) / 2 = .4, c (.6 + .3) / 2 = .45: c beats a, yet a is best."""
    table = {("a", "b"): 0.9, ("a", "c"): 0.4, ("b", "c"): 0.7}
    for order in itertools.permutations("abc"):
        assert judged(order, table) == ([("a", "b")], {"samples": 3, "unscored": 0, "ties": 0, "pairs": 1})
    assert judged("abc", table, min_gap=0.24)[0] == [("a", "b")]
    with pytest.raises(UserError, match="no pair is left"):
        judged("abc", table, min_gap=0.26)


def test_repeated_samples_weigh_as_often_as_they_were_drawn():
    """aab: a has (.5 + .8) / 2 = .65, b .2."""
    found = strengths("aab", [(0, 1, 0.5), (0, 2, 0.8), (1, 2, 0.8)])
    assert [one.win for one in found] == [0.65, 0.65, 0.2]


@pytest.mark.parametrize("p", [1.0, 0.7, 0.9, 1 / 3])
@pytest.mark.parametrize("texts", ["abc", "aabbcc", "abcabcabc"])
def test_a_cycle_has_no_best(p, texts):
    """Rock, paper, scissors: all win equally often, whatever rounding says."""
    table = {("a", "b"): p, ("b", "c"): p, ("c", "a"): p}
    with pytest.raises(UserError, match="no pair is left"):
        judged(texts, table)


def test_what_an_oracle_cannot_judge_is_left_out_and_counted():
    nan = math.nan
    # a - x unknown: a is (.8) by b alone; x has no comparison at all, even though its repetition ties with it.
    table = {("a", "b"): 0.8, ("a", "x"): nan, ("b", "x"): nan}
    assert judged("abxx", table) == ([("a", "b")], {"samples": 4, "unscored": 2, "ties": 0, "pairs": 1})


def test_an_oracle_s_rows_have_no_rewards_and_each_pair_is_asked_once():
    asked = []

    def probability(prompts, first, second):
        asked.extend(zip(prompts, first, second, strict=True))
        return [float(a < b) for a, b in zip(first, second, strict=True)]

    rows, _ = best_against_worst(["p", "q"], [[1], [2]], [drawn("abc"), drawn("dc")], probability=probability)
    assert [set(pair[1:]) for pair in asked] == [{"a", "b"}, {"a", "c"}, {"b", "c"}, {"d", "c"}]
    assert [pair[0] for pair in asked] == ["p", "p", "p", "q"]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "c"), ("c", "d")]
    assert all("reward_chosen" not in row and canonical(row) == row for row in rows)


# S of a general preference model (log-odds, already divided by tau) and a policy with probabilities .5, .3, .2.
# Against that policy, by a reference calculation: P(y > policy), and S @ policy by hand.
S = {("a", "b"): 2.0, ("a", "c"): -1.0, ("b", "c"): 1.0}
AGAINST_POLICY = {"a": (0.56803, 0.4), "b": (0.35581, -0.8), "c": (0.54621, 0.2)}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def all_pairs(texts, table) -> list[tuple[int, int, float]]:
    places = list(itertools.combinations(range(len(texts)), 2))
    answers = by_table(table)(None, [texts[i] for i, _ in places], [texts[j] for _, j in places])
    return [(i, j, p) for (i, j), p in zip(places, answers, strict=True)]


def test_samples_in_the_policy_s_shares_have_the_policy_s_expectations():
    """Ten samples, five a, three b, two c: with itself counted as a tie, a sample meets exactly the policy."""
    texts = "abacabbaca"
    found = strengths(texts, all_pairs(texts, {pair: sigmoid(s) for pair, s in S.items()}))
    for text, strength in zip(texts, found, strict=True):
        preference, score = AGAINST_POLICY[text]
        assert strength.preference == pytest.approx(preference, abs=5e-6)
        assert strength.log_odds == pytest.approx(score, abs=1e-12)


def test_samples_beat_themselves_half_the_time_and_by_no_odds():
    """Whatever the judge: of all samples against all, E[P] = 1/2 and E[log-odds] = 0."""
    generator = random.Random(3)
    for texts in ("ab", "abc", "abcde", "abacd"):
        table = {pair: generator.uniform(0.01, 0.99) for pair in itertools.combinations("abcde", 2)}
        found = strengths(texts, all_pairs(texts, table))
        assert math.fsum(one.preference for one in found) / len(texts) == pytest.approx(0.5, abs=1e-11)
        assert math.fsum(one.log_odds for one in found) == pytest.approx(0.0, abs=1e-12)


def test_a_comparison_that_could_not_be_judged_is_left_out_of_strengths():
    """a - c unknown: a meets b and itself, (.9 + .5)/2 and log 9/2; b meets all three; d has met nobody."""
    nan = math.nan
    pairs_ = [(0, 1, 0.9), (2, 0, nan), (2, 1, 0.5), (3, 0, nan), (1, 3, nan)]
    a, b, c, d = strengths("abcd", pairs_)
    assert a == Strength(0.9, 0.7, pytest.approx(math.log(9) / 2))
    assert b == Strength(0.3, pytest.approx(1.1 / 3), pytest.approx(-math.log(9) / 3))
    assert c == Strength(0.5, 0.5, 0.0)
    assert math.isnan(d.win) and math.isnan(d.preference) and d.log_odds is None


def test_certain_wins_have_no_log_odds():
    """a always beats b: neither has finite ones; c, which has met only a, has."""
    a, b, c = strengths("abc", [(0, 1, 1.0), (0, 2, 0.75)])
    assert a == Strength(0.875, 0.75, None) and b == Strength(0.0, 0.25, None)
    assert c == Strength(0.25, 0.375, pytest.approx(-math.log(3) / 2))


def test_rows_of_an_oracle_keep_both_strengths_and_noise_takes_them_along():
    table = {("a", "b"): 0.9, ("a", "c"): 0.4, ("b", "c"): 0.7}
    rows, _ = best_against_worst(["p"], [[1, 2]], [drawn("abc")], probability=by_table(table))
    wanted = {
        "preference_chosen": pytest.approx(1.8 / 3),
        "preference_rejected": pytest.approx(1.3 / 3),
        "log_odds_chosen": pytest.approx((math.log(9) + math.log(2 / 3)) / 3),
        "log_odds_rejected": pytest.approx((-math.log(9) + math.log(7 / 3)) / 3),
    }
    assert {name: value for name, value in rows[0].items() if name in wanted} == wanted
    (flipped,), _ = with_label_noise(rows, 1.0, 0)
    assert (flipped["chosen"], flipped["rejected"]) == ("b", "a")
    for name in ("preference", "log_odds"):
        assert flipped[f"{name}_chosen"] == wanted[f"{name}_rejected"]
        assert flipped[f"{name}_rejected"] == wanted[f"{name}_chosen"]


def test_one_certain_answer_takes_the_scores_from_all_rows():
    """A column is in all rows or in none: the reader would drop the rows without it."""
    table = {("a", "b"): 1.0, ("c", "d"): 0.8}
    rows, _ = best_against_worst(["p", "q"], [[1], [2]], [drawn("ab"), drawn("cd")], probability=by_table(table))
    assert [(r["preference_chosen"], r["preference_rejected"]) for r in rows] == [(0.75, 0.25), (0.65, 0.35)]
    assert not {name for row in rows for name in row if name.startswith("log_odds")}
    whole = [{"log_odds_chosen": 1.0, "log_odds_rejected": -1.0}, {"log_odds_chosen": 0.0, "log_odds_rejected": -1.0}]
    assert log_odds_in_all_or_none(whole) == whole
    for lacking in ({"log_odds_chosen": 1.0}, {"log_odds_chosen": 1.0, "log_odds_rejected": None}, {}):
        assert log_odds_in_all_or_none([*whole, lacking]) == [{}, {}, {}]


@pytest.mark.parametrize("given", [{}, {"score": by_text({}), "probability": by_table({})}])
def test_one_judge_decides(given):
    with pytest.raises(ValueError, match="either score or probability"):
        best_against_worst(["p"], [[1]], [drawn("ab")], **given)


# Label noise


def row(number: int, **more) -> dict:
    sides = {"chosen": f"good {number}", "rejected": f"bad {number}", "chosen_ids": [1, number], "rejected_ids": [2]}
    return {"prompt": f"p{number}", "calibration": "c", "prompt_ids": [9], **sides, **more}


def test_a_flipped_row_is_the_same_row_with_its_sides_exchanged():
    rows = [row(0, reward_chosen=2.0, reward_rejected=-1.0), row(1)]
    flipped, count = with_label_noise(rows, 1.0, 0)
    assert count == 2 and flipped == [
        {
            "prompt": "p0",
            "calibration": "c",
            "prompt_ids": [9],
            "chosen": "bad 0",
            "rejected": "good 0",
            "chosen_ids": [2],
            "rejected_ids": [1, 0],
            "reward_chosen": -1.0,
            "reward_rejected": 2.0,
        },
        {
            "prompt": "p1",
            "calibration": "c",
            "prompt_ids": [9],
            "chosen": "bad 1",
            "rejected": "good 1",
            "chosen_ids": [2],
            "rejected_ids": [1, 1],
        },
    ]
    assert rows == [row(0, reward_chosen=2.0, reward_rejected=-1.0), row(1)]  # nothing given was changed


def test_noise_counts_what_it_flips_and_repeats_exactly():
    rows = [row(i) for i in range(400)]
    noisy, count = with_label_noise(rows, 0.25, 7)
    changed = [a != b for a, b in zip(rows, noisy, strict=True)]
    assert count == sum(changed) and binomtest(count, 400, 0.25).pvalue > 1e-4
    assert with_label_noise(rows, 0.25, 7) == (noisy, count)
    assert with_label_noise(rows[:100], 0.25, 7)[0] == noisy[:100]
    assert with_label_noise(rows, 0.25, 8)[0] != noisy
    assert with_label_noise(rows, 0.0, 7) == (rows, 0)


RECIPE = """\
objective: {{name: dpo}}
model: {{name_or_path: {model}}}
data:
  sample: {{prompts: {prompts}, samples_per_prompt: 3}}
generation: {{max_new_tokens: 6}}
reward: {{name: length}}
training: {{global_batch_size: 4, learning_rate: 1e-4}}
"""


@pytest.fixture
def sampled(tiny, tmp_path, monkeypatch, capsys):
    """Rows that a recipe with the given overrides builds from the tiny model, and what it prints."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("\n".join(tiny_lm.openings()[:40]))
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=tiny, prompts=tmp_path / "prompts.txt"))
    tokenizer = load_tokenizer(tiny)

    def build(*overrides: str) -> tuple[list[dict], str]:
        rows = sampled_preferences(load_recipe(tmp_path / "r.yaml", overrides), tokenizer)
        return rows, capsys.readouterr().out

    return build


def test_noisy_samples_are_the_clean_ones_with_some_flipped(sampled):
    clean, said = sampled()
    assert "flipped" not in said
    noisy, said = sampled("data.sample.label_noise=0.25")
    assert len(clean) == len(noisy) > 20
    exchanged = [with_label_noise([r], 1.0, 0)[0][0] for r in clean]
    flips = [a != b for a, b in zip(clean, noisy, strict=True)]
    assert noisy == [b if flip else a for a, b, flip in zip(clean, exchanged, flips, strict=True)]
    assert 0 < sum(flips) < len(flips) and f"{sum(flips)} flipped" in said
    assert all((r["reward_chosen"] > r["reward_rejected"]) != flip for r, flip in zip(noisy, flips, strict=True))
    again, said = sampled("data.sample.label_noise=0.25")
    assert again == noisy and "in the cache" in said
    assert sampled()[0] == clean and sampled("data.sample.label_noise=1")[0] == exchanged


def test_an_oracle_of_the_reward_chooses_by_wins_and_keeps_no_rewards(sampled):
    """Hard Bradley–Terry on length: most wins is longest, fewest is shortest; the same pairs as length itself."""
    by_reward, _ = sampled()
    by_wins, said = sampled("reward=null", "oracle={name: bradley_terry, reward: {name: length}, hard: true}")
    assert f"{len(by_wins)} pairs" in said and len(by_wins) == len(by_reward)
    for one, other in zip(by_reward, by_wins, strict=True):
        assert (len(other["chosen"]), len(other["rejected"])) == (one["reward_chosen"], one["reward_rejected"])
        assert "reward_chosen" not in other and "reward_rejected" not in other
