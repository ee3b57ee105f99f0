"""Rewards that are rules: no model, no network, the same answer every time.

Each is a frozen dataclass whose fields are its recipe keys, so two rewards are equal exactly when they judge alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.rewards.base import Prompt, Reward, check_lengths


@lru_cache(maxsize=1)
def _vader() -> Any:
    """The analyser, made once: it parses a lexicon of 7,500 entries."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@dataclass(frozen=True)
class VaderReward(Reward):
    """VADER's compound sentiment of the response alone (Hutto & Gilbert 2014), in [-1, 1].

    A response without a sentiment word, and an empty one, scores 0: that is VADER's own neutral, not a failure.
    """

    name: ClassVar[str] = "vader"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Compound score per response; the prompt is not read."""
        check_lengths(prompts, responses)
        return [float(_vader().polarity_scores(response)["compound"]) for response in responses]

    def describe(self) -> str:
        return (
            "VADER compound sentiment of the response alone, -1 (negative) to 1 (positive), "
            f"vaderSentiment {version('vaderSentiment')}"
        )


@dataclass(frozen=True)
class LengthReward(Reward):
    """Length of the response in characters (Unicode code points)."""

    name: ClassVar[str] = "length"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Characters per response; the prompt is not read."""
        check_lengths(prompts, responses)
        return [float(len(response)) for response in responses]

    def describe(self) -> str:
        return "length of the response in characters, longer is better"


@dataclass(frozen=True)
class RegexReward(Reward):
    """How often a regular expression occurs in the response, without overlaps.

    Attributes:
        pattern: Python regular expression; put flags inside, such as `(?i)` to ignore case.

    Raises:
        UserError: `pattern` is not text, or not a valid expression.
    """

    pattern: str
    name: ClassVar[str] = "regex"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UserError(f"reward regex: pattern must be text, not {self.pattern!r}; quote it")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"reward regex: pattern {self.pattern!r} is not a valid expression: {error}") from None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Number of matches per response; the prompt is not read."""
        check_lengths(prompts, responses)
        pattern = re.compile(self.pattern)
        return [float(sum(1 for _ in pattern.finditer(response))) for response in responses]

    def describe(self) -> str:
        return f"number of matches of the regular expression {self.pattern!r} in the response"
