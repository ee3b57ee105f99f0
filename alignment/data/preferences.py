"""One preference row in its canonical form, and what makes a row unusable.

A row has `prompt`, `chosen`, `rejected`: three texts, or three lists of chat messages. Lists that repeat the prompt's
messages (UltraFeedback, TRL's implicit prompt) are taken apart into prompt and responses. Optional columns travel with
it: token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`; used as they are, never tokenised again), a `calibration`
response, and numbers that some objectives read. Not here: reading sources (`reading`), other forms of rows (`forms`),
tokens (`tokens`), whole data sets (`pipeline`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import iterate_json_lines, parse_json

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
# Numbers of each response of a pair: for both or for neither.
TOGETHER = tuple((f"{name}_chosen", f"{name}_rejected") for name in ("reward", "preference", "log_odds", "prev"))
NUMBER_COLUMNS = (*(column for pair in TOGETHER for column in pair), "margin", "label")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
READ_COLUMNS = (*NUMBER_COLUMNS, "calibration", "calibration_ids")  # by some objectives, or reward models
OPTIONAL_COLUMNS = (*ID_COLUMNS, *READ_COLUMNS)
# The beginning of chat messages that were written as text, as Python or JSON shows them.
_WRITTEN = re.compile(r"""\s*\[?\s*\{\s*(['"])(?:(role|content)|from|value)\1\s*:""")

MISSING_FIELD = "missing_field"
NOT_TEXT = "not_text"
EMPTY = "empty"
SAME_RESPONSES = "same_responses"
DIFFERENT_PROMPTS = "different_prompts"
SAME_AFTER_TRUNCATION = "same_after_truncation"
PROMPT_TOO_LONG = "prompt_too_long"
TIE = "tie"
BOS_EOS = "bos_eos"
BAD_NUMBER = "bad_number"
UNKNOWN_FORM = "unknown_form"
LOST_TEXT = "lost_text"
CONTROL_TOKEN = "control_token"

# What messages may have besides role and content: chat templates write it. `tool_calls` is JSON text.
CARRIED = ("reasoning_content", "tool_calls", "tool_call_id", "name")


class BadRow(Exception):
    """A row that cannot be used; never leaves `alignment.data`.

    Attributes:
        reason: one of the strings above.
        detail: what is wrong, in words, without the row's text.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a line is not a JSON object.
    """
    rows = [row for _, row in iterate_json_lines(path)]
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def is_messages(value: Any) -> bool:
    """Whether `value` is a list of chat messages with text in them; the list may be empty."""
    return (
        isinstance(value, list)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def canonical(row: dict[str, Any], unread: Collection[str] = ()) -> dict[str, Any]:
    """The row's known columns, checked; messages keep `role`, `content` and `CARRIED`, numbers are floats.

    A prompt may be empty only where its token ids are given, and so may a response.

    Args:
        row: as its form gives it.
        unread: optional columns that nobody reads: they are left out, whatever is in them.

    Raises:
        BadRow: the first thing that is wrong.
    """
    columns = (c for c in (*TEXT_COLUMNS, *OPTIONAL_COLUMNS) if c not in unread)
    row = explicit_prompt({c: row[c] for c in columns if row.get(c) is not None})
    for column in TEXT_COLUMNS:
        if column not in row:
            raise BadRow(MISSING_FIELD, f"{column} is missing")
    texts = [*TEXT_COLUMNS, *(["calibration"] if "calibration" in row else [])]
    for column in texts:
        _check_text(row, column)
    if len({isinstance(row[c], str) for c in texts}) != 1:
        raise BadRow(UNKNOWN_FORM, f"{', '.join(texts[:-1])} and {texts[-1]} mix text and chat messages")
    if row["chosen"] == row["rejected"] and row.get("chosen_ids") == row.get("rejected_ids"):
        raise BadRow(SAME_RESPONSES, "chosen and rejected are the same")
    if "calibration_ids" in row and "calibration" not in row:
        raise BadRow(MISSING_FIELD, "calibration_ids needs calibration beside it")
    absent = [c for c in ID_COLUMNS if c not in row]
    if 0 < len(absent) < len(ID_COLUMNS):
        raise BadRow(MISSING_FIELD, f"token ids come together: {', '.join(absent)} missing")
    numbers = {c: _number(c, row[c]) for c in NUMBER_COLUMNS if c in row}
    for column in ("label", "preference_chosen", "preference_rejected"):
        if not 0 <= numbers.get(column, 1.0) <= 1:
            raise BadRow(BAD_NUMBER, f"{column}: {numbers[column]:g} is not a probability (0 to 1)")
    for one, other in (pair for given in TOGETHER for pair in (given, given[::-1])):
        if one in numbers and other not in numbers:
            raise BadRow(MISSING_FIELD, f"{other} is missing, and {one} is there")
    plain = {c: [plain_message(m) for m in row[c]] for c in texts if is_messages(row[c])}
    return row | numbers | plain


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """The keys of a message that a chat template reads."""
    found = {"role": message["role"], "content": message["content"]}
    return found if len(message) == 2 else found | {c: message[c] for c in CARRIED if message.get(c)}


def written_json(value: Any) -> Any:
    """A value that may be written as JSON text, without the nulls that Parquet fills records up with."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, dict):
        return {key: written_json(v) if isinstance(v, dict | list) else v for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [written_json(v) if isinstance(v, dict | list) else v for v in value]
    return value


def refuse_written_messages(column: str, text: str) -> None:
    """Messages that a CSV, say, holds as text would be trained on with brackets and all.

    Raises:
        BadRow: `text` is a list of chat messages, or one of them, written out.
    """
    found = _WRITTEN.match(text)
    if found is None or text.rstrip()[-1] not in "]}":
        return
    keys = ("role", "content") if found[2] else ("from", "value")
    if all(f"{found[1]}{key}{found[1]}" in text for key in keys):
        raise BadRow(UNKNOWN_FORM, f"{column}: chat messages written as text; give them as lists, in JSON or Parquet")


def _number(column: str, value: Any) -> float:
    """A finite number; as text, too, because CSV has nothing else."""
    try:
        number = math.nan if isinstance(value, bool | list | dict) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(BAD_NUMBER, f"{column}: expected a finite number, got {value!r:.40}")
    return number


def _check_text(row: dict[str, Any], column: str) -> None:
    value, ids = row[column], row.get(f"{column}_ids")
    if not isinstance(value, str) and not is_messages(value):
        of = f" of {type(value[0]).__name__}" if isinstance(value, list) and value else ""
        raise BadRow(NOT_TEXT, f"{column}: expected text or a list of messages, got {type(value).__name__}{of}")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise BadRow(NOT_TEXT, f"{column}_ids: expected a list of token ids")
    if column != "prompt" and isinstance(value, list) and any(m["role"] in ("user", "system") for m in value):
        role = next(m["role"] for m in value if m["role"] in ("user", "system"))
        raise BadRow(DIFFERENT_PROMPTS, f"{column} has a {role} message that is not the prompt's")
    if ids is not None:
        if column != "prompt" and not ids:
            raise BadRow(EMPTY, f"{column}_ids is empty")
    elif not has_text(value):
        raise BadRow(EMPTY, f"{column} is empty")
    else:
        for text in [value] if isinstance(value, str) else [m["content"] for m in value]:
            refuse_written_messages(column, text)


def has_text(value: Any) -> bool:
    """Whether a text, or the last of a list of messages, says something; a call of a tool does."""
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and bool(value[-1]["content"].strip() or value[-1].get("tool_calls"))


def explicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt's messages in `prompt` and nowhere else.

    `chosen` and `rejected` may be whole conversations: `prompt` is then absent, or a text (what the user said first or
    last), or the list of messages that they begin with. What both begin with becomes the prompt, and is cut off
    `calibration` too. Other rows come back as they are, to be judged by `canonical`.
    """
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    prompt = row.get("prompt")
    if not (chosen and rejected and is_messages(chosen) and is_messages(rejected)):
        return row
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(prompt, str) and shared == 0:
        return row | {"prompt": [{"role": "user", "content": prompt}]}
    said = [m["content"].strip() for m in chosen[:shared] if m["role"] == "user"]
    if isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        shared = len(prompt)
    elif not (shared and (prompt is None or (isinstance(prompt, str) and prompt.strip() in said[:1] + said[-1:]))):
        return row
    head, found = chosen[:shared], {"prompt": chosen[:shared]}
    for column in ("chosen", "rejected", "calibration"):
        value = row.get(column)
        if isinstance(value, list) and value[:shared] == head:
            found[column] = value[shared:]
    return row | found


def same_prompt(text: str) -> str:
    """What two prompts have in common when they count as one: their words; spaces do not matter."""
    return " ".join(text.split())
