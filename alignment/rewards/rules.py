"""Rewards that are rules: no model, no network, the same answer every time.

Each is a frozen dataclass whose fields are its recipe keys, so two rewards are equal exactly when they judge alike.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_text
from alignment.rewards.base import Prompt, Reward, check_lengths, prompt_text


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


@dataclass(frozen=True)
class ExactMatchReward(Reward):
    """1 if the response is a reference answer to its prompt, else 0; NaN for a prompt without one.

    Attributes:
        answers: JSON-lines file of `{"prompt": …, "answer": …}`. A prompt is a text or chat messages, of which a
            single one stands for its text; `answer` is a text or a list of texts; rows that repeat a prompt add some.
        strip: white space around the response and the answers does not count.
        ignore_case: neither does case (Unicode case folding).

    Raises:
        UserError: a key of the wrong type; at the first score, a file or row that cannot be used.
    """

    answers: str = field(metadata={"file": True})
    strip: bool = True
    ignore_case: bool = False
    name: ClassVar[str] = "exact_match"

    def __post_init__(self) -> None:
        if not isinstance(self.answers, str) or not self.answers:
            raise UserError(f"reward exact_match: answers must be a JSON-lines file, not {self.answers!r}")
        for key in ("strip", "ignore_case"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"reward exact_match: {key} must be true or false, not {getattr(self, key)!r}")

    @cached_property
    def _known(self) -> dict[str, set[str]]:
        """Prompt -> its answers, as they are compared."""
        known: dict[str, set[str]] = {}
        for where, row in iterate_json_lines(Path(self.answers)):
            prompt: Any = row.get("prompt")
            answers = row.get("answer")
            chat = isinstance(prompt, list) and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in prompt
            )
            if not (isinstance(prompt, str) or chat):
                raise UserError(f"{where}: prompt must be text or chat messages, not {prompt!r:.60}")
            answers = answers if isinstance(answers, list) else [answers]
            if not answers or not all(isinstance(answer, str) for answer in answers):
                raise UserError(f"{where}: answer must be text or a list of texts, not {row.get('answer')!r:.60}")
            known.setdefault(prompt_text(prompt), set()).update(map(self._compared, answers))
        if not known:
            raise UserError(f"{self.answers}: holds no rows; rows of prompt and answer are needed")
        return known

    def _compared(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """1, 0 or NaN per response."""
        check_lengths(prompts, responses)
        answers = [self._known.get(prompt_text(prompt)) for prompt in prompts]
        return [
            math.nan if right is None else float(self._compared(response) in right)
            for right, response in zip(answers, responses, strict=True)
        ]

    def describe(self) -> str:
        digest = hashlib.sha256(read_text(Path(self.answers)).encode()).hexdigest()[:12]
        blind = [name for name, on in (("outer white space", self.strip), ("case", self.ignore_case)) if on]
        without = f", {' and '.join(blind)} ignored" if blind else ""
        return f"1 if the response is an answer in {self.answers} (SHA-256 {digest}){without}, else 0"
