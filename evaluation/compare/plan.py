"""From a compare recipe to the runs that it asks for: arms, tuning points, budgets, and the recipe of every run.

All of it is checked here, without a model, so that a mistake in one objective costs a second. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError

from alignment.data.overlap import asked
from alignment.data.prompt_files import read_prompts
from alignment.errors import nearest
from alignment.files import iterate_json_lines
from alignment.objectives import get_objective, list_objectives, objective_class, own_cards
from alignment.objectives.base import Objective, number_type, reads_reference
from alignment.recipes import IterateRecipe, Origin, Problem, Recipe, RecipeError
from alignment.recipes.checking import problems_of
from alignment.recipes.inspection import what_is_missing
from alignment.rewards.base import Prompt
from evaluation.compare.recipe import CompareRecipe

DIVERGENCES: tuple[dict[str, Any], ...] = (  # what f_dpo stands for among "all"; reverse_kl is dpo
    {"divergence": "jsd"},
    {"divergence": "forward_kl"},
    {"divergence": "alpha", "alpha": 0.5},
)
GIVEN = "pairs.jsonl"  # in the comparison's folder: the rows of data.train that every run trains on
RESAMPLING = {"previous", "preference", "log_odds"}  # a step of its method only on samples of the latest policy


@dataclass(frozen=True)
class Arm:
    """An objective of the comparison.

    Attributes:
        label: in tables and folders.
        name: of the registry; `file` registers it where it is the user's own.
        hyperparameters: those that are given; `over` is set by the tuning point.
        over: the tuned hyper-parameter; None where the objective has no number to tune.
        points: its values, ascending, as many for every arm (one None where there is nothing to tune).
        where: the arm's place in compare.objectives; None for one of "all".
    """

    label: str
    name: str
    file: str | None
    hyperparameters: Mapping[str, Any]
    over: str | None
    points: tuple[float | None, ...]
    where: int | None

    def at(self, value: float | None) -> dict[str, Any]:
        """The hyper-parameters of a tuning point."""
        return {**self.hyperparameters, **({} if self.over is None else {self.over: value})}

    def objective(self, value: float | None) -> Objective:
        """The objective of a tuning point."""
        return get_objective(self.name, **self.at(value))

    @property
    def iterative(self) -> bool:
        """Whether it samples again between its iterations."""
        return bool(RESAMPLING & set(self.objective(self.points[0]).needs))


@dataclass(frozen=True)
class Run:
    """One training run: an arm at a tuning point with a seed."""

    arm: Arm
    value: float | None
    seed: int
    folder: Path
    recipe: Recipe | IterateRecipe

    def __str__(self) -> str:
        return f"{self.arm.label}, {point_name(self.arm, self.value)}, seed {self.seed}"


@dataclass(frozen=True)
class Prompts:
    """The two sets of prompts that measure policies; those of training are in the data."""

    validation: Sequence[Prompt]
    test: Sequence[Prompt]


def point_name(arm: Arm, value: float | None) -> str:
    """`beta-0.1`, for folders and tables."""
    return "default" if arm.over is None else f"{arm.over}-{value:g}"


# --- arms ------------------------------------------------------------------------------------------------------------


def arms_of(recipe: CompareRecipe) -> list[Arm]:
    """The arms, in the order of the recipe.

    Raises:
        RecipeError: a label twice, a baseline that is not there, something that cannot be tuned.
    """
    section = recipe.compare
    given: list[tuple[int | None, str, str | None, dict[str, Any], str | None, str | None]]
    given = [(i, e.name, e.file, e.hyperparameters, e.label, e.over) for i, e in enumerate(section.objectives)]
    given = given or [(None, name, None, keys, None, None) for name, keys in all_that_fit(recipe)[0]]
    found: list[Arm] = []
    for where, name, file, keys, label, over in given:
        if name == "vpo" and keys.get("mode", "offline") == "offline":
            keys = {"calibration": "given", **keys}  # samples of the reference: with chosen answers it is rpo
        label = label or "-".join([name, *(v for k, v in keys.items() if isinstance(v, str) and k != "calibration")])
        try:
            found.append(_arm(recipe, label, name, file, keys, over, where))
            for value in found[-1].points:
                _constructed(found[-1], value)
            if found[-1].iterative and (unfair := against_iterations(recipe)) is not None:
                raise RecipeError([dataclasses.replace(unfair, message=f"{label} samples again: {unfair.message}")])
            if label in [arm.label for arm in found[:-1]]:
                raise ValueError(f"{label!r} is there twice; give one of them a label of its own")
        except ValueError as failed:
            raise _refused(recipe, where, str(failed)) from None
    if section.baseline not in [arm.label for arm in found]:
        labels, known = [arm.label for arm in found], {card.name for card in list_objectives()}
        place = recipe.origin("compare.baseline") or recipe.origin("compare") or Origin(str(recipe.path))
        remedy = "; name one of them" if section.baseline in known else nearest(section.baseline, labels)
        message = f"{section.baseline!r} is none of {', '.join(labels)}{remedy}"
        raise RecipeError([Problem(place, ("compare", "baseline"), message)])
    return found


def _constructed(arm: Arm, value: float | None) -> None:
    """ValueError where the objective refuses a tuning point."""
    try:
        arm.objective(value)
    except ValueError as failed:
        raise ValueError(f"{arm.label} at the tuning point {point_name(arm, value)}: {failed}") from None


def all_that_fit(recipe: CompareRecipe) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """What `objectives: all` is: (name, hyper-parameters) of every objective that trains on pairs under this judge.

    The second list names those left out since they would not have the same data or budget: methods that sample again,
    where `against_iterations` says so; and on given pairs those that read samples of the start or the judge's scores.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    left_out: list[str] = []
    given, fixed = recipe.data.sample is None, against_iterations(recipe) is not None
    for card in own_cards():
        needs = set(card.needs)
        unmet = ("reward" in needs and recipe.reward is None) or (
            bool(needs & {"preference", "log_odds"}) and recipe.oracle is None
        )
        if card.batch != "pairs" or unmet:
            continue
        if (fixed and RESAMPLING & needs) or (given and ("reward" in needs or card.name == "vpo")):
            left_out.append(card.name)
            continue
        variants = DIVERGENCES if card.name == "f_dpo" else ({},)
        found += [(card.name, dict(keys)) for keys in variants]
    return found, left_out


def against_iterations(recipe: CompareRecipe) -> Problem | None:
    """Why a method that samples again between its iterations would not have the others' data or budget here."""
    sample, training = recipe.data.sample, recipe.training
    if sample is None:
        key, why = (
            "data.train",
            "given pairs are not its policy's, nor scored, nor beside samples of the start: use data.sample",
        )
    elif sample.pairs_per_prompt > 1:
        key, why = "data.sample.pairs_per_prompt", "it trains on one pair of a prompt in an iteration: set this to 1"
    elif training.lr_scheduler_type != "constant" or training.warmup_steps:
        key = "training.lr_scheduler_type" if training.lr_scheduler_type != "constant" else "training.warmup_steps"
        why = "the schedule would begin anew in each iteration: set lr_scheduler_type: constant without warm-up"
    else:
        return None
    place = recipe.origin(key) or recipe.origin(key.partition(".")[0]) or Origin(str(recipe.path))
    return Problem(place, tuple(key.split(".")), why)


def left_out_of_all(recipe: CompareRecipe) -> str | None:
    """A line on what `objectives: all` leaves out for its data or schedule; None where that is nothing."""
    names = [] if recipe.compare.objectives else all_that_fit(recipe)[1]
    unfair = against_iterations(recipe)
    return (
        f"left out of all: {', '.join(names)} ({'.'.join(unfair.path)}: {unfair.message})"
        if names and unfair
        else None
    )


def _arm(
    recipe: CompareRecipe,
    label: str,
    name: str,
    file: str | None,
    keys: Mapping[str, Any],
    over: str | None,
    where: int | None,
) -> Arm:
    if objective_class(name).card.batch != "pairs":
        raise ValueError(f"{name!r} samples while it trains, and is no objective of given pairs")
    if not label.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"label {label!r}: letters, digits, - _ . only: it names a folder")
    if label == "start":
        raise ValueError("'start' is the model that training starts from; give another label")
    values = get_objective(name, **keys).hyperparameters
    numbers = tunable(name, keys)
    if over is not None and over not in numbers:
        raise ValueError(f"over: {over!r} is no number of {name}; it has {', '.join(numbers) or 'none'}")
    over = over or ("beta" if "beta" in numbers else next(iter(numbers), None))
    section = recipe.compare
    points: tuple[float | None, ...] = (None,)
    if over is not None:
        points = tuple(grid(float(values[over]), section.tune, section.tuning_factor, numbers[over]))
    return Arm(label, name, file, dict(keys), over, points, where)


def tunable(name: str, keys: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """The objective's real hyper-parameters that have a value, in the card's order, with their bounds."""
    cls = objective_class(name).variant(keys)
    hints, values = get_type_hints(cls), get_objective(name, **keys).hyperparameters
    return {
        field.name: field.metadata["bounds"]
        for field in dataclasses.fields(cls)
        if number_type(hints[field.name]) is float and values[field.name]
    }


def grid(value: float, count: int, factor: float, bounds: Mapping[str, float | None]) -> list[float]:
    """`count` values in geometric steps around `value`, inside `bounds`; four digits each.

    Where the ends would leave the range they are moved to it, and the steps get smaller: there are always as many.

    Args:
        value: the middle (of an even number: between the two in the middle), above 0.
        count: how many.
        factor: from one to the next.
        bounds: gt, ge, lt, le of the hyper-parameter; None for none.
    """
    reach = factor ** ((count - 1) / 2)
    low, high = value / reach, value * reach
    low = max(low, bounds.get("ge") or 0.0, (bounds.get("gt") or 0.0) * (1 + 1e-3))
    if (limit := bounds.get("le")) is not None:
        high = min(high, limit)
    if (limit := bounds.get("lt")) is not None:
        high = min(high, limit * (1 - 1e-3))
    if count == 1:
        return [value]
    steps = [math.exp(math.log(low) + i * math.log(high / low) / (count - 1)) for i in range(count)]
    return [float(f"{step:.4g}") for step in steps]


# --- budget and runs -------------------------------------------------------------------------------------------------


def updates(recipe: CompareRecipe, iterative: bool) -> int:
    """Optimiser steps of every run: training.max_steps, or what num_train_epochs over all pairs make.

    Args:
        recipe: the whole.
        iterative: some arm is: the steps are a multiple of the iterations then (rounded down).

    Raises:
        RecipeError: max_steps is not that multiple, or there are fewer steps than iterations.
    """
    settings, training, parts = recipe.data.sample, recipe.training, recipe.compare.iterations if iterative else 1
    key = "num_train_epochs"
    if training.max_steps > 0:
        key, steps = "max_steps", training.max_steps
    else:
        if settings is None:
            pairs = sum(1 for _ in iterate_json_lines(recipe.folder / GIVEN))
        else:
            pairs = len(read_prompts(settings.prompts, settings.limit)) * settings.pairs_per_prompt
        steps = int(pairs * training.num_train_epochs / training.global_batch_size + 1e-9)
        steps -= steps % parts
    if steps < parts or steps % parts:
        place = recipe.origin(f"training.{key}") or recipe.origin("training") or Origin(str(recipe.path))
        message = f"makes {steps} steps, to be shared out evenly over {parts} iterations (compare.iterations)"
        raise RecipeError([Problem(place, ("training", key), message)])
    return steps


def run_of(recipe: CompareRecipe, arm: Arm, value: float | None, seed: int, steps: int) -> Run:
    """The run of an arm at a tuning point with a seed; its recipe is checked.

    Raises:
        RecipeError: the sections do not fit the objective.
    """
    folder = recipe.folder / "runs" / arm.label / point_name(arm, value) / f"seed-{seed}"
    shared = recipe.model_dump(exclude={"compare", "lora", "reward", "oracle"})
    for name in ("lora", "reward", "oracle"):
        if (section := getattr(recipe, name)) is not None:
            shared[name] = section.model_dump()
    shared["objective"] = {"name": arm.name, **arm.at(value)} | ({"file": arm.file} if arm.file else {})
    if recipe.data.sample is None:
        kept = {key: shared["data"][key] for key in ("max_length", "overlap")}
        shared["data"] = {
            "train": [{"name": str(recipe.folder / GIVEN), "format": "preference", "ties": "soft"}],
            **kept,
        }
    shared["generation"]["seed"] += seed  # the pairs of a seed are the same for every objective
    shared["training"] |= {"output_dir": str(folder), "max_steps": steps, "seed": recipe.training.seed + seed}
    objective = arm.objective(value)
    kind: type[Recipe] | type[IterateRecipe] = Recipe
    if arm.iterative:
        kind, shared = IterateRecipe, _iterated(recipe, objective, shared, steps)
    elif reads_reference(objective):
        shared["reference"] = {"precompute": True}
    try:
        return Run(arm, value, seed, folder, kind.model_validate(shared))
    except ValidationError as failed:
        problem = problems_of(failed, recipe._document, kind)[0]
        raise _refused(recipe, arm.where, f"{arm.label}: {'.'.join(problem.path)}: {problem.message}") from None


def _iterated(recipe: CompareRecipe, objective: Objective, shared: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same prompts, samples and updates, shared out over the iterations."""
    settings = recipe.data.sample
    assert settings is not None  # the schema says so
    data = {key: shared["data"][key] for key in ("max_length", "max_rejected_share", "overlap")}
    whose = "previous" if {"preference", "log_odds"} & set(objective.needs) else "fixed"
    return shared | {
        "reference": whose,
        "data": {"prompts": [{"name": settings.prompts, "limit": settings.limit}], **data},
        "iterate": {
            "iterations": recipe.compare.iterations,
            "samples": settings.samples_per_prompt,
            "pairing": "best_worst",  # as data.sample pairs them
            "unfinished": "keep",  # as data.sample does
            "min_gap": settings.min_gap,
            "label_noise": settings.label_noise,
        },
        "training": shared["training"] | {"max_steps": steps // recipe.compare.iterations},
    }


def _refused(recipe: CompareRecipe, where: int | None, message: str) -> RecipeError:
    path = ("compare", "objectives") + (() if where is None else (where,))
    return RecipeError([Problem(recipe._document.origin(path), tuple(map(str, path)), message)])


def tuning_runs(recipe: CompareRecipe, arms: list[Arm], steps: int) -> Iterator[Run]:
    """Every arm at every tuning point with the seeds that tune."""
    for arm in arms:
        for value in arm.points:
            for seed in recipe.tuning_seeds:
                yield run_of(recipe, arm, value, seed, steps)


def read_all_prompts(recipe: CompareRecipe) -> Prompts:
    """Validation and test prompts; they and data.sample.prompts must be disjoint (of given pairs: `given`).

    Raises:
        RecipeError: a prompt stands in two sets, or a file that the recipe names is missing.
        UserError: a file of prompts cannot be used.
    """
    section, test, sample = recipe.compare, recipe.evaluation, recipe.data.sample
    sections = {name: value for name, value in recipe.resolved().items() if name != "compare"}
    base = Recipe.model_validate(sections | {"objective": {"name": "dpo"}})
    base._document = recipe._document
    if problems := what_is_missing(base):
        raise RecipeError(problems)
    sets = {} if sample is None else {"data.sample.prompts": read_prompts(sample.prompts, sample.limit)}
    sets["evaluation.prompts"] = read_prompts(test.prompts, test.limit)
    if section.validation is not None:
        if not Path(section.validation).is_file():
            place = recipe.origin("compare.validation") or Origin(str(recipe.path))
            raise RecipeError([Problem(place, ("compare", "validation"), f"{section.validation}: no such file")])
        sets["compare.validation"] = read_prompts(section.validation, section.validation_limit)
    seen: dict[str, str] = {}
    for key, prompts in sets.items():
        for prompt in prompts:
            before = seen.setdefault(asked(prompt), key)
            if before != key:
                place = recipe.origin(key) or Origin(str(recipe.path))
                shared = f"{asked(prompt)!r:.60} stands in {before}, too"
                message = f"{shared}: training, validation and test share no prompt"
                raise RecipeError([Problem(place, tuple(key.split(".")), message)])
    return Prompts(sets.get("compare.validation", []), sets["evaluation.prompts"])
