"""Canonical rows as Arrow tables, and tables as one mixture. Knows nothing of sources or tokenizers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from alignment.data.preferences import CARRIED, ID_COLUMNS, NUMBER_COLUMNS, TEXT_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_ROWS_AT_ONCE = 1000


def message_keys(rows: Iterable[Row]) -> list[str]:
    """What some messages have besides role and content, and `tools` where some row has them."""
    columns = (*TEXT_COLUMNS, "calibration")
    there = {key for row in rows for column in columns for m in row.get(column, ()) if len(m) > 2 for key in m}
    tools = ["tools"] if any("tools" in row for row in rows) else []
    return [*(key for key in CARRIED if key in there), *tools]


def features(chat: bool, columns: list[str], keys: Iterable[str] = ()) -> Any:
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    message = dict.fromkeys(("role", "content", *(key for key in keys if key != "tools")), Value("string"))
    text = List(message) if chat else Value("string")
    kinds = {c: ids if c.endswith("_ids") else Value("float64") if c in NUMBER_COLUMNS else text for c in columns}
    tools = {"tools": Value("string")} if "tools" in keys else {}
    return Features(dict.fromkeys(TEXT_COLUMNS, text) | dict.fromkeys(ID_COLUMNS, ids) | kinds | tools)


def table(rows: list[Row], features: Any) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in features}, features=features)


def mixed(tables: list[Dataset | None], sources: list[Any], seed: int) -> tuple[Dataset, list[Sequence[int]]]:
    """All rows of every source, or with weights the largest mixture of those shares; and which rows of each."""
    from datasets import concatenate_datasets

    have = [0 if rows is None else len(rows) for rows in tables]
    take = mixture(have, [source.weight for source in sources])
    drawn: list[Dataset] = []
    chosen: list[Sequence[int]] = []
    for place, (rows, count) in enumerate(zip(tables, take, strict=True)):
        chosen.append(range(count))
        if rows is None or not count:
            continue
        if count < len(rows):
            chosen[-1] = sorted(random.Random(f"{seed}/{place}").sample(range(len(rows)), count))
            rows = rows.select(chosen[-1], keep_in_memory=True)
        drawn.append(rows)
    return (concatenate_datasets(drawn) if drawn else table([], features(False, []))), chosen


def mixture(have: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many rows each source gives to the largest mixture with these shares; all of them without weights.

    The total is the largest T with T * share_i <= have_i for every source; what rounding down leaves over goes to the
    largest remainders, where there are rows left.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return list(have)
    shares = [weight / sum(given) for weight in given]
    total = min(int(n / share + 1e-9) for n, share in zip(have, shares, strict=True))
    take = [min(n, int(total * share + 1e-9)) for n, share in zip(have, shares, strict=True)]
    by_remainder = sorted(range(len(take)), key=lambda i: take[i] - total * shares[i])
    for i in by_remainder:
        if sum(take) < total and take[i] < have[i]:
            take[i] += 1
    return take


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of every value of a data set, in order."""
    digest = hashlib.sha256()
    for batch in dataset.iter(_ROWS_AT_ONCE):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()
