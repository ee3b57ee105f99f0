"""Prompts of on-policy training: read, tokenised and checked; the ones that cannot be used are counted and kept aside.

A file has prompts as `prompt_files` reads them, and where a reference answer is needed `answer`; of a hub data set the
columns are named. Not preferences (`pipeline`).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from alignment.data.messages import PLAIN, TextRules, settled, with_context
from alignment.data.pipeline import Prepared, Rejected, described
from alignment.data.preferences import (
    EMPTY,
    MISSING_FIELD,
    NOT_TEXT,
    PROMPT_TOO_LONG,
    BadRow,
    plain_message,
)
from alignment.data.prompt_files import prompt_rows, read_prompts, with_prompt
from alignment.data.reading import Place, raw_rows
from alignment.data.rendering import Renderer
from alignment.data.tokens import encode
from alignment.errors import UserError, nearest
from alignment.recipes.rows import DATA_ENDINGS, HubPromptsSection, SourceSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_prompts(
    file: str | HubPromptsSection,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    answers: bool,
    max_rejected_share: float,
    rules: TextRules = PLAIN,
) -> Prepared:
    """Columns `prompt`, `prompt_ids` and, with `answers`, `answer`.

    Args:
        file: of text or rows (`prompt_files`), or a column of a hub data set.
        limit: use only the first so many.
        longest: tokens that a prompt, with its reference answer, may have; longer ones are set aside.
        answers: whether a reference answer is needed.
        max_rejected_share: for `write_rejected`.
        rules: what becomes of reasoning, and of special tokens in the prompts' text.

    Raises:
        UserError: the file cannot be read, has too few prompts, or none that can be used.
    """
    from datasets import Dataset

    if not isinstance(file, str):
        rows, file = _columns(file, limit, answers), str(file)
    elif answers and not file.endswith(DATA_ENDINGS):
        raise UserError(f"{file}: a reference answer is needed for every prompt: give a .jsonl with prompt and answer")
    else:
        rows = _given(file, limit)
    kept: list[dict[str, Any]] = []
    places: list[tuple[str, Place]] = []
    rejected: list[Rejected] = []
    renderer = Renderer(tokenizer, rules)
    for number, row in enumerate(rows, start=1):
        try:
            kept.append(_usable(row, renderer, longest, answers))
            places.append((file, Place(number)))
        except BadRow as bad:
            rejected.append(Rejected(file, number, bad.reason, bad.detail))
    if not kept:
        raise UserError(
            f"{file}: none of {len(rows)} prompts can be used: row {rejected[0].row}: {rejected[0].detail}"
        )
    chats = {not isinstance(row["prompt"], str) for row in kept}
    if len(chats) > 1:
        raise UserError(f"{file}: some prompts are texts and others chat messages; give one kind")
    counts = dict(Counter(bad.reason for bad in rejected))
    return Prepared(
        Dataset.from_list(kept),
        rejected,
        counts,
        len(rows),
        role="prompts",
        notes=tuple(renderer.notes("prompt")),
        max_rejected_share=max_rejected_share,
        sources=(described("prompts", file, "prompts", len(rows), len(kept), len(kept), rejected),),
        places=tuple(places),
    )


def _given(file: str, limit: int | None) -> list[dict[str, Any]]:
    """The rows of a file; of text, where a prompt that is there twice is a slip, each once."""
    if not file.endswith(DATA_ENDINGS):
        return [{"prompt": prompt} for prompt in read_prompts(file, limit)]
    rows = [row for _, row in prompt_rows(file)]
    if limit is not None and len(rows) < limit:
        raise UserError(f"{file}: {len(rows)} prompts, but {limit} are asked for")
    return rows[:limit]


def _columns(source: HubPromptsSection, limit: int | None, answers: bool) -> list[dict[str, Any]]:
    """Rows `prompt` and, with `answers`, `answer` out of the columns that the recipe names."""
    given = SourceSection(name=source.hub, split=source.split, subset=source.subset, limit=limit)
    wanted = {"prompt": source.prompt} | ({"answer": source.answer} if answers else {})
    rows: list[dict[str, Any]] = []
    for _, row in raw_rows(given, "train"):
        for key, column in wanted.items():
            if column not in row:
                raise UserError(
                    f"data.prompts: {source} has no column {column!r}{nearest(column, row)}; name it: {key}: COLUMN"
                )
        rows.append({key: row[column] for key, column in wanted.items()})
        rows[-1]["prompt"] = _asked(rows[-1]["prompt"], source)
    return rows


def _asked(prompt: Any, source: HubPromptsSection) -> Any:
    """The prompt as a chat, where the recipe wants one."""
    if isinstance(prompt, str) and prompt and (source.chat or source.system):
        prompt = [{"role": "user", "content": prompt}]
    if source.system and isinstance(prompt, list):
        return [{"role": "system", "content": source.system}, *prompt]
    return prompt


def _usable(row: dict[str, Any], renderer: Renderer, longest: int, answers: bool) -> dict[str, Any]:
    """The row with its token ids.

    Raises:
        BadRow: what is wrong, without the row's text.
    """
    row = with_prompt(settled(row, renderer.rules))
    prompt, tokenizer = row["prompt"], renderer.tokenizer
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise BadRow(NOT_TEXT, "prompt is a list of chat messages, and the tokenizer has no chat template")
    if not isinstance(prompt, str):
        prompt = [plain_message(message) for message in prompt]
    found = with_context({"prompt": prompt}, row, renderer.rules)
    if answers:
        answer = row.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow(MISSING_FIELD, f"answer must be a text, got {json.dumps(answer)[:40]}")
        found["answer"] = answer
    encoded = encode([found], tokenizer, (), renderer)[0]
    if isinstance(encoded, BadRow):
        raise encoded
    ids = encoded[0]["prompt_ids"]
    if not ids:
        raise BadRow(EMPTY, "prompt has no token")
    tail = len(tokenizer(f" {found['answer']}", add_special_tokens=False).input_ids) + 1 if answers else 0
    if len(ids) + tail > longest:
        raise BadRow(
            PROMPT_TOO_LONG,
            f"{len(ids)} tokens{f' and {tail} of its answer' * answers}, and data.max_length less "
            f"generation.max_new_tokens leaves {longest}",
        )
    return found | {"prompt_ids": ids}
