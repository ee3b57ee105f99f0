"""Nash-MD-PG: REINFORCE on winning against a mixture, with the KL to the reference inside the reward."""

from typing import Literal

from torch import Tensor

from alignment.objectives.base import Card, hyper
from alignment.objectives.on_policy import SampleObjective
from alignment.objectives.registry import register
from alignment.objectives.samples import SamplePairs


@register
class NashMDPG(SampleObjective):
    """Policy gradient of P(pi > mixture) - beta KL(pi || ref), averaged over two samples."""

    card = Card(
        name="nash_md_pg",
        title="Nash-MD-PG: policy gradient against a geometric mixture of policy and reference",
        paper="Munos et al. 2023, arXiv:2312.00886",
        equation="REINFORCE form derived here; the paper's body was not read",
        formula="-(A1 s1 + A2 s2)/2,  A_i = sg[P(y_i > y'') - 1/2 - beta z_i]; y'': a sample of pi^(1-c) ref^c",
        normalisation="sum over tokens, or mean over tokens (`normalization`)",
        needs=("reference", "preference"),
        also_needs="length with normalization=mean",
        judge="oracle",
        optimum="with a constant c a fixed point solves z = P(y > mixture)/beta + const: near the Nash policy, not it",
        bounds="none: the value means nothing, its slopes are -A_i/2; with samples of pi its mean's gradient is the "
        "exact policy gradient",
        verified="the expected gradient against finite differences of pi'Pq - beta KL(pi || ref) by enumeration; the "
        "difference from TRL's former trainer read in its code",
        pitfalls=(
            "The KL's gradient is the whole sequence's: z(y) times grad s(y). TRL's NashMDTrainer (removed by now) "
            "summed (z of one token) times (grad of the same token), which leaves out how early tokens change the KL "
            "of later ones; both agree for responses of one token.",
            "1/2 is a baseline only: it changes the variance, not the mean gradient.",
            "Both samples must come from the policy itself (temperature 1, untruncated), drawn anew for each step.",
            "normalization=mean divides z and s by the length, so it is no longer the gradient of that value. Our "
            "choice, by analogy with the regressions.",
        ),
        collisions=("nash_md is the regression against the same opponent.",),
        settings=({"normalization": "mean"}, {"beta": 1.0}),
    )
    beta: float = hyper("weight of the KL to the reference", default=0.1, gt=0, source="as egpo's")
    normalization: Literal["sum", "mean"] = hyper(
        "log-probabilities of a response: sum or mean over its tokens", default="sum", source="policy gradient"
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.card.needs, *(("length",) if self.normalization == "mean" else ()))

    def _lengths(self, batch: SamplePairs) -> tuple[Tensor | float, Tensor | float]:
        if self.normalization == "sum":
            return 1.0, 1.0
        return batch.column("first_length"), batch.column("second_length")

    def _advantages(self, batch: SamplePairs) -> tuple[Tensor, Tensor]:
        """A_i = sg[P(y_i > y'') - 1/2 - beta z_i], `[B]` each."""
        first, second = self._lengths(batch)
        z1, z2 = (batch.log_ratio_first / first).detach(), (batch.log_ratio_second / second).detach()
        above = batch.column("preference_first") - 0.5, batch.column("preference_second") - 0.5
        return above[0] - self.beta * z1, above[1] - self.beta * z2

    def sample_loss(self, batch: SamplePairs) -> Tensor:
        first, second = self._lengths(batch)
        advantage_first, advantage_second = self._advantages(batch)
        return -(advantage_first * batch.first / first + advantage_second * batch.second / second) / 2

    def sample_statistics(self, batch: SamplePairs) -> dict[str, Tensor]:
        """`advantage` (of either sample, their mean), `preference` P(y > y'') likewise and `kl`, the mean z."""
        advantage_first, advantage_second = self._advantages(batch)
        return {
            "advantage": (advantage_first + advantage_second) / 2,
            "preference": (batch.column("preference_first") + batch.column("preference_second")) / 2,
            "kl": (batch.log_ratio_first + batch.log_ratio_second) / 2,
        }
