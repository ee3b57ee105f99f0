"""GPO's loss: one step of policy optimisation against a general preference model, as SPPO's with log-odds."""

from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register
from alignment.objectives.sppo import regressed


@register
class GPO(Objective):
    """Each log-ratio to the policy that sampled is regressed on its response's mean log-odds of winning."""

    card = Card(
        name="gpo",
        title="General Preference Optimization (the loss of one iteration)",
        paper="Zhang et al. 2024, arXiv:2410.02197",
        equation="GPO's update with log Z ~ 0 (number not checked), on the two responses that the released data keep",
        formula="[(z_w - eta S_w)^2 + (z_l - eta S_l)^2]/2; S_y = mean over pi_t's y' of s(y > y')/tau,  z to pi_t",
        needs=("reference", "log_odds"),
        reward="z/eta: regressed on S",
        bounds="loss >= 0; a response's slope grows linearly with its own z and does not read the other's",
        verified="update, S and step as our specification quotes the paper; that best and worst are kept, against the "
        "authors' code that prepares the data. The loss's own code is not released. LN-GPO (a division by |y|^gamma) "
        "is left out: of what is not clear to us",
        pitfalls=(
            "The reference IS pi_t, the policy that sampled the pairs: `reference: previous` in `alignment iterate`.",
            "eta = 1000 times log-odds asks for thousands of nats: clip gradients, small rate, no fp16, stop early.",
            "Log-odds are infinite where an oracle answers 0 or 1: such pairs have no log_odds_chosen; sppo reads P.",
            "Their preprocessing takes table[i][j] - table[j][i] of a skew table: twice the log-odds, a doubled eta.",
            "log Z ~ 0 is an approximation: it is near eta^2 var(S)/2, so no policy meets all targets exactly.",
            "Which response is called chosen does not matter, so labels and label noise do nothing: S is the label.",
        ),
        collisions=(
            "eta is the step, as sppo's; INPO's is the INVERSE step. The paper's beta is 1/eta, and also its tau.",
            "GPO also names Generalized (Tang et al. 2024) and Group Preference Optimization.",
        ),
        settings=({"eta": 2.0}, {"eta": 20.0}),
    )
    eta: float = hyper("step size; the target is eta S", default=1000.0, gt=0, source="released: 1/eta = 1e-3")

    def pair_loss(self, batch: PairLogps) -> Tensor:
        return regressed(  # L with log Z ~ 0
            batch, self.eta * batch.column("log_odds_chosen"), self.eta * batch.column("log_odds_rejected")
        )

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        return batch.log_ratio_chosen / self.eta, batch.log_ratio_rejected / self.eta
