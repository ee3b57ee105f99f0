"""From sources to one Dataset of canonical rows with token ids, and the rows that could not be used.

The order: rows are read (`reading`), turned into the canonical form (`forms`), tokenised and checked (`tokens`), and
mixed. A row that fails anywhere is counted and kept with its number and reason; nothing is dropped without a count.
Knows nothing of training.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.data.forms import PEEKED, converter, text_columns
from alignment.data.messages import PLAIN, TextRules
from alignment.data.preferences import (
    ID_COLUMNS,
    MISSING_FIELD,
    NUMBER_COLUMNS,
    OPTIONAL_COLUMNS,
    READ_COLUMNS,
    TIE,
    UNKNOWN_FORM,
    BadRow,
)
from alignment.data.reading import Place, Placed, numbered, raw_rows
from alignment.data.rendering import Renderer
from alignment.data.tables import features, message_keys, mixed, table
from alignment.data.tokens import check, encode, markers
from alignment.errors import UserError
from alignment.files import write_json_lines

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from alignment.recipes.rows import SourceSection

Row = dict[str, Any]
_TOKENISED_AT_ONCE = 1000


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used; `row` and `file` are its `Place`."""

    source: str
    row: int
    reason: str
    detail: str
    file: str | None = None


@dataclass(frozen=True)
class Prepared:
    """Rows ready for the trainer, and what became of the others.

    Attributes:
        dataset: columns prompt, chosen, rejected, their `…_ids`, and optional ones.
        rejected: the quarantined rows, in order.
        counts: reason -> rows.
        rows: rows read.
        role: train or eval.
        max_rejected_share: above it `write_rejected` stops the run.
        notes: what else is worth a line, such as prompts whose last token merges with the response.
        sources: for the manifest: one mapping per source (`described`).
        overlap: rows dropped because their prompts are judged on (`alignment.data.overlap`).
        places: of each row of `dataset`, its source and where it stands there.
        prompts: hashes of the prompts of rows that hold nothing but token ids (`alignment.data.supervised`).
    """

    dataset: Dataset
    rejected: list[Rejected]
    counts: dict[str, int]
    rows: int
    role: str = "train"
    max_rejected_share: float = 1.0
    notes: tuple[str, ...] = ()
    sources: tuple[dict[str, Any], ...] = ()
    overlap: int = 0
    places: tuple[tuple[str, Place], ...] = ()
    prompts: frozenset[str] = frozenset()

    def name_of(self, row: int) -> str:
        """How messages call a row of `dataset`, by its number from 0."""
        if not self.places:
            return f"row {row + 1} of {self.role}"
        source, place = self.places[row]
        return f"{place.file or source}: row {place.row}"

    def summary(self) -> list[str]:
        """Lines for the terminal: rows used and why the others are not, then the notes."""
        why = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        left_out = f"; {self.left_out} left out by the weights" if self.left_out else ""
        used = f"{self.role}: {len(self.dataset)} of {self.rows} rows{left_out}"
        return [used + (f"; rejected: {why}" if why else ""), *self.notes]

    @property
    def left_out(self) -> int:
        """Usable rows that the weights have no place for."""
        return sum(source["left_out"] for source in self.sources)

    def manifest(self) -> dict[str, Any]:
        """Counts for manifest.json."""
        return {
            "read": self.rows,
            "used": len(self.dataset),
            "rejected": self.counts,
            "overlap": self.overlap,
            "left_out": self.left_out,
        }


def described(
    role: str, source: str, form: str, read: int, usable: int, used: int, rejected: Iterable[Rejected]
) -> dict[str, Any]:
    """What became of a source's rows: those read are the used, those left out by its weight, and the rejected."""
    reasons = dict(Counter(bad.reason for bad in rejected).most_common())
    counts = {"read": read, "used": used, "left_out": usable - used, "rejected": reasons}
    return {"set": role, "source": source, "form": form, **counts}


@dataclass
class _Part:
    """One source on its way. `numbers` are those of `rows`, and every rejected row has one: its turn and its place.

    `tails` counts the ids at the ends of prompts that are lost, where any are.
    """

    name: str
    source: SourceSection | None
    form: str
    rows: list[Row] = field(default_factory=list)
    numbers: list[tuple[int, Place]] = field(default_factory=list)
    refused: list[tuple[int, Rejected]] = field(default_factory=list)
    read: int = 0
    tails: Counter[tuple[int, ...]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def reject(self, number: tuple[int, Place], bad: BadRow) -> None:
        turn, place = number
        self.refused.append((turn, Rejected(self.name, place.row, bad.reason, bad.detail, place.file)))

    @property
    def rejected(self) -> list[Rejected]:
        """In the source's order."""
        return [bad for _, bad in sorted(self.refused, key=lambda refused: refused[0])]

    def keep(self, test: Callable[[Row], None]) -> None:
        """Drop the rows that `test` refuses."""
        kept = []
        for row, number in zip(self.rows, self.numbers, strict=True):
            try:
                test(row)
                kept.append((row, number))
            except BadRow as bad:
                self.reject(number, bad)
        self.rows, self.numbers = [row for row, _ in kept], [number for _, number in kept]


def prepare(
    sources: Sequence[SourceSection],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    role: str,
    max_rejected_share: float = 0.1,
    calibration: bool = False,
    seed: int = 0,
    rules: TextRules = PLAIN,
    reads: Collection[str] = READ_COLUMNS,
) -> Prepared:
    """Read, check, tokenise and mix the sources of `data.train` or `data.eval`.

    Args:
        sources: with all of them weighted or none: weights are shares of the mixture, drawn without repetition, as
            many rows as the scarcest source allows.
        tokenizer: of the model.
        max_length: tokens of prompt and one response.
        role: "train" or "eval"; also says which split is meant where none is named.
        max_rejected_share: kept for `write_rejected`.
        calibration: tokenise the `calibration` responses; rows without one are rejected.
        seed: of the draw of a weighted mixture.
        rules: what becomes of reasoning, and of special tokens in the rows' text.
        reads: the optional columns that matter; the others are left out, whatever is in them.

    Raises:
        UserError: a source cannot be read or its form not be told, or text and chat sources are mixed.
    """
    has_template = bool(tokenizer.chat_template)
    parts = [_read(title(source), source, raw_rows(source, role), has_template, rules, reads) for source in sources]
    renderer = Renderer(tokenizer, rules)
    return _prepared(parts, renderer, max_length, role, max_rejected_share, calibration, seed)


def prepare_rows(
    rows: list[Row],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    role: str,
    max_rejected_share: float = 0.1,
    calibration: bool = False,
    rules: TextRules = PLAIN,
    reads: Collection[str] = READ_COLUMNS,
) -> Prepared:
    """`prepare` for rows in memory, in the preference form; `source` is what messages call them."""
    from alignment.recipes.rows import SourceSection

    section = SourceSection(name=source, format="preference", ties="soft")
    part = _read(source, section, numbered(rows), bool(tokenizer.chat_template), rules, reads)
    return _prepared([part], Renderer(tokenizer, rules), max_length, role, max_rejected_share, calibration, 0)


def usable_rows(source: SourceSection, role: str, *, chat: bool) -> tuple[list[tuple[Place, Row]], list[Rejected]]:
    """A source's canonical rows with where they stand, for what scores texts and needs no tokens; and the others.

    Args:
        source: as of `prepare`.
        role: which split is meant where none is named.
        chat: transcripts and Alpaca rows become chat messages.

    Raises:
        UserError: the source cannot be read or its form not be told.
    """
    part = _read(title(source), source, raw_rows(source, role), chat)
    return [(place, row) for (_, place), row in zip(part.numbers, part.rows, strict=True)], part.rejected


def title(source: SourceSection) -> str:
    """What messages call a source."""
    return source.name if source.split is None else f"{source.name}:{source.split}"


def _read(
    name: str,
    source: SourceSection,
    rows: Iterator[Placed],
    has_template: bool,
    rules: TextRules = PLAIN,
    reads: Collection[str] = READ_COLUMNS,
) -> _Part:
    """A source's canonical rows; optional columns that only some rows have, and text among chat, are rejected."""
    first = list(itertools.islice(rows, PEEKED))
    peeked = [row for _, row in first]
    texts = text_columns(source, peeked) & {*reads}
    unread = {*READ_COLUMNS} - {*reads} | texts
    form, convert = converter(source, peeked, has_template, rules, unread)
    part = _Part(name, source, form)
    part.notes += [f"{name}: column {column} has no number in it and is not read" for column in sorted(texts)]
    for part.read, (place, raw) in enumerate(itertools.chain(first, rows), start=1):
        try:
            part.rows.append(convert(raw))
            part.numbers.append((part.read, place))
        except BadRow as bad:
            part.reject((part.read, place), bad)
    chats = sum(_is_chat(row) for row in part.rows)
    chat = 2 * chats > len(part.rows)
    optional = {c for row in part.rows for c in OPTIONAL_COLUMNS if c in row and c != "label"}

    def uniform(row: Row) -> None:
        if _is_chat(row) != chat:
            kinds = ("chat messages", "text") if _is_chat(row) else ("text", "chat messages")
            raise BadRow(UNKNOWN_FORM, f"{kinds[0]}, and most rows of the source are {kinds[1]}")
        absent = sorted(optional - set(row))
        if absent:
            raise BadRow(MISSING_FIELD, f"{absent[0]} is missing, which other rows have")

    part.keep(uniform)
    return part


def _is_chat(row: Row) -> bool:
    return not isinstance(row["prompt"], str)


def _prepared(
    parts: list[_Part],
    renderer: Renderer,
    max_length: int | None,
    role: str,
    max_rejected_share: float,
    calibration: bool,
    seed: int,
) -> Prepared:
    _refuse_mixed(parts, role)
    if calibration and any("calibration" in row for part in parts for row in part.rows[:1]):
        for part in parts:
            part.keep(_has_calibration)
    columns, notes = _columns(parts, calibration)
    tables = [_tokenised(part, renderer, max_length, columns) for part in parts]
    notes = [*(note for part in parts for note in part.notes), *notes]
    notes += renderer.notes(role)
    dataset, chosen = mixed(tables, [part.source for part in parts], seed)
    tails = sum((part.tails for part in parts), Counter())
    notes += _lost_tails(tails, sum(len(part.numbers) for part in parts), renderer, role)
    rejected = [bad for part in parts for bad in part.rejected]
    sources = [
        described(role, part.name, part.form, part.read, len(part.numbers), count, part.rejected)
        for part, count in zip(parts, map(len, chosen), strict=True)
    ]
    return Prepared(
        dataset=dataset,
        rejected=rejected,
        counts=dict(Counter(bad.reason for bad in rejected).most_common()),
        rows=sum(part.read for part in parts),
        role=role,
        max_rejected_share=max_rejected_share,
        notes=tuple(notes),
        sources=tuple(sources),
        places=tuple((part.name, part.numbers[i][1]) for part, rows in zip(parts, chosen, strict=True) for i in rows),
    )


def _has_calibration(row: Row) -> None:
    if "calibration" not in row:
        raise BadRow(MISSING_FIELD, "calibration is missing, and the objective needs it")


def _refuse_mixed(parts: list[_Part], role: str) -> None:
    first = {_is_chat(part.rows[0]): part.name for part in reversed(parts) if part.rows}
    if len(first) > 1:
        raise UserError(
            f"data.{role}: {first[True]} has chat messages and {first[False]} text, which one model cannot be "
            "trained on together; set chat: true (or false) for one of them"
        )


def _columns(parts: list[_Part], calibration: bool) -> tuple[list[str], list[str]]:
    """The optional columns that the result has: those of every source (`label` of any), and notes on the others."""
    filled = [part for part in parts if part.rows]
    per_part = {part.name: {c for row in part.rows for c in OPTIONAL_COLUMNS if c in row} for part in filled}
    anywhere = set().union(*per_part.values()) - set(ID_COLUMNS)
    everywhere = {c for c in anywhere if all(c in found for found in per_part.values())}
    notes = [
        f"column {c} is only in {', '.join(name for name, found in per_part.items() if c in found)}: left out"
        for c in sorted(anywhere - everywhere - {"label", "calibration_ids"})
    ]
    texts = ["calibration"] if "calibration" in everywhere else []
    numbers = [c for c in NUMBER_COLUMNS if c in everywhere or (c == "label" and _soft(filled))]
    given = calibration or "calibration_ids" in everywhere
    return [*texts, *(["calibration_ids"] if given and texts else []), *numbers], notes


def _lost_tails(tails: Counter[tuple[int, ...]], total: int, renderer: Renderer, role: str) -> list[str]:
    """What is worth a line where prompts lose their ends: by chance of the text, or all the same by the template."""
    if not tails:
        return []
    (tail, count), tokenizer = tails.most_common(1)[0], renderer.tokenizer
    if count == total and tokenizer.chat_template:
        return [
            f"every {role} prompt ends with {tokenizer.decode(list(tail))!r} when a reply is sampled, and no row has "
            "that before its reply: training and sampling see different prompts (write it into the responses)"
        ]
    return [
        f"in {tails.total()} of {total} {role} rows the prompt's last tokens merge with the response; the response "
        "begins where they part, as in TRL (end prompts on a token boundary to avoid it)"
    ]


def _soft(parts: list[_Part]) -> bool:
    return any(row.get("label", 1.0) != 1.0 for part in parts for row in part.rows)


def _tokenised(part: _Part, renderer: Renderer, max_length: int | None, columns: list[str]) -> Dataset | None:
    """The rows that pass the token checks, a thousand at a time: ids are held as arrays, not as Python numbers."""
    from datasets import concatenate_datasets

    if not part.rows:
        return None
    chat = _is_chat(part.rows[0])
    marks = markers(renderer.tokenizer, chat)
    columns_of = features(chat, columns, message_keys(part.rows) if chat else ())
    branches = ["chosen", "rejected", *(["calibration"] if "calibration_ids" in columns else [])]
    tables, passed = [], []
    for start in range(0, len(part.rows), _TOKENISED_AT_ONCE):
        rows = part.rows[start : start + _TOKENISED_AT_ONCE]
        numbers = part.numbers[start : start + _TOKENISED_AT_ONCE]
        kept = []
        for row, number, ids in zip(rows, numbers, _ids(rows, renderer, branches), strict=True):
            try:
                if isinstance(ids, BadRow):
                    raise ids
                check(row, ids[0], marks, max_length, given="prompt_ids" in row)
            except BadRow as bad:
                part.reject(number, bad)
                continue
            part.tails.update([tuple(ids[1])] if ids[1] else [])
            passed.append(number)
            kept.append({"label": 1.0} | row | ids[0])
        if kept:
            tables.append(table(kept, columns_of))
    part.rows, part.numbers = [], passed
    return concatenate_datasets(tables) if tables else None


def _ids(
    rows: list[Row], renderer: Renderer, branches: list[str]
) -> Iterable[tuple[dict[str, Any], list[int]] | BadRow]:
    """Token ids row by row: those that the rows bring, or the tokenizer's."""
    wanted = [f"{branch}_ids" for branch in branches]
    if all(column in rows[0] for column in wanted):
        return [({c: row[c] for c in ("prompt_ids", *wanted)}, []) for row in rows]
    if "prompt_ids" in rows[0]:
        raise UserError("data: the rows bring token ids, but no calibration_ids")
    return encode(rows, renderer.tokenizer, branches, renderer)


def write_rejected(run: Path, *prepared: Prepared) -> Path | None:
    """Write the unusable rows to `RUN/rejected_rows.jsonl`, if there are any, and stop if they are too many.

    Ties dropped by option are written and counted, but are no part of the share. A run that is stopped leaves no
    directory, so its file is written beside it, as `RUN.rejected_rows.jsonl`.

    Raises:
        UserError: the share of a source is above `max_rejected_share`, or none of its rows is left.
    """
    rows = [
        {"set": p.role, "source": bad.source, **({"file": bad.file} if bad.file else {})}
        | {"row": bad.row, "reason": bad.reason, "detail": bad.detail}
        for p in prepared
        for bad in p.rejected
    ]
    problem = next(filter(None, map(refusal, prepared)), None)
    if not rows and problem is None:
        return None
    file = run / "rejected_rows.jsonl" if problem is None else run.with_name(f"{run.name}.rejected_rows.jsonl")
    write_json_lines(file, rows)
    if problem is not None:
        raise UserError(f"{problem}; all are in {file}")
    return file


def refusal(prepared: Prepared) -> str | None:
    """Why training makes no sense: a source with too many unusable rows, or none usable; None where it does."""
    for source in prepared.sources:
        rejected, read = source["rejected"], source["read"]
        usable = source["used"] + source["left_out"]
        unusable = {reason: count for reason, count in rejected.items() if reason != TIE}
        bad = sum(unusable.values())
        if usable and bad <= prepared.max_rejected_share * read:
            continue
        where = f"data.{prepared.role}: " + (f"{source['source']}: " if len(prepared.sources) > 1 else "")
        if not rejected:
            return f"{where}no rows"
        reason, count = max((unusable if usable else rejected).items(), key=lambda item: item[1])
        first = next(r for r in prepared.rejected if (r.source, r.reason) == (source["source"], reason))
        example = f"{reason} ({count} rows, such as {first.file or first.source}: row {first.row}: {first.detail})"
        if not usable:
            return f"{where}none of {read} rows is usable: mostly {example}"
        return (
            f"{where}{bad} of {read} rows are unusable, more than "
            f"data.max_rejected_share={prepared.max_rejected_share:g}: mostly {example}"
        )
    return None
