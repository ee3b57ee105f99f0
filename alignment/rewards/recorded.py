"""Answers that were written down before, replayed: nothing is asked, nothing is computed.

    oracle: {name: recorded, path: verdicts.jsonl}
    reward: {name: recorded, path: scores.jsonl}

For annotations of people, verdicts of a judge that is no longer there, or scores of a model that does not fit here.
Not the judge's own cache, which it keeps by itself (`judge`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_text
from alignment.rewards.base import Prompt, Reward, check_lengths, prompt_text

TOLERANCE = 1e-9  # of p + q = 1 where a pair stands in both orders: decimal fractions written in a file


@dataclass(frozen=True)
class RecordedReward(Reward):
    """Scores from a file; NaN for a prompt and response that are not in it.

    Attributes:
        path: JSON lines of `{"prompt": …, "response": …, "score": …}`. A prompt is a text or chat messages, of which
            a single one stands for its text. Texts are compared to the letter. A score is a number, or null for
            "could not be scored"; other keys of a row are not read.

    Raises:
        UserError: `path` is not text; at the first question, a file or row that cannot be used, or two rows that
            contradict each other.
    """

    path: str = field(metadata={"file": True})
    name: ClassVar[str] = "recorded"

    def __post_init__(self) -> None:
        _check_path(self.path, "reward")

    @cached_property
    def _known(self) -> dict[tuple[str, str], float]:
        """(prompt, response) -> score."""
        lines: dict[tuple[str, str], tuple[float, str]] = {}
        for where, row in _rows(self.path, ("response",), "score"):
            score = _number(row, "score", where)
            key = (prompt_text(row["prompt"]), row["response"])
            if score is None:
                continue
            before, line = lines.setdefault(key, (score, where))
            if before != score:
                raise UserError(f"{line} and {where}: score {before!r} and {score!r} of one response; remove one row")
        return {key: score for key, (score, _) in lines.items()}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The recorded score, or NaN, per response."""
        check_lengths(prompts, responses)
        known = self._known
        return [known.get((prompt_text(p), text), math.nan) for p, text in zip(prompts, responses, strict=True)]

    def describe(self) -> str:
        return f"scores recorded in {self.path}, SHA-256 {_digest(self.path)}"


@dataclass(frozen=True)
class RecordedOracle:
    """Preferences from a file; NaN for a pair that is not in it.

    A pair stands in the file in one order and is answered in both: the recorded number as it is in the recorded order
    (of the first row, where both are there), 1 minus that in the other.

    Attributes:
        path: JSON lines of `{"prompt": …, "first": …, "second": …, "probability": …}`, with P(first > second) in
            [0, 1], or null for "could not be judged". Prompts and texts as of `RecordedReward`.

    Raises:
        UserError: `path` is not text; at the first question, a file or row that cannot be used, or two rows that
            contradict each other.
    """

    path: str = field(metadata={"file": True})
    name: ClassVar[str] = "recorded"

    def __post_init__(self) -> None:
        _check_path(self.path, "oracle")

    @cached_property
    def _known(self) -> dict[tuple[str, str, str], float]:
        """(prompt, first, second) -> P(first > second), in one order of each pair."""
        lines: dict[tuple[str, str, str], tuple[float, str]] = {}
        for where, row in _rows(self.path, ("first", "second"), "probability"):
            p = _number(row, "probability", where)
            prompt, first, second = prompt_text(row["prompt"]), row["first"], row["second"]
            if p is None:
                continue
            if not 0 <= p <= 1:
                raise UserError(f"{where}: probability must be in [0, 1], not {p!r}")
            if first == second and p != 0.5:
                raise UserError(f"{where}: probability must be 0.5, not {p!r}: first and second are the same text")
            turned = (prompt, second, first) in lines and first != second
            key = (prompt, second, first) if turned else (prompt, first, second)
            before, line = lines.setdefault(key, (p, where))
            expected = 1.0 - before if turned else before
            if abs(expected - p) > TOLERANCE:
                raise UserError(
                    f"{line} and {where}: probability {before!r} and {p!r} of one pair"
                    f"{', in opposite orders' if turned else ''}; remove one row"
                )
        return {key: p for key, (p, _) in lines.items()}

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See `PreferenceOracle.probability`."""
        check_lengths(prompts, first, second)
        return [self._answer(prompt_text(p), a, b) for p, a, b in zip(prompts, first, second, strict=True)]

    def _answer(self, prompt: str, a: str, b: str) -> float:
        if a == b:
            return 0.5
        if (prompt, a, b) in self._known:
            return self._known[prompt, a, b]
        return 1.0 - self._known.get((prompt, b, a), math.nan)

    def describe(self) -> str:
        return f"preferences recorded in {self.path}, SHA-256 {_digest(self.path)}"


def _check_path(path: Any, kind: str) -> None:
    if not isinstance(path, str) or not path:
        raise UserError(f"{kind} recorded: path must be a JSON-lines file, not {path!r}")


def _rows(path: str, texts: Sequence[str], number: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`FILE:line`, row) with a usable prompt and texts; UserError for any other row, and for a file without rows."""
    empty, needed = True, ", ".join(("prompt", *texts, number))
    for where, row in iterate_json_lines(Path(path)):
        empty = False
        for key in ("prompt", *texts, number):
            if key not in row:
                raise UserError(
                    f"{where}: key {key!r} is missing; a row needs {', '.join(('prompt', *texts, number))}"
                )
        prompt = row["prompt"]
        chat = isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in prompt
        )
        if not (isinstance(prompt, str) or chat):
            raise UserError(f"{where}: prompt must be text or chat messages, not {prompt!r:.60}")
        for key in texts:
            if not isinstance(row[key], str):
                raise UserError(f"{where}: {key} must be text, not {row[key]!r:.60}")
        yield where, row
    if empty:
        raise UserError(f"{path}: holds no rows; rows of {needed} are needed")


def _number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number, or None for null."""
    value = row[key]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a number or null, not {value!r:.40}")
    return float(value)


def _digest(path: str) -> str:
    return hashlib.sha256(read_text(Path(path)).encode()).hexdigest()[:12]
