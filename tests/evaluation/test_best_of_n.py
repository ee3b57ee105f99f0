"""Best-of-n estimator against enumeration of subsets and tie-breaks, exact fractions, and closed forms."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from evaluation.best_of_n import best_of_n_curve, best_of_n_kl, overoptimization_curves, rank_weights

NAN = float("nan")


def values(curve, key="gold"):
    return [row[key] for row in curve]


def brute_force(proxy, gold, n):
    """Mean gold (and proxy) of the chosen sample over all subsets of n and all ways in which ties may break."""
    pool = [i for i in range(len(proxy)) if not math.isnan(proxy[i]) and not math.isnan(gold[i])]
    found = []
    for subset in itertools.combinations(pool, n):
        best = max(proxy[i] for i in subset)
        winners = [i for i in subset if proxy[i] == best]  # a fair tie-break picks each of them equally often
        found.append((best, sum(gold[i] for i in winners) / len(winners)))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(
    "proxy",
    [
        [0.3, -1.0, 2.5, 0.7, 0.1, -0.4, 9.0],
        [1, 0, 1, 2, 0, 1, 2],  # ties in the middle and at the top
        [5, 5, 5, 5, 5, 5, 5],
        [0.0, -0.0, 1, 1, 1, -3, -3],
        [NAN, 1, 2, 1, NAN, 3, 0],
    ],
)
def test_equals_the_mean_over_all_subsets(proxy):
    """A3, and ties: N = 7, every n, gold in no relation to the proxy."""
    gold = [2.0, -7.0, 0.5, 11.0, 3.0, -1.0, 4.0]
    ns = list(range(1, 8 - sum(map(math.isnan, proxy))))
    curve = best_of_n_curve([proxy], [gold], ns)
    for row, n in zip(curve, ns, strict=True):
        assert (row["n"], row["proxy"], row["gold"]) == (n, *(pytest.approx(v) for v in brute_force(proxy, gold, n)))


def test_ties_equal_the_mean_over_all_orders_of_drawing():
    """The same samples in every order, each with the first-drawn of equals winning: their mean is the estimate."""
    proxy, gold, n = [1, 1, 0, 1, 0], [4.0, -2.0, 1.0, 9.0, 5.0], 2
    found = []
    for order in itertools.permutations(range(5)):
        place = {i: p for p, i in enumerate(order)}
        for subset in itertools.combinations(range(5), n):
            found.append(gold[max(subset, key=lambda i: (proxy[i], -place[i]))])
    assert best_of_n_curve([proxy], [gold], [n])[0]["gold"] == pytest.approx(np.mean(found))


def test_tie_break_does_not_look_at_gold():
    """Within ties the high gold scores first, then last: the same curve."""
    proxy = np.array([0, 0, 0, 1, 1, 1.0])
    gold = np.array([3, 2, 1, 6, 5, 4.0])
    first, last = (values(best_of_n_curve([proxy], [g], [1, 3, 6])) for g in (gold, gold[[2, 1, 0, 5, 4, 3]]))
    assert first == last
    assert first[-1] == pytest.approx(5)  # n = N: the mean of the three best, not 6


def test_weights_are_exact_fractions():
    """C(i-1, n-1) / C(N, n) with whole numbers, N = 30."""
    ns = list(range(1, 31))
    got = rank_weights(30, ns)
    for n in ns:
        want = [Fraction(math.comb(i - 1, n - 1), math.comb(30, n)) for i in range(1, 31)]
        np.testing.assert_allclose(got[n - 1], [float(w) for w in want], rtol=1e-12)


def test_weights_at_the_papers_size():
    """A1: N = 12600. Sums are 1, and single weights agree with 50-digit binomials where floats cannot form them."""
    ns = [1, 2, 256, 4096, 8192, 12500, 12600]
    got = rank_weights(12600, ns)
    assert (got >= 0).all()
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-9)
    with mpmath.workdps(50):
        for row, n in zip(got, ns, strict=True):
            for i in {n, (n + 12600) // 2, 12590, 12599, 12600}:
                want = mpmath.binomial(i - 1, n - 1) / mpmath.binomial(12600, n) if i >= n else mpmath.mpf(0)
                assert row[i - 1] == pytest.approx(float(want), rel=1e-9, abs=1e-300)


def test_one_is_the_pools_mean_and_all_is_its_best():
    """A2."""
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(4, 50)), rng.normal(size=(4, 50))
    one, everything = best_of_n_curve(proxy, gold, [1, 50])
    assert one["gold"] == pytest.approx(gold.mean()) and one["proxy"] == pytest.approx(proxy.mean())
    assert everything["gold"] == pytest.approx(gold[range(4), proxy.argmax(axis=1)].mean())
    assert everything["proxy"] == pytest.approx(proxy.max(axis=1).mean())


@pytest.mark.parametrize(("pool", "n", "want"), [(10, 3, 8.25), (100, 7, 88.375), (12600, 12500, None)])
def test_gold_that_is_the_proxys_rank(pool, n, want):
    """A4: n (N + 1) / (n + 1), for any increasing proxy and any order of drawing."""
    ranks = np.random.default_rng(1).permutation(pool) + 1.0
    want = n * (pool + 1) / (n + 1) if want is None else want
    assert best_of_n_curve([np.log(ranks)], [ranks], [n])[0]["gold"] == pytest.approx(want, rel=1e-9)


def test_a_proxy_that_knows_nothing_and_one_that_is_wrong():
    """A5. Independent: over all orders of gold (N = 5), the mean for every n is gold's mean. Opposite: it falls."""
    gold, ns = [1.0, 2.0, 4.0, 8.0, 16.0], [1, 2, 3, 4, 5]
    orders = list(itertools.permutations(gold))
    assert values(best_of_n_curve([range(5)] * len(orders), orders, ns)) == pytest.approx([6.2] * 5)
    falling = values(best_of_n_curve([[-g for g in gold]], [gold], ns))
    assert all(a > b for a, b in itertools.pairwise(falling)) and falling[-1] == 1.0


def test_gold_is_permuted_with_the_proxy():
    """The fault of the released code: gold left in drawing order. Here the proxy's best is drawn first."""
    assert best_of_n_curve([[3.0, 2.0, 1.0]], [[30.0, 20.0, 10.0]], [3])[0]["gold"] == 30.0
    rng = np.random.default_rng(2)
    proxy, gold = rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    shuffled = rng.permuted(np.tile(np.arange(20), (3, 1)), axis=1)
    again = best_of_n_curve(np.take_along_axis(proxy, shuffled, 1), np.take_along_axis(gold, shuffled, 1), [1, 4, 20])
    assert values(again) == pytest.approx(values(best_of_n_curve(proxy, gold, [1, 4, 20])))


def test_constant_proxy_is_the_pools_mean_for_every_n():
    gold = np.random.default_rng(3).normal(size=(5, 33))
    assert values(best_of_n_curve(np.full((5, 33), 0.7), gold, range(1, 34))) == pytest.approx([gold.mean()] * 33)


def test_duplicate_texts_are_samples_of_their_own():
    """A response drawn three times, a worse one once: best of 2 is the worse one never, of 1 in a quarter."""
    curve = best_of_n_curve([[1, 0, 1, 1]], [[1, 0, 1, 1]], [1, 2])
    assert values(curve) == pytest.approx([0.75, 1.0])


def test_kl():
    """A6, and mpmath at other n."""
    golden = {1: 0.0, 2: 0.193147, 4: 0.636294, 16: 1.835089, 12500: 8.433564}
    assert {n: round(best_of_n_kl(n), 6) for n in golden} == golden
    assert best_of_n_kl(128) == pytest.approx(3.8598, abs=5e-5)
    with mpmath.workdps(40):
        for n in (3, 64, 6144, 10**6):
            assert best_of_n_kl(n) == pytest.approx(float(mpmath.log(n) - 1 + mpmath.mpf(1) / n), rel=1e-14)
    assert values(best_of_n_curve([[1, 2]], [[1, 2]], [1, 2]), "kl") == pytest.approx([0, math.log(2) - 0.5])


def test_kl_is_a_bound_for_a_discrete_policy():
    """Three answers: KL of the maximum's exact law from the base, below ln n - (n-1)/n."""
    base = np.array([0.2, 0.5, 0.3])
    for n in (2, 5, 30):
        law = np.diff(np.concatenate([[0], np.cumsum(base) ** n]))
        assert 0 < (law * np.log(law / base)).sum() < best_of_n_kl(n)


def test_unscored_samples_and_prompts_are_left_out_and_counted():
    proxy = [[1, NAN, -3, 0], [1, 2, 3, 4], [NAN, NAN, 1, 2]]  # what has no gold is the worst here
    gold = [[5, 99, NAN, 7], [0, 1, 2, 3], [1, 2, NAN, NAN]]
    first, second = best_of_n_curve(proxy, gold, [1, 2])
    assert first["gold"] == pytest.approx((6 + 1.5) / 2)  # {5, 7} and 0 … 3; nothing of the third prompt
    assert second["gold"] == pytest.approx((5 + (0 * 0 + 1 * 1 + 2 * 2 + 3 * 3) / 6) / 2)
    assert (first["prompts"], first["prompts_left_out"], first["samples_left_out"]) == (2, 1, 6)


@pytest.mark.parametrize(
    ("proxy", "gold", "ns", "text"),
    [
        ([[1, 2]], [[1, 2]], [3], "n = 3 is more than the pool's 2"),
        ([[1, 2, 3], [1, NAN, 3]], [[1, 2, 3]] * 2, [1, 3], "n = 3 is more than the 2 samples with both scores of pr"),
        ([[1, 2]], [[1, 2]], [0], "got 0"),
        ([[1, 2]], [[1, 2]], [1.5], "got 1.5"),
        ([[1, 2]], [[1, 2]], [], "at least one n"),
        ([[1, 2]], [[1, 2, 3]], [1], "expected one shape"),
        ([[1, math.inf]], [[1, 2]], [1], "infinite"),
        ([[NAN, NAN]], [[1, 2]], [1], "no prompt"),
    ],
)
def test_refused(proxy, gold, ns, text):
    with pytest.raises(ValueError, match=text):
        best_of_n_curve(proxy, gold, ns)


def test_interval_is_reproducible_and_over_prompts():
    """Prompts that agree inside but differ between: the interval is that of a mean of 40 values, not of 4000."""
    rng = np.random.default_rng(4)
    gold = np.repeat(rng.normal(size=(40, 1)), 100, axis=1)
    proxy = rng.normal(size=gold.shape)
    curve, again, other = (best_of_n_curve(proxy, gold, [1, 10], resamples=2000, seed=s) for s in (7, 7, 8))
    assert curve == again != other
    half = 1.96 * gold[:, 0].std() / math.sqrt(40)
    for row in curve:
        assert row["gold_low"] == pytest.approx(row["gold"] - half, abs=0.15 * half)
        assert row["gold_high"] == pytest.approx(row["gold"] + half, abs=0.15 * half)
    one = best_of_n_curve([[1, 2]], [[1, 2]], [1])[0]
    assert one["gold_low"] is None and one["gold_high"] is None


def test_change_from_the_best_n_is_paired():
    """Gold is the proxy up to a prompt's own level: prompts differ widely, the change between n does not at all."""
    proxy = np.tile(np.arange(10.0), (30, 1))
    gold = -proxy + 100 * np.arange(30)[:, None]
    one, ten = best_of_n_curve(proxy, gold, [1, 10], resamples=500)
    assert one["gold_from_best"] == one["gold_from_best_low"] == one["gold_from_best_high"] == 0
    assert [ten[f"gold_from_best{end}"] for end in ("", "_low", "_high")] == pytest.approx([-4.5] * 3)
    assert ten["gold_high"] - ten["gold_low"] > 100
    one, ten = best_of_n_curve(proxy, -gold, [1, 10], resamples=500)  # now ten is best
    assert [one[f"gold_from_best{end}"] for end in ("", "_low", "_high")] == pytest.approx([-4.5] * 3)
    assert ten["gold_from_best"] == 0


def test_ensemble_by_hand():
    """Two members, three samples: each choice at n = N worked out.

    Members (0, 1, 4) and (0, 2, -2): mean 0, 1.5, 1; min 0, 1, -2; mean - .5 var 0, 1.5 - .125, 1 - 4.5. Alone the
    first picks the third sample, the second picks the second.
    """
    members, gold = [[[0, 1, 4]], [[0, 2, -2]]], [[10, 20, 90]]
    found = overoptimization_curves(members, gold, [3], normalise="none")
    assert list(found) == ["single", "mean", "wco", "uwo"]
    assert {name: (c[0]["gold"], c[0]["proxy"]) for name, c in found.items()} == {
        "single": (pytest.approx(55), pytest.approx(3)),
        "mean": (pytest.approx(20), pytest.approx(1.5)),
        "wco": (pytest.approx(20), pytest.approx(1)),
        "uwo": (pytest.approx(20), pytest.approx(1.375)),
    }
    assert overoptimization_curves(members, gold, [3], normalise="none", lam=0)["uwo"] == found["mean"]


def test_ensemble_standardises_by_stored_constants():
    """A8: a member 100 lower decides alone under wco, unless its stored mean says so."""
    rng = np.random.default_rng(5)
    members, gold = rng.normal(size=(3, 6, 40)), rng.normal(size=(6, 40))
    moved = members + np.array([0, -100, 0])[:, None, None]
    ns, ones = [1, 5, 40], [1.0, 1.0, 1.0]
    plain = overoptimization_curves(members, gold, ns, mean=[0.0] * 3, std=ones)
    again = overoptimization_curves(moved, gold, ns, mean=[0.0, -100.0, 0.0], std=ones)
    for name in plain:
        assert values(again[name]) == pytest.approx(values(plain[name]))
        assert values(again[name], "proxy") == pytest.approx(values(plain[name], "proxy"))
    raw = overoptimization_curves(moved, gold, ns, normalise="none")
    assert values(raw["wco"]) == pytest.approx(values(best_of_n_curve(members[1], gold, ns)))
    assert values(raw["single"]) == pytest.approx(
        np.mean([values(best_of_n_curve(m, gold, ns)) for m in members], axis=0)
    )
    with pytest.raises(ValueError, match="mean"):
        overoptimization_curves(members, gold, ns)


def test_ensemble_chooses_from_one_pool():
    """A sample that one member could not score is left out of all four, however good the others find it."""
    members = [[[1.0, 2.0, NAN]], [[2.0, 1.0, 99.0]]]
    found = overoptimization_curves(members, [[1.0, 1.0, 50.0]], [1, 2], normalise="none")
    for curve in found.values():
        assert values(curve) == pytest.approx([1.0, 1.0]) and curve[0]["samples_left_out"] == 1
