"""How an objective becomes an algorithm of the game: who draws, who is the opponent, and what one iteration is.

The loss is the registry's (`alignment.objectives`); this file has none. What an on-policy trainer does with a language
model, `Method.iterate` does with arms.

    half:  theta_1/2 = theta - lr grad L(theta; opponent = pi_theta)       look_ahead only
    full:  theta    <- theta - lr grad L(theta; opponent = pi_theta or pi_1/2)

With pairs drawn uniformly from n arms a tabular step of the regressions (egpo, online_ipo1, nash_md) is mirror descent
with step eta = 4 lr/(n beta) (objectives.md 4(a)).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.games.gradients import Labels, Situation, Slopes, every_pair, loss, minimiser, random_pairs
from alignment.games.policies import Parameters, Policy, Tabular
from alignment.objectives import Objective, get_objective, objective_class

Source = Literal["uniform", "policy", "reference"]
Opponent = Literal["policy", "mixture"]

# Who draws the pair, and who is the third response, as the method is usually run.
_USUAL: dict[str, tuple[Source, Opponent]] = {
    "egpo": ("uniform", "policy"),
    "online_ipo1": ("uniform", "policy"),
    "nash_md": ("uniform", "mixture"),
    "nash_md_pg": ("policy", "mixture"),
    "inpo": ("policy", "policy"),
    "sppo": ("policy", "policy"),
    "gpo": ("policy", "policy"),
}


MIRROR = ("egpo", "online_ipo1", "nash_md")  # whose loss, with pairs drawn uniformly, is mirror descent's step


@dataclass(frozen=True)
class Method:
    """An objective with its place in the game; None is how the method is usually run.

    Attributes:
        objective: a registered name.
        name: how figures and tables call it.
        sampler: who draws the two responses. Offline objectives: the reference, whose pairs P labels.
        opponent: whose response y'' is; `mixture` is pi^(1-c) ref^c.
        mixture: c; None is eta beta, which is mirror descent's own (Nash-MD of Munos et al.).
        look_ahead: take the opponent of a half step first (extragradient).
        exact: an iteration is the minimiser of the population loss, not one gradient step (INPO).
        rate_scale: multiplies the setting's learning rate.
        hyperparameters: of the objective, in place of those that follow from beta and eta.
    """

    objective: str
    name: str = ""
    sampler: Source | None = None
    opponent: Opponent | None = None
    mixture: float | None = None
    look_ahead: bool | None = None
    exact: bool | None = None
    rate_scale: float = 1.0
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def resolved(self) -> Method:
        """Every None filled in; ValueError with the nearest name for an unknown objective."""
        on_policy = objective_class(self.objective).card.batch != "pairs"
        sampler, opponent = _USUAL.get(self.objective, ("policy" if on_policy else "reference", "policy"))
        return Method(
            self.objective,
            self.name or self.objective,
            self.sampler or sampler,
            self.opponent or opponent,
            self.mixture,
            self.objective == "egpo" if self.look_ahead is None else self.look_ahead,
            self.objective == "inpo" if self.exact is None else self.exact,
            self.rate_scale,
            self.hyperparameters,
        )

    @property
    def evaluations(self) -> int:
        """Gradients per iteration; an exact iteration counts as one."""
        return 2 if self.look_ahead else 1

    @property
    def mirror(self) -> bool:
        """Whether a gradient step of a table is mirror descent's, with step eta (its opponent's choice apart)."""
        return self.objective in MIRROR and self.resolved().sampler == "uniform" and not self.exact

    def build(self, beta: float, eta: float) -> Objective:
        """The objective for a game with this beta and mirror-descent step.

        beta is the hyper-parameter `beta`, or `tau` where there is none; INPO's eta is the inverse step.
        """
        own = [hyper.name for hyper in objective_class(self.objective).card.hyperparameters]
        values: dict[str, Any] = {name: beta for name in ("beta", "tau") if name in own}
        if self.objective == "inpo":
            values["eta"] = 1 / eta
        return get_objective(self.objective, **(values | self.hyperparameters))


@dataclass(frozen=True)
class Sampling:
    """Gradients from draws: so many per game and step, judged by P itself or by 0/1 draws."""

    samples: int
    generator: torch.Generator
    labels: Labels = "probability"


class Learner:
    """A method in B games: `iterate` maps parameters to the next ones. Gradients are exact unless `sampling` is given.

    Args:
        method: what to run.
        ref_logits: `[B, n]`.
        preference: `[B, n, n]`.
        beta, learning_rate: of the setting.
        policy: tabular by default.
        sampling: draws; None for exact gradients.
        autograd: never take the shortcut of `Slopes`.

    Raises:
        ValueError: a setting that the objective refuses, or exact iterations of a network or of samples.
    """

    def __init__(
        self,
        method: Method,
        ref_logits: Tensor,
        preference: Tensor,
        *,
        beta: float,
        learning_rate: float,
        policy: Policy | None = None,
        sampling: Sampling | None = None,
        autograd: bool = False,
    ):
        self.method = method.resolved()
        self.policy: Policy = policy or Tabular()
        self.preference, self.sampling = preference, sampling
        self.reference = ref_logits.log_softmax(-1)
        uniform = torch.full_like(ref_logits, 1 / ref_logits.shape[-1])
        self.fixed_samplers = {"uniform": uniform, "reference": self.reference.exp()}
        self.beta, self.rate = beta, learning_rate * self.method.rate_scale
        self.eta = 4 * learning_rate / (ref_logits.shape[-1] * beta)
        self.mixture = self.eta * beta if self.method.mixture is None else self.method.mixture
        self.objective = self.method.build(beta, self.eta)
        exact = isinstance(self.policy, Tabular) and sampling is None
        if self.method.exact and not exact:
            raise ValueError(f"{self.method.name}: an exact iteration needs a table and exact gradients")
        slopes = Slopes.read(self.objective) if exact and not autograd and not self.method.exact else None
        self.fast = None if slopes is None else slopes.bind(self.reference, preference)

    def iterate(self, parameters: Parameters) -> Parameters:
        """One full iteration; the parameters given are not changed."""
        here = self._log_probs(parameters)
        if self.method.exact:
            return [minimiser(self.objective, self.policy.logits(parameters), self._situation(here, here))]
        opponent = here
        if self.method.look_ahead:
            opponent = self._log_probs(self._step(parameters, here, here))
        return self._step(parameters, here, opponent)

    def gradient(self, parameters: Parameters, opponent: Tensor | None = None) -> Parameters:
        """Gradient of the loss in the parameters against `opponent` (log-probabilities; None is the policy itself)."""
        here = self._log_probs(parameters)
        return self._gradient(parameters, self._situation(here, here if opponent is None else opponent))

    def _step(self, parameters: Parameters, here: Tensor, opponent: Tensor) -> Parameters:
        found = self._gradient(parameters, self._situation(here, opponent))
        pairs = zip(parameters, found, strict=True)
        return [torch.sub(value, slope, alpha=self.rate) for value, slope in pairs]

    def _log_probs(self, parameters: Parameters) -> Tensor:
        return self.policy.logits(parameters).log_softmax(-1)

    def _situation(self, here: Tensor, opponent: Tensor) -> Situation:
        """Frozen numbers of a step at the policy `here`, log-probabilities `[B, n]`."""
        probabilities = here.exp()
        sampler = self.fixed_samplers.get(self.method.sampler or "policy", probabilities)
        if self.method.opponent == "mixture":
            mixed = (1 - self.mixture) * opponent + self.mixture * self.reference
            return Situation(here, self.reference, here, sampler, mixed.softmax(-1), self.preference)
        third = probabilities if opponent is here else opponent.exp()
        return Situation(here, self.reference, here, sampler, third, self.preference)

    def _gradient(self, parameters: Parameters, frozen: Situation) -> Parameters:
        if self.fast is not None:
            return [self.fast(frozen)]
        leaves = [value.detach().requires_grad_() for value in parameters]
        live = frozen.at(self._log_probs(leaves))
        if self.sampling is None:
            draws = every_pair(live, calibrated="calibration" in self.objective.needs)
        else:
            draws = random_pairs(live, self.sampling.samples, self.sampling.generator, self.sampling.labels)
        total = loss(self.objective, live, draws).sum()
        return list(torch.autograd.grad(total, leaves))
