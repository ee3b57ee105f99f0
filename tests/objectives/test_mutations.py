"""Does the suite catch mistakes? Deliberately wrong objectives, each a slip that released code has made.

Every mutant is a subclass with one changed formula; the checks named beside it must fail on it. The unchanged classes
pass everything (`test_conformance`), so that a failure here is the mutation's.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from alignment.objectives import PairLogps, objective_class
from alignment.objectives.conformance import run_check
from alignment.objectives.reward_aware_rpo import bernoulli_kl
from alignment.objectives.sppo import regressed

DPO, IPO, Robust, RPO, INPO, VPO, FDPO, NvidiaRPO, SimPO, ORPO, CPO, DPOP, SPO = map(
    objective_class,
    ("dpo", "ipo", "robust", "rpo", "inpo", "vpo", "f_dpo", "reward_aware_rpo", "simpo", "orpo", "cpo", "dpop", "spo"),
)
SPPO, GPO = map(objective_class, ("sppo", "gpo"))


class FlippedSign(DPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(-self.beta * batch.margin)


class NoBeta(DPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(batch.margin)


class WrongReference(DPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * (batch.log_ratio_chosen - (batch.rejected - batch.ref_chosen)))


class IgnoredSmoothing(DPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * batch.margin)


class UnstableLogarithm(DPO):
    def pair_loss(self, batch):
        logit, eps = self.beta * batch.margin, self.label_smoothing
        return -(1 - eps) * torch.log(torch.sigmoid(logit)) - eps * torch.log(torch.sigmoid(-logit))


class BatchNormalised(DPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * (batch.margin - batch.margin.mean()))


class MeanOverBatch(DPO):
    def pair_loss(self, batch):
        return super().pair_loss(batch).mean()


class DetachedRejected(DPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * (batch.log_ratio_chosen - batch.log_ratio_rejected.detach()))


class MeanForSum(IPO):
    def pair_loss(self, batch):
        ratios = batch.log_ratio_chosen / batch.chosen_length, batch.log_ratio_rejected / batch.rejected_length
        return (ratios[0] - ratios[1] - 1 / (2 * self.tau)) ** 2


class TargetOneOverTau(IPO):
    def pair_loss(self, batch):
        return (batch.margin - 1 / self.tau) ** 2


class NotRescaled(Robust):
    def pair_loss(self, batch):
        return super().pair_loss(batch) * (1 - 2 * self.label_smoothing)


class EtaWithoutBeta(RPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * batch.margin) - self.eta * batch.chosen


class LikelihoodOfRejected(RPO):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * batch.margin) - self.eta * self.beta * batch.rejected


class SwappedMixture(INPO):
    def pair_loss(self, batch):
        share = 1 - self.tau / self.eta
        frozen = share * (batch.ref_chosen - batch.ref_rejected) + (1 - share) * (
            batch.prev_chosen - batch.prev_rejected
        )
        return (batch.chosen - batch.rejected - frozen - 1 / (2 * self.eta)) ** 2


class SignOfOptimism(VPO):
    def pair_loss(self, batch):
        plain = -F.logsigmoid(self.beta * batch.margin)
        return 2 * plain - super().pair_loss(batch)


class FlippedAlpha(FDPO):
    def score(self, log_ratio):
        if self.divergence != "alpha":
            return super().score(log_ratio)
        return -torch.expm1(-(1 - self.alpha) * log_ratio.clamp(-12, 12)) / (1 - self.alpha)


class DeadBeyondTheCap(FDPO):
    def score(self, log_ratio):
        return super().score(log_ratio.clamp(min=-10.0))


class RewardConstantKept(FDPO):
    def pair_rewards(self, batch):
        shift = math.log(2) if self.divergence == "jsd" else 0.0
        return tuple(reward - self.beta * shift for reward in super().pair_rewards(batch))


class SwappedKL(NvidiaRPO):
    def pair_loss(self, batch):
        gap, target = self.beta * batch.margin, self.scale * (batch.reward_chosen - batch.reward_rejected)
        if self.form == "sq":
            return (gap - target) ** 2
        return bernoulli_kl(gap, target) if self.form == "bwd_kl" else bernoulli_kl(target, gap)


class GammaTimesBeta(SimPO):
    def pair_loss(self, batch):
        chosen, rejected = self.pair_rewards(batch)
        return -F.logsigmoid(chosen - rejected - self.beta * self.gamma)


class OddsOfTheSum(ORPO):
    def pair_rewards(self, batch):
        one = torch.ones_like(batch.chosen)
        return super().pair_rewards(PairLogps(batch.chosen, batch.rejected, chosen_length=one, rejected_length=one))


class LikelihoodSign(CPO):
    def pair_loss(self, batch):
        return super().pair_loss(batch) + 2 * self.nll_weight * batch.chosen


class PenaltyOutside(DPOP):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * batch.margin) + self.lam * F.relu(-batch.log_ratio_chosen)


class PenaltyOnRejected(DPOP):
    def pair_loss(self, batch):
        return -F.logsigmoid(self.beta * (batch.margin - self.lam * F.relu(-batch.log_ratio_rejected)))


class TowardsTheLoser(SPPO):
    def pair_loss(self, batch):
        return regressed(
            batch, self.eta * (0.5 - batch.preference_chosen), self.eta * (0.5 - batch.preference_rejected)
        )


class WinsWithoutHalf(SPPO):
    def pair_loss(self, batch):
        return regressed(batch, self.eta * batch.preference_chosen, self.eta * batch.preference_rejected)


class OnlyTheWinner(SPPO):
    def pair_loss(self, batch):
        return (batch.log_ratio_chosen - self.eta * (batch.preference_chosen - 0.5)) ** 2


class SumOverResponses(SPPO):
    def pair_loss(self, batch):
        return 2 * super().pair_loss(batch)


class ReferenceOfTheOther(SPPO):
    def pair_loss(self, batch):
        return super().pair_loss(replace(batch, ref_chosen=batch.ref_rejected, ref_rejected=batch.ref_chosen))


class PreviousForReference(SPPO):
    def pair_loss(self, batch):
        return super().pair_loss(replace(batch, ref_chosen=batch.prev_chosen, ref_rejected=batch.prev_rejected))


class InverseStep(SPPO):
    def pair_loss(self, batch):
        return SPPO(eta=1 / self.eta).pair_loss(batch)


class MarginOfBoth(SPPO):
    def pair_loss(self, batch):
        return (batch.margin - self.eta * (batch.preference_chosen - batch.preference_rejected)) ** 2 / 2


class TableMinusItsTranspose(GPO):
    def pair_loss(self, batch):
        return GPO(eta=2 * self.eta).pair_loss(batch)


class OddsForLogOdds(GPO):
    def pair_loss(self, batch):
        return regressed(batch, self.eta * batch.log_odds_chosen.exp(), self.eta * batch.log_odds_rejected.exp())


class WinsForLogOdds(GPO):
    def pair_loss(self, batch):
        return SPPO(eta=self.eta).pair_loss(batch)


class IgnoredLabel(RPO):
    def loss(self, batch):
        return self.pair_loss(batch)


class LabelOfRejected(DPO):
    def loss(self, batch):
        return super().loss(batch if batch.label is None else replace(batch, label=1 - batch.label))


class HardenedLabel(DPO):
    def loss(self, batch):
        hard = None if batch.label is None else (batch.label > 0.5).to(batch.label.dtype)
        return super().loss(replace(batch, label=hard))


class AveragedLabel(DPO):
    def loss(self, batch):
        average = None if batch.label is None else batch.label.mean().expand_as(batch.label)
        return super().loss(replace(batch, label=average))


class LabelAsWeight(IPO):
    def loss(self, batch):
        return self.pair_loss(batch) * (1.0 if batch.label is None else batch.label)


class ReferenceNotSwapped(DPO):
    def loss(self, batch):
        if batch.label is None:
            return self.pair_loss(batch)
        other = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
        return batch.label * self.pair_loss(batch) + (1 - batch.label) * self.pair_loss(other)


class LengthsNotSwapped(SimPO):
    def loss(self, batch):
        if batch.label is None:
            return self.pair_loss(batch)
        other = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
        return batch.label * self.pair_loss(batch) + (1 - batch.label) * self.pair_loss(other)


class LabelledRewards(DPO):
    def rewards(self, batch):
        chosen, rejected = super().rewards(batch)
        return (chosen, rejected) if batch.label is None else (batch.label * chosen, (1 - batch.label) * rejected)


class Degrees(SPO):
    """spo with the degree loss spelt out, for the mutants below to change one thing."""

    def degree_loss(self, surprise, real):
        return (surprise * real).sum(1) / real.sum(1).clamp(min=1)

    def target(self, labels):
        return labels.clamp(min=0)

    def pair_loss(self, batch):
        probabilities = batch.degree_logits.softmax(-1)
        surprise = -probabilities.gather(-1, self.target(batch.degree_labels)[..., None]).squeeze(-1).log()
        loss = self.aligned.pair_loss(batch)
        return loss + self.gamma * self.degree_loss(surprise, (batch.degree_labels >= 0).to(loss.dtype)).to(loss.dtype)


class SumOverCopies(Degrees):
    def degree_loss(self, surprise, real):
        return (surprise * real).sum(1)


class CopiesThatDoNotExist(Degrees):
    def degree_loss(self, surprise, real):
        return surprise.mean(1)


class DividedByAllCopies(Degrees):
    def degree_loss(self, surprise, real):
        return (surprise * real).mean(1)


class MeanOverTheBatch(Degrees):
    def degree_loss(self, surprise, real):
        return ((surprise * real).sum() / real.sum()).expand(len(surprise))


class WrongSign(Degrees):
    def degree_loss(self, surprise, real):
        return -super().degree_loss(surprise, real)


class ProbabilityForSurprise(Degrees):
    def degree_loss(self, surprise, real):
        return super().degree_loss(1 - (-surprise).exp(), real)


class DetachedHead(Degrees):
    def degree_loss(self, surprise, real):
        return super().degree_loss(surprise, real).detach()


class LabelOffByOne(Degrees):
    def target(self, labels):
        return (labels + 1) % self.degrees


class GammaTwice(SPO):
    def pair_loss(self, batch):
        base = self.aligned.pair_loss(batch)
        return base + self.gamma * (super().pair_loss(batch) - base)


class GammaAsShare(SPO):
    def pair_loss(self, batch):
        return super().pair_loss(batch) - self.gamma * self.aligned.pair_loss(batch)


class BaseIsAlwaysDPO(SPO):
    @property
    def aligned(self):
        return DPO(**{name: value for name, value in vars(self).items() if name in ("beta", "label_smoothing")})


class BaseForgetsItsSettings(SPO):
    @property
    def aligned(self):
        return (self.aligned_class or DPO)()


class RewardsOfDPO(SPO):
    def pair_rewards(self, batch):
        return 0.1 * batch.log_ratio_chosen, 0.1 * batch.log_ratio_rejected


class NeedsNoDegrees(SPO):
    @property
    def needs(self):
        return self.aligned.needs


class Unvalidated(DPO):
    def __post_init__(self):
        pass


MUTANTS = [
    (FlippedSign, "golden paper start_law direction optimum"),
    (NoBeta, "golden paper start_law bounds optimum"),
    (WrongReference, "golden paper optimum"),
    (IgnoredSmoothing, "golden paper start_law bounds optimum"),
    (UnstableLogarithm, "extremes"),
    (BatchNormalised, "golden paper split padding"),
    (MeanOverBatch, "shapes"),
    (DetachedRejected, "finite_differences paper start_law"),
    (MeanForSum, "golden paper start_law columns optimum"),
    (TargetOneOverTau, "golden paper start_law optimum"),
    (NotRescaled, "golden paper start_law"),
    (EtaWithoutBeta, "golden paper start_law columns bounds optimum"),
    (LikelihoodOfRejected, "golden paper start_law optimum"),
    (SwappedMixture, "golden paper optimum"),
    (SignOfOptimism, "golden paper start_law optimum"),
    (FlippedAlpha, "golden paper optimum"),
    (RewardConstantKept, "start"),
    (SwappedKL, "golden paper start_law bounds"),
    (GammaTimesBeta, "golden paper start_law optimum"),
    (OddsOfTheSum, "golden paper start_law"),
    (LikelihoodSign, "golden paper start_law direction optimum"),
    (PenaltyOutside, "paper bounds"),
    (PenaltyOnRejected, "golden paper"),
    (Unvalidated, "hyperparameters"),
    (TowardsTheLoser, "golden paper start_law direction"),
    (WinsWithoutHalf, "golden paper start_law"),
    (OnlyTheWinner, "golden paper start_law bounds"),
    (SumOverResponses, "golden paper start_law bounds"),
    (ReferenceOfTheOther, "golden paper start_law"),
    (PreviousForReference, "golden paper columns"),
    (InverseStep, "golden paper start_law"),
    (MarginOfBoth, "golden paper start_law bounds"),
    (TableMinusItsTranspose, "golden paper start_law"),
    (OddsForLogOdds, "golden paper start_law"),
    (WinsForLogOdds, "golden paper columns"),
    *((mutant, "labels") for mutant in (IgnoredLabel, LabelOfRejected, HardenedLabel, AveragedLabel, LabelAsWeight)),
    *((mutant, "labels") for mutant in (ReferenceNotSwapped, LengthsNotSwapped, LabelledRewards)),
    (SumOverCopies, "golden paper start_law"),
    (CopiesThatDoNotExist, "golden paper"),
    (DividedByAllCopies, "golden paper start_law"),
    (MeanOverTheBatch, "paper split padding"),
    (WrongSign, "golden paper start_law bounds"),
    (ProbabilityForSurprise, "golden paper start_law"),
    (LabelOffByOne, "golden paper"),
    (GammaTwice, "golden paper start_law"),
    (GammaAsShare, "golden paper start_law"),
    (BaseIsAlwaysDPO, "golden paper start_law"),
    (BaseForgetsItsSettings, "golden"),
    (NeedsNoDegrees, "columns"),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_the_suite_catches(mutant, checks: str) -> None:
    passed = [check for check in checks.split() if run_check(mutant, check).ok]
    assert not passed, f"{mutant.__name__} slips through {passed}"


@pytest.mark.parametrize(
    ("mutant", "label"),
    [
        (DeadBeyondTheCap, "linear extension"),
        (FlippedAlpha, "TRL's convention"),
        (SwappedMixture, "= ipo on mixed reference"),
        (EtaWithoutBeta, "= vpo offline + constant"),
        (SignOfOptimism, "signs"),
        (PenaltyOnRejected, "two regions"),
        (WinsWithoutHalf, "ties pull to the reference"),
        (TowardsTheLoser, "0 at its targets"),
        (OnlyTheWinner, "exchanged responses"),
        (ReferenceOfTheOther, "constant on a response"),
        (TableMinusItsTranspose, "log-odds P - 1/2 = sppo"),
        (OddsForLogOdds, "unit of the log-odds"),
        (HardenedLabel, "soft label = smoothing"),
        (LabelAsWeight, "soft label moves the target"),
        (SumOverCopies, "slope by the logits"),
        (CopiesThatDoNotExist, "missing copies"),
        (DividedByAllCopies, "zero head"),
        (WrongSign, "slope by the logits"),
        (DetachedHead, "slope by the logits"),
        (LabelOffByOne, "zero head"),
        (GammaTwice, "linear in gamma"),
        (GammaAsShare, "zero head"),
        (BaseForgetsItsSettings, "gamma 0 = base"),
        (RewardsOfDPO, "gamma 0 = base"),
    ],
)
def test_the_relations_catch(mutant, label: str) -> None:
    assert not run_check(mutant, f"relation: {label}").ok


def test_a_swapped_mixture_is_invisible_in_the_first_iteration() -> None:
    """Why the suite uses a previous iterate that differs from the reference."""
    assert run_check(SwappedMixture, "relation: first iteration = ipo").ok
