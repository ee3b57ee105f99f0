"""Aggregation against the paper's numbers and laws (specification A7 to A10), worked out by hand or with fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from alignment.rewards import aggregate
from alignment.rewards.diagnostics import agreement_matrix, disagreement, expected_calibration_error, reliability

THREE = [Fraction(1), Fraction(6, 5), Fraction(13, 5)]
OTHER = [Fraction(1), Fraction(11, 10), Fraction(6, 5)]
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(5, 40))


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def by_fractions(values: list[Fraction], lam: Fraction, ddof: int = 0) -> Fraction:
    mean = sum(values, Fraction(0)) / len(values)
    return mean - lam * sum(((v - mean) ** 2 for v in values), Fraction(0)) / (len(values) - ddof)


@pytest.mark.parametrize("kind", [np.asarray, lambda a: torch.tensor(np.asarray(a))], ids=["array", "tensor"])
def test_golden_values(kind):
    """A7: R = (1, 1.2, 2.6)."""
    r, other = kind(column(1, 1.2, 2.6)), kind(column(1, 1.1, 1.2))
    assert float(aggregate(r, "mean")[0]) == pytest.approx(1.6)
    assert float(aggregate(r, "wco")[0]) == 1.0
    assert float(aggregate(r, "uwo", lam=0.5)[0]) == pytest.approx(float(by_fractions(THREE, Fraction(1, 2))))
    assert float(aggregate(r, "uwo", lam=0.5)[0]) == pytest.approx(1.346667, abs=1e-6)
    assert float(aggregate(r, "uwo", lam=0.5, ddof=1)[0]) == pytest.approx(1.22)
    assert float(aggregate(r, "uwo", lam=1)[0]) == pytest.approx(1.093333, abs=1e-6)
    assert float(aggregate(other, "uwo", lam=0.5)[0]) == pytest.approx(1.096667, abs=1e-6)
    assert float(aggregate(other, "mean")[0]) == pytest.approx(1.1)
    assert float(aggregate(other, "wco")[0]) == 1.0
    assert float(aggregate(other, "uwo", lam=1)[0]) == pytest.approx(1.093333, abs=1e-6)
    assert type(aggregate(r)) is type(r)


@pytest.mark.parametrize(("how", "lam", "prefers"), [("mean", 0.5, 1), ("uwo", 0.5, 1), ("wco", 0.5, 0)])
def test_who_is_preferred(how, lam, prefers):
    """A7: mean and uwo(.5) prefer R = (1, 1.2, 2.6) to (1, 1.1, 1.2); wco ties."""
    first, second = aggregate(np.array([[1, 1], [1.2, 1.1], [2.6, 1.2]]), how, lam=lam)
    assert np.sign(first - second) == prefers


def test_uwo_changes_its_mind_at_lambda_one():
    """A7: both are 1.093333 at lambda 1, since the gap of .5 in the mean is the gap in variance, 38/75 - 1/150."""
    variances = [sum((v - sum(r) / 3) ** 2 for v in r) / 3 for r in (THREE, OTHER)]
    assert variances == [Fraction(38, 75), Fraction(1, 150)]
    assert by_fractions(THREE, Fraction(1)) == by_fractions(OTHER, Fraction(1))
    table = np.array([THREE, OTHER], dtype=float).T
    for lam, sign in ((0.99, 1), (1.01, -1), (3, -1)):
        first, second = aggregate(table, "uwo", lam=lam)
        assert np.sign(first - second) == sign
        assert first - second == pytest.approx((1 - lam) / 2)


def test_lambda_zero_is_the_mean():
    np.testing.assert_array_equal(aggregate(SCORES, "uwo", lam=0), aggregate(SCORES, "mean"))


@pytest.mark.parametrize("how", ["mean", "wco", "uwo"])
def test_laws(how):
    """A8: order of members, shift, equal members, a duplicated ensemble; never above the mean."""
    found = aggregate(SCORES, how)
    np.testing.assert_allclose(aggregate(SCORES[[3, 1, 4, 0, 2]], how), found, atol=1e-12)
    np.testing.assert_allclose(aggregate(SCORES + 7, how), found + 7, atol=1e-12)
    np.testing.assert_allclose(aggregate(np.repeat(SCORES[:1], 4, 0), how), SCORES[0], atol=1e-12)
    np.testing.assert_allclose(aggregate(np.concatenate([SCORES, SCORES]), how), found, atol=1e-12)
    assert (found <= SCORES.mean(0) + 1e-12).all()


def test_wco_and_uwo_are_not_ordered():
    """A8: (0, 1): wco 0, uwo(.5) .5 - .125 above it; (0, 10): wco 0, uwo(.5) 5 - 12.5 below it."""
    table = np.array([[0.0, 0.0], [1.0, 10.0]])
    assert aggregate(table, "wco").tolist() == [0, 0]
    assert aggregate(table, "uwo", lam=0.5).tolist() == [0.375, -7.5]


def test_a_member_that_is_100_below_changes_who_wins_except_for_the_mean():
    """A8, without normalisation. Adding c to member m changes the variance by
    2c/k (r_m - mean) + c^2 (k - 1)/k^2: the first term, twice c times the covariance of the members' scores with the
    indicator of m, differs from response to response; its part of uwo is -lambda times it."""
    moved, k, c, lam = SCORES.copy(), 5, -100.0, 0.5
    moved[2] += c
    for how in ("mean", "uwo"):
        before, after = aggregate(SCORES, how, lam=lam), aggregate(moved, how, lam=lam)
        if how == "mean":
            np.testing.assert_array_equal(np.argsort(after), np.argsort(before))
            np.testing.assert_allclose(after, before - 20, atol=1e-12)
            continue
        indicator = np.arange(k) == 2
        covariance = np.array([np.cov(indicator, column, ddof=0)[0, 1] for column in SCORES.T])
        change = c / k - lam * (2 * c * covariance + c**2 * (k - 1) / k**2)
        np.testing.assert_allclose(after - before, change, atol=1e-9)
        assert np.ptp(covariance) > 0.1 and (np.argsort(after) != np.argsort(before)).any()
    np.testing.assert_array_equal(aggregate(moved, "wco"), moved[2])


def test_uwo_falls_with_lambda_and_scales_as_the_paper_does():
    """A8, A9."""
    values = [aggregate(SCORES, "uwo", lam=lam) for lam in (0, 0.1, 0.5, 2)]
    assert all((low >= high).all() for low, high in zip(values, values[1:], strict=False))
    np.testing.assert_allclose(aggregate(3 * SCORES, "wco"), 3 * aggregate(SCORES, "wco"))
    np.testing.assert_allclose(aggregate(3 * SCORES, "uwo", lam=0.5), 3 * aggregate(SCORES, "uwo", lam=1.5))


def test_normalising_undoes_a_members_offset_and_scale():
    """A8's last: one member is moved by -100 and stretched; with its stored constants the ensemble is as before."""
    mean, std = SCORES.mean(1), SCORES.std(1)
    moved = SCORES.copy()
    moved[2] = 4 * moved[2] - 100
    mean_moved, std_moved = mean.copy(), std.copy()
    mean_moved[2], std_moved[2] = 4 * mean[2] - 100, 4 * std[2]
    for how in ("mean", "wco", "uwo"):
        before = aggregate(SCORES, how, normalise="member", mean=mean, std=std)
        after = aggregate(moved, how, normalise="member", mean=mean_moved, std=std_moved)
        np.testing.assert_allclose(after, before, atol=1e-10)
    np.testing.assert_array_equal(aggregate(moved, "wco"), moved[2])  # without: that member alone decides
    assert not np.allclose(np.argsort(aggregate(moved, "uwo")), np.argsort(aggregate(SCORES, "uwo")))


def test_constants_are_stored_ones_never_the_batchs():
    whole = aggregate(SCORES, "uwo", normalise="member", mean=[1.0] * 5, std=[2.0] * 5)
    part = aggregate(SCORES[:, :3], "uwo", normalise="member", mean=[1.0] * 5, std=[2.0] * 5)
    np.testing.assert_allclose(whole[:3], part, atol=1e-12)
    zero = aggregate(SCORES, "mean", normalise="member", mean=[0.0] * 5, std=[0.0] * 5)
    assert np.isfinite(zero).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"normalise": "member"}, "needs mean"),
        ({"normalise": "member", "mean": [0] * 5}, "needs std"),
        ({"normalise": "member", "mean": [0] * 4, "std": [1] * 5}, "mean: expected 5"),
        ({"normalise": "member", "mean": [float("nan")] * 5, "std": [1] * 5}, "mean: expected 5 finite"),
        ({"normalise": "batch"}, "normalise must be"),
        ({"how": "max"}, "how must be"),
        ({"lam": -0.1}, "lam must be"),
        ({"lam": float("nan")}, "lam must be"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        aggregate(SCORES, **given)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="expected \\[members, responses\\]"):
        aggregate(SCORES[0])


def test_a_member_without_a_score_has_no_part():
    scores = SCORES.copy()
    scores[1, 0] = scores[:, 1] = np.nan
    for how in ("mean", "wco", "uwo"):
        found = aggregate(scores, how)
        assert found[0] == pytest.approx(aggregate(np.delete(SCORES, 1, 0), how)[0])
        assert np.isnan(found[1]) and np.isfinite(found[2:]).all()


def test_gradients_reach_the_members_that_matter():
    """A10: under wco the arg-min member alone; NaN members give no NaN gradient."""
    scores = torch.tensor([[1.0, float("nan")], [0.5, 2.0], [3.0, 1.0]], requires_grad=True)
    aggregate(scores, "wco").sum().backward()
    assert scores.grad.tolist() == [[0, 0], [1, 0], [0, 1]]
    scores.grad = None
    aggregate(scores, "uwo", lam=0.5).sum().backward()
    assert scores.grad.isfinite().all()
    # d/dr_i [mean - lam var] = 1/k - 2 lam (r_i - mean) / k
    expected = [(1 - (r - 1.5)) / 3 for r in (1.0, 0.5, 3.0)]
    assert scores.grad[:, 0].tolist() == pytest.approx(expected)


def test_half_precision_and_integers_keep_their_kind():
    assert aggregate(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert aggregate(np.array([[1, 2], [3, 4]]), "mean").tolist() == [2.0, 3.0]


def test_views_and_lists_are_taken_as_they_are():
    """A view with negative strides, a transposed one, and a list, which is float64 as in numpy."""
    np.testing.assert_array_equal(aggregate(SCORES[::-1], "wco"), SCORES.min(0))
    np.testing.assert_allclose(aggregate(SCORES.T[::-2].T, "mean"), SCORES.mean(0)[::-2])
    found = aggregate([[0.1, 1.0], [0.2, 2.0]], "mean")
    assert found.dtype == np.float64 and found[0] == (0.1 + 0.2) / 2


def test_diagnostics_by_hand():
    assert disagreement([[1.0, 0.0], [3.0, 0.0]]).tolist() == [1.0, 0.0]
    assert disagreement([[1.0, np.nan], [3.0, 5.0]]).tolist() == [1.0, 0.0]
    matrix = agreement_matrix([[1.0, 1.0, -1.0, 0.0], [1.0, -1.0, -1.0, 1.0]])
    assert matrix.tolist() == [[0.875, 0.625], [0.625, 1.0]]


def test_calibration_by_hand():
    """Four pairs at .75 of which three are won: calibrated. At .95 of which three are: off by .2."""
    assert expected_calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)
    assert expected_calibration_error([0.95] * 4, [1, 1, 1, 0]) == pytest.approx(0.2)
    assert expected_calibration_error([0.05] * 4, [0, 0, 0, 1]) == pytest.approx(0.2)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0
    rows = reliability([0.05, 0.06, 1.0], [0, 1, 1])
    assert rows[0] == {"pairs": 2, "probability": pytest.approx(0.055), "won": 0.5}
    assert rows[1:] == [{"pairs": 1, "probability": 1, "won": 1}]
