"""Whether implicit rewards mean what they say: sigmoid(reward margin) against the labels, over pairs of all processes.

Only for objectives whose card says `bradley_terry`. Where sigmoid(margin) is fitted to something else than the labels
as they stand (robust: to those before flips; cDPO: to smoothed ones) it is translated into what the fit says of them.
Not a recalibration, and not the win rate of a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from alignment.objectives.base import Objective

BINS = 10  # of equal width over confidences 1/2 to 1
TIE = 1e-3  # a smaller margin names neither response: at the start its sign is that of rounding


def label_probability(objective: Objective | None, sigmoid: torch.Tensor) -> torch.Tensor:
    """P(the label as given names a response) by the objective's model, from sigmoid(its margin); same shape.

    The objective's own `label_probability` (of spo: its base's).
    """
    speaking = getattr(objective, "aligned", objective)
    return sigmoid if speaking is None else speaking.label_probability(sigmoid)


class Calibration:
    """Running sums over pairs; `reduce` gives the expected calibration error (ECE; Guo et al. 2017, 1706.04599).

    A pair counts in both orders, as sigmoid(margin) against its label and as sigmoid(-margin) against 1 - label: data
    that always name the chosen response first would otherwise need no more than "always near 1". The two orders fall
    into mirrored bins with the same gap, so that both together are one: the confidence sigmoid(|margin|), in [1/2, 1],
    against the share of labels on that side.

    Args:
        objective: whose margins these are (`label_probability`); None: sigmoid(margin) speaks of the labels itself.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective
        self.sums: torch.Tensor | None = None

    def add(self, margins: torch.Tensor, label: torch.Tensor | None = None) -> None:
        """Add pairs.

        Args:
            margins: `[B]`, implicit reward of chosen minus rejected.
            label: `[B]`, probability that chosen is the better one; None: 1.
        """
        margins = margins.detach().double()
        number = margins.isfinite()  # what is none has no confidence; training stops at it, or skips its step
        margins, label = margins[number], None if label is None else label[number]
        confidence = label_probability(self.objective, margins.abs().sigmoid())
        right = torch.ones_like(margins) if label is None else label.double()
        right = torch.where(margins > TIE, right, torch.where(margins < -TIE, 1 - right, 0.5))
        place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
        each = torch.stack([confidence - right, confidence * (1 - confidence), torch.ones_like(margins)])
        found = each.new_zeros(3, BINS).index_add_(1, place, each)
        self.sums = found if self.sums is None else self.sums + found

    def reduce(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """The numbers over all processes, all of which must call this; then start again. Empty without any pair.

        Returns:
            `calibration/ece`: mean over pairs of |mean confidence - share right| of their bin; 0 is calibrated.
            `calibration/overconfidence`: mean confidence - share right, signed.
            `calibration/noise`: the ECE to expect of a calibrated model with 0/1 labels on so many pairs, from
                normal errors of the shares: an ECE near it says nothing against the model.
        """
        sums = torch.zeros(3, BINS) if self.sums is None else self.sums
        self.sums = None
        gap, variance, count = reduce(sums.float().to(device)).double().cpu()  # fp32 on the wire, as `Totals`
        pairs = float(count.sum())
        if not pairs:
            return {}
        return {
            "calibration/ece": float(gap.abs().sum()) / pairs,
            "calibration/overconfidence": float(gap.sum()) / pairs,
            "calibration/noise": float((variance * 2 / math.pi).sqrt().sum()) / pairs,
        }
