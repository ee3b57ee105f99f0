"""The step-0 check: before the first update, is this the run that the user thinks it is?

Compares the first batch as training scores it with an independent scoring of the same rows: the starting model in eval
mode, one response a row. What it catches: a wrong reference or previous iterate, policy and reference in different
dtypes, active dropout, a broken mask or position, a loss that is not the objective's, a model that is all frozen.
(That the objective has a gradient is looked for over the first three steps: one batch of ties has none.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from alignment.files import read_json_object, write_json
from alignment.models.scoring import relative_gap
from alignment.objectives import PairLogps
from alignment.objectives.base import Objective

POLICY = ("chosen", "rejected", "calibration")


def step_zero_problem(
    objective: Objective,
    batch: PairLogps,
    start: torch.Tensor,
    tolerance: float,
    start_is_reference: bool,
    same_pass: bool = False,
) -> str | None:
    """What is wrong at step 0 and probably why, in one line; None if nothing is.

    Args:
        objective: the objective being trained.
        batch: the first batch, as training scored it.
        start: `[B, k]` log-probs of the same responses under the starting model, scored independently.
        tolerance: relative difference that rounding explains, as measured (`unpadded.allowed`).
        start_is_reference: whether training starts at the reference.
        same_pass: the reference has just scored the same rows in the same layout, so that only another model, not
            rounding, explains more than a fifth of the tolerance.
    """
    columns = {name: value for name in POLICY if (value := getattr(batch, name)) is not None}
    policy = torch.stack([value.detach() for value in columns.values()], dim=1)
    if not batch.chosen.requires_grad:
        return "no parameter is trainable: nothing would be learned"
    if not torch.isfinite(policy).all():
        return "a log-probability is not finite: fp16 overflow, or damaged weights; try dtype float32 or bfloat16"
    off = relative_gap(policy, start)
    if off > tolerance:
        return (
            f"the first batch's log-probs differ from the starting model's by a relative {off:.2g}: dropout is "
            "active, or rows, masks or positions of the chosen layout are wrong for this model (try "
            "training.layout=paired)"
        )
    frozen = [("reference", batch.ref_chosen, batch.ref_rejected)] if start_is_reference else []
    if objective.card.start == "previous":  # an iteration starts at the policy that sampled its pairs
        frozen.append(("previous iterate", batch.prev_chosen, batch.prev_rejected))
    for name, chosen, rejected in frozen:
        if chosen is None or rejected is None:
            continue
        scored = torch.stack([chosen, rejected], dim=1)
        off = relative_gap(scored, start[:, :2])
        if name == "reference" and same_pass:
            off = max(off, 5 * relative_gap(scored, policy[:, :2]))
        if off > tolerance:
            return (
                f"{name} and starting model differ by a relative {off:.2g} in log-prob, so implicit rewards do not "
                "start at 0: it is another model, has another dtype, is an adapter's base, or a fresh adapter does "
                "not start at zero (PEFT's init_lora_weights or init_weights)"
            )
    started = replace(batch, **{name: start[:, j] for j, name in enumerate(columns)})
    return _loss_problem(objective, batch, started, (policy - start).abs().sum(1))


def _loss_problem(objective: Objective, batch: PairLogps, started: PairLogps, moved: torch.Tensor) -> str | None:
    """The batch's loss against the objective's value at the start: no further off than `moved` nats explain."""
    losses, slopes = losses_and_slopes(objective, batch)
    expected, slopes_there = losses_and_slopes(objective, started)
    if not torch.isfinite(losses).all() or not torch.isfinite(slopes).all():
        return "the objective's loss or gradient is not finite on the first batch"
    allowed = 2 * torch.maximum(slopes, slopes_there) * moved + 1e-5 * expected.abs().clamp(min=1.0)
    if bool(((losses - expected).abs() > allowed).any()):
        return (
            f"the first batch's loss {float(losses.mean()):.6g} is not the objective's value at the starting model, "
            f"{float(expected.mean()):.6g}"
        )
    return None


def losses_and_slopes(objective: Objective, batch: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B]` losses and `[B]` largest |dL/ds| over the policy's columns."""
    leaves = {
        name: value.detach().clone().requires_grad_(True)
        for name in POLICY
        if (value := getattr(batch, name)) is not None
    }
    with torch.enable_grad():
        losses = objective.loss(replace(batch, **leaves))
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    return losses.detach(), torch.stack([g.abs() for g in gradients if g is not None]).amax(0)


def write_start(
    file: Path, rows: dict[str, torch.Tensor], start: torch.Tensor, frozen: dict[str, torch.Tensor]
) -> None:
    """Keep what the run began with: rows of its first batch, their log-probs under the starting model, and under the
    frozen ones ("ref", "prev")."""
    kept = {"rows": {key: value.tolist() for key, value in rows.items()}, "logps": start.tolist()}
    write_json(file, kept | {"frozen": {name: value.tolist() for name, value in frozen.items()}})


def read_start(
    file: Path, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]] | None:
    """(rows, `[B, k]` log-probs, frozen log-probs) that `write_start` kept; None where there is no such file."""
    if not file.is_file():
        return None
    kept = read_json_object(file)
    rows = {key: torch.tensor(value, device=device) for key, value in kept["rows"].items()}
    frozen = {name: torch.tensor(value, device=device) for name, value in kept.get("frozen", {}).items()}
    return rows, torch.tensor(kept["logps"], device=device), frozen
