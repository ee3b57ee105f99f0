"""Values, best responses, duality gaps and Nash policies against maximisation, iteration and closed forms."""

import math
import re

import numpy as np
import pytest
import torch

from alignment.games import best_response, duality_gap, exploitability, nash_policy, preferences, solution, value
from tests.games.playing import DOUBLE, centred, draw, games, mirror_step, value_of

ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]], dtype=DOUBLE)


def largest_value(pi, ref, matrix, beta):
    """max over p of V(p, pi), by ascent on the logits of p."""
    theta = torch.zeros_like(pi).requires_grad_()
    steps = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        steps.zero_grad()
        loss = -value_of(theta.softmax(0), pi, ref, matrix, beta)
        loss.backward()
        return loss

    steps.step(closure)
    return value_of(theta.detach().softmax(0), pi, ref, matrix, beta)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_the_gap_is_what_best_responses_win_and_cost(beta):
    """max_p V(p, pi) - min_p V(pi, p), both searched for: V(pi, p) = 1 - V(p, pi) makes the second 1 - the first."""
    matrices, ref = games(5, 3, seed=1)
    logits = draw(3, 5, seed=2)
    gaps = duality_gap(logits, ref, matrices, beta)
    for game in range(3):
        p, r = logits[game].softmax(0), ref[game].softmax(0)
        best = largest_value(p, r, matrices[game], beta)
        worst = 1 - largest_value(p, r, matrices[game], beta)
        assert gaps[game].item() == pytest.approx((best - worst).item(), abs=1e-8)
        reply = best_response(logits[game], ref[game], matrices[game], beta)
        assert value_of(reply.exp(), p, r, matrices[game], beta).item() == pytest.approx(best.item(), abs=1e-8)


def test_values_term_by_term():
    matrices, ref = games(4, 2, seed=3)
    first, second = draw(2, 4, seed=4), draw(2, 4, seed=5)
    found = value(first, second, ref, matrices, 0.3)
    for game in range(2):
        p, q, r = (each[game].softmax(0) for each in (first, second, ref))
        assert found[game].item() == pytest.approx(value_of(p, q, r, matrices[game], 0.3).item(), abs=1e-12)
    against = value(second, first, ref, matrices, 0.3)
    torch.testing.assert_close(found + against, torch.ones(2, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_the_gap_by_hand():
    """beta = 1, uniform reference: pi = (1/2, 1/4, 1/4) beats rock, paper, scissors with P pi = (1/2, 3/8, 5/8)."""
    logits = torch.tensor([math.log(2), 0.0, 0.0])
    weights = [math.exp(x) for x in (0.5, 0.375, 0.625)]
    reply = [w / sum(weights) for w in weights]
    expected = 2 * sum(p * math.log(p / r) for p, r in zip((0.5, 0.25, 0.25), reply, strict=True))
    found = duality_gap(logits, torch.zeros(3), ROCK_PAPER_SCISSORS, 1.0)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    for logit in (logits, logits.double()):  # two of certain arms: KL to the best reply is -log of what that plays
        pure = torch.where(torch.arange(3) == 0, logit, -math.inf)
        replies = [math.exp(x) for x in (0.5, 0.0, 1.0)]  # P pi against rock alone
        found = duality_gap(pure, torch.zeros(3), ROCK_PAPER_SCISSORS, 1.0)
        assert found.item() == pytest.approx(-2 * math.log(replies[0] / sum(replies)), rel=1e-12)
    assert exploitability(logits, ROCK_PAPER_SCISSORS).item() == pytest.approx(0.125)


def test_an_arm_that_the_reference_never_plays():
    """Costs nothing where the policy does not play it either, and the gap of the game without it; else infinitely."""
    never = torch.tensor([0.3, -math.inf, 0.0], dtype=DOUBLE)
    two = ROCK_PAPER_SCISSORS[[0, 2]][:, [0, 2]]
    policy = torch.tensor([1.0, -math.inf, 0.0], dtype=DOUBLE)
    found = duality_gap(policy, never, ROCK_PAPER_SCISSORS, 0.3)
    assert found.item() == pytest.approx(duality_gap(policy[[0, 2]], never[[0, 2]], two, 0.3).item(), abs=1e-14)
    assert duality_gap(torch.zeros(3), never, ROCK_PAPER_SCISSORS, 0.3).item() == math.inf
    with pytest.raises(ValueError, match="ref_logits must be finite"):
        nash_policy(ROCK_PAPER_SCISSORS, never, 0.3)


def test_types_of_what_is_given():
    """The widest of them is the answer's; integers are as good as float64; where float64 is in, 1e-12 is kept."""
    whole, single = torch.tensor([3, 0, 0]), ROCK_PAPER_SCISSORS.float()
    for ref in (torch.zeros(3), torch.zeros(3, dtype=torch.int64)):
        gap = duality_gap(whole, ref, ROCK_PAPER_SCISSORS, 0.1)
        assert gap.dtype == DOUBLE and gap.item() == pytest.approx(0.7935, abs=1e-4)
        assert duality_gap(whole, ref, single, 0.1).dtype == DOUBLE
    assert duality_gap(torch.zeros(3), torch.zeros(3), single, 0.1).dtype == torch.float32
    for ref in (whole, whole.float()):
        pi = nash_policy(ROCK_PAPER_SCISSORS, ref, 1.0)
        residual = centred(pi - ref - ROCK_PAPER_SCISSORS @ pi.exp())
        assert pi.dtype == DOUBLE and residual.abs().max() <= 1e-12
    assert nash_policy(single, whole, 1.0).dtype == DOUBLE
    assert nash_policy(single, whole.float(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("beta", [torch.tensor(0.25), np.float32(0.25), np.float64(0.25), np.array(0.25)])
def test_betas_of_numpy_and_torch(beta):
    ref = torch.tensor([0.5, 0.0, 0.0], dtype=DOUBLE)
    assert torch.equal(nash_policy(ROCK_PAPER_SCISSORS, ref, beta), nash_policy(ROCK_PAPER_SCISSORS, ref, 0.25))
    assert torch.equal(
        duality_gap(ref, ref, ROCK_PAPER_SCISSORS, beta), duality_gap(ref, ref, ROCK_PAPER_SCISSORS, 0.25)
    )


def test_what_is_not_solved_to_1e_12_is_an_error(monkeypatch):
    """Three Newton steps a stage leave 2e-8 in these games; with four they are solved."""
    matrices, ref = games(7, 20, seed=16)
    monkeypatch.setattr(solution, "NEWTON_STEPS", 3)
    with pytest.raises(
        solution.NotFound, match=r"no Nash policy to 1e-12: residual \d\.\de-\d\d at beta 0.1"
    ) as caught:
        nash_policy(matrices, ref, 0.1)
    assert 1e-12 < float(re.findall(r"residual (\S+)", str(caught.value))[0]) < 1e-7
    monkeypatch.setattr(solution, "NEWTON_STEPS", 5)
    nash_policy(matrices, ref, 0.1)


def test_leading_dimensions_broadcast_and_offsets_are_nothing():
    matrices, ref = games(4, 3, seed=6)
    logits = draw(2, 3, 4, seed=7)
    gaps = duality_gap(logits, ref, matrices, 0.1)
    assert gaps.shape == (2, 3)
    torch.testing.assert_close(gaps[1, 2], duality_gap(logits[1, 2], ref[2], matrices[2], 0.1), rtol=0, atol=1e-15)
    torch.testing.assert_close(duality_gap(logits + 7, ref - 3, matrices, 0.1), gaps, rtol=0, atol=1e-13)
    pi = nash_policy(matrices[0], ref, 0.1)  # one game, three references
    assert pi.shape == (3, 4)
    torch.testing.assert_close(pi[2], nash_policy(matrices[0], ref[2], 0.1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "cyclic", "deterministic", "bradley_terry", "labels"])
@pytest.mark.parametrize("beta", [10.0, 1.0, 0.1, 0.01, 0.001])
def test_the_nash_policy_solves_its_equation(kind, beta):
    """beta (log pi - log ref) - P pi is the same for all arms, to 1e-12; nothing can be won against it."""
    generator = torch.Generator().manual_seed(8)
    if kind == "labels":  # every comparison is certain, and they go round
        matrices = (preferences.random(7, games=20, generator=generator) > 0.5).to(DOUBLE)
        matrices[:, range(7), range(7)] = 0.5
    else:
        matrices = preferences.make(kind, 7, 20, generator)
    ref = draw(20, 7, seed=9)
    pi = nash_policy(matrices, ref, beta)
    residual = centred(beta * (pi - ref) - torch.einsum("gij,gj->gi", matrices, pi.exp()))
    assert residual.abs().max() <= 1e-12
    torch.testing.assert_close(pi.exp().sum(-1), torch.ones(20, dtype=DOUBLE), rtol=0, atol=1e-14)
    assert duality_gap(pi, ref, matrices, beta).max() < 1e-13
    if beta >= 0.1:  # policies that are not all but pure: a nudge shows
        assert duality_gap(pi + draw(20, 7, seed=10, scale=0.01), ref, matrices, beta).min() > 1e-9


@pytest.mark.parametrize(("beta", "precision"), [(1e-5, 1e-12), (1e-7, 1e-9), (1e4, 1e-8)])
def test_extreme_betas_are_solved_as_far_as_rounding_lets(beta, precision):
    matrices, ref = games(10, 20, seed=15)
    pi = nash_policy(matrices, ref, beta)
    residual = centred(beta * (pi - ref) - torch.einsum("gij,gj->gi", matrices, pi.exp()))
    assert residual.abs().max() < precision


def test_the_nash_policy_is_where_damped_iteration_ends():
    matrices, ref = games(6, 1, seed=11)
    theta = ref[0]
    for _ in range(4000):
        theta = mirror_step(theta, theta.softmax(0), ref[0], matrices[0], beta=0.2, eta=0.05)
    torch.testing.assert_close(nash_policy(matrices, ref, 0.2)[0], theta.log_softmax(0), rtol=0, atol=1e-11)


def test_ties_leave_the_reference():
    ref = draw(5, seed=12)
    pi = nash_policy(preferences.ties(5), ref, 0.01)
    torch.testing.assert_close(pi, ref.log_softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.03, 0.001])
def test_rock_paper_scissors_is_played_uniformly_whatever_beta(beta):
    pi = nash_policy(ROCK_PAPER_SCISSORS, torch.zeros(3, dtype=DOUBLE), beta)
    torch.testing.assert_close(pi.exp(), torch.full((3,), 1 / 3, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_under_bradley_terry_the_nash_policy_is_not_the_optimum_of_the_reward():
    """ref exp(r/beta) maximises the reward less the KL; the game's policy is elsewhere (total variation above 0.1)."""
    rewards, ref, beta = draw(5, seed=13), draw(5, seed=14), 0.1
    pi = nash_policy(preferences.bradley_terry(rewards), ref, beta).exp()
    optimum = (ref + rewards / beta).softmax(-1)
    assert (pi - optimum).abs().sum() / 2 > 0.1


def test_two_arms_in_closed_form():
    """log pi_1/pi_2 = log of the reference's + ((P pi)_1 - (P pi)_2)/beta; with two arms the bracket is a - 1/2."""
    a, beta = 0.8, 0.05
    matrix = torch.tensor([[0.5, a], [1 - a, 0.5]], dtype=DOUBLE)
    pi = nash_policy(matrix, torch.tensor([0.3, 0.0], dtype=DOUBLE), beta)
    assert (pi[0] - pi[1]).item() == pytest.approx(0.3 + (a - 0.5) / beta, abs=1e-11)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, True, "0.1", torch.tensor([0.1]), np.True_])
def test_a_beta_that_is_none_is_refused(beta):
    for call in (
        lambda: duality_gap(torch.zeros(3), torch.zeros(3), ROCK_PAPER_SCISSORS, beta),
        lambda: nash_policy(ROCK_PAPER_SCISSORS, torch.zeros(3), beta),
    ):
        with pytest.raises(ValueError, match=r"^beta must be a finite number > 0"):
            call()


def test_what_is_no_game_is_refused():
    wrong = ROCK_PAPER_SCISSORS.clone()
    wrong[0, 1] = 0.9
    with pytest.raises(ValueError, match=r"P\[0, 1\] \+ P\[1, 0\] must be 1, got 0.9"):
        duality_gap(torch.zeros(3), torch.zeros(3), wrong, 0.1)
    with pytest.raises(ValueError, match=r"must be probabilities: P\[0, 1\] is 1.5"):
        nash_policy(torch.tensor([[0.5, 1.5], [-0.5, 0.5]]), torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match=r"ref_logits must have shape \[..., 3\] for 3 arms, got \[4\]"):
        nash_policy(ROCK_PAPER_SCISSORS, torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match=r"shape \[..., n, n\], got \[3\]"):
        duality_gap(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.1)
