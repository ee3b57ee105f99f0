"""results.json of a comparison: everything that the report shows, from the samples and the runs' own files."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alignment.rewards.base import Prompt
from evaluation.compare import matrix
from evaluation.compare.equivalence import describe_equal, loss_of, same_up_to_tuning
from evaluation.compare.length import length_controlled_rate
from evaluation.compare.measure import Judge, Measured
from evaluation.compare.plan import Arm, Run, point_name
from evaluation.compare.recipe import CompareRecipe
from evaluation.comparison import invalid_answers
from evaluation.experiments import over_seeds

START = "start"
SAME_LOSS, ANOTHER_VALUE = "the same loss", "the same loss, another value"
COSTS = ("training_seconds", "seconds", "peak_memory")


@dataclass(frozen=True)
class Chosen:
    """An arm after tuning.

    Attributes:
        arm: the arm.
        values: the tuning point of each seed.
        tuned: a row per point: value, win_rate over the start on validation prompts, kl there, and how many seeds
            have chosen it.
        runs: those of the chosen points, one a seed.
    """

    arm: Arm
    values: Sequence[float | None]
    tuned: list[dict[str, float | None]]
    runs: list[Run]


def tuned_rows(
    judge: Judge,
    prompts: Sequence[Prompt],
    arm: Arm,
    policies: Mapping[tuple[float | None, int], Measured],
    starts: Any,
) -> list[dict[str, float | None]]:
    """One row per tuning point: its mean win rate over the start, and KL, over the seeds that tune.

    Args:
        judge: of the recipe.
        prompts: of validation.
        arm: whose.
        policies: (value, seed) -> samples.
        starts: seed -> samples of the start.
    """
    rows: list[dict[str, float | None]] = []
    for value in arm.points:
        seeds = [seed for at, seed in policies if at == value]
        won = [float(np.nanmean(judge.shares(prompts, policies[value, s], starts[s]))) for s in seeds]
        kl = [policies[value, s].kl for s in seeds]
        rows.append({"value": value, "win_rate": statistics.fmean(won), "kl": statistics.fmean(kl)})
    return rows


def best_of(rows: Sequence[Mapping[str, float | None]]) -> float | None:
    """The value with the highest win rate; of equals the one nearest to the middle of the grid. A value whose samples
    could not be judged comes last."""
    middle = (len(rows) - 1) / 2

    def won(i: int) -> float:
        rate = rows[i]["win_rate"]
        return -math.inf if rate is None or math.isnan(rate) else rate

    at = max(range(len(rows)), key=lambda i: (won(i), -abs(i - middle), -i))
    return rows[at]["value"]


def choices(
    rows: Mapping[int, Sequence[Mapping[str, float | None]]], seeds: Sequence[int], each: bool
) -> list[float | None]:
    """The tuning point of every seed.

    Args:
        rows: seed that tunes -> its `tuned_rows`.
        seeds: all of them.
        each: whether each chooses for itself; else all take the best of the tuning seeds' mean.
    """
    if each:
        return [best_of(rows[seed]) for seed in seeds]
    means = []
    for points in zip(*rows.values(), strict=True):
        rates = [point["win_rate"] for point in points]
        known = [rate for rate in rates if rate is not None]
        mean = statistics.fmean(known) if len(known) == len(rates) else None
        means.append({"value": points[0]["value"], "win_rate": mean})
    return [best_of(means)] * len(seeds)


def build(
    recipe: CompareRecipe,
    judge: Judge,
    prompts: Sequence[Prompt],
    chosen: Sequence[Chosen],
    policies: Mapping[str, Sequence[Measured]],
    facts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        recipe: the whole.
        judge: of the recipe.
        prompts: Q test prompts.
        chosen: the arms after tuning.
        policies: label (and START) -> samples of each seed.
        facts: label -> `runs.facts_of` of each seed's run.
    """
    names = [*(one.arm.label for one in chosen), START]
    cells = _cells(judge, prompts, names, policies, recipe.evaluation.bootstrap, recipe.evaluation.seed)
    tests = _tests(recipe, chosen, names, cells)
    rows = []
    for i, one in enumerate(chosen):
        label = one.arm.label
        against = [judge.one_to_one(prompts, *both) for both in zip(policies[label], policies[START], strict=True)]
        rows.append(
            {
                **_identity(one),
                "over_start": asdict(_cell(cells, i, len(names) - 1)),
                "length_controlled": length_controlled_rate(policies[label], policies[START], against),
                **_numbers(judge, prompts, policies[label]),
                **{key: facts[label][0][key] for key in ("steps", "batch")},
                "trained_tokens": round(statistics.fmean(fact["trained_tokens"] for fact in facts[label])),
                "pairs": [fact["pairs"] for fact in facts[label]],
                "versus_baseline": tests.get(label),
            }
        )
    grid = [[None if one is None else asdict(one) for one in line] for line in cells]
    base = names.index(recipe.compare.baseline)
    tested = [
        _cell(cells, names.index(label), base) for label, test in tests.items() if test["p_adjusted"] is not None
    ]
    return {
        "recipe": recipe.resolved(),
        "judge": judge.describe(),
        "invalid_answers": invalid_answers(judge.oracle),
        "seeds": list(recipe.seeds),
        "prompts": len(prompts),
        "baseline": recipe.compare.baseline,
        "claims_about": "objectives" if recipe.each_seed_tunes else "settings",
        "objectives": rows,
        "start": _numbers(judge, prompts, policies[START]),
        "matrix": {"names": names, "cells": grid},
        "triples": len(names) * (len(names) - 1) * (len(names) - 2) // 6,
        "cyclic_triples": matrix.cyclic_triples(cells),
        "cyclic_triples_sure": matrix.cyclic_triples(cells, sure=True),
        "detectable": matrix.detectable(tested),
        "detectable_holm": matrix.detectable(tested, matrix.LEVEL / max(1, len(tested))),
        "cost": {label: _cost(each) for label, each in facts.items()},
    }


def _cell(cells: Sequence[Sequence[matrix.Cell | None]], i: int, j: int) -> matrix.Cell:
    found = cells[i][j]
    assert found is not None  # off the diagonal
    return found


def _cells(
    judge: Judge,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    policies: Mapping[str, Sequence[Measured]],
    resamples: int,
    seed: int,
) -> list[list[matrix.Cell | None]]:
    """Row against column; the policies of a seed meet each other."""
    from tqdm import tqdm

    cells: list[list[matrix.Cell | None]] = [[None] * len(names) for _ in names]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    for i, j in tqdm(pairs, desc="judging", unit=" pairs of models"):
        both = zip(policies[names[i]], policies[names[j]], strict=True)
        shares = np.array([judge.shares(prompts, ours, theirs) for ours, theirs in both])
        one = matrix.cell(shares, resamples, seed)
        cells[i][j], cells[j][i] = one, one.swapped
    return cells


def _tests(
    recipe: CompareRecipe,
    chosen: Sequence[Chosen],
    names: Sequence[str],
    cells: Sequence[Sequence[matrix.Cell | None]],
) -> dict[str, dict[str, Any]]:
    """By label: the test against the baseline, Holm-adjusted over all that are another method than it.

    A row that is the baseline up to the tuned value is not tested: which value each got is luck of the tuning.
    """

    def losses(one: Chosen, values: Sequence[float | None]) -> list[Any]:
        return [loss_of(one.arm.name, one.arm.at(value)) for value in values]

    base = names.index(recipe.compare.baseline)
    others = [i for i in range(len(chosen)) if i != base]
    methods = [losses(one, one.arm.points) for one in chosen]
    family = [i for i in others if not same_up_to_tuning(methods[i], methods[base])]
    adjusted = dict(zip(family, matrix.adjusted([_cell(cells, i, base) for i in family]), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for i in others:
        if i in adjusted:
            one, p = _cell(cells, i, base), adjusted[i]
            found[names[i]] = {"p_value": one.claim_p, "p_adjusted": p, "verdict": matrix.verdict(one, p)}
            continue
        equal = losses(chosen[i], chosen[i].values) == losses(chosen[base], chosen[base].values)
        found[names[i]] = {"p_value": None, "p_adjusted": None, "verdict": SAME_LOSS if equal else ANOTHER_VALUE}
    return found


def _identity(one: Chosen) -> dict[str, Any]:
    """What an arm is; a hyper-parameter in which the seeds differ is a list, one value a seed."""
    arm, distinct = one.arm, list(dict.fromkeys(one.values))
    by_seed = [arm.objective(value).hyperparameters for value in one.values]
    shared = {key: [values[key] for values in by_seed] for key in by_seed[0] if by_seed[0][key] is not None}
    equals = [found for value in distinct if (found := describe_equal(arm.name, arm.at(value))) is not None]
    return {
        "label": arm.label,
        "name": arm.name,
        "hyperparameters": {key: each[0] if len(set(each)) == 1 else each for key, each in shared.items()},
        "over": arm.over,
        "value": distinct[0] if len(distinct) == 1 else None,
        "values": list(one.values),
        "point": _point(one),
        "tuned": one.tuned,
        "equals": " / ".join(equals) or None,
        "iterative": arm.iterative,
    }


def _point(one: Chosen) -> str:
    """`beta-0.1`, or `beta: 0.1 x 3, 0.3 x 2` where three and two seeds have chosen so."""
    counts = Counter(one.values)
    if len(counts) == 1:
        return point_name(one.arm, one.values[0])
    return f"{one.arm.over}: " + ", ".join(
        f"{value:g} x {counts[value]}" for value in one.arm.points if value in counts
    )


def _numbers(judge: Judge, prompts: Sequence[Prompt], policies: Sequence[Measured]) -> dict[str, Any]:
    """Numbers of a policy over its seeds, each with mean and interval."""
    values: dict[str, list[float]] = {
        "kl": [one.kl for one in policies],
        "tokens": [float(one.tokens.mean()) for one in policies],
        "finished": [one.finished for one in policies],
        "distinct_1": [one.distinct_1 for one in policies],
        "distinct_2": [one.distinct_2 for one in policies],
    }
    if judge.reward is not None:
        values["reward"] = [float(np.nanmean(judge.scores(prompts, one))) for one in policies]
    moved = [one.displacement for one in policies if one.displacement is not None]
    if moved:
        values["chosen"], values["rejected"] = ([pair[i] for pair in moved] for i in (0, 1))
    return {name: {**over_seeds(each), "by_seed": each} for name, each in values.items()}


def _cost(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean seconds and largest peak over the seeds that were measured; None where none was."""
    known = {key: [fact[key] for fact in facts if fact[key] is not None] for key in COSTS}
    return {
        key: (max if key == "peak_memory" else statistics.fmean)(each) if each else None for key, each in known.items()
    }
