"""Conversations through a tokenizer's chat template: the one place that renders them.

A template may write today's date (`strftime_now`: Llama 3.2, gpt-oss). Tokens must not change overnight, so the date
can be pinned: it is kept in the tokenizer's own settings, is saved with it, and every rendering uses it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
DATE = "template_date"  # key of tokenizer_config.json and of a run's manifest
_FORMAT = re.compile(r"""(['"])([^'"{}\n]*%[^'"{}\n]*)\1""")
# What a canonical message or row holds as JSON text: Arrow has no type for a value of any shape.
WRITTEN = ("tool_calls", "tools")


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date."""
    return "strftime_now" in template_text(tokenizer)


def pinned_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date (YYYY-MM-DD) that the chat template writes whatever the day; None where it follows the calendar."""
    return tokenizer.init_kwargs.get(DATE)


def pin_date(tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> str | None:
    """Keep the date that the chat template writes.

    Args:
        tokenizer: changed in place; saved, it keeps the date.
        date: YYYY-MM-DD; None: the one that it has, or today.

    Returns:
        The date; None where the template writes none.
    """
    if not writes_date(tokenizer):
        return None
    tokenizer.init_kwargs[DATE] = date or pinned_date(tokenizer) or datetime.date.today().isoformat()
    return pinned_date(tokenizer)


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    generation: bool,
    tools: Sequence[str | None] | None = None,
    template: str | None = None,
) -> list[str]:
    """The text of conversations, with the template's own markup.

    Args:
        tokenizer: with a chat template.
        conversations: lists of messages; `tool_calls` may be JSON text, keys that are None are left out.
        generation: end with what opens the assistant's turn.
        tools: of each conversation, as JSON text; None: of none.
        template: another one than the tokenizer's.

    Raises:
        jinja2.TemplateError, TypeError, ValueError: the template refuses a conversation.
    """
    settings: dict[str, Any] = {
        "chat_template": _dated(template, pinned_date(tokenizer)) if template else _pinned(tokenizer),
        "add_generation_prompt": generation,
        "tokenize": False,
    }
    given = list(tools or [None] * len(conversations))
    if not any(given) and not any(message.get("tool_calls") for messages in conversations for message in messages):
        texts: Any = tokenizer.apply_chat_template([[*map(_decoded, one)] for one in conversations], **settings)
        return list(texts)
    found = []
    for messages, listed in zip(conversations, given, strict=True):
        settings["tools"] = json.loads(listed) if listed else None
        try:
            text = tokenizer.apply_chat_template([*map(_decoded, messages)], **settings)
        except TypeError:  # DeepSeek's templates write arguments that are text already
            text = tokenizer.apply_chat_template([_decoded(m, arguments_as_text=True) for m in messages], **settings)
        found.append(str(text))
    return found


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered conversations: the template has written what stands around them."""
    found: Any = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(found["input_ids"])


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    generation: bool,
    tools: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """Token ids of conversations; arguments and errors as of `render`."""
    return text_ids(tokenizer, render(tokenizer, conversations, generation=generation, tools=tools))


def marked_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str, tools: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for those between the template's `{% generation %}` marks."""
    found: Any = tokenizer.apply_chat_template(
        [_decoded(message) for message in messages],
        tools=json.loads(tools) if tools else None,
        chat_template=_dated(template, pinned_date(tokenizer)),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's source; empty where there is none."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        return str(template.get("default", ""))
    return str(template or "")


def _pinned(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to hand over; None: transformers' own choice."""
    date = pinned_date(tokenizer)
    return None if date is None else _dated(template_text(tokenizer), date)


@lru_cache(maxsize=32)
def _dated(template: str, date: str | None) -> str:
    """The template with `strftime_now` answered for one day, by a macro of that name before it.

    The line end behind the macro is dropped by transformers' `trim_blocks`, so that the template begins as it did.
    """
    if date is None or "strftime_now" not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    answers = {form: day.strftime(form) for _, form in _FORMAT.findall(template)}
    return f"{{% macro strftime_now(form) %}}{{{{ {json.dumps(answers)}[form] }}}}{{% endmacro %}}\n{template}"


def _decoded(message: Message, arguments_as_text: bool = False) -> Message:
    """A message as templates read it."""
    if message.keys() == {"role", "content"}:
        return message
    found = {key: value for key, value in message.items() if value is not None}
    if isinstance(found.get("tool_calls"), str):
        found["tool_calls"] = json.loads(found["tool_calls"])
        for call in found["tool_calls"] if arguments_as_text else ():
            inner = call.get("function", call)
            inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
    return found
