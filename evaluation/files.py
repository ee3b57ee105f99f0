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

from alignment.data.preferences import read_prompts, same_prompt
from alignment.errors import UserError
from alignment.files import iterate_json_lines, jsonable, read_text, write_json, write_text


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it stands (`FILE:line`), for messages."""

    text: str
    where: str


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
    """The prompts of a text file (`alignment.data.preferences.read_prompts` has the rules) with their lines.

    Raises:
        UserError: as there.
    """
    texts = read_prompts(path, limit)
    lines = {line.strip(): number for number, line in enumerate(read_text(path).splitlines(), start=1)}
    return [Prompt(text, f"{path}:{lines[text]}") for text in texts]


def prompt_text(value: Any, where: str) -> str:
    """A prompt as text: a string as it is; a chat as its only message's content, or one `role: content` line each."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise UserError(f"{where}: prompt must be text or a list of messages with role and content, not {value!r:.60}")
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


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
        prompt = prompt_text(row["prompt"], where)
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
            prompt = prompt_text(row["prompt"], where)
            outputs.setdefault(prompt, (where, []))[1].extend(row["responses"])
            finished.setdefault(prompt, []).extend(row["finished"])
    return outputs, finished


def refuse_training_prompts(prompts: Sequence[Prompt], preferences: Path) -> int:
    """Refuse evaluation prompts that stand in the training data; they are compared with spaces collapsed.

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
        trained.setdefault(same_prompt(prompt_text(row.get("prompt"), where)), where)
    overlap = [prompt for prompt in prompts if same_prompt(prompt.text) in trained]
    if overlap:
        first = overlap[0]
        raise UserError(
            f"{first.where}: prompt {shorten(first.text)} was trained on ({trained[same_prompt(first.text)]}); "
            f"{len(overlap)} of {len(prompts)} evaluation prompts were; evaluate on prompts absent from training"
        )
    return len(trained)
