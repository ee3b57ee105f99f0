"""`report.html` of a run: one file that opens anywhere, with nothing to fetch. Works while parts are still missing.

    python -m evaluation.report runs/dpo

Not a dashboard and not where numbers are made: it shows manifest.json, metrics.jsonl, win_rate.json and samples.jsonl
of the run directory as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import UserError, run_or_exit
from alignment.files import iterate_json_lines, read_json_object, write_text
from alignment.models.card import is_outdated
from alignment.models.public_names import start_parts
from evaluation import comparison, curves
from evaluation.pages import page_environment
from evaluation.report_kinds import kind_of

SAMPLES_SHOWN = 4  # of each side and prompt; more hides the prompts below
LONG_SECTION = 14  # recipe sections with more rows start folded
VERDICTS = ("parted", "both fall", "both rise", "pulled back", "unmoved")  # of `alignment.trainers.entanglement`
# A calibration error of so many times what chance gives on average is called one. Chance alone exceeds it at most one
# time in twenty: for one bin the error is |N(0, 1)|, 1.96 / sqrt(2 / pi) = 2.46 times its mean; more bins average out.
CLEAR = 2.46


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir`/report.html from what the run directory holds.

    Args:
        run_dir: a run directory; it needs at least manifest.json or metrics.jsonl.

    Returns:
        The path of the report.

    Raises:
        UserError: there is no such folder, it holds neither file, or one of its files cannot be read.
    """
    run = Path(run_dir)
    if not any((run / name).is_file() for name in ("manifest.json", "metrics.jsonl")):
        raise UserError(f"{run}: neither manifest.json nor metrics.jsonl there; give a run directory")
    environment = page_environment()
    environment.filters.update(percent=comparison.percent, interval=comparison.percent_interval, number=format_number)
    page = environment.get_template("report.html").render(**report_content(run))
    path = run / "report.html"
    write_text(path, page)
    return path


def report_content(run: Path) -> dict[str, Any]:
    """Everything that the template shows, from the files of the run."""
    manifest = _optional_object(run / "manifest.json")
    metrics = read_metrics(run / "metrics.jsonl")
    result = _optional_object(run / "win_rate.json")
    samples_file = run / "samples.jsonl"
    samples = [row for _, row in iterate_json_lines(samples_file)] if result and samples_file.is_file() else []
    recipe = manifest.get("recipe") or {}
    model, kind = recipe.get("model") or {}, kind_of(run, recipe)
    return {
        "name": run.resolve().name,
        "kind": kind,
        "objective_name": (recipe.get("objective") or {}).get("name"),
        "model_name": " + ".join(start_parts(model)),
        "result": describe_result(result) if result else None,
        "outdated": bool(result) and is_outdated(run, run / "win_rate.json"),
        "brief": training_brief(metrics),
        "alarm": displacement_alarm(metrics, recipe),
        "figures": draw_figures(metrics, kind.loss),
        "samples": choose_samples(samples),
        "samples_shown": SAMPLES_SHOWN,
        "card": objective_card(recipe.get("objective") or {}),
        "recipe": recipe_tables(recipe),
        "environment": flatten({key: value for key, value in manifest.items() if key != "recipe"}),
    }


def _optional_object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, as far as training has written them."""
    return [row for _, row in iterate_json_lines(path, skip_unfinished=True)] if path.is_file() else []


def describe_result(result: dict[str, Any]) -> dict[str, Any]:
    """win_rate.json with the sentences and the geometry that the template needs."""
    return {
        **result,
        "samples_phrase": comparison.samples_phrase(result),
        "p_phrase": comparison.p_phrase(result["p_value"]),
        "judge_sentence": comparison.judge_sentence(result),
        "read_interval": comparison.read_interval(result),
        "show_wilson": comparison.needs_wilson(result),
        "verdict": comparison.verdict_sentence(result),
        "unended": comparison.unended_phrase(result),
        "unjudged": comparison.unjudged_phrase(result),
    }


def _last(metrics: curves.Rows, key: str) -> float | None:
    values = curves.series(metrics, key)[1]
    return values[-1] if values else None


def training_brief(metrics: curves.Rows) -> list[tuple[str, str]]:
    """(name, value) of the last logged values, and what they say; metrics that the run lacks are left out."""
    named = (
        ("Last logged step", "step"),
        ("Loss", "loss"),
        ("Steps skipped (loss or gradient not finite)", "skipped_steps"),
        ("Margin", "rewards/margins"),
        ("Accuracy", "rewards/accuracies"),
        ("Log π chosen since step 0", "displacement/chosen"),
        ("Drift from the reference", "kl"),
        ("Tokens per second", "tokens_per_second"),
        ("Padding share", "padding"),
    )
    found = [(name, _last(metrics, key)) for name, key in named]
    numbers = [(name, format_number(value)) for name, value in found if value is not None]
    return [*numbers, *calibration_words(metrics), *entanglement_words(metrics)]


def calibration_words(metrics: curves.Rows) -> list[tuple[str, str]]:
    """(name, value) of the last calibration error, on held-out pairs where they were scored, and its verdict."""
    for prefix, pairs in (("eval_", "held-out"), ("", "training")):
        ece, noise, over = (_last(metrics, f"{prefix}calibration/{key}") for key in ("ece", "noise", "overconfidence"))
        if ece is None or noise is None or over is None:
            continue
        numbers = f"{format_number(ece)}, where chance alone gives {format_number(noise)}"
        return [(f"Calibration error on {pairs} pairs", f"{numbers}: {calibration_verdict(ece, noise, over)}")]
    return []


def calibration_verdict(ece: float, noise: float, over: float) -> str:
    """What the error says, beside what chance gives on average and the signed error; all shares."""
    if ece <= noise:
        return "no more than chance explains"
    if ece <= CLEAR * noise:
        return f"above that, but chance can reach {format_number(CLEAR * noise)}: too little to tell"
    if abs(over) < ece / 2:
        return "over-confident on some pairs, under-confident on others"
    return "over-confident" if over > 0 else "under-confident"


def entanglement_words(metrics: curves.Rows) -> list[tuple[str, str]]:
    """(name, value) of the last probe: how many pairs got which verdict, and their mean cosine."""
    probes = [row for row in metrics if curves.is_number(row.get("entanglement/cosine"))]
    if not probes:
        return []
    counts = {word: probes[-1].get(f"entanglement/{word.replace(' ', '_')}") or 0 for word in VERDICTS}
    said = ", ".join(f"{format_number(count)} {word}" for word, count in counts.items() if count)
    cosine = format_number(probes[-1]["entanglement/cosine"])
    return [("Gradients of the probe pairs, last probe", f"{said}; mean cosine {cosine}")]


def displacement_alarm(metrics: curves.Rows, recipe: Mapping[str, Any]) -> str | None:
    """A warning in words where log π(chosen) fell by more than the recipe's alarm."""
    threshold = (recipe.get("training") or {}).get("displacement_alarm")
    fallen = _last(metrics, "displacement/chosen")
    if threshold is None or fallen is None or fallen > -threshold:
        return None
    return (
        f"The chosen responses' log-probability has fallen by {-fallen:.1f} nats since step 0 (alarm: {threshold:g}). "
        "Margin and accuracy do not show this. Read the sample outputs below; a smaller learning rate, a larger beta, "
        "or an objective that holds chosen up (dpop, rpo) are the usual remedies."
    )


def draw_figures(metrics: curves.Rows, loss: curves.Curve) -> list[dict[str, Any]]:
    """Title, drawing and reading of every curve that the run has; `loss` is that of its kind."""
    from markupsafe import Markup

    start = starting_loss(metrics)
    figures = []
    for curve in (loss, *curves.CURVES[1:]):
        level = (
            (start, f"before the first update: {format_number(start)}")
            if curve.title == "Loss" and start is not None
            else curve.level
        )
        svg = curves.draw(curve, metrics, level)
        if svg is not None:
            figures.append({"title": curve.title, "svg": Markup(svg), "reading": curve.reading})
    return figures


def starting_loss(metrics: curves.Rows) -> float | None:
    """The loss before the first update: that of step 1, which is computed before it. None where it was not logged."""
    return dict(zip(*curves.series(metrics, "loss"), strict=True)).get(1.0)


def choose_samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The prompts with the highest, the median and the lowest change of mean score: chosen by rule, not by eye.

    An oracle gives no scores: then the share of pairs that the model won decides.
    """
    key = "score_change" if any(row.get("score_change") is not None for row in rows) else "win_rate"
    ranked = sorted((row for row in rows if row.get(key) is not None), key=lambda row: -row[key])
    if not ranked:
        return []
    last = len(ranked) - 1
    best, worst = (_signed(ranked[place][key] - (0.5 if key == "win_rate" else 0)) for place in (0, last))
    highest = {1: "largest gain", 0: "no change", -1: "smallest loss"}
    lowest = {1: "smallest gain", 0: "no change", -1: "largest loss"}
    places = {last: lowest[worst], last // 2: "median", 0: highest[best]}
    words = "share won {:.3g}" if key == "win_rate" else "mean score {:+.4g}"
    return [
        {**ranked[place], "place": name, "change": words.format(ranked[place][key])}
        for place, name in sorted(places.items())
    ]


def _signed(value: float) -> int:
    return (value > 0) - (value < 0)


def objective_card(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The objective's card with the values in use, or None where the recipe names no objective that is known here."""
    if not section.get("name"):
        return None
    from alignment.objectives import get_objective, load_plugin

    keys = {key: value for key, value in section.items() if key not in ("name", "file")}
    try:
        if section.get("file"):
            load_plugin(section["file"])
        card = get_objective(section["name"], **keys).card
    except ValueError:  # the user's file has moved, or another version trained: the recipe's values still stand below
        return None
    parameters = [
        {"name": p.name, "value": format_value(keys.get(p.name, p.default)), "range": p.range, "meaning": p.meaning}
        for p in card.hyperparameters
    ]
    return {"card": card, "parameters": parameters}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of a nested mapping."""
    rows = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows += flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, format_value(value))]
    return rows


def recipe_tables(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per section of the resolved recipe; sections that are not set share one."""
    tables = []
    for name, section in recipe.items():
        if section is not None:
            rows = flatten(section) if isinstance(section, Mapping) else [(name, format_value(section))]
            tables.append({"name": name, "rows": rows, "folded": len(rows) > LONG_SECTION})
    unset = [(name, "null") for name, section in recipe.items() if section is None]
    return [*tables, {"name": "not set", "rows": unset, "folded": False}] if unset else tables


def format_number(value: float) -> str:
    """Four significant digits; whole numbers whole, with thousands separated."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_value(value: Any) -> str:
    """A setting as it would stand in YAML, near enough to read."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: python -m evaluation.report RUN_DIR")
    print(write_report(sys.argv[1]))


if __name__ == "__main__":
    run_or_exit(_main)
