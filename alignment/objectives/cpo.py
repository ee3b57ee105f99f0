"""CPO: DPO with a uniform reference plus a likelihood term on the chosen response."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class CPO(Objective):
    """Logistic loss on plain log-probabilities plus negative log-likelihood of chosen."""

    card = Card(
        name="cpo",
        title="Contrastive Preference Optimization",
        paper="Xu et al. 2024, arXiv:2401.08417",
        equation="L_prefer + L_NLL (numbers not checked)",
        formula="-log sigmoid(beta (s_w - s_l)) - nll_weight s_w; form=mean: ... - nll_weight s_w/T_w",
        normalisation="sum over tokens in both terms; form=mean averages the NLL over the response's own tokens",
        needs=(),
        also_needs="length with form=mean",
        start="none",
        reward="beta s",
        bradley_terry=True,
        optimum="no closed form; it is rpo with a uniform reference and eta = nll_weight/beta (sum form), so the "
        "gradient of the logistic part in logits is nll_weight (base - pi) there, base: distribution of chosen",
        bounds="loss >= 0 for log-probabilities <= 0; |dL/ds_l| <= beta",
        verified="logistic part and beta against TRL's CPO trainer; the paper's L_NLL as a sequence sum is from "
        "memory (TRL pools the tokens of a batch: use form=mean to be near it)",
        pitfalls=(
            "In the sum form with weight 1 the likelihood term outweighs the preference term (slopes 1, beta/2).",
        ),
        settings=({"form": "mean"}, {"nll_weight": 0.0}, {"beta": 0.5, "nll_weight": 0.2}),
    )
    beta: float = hyper(
        "scale of the log-probability gap", default=0.1, gt=0, source="paper from memory; TRL's default"
    )
    nll_weight: float = hyper("weight of the likelihood term", default=1.0, ge=0, source="paper; TRL's cpo_alpha")
    form: Literal["sum", "mean"] = hyper(
        "NLL summed or averaged over tokens", default="sum", source="paper from memory"
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("length",) if self.form == "mean" else ()

    def pair_loss(self, batch: PairLogps) -> Tensor:
        nll = -batch.chosen if self.form == "sum" else -batch.chosen / batch.column("chosen_length")
        return -F.logsigmoid(self.beta * (batch.chosen - batch.rejected)) + self.nll_weight * nll  # L_prefer + L_NLL
