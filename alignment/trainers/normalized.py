"""The pairwise-normalised gradient: each response's part of a pair's gradient has the same length.

Yuan et al. 2024 (2410.13828) propose the step g_w/|g_w| - g_l/|g_l| against gradient entanglement. To first order it
never lowers chosen and never raises rejected of its pair: |g_w| - <g_w, g_l>/|g_l| >= 0 by Cauchy-Schwarz. Here it is
c sqrt(|g_w||g_l|) (g_w/|g_w| - g_l/|g_l|) with the objective's own push c = -L'(m): the factor is our choice, so that
learning rates keep their meaning (where the norms are equal nothing changes).

The promise holds while the loss asks for a larger margin, c > 0. Past the target of ipo, inpo and reward_aware_rpo,
and where labels are smoothed or soft, c < 0 takes the margin back: then chosen never rises and rejected never falls.
No promise for the mean over a batch's pairs, nor under Adam, which rescales coordinates. Not an objective: the loss
and what is logged of it are unchanged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from alignment.errors import UserError
from alignment.objectives import PairLogps
from alignment.objectives.margin import is_margin_loss, why_not_margin
from alignment.trainers.entanglement import ResponseGradients, dot


class NormalizedGradient:
    """Rescales a batch's gradient; costs a forward and a backward pass more per response.

    Args:
        trainer: a `PreferenceTrainer`; all its trained parameters count in the norms.

    Raises:
        UserError: the loss reads more than the margin, or as `ResponseGradients`.
    """

    def __init__(self, trainer: Any):
        if not is_margin_loss(trainer.objective):
            raise UserError(f"training.normalized_gradient: {why_not_margin(trainer.objective)}")
        self.gradients = ResponseGradients(trainer, "all", "training.normalized_gradient")

    def __call__(self, batch: PairLogps, rows: dict[str, torch.Tensor]) -> PairLogps:
        """The batch with equal values, whose chosen and rejected carry gradients of equal length.

        Args:
            batch: `[B]` columns, as training scored them.
            rows: the same pairs, `paired`: all chosen first.
        """
        norms = torch.tensor([self._norm(rows, row) for row in range(2 * len(batch.chosen))]).view(2, -1)
        ratio = (norms[1] / norms[0]).sqrt()  # |g_l|/|g_w|
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).to(batch.chosen)
        return replace(batch, chosen=scaled(batch.chosen, ratio), rejected=scaled(batch.rejected, 1 / ratio))

    def _norm(self, rows: dict[str, torch.Tensor], row: int) -> float:
        _, gradient = self.gradients(rows, row)
        return math.sqrt(dot(gradient, gradient))


def scaled(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`values` to the bit, with a gradient that is `factor` times as large."""
    moving = values - values.detach()  # 0
    return values.detach() + factor * moving
