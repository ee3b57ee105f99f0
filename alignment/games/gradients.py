"""The project's objectives on games whose responses can be listed: losses and gradients, exact and sampled.

No formula of an objective stands here. A `Situation` says what every arm's numbers are; `loss` builds the batch that
the objective reads (`PairLogps` or `SamplePairs`) for given draws of responses and averages what `objective.loss`
returns. Draws are all pairs with their probabilities (`every_pair`: the population loss) or random ones.

`Slopes` is a shortcut for exact gradients: where an objective's slopes are affine in its columns (those of squared
margins are), it reads the coefficients off the objective by autograd, checks them on random columns, and then needs no
autograd: ten times faster.

All tensors have a leading dimension B: games times seeds, independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from alignment.games.solution import NotFound, win_rate
from alignment.objectives import Objective, PairLogps, SamplePairs

DOUBLE = torch.float64
Labels = Literal["probability", "drawn"]

# Columns of a batch, by what they are of an arm. A column of the first response is "chosen" or "first".
_OF_AN_ARM = {
    "pairs": {
        "{}": "policy",
        "ref_{}": "reference",
        "prev_{}": "previous",
        "{}_length": "length",
        "reward_{}": "won",
        "preference_{}": "won",
        "log_odds_{}": "log_odds",
    },
    "samples": {
        "{}": "policy",
        "ref_{}": "reference",
        "behaviour_{}": "previous",
        "{}_length": "length",
        "reward_{}": "won",
        "preference_{}": "won",
    },
}
_RESPONSES = {"pairs": ("chosen", "rejected"), "samples": ("first", "second")}
_OF_A_PAIR = {"pairs": "label", "samples": "preference"}  # P(first beats second)


THIRD = {"preference", "reward", "log_odds"}  # needs that are of a response against the third one, the opponent's


class NotEnumerable(ValueError):
    """An objective reads something that the arms of a game do not have."""


@dataclass(frozen=True)
class Situation:
    """What a gradient is taken at; `[B, n]` unless said. Only `policy` carries a gradient.

    Attributes:
        policy, reference, previous: log-probabilities; previous is what sampled (behaviour, the iteration's start).
        sampler: probabilities with which either response of a pair is drawn.
        opponent: probabilities of the third response.
        preference: P, `[B, n, n]`.
    """

    policy: Tensor
    reference: Tensor
    previous: Tensor
    sampler: Tensor
    opponent: Tensor
    preference: Tensor

    @cached_property
    def won(self) -> Tensor:
        """P(y beats the opponent)."""
        return win_rate(self.preference, self.opponent)

    @cached_property
    def log_odds(self) -> Tensor:
        """Mean log-odds of y against the opponent; not finite where y always wins or loses against an arm."""
        return win_rate(self.preference.logit(), self.opponent)

    def at(self, policy: Tensor) -> Situation:
        """The same for another policy's log-probabilities, such as those that carry a gradient."""
        return replace(self, policy=policy)

    def arm(self, what: str) -> Tensor:
        """`[B, n]`: one number per arm. Every response is one token long."""
        found: Tensor = torch.ones_like(self.sampler) if what == "length" else getattr(self, what)
        return found


@dataclass(frozen=True)
class Draws:
    """Pairs of arms and what each counts, `[B, m]`.

    Attributes:
        first, second, calibration: indices of arms.
        weight: sums to 1 in every game.
        won: whether first and second beat a drawn response of the opponent; None: P against the opponent in the mean.
        label: whether first beats second; None: P(first beats second).
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    won: tuple[Tensor, Tensor] | None = None
    label: Tensor | None = None
    calibration: Tensor | None = None


def every_pair(situation: Situation, *, calibrated: bool = False) -> Draws:
    """All n^2 ordered pairs with their probabilities; `calibrated`: each with all n responses of the reference."""
    games, n = situation.sampler.shape
    grid = [axis.reshape(1, -1).expand(games, -1) for axis in _grid(n, 3 if calibrated else 2)]
    weight = situation.sampler.gather(1, grid[0]) * situation.sampler.gather(1, grid[1])
    if not calibrated:
        return Draws(grid[0], grid[1], weight)
    weight = weight * situation.reference.exp().gather(1, grid[2])
    return Draws(grid[0], grid[1], weight, calibration=grid[2])


def _grid(n: int, axes: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(*[torch.arange(n)] * axes, indexing="ij")


def random_pairs(
    situation: Situation, samples: int, generator: torch.Generator, labels: Labels = "probability"
) -> Draws:
    """`samples` draws of (y, y', y'', calibration) per game, each counting 1/samples.

    Comparisons of y and y' with y'', and of y with y', are P of the drawn arms, or with labels "drawn" 0/1 draws.
    """

    def draw(probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, samples, replacement=True, generator=generator)

    def judge(one: Tensor, other: Tensor) -> Tensor:
        chance = _pairwise(situation.preference, one, other)
        if labels == "probability":
            return chance
        return (torch.rand(chance.shape, generator=generator, dtype=DOUBLE) < chance).to(DOUBLE)

    first, second = draw(situation.sampler), draw(situation.sampler)
    third, calibration = draw(situation.opponent), draw(situation.reference.exp())
    weight = torch.full(first.shape, 1 / samples, dtype=DOUBLE)
    won = judge(first, third), judge(second, third)
    return Draws(first, second, weight, won, judge(first, second), calibration)


def _pairwise(preference: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """P[b, first, second], `[B, m]`."""
    return preference.flatten(1).gather(1, first * preference.shape[-1] + second)


def loss(objective: Objective, situation: Situation, draws: Draws) -> Tensor:
    """Mean loss of each game over its draws, `[B]`; with `every_pair` the population loss.

    Raises:
        NotEnumerable: the objective reads chains of thought or degraded copies.
    """
    kind = objective.card.batch
    if kind == "groups" or "degree" in objective.needs:
        raise NotEnumerable(f"objective {objective.card.name!r} reads {', '.join(objective.needs)}: no game has that")
    columns = {}
    for at, (response, index) in enumerate(zip(_RESPONSES[kind], (draws.first, draws.second), strict=True)):
        for name, what in _OF_AN_ARM[kind].items():
            if what == "log_odds" and "log_odds" not in objective.needs:
                continue  # infinite in many games
            if what == "won" and draws.won is not None:
                columns[name.format(response)] = draws.won[at]
            else:
                columns[name.format(response)] = situation.arm(what).gather(1, index)
    label = draws.label
    columns[_OF_A_PAIR[kind]] = _pairwise(situation.preference, draws.first, draws.second) if label is None else label
    if kind == "pairs" and draws.calibration is not None:
        for name, what in (
            ("calibration", "policy"),
            ("ref_calibration", "reference"),
            ("calibration_length", "length"),
        ):
            columns[name] = situation.arm(what).gather(1, draws.calibration)
    flat = {name: column.reshape(-1) for name, column in columns.items()}
    batch = PairLogps(**flat) if kind == "pairs" else SamplePairs(**flat)
    values: Tensor = objective.loss(batch)  # type: ignore[arg-type]  # each kind of objective has its kind of batch
    return (draws.weight * values.view_as(draws.weight)).sum(1)


def population(objective: Objective, situation: Situation) -> Tensor:
    """Expected loss of each game over all responses, `[B]`."""
    return loss(objective, situation, every_pair(situation, calibrated="calibration" in objective.needs))


def minimiser(objective: Objective, logits: Tensor, situation: Situation, steps: int = 50) -> Tensor:
    """Logits `[B, n]` that minimise the population loss, by Newton's method from `logits`: one exact iteration.

    One step for a square of margins; others (logistic) take several. Responses that are never drawn stay put.

    Raises:
        NotFound: the gradient does not vanish: the loss has no minimum, or Newton's method does not find it.
    """
    theta = logits.detach()
    for _ in range(steps):
        leaf = theta.clone().requires_grad_()
        total = population(objective, situation.at(leaf.log_softmax(-1))).sum()
        slope = torch.autograd.grad(total, leaf, create_graph=True)[0]
        rows = [torch.autograd.grad(slope[:, i].sum(), leaf, retain_graph=True)[0] for i in range(theta.shape[1])]
        curvature = torch.stack(rows, 1)
        if not bool(curvature.isfinite().all()):
            break
        move = (torch.linalg.pinv(curvature, hermitian=True) @ slope.detach()[..., None]).squeeze(-1)
        theta = theta - move
        if bool(move.abs().amax() <= 1e-12 * (1 + theta.abs().amax())) and bool(slope.abs().amax() <= 1e-9):
            return theta
    raise NotFound(f"{objective.card.name}: no minimum of the population loss within {steps} Newton steps")


@dataclass(frozen=True)
class Slopes:
    """The exact gradient of an objective whose slopes are affine in its columns, without autograd.

    `Slopes.read(objective)` evaluates the slopes dl/ds of both responses at zero columns and at one column of 1 at a
    time, by autograd; of an affine objective that is all there is to know, and whether it is affine is checked on
    random columns. Since the two responses are drawn independently, sums over n^2 pairs become sums over n arms.

    Attributes:
        own: per quantity of an arm, its effect on the arm's own slope (as first and as second response).
        ratio: the effect on the other response's slope over that on the own one: -1 for losses of a margin.
        duel: effect of P(first beats second) on the slopes of first and second.
        constant: slopes of both where every column is 0.
        balanced: whether the two slopes of every pair sum to 0.
    """

    own: dict[str, float]
    ratio: float
    duel: tuple[float, float]
    constant: float
    balanced: bool

    @classmethod
    def read(cls, objective: Objective) -> Slopes | None:
        """The coefficients; None where the slopes are not affine, or a calibration response or log-odds are read."""
        kind = objective.card.batch
        if kind == "groups" or {"calibration", "ref_calibration", "degree", "log_odds"} & set(objective.needs):
            return None
        arms, responses, duel = _OF_AN_ARM[kind], _RESPONSES[kind], _OF_A_PAIR[kind]
        arms = {name: what for name, what in arms.items() if what not in ("length", "log_odds")}
        names = [name.format(response) for name in arms for response in responses] + [duel]
        base, *unit = _slopes(objective, names, torch.eye(len(names) + 1, dtype=DOUBLE)[:, 1:]).unbind(0)
        effect = torch.stack(unit) - base  # [columns, 2]
        tried = torch.rand(256, len(names), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        logp = torch.tensor([not name.startswith(("preference", "label")) for name in names])
        tried = torch.where(logp, 20 * tried - 10, tried)
        if not torch.allclose(_slopes(objective, names, tried), base + tried @ effect, rtol=1e-9, atol=1e-9):
            return None
        own: dict[str, float] = {}
        cross: dict[str, float] = {}
        for (_, what), ((a, b), (c, d)) in zip(arms.items(), effect[:-1].view(-1, 2, 2).tolist(), strict=True):
            own[what], cross[what] = own.get(what, 0.0) + a + d, cross.get(what, 0.0) + b + c
        largest = max(own, key=lambda what: abs(own[what]))
        ratio = cross[largest] / own[largest] if own[largest] else 0.0
        if any(abs(cross[what] - ratio * own[what]) > 1e-12 * (1 + abs(own[what])) for what in own):
            return None
        every = torch.cat([base[None], effect])
        balanced = bool((every[:, 0] == -every[:, 1]).all())
        first, second = effect[-1].tolist()
        return cls(own, ratio, (first, second), float(base.sum()), balanced)

    def bind(self, reference: Tensor, preference: Tensor) -> Callable[[Situation], Tensor]:
        """The gradient in the logits of `situation.policy`, `[B, n]`, in games with this reference and this P."""
        fixed = self.own["reference"] * reference
        duels = self.duel[0] * preference + self.duel[1] * preference.mT
        moving = [(what, own) for what, own in self.own.items() if own and what != "reference"]
        plain = self.constant == 0 and not any(self.duel)

        def gradient(situation: Situation) -> Tensor:
            total = fixed
            for what, own in moving:
                total = torch.add(total, situation.arm(what), alpha=own)
            slope = situation.sampler * total  # dL/ds of each arm, but for what the other response does
            if self.ratio:
                slope = torch.add(slope, situation.sampler * slope.sum(-1, keepdim=True), alpha=self.ratio)
            if not plain:
                slope = slope + situation.sampler * (win_rate(duels, situation.sampler) + self.constant)
            if self.balanced:
                return slope
            return slope - situation.policy.exp() * slope.sum(-1, keepdim=True)

        return gradient


def _slopes(objective: Objective, names: list[str], rows: Tensor) -> Tensor:
    """dl/ds of both responses, `[rows, 2]`, of columns `[rows, columns]`; lengths are 1."""
    kind = objective.card.batch
    columns = {name: rows[:, at].clone() for at, name in enumerate(names)}
    columns |= {f"{response}_length": torch.ones(len(rows), dtype=DOUBLE) for response in _RESPONSES[kind]}
    leaves = [columns[response].requires_grad_() for response in _RESPONSES[kind]]
    batch = PairLogps(**columns) if kind == "pairs" else SamplePairs(**columns)
    values: Tensor = objective.loss(batch)  # type: ignore[arg-type]
    found = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    return torch.stack([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)], 1)
