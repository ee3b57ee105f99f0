"""The raw rows of one source: a local file, a folder with one file per split, or a hub data set.

Rows come as dictionaries, in the source's order; what they mean is `forms`'s. JSON is read with Python's own reader:
pyarrow's and pandas' give a column one type, and a row with a wrong type is what the quarantine has to see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError, nearest
from alignment.files import iterate_json_lines, read_text

if TYPE_CHECKING:
    from alignment.recipes.sections import SourceSection

Row = dict[str, Any]
Splits = dict[str, Callable[[], Iterator[Row]]]

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")
DEFAULT_SPLIT = {"train": "train", "eval": "test"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # how the hub numbers the files of one split
_ROWS_AT_ONCE = 1000


def is_local(name: str) -> bool:
    """A file or folder rather than a hub name: it is there, or its ending or beginning says so."""
    return name.endswith(ENDINGS) or name.startswith((".", "/", "~")) or Path(name).exists()


def raw_rows(source: SourceSection, role: str) -> Iterator[Row]:
    """The rows of a source's split, in order, at most `limit`; numbers in messages count them from 1.

    Args:
        source: name, split and limit are read.
        role: "train" or "eval": which split is meant where none is named.

    Raises:
        UserError: no such file, data set or split, or it cannot be read.
    """
    rows = _local(source, role) if is_local(source.name) else _hub(source, role)
    for number, row in enumerate(rows):
        if source.limit is not None and number >= source.limit:
            return
        yield row


def _hub(source: SourceSection, role: str) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        yield from load_dataset(source.name, split=source.split or DEFAULT_SPLIT[role])
    except (OSError, ValueError, DatasetNotFoundError, DatasetGenerationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data: {source.name!r} is neither a local file ({', '.join(ENDINGS)}) nor a data set that the hub gives "
            f"({reason})"
        ) from error


def _local(source: SourceSection, role: str) -> Iterator[Row]:
    path = Path(source.name).expanduser()
    splits = _folder_splits(path) if path.is_dir() else _file_splits(path)
    if splits is None:
        splits = {"train": lambda: read_file(path)}
        wanted = source.split or "train"
    else:
        wanted = source.split or (next(iter(splits)) if len(splits) == 1 else DEFAULT_SPLIT[role])
    if re.search(r"[\[+]", wanted):
        return _sliced(source.name, splits, wanted)
    if wanted not in splits:
        raise UserError(f"{source.name}: no split {wanted!r} in it{nearest(wanted, splits)}")
    return splits[wanted]()


def _sliced(name: str, splits: Splits, wanted: str) -> Iterator[Row]:
    """`train[:10%]+test[5:]`, by the rules of `datasets`."""
    from datasets import ReadInstruction

    try:
        named = {part.split("[")[0].strip() for part in wanted.split("+")} & set(splits)
        rows = {split: list(splits[split]()) for split in named}
        parts = ReadInstruction.from_spec(wanted).to_absolute({split: len(rows[split]) for split in rows})
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"{name}: split {wanted!r}: {' '.join(str(error).split())}") from None
    for part in parts:
        yield from rows[part.splitname][part.from_ : part.to]


def _folder_splits(folder: Path) -> Splits:
    """One split per file name (`train.jsonl`), numbered parts of one split together; of the folder or its data/."""
    for place in (folder, folder / "data"):
        files = sorted(file for file in place.glob("*") if file.name.endswith(ENDINGS))
        if files:
            break
    else:
        raise UserError(f"{folder}: holds no data file ({', '.join(ENDINGS)})")
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(_SHARD.sub("", file.name.split(".")[0]), []).append(file)
    for split, found in parts.items():
        if len(found) > 1 and not all(_SHARD.search(file.name.split(".")[0]) for file in found):
            raise UserError(f"{folder}: {found[0].name} and {found[1].name} are both split {split!r}; keep one")
    return {
        split: lambda found=found: (row for file in found for row in read_file(file)) for split, found in parts.items()
    }


def _file_splits(path: Path) -> Splits | None:
    """The splits of a .json file that holds an object of lists; None for every other file."""
    if not path.name.endswith((".json", ".json.gz")):
        return None
    value = _json(path)
    if not (isinstance(value, dict) and value and all(isinstance(rows, list) for rows in value.values())):
        return None
    return {split: lambda rows=rows, split=split: iter(_objects(path, rows, split)) for split, rows in value.items()}


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, by its ending.

    Raises:
        UserError: the file is missing, empty or broken, or its ending is not one of `ENDINGS`.
    """
    if path.name.endswith(".parquet"):
        rows = _parquet(path)
    elif path.name.endswith(".csv"):
        rows = _csv(path)
    elif path.name.endswith((".json", ".json.gz")):
        rows = iter(_objects(path, _json(path)))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = (row for _, row in iterate_json_lines(path))
    else:
        raise UserError(f"{path}: unknown kind of file; valid: {', '.join(ENDINGS)}")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: no rows")


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def _objects(path: Path, rows: Any, split: str | None = None) -> list[Row]:
    where = f"{path}: split {split!r}" if split else str(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: expected a list of objects; for one object a line name it .jsonl")
    return rows


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    _there(path)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None


def _csv(path: Path) -> Iterator[Row]:
    """Every field as text; an absent field at a line's end is None."""
    import pandas

    _there(path)
    try:
        with pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=_ROWS_AT_ONCE) as chunks:
            for chunk in chunks:
                yield from chunk.to_dict("records")
    except pandas.errors.EmptyDataError:
        raise UserError(f"{path}: no rows") from None
    except (pandas.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable CSV file: {' '.join(str(error).split())[:200]}") from None


def _there(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; paths are relative to the current folder, {Path.cwd()}")
