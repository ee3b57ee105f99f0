"""Training curves of a run as inline SVG that follows the page's light or dark colours. No files, no pyplot.

What is plotted, and how to read it, is the table `CURVES`. matplotlib draws in marker colours, which are then replaced
by the page's CSS variables; text stays text, so that it can be read, searched and scaled.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]

_COLOURS = {  # marker colour in the drawing -> CSS variable of the page
    "#0a0b01": "var(--ink-2)",
    "#0a0b02": "var(--grid)",
    "#0a0b11": "var(--series-1)",
    "#0a0b12": "var(--series-2)",
    "#0a0b13": "var(--series-3)",
    "#0a0b14": "var(--series-4)",
    "#0a0b15": "var(--series-5)",
}
_INK, _GRID, *_SERIES = _COLOURS


@dataclass(frozen=True)
class Curve:
    """One plot.

    Attributes:
        title: its heading.
        lines: (label, key in metrics.jsonl) in drawing order.
        unit: of the vertical axis.
        reading: how to read it, and what misleads.
        level: a value to draw as a dashed line, with its label; the loss's is found in the run.
        share: whether the axis is that of a share, 0 to 1.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str
    reading: str
    level: tuple[float, str] | None = None
    share: bool = False


CURVES = (
    Curve(
        "Loss",
        (("training", "loss"), ("held out", "eval_loss")),
        "per pair",
        "The objective's mean value. It should fall below its value before training (dashed). A low loss says that "
        "chosen and rejected responses are told apart, not that the model writes better ones: see the win rate. "
        "On-policy losses are made of fresh samples at every step and need not fall.",
    ),
    Curve(
        "Implicit rewards",
        (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected"), ("margin", "rewards/margins")),
        "reward",
        "What the objective takes the model to think of each response; the margin is chosen minus rejected and should "
        "rise. See which of the two moves it: a margin that grows only because rejected sinks teaches what to avoid.",
        (0.0, "zero"),
    ),
    Curve(
        "Accuracy",
        (("training", "rewards/accuracies"), ("held out", "eval_rewards/accuracies")),
        "share of pairs",
        "Share of pairs, over all devices, whose chosen response has the higher implicit reward; one half is chance. "
        "Near 1 on the training pairs after several epochs is memory, and says nothing about new prompts.",
        (0.5, "chance"),
        share=True,
    ),
    Curve(
        "Log-probability since step 0",
        (("chosen", "displacement/chosen"), ("rejected", "displacement/rejected")),
        "nats per response",
        "How far log π of the responses has moved. Rejected should fall. Chosen falling with it means that "
        "probability leaves both for text that nobody rated, while margin and accuracy still look perfect; a large "
        "fall is the usual cause of repetitive or broken outputs.",
        (0.0, "step 0"),
    ),
    Curve(
        "Drift from the reference",
        (("log reference − log π", "kl"),),
        "nats per response",
        "Mean of log reference − log policy over the training responses. It estimates KL(reference ‖ policy) only if "
        "they are plain samples of the reference, which the best and the worst of several draws are not. It can dip "
        "below 0; a steady climb with no gain in win rate is a price paid for nothing.",
        (0.0, "reference"),
    ),
    Curve(
        "Judgement of the policy's samples",
        (("reward", "reward"), ("preference", "preference"), ("accuracy", "samples/accuracy")),
        "as the judge says",
        "On-policy runs: mean reward of fresh samples, mean probability of beating the opponent, or share of right "
        "answers. Read it beside the KL: every judge can be pleased by drifting far enough.",
    ),
    Curve(
        "KL to the reference",
        (("log π − log reference", "samples/kl"),),
        "nats per response",
        "On-policy runs: mean of log policy − log reference over fresh samples of the policy, an unbiased estimate of "
        "KL(policy ‖ reference). It starts at 0; tens of nats mean text that the reference would hardly write.",
        (0.0, "reference"),
    ),
    Curve(
        "Samples",
        (("finished", "samples/finished"), ("distinct bigrams", "samples/distinct_2"), ("valid", "samples/valid")),
        "share",
        "On-policy runs: responses that end by themselves, different bigrams among all of a rollout, and chains with "
        "the answer's marker. Falling diversity with rising reward is the usual way to please a judge.",
        share=True,
    ),
    Curve(
        "Gradient entanglement: probe pairs",
        (
            ("parted", "entanglement/parted"),
            ("both fall", "entanglement/both_fall"),
            ("both rise", "entanglement/both_rise"),
            ("pulled back", "entanglement/pulled_back"),
            ("unmoved", "entanglement/unmoved"),
        ),
        "pairs",
        "What a small step on a probe pair's own loss would do to its two responses, by their gradients and the "
        "loss's weights: part them (healthy), drag both down or up because the gradients are too much alike, pull "
        "them back (a loss past its target margin), or nothing. It says nothing of what other pairs do to them.",
    ),
    Curve(
        "Gradient entanglement: size",
        (("cosine", "entanglement/cosine"), ("ratio", "entanglement/ratio")),
        "mean over probe pairs",
        "How alike the gradients of log π(chosen) and log π(rejected) are: cosine of their angle, and inner product "
        "over the smaller squared norm. A loss of the margin moves both responses together exactly where the ratio is "
        "above 1 (dashed), so where the cosine is above the smaller norm over the larger: below 0.5 is safe while the "
        "norms differ by less than a factor of 2.",
        (1.0, "entangled above"),
    ),
    Curve(
        "Probe pairs since the last probe",
        (("chosen", "entanglement/moved_chosen"), ("rejected", "entanglement/moved_rejected")),
        "nats per response",
        "How far log π of the probe pairs' responses moved between probes, in all steps, under all pairs and the real "
        "optimiser; the verdicts speak of one step. Both below 0 is displacement, whichever pairs cause it.",
        (0.0, "unmoved"),
    ),
    Curve(
        "Calibration error of the implicit reward",
        (
            ("training", "calibration/ece"),
            ("held out", "eval_calibration/ece"),
            ("held out, by chance", "eval_calibration/noise"),
        ),
        "ECE",
        "Mean gap between sigmoid(|margin|), the confidence in a pair's order (robust, smoothed labels: translated to "
        "labels as given), and the share of labels on that side. Read the held-out line against the third one, what a "
        "calibrated model would show on so few pairs; the training line has fewer. Small rewards "
        "are under-confident: early in a run the error is accuracy minus 1/2.",
        share=True,
    ),
    Curve(
        "Pairs without push",
        (("saturated", "saturated"),),
        "share of pairs",
        "Share of pairs whose gradient has all but vanished. Near 1 the data has nothing more to teach this "
        "objective; further epochs only add drift.",
        share=True,
    ),
    Curve(
        "Throughput",
        (
            ("tokens", "tokens_per_second"),
            ("sampling", "tokens_per_second/sample"),
            ("training", "tokens_per_second/train"),
        ),
        "tokens per second",
        "Speed of training. The first point includes warming up; dips are evaluation or saving.",
    ),
)


def is_number(value: Any) -> bool:
    """Whether a metric can be drawn: a finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric, in file order."""
    points = [(row["step"], row[key]) for row in rows if is_number(row.get("step")) and is_number(row.get(key))]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def draw(curve: Curve, rows: Rows, level: tuple[float, str] | None) -> str | None:
    """One plot as an `<svg>` element, or None where the run has none of its metrics.

    Args:
        curve: what to draw.
        rows: rows of metrics.jsonl.
        level: dashed line and its label; None draws none.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [(i, label, *series(rows, key)) for i, (label, key) in enumerate(curve.lines)]
    drawn = [line for line in drawn if line[2]]
    if not drawn:
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        if level is not None:
            axes.axhline(level[0], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), label=level[1], zorder=1)
        for index, label, steps, values in drawn:
            marker = "o" if len(steps) <= 40 else ""
            axes.plot(steps, values, color=_SERIES[index], linewidth=1.8, marker=marker, markersize=3, label=label)
        if curve.share:
            axes.set_ylim(-0.03, 1.03)
        _style(axes, curve.unit, legend=len(drawn) > 1 or level is not None)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), f"{curve.title}: {', '.join(label for _, label, _, _ in drawn)}")


def _style(axes: Any, unit: str, legend: bool) -> None:
    """Light frame, whole steps, a legend above the plot where there is more than one line."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    if legend:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, labelcolor=_INK, borderaxespad=0,
            handlelength=1.6, columnspacing=1.6,
        )  # fmt: skip


def _inline(svg: str, label: str) -> str:
    """An `<svg>` element for a page: no prolog, no name spaces, ids of its own, the page's colours, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found.group(1)}{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
    for marker, variable in _COLOURS.items():
        svg = svg.replace(marker, variable)
    return svg
