"""Recipes: one YAML file per method and model, strict at every depth, every error with its file and line.

    from alignment.recipes import load_recipe
    recipe = load_recipe("recipes/quickstart/dpo.yaml", ["training.learning_rate=1e-6"])

Builds nothing from a recipe: models, data and trainers are made by those who read its attributes.
"""

from alignment.recipes.document import Origin, Problem, RecipeError
from alignment.recipes.loading import (
    AnyRecipe,
    EveryRecipe,
    IterateRecipe,
    Recipe,
    RewardModelRecipe,
    SftRecipe,
    load_any,
    load_iterate_recipe,
    load_recipe,
    load_reward_model_recipe,
    load_sft_recipe,
)

__all__ = [
    "AnyRecipe",
    "EveryRecipe",
    "IterateRecipe",
    "Origin",
    "Problem",
    "Recipe",
    "RecipeError",
    "RewardModelRecipe",
    "SftRecipe",
    "load_any",
    "load_iterate_recipe",
    "load_recipe",
    "load_reward_model_recipe",
    "load_sft_recipe",
]
