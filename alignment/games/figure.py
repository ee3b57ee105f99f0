"""The picture of an experiment in games: duality gap against iterations (above) and gradient evaluations (below).

One column per setting, one colour per method; the thick line is the median over games (and seeds), the thin one the
worst of them. The first two methods lie above the others. A straight line is linear convergence. matplotlib only, no
pyplot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.games.lab import Curve, Panel

FLOOR = 1e-12  # of the vertical axis, or higher where no curve goes as low
_COLOURS = ("#1f5fbf", "#d9730d", "#2e8b57", "#b0307a", "#7a7a7a", "#8c6d31", "#17a2b8", "#5b4ba0")
_DASHES: tuple[Any, ...] = ("-", "-", (0, (6, 2)), (0, (2, 2)), "-", (0, (6, 2)), (0, (2, 2)), "-")


def write(panels: Sequence[Panel], stem: Path) -> list[Path]:
    """Write STEM.svg and STEM.png; returns both."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = len(panels)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "games", "font.size": 9}):
        figure = Figure(figsize=(max(4.2 * columns, 5.5), 6.2), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
        grid = figure.subplots(2, columns, sharey=True, squeeze=False)
        grid[0][0].set_yscale("log")
        grid[0][0].set_ylim(_lowest(panels), 2)
        for row, what in enumerate(("iterations", "gradient evaluations")):
            for column, panel in enumerate(panels):
                axes = grid[row][column]
                _draw(axes, panel, per_gradient=row == 1)
                axes.set_xlabel(what)
                if row == 0:
                    axes.set_title(f"β {panel.setting.beta:g}, {panel.step.replace('eta', 'η')}", fontsize=10)
            grid[row][0].set_ylabel("duality gap")
        runs = next(iter(panels[0].curves.values())).gaps.shape[1]
        note = (
            f"thick line: median of {runs} runs; thin line of the same colour: the worst of them at that point"
            if runs > 1
            else ""
        )
        figure.supxlabel(note, fontsize=8, color="#555555")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
        files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], dpi=130)
    return files


def _draw(axes: Any, panel: Panel, *, per_gradient: bool) -> None:
    end = panel.setting.iterations
    for number, (name, curve) in enumerate(panel.curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        x, middle, worst = _line(curve, per_gradient)
        style = {"color": colour, "linestyle": _DASHES[number % len(_DASHES)]}
        axes.plot(x, middle, **style, linewidth=1.8, label=name, zorder=20 if number == 0 else 10 + number)
        axes.plot(x, worst, **style, linewidth=0.9, alpha=0.8, zorder=19 - number if number < 2 else 2)
    axes.set_xlim(0, end)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="x", style="plain")
    axes.locator_params(axis="x", nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lowest(panels: Sequence[Panel]) -> float:
    """The power of ten below the smallest gap of all, at least `FLOOR`."""
    smallest = min(float(curve.gaps.nan_to_num(1.0).min()) for panel in panels for curve in panel.curves.values())
    return max(FLOOR, 10.0 ** math.floor(math.log10(max(smallest, FLOOR))))


def _line(curve: Curve, per_gradient: bool) -> tuple[list[float], list[float], list[float]]:
    """Horizontal positions, median and largest gap, cut a little below the axis so that the log is finite."""
    factor = curve.evaluations if per_gradient else 1
    gaps = curve.gaps.clamp_min(FLOOR / 100)
    return (factor * curve.iterations).tolist(), gaps.quantile(0.5, 1).tolist(), gaps.amax(1).tolist()
