"""EGPO, Online IPO 1 and 2, Nash-MD and Nash-MD-PG on given pairs; what they do in games is in tests/games."""

import pytest
import torch

from alignment.objectives import SamplePairs, get_objective
from tests.objectives.enumerated import DOUBLE, differences, draw, every_pair, mean_gradient

SHARED = ("egpo", "online_ipo1", "nash_md")


def random_game(size, seed):
    """Preferences with P + P' = 1 and 1/2 on the diagonal."""
    above = draw(size, size, seed=seed, scale=2.0).sigmoid().triu(1)
    return above + (1 - above.T).tril(-1) + 0.5 * torch.eye(size, dtype=DOUBLE)


def regression_gradient(name, logits, ref, game, *, beta, opponent, sampler):
    """Gradient of the mean loss with y1, y2 from `sampler` and preferences against `opponent` (distributions)."""
    first, second = every_pair(len(logits))
    preference = game @ opponent
    ref = ref.log_softmax(0)

    def columns(logp):
        return {
            "first": logp[first], "second": logp[second], "ref_first": ref[first], "ref_second": ref[second],
            "preference_first": preference[first], "preference_second": preference[second],
            "preference": game[first, second],
        }  # fmt: skip

    return mean_gradient(get_objective(name, beta=beta), logits, sampler[first] * sampler[second], columns)


def golden_pair(**more):
    values = {
        "first": -10.0, "second": -12.0, "ref_first": -11.0, "ref_second": -11.5, "first_length": 20.0,
        "second_length": 30.0, "preference_first": 0.7, "preference_second": 0.4, "preference": 0.7,
    }  # fmt: skip
    return SamplePairs(**{name: torch.tensor([value], dtype=DOUBLE) for name, value in (values | more).items()})


@pytest.mark.parametrize("name", SHARED)
def test_golden_pair(name) -> None:
    """z1 - z2 = 1.5 against 0.3/0.1 = 3; per token 1/20 + 0.5/30 = 1/15 against 3."""
    assert get_objective(name, beta=0.1).loss(golden_pair()).item() == pytest.approx(2.25, abs=1e-12)
    mean = get_objective(name, beta=0.1, normalization="mean").loss(golden_pair()).item()
    assert mean == pytest.approx((44 / 15) ** 2, abs=1e-12)


def test_golden_pair_of_the_others() -> None:
    """Online IPO 2: 1.5 against 0.2/0.1. Nash-MD-PG: A = 0.2 - 0.1 = 0.1 and -0.1 + 0.05 = -0.05."""
    assert get_objective("online_ipo2", beta=0.1).loss(golden_pair()).item() == pytest.approx(0.25, abs=1e-12)
    mean = get_objective("online_ipo2", beta=0.1, normalization="mean").loss(golden_pair()).item()
    assert mean == pytest.approx((29 / 15) ** 2, abs=1e-12)
    assert get_objective("nash_md_pg", beta=0.1).loss(golden_pair()).item() == pytest.approx(0.2, abs=1e-12)
    # per token: A = 0.2 - 0.1/20 = 0.195 and -0.1 + 0.05/30 = -59/600; s = -0.5 and -0.4
    mean = get_objective("nash_md_pg", beta=0.1, normalization="mean").loss(golden_pair()).item()
    assert mean == pytest.approx((0.195 * 0.5 - 59 / 600 * 0.4) / 2, abs=1e-12)


def test_the_three_regressions_are_one_loss_bit_for_bit() -> None:
    losses = [get_objective(name, beta=0.37).loss(golden_pair()) for name in SHARED]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_one_sample_of_the_opponent_and_labels_give_the_same_mean_gradient() -> None:
    """The gradient is linear in the target: averaging over y'' and over 0/1 labels after it changes nothing."""
    size, beta = 3, 0.5
    theta, ref, game = draw(size, seed=6), draw(size, seed=7), random_game(size, seed=8)
    opponent, rho = draw(size, seed=9).softmax(0), draw(size, seed=10).softmax(0)
    expected = regression_gradient("egpo", theta, ref, game, beta=beta, opponent=opponent, sampler=rho)
    grid = torch.cartesian_prod(*[torch.arange(size)] * 3, torch.arange(2), torch.arange(2))
    first, second, third, won_first, won_second = grid.unbind(1)
    chance = [torch.where(won == 1, game[y, third], 1 - game[y, third])
              for won, y in ((won_first, first), (won_second, second))]  # fmt: skip

    def columns(logp):
        return {
            "first": logp[first], "second": logp[second], "ref_first": ref.log_softmax(0)[first],
            "ref_second": ref.log_softmax(0)[second], "preference_first": won_first.to(DOUBLE),
            "preference_second": won_second.to(DOUBLE),
        }  # fmt: skip

    weights = rho[first] * rho[second] * opponent[third] * chance[0] * chance[1]
    got = mean_gradient(get_objective("egpo", beta=beta), theta, weights, columns)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_nash_md_pg_has_the_kl_gradient_of_whole_sequences_and_a_token_s_own_is_another() -> None:
    """Two tokens of two: the first decides how far the second is from the reference."""
    beta = 0.4
    policy, ref = draw(3, 2, seed=17), draw(3, 2, seed=18)  # rows: first token, second after 0, second after 1

    def tokens(logits):  # log-probabilities of both tokens of the four sequences, [4, 2]
        logp = logits.log_softmax(1)
        return torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a in (0, 1) for b in (0, 1)])

    first, second = every_pair(4)
    leaf = policy.clone().requires_grad_()
    s, s_ref = tokens(leaf).sum(1), tokens(ref).sum(1)
    p = s.detach().exp()
    half = torch.full((16,), 0.5, dtype=DOUBLE)  # every preference a tie: what is left is the KL
    pairs = SamplePairs(
        first=s[first], second=s[second], ref_first=s_ref[first], ref_second=s_ref[second],
        preference_first=half, preference_second=half,
    )  # fmt: skip
    loss = (p[first] * p[second] * get_objective("nash_md_pg", beta=beta).loss(pairs)).sum()
    got = torch.autograd.grad(loss, leaf)[0]

    def penalty(logits):
        s = tokens(logits).sum(1)
        return beta * (s.exp() * (s - s_ref)).sum()

    torch.testing.assert_close(got, differences(penalty, policy), rtol=0, atol=1e-9)
    per_token = tokens(leaf)
    local = beta * (p[:, None] * (per_token - tokens(ref)).detach() * per_token).sum()
    assert (torch.autograd.grad(local, leaf)[0] - got).abs().max() > 0.01


@pytest.mark.parametrize("name", [*SHARED, "online_ipo2"])
def test_swapping_the_responses_changes_nothing(name) -> None:
    objective = get_objective(name, normalization="mean")
    torch.testing.assert_close(objective.loss(golden_pair().swapped()), objective.loss(golden_pair()))


@pytest.mark.parametrize("name", [*SHARED, "online_ipo2", "nash_md_pg"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_extremes_stay_finite_and_precision_is_kept(name, dtype, normalization) -> None:
    objective = get_objective(name, beta=1e-3, normalization=normalization)
    for values in ({"first": 0.0, "ref_first": -5000.0}, {"second": -5000.0}, {"preference_first": 1.0}):
        pairs = golden_pair(**values).map(lambda column: column.to(dtype))
        leaves = {each: pairs.column(each).requires_grad_() for each in ("first", "second")}
        pairs = SamplePairs(**(pairs.columns() | leaves))
        loss = objective.loss(pairs)
        found = [loss, *torch.autograd.grad(loss.sum(), list(leaves.values())), *objective.statistics(pairs).values()]
        assert all(each.dtype == dtype and bool(each.isfinite().all()) for each in found)


def test_estimates_by_hand() -> None:
    def found(name, **keywords):
        return {key: value.item() for key, value in get_objective(name, **keywords).statistics(golden_pair()).items()}

    assert found("egpo") == pytest.approx({"margin": 1.5, "target": 3.0, "kl": 0.25})
    assert found("egpo", normalization="mean") == pytest.approx({"margin": 1 / 15, "target": 3.0, "kl": 0.25})
    assert found("online_ipo2") == pytest.approx({"margin": 1.5, "target": 2.0, "kl": 0.25})
    assert found("nash_md_pg") == pytest.approx({"advantage": 0.025, "preference": 0.55, "kl": 0.25})
