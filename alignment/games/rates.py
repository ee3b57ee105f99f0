"""How fast mirror descent and extragradient close in on a Nash policy, from the linearised update. No simulation.

Derived from T(theta; q) = (1 - eta beta) theta + eta beta theta_ref + eta P q (objectives.md 4(a), 4(f)). A rate is
the factor by which a small distance to the Nash policy changes in one iteration, in the long run: the spectral radius
of the update's Jacobian on centred vectors. Above 1 the Nash policy repels. The duality gap is quadratic in the
distance: its factor is the square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contraction(nash: Tensor, preference: Tensor, *, beta: float, eta: float, look_ahead: bool) -> Tensor:
    """Spectral radius `[...]` at the Nash policy.

    Args:
        nash: its log-probabilities, `[..., n]`.
        preference: `[..., n, n]`.
        beta, eta: weight of the KL and step of mirror descent, 0 < eta beta <= 1.
        look_ahead: extragradient (EGPO) in place of mirror descent (Online IPO 1, INPO).
    """
    pi = nash.to(torch.float64).exp()
    arms = pi.shape[-1]
    identity = torch.eye(arms, dtype=torch.float64)
    centre = identity - 1 / arms
    spread = torch.diag_embed(pi) - pi[..., :, None] * pi[..., None, :]  # D, the Jacobian of softmax
    step = (1 - eta * beta) * identity + eta * preference @ spread
    if look_ahead:
        step = (1 - eta * beta) * identity + eta * preference @ spread @ step
    return torch.linalg.eigvals(centre @ step @ centre).abs().amax(-1)


def measured(iterations: Tensor, gaps: Tensor, floor: float = 1e-14) -> Tensor:
    """Factor per iteration by which each game's gap falls at the end of its curve, `[B]`.

    From the middle of the part of the curve above `floor` (rounding) to its end; NaN where fewer than four points are
    above it.

    Args:
        iterations: `[K]`.
        gaps: `[K, B]`.
        floor: gaps below it are not looked at.
    """
    found = torch.full(gaps.shape[1:], math.nan, dtype=torch.float64)
    for game in range(gaps.shape[1]):
        below = (gaps[:, game] <= floor).nonzero()
        end = int(below[0]) if len(below) else len(gaps)
        if end >= 4:
            a, b = end // 2, end - 1
            fall = gaps[b, game].log() - gaps[a, game].log()
            found[game] = (fall / (iterations[b] - iterations[a])).exp()
    return found
