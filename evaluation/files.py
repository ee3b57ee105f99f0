"""Files that evaluation programs read and write: prompts, model outputs, JSON lines, whole or not at all.

Not the reader of recipes or of preference data for training. Whatever is wrong with a file raises a `UserError` that
names the file and the row.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.data.preferences import read_prompts
from alignment.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it stands (`FILE:line`), for messages."""

    text: str
    where: str


def shorten(text: str, width: int = 60) -> str:
    """`text` on one line, quoted, cut to about `width` characters: for messages."""
    line = " ".join(text.split())
    return repr(line if len(line) <= width else line[: width - 1].rstrip() + "…")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; paths are relative to the current folder, {Path.cwd()}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file is needed") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The one JSON object that `path` holds."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def iterate_json_lines(path: Path, *, skip_unfinished: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE:line`, object) for every line of a JSON-lines file; empty lines are skipped.

    Args:
        path: the file.
        skip_unfinished: leave out a last line without its line end: somebody is still writing it.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines[:-1] if skip_unfinished else lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg}; one JSON object per line is needed") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield where, row


def jsonable(value: Any) -> Any:
    """`value` with numbers that JSON lacks (NaN, infinities) as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all (temporary file beside it, then an atomic rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON object, indented, atomically."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    lines = (json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))


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


def _same_prompt(text: str) -> str:
    return " ".join(text.split())


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
        trained.setdefault(_same_prompt(prompt_text(row.get("prompt"), where)), where)
    overlap = [prompt for prompt in prompts if _same_prompt(prompt.text) in trained]
    if overlap:
        first = overlap[0]
        raise UserError(
            f"{first.where}: prompt {shorten(first.text)} was trained on ({trained[_same_prompt(first.text)]}); "
            f"{len(overlap)} of {len(prompts)} evaluation prompts were; evaluate on prompts absent from training"
        )
    return len(trained)
