"""AlpacaEval's files: model_outputs.json, annotations.json and leaderboard CSV, and the numbers that it makes of them.

Formats and definitions are those of tatsu-lab/alpaca_eval cd543a149 (metrics/winrate.py, metrics/helpers.py), whose
own tools read what is written here. A preference is 1 where output_1 (the baseline) is better, 2 where output_2 (the
system under test) is, and anything between is a probability; 1.5, and 0 in old files, is a draw. Intervals are
`head_to_head`'s, length control is `length_control`'s; nothing here draws or judges.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.data.reading import read_file
from alignment.errors import UserError
from alignment.files import jsonable, read_json_object, read_text, write_text
from evaluation.files import shorten

Array = NDArray[np.float64]

LEADERBOARD_COLUMNS = (
    *("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode"),
    *("avg_length", "length_controlled_winrate", "lc_standard_error"),
)
SWITCHED = "is_switched_outputs"  # in a row: true where output_2 was shown first


@dataclass(frozen=True)
class Annotation:
    """One judged pair.

    Attributes:
        where: FILE and row, for messages.
        instruction: the prompt; the unit of resampling.
        output_1, output_2: the baseline's and the system's text.
        generator_1, generator_2: their names.
        preference: as in the file, NaN where the judge's answer was unusable.
        index: the row's `index` where it has one, else its place in the file, from 0.
        switched: whether output_2 was shown to the judge first; None where the file does not say.
        row: everything that the file has.
    """

    where: str
    instruction: str
    output_1: str
    output_2: str
    generator_1: str
    generator_2: str
    preference: float
    index: int
    switched: bool | None = None
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def share(self) -> float:
        """What output_2 gets of the pair, in [0, 1]; NaN for a preference that AlpacaEval drops."""
        value = 1.5 if self.preference == 0 else self.preference
        return value - 1 if 1 <= value <= 2 else math.nan


def read_annotations(path: Path) -> list[Annotation]:
    """The rows of an annotations file, a JSON list or JSON lines, in order.

    Raises:
        UserError: the file cannot be read, holds nothing, or a row lacks a text or has no number for its preference
            (null and NaN are numbers that are not known).
    """
    found = [_annotation(f"{path}: row {place.row}", number, row) for number, (place, row) in enumerate(_rows(path))]
    if not found:
        raise UserError(f"{path}: holds no annotations")
    return found


def _rows(path: Path) -> Iterable[tuple[Any, dict[str, Any]]]:
    if path.is_dir() or not path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        raise UserError(f"{path}: a .json or .jsonl file is needed")
    return read_file(path)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        has = f"{key} is {row[key]!r:.40}" if key in row else f"it has {', '.join(map(str, row)) or 'nothing'}"
        raise UserError(f"{where}: no text under {key!r} in this row ({has})")
    return str(row[key])


def _name(value: Any) -> str:
    """A system's name on one line, half a surrogate pair as its escape: it stands in tables and figures."""
    return " ".join(str(value).split()).encode(errors="backslashreplace").decode()


def _annotation(where: str, number: int, row: dict[str, Any]) -> Annotation:
    texts = {key: _text(row, key, where) for key in ("instruction", "output_1", "output_2")}
    names = [_name(row.get(key) or key) for key in ("generator_1", "generator_2")]
    index = row.get("index")
    return Annotation(
        where,
        **texts,
        generator_1=names[0],
        generator_2=names[1],
        preference=_preference(row, where),
        index=index if isinstance(index, int) and not isinstance(index, bool) else number,
        switched=_switched(row.get(SWITCHED), where),
        row=row,
    )


def _preference(row: Mapping[str, Any], where: str) -> float:
    if "preference" not in row:
        raise UserError(f"{where}: no preference in this row (it has {', '.join(map(str, row))})")
    value = row["preference"]
    number = math.nan if value is None else None if isinstance(value, str) else _number(value)
    if number is None:
        raise UserError(f"{where}: preference must be a number from 1 to 2, 0 or null, not {value!r:.40}")
    return number


def _switched(value: Any, where: str) -> bool | None:
    """true, false, or the 1 and 0 that some tools write for them; None of null and NaN."""
    if value is None or value != value:
        return None
    if value in (0, 1):
        return bool(value)
    raise UserError(f"{where}: {SWITCHED} must be true (output_2 was shown first), false or null, not {value!r:.40}")


def shares(rows: Sequence[Annotation]) -> Array:
    """[n] what the system got of each pair, in [0, 1]; NaN for what AlpacaEval drops."""
    return np.array([row.share for row in rows])


def one_pair(rows: Sequence[Annotation], path: Path) -> tuple[str, str]:
    """(baseline, system) of a file that compares two.

    Raises:
        UserError: it compares more than two.
    """
    pairs = sorted({(row.generator_1, row.generator_2) for row in rows})
    if len(pairs) > 1:
        shown = "; ".join(f"{a} and {b}" for a, b in pairs[:3]) + (" …" if len(pairs) > 3 else "")
        raise UserError(
            f"{path}: compares {len(pairs)} pairs of systems ({shown}), one is needed; `python evaluation/ratings.py` "
            "rates many"
        )
    return pairs[0]


def describe_head2head(preferences: Sequence[float]) -> dict[str, Any]:
    """AlpacaEval's numbers of a list of preferences, with its keys, in percent.

    x = preference - 1 of what lies in [1, 2], 0 being 1.5. `n_draws` counts 0 and 1.5, and `standard_error` is the
    standard deviation (ddof 1) / sqrt(n), NaN for one row. `discrete_win_rate` rounds first, draws being one half;
    like AlpacaEval's it rounds before it drops, so that 2.4 counts as 2 there and is dropped elsewhere.

    Raises:
        ValueError: no preference counts.
    """
    given = np.array([1.5 if p == 0 else p for p in preferences], dtype=np.float64)
    x = given[(given >= 1) & (given <= 2)] - 1  # NaN is neither
    if not x.size:
        raise ValueError("no preference between 1 and 2")
    rounded = np.array([1.5 if p == 1.5 or round(p) == 0 else round(p) for p in given[np.isfinite(given)]])
    return {
        "win_rate": 100 * float(x.mean()),
        "standard_error": 100 * float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan,
        "n_wins": int((x > 0.5).sum()),
        "n_wins_base": int((x < 0.5).sum()),
        "n_draws": int((given == 1.5).sum()),
        "n_total": int(x.size),
        "discrete_win_rate": 100 * float((rounded[(rounded >= 1) & (rounded <= 2)] - 1).mean()),
    }


def average_length(outputs: Sequence[str]) -> int:
    """Mean characters, cut to a whole number, as AlpacaEval's leaderboard has it."""
    return int(sum(map(len, outputs)) / len(outputs))


def read_model_outputs(path: Path) -> tuple[str, dict[str, tuple[str, list[str]]]]:
    """AlpacaEval's model_outputs.json: a JSON list of rows with `instruction`, `output` and `generator`.

    Returns:
        The generator's name (the file's where rows have none), and instruction → (where it stands first, its outputs).

    Raises:
        UserError: the file cannot be read, holds nothing, lacks a text, or has outputs of several generators.
    """
    outputs: dict[str, tuple[str, list[str]]] = {}
    names: dict[str, None] = {}
    for place, row in _rows(path):
        where = f"{path}: row {place.row}"
        outputs.setdefault(_text(row, "instruction", where), (where, []))[1].append(_text(row, "output", where))
        names[_name(row["generator"]) if row.get("generator") else str(path)] = None
    if not outputs:
        raise UserError(f"{path}: holds no rows; a list of instruction, output and generator is needed")
    if len(names) > 1:
        raise UserError(f"{path}: outputs of {len(names)} generators ({', '.join(list(names)[:3])}); one is needed")
    return next(iter(names)), outputs


def annotation_rows(
    prompts: Sequence[str],
    matrices: Sequence[Array],
    model: tuple[str, Sequence[Sequence[str]]],
    baseline: tuple[str, Sequence[Sequence[str]]],
    annotator: str,
) -> list[dict[str, Any]]:
    """A comparison in AlpacaEval's format, a row for every pair of samples of a prompt.

    Args:
        prompts: n prompts.
        matrices: per prompt, [I, J] P(model's sample > baseline's), NaN where it could not be judged.
        model, baseline: name, and per prompt the samples' texts.
        annotator: what judged.

    Returns:
        The rows; `index` is the prompt's number, by which AlpacaEval's difficulties are known.
    """
    return [
        {
            "index": number,
            "instruction": prompt,
            "output_1": theirs,
            "generator_1": baseline[0],
            "output_2": ours,
            "generator_2": model[0],
            "annotator": annotator,
            "preference": 1 + float(matrix[i, j]),
        }
        for number, (prompt, matrix, group, other) in enumerate(
            zip(prompts, matrices, model[1], baseline[1], strict=True)
        )
        for i, ours in enumerate(group)
        for j, theirs in enumerate(other)
    ]


def parse_annotations(rows: Sequence[Mapping[str, Any]]) -> list[Annotation]:
    """Rows that `annotation_rows` made, as `read_annotations` would read them."""
    return [_annotation(f"row {number + 1}", number, dict(row)) for number, row in enumerate(rows)]


def write_annotations(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write annotations.json: a JSON list, a preference that is not known as null."""
    write_text(path, json.dumps(jsonable(list(rows)), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_leaderboard(path: Path, systems: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a leaderboard with AlpacaEval's columns, the highest win rate first.

    Args:
        path: of the CSV; its first column, without a name, has the systems.
        systems: name → its numbers in percent; a column that is missing or null stays empty.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["", *LEADERBOARD_COLUMNS])
    for name, found in sorted(systems.items(), key=lambda item: -float(item[1]["win_rate"])):
        values = {"mode": "community", **found}
        known = [values.get(column) for column in LEADERBOARD_COLUMNS]
        table.writerow([name, *("" if v is None or v != v else v for v in known)])
    write_text(path, text.getvalue())


def difficulty_of(rows: Sequence[Annotation], table: Mapping[str | int, float]) -> Array:
    """The instruction difficulty γ of every row: by its text, else by its `index` (AlpacaEval's row number).

    Raises:
        UserError: a row's instruction has none.
    """
    return np.array([difficulty_at(row.instruction, row.index, row.where, table) for row in rows])


def difficulty_at(instruction: str, index: int, where: str, table: Mapping[str | int, float]) -> float:
    """The difficulty of the instruction at `where`, by its text, else by `index`.

    Raises:
        UserError: it has none.
    """
    value = table.get(instruction, table.get(index))
    if value is None:
        raise UserError(
            f"{where}: no difficulty for instruction {shorten(instruction)} or index {index} in the file of "
            "--difficulty; it needs every instruction, by its text or its index"
        )
    return value


def refuse_two_difficulties(
    rows: Sequence[Annotation], others: Sequence[Annotation], table: Mapping[str | int, float]
) -> None:
    """UserError where an instruction of two files has another difficulty in each.

    Row numbers mean the same instruction only where both files have the same rows: one that lacks a row shifts all
    that follow.
    """
    known, found = (
        {row.instruction: (value, row.where) for row, value in zip(of, difficulty_of(of, table), strict=True)}
        for of in (rows, others)
    )
    for instruction, (value, where) in found.items():
        other, there = known.get(instruction, (value, where))
        if other != value:
            raise UserError(
                f"{where}: instruction {shorten(instruction)} is of difficulty {value:g} by its row number, and of "
                f"{other:g} in {there}: the files do not have the same rows; give --difficulty as JSON, by text"
            )


def read_difficulty(path: Path) -> dict[str | int, float]:
    """Instruction difficulty: a JSON object of texts and numbers, or AlpacaEval's CSV of row numbers and numbers.

    A CSV's first line is its header where it does not end in a number.

    Raises:
        UserError: the file is neither; where it can, the message names the line or instruction.
    """
    if path.name.endswith((".json", ".json.gz")):
        given: Sequence[tuple[str | int, Any, str]] = [
            (key, value, shorten(key)) for key, value in read_json_object(path).items()
        ]
    else:
        given = _difficulty_lines(path)
    table: dict[str | int, float] = {}
    for key, value, where in given:
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise UserError(f"{path}: {where}: the difficulty must be a finite number, not {value!r:.40}")
        table[key] = number
    if not table:
        raise UserError(f"{path}: holds no difficulties; a number for every instruction or row number is needed")
    return table


def _difficulty_lines(path: Path) -> list[tuple[str | int, str, str]]:
    """Key (a row number where it is one), last cell and place of every line of a CSV but its header and empty ones."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    found: list[tuple[str | int, str, str]] = []
    try:
        for place, cells in enumerate(reader):
            if not cells or (place == 0 and _number(cells[-1]) is None):
                continue
            where = f"line {reader.line_num}"
            if len(cells) < 2:
                raise UserError(
                    f"{path}: {where}: a row number or instruction and a number are needed, not {cells!r:.60}"
                )
            found.append((int(cells[0]) if cells[0].isdecimal() else cells[0], cells[-1], where))
    except (csv.Error, ValueError) as error:  # a cell, or a row number, that is far too long
        raise UserError(f"{path}: line {reader.line_num}: not a readable CSV file: {error}") from None
    return found


def _number(value: Any) -> float | None:
    """A number or the text of one; None of anything else, and of a whole number of more than 308 digits."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
