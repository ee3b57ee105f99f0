"""f-DPO: DPO with another divergence than reverse KL to the reference; slopes bounded by a linear extension."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register

CAP = 10.0  # e^10 = 22026 is the largest slope of the score; beyond, the score goes on linearly


def capped_expm1(x: Tensor) -> Tensor:
    """e^x - 1 up to x = CAP, then its tangent: continuous with continuous slope, never above e^CAP."""
    return torch.expm1(x.clamp(max=CAP)) + math.exp(CAP) * F.relu(x - CAP)


@register
class FDPO(Objective):
    """DPO on f'(pi/ref) instead of log(pi/ref)."""

    card = Card(
        name="f_dpo",
        title="f-DPO: direct preference optimization with diverse divergence constraints",
        paper="Wang et al. 2023, arXiv:2309.16240",
        equation="the f-DPO loss with f' of its table 1 (numbers not checked); linear extension: ours",
        formula="-log sigmoid(beta (S(z_w) - S(z_l))), S = f' shifted to S(0) = 0; reverse_kl: z; jsd: log sigmoid(z) "
        "+ log 2; alpha: (1 - e^(-alpha z))/alpha; forward_kl: 1 - e^(-z); e^x continued linearly beyond x = 10",
        reward="beta S(z): the constant f'(1) is dropped, so that the reward is 0 at the reference",
        bradley_terry=True,
        optimum="beta f'(pi*/ref) = r - lambda for Bradley-Terry labels with reward r, lambda from sum pi* = 1 "
        "(while no exponent passes 10)",
        bounds="loss >= 0; |dL/ds| <= beta e^10 (alpha, forward_kl), beta (reverse_kl, jsd)",
        verified="scores and TRL's conventions against their code, optimum derived; the paper was not read",
        pitfalls=(
            "forward_kl and alpha take the exponential of a sequence log-ratio: chosen responses that the policy left "
            "(z << 0) get slopes up to beta e^10, so use a small beta and gradient clipping; `capped` counts "
            "them, but also pairs of which only the rejected response was left, as it should be.",
            "jsd starts with half of DPO's slope: beta_jsd = 2 beta_dpo gives the same first step.",
            "The limits alpha = 0 and 1 are reverse_kl and forward_kl, by name only.",
        ),
        collisions=("TRL >= 0.29 calls 1 - alpha f_alpha_divergence_coef; up to 0.28 it is alpha as here.",),
        settings=(
            {"divergence": "jsd"},
            {"divergence": "forward_kl"},
            {"divergence": "alpha", "alpha": 0.3},
            {"divergence": "alpha", "alpha": 0.7},
        ),
    )
    beta: float = hyper("inverse scale of the score gap", default=0.1, gt=0, source="authors' scripts: 0.03 to 0.9")
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "alpha"] = hyper(
        "penalty against the reference", default="reverse_kl", source="our choice: it is dpo"
    )
    alpha: float | None = hyper(
        "order of the alpha-divergence in the paper's sense; needed with divergence=alpha, refused otherwise",
        default=None,
        gt=0,
        lt=1,
        source="paper: 0.3, 0.5, 0.7",
    )

    def resolve(self) -> None:
        if (self.divergence == "alpha") != (self.alpha is not None):
            verb = "needs alpha in (0, 1)" if self.alpha is None else f"does not read alpha, got {self.alpha!r}"
            self.refuse(f"divergence={self.divergence!r} {verb}")

    @property
    def _order(self) -> float:
        """Exponent of the score: alpha, 1 for forward KL (the alpha -> 1 limit), 0 where there is none."""
        return 1.0 if self.divergence == "forward_kl" else self.alpha or 0.0

    def score(self, log_ratio: Tensor) -> Tensor:
        """S(z), `[B]`: f'(e^z) - f'(1)."""
        if self.divergence == "reverse_kl":
            return log_ratio  # f = u log u
        if self.divergence == "jsd":
            return F.logsigmoid(log_ratio) + math.log(2)  # f' = log(2u/(1+u))
        return -capped_expm1(-self._order * log_ratio) / self._order  # f' = (1 - u^-alpha)/alpha; alpha = 1: -1/u

    def pair_loss(self, batch: PairLogps) -> Tensor:
        gap = self.score(batch.log_ratio_chosen) - self.score(batch.log_ratio_rejected)
        return -F.logsigmoid(self.beta * gap)  # f-DPO loss

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        return self.beta * self.score(batch.log_ratio_chosen), self.beta * self.score(batch.log_ratio_rejected)

    def capped(self, batch: PairLogps) -> Tensor:
        """`[B]` bool: either response is beyond the start of the linear extension, where the slope stays beta e^c."""
        lowest = torch.minimum(batch.log_ratio_chosen, batch.log_ratio_rejected).detach()
        return -self._order * lowest > CAP
