"""win_rate.html: one self-contained page: intervals as a picture, numbers as tables, texts chosen by rule.

Written by `win_rate.py --output`, for sampled models and for annotations alike. No numbers are made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.files import write_text
from evaluation.annotations import Annotation
from evaluation.drawing import COLOURS, FAINT, controlled, explain_verdicts, legend_above, mark, plain, segment, svg_of
from evaluation.pages import Table, render
from evaluation.verdicts import NO_DIFFERENCE, TOO_FEW, verdict

Limits = tuple[float, float, float]  # lower limit, estimate, upper limit, in percent
Differences = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A system against its baseline.

    Attributes:
        name, baseline: who.
        rate: lower limit, win rate, upper limit, in percent; of the interval to read.
        prompts: that were judged.
        p_value: of the test of one half.
        controlled: the same of the length-controlled win rate; None where there is none.
        facts: what a table says beside them.
        rows: the judged pairs, of which some are shown.
    """

    name: str
    baseline: str
    rate: Limits
    prompts: int
    p_value: float
    controlled: Limits | None
    facts: Sequence[tuple[str, str]]
    rows: Sequence[Annotation]


def around(value: float | None, limits: Sequence[float] | None, times: float = 1) -> Limits | None:
    """`Limits` of an estimate and its interval; None where either is missing."""
    return None if value is None or limits is None else (times * limits[0], times * value, times * limits[1])


def write_page(
    path: Path,
    entries: Sequence[Entry],
    differences: Differences = (),
    head: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> None:
    """Write the page.

    Args:
        path: of the page.
        entries: the systems, all of one baseline.
        differences: paired comparisons of them, in percentage points.
        head, rows: a table of these.
    """
    tables: list[Table] = [(f"{e.name} against {e.baseline}", ["", ""], e.facts) for e in entries]
    if differences:
        tables.append(("The systems against each other, paired", head, rows))
    reading = (
        "Lines are 95 % intervals over prompts. Where the diamond (at equal lengths) lies far from the point, length "
        "decides. Compare two systems by their paired difference, not by how their intervals overlap."
    )
    page = render(
        "win_rate.html",
        f"Win rate over {entries[0].baseline}",
        [("Win rates", reading, svg_of("win_rate", draw, entries, differences))],
        tables,
        claims=[claim(entry) for entry in entries],
        examples=[(entry.name, examples(entry.rows)) for entry in entries],
    )
    write_text(path, page)


def claim(entry: Entry) -> str:
    """What interval and test let one say, in words."""
    low, rate, high = entry.rate
    said = f"{rate:.1f} % ({low:.1f} to {high:.1f} %) over {entry.baseline}"
    return f"{entry.name}: {said}: {verdict(entry.prompts, low, high, entry.p_value, 50)} by this judge"


def draw(figure: Any, entries: Sequence[Entry], differences: Differences = ()) -> None:
    """Win rates with length control; below them, as names may be long, the paired differences."""
    heights = [1.5 + 0.36 * len(rows) for rows in (entries, differences) if rows]
    figure.set_size_inches(9.2, sum(heights))
    upper, *others = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for y, entry in enumerate(reversed(entries)):
        low, rate, high = entry.rate
        segment(upper, low, rate, high, y, COLOURS[0], "win rate" if y == 0 else None)
    shown = [(y, entry.controlled) for y, entry in enumerate(reversed(entries)) if entry.controlled is not None]
    for place, (y, limits) in enumerate(shown):
        controlled(upper, *limits, y, "length-controlled" if place == 0 else None)
    upper.set_yticks(range(len(entries)), [_short(entry.name) for entry in reversed(entries)])
    upper.set_ylim(-0.7, len(entries) - 0.4)
    upper.set_xlabel(f"win rate over {_short(entries[0].baseline)}, percent")
    mark(upper, 50)
    legend_above(upper)
    plain(upper)
    if not others:
        return
    (lower,) = others
    for y, row in enumerate(reversed(differences)):
        low, high = row["interval"]
        colour = FAINT if row["verdict"] in (NO_DIFFERENCE, TOO_FEW) else COLOURS[2]
        segment(lower, low, row["difference"], high, y, colour)
    names = [f"{_short(row['first'], 18)} - {_short(row['second'], 18)}" for row in reversed(differences)]
    lower.set_yticks(range(len(names)), names)
    lower.set_ylim(-0.7, len(names) - 0.4)
    lower.set_xlabel("paired difference, points")
    explain_verdicts(lower)
    mark(lower, 0)
    plain(lower)


def _short(name: str, most: int = 30) -> str:
    """The end of a long name: paths differ there."""
    text = name if len(name) <= most else "…" + name[1 - most :]
    return text.replace("$", r"\$")  # else matplotlib reads mathematics


def examples(rows: Sequence[Annotation]) -> list[tuple[str, Annotation]]:
    """The judged pairs with the highest, the median and the lowest preference; the first in the file among equals."""
    judged = sorted((row for row in rows if not math.isnan(row.share)), key=lambda row: -row.share)
    last = len(judged) - 1
    lowest = next((i for i, row in enumerate(judged) if row.share == judged[-1].share), 0)
    places = {lowest: "least preferred", last // 2: "median", 0: "most preferred"}
    return [(name, judged[place]) for place, name in sorted(places.items())]
