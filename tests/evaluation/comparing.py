"""A compare recipe of small files for tests that train nothing."""

from __future__ import annotations

from pathlib import Path

from evaluation.compare.recipe import CompareRecipe, load_compare_recipe

TINY = Path(__file__).resolve().parents[2] / "recipes" / "compare" / "tiny.yaml"


def loaded(files: list[str], *more: str) -> CompareRecipe:
    """The tiny recipe with these files and overrides."""
    return load_compare_recipe(TINY, [*files, *more])
