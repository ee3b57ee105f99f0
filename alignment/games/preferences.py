"""Preference matrices: who beats whom, how often. No policy, no reference, no solution (`solution.py`).

P[i, j] is the probability that response i is preferred to response j; P[i, j] + P[j, i] = 1, so ties are 1/2 and the
diagonal is. Everything is float64. Random matrices are drawn from a generator that the caller seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-6  # on P + P' = 1: matrices written by hand or in float32 pass, and no wrong one does
KINDS = ("random", "rock_paper_scissors", "cyclic", "bradley_terry", "ties", "deterministic")


def random(arms: int, *, games: int, generator: torch.Generator) -> Tensor:
    """`[games, arms, arms]`: uniform on [0, 1] below the diagonal, as in EGPO's simulation (author code)."""
    below = torch.rand(games, arms, arms, generator=generator, dtype=torch.float64).tril(-1)
    return below + (1 - below.mT).triu(1) + 0.5 * torch.eye(arms, dtype=torch.float64)


def cyclic(arms: int, strength: float = 1.0) -> Tensor:
    """`[arms, arms]`: every arm beats the next (arms - 1) // 2 of a circle with probability (1 + strength)/2.

    With an even number the arm across is a tie. Uniform play is a Nash policy of the game without a KL term.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength!r}")
    step = (torch.arange(arms)[None, :] - torch.arange(arms)[:, None]) % arms
    half = (arms - 1) // 2
    wins = ((step >= 1) & (step <= half)).to(torch.float64)
    losses = (step >= arms - half).to(torch.float64)
    return 0.5 + strength / 2 * (wins - losses)


def rock_paper_scissors() -> Tensor:
    """`[3, 3]`: each arm always beats the next one."""
    return cyclic(3)


def bradley_terry(rewards: Tensor) -> Tensor:
    """`[..., n, n]`: sigmoid(r_i - r_j) of rewards `[..., n]`."""
    rewards = rewards.to(torch.float64)
    return (rewards[..., :, None] - rewards[..., None, :]).sigmoid()


def ties(arms: int) -> Tensor:
    """`[arms, arms]`: nothing is preferred to anything."""
    return torch.full((arms, arms), 0.5, dtype=torch.float64)


def deterministic(arms: int) -> Tensor:
    """`[arms, arms]`: a strict order; the later arm always wins."""
    full = torch.ones(arms, arms, dtype=torch.float64)
    return full.tril(-1) + 0.5 * torch.eye(arms, dtype=torch.float64)


def make(kind: str, arms: int, games: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """`[games, arms, arms]` of one of `KINDS`; `strength` is that of cyclic, the scale of bradley_terry's rewards.

    Raises:
        ValueError: an unknown kind, fewer than two arms, or rock_paper_scissors with other than three.
    """
    if arms < 2:
        raise ValueError(f"a game needs at least two arms, got {arms!r}")
    if kind == "random":
        return random(arms, games=games, generator=generator)
    if kind == "bradley_terry":
        rewards = torch.randn(games, arms, generator=generator, dtype=torch.float64)
        return bradley_terry(strength * rewards)
    if kind == "rock_paper_scissors" and arms != 3:
        raise ValueError(f"rock_paper_scissors has three arms, got {arms!r}; kind cyclic takes any number")
    one = {
        "rock_paper_scissors": rock_paper_scissors,
        "cyclic": lambda: cyclic(arms, strength),
        "ties": lambda: ties(arms),
        "deterministic": lambda: deterministic(arms),
    }
    if kind not in one:
        raise ValueError(f"unknown kind of game {kind!r}; valid: {', '.join(KINDS)}")
    return one[kind]().expand(games, arms, arms).clone()


def check(preference: Tensor) -> Tensor:
    """The matrices `[..., n, n]` in float64.

    Raises:
        ValueError: not square, an entry outside [0, 1], or a pair whose two entries do not sum to 1 (named).
    """
    if preference.dim() < 2 or preference.shape[-1] != preference.shape[-2] or preference.shape[-1] < 1:
        raise ValueError(f"preferences must have shape [..., n, n], got {list(preference.shape)}")
    preference = preference.to(torch.float64)
    if wrong := _first(~((preference >= 0) & (preference <= 1))):
        raise ValueError(f"preferences must be probabilities: P[{_place(wrong)}] is {preference[wrong].item():g}")
    total = preference + preference.mT
    if wrong := _first((total - 1).abs() > TOLERANCE):
        i, j = wrong[-2:]
        raise ValueError(f"P[{i}, {j}] + P[{j}, {i}] must be 1, got {total[wrong].item():g}")
    return preference


def _first(wrong: Tensor) -> tuple[int, ...]:
    """The index of the first true entry, () where there is none."""
    return tuple(int(index) for index in wrong.nonzero()[0]) if bool(wrong.any()) else ()


def _place(index: tuple[int, ...]) -> str:
    return ", ".join(map(str, index))
