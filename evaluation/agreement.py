"""Do raters agree, and does a judge agree with people? κ, accuracy and F1, length bias, with intervals over prompts.

    python evaluation/agreement.py --humans labels.json --rater annotator1 --rater annotator2 --rater annotator3
    python evaluation/agreement.py --humans labels.json --rater annotator1 --judge annotations.json

A row has `instruction` (and perhaps `input`), two texts under output_1 and output_2 (or response1 and response2), and
a label per rater: 1 first better, 2 second better, 0 or 1.5 a tie, or a probability between, as AlpacaEval's
preferences; null where there is none. A judge's file has `preference`; rows are joined by their texts, in whichever
order, and equal ones in the order of the files. A judge's file without `input`, which AlpacaEval's format does not
have, is joined without it where that leaves no doubt. Not a judge: it compares what others have said.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from alignment.errors import UserError, run_or_exit
from evaluation.estimates import cluster_bootstrap, cluster_sums
from evaluation.files import deliver
from evaluation.intervals import percentile_interval, share_interval, too_narrow

Array = NDArray[np.float64]
Verdicts = Sequence[int | None]
Key = tuple[str, str, str, str]

TIE, FIRST, SECOND = 0, 1, 2
NAMES = {FIRST: "first", SECOND: "second", TIE: "tie"}
RESAMPLES, LEVEL = 2000, 0.95
TEXTS = (("output_1", "output_2"), ("response1", "response2"))
_SCALARS = (str, int, float)  # converters to JSON make numbers and true of short answers; they stand for their text


@dataclass(frozen=True)
class Labelled:
    """Rows with verdicts (0 tie, 1 first, 2 second; None where there is none) of every rater.

    Attributes:
        keys: of each row, (instruction, input, first text, second text).
        verdicts: by rater, one per row.
    """

    keys: list[Key]
    verdicts: dict[str, list[int | None]]

    @property
    def prompts(self) -> list[tuple[str, str]]:
        """The unit of resampling."""
        return [key[:2] for key in self.keys]


def verdict(value: Any, where: str) -> int | None:
    """0, 1 or 2 of a label; None of null, NaN or a number outside [1, 2].

    Raises:
        UserError: not a number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{where}: a label must be 1 (first better), 2 (second better), 0 or 1.5 (tie), not {value!r:.40}"
        )
    if value == 0 or value == 1.5:
        return TIE
    return (FIRST if value < 1.5 else SECOND) if 1 <= value <= 2 else None


def read_labelled(path: Path, raters: Sequence[str]) -> Labelled:
    """Rows of a JSON list or JSON lines with a label of every rater.

    Raises:
        UserError: a row lacks a text or a rater, or a label is no number.
    """
    from alignment.data.reading import read_file

    keys: list[Key] = []
    verdicts: dict[str, list[int | None]] = {rater: [] for rater in raters}
    for place, row in read_file(path):
        where = f"{path}: row {place.row}"
        pair = next((names for names in TEXTS if all(isinstance(row.get(name), _SCALARS) for name in names)), None)
        if pair is None or not isinstance(row.get("instruction"), str):
            raise UserError(f"{where}: instruction, output_1 and output_2 (or response1, response2) must be texts")
        keys.append((row["instruction"], str(row.get("input") or ""), str(row[pair[0]]), str(row[pair[1]])))
        for rater in raters:
            if rater not in row:
                raise UserError(f"{where}: no {rater!r} in this row (it has {', '.join(map(str, row))})")
            verdicts[rater].append(verdict(row[rater], f"{where}, {rater}"))
    return Labelled(keys, verdicts)


def confusion(first: Verdicts, second: Verdicts) -> Array:
    """[3, 3] counts of rows that both have judged; rows are the first rater's tie, first, second."""
    table = np.zeros((3, 3))
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None:
            table[a, b] += 1
    return table


def cohen_kappa(table: Array) -> float:
    """Cohen's (1960) κ = (p_o - p_e) / (1 - p_e) of a table of counts; NaN where chance agreement is 1."""
    shares = table / table.sum()
    chance = float(shares.sum(axis=1) @ shares.sum(axis=0))
    return (float(np.trace(shares)) - chance) / (1 - chance) if chance < 1 else math.nan


def agreement(table: Array) -> float:
    """Share of rows with the same verdict."""
    return float(np.trace(table) / table.sum())


def class_scores(table: Array) -> dict[str, Any]:
    """Accuracy, and macro precision, recall and F1 over the classes that occur; the table's rows are the truth.

    A class that is never predicted has precision 0, and F1 0 where precision and recall are 0.
    """
    hits, truth, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    occurs = (truth + said) > 0
    precision = np.divide(hits, said, out=np.zeros(3), where=said > 0)[occurs]
    recall = np.divide(hits, truth, out=np.zeros(3), where=truth > 0)[occurs]
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return {
        "accuracy": agreement(table),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
    }


def majority(verdicts: Sequence[Verdicts]) -> list[int | None]:
    """Of each row, the verdict that most raters share; a tie where two are equally common; None without a rater."""
    found: list[int | None] = []
    for row in zip(*verdicts, strict=True):
        counts = Counter(v for v in row if v is not None).most_common(2)
        if not counts:
            found.append(None)
        else:
            found.append(TIE if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0])
    return found


MEASURES: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}


def length_bias(verdicts: Verdicts, keys: Sequence[Key], measure: str) -> tuple[Array, list[tuple[str, str]]]:
    """Of decided pairs: 1 where the longer text was preferred, 0 where the shorter was, 1/2 where lengths are equal.

    Args:
        verdicts: one per key.
        keys: instruction, input and both texts.
        measure: "characters" or "words" (between white space).

    Returns:
        [n] values, and n prompts.
    """
    length, hits, prompts = MEASURES[measure], [], []
    for v, (prompt, more, a, b) in zip(verdicts, keys, strict=True):
        if v in (FIRST, SECOND):
            longer = (length(b) > length(a)) - (length(b) < length(a))
            hits.append(0.5 + 0.5 * longer * (1 if v == SECOND else -1))
            prompts.append((prompt, more))
    return np.array(hits), prompts


def compare_raters(first: Verdicts, second: Verdicts, prompts: Sequence[Any], *, seed: int = 0) -> dict[str, Any]:
    """Agreement and κ of two raters, with percentile intervals over prompts.

    Raises:
        UserError: no row that both have judged.
    """
    table = confusion(first, second)
    if not table.sum():
        raise UserError("the two raters have no row in common")
    cells = np.zeros((len(prompts), 9))  # a row's place in the table, so that a resample is a sum
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a is not None and b is not None:
            cells[i, 3 * a + b] = 1
    draws = cluster_bootstrap(cells, prompts, RESAMPLES, np.random.default_rng(seed)).reshape(-1, 3, 3)
    draws = draws[draws.sum(axis=(1, 2)) > 0]
    rows = cluster_sums(cells.sum(axis=1)[:, None], prompts)[:, 0]  # of each prompt, that both have judged
    rows = rows[rows > 0]
    kappas = [k for k in map(cohen_kappa, draws) if k == k]
    found: dict[str, Any] = {"rows": int(table.sum()), "agreement": agreement(table), "kappa": cohen_kappa(table)}
    interval = share_interval(found["agreement"], [agreement(d) for d in draws], rows, LEVEL)
    found["agreement_interval"] = [interval.low, interval.high]
    found["kappa_interval"] = _kappa_limits(found["kappa"], kappas, len(rows))
    return found


def _kappa_limits(kappa: float, draws: Sequence[float], prompts: int) -> list[float] | None:
    """The bootstrap's limits; None where it is too narrow to be read: few prompts, or resamples that are all alike."""
    if not draws:
        return None
    interval = percentile_interval(kappa, draws, LEVEL)
    limits = [interval.low, interval.high]
    return None if too_narrow(prompts, limits) else limits


def summarise(humans: Labelled, judge: Labelled | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Every two raters against each other, the majority's length bias, and the judge against the majority.

    Raises:
        UserError: no two verdicts to compare, or a judge that judged none of the pairs.
    """
    gold = majority(list(humans.verdicts.values()))
    counts = Counter(NAMES[v] for v in gold if v is not None)
    result: dict[str, Any] = {
        "rows": len(humans.keys),
        "prompts": len(set(humans.prompts)),
        "majority": {name: counts[name] for name in NAMES.values()},
        "raters": [
            {"raters": [a, b], **compare_raters(humans.verdicts[a], humans.verdicts[b], humans.prompts, seed=seed)}
            for a, b in itertools.combinations(humans.verdicts, 2)
        ],
        "longer_preferred": _longer(gold, humans, seed),
    }
    if judge is not None:
        (said,) = judge.verdicts.values()
        found, joined = join(humans.keys, judge.keys, said)
        if not joined:
            raise UserError(
                "--judge: none of its pairs is among the humans'; instruction, input and both texts must be equal"
            )
        result["judge"] = {
            "pairs": joined,
            "rows_not_joined": len(found) - joined,
            "without_verdict": sum(v is None for v in found) - (len(found) - joined),
            **compare_raters(gold, found, humans.prompts, seed=seed),
            **class_scores(confusion(gold, found)),
            "longer_preferred": _longer(found, humans, seed),
        }
    return result


def join(keys: Sequence[Key], judged: Sequence[Key], said: Verdicts) -> tuple[list[int | None], int]:
    """The judge's verdict on each of `keys`, turned where its file has the texts in the other order.

    The k-th row with the same texts meets the judge's k-th. Where no row of the judge's has an `input`, it does not
    count in those of `keys` that are told apart without it.

    Returns:
        A verdict per key, None where there is none; and how many keys the judge's file has.
    """

    def counted(rows: Sequence[Key]) -> list[tuple[Any, int]]:
        times: Counter[Any] = Counter()
        found = []
        for prompt, more, a, b in rows:
            pair = (prompt, more, *sorted((a, b)))
            found.append((pair, times[pair]))
            times[pair] += 1
        return found

    place = {pair: i for i, pair in enumerate(counted(judged))}
    at = [place.get(pair) for pair in counted(keys if any(key[1] for key in judged) else _without_input(keys))]
    found: list[int | None] = []
    for key, i in zip(keys, at, strict=True):
        value = None if i is None else said[i]
        turned = i is not None and judged[i][2:] != key[2:]
        found.append(FIRST + SECOND - value if turned and value in (FIRST, SECOND) else value)
    return found, sum(i is not None for i in at)


def _without_input(keys: Sequence[Key]) -> list[Key]:
    """The keys with an empty `input`, but for those whose instruction and texts stand with several inputs."""
    inputs: dict[Any, set[str]] = {}
    for prompt, more, a, b in keys:
        inputs.setdefault((prompt, *sorted((a, b))), set()).add(more)
    return [(prompt, "" if len(inputs[(prompt, *sorted((a, b)))]) == 1 else more, a, b) for prompt, more, a, b in keys]


def _longer(verdicts: Verdicts, rows: Labelled, seed: int) -> dict[str, Any] | None:
    """Share of decided pairs in which the longer text was preferred, by each measure; None where there are none."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        hits, prompts = length_bias(verdicts, rows.keys, measure)
        if not len(hits):
            return None
        draws = cluster_bootstrap(hits[:, None], prompts, RESAMPLES, np.random.default_rng(seed))[:, 0]
        pairs = cluster_sums(hits[:, None], prompts)[:, -1]
        limits = share_interval(float(hits.mean()), draws, pairs, LEVEL)
        found[measure] = {"pairs": len(hits), "share": limits.estimate, "interval": [limits.low, limits.high]}
    return found


def describe(result: dict[str, Any]) -> str:
    """What is printed, a Markdown table first."""
    lines = ["| raters | rows | same verdict | κ | 95 % interval of κ |", "| --- | --- | --- | --- | --- |"]
    compared = [(" and ".join(one["raters"]), one) for one in result["raters"]]
    if "judge" in result:
        compared.append(("judge and majority", result["judge"]))
    for name, one in compared:
        limits = "not known" if one["kappa_interval"] is None else "{:.3f} to {:.3f}".format(*one["kappa_interval"])
        lines.append(f"| {name} | {one['rows']} | {100 * one['agreement']:.1f} % | {one['kappa']:.3f} | {limits} |")
    counts = ", ".join(f"{name} {count}" for name, count in result["majority"].items())
    lines.append(
        f"\n{result['rows']} pairs of {result['prompts']} prompts; majority: {counts}; intervals over prompts"
    )
    for who, one in (
        ("majority", result["longer_preferred"]),
        ("judge", result.get("judge", {}).get("longer_preferred")),
    ):
        for measure, bias in (one or {}).items():
            low, high = bias["interval"]
            lines.append(
                f"the {who} prefers the text with more {measure} in {100 * bias['share']:.1f} % of {bias['pairs']} "
                f"decided pairs ({100 * low:.1f} to {100 * high:.1f} %)"
            )
    if "judge" in result:
        judge = result["judge"]
        lines.append(
            f"judge against the majority: accuracy {judge['accuracy']:.4f}, macro precision "
            f"{judge['macro_precision']:.4f}, recall {judge['macro_recall']:.4f}, F1 {judge['macro_f1']:.4f}; "
            f"joined {judge['pairs']} of {result['rows']} rows, {judge['without_verdict']} of {judge['pairs']} "
            "without a verdict"
        )
    return "\n".join(lines)


def main(
    humans: Annotated[Path, typer.Option(help="JSON or JSON lines: instruction, two texts, a label per rater.")],
    rater: Annotated[list[str] | None, typer.Option(help="Key of a rater's labels; repeat it. [preference]")] = None,
    judge: Annotated[Path | None, typer.Option(help="The judge's annotations of the same pairs.")] = None,
    judge_key: Annotated[str, typer.Option(help="Key of the judge's label.")] = "preference",
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for agreement.json and .md. [nothing kept]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print agreement.json's content.")] = False,
) -> None:
    """Agreement and Cohen's κ of human raters with each other and of a judge with their majority."""
    raters = rater or ["preference"]
    if twice := next((name for name in raters if raters.count(name) > 1), None):
        raise UserError(f"--rater {twice!r}: given twice")
    if len(raters) < 2 and judge is None:
        raise UserError("--rater: two raters, or one and --judge, are needed to compare")
    given = read_labelled(judge, [judge_key]) if judge is not None else None
    result = summarise(read_labelled(humans, raters), given, seed=seed)
    deliver(result, describe(result), "agreement", output, as_json)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
