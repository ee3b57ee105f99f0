"""What a comparison makes of samples, by hand: shares, cells, circles, tests, every column, and claims."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit

from evaluation.compare.command import _chosen
from evaluation.compare.length import length_controlled_rate
from evaluation.compare.matrix import Cell, adjusted, cell, cyclic_triples, detectable, verdict
from evaluation.compare.measure import Judge, Measured, Measurer
from evaluation.compare.page import claims, notes, over_seeds, percent, tuning_table, win_table
from evaluation.compare.plan import arms_of, run_of, tuning_runs
from evaluation.compare.results import Chosen, best_of, build, choices, tuned_rows
from tests.evaluation.comparing import loaded


def measured(*groups):
    table = np.zeros((len(groups), len(groups[0])))
    return Measured([list(group) for group in groups], table, table, 1.0, 0.5, 0.5, None)


def test_shares_of_samples_by_hand(files):
    judge = Judge(loaded(files, "reward={name: regex, pattern: kind}"))
    ours = measured(("kind kind", "cold"), ("kind", "kind"))
    theirs = measured(("kind", "cold"), ("cold", "cold"))
    # First prompt: 2 > 1, 2 > 0, 0 < 1, 0 = 0: 2.5 of 4. Second: all four.
    assert judge.shares(["a", "b"], ours, theirs).tolist() == [0.625, 1.0]
    assert judge.shares(["a", "b"], theirs, ours).tolist() == [0.375, 0.0]
    assert judge.one_to_one(["a", "b"], ours, theirs).tolist() == [[1.0, 0.5], [1.0, 1.0]]


def test_an_oracle_gives_the_same_shares_where_it_is_sure(files):
    oracle = "oracle={name: bradley_terry, temperature: 0.001, reward: {name: regex, pattern: kind}}"
    judge = Judge(loaded(files, "reward=null", oracle, "compare.objectives=[dpo]"))
    ours, theirs = measured(("kind kind", "cold")), measured(("kind", "cold"))
    assert judge.shares(["a"], ours, theirs).tolist() == pytest.approx([0.625])
    assert judge.one_to_one(["a"], ours, theirs).tolist() == [pytest.approx([1.0, 0.5])]


def test_an_oracle_is_asked_once_about_two_policies(files, monkeypatch):
    """A judge by HTTP costs money: shares and one to one are read off the same answers."""
    oracle = "oracle={name: bradley_terry, reward: {name: regex, pattern: kind}}"
    judge = Judge(loaded(files, "reward=null", oracle, "compare.objectives=[dpo]"))
    asked, probability = [], judge.oracle.probability
    counting = lambda _, *three: asked.append(len(three[0])) or probability(*three)  # noqa: E731
    monkeypatch.setattr(type(judge.oracle), "probability", counting)
    ours, theirs = measured(("kind", "cold"), ("a", "b")), measured(("cold", "cold"), ("a", "b"))
    for _ in range(2):
        judge.shares(["a", "b"], ours, theirs), judge.one_to_one(["a", "b"], ours, theirs)
    assert asked == [8]  # two prompts, 2 x 2 samples each
    judge.shares(["a", "b"], ours, measured(("cold", "cold"), ("a", "b")))  # equal texts of another policy
    assert asked == [8, 8]


def test_a_cell_by_hand():
    one = cell(np.array([[0.625, 1.0, np.nan], [0.375, 1.0, np.nan]]), resamples=2000)
    assert one.rate == 0.75 and one.by_seed == (0.8125, 0.6875)  # prompts: 1/2 and 1; nobody judged the third
    # Of two prompts Wilson's: the roots of (3/4 - p)^2 = z^2 p (1 - p) / 2.
    assert (one.low, one.high) == (pytest.approx(0.19787, abs=1e-5), pytest.approx(0.97332, abs=1e-5))
    assert one.prompts == 2
    many = cell(np.tile([[0.625, 1.0], [0.375, 1.0]], 20), resamples=2000)  # 40 prompts: 1/2 or 1, mean 3/4
    assert (many.low, many.high) == pytest.approx((0.675, 0.825), abs=0.013)  # quantiles of 1/2 + Bin(40, 1/2) / 80
    assert one.standard_error == pytest.approx(0.25)  # sd of (0, 1/2) over the square root of 2
    assert one.p_value == 1.0  # flipping signs of (0, 1/2) never gives less
    half = 12.706204736 * math.sqrt(2 * 0.0625**2) / math.sqrt(2)
    assert (one.seeds_low, one.seeds_high) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))
    # t with one degree of freedom is Cauchy's: P(|t| > x) = 1 - 2 atan(x)/pi, x = .25 / (.0884/sqrt 2) = 4
    assert one.seeds_p == one.swapped.seeds_p == pytest.approx(1 - 2 * math.atan(4) / math.pi)
    # Over both: variances 1/256 and 1/16, with one degree of freedom each.
    error, freedom = math.sqrt(17 / 256), (17 / 256) ** 2 / (1 / 256**2 + 1 / 16**2)
    assert one.tests == ((pytest.approx(0.0625), 1), (pytest.approx(error), pytest.approx(freedom)))
    assert one.both_p == one.swapped.both_p == pytest.approx(t_tails(0.25 / error, freedom), rel=1e-6)
    assert one.claim_p == 1.0
    alike = cell(np.array([[0.6, 0.7], [0.6, 0.7]]), resamples=100)
    assert (alike.seeds_p, alike.claim_p) == (0.0, 0.5)  # of two prompts
    assert cell(np.full((2, 3), 0.5), resamples=100).claim_p == 1.0
    assert cell(np.array([[0.9], [0.8]]), resamples=100).claim_p == 1.0  # one prompt
    single = cell(np.array([[0.6, 0.7]]), resamples=100)
    assert (single.seeds_p, single.both_p, single.tests) == (None, None, ((pytest.approx(0.05), 1),))
    assert one.swapped.rate == 0.25 and one.swapped.low == 1 - one.high and one.swapped.by_seed == (0.1875, 0.3125)
    assert one.swapped.swapped == one


def t_tails(x, freedom):
    """P(|t| > x), by integrating Student's density."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(math.pi * freedom)
    return 1 - 2 * quad(lambda y: scale * (1 + y * y / freedom) ** (-(freedom + 1) / 2), 0, x)[0]


def a_cell(rate, low=None, high=None, p=1.0, seeds_p=None, both_p=0.0):
    low, high = rate - 0.09 if low is None else low, rate + 0.09 if high is None else high
    return Cell(
        rate,
        low,
        high,
        0.1,
        p,
        (rate,),
        None,
        None,
        seeds_p,
        None if seeds_p is None else both_p,
        ((0.1, 59.0),),
        1e-4,
        60,
    )


@pytest.mark.parametrize(
    ("seeds", "over_prompts"),
    [pytest.param(2, 0.0, marks=pytest.mark.slow), (5, 0.17), pytest.param(20, 0.09, marks=pytest.mark.slow)],
)
def test_false_claims_are_as_rare_as_they_say_and_true_ones_as_frequent(seeds, over_prompts):
    """Rates that are 1/2 over all seeds and prompts, the drawn ones off by 5 points and by as much on their mean.

    The larger of the two p-values of prompts and of seeds would be under 5 % in 8 of 100 cases with 5 seeds, in 12
    with 20; prompts alone in far more. A shift by what is said to be detectable is claimed about four times in five.
    """
    rng = np.random.default_rng(seeds)

    def draw(shift=0.0):
        by_seed, by_prompt = rng.normal(0, 0.05, (seeds, 1)), rng.normal(0, over_prompts, (1, 60))
        return cell(0.5 + shift + by_seed + by_prompt + rng.normal(0, 0.1, (seeds, 60)), resamples=200)

    cells = [draw() for _ in range(800)]
    assert sum(one.claim_p <= 0.05 for one in cells) / 800 < 0.07
    for alpha in (0.05, 0.01):
        shift = detectable(cells, alpha)
        if seeds == 2:
            assert shift is None  # with one degree of freedom no rate under 100 % would do
            continue
        assert 0.72 < sum(draw(shift).claim_p <= alpha for _ in range(200)) / 200 < 0.9


def test_intransitivity_by_hand():
    def table(wins, sure=()):
        return [
            [None if i == j else a_cell(w, low=0.51 if (i, j) in sure else 0.0) for j, w in enumerate(row)]
            for i, row in enumerate(wins)
        ]

    circle = [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]
    assert cyclic_triples(table(circle)) == 1 and cyclic_triples(table(circle), sure=True) == 0
    assert cyclic_triples(table(circle, sure={(0, 1), (1, 2), (2, 0)}), sure=True) == 1
    assert cyclic_triples(table(np.array(circle).T.tolist())) == 1  # the other way round
    assert cyclic_triples(table([[0.5, 0.9, 0.9], [0.1, 0.5, 0.9], [0.1, 0.1, 0.5]])) == 0
    fourth = [[*row, 0.9] for row in circle] + [[0.1, 0.1, 0.1, 0.5]]
    assert cyclic_triples(table(fourth)) == 1
    assert cyclic_triples(table([[0.5, 0.5, 0.1], [0.5, 0.5, 0.9], [0.9, 0.1, 0.5]])) == 0  # a tie beats nobody


def test_a_claim_needs_prompts_and_seeds():
    assert adjusted([a_cell(0.6, p=0.01), a_cell(0.6, p=0.04), a_cell(0.6, p=0.9)]) == pytest.approx([0.03, 0.08, 0.9])
    sure, unsure = a_cell(0.6, p=0.001, seeds_p=0.004), a_cell(0.6, p=0.001, seeds_p=0.03)
    assert adjusted([sure, unsure, unsure]) == pytest.approx([0.012, 0.06, 0.06])  # the larger p of each, then Holm
    assert adjusted([a_cell(0.6, p=0.2, seeds_p=0.001)]) == [0.2]
    assert adjusted([a_cell(0.6, p=0.2, seeds_p=0.001, both_p=0.3)]) == [0.3]
    assert (verdict(sure, 0.05), verdict(a_cell(0.4, seeds_p=0.1), 0.05)) == ("better", "worse")
    assert verdict(sure, 0.0501) == "no significant difference" == verdict(a_cell(0.5, seeds_p=1.0), 0.01)
    assert (verdict(a_cell(0.6), 0.01), verdict(a_cell(0.4), 0.01)) == ("better in this run", "worse in this run")
    assert verdict(a_cell(0.6, low=0.49, seeds_p=0.01), 0.01) == "no significant difference"  # interval and test
    assert verdict(replace(sure, prompts=19), 0.01) == "too few prompts to tell"
    assert detectable([a_cell(0.5)]) == pytest.approx(0.28, abs=0.01) and detectable([]) is None
    few = np.array([[0.4, 0.5, 0.6, 0.5, 0.45]] * 2) + [[0.01], [-0.01]]
    assert cell(few).least_p == 2 / 32 and detectable([cell(few)]) is None  # five prompts never give 5 %
    assert cell(np.tile(few, 2)).least_p == 2 / 1024 and 0 < detectable([cell(np.tile(few, 2))]) < 0.5
    assert cell(np.tile(few, 20), resamples=1000).least_p == 1 / 1001
    wide = cell(np.tile(few, 4) + [[0.1], [-0.1]])
    assert detectable([wide], 0.005) is None  # two seeds 20 points apart: more than there is
    assert detectable([cell(np.array([[0.9], [0.8]]))]) is None  # of one prompt


def test_results_by_hand(files):
    """Every column of three arms and the start, two seeds, two prompts, two samples; the judge counts "kind"."""

    def policy(texts, kl, tokens, distinct, moved):
        ratio = np.full((2, 2), kl)
        return Measured(texts, ratio, np.full((2, 2), tokens), 0.75, distinct, 2 * distinct, moved)

    much, some, none = [["kind kind", "kind kind"]] * 2, [["kind", "cold"]] * 2, [["cold", "cold"]] * 2
    recipe = loaded(files, "compare.objectives=[dpo, {name: robust, label_smoothing: 0.0}, ipo]", "compare.seeds=2",
                    "compare.tune=1", "evaluation.bootstrap=200")  # fmt: skip
    arms = arms_of(recipe)
    chosen = [Chosen(arm, [arm.points[0]] * 2, [], []) for arm in arms]
    policies = {
        "dpo": [policy(some, 1.0, 4.0, 0.1, (-1.0, -3.0)), policy(some, 2.0, 6.0, 0.3, (-2.0, -5.0))],
        "robust": [policy(some, 1.0, 4.0, 0.1, (-1.0, -3.0)), policy(none, 1.0, 4.0, 0.1, (-1.0, -3.0))],
        "ipo": [policy(much, 3.0, 4.0, 0.1, (-7.0, -8.0)), policy(much, 5.0, 4.0, 0.1, (-9.0, -8.0))],
        "start": [policy(none, 0.0, 3.0, 0.2, None), policy(none, 0.0, 3.0, 0.2, None)],
    }
    fact = {"steps": 5, "batch": 8, "pairs": 20, "training_seconds": 2.0, "seconds": 3.0, "peak_memory": 7}
    later = fact | {"training_seconds": 4.0, "seconds": None, "peak_memory": 9, "trained_tokens": 200}
    facts = {arm.label: [fact | {"trained_tokens": 100}, later] for arm in arms}
    result = build(recipe, Judge(recipe), ["a", "b"], chosen, policies, facts)
    dpo, robust, ipo = result["objectives"]
    # dpo's samples meet the start's: one wins both, the other ties both: 3/4. ipo wins all of them.
    assert dpo["over_start"]["by_seed"] == (0.75, 0.75) and ipo["over_start"]["rate"] == 1.0
    assert robust["over_start"]["by_seed"] == (0.75, 0.5)
    cells = result["matrix"]["cells"]
    assert result["matrix"]["names"] == ["dpo", "robust", "ipo", "start"]
    assert cells[2][0]["rate"] == 1.0 and cells[0][2]["rate"] == 0.0 and cells[1][0]["by_seed"] == (0.5, 0.25)
    assert [dpo["kl"]["mean"], ipo["kl"]["mean"], ipo["kl"]["by_seed"]] == [1.5, 4.0, [3.0, 5.0]]
    assert (dpo["tokens"]["mean"], dpo["distinct_1"]["mean"], dpo["distinct_2"]["mean"]) == (5.0, 0.2, 0.4)
    assert (dpo["reward"]["mean"], ipo["reward"]["mean"], result["start"]["reward"]["mean"]) == (0.5, 2.0, 0.0)
    assert (ipo["chosen"]["mean"], ipo["rejected"]["by_seed"]) == (-8.0, [-8.0, -8.0]) and dpo["rejected"][
        "mean"
    ] == -4
    assert "chosen" not in result["start"] and dpo["finished"]["mean"] == 0.75
    # robust without noise is dpo's loss and no test; ipo is the only one of the family. Two prompts: p = 2/4.
    assert dpo["versus_baseline"] is None and robust["versus_baseline"]["verdict"] == "the same loss"
    assert robust["versus_baseline"]["p_adjusted"] is None
    assert ipo["versus_baseline"] == {"p_value": 0.5, "p_adjusted": 0.5, "verdict": "too few prompts to tell"}
    assert robust["versus_baseline"]["p_value"] is None  # nothing was tested
    assert (dpo["trained_tokens"], dpo["steps"], dpo["pairs"]) == (150, 5, [20, 20])
    assert result["cost"]["dpo"] == {"training_seconds": 3.0, "seconds": 3.0, "peak_memory": 9}
    assert (result["triples"], result["cyclic_triples"], result["seeds"]) == (4, 0, [0, 1])


def test_claims_are_those_of_the_adjusted_p(files):
    """Forty prompts, three seeds: p over prompts is 2^-39 or so, over seeds 1, 2, 5 %: after Holm only the first."""

    def shares(*rates):  # of 40 prompts with 50 samples each; by turns one more and one fewer is kind
        counts = [[round(50 * r) + (-1) ** q for q in range(40)] for r in rates]
        return [measured(*(["kind"] * k + ["cold"] * (50 - k) for k in each)) for each in counts]

    labels = ["dpo", "ipo", "simpo", "rpo"]
    recipe = loaded(files, "compare.objectives=[dpo, ipo, simpo, rpo]", "compare.tune=1", "compare.seeds=3")
    judge = Judge(loaded(files, "reward={name: regex, pattern: kind}"))
    base = [measured(*[["kind"] * 25 + ["cold"] * 25] * 40) for _ in range(3)]
    policies = {"dpo": base, "ipo": shares(0.8, 0.82, 0.84), "simpo": shares(0.52, 0.8, 0.9),
                "rpo": shares(0.3, 0.2, 0.25), "start": base}  # fmt: skip
    fact = {"steps": 5, "batch": 8, "pairs": 20, "training_seconds": 2.0, "seconds": 3.0, "peak_memory": 7}
    facts = {label: [fact | {"trained_tokens": 100}] * 3 for label in labels}
    chosen = [Chosen(arm, [arm.points[0]] * 3, [], []) for arm in arms_of(recipe)]
    result = build(recipe, judge, [f"p{i}" for i in range(40)], chosen, policies, facts)
    tests = {row["label"]: row["versus_baseline"] for row in result["objectives"]}
    rates = {
        row["label"]: result["matrix"]["cells"][i][0]["by_seed"] for i, row in enumerate(result["objectives"]) if i
    }
    by_hand = {}
    for label, seeds in rates.items():
        mean, n = sum(seeds) / 3, 3
        t = abs(mean - 0.5) / math.sqrt(sum((r - mean) ** 2 for r in seeds) / (n - 1) / n)
        by_hand[label] = 1 - t / math.sqrt(t * t + 2)  # the t distribution with two degrees of freedom
    ordered = sorted(by_hand, key=by_hand.get)
    for label in labels[1:]:
        assert tests[label]["p_value"] == pytest.approx(by_hand[label], rel=1e-6)
        holm = max(min(1, by_hand[one] * (3 - k)) for k, one in enumerate(ordered[: ordered.index(label) + 1]))
        assert tests[label]["p_adjusted"] == pytest.approx(holm, rel=1e-6)
    assert [tests[label]["verdict"] for label in labels[1:]] == ["better", "no significant difference", "worse"]
    prompts = [f"p{i}" for i in range(40)]
    cells = [
        cell(np.array([judge.shares(prompts, *both) for both in zip(policies[label], base, strict=True)]))
        for label in labels[1:]
    ]
    assert result["detectable"] == pytest.approx(detectable(cells))
    assert result["detectable_holm"] == pytest.approx(detectable(cells, 0.05 / 3)) != pytest.approx(detectable(cells))


def test_the_best_win_rate_over_the_start_on_validation_prompts_tunes(files):
    arm = arms_of(loaded(files, "compare.objectives=[dpo]", "compare.tune=2"))[0]
    judge = Judge(loaded(files, "reward={name: regex, pattern: kind}"))
    low, high = arm.points
    starts = {0: measured(("kind", "cold")), 1: measured(("cold", "cold"))}
    policies = {(low, 0): measured(("cold", "cold")), (low, 1): measured(("cold", "cold")),
                (high, 0): measured(("kind", "kind")), (high, 1): measured(("kind", "kind"))}  # fmt: skip
    rows = tuned_rows(judge, ["a"], arm, policies, starts)
    assert [row["value"] for row in rows] == [low, high] and best_of(rows) == high
    assert [row["win_rate"] for row in rows] == [(0.25 + 0.5) / 2, (0.75 + 1) / 2]


# --- who chooses the tuning point ------------------------------------------------------------------------------------

RATES = {0: (0.6, 0.7, 0.5), 1: (0.4, 0.5, 0.9)}  # of each seed, at three points


def tuned(files, *more):
    """An arm's choice of its points and its runs, where seed s samples `kind` in RATES[s] of its answers."""
    recipe = loaded(files, "compare.seeds=2", "compare.tune=3", "compare.objectives=[dpo]", *more)
    (arm,) = arms_of(recipe)

    def policy(run, which):
        kind = round(100 * RATES[run.seed][arm.points.index(run.value)])
        return measured(["kind"] * kind + ["cold"] * (100 - kind))

    measurer = SimpleNamespace(policy=policy, start=lambda seed, which: measured(["cold"] * 100))
    runs = list(tuning_runs(recipe, [arm], 4))
    return recipe, arm, _chosen(recipe, arm, Judge(recipe), measurer, ["a"], runs, 4)


def test_each_seed_chooses_its_own_point_where_all_of_them_tune(files):
    for setting in ("seeds", "2"):
        recipe, arm, one = tuned(files, f"compare.tuning_seeds={setting}")
        low, middle, high = arm.points
        assert recipe.each_seed_tunes and one.values == [middle, high]
        assert [(run.seed, run.value) for run in one.runs] == [(0, middle), (1, high)]
        assert [point["chosen"] for point in one.tuned] == [0, 1, 1]
        assert [point["win_rate"] for point in one.tuned] == pytest.approx([0.75, 0.8, 0.85])  # (1 + share) / 2
    recipe, arm, one = tuned(files, "compare.tuning_seeds=1")
    assert not recipe.each_seed_tunes and one.values == [arm.points[1]] * 2  # seed 0 chooses for both
    assert [point["chosen"] for point in one.tuned] == [0, 2, 0]
    assert not loaded(files, "compare.tune=1", "compare.tuning_seeds=seeds").each_seed_tunes
    assert not loaded(files, "compare.seeds=1", "compare.tuning_seeds=seeds").each_seed_tunes


def test_a_report_of_seeds_with_points_of_their_own(files):
    """dpo took two values, f_dpo with reverse KL one of another grid: one method, tuned twice, and not tested."""
    objectives = "compare.objectives=[dpo, {name: f_dpo, divergence: reverse_kl, beta: 0.2}, ipo]"
    recipe = loaded(files, objectives, "compare.seeds=2", "compare.tuning_seeds=seeds", "evaluation.bootstrap=200")
    arms = arms_of(recipe)
    (low, middle, _), (*_, high) = arms[0].points, arms[1].points
    taken = ([low, middle], [high, high], [arms[2].points[0]] * 2)
    rows = [[{"value": v, "win_rate": 0.5, "kl": 1.0, "chosen": values.count(v)} for v in arm.points]
            for arm, values in zip(arms, taken, strict=True)]  # fmt: skip
    chosen = [Chosen(*one, []) for one in zip(arms, taken, rows, strict=True)]
    texts = [[["kind", "cold"]] * 40, [["kind", "kind"]] * 40, [["cold", "cold"]] * 40]
    ours, better, start = ([measured(*each), measured(*each)] for each in texts)
    policies = {"dpo": ours, "f_dpo-reverse_kl": better, "ipo": better, "start": start}
    fact = {"steps": 5, "batch": 8, "pairs": 20, "training_seconds": 2.0, "seconds": 3.0, "peak_memory": 7}
    facts = {arm.label: [fact | {"trained_tokens": 100}] * 2 for arm in arms}
    result = build(recipe, Judge(recipe), [f"p{i}" for i in range(40)], chosen, policies, facts)
    dpo, twin, ipo = result["objectives"]
    assert (dpo["value"], dpo["values"], dpo["hyperparameters"]["beta"]) == (None, [low, middle], [low, middle])
    assert dpo["point"] == f"beta: {low:g} x 1, {middle:g} x 1" and twin["point"] == f"beta-{high:g}"
    assert twin["equals"] == f"= dpo (beta={high:g})" and twin["hyperparameters"]["beta"] == high
    assert twin["versus_baseline"] == {
        "p_value": None, "p_adjusted": None, "verdict": "the same loss, another value"
    }  # fmt: skip
    assert ipo["versus_baseline"]["p_value"] == ipo["versus_baseline"]["p_adjusted"]  # the only one of the family
    assert result["claims_about"] == "objectives" and "different from dpo?" in win_table(result)[0]
    assert f"{low:g}: 50.0 (1.00) chosen by 1 of 2 seeds" in tuning_table(result)[1][-1][-1]
    assert any("Each seed chose its own tuning point" in note for note in notes(result))
    shared = result | {"claims_about": "settings"}
    assert "different from dpo at these settings?" in win_table(shared)[0]
    assert any("about these settings, not about the objectives: all seeds share" in note for note in notes(shared))
    assert "at these settings" in claims(shared)[0] and "at these settings" not in claims(result)[0]


def false_claims(gap, each, trials=150):
    """Share of comparisons in which one of three arms that are the baseline's own method is claimed to differ.

    Three tuning points of strength -gap, 0, -gap in logits, runs that differ by 0.12 (three points of win rate), 60
    validation and 60 test prompts of spread 0.5 with 16 pairs of samples each, five seeds.

    Args:
        gap: in logits.
        each: whether each seed tunes for itself; else the first tunes for all.
    """
    rng, strength, found = np.random.default_rng(11), np.array([-gap, 0, -gap]), 0

    def share(logits):  # [..., 60 prompts], of 16 pairs
        return rng.binomial(16, expit(logits[..., None] + rng.normal(0, 0.5, (*logits.shape, 60)))) / 16

    for _ in range(trials):
        arms = []
        for _ in range(4):
            true = strength + rng.normal(0, 0.12, (5, 3))  # [seeds, points]
            validation = share(true + 1).mean(-1)
            rows = {
                seed: [{"value": float(v), "win_rate": validation[seed, v]} for v in range(3)]
                for seed in range(5 if each else 1)
            }
            picked = [int(value) for value in choices(rows, range(5), each)]
            arms.append(true[range(5), picked])
        cells = [cell(share(arm - arms[0]), resamples=100) for arm in arms[1:]]
        verdicts = [verdict(one, p) for one, p in zip(cells, adjusted(cells), strict=True)]
        found += any(said in ("better", "worse") for said in verdicts)
    return found / trials


def test_the_noise_of_tuning_is_in_the_error_where_each_seed_tunes():
    """With one choice for all seeds an arm meets itself at another value, by luck, and is claimed to be better."""
    assert false_claims(0.2, each=True) < 0.09  # 0.05, and two standard errors of 150 comparisons
    assert false_claims(0.2, each=False) > 0.14


def test_seeds_of_measurements_differ_and_other_weights_are_measured_anew(files, tmp_path, monkeypatch):
    seen = []

    def stub(self, final, seed, which, pairs):
        seen.append(seed)
        return {"responses": [["a"]], "log_ratio": [[0.0]], "tokens": [[1]], "finished": 1.0, "distinct_1": 1.0,
                "distinct_2": 1.0, "displacement": None}  # fmt: skip

    monkeypatch.setattr(Measurer, "_measure", stub)
    recipe = loaded(files)
    measurer = Measurer(recipe, {"test": ["p"], "validation": ["q"]})
    for which in ("test", "validation"):
        for seed in (0, 1):
            measurer.start(seed, which)
    for arm in arms_of(recipe)[:2]:
        for value in arm.points[:2]:
            measurer.policy(run_of(recipe, arm, value, 0, 4), "test")
    assert len(set(seen)) == len(seen) == 8
    measurer.start(0, "test")
    assert len(seen) == 8  # kept
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    Measurer(recipe, {"test": ["p"]}).start(0, "test")
    assert len(seen) == 9 and seen[-1] == seen[0]


@pytest.mark.parametrize(("push", "shrunk"), [(0.2, True), (2.0, False)])
def test_a_rate_at_equal_lengths_that_the_penalty_shrank_is_marked(push, shrunk):
    """Ten prompts of six samples: an advantage of .2 where lengths decide is too little to tell, one of 2 is not."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 60, (10, 6))
    won = (rng.random((10, 6)) < expit((lengths - 30) / 10 + push)).astype(float)
    ours = measured(*[["x" * int(n) for n in row] for row in lengths])
    found = length_controlled_rate([ours], [measured(*[["y" * 30] * 6] * 10)], [won])
    assert found is not None and found["shrunk"] is shrunk and (found["rate"] == 0.5) is shrunk


def test_claims_are_in_those_words():
    def row(label, test):
        return {"label": label, "over_start": {"rate": 0.6}, "versus_baseline": test}

    rows = [row("dpo", None)]
    for name, p in (("better", 0.01), ("worse", 0.02), ("no significant difference", 0.3), ("the same loss", None)):
        rows.append(row(name.split()[0], {"p_adjusted": p, "verdict": name}))
    rows.append(row("once", {"p_adjusted": 0.01, "verdict": "worse in this run"}))
    rows.append(row("luck", {"p_adjusted": None, "verdict": "the same loss, another value"}))
    rows.append(row("few", {"p_adjusted": 0.01, "verdict": "too few prompts to tell"}))
    expected = [
        "better than dpo{}: better",
        "worse than dpo{}: worse",
        "worse in this run than dpo{}: once",
        "no significant difference from dpo{}: no",
        "too few prompts to tell from dpo{}: few",
        "the same loss as dpo, not tested: the",
        "the same loss as dpo at another value, not tested: luck",
    ]
    for about, words in (("settings", " at these settings"), ("objectives", "")):
        result = {"baseline": "dpo", "objectives": rows, "claims_about": about}
        assert claims(result) == [line.format(words) for line in expected]
    assert percent(None) == "not available" and percent({"rate": 0.5, "low": 0.25, "high": 1}) == "50.0 [25.0, 100.0]"
    assert percent({"rate": 0.5, "low": 0.5, "high": 1, "shrunk": True}) == "50.0 [50.0, 100.0] (shrunk)"
    assert over_seeds({"mean": 1.0, "by_seed": [0.5, 1.5]}) == "1.00 (0.50 to 1.50)"
