"""IPO: regress the margin of log-ratios on a constant."""

from typing import Literal

from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class IPO(Objective):
    """Squared distance of the margin from 1/(2 tau)."""

    card = Card(
        name="ipo",
        title="Identity Preference Optimization",
        paper="Azar et al. 2023, arXiv:2310.12036",
        equation="eq. 17",
        formula="(m - 1/(2 tau))^2; normalization=mean: m = z_w/T_w - z_l/T_l",
        normalisation="sum over tokens (default) or mean over tokens",
        also_needs="length with normalization=mean",
        reward="tau z (tau z/T in the mean form)",
        optimum="pi* ~ ref exp(P(y beats mu)/tau) for pairs drawn independently from mu (sum form)",
        bounds="loss >= 0; slope grows linearly with m",
        verified="sum form against the DPO authors' repository, mean form and equation number against TRL, which "
        "says that the IPO authors confirmed it",
        pitfalls=(
            "The two forms differ by a factor of about T in the natural scale of tau: quote the form with every tau.",
            "The target margin is 1/(2 tau) nats however strong the preference: 5 nats at tau = 0.1.",
        ),
        settings=({"normalization": "mean"}, {"tau": 0.5}),
    )
    tau: float = hyper("KL weight; the target margin is 1/(2 tau)", default=0.1, gt=0, source="TRL's default beta")
    normalization: Literal["sum", "mean"] = hyper(
        "log-ratios summed or averaged over tokens", default="sum", source="paper; mean is TRL's"
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference", "length") if self.normalization == "mean" else ("reference",)

    def _ratios(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        if self.normalization == "sum":
            return batch.log_ratio_chosen, batch.log_ratio_rejected
        lengths = batch.column("chosen_length"), batch.column("rejected_length")
        return batch.log_ratio_chosen / lengths[0], batch.log_ratio_rejected / lengths[1]

    def pair_loss(self, batch: PairLogps) -> Tensor:
        chosen, rejected = self._ratios(batch)
        return (chosen - rejected - 1 / (2 * self.tau)) ** 2  # eq. 17

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._ratios(batch)
        return self.tau * chosen, self.tau * rejected
