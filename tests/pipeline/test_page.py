"""docs/iterative.md: its recipes and keys exist and are all there, its example is a recipe."""

from __future__ import annotations

import re

import pytest
import yaml

from alignment.pipeline.driver import stages
from alignment.recipes import IterateRecipe, load_any, load_iterate_recipe
from alignment.recipes.iterate import IterateSection
from tests.pipeline.conftest import QUICKSTART

ROOT = QUICKSTART.parents[2]
TEXT = (ROOT / "docs" / "iterative.md").read_text()


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_iterative_recipe_is_named_and_its_row_is_what_it_says():
    files = [path for path in (ROOT / "recipes").glob("*/*.yaml") if "replications" not in path.parts]
    files = [path for path in files if path.parent.name not in ("accelerate", "compare", "games", "overoptimization")]
    ours = {str(path.relative_to(ROOT)) for path in files if isinstance(load_any(path), IterateRecipe)}
    assert ours <= set(re.findall(r"recipes/\w+/[\w.-]+\.yaml", TEXT)) and len(ours) >= 6
    for name in ours - {"recipes/quickstart/iterate.yaml"}:
        (row,) = [line for line in TEXT.splitlines() if line.startswith("|") and name in line]
        recipe = load_any(name)
        assert f"`{recipe.objective.name}`" in row and f"`{recipe.reference}`" in row
        assert f"pairing: {recipe.iterate.pairing}" in row


def test_every_key_and_stage_is_on_the_page():
    for key, field in IterateSection.model_fields.items():
        (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{key}` |")]
        default = row.split("|")[3].strip()
        assert field.default is None or default.startswith(str(field.default).removesuffix(".0"))
    recipe = load_iterate_recipe(QUICKSTART, ["objective={name: vpo, calibration: given}"])
    assert all(re.search(rf"\b{stage}/", TEXT) for _, stage in stages(recipe))


def test_the_example_is_a_recipe():
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    example = [
        f"{section}={yaml.safe_dump(value, default_flow_style=True)}"
        for section, value in yaml.safe_load(block).items()
    ]
    assert (
        load_iterate_recipe(QUICKSTART, [text.replace("\n...", "").strip() for text in example]).iterate.samples == 8
    )
