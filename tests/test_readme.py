"""README's promises: its commands run, and its example objective is short, passes its proofs and trains."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.errors import run_or_exit
from alignment.launched import main
from alignment.objectives import registry
from alignment.recipes import load_any, load_recipe
from tests.e2e.conftest import Grammar, grammar

__all__ = ["grammar"]  # a fixture
README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(language: str, program: str) -> list[list[str]]:
    """The words of every line that starts with `program` in a block of `language`; comments are left out."""
    lines = [shlex.split(line, comments=True) for block in blocks(language) for line in block.splitlines()]
    return [words for words in lines if words[:1] == [program]]


COMMANDS = commands("bash", "alignment")
LAUNCHES = commands("sh", "accelerate")


def test_two_commands_come_first(root):
    assert re.findall(r"^make \w+", blocks("bash")[0], flags=re.MULTILINE) == ["make train", "make test"]
    targets = re.findall(r"^(\w[\w-]*):", (root / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"train", "test", "test-all"} <= set(targets)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_shown_commands_run(root, monkeypatch, words):
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


def test_all_groups_of_the_command_are_shown():
    assert {tuple(words[1:3]) for words in COMMANDS} >= {
        ("objectives",),
        ("objectives", "show"),
        ("objectives", "check"),
        ("recipe", "check"),
        ("recipe", "explain"),
        ("recipe", "diff"),
    }


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_shown_launches_name_real_files_and_keys(root, monkeypatch, words):
    monkeypatch.chdir(root)
    at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    assert Path(words[at]).is_file()
    if "--config_file" in words[:at]:
        assert Path(words[words.index("--config_file") + 1]).is_file()
    load_any(words[at + 1], [word for word in words[at + 2 :] if not word.startswith("--")])


def test_files_that_are_linked_exist(root):
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links and all((root / link).exists() for link in links)


@pytest.fixture
def example(root, tmp_path, monkeypatch) -> Path:
    """A folder with README's example under the names that README gives; what it registers is forgotten afterwards."""
    section = README.split("\n## Add an objective\n")[1].split("\n## ")[0]
    (python,), (recipe,) = blocks("python", section), blocks("yaml", section)
    file = re.search(r"^ *file: (\S+)$", recipe, flags=re.MULTILINE)
    assert file is not None
    (tmp_path / file[1]).write_text(python)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return tmp_path / file[1]


def test_the_example_objective_is_one_short_file_that_passes_its_proofs(example):
    assert len(example.read_text().splitlines()) <= 15
    name = load_recipe("recipe.yaml").objective.name
    shown = f"`alignment objectives check {name} --file {example.name}`"
    assert shown in README
    done = CliRunner().invoke(app, shlex.split(shown.strip("`"))[1:])
    assert done.exit_code == 0, done.output
    assert re.search(rf"^ok +{name} ", done.stdout, flags=re.MULTILINE) and "FAIL" not in done.stdout


def test_the_example_objective_trains_from_its_recipe(example, grammar: Grammar, monkeypatch, capsys):
    overrides = grammar.overrides(example.parent / "run", "training.learning_rate=1e-3")
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe.yaml", *overrides])
    run_or_exit(main)
    assert "objective squared_hinge" in capsys.readouterr().out
    rows = [json.loads(line) for line in (example.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    # max(0, 1 - beta m)^2 with m = 0 at the start.
    assert rows[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert min(row["loss"] for row in rows) < 0.9
    assert json.loads((example.parent / "run" / "manifest.json").read_text())["objective"]["beta"] == 0.2
