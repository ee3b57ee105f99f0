"""A PPO-style baseline for recipes/replications/p3o.yaml: clipped ratios of whole sequences, a baseline of the batch.

Not PPO: there is no value network and no token-level ratio. What it shares with PPO, and P3O does not, is that a
response's advantage is its own reward less a baseline that knows nothing of the other response to the same prompt.
Also an example of an on-policy objective of one's own (`objective.file`).
"""

from torch import Tensor

from alignment.objectives import SampleObjective, SamplePairs, hyper, register
from alignment.objectives.base import Card


@register
class PPOStyle(SampleObjective):
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A), A = r - beta z less its mean over the batch."""

    card = Card(
        name="ppo_style",
        title="Clipped policy gradient with a batch baseline",
        paper="after Schulman et al. 2017, arXiv:1707.06347, by sequence and without a value network",
        equation="eq. 7 there",
        formula="mean over both responses of -min(rho A, clip(rho) A), A = sg[r - beta z - batch mean]",
        needs=("behaviour", "reference", "reward"),
        judge="reward",
        verified="a baseline of ours, tested only by what recipes/replications/p3o.yaml shows",
    )
    beta: float = hyper("weight of the KL inside the reward", default=0.05, ge=0)
    epsilon: float = hyper("clip range of the ratio", default=0.2, gt=0, lt=1, source="PPO")

    def sample_loss(self, batch: SamplePairs) -> Tensor:
        first = batch.column("reward_first") - self.beta * batch.log_ratio_first.detach()
        second = batch.column("reward_second") - self.beta * batch.log_ratio_second.detach()
        baseline = (first + second).mean() / 2
        total = first * 0
        for logp, old, value in (
            (batch.first, batch.column("behaviour_first"), first),
            (batch.second, batch.column("behaviour_second"), second),
        ):
            ratio, advantage = (logp - old).clamp(max=20).exp(), value - baseline
            clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
            total = total - (ratio * advantage).minimum(clipped * advantage) / 2
        return total
