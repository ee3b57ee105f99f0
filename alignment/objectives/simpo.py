"""SimPO: reference-free logistic loss on length-averaged log-probabilities with a target margin."""

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class SimPO(Objective):
    """Length-averaged log-probabilities, margin gamma, no reference."""

    card = Card(
        name="simpo",
        title="Simple Preference Optimization",
        paper="Meng, Xia, Chen 2024, arXiv:2405.14734",
        equation="eq. 6 (number from memory)",
        formula="-log sigmoid(beta s_w/T_w - beta s_l/T_l - gamma)",
        normalisation="mean over tokens",
        needs=("length",),
        start="none",
        reward="beta s/T",
        optimum="equal lengths T: pi* ~ exp(T r/beta) at gamma = 0; for gamma > 0 known for two responses only, from "
        "P sigmoid(gamma - d) = (1-P) sigmoid(gamma + d), d = beta (s_w - s_l)/T",
        bounds="loss >= 0; |dL/ds| <= beta/T",
        verified="formula and meaning of gamma against TRL's CPO trainer (loss_type simpo) and the authors' README; "
        "equation number from memory",
        pitfalls=(
            "gamma is the raw margin; the authors' scripts set gamma/beta (0.25 to 0.5): gamma = ratio * beta.",
            "Nothing ties the policy to its start: a large learning rate gives repetitive or broken text.",
        ),
        settings=({"beta": 10.0, "gamma": 3.0}, {"gamma": 0.0}),
    )
    beta: float = hyper(
        "scale of the averaged log-probabilities", default=2.0, gt=0, source="authors: 2.0 to 2.5, or 10"
    )
    gamma: float = hyper(
        "raw target margin, not divided by beta",
        default=1.0,
        ge=0,
        source="authors' first gamma/beta, 0.5, from memory",
    )

    def pair_loss(self, batch: PairLogps) -> Tensor:
        chosen, rejected = self.pair_rewards(batch)
        return -F.logsigmoid(chosen - rejected - self.gamma)  # eq. 6

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        chosen = self.beta * batch.chosen / batch.column("chosen_length")
        return chosen, self.beta * batch.rejected / batch.column("rejected_length")
