"""RPO (Liu et al.): DPO plus a likelihood term on a baseline response, which keeps log pi(chosen) from falling."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class RPO(Objective):
    """DPO with weight on the baseline response's log-probability."""

    card = Card(
        name="rpo",
        title="Regularized Preference Optimization",
        paper="Liu et al. 2024, arXiv:2405.16436",
        equation="eq. 4.8; mean form: appendix F",
        formula="-log sigmoid(beta m) - eta beta s_0; form=mean: ... - eta s_0/T_0 (no beta); "
        "s_0 = log pi of the chosen (or given) response",
        normalisation="sum over tokens; form=mean averages the likelihood term over the baseline's own tokens",
        also_needs="length with form=mean; calibration (and calibration_length with form=mean) with baseline=given",
        bradley_terry=True,
        optimum="no closed form; at the minimiser the DPO gradient in logits is eta beta (base - pi), base = the "
        "baseline's distribution",
        bounds="|dL/ds_w| >= eta beta at every margin (sum form, baseline=chosen); loss >= 0 while log-probs <= 0",
        verified="coefficient, forms and defaults against the paper and the authors' repository; golden values "
        "derived",
        pitfalls=(
            "The sum form weighs a response by its length: log eta beta mean(T_w).",
            "form=mean uses eta without beta: the authors' 0.2 there is not their 0.005 of the sum form.",
            "The value at policy == reference is log 2 - eta beta s_ref, not log 2.",
        ),
        collisions=(
            "TRL's former rpo_alpha is Iterative RPO (Pang et al.): token-mean NLL, recommended weight 1.",
            "NVIDIA's RPO is `reward_aware_rpo`; Relative PO, Robust PO and Reward Partitioning Optimization "
            "(arXiv:2506.13702) are others again.",
        ),
        settings=(
            {"form": "mean", "eta": 0.2},
            {"beta": 0.1, "eta": 0.05},
            {"baseline": "given"},
            {"baseline": "given", "form": "mean"},
        ),
    )
    beta: float = hyper("inverse scale of the margin", default=0.01, gt=0, source="paper, beta series")
    eta: float = hyper(
        "weight of the likelihood term; times beta in the sum form",
        default=0.005,
        ge=0,
        source="paper (chosen on the test split there)",
    )
    form: Literal["sum", "mean"] = hyper(
        "likelihood term summed or averaged over tokens", default="sum", source="paper"
    )
    baseline: Literal["chosen", "given"] = hyper(
        "response of the likelihood term: the chosen one or the column `calibration`", default="chosen", source="paper"
    )

    @property
    def needs(self) -> tuple[str, ...]:
        if self.baseline == "chosen":
            return ("reference", "length") if self.form == "mean" else ("reference",)
        return ("reference", "calibration", "calibration_length")[: 3 if self.form == "mean" else 2]

    def pair_loss(self, batch: PairLogps) -> Tensor:
        column = "chosen" if self.baseline == "chosen" else "calibration"
        likelihood = self.beta * batch.column(column)
        if self.form == "mean":
            likelihood = batch.column(column) / batch.column(f"{column}_length")  # appendix F: no beta
        return -F.logsigmoid(self.beta * batch.margin) - self.eta * likelihood  # eq. 4.8
