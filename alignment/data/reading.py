"""The raw rows of one source: a local file, a folder with one file per split, or a hub data set.

Rows come as dictionaries with their place, in the source's order; what they mean is `forms`'s. JSON is read
with Python's own reader: pyarrow's and pandas' give a column one type, and a row with a wrong type is what the
quarantine has to see.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import UserError, nearest
from alignment.files import iterate_json_lines, parse_json, read_text
from alignment.recipes.rows import DATA_ENDINGS, SourceSection

Row = dict[str, Any]


class Place(NamedTuple):
    """Where a row stands, so that it can be found.

    Attributes:
        row: the line of a JSON-lines file; else the row's number, from 1, in its file (.json: in its split's list;
            .csv: without the header) or hub split, whatever slice is read.
        file: of a folder's row, its file.
    """

    row: int
    file: str | None = None


Placed = tuple[Place, Row]
Splits = dict[str, Callable[[], Iterable[Placed]]]

DEFAULT_SPLIT = {"train": "train", "eval": "test"}
# How the hub numbers the files of one split; older ones have a hash, too.
_SHARD = re.compile(r"-\d{5}-of-(?P<of>\d{5})(-[0-9a-f]{8,})?$")
_SPLIT_NAME = re.compile(r"(train|test|valid|validation|val|dev|eval)([_-].+)?")
# Files that lie beside data, or are of a model or a run, and end like data.
COMPANIONS = frozenset(
    "dataset_infos.json dataset_info.json dataset_dict.json state.json metadata.json config.json manifest.json "
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "adapter_config.json model.safetensors.index.json trainer_state.json package.json".split()
)
_SLICED = re.compile(r"[\[+]")
_JSON = (".json", ".json.gz")
_ROWS_AT_ONCE = 1000


def raw_rows(source: SourceSection, role: str) -> Iterator[Placed]:
    """The rows of a source's split and where they stand, in order, at most `limit`.

    Args:
        source: name, split and limit are read.
        role: "train" or "eval": which split is meant where none is named.

    Raises:
        UserError: no such file, data set or split, or it cannot be read.
    """
    rows = _local(source, role) if source.is_local else _hub(source, role)
    yield from itertools.islice(rows, source.limit)


def numbered(rows: Iterable[Row]) -> Iterator[Placed]:
    """Rows with their numbers from 1."""
    return ((Place(number), row) for number, row in enumerate(rows, start=1))


def _hub(source: SourceSection, role: str) -> Iterator[Placed]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    def load(split: str) -> Any:
        return load_dataset(source.name, source.subset, data_dir=source.data_dir, split=split)

    wanted = source.split or DEFAULT_SPLIT[role]
    try:
        if not _SLICED.search(wanted):
            yield from numbered(load(wanted))
            return
        sets = {split: load(split) for split in _named(wanted)}
        for part in _slices(source.name, {split: len(rows) for split, rows in sets.items()}, wanted):
            chosen = range(part.from_, part.to)
            for i, row in zip(chosen, sets[part.splitname].select(chosen), strict=True):
                yield Place(i + 1), row
    except (OSError, ValueError, DatasetNotFoundError, DatasetGenerationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data: {source.name!r} is neither a local file ({', '.join(DATA_ENDINGS)}) nor a data set that the hub "
            f"gives ({reason})"
        ) from error


def _local(source: SourceSection, role: str) -> Iterable[Placed]:
    path = source.path
    if not path.exists():
        raise UserError(f"{path}: no such file; paths are relative to the current folder, {Path.cwd()}")
    if path.is_dir():
        splits = _folder_splits(path)
    else:  # without named splits all rows are one
        splits = _json_splits(path) if path.name.endswith(_JSON) else {"train": partial(read_file, path)}
    wanted = source.split or (next(iter(splits)) if len(splits) == 1 else DEFAULT_SPLIT[role])
    if _SLICED.search(wanted):
        return _sliced(source.name, splits, wanted)
    if wanted not in splits:
        raise UserError(f"{source.name}: no split {wanted!r} in it{nearest(wanted, splits)}")
    return splits[wanted]()


def _sliced(name: str, splits: Splits, wanted: str) -> Iterator[Placed]:
    rows = {split: list(splits[split]()) for split in _named(wanted) & set(splits)}
    for part in _slices(name, {split: len(found) for split, found in rows.items()}, wanted):
        yield from rows[part.splitname][part.from_ : part.to]


def _named(wanted: str) -> set[str]:
    return {part.split("[")[0].strip() for part in wanted.split("+")}


def _slices(name: str, sizes: dict[str, int], wanted: str) -> list[Any]:
    """`train[:10%]+test[5:]`, by the rules of `datasets`, as `splitname`, `from_` and `to`."""
    from datasets import ReadInstruction

    try:
        return list(ReadInstruction.from_spec(wanted).to_absolute(sizes))
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"{name}: split {wanted!r}: {' '.join(str(error).split())}") from None


def _folder_splits(folder: Path) -> Splits:
    """One split per file name (`train.jsonl`), numbered parts of one split together; of the folder or its data/.

    Where neither has a file, folders that are called like splits (`train/0000.parquet`) are splits.
    """
    for place in (folder, folder / "data"):
        files = _data_files(place)
        if files:
            break
    else:
        inside = {child.name: found for child in sorted(folder.iterdir()) if (found := _data_files(child))}
        if not any(map(_SPLIT_NAME.fullmatch, inside)):
            raise UserError(f"{folder}: holds no data file ({', '.join(DATA_ENDINGS)}){_instead(folder, inside)}")
        return {name: partial(_read_files, found) for name, found in inside.items() if _SPLIT_NAME.fullmatch(name)}
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(_SHARD.sub("", file.name.split(".")[0]), []).append(file)
    for split, found in parts.items():
        if len(found) > 1 and not all(_SHARD.search(file.name.split(".")[0]) for file in found):
            raise UserError(f"{folder}: {found[0].name} and {found[1].name} are both split {split!r}; keep one")
        _refuse_missing_parts(folder, split, found)
    return {split: partial(_read_files, found) for split, found in parts.items()}


def _data_files(folder: Path) -> list[Path]:
    """A folder's own data files, without what hub, git and `datasets` put beside them."""
    if folder.name.startswith(".") or not folder.is_dir():
        return []
    names = (file for file in folder.iterdir() if file.name.endswith(DATA_ENDINGS) and file.is_file())
    return sorted(file for file in names if file.name not in COMPANIONS and not file.name.startswith("."))


def _refuse_missing_parts(folder: Path, split: str, files: list[Path]) -> None:
    """A clone that stopped half-way has some of a split's parts, and a second download has parts of another set."""
    totals = {int(found["of"]) for file in files if (found := _SHARD.search(file.name.split(".")[0]))}
    if totals and totals != {len(files)}:
        wanted = " or ".join(map(str, sorted(totals)))
        remedy = "complete the download, or rename the parts to use these alone"
        raise UserError(f"{folder}: split {split!r} has {len(files)} parts, and their names say {wanted}: {remedy}")


def _instead(folder: Path, inside: Iterable[str]) -> str:
    """What is there instead of data files."""
    if any(folder.glob("*.arrow")) or (folder / "dataset_dict.json").is_file():
        return "; it was written by save_to_disk: write it with to_parquet or to_json"
    if any(folder.glob("*.safetensors")):
        return ", but a model's weights"
    folders = list(inside)
    if folders:
        return f"; its folders do: name one of them ({', '.join(f'{folder}/{name}' for name in folders[:5])})"
    there = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    return f"; there is {', '.join(there[:5])}{', …' * (len(there) > 5)}" if there else "; it is empty"


def _read_files(files: list[Path]) -> Iterator[Placed]:
    for file in files:
        for place, row in read_file(file):
            yield place._replace(file=str(file)), row


def _json_splits(path: Path) -> Splits:
    """The splits of a .json file that holds an object of lists; one split where it holds a list."""
    value = _json(path)
    if isinstance(value, dict) and value and all(isinstance(rows, list) for rows in value.values()):
        return {split: partial(_objects, f"{path}: split {split!r}", rows) for split, rows in value.items()}
    return {"train": partial(_objects, str(path), value)}


def read_file(path: Path) -> Iterator[Placed]:
    """The rows of one file and their places, by its ending.

    Raises:
        UserError: the file is empty or broken, or its ending is not one of `DATA_ENDINGS`.
    """
    rows: Iterable[Placed]
    if path.name.endswith(".parquet"):
        rows = numbered(_parquet(path))
    elif path.name.endswith(".csv"):
        rows = numbered(_csv(path))
    elif path.name.endswith(_JSON):
        rows = _objects(str(path), _json(path))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = ((Place(int(where.rpartition(":")[2])), row) for where, row in iterate_json_lines(path))
    else:
        raise UserError(f"{path}: unknown kind of file; valid: {', '.join(DATA_ENDINGS)}")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: no rows")


def _json(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        hint = "; for one object a line name it .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{hint}") from None


def _objects(where: str, rows: Any) -> Iterable[Placed]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: expected a list of objects; for one object a line name it .jsonl")
    if not rows:
        raise UserError(f"{where}: no rows")
    return numbered(rows)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None


def _csv(path: Path) -> Iterator[Row]:
    """Every field as text: what is a number, the form says. A line with too few or too many fields breaks the file."""
    import pyarrow
    from pyarrow import csv

    lines = csv.ParseOptions(newlines_in_values=True)
    try:
        with csv.open_csv(path, parse_options=lines) as peeked:
            names = peeked.schema.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two columns are called {twice!r}; which one is meant?")
        texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
        with csv.open_csv(path, parse_options=lines, convert_options=texts) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable CSV file: {' '.join(str(error).split())[:200]}") from None
