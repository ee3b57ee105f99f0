"""Losses of reward models and the general preference model against closed forms, mpmath and enumeration."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from scipy.optimize import minimize_scalar

from alignment.rewards.implicit import implicit_step_rewards
from alignment.rewards.losses import RewardLoss, general_matrix, general_score, unit


def value(loss: RewardLoss, chosen: float, rejected: float, label: float | None = None, margin: float | None = None):
    given = [None if v is None else torch.tensor([v]) for v in (label, margin)]
    return float(loss(torch.tensor([chosen]), torch.tensor([rejected]), *given)[0])


def logsig(x: float) -> float:
    return float(-mpmath.log1p(mpmath.exp(-mpmath.mpf(x))))


@pytest.mark.parametrize("difference", [-200.0, -3.0, 0.0, 0.7, 200.0])
def test_bradley_terry(difference):
    assert value(RewardLoss(), difference, 0.0) == pytest.approx(-logsig(difference), rel=1e-6, abs=1e-12)
    assert value(RewardLoss(), difference + 5, 5.0) == pytest.approx(-logsig(difference), rel=1e-5, abs=1e-6)


def test_margin_is_inside_the_sigmoid():
    """G.e: with a constant margin m the loss is ln 2 at D = m."""
    assert value(RewardLoss(), 1.3, 0.0, margin=1.3) == pytest.approx(math.log(2))
    assert value(RewardLoss(), 1.0, 0.0, margin=3.0) == pytest.approx(-logsig(-2.0))


def test_soft_and_swapped_labels():
    assert value(RewardLoss(), 0.4, -0.2, label=0.0) == pytest.approx(-logsig(-0.6), rel=1e-6)
    assert value(RewardLoss(), 0.4, -0.2, label=0.3) == pytest.approx(
        -0.3 * logsig(0.6) - 0.7 * logsig(-0.6), rel=1e-6
    )


@pytest.mark.parametrize("a", [0.1, 0.25])
def test_smoothing_has_its_optimum_at_the_log_odds(a):
    """G.e: D* = log((1 - a)/a); 2.197225 for a = 0.1."""
    best = minimize_scalar(lambda d: value(RewardLoss(label_smoothing=a), d, 0.0), bounds=(0, 6), method="bounded")
    assert best.x == pytest.approx(math.log((1 - a) / a), abs=2e-3)


def test_l2_and_centring():
    bt = value(RewardLoss(), 2.0, -1.0)
    assert value(RewardLoss(score_l2=0.001), 2.0, -1.0) == pytest.approx(bt + 0.001 * (4 + 1) / 2)
    assert value(RewardLoss(center=0.01), 2.0, -1.0) == pytest.approx(bt + 0.01 * 1)


@pytest.mark.parametrize(("weight", "least"), [(0.5, math.log(2)), (1.0, 2 * math.log(2))])
def test_ties_pull_together(weight, least):
    """O1: minimum at D = 0, symmetric, odd derivative; general value 2 log(1 + e^m) at D = 0 for the code's form."""
    loss = RewardLoss(kind="win_tie", tie_weight=weight)
    assert value(loss, 0.3, 0.3, label=0.5) == pytest.approx(least)
    apart = value(loss, 1.0, 0.0, label=0.5)
    assert apart == pytest.approx(value(loss, 0.0, 1.0, label=0.5)) and apart > least
    with_margin = RewardLoss(kind="win_tie", tie_weight=1.0, tie_margin=3.0)
    assert value(with_margin, 0.0, 0.0, label=0.5) == pytest.approx(2 * math.log(1 + math.e**3))
    assert value(loss, 1.0, 0.0) == pytest.approx(-logsig(1.0))  # a decided pair is Bradley–Terry's


def test_heads_are_separate():
    """[B, k] scores: head by head what single models would have; labels and margins are shared."""
    g = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    label, margin = torch.rand(6, generator=g), torch.rand(6, generator=g)
    loss = RewardLoss(label_smoothing=0.1, score_l2=0.01, center=0.02)
    whole = loss(chosen, rejected, label, margin)
    for i in range(3):
        torch.testing.assert_close(whole[:, i], loss(chosen[:, i], rejected[:, i], label, margin))


def test_gradient_is_minus_one_minus_p():
    chosen = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    RewardLoss()(chosen, torch.zeros(1)).sum().backward()
    assert float(chosen.grad) == pytest.approx(-1 / (1 + math.exp(0.4)), rel=1e-6)


# --- general preference model (section D.e) -------------------------------------------------------------------------


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_antisymmetric_to_the_last_bit():
    v = unit(torch.randn(7, 8, generator=torch.Generator().manual_seed(1)))
    s = general_matrix(v)
    assert torch.equal(s, -s.T) and torch.equal(s.diagonal(), torch.zeros(7))
    assert float(s.abs().max()) <= 1 + 1e-6


def test_equals_the_matrix_form():
    """<R v_i, v_j> with R = blockdiag [[0, -1], [1, 0]], written out; R'R = I, R^2 = -I."""
    block = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    r = torch.block_diag(block, block, block)
    assert torch.equal(r.T @ r, torch.eye(6)) and torch.equal(r @ r, -torch.eye(6))
    v = unit(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)))
    expected = torch.tensor([[float((r @ a) @ b) for b in v] for a in v])
    torch.testing.assert_close(general_matrix(v), expected)


def test_a_cycle_of_three():
    """Oracle 4: 0, 120, 240 degrees; each beats the next with probability sigmoid(8.66)."""
    s = general_matrix(at(0, 120, 240))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert float(s[i, j]) == pytest.approx(math.sqrt(3) / 2, abs=1e-6)
    assert 1 / (1 + math.exp(-float(s[0, 1]) / 0.1)) == pytest.approx(0.999827, abs=1e-6)
    loss = RewardLoss(kind="general")
    found = [value(loss, float(s[i, j]), 0.0) for i, j in ((0, 1), (1, 2), (2, 0))]
    assert found == pytest.approx([-logsig(8.660254)] * 3, rel=1e-3)


def test_no_scores_fit_a_cycle():
    """A Bradley–Terry scorer has minimum ln 2 there, and gets at most two of three right."""
    grid = [x / 2 for x in range(-8, 9)]
    losses, right = [], []
    for r in itertools.product(grid, repeat=3):
        d = [r[0] - r[1], r[1] - r[2], r[2] - r[0]]
        losses.append(sum(value_fast(x) for x in d) / 3)
        right.append(sum(x > 0 for x in d))
    assert min(losses) == pytest.approx(math.log(2)) and max(right) == 2


def value_fast(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_rotation_within_a_plane_changes_nothing():
    v = unit(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))
    c, s = math.cos(0.7), math.sin(0.7)
    turned = v @ torch.block_diag(torch.tensor([[c, -s], [s, c]]), torch.eye(2)).T
    torch.testing.assert_close(general_matrix(turned), general_matrix(v), atol=1e-6, rtol=0)


def test_bradley_terry_is_the_special_case():
    """k = 1, unnormalised v = [r, c]: s = c (r_i - r_j)."""
    r = torch.tensor([0.3, -1.2, 2.0])
    v = torch.stack([r, torch.full((3,), 1.7)], dim=1)
    torch.testing.assert_close(general_matrix(v), 1.7 * (r[:, None] - r[None, :]))


def test_gate_is_a_scaled_embedding():
    """Oracle 6: (V D R')(V D)' with D = blockdiag(sqrt(lambda_l) I_2); |s| <= max lambda."""
    g = torch.Generator().manual_seed(4)
    v, gate = unit(torch.randn(5, 6, generator=g)), torch.randn(3, generator=g).softmax(0)
    scaled = v * gate.sqrt().repeat_interleave(2)
    torch.testing.assert_close(general_matrix(v, gate), general_matrix(scaled))
    assert float(general_matrix(v, gate).abs().max()) <= float(gate.max()) + 1e-6
    assert float(general_score(v[0], v[1], gate)) == pytest.approx(float(general_matrix(v, gate)[0, 1]))


def test_zero_embedding_has_a_finite_gradient():
    v = torch.zeros(1, 4, requires_grad=True)
    general_score(unit(v), unit(torch.ones(1, 4))).sum().backward()
    assert v.grad.isfinite().all()


# --- implicit rewards (C.e): the loss of one labelled response is Bradley–Terry's against a score of 0 ---------------


def cross_entropy(reward: torch.Tensor, label: float) -> torch.Tensor:
    """-[l logsig(r) + (1 - l) logsig(-r)] of `[B]` rewards, through the loss that trains reward models."""
    return RewardLoss()(reward, torch.zeros_like(reward), torch.full_like(reward, label))


def test_a_policy_that_is_its_reference_has_the_losses_of_no_knowledge():
    """CE and DPO ln 2, NCA 2 ln 2."""
    none = implicit_step_rewards(torch.zeros(2, 5), torch.ones(2, 5), torch.tensor([[5], [5]]), 0.05)[:, 0]
    assert none.tolist() == [0, 0]
    won, lost = none[:1], none[1:]
    nca = cross_entropy(won, 1) + (cross_entropy(won, 0) + cross_entropy(lost, 0)) / 2
    found = [float(v) for v in (cross_entropy(won, 1), cross_entropy(lost, 0), RewardLoss()(won, lost), nca)]
    assert found == pytest.approx([math.log(2)] * 3 + [2 * math.log(2)])
    assert found[-1] == pytest.approx(1.386294, abs=1e-6)


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_gradient_of_cross_entropy_is_probability_minus_label(label):
    """dCE/dr = sigmoid(r) - l, where the released code's BCE on sigmoid outputs is flat."""
    rewards = torch.tensor([-40.0, -2.0, 0.0, 0.7, 40.0], requires_grad=True)
    cross_entropy(rewards, label).sum().backward()
    expected = [1 / (1 + math.exp(-r)) - label for r in rewards.tolist()]
    assert rewards.grad.tolist() == pytest.approx(expected, abs=1e-6)
