"""Is an objective a loss of the margin alone? Found by differentiation, so that a user's objective is known, too."""

from __future__ import annotations

import torch

from alignment.objectives.base import Objective
from alignment.objectives.batch import NEEDS, PairLogps

_PAIRS = 64


def is_margin_loss(objective: Objective) -> bool:
    """Whether dL/dlog π(chosen) = -dL/dlog π(rejected) everywhere, and nothing else carries a gradient.

    So for dpo, ipo (sum form), hinge, robust, reward_aware_rpo and inpo; not where there is a likelihood term (rpo,
    cpo), a further response (vpo) or head (spo), or a function of each log-ratio (dpop, simpo by its lengths, f_dpo
    but for reverse KL).
    """
    if {"calibration", "ref_calibration", "degree"} & set(objective.needs):
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        uniform = torch.rand(_PAIRS, generator=generator, dtype=torch.float64)
        if name.endswith("_length"):
            return (1 + 20 * uniform).floor()
        return uniform if name.startswith("preference") else -30 * uniform

    columns = {name: draw(name) for need in ("reference", *objective.needs) for name in NEEDS[need]}
    policy = [draw(name).requires_grad_(True) for name in ("chosen", "rejected")]
    with torch.enable_grad():
        losses = objective.loss(PairLogps(chosen=policy[0], rejected=policy[1], **columns))
        chosen, rejected = torch.autograd.grad(losses.sum(), policy, allow_unused=True)
    if chosen is None or rejected is None:
        return False
    return bool(torch.allclose(chosen, -rejected, rtol=1e-9, atol=1e-12))


def why_not_margin(objective: Objective) -> str:
    """What to say of an objective where only a loss of the margin fits, with the remedy."""
    return (
        f"objective {objective.card.name!r} is no function of the margin alone, so chosen and rejected are pushed "
        "unequally on purpose: take dpo, ipo, hinge or robust, or leave this out"
    )
