"""Rewards that are log-probabilities of a reference answer after a sampled chain of thought, and a verifier's beside.

The reward depends on the policy, so its own gradient is part of the objective's (`answer_grad`). A sample without the
answer's form has no reference answer behind it: `malformed` says whether it is left out or counts with reward 0.
"""

from typing import Literal

import torch
from torch import Tensor

from alignment.objectives.base import Card, Judge, hyper
from alignment.objectives.on_policy import GroupObjective
from alignment.objectives.registry import register
from alignment.objectives.samples import GroupLogps

INFINITE = float("inf")


def leave_one_out(rewards: Tensor, kept: Tensor) -> Tensor:
    """RLOO: each reward minus the mean of the others in its group, `[B, G]`; 0 where not kept or nothing is left.

    Args:
        rewards: `[B, G]`; read only where kept.
        kept: `[B, G]` bool.
    """
    read = torch.where(kept, rewards, 0.0)
    others = (kept.sum(1, keepdim=True) - 1).clamp(min=1)
    advantage = read - (read.sum(1, keepdim=True) - read) / others
    return torch.where(kept & (kept.sum(1, keepdim=True) >= 2), advantage, 0.0)


def log_mean_exp(values: Tensor, kept: Tensor) -> Tensor:
    """log of the mean of e^values over those kept in the last dimension, `[...]`; 0 where none is kept.

    Args:
        values: `[..., G]`; read only where kept.
        kept: `[..., G]` bool.
    """
    some = kept.any(-1, keepdim=True)
    finite = torch.where(some, torch.where(kept, values, -INFINITE), 0.0)  # a row of -inf would have a NaN slope
    count = kept.sum(-1).clamp(min=1)
    return torch.where(some.squeeze(-1), finite.logsumexp(-1) - count.to(values.dtype).log(), 0.0)


def log_mean_exp_advantage(values: Tensor, kept: Tensor) -> Tensor:
    """A_i = lme(all kept) - lme(all kept but i), `[B, G]`, detached; 0 where not kept or nothing is left.

    The diagonal is removed before the sum: subtracting e^(values_i) from it would cancel where one value dominates.
    """
    read = torch.where(kept, values.detach(), -INFINITE)
    top = torch.where(kept.any(1, keepdim=True), read.amax(1, keepdim=True), 0.0)
    read = read - top  # A does not change, and its digits are kept
    size = kept.shape[1]
    others = kept[:, None, :] & ~torch.eye(size, dtype=torch.bool, device=kept.device)  # [B, i, j != i]
    without = log_mean_exp(read[:, None, :].expand(-1, size, -1), others)
    advantage = log_mean_exp(read, kept)[:, None] - without
    return torch.where(kept & others.any(-1), advantage, 0.0)


@register
class Likelihood(GroupObjective):
    """RLOO on a log-probability reward plus the reward's own gradient."""

    card = Card(
        name="likelihood",
        title="Likelihood rewards: how probable the reference answer is after a sampled chain of thought",
        paper="Kwiatkowski et al. 2026, arXiv:2602.03979; jepo: arXiv:2503.19618; prob: VeriFree, arXiv:2505.21493",
        equation="2602.03979: Eq. 7 prob, 8 avgprob, 9 logprob, 10 avglogprob, 11 jepo, Lemma 1; 2503.19618: Eq. 7, 8",
        formula="-mean over samples of (sg[A_i] log pi(z_i) + R_i),  A_i = R_i - mean of the other R; R: logprob "
        "sum_t l_t, avglogprob mean_t l_t, prob exp(sum_t l_t), avgprob mean_t exp(l_t), with l_t = log pi(a*_t | z, "
        "a*_<t); base: R = scale verified and no R_i term; malformed=zero: R = 0 "
        "of a sample without the form; jepo: -(sum_i sg[A_i] log pi(z_i) + lme(l)), A_i = lme(l) - lme(l without "
        "l_i), lme = log mean exp",
        normalisation="log pi(z) is a sum over tokens; the answer's is what `reward` says; mean over the samples that "
        "count (malformed=drop: the valid ones), jepo: sum for the chains of thought",
        needs=("answer",),
        also_needs="verified, a verifier's verdict, in place of answer with reward=base",
        start="none",
        reward="none",
        optimum="malformed=zero (always base): maximises E_z R(z), with R = 0 for a malformed z; malformed=drop: "
        "E_z[R(z) | z valid], which says nothing of how often z is valid; jepo: E[log mean_i pi(a* | z_i)] over "
        "the valid z_i; where all are valid, a lower bound of log pi(a*) that grows with G",
        bounds="prob and avgprob are in [0, 1]; the log rewards are unbounded below, and so are their advantages; "
        "malformed=drop: a group with fewer than two valid samples contributes exactly 0",
        verified="against the specification's reading of the papers (no author code exists; VeriFree's number from "
        "memory); expected gradients equal finite differences of the optimum's E_z R(z) by enumeration for G = 2 and "
        "3, and a bandit's with malformed samples its closed form for G = 4",
        pitfalls=(
            "answer_grad=false leaves out the reward's own gradient (as RLPR does): another objective, biased for "
            "E[R]. The loss's value is the same.",
            "No division by the standard deviation: the answer's term would not be scaled with it.",
            "prob of a long answer is exp(-hundreds) = 0, and so is its gradient: it does not learn. logprob's "
            "advantages are of the size of the log-probability; clip gradients.",
            "Log-probabilities at temperature 1, and chains of thought sampled from exactly that distribution. The "
            "answer is tokenised in its context.",
            "On-policy: no importance ratio. A sample drawn from older weights biases the gradient.",
            "The paper's jepo may average over samples where this sums; the sum is what is unbiased for E[lme].",
            "A group that contributes 0 still counts in the batch's mean. Log and watch `skipped`.",
            "With malformed=drop nothing teaches the form, or keeps it: a policy may lose it. A reward of 0 is the "
            "worst for prob and avgprob and the best for the log rewards, which therefore refuse malformed=zero.",
        ),
        collisions=("reward=avgprob is not RLPR: that detaches the reward and subtracts the one without a chain.",),
        settings=(
            *({"reward": name} for name in ("avglogprob", "prob", "avgprob", "jepo", "base")),
            *({"reward": name, "malformed": "zero"} for name in ("prob", "avgprob")),
            {"answer_grad": False},
            {"reward": "jepo", "answer_grad": False},
            {"reward": "base", "scale": 100.0},
        ),
    )
    reward: Literal["logprob", "avglogprob", "prob", "avgprob", "jepo", "base"] = hyper(
        "what a sample is worth; base: a verifier's verdict on its own answer", default="logprob", source="paper"
    )
    answer_grad: bool = hyper("whether the reward's own gradient is kept", default=True, source="paper, Lemma 1")
    scale: float = hyper(
        "factor of the verdict; base only (the paper: 100 for 1, with 10 for well-formed but wrong)",
        default=1.0,
        gt=0,
        source="0/1 rewards",
    )
    malformed: Literal["drop", "zero"] | None = hyper(
        "a sample without the answer's form: left out, or counted with reward 0; None is zero for base, else drop",
        default=None,
        source="base: paper; prob: VeriFree has zero",
    )

    def resolve(self) -> None:
        if self.reward != "base" and self.scale != 1.0:
            self.refuse(f"reward={self.reward!r} does not read scale; it belongs to base")
        if self.malformed is None:
            self.set_derived("malformed", "zero" if self.reward == "base" else "drop")
        elif self.malformed == "drop" and self.reward == "base":
            self.refuse("malformed='drop': base counts a sample without the answer's form as wrong; leave it out")
        elif self.malformed == "zero" and self.reward not in ("base", "prob", "avgprob"):
            self.refuse(
                f"malformed='zero': reward={self.reward!r} is a log-probability, of which 0 is the best; use drop, or "
                "reward prob or avgprob"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("verified",) if self.reward == "base" else self.card.needs

    @property
    def judge(self) -> Judge:
        return "verifier" if self.reward == "base" else "none"

    def _counted(self, batch: GroupLogps) -> tuple[Tensor, Tensor]:
        """Samples that count, `[B, G]` bool, and groups that have two of them, `[B]` bool."""
        if batch.cot.shape[1] < 2:
            self.refuse(f"its leave-one-out baseline needs at least 2 samples per prompt, got {batch.cot.shape[1]}")
        kept = torch.ones_like(batch.kept) if self.malformed == "zero" else batch.kept
        return kept, kept.sum(1) >= 2

    def _tokens(self, batch: GroupLogps) -> tuple[Tensor, Tensor]:
        """Token log-probabilities with 0 where there is no token or no valid sample, and which are read, `[B, G, A]`.

        Chosen with where, not multiplied by the mask: what stands elsewhere may be NaN or infinite.
        """
        read = batch.column("answer_mask").bool() & batch.kept[..., None]
        return torch.where(read, batch.column("answer"), 0.0), read

    def _rewards(self, batch: GroupLogps) -> Tensor:
        """R, `[B, G]`, with its gradient, 0 for a malformed sample; for jepo the log-probability that enters it."""
        return torch.where(batch.kept, self._formed_rewards(batch), 0.0)

    def _formed_rewards(self, batch: GroupLogps) -> Tensor:
        """R, `[B, G]`, of samples with the answer's form; what stands for the others is no reward."""
        if self.reward == "base":
            return self.scale * batch.column("verified").to(batch.cot.dtype)
        tokens, read = self._tokens(batch)
        count = read.sum(-1).clamp(min=1)
        if self.reward in ("logprob", "jepo"):
            return tokens.sum(-1)  # Eq. 9
        if self.reward == "avglogprob":
            return tokens.sum(-1) / count  # Eq. 10
        if self.reward == "prob":
            return tokens.sum(-1).exp()  # Eq. 7
        return torch.where(read, tokens.exp(), 0.0).sum(-1) / count  # Eq. 8

    def group_loss(self, batch: GroupLogps) -> Tensor:
        kept, enough = self._counted(batch)
        kept = kept & enough[:, None]
        rewards = self._rewards(batch)
        rewards = rewards if self.answer_grad else rewards.detach()
        cot = torch.where(kept, batch.cot, 0.0)
        if self.reward == "jepo":
            advantage = log_mean_exp_advantage(rewards, kept)
            return -((advantage * cot).sum(1) + log_mean_exp(rewards, kept))  # 2503.19618 Eq. 7, 8
        own = torch.zeros_like(rewards) if self.reward == "base" else torch.where(kept, rewards, 0.0)
        advantage = leave_one_out(rewards.detach(), kept)
        return -(advantage * cot + own).sum(1) / kept.sum(1).clamp(min=1)  # Lemma 1, c = leave-one-out mean

    def group_statistics(self, batch: GroupLogps) -> dict[str, Tensor]:
        """`valid` per sample, `skipped` per prompt, `reward` per sample that counts, log-probabilities per valid one.

        `answer_logprob` is the sum over the answer's tokens and `answer_logprob_per_token` their mean; the mean over
        samples of the latter is the paper's per-answer log-probability. For jepo `reward` is that of a whole group,
        one for each that is not skipped.
        """
        kept, enough = self._counted(batch)
        rewards = self._rewards(batch)
        found = {
            "valid": batch.kept.flatten().to(batch.cot.dtype),
            "skipped": (~enough).to(batch.cot.dtype),
            "reward": log_mean_exp(rewards, kept)[enough] if self.reward == "jepo" else rewards[kept],
        }
        if self.reward != "base":
            tokens, read = self._tokens(batch)
            total, count = tokens.sum(-1)[batch.kept], read.sum(-1)[batch.kept]
            found |= {"answer_logprob": total, "answer_logprob_per_token": total / count}
        return found
