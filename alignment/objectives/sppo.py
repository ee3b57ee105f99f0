"""SPPO's loss: one multiplicative-weights step towards the Nash policy, as a regression on each response."""

from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


def regressed(batch: PairLogps, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean over a pair's responses of (z - target)^2 with the targets `chosen` and `rejected`, `[B]` nats each."""
    off_chosen = batch.log_ratio_chosen - chosen.to(batch.chosen.dtype)
    off_rejected = batch.log_ratio_rejected - rejected.to(batch.rejected.dtype)
    return (off_chosen**2 + off_rejected**2) / 2


@register
class SPPO(Objective):
    """Each log-ratio to the policy that sampled is regressed on how much better than 1/2 its response does."""

    card = Card(
        name="sppo",
        title="Self-Play Preference Optimization (the loss of one iteration)",
        paper="Wu et al. 2024, arXiv:2405.00675",
        equation="loss of an iteration (number not checked); uclaml/SPPO sppo/trainer.py, loss_type sppo",
        formula="[(z_w - eta (P_w - 1/2))^2 + (z_l - eta (P_l - 1/2))^2]/2; P_y = P(y beats pi_t),  z to pi_t",
        needs=("reference", "preference"),
        reward="z/eta: regressed on P - 1/2",
        bounds="loss >= 0; a response's slope grows linearly with its own z and does not read the other's",
        verified="loss, step and the sample's own 1/2 in P against the authors' released code; the paper was not read",
        pitfalls=(
            "The reference IS pi_t, the policy that sampled the pairs: `reference: previous` in `alignment iterate`. "
            "Against a fixed reference it is another method from the second iteration on.",
            "eta = 1000 asks for up to 500 nats of every response: the first loss is about 1e5. Clip gradients, small "
            "rate, no fp16, and stop early: the target is not meant to be reached.",
            "log Z ~ 0 is an approximation: it is near eta^2 var(P)/2, so no policy meets all targets exactly.",
            "Which response is called chosen does not matter, so labels and label noise do nothing: P is the label.",
            "P among K samples counts the sample itself, as 1/2; without it every target is K/(K - 1) times larger.",
        ),
        collisions=(
            "eta is the step here; INPO's is the INVERSE step, EGPO's a step of a parameter update.",
            "The released code's beta is 1/eta = 0.001.",
            "`spo` is an unrelated method.",
        ),
        settings=({"eta": 2.0}, {"eta": 20.0}),
    )
    eta: float = hyper("step size; the target is eta (P - 1/2)", default=1000.0, gt=0, source="released: 1/eta = 1e-3")

    def pair_loss(self, batch: PairLogps) -> Tensor:
        better = [batch.column(f"preference_{response}") - 0.5 for response in ("chosen", "rejected")]
        return regressed(batch, self.eta * better[0], self.eta * better[1])  # loss_type sppo

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        return batch.log_ratio_chosen / self.eta, batch.log_ratio_rejected / self.eta
