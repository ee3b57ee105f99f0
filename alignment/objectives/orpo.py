"""ORPO: supervised fine-tuning on the chosen response plus a log-odds-ratio penalty; no reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.objectives.base import Card, Objective, hyper
from alignment.objectives.batch import PairLogps
from alignment.objectives.registry import register


def log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p) for log p <= 0, `[B]`; log p is kept one rounding step below 0, where the odds diverge."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


@register
class ORPO(Objective):
    """Mean negative log-likelihood of chosen plus lam times the odds-ratio loss."""

    card = Card(
        name="orpo",
        title="Odds Ratio Preference Optimization",
        paper="Hong, Lee, Thorne 2024, arXiv:2403.07691",
        equation="eqs. 6 and 7 (numbers from memory)",
        formula="-s_w/T_w - lam log sigmoid(log odds_w - log odds_l),  odds = p/(1-p),  p = exp(s/T)",
        normalisation="mean over tokens, in the odds and in the NLL; the NLL is per sequence",
        needs=("length",),
        start="none",
        reward="log odds of the length-averaged probability",
        bradley_terry=True,
        optimum=None,
        bounds="loss >= 0 for log-probabilities <= 0",
        verified="odds term and lam = 0.1 against TRL's ORPO trainer; the per-sequence mean of the NLL is the paper's "
        "as remembered (TRL pools the tokens of a batch)",
        pitfalls=(
            "p is the geometric mean of token probabilities, not the probability of the response.",
            "Meant to start from a base model: it is the SFT stage as well.",
            "Log-probabilities above -1e-7 per token (p = 1 in float32) get no gradient from the odds.",
        ),
        collisions=("TRL calls lam `beta`.",),
        settings=({"lam": 1.0}, {"lam": 0.0}),
    )
    lam: float = hyper("weight of the odds-ratio term", default=0.1, ge=0, source="paper (Mistral), TRL's default")

    def pair_loss(self, batch: PairLogps) -> Tensor:
        chosen, rejected = self.pair_rewards(batch)
        nll = -batch.chosen / batch.column("chosen_length")
        return nll - self.lam * F.logsigmoid(chosen - rejected)  # eqs. 6 and 7

    def pair_rewards(self, batch: PairLogps) -> tuple[Tensor, Tensor]:
        chosen = log_odds(batch.chosen / batch.column("chosen_length"))
        return chosen, log_odds(batch.rejected / batch.column("rejected_length"))
