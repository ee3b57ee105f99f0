"""The report of a comparison: report.html (self-contained), report.md, table.csv. No numbers are made here."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.compare.figures import draw_all, ordered_matrix, ranked
from evaluation.compare.matrix import IN_THIS_RUN
from evaluation.compare.results import ANOTHER_VALUE, SAME_LOSS
from evaluation.comparison import markdown_table
from evaluation.pages import render
from evaluation.verdicts import NO_DIFFERENCE, TOO_FEW

Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]

UNAVAILABLE = "not available"
AT_THESE_SETTINGS = " at these settings"


def percent(one: Mapping[str, Any] | None) -> str:
    """`56.1 [53.0, 59.2]`; with `(shrunk)` behind it, or `not available` where there is nothing."""
    if one is None:
        return UNAVAILABLE
    mark = " (shrunk)" if one.get("shrunk") else ""
    return f"{100 * one['rate']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]{mark}"


def over_seeds(one: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`1.23 (1.10 to 1.31)`: mean, and the lowest and highest seed."""
    if one is None or one["mean"] is None:
        return "–"
    return f"{one['mean']:.{digits}f} ({min(one['by_seed']):.{digits}f} to {max(one['by_seed']):.{digits}f})"


def _seeds(rates: Sequence[float]) -> str:
    return f"{100 * min(rates):.1f} to {100 * max(rates):.1f}"


def win_table(result: Row) -> Table:
    """Win rates, tests and what is equivalent, one row an objective, the highest first."""
    base, names = result["baseline"], result["matrix"]["names"]
    head = ["objective", "tuned", "equivalent", "win rate over the start", "seeds", "length-controlled"]
    head += [f"win rate over {base}", "seeds", "Holm p", f"different from {base}{_settings(result)}?"]
    lines = []
    for row in ranked(result):
        against = result["matrix"]["cells"][names.index(row["label"])][names.index(base)]
        test = row["versus_baseline"]
        tested = ["–", "–", "–", "baseline"]
        if test is not None:
            p = "–" if test["p_adjusted"] is None else f"{test['p_adjusted']:.4f}"
            tested = [percent(against), _seeds(against["by_seed"]), p, test["verdict"]]
        over = row["over_start"]
        lines.append(
            [row["label"], row["point"], row["equals"] or "", percent(over), _seeds(over["by_seed"])]
            + [percent(row["length_controlled"]), *tested]
        )
    return head, lines


def policy_table(result: Row) -> Table:
    """What became of the policies."""
    named = {"reward": "reward", "kl": "KL to the start", "chosen": "log π chosen", "rejected": "log π rejected"}
    named |= {"distinct_1": "distinct-1", "distinct_2": "distinct-2", "tokens": "tokens", "finished": "finished"}
    shown = {key: title for key, title in named.items() if any(key in row for row in result["objectives"])}
    digits = {"distinct_1": 4, "distinct_2": 3, "finished": 3, "tokens": 1}
    rows = [*ranked(result), {"label": "start", **result["start"]}]
    lines = [[row["label"], *(over_seeds(row.get(key), digits.get(key, 2)) for key in shown)] for row in rows]
    return ["objective", *shown.values()], lines


def cost_table(result: Row) -> Table:
    """What a run of the chosen point cost, and its budget."""
    head = [
        "objective",
        "pairs",
        "updates x pairs",
        "tokens trained on",
        "seconds training",
        "seconds in all",
        "peak memory",
    ]
    lines = []
    for row in ranked(result):
        cost = result["cost"][row["label"]]
        seconds = "–" if cost["seconds"] is None else f"{cost['seconds']:.1f}"
        peak = "–" if cost["peak_memory"] is None else f"{cost['peak_memory'] / 1e9:.2f} GB"
        pairs = " / ".join(str(count) for count in row["pairs"])
        training = "–" if cost["training_seconds"] is None else f"{cost['training_seconds']:.1f}"
        work = [f"{row['steps']} x {row['batch']}", f"{row['trained_tokens']:,}"]
        lines.append([row["label"], pairs, *work, training, seconds, peak])
    return head, lines


def tuning_table(result: Row) -> Table:
    """Win rate over the start on validation prompts at every tuning point; the chosen one is marked."""
    head, lines = ["objective", "tuned over", "win rate over the start (KL) at each value, validation prompts"], []
    if not any(row["tuned"] for row in result["objectives"]):
        return ["nothing was tuned: one value of each hyper-parameter"], []
    for row in ranked(result):
        points = [_point(point, len(result["seeds"])) for point in row["tuned"]]
        lines.append([row["label"], row["over"] or "nothing", "; ".join(points)])
    return head, lines


def _point(point: Row, seeds: int) -> str:
    value, chosen = "default" if point["value"] is None else f"{point['value']:g}", point["chosen"]
    mark = "" if not chosen else " chosen" if chosen == seeds else f" chosen by {chosen} of {seeds} seeds"
    return f"{value}: {100 * point['win_rate']:.1f} ({point['kl']:.2f}){mark}"


def matrix_table(result: Row) -> Table:
    """Row against column."""
    names, cells = ordered_matrix(result)
    lines = [
        [name, *("–" if one is None else percent(one) for one in line)]
        for name, line in zip(names, cells, strict=True)
    ]
    return ["", *names], lines


def _settings(result: Row) -> str:
    """What every claim says where the noise of tuning is not in its error."""
    return "" if result["claims_about"] == "objectives" else AT_THESE_SETTINGS


def claims(result: Row) -> list[str]:
    """What the tests let one say, in words."""
    base, at, found = result["baseline"], _settings(result), []
    tested = [row for row in ranked(result) if row["versus_baseline"] is not None]
    for said in ("better", "worse", f"better{IN_THIS_RUN}", f"worse{IN_THIS_RUN}"):
        labels = [row["label"] for row in tested if row["versus_baseline"]["verdict"] == said]
        if labels:
            found.append(f"{said} than {base}{at}: {', '.join(labels)}")
    words = {
        NO_DIFFERENCE: f"{NO_DIFFERENCE} from {base}{at}",
        TOO_FEW: f"{TOO_FEW} from {base}{at}",
        SAME_LOSS: f"the same loss as {base}, not tested",
        ANOTHER_VALUE: f"the same loss as {base} at another value, not tested",
    }
    for said, sentence in words.items():
        labels = [row["label"] for row in tested if row["versus_baseline"]["verdict"] == said]
        if labels:
            found.append(f"{sentence}: {', '.join(labels)}")
    return found


def notes(result: Row) -> list[str]:
    """How to read the numbers; every limit that applies to this very report."""
    seeds, found = len(result["seeds"]), []
    found.append(
        f"Judge: {result['judge']}. It judged the training pairs, too: a win says that its taste was learned, not "
        f"that the text is better. {result['prompts']} test prompts; seeds {', '.join(map(str, result['seeds']))}."
    )
    invalid = result.get("invalid_answers")
    if invalid and invalid["invalid"]:
        found.append(
            f"No verdict: {100 * invalid['share']:.1f} % of the judge's {invalid['answers']} answers, counted as ties."
        )
    found.append(
        "Intervals are 95 % over prompts (paired bootstrap, seeds averaged) and hold for these trained models; "
        "'seeds' is the lowest and highest seed."
    )
    if seeds == 1:
        found.append(
            "One seed: what another seed of training would change is unknown; no claim goes beyond these runs."
        )
    else:
        found.append(
            f"p is the largest of three: a permutation test over prompts, a t test over {seeds} seeds, and one with "
            "both errors added. A difference is claimed where it is at most 0.05 after Holm's correction over all "
            "rows, and the interval leaves 50 out."
        )
    found.append(_about(result))
    tests = [row["versus_baseline"] for row in result["objectives"] if row["versus_baseline"] is not None]
    if any(test["p_adjusted"] is not None for test in tests) and result["detectable"] != 0:  # 0: all came out alike
        found.append(
            f"Claimed four times in five, for rows as uncertain as these: {_found(result['detectable'])} in a row "
            f"tested alone, {_found(result['detectable_holm'])} in the first of all rows (Holm). Smaller ones are "
            "easily missed."
        )
    if any((row["length_controlled"] or {}).get("shrunk") for row in result["objectives"]):
        found.append(
            "(shrunk): the penalty of length control left no strength of the policy in over 5 % of the resamples, "
            "whose rate is then exactly 50; it means too little to tell, not equal."
        )
    found.append(
        f"Cyclic triples in the matrix (a beats b, b beats c, c beats a): {result['cyclic_triples']} of "
        f"{result['triples']}; {result['cyclic_triples_sure']} of them with all three intervals clear of 50."
    )
    return found


def _about(result: Row) -> str:
    """What the claims are about, and why."""
    if result["claims_about"] == "objectives":
        return (
            "Each seed chose its own tuning point, so that the noise of that choice is in the spread of the seeds: "
            "claims are about the objectives as they are tuned here."
        )
    if any(row["tuned"] for row in result["objectives"]):
        return (
            "Claims are about these settings, not about the objectives: all seeds share the tuning point, and which "
            "one tuning picks is chance, too, which no p here knows. compare.tuning_seeds=seeds lets each seed choose."
        )
    return "Claims are about these settings, not about the objectives: nothing was tuned."


def _found(difference: float | None) -> str:
    if difference is None:
        return "no difference, however large,"
    return f"a true difference of {100 * difference:.1f} points from 50"


# --- files -----------------------------------------------------------------------------------------------------------


TABLES = (
    ("Win rates, percent", win_table),
    ("The policies (mean; lowest to highest seed)", policy_table),
    ("Cost of one run", cost_table),
    ("Tuning", tuning_table),
    ("Win rate of the row over the column, percent", matrix_table),
)


def as_markdown(result: Row) -> str:
    """report.md."""
    lines = ["# Comparison of objectives", "", *(f"* {claim}" for claim in claims(result)), ""]
    lines += [f"{note}\n" for note in notes(result)]
    for title, table in TABLES:
        head, rows = table(result)
        lines += [f"## {title}", "", markdown_table(head, rows), ""]
    return "\n".join(lines)


def as_csv(result: Row) -> str:
    """table.csv: one row an objective, plain numbers, shares in [0, 1]."""
    out = io.StringIO()
    rows = []
    for row in ranked(result):
        controlled, test = row["length_controlled"] or {}, row["versus_baseline"] or {}
        flat = {key: row[key] for key in ("label", "name", "point", "equals")}
        flat |= {f"over_start_{key}": row["over_start"][key] for key in ("rate", "low", "high", "standard_error")}
        flat |= {f"length_controlled_{key}": controlled.get(key) for key in ("rate", "low", "high")}
        flat |= {f"versus_baseline_{key}": test.get(key) for key in ("p_value", "p_adjusted", "verdict")}
        flat["claims_about"] = result["claims_about"]
        for key in ("reward", "kl", "chosen", "rejected", "distinct_1", "distinct_2", "tokens", "finished"):
            flat[key] = row[key]["mean"] if key in row else None
        flat |= {key: row[key] for key in ("steps", "batch", "trained_tokens")} | result["cost"][row["label"]]
        rows.append(flat)
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_html(result: Row, folder: Path) -> str:
    """report.html, with its figures inside; they are written to FOLDER/figures as PNG, too."""
    return render(
        "compare.html",
        f"{folder.resolve().name}: comparison of objectives",
        draw_all(result, folder / "figures"),
        [(title, *table(result)) for title, table in TABLES],
        claims=claims(result),
        notes=notes(result),
        one_seed=len(result["seeds"]) == 1,
        recipe=result["recipe"],
    )
