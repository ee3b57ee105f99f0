"""DPO and, with label smoothing, conservative DPO (cDPO)."""

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class DPO(Objective):
    """Logistic loss on the margin of log-ratios."""

    card = Card(
        name="dpo",
        title="Direct Preference Optimization; label_smoothing > 0 is conservative DPO (cDPO)",
        paper="Rafailov et al. 2023, arXiv:2305.18290; cDPO: Mitchell, note of Nov 2023",
        equation="DPO eq. 7; cDPO eq. 3 of the note (number from memory)",
        formula="-(1-e) log sigmoid(beta m) - e log sigmoid(-beta m),  m = z_w - z_l,  e = label_smoothing",
        bradley_terry=True,
        optimum="pi* ~ ref exp(r/beta) for Bradley-Terry labels with reward r, for any pair weights. cDPO reaches "
        "it where its smoothed labels (1-e)P + e(1-P) are Bradley-Terry in r; for one pair, beta m = logit of that",
        bounds="loss >= binary entropy of e (0 at e = 0); |dL/ds| <= beta",
        verified="formula and beta's range against the authors' repository; slopes and golden values derived by hand",
        pitfalls=(
            "log pi(chosen) usually falls while margin and accuracy rise: watch displacement, or use rpo, vpo, dpop.",
            "TRL >= 0.29 ignores label_smoothing for its sigmoid loss; here it acts.",
        ),
        settings=({"label_smoothing": 0.1}, {"beta": 0.5}),
    )
    beta: float = hyper(
        "inverse scale of the margin: the KL weight of the implied reward",
        default=0.1,
        gt=0,
        source="the authors suggest 0.1 to 0.5; TRL's default",
    )
    label_smoothing: float = hyper(
        "assumed share of flipped labels", default=0.0, ge=0, lt=0.5, source="authors' repo"
    )

    def pair_loss(self, batch: PairLogps) -> Tensor:
        logit, eps = self.beta * batch.margin, self.label_smoothing
        return -(1 - eps) * F.logsigmoid(logit) - eps * F.logsigmoid(-logit)  # DPO eq. 7; cDPO eq. 3

    def label_probability(self, sigmoid: Tensor) -> Tensor:
        """P(label as given), `[B]`, from the smoothed label e + (1 - 2e) P that sigmoid(beta m) is fitted to."""
        return ((sigmoid - self.label_smoothing) / (1 - 2 * self.label_smoothing)).clamp(0, 1)
