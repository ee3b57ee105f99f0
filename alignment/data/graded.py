"""Graded pairs: two responses, and by how much which of them is better, as a whole number on both sides of 0.

HelpSteer3 (`context`, `response1`, `response2`, `overall_preference`) and HelpSteer2's preferences (`prompt`,
`response_1`, `response_2`, `preference_strength`): -3 says that response 1 is much better, 0 that they are about the
same, 3 that response 2 is much better. The size of the grade becomes `margin`, which `reward_model.margin` may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.data.preferences import BAD_NUMBER, EMPTY, MISSING_FIELD, NOT_TEXT, BadRow, is_messages

Row = dict[str, Any]
PAIRS = (("response1", "response2"), ("response_1", "response_2"), ("output_1", "output_2"))
GRADES = ("overall_preference", "preference_strength")


def is_graded(rows: Sequence[Row], keys: set[str]) -> bool:
    """Whether first rows look like graded pairs: by the grade's name, or a negative `label`."""
    if not any(keys >= {*pair} for pair in PAIRS) or not {"context", "prompt"} & keys:
        return False
    return any(name in keys for name in GRADES) or any(_below_zero(row.get("label")) for row in rows)


def _below_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value < 0


def from_graded(row: Row, chat: bool) -> Row:
    """The better response as chosen; of 0 the first, with label 0.5.

    Raises:
        BadRow: no prompt, no response, or a grade that is not a whole number.
    """
    pair = next((pair for pair in PAIRS if any(row.get(column) is not None for column in pair)), PAIRS[0])
    for column in pair:
        if row.get(column) is None:
            raise BadRow(MISSING_FIELD, f"{column} is missing")
        if not isinstance(row[column], str):
            raise BadRow(NOT_TEXT, f"{column}: expected text, got {type(row[column]).__name__}")
        if not row[column].strip():
            raise BadRow(EMPTY, f"{column} is empty")
    grade = _grade(row)
    better, worse = (row[column] for column in (pair if grade <= 0 else pair[::-1]))
    prompt = row["context"] if row.get("context") is not None else row.get("prompt")
    if prompt is None:
        raise BadRow(MISSING_FIELD, "context is missing")
    found = {key: value for key, value in row.items() if key != "label"}
    found |= {"prompt": prompt, "chosen": better, "rejected": worse, "margin": abs(grade)}
    if grade == 0:
        found["label"] = 0.5
    if isinstance(prompt, str) and not chat:
        return found
    if not isinstance(prompt, str) and not is_messages(prompt):
        raise BadRow(NOT_TEXT, f"context: expected text or a list of messages, got {type(prompt).__name__}")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = {c: [{"role": "assistant", "content": found[c]}] for c in ("chosen", "rejected")}
    return found | answers | {"prompt": asked}


def _grade(row: Row) -> float:
    column = next((c for c in ("label", *GRADES) if row.get(c) is not None), None)
    if column is None:
        raise BadRow(MISSING_FIELD, f"no grade ({', '.join(GRADES)}) says which response is better")
    value = row[column]
    try:
        grade = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        grade = None
    if grade is None or grade != int(grade if abs(grade) < 1e9 else 0):
        raise BadRow(
            BAD_NUMBER, f"{column}: expected a whole number, negative where the first is better; got {value!r:.40}"
        )
    return grade
