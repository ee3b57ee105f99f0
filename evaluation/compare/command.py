"""The order of a comparison: check, tune, choose, train, measure, report. `alignment compare` calls `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import write_text
from alignment.locks import alone, make_folder
from alignment.rewards.base import Prompt
from evaluation.compare import runs as running
from evaluation.compare.given import as_pairs, write_given
from evaluation.compare.plan import (
    Arm,
    Prompts,
    Run,
    arms_of,
    left_out_of_all,
    point_name,
    read_all_prompts,
    run_of,
    tuning_runs,
    updates,
)
from evaluation.compare.recipe import CompareRecipe, load_compare_recipe

SPLIT = {"train.txt": slice(0, 80), "validation.txt": slice(80, 120)}  # of the tiny task's training prompts


def compare(path: Path, overrides: Sequence[str] = ()) -> Path:
    """Carry out what is not there yet, and write the report.

    Args:
        path: a compare recipe.
        overrides: SECTION.KEY=VALUE.

    Returns:
        The folder: report.html, report.md, table.csv, results.json, figures, runs.

    Raises:
        UserError: anything that the user can mend; before any training where it can be known then.
    """
    recipe = load_compare_recipe(path, overrides)
    arms = arms_of(recipe)
    if (line := left_out_of_all(recipe)) is not None:
        print(line, flush=True)
    iterative = any(arm.iterative for arm in arms)
    for arm in arms:  # a mistake in one of them shows before any work
        for value in arm.points:
            run_of(recipe, arm, value, recipe.seeds[0], recipe.compare.iterations)
    folder = recipe.folder
    if (folder / "manifest.json").exists():
        raise UserError(f"training.output_dir: {folder} is a run; give another folder")
    if recipe.compare.task is None:  # else its files of prompts are made below
        read_all_prompts(recipe)
        if recipe.data.sample is not None:
            updates(recipe, iterative)
    make_folder(folder)
    with alone(folder):
        if recipe.compare.task is not None:
            _build_task(recipe.compare.task, folder / recipe.compare.task)
        prompts = read_all_prompts(recipe)
        if recipe.data.train is not None:
            prompts = as_pairs(prompts, write_given(recipe, arms, prompts))
        steps = updates(recipe, iterative)
        every = [run_of(recipe, a, value, seed, steps) for a in arms for value in a.points for seed in recipe.seeds]
        running.refuse_changes(every)
        running.refuse_other_start(recipe)
        result = _carried_out(recipe, arms, prompts, steps)
        _write(result, folder)
    return folder


def _build_task(task: str, folder: Path) -> None:
    """The tiny model, and its training prompts split in two."""
    from evaluation import tiny

    make_folder(folder)
    if not (folder / "model").is_dir():
        print(f"== building the tiny model: {folder / 'model'}", flush=True)
    tiny.build(task, folder)
    lines = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    for name, part in SPLIT.items():
        write_text(folder / name, "".join(f"{line}\n" for line in lines[part]))


def _carried_out(recipe: CompareRecipe, arms: Sequence[Arm], prompts: Prompts, steps: int) -> dict[str, Any]:
    from evaluation.compare.measure import Judge, Measurer
    from evaluation.compare.results import START, build

    tuning = list(tuning_runs(recipe, list(arms), steps)) if recipe.compare.tune > 1 else []
    running.carry_out(tuning, recipe.folder, "tuning")
    measurer = Measurer(recipe, {"validation": prompts.validation, "test": prompts.test})
    judge = Judge(recipe)
    chosen = [_chosen(recipe, arm, judge, measurer, prompts.validation, tuning, steps) for arm in arms]
    final = [run for one in chosen for run in one.runs]
    running.carry_out(final, recipe.folder, "training")
    facts = [(run, running.facts_of(run)) for run in final]
    running.refuse_unequal(facts)
    pairs = {run.seed: running.pairs_files(run)[0] for run, one in facts if one["pairs_sha256"] is not None}
    print("== measuring on test prompts", flush=True)
    policies = {
        one.arm.label: [measurer.policy(run, "test", pairs.get(run.seed)) for run in one.runs] for one in chosen
    }
    policies[START] = [measurer.start(seed, "test") for seed in recipe.seeds]
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for run, one in facts:
        by_label.setdefault(run.arm.label, []).append(one)
    return build(recipe, judge, prompts.test, chosen, policies, by_label)


def _chosen(
    recipe: CompareRecipe,
    arm: Arm,
    judge: Any,
    measurer: Any,
    prompts: Sequence[Prompt],
    tuning: Sequence[Run],
    steps: int,
) -> Any:
    """An arm's best point on validation prompts, of all seeds or of each, and its run of every seed."""
    from evaluation.compare.results import Chosen, choices, tuned_rows

    values, rows = [arm.points[0]] * len(recipe.seeds), []
    own = [run for run in tuning if run.arm.label == arm.label]
    if own:
        starts = {run.seed: measurer.start(run.seed, "validation") for run in own}
        policies = {(run.value, run.seed): measurer.policy(run, "validation") for run in own}
        by_seed = {
            seed: tuned_rows(judge, prompts, arm, {at: one for at, one in policies.items() if at[1] == seed}, starts)
            for seed in recipe.tuning_seeds
        }
        values = choices(by_seed, recipe.seeds, recipe.each_seed_tunes)
        rows = tuned_rows(judge, prompts, arm, policies, starts)
        for row in rows:
            row["chosen"] = values.count(row["value"])
        shown = ", ".join(dict.fromkeys(point_name(arm, value) for value in values))
        print(f"== chosen on validation prompts: {arm.label}, {shown}", flush=True)
    both = zip(values, recipe.seeds, strict=True)
    return Chosen(arm, values, rows, [run_of(recipe, arm, value, seed, steps) for value, seed in both])


def _write(result: Mapping[str, Any], folder: Path) -> None:
    from alignment.files import write_json
    from evaluation.compare.page import as_csv, as_html, as_markdown

    write_json(folder / "results.json", result)
    write_text(folder / "report.md", as_markdown(result))
    write_text(folder / "table.csv", as_csv(result))
    write_text(folder / "report.html", as_html(result, folder))
