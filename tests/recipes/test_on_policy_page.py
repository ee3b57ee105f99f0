"""docs/on_policy.md: its recipes and keys exist and are all there, its examples are recipes, its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment.objectives import list_objectives
from alignment.recipes import load_recipe
from alignment.recipes.rows import HubPromptsSection
from alignment.recipes.sections import AnswerSection, RolloutSection
from alignment.trainers.rollout import Record
from tests.pages import ROOT, blocks, read

TEXT = read("docs/on_policy.md")
BASE = {
    "model": {"name_or_path": "some/model"},
    "training": {"global_batch_size": 8, "learning_rate": 1e-6},
}


def test_every_recipe_of_a_real_model_is_named():
    named = set(re.findall(r"recipes/\w+/[\w.-]+\.yaml", TEXT))
    assert all((ROOT / name).is_file() for name in named)
    real = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*/*.yaml")}
    real = {name for name in real if name.split("/")[1] not in ("accelerate", "games", "quickstart", "replications")}
    kinds = {card.name for card in list_objectives() if card.batch != "pairs"}
    assert {name for name in real if name.split("/")[1] in kinds} | {"recipes/vpo/zephyr-7b-online.yaml"} <= named


def test_every_key_field_and_objective_is_on_the_page():
    words = set(re.findall(r"\w+", TEXT))
    keys = {*RolloutSection.model_fields, *AnswerSection.model_fields, *HubPromptsSection.model_fields}
    keys |= {*Record.__dataclass_fields__}
    keys |= {card.name for card in list_objectives() if card.batch != "pairs"}
    assert keys - {"subset", "chat"} <= words


@pytest.mark.parametrize("block", blocks(TEXT, "yaml"))
def test_every_recipe_example_is_a_recipe(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    example = yaml.safe_load(block)
    chains = "samples" in example["rollout"]
    judged = {} if chains else {"reward": {"name": "vader"}}
    example |= {"objective": {"name": "likelihood" if chains else "p3o"}, **judged}
    Path("r.yaml").write_text(yaml.safe_dump({**BASE, **example}))
    load_recipe("r.yaml")


def test_the_python_example_runs():
    (code,) = blocks(TEXT, "python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
