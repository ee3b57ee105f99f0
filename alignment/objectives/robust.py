"""Robust DPO: the DPO loss made unbiased under label flips of known rate."""

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class Robust(Objective):
    """DPO minus the share that flipped labels contribute, rescaled."""

    card = Card(
        name="robust",
        title="Robust DPO (rDPO)",
        paper="Chowdhury, Kini, Natarajan 2024, arXiv:2403.00409",
        equation="unbiased loss of section 3 (number not checked)",
        formula="[-(1-e) log sigmoid(beta m) + e log sigmoid(-beta m)] / (1 - 2e),  e = label_smoothing",
        bradley_terry=True,
        optimum="pi* ~ ref exp(r/beta) when Bradley-Terry labels with reward r were flipped with probability e",
        bounds="UNBOUNDED BELOW: slope in m tends to -beta e/(1-2e) as m grows; |dL/ds| <= beta (1-e)/(1-2e)",
        verified="formula against TRL's robust loss; that it is unbiased under flips is proved by the suite",
        pitfalls=(
            "A separable pair (always labelled the same way) pushes its margin to infinity and the loss to -infinity.",
            "label_smoothing here is the true flip rate to correct for; in dpo the same key softens targets.",
            "sigmoid(beta m) is fitted to the labels before they were flipped, so it is surer than the labels are.",
        ),
        collisions=("'robust' also names distributionally robust DPO variants: unrelated.",),
        settings=({"label_smoothing": 0.0}, {"label_smoothing": 0.3, "beta": 0.5}),
    )
    beta: float = hyper("inverse scale of the margin", default=0.1, gt=0, source="as dpo")
    label_smoothing: float = hyper("rate at which labels were flipped", default=0.1, ge=0, lt=0.5, source="our choice")

    def pair_loss(self, batch: PairLogps) -> Tensor:
        logit, eps = self.beta * batch.margin, self.label_smoothing
        kept, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
        return ((1 - eps) * kept - eps * flipped) / (1 - 2 * eps)  # unbiased estimator, section 3

    def label_probability(self, sigmoid: Tensor) -> Tensor:
        """P(label as given), `[B]`, from the P(label before the flip) that sigmoid(beta m) is fitted to."""
        return self.label_smoothing + (1 - 2 * self.label_smoothing) * sigmoid
