"""NVIDIA's reward-aware preference optimization: match the implicit reward gap to a reward model's gap."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


def bernoulli_kl(logit_p: Tensor, logit_q: Tensor) -> Tensor:
    """KL(Bern(sigmoid(p)) || Bern(sigmoid(q))) from logits, finite for any finite logits."""
    yes = logit_p.sigmoid() * (F.logsigmoid(logit_p) - F.logsigmoid(logit_q))
    return yes + (-logit_p).sigmoid() * (F.logsigmoid(-logit_p) - F.logsigmoid(-logit_q))


@register
class RewardAwareRPO(Objective):
    """Distance between beta times the margin and the scaled reward gap."""

    card = Card(
        name="reward_aware_rpo",
        title="Reward-aware Preference Optimization (NVIDIA)",
        paper="Adler et al. 2024 (Nemotron-4), arXiv:2406.11704; NeMo-Aligner",
        equation="Nemotron-4 section on RPO: bwd_kl (from memory); the three forms as in NeMo-Aligner",
        formula="distance of m' = beta m from D = scale (r_w - r_l); sq: (m' - D)^2; bwd_kl: KL(Bern(sigmoid D) || "
        "Bern(sigmoid m')); fwd_kl: KL(Bern(sigmoid m') || Bern(sigmoid D))",
        needs=("reference", "reward"),
        optimum="pi* ~ ref exp(scale r/beta), every form, whatever the pair weights; the loss there is 0",
        bounds="loss >= 0, and 0 only at m' = D; fwd_kl <= softplus(|D|); bwd_kl slope in m' within [-1, 1]",
        verified="forms and defaults against NeMo-Aligner's code; golden values and optimum derived",
        pitfalls=(
            "NeMo's forward and backward are the reverse of 'target first': bwd_kl has the reward model first.",
            "fwd_kl has vanishing gradient once sigmoid(m') saturates on the wrong side.",
            "A pair whose 'chosen' has the lower reward is pushed the other way: by design.",
        ),
        collisions=("`rpo` is Liu et al.'s; both are called RPO.",),
        settings=({"form": "sq"}, {"form": "fwd_kl", "beta": 0.1, "scale": 2.0}),
    )
    beta: float = hyper("KL penalty: scale of the implicit reward", default=0.2, gt=0, source="NeMo-Aligner")
    scale: float = hyper("factor on the reward gap", default=1.0, gt=0, source="NeMo-Aligner")
    form: Literal["sq", "bwd_kl", "fwd_kl"] = hyper(
        "distance between the two gaps", default="bwd_kl", source="Nemotron-4's distance (from memory)"
    )

    def pair_loss(self, batch: PairLogps) -> Tensor:
        gap = self.beta * batch.margin
        target = self.scale * (batch.column("reward_chosen") - batch.column("reward_rejected")).to(gap.dtype)
        if self.form == "sq":
            return (gap - target) ** 2  # rpo_sq
        return bernoulli_kl(target, gap) if self.form == "bwd_kl" else bernoulli_kl(gap, target)  # rpo_bwd/fwd_kl
