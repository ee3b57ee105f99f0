"""sppo and gpo on a policy with three responses: one step of multiplicative weights, by numbers of a specification.

S are the log-odds of a general preference model, POLICY is pi_t and ETA the step. pi_t exp(eta S pi_t)/Z, its log Z,
and the same with P(y > pi_t) - 1/2, come from the specification to five digits.
"""

import itertools
import math

import pytest
import torch

from alignment.objectives import PairLogps, get_objective

S = torch.tensor([[0.0, 2.0, -1.0], [-2.0, 0.0, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ETA = 0.5
AFTER = {"gpo": (0.59129, 0.19470, 0.21401), "sppo": (0.51673, 0.27882, 0.20445)}
JUDGED = {"gpo": (0.4, -0.8, 0.2), "sppo": (0.56803, 0.35581, 0.54621)}
COLUMN = {"gpo": "log_odds", "sppo": "preference"}
LOG_Z = 0.032304  # of gpo
W, L = (torch.tensor(side) for side in zip(*itertools.permutations(range(3), 2), strict=True))


def pairs(name: str, policy: torch.Tensor, judged: torch.Tensor) -> PairLogps:
    """All six ordered pairs of different responses."""
    numbers = {"": policy.log(), "ref_": POLICY.log(), f"{COLUMN[name]}_": judged}
    sides = (("chosen", W), ("rejected", L))
    return PairLogps(**{f"{prefix}{side}": values[at] for prefix, values in numbers.items() for side, at in sides})


def judged(name: str) -> torch.Tensor:
    """Expectation over pi_t's own samples of log-odds, or of the probability of winning."""
    return (S if name == "gpo" else S.sigmoid()) @ POLICY


def step(name: str) -> tuple[torch.Tensor, float]:
    """pi_t exp(eta target)/Z and log Z."""
    target = judged(name) - (0.5 if name == "sppo" else 0.0)
    weights = POLICY * (ETA * target).exp()
    return weights / weights.sum(), math.log(weights.sum())


@pytest.mark.parametrize("name", ["gpo", "sppo"])
def test_the_step_is_the_specification_s(name) -> None:
    torch.testing.assert_close(judged(name), torch.tensor(JUDGED[name], dtype=torch.float64), rtol=0, atol=6e-6)
    torch.testing.assert_close(step(name)[0], torch.tensor(AFTER[name], dtype=torch.float64), rtol=0, atol=6e-6)


@pytest.mark.parametrize("name", ["gpo", "sppo"])
def test_with_log_z_the_loss_is_0_exactly_at_the_step(name) -> None:
    """And nowhere else: over all pairs, any other policy is off for some response."""
    after, log_z = step(name)
    exact = judged(name) - log_z / ETA
    objective = get_objective(name, eta=ETA)
    assert objective.loss(pairs(name, after, exact)).abs().max() < 1e-28
    for other in (POLICY, torch.full((3,), 1 / 3, dtype=torch.float64), (after + POLICY) / 2):
        assert objective.loss(pairs(name, other, exact)).max() > 1e-6


def test_without_log_z_every_response_is_off_by_log_z() -> None:
    after = torch.tensor(AFTER["gpo"], dtype=torch.float64)
    scores = torch.tensor(JUDGED["gpo"], dtype=torch.float64)
    losses = get_objective("gpo", eta=ETA).loss(pairs("gpo", after, scores))
    torch.testing.assert_close(losses, torch.full_like(losses, LOG_Z**2), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["gpo", "sppo"])
def test_the_neglected_log_z_shrinks_with_the_square_of_the_step(name) -> None:
    """log Z = eta^2 var(target)/2 + O(eta^3), since the policy's mean target is 0: what a card calls about."""
    target = judged(name) - (0.5 if name == "sppo" else 0.0)
    assert float(POLICY @ target) == pytest.approx(0, abs=1e-15)
    for eta in (1e-2, 1e-3):
        log_z = math.log(float(POLICY @ (eta * target).exp()))
        assert log_z == pytest.approx(eta**2 * float(POLICY @ target**2) / 2, rel=eta)
