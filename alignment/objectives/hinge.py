"""Hinge loss on the margin of log-ratios (the SLiC loss with DPO's implicit reward)."""

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class Hinge(Objective):
    """Linear until beta times the margin is 1, then flat."""

    card = Card(
        name="hinge",
        title="Hinge preference loss",
        paper="Liu et al. 2023 (RSO), arXiv:2309.06657, after SLiC-HF, arXiv:2305.10425",
        equation="RSO's hinge-norm loss (number from memory)",
        formula="max(0, 1 - beta m)",
        optimum="two responses: beta m = 1 in favour of the majority label; more responses: none known",
        bounds="loss >= 0; |dL/ds| is beta before beta m = 1 and 0 after",
        verified="formula against TRL's hinge loss; the paper was not read",
        pitfalls=("A pair past beta m = 1 teaches nothing: watch the saturated share.",),
        collisions=("SLiC's own hinge compares plain log-probabilities and adds an SFT term; this one has neither.",),
        settings=({"beta": 0.5},),
    )
    beta: float = hyper("inverse of the margin at which a pair is done", default=0.1, gt=0, source="TRL's default")

    def pair_loss(self, batch: PairLogps) -> Tensor:
        return F.relu(1 - self.beta * batch.margin)  # RSO hinge-norm
