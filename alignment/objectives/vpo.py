"""VPO: DPO with optimism (online) or pessimism (offline) about the value, through a calibration response."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


@register
class VPO(Objective):
    """DPO plus (online) or minus (offline) alpha beta times the calibration response's log-ratio."""

    card = Card(
        name="vpo",
        title="Value-Incentivized Preference Optimization",
        paper="Cen et al. 2024, arXiv:2405.19320",
        equation="loss of algorithms 1 (online) and 2 (offline), re-derived; the paper's body was not read",
        formula="-log sigmoid(beta m) +/- alpha beta z_cal; + online, - offline; z_cal: z of the calibration response",
        also_needs="calibration and ref_calibration with calibration=given (the default online)",
        bradley_terry=True,
        optimum="no closed form; at a stationary point the DPO gradient in logits is alpha beta (cal - pi) offline "
        "and alpha beta (pi - cal) online",
        bounds="online: UNBOUNDED BELOW in the calibration log-probability; offline: bounded below while "
        "log-probabilities are <= 0",
        verified="re-derived from the abstract's regulariser; sign checked against TRL's XPO; alpha is ours",
        pitfalls=(
            "Online: keep alpha beta near 1e-6 to 1e-4 per summed log-probability, stop when log pi(calibration) runs "
            "away, and shrink alpha over iterations.",
            "alpha is relative to the mean over pairs (our choice); the theory's loss is a sum over pairs.",
            "The term sums over tokens, so that long calibration responses weigh more.",
        ),
        collisions=("alpha here is neither f_dpo's order nor XPO's alpha: alpha_XPO = alpha beta.",),
        settings=(
            {"alpha": 0.05, "calibration": "rejected"},
            {"calibration": "given"},
            {"mode": "online", "alpha": 0.01},
            {"mode": "online", "calibration": "rejected"},
        ),
    )
    beta: float = hyper("inverse scale of the margin", default=0.1, gt=0, source="our choice; not seen in the paper")
    alpha: float = hyper(
        "weight of the value term",
        default=0.005,
        ge=0,
        source="our choice: rpo's eta, which it equals offline with calibration=chosen",
    )
    mode: Literal["offline", "online"] = hyper("pessimism (-) or optimism (+)", default="offline", source="paper")
    calibration: Literal["chosen", "rejected", "given"] | None = hyper(
        "response whose reward is pinned to 0 on average; None is chosen offline and given online",
        default=None,
        source="offline: the paper's experiments, from memory",
    )

    def resolve(self) -> None:
        if self.calibration is None:
            self.set_derived("calibration", "chosen" if self.mode == "offline" else "given")

    @property
    def needs(self) -> tuple[str, ...]:
        given = ("calibration", "ref_calibration") if self.calibration == "given" else ()
        return ("reference", *given)

    def _calibration_ratio(self, batch: PairLogps) -> Tensor:
        if self.calibration == "given":
            return batch.column("calibration") - batch.column("ref_calibration")
        return batch.log_ratio_chosen if self.calibration == "chosen" else batch.log_ratio_rejected

    def pair_loss(self, batch: PairLogps) -> Tensor:
        sign = 1.0 if self.mode == "online" else -1.0
        value = self.alpha * self.beta * self._calibration_ratio(batch)  # -alpha J*(r); its s_ref part is constant
        return -F.logsigmoid(self.beta * batch.margin) + sign * value  # algorithms 1 and 2
