"""Chat messages as people publish them, made into those that a chat template reads.

A message keeps `role`, `content` and what templates write of the rest (`CARRIED`). Content in parts is joined where
the parts are text. What cannot become tokens (images, calls in an old form …) makes the row unusable, by name, unless
the source's `ignore` leaves it out on purpose. Columns beside the messages that carry text (`system`, `tools`) join
them here. Whether a template really writes it all is checked on the rendering (`rendering`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignment.data.preferences import (
    CARRIED,
    LOST_TEXT,
    MISSING_FIELD,
    NOT_TEXT,
    UNKNOWN_FORM,
    BadRow,
    written_json,
)

Row = dict[str, Any]
Message = dict[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers' names for it
TEXT_PARTS = ("text", "input_text", "output_text")
# Columns whose messages are read, and keys of rows and messages that hold what a text model's tokens cannot.
MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "calibration", "conversations", "messages", "completion", "context")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
UNREAD_COLUMNS = (*MEDIA, "documents", "functions")
UNREAD_KEYS = (*MEDIA, "documents", "function_call", "functions", "tools", "tool_plan", "refusal")
_HINTS = {
    "function_call": "write it as tool_calls",
    "functions": "give them as a column tools",
    "tools": "give them as a column beside the messages",
}
_THOUGHTS = re.compile(r".*</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class TextRules:
    """What a recipe's `data` section says of text that templates may drop or mistake.

    Attributes:
        reasoning: keep or remove what a model thought before it answered; None: rows that have it apart are refused.
        control_tokens: special tokens written in a row's text: refuse the row, make them ordinary text, or keep them.
    """

    reasoning: Literal["keep", "remove"] | None = None
    control_tokens: Literal["refuse", "text", "keep"] = "refuse"

    @classmethod
    def of(cls, section: Any) -> TextRules:
        """The rules of a recipe's `data` section."""
        return cls(section.reasoning, section.control_tokens)


PLAIN = TextRules()  # a recipe's, unless it says otherwise


def settled(row: Row, rules: TextRules, ignore: Collection[str] = ()) -> Row:
    """The row with its messages as templates read them.

    Args:
        row: under our names; messages may have `from` and `value`.
        rules: of these `reasoning`.
        ignore: columns, and keys of messages, that are left out on purpose.

    Raises:
        BadRow: something in it would not become tokens.
    """
    if ignore:
        row = {key: value for key, value in row.items() if key not in ignore}
    for column in UNREAD_COLUMNS:
        if row.get(column) is not None and _filled(row[column]):
            raise _lost("", column)
    settings = row.get("chat_template_kwargs")  # TRL's: thinking may be off by them
    if isinstance(settings, dict) and any(value is not None for value in settings.values()):
        raise _lost("", "chat_template_kwargs")
    changed: Row = {}
    for column in MESSAGE_COLUMNS:
        value = row.get(column)
        if isinstance(value, list):
            messages = [_message(column, item, rules, ignore) for item in value]
            if any(one is not two for one, two in zip(messages, value, strict=True)):
                changed[column] = messages
        elif isinstance(value, dict):
            changed[column] = _message(column, value, rules, ignore)
    return row | changed if changed else row


def _filled(value: Any) -> bool:
    """Whether there is something in it: Parquet writes absent lists and records as empty ones, or full of nulls."""
    if isinstance(value, Mapping):
        return any(_filled(inner) for inner in value.values())
    if isinstance(value, list | tuple | str):
        return len(value) > 0 and (isinstance(value, str) or any(_filled(inner) for inner in value))
    return value is not None and value is not False


def _lost(column: str, key: str) -> BadRow:
    hint = _HINTS.get(key, "it cannot become tokens here")
    where = f"{column}: a message has {key!r}" if column else f"column {key!r} is filled"
    return BadRow(LOST_TEXT, f"{where}: {hint}; ignore: [{key}] leaves it out")


def _message(column: str, message: Any, rules: TextRules, ignore: Collection[str]) -> Any:
    """One message; the same object where there is nothing to do."""
    if not isinstance(message, dict):
        return message
    text = "content" if "content" in message or "role" in message else "value"
    if len(message) == 2 and isinstance(message.get(text), str):
        return message
    who = "from" if text == "value" else "role"
    found: Message = {key: message[key] for key in (who,) if key in message}
    thoughts: list[str] = []
    found[text] = _joined(column, message.get(text), thoughts, ignore)
    for key, value in message.items():
        if key in (who, text) or key in ignore or not (_filled(value) or key == "train"):
            continue
        if key in ("weight", "train") and column in ("messages", "conversations"):
            _refuse_unlearned(column, key, message)
        elif key in REASONING:
            if isinstance(value, str):
                thoughts[:0] = [value] if value not in thoughts else []
        elif key in UNREAD_KEYS:
            raise _lost(column, key)
        elif key == "tool_calls":
            found[key] = _calls(column, value)
        elif key in CARRIED:
            found[key] = str(value)
    if thoughts:
        if rules.reasoning is None:
            raise BadRow(
                LOST_TEXT,
                f"{column}: a message has reasoning apart from its content: set data.reasoning: keep or remove",
            )
        if rules.reasoning == "keep":
            found["reasoning_content"] = "\n".join(thoughts)
    if found[text] is None and len(found) > 2:  # a call, or thoughts, and no words
        found[text] = ""
    return found


def _refuse_unlearned(column: str, key: str, message: Message) -> None:
    """An assistant's turn that its row says is not to be learned (OpenAI's `weight`, axolotl's `train`)."""
    speaker = message.get("role", message.get("from"))
    if not message[key] and speaker in ("assistant", "gpt", "model") and message[key] is not None:
        raise BadRow(LOST_TEXT, f"{column}: an assistant's turn has {key} {message[key]}: ignore: [{key}] learns it")


def _joined(column: str, content: Any, thoughts: list[str], ignore: Collection[str]) -> Any:
    """Content as one text, a line for each of its parts; what is no list stays as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and kind in REASONING and isinstance(part.get(kind, part.get("text")), str):
            thoughts.append(str(part.get(kind, part.get("text"))))
        elif kind not in ignore:
            raise BadRow(LOST_TEXT, f"{column}: content has a part of type {kind!r:.40}: only text becomes tokens")
    return "\n".join(texts)


def _calls(column: str, value: Any) -> str:
    """Calls of tools as JSON text, each with its arguments as an object, as transformers' templates expect them."""
    calls = written_json(value)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(NOT_TEXT, f"{column}: tool_calls: expected a list of calls, got {type(value).__name__}")
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(MISSING_FIELD, f"{column}: tool_calls: a call without the name of its function")
        arguments = written_json(inner.get("arguments") or {})
        inner["arguments"] = arguments if isinstance(arguments, dict) else inner["arguments"]
    return json.dumps(calls, ensure_ascii=False)


def refuse_unread(form: str, given: Row, row: Row) -> None:
    """Text in a column that belongs to the question in other forms, unless the prompt has it already.

    Args:
        form: of the source.
        given: the source's row, under our names.
        row: what it became, with `prompt` or `messages`.

    Raises:
        BadRow: it would not be read.
    """
    read = {"alpaca": ("input",), "instruction": ("input",), "graded": ("context",)}.get(form, ())
    for column in {"input", "context", "history"} - {*read}:
        text = given.get(column)
        if isinstance(text, str) and len(text.split()) > 1:
            asked = row["messages"] if "messages" in row else row["prompt"]
            texts = [asked] if isinstance(asked, str) else [message["content"] for message in asked]
            if any(text.strip() in part for part in texts):
                continue
        elif not (isinstance(text, list) and text):
            continue
        remedy = f"name it in columns, such as {{input: {column}}}, or leave it out with ignore: [{column}]"
        raise BadRow(LOST_TEXT, f"column {column!r} is not read in rows of form {form}; {remedy}")


def with_context(row: Row, given: Row, rules: TextRules) -> Row:
    """The row with what its source gives beside the messages: `system` before them, `tools` as JSON text.

    Args:
        row: `prompt`, or `messages`; and responses, out of which `reasoning: remove` takes the thoughts.
        given: the source's row, under our names.
        rules: of these `reasoning`.

    Raises:
        BadRow: there are messages, and another system message; or text, which neither has a place in.
    """
    place = "messages" if "messages" in row else "prompt"
    chat = isinstance(row[place], list)
    system = given.get("system") or given.get("system_prompt")
    if system:
        row = row | {place: _with_system(row[place], system)}
    tools = written_json(given.get("tools"))
    if _filled(tools):
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(NOT_TEXT, f"tools: expected a list of schemas, got {type(given['tools']).__name__}")
        if not chat:
            raise BadRow(LOST_TEXT, "tools stand beside plain text, which has no place for them; set chat: true")
        row = row | {"tools": json.dumps(tools, ensure_ascii=False)}
    if rules.reasoning == "remove":
        answers = ("prompt", "messages", "chosen", "rejected", "calibration", "completion")
        row = row | {column: _without_thoughts(column, row[column]) for column in answers if column in row}
    return row


def _with_system(prompt: Any, system: Any) -> Any:
    if not isinstance(system, str):
        raise BadRow(NOT_TEXT, f"system: expected text, got {type(system).__name__}")
    if not system.strip():
        return prompt
    if isinstance(prompt, str):
        raise BadRow(LOST_TEXT, "a system text stands beside plain text, which has no place for it; set chat: true")
    said = [m["content"] for m in prompt if m["role"] in ("system", "developer")]
    if any(text.strip() == system.strip() for text in said):
        return prompt
    if said:
        raise BadRow(UNKNOWN_FORM, "column system and the conversation's own system message differ")
    return [{"role": "system", "content": system}, *prompt]


def _without_thoughts(column: str, value: Any) -> Any:
    """An assistant's words from behind its last `</think>`; other text as it is."""
    if isinstance(value, str):
        return value if column == "prompt" else _THOUGHTS.sub("", value)
    return [
        m | {"content": _THOUGHTS.sub("", m["content"])}
        if m["role"] == "assistant" and "</think>" in m["content"]
        else m
        for m in value
    ]
