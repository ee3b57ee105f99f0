"""What a comparison of two models leaves in a folder: win_rate.json, samples.jsonl, AlpacaEval's files, pages.

Not the comparison (`comparison`) and not the formats (`annotations`); a run's report.html is `report`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.files import write_json, write_json_lines, write_text
from evaluation import annotations as alpaca
from evaluation.annotations import Annotation
from evaluation.comparison import Comparison, facts, headline, markdown_table, read_interval
from evaluation.equal_lengths import described, fit_annotations
from evaluation.win_rate_page import Entry, around, write_page


def with_length_control(
    comparison: Comparison,
    gamed: Sequence[Sequence[Annotation]] = (),
    difficulty: Mapping[str | int, float] | None = None,
) -> Comparison:
    """The comparison with `length_controlled` in its result, in shares; null with a note where pairs are too few.

    Raises:
        UserError: an instruction has no difficulty.
    """
    result = comparison.result
    seed = result["bootstrap"]["seed"]
    raw = 100 * result["win_rate"]
    try:
        found = fit_annotations(alpaca.parse_annotations(comparison.annotations), gamed, difficulty, seed=seed)
    except ValueError as error:
        fields = {"win_rate": None, "interval": None, **described(None, raw, str(error))}
    else:
        limits, known = found.interval, not found.says_nothing
        fields = {
            "win_rate": found.rate if known else None,
            "interval": None if limits is None else [limits.low, limits.high],
            "standard_error": found.standard_error if known else None,
            **described(found, raw),
        }
    return replace(comparison, result={**result, "length_controlled": fields})


def leaderboard_row(comparison: Comparison) -> dict[str, Any]:
    """The model's row of AlpacaEval's leaderboard, in percent, over pairs of samples."""
    rows, control = comparison.annotations, comparison.result.get("length_controlled") or {}
    found = alpaca.describe_head2head([row["preference"] for row in rows])
    found["avg_length"] = alpaca.average_length([row["output_2"] for row in rows])
    if control.get("win_rate") is not None:
        found["length_controlled_winrate"] = 100 * control["win_rate"]
        if control["standard_error"] is not None:
            found["lc_standard_error"] = 100 * control["standard_error"]
    return found


def write_comparison(folder: Path, comparison: Comparison) -> list[Path]:
    """Write samples.jsonl, then win_rate.json, which is what says that the result is complete."""
    files = [folder / "win_rate.json", folder / "samples.jsonl"]
    write_json_lines(files[1], comparison.rows)
    write_json(files[0], comparison.result)
    return files


def write_output(folder: Path, comparison: Comparison) -> list[Path]:
    """The same with annotations.json and leaderboard.csv, which AlpacaEval's tools read, and win_rate.md and .html."""
    files = [folder / name for name in ("annotations.json", "leaderboard.csv", "win_rate.md", "win_rate.html")]
    alpaca.write_annotations(files[0], comparison.annotations)
    alpaca.write_leaderboard(files[1], {comparison.result["model"]: leaderboard_row(comparison)})
    write_text(files[2], markdown(comparison.result))
    write_page(files[3], [_entry(comparison)])
    return [*write_comparison(folder, comparison), *files]


def write_into_run(run_dir: Path, comparison: Comparison) -> list[Path]:
    """Write a comparison into a run, then the run's report and model cards, which quote it."""
    from alignment.models.card import refresh
    from evaluation.report import write_report

    result = {**comparison.result, "summary": summary(comparison.result)}
    return [*write_comparison(run_dir, replace(comparison, result=result)), *refresh(run_dir), write_report(run_dir)]


def summary(result: dict[str, Any]) -> list[str]:
    """What a model card says of a comparison: the rate with its interval, against whom, judged by what, and how."""
    left_out = ("model", "baseline", "prompts won", "ties", "mean score", "orders")
    first = " ".join(headline(result, result["baseline"]).split())
    return [first, *(f"{name}: {text}" for name, text in facts(result) if name not in left_out)]


def markdown(result: dict[str, Any]) -> str:
    """win_rate.md: the printed block as a table."""
    return f"# {' '.join(headline(result).split())}\n\n{markdown_table(['', ''], facts(result))}\n"


def _entry(comparison: Comparison) -> Entry:
    result = comparison.result
    control = result.get("length_controlled") or {"win_rate": None, "interval": None}
    low, high = read_interval(result)
    return Entry(
        result["model"],
        result["baseline"],
        (100 * low, 100 * result["win_rate"], 100 * high),
        prompts=result["prompts"],
        p_value=result["p_value"],
        controlled=around(control["win_rate"], control["interval"], 100),
        facts=facts(result),
        rows=alpaca.parse_annotations(comparison.annotations),
    )
