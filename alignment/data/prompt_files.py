"""Reads files of prompts, the same way for every key and option that names one.

A file of text has one prompt a line. A file of rows (.jsonl, .json, .parquet, .csv; the first two also .gz) has one of
`prompt` (text or chat messages), `messages` or `conversations` (up to the last question), `instruction` with `input`,
or whole conversations `chosen` and `rejected`; `system` goes before them. Of preference rows only the prompt is read.
Not here: tokens (`prompts`), preferences (`pipeline`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignment.data.forms import chat_messages
from alignment.data.messages import PLAIN, TextRules, settled, with_context
from alignment.data.preferences import (
    EMPTY,
    LOST_TEXT,
    MISSING_FIELD,
    NOT_TEXT,
    UNKNOWN_FORM,
    BadRow,
    explicit_prompt,
    has_text,
    is_messages,
    plain_message,
    refuse_written_messages,
)
from alignment.data.reading import read_file
from alignment.errors import UserError
from alignment.files import read_text
from alignment.recipes.rows import DATA_ENDINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Prompt = str | list[dict[str, Any]]
ACCEPTED = "prompt, messages, conversations, or instruction"


class PlacedPrompt(NamedTuple):
    """A prompt, as a model is to get it, and where it stands (`FILE:line`)."""

    prompt: Prompt
    where: str


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, all texts or all chat messages.

    Raises:
        UserError: as of `locate_prompts`.
    """
    return [one.prompt for one in locate_prompts(path, limit)]


def locate_prompts(path: str | Path, limit: int | None = None, *, strict: bool = True) -> list[PlacedPrompt]:
    """The prompts of a file and where they stand.

    Args:
        path: of text or of rows.
        limit: use only the first so many.
        strict: refuse a prompt that stands there twice, and texts beside chats.

    Raises:
        UserError: the file is missing, cannot be read, has no prompts or fewer than `limit`; a row has none, or one
            that no model can get; some are texts and others chats.
    """
    found: list[PlacedPrompt] = []
    first: dict[str, str] = {}
    for where, row in prompt_rows(path):
        try:
            prompt = prompt_of(row)
        except BadRow as bad:
            raise UserError(f"{where}: {bad.detail}") from None
        before = first.setdefault(json.dumps(prompt, sort_keys=True), where)
        if before != where and strict:
            raise UserError(f"{where}: repeats the prompt of {before}; give each prompt once")
        found.append(PlacedPrompt(prompt, where))
    if not found:
        raise UserError(f"{path}: no prompts in it")
    if limit is not None and len(found) < limit:
        raise UserError(f"{path}: {len(found)} prompts, but {limit} are asked for")
    return (_of_one_kind(found) if strict else found)[:limit]


def refuse_without_prompts(path: str | Path) -> None:
    """Refuse a file in which no row has a prompt; of training's prompts single bad rows are set aside later.

    Raises:
        UserError: the file cannot be read, or names the first row and what is wrong with it.
    """
    first: str | None = None
    for where, row in prompt_rows(path):
        try:
            with_prompt(settled(row, TextRules(reasoning="keep")))
            return
        except BadRow as bad:
            first = first or f"{where}: {bad.detail}"
    raise UserError(first or f"{path}: no prompts in it")


def refuse_unrendered(prompts: Iterable[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse chat prompts of which the tokenizer's template would not write every word.

    Args:
        prompts: each with its place, for the message. Texts pass.
        tokenizer: of the model that is to answer.

    Raises:
        UserError: no chat template; a role that it does not know; text that it drops, or a form that it refuses.
    """
    from jinja2 import TemplateError

    from alignment.data.rendering import Renderer
    from alignment.models.chat import render

    renderer = Renderer(tokenizer)
    for prompt, where in prompts:
        if isinstance(prompt, str):
            continue
        if not tokenizer.chat_template:
            raise UserError(f"{where}: a chat prompt, and the model's tokenizer has no chat template; give texts")
        try:
            renderer.check(prompt, None, render(tokenizer, [prompt], generation=True)[0], "prompt")
        except BadRow as bad:
            raise UserError(f"{where}: {bad.detail}") from None
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: the chat template refuses this prompt: {reason}") from None


def prompt_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file of prompts and where each stands; a line of text is a row with `prompt`.

    Raises:
        UserError: the file is missing, empty or broken, or has JSON in lines and is not named so.
    """
    file = Path(path)
    if file.name.endswith(DATA_ENDINGS):
        line = file.name.endswith((".jsonl", ".jsonl.gz"))
        for place, row in read_file(file):
            yield (f"{path}:{place.row}" if line else f"{path}: row {place.row}"), row
        return
    for number, line_of_text in enumerate(read_text(file).split("\n"), start=1):
        text = line_of_text.strip()
        if text and not text.startswith("#"):
            if text[0] in "{[" and _is_json(text):
                raise UserError(f"{path}:{number}: a row of JSON in a file of text; name the file .jsonl")
            yield f"{path}:{number}", {"prompt": text}


def prompt_of(row: Row) -> Prompt:
    """The prompt of a row, with its system text.

    Raises:
        BadRow: there is none, or one whose text would be lost.
    """
    row = with_prompt(settled(row, PLAIN))
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = [plain_message(message) for message in prompt]
    found = with_context({"prompt": prompt}, row, PLAIN)
    if "tools" in found:
        raise BadRow(LOST_TEXT, "column 'tools' is filled: only training and data.prompts read tools")
    return found["prompt"]


def with_prompt(row: Row) -> Row:
    """The row with a checked `prompt`, found where the row has it; texts with a system text beside them are chats.

    Args:
        row: from `prompt_rows`, settled.

    Raises:
        BadRow: no prompt, not a text or messages, or one that ends with an answer.
    """
    prompt = _prompt_in(row)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow(EMPTY, "prompt is empty")
        refuse_written_messages("prompt", prompt)
        if row.get("system") or row.get("system_prompt"):
            prompt = [{"role": "user", "content": prompt}]
    elif not is_messages(prompt):
        raise BadRow(NOT_TEXT, f"prompt is {type(prompt).__name__}, neither a text nor a list of chat messages")
    elif not prompt or not has_text(prompt):
        raise BadRow(EMPTY, "prompt is empty")
    elif prompt[-1]["role"] == "assistant":
        raise BadRow(UNKNOWN_FORM, "prompt ends with the assistant's message; end it with the user's")
    return row | {"prompt": prompt}


def _prompt_in(row: Row) -> Any:
    """The prompt under any of its names."""
    for column in ("prompt", "messages", "conversations"):
        value = row.get(column)
        if value is None:
            continue
        if isinstance(value, list) and not is_messages(value):
            value = chat_messages(column, value)
        while column != "prompt" and isinstance(value, list) and value and value[-1]["role"] == "assistant":
            value = value[:-1]  # the answer, which is not asked
        if column != "prompt" and isinstance(value, str):
            raise BadRow(NOT_TEXT, f"{column}: expected a list of chat messages, got str")
        return value
    if isinstance(row.get("instruction"), str):
        more = row.get("input")
        return f"{row['instruction']}\n\n{more}" if isinstance(more, str) and more.strip() else row["instruction"]
    shared = explicit_prompt(row).get("prompt")
    if shared is None:
        columns = ", ".join(map(str, row)) or "nothing"
        raise BadRow(MISSING_FIELD, f"no prompt in this row (it has {columns:.80}); accepted: {ACCEPTED}")
    return shared


def _of_one_kind(found: list[PlacedPrompt]) -> list[PlacedPrompt]:
    """All texts or all chats: beside rows with a system text, those without are chats as well."""
    chats = [one for one in found if not isinstance(one.prompt, str)]
    if not chats or len(chats) == len(found):
        return found
    if any(one.prompt[0]["role"] != "system" or len(one.prompt) > 2 for one in chats):  # type: ignore[index]
        text = next(one for one in found if isinstance(one.prompt, str))
        raise UserError(f"{text.where}: a text, and {chats[0].where} is a list of chat messages; give one kind")
    return [
        PlacedPrompt([{"role": "user", "content": one.prompt}], one.where) if isinstance(one.prompt, str) else one
        for one in found
    ]


def _is_json(text: str) -> bool:
    """Whether a line is a JSON object, or a list of some."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
