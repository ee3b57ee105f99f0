"""`alignment games run`: what it prints and leaves, and one line for every mistake."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.errors import UserError
from alignment.recipes.games import load_games_recipe

RECIPE = """\
claim: A small one
games: {kind: random, arms: 4, count: 2}
settings:
  - {beta: 0.1, learning_rate: 0.05, iterations: 300}
methods:
  - {objective: egpo}
  - {objective: online_ipo1}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_it_prints_the_table_and_leaves_the_files(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["games", "run", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("A small one\n") and "| setting | iterations | egpo | online_ipo1 |" in done.stdout
    folder = tmp_path / "runs" / "games-small"
    assert {path.name for path in folder.iterdir()} == {"figure.svg", "figure.png", "table.md", "table.json"}
    assert "FAILS" not in done.stdout and done.stdout.count("* holds:") == 2


def test_overrides_and_output(file, tmp_path):
    words = ["games", "run", str(file), "games.seed=3", "claim=Another", "settings=[{beta: 0.2, learning_rate: 0.1, "]
    words[-1] += "iterations: 40}]"
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "there")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Another\n") and "| beta 0.2, eta 0.5 | 40 |" in done.stdout
    assert (tmp_path / "there" / "table.md").is_file()


def test_what_theory_says_and_does_not_hold_is_exit_code_1(file, tmp_path, monkeypatch):
    from alignment.games import report

    monkeypatch.setattr(report, "_linear", lambda *_: (False, "said"))
    done = CliRunner().invoke(app, ["games", "run", str(file), "--output", str(tmp_path / "there")])
    assert done.exit_code == 1 and "* FAILS: said" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("beta: 0.1", "beta: 0.0", 4, "settings.0.beta: must be > 0, got 0.0"),
        ("beta: 0.1", "beta: .nan", 4, "settings.0.beta: expected a finite number, got .nan"),
        (
            "objective: egpo",
            "objective: egppo",
            6,
            "methods.0.objective: unknown objective 'egppo'; did you mean 'egpo'?",
        ),
        ("objective: egpo", "objective: likelihood", 6, "'likelihood' reads what the arms of a game do not have"),
        ("objective: egpo", "objective: online_ipo1", 7, "methods.1: 'online_ipo1' is there twice"),
        ("{objective: egpo}", "{objective: egpo, smapler: policy}", 6, "unknown key; did you mean 'sampler'?"),
        ("{objective: egpo}", "{objective: egpo, sampler: all}", 6, "got 'all'"),
        (
            "{objective: egpo}",
            "{objective: egpo, hyperparameters: {bta: 1.0}}",
            6,
            "objective 'egpo' has no hyper-parameter 'bta'; did you mean 'beta'?",
        ),
        ("kind: random", "kind: randon", 2, "got 'randon'; did you mean 'random'?"),
        ("kind: random, arms: 4", "kind: rock_paper_scissors, arms: 4", 2, "has three arms, got 4"),
        ("kind: random", "matrix: [[0.5, 0.7], [0.2, 0.5]]", 2, "P[0, 1] + P[1, 0] must be 1, got 0.9"),
        ("kind: random", "matrix: [[0.5, 0.7], [0.3]]", 2, "games.matrix: the matrix is not square"),
        ("learning_rate: 0.05", "learning_rate: 1.5", 4, "eta beta = 4 lr/4 must be at most 1, got lr 1.5"),
        ("iterations: 300", "iterations: 0", 4, "settings.0.iterations: must be >= 1, got 0"),
        (
            "{objective: online_ipo1}",
            "{objective: inpo}\nsamples: 10",
            7,
            "methods.1: an exact iteration needs a table and exact gradients; write `exact: false`",
        ),
        ("claim: A small one\n", "", None, "claim: required section is missing"),
        ("claim", "clam", 1, "clam: unknown key; did you mean 'claim'?"),
        ("methods:\n  - {objective: egpo}\n  - {objective: online_ipo1}", "methods: []", 5, "at least one is needed"),
    ],
)
def test_mistakes_are_one_line_with_their_place(file, old, new, line, words):
    assert old in RECIPE
    file.write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_games_recipe(file)
    assert "\n" not in str(caught.value)
    place = f"{file}:{line}: " if line else f"{file}: "
    assert any(str(p).startswith(place) and words in str(p) for p in caught.value.problems), str(caught.value)


def test_a_mistake_ends_the_command_with_one_line_and_code_2(file, tmp_path):
    program = [sys.executable, "-c", "from alignment.cli import main; main()", "games", "run", str(file)]
    words = "settings=[{beta: -1.0, learning_rate: 0.1, iterations: 1}]"
    done = subprocess.run([*program, words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: command line: settings.0.beta: must be > 0, got -1.0\n"
    with pytest.raises(UserError, match="smal.yaml: no such recipe file"):
        load_games_recipe(tmp_path / "smal.yaml")


def test_a_folder_that_cannot_be_made(file, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken: cannot be made"):
        from alignment.games.run import run_and_write

        recipe = load_games_recipe(file)
        run_and_write(recipe.claim, recipe.experiment(), tmp_path / "taken")


def test_commands_of_the_page_and_of_recipes_can_be_run(root, monkeypatch):
    """Files and keys exist; every recipe is shown; the page's tables have the rows that egpo.yaml makes."""
    monkeypatch.chdir(root)
    page = (root / "docs" / "games.md").read_text()
    heads = [path.read_text().replace("#   alignment", "alignment") for path in Path("recipes/games").glob("*.yaml")]
    lines = [line for text in (page, *heads) for line in text.splitlines() if line.startswith("alignment games run ")]
    shown = set()
    for line in lines:
        words = shlex.split(line, comments=True)[3:]
        load_games_recipe(words[0], [word for word in words[1:] if "=" in word])
        shown.add(words[0])
    assert shown == {str(path) for path in Path("recipes/games").glob("*.yaml")} and len(lines) >= 8
    recipe = load_games_recipe("recipes/games/egpo.yaml")
    for setting in recipe.settings:
        eta = 4 * setting.learning_rate / (recipe.games.arms * setting.beta)
        for share in (0.1, 0.5, 1):
            assert page.count(f"| beta {setting.beta:g}, eta {eta:.2g} | {setting.iterations * share:.0f} |") == 2


@pytest.mark.parametrize("name", ["egpo", "neural", "rock_paper_scissors", "sampled"])
def test_shipped_recipes_are_read_and_their_heads_show_them(root, name):
    path = root / "recipes" / "games" / f"{name}.yaml"
    load_games_recipe(path)
    assert f"#   alignment games run recipes/games/{name}.yaml" in path.read_text()
    assert {p.stem for p in path.parent.iterdir()} == {"egpo", "neural", "rock_paper_scissors", "sampled"}
