"""The step-0 check: before the first update, is this the run that the user thinks it is?

Compares the first batch as training scores it with an independent scoring of the same rows: the starting model in eval
mode, one response a row. What it catches: a wrong reference, policy and reference in different dtypes, active dropout,
a broken mask or position, an empty response, an objective without gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from alignment.objectives import PairLogps
from alignment.objectives.base import Objective

# Relative to the size of a log-prob (at least 1 nat). Half precision: two layouts of one row differ by about 1e-2.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def step_zero_problem(
    objective: Objective, batch: PairLogps, start: torch.Tensor, dtype: torch.dtype, start_is_reference: bool
) -> str | None:
    """What is wrong at step 0 and probably why, in one line; None if nothing is.

    Args:
        objective: the objective being trained.
        batch: the first batch, as training scored it.
        start: `[B, k]` log-probs of the same responses under the starting model, scored independently.
        dtype: in which the model computes (of its weights, or autocast's).
        start_is_reference: whether training starts at the reference.
    """
    columns = [c for c in (batch.chosen, batch.rejected, batch.calibration) if c is not None]
    policy = torch.stack([c.detach() for c in columns], dim=1)
    scale = start.abs().clamp(min=1.0)
    tolerance = TOLERANCE.get(dtype, 5e-2)
    if not torch.isfinite(policy).all():
        return "a log-probability is not finite: fp16 overflow, or damaged weights; try dtype float32 or bfloat16"
    off = float(((policy - start).abs() / scale).max())
    if off > tolerance:
        return (
            f"the first batch's log-probs differ from the starting model's by a relative {off:.2g}: dropout is "
            "active, or rows, masks or positions of the chosen layout are wrong for this model (try "
            "training.layout=paired)"
        )
    if start_is_reference and batch.ref_chosen is not None and batch.ref_rejected is not None:
        reference = torch.stack([batch.ref_chosen, batch.ref_rejected], dim=1)
        off = float(((reference - start[:, :2]).abs() / scale[:, :2]).max())
        if off > tolerance:
            return (
                f"reference and starting model differ by a relative {off:.2g} in log-prob, so implicit rewards do not "
                "start at 0: the reference is another model, has another dtype, or is an adapter's base"
            )
    at_start = {"chosen": start[:, 0], "rejected": start[:, 1]}
    if batch.calibration is not None:
        at_start["calibration"] = start[:, 2]
    return _loss_problem(objective, batch, replace(batch, **at_start), tolerance * scale.sum(1))


def _loss_problem(objective: Objective, batch: PairLogps, started: PairLogps, slack: torch.Tensor) -> str | None:
    """Loss against the card's value at the start (within what `slack` nats can change), and its gradient."""
    leaves = {
        name: getattr(batch, name).detach().clone().requires_grad_(True)
        for name in ("chosen", "rejected", "calibration")
        if getattr(batch, name) is not None
    }
    with torch.enable_grad():
        losses = objective.loss(replace(batch, **leaves))
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    slopes = torch.stack([g.abs() for g in gradients if g is not None])
    if not torch.isfinite(losses).all() or not torch.isfinite(slopes).all():
        return "the objective's loss or gradient is not finite on the first batch"
    if not bool((slopes.sum(0) > 0).any()):
        return f"objective {objective.card.name!r} has no gradient on the first batch: nothing would be learned"
    off = (losses.detach() - objective.loss(started)).abs()
    if bool((off > 2 * slopes.max() * slack + 1e-6).any()):
        return (
            f"the first batch's loss {float(losses.mean()):.6g} is not the objective's value at the starting model "
            f"{float(objective.loss(started).mean()):.6g}"
        )
    return None
