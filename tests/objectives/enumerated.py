"""Policies whose responses can all be listed: expectations are sums, and gradients are exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignment.objectives import Objective, SamplePairs

DOUBLE = torch.float64


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times `scale`, in float64."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def every_pair(size: int) -> tuple[Tensor, Tensor]:
    """Indices of both responses of all size^2 ordered pairs."""
    first, second = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return first.flatten(), second.flatten()


def mean_gradient(
    objective: Objective, logits: Tensor, weights: Tensor, columns: Callable[[Tensor], dict[str, Tensor]]
) -> Tensor:
    """d/d(logits) of the sum of weights times the losses; `columns` makes the batch from log-probabilities, `[n]`."""
    leaf = logits.clone().requires_grad_()
    loss = objective.loss(SamplePairs(**columns(leaf.log_softmax(0))))
    return torch.autograd.grad((weights * loss).sum(), leaf)[0]


def differences(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, one entry at a time; error about 1e-10 for functions of size 1."""
    found = torch.empty_like(at).flatten()
    for index in range(at.numel()):
        moved = torch.zeros_like(at).flatten()
        moved[index] = step
        moved = moved.view_as(at)
        found[index] = (value(at + moved) - value(at - moved)) / (2 * step)
    return found.view_as(at)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two distributions."""
    return (p * (p.log() - q.log())).sum()
