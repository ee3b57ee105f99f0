"""The KL-regularised preference game solved: values, best responses, duality gap, Nash policy. No learning.

    V(p1, p2) = p1' P p2 - beta KL(p1 || ref) + beta KL(p2 || ref)

Its symmetric Nash policy pi* is unique for beta > 0: log pi* = log ref + P pi*/beta + const (the game of Munos et al.
2023, arXiv:2312.00886, and of Zhou, Fazel and Du 2025, arXiv:2503.08942). Policies come in as logits of any offset,
`[..., n]`; leading dimensions are games, seeds or whatever broadcasts. A logit of -inf is an arm that is never played.
All is computed in float64; `duality_gap` and `nash_policy` answer in the widest floating type of what they are given,
and in float64 where that is integers.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from alignment.games.preferences import check

TOLERANCE = 1e-12  # of the Nash policy, on preferences: |beta (log pi - log ref) - P pi - const|
EPS = torch.finfo(torch.float64).eps
NEWTON_STEPS = 100


class NotFound(ValueError):
    """A policy that was to be computed was not found to the precision that is promised."""


def check_beta(beta: SupportsFloat) -> float:
    """beta as a float; ValueError unless it is a finite number above 0, of Python, numpy or a tensor without axes."""
    scalar: Any = beta
    number = scalar.item() if getattr(scalar, "ndim", None) == 0 else scalar
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError(f"beta must be a finite number > 0, got {beta!r}")
    return float(number)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, `[...]`, of log-probabilities `[..., n]`; 0 at least, whatever rounding says.

    Arms that p never plays count nothing; one that p plays and q does not makes it infinite.
    """
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1).clamp_min(0)


def win_rate(preference: Tensor, probabilities: Tensor) -> Tensor:
    """P q: how often each arm beats a sample of q, `[..., n]`, of P `[..., n, n]` and q `[..., n]`."""
    return (preference @ probabilities[..., None]).squeeze(-1)


def value(first: Tensor, second: Tensor, ref_logits: Tensor, preference: Tensor, beta: float) -> Tensor:
    """V(first, second), `[...]`; all but the matrix are logits `[..., n]`."""
    p1, p2, ref = _log_probs(first), _log_probs(second), _log_probs(ref_logits)
    duel = (p1.exp() * win_rate(preference.to(torch.float64), p2.exp())).sum(-1)
    return duel - beta * kl(p1, ref) + beta * kl(p2, ref)


def best_response(logits: Tensor, ref_logits: Tensor, preference: Tensor, beta: float) -> Tensor:
    """Log-probabilities `[..., n]` of the policy that does best against `logits`: ref exp(P pi/beta)/Z."""
    won = win_rate(preference.to(torch.float64), _log_probs(logits).exp())
    return (_log_probs(ref_logits) + won / beta).log_softmax(-1)


def duality_gap(logits: Tensor, ref_logits: Tensor, preference: Tensor, beta: SupportsFloat) -> Tensor:
    """max_p V(p, pi) - min_p V(pi, p), which is 2 beta KL(pi || best response to pi): 0 iff pi is the Nash policy.

    Args:
        logits: the policy's, `[..., n]`, of any offset; a pure policy has -inf for the other arms.
        ref_logits: the reference's, `[..., n]`.
        preference: P `[..., n, n]` with P + P' = 1.
        beta: weight of the KL terms, > 0; a number of Python or numpy, or a tensor without axes.

    Returns:
        `[...]` in units of probability of winning, 0 at least; infinite where the policy plays an arm that the
        reference never does. In the widest dtype of the three tensors; float64 where one of them holds integers.

    Raises:
        ValueError: beta, a shape, or a pair of entries of P that does not sum to 1.
    """
    dtype = _widest(logits, ref_logits, preference)
    weight, preference = check_beta(beta), check(preference)
    _same_arms(preference, logits=logits, ref_logits=ref_logits)
    gap = 2 * weight * kl(_log_probs(logits), best_response(logits, ref_logits, preference, weight))
    return gap.to(dtype)


def exploitability(logits: Tensor, preference: Tensor) -> Tensor:
    """max_i (P pi)_i - 1/2, `[...]`: what the best arm wins against pi in the game without KL terms."""
    return win_rate(preference.to(torch.float64), _log_probs(logits).exp()).amax(-1) - 0.5


def fixed_point_residual(logits: Tensor, ref_logits: Tensor, preference: Tensor, beta: float) -> Tensor:
    """max_y |beta (log pi - log ref) - P pi - mean|, `[...]`: how far `logits` are from the Nash policy's equation."""
    won = win_rate(preference.to(torch.float64), _log_probs(logits).exp())
    return _centred(beta * (_log_probs(logits) - _log_probs(ref_logits)) - won).abs().amax(-1)


def nash_policy(preference: Tensor, ref_logits: Tensor, beta: SupportsFloat) -> Tensor:
    """Log-probabilities `[..., n]` of the Nash policy, in the wider dtype of the two tensors.

    It is solved to `TOLERANCE` in float64, and answered so where either tensor is float64 or holds integers; of two
    float32 tensors the answer is rounded to float32.

    Newton's method on F(theta) = theta - theta_ref - P pi/beta, from a large beta (where the reference is nearly the
    solution) down to the one asked for, halving steps that do not lower |F|. Its Jacobian is I - P D/beta with
    D = diag(pi) - pi pi'. On centred vectors P acts as an antisymmetric matrix A, and the eigenvalues of A D are
    imaginary: the Jacobian is never singular, and |F| has no minimum but the solution.

    Args:
        preference: P `[..., n, n]` with P + P' = 1.
        ref_logits: the reference's, `[..., n]`, all finite.
        beta: weight of the KL terms, > 0; a number of Python or numpy, or a tensor without axes.

    Raises:
        ValueError: as `duality_gap`; an arm that the reference never plays.
        NotFound: no convergence to `TOLERANCE`, or to what float64 allows: times beta above 1, and EPS/beta where that
            is more (below beta = 2e-4). Not seen.
    """
    dtype = _widest(preference, ref_logits)
    weight, preference = check_beta(beta), check(preference)
    _same_arms(preference, ref_logits=ref_logits)
    if not bool(ref_logits.isfinite().all()):
        raise ValueError("ref_logits must be finite; leave out arms that the reference never plays")
    shape = torch.broadcast_shapes(preference.shape[:-1], ref_logits.shape)
    matrices = preference.expand(*shape, shape[-1]).reshape(-1, shape[-1], shape[-1])
    ref = _log_probs(ref_logits).expand(shape).reshape(-1, shape[-1])
    theta, stage = ref, max(1.0, weight)
    while True:
        stage = max(weight, stage)
        theta = _newton(theta, ref, matrices, stage)
        if stage == weight:
            break
        stage /= 2
    residual = fixed_point_residual(theta, ref, matrices, weight)
    if not bool((residual <= max(TOLERANCE, TOLERANCE * weight, EPS / weight)).all()):
        raise NotFound(f"no Nash policy to {TOLERANCE:g}: residual {residual.max().item():.1e} at beta {weight:g}")
    return theta.log_softmax(-1).reshape(shape).to(dtype)


def _newton(theta: Tensor, ref: Tensor, preference: Tensor, beta: float) -> Tensor:
    """The fixed point for this beta from a start `[B, n]`, as far as rounding lets |F| fall; see `nash_policy`."""
    identity = torch.eye(theta.shape[-1], dtype=theta.dtype)

    def distance(logits: Tensor) -> tuple[Tensor, Tensor]:
        f = _centred(logits - ref - win_rate(preference, logits.softmax(-1)) / beta)
        return f, f.norm(dim=-1)

    f, size = distance(theta)
    for _ in range(NEWTON_STEPS):
        pi = theta.softmax(-1)
        spread = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
        step = torch.linalg.solve(identity - (preference - 0.5) @ spread / beta, f)
        share = torch.ones_like(size)
        for _ in range(30):
            moved = theta - share[:, None] * step
            f_moved, size_moved = distance(moved)
            worse = size_moved >= size
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        better = size_moved < size
        if not bool(better.any()):
            break  # every game is at its rounding floor
        theta = torch.where(better[:, None], moved, theta)
        f, size = torch.where(better[:, None], f_moved, f), torch.where(better, size_moved, size)
    return theta


def _log_probs(logits: Tensor) -> Tensor:
    return logits.to(torch.float64).log_softmax(-1)


def _widest(*given: Tensor) -> torch.dtype:
    """The floating type that loses nothing of what was given; integers count as float64."""
    floating = [each.dtype if each.dtype.is_floating_point else torch.float64 for each in given]
    return reduce(torch.promote_types, floating)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def _same_arms(preference: Tensor, **policies: Tensor) -> None:
    for name, logits in policies.items():
        if logits.dim() < 1 or logits.shape[-1] != preference.shape[-1]:
            arms = preference.shape[-1]
            raise ValueError(f"{name} must have shape [..., {arms}] for {arms} arms, got {list(logits.shape)}")
