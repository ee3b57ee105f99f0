"""Algorithms of the game: their steps, their fixed points, and how fast they get there."""

import math
import re

import pytest
import torch

from alignment.games import duality_gap, nash_policy, preferences, rates
from alignment.games.methods import Learner, Method, Sampling
from alignment.games.policies import Neural
from tests.games.playing import DOUBLE, centred, draw, games, mirror_step

BETA, ETA = 0.05, 0.7


def learner(name, matrices, ref, beta=BETA, eta=ETA, **more):
    """A method with the learning rate that makes mirror descent's step eta."""
    method = more.pop("method", Method(name))
    rate = eta * matrices.shape[-1] * beta / 4
    return Learner(method, ref, matrices, beta=beta, learning_rate=rate, **more)


@pytest.mark.parametrize("autograd", [False, True])
def test_steps_are_those_of_the_papers(autograd):
    """Online IPO 1: T(theta; pi). EGPO: T(theta; softmax T(theta; pi)). Nash-MD: T(theta; pi^(1-eta beta) ref^...)."""
    matrices, ref = games(6, 3, seed=1)
    theta = draw(3, 6, seed=2)
    found = {
        name: learner(name, matrices, ref, autograd=autograd).iterate([theta])[0]
        for name in ("online_ipo1", "egpo", "nash_md")
    }
    for g in range(3):
        args = (ref[g], matrices[g], BETA, ETA)
        half = mirror_step(theta[g], theta[g].softmax(0), *args)
        mixture = ((1 - ETA * BETA) * theta[g] + ETA * BETA * ref[g]).softmax(0)
        expected = {
            "online_ipo1": half,
            "egpo": mirror_step(theta[g], half.softmax(0), *args),
            "nash_md": mirror_step(theta[g], mixture, *args),
        }
        for name, value in expected.items():
            torch.testing.assert_close(centred(found[name][g]), centred(value), rtol=0, atol=1e-13)


def test_learning_rate_scale_is_a_longer_step_and_the_mixture_follows_the_look_ahead():
    """T with three times eta. EGPO against the mixture c = 0.3: first of the policy, then of the half step."""
    matrices, ref = games(6, 3, seed=20)
    theta = draw(3, 6, seed=21)
    scaled = learner("", matrices, ref, method=Method("online_ipo1", rate_scale=3.0)).iterate([theta])[0]
    mixed = learner("", matrices, ref, method=Method("egpo", opponent="mixture", mixture=0.3)).iterate([theta])[0]
    for g in range(3):
        expected = mirror_step(theta[g], theta[g].softmax(0), ref[g], matrices[g], BETA, 3 * ETA)
        torch.testing.assert_close(centred(scaled[g]), centred(expected), rtol=0, atol=1e-13)
        args = (ref[g], matrices[g], BETA, ETA)
        half = mirror_step(theta[g], (0.7 * theta[g] + 0.3 * ref[g]).softmax(0), *args)
        expected = mirror_step(theta[g], (0.7 * half + 0.3 * ref[g]).softmax(0), *args)
        torch.testing.assert_close(centred(mixed[g]), centred(expected), rtol=0, atol=1e-13)


def test_usual_samplers_and_opponents_are_those_of_the_page(root):
    """The table of docs/games.md, read."""
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \| .+ \|$", (root / "docs" / "games.md").read_text(), re.M)
    samplers = {"all arms alike": "uniform", "the policy": "policy", "the reference": "reference"}
    found = {}
    for names, drawn, third in rows:
        for name in re.findall(r"`(\w+)`", names):
            method = Method(name).resolved()
            assert method.sampler == samplers[drawn], name
            if not third.startswith("none"):
                assert method.opponent == ("mixture" if "mixture" in third or "ref^c" in third else "policy"), name
            found[name] = (method.look_ahead, method.exact)
    assert {"egpo", "nash_md", "nash_md_pg", "p3o", "inpo", "sppo", "gpo", "dpo", "vpo"} <= set(found)
    assert {name for name, (ahead, _) in found.items() if ahead} == {"egpo"}
    assert {name for name, (_, exact) in found.items() if exact} == {"inpo"}


def test_an_exact_iteration_of_inpo_is_one_of_online_ipo_1():
    matrices, ref = games(6, 3, seed=3)
    a = b = [draw(3, 6, seed=4)]
    inpo, mirror = learner("inpo", matrices, ref), learner("online_ipo1", matrices, ref)
    for _ in range(20):
        a, b = inpo.iterate(a), mirror.iterate(b)
        torch.testing.assert_close(a[0].log_softmax(-1), b[0].log_softmax(-1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampling", [False, True])
def test_egpo_without_its_look_ahead_is_online_ipo_1_bit_for_bit(sampling):
    matrices, ref = games(5, 2, seed=5)
    start = [draw(2, 5, seed=6)]
    moved = []
    for method in (Method("egpo", look_ahead=False), Method("online_ipo1"), Method("egpo")):
        draws = Sampling(20, torch.Generator().manual_seed(0)) if sampling else None
        moved.append(learner("", matrices, ref, method=method, sampling=draws).iterate(start)[0])
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])


def test_the_shortcut_and_autograd_stay_together():
    matrices, ref = games(6, 4, seed=7)
    for name in ("egpo", "online_ipo2", "nash_md_pg"):
        fast, slow = learner(name, matrices, ref), learner(name, matrices, ref, autograd=True)
        a = b = [ref]
        for _ in range(100):
            a, b = fast.iterate(a), slow.iterate(b)
        assert fast.fast is not None and slow.fast is None
        torch.testing.assert_close(centred(a[0]), centred(b[0]), rtol=0, atol=1e-11)


def measured_rate(name, beta, eta, steps):
    """Factor per iteration of the distance to uniform on rock, paper, scissors, from a start 1e-6 away."""
    matrices, ref = preferences.rock_paper_scissors()[None], torch.zeros(1, 3, dtype=DOUBLE)
    play = learner(name, matrices, ref, beta=beta, eta=eta)
    theta = [torch.tensor([[1e-6, -3e-7, -7e-7]], dtype=DOUBLE)]
    start = theta[0].norm()
    for _ in range(steps):
        theta = play.iterate(theta)
    return (centred(theta[0]).norm() / start).item() ** (1 / steps)


@pytest.mark.parametrize(("beta", "eta"), [(0.01, 1.0), (0.01, 0.2), (0.1, 0.4), (0.01, 2.0)])
def test_rock_paper_scissors_rates(beta, eta):
    """sqrt((1-eb)^2 + e^2 w^2) and sqrt((1-eb-e^2w^2)^2 + e^2 w^2 (1-eb)^2), w^2 = 1/12, e = eta, to four digits."""
    w2, keep = 1 / 12, 1 - eta * beta
    formula = {
        "online_ipo1": math.sqrt(keep**2 + eta**2 * w2),
        "inpo": math.sqrt(keep**2 + eta**2 * w2),
        "egpo": math.sqrt((keep - eta**2 * w2) ** 2 + eta**2 * w2 * keep**2),
    }
    for name, expected in formula.items():
        assert measured_rate(name, beta, eta, steps=60) == pytest.approx(expected, abs=5e-6), name
        general = rates.contraction(
            torch.full((3,), -math.log(3)), preferences.rock_paper_scissors(), beta=beta, eta=eta,
            look_ahead=name == "egpo",
        )  # fmt: skip
        assert general.item() == pytest.approx(expected, abs=1e-7)
    if (beta, eta) == (0.01, 1.0):
        assert (round(formula["online_ipo1"], 4), round(formula["egpo"], 4)) == (1.0312, 0.9506)


def test_mirror_descent_s_largest_stable_step():
    """|1 - eta beta + i eta/sqrt(12)| < 1 iff eta < 2 beta/(beta^2 + 1/12)."""
    limit = 2 * 0.01 / (0.01**2 + 1 / 12)
    assert round(limit, 4) == 0.2397
    assert (
        measured_rate("online_ipo1", 0.01, 0.99 * limit, steps=200)
        < 1
        < measured_rate("online_ipo1", 0.01, 1.01 * limit, steps=200)
    )


def test_on_rock_paper_scissors_egpo_ends_at_uniform_and_mirror_descent_on_a_cycle():
    """beta = 0.01, eta = 1, from far away."""
    matrices, ref = preferences.rock_paper_scissors()[None], torch.zeros(1, 3, dtype=DOUBLE)
    mirror, extra = (learner(name, matrices, ref, beta=0.01, eta=1.0) for name in ("online_ipo1", "egpo"))
    a = b = [draw(1, 3, seed=8)]
    seen = []
    for step in range(900):
        a, b = mirror.iterate(a), extra.iterate(b)
        if step >= 600:
            seen.append(a[0][0].softmax(-1))
    assert centred(b[0]).abs().max() < 1e-12
    favourite = {int(pi.argmax()) for pi in seen}
    assert favourite == {0, 1, 2} and min(float(pi.max()) for pi in seen) > 0.4  # round and round, never near uniform
    assert duality_gap(a[0], ref, matrices, 0.01).item() > 0.1


@pytest.mark.parametrize("name", ["online_ipo1", "egpo"])
def test_general_rates_are_those_of_the_iteration_s_jacobian(name):
    """Central differences of one iteration at the Nash policy, restricted to centred logits."""
    matrices, ref = games(8, 5, seed=9)
    beta, eta, step = 0.02, 3.0, 1e-5
    nash = nash_policy(matrices, ref, beta)
    play = learner(name, matrices, ref, beta=beta, eta=eta)
    columns = []
    for arm in range(8):
        nudge = torch.zeros(8, dtype=DOUBLE)
        nudge[arm] = step
        columns.append(centred(play.iterate([nash + nudge])[0] - play.iterate([nash - nudge])[0]) / (2 * step))
    radius = torch.linalg.eigvals(torch.stack(columns, -1)).abs().amax(-1)
    found = rates.contraction(nash, matrices, beta=beta, eta=eta, look_ahead=name == "egpo")
    torch.testing.assert_close(found, radius, rtol=0, atol=1e-7)
    if name == "egpo":  # 1 - eta beta: arms that the Nash policy all but never plays
        assert (found < 0.941).all()
    else:
        assert (found > 1).any()


def test_the_nash_policy_is_a_fixed_point_of_all_but_nash_md_with_constant_mixture():
    matrices, ref = games(5, 3, seed=10)
    nash = nash_policy(matrices, ref, 0.2)
    for name in ("egpo", "online_ipo1", "online_ipo2", "nash_md_pg", "p3o", "inpo"):
        method = Method(name, opponent="policy", exact=False)
        gradient = learner("", matrices, ref, beta=0.2, method=method).gradient([nash])[0]
        assert gradient.abs().max() < 1e-12, name
    biased = learner("", matrices, ref, beta=0.2, method=Method("nash_md", mixture=0.125))
    theta = [nash]
    assert biased.gradient(theta)[0].abs().max() > 1e-3
    for _ in range(2000):
        theta = biased.iterate(theta)
    mixed = (0.875 * theta[0].log_softmax(-1) + 0.125 * ref.log_softmax(-1)).softmax(-1)
    off = theta[0] - ref - torch.einsum("gij,gj->gi", matrices, mixed) / 0.2
    assert centred(off).abs().max() < 1e-9  # z = P mix/beta: where it ends instead
    assert (duality_gap(theta[0], ref, matrices, 0.2) > 1e-6).all()


def test_offline_dpo_does_not_find_the_nash_policy_of_an_intransitive_game():
    """Under Bradley-Terry it finds ref exp(r/beta); with cyclic preferences its policy can be exploited."""
    ref = draw(1, 5, seed=11)
    rewards = draw(1, 5, seed=12)
    transitive = learner("", preferences.bradley_terry(rewards), ref, beta=0.5, method=Method("dpo", exact=True))
    found = transitive.iterate([ref])[0]
    torch.testing.assert_close(centred(found), centred(ref + rewards / 0.5), rtol=0, atol=1e-8)
    cyclic = preferences.cyclic(5, 0.9)[None]
    found = learner("", cyclic, ref, beta=0.05, method=Method("dpo", exact=True)).iterate([ref])[0]
    assert duality_gap(found, ref, cyclic, 0.05).item() > 0.05


def test_networks_have_the_gradient_of_their_weights():
    """Central differences of the population loss in a few weights of each tensor."""
    matrices, ref = games(4, 2, seed=13)
    policy = Neural()
    weights = policy.start(ref, torch.Generator().manual_seed(0))
    play = learner("online_ipo1", matrices, ref, policy=policy)
    q = policy.logits(weights).softmax(-1)
    won = torch.einsum("gij,gj->gi", matrices, q)

    def population_loss(parameters):
        d = policy.logits(parameters).log_softmax(-1) - ref.log_softmax(-1) - won / BETA
        return ((d[:, :, None] - d[:, None, :]) ** 2).mean((1, 2)).sum()

    found = play.gradient(weights)
    for at, weight in enumerate(weights):
        for index in (0, weight.numel() - 1):
            values = []
            for sign in (1, -1):
                moved = [each.clone() for each in weights]
                moved[at].view(-1)[index] += sign * 1e-5
                values.append(population_loss(moved).item())
            slope = (values[0] - values[1]) / 2e-5
            assert found[at].view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_an_unknown_objective_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown objective 'egppo'; did you mean 'egpo'"):
        Method("egppo").resolved()
