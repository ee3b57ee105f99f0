"""What evaluation programs read: prompts with their places, model outputs, the prompts that were trained on.

Not the reader of recipes or of preference data for training, and not plain file access (`alignment.files`). Whatever
is wrong with a file raises a `UserError` that names the file and the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.data import prompt_files
from alignment.data.overlap import prompt_hash
from alignment.data.preferences import is_messages
from alignment.errors import UserError
from alignment.files import iterate_json_lines, jsonable, write_json, write_text
from alignment.rewards.base import prompt_text


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it stands (`FILE:line`), for messages.

    Attributes:
        text: what reports and judges show: a chat as its only message's content, or one `role: content` line each.
        where: `FILE:line`.
        messages: of a chat prompt.
    """

    text: str
    where: str
    messages: list[dict[str, Any]] | None = None

    def given(self, chat: bool) -> str | list[dict[str, Any]]:
        """As a model gets it; with `chat`, a text is what the user says."""
        return self.messages or ([{"role": "user", "content": self.text}] if chat else self.text)


def deliver(result: Mapping[str, Any], text: str, name: str, output: Path | None, as_json: bool) -> None:
    """Keep a program's result as OUTPUT/NAME.json and its text as NAME.md, and print the one or the other."""
    if output is not None:
        write_text(output / f"{name}.md", text + "\n")
        write_json(output / f"{name}.json", result)
    print(json.dumps(jsonable(result), allow_nan=False) if as_json else text)


def shorten(text: str, width: int = 60) -> str:
    """`text` on one line, quoted, cut to about `width` characters: for messages."""
    line = " ".join(text.split())
    return repr(line if len(line) <= width else line[: width - 1].rstrip() + "…")


def locate_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file (`alignment.data.prompt_files` has the rules) with their places.

    Raises:
        UserError: as there; or two chats that read alike.
    """
    first: dict[str, str] = {}
    found = []
    for given, where in prompt_files.locate_prompts(path, limit):
        text = prompt_text(given)
        if (before := first.setdefault(text, where)) != where:
            raise UserError(f"{where}: reads like the prompt of {before}; give each prompt once")
        found.append(Prompt(text, where, None if isinstance(given, str) else given))
    return found


def checked_text(value: Any, where: str) -> str:
    """A prompt out of a file of outputs as text, as `prompt_text` spells it.

    Raises:
        UserError: it is neither a text nor chat messages.
    """
    if not isinstance(value, str) and not is_messages(value):
        raise UserError(f"{where}: prompt must be text or a list of messages with role and content, not {value!r:.60}")
    return prompt_text(value)


def read_outputs(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Responses by prompt of a JSON-lines file with `prompt` and `response` in every row.

    Returns:
        prompt -> (where it stands first, its responses in file order). Rows that repeat a prompt are further samples.
    """
    outputs: dict[str, tuple[str, list[str]]] = {}
    for where, row in iterate_json_lines(path):
        for key in ("prompt", "response"):
            if key not in row:
                raise UserError(f"{where}: no {key!r} in this row (it has {', '.join(row) or 'nothing'})")
        if not isinstance(row["response"], str):
            raise UserError(f"{where}: response must be text, not {row['response']!r:.60}")
        prompt = checked_text(row["prompt"], where)
        outputs.setdefault(prompt, (where, []))[1].append(row["response"])
    if not outputs:
        raise UserError(f'{path}: holds no rows; rows like {{"prompt": …, "response": …}} are needed')
    return outputs


def read_pool(folder: Path) -> tuple[dict[str, tuple[str, list[str]]], dict[str, list[bool]]]:
    """Responses by prompt of a pool of samples, as `read_outputs` gives them, and which of them are finished.

    Equal prompts are further samples of one prompt. A chat is asked for as `prompt_text` spells it.

    Raises:
        UserError: no complete pool there.
    """
    from alignment.models.pools import open_pool

    pool = open_pool(folder)
    outputs: dict[str, tuple[str, list[str]]] = {}
    finished: dict[str, list[bool]] = {}
    for shard in range(len(pool.shards)):
        for number, row in enumerate(pool.rows(shard), start=1):
            where = f"{pool.file(shard)}:{number}"
            prompt = checked_text(row["prompt"], where)
            outputs.setdefault(prompt, (where, []))[1].extend(row["responses"])
            finished.setdefault(prompt, []).extend(row["finished"])
    return outputs, finished


def refuse_training_prompts(prompts: Sequence[Prompt], preferences: Path) -> int:
    """Refuse evaluation prompts in which the user says the same as in one of the training data, text or messages.

    Args:
        prompts: evaluation prompts.
        preferences: the JSON-lines file of training pairs, with a `prompt` in every row.

    Returns:
        How many different prompts were trained on.

    Raises:
        UserError: names the first evaluation prompt that was trained on, and both rows.
    """
    trained: dict[str, str] = {}
    for where, row in iterate_json_lines(preferences):
        checked_text(row.get("prompt"), where)
        trained.setdefault(prompt_hash(row["prompt"]), where)
    shared = [prompt for prompt in prompts if prompt_hash(prompt.given(chat=False)) in trained]
    if shared:
        first = shared[0]
        stands = trained[prompt_hash(first.given(chat=False))]
        raise UserError(
            f"{first.where}: prompt {shorten(first.text)} was trained on ({stands}); {len(shared)} of {len(prompts)} "
            "evaluation prompts were; evaluate on prompts absent from training"
        )
    return len(trained)
