"""An objective of one's own: one class in one file, outside the package.

alignment objectives check squared_hinge --file examples/own_objective.py      # every generic proof
alignment train examples/own_objective.yaml                                    # the recipe beside it
"""

import torch.nn.functional as F

from alignment.objectives import Card, Objective, hyper, register


@register
class SquaredHinge(Objective):
    card = Card("squared_hinge", "Squared hinge", "none", "none", "max(0, 1 - beta m)^2")
    beta: float = hyper("inverse of the margin at which a pair is done", default=0.1, gt=0)

    def pair_loss(self, batch):
        return F.relu(1 - self.beta * batch.margin) ** 2  # m: the margin of log-ratios
