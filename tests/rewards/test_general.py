"""Preferences against a policy, exact: what a general preference model is for (specification D.e, oracles 7 to 9).

The policy is a table over few responses, the preferences are those of `general_matrix` or of a tabular oracle. The
update, which is one line, is checked against a numerical optimum of what it maximises.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, rel_entr, softmax

from alignment.rewards import get_oracle
from alignment.rewards.losses import general_matrix, unit

S = np.array([[0.0, 2, -1], [-2, 0, 1], [1, -1, 0]])
PI = np.array([0.5, 0.3, 0.2])
NAMES = ["rock", "paper", "scissors"]


def table(scores: np.ndarray) -> np.ndarray:
    """`[K, K]` P(i > j) = sigmoid(s), read from a tabular oracle pair by pair."""
    matrix = expit(scores)
    matrix = np.triu(matrix, 1) + np.tril(1 - matrix.T, -1) + 0.5 * np.eye(len(scores))
    names = NAMES[: len(scores)]
    oracle = get_oracle("tabular", table={"responses": names, "matrix": matrix.tolist()})
    pairs = [(a, b) for a in names for b in names]
    found = oracle.probability(["x"] * len(pairs), [a for a, _ in pairs], [b for _, b in pairs])
    return np.reshape(found, scores.shape)


def improved(pi: np.ndarray, advantage: np.ndarray, eta: float) -> tuple[np.ndarray, float]:
    """(pi', log Z) with pi' = pi exp(eta * advantage) / Z."""
    weights = pi * np.exp(eta * advantage)
    return weights / weights.sum(), float(np.log(weights.sum()))


def test_nobody_beats_himself_on_average():
    """Oracle 7: E_pi s(y > pi) = 0 and E_pi P(y > pi) = 1/2, whatever the embeddings, gate and policy."""
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        v, gate = unit(torch.randn(6, 4, generator=g)), torch.rand(2, generator=g).softmax(0)
        s = general_matrix(v, gate).double().numpy()
        pi = torch.rand(6, generator=g).double().softmax(0).numpy()
        assert pi @ s @ pi == pytest.approx(0, abs=1e-9)
        assert pi @ expit(s / 0.1) @ pi == pytest.approx(0.5, abs=1e-9)
        assert np.abs(s @ pi).max() > 0.01
    assert PI @ table(S) @ PI == pytest.approx(0.5, abs=1e-12)


def test_golden_steps():
    """Oracle 8: GPO's exact step, and SPPO's with P(y > pi) - 1/2 in the place of the mean score."""
    mean_score = S @ PI
    assert mean_score.tolist() == pytest.approx([0.4, -0.8, 0.2])
    new, log_z = improved(PI, mean_score, 0.5)
    assert new.tolist() == pytest.approx([0.59129, 0.19470, 0.21401], abs=1e-5)
    assert log_z == pytest.approx(0.032304, abs=1e-6)
    against = table(S) @ PI
    assert against.tolist() == pytest.approx([0.56803, 0.35581, 0.54621], abs=1e-5)
    new, _ = improved(PI, against - 0.5, 0.5)
    assert new.tolist() == pytest.approx([0.51673, 0.27882, 0.20445], abs=1e-5)


@pytest.mark.parametrize("advantage", [S @ PI, table(S) @ PI - 0.5], ids=["gpo", "sppo"])
def test_the_step_is_the_optimum_within_a_kl_ball(advantage):
    """pi' maximises E_pi'[advantage] - KL(pi' | pi) / eta; the maximum is log Z / eta."""
    eta = 0.5

    def worse(logits: np.ndarray) -> float:
        p = softmax(logits)
        return float(-(p @ advantage - rel_entr(p, PI).sum() / eta))

    best = minimize(worse, np.zeros(3), method="BFGS", options={"gtol": 1e-10})
    expected, log_z = improved(PI, advantage, eta)
    np.testing.assert_allclose(softmax(best.x), expected, atol=1e-6)
    assert -best.fun == pytest.approx(log_z / eta, abs=1e-9)


def iterates(scores: np.ndarray, eta: float, steps: int) -> np.ndarray:
    """`[steps, K]` policies, each the step from the one before."""
    pi, found = PI[: len(scores)] / PI[: len(scores)].sum(), []
    for _ in range(steps):
        found.append(pi)
        pi, _ = improved(pi, scores @ pi, eta)
    return np.array(found)


def test_a_cycle_is_met_by_the_average_and_a_condorcet_winner_by_the_last():
    """Oracle 9. In rock, paper, scissors the last iterate goes round and moves out; the mean tends to one third."""
    cycle = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    found = iterates(cycle, 0.02, 20_000)
    np.testing.assert_allclose(found.mean(0), 1 / 3, atol=0.01)
    assert np.abs(found[-2000:] - 1 / 3).max() > np.abs(found[:2000] - 1 / 3).max() > 0.1
    winner = np.array([[0.0, 0.5, 0.1], [-0.5, 0, 2], [-0.1, -2, 0]])  # the first beats both
    assert iterates(winner, 0.5, 1000)[-1].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
