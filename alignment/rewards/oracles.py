"""Oracles that need no service: a reward read by Bradley–Terry, and a table. Also what all oracles share.

    oracle:
      name: bradley_terry
      reward: {name: vader}
      temperature: 0.5

Not the judge behind an HTTP endpoint (`judge`), the general preference model (`general`), nor recorded answers
(`recorded`). `symmetric` gives any back-end the two promises of `PreferenceOracle`; `flip_labels` spoils labels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.files import json_digest, read_json_object
from alignment.rewards.base import Prompt, RewardFunction, check_lengths
from alignment.rewards.registry import get_reward

Probability = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[float]]
SUM_TOLERANCE = 1e-9  # of P_ij + P_ji in a table: decimal fractions written in a file


def symmetric(ask: Probability, *, both_orders: bool = True) -> Probability:
    """An oracle's `probability` from a back-end that may favour the first or the second place.

    Each unordered pair of different texts is asked about once, however often and in whichever order it stands in a
    call; P(b, a) is computed as 1 - P(a, b), and the two sum to 1 to the last bit. Equal texts are 1/2, unasked.

    Args:
        ask: `(prompts, first, second) -> P(first > second)`, each in [0, 1] or NaN for "could not be judged".
        both_orders: ask for (a, b) and (b, a) and take the mean of P(a, b) and 1 - P(b, a); NaN if either is.
            False for a back-end without an order, which is asked once, with the texts sorted.

    Returns:
        A function with the signature and errors of `PreferenceOracle.probability`; it also raises ValueError where
        `ask` gives a wrong number of answers or one outside [0, 1].
    """

    def probability(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        check_lengths(prompts, first, second)
        keys = [
            (json.dumps(prompt, sort_keys=True), *sorted((a, b)))
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        pairs = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key[1] != key[2]}
        asked, low, high = list(pairs.values()), [key[1] for key in pairs], [key[2] for key in pairs]
        answers: list[float] = []
        if pairs and both_orders:  # one call, so that a back-end can work on all of it at once
            both = _checked(ask([*asked, *asked], [*low, *high], [*high, *low]), 2 * len(pairs))
            forward, backward = both[: len(pairs)], both[len(pairs) :]
            answers = [(p + (1.0 - q)) / 2 for p, q in zip(forward, backward, strict=True)]
        elif pairs:
            answers = _checked(ask(asked, low, high), len(pairs))
        found = dict(zip(pairs, answers, strict=True))
        return [
            0.5 if key not in found else found[key] if a == key[1] else 1.0 - found[key]
            for key, a in zip(keys, first, strict=True)
        ]

    return probability


def _checked(answers: Sequence[float], wanted: int) -> list[float]:
    if len(answers) != wanted:
        raise ValueError(f"{wanted} pairs but {len(answers)} answers of the back-end")
    for answer in answers:
        if not (0.0 <= answer <= 1.0 or math.isnan(answer)):
            raise ValueError(f"{answer!r} is not a probability")
    return [float(answer) for answer in answers]


def flip_labels(rows: Iterable[int | str], probability: float, seed: int) -> list[bool]:
    """Which labels to flip: each with `probability`, alone and for itself.

    A row's answer depends on `seed` and the row's own number or key, not on the other rows, so it is the same however
    the rows are split into batches or processes. Whatever is flipped at some probability is also flipped at a higher
    one with the same seed.

    Args:
        rows: numbers in the whole data set, or keys; different for different rows.
        probability: in [0, 1]; 0 flips nothing, 1 everything.
        seed: any integer.

    Raises:
        ValueError: `probability` is outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability!r} is not in [0, 1]")
    draws = (hashlib.sha256(f"label noise {seed} {row}".encode()).digest()[:8] for row in rows)
    return [int.from_bytes(draw, "big") < probability * 2**64 for draw in draws]


def as_reward_section(section: Any) -> dict[str, Any]:
    """`vader` or `{name: regex, pattern: good}` as a mapping with a name; ValueError for anything else."""
    if isinstance(section, str):
        return {"name": section}
    if isinstance(section, Mapping) and isinstance(section.get("name"), str):
        return dict(section)
    raise ValueError("must be a reward's name or a reward section with a name")


@dataclass(frozen=True)
class RewardOracle:
    """A scalar reward as an oracle: P(a > b) = sigmoid((r(a) - r(b)) / temperature), or 1, 1/2, 0 (`hard`).

    Transitive by construction. NaN where a reward is, for different texts.

    Attributes:
        reward: a reward section, `{name: vader}`, or a name alone.
        temperature: T > 0, in the reward's unit: a gap of T is preferred with probability sigmoid(1) = 0.73.
        hard: the higher reward wins with probability 1, equal ones tie; the limit of temperature 0.

    Raises:
        UserError: no reward section, whatever that reward refuses, or a temperature that is not above 0.
    """

    reward: str | Mapping[str, Any] = field(metadata={"section": "reward"})
    temperature: float = 1.0
    hard: bool = False
    name: ClassVar[str] = "bradley_terry"

    def __post_init__(self) -> None:
        if not isinstance(self.hard, bool):
            raise UserError(f"oracle bradley_terry: hard must be true or false, not {self.hard!r}")
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < math.inf:
            raise UserError(f"oracle bradley_terry: temperature must be a number above 0, not {self.temperature!r}")
        if self.hard and self.temperature != 1:
            raise UserError("oracle bradley_terry: temperature changes nothing with hard: true; remove one of them")
        try:
            as_reward_section(self.reward)
        except ValueError as error:
            raise UserError(f"oracle bradley_terry: reward {error}, not {self.reward!r:.60}") from None
        _ = self._scorer  # its own complaints come now, not after an hour of sampling

    @cached_property
    def _scorer(self) -> RewardFunction:
        return get_reward(**as_reward_section(self.reward))

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See `PreferenceOracle.probability`; each different (prompt, response) is scored once."""
        check_lengths(prompts, first, second)
        keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
        triples = [t for t in zip(keys, prompts, first, second, strict=True) if t[2] != t[3]]
        wanted = {(key, text): prompt for key, prompt, a, b in triples for text in (a, b)}
        scores = self._scorer.score(list(wanted.values()), [text for _, text in wanted]) if wanted else []
        of = dict(zip(wanted, scores, strict=True))
        return [
            0.5 if a == b else self._preference(of[key, a], of[key, b])
            for key, a, b in zip(keys, first, second, strict=True)
        ]

    def _preference(self, a: float, b: float) -> float:
        """P(a > b); the smaller one of P and 1 - P is computed, so that it keeps its digits and the two sum to 1."""
        if math.isnan(a) or math.isnan(b):
            return math.nan
        if a == b:
            return 0.5
        odds = 0.0 if self.hard else math.exp(-abs(a - b) / self.temperature)
        less = odds / (1.0 + odds)  # sigmoid(-|a - b| / T), in [0, 1/2]
        return less if a < b else 1.0 - less

    def describe(self) -> str:
        how = (
            "the higher wins, equal ones tie" if self.hard else f"Bradley–Terry with temperature {self.temperature:g}"
        )
        return f"{how}, on: {self._scorer.describe()}"


@dataclass(frozen=True)
class TabularOracle:
    """Preferences from a table; any cycle in it stays one.

    Attributes:
        table: `{"responses": [n different texts], "matrix": [n rows of n]}`, or the JSON file that holds it.
            matrix[i][j] = P(responses[i] > responses[j]); P_ij + P_ji = 1, and the diagonal is 1/2. The prompt is not
            read. A pair with a text that is not in `responses` is NaN, unless its two texts are equal.

    Raises:
        UserError: the table is not of that form: at once for a mapping, at the first question for a file.
    """

    table: str | Mapping[str, Any] = field(metadata={"file": True})
    name: ClassVar[str] = "tabular"

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            _ = self._places

    @cached_property
    def _content(self) -> Mapping[str, Any]:
        if isinstance(self.table, Mapping):
            return self.table
        if not isinstance(self.table, str) or not self.table:
            raise UserError(
                f"oracle tabular: table must be a JSON file or a mapping of responses and matrix, not {self.table!r}"
            )
        return read_json_object(Path(self.table))

    @cached_property
    def _places(self) -> dict[str, int]:
        """Row of each response; the table is checked on the way."""
        where = f"oracle tabular: table {self.table}:" if isinstance(self.table, str) else "oracle tabular: table:"
        check_table(self._content, where)
        return {text: i for i, text in enumerate(self._content["responses"])}

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See `PreferenceOracle.probability`."""
        return symmetric(self._look_up, both_orders=False)(prompts, first, second)

    def _look_up(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        places, matrix = self._places, self._content["matrix"]
        known = [(places.get(a), places.get(b)) for a, b in zip(first, second, strict=True)]
        return [math.nan if i is None or j is None else float(matrix[i][j]) for i, j in known]

    def describe(self) -> str:
        digest = json_digest(dict(self._content))[:12]
        source = f" in {self.table}" if isinstance(self.table, str) else ""
        return f"table of preferences among {len(self._places)} responses{source}, SHA-256 {digest}"


def check_table(table: Mapping[str, Any], where: str) -> None:
    """UserError unless `table` is as `TabularOracle.table` says; `where` begins the message."""
    if set(table) != {"responses", "matrix"}:
        raise UserError(f"{where} needs the keys responses and matrix, got {', '.join(map(str, table)) or 'none'}")
    responses, matrix = table["responses"], table["matrix"]
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where} responses must be a list of texts")
    for text in responses:
        if responses.count(text) > 1:
            raise UserError(f"{where} responses has {text!r:.60} twice; keep one")
    n = len(responses)
    square = isinstance(matrix, list) and len(matrix) == n and all(isinstance(r, list) and len(r) == n for r in matrix)
    if not square:
        raise UserError(f"{where} matrix must have {n} rows of {n} numbers, as there are {n} responses")
    for i in range(n):
        for j in range(n):
            value = matrix[i][j]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"{where} matrix[{i}][{j}] must be a probability, not {value!r:.40}")
            if i == j and value != 0.5:
                raise UserError(f"{where} matrix[{i}][{i}] must be 0.5, not {value!r}: a response ties with itself")
            if j < i and abs(value + matrix[j][i] - 1) > SUM_TOLERANCE:
                total = value + matrix[j][i]
                raise UserError(f"{where} matrix[{j}][{i}] + matrix[{i}][{j}] must be 1, not {total:.6g}")
