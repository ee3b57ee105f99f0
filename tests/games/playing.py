"""Games for the tests, and the arithmetic that they are checked with: written out, without the lab's functions."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment.games import preferences
from alignment.games.gradients import Situation, population
from alignment.objectives import Objective

DOUBLE = torch.float64


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times `scale`, in float64."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def games(arms: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random preferences `[count, n, n]` and reference logits `[count, n]`."""
    generator = torch.Generator().manual_seed(seed)
    return preferences.random(arms, games=count, generator=generator), draw(count, arms, seed=seed + 1000)


def centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def mirror_step(theta: Tensor, q: Tensor, ref: Tensor, matrix: Tensor, beta: float, eta: float) -> Tensor:
    """T(theta; q) of objectives.md 4(a), for one game: logits `[n]`, opponent's probabilities q `[n]`."""
    return (1 - eta * beta) * theta + eta * beta * ref + eta * matrix @ q


def value_of(p: Tensor, q: Tensor, ref: Tensor, matrix: Tensor, beta: float) -> Tensor:
    """V(p, q) of one game from probabilities `[n]`, term by term."""
    return p @ matrix @ q - beta * (p * (p / ref).log()).sum() + beta * (q * (q / ref).log()).sum()


def situation(arms: int, count: int, seed: int, *, sampler: str = "policy") -> Situation:
    """Random games at random policies, all four of them different."""
    matrices, ref = games(arms, count, seed)
    policy, previous, opponent, other = (draw(count, arms, seed=seed + k).log_softmax(-1) for k in (1, 2, 3, 4))
    drawn = {"policy": policy.exp(), "other": other.exp(), "uniform": torch.full_like(policy, 1 / arms)}[sampler]
    return Situation(policy, ref.log_softmax(-1), previous, drawn, opponent.exp(), matrices)


def exact_gradient(objective: Objective, logits: Tensor, situation: Situation) -> Tensor:
    """Gradient of the population loss in the logits `[B, n]`, by autograd; they take the place of the policy."""
    leaf = logits.detach().requires_grad_()
    total = population(objective, situation.at(leaf.log_softmax(-1))).sum()
    return torch.autograd.grad(total, leaf)[0]
