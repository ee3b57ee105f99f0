"""Judges for studying objectives, not for aligning anything: a reward with prompt noise, and a cyclic oracle.

reward: {name: shifted, reward: {name: vader}, scale: 5.0, seed: 0}
oracle: {name: cyclic, pattern: '\\w+', strength: 0.9}
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.rewards.base import Prompt, Reward, RewardFunction, check_lengths
from alignment.rewards.oracles import as_reward_section, symmetric
from alignment.rewards.registry import get_reward


@dataclass(frozen=True)
class ShiftedReward(Reward):
    """Another reward plus a number that depends on the prompt alone, normal with standard deviation `scale`.

    No preference between two responses to a prompt changes; an objective that compares rewards across prompts does.

    Attributes:
        reward: a reward section, or a name alone.
        scale: in the reward's unit.
        seed: of the numbers.

    Raises:
        UserError: no reward section, or a scale or seed that is not a number.
    """

    reward: str | Mapping[str, Any] = field(metadata={"section": "reward"})
    scale: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "shifted"

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or self.scale < 0:
            raise UserError(f"reward shifted: scale must be a number of at least 0, not {self.scale!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"reward shifted: seed must be a whole number, not {self.seed!r}")
        try:
            as_reward_section(self.reward)
        except ValueError as error:
            raise UserError(f"reward shifted: reward {error}, not {self.reward!r:.60}") from None
        _ = self._scorer

    @cached_property
    def _scorer(self) -> RewardFunction:
        return get_reward(**as_reward_section(self.reward))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """See `RewardFunction.score`."""
        scores = self._scorer.score(prompts, responses)
        return [score + self._shift(prompt) for score, prompt in zip(scores, prompts, strict=True)]

    def _shift(self, prompt: Prompt) -> float:
        digest = hashlib.sha256(f"{self.seed} {json.dumps(prompt, sort_keys=True)}".encode()).hexdigest()
        return random.Random(digest).gauss(0.0, self.scale)

    def describe(self) -> str:
        return f"{self._scorer.describe()}; plus N(0, {self.scale:g}^2) by prompt, seed {self.seed}"


@dataclass(frozen=True)
class CyclicOracle:
    """Rock, paper, scissors over a count: n matches beat n - 1 (mod 3) with probability `strength`, equal ones tie.

    Intransitive: no scalar reward gives these preferences, and every pure strategy is beaten by another.

    Attributes:
        pattern: Python regular expression whose matches in the response are counted.
        strength: P(winner > loser), in [0.5, 1].

    Raises:
        UserError: `pattern` is no expression, or `strength` out of range.
    """

    pattern: str
    strength: float = 0.9
    name: ClassVar[str] = "cyclic"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError):
            raise UserError(f"oracle cyclic: pattern {self.pattern!r} is not a valid expression") from None
        if (
            isinstance(self.strength, bool)
            or not isinstance(self.strength, int | float)
            or not 0.5 <= self.strength <= 1
        ):
            raise UserError(f"oracle cyclic: strength must be in [0.5, 1], not {self.strength!r}")

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See `PreferenceOracle.probability`; the prompt is not read."""
        check_lengths(prompts, first, second)
        return symmetric(self._compare, both_orders=False)(prompts, first, second)

    def _compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        won = {0: 0.5, 1: float(self.strength), 2: 1 - float(self.strength)}
        return [won[(self._count(a) - self._count(b)) % 3] for a, b in zip(first, second, strict=True)]

    def _count(self, text: str) -> int:
        return len(re.findall(self.pattern, text))

    def describe(self) -> str:
        return f"count of {self.pattern!r} modulo 3: each beats the one below with probability {self.strength:g}"
