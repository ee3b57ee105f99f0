"""A best-of-n result as Markdown and as one self-contained page with its plot. Numbers are `best_of_n.py`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.files import write_json, write_text
from evaluation.drawing import svg_of
from evaluation.pages import render

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def describe(result: Mapping[str, Any]) -> str:
    """The result as Markdown: settings, a table of gold, a table of proxies."""
    curves, pool, proxy = result["curves"], result["pool"], result["proxy"]
    first = curves["single"][0]
    members = f"{proxy['members']} member{'' if proxy['members'] == 1 else 's'}"
    unit = "each standardised by its stored constants" if result["normalise"] == "member" else "in their own units"
    lines = [
        "# Best of n",
        "",
        f"- pool: {pool['prompts']} prompts, {pool['n']} samples each, of `{pool['model']}`",
        f"- gold: {result['gold']['description']}",
        f"- proxy: `{proxy['path']}`, {members}, {unit}; uwo with lambda {result['lam']:g}",
        f"- intervals: 95 %, over prompts ({result['resamples']:,} bootstrap resamples), not over training seeds",
        f"- left out: {first['prompts_left_out']} prompts, {first['samples_left_out']} samples without both scores",
    ]
    if proxy["members"] == 1:
        lines.append("- one member: the four curves choose the same samples")
    for key, title in (("gold", "Gold"), ("proxy", "Proxy")):
        lines += ["", f"## {title}", "", "| n | KL (nats) | " + " | ".join(curves) + " |", "|---" * 6 + "|"]
        for place, row in enumerate(curves["single"]):
            cells = " | ".join(_with_interval(curves[name][place], key) for name in curves)
            lines.append(f"| {row['n']} | {row['kl']:.3f} | {cells} |")
    lines += [
        "",
        "## Gold at the largest n minus gold at the curve's best n",
        "",
        "| | best n | change |",
        "|---|---|---|",
    ]
    for name in curves:
        last = max(curves[name], key=lambda row: row["n"])
        best = max(curves[name], key=lambda row: row["gold"])
        lines.append(f"| {name} | {best['n']} | {_with_interval(last, 'gold_from_best')} |")
    return "\n".join(lines) + "\n"


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    if row[f"{key}_low"] is None:
        return f"{row[key]:.4g}"
    return f"{row[key]:.4g} [{row[f'{key}_low']:.4g}, {row[f'{key}_high']:.4g}]"


def draw(figure: Any, curves: Curves) -> None:
    """Gold and proxy against KL; bands are the intervals."""
    figure.set_size_inches(10, 3.8)
    for axes, key in zip(figure.subplots(1, 2), ("gold", "proxy"), strict=True):
        for name, colour in zip(curves, ("#d9631e", "#8a8f98", "#1f6fd6", "#3b8f5a"), strict=True):
            rows = sorted(curves[name], key=lambda row: row["n"])
            kl = [row["kl"] for row in rows]
            axes.plot(kl, [row[key] for row in rows], color=colour, marker="o", markersize=3, label=name)
            if rows[0][f"{key}_low"] is not None:
                limits = ([row[f"{key}_{end}"] for row in rows] for end in ("low", "high"))
                axes.fill_between(kl, *limits, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("KL(best of n ‖ policy), nats: ln n − (n−1)/n")
        axes.set_ylabel(f"{key} score")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def write_result(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """best_of_n.html and .md, then .json, which is what says that the result is complete."""
    text = describe(result)
    reading = (
        "Over-optimisation: gold falls while the proxy still rises. Left: what is wanted. Right: what was chosen by."
    )
    figure = ("Scores of the chosen answers", reading, svg_of("best_of_n", draw, result["curves"]))
    files = [folder / f"best_of_n.{ending}" for ending in ("json", "md", "html")]
    write_text(files[2], render("text.html", "Best of n", [figure], text=text))
    write_text(files[1], text)
    write_json(files[0], result)
    return files
