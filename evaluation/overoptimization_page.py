"""The over-optimisation experiment's result as Markdown and as a page with its figure. Numbers: `overoptimization`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.files import write_json, write_text
from evaluation.drawing import svg_of
from evaluation.experiments import cell
from evaluation.pages import render

COLOURS = {"single": "#d9631e", "mean": "#8a8f98", "wco": "#1f6fd6", "uwo": "#3b8f5a"}


def describe(result: Mapping[str, Any]) -> str:
    """Settings, what the numbers do not say, and the tables."""
    asked, pairs = result["experiment"], result["pairs"]
    lines = [
        "# Over-optimisation of proxy rewards, best of n",
        "",
        f"- policy: `{asked['policy']['name_or_path']}`; gold: {result['gold']}",
        f"- proxies: {asked['reward_model']}, trained on {pairs['pairs']} gold-labelled pairs of the policy's answers "
        f"({pairs['ties']} ties dropped)",
        f"- pool: N = {asked['n']} answers to prompts of {asked['pool']['file']} (first {asked['pool']['limit']})",
        f"- uwo with lambda {asked['lam']:g}",
        f"- {result['summary'][0]['seeds']} seeds; in brackets 95 % t intervals over seeds",
        "- all seeds share one pool and one set of pairs: what other prompts or pairs would change is not in the "
        "intervals",
        "- a curve's best n is chosen on that same curve: a little lost is chance, of which the interval of `lost` "
        "does not know",
        "",
        "Members standardised by their stored constants:",
        "",
        *_table(result["summary"]),
        "",
        "Members as they are (wco and uwo then compare scores of different zero points):",
        "",
        *_table(result["summary_not_normalised"]),
    ]
    lines += ["", "Rank correlations within a prompt's pool, mean over prompts:", ""]
    lines += ["| noise | seed | single with gold | mean with gold | two members |", "|---" * 5 + "|"]
    for run in result["runs"]:
        numbers = [run[key] for key in ("single_with_gold", "mean_with_gold", "members_with_each_other")]
        lines.append(f"| {run['noise']:g} | {run['seed']} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |")
    return "\n".join(lines) + "\n"


def _table(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of one summary's table."""
    lines = [
        "| noise | method | gold at n = 1 | best n | gold there | largest n | gold there | lost | over single |",
        "|---" * 9 + "|",
    ]
    for row in summary:
        cells = [f"{row['noise']:g}", row["method"], f"{row['gold_at_1']:.3f}", row["best_n"], cell(row["best_gold"])]
        cells += [row["largest_n"], cell(row["last_gold"]), cell(row["lost"]), cell(row["over_single"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """A column per noise; gold above, proxy (standardised) below; lines are means over seeds, bands their extremes."""
    noises = list(dict.fromkeys(run["noise"] for run in result["runs"]))
    figure.set_size_inches(5 * len(noises), 7)
    grid = figure.subplots(2, len(noises), squeeze=False, sharex=True)
    for column, noise in enumerate(noises):
        of = [run["curves"] for run in result["runs"] if run["noise"] == noise]
        for place, key in enumerate(("gold", "proxy")):
            axes = grid[place][column]
            for name, colour in COLOURS.items():
                kl = [row["kl"] for row in of[0][name]]
                values = np.array([[row[key] for row in curves[name]] for curves in of])
                axes.plot(kl, values.mean(0), color=colour, marker="o", markersize=3, label=name)
                axes.fill_between(kl, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set_ylabel(f"{key} score of the chosen answer")
            axes.spines[["top", "right"]].set_visible(False)
        grid[0][column].set_title(f"{100 * noise:g} % of labels flipped")
        grid[1][column].set_xlabel("KL(best of n ‖ policy), nats: ln n − (n−1)/n")
    grid[0][0].legend(frameon=False)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """overoptimization.html and .md, then .json, which is what says that the result is complete."""
    text = describe(result)
    reading = (
        "Over-optimisation: the proxy (below) goes on rising while gold (above) falls. Members are standardised. "
        "Bands: smallest and largest seed."
    )
    title = "Over-optimisation of proxy rewards"
    figure = ("Best of n", reading, svg_of("overoptimization", draw, result))
    write_text(folder / "overoptimization.html", render("text.html", title, [figure], text=text))
    write_text(folder / "overoptimization.md", text)
    write_json(folder / "overoptimization.json", result)
