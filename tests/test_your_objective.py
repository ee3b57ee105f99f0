"""The example objective of docs/your_objective.md: short, proved, and it trains from its recipe."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.errors import run_or_exit
from alignment.objectives import registry
from alignment.recipes import load_recipe
from alignment.runs.program import main
from tests.e2e.conftest import Grammar, grammar
from tests.pages import blocks, commands, mentioned, read, shell_lines

__all__ = ["grammar"]  # a fixture
TEXTS = {"per_token": read("docs/your_objective.md")}


@pytest.fixture(params=TEXTS)
def example(request, root, tmp_path, monkeypatch) -> Path:
    """A folder with an example under the names that its text gives; what it registers is forgotten afterwards."""
    (python,), (recipe,) = blocks(TEXTS[request.param], "python"), blocks(TEXTS[request.param], "yaml")
    file = re.search(r"^ *file: (\S+)$", recipe, flags=re.MULTILINE)
    assert file is not None and Path(file[1]).stem == request.param
    (tmp_path / file[1]).write_text(python)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return tmp_path / file[1]


def test_it_is_one_short_file_that_passes_its_proofs(example):
    assert len(example.read_text().splitlines()) <= 15
    name = load_recipe("recipe.yaml").objective.name
    shown = ["alignment", "objectives", "check", name, "--file", example.name]
    assert shown in [*commands(shell_lines(TEXTS[name])), *mentioned(TEXTS[name])]
    done = CliRunner().invoke(app, shown[1:])
    assert done.exit_code == 0, done.output
    assert re.search(rf"^ok +{name} ", done.stdout, flags=re.MULTILINE) and "FAIL" not in done.stdout


def test_it_trains_from_its_recipe(example, grammar: Grammar, monkeypatch, capsys):
    given = load_recipe("recipe.yaml").objective.hyperparameters
    overrides = grammar.overrides(example.parent / "run", "training.learning_rate=1e-3")
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe.yaml", *overrides])
    run_or_exit(main)
    assert f"objective {example.stem}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (example.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    # The square is 1 at the start, where the margin is 0.
    assert rows[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert min(row["loss"] for row in rows) < 0.9
    manifest = json.loads((example.parent / "run" / "manifest.json").read_text())
    assert given.items() <= manifest["objective"].items()


def test_the_page_s_needs_are_those_of_the_batch():
    from alignment.objectives.batch import NEEDS

    page = TEXTS["per_token"]
    assert set(NEEDS) - {"degree"} <= set(re.findall(r"`(\w+)`", page))  # degrees are spo's own
