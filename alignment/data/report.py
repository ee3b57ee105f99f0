"""`alignment data report RECIPE`: what is in the preference data, in numbers. Never prints a row's text.

Rows that cannot be used and why, lengths in tokens and what `data.max_length` cuts, whether the longer response tends
to win, duplicates within and across train and eval, BOS and EOS, soft labels. Not a cleaner: nothing is changed, and
`alignment.data.pipeline` decides what is unusable. The page (`--html`) is `report_page.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from alignment.data.messages import TextRules
from alignment.data.overlap import prompt_hash, refuse_two_kinds, row_hash
from alignment.data.pipeline import Prepared, prepare, refusal
from alignment.errors import UserError

if TYPE_CHECKING:
    from alignment.recipes import Recipe

BINS, BAR = 10, 40
DETAILS = 3  # different causes shown per reason
FIRST_ROWS = 5  # rows named per reason; all are in the run's rejected_rows.jsonl
PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width: `counts[i]` values lie in [edges[i], edges[i + 1]), the last bin closed."""

    title: str
    edges: list[float]
    counts: list[int]
    brief: str


@dataclass(frozen=True)
class Unusable:
    """Rows refused for one reason, where the first of them stand, and what is wrong with them."""

    reason: str
    rows: int
    where: list[str]
    detail: str = ""


@dataclass(frozen=True)
class SetReport:
    """One of the two sets, train or eval.

    Attributes:
        role: train or eval.
        read, used: rows.
        unusable: reasons, commonest first.
        too_many: whether training would stop for them (`data.max_rejected_share`, or a source without usable rows).
        lengths: histograms of prompt, chosen and rejected, in tokens before truncation.
        difference: histogram of chosen minus rejected.
        longer, shorter: pairs whose chosen response is longer, and shorter, than the rejected one.
        longer_share, longer_interval: share of the former among both, with a 95 % interval.
        cut: pairs of which data.max_length cuts the chosen, the rejected, either response.
        repeated_rows, repeated_prompts: rows that repeat an earlier one's prompt and responses (in either order), and
            rows that repeat an earlier one's prompt.
        markers: lines on BOS and EOS.
        labels: lines on soft labels; empty where every label is 1.
        notes: the pipeline's own.
    """

    role: str
    read: int
    used: int
    unusable: list[Unusable]
    too_many: bool
    lengths: list[Histogram]
    difference: Histogram | None
    longer: int
    shorter: int
    longer_share: float | None
    longer_interval: tuple[float, float] | None
    cut: tuple[int, int, int]
    repeated_rows: int
    repeated_prompts: int
    markers: list[str]
    labels: list[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """Both sets, and what they share.

    Attributes:
        recipe: path of the recipe.
        max_length: of `data.max_length`.
        sets: train, and eval where the recipe has it.
        shared_prompts, shared_rows: rows of train whose prompt, or whole row, is in eval too; None without eval.
        overlap: what the recipe says should be done about them.
    """

    recipe: str
    max_length: int
    sets: list[SetReport]
    shared_prompts: int | None
    shared_rows: int | None
    overlap: str

    @property
    def ok(self) -> bool:
        """Whether training would take the data."""
        refused = bool(self.shared_prompts) and self.overlap == "refuse"
        return not refused and not any(s.too_many or not s.used for s in self.sets)


def data_report(recipe: Recipe) -> DataReport:
    """Read and count the rows of a recipe as training would.

    Raises:
        UserError: the rows are drawn from the model, or the model's tokenizer or a source cannot be read.
    """
    from alignment.models import load_tokenizer
    from alignment.objectives import get_objective
    from alignment.objectives.base import row_columns

    data = recipe.data
    if data.train is None:
        raise UserError(
            "data.sample: these rows are drawn from the model when training begins; report on those of a run with "
            "data.sample=null data.train=RUN/preferences.jsonl"
        )
    tokenizer: Any = load_tokenizer(recipe.model.name_or_path, **recipe.model.tokenizing)
    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    found = [
        prepare(
            sources,
            tokenizer,
            max_length=data.max_length,
            role=role,
            max_rejected_share=data.max_rejected_share,
            calibration="calibration" in objective.needs,
            seed=recipe.training.seed,
            rules=TextRules.of(data),
            reads=row_columns(objective),
        )
        for role, sources in (("train", data.train), ("eval", data.eval))
        if sources is not None
    ]
    if len(found) == 2:
        refuse_two_kinds(*found)
    prompts, rows = _shared(*found) if len(found) == 2 else (None, None)
    sets = [set_report(prepared, data.max_length, tokenizer) for prepared in found]
    return DataReport(str(recipe.path), data.max_length, sets, prompts, rows, data.overlap)


def set_report(prepared: Prepared, max_length: int, tokenizer: Any) -> SetReport:
    """The numbers of one set.

    Args:
        prepared: from `alignment.data.pipeline.prepare`.
        max_length: tokens of prompt and one response.
        tokenizer: whose BOS and EOS are counted.
    """
    data = prepared.dataset
    ids = {part: data[f"{part}_ids"][:] if len(data) else [] for part in PARTS}
    sizes = {part: [len(row) for row in ids[part]] for part in PARTS}
    differences = [c - r for c, r in zip(sizes["chosen"], sizes["rejected"], strict=True)]
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    columns = data.select_columns(list(PARTS)) if len(data) else []
    return SetReport(
        role=prepared.role,
        read=prepared.rows,
        used=len(data),
        unusable=_unusable(prepared),
        too_many=refusal(prepared) is not None,
        lengths=[histogram(f"{part}, tokens", sizes[part]) for part in PARTS if sizes[part]],
        difference=histogram("chosen - rejected, tokens", differences) if differences else None,
        longer=longer,
        shorter=shorter,
        longer_share=longer / (longer + shorter) if longer + shorter else None,
        longer_interval=wilson(longer, longer + shorter) if longer + shorter else None,
        cut=_cut(sizes, max_length),
        repeated_rows=_repeats(row_hash(row) for row in columns),
        repeated_prompts=_repeats(prompt_hash(row["prompt"]) for row in columns),
        markers=_markers(ids, tokenizer) if len(data) else [],
        labels=_labels(data["label"][:]) if "label" in data.column_names else [],
        notes=prepared.notes,
    )


def histogram(title: str, values: Sequence[int]) -> Histogram:
    """At most ten bins of equal whole width that cover the values."""
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / BINS))
    counts = Counter((value - low) // width for value in values)
    bins = (high - low) // width + 1
    ordered = sorted(values)
    brief = (
        f"mean {sum(values) / len(values):.1f}, median {median(ordered):g}, "
        f"95 % up to {ordered[math.ceil(0.95 * len(ordered)) - 1]}, from {low} to {high}"
    )
    edges = [float(low + i * width) for i in range(bins + 1)]
    return Histogram(title, edges, [counts[i] for i in range(bins)], brief)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval for a share (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _unusable(prepared: Prepared) -> list[Unusable]:
    found = []
    several = len({bad.file or bad.source for bad in prepared.rejected}) > 1
    for reason, count in sorted(prepared.counts.items(), key=lambda item: -item[1]):
        rows = [bad for bad in prepared.rejected if bad.reason == reason]
        where = [f"{bad.file or bad.source}: {bad.row}" if several else str(bad.row) for bad in rows]
        causes: dict[str, str] = {}  # the first row of each
        for bad, place in zip(rows, where, strict=True):
            causes.setdefault(bad.detail, place)
        named = [f"row {place}: {cause}" for cause, place in causes.items()] if len(causes) > 1 else list(causes)
        more = [f"{len(causes) - DETAILS} further causes"] if len(causes) > DETAILS else []
        found.append(Unusable(reason, count, where[:FIRST_ROWS], "; ".join(named[:DETAILS] + more)))
    return found


def _cut(sizes: dict[str, list[int]], max_length: int) -> tuple[int, int, int]:
    """Pairs whose chosen, whose rejected, and of whom either response is cut."""
    cut = {
        part: [p + n > max_length for p, n in zip(sizes["prompt"], sizes[part], strict=True)]
        for part in ("chosen", "rejected")
    }
    either = sum(a or b for a, b in zip(cut["chosen"], cut["rejected"], strict=True))
    return sum(cut["chosen"]), sum(cut["rejected"]), either


def _repeats(hashes: Iterator[str]) -> int:
    return sum(count - 1 for count in Counter(hashes).values())


def _shared(train: Prepared, held_out: Prepared) -> tuple[int, int]:
    """Rows of train whose prompt, and whose whole row, is in eval."""
    if not len(train.dataset) or not len(held_out.dataset):
        return 0, 0
    judged, trained = (p.dataset.select_columns(list(PARTS)) for p in (held_out, train))
    prompts, rows = {prompt_hash(row["prompt"]) for row in judged}, {row_hash(row) for row in judged}
    return (
        sum(prompt_hash(row["prompt"]) in prompts for row in trained),
        sum(row_hash(row) in rows for row in trained),
    )


def _markers(ids: dict[str, list[list[int]]], tokenizer: Any) -> list[str]:
    """How often BOS and EOS stand in a row: a share that is neither none nor all deserves a look."""
    lines, total = [], len(ids["prompt"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None:
        lines.append("BOS: the tokenizer has none")
    else:
        first = sum(row[:1] == [bos] for row in ids["prompt"])
        twice = sum(row[:2] == [bos, bos] for row in ids["prompt"])
        lines.append(f"BOS: first token of {first} of {total} prompts; doubled in {twice}")
    if eos is None:
        lines.append("EOS: the tokenizer has none")
    for part in ("chosen", "rejected") if eos is not None else ():
        counts = Counter(min(row.count(eos), 2) for row in ids[part])
        lines.append(f"EOS in {part}: once in {counts[1]} of {total}, never in {counts[0]}, more often in {counts[2]}")
    return lines


def _labels(labels: list[float]) -> list[str]:
    soft = [label for label in labels if label != 1]
    if not soft:
        return []
    ties = sum(label == 0.5 for label in soft)
    against = sum(label < 0.5 for label in soft)
    mean = sum(labels) / len(labels)
    return [f"{len(soft)} of {len(labels)} are soft: {ties} ties, {against} for the other response; mean {mean:.3f}"]


def as_text(report: DataReport) -> str:
    """The report in lines, with bars."""
    lines = [f"{report.recipe}: data.max_length {report.max_length}"]
    for found in report.sets:
        lines += ["", *_set_lines(found, report.max_length)]
    if report.shared_prompts is not None:
        lines += [
            "",
            f"train and eval share: {report.shared_prompts} rows of train have a prompt of eval, "
            f"{report.shared_rows} are whole rows of it (data.overlap: {report.overlap})",
        ]
    if not report.ok:
        lines += ["", "training would refuse this data"]
    return "\n".join(lines)


def _set_lines(found: SetReport, max_length: int) -> Iterator[str]:
    yield f"{found.role}: {found.used} of {found.read} rows can be used"
    for bad in found.unusable:
        more = ", …" if bad.rows > len(bad.where) else ""
        where = f"row{'s' * (bad.rows > 1)} {', '.join(bad.where)}{more}"
        yield f"  {bad.reason:<22}{bad.rows:>6}  {where}{f': {bad.detail}' * bool(bad.detail)}"
    if found.too_many:
        yield "  more than data.max_rejected_share, or all rows of a source"
    for note in found.notes:
        yield f"  {note}"
    if not found.used:
        return
    for drawn in [*found.lengths, *([found.difference] if found.difference else [])]:
        yield f"  {drawn.title}: {drawn.brief}"
        yield from bars(drawn)
    yield f"  {length_bias(found)}"
    yield f"  {cut_off(found, max_length)}"
    yield f"  {duplicates(found)}"
    yield from (f"  {line}" for line in found.markers)
    yield from (f"  labels: {line}" for line in found.labels)


def length_bias(found: SetReport) -> str:
    """Whether the longer response tends to be the chosen one, in a sentence."""
    equal = found.used - found.longer - found.shorter
    if found.longer_share is None or found.longer_interval is None:
        return f"length bias: none to see, all {equal} pairs have responses of equal length"
    low, high = found.longer_interval
    verdict = "longer responses win" if low > 0.5 else "shorter responses win" if high < 0.5 else "no clear bias"
    return (
        f"length bias: chosen is longer in {found.longer_share:.1%} of {found.longer + found.shorter} pairs "
        f"(95 %: {low:.1%} to {high:.1%}; {equal} of equal length left out): {verdict}"
    )


def cut_off(found: SetReport, max_length: int) -> str:
    """What `data.max_length` cuts."""
    chosen, rejected, either = found.cut
    share = f"{either / found.used:.1%}"
    return f"cut off at {max_length} tokens: {either} pairs ({share}); chosen {chosen}, rejected {rejected}"


def duplicates(found: SetReport) -> str:
    """What repeats within the set."""
    return f"duplicates: {found.repeated_rows} rows repeat an earlier one, {found.repeated_prompts} an earlier prompt"


def bars(drawn: Histogram) -> Iterator[str]:
    """One line per bin."""
    most = max(drawn.counts)
    for low, high, count in zip(drawn.edges, drawn.edges[1:], drawn.counts, strict=False):
        span = f"{low:.0f}" if high - low == 1 else f"{low:.0f} to {high - 1:.0f}"
        yield f"    {span:>16} {'█' * round(BAR * count / most) or '▏' * bool(count):<{BAR}} {count}"
