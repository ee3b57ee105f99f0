"""The regression losses of preference games: EGPO, its two Online IPO baselines and Nash-MD.

The first three names share one loss. What tells them apart (who the opponent is, and a look-ahead step) is the
trainer's affair; here is the loss of one step on given samples.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from alignment.objectives.base import Card, hyper
from alignment.objectives.on_policy import SampleObjective
from alignment.objectives.registry import register
from alignment.objectives.samples import SamplePairs

TARGET = "h = z1 - z2 - (P(y1 > y'') - P(y2 > y''))/beta"
READ = "loss, defaults and sampling read in the author code (zhourunlong/EGPO), the paper's text only in its abstract"


_CARD = Card(
    name="egpo",
    title="Extragradient Preference Optimization (the loss of its half and of its full step)",
    paper="Zhou, Fazel and Du 2025, arXiv:2503.08942",
    equation="loss of the author code; the paper's numbers not seen",
    formula=f"h^2,  {TARGET}; y'': the opponent's sample",
    normalisation="sum over tokens, or mean over tokens (`normalization`)",
    needs=("reference", "preference"),
    also_needs="length with normalization=mean",
    judge="oracle",
    optimum="for opponent q: pi ~ ref exp(P(y > q)/beta); with q = pi the Nash policy of the KL-regularised game",
    bounds="loss >= 0; slope 2 h grows linearly; its mean's gradient is 4 E_rho[(d - E_rho d) grad log pi], "
    "d = z - P(y > q)/beta",
    verified=f"{READ}; gradient identity, contraction rates and the golden value derived and tested; "
    "arXiv numbers of the baselines from memory",
    pitfalls=(
        "The opponent's sample y'' comes from the current policy in the half step and from the half-step policy in "
        "the full step, whose log-probabilities are those at the start.",
        "The target is up to 1/beta = 10. Against per-token log-ratios (mean, as released) it is never reached and "
        "acts as a bounded advantage; against sums it is a real target.",
        "P must come from both orders of the judge, or position bias enters the target. Probabilities or 0/1 labels "
        "both give the right gradient on average; labels with more variance.",
        "A half step smaller than the weights' precision is lost, and EGPO silently becomes Online IPO 1.",
        "An iteration costs two generations, two judgements and two updates: compare at equal samples as well.",
    ),
    collisions=(
        "eta in the papers is a STEP size: 4 lr/(n beta) for uniform samples of n; INPO's eta is its inverse.",
        "In EGPO's naming Online IPO 1 is mirror descent, and Online IPO 2 the loss of Calandriello et al.",
    ),
    settings=({"normalization": "mean"}, {"beta": 1.0}),
)


@register
class EGPO(SampleObjective):
    """Squared distance of the margin z1 - z2 from a target: two preferences over the same opponent's sample."""

    card = _CARD
    beta: float = hyper(
        "weight of the KL to the reference: the target is a preference over beta", default=0.1, gt=0,
        source="author code (zhourunlong/EGPO)",
    )  # fmt: skip
    normalization: Literal["sum", "mean"] = hyper(
        "log-probabilities of a response: sum or mean over its tokens",
        default="sum",
        source="the paper's theory; the released code uses mean",
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.card.needs, *(("length",) if self.normalization == "mean" else ()))

    def _ratios(self, batch: SamplePairs) -> tuple[Tensor, Tensor]:
        """z1 and z2, per token with mean, `[B]` each."""
        first, second = batch.log_ratio_first, batch.log_ratio_second
        if self.normalization == "sum":
            return first, second
        return first / batch.column("first_length"), second / batch.column("second_length")

    def _target(self, batch: SamplePairs) -> Tensor:
        """What the margin is regressed on, `[B]`."""
        advantage = batch.column("preference_first") - batch.column("preference_second")
        return advantage / self.beta  # objectives.md 4(a): (P(y > q) - P(y' > q))/beta

    def sample_loss(self, batch: SamplePairs) -> Tensor:
        first, second = self._ratios(batch)
        return (first - second - self._target(batch)) ** 2  # L(theta; rho, q)

    def sample_statistics(self, batch: SamplePairs) -> dict[str, Tensor]:
        """`margin` z1 - z2 and its `target`, as the loss has them, and `kl`, the mean of both summed z."""
        first, second = self._ratios(batch)
        kl = (batch.log_ratio_first + batch.log_ratio_second) / 2
        return {"margin": first - second, "target": self._target(batch), "kl": kl}


@register
class OnlineIPO1(EGPO):
    """EGPO without the extra step: online mirror descent."""

    card = replace(
        _CARD,
        name="online_ipo1",
        title="Online IPO 1: online mirror descent on the game, EGPO without its extra step",
        formula=f"h^2,  {TARGET}; y'': the current policy's sample",
        pitfalls=(
            *_CARD.pitfalls[1:3],
            "Cycles or diverges on intransitive preferences once beta is small: on rock-paper-scissors with step eta "
            "it is stable only for eta < 2 beta/(beta^2 + 1/12).",
        ),
    )


@register
class NashMD(EGPO):
    """EGPO's regression against a mixture of policy and reference."""

    card = replace(
        _CARD,
        name="nash_md",
        title="Nash-MD as a regression: the opponent is a geometric mixture of policy and reference",
        paper="Munos et al. 2023, arXiv:2312.00886; as in Zhou, Fazel and Du 2025, arXiv:2503.08942",
        formula=f"h^2,  {TARGET}; y'': a sample of pi^(1-c) ref^c",
        optimum="with a constant c its fixed point solves z = P(y > mixture)/beta: not the Nash policy, near it",
        pitfalls=(
            *_CARD.pitfalls[1:3],
            "The mixture is the sampler's: next-token pi^(1-c) ref^c, renormalised at each token, is not the mixture "
            "of whole responses.",
        ),
        collisions=("nash_md_pg is the policy gradient of the same game, the form that Munos et al. train with.",),
    )


@register
class OnlineIPO2(EGPO):
    """IPO on two samples of the policy, with the preference between them in place of a label."""

    card = replace(
        _CARD,
        name="online_ipo2",
        title="Online IPO 2: IPO on the policy's own samples and the preference between them",
        paper="Calandriello et al. 2024, arXiv:2403.08635; as in Zhou, Fazel and Du 2025, arXiv:2503.08942",
        formula="(z1 - z2 - (P(y1 > y2) - 1/2)/beta)^2",
        needs=("reference", "duel"),
        optimum="the Nash policy of the KL-regularised game is its fixed point",
        bounds="loss >= 0; slope 2 h grows linearly; its mean's gradient is -4/beta times the policy gradient of "
        "P(y > pi) - beta KL at pi",
        pitfalls=(
            "Both samples must come from the policy itself (temperature 1, untruncated).",
            "Slow for rare responses: the speed is scaled by pi(y).",
            *_CARD.pitfalls[1:3],
        ),
    )

    def _target(self, batch: SamplePairs) -> Tensor:
        return (batch.column("preference") - 0.5) / self.beta  # P(y1 > y2) replaces the third sample
