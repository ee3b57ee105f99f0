"""P3O: policy gradient on the difference of two samples' rewards, with ratios clipped per pair."""

import math
from typing import Literal

import torch
from torch import Tensor

from alignment.objectives.base import Card, hyper
from alignment.objectives.on_policy import SampleObjective
from alignment.objectives.registry import register
from alignment.objectives.samples import SamplePairs

AUTHORS = "author code (thwu1/trlx), HH configurations"
EXPONENT = 30.0  # largest |log rho| that is exponentiated: a product of two, 1e26, leaves float32 room for q


def _ratio(difference: Tensor) -> Tensor:
    """e^x with e^(clamped x) in its place beyond EXPONENT, in value and slope: never inf, and the slope never lost."""
    fixed = difference.detach()
    return fixed.clamp(-EXPONENT, EXPONENT).exp() * (difference - fixed).exp()


@register
class P3O(SampleObjective):
    """Pairwise Proximal Policy Optimization: three versions that coincide where the policy is the sampler."""

    card = Card(
        name="p3o",
        title="Pairwise Proximal Policy Optimization",
        paper="Wu et al. 2023, arXiv:2310.00212",
        equation="unclipped gradient, V1 (separate) and V2 (joint clipping); equation numbers not checked",
        formula="max(-q w D, -q w clip(D, D_old - delta, D_old + delta))/2,  q = sg[r1 - r2 - beta (z1 - z2)],  "
        "w = sg[clip(rho1 rho2, 1/c, c)],  D = z1 - z2,  rho = pi/behaviour; unclipped: -q sg[rho1 rho2] D/2; v1: "
        "-(min(A1, A1') + min(A2, A2'))/2, A_i = q_i sg[rho_j] rho_i, A_i' with both rho clipped to 1 +- epsilon",
        needs=("behaviour", "reference", "reward"),
        judge="reward",
        reward="beta z, which equals the reward up to a constant per prompt at the optimum",
        optimum="pi* ~ ref exp(r/beta): its gradient is 0 in every version, whatever sampled",
        bounds="none: linear in q; the slopes are at most |q| w/2, 0 where clipped; w <= c in v2",
        verified="v2 and defaults against the author's code; unclipped derived, its expectation the exact gradient "
        "of E[r] - beta KL by enumeration; v1 from memory: only that it clips separately was read",
        pitfalls=(
            "Adding a number to both rewards of a prompt changes nothing. Clipping or standardising single rewards "
            "breaks that: scale their difference.",
            "A NaN or infinite reward makes the pair's loss NaN or infinite in every version: leave out unscorable "
            "pairs. Equal responses give 0: leave them out and count them.",
            "rho is the ratio of whole sequences. Watch ratio_clipped and difference_clipped: c hides explosions. "
            f"Without c, |log rho| above {EXPONENT:g} counts as {EXPONENT:g} in the ratio.",
            "q takes z of the current policy, recomputed in every inner step (author code), not the rollout's.",
            "The released example runs token-normalised by a later flag; this is the plain batch mean.",
        ),
        collisions=(
            "P3O is also Policy-on Policy-off Policy Optimization (Fakoor et al.) and Penalized PPO (constrained RL).",
            "delta is the clip range of D, not a reward offset; epsilon is PPO's, read by v1 only.",
        ),
        settings=({"version": "v1"}, {"version": "unclipped"}, {"beta": 0.0}),
    )
    version: Literal["unclipped", "v1", "v2"] = hyper(
        "no clipping, separate clipping or joint clipping", default="v2", source=AUTHORS
    )
    beta: float = hyper("weight of the KL to the reference within the reward", default=0.05, ge=0, source=AUTHORS)
    delta: float = hyper("how far D may move from the sampler's; v2", default=0.2, gt=0, source=AUTHORS)
    ratio_cap: float = hyper("c: largest rho1 rho2, its inverse the smallest; v2", default=10.0, ge=1, source=AUTHORS)
    epsilon: float = hyper("clip range of each ratio; v1", default=0.2, gt=0, lt=1, source="PPO's; from memory")

    def sample_loss(self, batch: SamplePairs) -> Tensor:
        q = self._advantage(batch)
        if self.version == "v1":
            return self._separate(q, batch)
        difference = batch.log_ratio_first - batch.log_ratio_second  # D
        weight = self._weight(batch)
        if self.version == "unclipped":
            return -q * weight * difference / 2  # gradient g: q rho1 rho2 grad(s1 - s2)/2
        old = self._old_difference(batch)
        clipped = torch.clamp(difference, old - self.delta, old + self.delta)
        return torch.maximum(-q * weight * difference, -q * weight * clipped) / 2  # V2

    def _advantage(self, batch: SamplePairs) -> Tensor:
        """q = sg[q1 - q2], q_i = r_i - beta z_i, `[B]`; rewards differ first, so that a common part cancels."""
        rewards = batch.column("reward_first") - batch.column("reward_second")
        return rewards - self.beta * (batch.log_ratio_first - batch.log_ratio_second).detach()

    def _log_ratios(self, batch: SamplePairs) -> tuple[Tensor, Tensor]:
        """log rho of both responses, `[B]` each."""
        return batch.first - batch.column("behaviour_first"), batch.second - batch.column("behaviour_second")

    def _weight(self, batch: SamplePairs) -> Tensor:
        """w: rho1 rho2 under stop-gradient, within [1/c, c] in v2 (the logarithm is cut: no overflow), `[B]`."""
        first, second = self._log_ratios(batch)
        cap = min(math.log(self.ratio_cap), 2 * EXPONENT) if self.version == "v2" else 2 * EXPONENT
        return (first + second).detach().clamp(-cap, cap).exp()

    def _old_difference(self, batch: SamplePairs) -> Tensor:
        """D_old: z1 - z2 of the sampler, `[B]`."""
        first = batch.column("behaviour_first") - batch.column("ref_first")
        return first - (batch.column("behaviour_second") - batch.column("ref_second"))

    def _separate(self, q: Tensor, batch: SamplePairs) -> Tensor:
        """V1: PPO's minimum for each response, the other response's ratio being a weight, `[B]`."""
        first, second = (_ratio(difference) for difference in self._log_ratios(batch))
        low, high = 1 - self.epsilon, 1 + self.epsilon
        total = torch.zeros_like(q)
        for advantage, own, other in ((q, first, second), (-q, second, first)):
            free = advantage * other.detach() * own  # A_i
            clipped = advantage * other.detach().clamp(low, high) * own.clamp(low, high)  # A_i'
            total = total + torch.minimum(free, clipped)
        return -total / 2

    def sample_statistics(self, batch: SamplePairs) -> dict[str, Tensor]:
        """`advantage` |q|, `log_ratio` log(rho1 rho2), `kl` mean z; v1, v2: `ratio_clipped`; v2: `difference_clipped`.

        ratio_clipped is the share of clipped ratios: of rho1 and rho2 by epsilon in v1, of their product by c in v2.
        """
        first, second = self._log_ratios(batch)
        found = {
            "advantage": self._advantage(batch).abs(),
            "log_ratio": first + second,
            "kl": (batch.log_ratio_first + batch.log_ratio_second) / 2,
        }
        if self.version == "v1":
            outside = [(_ratio(each) - 1).abs() > self.epsilon for each in (first, second)]
            found["ratio_clipped"] = torch.stack(outside).to(first.dtype).mean(0)
        elif self.version == "v2":
            moved = batch.log_ratio_first - batch.log_ratio_second - self._old_difference(batch)
            found["ratio_clipped"] = ((first + second).abs() > math.log(self.ratio_cap)).to(first.dtype)
            found["difference_clipped"] = (moved.abs() > self.delta).to(first.dtype)
        return found
