"""The figures of a comparison, drawn by matplotlib: SVG for the page, PNG beside it. No numbers are made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.drawing import (
    COLOURS,
    FAINT,
    GRID,
    INK,
    MARKERS,
    controlled,
    explain_verdicts,
    legend_above,
    mark,
    plain,
    segment,
    svg_of,
)

Row = Mapping[str, Any]


def draw_all(result: Row, folder: Path) -> list[tuple[str, str, str]]:
    """(title, how to read it, SVG text) of every figure; each is also written to `folder` as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (title, reading, svg_of(name, draw, result, png=folder / f"{name}.png"))
        for name, title, reading, draw in FIGURES
    ]


def ranked(result: Row) -> list[Row]:
    """The objectives, the highest win rate over the start first."""
    return sorted(result["objectives"], key=lambda row: -row["over_start"]["rate"])


def ordered_matrix(result: Row) -> tuple[list[str], list[list[Row | None]]]:
    """Names and cells, the highest win rate over the start first, the start itself last."""
    names, cells = result["matrix"]["names"], result["matrix"]["cells"]
    order = [names.index(row["label"]) for row in ranked(result)]
    order += [i for i in range(len(names)) if i not in order]
    return [names[i] for i in order], [[cells[i][j] for j in order] for i in order]


def win_rates(figure: Any, result: Row) -> None:
    """Two panels: over the start (with length control), and over the baseline."""
    rows, base, names = ranked(result)[::-1], result["baseline"], result["matrix"]["names"]
    figure.set_size_inches(9.2, 1.5 + 0.34 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    for y, row in enumerate(rows):
        one = row["over_start"]
        _interval(left, one, y, COLOURS[0], "win rate" if y == 0 else None)
        if row["length_controlled"] is not None:
            label = "length-controlled" if y == 0 else None
            controlled(left, *_limits(row["length_controlled"]), y, label)
        if row["label"] != base:
            cell = result["matrix"]["cells"][names.index(row["label"])][names.index(base)]
            sure = row["versus_baseline"]["verdict"].startswith(("better", "worse"))
            _interval(right, cell, y, COLOURS[2] if sure else FAINT, None)
    left.set_yticks(range(len(rows)), [row["label"] for row in rows])
    for axes, against in ((left, "the start"), (right, base)):
        mark(axes, 50)
        axes.set_xlabel(f"win rate over {against}, percent", color=INK)
        plain(axes)
    legend_above(left)
    explain_verdicts(right)


def _limits(one: Row) -> tuple[float, float, float]:
    """Lower limit, estimate and upper limit, in percent."""
    return 100 * one["low"], 100 * one["rate"], 100 * one["high"]


def _interval(axes: Any, one: Row, y: float, colour: str, label: str | None) -> None:
    """Interval over prompts, estimate, and a small tick for each seed."""
    segment(axes, *_limits(one), y, colour, label)
    axes.plot([100 * rate for rate in one["by_seed"]], [y + 0.25] * len(one["by_seed"]), "|", color=colour, ms=6)


def matrix(figure: Any, result: Row) -> None:
    """The matrix as a table of colours with its numbers."""
    names, cells = ordered_matrix(result)
    figure.set_size_inches(2.6 + 0.58 * len(names), 1.9 + 0.42 * len(names))
    axes = figure.subplots()
    table = [[50.0 if one is None else 100 * one["rate"] for one in line] for line in cells]
    reach = max(10.0, *(abs(value - 50) for line in table for value in line))
    axes.imshow(table, cmap="RdBu", vmin=50 - 1.6 * reach, vmax=50 + 1.6 * reach, aspect="auto")
    for i, line in enumerate(cells):
        for j, one in enumerate(line):
            if one is not None:
                clear = one["low"] > 0.5 or one["high"] < 0.5
                weight = "bold" if clear else "normal"
                axes.text(j, i, f"{100 * one['rate']:.0f}", ha="center", va="center", color="#111111", weight=weight)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def frontier(figure: Any, result: Row) -> None:
    """Reward, or win rate over the start, against KL: the chosen points on test prompts, a faint dot for each seed."""
    rows = ranked(result)
    figure.set_size_inches(9.2, 4.9)
    tuned = any(row["tuned"] for row in rows)
    left, right = figure.subplots(1, 2) if tuned else (figure.subplots(), None)
    rewarded = "reward" in rows[0]
    for number, row in enumerate(rows):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        if number >= len(COLOURS):
            style["markerfacecolor"] = "white"
        heights = row["reward"]["by_seed"] if rewarded else [100 * rate for rate in row["over_start"]["by_seed"]]
        height = row["reward"]["mean"] if rewarded else 100 * row["over_start"]["rate"]
        left.plot(row["kl"]["by_seed"], heights, linestyle="", alpha=0.35, markersize=4, **style)
        left.plot([row["kl"]["mean"]], [height], linestyle="", markersize=9, label=row["label"], **style)
        if right is not None:
            right.plot(
                [p["kl"] for p in row["tuned"]], [100 * p["win_rate"] for p in row["tuned"]], markersize=6, **style
            )
    left.set_title("chosen points, test prompts (small: each seed)", fontsize=9.5, color=INK, loc="left")
    left.set_ylabel("reward" if rewarded else "win rate over the start, percent", color=INK)
    if right is not None:
        right.set_title("all tuning points, validation prompts", fontsize=9.5, color=INK, loc="left")
        right.set_ylabel("win rate over the start, percent", color=INK)
    for axes in (left,) if right is None else (left, right):
        axes.set_xlabel("KL to the start, nats per response", color=INK)
        _widened(axes, [row["kl"]["mean"] for row in rows])
        plain(axes, "both")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)


def _widened(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where one policy has gone so far that it would press all others into a corner."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) / min(values) < 10 or min(axes.dataLim.intervalx) <= 0:
        return  # an estimate of 0 or below has no place on that axis
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def displacement(figure: Any, result: Row) -> None:
    """Log-probability of chosen and rejected since the start, on the pairs that all trained on."""
    rows = [row for row in ranked(result)[::-1] if "chosen" in row]
    figure.set_size_inches(9.2, 1.5 + 0.34 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        chosen, rejected = row["chosen"]["mean"], row["rejected"]["mean"]
        axes.plot([rejected, chosen], [y, y], color=GRID, linewidth=3, zorder=1)
        axes.plot([chosen], [y], "o", color=COLOURS[0], markersize=7, label="chosen" if y == 0 else None)
        axes.plot([rejected], [y], "o", color=COLOURS[1], markersize=7, label="rejected" if y == 0 else None)
    mark(axes, 0)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_xlabel("log π since the start, nats per response (mean over seeds)", color=INK)
    if rows:
        legend_above(axes)
    plain(axes)


Draw = Callable[[Any, Row], None]
FIGURES: Sequence[tuple[str, str, str, Draw]] = (
    (
        "win_rates",
        "Win rates",
        "Lines are 95 % intervals over prompts, ticks above them the seeds. Where the diamond lies far left of the "
        "point, the objective wins by writing more.",
        win_rates,
    ),
    (
        "matrix",
        "Win rate of the row over the column, percent",
        "Blue: the row wins. Bold: the interval over prompts leaves 50 out (not corrected for the many cells).",
        matrix,
    ),
    (
        "frontier",
        "Reward against KL",
        "Up and to the left is better: more reward for less drift. A method that only goes further along the same "
        "curve could have been had by another beta.",
        frontier,
    ),
    (
        "displacement",
        "Where the probability went",
        "Chosen left of zero means that probability left the chosen responses, too, for text that nobody rated.",
        displacement,
    ),
)
