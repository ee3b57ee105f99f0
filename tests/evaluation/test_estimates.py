"""Win-rate statistics against enumeration, closed forms and simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from evaluation.estimates import (
    bootstrap_means,
    cluster_bootstrap,
    clustered_standard_error,
    compare_paired,
    holm,
    mean_difference,
    minimal_detectable_difference,
    preferences,
    sign_flip_p_value,
    wilson_interval,
    win_rate,
    win_rate_of_preferences,
)

NAN = float("nan")


def test_preferences_of_all_pairs():
    # a = 1 beats 0, ties 1, loses to 2; a = 2 beats 0 and 1, ties 2; NaN decides nothing.
    got = preferences([1, 2, NAN], [0, 1, 2])
    np.testing.assert_array_equal(got, [[1, 0.5, 0], [1, 1, 0.5], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(preferences([1], [NAN, 0]), [[NAN, 1]])


def test_counts_and_rates_by_hand():
    """Four prompts, worked by hand.

    1: a (3, 1) against b (2, 2): win, win, loss, loss      -> score 1/2, shares 1/2, 0, 1/2
    2: a (1, 1) against b (0, 1): win, tie, win, tie        -> score 3/4, shares 1/2, 1/2, 0
    3: a (5, NaN) against b (4, 9): win, loss; two left out -> score 1/2, shares 1/2, 0, 1/2
    4: a (NaN) against b (1): left out
    rate = (1/2 + 3/4 + 1/2) / 3 = 7/12; won 3/2, lost 1: ties dropped 3/5.
    Scores have sd sqrt(((1/12)^2 * 2 + (1/6)^2) / 2) = sqrt(1/48): standard error sqrt(1/48) / sqrt(3) = 1/12.
    """
    got = win_rate([[3, 1], [1, 1], [5, NAN], [NAN]], [[2, 2], [0, 1], [4, 9], [1]], resamples=2000)
    assert (got.prompts, got.prompts_excluded, got.pairs, got.pairs_excluded) == (3, 1, 10, 3)
    assert got.rate.estimate == pytest.approx(7 / 12)
    assert got.rate_ties_dropped is not None
    assert got.rate_ties_dropped.estimate == pytest.approx(3 / 5)
    assert got.standard_error == pytest.approx(1 / 12)
    assert got.prompt_outcomes == (1, 2, 0)
    assert got.pair_outcomes == (5, 2, 3)
    # Differences from one half are (0, 1/4, 0): both signs of the only non-zero one are as extreme.
    assert got.p_value == 1.0


def test_identical_models_are_at_one_half_and_swapping_mirrors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    same = win_rate(list(a), list(a), resamples=1000)
    assert same.rate.estimate == 0.5
    assert (same.rate.low, same.rate.high, same.p_value) == (0.5, 0.5, 1.0)
    forward, backward = (win_rate(list(x), list(y), resamples=1000) for x, y in ((a, b), (b, a)))
    assert forward.rate.estimate == pytest.approx(1 - backward.rate.estimate)
    assert forward.rate.low == pytest.approx(1 - backward.rate.high)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert forward.prompt_outcomes == backward.prompt_outcomes[::-1]


def test_all_ties_have_no_rate_without_ties():
    got = win_rate([[1.0], [2.0]], [[1.0], [2.0]], resamples=100)
    assert got.rate_ties_dropped is None
    assert got.prompt_outcomes == (0, 2, 0)


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="no prompt has a pair"):
        win_rate([[NAN]], [[1.0]])
    with pytest.raises(ValueError, match="both sides"):
        mean_difference([[NAN]], [[1.0]])


def test_soft_preferences_count_as_wins_above_one_half():
    got = win_rate_of_preferences([np.array([[0.9, 0.6]]), np.array([[0.2]])], resamples=100)
    assert got.rate.estimate == pytest.approx((0.75 + 0.2) / 2)
    assert got.prompt_outcomes == (1, 0, 1)


def test_bootstrap_means_follow_the_enumerated_distribution():
    """n = 4: all 4^4 resamples enumerated, every value's probability against its frequency (5 standard errors)."""
    values = np.array([0.0, 0.25, 0.5, 1.0])
    exact = Counter(round(float(np.mean(r)), 6) for r in itertools.product(values, repeat=4))
    draws = bootstrap_means(values[:, None], 40_000, np.random.default_rng(1))[:, 0]
    seen = Counter(np.round(draws, 6).tolist())
    assert set(seen) == set(exact)
    for value, ways in exact.items():
        p = ways / 4**4
        assert seen[value] / 40_000 == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 40_000))


def test_percentile_interval_equals_the_binomial_quantiles():
    """Ten prompts, 7 won: a resample wins Binomial(10, 0.7).

    P(<= 3) = 0.0106 < 0.025 < 0.0473 = P(<= 4) and P(<= 9) = 1 - 0.7^10 = 0.9718 < 0.975: limits 4/10 and 10/10.
    """
    got = win_rate([[1.0]] * 7 + [[0.0]] * 3, [[0.0]] * 7 + [[1.0]] * 3, resamples=40_000)
    assert (got.rate.estimate, got.rate.low, got.rate.high) == pytest.approx((0.7, 0.4, 1.0))
    assert got.rate_ties_dropped == got.wilson  # no ties to drop, and the interval to read of so few prompts


def test_ratio_without_ties_against_enumeration():
    """Ten times three prompts (win, tie, loss): how often each is drawn is multinomial; ties alone are left out."""
    chances = {
        (won, lost): stats.multinomial.pmf([won, 30 - won - lost, lost], 30, [1 / 3] * 3)
        for won in range(31) for lost in range(31 - won) if won + lost
    }  # fmt: skip
    ordered = sorted((won / (won + lost), chance) for (won, lost), chance in chances.items())
    sums = np.cumsum([chance for _, chance in ordered]) / sum(chances.values())
    low, high = (ordered[int(np.searchsorted(sums, tail))][0] for tail in (0.025, 0.975))
    got = win_rate([[1.0], [1.0], [0.0]] * 10, [[0.0], [1.0], [1.0]] * 10, resamples=40_000).rate_ties_dropped
    assert got is not None
    assert (got.estimate, got.low, got.high) == pytest.approx(
        (0.5, low, high), abs=0.03
    )  # resamples are 40,000 of them


def test_ratio_without_ties_of_few_prompts_is_wilson_s():
    """Three won outright, one tied, half of one lost: 3 of 3.5, and weights 1, 1, 1, .5 are 3.5^2 / 3.25 trials."""
    got = win_rate([[1.0]] * 3 + [[0.0], [0.0, 0.0]], [[0.0]] * 3 + [[0.0], [0.0, 1.0]]).rate_ties_dropped
    assert got == wilson_interval(3 / 3.5, 3.5**2 / 3.25)


def test_same_seed_same_numbers_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(2).normal(size=(20, 2))
    whole = bootstrap_means(values, 500, np.random.default_rng(3))
    monkeypatch.setattr("evaluation.estimates._CHUNK", 100)
    # A matrix product of another size may round its sums in another order (BLAS, by CPU): the last bits.
    np.testing.assert_allclose(bootstrap_means(values, 500, np.random.default_rng(3)), whole, rtol=0, atol=1e-14)
    # Closed form: the mean of a resample has mean x-bar and variance (population variance) / n.
    assert whole.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=5 * values.std() / math.sqrt(20 * 500))
    assert whole.var(axis=0) == pytest.approx(values.var(axis=0) / 20, rel=0.3)


@pytest.mark.parametrize(("mean", "n"), [(0.0, 5), (0.3, 10), (0.65, 128), (1.0, 8)])
def test_wilson_limits_solve_its_defining_equation(mean, n):
    """Limits p solve |mean - p| = z sqrt(p (1 - p) / n) (Wilson 1927), found here by root finding."""
    got = wilson_interval(mean, n)
    for p in (got.low, got.high):
        assert abs(mean - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert 0 <= got.low <= mean <= got.high <= 1
    assert got.low < got.high  # unlike the bootstrap's, never of width 0


@pytest.mark.parametrize("n", [1, 5, 14])
def test_sign_flip_enumerated_closed_form(n):
    # All differences equal: only "all plus" and "all minus" are as extreme.
    assert sign_flip_p_value(np.full(n, 0.3), 10, np.random.default_rng(0)) == 2 / 2**n


def test_sign_flip_enumerated_against_loops():
    values = [0.5, -0.25, 0.1, 0.0, 0.7, 0.3]
    flips = list(itertools.product((1, -1), repeat=6))
    as_extreme = sum(
        abs(sum(s * v for s, v in zip(f, values, strict=True))) >= abs(sum(values)) - 1e-12 for f in flips
    )
    assert sign_flip_p_value(values, 10, np.random.default_rng(0)) == as_extreme / 64


def test_sign_flip_of_equal_sizes_is_the_binomial_sign_test():
    for won, lost, tied in ((27, 13, 5), (270, 230, 0), (16, 6, 0)):
        values = np.array([0.5] * won + [-0.5] * lost + [0.0] * tied)
        expected = stats.binomtest(won, won + lost).pvalue
        assert sign_flip_p_value(values, 10, np.random.default_rng(4)) == pytest.approx(expected, rel=1e-9)
    assert sign_flip_p_value([0.0, 0.0], 10, np.random.default_rng(4)) == 1


def test_sign_flip_of_two_sizes_is_a_sum_over_two_binomials():
    """20 differences of 1/2, 14 positive, and 10 of 1/4, 6 positive: |sum| >= 4.5 in how many of 2^30 patterns?"""
    values = np.array([0.5] * 14 + [-0.5] * 6 + [0.25] * 6 + [-0.25] * 4)
    ways = sum(
        math.comb(20, i) * math.comb(10, j)
        for i in range(21) for j in range(11) if abs((2 * i - 20) / 2 + (2 * j - 10) / 4) >= 4.5
    )  # fmt: skip
    assert sign_flip_p_value(values, 10, np.random.default_rng(4)) == pytest.approx(ways / 2**30, rel=1e-12)


def test_sign_flip_sampled_agrees_with_the_binomial_sign_test():
    """Sizes that all differ, by next to nothing: as good as equal ones, but too many sums to enumerate."""
    values = np.array([1.0] * 27 + [-1.0] * 13) * (1 + 1e-9 * np.arange(40))
    got = sign_flip_p_value(values, 20_000, np.random.default_rng(4))
    expected = stats.binomtest(27, 40).pvalue
    assert got == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 20_000))
    many = 1 + 1e-9 * np.arange(100)
    assert sign_flip_p_value(many, 999, np.random.default_rng(5)) == 1 / 1000  # never 0


def test_mean_difference_by_hand():
    got = mean_difference([[1, 3], [NAN, 4], [NAN]], [[0], [1, 2], [5]], resamples=20_000)
    # Prompt means (2, 0) and (4, 1.5); the third has nothing on the first side.
    assert (got.mean_a, got.mean_b, got.prompts) == (3.0, 0.75, 2)
    # Differences 2 and 2.5: resample means 2 (1/4), 2.25 (1/2), 2.5 (1/4).
    assert (got.difference.estimate, got.difference.low, got.difference.high) == pytest.approx((2.25, 2.0, 2.5))


def _correlated_scores(rng, prompts: int, samples: int, effect: float):
    """Scores with a prompt effect of the difference: samples of one prompt move together."""
    shift = effect + rng.normal(size=(prompts, 1))
    return shift + 0.5 * rng.normal(size=(prompts, samples)), 0.5 * rng.normal(size=(prompts, samples))


def test_resampling_prompts_is_wider_than_resampling_samples():
    """Closed form: with ICC rho and m samples a prompt, the variance is inflated by 1 + (m - 1) rho."""
    a, b = _correlated_scores(np.random.default_rng(6), 200, 8, 0.2)
    wins = (a > b).astype(float)  # [200, 8]: 8 sample pairs of each prompt
    rng = np.random.default_rng(7)
    by_prompt = bootstrap_means(wins.mean(axis=1, keepdims=True), 2000, rng).std()
    by_sample = bootstrap_means(wins.reshape(-1, 1), 2000, rng).std()
    between, within = wins.mean(axis=1).var(ddof=1), wins.var(axis=1, ddof=1).mean()
    icc = (between - within / 8) / (between - within / 8 + within)
    assert by_prompt / by_sample > 1.5
    assert by_prompt / by_sample == pytest.approx(math.sqrt(1 + 7 * icc), rel=0.1)


def test_interval_covers_the_true_win_rate():
    """Simulated: the difference of two samples is N(effect, 1 + 1/4 + 1/4), so the truth is a normal tail."""
    effect, rng, covered, runs = 0.3, np.random.default_rng(8), 0, 300
    truth = stats.norm.cdf(effect / math.sqrt(1.5))
    for run in range(runs):
        a, b = _correlated_scores(rng, 60, 2, effect)
        got = win_rate(list(a), list(b), resamples=400, seed=run)
        covered += got.rate.low <= truth <= got.rate.high
    assert 0.90 <= covered / runs <= 0.98  # nominal 0.95, its standard error 0.013


def test_clustered_standard_error_by_hand_and_without_clusters():
    """Rows 1, 0 of prompt p and 1, 1, 0 of q; mean 3/5.

    Residual sums: p (1 + 0) - 2 * 3/5 = -1/5, q 2 - 3 * 3/5 = 1/5. sqrt(2/1 * (1/25 + 1/25)) / 5 = 2/25.
    """
    assert clustered_standard_error([1, 0, 1, 1, 0], ["p", "p", "q", "q", "q"]) == pytest.approx(2 / 25)
    values = np.random.default_rng(0).normal(size=12)
    assert clustered_standard_error(values) == pytest.approx(stats.sem(values))
    assert math.isnan(clustered_standard_error([1.0, 2.0], ["p", "p"]))


def test_cluster_bootstrap_against_enumeration():
    """Clusters p (1, 0), q (1): resamples pp 1/2, pq and qp 2/3, qq 1, with chances 1/4, 1/2, 1/4."""
    draws = cluster_bootstrap([[1.0], [0.0], [1.0]], ["p", "p", "q"], 20_000, np.random.default_rng(1))[:, 0]
    seen = Counter(np.round(draws, 6).tolist())
    assert set(seen) == {0.5, 0.666667, 1.0}
    for value, chance in ((0.5, 0.25), (0.666667, 0.5), (1.0, 0.25)):
        assert seen[value] / 20_000 == pytest.approx(chance, abs=0.02)
    with pytest.raises(ValueError, match="2 rows but 1 cluster labels"):
        cluster_bootstrap([[1.0], [0.0]], ["p"], 10, np.random.default_rng(0))


def test_paired_comparison_by_hand():
    """Differences 1/2, 0, 1 of prompts p, p, q (the fourth row is unknown): mean 1/2, cluster sums 1/2 and 1.

    Both signs alike are the extremes: p = 2/4. Residual sums 1/2 - 1 and 1 - 1/2: error
    sqrt(2 * (1/4 + 1/4)) / 3 = 1/3. Two prompts: Wilson's interval of (1 + 1/2) / 2 in 3^2 / (2^2 + 1^2) trials.
    """
    got = compare_paired([1, 0.5, 1, NAN], [0.5, 0.5, 0, 1], clusters=["p", "p", "q", "r"], resamples=4000)
    assert (got.mean_x, got.mean_y) == pytest.approx((2.5 / 3, 1 / 3))
    wilson = wilson_interval(0.75, 9 / 5)
    limits = 2 * wilson.low - 1, 2 * wilson.high - 1
    assert (got.difference.estimate, got.difference.low, got.difference.high) == pytest.approx((0.5, *limits))
    scores = compare_paired([2, 1, 3], [1, 1, 1], clusters=["p", "p", "q"], resamples=4000).difference
    assert (scores.estimate, scores.low, scores.high) == pytest.approx((1, 0.5, 2))  # pp 1/2, pq 1, qq 2: no shares
    assert (got.standard_error, got.p_value) == pytest.approx((1 / 3, 0.5))
    assert (got.rows, got.clusters) == (3, 2)
    with pytest.raises(ValueError, match="no row on which both"):
        compare_paired([NAN], [1.0])
    with pytest.raises(ValueError, match="of one length"):
        compare_paired([1.0, 2.0], [1.0])


def test_the_paired_test_flips_clusters_and_not_rows():
    """Two rows of each of three prompts say the same: the extremes are 2 of 2^3 patterns, of rows 2 of 2^6."""
    got = compare_paired([0.5, 0.5, 1, 0.25, 0.75, 0.75], [0.0] * 6, clusters=["p", "p", "q", "q", "r", "r"])
    assert (got.p_value, got.clusters, got.rows) == (2 / 8, 3, 6)
    assert compare_paired([0.5, 0.5, 1, 0.25, 0.75, 0.75], [0.0] * 6).p_value == 2 / 64


def test_paired_comparison_is_finer_than_two_single_rates():
    """Two systems that share a prompt effect: var(x - y) = var(x) + var(y) - 2 cov(x, y)."""
    rng = np.random.default_rng(2)
    hard = rng.normal(size=400)
    x, y = hard + 0.2 * rng.normal(size=400) + 0.05, hard + 0.2 * rng.normal(size=400)
    got = compare_paired(x, y, resamples=2000)
    cov = np.cov(x, y)
    assert got.standard_error == pytest.approx(math.sqrt((cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]) / 400))
    assert got.standard_error < 0.3 * math.hypot(stats.sem(x), stats.sem(y))
    assert got.p_value == pytest.approx(stats.ttest_rel(x, y).pvalue, abs=0.02)


def test_holm_by_hand():
    """Sorted .01, .02, .03, .04 times 4, 3, 2, 1: .04, .06, .06, .04 -> running maximum .04, .06, .06, .06."""
    assert holm([0.03, 0.01, 0.04, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.9]).tolist() == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.7]).tolist() == pytest.approx([1.0, 1.0])
    assert holm([]).tolist() == []


def test_minimal_detectable_difference_is_found_as_often_as_it_says():
    """805 prompts with sd .45: 4.4 points at 80 %; at that difference a z-test rejects in 80 % of experiments."""
    error = 0.45 / math.sqrt(805)
    detectable = minimal_detectable_difference(error)
    assert detectable == pytest.approx(0.0444, abs=5e-5)
    assert stats.norm.sf(stats.norm.ppf(0.975) - detectable / error) == pytest.approx(0.8)
