"""Objectives on enumerated responses: population losses by loops, exact gradients by calculus, sampled on average."""

import math

import pytest
import torch

from alignment.games.gradients import (
    NotEnumerable,
    Slopes,
    loss,
    minimiser,
    population,
    random_pairs,
)
from alignment.games.solution import NotFound
from alignment.objectives import SamplePairs, get_objective, list_objectives
from alignment.objectives.egpo import EGPO
from tests.games.playing import centred, draw, exact_gradient, games, mirror_step, situation

PLAYED = [card.name for card in list_objectives() if card.batch != "groups" and card.name != "spo"]
AFFINE = {"egpo", "online_ipo1", "online_ipo2", "nash_md", "nash_md_pg", "inpo", "ipo", "sppo", "reward_aware_rpo"}
FORMS = {"reward_aware_rpo": {"form": "sq"}}  # the others are not affine


def self_play_gradient(policy, opponent, ref, matrix, beta):
    """d/d(logits) of pi'Pq - beta KL(pi || ref) with q held: pi (a - E_pi a), a = P q - beta (log pi - log ref)."""
    a = matrix @ opponent - beta * (policy - ref)
    return policy.exp() * (a - (policy.exp() * a).sum())


@pytest.mark.parametrize("name", PLAYED)
def test_the_shortcut_is_the_autograd_gradient(name):
    """Three situations with policy, sampler, opponent, reference and previous iterate all different."""
    objective = get_objective(name, **FORMS.get(name, {}))
    slopes = Slopes.read(objective)
    assert (slopes is not None) == (name in AFFINE)
    for seed, sampler in enumerate(("policy", "other", "uniform")):
        at = situation(6, 4, seed=10 * seed, sampler=sampler)
        expected = exact_gradient(objective, at.policy, at)
        assert expected.isfinite().all() and (expected.abs().amax(1) > 1e-6).all()
        assert expected.sum(1).abs().max() < 1e-10 * expected.abs().max()  # adding to all logits does nothing
        if slopes is not None:
            found = slopes.bind(at.reference, at.preference)(at)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_the_shortcut_follows_the_objective():
    """An objective with the opposite target has the opposite preference part: nothing of a formula is kept here."""

    class Flipped(EGPO):
        def _target(self, batch: SamplePairs) -> torch.Tensor:
            return -super()._target(batch)

    class Bent(EGPO):
        def sample_loss(self, batch: SamplePairs) -> torch.Tensor:
            return super().sample_loss(batch) ** 1.5

    at = situation(5, 2, seed=40, sampler="uniform")
    for objective in (EGPO(beta=0.3), Flipped(beta=0.3)):
        slopes = Slopes.read(objective)
        assert slopes is not None
        found = slopes.bind(at.reference, at.preference)(at)
        torch.testing.assert_close(found, exact_gradient(objective, at.policy, at), rtol=0, atol=1e-13)
    assert Slopes.read(EGPO(beta=0.3)).own["won"] == -Slopes.read(Flipped(beta=0.3)).own["won"] != 0  # type: ignore
    assert Slopes.read(Bent()) is None


def test_population_loss_of_dpo_by_loops():
    at = situation(4, 2, seed=50, sampler="other")
    found = population(get_objective("dpo", beta=0.4), at)
    for game in range(2):
        z, total = (at.policy - at.reference)[game].tolist(), 0.0
        for i in range(4):
            for j in range(4):
                p, weight = at.preference[game, i, j].item(), (at.sampler[game, i] * at.sampler[game, j]).item()
                margin = 0.4 * (z[i] - z[j])
                total += weight * (p * math.log1p(math.exp(-margin)) + (1 - p) * math.log1p(math.exp(margin)))
        assert found[game].item() == pytest.approx(total, abs=1e-13)


def test_population_loss_of_online_vpo_has_a_calibration_response_of_the_reference():
    """DPO's loss plus alpha beta E_ref[z]."""
    at = situation(4, 2, seed=60)
    vpo = population(get_objective("vpo", beta=0.4, alpha=0.3, mode="online"), at)
    extra = 0.3 * 0.4 * (at.reference.exp() * (at.policy - at.reference)).sum(1)
    torch.testing.assert_close(vpo, population(get_objective("dpo", beta=0.4), at) + extra, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["egpo", "online_ipo1", "nash_md"])
@pytest.mark.parametrize("sampler", ["uniform", "other", "policy"])
def test_gradient_identity_of_the_regressions(name, sampler):
    """dL/dtheta = 4 rho (d - E_rho d), d = z - P(y > q)/beta, to 1e-13."""
    at, beta = situation(6, 3, seed=70, sampler=sampler), 0.2
    d = at.policy - at.reference - torch.einsum("gij,gj->gi", at.preference, at.opponent) / beta
    mean = (at.sampler * d).sum(1, keepdim=True)
    found = exact_gradient(get_objective(name, beta=beta), at.policy, at)
    torch.testing.assert_close(found, 4 * at.sampler * (d - mean), rtol=0, atol=1e-13)


def test_policy_gradients():
    """Online IPO 2 has -4/beta times that of self-play, Nash-MD-PG minus that against its opponent; P3O's reward is
    the chance of beating the opponent, so that on the sampler's own policy it has Nash-MD-PG's."""
    at, beta = situation(5, 1, seed=80), 0.3
    one = (at.reference[0], at.preference[0], beta)
    pi = at.policy.exp()
    self_play = self_play_gradient(at.policy[0], pi[0], *one)
    found = exact_gradient(get_objective("online_ipo2", beta=beta), at.policy, at)[0]
    torch.testing.assert_close(found, -4 / beta * self_play, rtol=0, atol=1e-13)
    against = self_play_gradient(at.policy[0], at.opponent[0], *one)
    found = exact_gradient(get_objective("nash_md_pg", beta=beta), at.policy, at)[0]
    torch.testing.assert_close(found, -against, rtol=0, atol=1e-13)
    fresh = type(at)(at.policy, at.reference, at.policy, pi, at.opponent, at.preference)
    for version in ("unclipped", "v1", "v2"):
        found = exact_gradient(get_objective("p3o", beta=beta, version=version), at.policy, fresh)[0]
        torch.testing.assert_close(found, -against, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_inpo_s_exact_iterate_is_the_mirror_descent_step(seed):
    """Pairs from the previous iterate: the minimiser is T(theta; pi) with step 1/eta_INPO and beta = tau, to 1e-12."""
    matrices, ref = games(8, 5, seed=90 + seed)
    theta, beta, eta = draw(5, 8, seed=95 + seed), 0.07, (0.5, 2.0, 12.0)[seed]
    pi = theta.softmax(-1)
    here = theta.log_softmax(-1)
    at = type(situation(2, 1, 0))(here, ref.log_softmax(-1), here, pi, pi, matrices)
    found = minimiser(get_objective("inpo", eta=1 / eta, tau=beta), theta, at)
    for game in range(5):
        expected = mirror_step(theta[game], pi[game], ref[game], matrices[game], beta, eta)
        torch.testing.assert_close(centred(found[game]), centred(expected), rtol=0, atol=1e-12)


def test_minimisers_of_offline_objectives():
    """DPO on Bradley-Terry labels: ref exp(r/beta). IPO: ref exp(P(y beats mu)/tau). Whatever draws the pairs."""
    at = situation(5, 2, seed=100, sampler="other")
    rewards = draw(2, 5, seed=101)
    odds = rewards[:, :, None] - rewards[:, None, :]
    labelled = type(at)(at.policy, at.reference, at.previous, at.sampler, at.opponent, odds.sigmoid())
    found = minimiser(get_objective("dpo", beta=0.5), at.reference, labelled)
    torch.testing.assert_close(centred(found), centred(at.reference + rewards / 0.5), rtol=0, atol=1e-9)
    found = minimiser(get_objective("ipo", tau=0.5), at.policy, at)
    won = torch.einsum("gij,gj->gi", at.preference, at.sampler)
    torch.testing.assert_close(centred(found), centred(at.reference + won / 0.5), rtol=0, atol=1e-11)
    with pytest.raises(NotFound, match="hinge: no minimum"):
        minimiser(get_objective("hinge"), at.policy, at, steps=3)
    certain = type(at)(at.policy, at.reference, at.previous, at.sampler, at.opponent, (odds > 0).double())
    with pytest.raises(NotFound, match="gpo: no minimum"):  # infinite log-odds
        minimiser(get_objective("gpo"), at.policy, certain)


@pytest.mark.parametrize("labels", ["probability", "drawn"])
@pytest.mark.parametrize("name", ["egpo", "online_ipo2", "nash_md_pg", "inpo", "dpo", "p3o", "vpo"])
def test_sampled_gradients_are_right_on_average(name, labels):
    """Mean of 40,000 gradients of 10 draws within five standard errors of the exact one, in every entry."""
    own = {"inpo": {"eta": 0.5, "tau": 0.2}, "vpo": {"beta": 0.5, "alpha": 2.0, "mode": "online"}}
    objective = get_objective(name, **own.get(name, {"beta": 0.5}))
    one = situation(4, 1, seed=110)
    if name == "p3o":  # its ratios are unbiased where the policy has not moved
        one = type(one)(one.policy, one.reference, one.policy, one.sampler, one.opponent, one.preference)
    many = type(one)(*(getattr(one, f).expand(40_000, *getattr(one, f).shape[1:]) for f in one.__dataclass_fields__))
    leaf = many.policy.clone().requires_grad_()
    draws = random_pairs(many, 10, torch.Generator().manual_seed(0), labels)
    total = loss(objective, many.at(leaf.log_softmax(-1)), draws).sum()
    found = torch.autograd.grad(total, leaf)[0]
    exact = exact_gradient(objective, one.policy, one)[0]
    standard_error = found.std(0) / 40_000**0.5
    assert standard_error.max() < 0.05 * exact.abs().max()  # enough draws to see a wrong factor
    assert ((found.mean(0) - exact).abs() < 5 * standard_error).all()


def test_what_no_game_has_is_said():
    at = situation(3, 1, seed=120)
    for name in ("likelihood", "spo"):
        with pytest.raises(NotEnumerable, match=f"objective '{name}' reads .*: no game has that"):
            population(get_objective(name), at)
        assert Slopes.read(get_objective(name)) is None
