"""The known minimiser of each population loss, found without the objective, then checked through it.

A handful of enumerated responses stands for all text. The target policy comes from a closed form, a bracketed root or
a root of a hand-derived gradient; the objective's exact population loss must have zero gradient there, and descent
from a random start must arrive there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from alignment.objectives.base import Objective
from alignment.objectives.batch import PairLogps
from alignment.objectives.conformance.batches import DOUBLE, Make, require

GRADIENT_TOLERANCE = 1e-9  # on the gradient in logits, relative to its size at the random start
POLICY_TOLERANCE = 1e-6  # on probabilities after descent
Array = np.ndarray


@dataclass
class World:
    """n enumerated responses: who is drawn against whom, who wins, and what the frozen models think.

    Attributes:
        reference, previous: log-probabilities, `[n]`.
        weights: probability that the ordered pair (i, j) is drawn, `[n, n]`.
        wins: probability that i beats j, `[n, n]`.
        rewards, lengths, calibration: per response, `[n]`; calibration is a distribution.
    """

    reference: Array
    weights: Array
    wins: Array
    rewards: Array
    lengths: Array
    calibration: Array
    previous: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def labelled(self) -> Array:
        """Probability that (i, j) enters the data as (chosen, rejected), `[n, n]`; sums to 1."""
        return (self.weights + self.weights.T) * self.wins

    @property
    def chosen(self) -> Array:
        """Marginal distribution of the chosen response, `[n]`."""
        return self.labelled.sum(1)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max())
    return shifted / shifted.sum()


def make_world(arms: int, seed: int, spread: float = 1.0) -> World:
    """Random reference, rewards, pair weights with full support, Bradley-Terry labels."""
    rng = np.random.default_rng(seed)
    rewards = spread * rng.uniform(-1, 1, arms)
    weights = rng.uniform(0.2, 1.0, (arms, arms)) * (1 - np.eye(arms))
    return World(
        reference=np.log(softmax(rng.normal(size=arms))),
        weights=weights / weights.sum(),
        wins=sigmoid(rewards[:, None] - rewards[None, :]),
        rewards=rewards,
        lengths=rng.integers(2, 9, arms).astype(float),
        calibration=softmax(rng.normal(size=arms)),
        previous=np.log(softmax(rng.normal(size=arms))),
    )


def population_loss(objective: Objective, world: World, logits: Tensor) -> Tensor:
    """Expected loss over all (chosen, rejected, calibration) triples at the policy softmax(logits); a scalar."""
    n = len(world.reference)
    i, j, k = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"))
    weight = torch.as_tensor(world.labelled)[i, j] * torch.as_tensor(world.calibration)[k]
    kept = weight > 0
    i, j, k, weight = i[kept], j[kept], k[kept], weight[kept]
    policy = torch.log_softmax(logits, 0)
    table = {"": policy, "ref_": torch.as_tensor(world.reference), "prev_": torch.as_tensor(world.previous)}
    columns: dict[str, Tensor] = {}
    for name, at in (("chosen", i), ("rejected", j), ("calibration", k)):
        columns |= {f"{prefix}{name}": values[at] for prefix, values in table.items()}
        columns[f"{name}_length"] = torch.as_tensor(world.lengths)[at]
        columns[f"reward_{name}"] = torch.as_tensor(world.rewards)[at]
    del columns["prev_calibration"], columns["reward_calibration"]
    return (weight * objective.loss(PairLogps(**columns))).sum()


def gradient(objective: Objective, world: World, logits: Tensor) -> Tensor:
    """Gradient of the population loss in the logits, `[n]`."""
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(population_loss(objective, world, leaf), leaf)[0]


def descend(objective: Objective, world: World, start: Tensor) -> Tensor:
    """Log-probabilities after descent (L-BFGS with line search) from `start`."""
    logits = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = population_loss(objective, world, logits)
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.log_softmax(logits.detach(), 0)


@dataclass
class Case:
    """An objective's settings, a world and the minimiser that theory gives for it, as log-probabilities `[n]`."""

    settings: dict[str, Any]
    world: World
    target: Array


def tilted(world: World, exponent: Array) -> Array:
    """log of ref exp(exponent)/Z."""
    return np.log(softmax(world.reference + exponent))


def dpo_cases() -> list[Case]:
    """Closed form; cDPO: labels that smoothing makes Bradley-Terry, P = (sigmoid(d) - e)/(1-2e)."""
    world = make_world(5, seed=1)
    cases = [Case({"beta": 0.5}, world, tilted(world, world.rewards / 0.5))]
    eps, gentle = 0.1, make_world(4, seed=2, spread=0.9)
    gentle.wins = (gentle.wins - eps) / (1 - 2 * eps)
    cases.append(Case({"beta": 0.5, "label_smoothing": eps}, gentle, tilted(gentle, gentle.rewards / 0.5)))
    always = make_world(2, seed=3)
    always.wins = np.array([[0.5, 1.0], [0.0, 0.5]])
    margin = math.log(0.9 / 0.1) / 2.0  # logit(1 - e)/beta
    return [*cases, Case({"beta": 2.0, "label_smoothing": eps}, always, tilted(always, np.array([margin, 0.0])))]


def robust_cases() -> list[Case]:
    """Labels flipped with probability e: the clean optimum."""
    world, eps = make_world(5, seed=4), 0.2
    world.wins = (1 - eps) * world.wins + eps * (1 - world.wins)
    return [Case({"beta": 0.5, "label_smoothing": eps}, world, tilted(world, world.rewards / 0.5))]


def _independent_pairs(world: World, source: Array) -> World:
    """Both responses drawn from `source`, and labels of a general (not Bradley-Terry) preference."""
    n = len(source)
    rng = np.random.default_rng(17)
    upper = np.triu(rng.uniform(0.1, 0.9, (n, n)), 1)
    world.wins = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(n)
    world.weights = np.outer(source, source)
    return world


def ipo_cases() -> list[Case]:
    """pi* ~ ref exp(P(y beats mu)/tau); equal lengths T in the mean form: tau/T."""
    mu = softmax(np.array([0.3, -0.8, 0.5, 0.0]))
    world = _independent_pairs(make_world(4, seed=5), mu)
    world.lengths = np.full(4, 3.0)
    score = world.wins @ mu
    return [
        Case({"tau": 0.4}, world, tilted(world, score / 0.4)),
        Case({"tau": 1.2, "normalization": "mean"}, world, tilted(world, 3.0 * score / 1.2)),
    ]


def inpo_cases() -> list[Case]:
    """pi* ~ exp(P(y beats prev)/eta) ref^(tau/eta) prev^(1 - tau/eta): one step of online mirror descent."""
    cases = []
    for eta, tau in ((0.5, 0.2), (0.5, 0.0), (0.8, 0.8)):
        world = make_world(4, seed=6)
        world = _independent_pairs(world, np.exp(world.previous))
        logits = world.wins @ np.exp(world.previous) / eta
        logits += tau / eta * world.reference + (1 - tau / eta) * world.previous
        cases.append(Case({"eta": eta, "tau": tau}, world, np.log(softmax(logits))))
    return cases


_RATIO: dict[str, Callable[[Array, float], Array]] = {  # u = pi/ref as a function of v = (r - lambda)/beta
    "reverse_kl": lambda v, a: np.exp(v),
    "jsd": lambda v, a: np.exp(v) / (2 - np.exp(v)),
    "forward_kl": lambda v, a: -1 / v,
    "alpha": lambda v, a: (1 - a * v) ** (-1 / a),
}


def f_dpo_cases() -> list[Case]:
    """beta f'(u) = r - lambda; lambda is bracketed so that sum ref u = 1."""
    cases, beta = [], 0.5
    for divergence, a in (("reverse_kl", 0), ("jsd", 0), ("forward_kl", 0), ("alpha", 0.3), ("alpha", 0.7)):
        world = make_world(5, seed=7)
        ceiling = {"reverse_kl": math.inf, "jsd": math.log(2), "forward_kl": 0.0, "alpha": 1 / a if a else 0}[
            divergence
        ]
        ratio, top = _RATIO[divergence], world.rewards.max()
        low = top - beta * ceiling + 1e-9 if math.isfinite(ceiling) else -50.0

        def excess(shift: float, world: World = world, ratio: Any = ratio, a: float = a) -> float:
            return float(np.exp(world.reference) @ ratio((world.rewards - shift) / beta, a)) - 1

        shift = optimize.brentq(excess, low, 50.0, xtol=1e-15, rtol=1e-15)
        u = ratio((world.rewards - shift) / beta, a)
        keywords = {"beta": beta, "divergence": divergence} | ({"alpha": a} if divergence == "alpha" else {})
        cases.append(Case(keywords, world, world.reference + np.log(u)))
    return cases


def reward_aware_cases() -> list[Case]:
    """pi* ~ ref exp(scale r/beta): the loss itself is 0 there, whatever the labels."""
    world = make_world(5, seed=8)
    forms = ("sq", "bwd_kl", "fwd_kl")
    return [
        Case({"beta": 0.8, "scale": 1.5, "form": form}, world, tilted(world, 1.5 * world.rewards / 0.8))
        for form in forms
    ]


def logistic_gradient(world: World, log_policy: Array, beta: float, reference: Array) -> Array:
    """Hand-derived gradient of the population DPO loss in the logits, `[n]`."""
    ratio = log_policy - reference
    push = -beta * sigmoid(-beta * (ratio[:, None] - ratio[None, :])) * world.labelled
    return push.sum(1) - push.sum(0)


def _with_likelihood(world: World, beta: float, coefficients: Array, reference: Array) -> Array:
    """Root of: DPO gradient = coefficients - pi * sum(coefficients), the stationarity of DPO - sum coefficients s."""

    def residual(free: Array) -> Array:
        log_policy = np.log(softmax(np.append(free, 0.0)))
        total = logistic_gradient(world, log_policy, beta, reference)
        return (total - coefficients + np.exp(log_policy) * coefficients.sum())[:-1]

    plain = reference + world.rewards / beta
    solution = optimize.root(residual, (plain - plain[-1])[:-1], tol=1e-14)
    require(bool(np.abs(residual(solution.x)).max() < 1e-12), "the independent root was not found")
    return np.log(softmax(np.append(solution.x, 0.0)))


def rpo_cases() -> list[Case]:
    """Stationarity g = eta beta (base - pi): base = chosen or calibration distribution (per token in `mean`)."""
    cases = []
    for baseline, form in (("chosen", "sum"), ("given", "sum"), ("chosen", "mean"), ("given", "mean")):
        world, beta, eta = make_world(4, seed=9), 0.5, 0.2
        base = world.chosen if baseline == "chosen" else world.calibration
        coefficients = eta * beta * base if form == "sum" else eta * base / world.lengths
        target = _with_likelihood(world, beta, coefficients, world.reference)
        cases.append(Case({"beta": beta, "eta": eta, "form": form, "baseline": baseline}, world, target))
    return cases


def vpo_cases() -> list[Case]:
    """Stationarity g = +- alpha beta (cal - pi), + offline."""
    cases = []
    for mode, calibration in (
        ("offline", "chosen"),
        ("offline", "given"),
        ("online", "given"),
        ("online", "rejected"),
    ):
        world, beta, alpha = make_world(4, seed=10), 0.5, 0.1
        base = {"chosen": world.chosen, "given": world.calibration, "rejected": world.labelled.sum(0)}[calibration]
        coefficients = alpha * beta * base * (1 if mode == "offline" else -1)
        target = _with_likelihood(world, beta, coefficients, world.reference)
        cases.append(Case({"beta": beta, "alpha": alpha, "mode": mode, "calibration": calibration}, world, target))
    return cases


def cpo_cases() -> list[Case]:
    """As rpo with a uniform reference."""
    world, beta, weight = make_world(4, seed=12), 0.5, 0.1
    target = _with_likelihood(world, beta, weight * world.chosen, np.zeros(4))
    return [Case({"beta": beta, "nll_weight": weight}, world, target)]


def simpo_cases() -> list[Case]:
    """gamma = 0: pi* ~ exp(T r/beta). Two responses, gamma > 0: P sigmoid(gamma - d) = (1-P) sigmoid(gamma + d)."""
    world, pair = make_world(4, seed=13), make_world(2, seed=14)
    world.lengths, pair.lengths = np.full(4, 2.0), np.full(2, 2.0)
    cases = [Case({"beta": 2.0, "gamma": 0.0}, world, np.log(softmax(2.0 * world.rewards / 2.0)))]
    win, gamma, beta = pair.wins[0, 1], 0.7, 2.0
    gap = optimize.brentq(lambda d: win * sigmoid(gamma - d) - (1 - win) * sigmoid(gamma + d), -50, 50, xtol=1e-14)
    return [*cases, Case({"beta": beta, "gamma": gamma}, pair, np.log(softmax(np.array([2.0 * gap / beta, 0.0]))))]


CASES: dict[str, Callable[[], list[Case]]] = {
    "dpo": dpo_cases,
    "robust": robust_cases,
    "ipo": ipo_cases,
    "inpo": inpo_cases,
    "f_dpo": f_dpo_cases,
    "reward_aware_rpo": reward_aware_cases,
    "rpo": rpo_cases,
    "vpo": vpo_cases,
    "cpo": cpo_cases,
    "simpo": simpo_cases,
}


def hinge_optimum(cls: Make) -> str:
    """Two responses: the slope in the margin changes sign at beta m = 1, where bisection arrives."""
    world, beta = make_world(2, seed=15), 0.5
    world.wins = np.array([[0.5, 0.7], [0.3, 0.5]])
    objective, base = cls(beta=beta), torch.as_tensor(world.reference)

    def slope(margin: float) -> float:
        return float(gradient(objective, world, base + torch.tensor([margin, 0.0], dtype=DOUBLE))[0])

    require(slope(1 / beta - 1e-6) < 0 < slope(1 / beta + 1e-6), "the slope does not change sign at beta m = 1")
    low, high = -7.0, 9.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    require(abs(low - 1 / beta) < 1e-9, f"descent stops at margin {low:.6g}, expected {1 / beta:g}")
    return "two responses: kink at beta m = 1, reached"


def optimum(cls: type[Objective]) -> str:
    """Zero population gradient at the independently known minimiser, and descent reaches it; or none is known."""
    name = cls.card.name
    if name == "hinge":
        return hinge_optimum(cls)
    if name not in CASES:
        require(cls.card.optimum is None, "the card states an optimum that no tabular case proves; set optimum=None")
        return "none is known: the card says so"
    cases = CASES[name]()
    for case in cases:
        _prove(cls(**case.settings), case)
    return f"{len(cases)} worlds: zero gradient at the minimiser, descent reaches it"


def _prove(objective: Objective, case: Case) -> None:
    target = torch.as_tensor(case.target, dtype=DOUBLE)
    require(abs(float(target.exp().sum()) - 1) < 1e-9, "the independent target is not a distribution")
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(len(target), generator=generator, dtype=DOUBLE)
    there, here = gradient(objective, case.world, target), gradient(objective, case.world, start)
    size, scale = float(there.abs().max()), float(here.abs().max())
    require(size < GRADIENT_TOLERANCE * max(scale, 1e-3), f"{case.settings}: gradient {size:.3g} at the minimiser")
    miss = float((descend(objective, case.world, start).exp() - target.exp()).abs().max())
    require(miss < POLICY_TOLERANCE, f"{case.settings}: descent ends {miss:.3g} away from the minimiser")
