"""What annotations of a system against a baseline say: AlpacaEval's numbers with intervals, length control, orders.

    python evaluation/win_rate.py --annotations annotations.json --json

Summaries of rows that `annotations` has read, in percent as AlpacaEval has them (win_rate.json of sampled models has
shares); several systems against one baseline are compared in pairs. The program is `win_rate`. No model, no judge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alignment.errors import UserError
from alignment.files import write_json, write_text
from evaluation import annotations as alpaca
from evaluation.annotations import Annotation
from evaluation.comparison import markdown_table
from evaluation.equal_lengths import Difficulty, Fits, described, fit_annotations
from evaluation.estimates import (
    cluster_bootstrap,
    cluster_sums,
    clustered_standard_error,
    compare_paired,
    holm,
    minimal_detectable_difference,
    sign_flip_p_value,
    without_ties,
)
from evaluation.intervals import Interval, effective_count, percentile_interval, readable, too_narrow, wilson_interval
from evaluation.verdicts import LEVEL, NO_DIFFERENCE, TOO_FEW, sentence, verdict
from evaluation.win_rate_page import Entry, around, write_page

Array = NDArray[np.float64]


def summarise(
    rows: Sequence[Annotation],
    *,
    gamed: Sequence[Sequence[Annotation]] = (),
    difficulty: Difficulty | None = None,
    resamples: int = 10_000,
    seed: int = 1,
) -> dict[str, Any]:
    """All numbers of one system against one baseline.

    Args:
        rows: its annotations.
        gamed: annotations of the baseline's own gamed variants, for the regularised length control.
        difficulty: by instruction or row number, for length control.
        resamples: of the bootstrap over instructions.
        seed: of the bootstrap and the permutation test.

    Returns:
        AlpacaEval's keys in percent (`annotations.describe_head2head`, avg_length, length_controlled_winrate,
        lc_standard_error), and ours: `interval` and the rest, in percent, too, but for p-values and counts.

    Raises:
        UserError: no preference counts, or not even every second one, or a row has no difficulty.
    """
    try:
        found = alpaca.describe_head2head([row.preference for row in rows])
    except ValueError:
        raise UserError(
            f"{rows[0].where.rpartition(':')[0]}: no preference between 1 and 2 in {len(rows)} rows"
        ) from None
    dropped = len(rows) - found["n_total"]
    if dropped > found["n_total"]:
        raise UserError(
            f"{rows[0].where.rpartition(':')[0]}: {dropped} of {len(rows)} rows have no preference between 1 and 2; "
            "annotate again with a judge that answers"
        )
    share = alpaca.shares(rows)
    known = ~np.isnan(share)
    x, prompts = share[known], [row.instruction for row, here in zip(rows, known, strict=True) if here]
    rng = np.random.default_rng(seed)
    columns = np.column_stack([x, x > 0.5, x < 0.5])
    draws = cluster_bootstrap(columns, prompts, resamples, rng)
    sums = cluster_sums((x - 0.5)[:, None], prompts)
    error = clustered_standard_error(x, prompts)
    wilson = wilson_interval(float(x.mean()), effective_count(sums[:, 1]), LEVEL)
    _, won, lost, _ = cluster_sums(columns, prompts).T
    loose = without_ties(won, lost, draws[:, 1], draws[:, 2], LEVEL)
    return {
        **found,
        "standard_error": known_points(found["standard_error"] / 100),
        "avg_length": alpaca.average_length([row.output_2 for row in rows]),
        "interval": _in_percent(percentile_interval(float(x.mean()), draws[:, 0], LEVEL)),
        "level": LEVEL,
        "generator_1": rows[0].generator_1,
        "generator_2": rows[0].generator_2,
        "n_dropped": dropped,
        "n_instructions": len(sums),
        "clustered_standard_error": known_points(error),
        "wilson_interval": [100 * wilson.low, 100 * wilson.high],
        "win_rate_ties_dropped": None if loose is None else 100 * loose.estimate,
        "interval_ties_dropped": _in_percent(loose),
        "p_value": sign_flip_p_value(sums[:, 0], resamples, rng),
        "minimal_detectable_difference": detectable_points(error),
        "avg_length_base": alpaca.average_length([row.output_1 for row in rows]),
        **_controlled_fields(rows, gamed, difficulty, found["win_rate"], seed),
        "orders": orders(rows),
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "instruction"},
    }


def known_points(standard_error: float) -> float | None:
    """A standard error of shares in points; None where it is unknown (NaN), or 0 up to rounding as all are alike."""
    return 100 * standard_error if standard_error > 1e-12 else None


def detectable_points(standard_error: float) -> float | None:
    """The minimal detectable difference in points; None where the error is unknown."""
    return None if known_points(standard_error) is None else 100 * minimal_detectable_difference(standard_error)


def _in_percent(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [100 * interval.low, 100 * interval.high]


_CONTROLLED = ("length_controlled_winrate", "lc_standard_error", "length_controlled_interval")


def _controlled_fields(
    rows: Sequence[Annotation],
    gamed: Sequence[Sequence[Annotation]],
    difficulty: Difficulty | None,
    raw: float,
    seed: int,
) -> dict[str, Any]:
    try:
        found = fit_annotations(rows, gamed, difficulty, seed=seed)
    except ValueError as error:
        return {**dict.fromkeys(_CONTROLLED), "length_control": described(None, raw, str(error))}
    if found.says_nothing:
        return {**dict.fromkeys(_CONTROLLED), "length_control": described(found, raw)}
    return {
        "length_controlled_winrate": 100 * found.rate,
        "lc_standard_error": None if found.standard_error is None else 100 * found.standard_error,
        "length_controlled_interval": _in_percent(found.interval),
        "length_control": described(found, raw),
    }


def orders(rows: Sequence[Annotation]) -> dict[str, Any] | None:
    """Position bias, where rows say which text was shown first (`is_switched_outputs`); None where none does.

    Returns:
        `first_preference`: mean share of the text shown first. `pairs_in_both_orders`, and of these `consistency`, the
        share in which both orders prefer the same text or none, and `win_rate_disagreement_tied` (MT-Bench's rule: a
        pair on which the orders disagree is a tie). All in percent; repeated judgements of an order are averaged.
    """
    shown = [row for row in rows if row.switched is not None and not math.isnan(row.share)]
    if not shown:
        return None
    both: dict[tuple[str, str, str], dict[bool, list[float]]] = {}
    for row in shown:
        places = both.setdefault((row.instruction, row.output_1, row.output_2), {})
        places.setdefault(bool(row.switched), []).append(row.share)
    pairs = [tuple(map(np.mean, found.values())) for found in both.values() if len(found) == 2]
    agree = [np.sign(p - 0.5) == np.sign(q - 0.5) for p, q in pairs]
    strict = [(1 + np.sign(p - 0.5)) / 2 if same else 0.5 for (p, q), same in zip(pairs, agree, strict=True)]
    return {
        "first_preference": 100 * float(np.mean([row.share if row.switched else 1 - row.share for row in shown])),
        "pairs_in_both_orders": len(pairs),
        "consistency": 100 * float(np.mean(agree)) if pairs else None,
        "win_rate_disagreement_tied": 100 * float(np.mean(strict)) if pairs else None,
    }


def compare_systems(
    systems: Mapping[str, Sequence[Annotation]],
    *,
    gamed: Sequence[Sequence[Annotation]] = (),
    difficulty: Difficulty | None = None,
    resamples: int = 10_000,
    seed: int = 1,
) -> list[dict[str, Any]]:
    """Every two systems on the instructions that both answered, paired; p-values with Holm's correction over all.

    Args:
        systems: name → its annotations against the common baseline.
        gamed, difficulty: of length control, as of `summarise`.
        resamples, seed: of bootstrap and permutation.

    Returns:
        Rows with the difference first - second in percentage points, and the length-controlled win rate of the first
        over the second in percent (null where one of the two has none).

    Raises:
        UserError: two systems share no judged instruction.
    """
    means = {name: _by_instruction(rows) for name, rows in systems.items()}
    fits = Fits(systems, gamed, difficulty, seed)
    found: list[dict[str, Any]] = []
    pairs = list(itertools.combinations(systems, 2))
    for a, b in tqdm(pairs, desc="comparing", unit=" pairs of systems", disable=None, delay=2):
        common = [prompt for prompt in means[a] if prompt in means[b]]
        if not common:
            raise UserError(f"{a} and {b}: no instruction that both answered and were judged on")
        x, y = ([means[name][prompt] for prompt in common] for name in (a, b))
        paired = compare_paired(x, y, resamples=resamples, seed=seed)
        controlled = fits.between(a, b, frozenset(common))
        found.append(
            {
                "first": a,
                "second": b,
                "difference": 100 * paired.difference.estimate,
                "interval": _in_percent(paired.difference),
                "standard_error": known_points(paired.standard_error),
                "minimal_detectable_difference": detectable_points(paired.standard_error),
                "p_value": paired.p_value,
                "instructions": paired.rows,
                "length_controlled_winrate": None if controlled is None else 100 * controlled.estimate,
                "length_controlled_interval": _in_percent(controlled),
            }
        )
    for row, adjusted in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = float(adjusted)
        low, high = row["interval"]
        said = verdict(row["instructions"], low, high, row["p_holm"], middle=0)
        row["verdict"] = said if said in (NO_DIFFERENCE, TOO_FEW) else "different"
    return found


def _by_instruction(rows: Sequence[Annotation]) -> dict[str, float]:
    """Mean share of each instruction that was judged."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if not math.isnan(row.share):
            groups.setdefault(row.instruction, []).append(row.share)
    return {prompt: float(np.mean(values)) for prompt, values in groups.items()}


def read_gamed(
    paths: Sequence[Path], baseline: str | None = None, compared: Path | None = None
) -> list[list[Annotation]]:
    """Annotations of gamed systems.

    Args:
        paths: a file each.
        baseline: whom they must have been judged against; None: not known.
        compared: the file that says so, for messages.

    Raises:
        UserError: as of `read_annotations`; a file compares several pairs, or is against another baseline.
    """
    found = []
    for path in paths:
        rows = alpaca.read_annotations(path)
        theirs, _ = alpaca.one_pair(rows, path)
        if baseline not in (None, theirs):
            raise UserError(
                f"--gamed {path}: is against {theirs}, and {compared} against {baseline}: the gamed answers are of "
                "that baseline, judged against it"
            )
        found.append(rows)
    return found


def read_systems(files: Sequence[Path]) -> dict[str, list[Annotation]]:
    """Annotations by system, one file each, against one baseline.

    Raises:
        UserError: as of `read_annotations`; a file is given twice or compares several pairs, or the baselines differ.
    """
    if twice := [path for path in files if files.count(path) > 1]:
        raise UserError(f"--annotations {twice[0]}: given twice; a system is compared with others")
    systems: dict[str, list[Annotation]] = {}
    baselines: dict[str, Path] = {}
    for path in files:
        rows = alpaca.read_annotations(path)
        baseline, name = alpaca.one_pair(rows, path)
        baselines.setdefault(baseline, path)
        systems[f"{name} ({path})" if name in systems else name] = rows
    if len(baselines) > 1:
        (one, file), (other, more) = list(baselines.items())[:2]
        raise UserError(f"{file} has the baseline {one}, {more} has {other}; one baseline makes systems comparable")
    return systems


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One system's numbers, each with its name."""
    low, high = _read_interval(result)
    decided, loose = result["win_rate_ties_dropped"], result["interval_ties_dropped"]
    dropped = result["n_dropped"] / (result["n_dropped"] + result["n_total"])
    missing = f"; no preference: {100 * dropped:.1f} % of the rows, left out" if dropped else ""
    found = [
        ("win rate, ties one half", f"{result['win_rate']:.2f} % (95 % interval {low:.2f} to {high:.2f}){missing}"),
        ("verdict", sentence(result["n_instructions"], low, high, result["p_value"], middle=50)),
        ("without ties", "every pair is a tie" if decided is None else _rate(decided, loose)),
    ]
    if too_narrow(result["n_instructions"], result["interval"]):
        bootstrap = "{:.2f} to {:.2f}".format(*result["interval"])
        found.append(("Wilson", f"the interval above is Wilson's; the bootstrap's, {bootstrap}, is too narrow here"))
    found += [
        ("won, tied, lost", f"{_outcomes(result)} of {result['n_total']}; {result['n_dropped']} dropped"),
        ("discrete win rate", f"{result['discrete_win_rate']:.2f} %"),
        (
            "standard error",
            f"{_points(result['standard_error'])}; over {result['n_instructions']} instructions "
            f"{_points(result['clustered_standard_error'])}",
        ),
        ("length-controlled", _controlled(result)),
        ("characters", f"{result['avg_length']} against {result['avg_length_base']}"),
        (
            "different from one half",
            f"p = {result['p_value']:.2g}; detectable at 80 %: {_points(result['minimal_detectable_difference'])}",
        ),
    ]
    if result["orders"] is not None:
        found.append(("orders", _orders_phrase(result["orders"])))
    return found


def _read_interval(result: Mapping[str, Any]) -> tuple[float, float]:
    return readable(result["n_instructions"], result["interval"], result["wilson_interval"])


def describe(result: Mapping[str, Any]) -> str:
    """The same as a Markdown table."""
    table = markdown_table(["", ""], facts(result))
    return f"# {result['generator_2']} against {result['generator_1']}\n\n{table}"


def _orders_phrase(found: Mapping[str, Any]) -> str:
    text = f"the first place gets {found['first_preference']:.1f} %"
    if found["consistency"] is None:
        return text
    return (
        f"{text}; {found['pairs_in_both_orders']} pairs in both orders agree on {found['consistency']:.1f} %, "
        f"disagreement as a tie: {found['win_rate_disagreement_tied']:.2f} %"
    )


def _rate(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} % ({interval[0]:.2f} to {interval[1]:.2f})"


def _over(value: float | None, interval: Sequence[float] | None) -> str:
    return "–" if value is None or interval is None else _rate(value, interval)


def _points(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} points"


def _outcomes(result: Mapping[str, Any]) -> str:
    return f"{result['n_wins']}, {result['n_draws']}, {result['n_wins_base']}"


def _controlled(result: Mapping[str, Any]) -> str:
    control = result["length_control"]
    if result["length_controlled_winrate"] is None:
        return f"no estimate: {control['note']}"
    rate, interval = result["length_controlled_winrate"], result["length_controlled_interval"]
    text = f"{rate:.2f} %" if interval is None else _rate(rate, interval)
    return f"{text}, {control['variant']}{'; ' + control['note'] if control['note'] else ''}"


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the paired comparisons; "no significant difference" in those words."""
    table = [
        [
            f"{row['first']} - {row['second']}",
            f"{row['difference']:+.2f} points",
            "{:+.2f} to {:+.2f}".format(*row["interval"]),
            f"{row['p_holm']:.2g}",
            _over(row["length_controlled_winrate"], row["length_controlled_interval"]),
            row["verdict"],
        ]
        for row in rows
    ]
    return [
        "systems",
        "difference",
        "95 % interval",
        "p, Holm",
        "first over second at equal lengths",
        "verdict",
    ], table


def annotation_result(
    files: Sequence[Path],
    *,
    gamed: Sequence[Path] = (),
    difficulty: Path | None = None,
    resamples: int = 10_000,
    seed: int = 1,
) -> tuple[dict[str, Any], str, dict[str, list[Annotation]]]:
    """Everything that `win_rate.py --annotations` says: its JSON, its text, and the rows by system.

    One file gives one object; several give `systems` and `comparisons`.

    Raises:
        UserError: as of `read_systems` and `summarise`.
    """
    systems = read_systems(files)
    table = None if difficulty is None else alpaca.read_difficulty(difficulty)
    others = read_gamed(gamed, next(iter(systems.values()))[0].generator_1, files[0])
    found = {
        name: summarise(rows, gamed=others, difficulty=table, resamples=resamples, seed=seed)
        for name, rows in tqdm(systems.items(), desc="summarising", unit=" systems", disable=None, delay=2)
    }
    if len(found) == 1:
        (only,) = found.values()
        return only, describe(only), systems
    compared = compare_systems(systems, gamed=others, difficulty=table, resamples=resamples, seed=seed)
    text = "\n\n".join([*(describe(one) for one in found.values()), markdown_table(*comparison_table(compared))])
    return {"systems": found, "comparisons": compared}, text, systems


def write_annotation_result(
    folder: Path, result: dict[str, Any], text: str, systems: Mapping[str, Sequence[Annotation]]
) -> list[Path]:
    """Write leaderboard.csv, win_rate.md, win_rate.html and, at last, win_rate.json."""
    found = result["systems"] if "systems" in result else {next(iter(systems)): result}
    files = [folder / name for name in ("leaderboard.csv", "win_rate.md", "win_rate.html", "win_rate.json")]
    alpaca.write_leaderboard(files[0], found)
    write_text(files[1], text + "\n")
    entries = [_entry(name, one, systems[name]) for name, one in found.items()]
    compared = result.get("comparisons", [])
    write_page(files[2], entries, compared, *comparison_table(compared))
    write_json(files[3], result)
    return files


def _entry(name: str, result: Mapping[str, Any], rows: Sequence[Annotation]) -> Entry:
    low, high = _read_interval(result)
    return Entry(
        name,
        result["generator_1"],
        (low, result["win_rate"], high),
        prompts=result["n_instructions"],
        p_value=result["p_value"],
        controlled=around(result["length_controlled_winrate"], result["length_controlled_interval"]),
        facts=facts(result),
        rows=rows,
    )
