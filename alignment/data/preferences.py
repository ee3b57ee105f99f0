"""Preference rows from a JSON/JSONL file or the hub into one `datasets.Dataset`.

A row has `prompt`, `chosen`, `rejected`: three texts, or three lists of chat messages. Lists that repeat the prompt's
messages (UltraFeedback, TRL's implicit prompt) are taken apart into prompt and responses. Optional columns travel with
it: token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`; used as they are, never tokenised again), a `calibration`
response, and numbers that some objectives read. Not a cleaner: the first unusable row stops the run, by its number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError
from alignment.files import iterate_json_lines, read_text

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
NUMBER_COLUMNS = ("reward_chosen", "reward_rejected", "prev_chosen", "prev_rejected")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
OPTIONAL_COLUMNS = (*ID_COLUMNS, *NUMBER_COLUMNS, "calibration", "calibration_ids")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file (one a line) or a .json file (one list).

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a line is not a JSON object.
    """
    if path.suffix != ".json":
        rows = [row for _, row in iterate_json_lines(path)]
    else:
        try:
            rows = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: expected a list of objects; for one object a line name it .jsonl")
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def _problem(row: dict[str, Any], first: dict[str, Any]) -> str | None:
    """What is wrong with a row, in words; None where nothing is."""
    for column in TEXT_COLUMNS:
        if column not in row:
            return f"column {column!r} is missing (a row needs prompt, chosen, rejected)"
    texts = [*TEXT_COLUMNS, *(["calibration"] if "calibration" in row else [])]
    problem = next(filter(None, (_text_problem(row, column) for column in texts)), None)
    if problem is not None:
        return problem
    if len({isinstance(row[c], str) for c in texts}) != 1:
        return f"{', '.join(texts[:-1])} and {texts[-1]} mix text and chat messages"
    if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
        return "text rows and chat rows are mixed in one file"
    if row["chosen"] == row["rejected"] and row.get("chosen_ids") == row.get("rejected_ids"):
        return "chosen and rejected are the same"
    for column in NUMBER_COLUMNS:
        value = row.get(column, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"column {column!r}: expected a number, got {value!r}"
        if not math.isfinite(value):
            return f"column {column!r}: {value} is not a finite number"
    if "calibration_ids" in row and "calibration" not in row:
        return "column 'calibration_ids' needs calibration beside it"
    given = [c for c in ID_COLUMNS if c in row]
    if given and len(given) < len(ID_COLUMNS):
        return f"column {given[0]!r} needs {', '.join(c for c in ID_COLUMNS if c not in row)} beside it"
    differing = (set(first) ^ set(row)) & set(OPTIONAL_COLUMNS)
    return f"column {sorted(differing)[0]!r} is in some rows only" if differing else None


def _text_problem(row: dict[str, Any], column: str) -> str | None:
    """What is wrong with a text and its token ids; a prompt may be empty, and so may a text whose ids are given."""
    value, ids = row[column], row.get(f"{column}_ids", [])
    if not isinstance(value, str) and not _is_messages(value):
        return f"column {column!r}: expected text or a list of messages, got {type(value).__name__}"
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        return f"column '{column}_ids': expected a list of token ids"
    if column == "prompt" or ids:
        return None
    if f"{column}_ids" in row:
        return f"column '{column}_ids' is empty"
    if isinstance(value, list) and value[0]["role"] in ("user", "system"):
        return f"column {column!r} begins with a {value[0]['role']} message that is not the prompt's"
    text = value if isinstance(value, str) else value[-1]["content"]
    return None if text.strip() else f"column {column!r} is empty"


def explicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt's messages in `prompt` and nowhere else.

    `chosen` and `rejected` may be whole conversations: `prompt` is then absent, or a text (what the user said first or
    last), or the list of messages that they begin with. What both begin with becomes the prompt, and is cut off
    `calibration` too. Other rows come back as they are, to be judged by `_problem`.
    """
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    prompt = row.get("prompt")
    if not (_is_messages(chosen) and _is_messages(rejected)):
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


def preference_dataset(rows: list[dict[str, Any]], source: str) -> Dataset:
    """Checked rows as a Dataset holding only the columns that this project knows.

    Raises:
        UserError: names `source`, the row's number (from 1), the column and what is wrong.
    """
    from datasets import Dataset

    rows = [explicit_prompt(row) for row in rows]
    for number, row in enumerate(rows, start=1):
        problem = _problem(row, rows[0])
        if problem is not None:
            raise UserError(f"{source}: row {number}: {problem}")
    known = [c for c in (*TEXT_COLUMNS, *OPTIONAL_COLUMNS) if c in rows[0]]
    return Dataset.from_list([{c: row[c] for c in known} for row in rows])


def load_preferences(name: str, split: str = "train") -> Dataset:
    """Preferences from a local .json/.jsonl file, else from the hub.

    Raises:
        UserError: no such file or hub data set, or an unusable row.
    """
    if name.endswith((".json", ".jsonl")) or Path(name).exists():
        return preference_dataset(read_rows(Path(name)), name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data: {name!r} is neither a local file nor a data set that the hub gives ({reason})"
        ) from error
    return preference_dataset(list(rows), name)


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """Prompts from a text file: one a line; blank lines and lines that start with `#` are skipped.

    Raises:
        UserError: the file is missing, has no prompts, repeats one, or has fewer than `limit`.
    """
    file = Path(path)
    first: dict[str, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text in first:
            raise UserError(f"{path}: line {number}: repeats the prompt of line {first[text]}")
        first[text] = number
    if not first:
        raise UserError(f"{path}: no prompts in it")
    if limit is not None and len(first) < limit:
        raise UserError(f"{path}: {len(first)} prompts, but {limit} are asked for")
    return list(first)[:limit]
