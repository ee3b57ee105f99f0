"""How figures of pages look, and how one becomes SVG. No numbers are made here; the training curves have `curves`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOURS = ("#1f6fd6", "#d9631e", "#2f8f5b", "#8a4fbf", "#c2334d", "#0f8a99", "#8c6d1f")
MARKERS = "osD^vP*"
INK, GRID, FAINT = "#333a45", "#dfe3e9", "#8a93a0"


def svg_of(name: str, draw: Callable[..., None], *content: Any, png: Path | None = None) -> str:
    """SVG text of what `draw` puts on an empty figure, the same bytes for the same numbers.

    Args:
        name: of the figure; makes its ids its own on a page.
        draw: takes a matplotlib figure and `content`.
        png: also written there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(layout="constrained", facecolor="white")
        draw(figure, *content)
        if png is not None:
            figure.savefig(png, dpi=130)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def plain(axes: Any, along: str = "x") -> None:
    """No frame, no ticks, a faint grid."""
    axes.grid(axis=along, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def mark(axes: Any, at: float) -> None:
    """A dashed line where nothing differs."""
    axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))


def segment(axes: Any, low: float, value: float, high: float, y: float, colour: str, label: str | None = None) -> None:
    """An estimate on its interval."""
    axes.plot([low, high], [y, y], color=colour, linewidth=2.4, solid_capstyle="round")
    axes.plot([value], [y], "o", color=colour, markersize=6, label=label)


def controlled(axes: Any, low: float, value: float, high: float, y: float, label: str | None = None) -> None:
    """The length-controlled estimate, just below the plain one."""
    axes.plot([low, high], [y - 0.25] * 2, color=COLOURS[1], linewidth=1)
    axes.plot([value], [y - 0.25], "D", mfc="white", mec=COLOURS[1], markersize=5, label=label)


def explain_verdicts(axes: Any) -> None:
    """What the colours of differences say, above the axes, from their right end on."""
    axes.set_title("green: different; grey: no significant difference", fontsize=9.5, color=INK, loc="right")


def legend_above(axes: Any) -> None:
    """One row of names above the axes, on the left."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
