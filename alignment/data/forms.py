"""Forms in which preference data are published, each turned into the canonical row of `preferences`.

| form | what its rows look like |
|---|---|
| preference | `prompt`, `chosen`, `rejected`: texts or chat messages; `chosen`/`rejected` may be whole conversations |
| hh | `chosen`, `rejected`: transcripts "\\n\\nHuman: … \\n\\nAssistant: …" that share all but the last reply |
| sharegpt | `conversations` of {"from", "value"}, with `chosen` and `rejected` replies of that kind |
| alpaca | `instruction`, `input`, and two responses with a label, or `chosen`/`rejected`, or a list `output` |
| graded | `context` (messages or text), two responses and a grade from -3 (the first is much better) to 3 (`graded`) |

A source has one form, told from its columns and first rows, or named in the recipe. What it is not: no cleaning, no
guessing row by row; a row that is not of its source's form is quarantined.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from alignment.data.graded import PAIRS, from_graded, is_graded
from alignment.data.messages import PLAIN, TextRules, refuse_unread, settled, with_context
from alignment.data.preferences import (
    BAD_NUMBER,
    CARRIED,
    DIFFERENT_PROMPTS,
    EMPTY,
    MISSING_FIELD,
    NOT_TEXT,
    NUMBER_COLUMNS,
    TIE,
    UNKNOWN_FORM,
    BadRow,
    canonical,
    is_messages,
)
from alignment.errors import UserError, nearest

if TYPE_CHECKING:
    from alignment.recipes.rows import SourceSection

Row = dict[str, Any]
PEEKED = 50  # rows that a source's form is told from

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"
LABELS = ("label", "preference")
_ANNOTATOR = re.compile(r"annotator_?\d+")
# Role names of ShareGPT files in the wild (LLaMA-Factory's and axolotl's documentation).
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# The probability that the first response is the better one, by what annotators write; numbers by what 0 means.
VOTES = {"a": 1.0, "b": 0.0, "tie": 0.5}
NUMBERS: dict[str | None, dict[str, float]] = {
    None: {"1": 1.0, "2": 0.0},
    "tie": {"1": 1.0, "2": 0.0, "0": 0.5},
    "first": {"1": 0.0, "0": 1.0},
    "second": {"1": 1.0, "0": 0.0},
}
ACCEPTED = (
    "prompt/chosen/rejected (texts or messages); chosen/rejected as whole conversations or as "
    "Human/Assistant transcripts; conversations/chosen/rejected (ShareGPT); instruction/input with "
    "response1/response2 and label, or output: [better, worse]; context/response1/response2/overall_preference"
)
# Stanford Alpaca's own templates (Taori et al. 2023, train.py), for tokenizers without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)
_ALPACA_PROMPT = re.compile(
    r"\s*Below is an instruction that describes a task(?:, paired with an input that provides further context)?\. "
    r"Write a response that appropriately completes the request\.\s*### Instruction:\s(.*?)"
    r"(?:\s### Input:\s(.*?))?\s### Response:\s*",
    re.DOTALL,
)


def converter(
    source: SourceSection,
    first: Sequence[Row],
    has_template: bool,
    rules: TextRules = PLAIN,
    unread: Collection[str] = (),
) -> tuple[str, Callable[[Row], Row]]:
    """The form of a source, and the function that turns its rows into canonical ones (or raises `BadRow`).

    Args:
        source: format, columns, ignore, ties and chat are read.
        first: the source's first rows (`PEEKED` suffice).
        has_template: whether the tokenizer has a chat template: hh, alpaca and graded rows become chat messages then.
        rules: what becomes of reasoning.
        unread: optional columns that nobody reads.

    Raises:
        UserError: a column of `columns` is not there, or the form cannot be told.
    """
    check_columns(source, first)
    renamed = [tidy(under_our_names(row, source.columns)) for row in first]
    form = form_of(renamed) if source.format == "auto" else source.format
    if form is None:
        found = list(dict.fromkeys(key for row in first for key in row))
        raise UserError(
            f"{source.name}: the form of the rows cannot be told from the columns {', '.join(found) or '(none)'}; "
            f"accepted: {ACCEPTED}; map other names with columns: {{chosen: THEIRS, …}}"
        )
    chat = source.chat if source.chat is not None else has_template
    told = any(vote in VOTES or vote == "2" for row in renamed for vote in _votes(row))
    zero = source.zero or ("tie" if told else None)
    read: Callable[[Row], Row] = {
        "preference": lambda row: _as_chat(row) if source.chat else row,
        "hh": lambda row: _from_transcripts(row, chat),
        "sharegpt": _from_sharegpt,
        "alpaca": lambda row: _from_alpaca(row, chat, source.ties == "soft", zero),
        "graded": lambda row: from_graded(row, chat),
    }[form]

    def convert(row: Row) -> Row:
        given = row = settled(under_our_names(row, source.columns), rules, source.ignore)
        if zero is None and form == "alpaca" and "chosen" not in row and "0" in _votes(row):
            raise UserError(
                f"{source.name}: a label is 0, and none of the first rows' is 2: say with zero: what 0 means: first "
                "or second (the better response; 1 is the other one), or tie (1 is the first, 2 the second)"
            )
        row = with_context(canonical(read(row), unread), given, rules)
        refuse_unread(form, given, row)
        if source.chat is not None and source.chat == isinstance(row["prompt"], str):
            raise BadRow(UNKNOWN_FORM, f"chat: {str(source.chat).lower()} is set, and the row is the other kind")
        if row.get("label") == 0.5 and source.ties == "drop":
            raise BadRow(TIE, "neither response is preferred; data.*.ties: soft keeps it")
        return row

    return form, convert


def tidy(row: Row) -> Row:
    """A row whose messages are settled, for telling its form; as it is where something in it is not usable."""
    try:
        return settled(row, TextRules(reasoning="remove"))
    except BadRow:
        return row


def text_columns(source: SourceSection, rows: Sequence[Row]) -> set[str]:
    """Number columns of the preference form in which no first row has a number: they are called so by chance.

    Not those that the recipe names, nor a `label` by which the better response is told.
    """
    found = set()
    for column in {*NUMBER_COLUMNS} - {*(source.columns or {})}:
        values = [row[column] for row in rows if row.get(column) is not None]
        if values and not any(_is_number(value) for value in values):
            found.add(column)
    return found if any("chosen" in row for row in rows) else found - {"label"}


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def check_columns(source: SourceSection, first: Sequence[Row]) -> None:
    """Refuse `columns` that name what the source's first rows do not have."""
    found = list(dict.fromkeys(key for row in first for key in row))
    for ours, theirs in (source.columns or {}).items():
        for column in [theirs] if isinstance(theirs, str) else theirs:
            if column not in found:
                raise UserError(f"{source.name}: columns.{ours}: no column {column!r}{nearest(column, found)}")


def under_our_names(row: Row, columns: dict[str, Any] | None) -> Row:
    """The row under our names; a `label` of several columns becomes the list of their values."""
    if not columns:
        return row
    taken = {name for names in columns.values() for name in ([names] if isinstance(names, str) else names)}
    rest = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return rest | {
        ours: row.get(theirs) if isinstance(theirs, str) else [row.get(name) for name in theirs]
        for ours, theirs in columns.items()
    }


def form_of(rows: Sequence[Row]) -> str | None:
    """The form of preferences that columns and first values speak for, if one does."""
    keys = {key for row in rows for key in row}
    if is_graded(rows, keys):
        return "graded"

    def most(test: Callable[[Row], bool]) -> bool:
        return 2 * sum(test(row) for row in rows) > len(rows)

    if {"chosen", "rejected"} <= keys:
        if "conversations" in keys or most(lambda row: any(_is_sharegpt(row.get(c)) for c in ("chosen", "rejected"))):
            return "sharegpt"
        if most(lambda row: any(_is_transcript(row.get(c)) for c in ("prompt", "chosen", "rejected"))):
            return "hh"
        if "prompt" not in keys and "instruction" in keys:
            return "alpaca"
        if "prompt" in keys or most(lambda row: any(is_messages(row.get(c)) for c in ("chosen", "rejected"))):
            return "preference"
    if {"instruction", "prompt"} & keys and (any(keys >= {*pair} for pair in PAIRS) or "output" in keys):
        listed = most(lambda row: isinstance(row.get("output"), list))
        return "alpaca" if listed or any(keys >= {*pair} for pair in PAIRS) else None
    return None


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and HUMAN in f"\n\n{value.lstrip()}" and ASSISTANT in value


def _is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first and "value" in first


def _text(row: Row, column: str) -> str:
    """The text of a column that the form cannot do without."""
    value = row.get(column)
    if value is None:
        raise BadRow(MISSING_FIELD, f"{column} is missing")
    if not isinstance(value, str):
        raise BadRow(NOT_TEXT, f"{column}: expected text, got {type(value).__name__}")
    return value


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _as_chat(row: Row) -> Row:
    """Texts as one question and two answers (`chat: true`); messages stay as they are."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "calibration": "assistant"}
    texts = {c: [_said(role, row[c])] for c, role in roles.items() if isinstance(row.get(c), str)}
    return row if is_messages(row.get("chosen")) else row | texts


def _from_transcripts(row: Row, chat: bool) -> Row:
    """hh: what both transcripts share up to the last shared "\\n\\nAssistant:" is the prompt.

    Bai et al. 2022 (2204.05862) publish the pairs so; cutting at the last shared marker is what the DPO reference code
    does. As text the pieces are kept to the letter; as chat messages every turn is stripped of surrounding blanks.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(EMPTY, f"{column} is empty")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt and not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        if _is_transcript(chosen) or _is_transcript(rejected):
            raise BadRow(DIFFERENT_PROMPTS, "chosen and rejected do not both begin with prompt")
        chosen, rejected = prompt + chosen, prompt + rejected
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if not _is_transcript(text):
            raise BadRow(UNKNOWN_FORM, f"{column}: no Human and Assistant turns in it")
    cut = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT)
    if cut < 0:
        raise BadRow(DIFFERENT_PROMPTS, "the transcripts differ before the first Assistant turn")
    cut += len(ASSISTANT)
    responses = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    for column, text in responses.items():
        if HUMAN in text or ASSISTANT in text:
            raise BadRow(DIFFERENT_PROMPTS, f"the transcripts differ before the last reply ({column} goes on)")
    if not chat:
        return row | responses | {"prompt": chosen[:cut]}
    answers = {column: [_said("assistant", text.strip())] for column, text in responses.items()}
    return row | answers | {"prompt": _turns(chosen[: cut - len(ASSISTANT)])}


def _turns(transcript: str) -> list[dict[str, str]]:
    before, *parts = re.split(r"\n\n(Human|Assistant):", f"\n\n{transcript.lstrip()}")
    if before.strip():
        raise BadRow(UNKNOWN_FORM, "text stands before the first Human turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [_said(roles[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    for number, turn in enumerate(turns, start=1):
        if not turn["content"]:
            raise BadRow(EMPTY, f"turn {number} of the prompt is empty")
    return turns


def questions(prompt: str) -> list[str]:
    """What the user says in a prompt that is text: without the markers of transcripts, or Alpaca's frame."""
    framed = _ALPACA_PROMPT.fullmatch(prompt)
    if framed:
        return ["\n\n".join(part for part in framed.groups() if part)]
    if not _is_transcript(prompt):
        return [prompt]
    _, *parts = re.split(r"\n\n(Human|Assistant):", f"\n\n{prompt.lstrip()}")
    return [text for who, text in zip(parts[::2], parts[1::2], strict=True) if who == "Human"]


def _from_sharegpt(row: Row) -> Row:
    """sharegpt: {"from", "value"} messages as {"role", "content"}."""
    found: Row = {c: chat_messages(c, row[c]) for c in ("chosen", "rejected", "calibration") if row.get(c) is not None}
    asked = row.get("conversations", row.get("prompt"))
    if asked is not None:
        found["prompt"] = asked if isinstance(asked, str) else chat_messages("conversations", asked)
    return row | found


def chat_messages(column: str, value: Any) -> list[dict[str, str]]:
    """ShareGPT's messages with `role` and `content`; a text is a reply."""
    if isinstance(value, str):
        return [_said("assistant", value)]
    messages = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            raise BadRow(NOT_TEXT, f"{column}: expected messages, got {type(message).__name__}")
        who, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if not isinstance(text, str):
            raise BadRow(NOT_TEXT, f"{column}: a message's value is {type(text).__name__}, not text")
        if not isinstance(who, str) or who not in ROLES:
            raise BadRow(UNKNOWN_FORM, f"{column}: a message from {who!r:.30}; known: {', '.join(ROLES)}")
        messages.append(_said(ROLES[who], text) | {key: message[key] for key in CARRIED if message.get(key)})
    return messages


def _from_alpaca(row: Row, chat: bool, soft: bool, zero: str | None) -> Row:
    """alpaca: the prompt from instruction and input; of two responses the one that the votes prefer is chosen.

    With `soft` the label is the winner's share of the votes; otherwise the majority counts as certain.
    """
    prompt = alpaca_prompt(row, chat)
    pair = _responses(row)
    for column, response in pair.items():
        if not isinstance(response, str):
            raise BadRow(NOT_TEXT, f"{column}: expected text, got {type(response).__name__}")
    (_, first), (_, second) = pair.items()
    share = _share(row, VOTES | NUMBERS[zero]) if "chosen" not in pair else None
    row = {key: value for key, value in row.items() if key != "label"}
    if share is not None:
        first, second = (first, second) if share >= 0.5 else (second, first)
        if soft or share == 0.5:
            row["label"] = max(share, 1 - share)
    if not chat:
        return row | {"prompt": prompt, "chosen": first, "rejected": second}
    return row | {"prompt": prompt, "chosen": [_said("assistant", first)], "rejected": [_said("assistant", second)]}


def alpaca_prompt(row: Row, chat: bool) -> Any:
    """Instruction and input as one question; as text they stand in Stanford Alpaca's frame."""
    asked = _text(row, "instruction" if "instruction" in row else "prompt")
    if not asked.strip():
        raise BadRow(EMPTY, "instruction is empty")
    more = _text(row, "input") if row.get("input") is not None else ""
    if row.get("history"):
        raise BadRow(UNKNOWN_FORM, "history is not read; give such rows as conversations")
    if chat:
        question = f"{asked}\n\n{more}" if more.strip() else asked
        return [_said("user", question)]
    return _ALPACA.format(
        with_input=", paired with an input that provides further context" if more.strip() else "",
        instruction=asked,
        input=f"### Input:\n{more}\n\n" if more.strip() else "",
    )


def _responses(row: Row) -> dict[str, Any]:
    """The two responses under their columns' names."""
    for pair in (("chosen", "rejected"), *PAIRS):
        present = [column for column in pair if row.get(column) is not None]
        if present:
            absent = [column for column in pair if column not in present]
            if absent:
                raise BadRow(MISSING_FIELD, f"{absent[0]} is missing")
            return {column: row[column] for column in pair}
    output = row.get("output")
    if output is None:
        raise BadRow(MISSING_FIELD, "no responses")
    if not isinstance(output, list):
        raise BadRow(NOT_TEXT, f"output: expected a list of two texts, got {type(output).__name__}")
    if len(output) != 2:
        raise BadRow(UNKNOWN_FORM, f"output: expected two texts, got {len(output)}")
    return {"output[0]": output[0], "output[1]": output[1]}


def _ballots(row: Row) -> list[str]:
    """The columns that votes stand in."""
    return [c for c in LABELS if c in row][:1] or sorted(c for c in row if _ANNOTATOR.fullmatch(c))


def _votes(row: Row) -> list[str]:
    """The votes as they are compared."""
    found = [row[column] if isinstance(row[column], list) else [row[column]] for column in _ballots(row)]
    return [_spelt(value) for values in found for value in values]


def _spelt(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).strip().lower()


def _share(row: Row, meanings: dict[str, float]) -> float | None:
    """Mean vote for the first response; None where a list `output` comes without label: better first."""
    columns = _ballots(row)
    if not columns:
        if isinstance(row.get("output"), list):
            return None
        raise BadRow(MISSING_FIELD, f"no label ({', '.join(LABELS)} or annotator1 …) says which response is better")
    votes: list[Any] = []
    for column in columns:
        votes += row[column] if isinstance(row[column], list) else [row[column]]
    return sum(_vote(value, meanings) for value in votes) / len(votes) if votes else 0.5


def _vote(value: Any, meanings: dict[str, float]) -> float:
    if value is None:
        raise BadRow(MISSING_FIELD, "label is missing")
    if isinstance(value, bool) or _spelt(value) not in meanings:
        raise BadRow(BAD_NUMBER, f"label: expected one of {', '.join(sorted(meanings))}; got {value!r:.40}")
    return meanings[_spelt(value)]
