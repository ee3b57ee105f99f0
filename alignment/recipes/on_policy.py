"""Rules of on-policy recipes, those with `data.prompts`: what each objective samples, and what must judge it.

Read by `Recipe` once its sections are checked; every complaint stands at the key that causes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic_core import InitErrorDetails

from alignment.recipes.schema import error
from alignment.recipes.sections import RolloutSection

if TYPE_CHECKING:
    from alignment.objectives.base import Objective
    from alignment.recipes.loading import Recipe

# What an objective on labelled pairs can be given while the policy samples.
_PAIR_NEEDS = {"reference", "length", "calibration", "ref_calibration", "calibration_length", "reward"}
# Objectives whose y and y' come from a sampler of any kind: the loss is a regression on their difference.
_EXPLORING = ("egpo", "online_ipo1", "nash_md")
MIXTURE = ("nash_md", "nash_md_pg")


def on_policy_problems(recipe: Recipe) -> Iterator[InitErrorDetails]:
    """What is wrong with a recipe as an on-policy one; or with an offline one that has on-policy settings."""
    from alignment.objectives import get_objective

    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    if recipe.data.prompts is None:
        if objective.card.batch != "pairs":
            yield error(
                f"{recipe.objective.name!r} learns from samples of the policy being trained: give data.prompts "
                "in place of data.train or data.sample",
                "objective",
                "name",
            )
        for key in _changed(recipe.rollout):
            yield error("belongs to on-policy training, which needs data.prompts", "rollout", key)
        if recipe.generation.replay is not None:
            yield error("belongs to on-policy training, which needs data.prompts", "generation", "replay")
        return
    yield from _judges(recipe, objective)
    yield from _sampling(recipe, objective)
    yield from _idle(recipe, objective)


def _judges(recipe: Recipe, objective: Objective) -> Iterator[InitErrorDetails]:
    name, kind = recipe.objective.name, objective.card.batch
    missing = set(objective.needs) - _PAIR_NEEDS
    if kind == "pairs" and missing:
        yield error(
            f"objective {name!r} reads {', '.join(sorted(missing))}, which on-policy training does not provide",
            "objective",
            "name",
        )
    scores = "reward" in objective.needs
    if scores and recipe.reward is None:
        found = "has an oracle: a preference is no scalar" if recipe.oracle is not None else "has neither"
        yield error(
            f"objective {name!r} learns from rewards, and the recipe {found}; add a reward section", "objective"
        )
    elif kind == "samples" and not scores and recipe.oracle is None:
        found = (
            "has a reward; write oracle: {name: bradley_terry, reward: {...}} around it"
            if recipe.reward is not None
            else "has none"
        )
        yield error(f"objective {name!r} learns from preferences of an oracle, and the recipe {found}", "objective")
    elif kind == "pairs" and recipe.reward is None and recipe.oracle is None:
        yield error("needs a reward or oracle section: something has to label the samples", "data", "prompts")
    if kind == "pairs" and recipe.reward is not None and recipe.oracle is not None:
        yield error("excludes reward: the samples can have one judge; remove one section", "oracle")


def _sampling(recipe: Recipe, objective: Objective) -> Iterator[InitErrorDetails]:
    rollout, name, kind = recipe.rollout, recipe.objective.name, objective.card.batch
    batch = recipe.training.global_batch_size
    if rollout.prompts_per_rollout is not None and rollout.prompts_per_rollout % batch:
        yield error(
            f"must be a multiple of training.global_batch_size, {batch}, got {rollout.prompts_per_rollout}",
            "rollout",
            "prompts_per_rollout",
        )
    if kind == "groups" and rollout.samples == 1:
        yield error("one sample has no leave-one-out baseline: at least 2", "rollout", "samples")
    if kind != "groups" and rollout.samples not in (None, 2):
        yield error(
            f"objective {name!r} compares two samples of a prompt, got {rollout.samples}", "rollout", "samples"
        )
    for key in ("temperature", "top_p", "top_k"):
        if getattr(recipe.generation, key) != type(recipe.generation).model_fields[key].default:
            what = "rollout.explore is for that" if name in _EXPLORING else "its estimates assume them"
            yield error(
                f"on-policy samples are the policy's own, at temperature 1 and whole; {what}", "generation", key
            )
    once = rollout.prompts_per_rollout in (None, batch) and rollout.inner_epochs == 1
    if kind != "pairs" and "behaviour" not in objective.needs and not once:
        key = "inner_epochs" if rollout.inner_epochs != 1 else "prompts_per_rollout"
        message = f"{name} does not correct for samples of an older policy: one rollout is one step"
        yield error(message, "rollout", key)
    if rollout.vllm is not None and ("calibration" in objective.needs or name in MIXTURE):
        yield error(f"vLLM holds the policy alone, and {name} draws from the reference, too", "rollout", "vllm")
    if recipe.generation.max_new_tokens >= recipe.data.max_length:
        yield error(
            f"prompt and response take max_length {recipe.data.max_length} tokens at most, and the response alone may "
            f"take {recipe.generation.max_new_tokens}: lower it, or raise data.max_length",
            "generation",
            "max_new_tokens",
        )


def _idle(recipe: Recipe, objective: Objective) -> Iterator[InitErrorDetails]:
    """Keys that nothing would read."""
    kind = objective.card.batch
    belongs: dict[str, bool] = {
        "explore": recipe.objective.name in _EXPLORING,
        "mixture": recipe.objective.name in MIXTURE,
        "label_noise": kind == "pairs",
        "drift": "calibration" in objective.needs,
        "answer": kind == "groups",
    }
    for key in _changed(recipe.rollout):
        if not belongs.get(key, True):
            meaning = (RolloutSection.model_fields[key].description or "").partition(")")[0].lstrip("(")
            yield error(f"belongs to {meaning}, and the objective is {recipe.objective.name}", "rollout", key)
    if recipe.reference.precompute:
        yield error("samples are new at every step: nothing can be scored before", "reference", "precompute")
    for key in ("group_by_length", "displacement_alarm", "normalized_gradient", "diagnostics"):
        if getattr(recipe.training, key) != type(recipe.training).model_fields[key].default:
            yield error("belongs to training on given pairs, and this recipe has data.prompts", "training", key)
    for key in ("activation_offloading", "dataset_num_proc"):
        if key in (recipe.training.model_extra or {}):
            yield error("TRL's on-policy trainers have no such option", "training", key)


def _changed(section: RolloutSection) -> list[str]:
    """Keys whose values are not the defaults: a resolved recipe writes all keys, and is a recipe, too."""
    plain = RolloutSection()
    return [key for key in sorted(type(section).model_fields) if getattr(section, key) != getattr(plain, key)]


def rollout_settings(recipe: Recipe) -> dict[str, Any]:
    """What `trainers.online.Rollouts` is made of, apart from the samplers and the replay."""
    from alignment.objectives import get_objective

    objective = get_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    section = recipe.rollout
    opponent = None
    if "preference" in objective.needs:
        opponent = section.mixture if recipe.objective.name in MIXTURE else 0.0
    return {
        "per_rollout": section.prompts_per_rollout or recipe.training.global_batch_size,
        "inner_epochs": section.inner_epochs,
        "samples": section.samples or (4 if objective.card.batch == "groups" else 2),
        "opponent": opponent,
        "calibration": "calibration" in objective.needs,
        "look_ahead": recipe.objective.name == "egpo",
        "label_noise": section.label_noise,
        "marker": section.answer.marker,
        "separator": section.answer.separator,
        "drift": section.drift if "calibration" in objective.needs else None,
        "batch": recipe.generation.batch_size,
    }
