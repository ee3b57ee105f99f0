"""P3O: every oracle of its specification, on listed responses, by hand and at 50 digits."""

import math

import mpmath
import pytest
import torch

from alignment.objectives import SamplePairs, get_objective
from tests.objectives.enumerated import DOUBLE, differences, draw, every_pair, kl, mean_gradient

VERSIONS = ("unclipped", "v1", "v2")
SIZE = 5
POLICY, OLD, REF = draw(SIZE, seed=1), draw(SIZE, seed=2), draw(SIZE, seed=3)
REWARD = draw(SIZE, seed=4)
ALL = every_pair(SIZE)


def columns(logp, old=OLD, reward=REWARD):
    """The batch of all pairs, as `mean_gradient` wants it."""
    first, second = ALL
    old, ref = old.log_softmax(0), REF.log_softmax(0)
    return {
        "first": logp[first], "second": logp[second],
        "behaviour_first": old[first], "behaviour_second": old[second],
        "ref_first": ref[first], "ref_second": ref[second],
        "reward_first": reward[first], "reward_second": reward[second],
    }  # fmt: skip


def pair_weights(logits):
    """Probability of each pair when both responses are drawn from softmax(logits)."""
    p = logits.softmax(0)
    return p[ALL[0]] * p[ALL[1]]


def exact_gradient(logits, beta, reward=REWARD):
    """Gradient of E[r] - beta KL(pi || ref) by finite differences of its enumeration."""

    def value(theta):
        p = theta.softmax(0)
        return (p * reward).sum() - beta * kl(p, REF.softmax(0))

    return differences(value, logits)


def random_pairs(rows, seed, scale=1.0, dtype=DOUBLE, **given):
    """Pairs off the policy: log-probabilities near -20 and ratios of size `scale`."""
    base = draw(2, rows, seed=seed, scale=3.0) - 20
    moved = draw(4, rows, seed=seed + 1, scale=scale)
    reward = draw(2, rows, seed=seed + 2)
    found = {
        "first": base[0], "second": base[1],
        "behaviour_first": base[0] + moved[0], "behaviour_second": base[1] + moved[1],
        "ref_first": base[0] + moved[2], "ref_second": base[1] + moved[3],
        "reward_first": reward[0], "reward_second": reward[1],
    }  # fmt: skip
    return SamplePairs(**{name: value.to(dtype) for name, value in (found | given).items()})


def slopes(objective, pairs):
    """dL/d(first) and dL/d(second), `[B]` each."""
    leaves = {name: pairs.column(name).clone().requires_grad_() for name in ("first", "second")}
    total = objective.loss(SamplePairs(**(pairs.columns() | leaves))).sum()
    return torch.autograd.grad(total, list(leaves.values()))


def golden_pair():
    def one(value):
        return torch.tensor([value], dtype=DOUBLE)

    return SamplePairs(
        first=one(-10.0), second=one(-12.0), behaviour_first=one(-10.5), behaviour_second=one(-11.8),
        ref_first=one(-11.0), ref_second=one(-11.5), reward_first=one(1.2), reward_second=one(0.3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "expected", "slope"),
    [
        # q = 0.9 - 0.05 * 1.5 = 0.825, w = e^0.3, D = 1.5 against 0.8 + 0.2: v2 is clipped, and has no slope.
        ("unclipped", -0.835225137188, (-0.825 * math.exp(0.3) / 2, 0.825 * math.exp(0.3) / 2)),
        ("v2", -0.556816758125, (0.0, 0.0)),
        # rho = (1.6487, 0.8187): A1' = 0.825 * 0.8187 * 1.2 is the smaller, without slope; A2 = -0.825 * 1.6487 *
        # 0.8187 is smaller than A2' = -0.825 * 1.2 * 0.8187 and has the slope of rho2: 0.1515450353515 in all.
        ("v1", (0.825 * math.exp(0.3) - 0.825 * math.exp(-0.2) * 1.2) / 2, (0.0, 0.825 * math.exp(0.3) / 2)),
    ],
)
def test_golden_pair(version, expected, slope) -> None:
    objective = get_objective("p3o", version=version, beta=0.05, delta=0.2, ratio_cap=10.0, epsilon=0.2)
    assert objective.loss(golden_pair()).item() == pytest.approx(expected, abs=1e-12)
    assert [each.item() for each in slopes(objective, golden_pair())] == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("beta", [0.0, 0.05, 1.0])
def test_first_inner_step_is_the_exact_gradient_of_reward_minus_kl(version, beta) -> None:
    objective = get_objective("p3o", version=version, beta=beta)
    got = mean_gradient(objective, OLD, pair_weights(OLD), columns)
    torch.testing.assert_close(-got, exact_gradient(OLD, beta), rtol=0, atol=1e-9)
    p = OLD.softmax(0)  # and the closed form p (a - E a), a = r - beta z, to rounding
    a = REWARD - beta * (OLD.log_softmax(0) - REF.log_softmax(0))
    torch.testing.assert_close(-got, p * (a - (p * a).sum()), rtol=0, atol=1e-15)


def test_unclipped_is_exact_off_policy_and_the_others_are_not() -> None:
    exact = exact_gradient(POLICY, 0.3)
    for version, same in (("unclipped", True), ("v1", False), ("v2", False)):
        got = mean_gradient(get_objective("p3o", version=version, beta=0.3), POLICY, pair_weights(OLD), columns)
        assert torch.allclose(-got, exact, rtol=0, atol=1e-9) is same, version


@pytest.mark.parametrize("version", VERSIONS)
def test_adding_a_number_per_prompt_to_the_rewards_changes_nothing(version) -> None:
    """Bit for bit where the sums are exact (multiples of 1/64), and to rounding elsewhere."""
    objective = get_objective("p3o", version=version)
    pairs = random_pairs(64, seed=11)
    for grid, shift in ((64, draw(64, seed=12, scale=100.0).mul(64).round() / 64), (None, draw(64, seed=13))):
        r1, r2 = (pairs.column(f"reward_{which}") for which in ("first", "second"))
        if grid:
            r1, r2 = (r1 * grid).round() / grid, (r2 * grid).round() / grid
        plain, shifted = (
            SamplePairs(**(pairs.columns() | {"reward_first": r1 + more, "reward_second": r2 + more}))
            for more in (torch.zeros_like(shift), shift)
        )
        results = [(objective.loss(each), *slopes(objective, each)) for each in (plain, shifted)]
        for before, after in zip(*results, strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0 if grid else 1e-13)


@pytest.mark.parametrize("version", VERSIONS)
def test_swapping_the_responses_changes_nothing(version) -> None:
    objective = get_objective("p3o", version=version)
    pairs = random_pairs(50, seed=21)
    torch.testing.assert_close(objective.loss(pairs.swapped()), objective.loss(pairs), rtol=1e-13, atol=1e-14)
    for got, expected in zip(slopes(objective, pairs.swapped()), reversed(slopes(objective, pairs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_v2_without_limits_is_unclipped() -> None:
    free = get_objective("p3o", version="v2", delta=1e30, ratio_cap=1e30)
    pairs = random_pairs(50, seed=31, scale=2.0)
    unclipped = get_objective("p3o", version="unclipped")
    torch.testing.assert_close(free.loss(pairs), unclipped.loss(pairs))
    for got, expected in zip(slopes(free, pairs), slopes(unclipped, pairs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_optimum_has_no_gradient_whatever_sampled(version) -> None:
    """At pi* = ref exp(r/beta)/Z every single pair has q = beta log Z - beta log Z = 0."""
    beta = 0.7
    best = REF.log_softmax(0) + REWARD / beta
    objective = get_objective("p3o", version=version, beta=beta)
    for old in (OLD, best, REF):
        pairs = SamplePairs(**columns(best.log_softmax(0), old=old))
        for each in (objective.loss(pairs), *slopes(objective, pairs)):
            torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=1e-13)


@pytest.mark.parametrize("version", VERSIONS)
def test_first_inner_step_is_rloo_with_two_samples(version) -> None:
    """RLOO: each sample's log-probability times (its reward - the other's), averaged over both; KL in the reward."""
    pairs = random_pairs(20, seed=41)
    pairs = SamplePairs(**(pairs.columns() | {"behaviour_first": pairs.first, "behaviour_second": pairs.second}))
    q1 = pairs.reward_first - 0.05 * (pairs.first - pairs.ref_first)
    q2 = pairs.reward_second - 0.05 * (pairs.second - pairs.ref_second)
    got = slopes(get_objective("p3o", version=version, beta=0.05), pairs)
    torch.testing.assert_close(got[0], -(q1 - q2) / 2, rtol=0, atol=1e-13)
    torch.testing.assert_close(got[1], -(q2 - q1) / 2, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("q", "moved", "log_ratio", "expected"),
    [
        # D = D_old + moved, rho1 rho2 = e^log_ratio, c = 10; slope of the first response without clipping: -q w/2
        (1.0, 0.1, 0.5, -math.exp(0.5) / 2),
        (1.0, 0.3, 0.5, 0.0),  # good response already pushed far enough
        (1.0, -0.3, 0.5, -math.exp(0.5) / 2),  # moved the wrong way: full push
        (-1.0, 0.3, 0.5, math.exp(0.5) / 2),
        (-1.0, -0.3, 0.5, 0.0),
        (1.0, 0.1, 5.0, -10.0 / 2),
        (-1.0, 0.1, -5.0, 0.1 / 2),
    ],
)
def test_v2_clips_only_what_has_moved_in_the_direction_of_its_reward(q, moved, log_ratio, expected) -> None:
    def one(value):
        return torch.tensor([value], dtype=DOUBLE)

    first, second = (log_ratio + moved) / 2, (log_ratio - moved) / 2  # log rho of both, from -30 and -33
    pairs = SamplePairs(
        first=one(-30.0 + first), second=one(-33.0 + second), behaviour_first=one(-30.0), behaviour_second=one(-33.0),
        ref_first=one(-29.0), ref_second=one(-31.0), reward_first=one(q), reward_second=one(0.0),
    )  # fmt: skip
    objective = get_objective("p3o", version="v2", beta=0.0)
    got = [each.item() for each in slopes(objective, pairs)]
    assert got == pytest.approx([expected, -expected], abs=1e-13)
    found = objective.statistics(pairs)
    assert found["difference_clipped"].item() == (abs(moved) > 0.2)
    assert found["ratio_clipped"].item() == (abs(log_ratio) > math.log(10))


def test_v1_is_the_pessimistic_ppo_term_of_both_responses() -> None:
    """At 50 digits, from rewards, ratios and epsilon alone."""
    pairs = random_pairs(40, seed=51, scale=0.5)
    got = get_objective("p3o", version="v1", beta=0.1, epsilon=0.3).loss(pairs)
    with mpmath.workdps(50):
        for row in range(40):
            c = {name: mpmath.mpf(value[row].item()) for name, value in pairs.columns().items()}
            gap = c["reward_first"] - c["reward_second"]
            gap -= mpmath.mpf(0.1) * (c["first"] - c["ref_first"] - c["second"] + c["ref_second"])
            ratio = [mpmath.exp(c[name] - c[f"behaviour_{name}"]) for name in ("first", "second")]
            near = [min(max(value, 1 - mpmath.mpf(0.3)), 1 + mpmath.mpf(0.3)) for value in ratio]
            terms = [min(a * ratio[0] * ratio[1], a * near[0] * near[1]) for a in (gap, -gap)]
            assert got[row].item() == pytest.approx(float(-sum(terms) / 2), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_extreme_ratios_and_rewards_stay_finite(version, dtype) -> None:
    grid = torch.cartesian_prod(*[torch.tensor([-800.0, -31.0, 0.0, 31.0, 800.0], dtype=dtype)] * 2)
    for reward in (0.0, 1000.0, -1000.0):
        pairs = SamplePairs(
            first=-900 + grid[:, 0], second=-900 + grid[:, 1],
            behaviour_first=torch.full_like(grid[:, 0], -900.0), behaviour_second=torch.full_like(grid[:, 0], -900.0),
            ref_first=torch.full_like(grid[:, 0], -905.0), ref_second=torch.full_like(grid[:, 0], -895.0),
            reward_first=torch.full_like(grid[:, 0], reward), reward_second=torch.zeros_like(grid[:, 0]),
        )  # fmt: skip
        objective = get_objective("p3o", version=version)
        for each in (objective.loss(pairs), *slopes(objective, pairs), *objective.statistics(pairs).values()):
            assert bool(each.isfinite().all()), each
            assert each.dtype == dtype


def test_a_ratio_beyond_the_exponent_s_limit_is_still_pushed_back() -> None:
    """v1, a bad response 50 nats above its behaviour: the slope is that of a ratio of e^30, not 0."""

    def one(value):
        return torch.tensor([value], dtype=DOUBLE)

    pairs = SamplePairs(
        first=one(-10.0), second=one(-60.0), behaviour_first=one(-60.0), behaviour_second=one(-60.0),
        ref_first=one(-60.0), ref_second=one(-60.0), reward_first=one(-1.0), reward_second=one(0.0),
    )  # fmt: skip
    got = slopes(get_objective("p3o", version="v1", beta=0.0), pairs)[0].item()
    assert got == pytest.approx(math.exp(30) / 2, rel=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_reward_that_is_no_number_is_not_taken_for_zero(version) -> None:
    pairs = random_pairs(3, seed=61)
    reward = pairs.reward_first.clone()
    reward[1] = math.nan
    objective = get_objective("p3o", version=version)
    loss = objective.loss(SamplePairs(**(pairs.columns() | {"reward_first": reward})))
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("version", VERSIONS)
def test_equal_responses_contribute_nothing(version) -> None:
    pairs = random_pairs(5, seed=62)
    own = {name: pairs.column(name) for name in ("first", "behaviour_first", "ref_first", "reward_first")}
    twin = {name.replace("first", "second"): value for name, value in own.items()}
    objective = get_objective("p3o", version=version)
    pairs = SamplePairs(**own, **twin)
    for each in (objective.loss(pairs), *slopes(objective, pairs)):
        assert each.abs().max().item() == 0


def test_estimates_by_hand() -> None:
    found = {name: value.item() for name, value in get_objective("p3o").statistics(golden_pair()).items()}
    assert found == pytest.approx(
        {"advantage": 0.825, "log_ratio": 0.3, "kl": 0.25, "ratio_clipped": 0.0, "difference_clipped": 1.0}
    )
    found = get_objective("p3o", version="v1").statistics(golden_pair())
    assert found["ratio_clipped"].item() == 0.5  # 1.65 is outside 1 +- 0.2, 0.82 is inside
    assert set(get_objective("p3o", version="unclipped").statistics(golden_pair())) == {"advantage", "log_ratio", "kl"}
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"version": "v3"}, "p3o: version must be one of 'unclipped' | 'v1' | 'v2', got 'v3'"),
        ({"ratio_cap": math.inf}, "p3o: ratio_cap must be a number >= 1, got inf"),
        ({"ratio_cap": 0.5}, "p3o: ratio_cap must be a number >= 1, got 0.5"),
        ({"delta": 0}, "p3o: delta must be a number > 0, got 0"),
        ({"epsilon": 1.0}, "p3o: epsilon must be a number in (0, 1), got 1.0"),
        ({"beta": -0.1}, "p3o: beta must be a number >= 0, got -0.1"),
    ],
)
def test_bad_settings_are_named(keywords, message) -> None:
    with pytest.raises(ValueError) as caught:
        get_objective("p3o", **keywords)
    assert str(caught.value) == message
