"""DPOP (DPO-Positive): DPO whose margin is penalised when the chosen response falls below the reference."""

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class DPOP(Objective):
    """DPO on m - lam max(0, -z_w)."""

    card = Card(
        name="dpop",
        title="DPO-Positive (Smaug)",
        paper="Pal et al. 2024, arXiv:2402.13228",
        equation="eq. 3 (number from memory)",
        formula="-log sigmoid(beta (m - lam max(0, -z_w)))",
        optimum=None,
        bounds="loss >= 0; |dL/ds_w| <= beta (1 + lam), |dL/ds_l| <= beta",
        verified="formula and lam = 50 from memory of the paper: no source was at hand; values and slopes checked "
        "against that formula by the suite",
        pitfalls=(
            "There is a kink at policy == reference: the first slope is taken as DPO's, and it is 1 + lam times "
            "as steep as soon as log pi(chosen) falls.",
            "With lam = 50 a fall of 1 nat in log pi(chosen) costs as much as 50 nats of margin.",
        ),
        settings=({"lam": 5.0, "beta": 0.3}, {"lam": 0.0}),
    )
    beta: float = hyper("inverse scale of the margin", default=0.1, gt=0, source="our choice: as dpo")
    lam: float = hyper(
        "weight of the penalty inside the sigmoid",
        default=50.0,
        ge=0,
        source="paper from memory: 5, 50, 500 tried, 50 used",
    )

    def pair_loss(self, batch: PairLogps) -> Tensor:
        penalty = F.relu(-batch.log_ratio_chosen)  # max(0, log ref/pi); its slope at 0 is taken as 0
        return -F.logsigmoid(self.beta * (batch.margin - self.lam * penalty))  # eq. 3
