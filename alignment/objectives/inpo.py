"""INPO's loss: one step of online mirror descent towards the Nash policy, as a regression on pairs."""

from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class INPO(Objective):
    """IPO against a geometric mixture of the reference and the previous iterate."""

    card = Card(
        name="inpo",
        title="Iterative Nash Policy Optimization (the loss of one iteration)",
        paper="Zhang et al. 2024, arXiv:2407.00617",
        equation="loss L_t with h_t (number not checked)",
        formula="(h - 1/(2 eta))^2,  h = (s_w - s_l) - (tau/eta)(ref_w - ref_l) - (1 - tau/eta)(prev_w - prev_l)",
        needs=("reference", "previous"),
        start="previous",
        reward="eta (s - (tau/eta) ref - (1 - tau/eta) prev): its margin is regressed on 1/2",
        optimum="pi* ~ exp(P(y beats prev)/eta) ref^(tau/eta) prev^(1-tau/eta) for independent pairs from prev",
        bounds="loss >= 0; slope grows linearly with h",
        verified="formula, defaults and optimum against the paper; golden value and slopes derived",
        pitfalls=(
            "The target is 100 nats at eta = 0.005: the first loss is 1e4 and its slope 200. Clip gradients; no fp16.",
            "Swapping previous and reference is invisible in the first iteration, where they coincide.",
            "Best-of-K against worst-of-K pairs are not independent draws: a larger, biased step.",
        ),
        collisions=("eta is the INVERSE step here; sppo's and gpo's is the step, rpo's a likelihood weight.",),
        settings=({"eta": 0.5, "tau": 0.2}, {"eta": 0.1, "tau": 0.0}, {"eta": 0.1, "tau": 0.1}),
    )
    eta: float = hyper("inverse step size; the target is 1/(2 eta)", default=0.005, gt=0, source="paper, grid search")
    tau: float | None = hyper(
        "KL weight to the reference, in [0, eta]; None is eta/3", default=None, ge=0, source="paper: eta/3"
    )

    def resolve(self) -> None:
        if self.tau is None:
            self.set_derived("tau", self.eta / 3)
        elif self.tau > self.eta:
            self.refuse(f"tau must be in [0, eta] = [0, {self.eta:g}], got {self.tau!r}")

    def _ratios(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        """Log-ratios of chosen and rejected to the mixture ref^(tau/eta) prev^(1 - tau/eta)."""
        share = (self.tau or 0.0) / self.eta
        chosen = share * batch.column("ref_chosen") + (1 - share) * batch.column("prev_chosen")
        rejected = share * batch.column("ref_rejected") + (1 - share) * batch.column("prev_rejected")
        return batch.chosen - chosen, batch.rejected - rejected

    def pair_loss(self, batch: PairLogps) -> Tensor:
        chosen, rejected = self._ratios(batch)
        return (chosen - rejected - 1 / (2 * self.eta)) ** 2  # L_t

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._ratios(batch)
        return self.eta * chosen, self.eta * rejected
